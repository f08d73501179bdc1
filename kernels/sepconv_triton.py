"""Halves of separable convolutions in Triton: `sepconv_forward`, `sepconv_backward`,
`sepconv_tangent_forward`, `sepconv_second`.

Notation of docs/mathematics.md: a = relu(h), z = D * a, y = P z; capitals are adjoints, a trailing d is a
tangent. The four sweeps are three kernels, each launched once for all tasks of a call:

    sepconv_fwd_kernel            y = P (D * a) and its statistics; as tangent yd = P (D * ad + Dd * a) + Pd z
    sepconv_bwd_pointwise_kernel  Z = P' Y, and the weight gradients; as tangent also Zd = P' Yd + Pd' Y
    sepconv_bwd_kernel            H = [h > 0] D' * Z, summed over a source's tasks; as tangent Hd

Batch norm on load has its own derivative behind the last one: `norm_backward` of mix_triton.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from darts_fast.kernels.handover import Link
from darts_fast.kernels.launch_table import (
    Case,
    dot_channel_block,
    positions,
    power_of_two,
    splits_of,
    tile,
    warps,
)
from darts_fast.kernels.mix_triton import norm_backward, norm_sums
from darts_fast.kernels.sepconv import Own
from darts_fast.kernels.torch_backend import Normalizer, Task
from darts_fast.kernels.triton_launch import (
    ACCUMULATORS,
    Table,
    accumulator,
    counters,
    images,
    last_program,
    launch,
    load_normalizer,
    merge_statistics,
    pick,
    refuse_single_value,
    row_stride,
    store_statistics,
    sum_of_rows,
)

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
    p_partials,  # [tasks, tiles, 2, K]; written unless TANGENT, as the next
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
    HAS_XD: tl.constexpr,  # which tangents are not zero
    HAS_DD: tl.constexpr,
    HAS_PD: tl.constexpr,
    TANGENT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BATCH: tl.constexpr,
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
    m_d, m_xd = pick(HAS_D, i_task) > 0, pick(HAS_XD, i_task) > 0
    m_dd, m_pd = pick(HAS_DD, i_task) > 0, pick(HAS_PD, i_task) > 0
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
        if TANGENT and NORMALIZE and BATCH:
            m_norm = m_c & m_xd & (has_norm > 0)
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
                b_hd = tl.load(p_in_d + o, mask=m & m_xd, other=0.0).to(ACC)
                if NORMALIZE:
                    if BATCH:
                        b_hd = b_hd - b_md[None, :] - b_h * b_td[None, :]
                    b_hd = b_hd * b_r[None, :]
                b_ad = tl.where(m & (b_h > 0.0), b_hd, 0.0)
                b_dd = tl.load(p_dd + o_c * (kernel * kernel) + i_tap, mask=m_c & m_dd, other=0.0).to(ACC)
                b_zd += b_ad * b_d[None, :] + b_a * b_dd[None, :]
        o_weight = o_k[None, :] * C + o_c[:, None]
        m_weight = m_k[None, :] & m_c[:, None]
        b_p = tl.load(p_p + o_weight, mask=m_weight, other=0.0)  # [BLOCK_C, BLOCK_K]
        element: tl.constexpr = p_y.dtype.element_ty
        if TANGENT:
            b_pd = tl.load(p_pd + o_weight, mask=m_weight & m_pd, other=0.0)
            b_y += dot(b_zd.to(element), b_p.to(element), ACC) + dot(b_z.to(element), b_pd.to(element), ACC)
        else:
            b_y += dot(b_z.to(element), b_p.to(element), ACC)
    i_output, i_part = i_task // JOIN, i_task % JOIN
    p_out = p_y + (tl.cast(i_output, tl.int64) * positions + i_first) * (JOIN * K) + i_part * K
    o_out = o_t[:, None] * (JOIN * K) + o_k[None, :]
    tl.store(p_out + o_out, b_y.to(p_y.dtype.element_ty), mask=m_p[:, None] & m_k[None, :])
    if not TANGENT:
        count = tl.minimum(positions - i_first, BLOCK_P).to(ACC)
        p_tile = p_partials + (tl.cast(i_task, tl.int64) * tiles + i_tile) * 2 * K
        store_statistics(p_tile, b_y, m_p, count, o_k, m_k, K)
        if last_program(p_counters + i_task, tiles):
            p_tiles = p_partials + tl.cast(i_task, tl.int64) * tiles * 2 * K
            p_found = p_statistics + (i_output * 3 * JOIN + i_part) * K
            merge_statistics(p_tiles, p_found, positions, tiles, o_k, m_k, K, JOIN * K, BLOCK_P, BLOCK_K, ACC)


@triton.jit
def sepconv_bwd_pointwise_kernel(
    p_x,  # tuples as in the forward kernel; this is read if WEIGHTS or DIRECT, the next three if WEIGHTS
    p_means,
    p_rs,
    p_depthwise,
    p_pointwise,
    p_pointwise_d,  # read if TANGENT
    p_adjoints,  # tuple of Y [N, HO, WO, Y_ROWS[t] >= K]; where LINKED of G, and Y = p B(G)
    p_seconds,  # tuple of Yd; where LINKED of Gd; read if TANGENT
    p_own,  # tuple of y; this and the next four are read where LINKED
    p_own_means,  # tuple of [K]; so is the next
    p_own_rs,
    p_mix_weights,  # tuple of [candidates]
    p_first_sums,  # tuple of [2, candidates, K]: of G, G h
    p_own_d,  # tuple of yd; this and the next two are read where LINKED if TANGENT
    p_own_d_sums,  # tuple of [4, candidates, K]: of yd, yd h, yd G, G
    p_second_sums,  # tuple of [2, candidates, K]: of Gd, Gd h
    p_z,  # [1, or 2 if TANGENT and not DIRECT, tasks, N, HO, WO, C]: Z, Zd
    p_partials,  # [tasks, c blocks, splits, K + TAPS, BLOCK_C]: dP and dD of a program; written if WEIGHTS
    p_gradients,  # [tasks, K * C + C * TAPS]: dP [K, C], dD [C, k * k]; written if WEIGHTS
    p_counters,
    positions,  # N * HO * WO
    tasks,
    NORMS: tl.constexpr,
    KERNELS: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_PD: tl.constexpr,
    HAS_YD: tl.constexpr,
    LINKED: tl.constexpr,  # which tasks' outputs are read by a link; empty: none
    PLACES: tl.constexpr,  # its row in the sums, and the place of its p
    CANDIDATES: tl.constexpr,  # how many rows there are
    WEIGHED: tl.constexpr,  # whether it has a p
    WEIGHTS: tl.constexpr,
    TANGENT: tl.constexpr,
    DIRECT: tl.constexpr,  # `_Call.direct`: write [h > 0] Z, or with TANGENT [h > 0] Zd, in place of Z
    NORMALIZE: tl.constexpr,
    TAPS: tl.constexpr,  # of the largest depthwise kernel
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    Y_ROWS: tl.constexpr,  # from one position of Y and Yd to the next: they may be slices of channels
    OWN_ROW: tl.constexpr,  # the same of y and yd, and from one row of all sums of channels to the next
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    ACC: tl.constexpr,
):
    i_split, i_task, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    p_y, y_row = pick(p_adjoints, i_task), pick(Y_ROWS, i_task)
    element: tl.constexpr = p_z.dtype.element_ty
    o_t, o_k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_k, m_c = o_k < K, o_c < C
    o_weight = o_k[:, None] * C + o_c[None, :]
    m_weight = m_k[:, None] & m_c[None, :]
    b_p = tl.load(pick(p_pointwise, i_task) + o_weight, mask=m_weight, other=0.0)  # [BLOCK_K, BLOCK_C]
    if TANGENT:
        m_pd = m_weight & (pick(HAS_PD, i_task) > 0)
        b_pd = tl.load(pick(p_pointwise_d, i_task) + o_weight, mask=m_pd, other=0.0)
    if WEIGHTS:
        p_in, p_d = pick(p_x, i_task), pick(p_depthwise, i_task)
        kernel, dilation, shift = pick(KERNELS, i_task), pick(DILATIONS, i_task), pick(SHIFTS, i_task)
        m_d = m_c & (pick(HAS_D, i_task) > 0)
        has_norm = pick(NORMS, i_task)
        b_mean, b_r = load_normalizer(pick(p_means, i_task), pick(p_rs, i_task), has_norm, o_c, m_c, ACC)
        o_tap = tl.arange(0, BLOCK_TAPS)
        b_dp = tl.zeros([BLOCK_K, BLOCK_C], ACC)
        b_dd = tl.zeros([BLOCK_TAPS, BLOCK_C], ACC)
    if len(LINKED) > 0:
        m_link = m_k & (pick(LINKED, i_task) > 0)
        i_place, size = pick(PLACES, i_task), pick(CANDIDATES, i_task) * OWN_ROW
        o_sum = i_place * OWN_ROW + o_k
        b_own_mean = tl.load(pick(p_own_means, i_task) + o_k, mask=m_link, other=0.0)
        b_own_r = tl.load(pick(p_own_rs, i_task) + o_k, mask=m_link, other=1.0)
        m_weighed = m_link & (pick(WEIGHED, i_task) > 0)
        b_weight = tl.load(pick(p_mix_weights, i_task) + i_place + o_k * 0, mask=m_weighed, other=1.0)
        b_scale = b_weight * b_own_r  # p r, [BLOCK_K]
        p_sums_1 = pick(p_first_sums, i_task)
        b_g_mean = tl.load(p_sums_1 + o_sum, mask=m_link, other=0.0) / positions
        b_s = tl.load(p_sums_1 + size + o_sum, mask=m_link, other=0.0) / positions
        if TANGENT:
            p_sums_d, p_sums_2 = pick(p_own_d_sums, i_task), pick(p_second_sums, i_task)
            b_md = tl.load(p_sums_d + o_sum, mask=m_link, other=0.0) / positions
            b_td = tl.load(p_sums_d + size + o_sum, mask=m_link, other=0.0) / positions
            b_u = tl.load(p_sums_d + 2 * size + o_sum, mask=m_link, other=0.0) / positions
            b_u = b_own_r * (b_u - b_g_mean * b_md - b_s * b_td)
            b_gd_mean = tl.load(p_sums_2 + o_sum, mask=m_link, other=0.0) / positions
            b_sd = tl.load(p_sums_2 + size + o_sum, mask=m_link, other=0.0) / positions
    for i_tile in range(i_split, tl.cdiv(positions, BLOCK_P), splits):
        i_first = tl.cast(i_tile, tl.int64) * BLOCK_P
        m_p = i_first + o_t < positions
        # 32 bits within the tile: with 64, second sweeps of 16 outputs of float32 spilled twice (sm_100).
        o_in_y = o_t[:, None] * y_row + o_k[None, :]
        m_y = m_p[:, None] & m_k[None, :]
        b_y = tl.load(p_y + i_first * y_row + o_in_y, mask=m_y, other=0.0)  # [BLOCK_P, BLOCK_K]
        if TANGENT:
            m_yd = m_y & (pick(HAS_YD, i_task) > 0)
            b_yd = tl.load(pick(p_seconds, i_task) + i_first * y_row + o_in_y, mask=m_yd, other=0.0)
        if len(LINKED) > 0:
            m_own = m_p[:, None] & m_link[None, :]
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
            b_found = b_z
            if TANGENT:
                b_found = b_zd
            b_x = tl.load(pick(p_x, i_task) + i_first * C + o_out, mask=m_out, other=0.0)
            tl.store(p_out + o_out, tl.where(b_x > 0.0, b_found, 0.0).to(element), mask=m_out)
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
            p_found = p_gradients + tl.cast(i_task, tl.int64) * (K * C + C * TAPS)
            for i_column in range(0, (K + taps) * BLOCK_C, COLUMNS):
                o_column = i_column + tl.arange(0, COLUMNS)
                o_row, o_channel = o_column // BLOCK_C, i_c * BLOCK_C + o_column % BLOCK_C
                m_column = (o_row < K + taps) & (o_channel < C)
                b_sum = sum_of_rows(p_rows, splits, row, o_column, m_column, COLUMNS, ACC)
                o_d = K * C + o_channel * taps + o_row - K
                o_found = tl.where(o_row < K, o_row * C + o_channel, o_d)
                tl.store(p_found + o_found, b_sum, mask=m_column)


@triton.jit
def sepconv_bwd_kernel(
    p_x,  # tuple, as the next three and p_xd one a source: [N, H, W, C]
    p_means,
    p_rs,
    p_xd,  # read if TANGENT, as are the next two
    p_xd_sums,  # [2, sources, C]: of xd, xd h
    p_depthwise_d,  # tuple, one a task, as the next
    p_depthwise,
    p_z,  # [1, or 2 if TANGENT, tasks, N, HO, WO, C]: Z, Zd
    p_found,  # [sources, N, H, W, C]
    p_partials,  # [2, or 4 if TANGENT and not LINKED, sources, tiles, C]; written if SUMS, as the next
    p_sums,  # [2 or 4, sources, C]: of H, H h, and if 4 of first h, first hd
    p_counters,
    pixels,  # N * H * W
    positions,  # N * HO * WO
    SOURCES: tl.constexpr,
    NORMS: tl.constexpr,
    KERNELS: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_XD: tl.constexpr,
    HAS_DD: tl.constexpr,
    TANGENT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SUMS: tl.constexpr,  # batch norm moves with x: write H and its sums, for `norm_backward` or a link
    LINKED: tl.constexpr,  # the sources have links
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
    b_first = tl.zeros([BLOCK_P, BLOCK_C], ACC)  # D' * Z
    b_second = tl.zeros([BLOCK_P, BLOCK_C], ACC)  # D' * Zd + Dd' * Z
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
                if not (TANGENT and LINKED):
                    b_first += b_z * b_d[None, :]
                if TANGENT:
                    m_dd = m_c & (HAS_DD[t] > 0)
                    b_dd = tl.load(p_depthwise_d[t] + o_d, mask=m_dd, other=0.0).to(ACC)
                    p_task_d = p_task + tl.cast(len(SOURCES), tl.int64) * positions * C
                    b_zd = tl.load(p_task_d + o, mask=m, other=0.0).to(ACC)
                    b_second += b_zd * b_d[None, :] + b_z * b_dd[None, :]
    m = m_p[:, None] & m_c[None, :]
    o = i_first * C + (o_t[:, None] * C + o_c[None, :])
    has_norm = pick(NORMS, i_source)
    b_mean, b_r = load_normalizer(pick(p_means, i_source), pick(p_rs, i_source), has_norm, o_c, m_c, ACC)
    b_h = tl.load(pick(p_x, i_source) + o, mask=m, other=0.0).to(ACC)
    b_h = (b_h - b_mean[None, :]) * b_r[None, :]
    m_open = m & (b_h > 0.0)
    b_first = tl.where(m_open, b_first, 0.0)
    b_found = b_first
    if TANGENT:
        b_found = tl.where(m_open, b_second, 0.0)
    entries = tl.num_programs(1)
    tiles = tl.num_programs(0)
    p_tile = p_partials + tl.cast(i_source * tiles + i_tile, tl.int64) * C + o_c
    stride = tl.cast(entries * tiles, tl.int64) * C
    if SUMS:
        if TANGENT and not LINKED:
            # Of B(first) only its product with -r t is wanted: it joins what B is taken of next.
            m_xd = m_c & (pick(HAS_XD, i_source) > 0)
            p_sum = p_xd_sums + i_source * C + o_c
            b_md = tl.load(p_sum, mask=m_xd, other=0.0) / pixels
            b_td = tl.load(p_sum + entries * C, mask=m_xd, other=0.0) / pixels
            b_hd = tl.load(pick(p_xd, i_source) + o, mask=m & m_xd[None, :], other=0.0).to(ACC)
            b_hd = (b_hd - b_md[None, :] - b_h * b_td[None, :]) * b_r[None, :]
            b_found -= b_first * (b_r * b_td)[None, :]
            tl.store(p_tile + 2 * stride, tl.sum(b_first * b_h, axis=0), mask=m_c)
            tl.store(p_tile + 3 * stride, tl.sum(b_first * b_hd, axis=0), mask=m_c)
        tl.store(p_tile, tl.sum(b_found, axis=0), mask=m_c)
        tl.store(p_tile + stride, tl.sum(b_found * b_h, axis=0), mask=m_c)
    elif NORMALIZE:
        b_found = b_found * b_r[None, :]
    p_out = p_found + i_source.to(tl.int64) * pixels * C
    tl.store(p_out + o, b_found.to(p_found.dtype.element_ty), mask=m)
    if SUMS:
        if last_program(p_counters + i_source * tl.num_programs(2) + i_c, tiles):
            for i_sum in tl.static_range(4 if TANGENT and not LINKED else 2):
                p_rows = p_partials + i_sum * stride + tl.cast(i_source * tiles, tl.int64) * C
                b_sum = sum_of_rows(p_rows, tiles, C, o_c, m_c, BLOCK_C, ACC)
                tl.store(p_sums + (i_sum * entries + i_source) * C + o_c, b_sum, mask=m_c)


# Launches


class _Call(NamedTuple):
    """The arguments that the three functions share, as the kernels take them."""

    sources: tuple[Tensor, ...]
    normalizers: tuple[Normalizer | None, ...]
    tasks: tuple[Task, ...]
    depthwise: tuple[Tensor, ...]  # with a tensor that is not read where a task has none
    pointwise: tuple[Tensor, ...]
    has_depthwise: tuple[int, ...]
    out_shape: tuple[int, int, int, int]

    @classmethod
    def of(
        cls,
        sources: Sequence[Tensor],
        normalizers: Sequence[Normalizer | None],
        tasks: Sequence[Task],
        depthwise: Sequence[Tensor | None],
        pointwise: Sequence[Tensor],
    ) -> "_Call":
        x = sources[0]
        if (
            len({s.shape for s in sources}) > 1
            or len({p.shape for p in pointwise}) > 1
            or len({task.stride for task in tasks}) > 1
            or len({s.dtype for s in sources}) > 1
        ):
            raise ValueError("the sources, outputs and strides of one Triton launch must be alike")
        n, _, height, width = x.shape
        stride, k = tasks[0].stride, pointwise[0].shape[0]
        given = tuple(d is not None for d in depthwise)
        return cls(
            tuple(sources),
            tuple(normalizers),
            tuple(tasks),
            tuple(p if d is None else d.contiguous() for d, p in zip(depthwise, pointwise, strict=True)),
            tuple(p.contiguous() for p in pointwise),
            tuple(int(d) for d in given),
            (n, k, -(-height // stride), -(-width // stride)),
        )

    def of_tasks(self, values: Sequence) -> tuple:
        """What each task's source has."""
        return tuple(values[task.source] for task in self.tasks)

    def geometry(self) -> dict:
        """How each task walks its source."""
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
        return tuple(
            d.shape[-1] if has else 1 for d, has in zip(self.depthwise, self.has_depthwise, strict=True)
        )

    def direct(self) -> bool:
        """Whether the tasks are 1x1 convolutions of a source each, whose adjoint is [h > 0] P' Y."""
        plain = all(task == Task(i) for i, task in enumerate(self.tasks)) and not any(self.has_depthwise)
        return plain and len(self.tasks) == len(self.sources) and not any(self.normalizers)

    def case(self) -> Case:
        x = self.sources[0]
        return Case(
            x.dtype,
            x.shape[1],
            self.out_shape[1],
            self.tasks[0].stride,
            any(self.has_depthwise),
            any(self.normalizers),
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

    def outputs(self, join: int) -> Tensor:
        """Uninitialised [tasks / join, N, join * K, HO, WO]."""
        n, k, height, width = self.out_shape
        x = self.sources[0]
        return images(len(self.tasks) // join, (n, join * k, height, width), x.dtype, x.device)

    def positions(self) -> int:
        n, _, height, width = self.out_shape
        return n * height * width

    def pixels(self) -> int:
        n, _, height, width = self.sources[0].shape
        return n * height * width


def sepconv_forward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    join: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """y of every task in the sources' dtype, and their statistics [tasks, 3, K]: one launch. The channels of
    `join` neighbours are side by side in one output."""
    call = _Call.of(sources, normalizers, tasks, depthwise_weights, pointwise_weights)
    refuse_single_value(call.positions())
    x = sources[0]
    tiles = triton.cdiv(call.positions(), positions("sepconv_fwd_kernel", call.case()))
    y = call.outputs(join)
    k, dtype = call.out_shape[1], accumulator(x.dtype)
    partials = x.new_empty(len(tasks), tiles, 2, k, dtype=dtype)
    statistics = x.new_empty(len(y), 3, join * k, dtype=dtype)
    _launch_forward(call, y, (partials, statistics, counters(x, len(tasks))))
    return list(y.unbind()), statistics


def sepconv_backward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    weight_gradients: bool,
    owns: Sequence[Own | None] = (),
    source_links: Sequence[Link] = (),
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """The adjoint of every source (with links, of its batch norm), and the gradients of the weights: None
    where they are not asked for."""
    call = _Call.of(sources, normalizers, tasks, depthwise_weights, pointwise_weights)
    z, sums = _launch_pointwise(call, adjoints, weight_gradients, owns)
    found = list(z[0].unbind()) if call.direct() else _launch_backward(call, z, source_links)
    d_gradients: list[Tensor | None] = [None] * len(tasks)
    p_gradients: list[Tensor | None] = [None] * len(tasks)
    if sums is not None:
        for i, (d, p) in enumerate(zip(depthwise_weights, pointwise_weights, strict=True)):
            p_gradients[i] = sums[i, : p.numel()].view(p.shape)
            if d is not None:
                d_gradients[i] = sums[i, p.numel() : p.numel() + d.numel()].view(d.shape)
    return found, d_gradients, p_gradients


class _Left(NamedTuple):
    """What the tangent sweep leaves for the second backward sweep."""

    adjoints: Sequence[Tensor]
    tangents: "_Tangents"
    outputs: Sequence[Tensor]  # yd of every task
    owns: Sequence[Own | None]
    source_links: Sequence[Link]


def sepconv_tangent_forward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    source_tangents: Sequence[Tensor | None],
    depthwise_tangents: Sequence[Tensor | None],
    pointwise_tangents: Sequence[Tensor | None],
    owns: Sequence[Own | None] = (),
    join: int = 1,
    source_links: Sequence[Link] = (),
    firsts: Sequence[Tensor] = (),
) -> tuple[list[Tensor], _Left]:
    """yd of every task, joined as the outputs are, and what `sepconv_second` needs. A tangent that is None
    is zero. `firsts` are the sources' adjoints that `sepconv_backward` gave, where they have links."""
    call = _Call.of(sources, normalizers, tasks, depthwise_weights, pointwise_weights)
    tangents = _Tangents.of(call, source_tangents, depthwise_tangents, pointwise_tangents, firsts)
    for link in source_links:
        link.tangent_sums = tangents.sums
    y = call.outputs(join)
    _launch_forward(call, y, None, tangents)
    by_task = [part for output in y for part in output.chunk(join, dim=1)]
    return list(y.unbind()), _Left(adjoints, tangents, by_task, owns, source_links)


def sepconv_second(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor | None],
    left: _Left,
) -> list[Tensor]:
    """The second adjoint of every source, from those of the outputs, `adjoints` (None: zero)."""
    call = _Call.of(sources, normalizers, tasks, depthwise_weights, pointwise_weights)
    z, _ = _launch_pointwise(call, left.adjoints, False, left.owns, left, adjoints)
    if call.direct():
        return list(z[0].unbind())
    return _launch_backward(call, z, left.source_links, left.tangents)


