"""What instructions compute, as functions of NumPy arrays of bits; nothing here knows of registers or memory.

Results are those of IEEE 754, rounded to nearest even. Where PTX allows an error (`div.full.f32`,
`sqrt.approx`, and the sums of `mma`), the result here is the exact one, rounded once: a GPU's may differ
by as much as the PTX manual says. A NaN's payload is not specified by PTX for wide types; for 2-byte types
it is 0x7FFF, here too.
"""

from fractions import Fraction

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
NAN_16 = U16(0x7FFF)


# 2-byte types. A bfloat16 is the upper half of a float32.


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 to float32, exactly."""
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), NAN_16, rounded.astype(U16))


def from_f16(bits: np.ndarray) -> np.ndarray:
    return bits.view(F16).astype(F32)


def to_f16(x: np.ndarray) -> np.ndarray:
    """float32 or float16 to the bits of float16."""
    return np.where(np.isnan(x), NAN_16, x.astype(F16).view(U16))


# Fused multiply-add: a b + c rounded once. A sum that is rounded to odd (an inexact one to the neighbour
# whose last bit is 1) can be rounded again, to a type with at least two bits fewer, as if it were exact
# (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b as float64 and what it lacks (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64, rounded to odd."""
    total, rest = two_sum(a, b)
    bits = total.view(np.int64)
    even = (rest != 0) & (bits & 1 == 0) & np.isfinite(total)
    return np.where(even, bits + np.where((rest > 0) == (total > 0), 1, -1), bits).view(F64)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product = np.multiply(a, b, dtype=F64)  # exact
    total = product + c
    # Rounded twice, it is wrong only if the float64 lies halfway between two of float32, or is one of its
    # denormals, which have halfway points elsewhere.
    bits = total.view(U64) & U64(0x7FFFFFFFFFFFFFFF)
    halfway = (bits & U64(0x1FFFFFFF)) == U64(0x10000000)
    denormal = bits - U64(1) < U64(0x380FFFFFFFFFFFFF)
    if (halfway | denormal).any():
        total = sum_to_odd(product, np.broadcast_to(c, product.shape).astype(F64))
    return total.astype(F32)


def fma_bf16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, c = (from_bf16(x).astype(F64) for x in (a, b, c))
    exact = sum_to_odd(a * b, c)
    rounded = exact.astype(F32)
    bits, back = rounded.view(np.int32), rounded.astype(F64)
    even = (back != exact) & (bits & 1 == 0) & ~np.isnan(exact)
    odd = np.where(even, bits + np.where(np.abs(back) < np.abs(exact), 1, -1), bits)
    return to_bf16(odd.astype(np.int32).view(F32))


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _two_product(a, b)
    t_high, t_low = two_sum(c, low)
    v_high, v_low = two_sum(high, t_high)
    rest = sum_to_odd(t_low, v_low)
    result = np.where(rest == 0, v_high, v_high + rest)
    # The steps above are exact where nothing overflows or is a denormal.
    sizes = [np.abs(x) for x in (a, b, c)]
    safe = np.ones(a.shape, bool)
    for size in sizes:
        safe &= (size == 0) | ((size > 2.0**-450) & (size < 2.0**450))
    for i in np.flatnonzero(~safe):
        result[i] = _fma(float(a[i]), float(b[i]), float(c[i]))
    return result


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a b as float64 and what it lacks (Dekker, Veltkamp)."""
    product = a * b
    a_high, b_high = (x * 134217729.0 - (x * 134217729.0 - x) for x in (a, b))  # 2^27 + 1
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _fma(a: float, b: float, c: float) -> float:
    if not np.isfinite([a, b, c]).all():
        return float(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    try:
        return float(exact)
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


# Integers


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.hi: the upper half of a product of 32-bit or 64-bit integers."""
    if a.dtype == np.int64:  # a negative number is its bits less 2^64
        high = multiply_high(a.view(U64), b.view(U64)).view(np.int64)
        return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    if a.dtype != U64:
        wide = np.multiply(a, b, dtype=f"{a.dtype.kind}8")
        return (wide >> wide.dtype.type(32)).astype(a.dtype)
    half, mask = U64(32), U64(0xFFFFFFFF)
    low_a, high_a, low_b, high_b = a & mask, a >> half, b & mask, b >> half
    middle = (low_a * low_b >> half) + low_a * high_b  # less than 2^64
    carry = (middle & mask) + high_a * low_b
    return high_a * high_b + (middle >> half) + (carry >> half)


