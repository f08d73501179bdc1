"""The mix in Triton: `mix_forward`, `mix_backward`, `mix_tangent_forward`, `mix_second`; and what the batch
norm on load of a separable half shares with it: the sums of a batch norm's derivative, and that derivative.

Batch norm's adjoint needs sums over all positions before it can be written, so the two derivatives read their
tensors twice: once for the sums (`norm_sums_kernel`), once to write.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from darts_fast.kernels.handover import Link, Reader
from darts_fast.kernels.launch_table import Case, channel_block, splits_of, tile, warps
from darts_fast.kernels.torch_backend import Normalizer
from darts_fast.kernels.triton_launch import (
    ACCUMULATORS,
    Table,
    accumulator,
    counters,
    images,
    in_rows,
    last_program,
    launch,
    load_normalizer,
    pick,
    row_stride,
    sum_of_rows,
)


@triton.jit
def store_in_all(p_outs, ROWS: tl.constexpr, b_out, o_p, o_c, m):
    for i in tl.static_range(len(p_outs)):
        o_out = o_p[:, None] * ROWS[i] + o_c[None, :]
        tl.store(p_outs[i] + o_out, b_out.to(p_outs[i].dtype.element_ty), mask=m)


@triton.jit
def mix_fwd_kernel(
    p_candidates,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weights,  # [candidates]
    p_outs,  # tuple of [positions, OUT_ROWS[i] >= C], each written
    positions,
    NORMS: tl.constexpr,  # which candidates are normalised
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
        b_scale = tl.load(p_weights + k) * b_r  # [BLOCK_C]
        b_y = tl.load(p_candidates[k] + i_first * C + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        b_total += (b_y - b_mean[None, :]) * b_scale[None, :]
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
def spread_kernel(
    p_adjoints,  # tuple, one a reader j: G_j [positions, ROWS[j] >= C]; if TANGENT Gd_j
    p_sums,  # tuple, one a reader: [2, candidates, C], of G, G h; if TANGENT of Gd, Gd h
    p_weights,  # tuple, one a reader: p [candidates]
    p_tensors,  # tuple of y_c [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_firsts,  # tuple of G_j [positions, FIRST_ROWS[j]]; this and the next three are read if TANGENT
    p_first_sums,
    p_tangents,  # tuple of yd_c
    p_tangent_sums,  # tuple, one a reader: [4, candidates, C], of yd, yd h, yd G, G
    p_out,  # [tensors, positions, C]: B_c of the sum over j of p_jc G_j, or the second adjoint
    positions,
    PLACES: tl.constexpr,  # where a reader has a tensor among its candidates, by reader, then by tensor
    CANDIDATES: tl.constexpr,  # of each reader
    ROWS: tl.constexpr,
    FIRST_ROWS: tl.constexpr,
    NORMS: tl.constexpr,  # which tensors are normalised
    HAS_TANGENT: tl.constexpr,
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
        b_found = tl.zeros([BLOCK_P, BLOCK_C], ACC)
        b_first = tl.zeros([BLOCK_P, BLOCK_C], ACC)
        b_m = tl.zeros([BLOCK_C], ACC)  # mean(G_c), and below mean(G_c h)
        b_mh = tl.zeros([BLOCK_C], ACC)
        b_mf = tl.zeros([BLOCK_C], ACC)  # the same of the first sweep's
        b_s = tl.zeros([BLOCK_C], ACC)
        b_u = tl.zeros([BLOCK_C], ACC)
        for j in tl.static_range(len(p_adjoints)):
            b_weight = tl.load(p_weights[j] + PLACES[j * len(p_tensors) + c]).to(ACC)
            o_j = o_p[:, None] * ROWS[j] + o_c[None, :]
            b_found += b_weight * tl.load(p_adjoints[j] + o_j, mask=m, other=0.0).to(ACC)
            if NORMS[c]:
                size = CANDIDATES[j] * C
                o_sum = PLACES[j * len(p_tensors) + c] * C + o_c
                b_part = b_weight * share
                b_m += b_part * tl.load(p_sums[j] + o_sum, mask=m_c, other=0.0)
                b_mh += b_part * tl.load(p_sums[j] + size + o_sum, mask=m_c, other=0.0)
                if TANGENT and HAS_TANGENT[c]:
                    o_first = o_p[:, None] * FIRST_ROWS[j] + o_c[None, :]
                    b_first += b_weight * tl.load(p_firsts[j] + o_first, mask=m, other=0.0).to(ACC)
                    b_mf += b_part * tl.load(p_first_sums[j] + o_sum, mask=m_c, other=0.0)
                    b_s += b_part * tl.load(p_first_sums[j] + size + o_sum, mask=m_c, other=0.0)
                    b_u += b_part * tl.load(p_tangent_sums[j] + 2 * size + o_sum, mask=m_c, other=0.0)
        if NORMS[c]:
            b_mean, b_r = load_normalizer(p_means[c], p_rs[c], 1, o_c, m_c, ACC)
            b_h = (tl.load(p_tensors[c] + o, mask=m, other=0.0).to(ACC) - b_mean[None, :]) * b_r[None, :]
            b_found = b_found - b_m[None, :] - b_h * b_mh[None, :]
            if TANGENT and HAS_TANGENT[c]:
                p_sum = p_tangent_sums[0] + PLACES[c] * C + o_c  # the same for all readers
                b_md = tl.load(p_sum, mask=m_c, other=0.0) * share
                b_t = tl.load(p_sum + CANDIDATES[0] * C, mask=m_c, other=0.0) * share
                b_u = b_r * (b_u - b_mf * b_md - b_s * b_t)
                b_yd = tl.load(p_tangents[c] + o, mask=m, other=0.0).to(ACC)
                b_hd = (b_yd - b_md[None, :] - b_h * b_t[None, :]) * b_r[None, :]
                b_found -= (b_first - b_mf[None, :] - b_h * b_s[None, :]) * (b_r * b_t)[None, :]
                b_found -= b_s[None, :] * b_hd + b_u[None, :] * b_h
            b_found = b_found * b_r[None, :]
        p_c = p_out + tl.cast(positions, tl.int64) * C * c
        tl.store(p_c + o, b_found.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def norm_sums_kernel(
    p_g,  # tuple of g_k [positions, G_ROW >= C]
    p_y,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weighed,  # tuple of [positions, WEIGHED_ROW >= C]; read if TANGENT
    p_partials,  # [2, or 4 if TANGENT, entries, splits, C]
    p_sums,  # [2 or 4, entries, C]: of g, g h, and if TANGENT of g * weighed, weighed
    p_gh_sums,  # [entries, C]: of weighed h; read if GAIN and TANGENT
    p_gained,  # [c blocks, entries], written if GAIN: the sum over channels of g h, or if TANGENT of u
    p_before,  # as p_gained, which it is added to; read if ADD
    p_counters,
    positions,
    NORMS: tl.constexpr,
    TANGENT: tl.constexpr,
    GAIN: tl.constexpr,  # g is a mix's adjoint: also dL/dp; or if TANGENT its yd, weighed its adjoint
    ADD: tl.constexpr,
    BATCH: tl.constexpr,
    G_ROW: tl.constexpr,
    WEIGHED_ROW: tl.constexpr,
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
    b_s = tl.zeros([BLOCK_P, BLOCK_C], ACC)  # sums over tiles, and at the end over a tile's positions
    b_sh = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    b_sw = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    b_w = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i_tile in range(i_split, tl.cdiv(positions, BLOCK_P), splits):
        o_p = tl.cast(i_tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        m = (o_p < positions)[:, None] & m_c[None, :]
        o = o_p[:, None] * C + o_c[None, :]
        o_g = o_p[:, None] * G_ROW + o_c[None, :]
        b_g = tl.load(p_g_k + o_g, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        b_h = (tl.load(p_y_k + o, mask=m, other=0.0).to(ACC) - b_mean[None, :]) * b_r[None, :]
        b_s += b_g
        b_sh += b_g * b_h
        if TANGENT:
            o_v = o_p[:, None] * WEIGHED_ROW + o_c[None, :]
            b_v = tl.load(pick(p_weighed, i_entry) + o_v, mask=m, other=0.0).to(ACC)
            b_sw += b_g * b_v
            b_w += b_v
    entries = tl.num_programs(1)
    p_split = p_partials + (i_entry * splits + i_split) * C + o_c
    stride = tl.cast(entries * splits, tl.int64) * C
    tl.store(p_split, tl.sum(b_s, axis=0), mask=m_c)
    tl.store(p_split + stride, tl.sum(b_sh, axis=0), mask=m_c)
    if TANGENT:
        tl.store(p_split + 2 * stride, tl.sum(b_sw, axis=0), mask=m_c)
        tl.store(p_split + 3 * stride, tl.sum(b_w, axis=0), mask=m_c)
    if last_program(p_counters + i_entry * tl.num_programs(2) + tl.program_id(2), splits):
        p_rows = p_partials + i_entry * splits * C
        p_found = p_sums + i_entry * C + o_c
        b_0 = sum_of_rows(p_rows, splits, C, o_c, m_c, BLOCK_C, ACC)
        b_1 = sum_of_rows(p_rows + stride, splits, C, o_c, m_c, BLOCK_C, ACC)
        tl.store(p_found, b_0, mask=m_c)
        tl.store(p_found + entries * C, b_1, mask=m_c)
        if TANGENT:
            b_2 = sum_of_rows(p_rows + 2 * stride, splits, C, o_c, m_c, BLOCK_C, ACC)
            b_3 = sum_of_rows(p_rows + 3 * stride, splits, C, o_c, m_c, BLOCK_C, ACC)
            tl.store(p_found + 2 * entries * C, b_2, mask=m_c)
            tl.store(p_found + 3 * entries * C, b_3, mask=m_c)
        if GAIN:
            b_gained = b_1
            if TANGENT:
                if BATCH:
                    m_norm = m_c & (has_norm > 0)
                    b_gh = tl.load(p_gh_sums + i_entry * C + o_c, mask=m_norm, other=0.0)
                    b_2 -= tl.where(m_norm, b_3 * b_0 + b_gh * b_1, 0.0) / positions
                b_gained = b_2 * b_r
            o_gained = tl.program_id(2) * entries + i_entry
            gained = tl.sum(tl.where(m_c, b_gained, 0.0), axis=0)
            if ADD:
                gained += tl.load(p_before + o_gained)
            tl.store(p_gained + o_gained, gained)


@triton.jit
def norm_bwd_kernel(
    p_g,  # tuple of g_k [positions, C]
    p_y,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weights,  # [rows]; read if WEIGHTED
    p_sums,  # [2, rows, C]: of g, g h; if TANGENT and not FIRST [4, ...]: then of G h, G hd; read if BATCH
    p_yd,  # tuple of yd_k [positions, C]; read if TANGENT
    p_yd_sums,  # [2, rows, C]: of yd, yd h; read if TANGENT; if FIRST [4, ...]: then of yd G, G
    p_first,  # tuple of G_k [positions, C], the first adjoint of h; read if FIRST, as is the next
    p_first_sums,  # [rows, C]: of G h
    p_found,  # [entries, positions, C]
    positions,
    rows,
    ROWS: tl.constexpr,  # an entry's row in the sums and weights
    NORMS: tl.constexpr,
    HAS_YD: tl.constexpr,
    BATCH: tl.constexpr,  # the statistics move with y
    WEIGHTED: tl.constexpr,
    TANGENT: tl.constexpr,
    FIRST: tl.constexpr,  # with TANGENT: take r t B(G) off, too
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_entry = tl.program_id(1)
    i_row = pick(ROWS, i_entry)
    p_g_k, p_y_k = pick(p_g, i_entry), pick(p_y, i_entry)
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m = (o_p < positions)[:, None] & m_c[None, :]
    o = o_p[:, None] * C + o_c[None, :]
    has_norm = pick(NORMS, i_entry)
    b_mean, b_r = load_normalizer(pick(p_means, i_entry), pick(p_rs, i_entry), has_norm, o_c, m_c, ACC)
    b_found = tl.load(p_g_k + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
    if BATCH:
        stride = rows * C
        p_sums_k = p_sums + i_row * C + o_c
        m_norm = m_c & (has_norm > 0)
        b_m = tl.load(p_sums_k, mask=m_norm, other=0.0) / positions  # mean(g)
        b_mh = tl.load(p_sums_k + stride, mask=m_norm, other=0.0) / positions  # mean(g h)
        b_h = (tl.load(p_y_k + o, mask=m, other=0.0).to(ACC) - b_mean[None, :]) * b_r[None, :]
        b_found = b_found - b_m[None, :] - b_h * b_mh[None, :]
        if TANGENT:
            m_yd = m_norm & (pick(HAS_YD, i_entry) > 0)
            p_yd_sums_k = p_yd_sums + i_row * C + o_c
            b_md = tl.load(p_yd_sums_k, mask=m_yd, other=0.0) / positions
            b_t = tl.load(p_yd_sums_k + stride, mask=m_yd, other=0.0) / positions
            if FIRST:
                b_s = tl.load(p_first_sums + i_row * C + o_c, mask=m_yd, other=0.0) / positions
                b_u = tl.load(p_yd_sums_k + 2 * stride, mask=m_yd, other=0.0) / positions
                b_mf = tl.load(p_yd_sums_k + 3 * stride, mask=m_yd, other=0.0) / positions
                b_u = b_r * (b_u - b_mf * b_md - b_s * b_t)
                b_first = tl.load(pick(p_first, i_entry) + o, mask=m & m_yd[None, :], other=0.0).to(ACC)
                b_found -= (b_first - b_mf[None, :] - b_h * b_s[None, :]) * (b_r * b_t)[None, :]
            else:
                b_s = tl.load(p_sums_k + 2 * stride, mask=m_yd, other=0.0) / positions
                b_u = tl.load(p_sums_k + 3 * stride, mask=m_yd, other=0.0) / positions
            b_yd = tl.load(pick(p_yd, i_entry) + o, mask=m & m_yd[None, :], other=0.0).to(ACC)
            b_hd = (b_yd - b_md[None, :] - b_h * b_t[None, :]) * b_r[None, :]
            b_found -= b_s[None, :] * b_hd + b_u[None, :] * b_h
    if WEIGHTED:
        b_r = b_r * tl.load(p_weights + i_row)
    p_out = p_found + tl.cast(i_entry, tl.int64) * positions * C
    tl.store(p_out + o, (b_found * b_r[None, :]).to(p_found.dtype.element_ty), mask=m)


@triton.jit
def mix_tangent_kernel(
    p_candidates,  # tuple of y_k [positions, C]
    p_tangents,  # tuple of yd_k
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weights,  # [candidates]
    p_sums,  # [4, candidates, C]: of yd, yd h, yd G, G
    p_outs,  # tuple of [positions, OUT_ROWS[i] >= C], each written: od
    positions,
    NORMS: tl.constexpr,
    HAS_TANGENT: tl.constexpr,
    BATCH: tl.constexpr,
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
    # 32 bits within the tile: with 64, 35 candidates of float32 spilled 16 times. The outputs have 64: with
    # 32, those of bfloat16 spilled 82 times (sm_100).
    o = o_t[:, None] * C + o_c[None, :]
    b_total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    # A division of float64 is a call: with two a candidate, 35 candidates spilled 26 times (sm_90, sm_100).
    share = 1.0 / tl.cast(positions, ACC)
    for k in tl.static_range(len(p_candidates)):
        if HAS_TANGENT[k]:
            b_mean, b_r = load_normalizer(p_means[k], p_rs[k], NORMS[k], o_c, m_c, ACC)
            b_hd = tl.load(p_tangents[k] + i_first * C + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            if NORMS[k] and BATCH:
                p_sums_k = p_sums + k * C + o_c
                b_md = tl.load(p_sums_k, mask=m_c, other=0.0) * share
                b_t = tl.load(p_sums_k + len(p_candidates) * C, mask=m_c, other=0.0) * share
                b_y = tl.load(p_candidates[k] + i_first * C + o, mask=m, other=0.0).to(ACC)
                b_h = (b_y - b_mean[None, :]) * b_r[None, :]
                b_hd = b_hd - b_md[None, :] - b_h * b_t[None, :]
            b_total += b_hd * (b_r * tl.load(p_weights + k))[None, :]
    store_in_all(p_outs, OUT_ROWS, b_total, i_first + o_t, o_c, m)


def mix_forward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    outputs: Sequence[Tensor] = (),
) -> Tensor:
    """o in the candidates' dtype; p [candidates]. One read of each candidate. `outputs`, which may be slices
    of channels, are all written, and the first returned; else o is a new tensor."""
    y = candidates[0]
    outputs = outputs or images(1, y.shape, y.dtype, y.device).unbind()
    table = Table.of(normalizers, candidates)
    sizes, (tiles, blocks) = _sizes("mix_fwd_kernel", y, len(candidates))
    launch(
        mix_fwd_kernel,
        (tiles, blocks),
        {
            "p_candidates": tuple(candidates),
            "p_means": table.means,
            "p_rs": table.rs,
            "p_weights": p.contiguous(),
            "p_outs": tuple(outputs),
            "positions": _positions(y),
        },
        {"NORMS": table.norms, "OUT_ROWS": tuple(map(row_stride, outputs)), **sizes},
    )
    return outputs[0]


def add(terms: Sequence[Tensor]) -> Tensor:
    """The sum of two or more tensors, in their dtype. One read of each; they may be slices of channels."""
    y = terms[0]
    terms = [in_rows(t) for t in terms]
    (out,) = images(1, y.shape, y.dtype, y.device)
    sizes, grid = _sizes("add_kernel", y, len(terms))
    launch(
        add_kernel,
        grid,
        {"p_terms": tuple(terms), "p_out": out, "positions": _positions(y)},
        {"ROW_STRIDES": tuple(map(row_stride, terms)), **sizes},
    )
    return out


def mix_backward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    links: Sequence[Link | None] = (),
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The adjoint of every candidate, p_k B_k(g), or g where it has a link; the sums of g h_k:
    [candidates, C]; and dL/dp, their sums over channels."""
    gained = _gains(p, candidates[0])
    sums = norm_sums([g] * len(candidates), candidates, normalizers, gained=gained)
    for link in filter(None, links):
        link.sums = sums
    return _of_candidates(candidates, normalizers, p, g, sums, links), sums[1], _over_blocks(gained)