class _Tangents(NamedTuple):
    """Tangents of the sources and weights, with tensors that are not read where they are zero."""

    sources: tuple[Tensor, ...]
    depthwise: tuple[Tensor, ...]
    pointwise: tuple[Tensor, ...]
    has_sources: tuple[int, ...]
    has_depthwise: tuple[int, ...]
    has_pointwise: tuple[int, ...]
    sums: (
        Tensor | None
    )  # [2, sources, C]: of xd, xd h, where batch norm moves with x; with links 4, as theirs

    @classmethod
    def of(
        cls,
        call: _Call,
        sources: Sequence[Tensor | None],
        depthwise: Sequence[Tensor | None],
        pointwise: Sequence[Tensor | None],
        firsts: Sequence[Tensor],
    ) -> "_Tangents":
        has_sources = tuple(int(xd is not None) for xd in sources)
        given = tuple(
            x if xd is None else xd.contiguous(memory_format=torch.channels_last)
            for xd, x in zip(sources, call.sources, strict=True)
        )
        batch = Table.of(call.normalizers, call.sources).batch
        return cls(
            given,
            tuple(
                d if dd is None else dd.contiguous() for dd, d in zip(depthwise, call.depthwise, strict=True)
            ),
            tuple(
                p if pd is None else pd.contiguous() for pd, p in zip(pointwise, call.pointwise, strict=True)
            ),
            has_sources,
            tuple(int(dd is not None) for dd in depthwise),
            tuple(int(pd is not None) for pd in pointwise),
            norm_sums(given, call.sources, call.normalizers, firsts or None)
            if batch and any(has_sources)
            else None,
        )


