"""What the Triton kernels share: their launches, the layout of tensors, device functions.

Imported only where Triton kernels run, are compiled or are counted: importing it imports triton.
"""

import functools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from darts_fast.kernels import types
from darts_fast.kernels.types import EPSILON, Source


class Launch(types.Launch):
    """One launch of one kernel: everything that running it, and compiling it without a GPU, need.

    `arguments` are tensors, tuples of tensors and integers by parameter name; `constants` are compiled in.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        constants: dict[str, Any],
        warps: int = 4,
    ):
        values = [v for value in arguments.values() for v in (value if isinstance(value, tuple) else [value])]
        super().__init__(kernel.fn.__name__, [v for v in values if isinstance(v, Tensor)])
        self.kernel, self.grid, self.warps = kernel, grid, warps
        self.arguments, self.constants = arguments, constants

    def run(self) -> None:
        """Launches on the tensors' device, on its current stream."""
        device = self.tensors[0].device
        # Triton launches on the current device, wherever the pointers are.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps)


# Parameters that are slices of longer vectors (p and its gradient), of which a kernel loads or stores single
# elements. With `do_not_specialize_on_alignment` Triton compiles one variant wherever the slice begins.
SLICES_OF_VECTORS = ("p_weights", "p_gradient")

# Tensors

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}


Pointers = tuple[Tensor, ...]


def norms_of(sources: Sequence[Source]) -> tuple[Pointers, Pointers, tuple[int, ...]]:
    """Returns the means and r [C] of the sources, and which sources are normalised."""
    return _rows_of([source.statistics for source in sources], (0, 2), sources[0].x)


def affines_of(sources: Sequence[Source]) -> tuple[Pointers, Pointers, tuple[int, ...]]:
    """Returns gamma and beta [C] of the sources, and which have them."""
    return _rows_of([source.affine for source in sources], (0, 1), sources[0].x)


def _rows_of(
    tensors: Sequence[Tensor | None], rows: tuple[int, int], otherwise: Tensor
) -> tuple[Pointers, Pointers, tuple[int, ...]]:
    """Returns two rows of each tensor, and which tensors there are. Where there is none, a tensor that is not
    read stands in: a row of another, because a tuple of pointers has one type, or `otherwise`."""
    stand_in = next((t[0] for t in tensors if t is not None), otherwise)
    first, second = (tuple(stand_in if t is None else t[row] for t in tensors) for row in rows)
    return first, second, tuple(int(t is not None) for t in tensors)


def weights_row(weights: Iterable[Tensor | None]) -> int:
    """Returns the numbers from one candidate's row to the next where p is by image, [candidates, N]; else 0.

    Raises:
        ValueError: they differ.
    """
    rows = {w.stride(0) for w in weights if w is not None and w.dim() == 2} or {0}
    if len(rows) > 1:
        raise ValueError("the weights by image of one Triton launch must have one row stride")
    return rows.pop()


COUNTERS = 1024  # more than any grid's second and third dimension make
STREAMS = 64  # of a device: more than PyTorch's pool has

_rows: dict[tuple[torch.device, int], int] = {}  # the row of the counters, by device and stream


