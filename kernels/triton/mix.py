"""Mixes, batch norms, the tensors that several nodes read, and sums of tensors, in Triton.

Batch norm's derivatives need sums over all positions before they can be written, so they read their tensors
twice: once for the sums (`norm_sums_kernel`), and once where p B(G) is computed on load, by `fan_out_kernel`
here and in sepconv_bwd_pointwise.py.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from darts_fast.kernels.triton.launch import (
    ACCUMULATORS,
    SLICES_OF_VECTORS,
    Launch,
    affines_of,
    counters,
    last_program,
    load_affine,
    load_normalizer,
    norms_of,
    pick,
    sum_of_products,
    sum_of_rows,
    weights_row,
)
from darts_fast.kernels.triton.launch_table import Case, splits_of, tile
from darts_fast.kernels.types import Reader, SecondReader, Source, accumulator, row_stride


@triton.jit
def store_in_all(p_outs, ROWS: tl.constexpr, b_out, o_p, o_c, m):
    for i in tl.static_range(len(p_outs)):
        o_out = o_p[:, None] * ROWS[i] + o_c[None, :]
        tl.store(p_outs[i] + o_out, b_out.to(p_outs[i].dtype.element_ty), mask=m)


@triton.jit
def load_image_weights(p_row, o_p, positions, PIXELS: tl.constexpr, ACC: tl.constexpr):
    """Returns p of each position's image, from a row [N]."""
    return tl.load(p_row + o_p // PIXELS, mask=o_p < positions, other=0.0).to(ACC)


@triton.jit(do_not_specialize_on_alignment=SLICES_OF_VECTORS)
def mix_fwd_kernel(
    p_candidates,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_gammas,  # tuple of [C], as the next; read where AFFINES
    p_betas,
    p_weights,  # [candidates] if WEIGHTS is 1, [candidates, weights_row >= N] if it is 2
    p_outs,  # tuple of [positions, OUT_ROWS[i] >= C], each written
    positions,
    weights_row,
    NORMS: tl.constexpr,  # which candidates are normalised
    AFFINES: tl.constexpr,  # whose batch norms have gamma and beta
    WEIGHTS: tl.constexpr,
    PIXELS: tl.constexpr,  # of an image
    OUT_ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * BLOCK_P
    o_t = tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m = (i_first + o_t < positions)[:, None] & m_c[None, :]
    o = o_t[:, None] * C + o_c[None, :]
    b_total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for k in tl.static_range(len(p_candidates)):
        b_mean, b_r = load_normalizer(p_means[k], p_rs[k], NORMS[k], o_c, m_c, ACC)
        b_scale = b_r  # [BLOCK_C]
        if WEIGHTS == 1:
            b_scale = tl.load(p_weights + k) * b_r
        b_y = tl.load(p_candidates[k] + i_first * C + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        if AFFINES[k]:
            b_gamma, b_beta = load_affine(p_gammas[k], p_betas[k], 1, o_c, m_c, ACC)
            b_h = (b_y - b_mean[None, :]) * (b_scale * b_gamma)[None, :] + b_beta[None, :]
        else:
            b_h = (b_y - b_mean[None, :]) * b_scale[None, :]
        if WEIGHTS == 2:
            p_row = p_weights + k * weights_row
            b_h = b_h * load_image_weights(p_row, i_first + o_t, positions, PIXELS, ACC)[:, None]
        b_total += b_h
    store_in_all(p_outs, OUT_ROWS, b_total, i_first + o_t, o_c, m)


@triton.jit
def add_kernel(
    p_terms,  # tuple of [positions, ROW_STRIDES[k] >= C]
    p_out,  # [positions, C]
    positions,
    ROW_STRIDES: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (o_p < positions)[:, None] & (o_c < C)[None, :]
    b_total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for k in tl.static_range(len(p_terms)):
        o_k = o_p[:, None] * ROW_STRIDES[k] + o_c[None, :]
        b_total += tl.load(p_terms[k] + o_k, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
    tl.store(p_out + (o_p[:, None] * C + o_c[None, :]), b_total.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def fan_out_kernel(
    p_adjoints,  # tuple, one a reader j, those of the first tensor first: G_j [positions, ROWS[j] >= C]; if
    # TANGENT Gd_j
    p_sums,  # tuple, one a reader: [2, CANDIDATES[j], C], of G, G u; if TANGENT of Gd, Gd h
    p_weights,  # tuple, one a reader: p [candidates], or [candidates, weights_row >= N]
    p_gammas,  # tuple, one a reader: [C]; read where AFFINES
    p_tensors,  # tuple of y_c [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_firsts,  # tuple of G_j [positions, FIRST_ROWS[j]]; this and the next three are read if TANGENT
    p_first_sums,
    p_tangents,  # tuple of yd_c
    p_tangent_sums,  # tuple, one a reader: [3, CANDIDATES[j], C], of yd, yd h, yd G
    p_out,  # [tensors, positions, C]: the sum over readers of gamma_j B_c(p_j G_j), or its derivative
    positions,
    weights_row,
    ENDS: tl.constexpr,  # by tensor: how many readers it and those before it have
    PLACES: tl.constexpr,  # the index of a reader in its sums and p
    CANDIDATES: tl.constexpr,
    WEIGHED: tl.constexpr,  # which readers have a p: 1, or 2 if it is by image
    AFFINES: tl.constexpr,  # which have a gamma
    PIXELS: tl.constexpr,  # of an image
    ROWS: tl.constexpr,
    FIRST_ROWS: tl.constexpr,
    NORMS: tl.constexpr,  # which tensors have readers that normalise them
    TANGENT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m = (o_p < positions)[:, None] & m_c[None, :]
    o = o_p[:, None] * C + o_c[None, :]
    share = 1.0 / tl.cast(positions, ACC)  # see mix_tangent_kernel
    for c in tl.static_range(len(p_tensors)):
        b_out = tl.zeros([BLOCK_P, BLOCK_C], ACC)
        b_first = tl.zeros([BLOCK_P, BLOCK_C], ACC)
        b_m = tl.zeros([BLOCK_C], ACC)  # mean(G_c), and below mean(G_c h)
        b_mh = tl.zeros([BLOCK_C], ACC)
        b_mf = tl.zeros([BLOCK_C], ACC)  # the same of the first sweep's
        b_s = tl.zeros([BLOCK_C], ACC)
        b_u = tl.zeros([BLOCK_C], ACC)
        for j in tl.static_range(len(p_adjoints)):
            if ENDS[c] <= j and j < ENDS[c + 1]:  # its readers; Triton 3.6 takes no such bounds of a range
                b_weight = tl.full([], 1.0, ACC)
                if WEIGHED[j] == 1:
                    b_weight = tl.load(p_weights[j] + PLACES[j]).to(ACC)
                o_j = o_p[:, None] * ROWS[j] + o_c[None, :]
                b_g = tl.load(p_adjoints[j] + o_j, mask=m, other=0.0).to(ACC)
                if WEIGHED[j] == 2:
                    p_row = p_weights[j] + PLACES[j] * weights_row
                    b_g = b_g * load_image_weights(p_row, o_p, positions, PIXELS, ACC)[:, None]
                b_part = tl.full([BLOCK_C], 1.0, ACC) * (b_weight * share)
                if AFFINES[j]:
                    b_gamma = tl.load(p_gammas[j] + o_c, mask=m_c, other=0.0).to(ACC)
                    b_g = b_g * b_gamma[None, :]
                    b_part = b_part * b_gamma
                b_out += b_weight * b_g
                if NORMS[c]:
                    size = CANDIDATES[j] * C
                    o_sum = PLACES[j] * C + o_c
                    b_m += b_part * tl.load(p_sums[j] + o_sum, mask=m_c, other=0.0)
                    b_mh += b_part * tl.load(p_sums[j] + size + o_sum, mask=m_c, other=0.0)
                    if TANGENT:
                        o_first = o_p[:, None] * FIRST_ROWS[j] + o_c[None, :]
                        b_first += b_weight * tl.load(p_firsts[j] + o_first, mask=m, other=0.0).to(ACC)
                        b_mf += b_part * tl.load(p_first_sums[j] + o_sum, mask=m_c, other=0.0)
                        b_s += b_part * tl.load(p_first_sums[j] + size + o_sum, mask=m_c, other=0.0)
                        b_u += b_part * tl.load(p_tangent_sums[j] + 2 * size + o_sum, mask=m_c, other=0.0)
        if NORMS[c]:
            b_mean, b_r = load_normalizer(p_means[c], p_rs[c], 1, o_c, m_c, ACC)
            b_h = (tl.load(p_tensors[c] + o, mask=m, other=0.0).to(ACC) - b_mean[None, :]) * b_r[None, :]
            b_out = b_out - b_m[None, :] - b_h * b_mh[None, :]
            if TANGENT:
                # The same for all readers of the tensor.
                p_sum = p_tangent_sums[ENDS[c]] + PLACES[ENDS[c]] * C + o_c
                b_md = tl.load(p_sum, mask=m_c, other=0.0) * share
                b_t = tl.load(p_sum + CANDIDATES[ENDS[c]] * C, mask=m_c, other=0.0) * share
                b_u = b_r * (b_u - b_mf * b_md - b_s * b_t)
                b_yd = tl.load(p_tangents[c] + o, mask=m, other=0.0).to(ACC)
                b_hd = (b_yd - b_md[None, :] - b_h * b_t[None, :]) * b_r[None, :]
                b_out -= (b_first - b_mf[None, :] - b_h * b_s[None, :]) * (b_r * b_t)[None, :]
                b_out -= b_s[None, :] * b_hd + b_u[None, :] * b_h
            b_out = b_out * b_r[None, :]
        p_c = p_out + tl.cast(positions, tl.int64) * C * c
        tl.store(p_c + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize_on_alignment=SLICES_OF_VECTORS)
def norm_sums_kernel(
    p_g,  # tuple of G_k [positions, G_ROW >= C], or if SECOND Gd_k
    p_y,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_partials,  # [2, entries, splits, C]
    p_sums,  # [2, entries, C]: of G, G u, with BY_IMAGE of p G, p G u; if SECOND of Gd, Gd h
    p_weights,  # p [entries, weights_row >= N], read if BY_IMAGE
    p_first_sums,  # [2, entries, C]: of G, G h; this and the next two are read if SECOND
    p_tangent_sums,  # [3, entries, C]: of yd, yd h, yd G, where an entry is normalised
    p_products,  # [entries, C]: of yd G, where it is not
    p_gradient,  # [entries], written if GRADIENT: the sum over channels of G h, if SECOND of Gd h + G hd
    p_blocks,  # [entries, c blocks]: p_gradient of one block; written if there are several
    p_counters,
    positions,
    weights_row,
    NORMS: tl.constexpr,
    GRADIENT: tl.constexpr,  # the entries are a mix's candidates: also the gradient of p
    SECOND: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    PIXELS: tl.constexpr,  # of an image
    G_ROW: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_split, i_entry = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    p_g_k, p_y_k = pick(p_g, i_entry), pick(p_y, i_entry)
    o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    has_norm = pick(NORMS, i_entry)
    b_mean, b_r = load_normalizer(pick(p_means, i_entry), pick(p_rs, i_entry), has_norm, o_c, m_c, ACC)
    share = 1.0 / tl.cast(positions, ACC)  # here: where it is needed, 32 channels of float64 spilled (sm_90)
    b_s = tl.zeros([BLOCK_P, BLOCK_C], ACC)  # sums over tiles, and at the end over a tile's positions
    b_sh = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i_tile in range(i_split, tl.cdiv(positions, BLOCK_P), splits):
        o_p = tl.cast(i_tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        m = (o_p < positions)[:, None] & m_c[None, :]
        o = o_p[:, None] * C + o_c[None, :]
        o_g = o_p[:, None] * G_ROW + o_c[None, :]
        b_g = tl.load(p_g_k + o_g, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        if BY_IMAGE:
            p_row = p_weights + i_entry * weights_row
            b_g = b_g * load_image_weights(p_row, o_p, positions, PIXELS, ACC)[:, None]
        b_h = (tl.load(p_y_k + o, mask=m, other=0.0).to(ACC) - b_mean[None, :]) * b_r[None, :]
        b_s += b_g
        b_sh += b_g * b_h
    entries = tl.num_programs(1)
    p_split = p_partials + (i_entry * splits + i_split) * C + o_c
    stride = tl.cast(entries * splits, tl.int64) * C
    tl.store(p_split, tl.sum(b_s, axis=0), mask=m_c)
    tl.store(p_split + stride, tl.sum(b_sh, axis=0), mask=m_c)
    if last_program(p_counters + i_entry * tl.num_programs(2) + tl.program_id(2), splits):
        p_rows = p_partials + i_entry * splits * C
        p_k = p_sums + i_entry * C + o_c
        b_0 = sum_of_rows(p_rows, splits, C, o_c, m_c, BLOCK_C, ACC)
        b_1 = sum_of_rows(p_rows + stride, splits, C, o_c, m_c, BLOCK_C, ACC)
        tl.store(p_k, b_0, mask=m_c)
        tl.store(p_k + entries * C, b_1, mask=m_c)
        if GRADIENT:
            b_terms = b_1
            if SECOND:
                o_k, m_norm = i_entry * C + o_c, m_c & (has_norm > 0)
                b_g = tl.load(p_first_sums + o_k, mask=m_norm, other=0.0)
                b_gh = tl.load(p_first_sums + entries * C + o_k, mask=m_norm, other=0.0)
                b_yd = tl.load(p_tangent_sums + o_k, mask=m_norm, other=0.0)
                b_ydh = tl.load(p_tangent_sums + entries * C + o_k, mask=m_norm, other=0.0)
                b_ydg = tl.load(p_tangent_sums + 2 * entries * C + o_k, mask=m_norm, other=0.0)
                b_ydg += tl.load(p_products + o_k, mask=m_c & (has_norm == 0), other=0.0)
                b_terms += b_r * (b_ydg - (b_g * b_yd + b_gh * b_ydh) * share)
            gradient = tl.sum(tl.where(m_c, b_terms, 0.0), axis=0)
            BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
            if BLOCKS == 1:
                tl.store(p_gradient + i_entry, gradient)
            else:
                p_of_blocks = p_blocks + i_entry * BLOCKS
                tl.store(p_of_blocks + tl.program_id(2), gradient)
                if last_program(p_counters + entries * BLOCKS + i_entry, BLOCKS):
                    total = tl.load(p_of_blocks, cache_modifier=".cg")
                    for i in tl.static_range(1, BLOCKS):
                        total += tl.load(p_of_blocks + i, cache_modifier=".cg")
                    tl.store(p_gradient + i_entry, total)


@triton.jit
def norm_fwd_kernel(
    p_y,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_gammas,  # tuple of [C], as the next; read where AFFINES
    p_betas,
    p_tangents,  # tuple of yd_k; read if TANGENT, as is the next
    p_sums,  # [3, entries, C]: of yd, yd h, yd G
    p_out,  # [entries, positions, C]: h, or if TANGENT hd
    positions,
    NORMS: tl.constexpr,
    AFFINES: tl.constexpr,
    TANGENT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_entry, entries = tl.program_id(1), tl.num_programs(1)
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m = (o_p < positions)[:, None] & m_c[None, :]
    o = o_p[:, None] * C + o_c[None, :]
    has_norm = pick(NORMS, i_entry)
    b_mean, b_r = load_normalizer(pick(p_means, i_entry), pick(p_rs, i_entry), has_norm, o_c, m_c, ACC)
    b_out = tl.load(pick(p_y, i_entry) + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
    b_out = (b_out - b_mean[None, :]) * b_r[None, :]
    if AFFINES[0]:
        p_gamma, p_beta, has_affine = pick(p_gammas, i_entry), pick(p_betas, i_entry), pick(AFFINES, i_entry)
        b_gamma, b_beta = load_affine(p_gamma, p_beta, has_affine, o_c, m_c, ACC)
        b_out = b_out * b_gamma[None, :] + b_beta[None, :]
    if TANGENT:
        m_norm = m_c & (has_norm > 0)
        p_sum = p_sums + i_entry * C + o_c
        b_md = tl.load(p_sum, mask=m_norm, other=0.0) / positions
        b_t = tl.load(p_sum + entries * C, mask=m_norm, other=0.0) / positions
        b_yd = tl.load(pick(p_tangents, i_entry) + o, mask=m, other=0.0).to(ACC)
        b_out = (b_yd - b_md[None, :] - b_out * b_t[None, :]) * b_r[None, :]
    p_k = p_out + tl.cast(i_entry, tl.int64) * positions * C
    tl.store(p_k + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize_on_alignment=SLICES_OF_VECTORS)
def mix_tangent_kernel(
    p_candidates,  # tuple of y_k [positions, C]
    p_tangents,  # tuple of yd_k
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weights,  # [candidates]
    p_sums,  # [3, candidates, C]: of yd, yd h, yd G, where a candidate is normalised
    p_adjoint,  # [positions, G_ROW >= C]: G; this and the next three are there if any is not
    p_partials,  # [tiles, how many are not, C]
    p_products,  # [candidates, C]: of yd G, written where a candidate is not normalised
    p_counters,
    p_outs,  # tuple of [positions, OUT_ROWS[i] >= C], each written: od
    positions,
    NORMS: tl.constexpr,
    PRODUCTS: tl.constexpr,  # how many candidates are not normalised
    G_ROW: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * BLOCK_P
    o_t = tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m = (i_first + o_t < positions)[:, None] & m_c[None, :]
    o = o_t[:, None] * C + o_c[None, :]
    if PRODUCTS:
        # These tangents are read again below, from the cache: in the loop there, whose loads are all ahead,
        # their sums made 35 candidates spill 187 times (float32, sm_90). The barrier keeps the loops apart.
        p_tile = p_partials + tl.program_id(0).to(tl.int64) * (PRODUCTS * C) + o_c
        o_g = (i_first + o_t)[:, None] * G_ROW + o_c[None, :]
        b_g = tl.load(p_adjoint + o_g, mask=m, other=0.0).to(ACC)
        for k in tl.static_range(len(p_candidates)):
            if not NORMS[k]:
                b_yd = tl.load(p_tangents[k] + i_first * C + o, mask=m, other=0.0).to(ACC)
                tl.store(p_tile, sum_of_products(b_yd, b_g), mask=m_c)
                p_tile += C
        tl.debug_barrier()
    b_total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    # A division of float64 is a call: with two a candidate, 35 candidates spilled 26 times (sm_90, sm_100).
    share = 1.0 / tl.cast(positions, ACC)
    for k in tl.static_range(len(p_candidates)):
        b_mean, b_r = load_normalizer(p_means[k], p_rs[k], NORMS[k], o_c, m_c, ACC)
        b_hd = tl.load(p_tangents[k] + i_first * C + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        if NORMS[k]:
            p_sums_k = p_sums + k * C + o_c
            b_md = tl.load(p_sums_k, mask=m_c, other=0.0) * share
            b_t = tl.load(p_sums_k + len(p_candidates) * C, mask=m_c, other=0.0) * share
            b_y = tl.load(p_candidates[k] + i_first * C + o, mask=m, other=0.0).to(ACC)
            b_h = (b_y - b_mean[None, :]) * b_r[None, :]
            b_hd = b_hd - b_md[None, :] - b_h * b_t[None, :]
        b_total += b_hd * (b_r * tl.load(p_weights + k))[None, :]
    store_in_all(p_outs, OUT_ROWS, b_total, i_first + o_t, o_c, m)
    if PRODUCTS:
        tiles = tl.num_programs(0)
        if last_program(p_counters + tl.program_id(1), tiles):
            p_rows = p_partials
            for k in tl.static_range(len(p_candidates)):
                if not NORMS[k]:
                    b_sum = sum_of_rows(p_rows, tiles, PRODUCTS * C, o_c, m_c, BLOCK_C, ACC)
                    tl.store(p_products + k * C + o_c, b_sum, mask=m_c)
                    p_rows += C


def mix_forward(
    candidates: Sequence[Source], weights: Tensor | None, *, outs: Sequence[Tensor]
) -> list[Launch]:
    y, (means, rs, norms) = candidates[0].x, norms_of(candidates)
    gammas, betas, affines = affines_of(candidates)
    sizes, (tiles, blocks) = _sizes("mix_fwd_kernel", y, len(candidates))
    arguments = {
        "p_candidates": tuple(source.x for source in candidates),
        "p_means": means,
        "p_rs": rs,
        "p_gammas": gammas,
        "p_betas": betas,
        "p_weights": y if weights is None else weights,
        "p_outs": tuple(outs),
        "positions": _positions(y),
        "weights_row": weights_row([weights]),
    }
    constants = {
        "NORMS": norms,
        "AFFINES": affines,
        "WEIGHTS": 0 if weights is None else weights.dim(),
        "PIXELS": _pixels(weights, y),
        "OUT_ROWS": tuple(map(row_stride, outs)),
        **sizes,
    }
    return [Launch(mix_fwd_kernel, (tiles, blocks), arguments, constants)]


def mix_backward(
    candidates: Sequence[Source],
    weights: Tensor | None,
    adjoint: Tensor,
    *,
    sums: Tensor,
    weight_gradient: Tensor | None,
) -> list[Launch]:
    adjoints = [adjoint] * len(candidates)
    return [_sums(adjoints, candidates, sums, weight_gradient, weights=weights)]


def mix_tangent(
    candidates: Sequence[Source],
    weights: Tensor,
    tangents: Sequence[Tensor],
    tangent_sums: Tensor | None,
    adjoint: Tensor,
    *,
    outs: Sequence[Tensor],
    products: Tensor,
) -> list[Launch]:
    y, (means, rs, norms) = candidates[0].x, norms_of(candidates)
    sizes, (tiles, blocks) = _sizes("mix_tangent_kernel", y, 2 * len(candidates))
    partials = counts = y  # stand in where they are not wanted
    count = norms.count(0)
    if count:
        partials = y.new_empty(tiles, count, y.shape[1], dtype=products.dtype)
        counts = counters(y, blocks)
    arguments = {
        # Of a candidate without batch norm only the tangent is read.
        "p_candidates": tuple(
            source.x if norm else yd for source, yd, norm in zip(candidates, tangents, norms, strict=True)
        ),
        "p_tangents": tuple(tangents),
        "p_means": means,
        "p_rs": rs,
        "p_weights": weights,
        "p_sums": weights if tangent_sums is None else tangent_sums,
        "p_adjoint": adjoint if count else y,
        "p_partials": partials,
        "p_products": products if count else y,
        "p_counters": counts,
        "p_outs": tuple(outs),
        "positions": _positions(y),
    }
    constants = {
        "NORMS": norms,
        "PRODUCTS": count,
        "G_ROW": row_stride(adjoint) if count else 0,
        "OUT_ROWS": tuple(map(row_stride, outs)),
        **sizes,
    }
    return [Launch(mix_tangent_kernel, (tiles, blocks), arguments, constants)]


def mix_second(
    candidates: Sequence[Source],
    adjoint: Tensor,
    first_sums: Tensor,
    tangent_sums: Tensor | None,
    products: Tensor,
    *,
    sums: Tensor,
    weight_gradient: Tensor,
) -> list[Launch]:
    adjoints = [adjoint] * len(candidates)
    read = first_sums, first_sums if tangent_sums is None else tangent_sums, products
    return [_sums(adjoints, candidates, sums, weight_gradient, read)]


def _sums(
    adjoints: Sequence[Tensor],
    sources: Sequence[Source],
    sums: Tensor,
    weight_gradient: Tensor | None = None,
    of_sweeps_before: tuple[Tensor, Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
) -> Launch:
    """Returns the launch that writes the sums of G and G u (with `weights` of p G and p G u), and of a mix
    the gradient of p; of the second sweep with what the sweeps before summed, as `mix_second` reads it."""
    y, entries, (means, rs, norms) = sources[0].x, len(sources), norms_of(sources)
    if len(set(map(row_stride, adjoints))) > 1:
        raise ValueError("the adjoints of one Triton launch must have one row stride")
    first_sums, tangent_sums, products = of_sweeps_before or (sums, sums, sums)
    sizes, (tiles, blocks) = _sizes("norm_sums_kernel", y, by_image=weights is not None)
    splits = splits_of(tiles, entries)
    blocks_of_gradients = y.new_empty(entries, blocks, dtype=sums.dtype) if blocks > 1 else sums
    arguments = {
        "p_g": tuple(adjoints),
        "p_y": tuple(source.x for source in sources),
        "p_means": means,
        "p_rs": rs,
        "p_partials": y.new_empty(2, entries, splits, y.shape[1], dtype=sums.dtype),
        "p_sums": sums,
        "p_weights": sums if weights is None else weights,
        "p_first_sums": first_sums,
        "p_tangent_sums": tangent_sums,
        "p_products": products,
        "p_gradient": sums if weight_gradient is None else weight_gradient,
        "p_blocks": blocks_of_gradients,
        "p_counters": counters(y, entries * (blocks + int(blocks > 1))),
        "positions": _positions(y),
        "weights_row": weights_row([weights]),
    }
    constants = {
        "NORMS": norms,
        "GRADIENT": weight_gradient is not None,
        "SECOND": of_sweeps_before is not None,
        "BY_IMAGE": weights is not None,
        "PIXELS": _pixels(weights, y),
        "G_ROW": row_stride(adjoints[0]),
        **sizes,
    }
    return Launch(norm_sums_kernel, (splits, entries, blocks), arguments, constants)


def norm_forward(sources: Sequence[Source], *, out: Tensor) -> list[Launch]:
    return [_norm_forward(sources, None, None, out)]


def norm_backward(sources: Sequence[Source], adjoints: Sequence[Tensor], *, sums: Tensor) -> list[Launch]:
    return [_sums(adjoints, sources, sums)]


def norm_tangent(
    sources: Sequence[Source],
    tangents: Sequence[Tensor],
    sums: Tensor,
    *,
    out: Tensor,
) -> list[Launch]:
    return [_norm_forward(sources, tangents, sums, out)]


def _norm_forward(
    sources: Sequence[Source], tangents: Sequence[Tensor] | None, sums: Tensor | None, out: Tensor
) -> Launch:
    y, (means, rs, norms) = sources[0].x, norms_of(sources)
    sizes, (tiles, blocks) = _sizes("norm_fwd_kernel", y)
    tensors, (gammas, betas, affines) = tuple(source.x for source in sources), affines_of(sources)
    arguments = {
        "p_y": tensors,
        "p_means": means,
        "p_rs": rs,
        "p_gammas": gammas,
        "p_betas": betas,
        "p_tangents": tensors if tangents is None else tuple(tangents),
        "p_sums": means[0] if sums is None else sums,
        "p_out": out,
        "positions": _positions(y),
    }
    constants = {
        "NORMS": norms,
        "AFFINES": affines if any(affines) else (0,),
        "TANGENT": tangents is not None,
        **sizes,
    }
    return Launch(norm_fwd_kernel, (tiles, len(sources), blocks), arguments, constants)


def fan_out_backward(
    sources: Sequence[Source], readers: Sequence[Sequence[Reader]], *, out: Tensor
) -> list[Launch]:
    return [_fan_out(sources, readers, None, out)]


def fan_out_second(
    sources: Sequence[Source], readers: Sequence[Sequence[SecondReader]], *, out: Tensor
) -> list[Launch]:
    firsts = [[reader.first for reader in of_one] for of_one in readers]
    return [_fan_out(sources, firsts, readers, out)]


def _fan_out(
    sources: Sequence[Source],
    firsts: Sequence[Sequence[Reader]],
    seconds: Sequence[Sequence[SecondReader]] | None,
    out: Tensor,
) -> Launch:
    """Returns the launch of the second sweep if there are `seconds`, else of the first."""
    # A tensor that no reader normalises is not read; out stands in for all that is not read.
    read = [
        source if source.statistics is not None and of_one else Source(out)
        for source, of_one in zip(sources, firsts, strict=True)
    ]
    means, rs, norms = norms_of(read)
    tangents = [out] * len(norms)
    if seconds:
        tangents = [of_one[0].tangent if norm else out for of_one, norm in zip(seconds, norms, strict=True)]
    all_firsts = [reader for of_one in firsts for reader in of_one]
    all_seconds = [reader for of_one in seconds or () for reader in of_one]
    all_readers: Sequence[Reader | SecondReader] = all_seconds if seconds else all_firsts
    normed = [norm for of_one, norm in zip(firsts, norms, strict=True) for _ in of_one]
    adjoints = [reader.adjoint for reader in all_readers]
    first_adjoints = [reader.adjoint for reader in all_firsts]

    def where_normed(values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return tuple(
            v if norm and v is not None else out for v, norm in zip(values, normed, strict=True)
        ) or (out,)

    weighed = tuple(0 if reader.weights is None else reader.weights.dim() for reader in all_firsts)
    sizes, grid = _sizes("fan_out_kernel", out[0], 2 * (len(read) + len(adjoints)))
    arguments = {
        "p_adjoints": tuple(adjoints) or (out,),
        "p_sums": where_normed([reader.sums for reader in all_readers]),
        "p_weights": tuple(out if r.weights is None else r.weights for r in all_firsts) or (out,),
        "p_gammas": tuple(out if r.gamma is None else r.gamma for r in all_firsts) or (out,),
        "p_tensors": tuple(source.x for source in read),
        "p_means": means,
        "p_rs": rs,
        "p_firsts": where_normed(first_adjoints),
        "p_first_sums": where_normed([reader.sums for reader in all_firsts]),
        "p_tangents": tuple(tangents),
        "p_tangent_sums": where_normed([reader.tangent_sums for reader in all_seconds])
        if seconds
        else (out,),
        "p_out": out,
        "positions": _positions(out[0]),
        "weights_row": weights_row(reader.weights for reader in all_firsts),
    }
    constants = {
        "ENDS": tuple(sum(map(len, firsts[:c])) for c in range(len(firsts) + 1)),
        "PLACES": tuple(reader.index for reader in all_firsts),
        "CANDIDATES": tuple(0 if reader.sums is None else reader.sums.shape[1] for reader in all_firsts),
        "WEIGHED": weighed,
        "AFFINES": tuple(int(reader.gamma is not None) for reader in all_firsts),
        "PIXELS": out.shape[3] * out.shape[4] if 2 in weighed else 1,
        "ROWS": tuple(map(row_stride, adjoints)),
        "FIRST_ROWS": tuple(map(row_stride, first_adjoints)),
        "NORMS": norms,
        "TANGENT": seconds is not None,
        **sizes,
    }
    return Launch(fan_out_kernel, grid, arguments, constants)


def add(terms: Sequence[Tensor], *, out: Tensor) -> list[Launch]:
    sizes, grid = _sizes("add_kernel", out, len(terms))
    arguments = {"p_terms": tuple(terms), "p_out": out, "positions": _positions(out)}
    constants = {"ROW_STRIDES": tuple(map(row_stride, terms)), **sizes}
    return [Launch(add_kernel, grid, arguments, constants)]


def _pixels(weights: Tensor | None, y: Tensor) -> int:
    """Returns the pixels of an image, which a kernel divides by where p is by image; else 1."""
    return 1 if weights is None or weights.dim() < 2 else y.shape[2] * y.shape[3]


def _positions(y: Tensor) -> int:
    return y.shape[0] * y.shape[2] * y.shape[3]


def _sizes(kernel: str, y: Tensor, tensors: int = 0, by_image: bool = False) -> tuple[dict, tuple[int, int]]:
    """Returns the sizes that are compiled in, and the grid that covers y. `tensors`: how many tensors, each
    with two rows of statistics, a kernel loads that is unrolled over them; `by_image`: p is."""
    c, wide = y.shape[1], accumulator(y.dtype)
    ahead = tensors * (y.element_size() + 2 * wide.itemsize)
    block_p, block_c = tile(kernel, Case(y.dtype, c, by_image=by_image, ahead=ahead))
    sizes = {"C": c, "BLOCK_P": block_p, "BLOCK_C": block_c, "ACC": ACCUMULATORS[wide]}
    return sizes, (triton.cdiv(_positions(y), block_p), triton.cdiv(c, block_c))