def _launch_forward(
    call: _Call, y: Tensor, statistics: tuple[Tensor, ...] | None, tangents: _Tangents | None = None
) -> None:
    """`statistics` are partial ones, whole ones and counters, unless it is a tangent."""
    partials, found, counts = (y, y, y) if statistics is None else statistics
    table = Table.of(call.normalizers, call.sources)
    k = call.out_shape[1]
    case = call.case()._replace(tangent=tangents is not None)
    block_p = positions("sepconv_fwd_kernel", case)
    tiles = triton.cdiv(call.positions(), block_p)
    none = (0,) * len(call.tasks)
    launch(
        sepconv_fwd_kernel,
        (tiles, len(call.tasks)),
        {
            "p_x": call.of_tasks(call.sources),
            "p_means": call.of_tasks(table.means),
            "p_rs": call.of_tasks(table.rs),
            "p_depthwise": call.depthwise,
            "p_pointwise": call.pointwise,
            "p_xd": call.of_tasks(tangents.sources if tangents else call.sources),
            "p_xd_sums": tangents.sums if tangents and tangents.sums is not None else call.pointwise[0],
            "p_depthwise_d": tangents.depthwise if tangents else call.depthwise,
            "p_pointwise_d": tangents.pointwise if tangents else call.pointwise,
            "p_y": y,
            "p_partials": partials,
            "p_statistics": found,
            "p_counters": counts,
            "positions": call.positions(),
            "pixels": call.pixels(),
            "sources": len(call.sources),
        },
        {
            "SOURCES": tuple(task.source for task in call.tasks),
            "NORMS": call.of_tasks(table.norms),
            **call.geometry(),
            "HAS_XD": call.of_tasks(tangents.has_sources) if tangents else none,
            "HAS_DD": tangents.has_depthwise if tangents else none,
            "HAS_PD": tangents.has_pointwise if tangents else none,
            "TANGENT": tangents is not None,
            "NORMALIZE": any(table.norms),
            "BATCH": tangents is not None and tangents.sums is not None,
            "JOIN": len(call.tasks) // len(y),
            "K": k,
            **call.sizes(),
            "BLOCK_P": block_p,
            "BLOCK_K": max(16, power_of_two(k)),
        },
        warps("sepconv_fwd_kernel", case),
    )