def _gains(p: Tensor, y: Tensor) -> Tensor:
    """Uninitialised, what dL/dp gains by block of channels."""
    return p.new_empty(triton.cdiv(y.shape[1], channel_block(y.shape[1])), len(p))


def _over_blocks(gained: Tensor) -> Tensor:
    return gained[0] if len(gained) == 1 else gained.sum(0)


def _of_candidates(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    sums: Tensor,
    links: Sequence[Link | None],
    left: "_Left | None" = None,
) -> list[Tensor]:
    """The adjoint of every candidate, or with `left` the second one."""
    own = [k for k in range(len(candidates)) if not (links and links[k])]
    if not own:
        return [g] * len(candidates)
    found = norm_backward(
        [g.contiguous(memory_format=torch.channels_last)] * len(own),
        [candidates[k] for k in own],
        [normalizers[k] for k in own],
        sums,
        p,
        left and [left.tangents[k] for k in own],
        left and left.tangent_sums,
        left and ([left.g.contiguous(memory_format=torch.channels_last)] * len(own), left.sums),
        own,
    )
    by_candidate = dict(zip(own, found, strict=True))
    return [by_candidate.get(k, g) for k in range(len(candidates))]


class _Left(NamedTuple):
    """What the tangent sweep of a mix leaves for its second backward sweep."""

    g: Tensor
    sums: Tensor  # [candidates, C]: of g h
    tangents: Sequence[Tensor | None]  # yd
    tangent_sums: Tensor  # [4, candidates, C]: of yd, yd h, yd g, g
    gained: Tensor  # by dL/dp, by block of channels


