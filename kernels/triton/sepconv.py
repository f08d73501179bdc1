"""Halves of separable convolutions and 1x1 convolutions in Triton.

Notation of docs/mathematics.md: a = relu(h), z = D * a, y = P z; capitals are adjoints, a trailing d is a
tangent. The four sweeps are three kernels, each launched once for all tasks of a call:

    sepconv_fwd_kernel            y = P (D * a) and its statistics; as tangent yd = P (D * ad + Dd * a) + Pd z
    sepconv_bwd_pointwise_kernel  Z = P' Y, and the weight gradients; as tangent also Zd = P' Yd + Pd' Y
    sepconv_bwd_kernel            H = [h > 0] D' * Z, summed over a source's tasks; as tangent Hd
"""

from collections.abc import Sequence
from typing import NamedTuple

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
    pick,
    row_stride,
    store_statistics,
    sum_of_rows,
)
from darts_fast.kernels.triton.launch_table import (
    Case,
    dot_channel_block,
    positions,
    power_of_two,
    splits_of,
    tile,
    warps,
)
from darts_fast.kernels.triton.mix import norm_sums
from darts_fast.kernels.types import Reader, SecondReader, Source, Task, Weights, accumulator, images

# The interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same and exact.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# Numbers of a weight gradient that the last program adds at a time, over 16 programs (`ROWS` numbers).
COLUMNS = tl.constexpr(128)


@triton.jit
def dot(b_x, b_y, ACC: tl.constexpr):
    """Tensor cores for 2-byte types; float32 as it is, without TF32."""
    if INTERPRETED:
        b_x, b_y = b_x.to(ACC), b_y.to(ACC)
    return tl.dot(b_x, b_y, input_precision="ieee", out_dtype=ACC)


