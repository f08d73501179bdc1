"""The instructions, each by a program of a few lines, against the PTX manual: its formulas and tables are
written here once more, for one thread at a time."""

import operator
from collections.abc import Callable
from fractions import Fraction
from math import isqrt

import numpy as np
import pytest
import torch

from ptx.by_hand import compute, run
from ptx.instructions import PURE, TYPES

NAN = object()

# Integers and predicates: opcode to a function of Python's numbers.


def shift_right(n: int) -> Callable[[int, int], int]:
    return lambda a, b: a >> min(b, n)


def bit_field(signed: bool) -> Callable[[int, int, int], int]:
    """The loop of the manual."""

    def function(a: int, start: int, length: int) -> int:
        a, start, length = a % 2**32, start & 0xFF, length & 0xFF
        bit = 0 if not signed or length == 0 else a >> min(start + length - 1, 31) & 1
        return sum((a >> (start + i) & 1 if i < length and start + i <= 31 else bit) << i for i in range(32))

    return function


def permuted(a: int, b: int, selector: int) -> int:
    both, result = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")], []
    for i in range(4):
        choice = selector >> 4 * i & 0xF
        byte = both[choice & 7]
        result.append((0xFF if byte & 0x80 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(result), "little")


INTEGERS: dict[str, tuple[Callable, str]] = {}  # function, types of the result and of the operands
for n in (16, 32, 64):
    for sign in "su":
        kind = f"{sign}{n}"
        INTEGERS |= {
            f"add.{kind}": (operator.add, f"{kind} {kind} {kind}"),
            f"sub.{kind}": (operator.sub, f"{kind} {kind} {kind}"),
            f"mul.lo.{kind}": (operator.mul, f"{kind} {kind} {kind}"),
            f"mul.hi.{kind}": (lambda a, b, n=n: a * b >> n, f"{kind} {kind} {kind}"),
            f"mul.wide.{kind}": (operator.mul, f"{sign}{2 * n} {kind} {kind}"),
            f"mad.lo.{kind}": (lambda a, b, c: a * b + c, f"{kind} {kind} {kind} {kind}"),
            f"mad.wide.{kind}": (lambda a, b, c: a * b + c, f"{sign}{2 * n} {kind} {kind} {sign}{2 * n}"),
            f"min.{kind}": (min, f"{kind} {kind} {kind}"),
            f"max.{kind}": (max, f"{kind} {kind} {kind}"),
            f"neg.{kind}": (operator.neg, f"{kind} {kind}"),
            f"shr.{kind}": (shift_right(n), f"{kind} {kind} u32"),
            **{
                f"setp.{name}.{kind}": (getattr(operator, name), f"pred {kind} {kind}")
                for name in ("lt", "le", "gt", "ge")
            },
            **{f"cvt.{kind}.{of}{m}": (int, f"{kind} {of}{m}") for of in "su" for m in (16, 32, 64)},
        }
    kind = f"b{n}"
    INTEGERS |= {
        f"and.{kind}": (operator.and_, f"{kind} {kind} {kind}"),
        f"or.{kind}": (operator.or_, f"{kind} {kind} {kind}"),
        f"xor.{kind}": (operator.xor, f"{kind} {kind} {kind}"),
        f"not.{kind}": (operator.invert, f"{kind} {kind}"),
        f"shl.{kind}": (lambda a, b, n=n: a << min(b, n), f"{kind} {kind} u32"),
        f"selp.{kind}": (lambda a, b, p: a if p else b, f"{kind} {kind} {kind} pred"),
        f"selp.f{n}": (lambda a, b, p: a if p else b, f"{kind} {kind} {kind} pred"),
        f"setp.eq.{kind}": (operator.eq, f"pred {kind} {kind}"),
        f"setp.ne.{kind}": (operator.ne, f"pred {kind} {kind}"),
    }
INTEGERS |= {
    "div.u32": (lambda a, b: a // b if b else 0, "u32 u32 u32"),
    "and.pred": (operator.and_, "pred pred pred"),
    "or.pred": (operator.or_, "pred pred pred"),
    "xor.pred": (operator.xor, "pred pred pred"),
    "not.pred": (operator.not_, "pred pred"),
    "bfe.u32": (bit_field(False), "u32 u32 u32 u32"),
    "bfe.s32": (bit_field(True), "s32 s32 u32 u32"),
    "prmt.b32": (permuted, "b32 b32 b32 b32"),
    # A register has 16 bits at least; the number is its lowest 8.
    "cvt.s16.s8": (lambda a: (a + 128) % 256 - 128, "s16 u16"),
}


def examples(kind: str, seed: int) -> np.ndarray:
    """Bits: edges and small numbers, then random ones, 256 of them; in an order that depends on the seed."""
    random = np.random.default_rng(seed)
    if kind == "pred":
        return random.integers(0, 2, 256).astype(bool)
    t = np.dtype(f"u{TYPES[kind].itemsize}")
    top = 8 * t.itemsize
    edges = [
        0,
        1,
        2,
        3,
        5,
        15,
        31,
        32,
        33,
        63,
        64,
        2**top - 1,
        2**top - 2,
        2 ** (top - 1),
        2 ** (top - 1) - 1,
    ]
    rest = random.integers(0, 2**top, 120, np.uint64, endpoint=False) if top < 64 else random.bytes(8 * 120)
    rest = np.frombuffer(rest, np.uint64) if top == 64 else rest
    small = random.integers(0, 40, 256 - len(edges) - len(rest))
    return random.permutation(
        np.concatenate([np.array(edges, np.uint64), rest, small.astype(np.uint64)])
    ).astype(t)


@pytest.mark.parametrize("opcode", sorted(set(PURE) & set(INTEGERS)))
def test_integers(opcode):
    function, kinds = INTEGERS[opcode]
    target, *sources = kinds.split()
    inputs = [examples(kind, 10 * i) for i, kind in enumerate(sources)]
    if opcode == "prmt.b32":
        inputs[2] &= np.uint32(0xFFFF)
    bits = bool if target == "pred" else np.dtype(f"u{TYPES[target].itemsize}").type
    text = opcode + " " + ", ".join(f"{{{i}}}" for i in range(len(inputs) + 1))
    (found,) = compute(text, inputs, [bits])
    numbers = [x.view(TYPES[kind]).tolist() for x, kind in zip(inputs, sources, strict=True)]
    wanted = [function(*each) for each in zip(*numbers, strict=True)]
    if target == "pred":
        assert found.tolist() == [bool(w) for w in wanted]
    elif opcode == "div.u32":
        divisible = inputs[1] != 0  # else PTX does not say
        assert (found == np.array(wanted, bits))[divisible].all()
    else:
        assert found.tolist() == [w % 2 ** (8 * found.itemsize) for w in wanted]


# Floating point. A number is rounded by hand, as a fraction.

FORMATS = {
    "f16": (11, -24, 2**16),
    "bf16": (8, -133, 2**128),
    "f32": (24, -149, 2**128),
    "f64": (53, -1074, 2**1024),
}


def rounded(x: Fraction, kind: str) -> Fraction | float:
    """To nearest even: digits, exponent of the least denormal, and what is beyond the largest number."""
    digits, least, beyond = FORMATS[kind]
    if x == 0:
        return Fraction(0)
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent += -1 if size < Fraction(2) ** exponent else 0  # 2^exponent <= size
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    result = round(x / unit) * unit  # Python rounds to even
    return result if abs(result) < beyond else float("inf") if x > 0 else float("-inf")


def to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """The numbers of some bits, as float64."""
    numbers = (bits.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else bits.view(TYPES[kind])
    with np.errstate(invalid="ignore"):  # signalling NaN
        return numbers.astype(np.float64)


def floats(kind: str, seed: int) -> np.ndarray:
    """Bits: special numbers, all sizes, and numbers about 1, whose sums cancel."""
    random = np.random.default_rng(seed)
    t = np.dtype(f"u{TYPES[kind].itemsize}")
    digits = FORMATS[kind][0] - 1
    one = (2 ** (8 * t.itemsize - 2) - 1) >> digits << digits
    infinity = (2 ** (8 * t.itemsize - 1) - 1) >> digits << digits
    special = [0, 1, 2, one, one + 1, one - 1, 2**digits, 2**digits - 1, infinity - 1, infinity, infinity + 1]
    special += [n | 1 << (8 * t.itemsize - 1) for n in special]
    anything = np.frombuffer(random.bytes(200 * t.itemsize), t)
    near = one + random.integers(-(2 ** (digits - 1)), 2 ** (digits - 1), 290, np.int64)
    return random.permutation(
        np.concatenate([np.array(special, np.uint64), anything, near.view(np.uint64)])
    ).astype(t)


def same(found: np.ndarray, kind: str, wanted: list) -> None:
    """NaN is any NaN, and 0 is -0."""
    numbers = to_float(found, kind)
    for i, (number, w) in enumerate(zip(numbers, wanted, strict=True)):
        if w is NAN:
            assert np.isnan(number), i
        else:
            assert number == w, (i, number, float(w))


def exact(function: Callable, kind: str) -> Callable:
    """Of numbers as fractions, where all are finite; else what float64 gives."""

    def compute_one(*x: float):
        if not np.isfinite(x).all():
            with np.errstate(all="ignore"):
                special = function(*map(np.float64, x))
            return NAN if np.isnan(special) else float(special)
        return rounded(function(*map(Fraction, x)), kind)

    return compute_one


FLOATS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "fma.rn": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize(
    "opcode", [f"{name}.{kind}" for name in FLOATS for kind in FORMATS if f"{name}.{kind}" in PURE]
)
def test_floats_are_rounded_once(opcode):
    name, kind = opcode.rsplit(".", 1)
    function = FLOATS[name]
    count = function.__code__.co_argcount
    inputs = [floats(kind, seed) for seed in range(count)]
    if name == "fma.rn":  # a b + c near halfway points, and sums that cancel
        a, b = (to_float(x, kind) for x in inputs[:2])
        with np.errstate(all="ignore"):
            product = torch.from_numpy(-a * b)
        narrow = product.to({"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}[kind])
        bits = narrow.view({"f32": torch.int32, "f64": torch.int64, "bf16": torch.int16}[kind]).numpy()
        inputs = [np.concatenate([x, x]) for x in inputs]
        inputs[2] = np.concatenate([inputs[2][: len(bits)], bits.view(inputs[2].dtype)])
    (found,) = compute(
        opcode + " " + ", ".join(f"{{{i}}}" for i in range(count + 1)), inputs, [inputs[0].dtype.type]
    )
    one = exact(function, kind)
    same(found, kind, [one(*x) for x in zip(*(to_float(x, kind).tolist() for x in inputs), strict=True)])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "kind, a, b, c",
    [
        # a b is halfway between two numbers, and c decides, though no wider type holds the sum.
        ("f32", 1 + 2**-12, 1 + 2**-12, 2**-80),
        ("f32", 1 + 2**-12, 1 + 3 * 2**-12, 2**-80),
        ("f64", 1 + 2**-26, 1 + 2**-27, 2**-120),
        ("f64", 1 + 2**-26, 1 + 3 * 2**-27, 2**-120),
        ("bf16", 1 + 2**-4, 1 + 2**-4, 2**-60),
        ("bf16", 1 + 2**-4, 1 + 3 * 2**-4, 2**-60),
        # Denormals: c is one, and a b a little less than half of the least.
        ("f32", 2.0**-75 * (1 + 2**-23), 2.0**-75 * (1 - 2**-23), 2.0**-127 + 2.0**-149),
        ("f32", 2.0**-75 * (1 + 2**-23), 2.0**-75 * (1 - 2**-23), -(2.0**-127)),
        ("f64", 2.0**-540 * (1 + 2**-52), 2.0**-535 * (1 - 2**-52), 2.0**-1074),
    ],
)
def test_fma_that_is_not_rounded_twice(kind, a, b, c, sign):
    bits = {"f32": np.uint32, "f64": np.uint64, "bf16": np.uint16}[kind]
    numbers = [np.full(32, x, np.float64 if kind == "f64" else np.float32) for x in (a, b, sign * c)]
    if kind == "bf16":
        inputs = [(x.view(np.uint32) >> 16).astype(bits) for x in numbers]
    else:
        inputs = [x.view(bits) for x in numbers]
    exactly = [Fraction(float(to_float(x, kind)[0])) for x in inputs]
    assert exactly == [Fraction(a), Fraction(b), Fraction(sign * c)]
    (found,) = compute(f"fma.rn.{kind} {{0}}, {{1}}, {{2}}, {{3}}", inputs, [bits])
    assert to_float(found, kind)[0] == rounded(exactly[0] * exactly[1] + exactly[2], kind)


@pytest.mark.parametrize("opcode", ["div.full.f32", "div.rn.f64"])
def test_division(opcode):
    kind = opcode[-3:]
    inputs = [floats(kind, 3), floats(kind, 4)]
    (found,) = compute(opcode + " {0}, {1}, {2}", inputs, [inputs[0].dtype.type])
    wanted = []
    for a, b in zip(*(to_float(x, kind).tolist() for x in inputs), strict=True):
        if np.isfinite([a, b]).all() and b != 0:
            wanted.append(rounded(Fraction(a) / Fraction(b), kind))
        else:
            with np.errstate(all="ignore"):
                special = np.float64(a) / np.float64(b)
            wanted.append(NAN if np.isnan(special) else float(special))
    same(found, kind, wanted)


@pytest.mark.parametrize("opcode, tolerance", [("sqrt.rn.f64", 0), ("sqrt.approx.ftz.f32", 2**-23)])
def test_square_root(opcode, tolerance):
    """The approximate one is here the exact one rounded; the manual allows an error of 2^-23."""
    kind = opcode[-3:]
    inputs = [floats(kind, 5)]
    (found,) = compute(opcode + " {0}, {1}", inputs, [inputs[0].dtype.type])
    for x, y in zip(to_float(inputs[0], kind).tolist(), to_float(found, kind).tolist(), strict=True):
        if "ftz" in opcode and abs(x) < 2.0**-126:
            x = 0.0
        if np.isnan(x) or x < 0:
            assert np.isnan(y)
        elif np.isinf(x) or x == 0:
            assert y == x
        else:
            scaled = Fraction(x) * Fraction(2) ** 2400
            root = Fraction(isqrt(scaled.numerator // scaled.denominator), 2**1200)
            wanted = rounded(root + Fraction(1, 2**1300), kind)  # more than isqrt's, which rounds down
            assert abs(Fraction(y) - wanted) <= tolerance * wanted


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b,
    "leu": lambda a, b: a <= b or a != a or b != b,
    "geu": lambda a, b: a >= b or a != a or b != b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
def test_comparisons(name, kind):
    a, b = floats(kind, 6), floats(kind, 7)
    b[::3] = a[::3]
    (found,) = compute(f"setp.{name}.{kind} {{0}}, {{1}}, {{2}}", [a, b], [bool])
    pairs = zip(to_float(a, kind).tolist(), to_float(b, kind).tolist(), strict=True)
    assert found.tolist() == [COMPARISONS[name](*pair) for pair in pairs]


@pytest.mark.parametrize("name", ["gt", "geu"])
def test_comparisons_of_halves(name):
    a, b = (floats("f16", seed) for seed in (10, 11))
    b[::3] = a[::3]
    found = compute(
        f"setp.{name}.f16x2 {{0}}|{{1}}, {{2}}, {{3}}", [a.view(np.uint32), b.view(np.uint32)], [bool, bool]
    )
    pairs = zip(to_float(a, "f16").tolist(), to_float(b, "f16").tolist(), strict=True)
    assert np.stack(found, axis=1).reshape(-1).tolist() == [COMPARISONS[name](*pair) for pair in pairs]


def test_fma_of_halves():
    inputs = [floats("bf16", seed) for seed in (10, 11, 12)]
    (found,) = compute("fma.rn.bf16x2 {0}, {1}, {2}, {3}", [x.view(np.uint32) for x in inputs], [np.uint32])
    (wanted,) = compute("fma.rn.bf16 {0}, {1}, {2}, {3}", inputs, [np.uint16])
    assert (found.view(np.uint16) == wanted).all()


# Conversions


ALL = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}


def bits_in_torch(x: torch.Tensor) -> np.ndarray:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()]).numpy().view(f"u{x.element_size()}")


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_every_number_of_2_bytes_becomes_float32(kind):
    (found,) = compute(f"cvt.f32.{kind} {{0}}, {{1}}", [ALL], [np.uint32])
    wanted = torch.from_numpy(ALL.view(np.int16)).view(TORCH[kind]).float().numpy()
    # Which of float32's NaNs a NaN becomes PTX leaves open: any will do, where torch has one and only there.
    assert np.array_equal(found.view(np.float32), wanted, equal_nan=True)
    assert ((found >> 31) == (ALL >> 15)).all()  # -0


@pytest.fixture(scope="module")
def around_halfway():
    """float32 bits: every number of 2 bytes, the halfway point after it, and their neighbours."""
    bf16 = ALL.astype(np.uint32) << 16
    bf16 = [bf16 + np.uint32(d) for d in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    f16 = (
        ALL.view(np.float16).astype(np.float32).view(np.uint32)
    )  # neighbours differ by 2^13 units of float32
    f16 = [f16 + np.uint32(d) for d in (1, 0xFFF, 0x1000, 0x1001)]
    with np.errstate(invalid="ignore"):
        halves = (ALL.view(np.float16).astype(np.float32) + np.float32(2.0**-25)).view(
            np.uint32
        )  # of denormals
    return np.concatenate([*bf16, *f16, halves, halves + 1, halves - 1])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_float32_becomes_2_bytes(kind, around_halfway):
    (found,) = compute(f"cvt.rn.{kind}.f32 {{0}}, {{1}}", [around_halfway], [np.uint16])
    x = torch.from_numpy(around_halfway.view(np.float32))
    wanted, number = bits_in_torch(x.to(TORCH[kind])), ~x.isnan().numpy()
    assert (found == wanted)[number].all()
    assert (found[~number] == 0x7FFF).all()
    low, high = around_halfway[:4096], around_halfway[4096:8192]
    (pairs,) = compute(f"cvt.rn.{kind}x2.f32 {{0}}, {{1}}, {{2}}", [high, low], [np.uint32])
    assert (pairs & 0xFFFF == found[:4096]).all() and (pairs >> 16 == found[4096:8192]).all()


@pytest.mark.parametrize(
    "target, source", [("f32", "s32"), ("f32", "u32"), ("f32", "s64"), ("f64", "s32"), ("f64", "s64")]
)
def test_integers_become_floats(target, source):
    x = np.concatenate([examples(source, 8), examples(source, 9)])
    (found,) = compute(
        f"cvt.rn.{target}.{source} {{0}}, {{1}}",
        [x],
        [np.dtype(f"u{target[1:]}".replace("32", "4").replace("64", "8")).type],
    )
    wanted = [rounded(Fraction(n), target) for n in x.view(TYPES[source]).tolist()]
    assert [Fraction(n) for n in to_float(found, target).tolist()] == wanted


def test_every_instruction_that_computes_is_tested():
    tested = set(INTEGERS)
    tested |= {f"{name}.{kind}" for name in FLOATS for kind in FORMATS}
    tested |= {f"setp.{name}.{kind}" for name in COMPARISONS for kind in ("f16", "f32", "f64")}
    tested |= {"fma.rn.bf16x2", "div.full.f32", "div.rn.f64", "sqrt.rn.f64", "sqrt.approx.ftz.f32"}
    for kind in ("bf16", "f16"):
        tested |= {f"cvt.f32.{kind}", f"cvt.rn.{kind}.f32", f"cvt.rn.{kind}x2.f32"}
    tested |= {f"cvt.rn.{t}.{s}" for t in ("f32", "f64") for s in ("s32", "u32", "s64")}
    assert set(PURE) <= tested, set(PURE) - tested


# Registers


def test_moves():
    x = examples("b32", 1)
    low, high = compute("mov.b32 {{{0}, {1}}}, {2}", [x], [np.uint16, np.uint16])
    assert (low == x & 0xFFFF).all() and (high == x >> 16).all()
    (back,) = compute("mov.b32 {0}, {{{1}, {2}}}", [low, high], [np.uint32])
    assert (back == x).all()
    wide = examples("b64", 2)
    (upper,) = compute("mov.b64 {{_, {0}}}, {1}", [wide], [np.uint32])
    assert (upper == wide >> np.uint64(32)).all()


# Warps, by the manual's tables


def shuffled(mode: str, lane: int, b: int, c: int) -> int:
    """The lane that `lane` reads, by the manual's pseudocode."""
    b, segment, c = b & 0x1F, c >> 8 & 0x1F, c & 0x1F
    most, least = (lane & segment) | (c & ~segment), lane & segment
    if mode == "up":
        source, valid = lane - b, lane - b >= most
    elif mode == "down":
        source, valid = lane + b, lane + b <= most
    elif mode == "bfly":
        source, valid = lane ^ b, (lane ^ b) <= most
    else:
        source = least | (b & ~segment)
        valid = source <= most
    return source if valid else lane


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("clamp", [31, 0, 7 | 24 << 8, 24 << 8])
@pytest.mark.parametrize("by", [1, 4, 16, 27, None])
def test_shuffles(mode, clamp, by):
    x, lanes = (
        np.arange(64, dtype=np.uint32) * 3,
        np.random.default_rng(0).integers(0, 32, 64).astype(np.uint32),
    )
    operand = "{2}" if by is None else str(by)
    (found,) = compute(f"shfl.sync.{mode}.b32 {{0}}, {{1}}, {operand}, {clamp}, -1", [x, lanes], [np.uint32])
    for i in range(64):
        b = int(lanes[i]) if by is None else by
        assert found[i] == x[i // 32 * 32 + shuffled(mode, i % 32, b, clamp)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded(count, transposed):
    """8 x 8 matrices lie in shared memory in any order of rows; lane l gets elements 2 (l % 4) and one more
    of row l / 4 (transposed: of column l / 4)."""
    matrices = torch.arange(2 * count * 64, dtype=torch.int16)  # of two warps
    out = torch.zeros(count, 64, dtype=torch.int32)
    names = ", ".join(f"%r{10 + i}" for i in range(count))
    suffix = ".trans" if transposed else ""
    stores = "".join(f"st.global.b32 [%rd9+{256 * i}], %r{10 + i};" for i in range(count))
    # Row n of the warp's 8 * count rows is stored at place 5 n modulo 8 * count.
    rows = 8 * count
    run(
        f"""
        shr.u32 %r2, %r0, 5;
        and.b32 %r3, %r0, 31;
        setp.lt.u32 %p1, %r3, {rows};
        mad.lo.s32 %r4, %r2, {rows}, %r3;
        mad.wide.u32 %rd8, %r4, 16, %rd0;
        mul.lo.s32 %r5, %r3, 5;
        and.b32 %r5, %r5, {rows - 1};
        mad.lo.s32 %r5, %r2, {rows}, %r5;
        mov.b32 %r6, smem;
        mad.lo.s32 %r5, %r5, 16, %r6;
        @%p1 ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd8];
        @%p1 st.shared.v4.b32 [%r5], {{%r20, %r21, %r22, %r23}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{names}}}, [%r5];
        mad.wide.u32 %rd9, %r0, 4, %rd1;
        {stores}
        """,
        matrices,
        out,
        threads=64,
        shared=2 * rows * 16,
    )
    elements = matrices.view(2, count, 8, 8)
    for matrix in range(count):
        for thread in range(64):
            warp, lane = divmod(thread, 32)
            for i in range(2):
                row, column = lane // 4, 2 * (lane % 4) + i
                if transposed:
                    row, column = column, row
                found = int(out[matrix, thread]) >> 16 * i & 0xFFFF
                assert found == int(elements[warp, matrix, row, column])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_products_of_2_byte_matrices(kind):
    """mma.m16n8k16, its fragments by the manual's formulas."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2, *shape, generator=generator) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = a.to(TORCH[kind]), b.to(TORCH[kind])
    fragments = np.zeros((10, 64), np.uint32)
    for thread in range(64):
        warp, lane = divmod(thread, 32)
        group, place = divmod(lane, 4)
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = place * 2 + (i & 1) + (8 if i >= 4 else 0)
            fragments[i // 2, thread] |= int(bits_in_torch(a[warp, row, column].reshape(1))[0]) << 16 * (
                i & 1
            )
        for i in range(4):
            row = place * 2 + (i & 1) + (8 if i >= 2 else 0)
            fragments[4 + i // 2, thread] |= int(bits_in_torch(b[warp, row, group].reshape(1))[0]) << 16 * (
                i & 1
            )
        for i in range(4):
            row, column = group + (8 if i >= 2 else 0), place * 2 + (i & 1)
            fragments[6 + i, thread] = bits_in_torch(c[warp, row, column].reshape(1))[0]
    opcode = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    text = (
        opcode + " {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{10}, {11}, {12}, {13}}}"
    )
    found = compute(text, list(fragments), [np.uint32] * 4)
    wanted = a.double() @ b.double() + c.double()
    for thread in range(64):
        warp, lane = divmod(thread, 32)
        for i in range(4):
            row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)
            assert found[i].view(np.float32)[thread] == np.float32(wanted[warp, row, column])


def test_products_of_float64_matrices():
    """mma.m8n8k4."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2, *shape, generator=generator).double() for shape in ((8, 4), (4, 8), (8, 8)))
    fragments = np.zeros((4, 64))
    for thread in range(64):
        warp, lane = divmod(thread, 32)
        fragments[0, thread] = a[warp, lane // 4, lane % 4]
        fragments[1, thread] = b[warp, lane % 4, lane // 4]
        for i in range(2):
            fragments[2 + i, thread] = c[warp, lane // 4, lane % 4 * 2 + i]
    text = "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {{{0}, {1}}}, {{{2}}}, {{{3}}}, {{{4}, {5}}}"
    found = compute(text, list(fragments.view(np.uint64)), [np.uint64] * 2)
    wanted = a @ b + c
    for thread in range(64):
        warp, lane = divmod(thread, 32)
        for i in range(2):
            assert found[i].view(np.float64)[thread] == pytest.approx(
                float(wanted[warp, lane // 4, lane % 4 * 2 + i]), 1e-14
            )
