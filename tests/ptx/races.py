"""Which accesses of memory are ordered. A race is two accesses of one place by different threads, one of them
writing, neither ordered after the other.

These order, and nothing else does:

- a thread's own program;
- `bar.sync`, within a block: all before it comes before all after it, in shared and in global memory;
- `bar.warp.sync`, within a warp. Since Volta the threads of a warp do not run in step: neither a shuffle nor
  that they execute an instruction together orders what they access;
- an atomic with acquire and release, between blocks. It releases the thread's own accesses and, because a
  barrier is cumulative, those of its block before the block's last `bar.sync`. It acquires what the atomics
  before it at that address released, for the thread's block from its next `bar.sync` on. So `last_program`
  (kernels/triton/launch.py) needs a barrier before the atomic, else it does not release what other threads
  stored, and one after it before other programs' sums are read. Atomics do not race with each other.

Threads may write equal bits to one place: Triton stores a number that several threads hold from each of them.
If the bits differ it is a race, also by one instruction, because PTX does not say which are kept.

`cp.async` writes at some time between its issue and the end of the `cp.async.wait_group` that waits for it.
Any access between is a race, also of the thread itself; afterwards it is as if the thread had written then.

Blocks run in some order, but whether accesses race does not depend on it, only on what ordered them.

Time is a number that grows with every access. Threads are numbered through the grid.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

IN_FLIGHT = 2**31 - 1  # the time of an asynchronous write that has not been waited for


class Race(Exception):
    """An access of `place` by `thread` races with another thread's access, or reads what was never written
    (`kind`)."""

    def __init__(self, thread: int, place: int, text: str, kind: str = "race"):
        super().__init__(text)
        self.thread, self.place, self.kind = int(thread), int(place), kind


class Release(NamedTuple):
    """What an atomic has seen, by block: what was accessed up to time `barrier`, and by `thread` up to
    `time`."""

    barrier: np.ndarray
    thread: np.ndarray
    time: np.ndarray

    def join(self, other: "Release") -> "Release":
        later = other.time > self.time
        return Release(
            np.maximum(self.barrier, other.barrier),
            np.where(later, other.thread, self.thread),
            np.where(later, other.time, self.time),
        )


class Order:
    """What is ordered, as it happens."""

    def __init__(self, blocks: int, threads: int):
        self.blocks, self.threads = blocks, threads
        self.history: list[object] = []  # what happened at each time, from 1 on
        self.barrier = np.zeros(blocks, np.int64)  # the time of the block's last bar.sync
        self.warp = np.zeros(blocks * threads // 32, np.int64)  # of the warp's last bar.warp.sync
        self.released: dict[int, Release] = {}  # by address
        self.pending: dict[int, Release] = {}  # by block: acquired, before the block's barrier
        self.acquired: dict[int, Release] = {}

    @property
    def now(self) -> int:
        return len(self.history)

    def tick(self, what: object = "a barrier") -> int:
        self.history.append(what)
        return len(self.history)

    def describe(self, thread: int, time: int) -> str:
        """An access, in words."""
        by = f"thread {thread % self.threads} of block number {thread // self.threads}"
        if time == IN_FLIGHT:
            return f"{by}, a cp.async that has not been waited for"
        return f"{by}, {self.history[time - 1]}"

    def pass_barrier(self, blocks: np.ndarray) -> int:
        """Of whole blocks; returns its time."""
        now = self.tick()
        self.barrier[blocks] = now
        for block in self.pending.keys() & set(blocks.tolist()):
            self.acquired[block] = self.pending.pop(block)
        return now

    def pass_warp_barrier(self, warps: np.ndarray) -> None:
        self.warp[warps] = self.tick()

    def pass_atomic(self, address: int, thread: int) -> None:
        """An atomic with acquire and release."""
        block = thread // self.threads
        nothing = Release(*(np.zeros(self.blocks, np.int64) for _ in range(3)))
        known = self.pending.get(block) or self.acquired.get(block) or nothing
        own = Release(*(np.zeros(self.blocks, np.int64) for _ in range(3)))
        own.barrier[block], own.thread[block], own.time[block] = self.barrier[block], thread, self.now
        here = self.released.get(address, nothing)
        self.pending[block] = known.join(here)
        # Cumulative: with its own it releases what the block had acquired before its last barrier.
        before = self.acquired.get(block, nothing)
        self.released[address] = here.join(before).join(own)

    def ordered(self, earlier: np.ndarray, time: np.ndarray, later: np.ndarray) -> np.ndarray:
        """Whether accesses by threads `earlier` at `time` are ordered before accesses now by threads
        `later`; arrays of one shape."""
        block, own_block = earlier // self.threads, later // self.threads
        result = (earlier == later) | ((block == own_block) & (time <= self.barrier[own_block]))
        result |= (earlier // 32 == later // 32) & (time <= self.warp[later // 32])
        for i in np.unique(own_block[~result]):
            if known := self.acquired.get(int(i)):
                theirs = time <= known.barrier[block]
                theirs |= (earlier == known.thread[block]) & (time <= known.time[block])
                result |= theirs & (own_block == i) & (block != i)
        return result & (time != IN_FLIGHT)


class Read(NamedTuple):
    """Reads that a write may race with."""

    first: np.ndarray
    k: int
    threads: np.ndarray
    time: int
    low: int  # of the places
    high: int


class Shadow:
    """Who last wrote each of `count` places (of a few bytes each).

    An access is of rows of k neighbouring places, the first of row i being first[i], a multiple of k, by
    thread threads[i]. What was written up to time `safe` is known to be ordered before it. `reads` are those
    that a write has to be compared with; a read is added to them.

    The methods raise Race.
    """

    def __init__(self, order: Order, count: int):
        self.order = order
        self.time = np.zeros(count, np.int32)  # of the last write; 0: never written
        self.writer = np.zeros(count, np.int32)  # its thread t; of an atomic -1 - t

    def read(
        self,
        what: object,
        first: np.ndarray,
        k: int,
        threads: np.ndarray,
        safe: int,
        reads: list[Read],
        must_be_written: bool = False,
    ) -> None:
        now = self.order.tick(what)
        times = self.time.reshape(-1, k).take(first // k, axis=0)
        if must_be_written and not times.all():
            row, place = (int(found[0]) for found in np.nonzero(times == 0))
            raise Race(threads[row], first[row] + place, "nothing was written there", "never written")
        self._compare(times, first, k, threads, safe)
        reads.append(Read(first, k, threads, now, int(first.min()), int(first.max()) + k))

    def write(
        self,
        what: object,
        first: np.ndarray,
        k: int,
        threads: np.ndarray,
        safe: int,
        reads: list[Read],
        unchanged: Callable[[], np.ndarray] | None = None,  # in which rows the bits are those that are there
        atomic: bool = False,
        in_flight: bool = False,
    ) -> np.ndarray:
        """Returns the rows to some of whose places another thread's row is written, too."""
        now = self.order.tick(what)
        rows, times, writers = first // k, self.time.reshape(-1, k), self.writer.reshape(-1, k)
        self._compare(times.take(rows, axis=0), first, k, threads, safe, unchanged, atomic)
        times[rows] = now
        writers[rows] = threads[:, None]
        lost = (writers.take(rows, axis=0) != threads[:, None]).any(axis=1)
        low, high = int(first.min()), int(first.max()) + k
        for read in reads:
            if read.low < high and low < read.high:
                self._compare_read(read, now)
        if in_flight:
            times[rows] = IN_FLIGHT
        if atomic:
            writers[rows] = -1 - threads[:, None]
        return np.flatnonzero(lost)

    def land(self, what: object, first: np.ndarray, k: int) -> None:
        """Writes that were in flight are done."""
        self.time.reshape(-1, k)[first // k] = self.order.tick(what)

    def _compare(self, times, first, k, threads, safe, unchanged=None, atomic=False) -> None:
        """With the last writes, which were at `times`."""
        row, place = np.nonzero(times > safe)
        if not row.size:
            return
        times = times[row, place]
        writers = self.writer.reshape(-1, k)[first[row] // k, place]
        was_atomic = writers < 0
        writers = np.where(was_atomic, -1 - writers, writers)
        bad = ~self.order.ordered(writers, times, threads[row])
        if atomic:
            bad &= ~was_atomic
        if unchanged is not None and bad.any():
            bad &= ~unchanged()[row] | (times == IN_FLIGHT)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            by = self.order.describe(int(writers[i]), int(times[i]))
            raise Race(threads[row[i]], first[row[i]] + place[i], f"not ordered after the write by {by}")

    def _compare_read(self, read: Read, now: int) -> None:
        """With what was written now."""
        row, place = np.nonzero(self.time.reshape(-1, read.k).take(read.first // read.k, axis=0) == now)
        if not row.size:
            return
        readers, writers = (
            read.threads[row],
            self.writer.reshape(-1, read.k)[read.first[row] // read.k, place],
        )
        bad = ~self.order.ordered(readers, np.full(readers.shape, read.time), writers)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            by = self.order.describe(int(readers[i]), read.time)
            raise Race(writers[i], read.first[row[i]] + place[i], f"not ordered after the read by {by}")