def bit_field(x: np.ndarray, start: np.ndarray, length: np.ndarray, signed: bool) -> np.ndarray:
    """bfe: `length` bits of a uint32 from bit `start` on, extended by zeros or by the field's upper bit."""
    start, length = ((n & U32(0xFF)).astype(U64) for n in (start, length))
    wide, one = x.astype(U64), U64(1)  # 0 beyond bit 31; shifts by 64 and more give 0
    field = (wide >> start) & ((one << length) - one)
    if signed:
        present = np.minimum(length, U64(32) - np.minimum(start, U64(32)))  # bits that lie inside of x
        sign = (wide >> np.minimum(start + length - one, U64(31))) & one
        field = np.where((length > 0) & (sign == one), field | ~((one << present) - one), field)
    return field.astype(U32)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each byte of the result is one of the eight of (a, b), or eight times its upper bit."""
    both = a.astype(U64) | (b.astype(U64) << U64(32))
    result = np.zeros(np.broadcast(both, selector).shape, U64)
    for i in range(4):
        choice = (selector.astype(U64) >> U64(4 * i)) & U64(0xF)
        byte = (both >> (U64(8) * (choice & U64(7)))) & U64(0xFF)
        sign = np.where(byte & U64(0x80), U64(0xFF), U64(0))
        result |= np.where(choice & U64(8), sign, byte) << U64(8 * i)
    return result.astype(U32)


# Warps. Arrays of a register are [warps * 32].

LANES = np.arange(32)


def shuffle_sources(mode: str, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """shfl: the lane [warps, 32] from which each lane takes its value, for operands of that shape."""
    b, c = b.astype(np.int64), c.astype(np.int64)
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    low = LANES & segment
    limit = low | (clamp & ~segment)
    if mode == "idx":
        source = low | (b & ~segment)
    else:
        source = {"up": LANES - b, "down": LANES + b, "bfly": LANES ^ b}[mode]
    inside = source >= limit if mode == "up" else source <= limit
    return np.where(inside, source, LANES)


def matrix_fragments(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """ldmatrix: uint16 [warps, matrices, 8 rows, 8] to registers [matrices, warps * 32]: lane l has the
    elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4."""
    if transposed:
        rows = rows.swapaxes(2, 3)
    warps, matrices = rows.shape[:2]
    pairs = np.ascontiguousarray(rows.transpose(1, 0, 2, 3)).view(U32)  # [matrices, warps, 8, 4]
    return pairs.reshape(matrices, warps * 32)


def _halves(register: np.ndarray, widen) -> np.ndarray:
    """The two elements of each lane, [warps, 8 groups, 4 lanes of a group, 2]."""
    return widen(np.ascontiguousarray(register).view(U16)).reshape(-1, 8, 4, 2)


def mma_m16n8k16(a: list, b: list, c: list, widen) -> list[np.ndarray]:
    """A [16, 16] B [16, 8] + C [16, 8] of each warp. Registers a (4) and b (2) have two elements of 2 bytes,
    which `widen` makes float32; c (4) has one float32. Of A's registers the odd ones are of the lower eight
    rows, the last two of the right eight columns."""
    a_parts = np.stack([_halves(x, widen) for x in a]).reshape(2, 2, -1, 8, 4, 2)  # [column, row, warp, ...]
    a_matrix = a_parts.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)
    b_parts = np.stack([_halves(x, widen) for x in b])  # [row, warp, column, 4, 2]
    b_matrix = b_parts.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)
    c_parts = np.stack([x.view(F32).reshape(-1, 8, 4) for x in c]).reshape(
        2, 2, -1, 8, 4
    )  # [row, element, ...]
    c_matrix = c_parts.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
    total = np.matmul(a_matrix, b_matrix, dtype=F64) + c_matrix
    parts = total.astype(F32).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [np.ascontiguousarray(part).view(U32) for part in parts]


def mma_m8n8k4(a: list, b: list, c: list) -> list[np.ndarray]:
    """A [8, 4] B [4, 8] + C [8, 8] of each warp, of float64."""
    a_matrix = a[0].view(F64).reshape(-1, 8, 4)
    b_matrix = b[0].view(F64).reshape(-1, 8, 4).swapaxes(1, 2)
    c_matrix = np.stack([x.view(F64).reshape(-1, 8, 4) for x in c], axis=-1).reshape(-1, 8, 8)
    total = (np.matmul(a_matrix, b_matrix) + c_matrix).reshape(-1, 4, 2)
    return [np.ascontiguousarray(total[..., i]).view(U64).reshape(-1) for i in range(2)]
