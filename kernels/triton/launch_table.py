"""The launch table: tiles and warps of every Triton kernel, by type and shape; a reason beside each row.

Of a kernel's rows the first that fits is taken: nothing is tuned at run time. The rows are the same on every
architecture; one that a reason names is where the row was needed, and the others compile without spills, too.
Spills are instructions that Triton 3.8 made, where no other is named, as `python -m
darts_fast.kernels.triton.aot` counts them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Case(NamedTuple):
    """What a launch is looked up by."""

    dtype: torch.dtype  # of the activations
    c: int  # channels, of a convolution's source
    k: int = 0  # channels of a convolution's output
    stride: int = 1
    depthwise: bool = False  # whether a task has a depthwise part
    normalized: bool = False  # whether a source is
    direct: bool = False  # 1x1 convolutions of a source each
    weights: bool = False  # with weight gradients
    tangent: bool = False  # of the last two sweeps
    statistics: bool = False  # with the statistics of a convolution's output
    by_image: bool = False  # p is a number an image
    ahead: int = 0  # bytes a channel of all that a program loads, where it is unrolled over tensors

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize


Rows = tuple[tuple[Callable[[Case], bool], int], ...]


def otherwise(_: Case) -> bool:
    return True


# Positions of a program of a kernel with a dot. 64: a tile of 64 x 64 float32 is 32 registers a thread of 4
# warps, and two or three are alive.
POSITIONS: dict[str, Rows] = {
    "sepconv_fwd_kernel": (
        # With 64 up to 8 spills (sm_90).
        (lambda q: q.bytes == 8, 32),
        # 1x1 of a derived network's two states to 72 outputs: with 64 and 8 warps 2 spills (sm_90).
        (lambda q: q.bytes == 4 and q.direct and 64 < q.k <= 128 and q.statistics, 32),
        # An evaluation: with 64 up to 12 spills (sm_100).
        (lambda q: q.bytes == 4 and q.k > 32 and not q.tangent and not q.statistics, 32),
        # 1x1 tangents: with 64, 16 and 32 outputs spilled twice (sm_100).
        (lambda q: q.bytes == 4 and q.k <= 32 and q.tangent and not q.depthwise, 32),
        # Second halves: with 64, 64 outputs spilled 4 times (Triton 3.6, sm_90).
        (lambda q: q.bytes == 4 and q.k > 32 and q.statistics and q.normalized, 32),
        # With 64, tangents of 64 outputs of bfloat16 spilled 5 times (sm_100).
        (lambda q: q.bytes == 2 and q.k > 32 and q.tangent and q.depthwise, 32),
        (otherwise, 64),
    ),
    "sepconv_bwd_pointwise_kernel": (
        # 64 outputs took 176 KiB of shared memory, where sm_80 has 163.
        (lambda q: q.bytes == 8, 16),
        # Second sweeps of wide searches: with 32, 128 outputs of float32 took 176 KiB and spilled 168 times,
        # 144 of bfloat16 176 and 142 times. (144 of float32 take 192 with 16, too: sm_90 has 227.)
        (lambda q: q.tangent and q.k > 128, 16),
        (lambda q: q.tangent and q.bytes == 4 and q.k > 64, 16),
        # 1x1 weight gradients of a derived network's 36 outputs: with 16 up to 7 spills (sm_100).
        (lambda q: q.bytes == 4 and q.direct and q.weights and 32 < q.k < 64, 32),
        # Those of factorized reduces of 72 channels: with 16 twice (sm_80).
        (lambda q: q.bytes == 4 and q.stride > 1 and q.weights and not q.depthwise and 32 < q.k < 64, 32),
        # The compiler unrolls dots of float32, those of weight gradients over positions. With 32, 1x1
        # convolutions of 32 and 64 outputs spilled.
        (lambda q: q.bytes == 4 and (q.weights or q.tangent) and not q.depthwise and q.k > 16, 16),
        # With 64, weight gradients spilled 141 times; so did second sweeps at 64 channels, in 168 KiB.
        (lambda q: q.bytes == 4 and (q.weights or q.tangent), 32),
        # With 64, 64 outputs of bfloat16 spilled 410 times (sm_100).
        (lambda q: q.tangent, 32),
        # With 64, 1x1 weight gradients of 256 to 64 channels spilled 9 times (sm_100), of 64 to 16 twice
        # (sm_80); of a derived network's 144 outputs they took 188 KiB of shared memory.
        (lambda q: q.bytes == 2 and q.direct and q.weights and q.c > 128 and q.k == 64, 32),
        (lambda q: q.bytes == 2 and q.direct and q.weights and (q.k <= 16 or q.k > 128), 32),
        # Those searches without weight gradients: with 64, 128 outputs of float32 took 168 KiB, 144 took 336,
        # and of 2 bytes 176.
        (lambda q: q.bytes == 4 and not q.weights and q.k > 128, 16),
        (lambda q: q.bytes == 4 and not q.weights and q.k > 64, 32),
        (lambda q: q.bytes == 2 and not q.weights and q.k > 256, 16),
        (lambda q: q.bytes == 2 and not q.weights and q.k > 128, 32),
        # With 64 and 8 warps, a derived network's 72 outputs spilled 3 times, with 4 warps 7 (sm_100).
        (lambda q: q.weights and q.depthwise and 64 < q.k <= 128, 32),
        (otherwise, 64),
    ),
}

# 4 a thread of each tensor, in one load. With 8, tangents of 21 candidates of bfloat16 spilled; with 4, those
# of 35 of float32 (sm_90), whose 35 x 12 bytes are more than the 352 that fit (not all are held at once).
UNROLLED: Rows = ((lambda q: q.ahead <= 352, 512), (otherwise, 256))
# Nine taps are loaded ahead: a tile of 2,048 took 196 registers, which leaves room for 8 of 64 warps. With
# 1,024, 64 channels of bfloat16 (sm_90) and 16 of float16 (sm_100) spilled twice.
POOL: Rows = (
    # With 512, tangents spilled twice (sm_90).
    (lambda q: q.c > 32 and q.bytes == 8, 1024),
    (lambda q: q.c > 32 or q.dtype == torch.float16, 512),
    (otherwise, 1024),
)

# Elements of a program of a kernel without a dot. 2,048: 16 a thread of 4 warps, so that it has four 128-bit
# loads of float32 under way for each of its operands. Of float64, half as many.
ELEMENTS: dict[str, Rows] = {
    "sepconv_bwd_kernel": (
        # With 1,024, second sweeps of bfloat16 spilled twice (sm_100).
        (lambda q: q.stride > 1 and q.bytes == 2, 512),
        # With 2,048, 64 channels of float32 spilled 4 times, with 512 twice (sm_80).
        (lambda q: q.stride > 1, 1024),
        # Second sweeps of second halves of float64: with 2,048, 2 spills (Triton 3.6, sm_90).
        (lambda q: q.bytes == 8 and q.normalized and q.c <= 16, 1024),
        # First halves: with 2,048, 16 channels spilled twice (sm_90); 512 of float64, 437 times.
        (lambda q: q.bytes == 4 and not q.normalized, 1024),
        # Second halves of a derived network's 36 channels: with 2,048, 4 spills (sm_100).
        (lambda q: q.bytes == 2 and 32 < q.c < 64, 1024),
        (otherwise, 2048),
    ),
    "pool_fwd_kernel": POOL,
    "pool_bwd_kernel": POOL,
    "mix_fwd_kernel": UNROLLED,
    "mix_tangent_kernel": (
        # With 256, 35 candidates of float32 spilled 16 times (sm_90), of bfloat16 18 times (sm_100).
        (lambda q: q.c > 32 and q.ahead >= 700, 128),
        # With 256, 28 candidates of float32 spilled twice (Triton 3.6, sm_90).
        (lambda q: q.bytes == 4 and 600 < q.ahead < 700, 128),
        *UNROLLED,
    ),
    "fan_out_kernel": UNROLLED,
    "add_kernel": UNROLLED,
    "norm_sums_kernel": (
        # With 2,048 up to 5 spills, with 1,024 of float16 up to 3 (sm_100).
        (lambda q: q.by_image, 512),
        (otherwise, 2048),
    ),
    "norm_fwd_kernel": (
        # With 2,048, tangents of 64 channels spilled twice (sm_100).
        (lambda q: q.bytes == 4 and q.c > 32, 1024),
        # With gamma and beta, 72 channels of bfloat16 twice (sm_90).
        (lambda q: q.c > 64, 1024),
        (otherwise, 2048),
    ),
}

# Warps of a program of a kernel with a dot; of all others 4.
WARPS: dict[str, Rows] = {
    "sepconv_fwd_kernel": (
        # 1x1 of two states to 72, see above.
        (lambda q: q.bytes == 4 and q.direct and 64 < q.k <= 128 and q.statistics, 4),
        # With 4, a derived network's 144 outputs spilled up to 222 times (float32, sm_90).
        (lambda q: q.k > 64, 8),
        # With 4 up to 6 spills (bfloat16, sm_100). With 8, tangents of 64 spilled, and 16 channels had 64-bit
        # loads; so did 1x1 tangents of 32 of float32 (sm_90), and of 128 to 32 of float64 (Triton 3.6).
        (lambda q: q.bytes == 8 and q.tangent and q.c > 64 and 16 < q.k <= 32, 4),
        (lambda q: q.tangent and 16 < q.k <= 32 and (q.depthwise or q.bytes != 4), 8),
        (otherwise, 4),
    ),
    "sepconv_bwd_pointwise_kernel": (
        # See above; with 32 positions and 8 warps 12 spills.
        (lambda q: q.bytes == 2 and q.weights and q.depthwise and 64 < q.k <= 128, 4),
        # Factorized reduces: with 8, 72 outputs spilled twice, 16 of float64 8 times (Triton 3.6, sm_90).
        (lambda q: q.bytes == 4 and q.weights and not q.depthwise and q.stride > 1 and q.k == 72, 4),
        (lambda q: q.bytes == 8 and q.weights and not q.depthwise and q.stride > 1 and q.c <= 32, 4),
        # With 4, 144 outputs of float32 spilled up to 287 times (sm_90).
        (lambda q: q.k > 64, 8),
        # 1x1 weight gradients of 256 to 64 channels of float64: with 8, 8 spills (sm_100).
        (lambda q: q.bytes == 8 and q.direct and q.weights and q.c > 128 and q.k == 64, 4),
        # 1x1 weight gradients: with 4, of two sources to 32 outputs 13 spills (sm_100).
        (lambda q: q.bytes == 8, 8),
        # Weight gradients of 1x1 convolutions: with 4, of 108 to 36 channels of bfloat16 2 spills (sm_80), of
        # 128 to 64 of float16 24 (sm_100). With 8, of 108 to 36 of float32 spilled (sm_100).
        # With 32 positions and 4, of 128 to 32 of bfloat16 twice (Triton 3.6, sm_90); with 64 and 4, of
        # float16 twice (sm_80).
        (lambda q: q.bytes == 2 and q.direct and q.weights and 16 < q.k <= 64, 8),
        # Factorized reduces of 72 channels, with 32 positions: with 4 twice (sm_90).
        (lambda q: q.bytes == 4 and q.stride > 1 and q.weights and not q.depthwise and 32 < q.k < 64, 8),
        # Of 108 to 36 of float32, with 32 positions: with 4 twice (sm_80).
        (lambda q: q.bytes == 4 and q.direct and q.weights and 32 < q.k < 64, 8),
        # Of 3x3 and 5x5 of 36: 8 (sm_100); with 8, of 5x5 of bfloat16.
        (lambda q: q.dtype == torch.float16 and q.weights and 32 < q.k < 64, 8),
        # Of second halves of 16: 3 (sm_90).
        (lambda q: q.bytes == 4 and q.weights and q.normalized and q.k <= 16, 8),
        (otherwise, 4),
    ),
}


def positions(kernel: str, case: Case) -> int:
    """BLOCK_P of a kernel with a dot."""
    return _first(POSITIONS[kernel], case)


def tile(kernel: str, case: Case) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C) of a kernel without one."""
    block_c = channel_block(case.c)
    return _first(ELEMENTS[kernel], case) * 4 // max(4, case.bytes) // block_c, block_c


def warps(kernel: str, case: Case) -> int:
    return _first(WARPS[kernel], case)


def _first(rows: Rows, case: Case) -> int:
    return next(value for fits, value in rows if fits(case))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def channel_block(channels: int) -> int:
    """Channels of a tile: 16 is the least that tl.dot takes, 64 the most that a tile of positions leaves
    registers for; wider tensors (the 1x1 preprocessing reads up to 256) go through in several."""
    return min(64, max(16, power_of_two(channels)))


def dot_channel_block(channels: int, dtype: torch.dtype) -> int:
    """The same where there is a dot. Wider types than 2 bytes have no tensor cores here, and the compiler
    unrolls their dots: with 64 x 64 channels float32 spilled 5 KB a thread. They take 16 channels a time;
    2-byte types 32, with 64 bfloat16 spilled 144 bytes on sm_80."""
    return min(32, channel_block(channels)) if dtype.itemsize == 2 else 16


def splits_of(tiles: int, entries: int, programs: int = 1024) -> int:
    """Programs that share the tiles of a reduction of each of `entries`: about 1,024 programs in all, eight
    for each of an H100's 132 multiprocessors, and partial sums that are small beside what they are of."""
    return max(1, min(tiles, programs // entries))
