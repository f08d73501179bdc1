"""Global and shared memory as instructions see them: bounds, alignment, and what races.

An access is of `count` neighbouring numbers of `size` bytes by each of some threads. `addresses` and
`threads` (numbered through the grid) have an entry for each.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptx.memory import FIRST, Memory, Range, real_memory
from ptx.parse import Instruction, Program
from ptx.races import Order, Race, Read, Shadow

if TYPE_CHECKING:
    from ptx.machine import Group

# A pointer has in its upper 16 bits which parameter it was made from, counted from 1: arithmetic on it leaves
# them as they are. The lower 48 are the real address.
TAG, ADDRESS = 48, 2**48 - 1


def differing(rows: np.ndarray, data: np.ndarray) -> int | None:
    """The first entry of a store that stores something else to its row than another."""
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    differs = np.flatnonzero((data != data[first[inverse]]).any(axis=1))
    return int(differs[0]) if differs.size else None


def united(ranges: list[Range]) -> list[tuple[int, int]]:
    """The unions of ranges that overlap."""
    unions: list[tuple[int, int]] = []
    for start, end, _ in sorted(one for one in ranges if one.end):
        if unions and start < unions[-1][1]:
            start, end = unions[-1][0], max(end, unions.pop()[1])
        unions.append((start, end))
    return unions


class Space(ABC):
    must_be_written = False  # before it is read

    def __init__(self, shadow: Shadow, grain: int):
        self.shadow = shadow
        self.grain = grain  # bytes of a place

    @abstractmethod
    def locate(
        self, g: "Group", what: Instruction, addresses: np.ndarray, threads: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows of accesses of `size` bytes in `view`, and the first of each one's places in the shadow,
        None if nothing there is ever written. Raises Fault."""

    @abstractmethod
    def view(self, size: int, count: int) -> np.ndarray:
        """The memory, [rows, count] unsigned integers of `size` bytes."""

    @abstractmethod
    def known(self, g: "Group") -> tuple[int, list[Read]]:
        """Until when all writes are ordered before the group's accesses; the reads that a write of the group
        may race with."""

    def load(
        self, g: "Group", what: Instruction, addresses: np.ndarray, threads: np.ndarray, size: int, count: int
    ) -> np.ndarray:
        """Returns the bits, [threads, count]."""
        rows, first = self.locate(g, what, addresses, threads, size * count)
        if first is not None:
            k = size * count // self.grain
            try:
                self.shadow.read(what, first, k, threads, *self.known(g), self.must_be_written)
            except Race as race:
                raise self._fault(g, what, addresses, threads, first, k, race) from None
        return self.view(size, count).take(rows, axis=0)

    def store(
        self, g: "Group", what: Instruction, addresses: np.ndarray, threads: np.ndarray, data: np.ndarray
    ) -> None:
        """`data` is [threads, count]."""
        size, count = data.itemsize, data.shape[1]
        rows, first = self.locate(g, what, addresses, threads, size * count)
        view = self.view(size, count)
        self._note_write(
            g,
            what,
            addresses,
            threads,
            rows,
            first,
            data,
            unchanged=lambda: (view.take(rows, axis=0) == data).all(1),
        )
        view[rows] = data

    def _note_write(self, g, what, addresses, threads, rows, first, data, **how) -> None:
        assert first is not None, f"{what}: not among the parameters that are stored to"
        k = data.itemsize * data.shape[1] // self.grain
        try:
            lost = self.shadow.write(what, first, k, threads, *self.known(g), **how)
        except Race as race:
            raise self._fault(g, what, addresses, threads, first, k, race) from None
        if lost.size and (i := differing(rows, data)) is not None:
            detail = f"threads store different bits to one place by {what}"
            raise g.fault("race", what, threads[i], addresses[i] & ADDRESS, detail)

    def _fault(self, g, what, addresses, threads, first, k, race: Race) -> Exception:
        here = (threads == race.thread) & (first <= race.place) & (race.place < first + k)
        i = int(np.flatnonzero(here)[0])
        address = (int(addresses[i]) & ADDRESS) + (race.place - int(first[i])) * self.grain
        return g.fault(race.kind, what, race.thread, address, f"{what}: {race}")

    def _check_alignment(self, g, what, addresses, threads, size) -> None:
        if np.bitwise_or.reduce(addresses) & (size - 1):
            i = int(np.flatnonzero(addresses & (size - 1))[0])
            detail = f"not at a multiple of {size} bytes: {what}"
            raise g.fault("misaligned", what, threads[i], addresses[i] & ADDRESS, detail)