def mix_tangent_forward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    sums: Tensor,
    tangents: Sequence[Tensor | None],
    links: Sequence[Link | None] = (),
    outputs: Sequence[Tensor] = (),
) -> tuple[Tensor, _Left]:
    """od, and what `mix_second` needs; `sums` are what `mix_backward` returned, `outputs` as there. A tangent
    that is None is zero."""
    y = candidates[0]
    has = tuple(int(yd is not None) for yd in tangents)
    tangents = [None if yd is None else yd.contiguous(memory_format=torch.channels_last) for yd in tangents]
    given = _where(has, tangents, candidates)
    table = Table.of(normalizers, candidates)
    outputs = outputs or images(1, y.shape, y.dtype, y.device).unbind()
    sizes, (tiles, blocks) = _sizes("mix_tangent_kernel", y, 2 * len(candidates))
    # Where a tangent is zero, y stands in for it: its sums are not read, and its gain becomes zero.
    gained = _gains(p, y)
    tangent_sums = norm_sums(given, candidates, normalizers, [g] * len(given), sums, gained)
    for k in range(len(candidates)):
        if not has[k]:
            gained[:, k].zero_()
    left = _Left(g, sums, tangents, tangent_sums, gained)
    for link in filter(None, links):
        link.tangent_sums = tangent_sums
    launch(
        mix_tangent_kernel,
        (tiles, blocks),
        {
            # Of a candidate without batch norm only the tangent is read.
            "p_candidates": _where(table.norms, candidates, given),
            "p_tangents": given,
            "p_means": table.means,
            "p_rs": table.rs,
            "p_weights": p.contiguous(),
            "p_sums": tangent_sums,
            "p_outs": tuple(outputs),
            "positions": _positions(y),
        },
        {
            "NORMS": table.norms,
            "HAS_TANGENT": has,
            "BATCH": table.batch,
            "OUT_ROWS": tuple(map(row_stride, outputs)),
            **sizes,
        },
    )
    return outputs[0], left