@functools.cache
def _counters(device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first launch on a device cannot be captured: call the function once before")
    rows = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the other streams' launches come after
    return rows


def counters(like: Tensor, count: int) -> Tensor:
    """Returns zeros in which `last_program` counts, and which it leaves zero.

    All launches of a stream have the same, because they run one after the other. A captured launch has those
    of the stream that it was captured on, so graphs captured on one stream must not be replayed side by side.
    """
    if count > COUNTERS:
        raise ValueError(f"a launch with {count} sums, where there are counters for {COUNTERS}")
    stream = torch.cuda.current_stream(like.device).stream_id if like.is_cuda else 0
    row = _rows.setdefault((like.device, stream), sum(device == like.device for device, _ in _rows))
    if row >= STREAMS:
        raise RuntimeError(f"kernels were launched on more than {STREAMS} streams of {like.device}")
    return _counters(like.device)[row, :count]


# Device functions

EPS = tl.constexpr(EPSILON)


@triton.jit
def pick(values, i_entry):
    """Returns entry number `i_entry` of a tuple of pointers or integers. This is one select an entry: there
    is no table in memory, and the pointers keep their alignment, so that loads stay 128 bits wide."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(i_entry == i, values[i], value)
    return value


@triton.jit
def load_normalizer(p_mean, p_r, has_norm, o_c, m_c, ACC: tl.constexpr):
    """Returns mean and r [BLOCK_C]: 0 and 1 where the entry has no batch norm."""
    m_norm = m_c & (has_norm > 0)
    b_mean = tl.load(p_mean + o_c, mask=m_norm, other=0.0).to(ACC)
    return b_mean, tl.load(p_r + o_c, mask=m_norm, other=1.0).to(ACC)


@triton.jit
def load_affine(p_gamma, p_beta, has_affine, o_c, m_c, ACC: tl.constexpr):
    """Returns gamma and beta [BLOCK_C]: 1 and 0 where the entry has none."""
    m_affine = m_c & (has_affine > 0)
    b_gamma = tl.load(p_gamma + o_c, mask=m_affine, other=1.0).to(ACC)
    return b_gamma, tl.load(p_beta + o_c, mask=m_affine, other=0.0).to(ACC)


# Sums over positions: every program stores those of its tile, and the last one to do so adds them up, always
# in the order of the tiles. No launch only adds, and no result depends on the order of programs.

# Elements that the last program loads at a time: 16 a thread under way. With 4,096 sepconv_fwd_kernel took 96
# registers and 31 % of the threads (bfloat16, 16 channels, sm_90), with 2,048 it takes 56 and 56 %.
ROWS = tl.constexpr(2048)


@triton.jit
def last_program(p_counter, programs):
    """Returns whether this is the last of `programs` to get here. It sees what the others stored before."""
    tl.debug_barrier()  # the stores of all of this program's threads come before the count
    last = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(p_counter, 0)
    return last


@triton.jit
def sum_of_rows(p_rows, rows, stride, o_c, m_c, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """Returns the sums of the columns o_c of [rows, stride]. Other programs wrote the rows, so the loads go
    past the first-level cache."""
    BLOCK_T: tl.constexpr = ROWS // BLOCK_C
    b_sum = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for i_t in range(0, rows, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m = (o_t < rows)[:, None] & m_c[None, :]
        p = p_rows + (o_t.to(tl.int64) * stride)[:, None] + o_c[None, :]
        b_sum += tl.load(p, mask=m, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum, axis=0)  # [BLOCK_C]


@triton.jit
def sum_of_products(b_a, b_b):
    """Returns the sums over positions of a b [BLOCK_C]. The zero changes no bit of a product. Without it the
    compiler may add the products of two threads by a multiply-add, in which each thread leaves its own
    unrounded: they then hold two numbers where both should hold the same one, and either may be stored."""
    return tl.sum(b_a * b_b + 0.0, axis=0)


@triton.jit
def store_statistics(p_tile, b_y, m_p, count, o_c, m_c, C: tl.constexpr):
    """Stores the tile's mean and sum of squares about it, for `merge_statistics`; rows beyond m_p are 0."""
    b_mean = tl.sum(b_y, axis=0) / count  # [BLOCK_C]
    b_d = b_y - b_mean[None, :]  # [BLOCK_P, BLOCK_C]
    # Chosen behind the product, for the reason of `sum_of_products`; a square is no -0, so its zero would go.
    b_squares = tl.where(m_p[:, None], b_d * b_d, 0.0)
    tl.store(p_tile + o_c, b_mean, mask=m_c)
    tl.store(p_tile + C + o_c, tl.sum(b_squares, axis=0), mask=m_c)


@triton.jit
def merge_statistics(
    p_tiles,  # [tiles, 2, C]: mean, and sum of squares about it, of each tile
    p_statistics,  # [3, C]: mean, biased variance, 1 / sqrt(variance + EPSILON)
    positions,
    tiles,
    o_c,
    m_c,
    C: tl.constexpr,
    ROW: tl.constexpr,  # C, or more where the statistics are a slice's
    TILE: tl.constexpr,  # positions of a tile; the last has what is left
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Merges the means first, then the squares about them, so that nothing cancels."""
    BLOCK_T: tl.constexpr = ROWS // BLOCK_C
    b_sum = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for i_t in range(0, tiles, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m = (o_t < tiles)[:, None] & m_c[None, :]
        b_count = tl.minimum(positions - o_t.to(tl.int64) * TILE, TILE).to(ACC)
        p_tile = p_tiles + (o_t.to(tl.int64) * (2 * C))[:, None] + o_c[None, :]
        b_sum += tl.load(p_tile, mask=m, other=0.0, cache_modifier=".cg") * b_count[:, None]
    b_total = tl.sum(b_sum, axis=0) / positions  # [BLOCK_C]
    b_squares = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for i_t in range(0, tiles, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m = (o_t < tiles)[:, None] & m_c[None, :]
        b_count = tl.minimum(positions - o_t.to(tl.int64) * TILE, TILE).to(ACC)
        p_tile = p_tiles + (o_t.to(tl.int64) * (2 * C))[:, None] + o_c[None, :]
        b_d = tl.load(p_tile, mask=m, other=0.0, cache_modifier=".cg") - b_total[None, :]
        b_squares += tl.load(p_tile + C, mask=m, other=0.0, cache_modifier=".cg")
        b_squares += tl.where(m, b_d * b_d * b_count[:, None], 0.0)
    b_variance = tl.sum(b_squares, axis=0) / positions
    tl.store(p_statistics + o_c, b_total, mask=m_c)
    tl.store(p_statistics + ROW + o_c, b_variance, mask=m_c)
    tl.store(p_statistics + 2 * ROW + o_c, 1.0 / tl.sqrt(b_variance + EPS), mask=m_c)