def _launch_pointwise(
    call: _Call,
    adjoints: Sequence[Tensor],
    weight_gradients: bool,
    owns: Sequence[Own | None] = (),
    left: _Left | None = None,
    seconds: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor | None]:
    """Z, and with tangents and second adjoints Zd: [1 or 2, tasks, N, C, HO, WO]; and the tasks' dP and dD,
    flat, if wanted."""
    table = Table.of(call.normalizers, call.sources)
    tangents = left.tangents if left else None
    x, count = call.sources[0], len(call.tasks)
    n, k, out_height, out_width = call.out_shape
    c, dtype = x.shape[1], accumulator(x.dtype)
    has_seconds = tuple(int(yd is not None) for yd in seconds) or (0,) * count
    given = zip(adjoints, seconds or adjoints, strict=True)
    pairs = [_of_one_row_stride(y, y if yd is None else yd) for y, yd in given]
    adjoints, seconds = zip(*pairs, strict=True)
    direct = call.direct()
    layers = 1 if tangents is None or direct else 2
    z = images(layers * count, (n, c, out_height, out_width), x.dtype, x.device).unflatten(0, (layers, count))
    taps = max(call.kernels()) ** 2
    block_c = dot_channel_block(c, x.dtype)
    case = call.case()._replace(weights=weight_gradients, tangent=left is not None)
    block_p = positions("sepconv_bwd_pointwise_kernel", case)
    splits = triton.cdiv(call.positions(), block_p)
    blocks = triton.cdiv(c, block_c)
    partials = gradients = counts = None
    if weight_gradients:
        # Two programs a multiprocessor, which is what 180 registers a thread let in: with 1,024 the partial
        # sums of a weight gradient at 64 channels were more bytes than its operands.
        splits = splits_of(splits, count * blocks, 264)
        partials = x.new_empty(count, blocks, splits, k + taps, block_c, dtype=dtype)
        gradients, counts = x.new_empty(count, k * c + c * taps, dtype=dtype), counters(x, count * blocks)
    launch(
        sepconv_bwd_pointwise_kernel,
        (splits, count, blocks),
        {
            "p_x": call.of_tasks(call.sources) if weight_gradients or direct else call.pointwise,
            "p_means": call.of_tasks(table.means) if weight_gradients else call.pointwise,
            "p_rs": call.of_tasks(table.rs) if weight_gradients else call.pointwise,
            "p_depthwise": call.depthwise if weight_gradients else call.pointwise,
            "p_pointwise": call.pointwise,
            "p_pointwise_d": tangents.pointwise if tangents else call.pointwise,
            "p_adjoints": adjoints,
            "p_seconds": seconds,
            **_own_arguments(owns, adjoints, left),
            "p_z": z,
            "p_partials": z if partials is None else partials,
            "p_gradients": z if gradients is None else gradients,
            "p_counters": z if counts is None else counts,
            "positions": call.positions(),
            "tasks": count,
        },
        {
            "NORMS": call.of_tasks(table.norms),
            **call.geometry(),
            "HAS_PD": tangents.has_pointwise if tangents else (0,) * count,
            "HAS_YD": has_seconds,
            "LINKED": tuple(int(own is not None) for own in owns),
            "PLACES": tuple(own.link.index if own else 0 for own in owns),
            "CANDIDATES": tuple(own.first.shape[1] if own else 0 for own in owns),
            "WEIGHED": tuple(int(own is not None and own.link.weights is not None) for own in owns),
            "WEIGHTS": weight_gradients,
            "TANGENT": tangents is not None,
            "DIRECT": direct,
            "NORMALIZE": any(table.norms),
            "TAPS": taps,
            "Y_ROWS": tuple(map(row_stride, adjoints)),
            "OWN_ROW": next((row_stride(own.y) for own in owns if own), k),
            "K": k,
            **call.sizes(),
            "BLOCK_P": block_p,
            "BLOCK_K": max(16, power_of_two(k)),
            "BLOCK_TAPS": power_of_two(taps),
        },
        warps("sepconv_bwd_pointwise_kernel", case),
    )
    return z, gradients