def mix_second(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    left: _Left,
    links: Sequence[Link | None] = (),
) -> tuple[list[Tensor], Tensor]:
    """The second adjoint of every candidate (or g where it has a link), and that of p, with what it gains in
    the tangent sweep; g is the node's."""
    gained = torch.empty_like(left.gained)
    sums = norm_sums([g] * len(candidates), candidates, normalizers, gained=gained, before=left.gained)
    for link in filter(None, links):
        link.sums = sums
    return _of_candidates(candidates, normalizers, p, g, sums, links, left), _over_blocks(gained)


def spread_backward(
    tensors: Sequence[Tensor], normalizers: Sequence[Normalizer | None], readers: Sequence[Reader]
) -> list[Tensor]:
    """B_c of the sum over readers j of p_jc G_j, for every tensor."""
    return _launch_spread(tensors, normalizers, readers, readers, [None] * len(tensors), readers)


def spread_second(
    tensors: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    seconds: Sequence[Reader],
    firsts: Sequence[Reader],
    tangents: Sequence[Tensor | None],
    tangent_sums: Sequence[Tensor],
) -> list[Tensor]:
    """The second adjoint of every tensor, from its tangent; `tangent_sums` are each reader's."""
    tangents = [None if yd is None else yd.contiguous(memory_format=torch.channels_last) for yd in tangents]
    given = [first._replace(sums=sums) for first, sums in zip(firsts, tangent_sums, strict=True)]
    return _launch_spread(tensors, normalizers, seconds, firsts, tangents, given)


