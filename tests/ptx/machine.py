"""Runs a program of PTX: the threads of several blocks at once, as vectors, with a mask where they diverge.

Blocks are taken in an order that depends on the seed, and cut into groups that run in turn, each from one barrier or
atomic to the next. Where whole blocks of a group branch apart, it is split; where threads of a block do, those that
are the farthest behind in the program run, under a mask, until they meet the others.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from ptx.instructions import SPECIAL, Builder, Step, Unknown, shared_base
from ptx.memory import Memory
from ptx.parse import Instruction, Program, Where
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


class Fault(Exception):
    """A program did what it must not do.

    `kind` is one of KINDS; `where` the line of Python, `thread` the number of the thread in its block, `block`
    the block's place in the grid, `address` that in the space of the access (or None).
    """

    KINDS = (
        "misaligned",
        "out of bounds",  # of the tensor of the pointer, or of shared memory
        "never written",  # a register or shared memory was read
        "barrier",  # that not all threads reach
        "race",
        "unknown instruction",
    )

    def __init__(
        self,
        kind: str,
        kernel: str,
        where: Where | None,
        thread: int | None,
        block: tuple[int, int, int] | None,
        address: int | None,
        detail: str,
    ):
        assert kind in self.KINDS, kind
        self.kind, self.kernel, self.where = kind, kernel, where
        self.thread, self.block, self.address, self.detail = thread, block, address, detail
        of = "" if thread is None else f", thread {thread} of block {block}"
        at = "" if address is None else f", address {address:#x}"
        super().__init__(f"{kind}: {detail}; kernel {kernel}, {where}{of}{at}")


# A program as segments: steps without branches, barriers or atomics between them.


@dataclass
class Segment:
    first: int  # the number of its first instruction
    steps: list[Step]
    end: str = "next"  # or "branch", "barrier", "atomic" (which is the last step)
    target: int = 0  # the segment of a branch
    guard: tuple[int, bool] | None = None  # of a branch


@dataclass
class Code:
    """A program that can be run."""

    builder: Builder
    segments: list[Segment]  # the one after the last is where threads have returned
    written: frozenset[int]  # parameters to whose tensors it may write
    grains: dict[str, int]  # bytes of the narrowest access, by space


def effects(instruction: Instruction) -> tuple[set[str], set[str]]:
    """The registers that an instruction reads, and those that it writes."""

    def registers(operands) -> set[str]:
        if isinstance(operands, str):
            return {operands} if operands[0] == "%" and operands not in SPECIAL else set()
        return {name for operand in operands if not isinstance(operand, int) for name in registers(operand)}

    name = instruction.opcode.split(".")[0]
    targets = 0 if name in ("st", "bra", "bar", "ret", "cp") else 1
    reads = registers(instruction.operands[targets:])
    if instruction.guard:
        reads.add(instruction.guard.lstrip("!"))
    return reads, registers(instruction.operands[:targets])


@cache
def compiled(program: Program) -> Code:
    """Raises Fault for an unknown instruction."""
    builder, instructions = Builder(program), program.instructions
    targets = {i.operands[0] for i in instructions if i.opcode.split(".")[0] == "bra"}
    starts = {program.labels[name] for name in targets} | {0}
    for n, instruction in enumerate(instructions):
        if instruction.opcode.split(".")[0] in ("bra", "ret", "atom") or instruction.opcode == "bar.sync":
            starts.add(n + 1)
    order = sorted(start for start in starts if start < len(instructions))
    number = {start: i for i, start in enumerate(order)} | {len(instructions): len(order)}
    checked = not_surely_written(
        instructions, order, {name: number[program.labels[name]] for name in targets}
    )
    segments = []
    for first, end in zip(order, [*order[1:], len(instructions)], strict=True):
        segment = Segment(first, [])
        for n in range(first, end):
            instruction = instructions[n]
            name = instruction.opcode.split(".")[0]
            try:
                guard = builder.guard(instruction)
                if instruction.opcode in ("bra", "bra.uni"):
                    segment.end, segment.guard = "branch", guard
                    segment.target = number[program.labels[instruction.operands[0]]]
                elif instruction.opcode == "ret":
                    segment.end, segment.guard, segment.target = "branch", guard, len(order)
                elif instruction.opcode == "bar.sync":
                    if instruction.operands != ("0",) or guard is not None:
                        raise Unknown(str(instruction))
                    segment.end = "barrier"
                else:
                    step = builder.step(instruction)
                    segment.steps.append(checking(builder, instruction, step, checked))
                    if name == "atom":
                        segment.end = "atomic"
            except Unknown as unknown:
                raise unknown_instruction(program, instruction, unknown) from None
        segments.append(segment)
    return Code(builder, segments, written_parameters(program), grains(instructions))


def unknown_instruction(program: Program, instruction: Instruction, unknown: Unknown) -> Fault:
    detail = f"{unknown}, in {instruction}"
    return Fault("unknown instruction", program.name, instruction.where, None, None, None, detail)


def not_surely_written(instructions, order: list[int], targets: dict[str, int]) -> set[str]:
    """The registers that some path through the program reads before it writes all of them; those are checked as
    the program runs."""
    ends = [*order[1:], len(instructions)]
    everything = {name for i in instructions for name in effects(i)[1]}
    surely = [everything for _ in order]  # written, when a segment begins
    surely[0] = set()
    changed, found = True, set()
    while changed:
        changed, found = False, set()
        for segment, (first, end) in enumerate(zip(order, ends, strict=True)):
            written, following = set(surely[segment]), {segment + 1}
            for instruction in instructions[first:end]:
                reads, writes = effects(instruction)
                found |= reads - written
                if instruction.guard is None:
                    written |= writes
                if instruction.opcode in ("bra", "bra.uni", "ret"):
                    following = {segment + 1} if instruction.guard else set()
                    if instruction.opcode != "ret":
                        following.add(targets[instruction.operands[0]])
            for after in following - {len(order)}:
                if not surely[after] <= written:
                    surely[after] = surely[after] & written
                    changed = True
    return found


def checking(builder: Builder, instruction: Instruction, step: Step, checked: set[str]) -> Step:
    """A step that also notes which threads wrote the registers of `checked`, and faults where one reads what it
    has not written."""
    reads, writes = (sorted(names & checked) for names in effects(instruction))
    if not reads and not writes:
        return step
    guard = builder.guard(instruction)

    def checked_step(g: "Group") -> None:
        active = g.active(guard)
        active = np.ones(g.size, bool) if active is None else active
        for name in reads:
            missing = active & ~g.has_written(name)
            if missing.any():
                thread = g.threads[np.flatnonzero(missing)[0]]
                raise g.fault("never written", instruction, thread, None, f"{name} is read by {instruction}")
        step(g)
        for name in writes:
            g.written[name] = g.has_written(name) | active

    return checked_step


def written_parameters(program: Program) -> frozenset[int]:
    """The parameters from which the addresses of stores and atomics are made, and maybe some more."""
    origins: dict[str, set[str]] = {parameter.name: {parameter.name} for parameter in program.parameters}
    changed = True
    while changed:
        changed = False
        for instruction in program.instructions:
            name, *rest = instruction.opcode.split(".")
            if name in ("st", "bra", "bar", "ret", "cp", "atom") or (name == "ld" and rest[0] != "param"):
                continue
            target, *operands = instruction.operands
            found = set()
            for operand in operands:
                found |= origins.get(operand[1] if operand[0] == "[" else operand, set())
            for one in target if isinstance(target, tuple) else [target]:
                if not found <= origins.setdefault(one, set()):
                    origins[one] |= found
                    changed = True
    written = set()
    for instruction in program.instructions:
        if instruction.opcode.startswith(("st.global", "atom.global")):
            place = instruction.operands[1 if instruction.opcode.startswith("atom") else 0]
            written |= origins.get(place[1], set())
    return frozenset(i for i, parameter in enumerate(program.parameters) if parameter.name in written)


def grains(instructions) -> dict[str, int]:
    """Bytes of the narrowest number that is loaded or stored in each space."""
    sizes = {"global": [4], "shared": [4]}
    for instruction in instructions:
        name, *rest = instruction.opcode.replace("::cta", "").split(".")
        if name in ("ld", "st") and rest[0] in sizes:
            sizes[rest[0]].append(int(rest[-1][1:]) // 8)
        elif name == "ldmatrix":
            sizes["shared"].append(2)
    return {space: min(found) for space, found in sizes.items()}


# Threads


class Machine:
    """A launch that is being run."""

    def __init__(self, program: Program, launch: Launch, memory: Memory):
        self.program, self.launch, self.code = program, launch, compiled(program)
        self.threads = int(np.prod(launch.block))
        if self.threads % 32:
            raise ValueError(f"a block of {self.threads} threads, which are not whole warps")
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
    """Blocks that run together. All its threads are one vector; `mask` says which of them run, None that all do."""

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
        """The threads that run an instruction that all threads of a warp must run together."""
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
            unknown = Unknown(f"{what.opcode} of some of a block's threads")
            raise unknown_instruction(self.machine.program, what, unknown)

    # Running

    def run(self) -> list["Group"]:
        """Runs to the next barrier, atomic or end, and returns what is left to run."""
        segments, end = self.machine.code.segments, len(self.machine.code.segments)
        while True:
            if self.segment == end:
                return []
            segment = segments[self.segment]
            for step in segment.steps:
                step(self)
            following = self.segment + 1
            if self.mask is not None:
                self._leave(segment, following)
                apart = self._choose()
                if apart is not None:
                    return apart
            elif segment.end == "branch":
                taken = self.active(segment.guard)
                if taken is None:
                    self.segment = segment.target
                elif not taken.any():
                    self.segment = following
                else:
                    by_block = taken.reshape(len(self.blocks), -1)
                    if (by_block == by_block[:, :1]).all():
                        there, here = self._part(by_block[:, 0]), self._part(~by_block[:, 0])
                        there.segment, here.segment = segment.target, following
                        return [there, here]
                    self.segments = np.where(taken, segment.target, following)
                    self._choose()
            else:
                self.segment = following
                if segment.end == "barrier":
                    self._pass_barrier()
                if segment.end != "next":
                    return [self]

    def _leave(self, segment: Segment, following: int) -> None:
        """Notes where the threads of the mask go after a segment."""
        if segment.end == "branch":
            taken = self.mask if segment.guard is None else self.active(segment.guard)
            self.segments[self.mask] = following
            self.segments[taken] = segment.target
        else:
            self.segments[self.mask] = following
            if segment.end == "barrier":
                self.waiting |= self.mask

    def _choose(self) -> list["Group"] | None:
        """The threads that run next: those farthest behind that do not wait. If none can, the groups that go on,
        else None."""
        end = len(self.machine.code.segments)
        able = ~self.waiting & (self.segments < end)
        if able.any():
            self.segment = int(self.segments[able].min())
            mask = able & (self.segments == self.segment)
            if mask.all():
                self.mask = self.segments = None
            else:
                self.mask = mask
            return None
        parts = []
        by_block = self.segments.reshape(len(self.blocks), -1)
        for where in np.unique(by_block[:, 0]):
            blocks = by_block[:, 0] == where
            apart = (by_block != where) & blocks[:, None]
            if apart.any():
                thread = int(np.flatnonzero(apart.reshape(-1))[0])
                # A thread that has returned is reached by no barrier; else it waits at another one.
                waits = int(by_block[blocks].min()) - 1
                raise self._barrier_fault(waits, thread)
            if where < end:
                part = self._part(blocks)
                part.segment, part.mask, part.segments = int(where), None, None
                part.waiting = np.zeros(part.size, bool)
                part._pass_barrier()
                parts.append(part)
        return parts

    def _barrier_fault(self, segment: int, thread: int) -> Fault:
        segments, instructions = self.machine.code.segments, self.machine.program.instructions
        last = segments[segment + 1].first - 1 if segment + 1 < len(segments) else len(instructions) - 1
        what = instructions[last]
        return self.fault(
            "barrier", what, self.threads[thread], None, f"not all threads of the block reach {what}"
        )

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
    """Executes every block of a launch. The blocks' order, and how they are interleaved, depend on `seed`.

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
                count = int(random.integers(-(-most // 2), most + 1))
                running.append(machine.begin(left[:count]))
                left = left[count:]
            group = running.pop(int(random.integers(len(running))))
            running += group.run()
