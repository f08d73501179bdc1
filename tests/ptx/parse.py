"""PTX as data: the instructions of the one kernel of a text, with the lines of Python that they come from."""

import re
from dataclasses import dataclass
from typing import NamedTuple


class Where(NamedTuple):
    """A line of Python; of a device function, with the line that calls it."""

    file: str
    line: int
    caller: "Where | None" = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" called at {self.caller}" if self.caller else "")


class Instruction(NamedTuple):
    """`@guard opcode operands;`. An operand is a register ("%r1"), a number or a name as it is written; an
    address is ("[", base, offset), a vector a tuple of operands, a table of branches a tuple of labels."""

    opcode: str
    operands: tuple
    guard: str | None  # "%p1" or "!%p1"
    text: str
    line: int  # of the PTX
    where: Where | None

    def __str__(self) -> str:
        return f"{self.text} (line {self.line} of the PTX)"


class Parameter(NamedTuple):
    name: str
    size: int  # bytes
    pointer: bool  # to global memory


@dataclass(frozen=True, eq=False)
class Program:
    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # the number of the instruction that follows
    parameters: tuple[Parameter, ...]
    registers: dict[str, int]  # bits of each declared prefix, "%rd": 64; of predicates 1
    shared: dict[str, int]  # alignment of the dynamic shared memory, by its name
    threads: int | None  # that a block must have


ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{")
PARAMETER = re.compile(r"\.param\s+\.[a-z](\d+)\s*(\.ptr\s+\.global)?[^,]*?(\w+)\s*$")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[\]")
THREADS = re.compile(r"\.reqntid\s+(\d+)\s*$")
REGISTERS = re.compile(r"\.reg\s+\.([a-z]+)(\d*)\s+(%\w+)<\d+>")
LOC = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:\s*,\s*function_name[^,]*,\s*inlined_at\s+(\d+)\s+(\d+)\s+\d+)?"
)
LABEL = re.compile(r"(\$\w+):")
BRANCHES = re.compile(r"\.branchtargets\s+(.*)", re.S)
OPERATION = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)


def parse(ptx: str) -> Program:
    """The program of a text with one kernel, as Triton writes it.

    Raises:
        ValueError: the text has something that this does not know.
    """
    entry = ENTRY.search(ptx)
    if entry is None:
        raise ValueError("the PTX has no .entry")
    files = dict(FILE.findall(ptx))
    body_line = ptx.count("\n", 0, entry.end()) + 1
    end = ptx.index("\n}", entry.end())
    instructions: list[Instruction] = []
    labels, registers, callers, tables = {}, {}, {}, {}
    where, rest, first_line, table = None, "", 0, ""
    for i, raw in enumerate(ptx[entry.end() : end].split("\n")):
        line = raw.split("//")[0].strip()
        if loc := LOC.match(line):
            place = Where(files.get(loc[1], loc[1]), int(loc[2]))
            if loc[3]:
                # The caller's own .loc stands before, and says by whom it is called itself.
                at = Where(files.get(loc[3], loc[3]), int(loc[4]))
                place = place._replace(caller=callers.get(at, at))
            callers[Where(place.file, place.line)] = where = place
            continue
        if line.startswith("."):
            if declared := REGISTERS.match(line):
                registers[declared[3]] = int(declared[2] or 1)
            elif not line.startswith(".pragma"):
                raise ValueError(f"line {body_line + i} of the PTX: unknown directive {line!r}")
            continue
        if label := LABEL.match(line):
            table = label[1]
            labels[table] = len(instructions)
            line = line[label.end() :].strip()
        if not line:
            continue
        first_line = first_line or body_line + i
        *done, rest = (rest + " " + line).split(";")
        for text in done:
            if found := BRANCHES.fullmatch(text.strip()):  # the table of a brx.idx, which follows
                tables[table] = tuple(_split(found[1]))
                continue
            one = _instruction(text.strip(), first_line, where)
            operands = tuple(tables.get(o, o) if isinstance(o, str) else o for o in one.operands)
            instructions.append(one._replace(operands=operands))
        rest = rest.strip()
        if not rest:
            first_line = 0
    if rest:
        raise ValueError(f"line {first_line} of the PTX: {rest!r} does not end")
    return Program(
        entry[1],
        tuple(instructions),
        labels,
        tuple(_parameter(text) for text in entry[2].split(",") if text.strip()),
        registers,
        {name: int(align) for align, name in SHARED.findall(ptx)},
        int(asked[1]) if (asked := THREADS.search(entry[3])) else None,
    )


def _parameter(text: str) -> Parameter:
    found = PARAMETER.search(text.strip())
    if found is None:
        raise ValueError(f"unknown parameter {text.strip()!r}")
    return Parameter(found[3], int(found[1]) // 8, found[2] is not None)


def _instruction(text: str, line: int, where: Where | None) -> Instruction:
    found = OPERATION.fullmatch(text)
    if found is None:
        raise ValueError(f"line {line} of the PTX: {text!r} is no instruction")
    guard, opcode, rest = found.groups()
    return Instruction(opcode, tuple(map(_operand, _split(rest))), guard, " ".join(text.split()), line, where)


def _split(text: str) -> list[str]:
    """The operands: commas inside of braces separate none."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text) if part.strip()]


def _operand(text: str):
    if text[0] == "{":
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return "[", base.strip(), int(offset or 0)
    if "|" in text:  # two results
        return tuple(text.split("|"))
    return text