def _launch_spread(
    tensors: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    readers: Sequence[Reader],
    firsts: Sequence[Reader],
    tangents: Sequence[Tensor | None],
    tangent_readers: Sequence[Reader],
) -> list[Tensor]:
    """`firsts` and `tangent_readers` are `readers` in the first sweep, where they are not read."""
    y = tensors[0]
    adjoints, first_adjoints = ([reader.adjoint for reader in group] for group in (readers, firsts))
    table = Table.of(normalizers, tensors)
    out = images(len(tensors), y.shape, y.dtype, y.device)
    sizes, grid = _sizes("spread_kernel", y, len(tensors) * (2 * len(readers) + 2))
    launch(
        spread_kernel,
        grid,
        {
            "p_adjoints": tuple(adjoints),
            "p_sums": tuple(reader.sums for reader in readers),
            "p_weights": tuple(reader.weights for reader in readers),
            # Of a tensor without batch norm nothing is read.
            "p_tensors": _where(table.norms, tensors, [adjoints[0]] * len(tensors)),
            "p_means": table.means,
            "p_rs": table.rs,
            "p_firsts": tuple(first_adjoints),
            "p_first_sums": tuple(reader.sums for reader in firsts),
            "p_tangents": tuple(
                yd if yd is not None and norm else adjoints[0]
                for yd, norm in zip(tangents, table.norms, strict=True)
            ),
            "p_tangent_sums": tuple(reader.sums for reader in tangent_readers),
            "p_out": out,
            "positions": _positions(y),
        },
        {
            "PLACES": tuple(place for reader in readers for place in reader.places),
            "CANDIDATES": tuple(reader.sums.shape[1] for reader in readers),
            "ROWS": tuple(map(row_stride, adjoints)),
            "FIRST_ROWS": tuple(map(row_stride, first_adjoints)),
            "NORMS": table.norms,
            "HAS_TANGENT": tuple(int(yd is not None) for yd in tangents),
            "TANGENT": firsts is not readers,
            **sizes,
        },
    )
    return list(out.unbind())


