"""3x3 max and average pool of a state, in Triton."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from darts_fast.kernels.triton.launch import (
    ACCUMULATORS,
    Launch,
    counters,
    last_program,
    load_normalizer,
    merge_statistics,
    norms_of,
    store_statistics,
    sum_of_products,
    sum_of_rows,
)
from darts_fast.kernels.triton.launch_table import Case, tile
from darts_fast.kernels.types import Reader, Source, accumulator, row_stride


@triton.jit
def valid_taps(o, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """Returns how many of a window's three rows (or columns) lie in the image, for output rows o."""
    first = o * STRIDE - 1
    return tl.minimum(first + 3, SIZE) - tl.maximum(first, 0)


@triton.jit
def pool_fwd_kernel(
    p_x,  # [N, H, W, C]
    p_max,  # [N, HO, WO, C]; so are the next two
    p_average,
    p_position,  # uint8: which of the window's nine pixels, row-major, is the maximum; read if TANGENT
    p_pools,  # both pools of the image, [N, HO, WO, C] each; this and the next four are read if TANGENT
    p_means,  # tuple of both's [C]; so is the next
    p_rs,
    p_adjoints,  # tuple, one a reader, those of the maximum first: G [N, HO, WO, G_ROWS[j] >= C]
    p_sums,  # tuple, one a reader: [3, SUM_ROWS[j] >= C], written: of yd, yd h, yd G
    p_partials,  # [2, tiles, 2, C] if STATISTICS; [4 + readers, tiles, C] if TANGENT
    p_statistics,  # [2, 3, C], written if STATISTICS
    p_counters,
    positions,  # N * HO * WO
    NORMS: tl.constexpr,  # which pools are normalised by their readers
    READERS: tl.constexpr,  # how many each pool has
    G_ROWS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    TANGENT: tl.constexpr,  # x is a tangent: gather it where the maxima are
    STATISTICS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_tile, tiles = tl.program_id(0), tl.num_programs(0)
    # Offsets from the image of the tile's first position are small: 32 bits are enough for them.
    i_first = tl.cast(i_tile, tl.int64) * BLOCK_P
    i_image = i_first // (HO * WO)
    o_t = tl.arange(0, BLOCK_P)
    o_p = (i_first - i_image * (HO * WO)).to(tl.int32) + o_t  # [BLOCK_P], counted from the image's first
    m_p = i_first + o_t < positions
    o_n, o_y, o_x = o_p // (HO * WO), o_p // WO % HO, o_p % WO
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_out = m_p[:, None] & m_c[None, :]
    o_out = i_first * C + (o_t[:, None] * C + o_c[None, :])
    p_image = p_x + i_image * (H * W * C)
    if TANGENT:
        b_position = tl.load(p_position + o_out, mask=m_out, other=0).to(tl.int32)
    else:
        b_position = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
    b_max = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    if not TANGENT:
        b_max += float("-inf")
    for i_tap in tl.static_range(9):
        o_iy, o_ix = o_y * STRIDE + (i_tap // 3 - 1), o_x * STRIDE + (i_tap % 3 - 1)
        m_in = m_p & (o_iy >= 0) & (o_iy < H) & (o_ix >= 0) & (o_ix < W)
        m = m_in[:, None] & m_c[None, :]
        o_in = ((o_n * H + o_iy) * W + o_ix)[:, None] * C + o_c[None, :]
        b_x = tl.load(p_image + o_in, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        b_sum += b_x
        if TANGENT:
            b_max = tl.where(b_position == i_tap, b_x, b_max)
        else:
            m_more = m & ((b_x > b_max) | (b_x != b_x))  # the first of equals; NaN counts as more
            b_max = tl.where(m_more, b_x, b_max)
            b_position = tl.where(m_more, i_tap, b_position)
    b_count = valid_taps(o_y, STRIDE, H) * valid_taps(o_x, STRIDE, W)
    b_average = b_sum / b_count[:, None].to(ACC)
    tl.store(p_max + o_out, b_max.to(p_max.dtype.element_ty), mask=m_out)
    tl.store(p_average + o_out, b_average.to(p_average.dtype.element_ty), mask=m_out)
    if not TANGENT:
        tl.store(p_position + o_out, b_position.to(tl.uint8), mask=m_out)
    if STATISTICS:
        count = tl.minimum(positions - i_first, BLOCK_P).to(ACC)
        layer = tl.cast(tiles, tl.int64) * 2 * C
        p_tile = p_partials + i_tile * 2 * C
        store_statistics(p_tile, tl.where(m_out, b_max, 0.0), m_p, count, o_c, m_c, C)
        store_statistics(p_tile + layer, tl.where(m_out, b_average, 0.0), m_p, count, o_c, m_c, C)
        if last_program(p_counters + tl.program_id(1), tiles):
            for i in tl.static_range(2):
                p_tiles, p_pool = p_partials + i * layer, p_statistics + i * 3 * C
                merge_statistics(p_tiles, p_pool, positions, tiles, o_c, m_c, C, C, BLOCK_P, BLOCK_C, ACC)
    if TANGENT and READERS[0] + READERS[1] > 0:
        row = tl.cast(tiles, tl.int64) * C
        p_tile = p_partials + i_tile * C + o_c
        for i in tl.static_range(2):
            b_yd = tl.where(m_out, b_max if i == 0 else b_average, 0.0)
            if READERS[i]:
                b_mean, b_r = load_normalizer(p_means[i], p_rs[i], NORMS[i], o_c, m_c, ACC)
                b_y = tl.load(p_pools[i] + o_out, mask=m_out, other=0.0).to(ACC)
                tl.store(p_tile, tl.sum(b_yd, axis=0), mask=m_c)
                tl.store(p_tile + row, sum_of_products(b_yd, b_y - b_mean[None, :]) * b_r, mask=m_c)
                p_tile += 2 * row
                for j in tl.static_range(len(p_adjoints)):
                    if (j >= READERS[0]) == (i == 1):
                        o_g = i_first * G_ROWS[j] + (o_t[:, None] * G_ROWS[j] + o_c[None, :])
                        b_g = tl.load(p_adjoints[j] + o_g, mask=m_out, other=0.0).to(ACC)
                        tl.store(p_tile, sum_of_products(b_yd, b_g), mask=m_c)
                        p_tile += row
        if last_program(p_counters + tl.program_id(1), tiles):
            p_rows = p_partials
            for i in tl.static_range(2):
                if READERS[i]:
                    b_0 = sum_of_rows(p_rows, tiles, C, o_c, m_c, BLOCK_C, ACC)
                    b_1 = sum_of_rows(p_rows + row, tiles, C, o_c, m_c, BLOCK_C, ACC)
                    p_rows += 2 * row
                    for j in tl.static_range(len(p_adjoints)):
                        if (j >= READERS[0]) == (i == 1):
                            tl.store(p_sums[j] + o_c, b_0, mask=m_c)
                            tl.store(p_sums[j] + SUM_ROWS[j] + o_c, b_1, mask=m_c)
                            b_2 = sum_of_rows(p_rows, tiles, C, o_c, m_c, BLOCK_C, ACC)
                            tl.store(p_sums[j] + 2 * SUM_ROWS[j] + o_c, b_2, mask=m_c)
                            p_rows += row


@triton.jit
def pool_bwd_kernel(
    p_max,  # [N, HO, WO, C], adjoints; so are the next two
    p_average,
    p_position,
    p_terms,  # tuple of [N, H, W, TERM_ROWS[k] >= C], which are added
    p_out,  # [N, H, W, C]
    positions,  # N * H * W
    TERM_ROWS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * BLOCK_P
    i_image = i_first // (H * W)
    o_t = tl.arange(0, BLOCK_P)
    o_p = (i_first - i_image * (H * W)).to(tl.int32) + o_t
    m_p = i_first + o_t < positions
    o_n, o_y, o_x = o_p // (H * W), o_p // W % H, o_p % W
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_image = i_image * (HO * WO * C)
    b_out = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i_tap in tl.static_range(9):
        # The window in which this pixel is number i_tap, if there is one.
        o_wy, o_wx = o_y - (i_tap // 3 - 1), o_x - (i_tap % 3 - 1)
        m_in = m_p & (o_wy >= 0) & (o_wy < HO * STRIDE) & (o_wx >= 0) & (o_wx < WO * STRIDE)
        if STRIDE > 1:
            m_in = m_in & (o_wy % STRIDE == 0) & (o_wx % STRIDE == 0)
        o_oy, o_ox = o_wy // STRIDE, o_wx // STRIDE
        m = m_in[:, None] & m_c[None, :]
        o = o_image + (((o_n * HO + o_oy) * WO + o_ox)[:, None] * C + o_c[None, :])
        b_position = tl.load(p_position + o, mask=m, other=9).to(tl.int32)  # 9: of no pixel
        b_max = tl.load(p_max + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        b_average = tl.load(p_average + o, mask=m, other=0.0).to(ACC)
        b_count = valid_taps(o_oy, STRIDE, H) * valid_taps(o_ox, STRIDE, W)
        b_count = tl.where(m_in, b_count, 1).to(ACC)
        b_out += tl.where(b_position == i_tap, b_max, 0.0) + b_average / b_count[:, None]
    m_out = m_p[:, None] & m_c[None, :]
    for k in tl.static_range(len(TERM_ROWS)):
        o_k = i_first * TERM_ROWS[k] + (o_t[:, None] * TERM_ROWS[k] + o_c[None, :])
        b_out += tl.load(p_terms[k] + o_k, mask=m_out, other=0.0).to(ACC)
    o_out = i_first * C + (o_t[:, None] * C + o_c[None, :])
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


def pool_forward(
    x: Tensor, stride: int, *, pools: Tensor, position: Tensor, statistics: Tensor | None
) -> list[Launch]:
    return [_forward(x, position, stride, pools, statistics)]


def pool_tangent(
    tangent: Tensor,
    position: Tensor,
    stride: int,
    readers: Sequence[Sequence[Reader]],
    *,
    pools: Tensor,
    sums: Sequence[Sequence[Tensor]],
) -> list[Launch]:
    return [_forward(tangent, position, stride, pools, None, readers, sums)]


def _forward(
    x: Tensor,
    position: Tensor,
    stride: int,
    pools: Tensor,
    statistics: Tensor | None,
    readers: Sequence[Sequence[Reader]] | None = None,
    sums: Sequence[Sequence[Tensor]] = ((), ()),
) -> Launch:
    """With readers x is a tangent."""
    n, c, height, width = position.shape
    positions = n * height * width
    block_p, block_c = block = tile("pool_fwd_kernel", Case(x.dtype, c))
    tiles, blocks = triton.cdiv(positions, block_p), triton.cdiv(c, block_c)
    partials = counts = x  # stand in where they are not wanted
    if statistics is not None:
        partials, counts = x.new_empty(2, tiles, 2, c, dtype=statistics.dtype), counters(x, blocks)
    flat = [reader for of_pool in readers or () for reader in of_pool]
    flat_sums = [of_reader for of_pool in sums for of_reader in of_pool]
    # Of a pool that nobody reads nothing is read.
    read = [
        Source(of_pool[0].y, of_pool[0].statistics) if of_pool else Source(x)
        for of_pool in readers or ((), ())
    ]
    means, rs, norms = norms_of(read)
    if flat:
        partials = x.new_empty(4 + len(flat), tiles, c, dtype=accumulator(x.dtype))
        counts = counters(x, blocks)
    arguments = {
        "p_x": x,
        "p_max": pools[0],
        "p_average": pools[1],
        "p_position": position,
        "p_pools": tuple(source.x for source in read),
        "p_means": means,
        "p_rs": rs,
        "p_adjoints": tuple(reader.adjoint for reader in flat) or (x,),
        "p_sums": tuple(flat_sums) or (x,),
        "p_partials": partials,
        "p_statistics": x if statistics is None else statistics,
        "p_counters": counts,
        "positions": positions,
    }
    constants = {
        "NORMS": norms,
        "READERS": tuple(map(len, sums)),
        "G_ROWS": tuple(row_stride(reader.adjoint) for reader in flat) or (0,),
        "SUM_ROWS": tuple(of_reader.stride(0) for of_reader in flat_sums) or (0,),
        **_sizes(x, position, stride, block),
        "TANGENT": readers is not None,
        "STATISTICS": statistics is not None,
    }
    return Launch(pool_fwd_kernel, (tiles, blocks), arguments, constants)


def pool_backward(
    position: Tensor, stride: int, pools: Tensor, terms: Sequence[Tensor], *, out: Tensor
) -> list[Launch]:
    n, c, height, width = out.shape
    block_p, block_c = block = tile("pool_bwd_kernel", Case(out.dtype, c))
    arguments = {
        "p_max": pools[0],
        "p_average": pools[1],
        "p_position": position,
        "p_terms": tuple(terms) or (out,),
        "p_out": out,
        "positions": n * height * width,
    }
    constants = {"TERM_ROWS": tuple(map(row_stride, terms)), **_sizes(out, position, stride, block)}
    grid = triton.cdiv(n * height * width, block_p), triton.cdiv(c, block_c)
    return [Launch(pool_bwd_kernel, grid, arguments, constants)]


def _sizes(x: Tensor, pooled: Tensor, stride: int, block: tuple[int, int]) -> dict:
    _, c, height, width = x.shape
    block_p, block_c = block
    return {
        "H": height,
        "W": width,
        "HO": pooled.shape[2],
        "WO": pooled.shape[3],
        "C": c,
        "STRIDE": stride,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "ACC": ACCUMULATORS[accumulator(x.dtype)],
    }