class Global(Space):
    """The tensors of a launch. The shadow has the places of those that the program may write."""

    def __init__(
        self,
        memory: Memory,
        program: Program,
        values: list[int],
        written: frozenset[int],
        order: Order,
        grain: int,
    ):
        nothing = Range(0, 0, "no tensor")
        pointers = [parameter.pointer for parameter in program.parameters]
        ranges = [memory.find(v) or nothing if p else nothing for v, p in zip(values, pointers, strict=True)]
        self.names = ["no parameter", *(f"parameter {i}, {one.name}" for i, one in enumerate(ranges))]
        self.starts = np.array([0, *(one.start for one in ranges)])
        self.ends = np.array([0, *(one.end for one in ranges)])
        # What is added to an address made from a parameter to give its byte in the shadow; ranges that
        # overlap have the same. The first 16 bytes are of all that is never written.
        self.shadowed, self.shift = np.zeros(len(values) + 1, bool), np.zeros(len(values) + 1, np.int64)
        size = 16
        for start, end in united(ranges):
            inside = (start <= self.starts) & (self.starts < end)
            if any(inside[i + 1] for i in written):
                self.shadowed |= inside
                self.shift[inside] = size - start // 16 * 16
                size += -(-end // 16) * 16 - start // 16 * 16
        super().__init__(Shadow(order, size // grain), grain)
        self.reads: list[Read] = []
        # As the program is given them.
        self.parameters = np.array(
            [
                v | (i + 1) << TAG if p and v else v
                for i, (v, p) in enumerate(zip(values, pointers, strict=True))
            ],
            np.uint64,
        )

    def locate(self, g, what, addresses, threads, size):
        self._check_alignment(g, what, addresses, threads, size)
        low, high = int(addresses.min()), int(addresses.max())
        tags, real = low >> TAG, addresses & ADDRESS
        if not (
            0 < tags < len(self.starts)
            and self.starts[tags] <= low & ADDRESS
            and high + size <= self.ends[tags] + (tags << TAG)
        ):
            tags = addresses >> TAG
            tags[(tags < 0) | (tags >= len(self.starts))] = 0  # of a number that is no pointer
            outside = (real < self.starts[tags]) | (real + size > self.ends[tags])
            if outside.any():
                i = int(np.flatnonzero(outside)[0])
                t = int(tags[i])
                of = f"{self.names[t]} ({self.starts[t]:#x} to {self.ends[t]:#x})"
                detail = f"{size} bytes outside of {of}: {what}"
                raise g.fault("out of bounds", what, threads[i], real[i], detail)
        first = None
        if self.shadowed[tags].any():
            first = np.where(self.shadowed[tags], real + self.shift[tags], 0) // self.grain
        return (real - FIRST) // size, first

    def view(self, size, count):
        return real_memory(size, count)

    def known(self, g):
        return 0, self.reads

    def atomic_add(self, g, what, addresses, threads, values) -> np.ndarray:
        """Adds each thread's uint32, one after the other; returns what was there before."""
        rows, first = self.locate(g, what, addresses, threads, 4)
        old, view = np.empty(len(rows), np.uint32), self.view(4, 1)
        for i in range(len(rows)):
            one = slice(i, i + 1)
            self._note_write(
                g, what, addresses[one], threads[one], rows[one], first[one], values[one, None], atomic=True
            )
            old[i] = view[rows[i], 0]
            view[rows[i], 0] += values[i]
            self.shadow.order.pass_atomic(int(addresses[i]) & ADDRESS, int(threads[i]))
        return old


class Copy(NamedTuple):
    """A cp.async of some threads that is under way."""

    what: Instruction
    threads: np.ndarray
    rows: np.ndarray
    first: np.ndarray
    data: np.ndarray

    def of(self, threads: np.ndarray) -> "Copy":
        """That of some of the threads."""
        keep = np.isin(self.threads, threads)
        return Copy(self.what, *(array[keep] for array in self[1:]))


class Shared(Space):
    """The shared memory of some blocks, one after the other."""

    must_be_written = True

    def __init__(self, base: int, size: int, blocks: np.ndarray, order: Order, grain: int):
        self.base, self.size, self.threads = base, size, order.threads
        self.stride = -(-size // 16) * 16
        self.offsets = np.zeros(order.blocks, np.int64)
        self.offsets[blocks] = np.arange(len(blocks)) * self.stride
        super().__init__(Shadow(order, len(blocks) * self.stride // grain), grain)
        self.bytes = np.full(len(blocks) * self.stride, 0xFF, np.uint8)  # NaN

    def locate(self, g, what, addresses, threads, size):
        self._check_alignment(g, what, addresses, threads, size)
        offsets = addresses - self.base
        if int(offsets.min()) < 0 or int(offsets.max()) + size > self.size:
            i = int(np.flatnonzero((offsets < 0) | (offsets + size > self.size))[0])
            detail = (
                f"{size} bytes outside of the {self.size} of shared memory from {self.base:#x} on: {what}"
            )
            raise g.fault("out of bounds", what, threads[i], addresses[i], detail)
        offsets = offsets + self.offsets.take(threads // self.threads)
        return offsets // size, offsets // self.grain

    def view(self, size, count):
        return self.bytes.view(f"u{size}").reshape(-1, count)

    def known(self, g):
        return g.barrier, g.shared_reads

    def begin_copy(self, g, what, addresses, threads, data) -> Copy:
        rows, first = self.locate(g, what, addresses, threads, data.itemsize * data.shape[1])
        self._note_write(g, what, addresses, threads, rows, first, data, in_flight=True)
        return Copy(what, threads, rows, first, data)

    def end_copy(self, what: Instruction, copy: Copy) -> None:
        size, count = copy.data.itemsize, copy.data.shape[1]
        self.view(size, count)[copy.rows] = copy.data
        self.shadow.land(what, copy.first, size * count // self.grain)