def norm_sums(
    gs: Sequence[Tensor],
    ys: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    weighed: Sequence[Tensor] | None = None,
    gh_sums: Tensor | None = None,
    gained: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Per channel, the sums of g and g h; with `weighed` also of g * weighed and of weighed: [sums, k, C].
    All g, and all weighed, have one row stride.

    `gained` [blocks of channels, k], of a mix: where what dL/dp gains is to be written, and `before` added;
    with `weighed`, for which `gh_sums` are the sums of weighed h [k, C]."""
    y, entries = ys[0], len(ys)
    table = Table.of(normalizers, ys)
    sizes, (tiles, blocks) = _sizes("norm_sums_kernel", y)
    splits = splits_of(tiles, entries)
    count = 2 if weighed is None else 4
    c, dtype = y.shape[1], accumulator(y.dtype)
    partials = y.new_empty(count, entries, splits, c, dtype=dtype)
    sums = y.new_empty(count, entries, c, dtype=dtype)
    launch(
        norm_sums_kernel,
        (splits, entries, blocks),
        {
            "p_g": tuple(gs),
            "p_y": tuple(ys),
            "p_means": table.means,
            "p_rs": table.rs,
            "p_weighed": tuple(gs if weighed is None else weighed),
            "p_partials": partials,
            "p_sums": sums,
            "p_gh_sums": sums if gh_sums is None else gh_sums,
            "p_gained": sums if gained is None else gained,
            "p_before": sums if before is None else before,
            "p_counters": counters(y, entries * blocks),
            "positions": _positions(y),
        },
        {
            "NORMS": table.norms,
            "TANGENT": weighed is not None,
            "GAIN": gained is not None,
            "ADD": before is not None,
            "BATCH": table.batch,
            "G_ROW": row_stride(gs[0]),
            "WEIGHED_ROW": row_stride((gs if weighed is None else weighed)[0]),
            **sizes,
        },
    )
    return sums


def norm_backward(
    gs: Sequence[Tensor],
    ys: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    sums: Tensor,
    p: Tensor | None = None,
    yds: Sequence[Tensor | None] | None = None,
    yd_sums: Tensor | None = None,
    first: tuple[Sequence[Tensor], Tensor] | None = None,
    rows: Sequence[int] | None = None,
) -> list[Tensor]:
    """p_k B_k(g_k), see `Normalizer.adjoint`; with tangents yd, less p_k r_k (s_k hd_k + u_k h_k); with
    `first` then also less p_k r_k t_k B_k(G_k), which a separable half takes from g before.

    Args:
        sums: of g, g h; with tangents and without `first` then of G h, G hd: s and u times the positions.
        yd_sums: of yd and yd h; with `first` then of yd G and G.
        first: the G_k, and the sums of G_k h_k.
        rows: the entries' rows in sums and p, if they are not all that there are.
    """
    y, entries = ys[0], len(ys)
    table = Table.of(normalizers, ys)
    found = images(entries, y.shape, y.dtype, y.device)
    sizes, (tiles, blocks) = _sizes("norm_bwd_kernel", y)
    yds_given = [None] * entries if yds is None else yds
    launch(
        norm_bwd_kernel,
        (tiles, entries, blocks),
        {
            "p_g": tuple(gs),
            "p_y": _where(table.norms, ys, gs),  # y is read for batch norm only
            "p_means": table.means,
            "p_rs": table.rs,
            "p_weights": sums if p is None else p.contiguous(),
            "p_sums": sums,
            "p_yd": tuple(
                yd if norm and yd is not None else g
                for yd, g, norm in zip(yds_given, gs, table.norms, strict=True)
            ),
            "p_yd_sums": sums if yd_sums is None else yd_sums,
            "p_first": tuple(first[0] if first else gs),
            "p_first_sums": first[1] if first else sums,
            "p_found": found,
            "positions": _positions(y),
            "rows": sums.shape[1],
        },
        {
            "ROWS": tuple(range(entries) if rows is None else rows),
            "NORMS": table.norms,
            "HAS_YD": tuple(int(yd is not None) for yd in yds_given),
            "BATCH": table.batch,
            "WEIGHTED": p is not None,
            "TANGENT": yds is not None,
            "FIRST": first is not None,
            **sizes,
        },
        warps("norm_bwd_kernel", Case(y.dtype, y.shape[1])),
    )
    return list(found.unbind())


def _where(flags: Sequence[int], tensors: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t if flag else o for flag, t, o in zip(flags, tensors, others, strict=True))


def _positions(y: Tensor) -> int:
    return y.shape[0] * y.shape[2] * y.shape[3]


def _sizes(kernel: str, y: Tensor, tensors: int = 0) -> tuple[dict, tuple[int, int]]:
    """The sizes that are compiled in, and the grid that covers y; perhaps of a kernel that is unrolled over
    so many tensors, each with two rows of statistics."""
    c, wide = y.shape[1], accumulator(y.dtype)
    block_p, block_c = tile(kernel, Case(y.dtype, c, ahead=tensors * (y.element_size() + 2 * wide.itemsize)))
    sizes = {"C": c, "BLOCK_P": block_p, "BLOCK_C": block_c, "ACC": ACCUMULATORS[wide]}
    return sizes, (triton.cdiv(_positions(y), block_p), triton.cdiv(c, block_c))