@triton.jit
def sepconv_fwd_kernel(
    p_x,  # tuple, as all tuples here one a task: the task's source [N, H, W, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_depthwise,  # tuple of [C, k * k]
    p_pointwise,  # tuple of [K, C]
    p_xd,  # tuple of [N, H, W, C]; this and the next three are read if TANGENT
    p_xd_sums,  # [2, sources, C]: of xd, xd h
    p_depthwise_d,
    p_pointwise_d,
    p_y,  # [tasks / JOIN, N, HO, WO, JOIN * K]
    p_partials,  # [tasks, tiles, 2, K]; written if STATISTICS, as the next
    p_statistics,  # [tasks / JOIN, 3, JOIN * K]
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
    TANGENT: tl.constexpr,
    STATISTICS: tl.constexpr,
    NORMALIZE: tl.constexpr,
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


@triton.jit
def sepconv_bwd_pointwise_kernel(
    p_x,  # tuples as in the forward kernel; this is read if WEIGHTS or DIRECT, the next three if WEIGHTS
    p_means,
    p_rs,
    p_depthwise,
    p_pointwise,
    p_pointwise_d,  # read if TANGENT
    p_adjoints,  # tuple of G [N, HO, WO, G_ROWS[t] >= K]; Y = p B(G)
    p_seconds,  # tuple of Gd; read if TANGENT
    p_mix_weights,  # tuple of p [candidates]; read where WEIGHED
    p_own,  # tuple of y; this and the next three are read where OWN_NORMS
    p_own_means,  # tuple of [K]; so is the next
    p_own_rs,
    p_first_sums,  # tuple of [2, candidates, K]: of G, G h
    p_own_d,  # tuple of yd; this and the next two are read where OWN_NORMS if TANGENT
    p_own_d_sums,  # tuple of [4, candidates, K]: of yd, yd h, yd G, G
    p_second_sums,  # tuple of [2, candidates, K]: of Gd, Gd h
    p_z,  # [1, or 2 if TANGENT and not DIRECT, tasks, N, HO, WO, C]: Z, Zd
    p_partials,  # [tasks, c blocks, splits, K + TAPS, BLOCK_C]: dP and dD of a program; written if WEIGHTS
    p_gradients,  # [tasks, gradients_row]: dP [K, C], dD [C, k * k]; written if WEIGHTS
    p_counters,
    positions,  # N * HO * WO
    tasks,
    gradients_row,  # K * C + C * TAPS, or K * C if no task has a depthwise part
    NORMS: tl.constexpr,
    KERNELS: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HAS_D: tl.constexpr,
    OWN_NORMS: tl.constexpr,  # which tasks' outputs are normalised by their readers, and so have sums
    WEIGHED: tl.constexpr,  # which have a p
    PLAIN: tl.constexpr,  # whether none are normalised, and none have a p: Y = G
    PLACES: tl.constexpr,  # the reader's index in the sums and in p
    CANDIDATES: tl.constexpr,  # entries of the sums
    WEIGHTS: tl.constexpr,
    TANGENT: tl.constexpr,
    DIRECT: tl.constexpr,  # `_Call.direct`: write [h > 0] Z, or with TANGENT [h > 0] Zd, in place of Z
    NORMALIZE: tl.constexpr,
    TAPS: tl.constexpr,  # of the largest depthwise kernel; 1 if no task has one, whose dD is not stored
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    G_ROWS: tl.constexpr,  # from one position of G and Gd to the next: they may be slices of channels
    OWN_ROW: tl.constexpr,  # the same of y and yd, and from one row of all sums of channels to the next
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    ACC: tl.constexpr,
):
    i_split, i_task, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    p_y, y_row = pick(p_adjoints, i_task), pick(G_ROWS, i_task)
    element: tl.constexpr = p_z.dtype.element_ty
    o_t, o_k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_k, m_c = o_k < K, o_c < C
    o_weight = o_k[:, None] * C + o_c[None, :]
    m_weight = m_k[:, None] & m_c[None, :]
    b_p = tl.load(pick(p_pointwise, i_task) + o_weight, mask=m_weight, other=0.0)  # [BLOCK_K, BLOCK_C]
    if TANGENT:
        b_pd = tl.load(pick(p_pointwise_d, i_task) + o_weight, mask=m_weight, other=0.0)
    if WEIGHTS:
        p_in, p_d = pick(p_x, i_task), pick(p_depthwise, i_task)
        kernel, dilation, shift = pick(KERNELS, i_task), pick(DILATIONS, i_task), pick(SHIFTS, i_task)
        m_d = m_c & (pick(HAS_D, i_task) > 0)
        has_norm = pick(NORMS, i_task)
        b_mean, b_r = load_normalizer(pick(p_means, i_task), pick(p_rs, i_task), has_norm, o_c, m_c, ACC)
        o_tap = tl.arange(0, BLOCK_TAPS)
        b_dp = tl.zeros([BLOCK_K, BLOCK_C], ACC)
        b_dd = tl.zeros([BLOCK_TAPS, BLOCK_C], ACC)
    if not PLAIN:
        m_own_k = m_k & (pick(OWN_NORMS, i_task) > 0)
        i_place, size = pick(PLACES, i_task), pick(CANDIDATES, i_task) * OWN_ROW
        o_sum = i_place * OWN_ROW + o_k
        b_own_mean = tl.load(pick(p_own_means, i_task) + o_k, mask=m_own_k, other=0.0)
        b_own_r = tl.load(pick(p_own_rs, i_task) + o_k, mask=m_own_k, other=1.0)
        m_weighed = m_k & (pick(WEIGHED, i_task) > 0)
        b_weight = tl.load(pick(p_mix_weights, i_task) + i_place + o_k * 0, mask=m_weighed, other=1.0)
        b_scale = b_weight * b_own_r  # p r, [BLOCK_K]
        p_sums_1 = pick(p_first_sums, i_task)
        b_g_mean = tl.load(p_sums_1 + o_sum, mask=m_own_k, other=0.0) / positions
        b_s = tl.load(p_sums_1 + size + o_sum, mask=m_own_k, other=0.0) / positions
        if TANGENT:
            p_sums_d, p_sums_2 = pick(p_own_d_sums, i_task), pick(p_second_sums, i_task)
            b_md = tl.load(p_sums_d + o_sum, mask=m_own_k, other=0.0) / positions
            b_td = tl.load(p_sums_d + size + o_sum, mask=m_own_k, other=0.0) / positions
            b_u = tl.load(p_sums_d + 2 * size + o_sum, mask=m_own_k, other=0.0) / positions
            b_u = b_own_r * (b_u - b_g_mean * b_md - b_s * b_td)
            b_gd_mean = tl.load(p_sums_2 + o_sum, mask=m_own_k, other=0.0) / positions
            b_sd = tl.load(p_sums_2 + size + o_sum, mask=m_own_k, other=0.0) / positions
    for i_tile in range(i_split, tl.cdiv(positions, BLOCK_P), splits):
        i_first = tl.cast(i_tile, tl.int64) * BLOCK_P
        m_p = i_first + o_t < positions
        o_in_y = o_t[:, None] * y_row + o_k[None, :]
        m_y = m_p[:, None] & m_k[None, :]
        b_y = tl.load(p_y + i_first * y_row + o_in_y, mask=m_y, other=0.0)  # [BLOCK_P, BLOCK_K]
        if TANGENT:
            b_yd = tl.load(pick(p_seconds, i_task) + i_first * y_row + o_in_y, mask=m_y, other=0.0)
        if not PLAIN:
            m_own = m_p[:, None] & m_own_k[None, :]
            o_own = o_t[:, None] * OWN_ROW + o_k[None, :]
            b_h = tl.load(pick(p_own, i_task) + i_first * OWN_ROW + o_own, mask=m_own, other=0.0).to(ACC)
            b_h = (b_h - b_own_mean[None, :]) * b_own_r[None, :]
            b_inner = b_y.to(ACC) - b_g_mean[None, :] - b_h * b_s[None, :]  # Y / (p r)
            b_y = tl.where(m_y, b_inner * b_scale[None, :], 0.0)
            if TANGENT:
                p_yd_own = pick(p_own_d, i_task) + i_first * OWN_ROW
                b_hd = tl.load(p_yd_own + o_own, mask=m_own, other=0.0).to(ACC)
                b_hd = (b_hd - b_md[None, :] - b_h * b_td[None, :]) * b_own_r[None, :]
                b_yd = b_yd.to(ACC) - b_gd_mean[None, :] - b_h * (b_sd + b_u)[None, :]
                b_yd -= b_inner * (b_own_r * b_td)[None, :] + b_hd * b_s[None, :]
                b_yd = tl.where(m_y, b_yd * b_scale[None, :], 0.0)
        b_z = dot(b_y.to(element), b_p.to(element), ACC)  # [BLOCK_P, BLOCK_C]
        p_out = p_z + (tl.cast(i_task, tl.int64) * positions + i_first) * C
        o_out = o_t[:, None] * C + o_c[None, :]
        m_out = m_p[:, None] & m_c[None, :]
        if TANGENT:
            b_zd = dot(b_yd.to(element), b_p.to(element), ACC) + dot(b_y.to(element), b_pd.to(element), ACC)
        if DIRECT:
            b_adjoint = b_z
            if TANGENT:
                b_adjoint = b_zd
            b_x = tl.load(pick(p_x, i_task) + i_first * C + o_out, mask=m_out, other=0.0)
            tl.store(p_out + o_out, tl.where(b_x > 0.0, b_adjoint, 0.0).to(element), mask=m_out)
        else:
            tl.store(p_out + o_out, b_z.to(element), mask=m_out)
        if TANGENT and not DIRECT:
            tl.store(p_out + tl.cast(tasks, tl.int64) * positions * C + o_out, b_zd.to(element), mask=m_out)
        if WEIGHTS:
            i_image = i_first // (HO * WO)
            o_p = (i_first - i_image * (HO * WO)).to(tl.int32) + o_t  # [BLOCK_P]
            o_n, o_y, o_x = o_p // (HO * WO), o_p // WO % HO * STRIDE + shift, o_p % WO * STRIDE + shift
            p_image = p_in + i_image * (H * W * C)
            b_forward = tl.zeros([BLOCK_P, BLOCK_C], ACC)  # z, computed again
            for i_tap in range(kernel * kernel):
                o_iy, o_ix = o_y + i_tap // kernel * dilation, o_x + i_tap % kernel * dilation
                m_in = m_p & (o_iy >= 0) & (o_iy < H) & (o_ix >= 0) & (o_ix < W)
                o_in = (o_n * H + o_iy) * W + o_ix
                m = m_in[:, None] & m_c[None, :]
                b_a = tl.load(p_image + (o_in[:, None] * C + o_c[None, :]), mask=m, other=0.0).to(ACC)
                if NORMALIZE:
                    b_a = (b_a - b_mean[None, :]) * b_r[None, :]
                b_a = tl.where(m & ~(b_a < 0.0), b_a, 0.0)  # [BLOCK_P, BLOCK_C]
                b_d = tl.load(p_d + o_c * (kernel * kernel) + i_tap, mask=m_d, other=1.0).to(ACC)
                b_forward += b_a * b_d[None, :]
                b_sum = tl.sum(b_z * b_a, axis=0)  # [BLOCK_C]
                b_dd += tl.where(o_tap[:, None] == i_tap, b_sum[None, :], 0.0)
            b_dp += dot(tl.trans(b_y.to(element)), b_forward.to(element), ACC)
    if WEIGHTS:
        taps = kernel * kernel
        row: tl.constexpr = (K + TAPS) * BLOCK_C
        i_block = i_task * tl.num_programs(2) + i_c
        p_rows = p_partials + tl.cast(i_block * splits, tl.int64) * row
        p_row = p_rows + tl.cast(i_split, tl.int64) * row
        o_b = tl.arange(0, BLOCK_C)
        tl.store(p_row + o_k[:, None] * BLOCK_C + o_b[None, :], b_dp, mask=m_weight)
        o_dd = (K + o_tap)[:, None] * BLOCK_C + o_b[None, :]
        tl.store(p_row + o_dd, b_dd, mask=(o_tap < taps)[:, None] & m_c[None, :])
        if last_program(p_counters + i_block, splits):
            p_task = p_gradients + tl.cast(i_task, tl.int64) * gradients_row
            for i_column in range(0, (K + taps) * BLOCK_C, COLUMNS):
                o_column = i_column + tl.arange(0, COLUMNS)
                o_row, o_channel = o_column // BLOCK_C, i_c * BLOCK_C + o_column % BLOCK_C
                m_column = (o_row < K + taps) & (o_channel < C)
                b_sum = sum_of_rows(p_rows, splits, row, o_column, m_column, COLUMNS, ACC)
                o_d = K * C + o_channel * taps + o_row - K
                o_gradient = tl.where(o_row < K, o_row * C + o_channel, o_d)
                tl.store(p_task + o_gradient, b_sum, mask=m_column & (o_gradient < gradients_row))


@triton.jit
def sepconv_bwd_kernel(
    p_x,  # tuple, as the next two one a source: [N, H, W, C]
    p_means,
    p_rs,
    p_depthwise,  # tuple, one a task, as the next
    p_depthwise_d,  # read if TANGENT
    p_z,  # [1, or 2 if TANGENT, tasks, N, HO, WO, C]: Z, Zd
    p_adjoint,  # [sources, N, H, W, C]
    p_partials,  # [2, sources, tiles, C]; written if SUMS, as the next
    p_sums,  # [2, sources, C]: of H, H h
    p_counters,
    pixels,  # N * H * W
    positions,  # N * HO * WO
    SOURCES: tl.constexpr,
    NORMS: tl.constexpr,
    KERNELS: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HAS_D: tl.constexpr,
    TANGENT: tl.constexpr,
    SUMS: tl.constexpr,
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
    i_tile, i_source, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_first = tl.cast(i_tile, tl.int64) * BLOCK_P
    i_image = i_first // (H * W)
    o_t = tl.arange(0, BLOCK_P)
    o_p = (i_first - i_image * (H * W)).to(tl.int32) + o_t  # [BLOCK_P]
    m_p = i_first + o_t < pixels
    o_n, o_y, o_x = o_p // (H * W), o_p // W % H, o_p % W
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_adjoint = tl.zeros([BLOCK_P, BLOCK_C], ACC)  # D' * Z, or D' * Zd + Dd' * Z
    for t in tl.static_range(len(SOURCES)):  # unrolled: no choice of pointers, and divisions by constants
        if i_source == SOURCES[t]:
            p_task = p_z + (tl.cast(t, tl.int64) * positions + i_image * (HO * WO)) * C
            for i_tap in range(KERNELS[t] * KERNELS[t]):
                # The output whose tap number i_tap is this pixel, if there is one.
                o_oy = o_y - SHIFTS[t] - i_tap // KERNELS[t] * DILATIONS[t]
                o_ox = o_x - SHIFTS[t] - i_tap % KERNELS[t] * DILATIONS[t]
                m_in = m_p & (o_oy >= 0) & (o_oy < HO * STRIDE) & (o_ox >= 0) & (o_ox < WO * STRIDE)
                if STRIDE > 1:
                    m_in = m_in & (o_oy % STRIDE == 0) & (o_ox % STRIDE == 0)
                m = m_in[:, None] & m_c[None, :]
                o = ((o_n * HO + o_oy // STRIDE) * WO + o_ox // STRIDE)[:, None] * C + o_c[None, :]
                o_d = o_c * (KERNELS[t] * KERNELS[t]) + i_tap
                b_d = tl.load(p_depthwise[t] + o_d, mask=m_c & (HAS_D[t] > 0), other=1.0).to(ACC)
                b_z = tl.load(p_task + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
                if TANGENT:
                    b_dd = tl.load(p_depthwise_d[t] + o_d, mask=m_c & (HAS_D[t] > 0), other=0.0).to(ACC)
                    p_task_d = p_task + tl.cast(len(SOURCES), tl.int64) * positions * C
                    b_zd = tl.load(p_task_d + o, mask=m, other=0.0).to(ACC)
                    b_adjoint += b_zd * b_d[None, :] + b_z * b_dd[None, :]
                else:
                    b_adjoint += b_z * b_d[None, :]
    m = m_p[:, None] & m_c[None, :]
    o = i_first * C + (o_t[:, None] * C + o_c[None, :])
    has_norm = pick(NORMS, i_source)
    b_mean, b_r = load_normalizer(pick(p_means, i_source), pick(p_rs, i_source), has_norm, o_c, m_c, ACC)
    b_h = tl.load(pick(p_x, i_source) + o, mask=m, other=0.0).to(ACC)
    b_h = (b_h - b_mean[None, :]) * b_r[None, :]
    b_adjoint = tl.where(m & (b_h > 0.0), b_adjoint, 0.0)
    entries = tl.num_programs(1)
    tiles = tl.num_programs(0)
    p_tile = p_partials + tl.cast(i_source * tiles + i_tile, tl.int64) * C + o_c
    stride = tl.cast(entries * tiles, tl.int64) * C
    if SUMS:
        tl.store(p_tile, tl.sum(b_adjoint, axis=0), mask=m_c)
        tl.store(p_tile + stride, tl.sum(b_adjoint * b_h, axis=0), mask=m_c)
    p_out = p_adjoint + i_source.to(tl.int64) * pixels * C
    tl.store(p_out + o, b_adjoint.to(p_adjoint.dtype.element_ty), mask=m)
    if SUMS:
        if last_program(p_counters + i_source * tl.num_programs(2) + i_c, tiles):
            for i_sum in tl.static_range(2):
                p_rows = p_partials + i_sum * stride + tl.cast(i_source * tiles, tl.int64) * C
                b_sum = sum_of_rows(p_rows, tiles, C, o_c, m_c, BLOCK_C, ACC)
                tl.store(p_sums + (i_sum * entries + i_source) * C + o_c, b_sum, mask=m_c)


# Launches


class _Call(NamedTuple):
    """The arguments that the functions share, as the kernels take them."""

    sources: tuple[Tensor, ...]
    means: tuple[Tensor, ...]  # of the sources
    rs: tuple[Tensor, ...]
    norms: tuple[int, ...]
    tasks: tuple[Task, ...]
    has_depthwise: tuple[int, ...]
    out_shape: tuple[int, int, int, int]  # of a task

    @classmethod
    def of(cls, sources: Sequence[Source], tasks: Sequence[Task]) -> "_Call":
        x, pointwise = sources[0].x, [task.weights.pointwise for task in tasks]
        if (
            len({(source.x.shape, source.x.dtype) for source in sources}) > 1
            or len({p.shape for p in pointwise}) > 1
            or len({task.stride for task in tasks}) > 1
        ):
            raise ValueError("the sources, outputs and strides of one Triton launch must be alike")
        n, _, height, width = x.shape
        stride, k = tasks[0].stride, pointwise[0].shape[0]
        return cls(
            tuple(source.x for source in sources),
            *norms_of(sources),
            tuple(tasks),
            tuple(int(task.weights.depthwise is not None) for task in tasks),
            (n, k, -(-height // stride), -(-width // stride)),
        )

    def of_tasks(self, values: Sequence) -> tuple:
        """Returns the value of each task's source."""
        return tuple(values[task.source] for task in self.tasks)

    def weights(
        self, tangents: Sequence[Weights] | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns the depthwise and the pointwise weights, or their tangents. Where a task has no depthwise
        weights, a tensor that is not read stands in."""
        weights = tangents or [task.weights for task in self.tasks]
        depthwise = tuple(w.pointwise if w.depthwise is None else w.depthwise for w in weights)
        return depthwise, tuple(w.pointwise for w in weights)

    def geometry(self) -> dict:
        """Returns the constants that say how each task walks its source."""
        kernels = self.kernels()
        return {
            "KERNELS": kernels,
            "DILATIONS": tuple(task.dilation for task in self.tasks),
            "SHIFTS": tuple(
                task.offset - task.dilation * (k // 2) for task, k in zip(self.tasks, kernels, strict=True)
            ),
            "HAS_D": self.has_depthwise,
        }

    def kernels(self) -> tuple[int, ...]:
        depthwise = [task.weights.depthwise for task in self.tasks]
        return tuple(1 if d is None else d.shape[-1] for d in depthwise)

    def direct(self) -> bool:
        """Returns whether the tasks are 1x1 convolutions of one source each: its adjoint is [h > 0] P' Y."""
        plain = all(task == Task(i, task.weights) for i, task in enumerate(self.tasks))
        return (
            plain
            and len(self.tasks) == len(self.sources)
            and not any(self.has_depthwise)
            and not any(self.norms)
        )

    def case(self) -> Case:
        x = self.sources[0]
        return Case(
            x.dtype,
            x.shape[1],
            self.out_shape[1],
            self.tasks[0].stride,
            any(self.has_depthwise),
            any(self.norms),
            self.direct(),
        )

    def sizes(self) -> dict:
        x = self.sources[0]
        _, c, height, width = x.shape
        return {
            "H": height,
            "W": width,
            "HO": self.out_shape[2],
            "WO": self.out_shape[3],
            "C": c,
            "STRIDE": self.tasks[0].stride,
            "BLOCK_C": dot_channel_block(c, x.dtype),
            "ACC": ACCUMULATORS[accumulator(x.dtype)],
        }

    def positions(self) -> int:
        n, _, height, width = self.out_shape
        return n * height * width

    def pixels(self) -> int:
        n, _, height, width = self.sources[0].shape
        return n * height * width


def sepconv_forward(
    sources: Sequence[Source], tasks: Sequence[Task], *, y: Tensor, statistics: Tensor | None
) -> list[Launch]:
    return [_forward(_Call.of(sources, tasks), y, statistics)]


def sepconv_backward(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    readers: Sequence[Reader],
    *,
    adjoint: Tensor,
    sums: Tensor | None,
    gradients: Tensor | None,
) -> list[Launch]:
    return _backward(_Call.of(sources, tasks), readers, None, None, adjoint, sums, gradients)


def sepconv_tangent(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    source_tangents: Sequence[Tensor],
    weight_tangents: Sequence[Weights],
    adjoints: Tensor | None,
    *,
    y: Tensor,
    sums: Tensor | None,
) -> list[Launch]:
    tangents = _Tangents(source_tangents, weight_tangents, sums)
    launches = [_forward(_Call.of(sources, tasks), y, None, tangents)]
    if sums is not None:
        launches.insert(0, norm_sums(source_tangents, sources, list(adjoints), sums=sums))
    return launches


def sepconv_second(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    weight_tangents: Sequence[Weights],
    readers: Sequence[SecondReader],
    *,
    adjoint: Tensor,
    sums: Tensor | None,
) -> list[Launch]:
    firsts = [reader.first for reader in readers]
    return _backward(_Call.of(sources, tasks), firsts, readers, weight_tangents, adjoint, sums, None)


class _Tangents(NamedTuple):
    """The tangents of the sources and of the weights, and the sums of the former, see `sepconv_tangent`."""

    sources: Sequence[Tensor]
    weights: Sequence[Weights]
    sums: Tensor | None


def _forward(call: _Call, y: Tensor, statistics: Tensor | None, tangents: _Tangents | None = None) -> Launch:
    x, count, k = call.sources[0], len(call.tasks), call.out_shape[1]
    case = call.case()._replace(tangent=tangents is not None, statistics=statistics is not None)
    block_p = positions("sepconv_fwd_kernel", case)
    tiles = triton.cdiv(call.positions(), block_p)
    partials = counts = None
    if statistics is not None:
        partials = x.new_empty(count, tiles, 2, k, dtype=statistics.dtype)
        counts = counters(x, count)
    depthwise, pointwise = call.weights()
    depthwise_d, pointwise_d = call.weights(tangents.weights if tangents else None)
    arguments = {
        "p_x": call.of_tasks(call.sources),
        "p_means": call.of_tasks(call.means),
        "p_rs": call.of_tasks(call.rs),
        "p_depthwise": depthwise,
        "p_pointwise": pointwise,
        "p_xd": call.of_tasks(tangents.sources if tangents else call.sources),
        "p_xd_sums": tangents.sums if tangents and tangents.sums is not None else pointwise[0],
        "p_depthwise_d": depthwise_d,
        "p_pointwise_d": pointwise_d,
        "p_y": y,
        "p_partials": y if partials is None else partials,
        "p_statistics": y if statistics is None else statistics,
        "p_counters": y if counts is None else counts,
        "positions": call.positions(),
        "pixels": call.pixels(),
        "sources": len(call.sources),
    }
    constants = {
        "SOURCES": tuple(task.source for task in call.tasks),
        "NORMS": call.of_tasks(call.norms),
        **call.geometry(),
        "TANGENT": tangents is not None,
        "STATISTICS": statistics is not None,
        "NORMALIZE": any(call.norms),
        "JOIN": count // len(y),
        "K": k,
        **call.sizes(),
        "BLOCK_P": block_p,
        "BLOCK_K": max(16, power_of_two(k)),
    }
    return Launch(sepconv_fwd_kernel, (tiles, count), arguments, constants, warps("sepconv_fwd_kernel", case))


def _backward(
    call: _Call,
    firsts: Sequence[Reader],
    seconds: Sequence[SecondReader] | None,
    weight_tangents: Sequence[Weights] | None,
    adjoint: Tensor,
    sums: Tensor | None,
    gradients: Tensor | None,
) -> list[Launch]:
    """Returns the launches of the second backward sweep if there are `seconds`, else of the first."""
    if call.direct():
        return [_pointwise(call, firsts, seconds, weight_tangents, adjoint, gradients)]
    n, _, height, width = call.out_shape
    x, count, layers = call.sources[0], len(call.tasks), 1 if seconds is None else 2
    z = images(layers * count, (n, x.shape[1], height, width), x.dtype, x.device).unflatten(
        0, (layers, count)
    )
    return [
        _pointwise(call, firsts, seconds, weight_tangents, z, gradients),
        _depthwise(call, z, weight_tangents, adjoint, sums),
    ]


def _pointwise(
    call: _Call,
    firsts: Sequence[Reader],
    seconds: Sequence[SecondReader] | None,
    weight_tangents: Sequence[Weights] | None,
    z: Tensor,
    gradients: Tensor | None,
) -> Launch:
    """Returns the launch that writes z [1 or 2, tasks, N, C, HO, WO]: Z of the tasks, and with `seconds` Zd;
    or the sources' adjoints, see `_Call.direct`."""
    x, count, k = call.sources[0], len(call.tasks), call.out_shape[1]
    c, dtype = x.shape[1], accumulator(x.dtype)
    taps = max(call.kernels()) ** 2
    block_c = dot_channel_block(c, x.dtype)
    case = call.case()._replace(weights=gradients is not None, tangent=seconds is not None)
    block_p = positions("sepconv_bwd_pointwise_kernel", case)
    splits = triton.cdiv(call.positions(), block_p)
    blocks = triton.cdiv(c, block_c)
    partials = counts = None
    if gradients is not None:
        # Two programs a multiprocessor, which is what 180 registers a thread let in: with 1,024 the partial
        # sums of a weight gradient at 64 channels were more bytes than its operands.
        splits = splits_of(splits, count * blocks, 264)
        partials = x.new_empty(count, blocks, splits, k + taps, block_c, dtype=dtype)
        counts = counters(x, count * blocks)
    depthwise, pointwise = call.weights()
    of_readers, constants_of_readers = _of_readers(firsts, seconds, count // len(firsts))
    arguments = {
        "p_x": call.of_tasks(call.sources) if gradients is not None or call.direct() else pointwise,
        "p_means": call.of_tasks(call.means) if gradients is not None else pointwise,
        "p_rs": call.of_tasks(call.rs) if gradients is not None else pointwise,
        "p_depthwise": depthwise if gradients is not None else pointwise,
        "p_pointwise": pointwise,
        "p_pointwise_d": call.weights(weight_tangents)[1],
        **of_readers,
        "p_z": z,
        "p_partials": z if partials is None else partials,
        "p_gradients": z if gradients is None else gradients,
        "p_counters": z if counts is None else counts,
        "positions": call.positions(),
        "tasks": count,
        "gradients_row": 0 if gradients is None else gradients.stride(0),
    }
    constants = {
        "NORMS": call.of_tasks(call.norms),
        **call.geometry(),
        **constants_of_readers,
        "WEIGHTS": gradients is not None,
        "TANGENT": seconds is not None,
        "DIRECT": call.direct(),
        "NORMALIZE": any(call.norms),
        "TAPS": taps,
        "K": k,
        **call.sizes(),
        "BLOCK_P": block_p,
        "BLOCK_K": max(16, power_of_two(k)),
        "BLOCK_TAPS": power_of_two(taps),
    }
    grid, used = (splits, count, blocks), warps("sepconv_bwd_pointwise_kernel", case)
    return Launch(sepconv_bwd_pointwise_kernel, grid, arguments, constants, used)


def _of_readers(
    firsts: Sequence[Reader], seconds: Sequence[SecondReader] | None, join: int
) -> tuple[dict, dict]:
    """Returns the arguments and the constants that come from the readers; `join` tasks have one reader."""
    firsts = [part for reader in firsts for part in _parts(reader, join)]
    count = len(firsts)
    seconds = [part for reader in seconds for part in _parts(reader, join)] if seconds else [None] * count
    adjoints = tuple(reader.adjoint for reader in firsts)
    second_adjoints = tuple(g if s is None else s.adjoint for g, s in zip(adjoints, seconds, strict=True))
    rows = tuple(map(row_stride, adjoints))
    if rows != tuple(map(row_stride, second_adjoints)):
        raise ValueError("an adjoint and its derivative must have the same strides")
    means, rs, norms = norms_of([Source(reader.adjoint, reader.statistics) for reader in firsts])
    weighed = tuple(int(reader.weights is not None) for reader in firsts)
    # A tuple of pointers has one type, also where a tensor stands in for one that is not read.
    weights = next((reader.weights for reader in firsts if reader.weights is not None), means[0])

    def images_of(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(v if norm else g for v, norm, g in zip(values, norms, adjoints, strict=True))

    def sums_of(values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return tuple(v if norm and v is not None else means[0] for v, norm in zip(values, norms, strict=True))

    arguments = {
        "p_adjoints": adjoints,
        "p_seconds": second_adjoints,
        "p_mix_weights": tuple(weights if r.weights is None else r.weights for r in firsts),
        "p_own": images_of([r.y for r in firsts]),
        "p_own_means": means,
        "p_own_rs": rs,
        "p_first_sums": sums_of([r.sums for r in firsts]),
        "p_own_d": images_of([g if s is None else s.tangent for g, s in zip(adjoints, seconds, strict=True)]),
        "p_own_d_sums": sums_of([s and s.tangent_sums for s in seconds]),
        "p_second_sums": sums_of([s and s.sums for s in seconds]),
    }
    read = [norm or has_p for norm, has_p in zip(norms, weighed, strict=True)]
    constants = {
        "OWN_NORMS": norms,
        "WEIGHED": weighed,
        "PLAIN": not any(read),
        "PLACES": tuple(r.index if is_read else 0 for r, is_read in zip(firsts, read, strict=True)),
        "CANDIDATES": tuple(0 if r.sums is None else r.sums.shape[1] for r in firsts),
        "G_ROWS": rows,
        "OWN_ROW": row_stride(firsts[0].y),
    }
    return arguments, constants


def _parts(reader: Reader | SecondReader, count: int) -> list:
    """Returns the readers of each of `count` equal parts of the channels."""
    if count == 1:
        return [reader]
    by_field = []
    for name, value in zip(reader._fields, reader, strict=True):
        if name == "first":
            by_field.append(_parts(value, count))
        elif isinstance(value, Tensor) and name != "weights":
            by_field.append(value.chunk(count, dim=1 if value.dim() == 4 else -1))
        else:
            by_field.append([value] * count)
    return [type(reader)(*values) for values in zip(*by_field, strict=True)]


def _depthwise(
    call: _Call,
    z: Tensor,
    weight_tangents: Sequence[Weights] | None,
    adjoint: Tensor,
    sums: Tensor | None,
) -> Launch:
    """Returns the launch that writes the sources' adjoints; with tangents, the second ones."""
    x, count = call.sources[0], len(call.sources)
    c = x.shape[1]
    block_p, block_c = tile("sepconv_bwd_kernel", call.case())
    tiles, blocks = triton.cdiv(call.pixels(), block_p), triton.cdiv(c, block_c)
    partials = counts = None
    if sums is not None:
        partials = x.new_empty(2, count, tiles, c, dtype=sums.dtype)
        counts = counters(x, count * blocks)
    arguments = {
        "p_x": call.sources,
        "p_means": call.means,
        "p_rs": call.rs,
        "p_depthwise": call.weights()[0],
        "p_depthwise_d": call.weights(weight_tangents)[0],
        "p_z": z,
        "p_adjoint": adjoint,
        "p_partials": z if partials is None else partials,
        "p_sums": z if sums is None else sums,
        "p_counters": z if counts is None else counts,
        "pixels": call.pixels(),
        "positions": call.positions(),
    }
    constants = {
        "SOURCES": tuple(task.source for task in call.tasks),
        "NORMS": call.norms,
        **call.geometry(),
        "TANGENT": weight_tangents is not None,
        "SUMS": sums is not None,
        **call.sizes(),
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    return Launch(sepconv_bwd_kernel, (tiles, count, blocks), arguments, constants)