def _of_one_row_stride(y: Tensor, yd: Tensor) -> tuple[Tensor, Tensor]:
    if row_stride(y) and row_stride(y) == row_stride(yd):
        return y, yd
    return y.contiguous(memory_format=torch.channels_last), yd.contiguous(memory_format=torch.channels_last)


def _own_arguments(owns: Sequence[Own | None], adjoints: Sequence[Tensor], left: _Left | None) -> dict:
    """With tensors that are not read where a task has no link."""
    given = [own for own in owns if own is not None]
    if not given:
        names = (
            "own",
            "own_means",
            "own_rs",
            "mix_weights",
            "first_sums",
            "own_d",
            "own_d_sums",
            "second_sums",
        )
        return {f"p_{name}": adjoints for name in names}
    filled = [given[0] if own is None else own for own in owns]
    return {
        "p_own": tuple(y if own is None else own.y for own, y in zip(owns, adjoints, strict=True)),
        "p_own_means": tuple(own.statistics[0] for own in filled),
        "p_own_rs": tuple(own.statistics[2] for own in filled),
        "p_mix_weights": tuple(
            own.statistics[2] if own.link.weights is None else own.link.weights for own in filled
        ),
        "p_first_sums": tuple(own.first for own in filled),
        "p_own_d": tuple(yd if own else y for own, yd, y in zip(owns, left.outputs, adjoints, strict=True))
        if left
        else adjoints,
        "p_own_d_sums": tuple(
            own.link.tangent_sums[..., own.channels] if left else own.first for own in filled
        ),
        "p_second_sums": tuple(own.link.sums[..., own.channels] if left else own.first for own in filled),
    }


