"""A program as what runs: segments, the steps between two places where threads may branch, wait or be
interleaved."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from ptx.instructions import SPECIAL, Builder, Step, Unknown
from ptx.parse import Instruction, Program, Where


class Fault(Exception):
    """A program did what it must not do.

    `kind` is one of KINDS; `where` the line of Python, `thread` the number of the thread in its block,
    `block` the block's place in the grid, `address` that in the space of the access (or None).
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


@dataclass
class Segment:
    steps: list[Step]
    last: Instruction
    end: str  # "branch", "barrier", "atomic" (which is the last step), or "next"
    guard: tuple[int, bool] | None = None  # of a branch
    targets: tuple[int, ...] = ()  # the segments of a branch
    choice: int = 0  # if they are several, the slot of which it is


@dataclass
class Code:
    builder: Builder
    segments: list[Segment]  # the one after the last is where threads have returned
    written: frozenset[int]  # parameters to whose tensors it may write
    grains: dict[str, int]  # bytes of the narrowest access, by space


ENDS = {"bra": "branch", "bra.uni": "branch", "brx.idx": "branch", "ret": "branch", "bar.sync": "barrier"}


def end_of(instruction: Instruction) -> str:
    """How a segment of which it is the last ends."""
    return "atomic" if instruction.opcode.startswith("atom.") else ENDS.get(instruction.opcode, "next")


def labels_of(instruction: Instruction) -> tuple[str, ...]:
    """Where a branch may go."""
    if instruction.opcode == "brx.idx":
        return instruction.operands[1]
    return instruction.operands if instruction.opcode in ("bra", "bra.uni") else ()


class Effects(NamedTuple):
    reads: set[str]  # registers
    writes: set[str]


def effects(instruction: Instruction) -> Effects:
    targets = 0 if instruction.opcode.split(".")[0] in ("st", "bra", "brx", "bar", "ret", "cp") else 1
    reads = registers(instruction.operands[targets:])
    if instruction.guard:
        reads.add(instruction.guard.lstrip("!"))
    return Effects(reads, registers(instruction.operands[:targets]))


def registers(operands: tuple) -> set[str]:
    names = []
    for operand in operands:
        names += (
            [operand] if isinstance(operand, str) else [name for name in operand if isinstance(name, str)]
        )
    return {name for name in names if name[0] == "%" and name not in SPECIAL}


@cache
def compiled(program: Program) -> Code:
    """Raises Fault for an unknown instruction."""
    builder, instructions = Builder(program), program.instructions
    starts = {0} | {program.labels[label] for one in instructions for label in labels_of(one)}
    starts |= {n + 1 for n, one in enumerate(instructions) if end_of(one) != "next"}
    order = sorted(starts - {len(instructions)})
    number = {start: i for i, start in enumerate(order)} | {len(instructions): len(order)}
    parts = [instructions[a:b] for a, b in zip(order, [*order[1:], len(instructions)], strict=True)]
    targets = []
    for part in parts:
        found = tuple(number[program.labels[label]] for label in labels_of(part[-1]))
        targets.append((len(parts),) if part[-1].opcode == "ret" else found)
    effects_of = {one: effects(one) for one in instructions}
    checked = not_surely_written(parts, targets, effects_of)
    segments = []
    for part, places in zip(parts, targets, strict=True):
        segment = Segment([], part[-1], end_of(part[-1]), targets=places)
        for one in part:
            try:
                step = None if end_of(one) in ("branch", "barrier") else builder.step(one)
                if end_of(one) == "branch":
                    segment.guard = builder.guard(one)
                    if one.opcode == "brx.idx":
                        segment.choice = builder.slot(one.operands[0], "u32")
                elif end_of(one) == "barrier" and (one.operands != ("0",) or one.guard):
                    raise Unknown(one.text)
            except Unknown as unknown:
                raise unknown_instruction(program, one, unknown) from None
            segment.steps += checking(builder, one, step, effects_of[one], checked)
        segments.append(segment)
    return Code(builder, segments, written_parameters(program), grains(instructions))


def unknown_instruction(program: Program, instruction: Instruction, unknown: Unknown) -> Fault:
    detail = f"{unknown}, in {instruction}"
    return Fault("unknown instruction", program.name, instruction.where, None, None, None, detail)


def not_surely_written(
    parts: list[tuple[Instruction, ...]],
    targets: list[tuple[int, ...]],
    effects_of: dict[Instruction, Effects],
) -> set[str]:
    """The registers that some path through the program's segments reads before it writes them for every
    thread; these are checked as the program runs."""
    read_first, written = [], []  # by segment: registers read before they are written, and those written
    for part in parts:
        reads_of_part: set[str] = set()
        writes_of_part: set[str] = set()
        for one in part:
            reads, writes = effects_of[one]
            reads_of_part |= reads - writes_of_part
            if one.guard is None:
                writes_of_part |= writes
        read_first.append(reads_of_part)
        written.append(writes_of_part)
    before = [set().union(*written) for _ in parts]  # written on every path to the segment
    before[0] = set()
    changed = True
    while changed:
        changed = False
        for i, part in enumerate(parts):
            always = part[-1].guard is None and end_of(part[-1]) == "branch"
            after = before[i] | written[i]
            for j in {*targets[i], *([] if always else [i + 1])} - {len(parts)}:
                if not before[j] <= after:
                    before[j] &= after
                    changed = True
    return set().union(*(reads - surely for reads, surely in zip(read_first, before, strict=True)))


def checking(
    builder: Builder, instruction: Instruction, step: Step | None, effects: Effects, checked: set[str]
) -> list[Step]:
    """The step (of a branch none), made to note which threads wrote the registers of `checked`, and to fault
    where a thread reads one that it has not written."""
    reads, writes = (sorted(names & checked) for names in effects)
    if not reads and not writes:
        return [] if step is None else [step]
    guard = builder.guard(instruction)
    of_guard = instruction.guard and instruction.guard.lstrip("!")

    def checked_step(g) -> None:
        everyone = np.ones(g.size, bool)
        running = everyone if g.mask is None else g.mask
        for name in reads:
            # The guard itself is read by all.
            active = g.active(None if name == of_guard else guard)
            missing = (running if active is None else active) & ~g.has_written(name)
            if missing.any():
                thread = g.threads[np.flatnonzero(missing)[0]]
                raise g.fault("never written", instruction, thread, None, f"{name} is read by {instruction}")
        active = g.active(guard) if writes else None
        if step is not None:
            step(g)
        for name in writes:
            g.written[name] = g.has_written(name) | (running if active is None else active)

    return [checked_step]


def written_parameters(program: Program) -> frozenset[int]:
    """The parameters from which the addresses of stores and atomics are made, and maybe some more."""
    origins: dict[str, set[str]] = {parameter.name: {parameter.name} for parameter in program.parameters}
    changed = True
    while changed:
        changed = False
        for instruction in program.instructions:
            name, *rest = instruction.opcode.split(".")
            if name in ("st", "bra", "brx", "bar", "ret", "cp", "atom") or (
                name == "ld" and rest[0] != "param"
            ):
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
