"""Runs a program of PTX: the threads of several blocks at once, as vectors, with a mask where they diverge.

Blocks are taken in an order that depends on the seed, and cut into groups that run in turn, each from one
barrier or atomic to the next. Where whole blocks of a group branch apart, it is split; where threads of a
block do, those that are the farthest behind in the program run, under a mask, until they meet the others.
"""

from typing import Protocol

import numpy as np

from ptx.code import Fault, Segment, compiled
from ptx.instructions import SPECIAL, shared_base
from ptx.memory import Memory
from ptx.parse import Instruction, Program
from ptx.races import Order, Read
from ptx.spaces import Copy, Global, Shared, Space

THREADS = 4096  # of a group: fewer cost as much time in NumPy
RESIDENT = 4  # groups that are begun at a time


class Launch(Protocol):
    """What `run` needs of a launch; a `cuda_stand_in.Record` has it."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes, dynamic
    parameters: tuple[bytes, ...]


class Machine:
    """A launch that is being run."""

    def __init__(self, program: Program, launch: Launch, memory: Memory):
        self.program, self.launch, self.code = program, launch, compiled(program)
        self.threads = int(np.prod(launch.block))
        if self.threads % 32 or self.threads != (program.threads or self.threads):
            raise ValueError(f"a block has {self.threads} threads, the program asks for {program.threads}")
        values = [int.from_bytes(value, "little") for value in launch.parameters]
        sizes = [parameter.size for parameter in program.parameters]
        if [len(value) for value in launch.parameters] != sizes:
            raise ValueError(
                f"the parameters have {list(map(len, launch.parameters))} bytes, declared are {sizes}"
            )
        self.order = Order(int(np.prod(launch.grid)), self.threads)
        grain = self.code.grains["global"]
        self.memory = Global(memory, program, values, self.code.written, self.order, grain)

    def begin(self, blocks: np.ndarray) -> "Group":
        """A group of blocks at the program's first instruction."""
        grain = self.code.grains["shared"]
        shared = Shared(shared_base(self.program), self.launch.shared, blocks, self.order, grain)
        group = Group(self, blocks, {"global": self.memory, "shared": shared})
        registers = [None] * self.code.builder.count()
        for slot, value in self.code.builder.constants.items():
            registers[slot] = value
        threads = np.arange(self.threads, dtype=np.uint32)
        for name, slot in self.code.builder.slots.items():
            if name in SPECIAL:
                what, axis = name.split(".")
                if what == "%tid":
                    value = np.tile(self._place(threads, self.launch.block)["xyz".index(axis)], len(blocks))
                elif what == "%ctaid":
                    value = np.repeat(self._place(blocks, self.launch.grid)["xyz".index(axis)], self.threads)
                else:
                    sizes = self.launch.block if what == "%ntid" else self.launch.grid
                    value = np.full(group.size, sizes["xyz".index(axis)])
                registers[slot] = value.astype(np.uint32)
        group.registers = registers
        return group

    @staticmethod
    def _place(number, shape: tuple[int, int, int]) -> tuple:
        x, y, _ = shape
        return number % x, number // x % y, number // (x * y)

    def fault(self, kind: str, what: Instruction, thread: int, address: int | None, detail: str) -> Fault:
        """By a thread numbered through the grid."""
        block = tuple(int(i) for i in self._place(int(thread) // self.threads, self.launch.grid))
        address = None if address is None else int(address)
        return Fault(kind, self.program.name, what.where, int(thread) % self.threads, block, address, detail)


class Group:
    """Blocks that run together. All its threads are one vector; `mask` says which of them run, None that all
    do."""

    def __init__(self, machine: Machine, blocks: np.ndarray, spaces: dict[str, Space]):
        self.machine, self.blocks, self.spaces = machine, blocks, spaces
        self.size = len(blocks) * machine.threads
        # Numbered through the grid.
        self.threads = (blocks[:, None] * machine.threads + np.arange(machine.threads)).reshape(-1)
        self.parameters = machine.memory.parameters
        self.registers: list = []
        self.written: dict[str, np.ndarray] = {}  # which threads wrote a register, of those that are checked
        self.mask: np.ndarray | None = None
        self.segment = 0  # that runs next
        self.segments: np.ndarray | None = None  # the same by thread, while they are apart
        self.waiting = np.zeros(self.size, bool)  # at the barrier before their segment, while they are apart
        self.barrier = 0  # the time of the last one
        self.shared_reads: list[Read] = []  # since then
        self.copies: list[list[Copy]] = [[]]  # by commit; those of the last list are not committed

    # What steps use

    def full(self, value: np.ndarray) -> np.ndarray:
        """A number a thread, also of a constant."""
        return value if value.shape else np.full(self.size, value)

    def active(self, guard: tuple[int, bool] | None) -> np.ndarray | None:
        """Which threads run an instruction; None: all."""
        if guard is None:
            return self.mask
        slot, negated = guard
        active = ~self.full(self.registers[slot]) if negated else self.full(self.registers[slot])
        if self.mask is not None:
            return active & self.mask
        return None if active.all() else active

    def index(self, guard: tuple[int, bool] | None) -> np.ndarray | None:
        active = self.active(guard)
        return None if active is None else np.flatnonzero(active)

    def taking_part(self, addresses: np.ndarray, index: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The addresses and the threads of an access."""
        return (addresses, self.threads) if index is None else (addresses[index], self.threads[index])

    def merge(self, slot: int, value: np.ndarray, active: np.ndarray | None) -> None:
        """Writes the active threads' entries of `value`, which has one for every thread."""
        if active is not None:
            old = self.registers[slot]
            value = np.where(active, value, value.dtype.type(0) if old is None else old)
        self.registers[slot] = value

    def put(self, slot: int, value: np.ndarray, index: np.ndarray | None) -> None:
        """Writes `value`, which has one for each thread of `index`."""
        if index is not None:
            old = self.registers[slot]
            new = np.zeros(self.size, value.dtype) if old is None else old.copy()
            new[index] = value
            value = new
        self.registers[slot] = value

    def has_written(self, register: str) -> np.ndarray:
        found = self.written.get(register)
        return np.zeros(self.size, bool) if found is None else found

    def fault(self, kind: str, what: Instruction, thread: int, address: int | None, detail: str) -> Fault:
        return self.machine.fault(kind, what, thread, address, detail)

    def whole_warps(self, what: Instruction, guard: tuple[int, bool] | None) -> np.ndarray | None:
        """The threads that run an instruction that all threads of a warp must run together. (A GPU would wait
        for the others. Those farthest behind run first, so they could only come by a loop that these have
        left.)"""
        active = self.active(guard)
        if active is None:
            return None
        warps = active.reshape(-1, 32)
        partly = (warps.any(axis=1) != warps.all(axis=1))[:, None] & ~warps
        if partly.any():
            thread = self.threads[np.flatnonzero(partly.reshape(-1))[0]]
            raise self.fault("barrier", what, thread, None, f"not all threads of the warp are at {what}")
        return np.flatnonzero(active)

    def pass_warp_barrier(self, index: np.ndarray | None) -> None:
        threads = self.threads if index is None else self.threads[index]
        self.machine.order.pass_warp_barrier(np.unique(threads // 32))

    def commit_copies(self, what: Instruction) -> None:
        self._together(what)
        self.copies.append([])

    def wait_copies(self, what: Instruction, left: int) -> None:
        """Until all but the `left` last commits are done."""
        self._together(what)
        while len(self.copies) - 1 > left:
            for copy in self.copies.pop(0):
                self.spaces["shared"].end_copy(what, copy)

    def _together(self, what: Instruction) -> None:
        if self.mask is not None:
            thread = self.threads[np.flatnonzero(~self.mask)[0]]
            raise self.fault(
                "unknown instruction", what, thread, None, f"not by all of a block's threads: {what}"
            )

    # Running

    def run(self) -> list["Group"]:
        """Runs to the next barrier, atomic or end, and returns what is left to run."""
        segments = self.machine.code.segments
        while self.segment < len(segments):
            segment = segments[self.segment]
            for step in segment.steps:
                step(self)
            following = self._following(segment)
            if self.mask is not None:
                self.segments = np.where(self.mask, following, self.segments)
                if segment.end == "barrier":
                    self.waiting |= self.mask
            elif following.shape == ():
                self.segment = int(following)
                if segment.end == "barrier":
                    self._pass_barrier()
                if segment.end in ("barrier", "atomic"):
                    return [self]
                continue
            else:
                by_block = following.reshape(len(self.blocks), -1)
                if (by_block == by_block[:, :1]).all():
                    return self._split(by_block[:, 0])
                self.segments = following
            if not self._choose():
                return self._resolve()
        return []

    def _following(self, segment: Segment) -> np.ndarray:
        """The segment that comes after one, of no shape or, if it is not the same for all, by thread."""
        after = np.asarray(self.segment + 1)
        if not segment.targets:
            return after
        target = np.asarray(segment.targets[0])
        if len(segment.targets) > 1:
            choice = self.full(self.registers[segment.choice])
            wrong = (choice >= len(segment.targets)) & (self.mask if self.mask is not None else True)
            if wrong.any():
                thread = self.threads[np.flatnonzero(wrong)[0]]
                raise self.fault(
                    "out of bounds", segment.last, thread, None, f"no such target: {segment.last}"
                )
            target = np.asarray(segment.targets).take(choice, mode="clip")
        taken = self.active(segment.guard)
        if taken is not None and segment.guard is not None:
            target = np.where(taken, target, after)
        if target.shape and (target == target[0]).all():
            target = target[0]
        return target

    def _split(self, following: np.ndarray) -> list["Group"]:
        """The groups of the blocks that go to each of some segments and have not returned."""
        parts = []
        for segment in np.unique(following[following < len(self.machine.code.segments)]):
            part = self._part(following == segment)
            part.segment = int(segment)
            parts.append(part)
        return parts

    def _choose(self) -> bool:
        """Whether there are threads that do not wait; those of them farthest behind are made to run next."""
        able = ~self.waiting & (self.segments < len(self.machine.code.segments))
        if not able.any():
            return False
        self.segment = int(self.segments[able].min())
        mask = able & (self.segments == self.segment)
        if mask.all():
            self.mask = self.segments = None
        else:
            self.mask = mask
        return True

    def _resolve(self) -> list["Group"]:
        """The groups that go on when every thread waits or has returned."""
        by_block = self.segments.reshape(len(self.blocks), -1)
        waiting = self.waiting.reshape(len(self.blocks), -1)
        # A thread waits at the barrier before its segment. PTX lets warps meet at different barriers of one
        # number; Triton makes no such program, and here it is a fault.
        apart = waiting.any(axis=1)[:, None] & (by_block != by_block.min(axis=1)[:, None])
        if apart.any():
            block, _ = np.argwhere(apart)[0]
            barrier = self.machine.code.segments[by_block[block].min() - 1].last
            thread = self.threads[np.flatnonzero(apart)[0]]
            detail = f"not all threads of the block reach {barrier}"
            raise self.fault("barrier", barrier, thread, None, detail)
        parts = self._split(by_block[:, 0])
        for part in parts:
            part._pass_barrier()
        return parts

    def _pass_barrier(self) -> None:
        self.barrier = self.machine.order.pass_barrier(self.blocks)
        self.shared_reads = []

    def _part(self, blocks: np.ndarray) -> "Group":
        """The group of some of these blocks, at the same place."""
        part = Group(self.machine, self.blocks[blocks], self.spaces)
        keep = np.repeat(blocks, self.machine.threads)
        part.registers = [r if r is None or not r.shape else r[keep] for r in self.registers]
        part.written = {name: written[keep] for name, written in self.written.items()}
        part.segment, part.barrier, part.shared_reads = self.segment, self.barrier, list(self.shared_reads)
        part.copies = [[copy.of(part.threads) for copy in copies] for copies in self.copies]
        return part


def run(program: Program, launch: Launch, memory: Memory, seed: int = 0) -> None:
    """Executes every block of a launch. The blocks' order, and how they are interleaved, depend on `seed`;
    with 0 the groups are as large as they may be, which is fastest.

    Raises:
        Fault: see there.
        ValueError: the launch does not fit the program.
    """
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        machine = Machine(program, launch, memory)
        left = random.permutation(machine.order.blocks)
        most = max(1, THREADS // machine.threads)
        running: list[Group] = []
        while running or left.size:
            if left.size and len(running) < RESIDENT:
                count = most if seed == 0 else int(random.integers(1, min(most, len(left)) + 1))
                running.append(machine.begin(left[:count]))
                left = left[count:]
            group = running.pop(int(random.integers(len(running))))
            running += group.run()