def _launch_backward(
    call: _Call, z: Tensor, links: Sequence[Link], tangents: _Tangents | None = None
) -> list[Tensor]:
    """The adjoints of the sources, or with links of their batch norms; with tangents, the second adjoints."""
    table = Table.of(call.normalizers, call.sources)
    x, count = call.sources[0], len(call.sources)
    c = x.shape[1]
    block_p, block_c = tile("sepconv_bwd_kernel", call.case())
    tiles = triton.cdiv(call.pixels(), block_p)
    found = images(count, x.shape, x.dtype, x.device)
    partials = sums = counts = None
    if table.batch:
        layers, dtype = 2 if tangents is None or links else 4, accumulator(x.dtype)
        partials = x.new_empty(layers, count, tiles, c, dtype=dtype)
        sums, counts = (
            x.new_empty(layers, count, c, dtype=dtype),
            counters(x, count * triton.cdiv(c, block_c)),
        )
    xd_sums = tangents.sums if tangents else None
    none = (0,) * len(call.tasks)
    launch(
        sepconv_bwd_kernel,
        (tiles, count, triton.cdiv(c, block_c)),
        {
            "p_x": call.sources,
            "p_means": table.means,
            "p_rs": table.rs,
            "p_xd": tangents.sources if tangents and not links else call.sources,
            "p_xd_sums": z if xd_sums is None else xd_sums,
            "p_depthwise_d": tangents.depthwise if tangents else call.depthwise,
            "p_depthwise": call.depthwise,
            "p_z": z,
            "p_found": found,
            "p_partials": z if partials is None else partials,
            "p_sums": z if sums is None else sums,
            "p_counters": z if counts is None else counts,
            "pixels": call.pixels(),
            "positions": call.positions(),
        },
        {
            "SOURCES": tuple(task.source for task in call.tasks),
            "NORMS": table.norms,
            **call.geometry(),
            "HAS_XD": tangents.has_sources if tangents and xd_sums is not None else (0,) * count,
            "HAS_DD": tangents.has_depthwise if tangents else none,
            "TANGENT": tangents is not None,
            "NORMALIZE": any(table.norms),
            "SUMS": table.batch,
            "LINKED": bool(links),
            **call.sizes(),
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
        },
    )
    found = list(found.unbind())
    for link in links:
        link.sums = sums
    if links or sums is None:
        return found
    if tangents is None:
        return norm_backward(found, call.sources, call.normalizers, sums)
    yds = [xd if has else None for xd, has in zip(tangents.sources, tangents.has_sources, strict=True)]
    return norm_backward(found, call.sources, call.normalizers, sums, None, yds, xd_sums)
