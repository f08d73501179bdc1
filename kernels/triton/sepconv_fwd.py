"""y = P (D * a) with its statistics, or its tangent yd with its sums, in Triton."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from darts_fast.kernels.triton.launch import (
    Launch,
    counters,
    last_program,
    load_affine,
    load_normalizer,
    merge_statistics,
    norms_of,
    pick,
    store_statistics,
    sum_of_products,
    sum_of_rows,
)
from darts_fast.kernels.triton.launch_table import positions, power_of_two, warps
from darts_fast.kernels.triton.sepconv_call import Call, dot
from darts_fast.kernels.types import (
    Reader,
    Source,
    Weights,
    accumulator,
    of_tasks,
    readers_of_tasks,
    row_stride,
)


@triton.jit
def sepconv_fwd_kernel(
    p_x,  # tuple, as all tuples here one a task: the task's source [N, H, W, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_gammas,  # tuple of [C]; this and the next are read if AFFINE
    p_betas,
    p_depthwise,  # tuple of [C, k * k]
    p_pointwise,  # tuple of [K, C]
    p_xd,  # tuple of [N, H, W, C]; this and the next eight are read if TANGENT
    p_xd_sums,  # [3, sources, C]: of xd, xd h, xd H
    p_depthwise_d,
    p_pointwise_d,
    p_own,  # tuple of what the task wrote: y [N, HO, WO, OWN_ROW >= K]
    p_own_means,  # tuple of [K]; so is the next
    p_own_rs,
    p_adjoints,  # tuple of G of the reader [N, HO, WO, G_ROWS[t] >= K]
    p_own_sums,  # tuple of [3, SUM_ROWS[t] >= K], written: of yd, yd h, yd G
    p_y,  # [tasks / JOIN, N, HO, WO, JOIN * K]
    p_partials,  # [tasks, tiles, 2, K] if STATISTICS, [tasks, 3, tiles, K] if TANGENT
    p_statistics,  # [tasks / JOIN, 3, JOIN * K]; written if STATISTICS
    p_counters,
    positions,  # N * HO * WO
    pixels,  # N * H * W
    sources,
    SOURCES: tl.constexpr,  # tuples of integers
    NORMS: tl.constexpr,
    KERNELS: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFTS: tl.constexpr,  # from an output's pixel times the stride to its first tap
    HAS_D: tl.constexpr,  # whether the task has a depthwise part; else z = a
    OWN_NORMS: tl.constexpr,
    OWN_ROW: tl.constexpr,
    G_ROWS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    TANGENT: tl.constexpr,
    STATISTICS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    AFFINE: tl.constexpr,  # the batch norms of the sources have gamma and beta
    JOIN: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    i_tile, i_task = tl.program_id(0), tl.program_id(1)
    tiles = tl.num_programs(0)
    p_in, p_in_d = pick(p_x, i_task), pick(p_xd, i_task)
    p_d, p_dd = pick(p_depthwise, i_task), pick(p_depthwise_d, i_task)
    p_p, p_pd = pick(p_pointwise, i_task), pick(p_pointwise_d, i_task)
    kernel, dilation, shift = pick(KERNELS, i_task), pick(DILATIONS, i_task), pick(SHIFTS, i_task)
    has_norm, i_source = pick(NORMS, i_task), pick(SOURCES, i_task)
    m_d = pick(HAS_D, i_task) > 0
    # Offsets from the image of the tile's first position are small: 32 bits are enough for them.
    i_first = tl.cast(i_tile, tl.int64) * BLOCK_P
    i_image = i_first // (HO * WO)
    o_t = tl.arange(0, BLOCK_P)
    o_p = (i_first - i_image * (HO * WO)).to(tl.int32) + o_t  # [BLOCK_P]
    m_p = i_first + o_t < positions
    o_n, o_y, o_x = o_p // (HO * WO), o_p // WO % HO * STRIDE + shift, o_p % WO * STRIDE + shift
    p_in += i_image * (H * W * C)
    p_in_d += i_image * (H * W * C)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_y = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_mean, b_r = load_normalizer(pick(p_means, i_task), pick(p_rs, i_task), has_norm, o_c, m_c, ACC)
        if AFFINE:
            b_gamma, b_beta = load_affine(pick(p_gammas, i_task), pick(p_betas, i_task), 1, o_c, m_c, ACC)
            b_r = b_r * b_gamma
        if TANGENT and NORMALIZE:
            m_norm = m_c & (has_norm > 0)
            p_sum = p_xd_sums + i_source * C + o_c
            b_md = tl.load(p_sum, mask=m_norm, other=0.0) / pixels
            b_td = tl.load(p_sum + sources * C, mask=m_norm, other=0.0) / pixels
        b_z = tl.zeros([BLOCK_P, BLOCK_C], ACC)
        b_zd = tl.zeros([BLOCK_P, BLOCK_C], ACC)
        for i_tap in range(kernel * kernel):
            o_iy, o_ix = o_y + i_tap // kernel * dilation, o_x + i_tap % kernel * dilation
            m_in = m_p & (o_iy >= 0) & (o_iy < H) & (o_ix >= 0) & (o_ix < W)
            o_in = (o_n * H + o_iy) * W + o_ix
            m = m_in[:, None] & m_c[None, :]
            o = o_in[:, None] * C + o_c[None, :]
            b_d = tl.load(p_d + o_c * (kernel * kernel) + i_tap, mask=m_c & m_d, other=1.0).to(ACC)
            b_h = tl.load(p_in + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            if NORMALIZE:
                b_h = (b_h - b_mean[None, :]) * b_r[None, :]
            if AFFINE:
                b_h += b_beta[None, :]
            b_a = tl.where(m & ~(b_h < 0.0), b_h, 0.0)  # NaN stays
            b_z += b_a * b_d[None, :]
            if TANGENT:
                b_hd = tl.load(p_in_d + o, mask=m, other=0.0).to(ACC)
                if NORMALIZE:
                    b_hd = (b_hd - b_md[None, :] - b_h * b_td[None, :]) * b_r[None, :]
                b_ad = tl.where(m & (b_h > 0.0), b_hd, 0.0)
                b_dd = tl.load(p_dd + o_c * (kernel * kernel) + i_tap, mask=m_c & m_d, other=0.0).to(ACC)
                b_zd += b_ad * b_d[None, :] + b_a * b_dd[None, :]
        o_weight = o_k[None, :] * C + o_c[:, None]
        m_weight = m_k[None, :] & m_c[:, None]
        b_p = tl.load(p_p + o_weight, mask=m_weight, other=0.0)  # [BLOCK_C, BLOCK_K]
        element: tl.constexpr = p_y.dtype.element_ty
        if TANGENT:
            b_pd = tl.load(p_pd + o_weight, mask=m_weight, other=0.0)
            b_y += dot(b_zd.to(element), b_p.to(element), ACC) + dot(b_z.to(element), b_pd.to(element), ACC)
        else:
            b_y += dot(b_z.to(element), b_p.to(element), ACC)
    i_output, i_part = i_task // JOIN, i_task % JOIN
    p_out = p_y + (tl.cast(i_output, tl.int64) * positions + i_first) * (JOIN * K) + i_part * K
    o_out = o_t[:, None] * (JOIN * K) + o_k[None, :]
    tl.store(p_out + o_out, b_y.to(p_y.dtype.element_ty), mask=m_p[:, None] & m_k[None, :])
    if STATISTICS:
        count = tl.minimum(positions - i_first, BLOCK_P).to(ACC)
        p_tile = p_partials + (tl.cast(i_task, tl.int64) * tiles + i_tile) * 2 * K
        store_statistics(p_tile, b_y, m_p, count, o_k, m_k, K)
        if last_program(p_counters + i_task, tiles):
            p_tiles = p_partials + tl.cast(i_task, tl.int64) * tiles * 2 * K
            p_part = p_statistics + (i_output * 3 * JOIN + i_part) * K
            merge_statistics(p_tiles, p_part, positions, tiles, o_k, m_k, K, JOIN * K, BLOCK_P, BLOCK_K, ACC)
    if TANGENT:
        # b_y is 0 beyond the positions, where its inputs are masked.
        g_row, m_own = pick(G_ROWS, i_task), m_p[:, None] & m_k[None, :]
        o_own, o_g = o_t[:, None] * OWN_ROW + o_k[None, :], o_t[:, None] * g_row + o_k[None, :]
        p_mean, p_r, own_norm = pick(p_own_means, i_task), pick(p_own_rs, i_task), pick(OWN_NORMS, i_task)
        b_mean, b_r = load_normalizer(p_mean, p_r, own_norm, o_k, m_k, ACC)
        b_h = tl.load(pick(p_own, i_task) + i_first * OWN_ROW + o_own, mask=m_own, other=0.0).to(ACC)
        p_tile = p_partials + (tl.cast(i_task, tl.int64) * 3 * tiles + i_tile) * K + o_k
        tl.store(p_tile, tl.sum(b_y, axis=0), mask=m_k)
        b_sum = sum_of_products(b_y, b_h - b_mean[None, :]) * b_r
        tl.store(p_tile + tiles * K, b_sum, mask=m_k)
        b_g = tl.load(pick(p_adjoints, i_task) + i_first * g_row + o_g, mask=m_own, other=0.0).to(ACC)
        tl.store(p_tile + 2 * tiles * K, sum_of_products(b_y, b_g), mask=m_k)
        if last_program(p_counters + i_task, tiles):
            p_sums, sum_row = pick(p_own_sums, i_task), pick(SUM_ROWS, i_task)
            for i_sum in tl.static_range(3):
                p_rows = p_partials + (tl.cast(i_task, tl.int64) * 3 + i_sum) * tiles * K
                b_sum = sum_of_rows(p_rows, tiles, K, o_k, m_k, BLOCK_K, ACC)
                tl.store(p_sums + i_sum * sum_row + o_k, b_sum, mask=m_k)


class Tangents(NamedTuple):
    """The arguments of `sepconv_tangent` that `sepconv_forward` does not have."""

    sources: Sequence[Tensor]
    source_sums: Tensor | None
    weights: Sequence[Weights]
    readers: Sequence[Reader]
    sums: Sequence[Tensor]


def forward(call: Call, y: Tensor, statistics: Tensor | None, tangents: Tangents | None = None) -> Launch:
    x, count, k = call.sources[0], len(call.tasks), call.out_shape[1]
    case = call.case()._replace(tangent=tangents is not None, statistics=statistics is not None)
    block_p = positions("sepconv_fwd_kernel", case)
    tiles = triton.cdiv(call.positions(), block_p)
    partials = counts = y  # stand in where they are not wanted
    if statistics is not None:
        partials, counts = x.new_empty(count, tiles, 2, k, dtype=statistics.dtype), counters(x, count)
    if tangents:
        partials = x.new_empty(count, 3, tiles, k, dtype=accumulator(x.dtype))
        counts = counters(x, count)
    depthwise, pointwise = call.weights()
    depthwise_d, pointwise_d = call.weights(tangents.weights if tangents else None)
    of_outputs, constants_of_outputs = _of_outputs(y, tangents, count)
    arguments = {
        "p_x": call.of_tasks(call.sources),
        "p_means": call.of_tasks(call.means),
        "p_rs": call.of_tasks(call.rs),
        "p_gammas": call.of_tasks(call.gammas),
        "p_betas": call.of_tasks(call.betas),
        "p_depthwise": depthwise,
        "p_pointwise": pointwise,
        "p_xd": call.of_tasks(tangents.sources if tangents else call.sources),
        "p_xd_sums": tangents.source_sums if tangents and tangents.source_sums is not None else pointwise[0],
        "p_depthwise_d": depthwise_d,
        "p_pointwise_d": pointwise_d,
        **of_outputs,
        "p_y": y,
        "p_partials": partials,
        "p_statistics": y if statistics is None else statistics,
        "p_counters": counts,
        "positions": call.positions(),
        "pixels": call.pixels(),
        "sources": len(call.sources),
    }
    constants = {
        "SOURCES": tuple(task.source for task in call.tasks),
        "NORMS": call.of_tasks(call.norms),
        **call.geometry(),
        **constants_of_outputs,
        "TANGENT": tangents is not None,
        "STATISTICS": statistics is not None,
        "NORMALIZE": any(call.norms),
        "AFFINE": call.affine,
        "JOIN": count // len(y),
        "K": k,
        **call.sizes(),
        "BLOCK_P": block_p,
        "BLOCK_K": max(16, power_of_two(k)),
    }
    return Launch(sepconv_fwd_kernel, (tiles, count), arguments, constants, warps("sepconv_fwd_kernel", case))


def _of_outputs(y: Tensor, tangents: Tangents | None, count: int) -> tuple[dict, dict]:
    """Returns the arguments and the constants that are of the output of each of `count` tasks."""
    if tangents is None:  # nothing of it is read
        names = "p_own", "p_own_means", "p_own_rs", "p_adjoints", "p_own_sums"
        return dict.fromkeys(names, (y,)), {"OWN_NORMS": (0,), "OWN_ROW": 0, "G_ROWS": (0,), "SUM_ROWS": (0,)}
    readers, sums = readers_of_tasks(tangents.readers, count), of_tasks(tangents.sums, count)
    means, rs, norms = norms_of([Source(reader.y, reader.statistics) for reader in readers])
    arguments = {
        "p_own": tuple(reader.y for reader in readers),
        "p_own_means": means,
        "p_own_rs": rs,
        "p_adjoints": tuple(reader.adjoint for reader in readers),
        "p_own_sums": tuple(sums),
    }
    constants = {
        "OWN_NORMS": norms,
        "OWN_ROW": row_stride(readers[0].y),
        "G_ROWS": tuple(row_stride(reader.adjoint) for reader in readers),
        "SUM_ROWS": tuple(of_reader.stride(0) for of_reader in sums),
    }
    return arguments, constants
