"""Each instruction of PTX that Triton makes of our kernels, as a step: a function that carries it out for a
`Group` of threads (machine.py). What is not here is an error that names it.

Registers hold arrays of bits, a number a thread: uint16, uint32, uint64, or bool of a predicate. Constants
and special registers have slots among them, so an operand is always a slot.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptx import arithmetic
from ptx.arithmetic import F16, F32, U16, U32
from ptx.parse import Instruction, Program

if TYPE_CHECKING:
    from ptx.machine import Group

Step = Callable[["Group"], None]
Function = Callable[..., np.ndarray]

TYPES = {
    **{f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"u{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    **{f"f{n}": np.dtype(f"f{n // 8}") for n in (16, 32, 64)},
    "bf16": np.dtype(U16),
    "bf16x2": np.dtype(U32),
    "pred": np.dtype(bool),
}
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"]
EVERY_LANE = "-1"  # the mask of the lanes of a warp that take part; no other is known


class Unknown(Exception):
    """An instruction, or a form of it, that is not here."""


def bits_of(kind: str) -> np.dtype:
    """The type of the bits of a number."""
    t = TYPES[kind]
    return t if t.kind == "b" else np.dtype(f"u{t.itemsize}")


# Instructions that compute


class Pure(NamedTuple):
    """A function of arrays of bits, and the types of its operands."""

    function: Function
    operands: tuple[str, ...]


def on_bits(count: int) -> Callable[[Function, str], Pure]:
    """Of `count` numbers; the same function of the bits, whatever they mean."""
    return lambda function, kind: Pure(function, (kind,) * count)


def unary(function: Function, kind: str) -> Pure:
    t, bits = TYPES[kind], bits_of(kind)
    return Pure(lambda a: function(a.view(t)).view(bits), (kind,))


def binary(function: Function, kind: str) -> Pure:
    t, bits = TYPES[kind], bits_of(kind)
    return Pure(lambda a, b: function(a.view(t), b.view(t)).view(bits), (kind,) * 2)


def ternary(function: Function, kind: str) -> Pure:
    t, bits = TYPES[kind], bits_of(kind)
    return Pure(lambda a, b, c: function(a.view(t), b.view(t), c.view(t)).view(bits), (kind,) * 3)


def compare(function: Function, kind: str) -> Pure:
    t = TYPES[kind]
    return Pure(lambda a, b: function(a.view(t), b.view(t)), (kind,) * 2)


def select(function: Function, kind: str) -> Pure:
    return Pure(function, (kind, kind, "pred"))


def shift(function: Function, kind: str) -> Pure:
    """By counts of 32 bits. In NumPy, too, a shift by all bits or more leaves zeros, or signs."""
    t, bits = TYPES[kind], bits_of(kind)
    most = U32(8 * t.itemsize)
    return Pure(lambda a, n: function(a.view(t), np.minimum(n, most).astype(t)).view(bits), (kind, "u32"))


def wide(function: Function, kind: str) -> Pure:
    """The product of two numbers in twice their bits; of three with the third, which has these, added."""
    t, double = TYPES[kind], f"{kind[0]}{2 * int(kind[1:])}"
    twice, bits = TYPES[double], bits_of(double)
    if function is np.multiply:
        return Pure(lambda a, b: np.multiply(a.view(t), b.view(t), dtype=twice).view(bits), (kind,) * 2)
    return Pure(
        lambda a, b, c: np.multiply(a.view(t), b.view(t), dtype=twice).view(bits) + c, (kind, kind, double)
    )


def converted_to(target: str) -> Callable[[Function, str], Pure]:
    """Of integers; to floating point rounded once. A register may be wider than the number in it."""
    t, bits = TYPES[target], bits_of(target)

    def make(_: Function, kind: str) -> Pure:
        narrow, s = bits_of(kind), TYPES[kind]
        return Pure(lambda a: a.astype(narrow, copy=False).view(s).astype(t).view(bits), (kind,))

    return make


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a * b + c


def is_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def flushed(x: np.ndarray) -> np.ndarray:
    """.ftz: denormals are 0."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def pack(narrow: Function) -> Function:
    """Two of float32 as two of 2 bytes; the first is the upper half."""

    def function(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return narrow(low.view(F32)).astype(U32) | (narrow(high.view(F32)).astype(U32) << U32(16))

    return function


def in_halves(function: Function) -> Function:
    """Of numbers of 2 bytes, two in a register."""

    def pairs(*x: np.ndarray) -> np.ndarray:
        parts = np.broadcast_arrays(*(y.reshape(-1).view(U16).reshape(-1, 2) for y in x))
        return np.ascontiguousarray(function(*parts)).view(U32).reshape(-1)

    return pairs


# Name, what makes a Pure of a function and a type, function, types.
FAMILIES: list[tuple[str, Callable[[Function, str], Pure], Function | None, str]] = [
    ("add", on_bits(2), np.add, "s16 s32 s64"),
    ("add", binary, np.add, "f32 f64"),
    ("sub", on_bits(2), np.subtract, "s16 s32 s64"),
    ("sub", binary, np.subtract, "f32 f64"),
    ("mul.lo", on_bits(2), np.multiply, "s16 s32 s64"),
    ("mul", binary, np.multiply, "f32 f64"),
    ("mul.wide", wide, np.multiply, "s16 u16 s32 u32"),
    ("mul.hi", binary, arithmetic.multiply_high, "s32 u32 s64 u64"),
    ("mad.lo", on_bits(3), multiply_add, "s32 s64"),
    ("mad.wide", wide, multiply_add, "s16 u16 s32 u32"),
    ("div", binary, np.floor_divide, "u32"),
    ("div.full", binary, np.divide, "f32"),
    ("div.rn", binary, np.divide, "f64"),
    ("neg", on_bits(1), np.negative, "s32"),
    ("neg", unary, np.negative, "f32 f64"),
    ("sqrt.rn", unary, np.sqrt, "f64"),
    ("sqrt.approx.ftz", unary, lambda x: flushed(np.sqrt(flushed(x))), "f32"),
    ("fma.rn", ternary, arithmetic.fma_f32, "f32"),
    ("fma.rn", ternary, arithmetic.fma_f64, "f64"),
    ("fma.rn", on_bits(3), arithmetic.fma_bf16, "bf16"),
    ("fma.rn", on_bits(3), in_halves(arithmetic.fma_bf16), "bf16x2"),  # of Triton 3.6
    ("add", on_bits(2), lambda a, b: arithmetic.to_f16(a.view(F16) + b.view(F16)), "f16"),
    ("min", binary, np.minimum, "s32 u32 s64"),
    ("max", binary, np.maximum, "s32 u32 s64"),
    ("and", on_bits(2), np.bitwise_and, "b16 b32 b64 pred"),
    ("or", on_bits(2), np.bitwise_or, "b16 b32 b64 pred"),
    ("xor", on_bits(2), np.bitwise_xor, "b16 b32 b64 pred"),
    ("not", on_bits(1), np.invert, "b16 b32 b64 pred"),
    ("shl", shift, np.left_shift, "b16 b32 b64"),
    ("shr", shift, np.right_shift, "s16 u16 s32 u32 s64 u64"),
    ("bfe", on_bits(3), lambda a, b, c: arithmetic.bit_field(a, b, c, signed=False), "u32"),
    ("bfe", on_bits(3), lambda a, b, c: arithmetic.bit_field(a, b, c, signed=True), "s32"),
    ("prmt", on_bits(3), arithmetic.permute_bytes, "b32"),
    ("selp", select, lambda a, b, p: np.where(p, a, b), "b16 b32 b64 f32 f64"),
    ("setp.eq", compare, np.equal, "b16 b32 b64 f16 f32 f64"),
    ("setp.ne", compare, np.not_equal, "b16 b32 b64"),
    ("setp.lt", compare, np.less, "s16 u16 s32 u32 s64 u64 f16 f32 f64"),
    ("setp.le", compare, np.less_equal, "s16 u16 s32 u32 s64 u64 f16 f32 f64"),
    ("setp.gt", compare, np.greater, "s16 u16 s32 u32 s64 u64 f16 f32 f64"),
    ("setp.ge", compare, np.greater_equal, "s16 u16 s32 u32 s64 u64 f16 f32 f64"),
    # Also true of NaN.
    ("setp.neu", compare, np.not_equal, "f16 f32 f64"),
    ("setp.leu", compare, lambda a, b: ~(a > b), "f16 f32 f64"),
    ("setp.geu", compare, lambda a, b: ~(a < b), "f16 f32 f64"),
    ("setp.nan", compare, is_nan, "f16 f32 f64"),
    ("cvt.u16", converted_to("u16"), None, "u32 u64"),
    ("cvt.u32", converted_to("u32"), None, "u16 u64"),
    ("cvt.s16", converted_to("s16"), None, "s8"),
    ("cvt.s32", converted_to("s32"), None, "s16"),
    ("cvt.u64", converted_to("u64"), None, "u32"),
    ("cvt.s64", converted_to("s64"), None, "s32"),
    ("cvt.rn.f32", converted_to("f32"), None, "s32 u32 s64"),
    ("cvt.rn.f64", converted_to("f64"), None, "s32 s64"),
    ("cvt.f32", on_bits(1), lambda a: arithmetic.from_bf16(a).view(U32), "bf16"),
    ("cvt.f32", on_bits(1), lambda a: arithmetic.from_f16(a).view(U32), "f16"),
    ("cvt.rn.bf16", on_bits(1), lambda a: arithmetic.to_bf16(a.view(F32)), "f32"),
    ("cvt.rn.f16", on_bits(1), lambda a: arithmetic.to_f16(a.view(F32)), "f32"),
    ("cvt.rn.bf16x2", on_bits(2), pack(arithmetic.to_bf16), "f32"),
    ("cvt.rn.f16x2", on_bits(2), pack(arithmetic.to_f16), "f32"),
]
PURE = {
    f"{name}.{kind}": make(function, kind)
    for name, make, function, kinds in FAMILIES
    for kind in kinds.split()
}


def constant(text: str, kind: str) -> np.generic:
    """A number of PTX as the bits of a type."""
    if text[:2].lower() in ("0f", "0d"):  # the bits of a float32 or float64, in hexadecimal
        return bits_of(kind).type(int(text[2:], 16))
    number = int(text.removesuffix("U"), 0)
    if kind == "pred":
        return np.bool_(number != 0)
    return bits_of(kind).type(number % 2 ** (8 * TYPES[kind].itemsize))


def shared_base(program: Program) -> int:
    """The address of the dynamic shared memory: a multiple of the alignment that the program asks for, and of
    nothing more."""
    return 0x1000 + max(program.shared.values(), default=16)


class Builder:
    """Makes the steps of a program, and gives its registers, constants and special registers their slots."""

    def __init__(self, program: Program):
        self.program = program
        self.slots: dict[str, int] = {}  # by register, also special ones
        self.constants: dict[int, np.generic] = {}  # by slot
        self._slot_of: dict[tuple, int] = {}  # by constant
        self.parameters = {parameter.name: 8 * i for i, parameter in enumerate(program.parameters)}

    def slot(self, operand: str, kind: str) -> int:
        """Of an operand; `kind` is its type if it is a number."""
        if operand in self.slots:
            return self.slots[operand]
        if operand[0] == "%":
            if operand not in SPECIAL and re.match(r"%[a-z]+", operand)[0] not in self.program.registers:
                raise Unknown(f"the register {operand}")
            return self.slots.setdefault(operand, self.count())
        if operand in self.parameters:
            value = bits_of(kind).type(self.parameters[operand])
        elif operand in self.program.shared:
            value = bits_of(kind).type(shared_base(self.program))
        else:
            value = constant(operand, kind)
        key = value.tobytes(), value.dtype.str
        if key not in self._slot_of:
            slot = self._slot_of[key] = self.count()
            self.constants[slot] = value
        return self._slot_of[key]

    def count(self) -> int:
        return len(self.slots) + len(self.constants)

    def bits(self, register: str) -> np.dtype:
        """The type of what a register holds."""
        size = self.program.registers[re.match(r"%[a-z]+", register)[0]]
        return np.dtype(bool) if size == 1 else np.dtype(f"u{size // 8}")

    def guard(self, instruction: Instruction) -> tuple[int, bool] | None:
        """The slot of the predicate, and whether it is negated."""
        guard = instruction.guard
        return None if guard is None else (self.slot(guard.lstrip("!"), "pred"), guard[0] == "!")

    def step(self, instruction: Instruction) -> Step:
        """Raises Unknown."""
        opcode = instruction.opcode
        if opcode in PURE:
            return self._pure(instruction, PURE[opcode])
        name = opcode.split(".")[0]
        if name == "setp" and opcode.endswith(".f16x2"):
            return self._compare_halves(instruction)
        make = {
            "mov": self._move,
            "ld": self._load,
            "st": self._store,
            "atom": self._atomic,
            "cp": self._copy,
            "ldmatrix": self._load_matrix,
            "mma": self._mma,
            "shfl": self._shuffle,
            "bar": self._warp_barrier,
        }.get(name)
        if make is None:
            raise Unknown(opcode)
        return make(instruction)

    def _pure(self, instruction: Instruction, pure: Pure) -> Step:
        target, *operands = instruction.operands
        if len(operands) != len(pure.operands):
            raise Unknown(str(instruction))
        d = self.slot(target, "pred")
        sources = [self.slot(operand, kind) for operand, kind in zip(operands, pure.operands, strict=True)]
        function, guard = pure.function, self.guard(instruction)
        if guard is not None:
            return lambda g: g.merge(d, function(*(g.registers[s] for s in sources)), g.active(guard))
        if not any(operand[0] == "%" for operand in operands):
            return lambda g: g.put(d, g.full(function(*(g.registers[s] for s in sources))))
        if len(sources) == 1:
            (a,) = sources

            def step(g: "Group") -> None:
                value = function(g.registers[a])
                if g.mask is None:
                    g.registers[d] = value
                else:
                    g.merge(d, value, g.mask)

        elif len(sources) == 2:
            a, b = sources

            def step(g: "Group") -> None:
                r = g.registers
                value = function(r[a], r[b])
                if g.mask is None:
                    r[d] = value
                else:
                    g.merge(d, value, g.mask)

        else:
            a, b, c = sources

            def step(g: "Group") -> None:
                r = g.registers
                value = function(r[a], r[b], r[c])
                if g.mask is None:
                    r[d] = value
                else:
                    g.merge(d, value, g.mask)

        return step

    def _compare_halves(self, instruction: Instruction) -> Step:
        """setp of two float16 in each register, which has two results (of Triton 3.6)."""
        single = PURE.get(instruction.opcode.removesuffix("x2"))
        targets, *operands = instruction.operands
        if single is None or not isinstance(targets, tuple) or len(operands) != 2:
            raise Unknown(str(instruction))
        slots = [self.slot(name, "pred") for name in targets]
        sources, guard = [self.slot(operand, "b32") for operand in operands], self.guard(instruction)

        def compare_halves(g: "Group") -> None:
            a, b = (g.full(g.registers[s]).view(U16).reshape(-1, 2) for s in sources)
            active, found = g.active(guard), single.function(a, b)
            for i, d in enumerate(slots):
                g.merge(d, np.ascontiguousarray(found[:, i]), active)

        return compare_halves

    def _move(self, instruction: Instruction) -> Step:
        kind = instruction.opcode.removeprefix("mov.")
        if kind not in ("b16", "u16", "b32", "u32", "b64", "u64", "f32", "f64", "pred"):
            raise Unknown(instruction.opcode)
        target, source = instruction.operands
        guard = self.guard(instruction)
        if isinstance(target, tuple):  # the first is the lowest bits
            s = self.slot(source, kind)
            parts = [(i, self.slot(part, kind)) for i, part in enumerate(target) if part != "_"]
            bits, count = self.bits(next(part for part in target if part != "_")), len(target)

            def unpack(g: "Group") -> None:
                values = g.registers[s].view(bits).reshape(-1, count)
                for i, d in parts:
                    g.merge(d, np.ascontiguousarray(values[:, i]), g.active(guard))

            return unpack
        d = self.slot(target, kind)
        if isinstance(source, tuple):
            sources, bits = [self.slot(part, f"b{64 // len(source)}") for part in source], bits_of(kind)
            if {self.bits(part).itemsize * len(source) for part in source if part[0] == "%"} != {
                bits.itemsize
            }:
                raise Unknown(str(instruction))
            return lambda g: g.merge(
                d,
                np.stack([g.registers[s] for s in sources], axis=1).view(bits).reshape(-1),
                g.active(guard),
            )
        s = self.slot(source, kind)
        return lambda g: g.merge(d, g.full(g.registers[s]), g.active(guard))

    # Memory. An access is of `count` neighbours of `kind` by each thread.

    def _address(self, operand: tuple, kind: str) -> Callable[["Group"], np.ndarray]:
        """The addresses, one a thread."""
        _, base, offset = operand
        s, offset = self.slot(base, kind), np.int64(offset)
        return lambda g: g.full(g.registers[s]).astype(np.int64) + offset

    def _access(self, instruction: Instruction, parts: list[str], operand) -> tuple[int, str, list[str]]:
        """How many neighbours of what type, and the registers (or numbers) that they are in."""
        kind, count = parts[-1], 1
        if len(parts) == 2 and re.fullmatch("v[24]", parts[0]):
            count = int(parts[0][1])
        elif len(parts) != 1:
            raise Unknown(instruction.opcode)
        names = list(operand) if isinstance(operand, tuple) else [operand]
        if len(names) != count or kind not in TYPES:
            raise Unknown(str(instruction))
        return count, kind, names

    def _load(self, instruction: Instruction) -> Step:
        _, space, *parts = instruction.opcode.split(".")
        if space == "param":
            return self._load_parameter(instruction, parts)
        if space == "global" and parts[0] == "cg":  # past the first-level cache, of which there is none here
            parts = parts[1:]
        if space not in ("global", "shared"):
            raise Unknown(instruction.opcode)
        count, kind, names = self._access(instruction, parts, instruction.operands[0])
        targets = [(self.slot(name, kind), self.bits(name)) for name in names]
        address = self._address(instruction.operands[1], "b64" if space == "global" else "b32")
        guard, read_as, size = self.guard(instruction), TYPES[kind], TYPES[kind].itemsize

        def load(g: "Group") -> None:
            index = g.index(guard)
            if index is None or index.size:
                rows = g.spaces[space].load(g, instruction, *g.taking_part(address(g), index), size, count)
                columns = np.ascontiguousarray(rows.T).view(read_as)
                for (d, bits), column in zip(targets, columns, strict=True):
                    g.put(d, column if column.dtype == bits else column.astype(bits), index)

        return load

    def _load_parameter(self, instruction: Instruction, parts: list[str]) -> Step:
        (kind,) = parts
        (target, (_, base, offset)), guard = instruction.operands, self.guard(instruction)
        if offset:
            raise Unknown(str(instruction))
        d, s, bits = self.slot(target, kind), self.slot(base, "b64"), self.bits(target)
        read_as, narrow = TYPES[kind], bits_of(kind)
        return lambda g: g.merge(
            d,
            g.parameters.take((g.full(g.registers[s]) >> 3).astype(np.int64))
            .astype(narrow)
            .view(read_as)
            .astype(bits),
            g.active(guard),
        )

    def _store(self, instruction: Instruction) -> Step:
        _, space, *parts = instruction.opcode.replace("::cta", "").split(".")
        if space not in ("global", "shared"):
            raise Unknown(instruction.opcode)
        count, kind, names = self._access(instruction, parts, instruction.operands[1])
        sources = [self.slot(name, kind) for name in names]
        address = self._address(instruction.operands[0], "b64" if space == "global" else "b32")
        guard, bits = self.guard(instruction), bits_of(kind)

        def store(g: "Group") -> None:
            index = g.index(guard)
            if index is None or index.size:
                columns = [g.full(g.registers[s]).astype(bits, copy=False) for s in sources]
                rows = np.stack(columns, axis=1)
                rows = rows if index is None else rows[index]
                g.spaces[space].store(g, instruction, *g.taking_part(address(g), index), rows)

        return store

    def _atomic(self, instruction: Instruction) -> Step:
        if instruction.opcode != "atom.global.gpu.acq_rel.add.u32":
            raise Unknown(instruction.opcode)
        target, place, added = instruction.operands
        d, s, guard = self.slot(target, "u32"), self.slot(added, "u32"), self.guard(instruction)
        address = self._address(place, "b64")

        def atomic(g: "Group") -> None:
            index = g.index(guard)
            if index is None or index.size:
                values = g.full(g.registers[s])
                values = values if index is None else values[index]
                old = g.spaces["global"].atomic_add(g, instruction, *g.taking_part(address(g), index), values)
                g.put(d, old, index)

        return atomic

    def _copy(self, instruction: Instruction) -> Step:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "cp.async.commit_group":
            return lambda g: g.commit_copies(instruction)
        if opcode == "cp.async.wait_group":
            (left,) = operands
            return lambda g: g.wait_copies(instruction, int(left))
        if opcode not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global") or len(operands) != 4:
            raise Unknown(str(instruction))
        target, source, size = operands[:3]
        into, out_of, count = self._address(target, "b32"), self._address(source, "b64"), int(size, 0) // 4
        sizes, guard = self.slot(operands[3], "u32"), self.guard(instruction)

        def copy(g: "Group") -> None:
            index = g.index(guard)
            index = np.arange(g.size) if index is None else index
            read = g.full(g.registers[sizes])[index]  # bytes; the rest is zeros
            other = np.flatnonzero((read != 0) & (read != 4 * count))
            if other.size:
                detail = f"of other sizes than 0 and {4 * count}: {instruction}"
                raise g.fault("unknown instruction", instruction, g.threads[index[other[0]]], None, detail)
            rows, reading = np.zeros((len(index), count), U32), read > 0
            if reading.any():
                part = g.taking_part(out_of(g), index[reading])
                rows[reading] = g.spaces["global"].load(g, instruction, *part, 4, count)
            if index.size:
                part = g.taking_part(into(g), index)
                g.copies[-1].append(g.spaces["shared"].begin_copy(g, instruction, *part, rows))

        return copy

    # Warps

    def _load_matrix(self, instruction: Instruction) -> Step:
        found = re.fullmatch(
            r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", instruction.opcode
        )
        if found is None:
            raise Unknown(instruction.opcode)
        names, place = instruction.operands
        targets, count, transposed = (
            [self.slot(name, "b32") for name in names],
            int(found[1]),
            found[2] is not None,
        )
        address, guard = self._address(place, "b32"), self.guard(instruction)

        def load(g: "Group") -> None:
            index = g.whole_warps(instruction, guard)
            lanes = np.arange(g.size) if index is None else index
            # The first 8 lanes have the addresses of the rows of the first matrix, and so on.
            lanes = lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1)
            rows = g.spaces["shared"].load(g, instruction, *g.taking_part(address(g), lanes), 2, 8)
            fragments = arithmetic.matrix_fragments(rows.reshape(-1, count, 8, 8), transposed)
            for d, fragment in zip(targets, fragments, strict=True):
                g.put(d, fragment, index)

        return load

    def _mma(self, instruction: Instruction) -> Step:
        multiply = {
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": lambda a, b, c: arithmetic.mma_m16n8k16(
                a, b, c, arithmetic.from_bf16
            ),
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": lambda a, b, c: arithmetic.mma_m16n8k16(
                a, b, c, arithmetic.from_f16
            ),
            "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64": arithmetic.mma_m8n8k4,
        }.get(instruction.opcode)
        if multiply is None:
            raise Unknown(instruction.opcode)
        targets, *matrices = [[self.slot(name, "b32") for name in names] for names in instruction.operands]
        guard = self.guard(instruction)

        def mma(g: "Group") -> None:
            index = g.whole_warps(instruction, guard)
            taken = slice(None) if index is None else index
            parts = multiply(*([g.full(g.registers[s])[taken] for s in slots] for slots in matrices))
            for d, part in zip(targets, parts, strict=True):
                g.put(d, part, index)

        return mma

    def _shuffle(self, instruction: Instruction) -> Step:
        found = re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", instruction.opcode)
        target, source, lane, clamp, members = instruction.operands
        if found is None or members != EVERY_LANE:
            raise Unknown(str(instruction))
        d, s, mode = self.slot(target, "b32"), self.slot(source, "b32"), found[1]
        b, c, guard = self.slot(lane, "u32"), self.slot(clamp, "u32"), self.guard(instruction)
        fixed = None
        if b in self.constants and c in self.constants:
            fixed = arithmetic.shuffle_sources(mode, self.constants[b], self.constants[c])

        def shuffle(g: "Group") -> None:
            index = g.whole_warps(instruction, guard)
            taken = slice(None) if index is None else index
            values = g.full(g.registers[s])[taken].reshape(-1, 32)
            if fixed is not None:
                shuffled = values[:, fixed]
            else:
                b_all, c_all = (g.full(g.registers[n])[taken].reshape(-1, 32) for n in (b, c))
                shuffled = np.take_along_axis(values, arithmetic.shuffle_sources(mode, b_all, c_all), axis=1)
            g.put(d, shuffled.reshape(-1), index)

        return shuffle

    def _warp_barrier(self, instruction: Instruction) -> Step:
        if instruction.opcode != "bar.warp.sync" or instruction.operands != (EVERY_LANE,):
            raise Unknown(str(instruction))
        guard = self.guard(instruction)
        return lambda g: g.pass_warp_barrier(g.whole_warps(instruction, guard))
