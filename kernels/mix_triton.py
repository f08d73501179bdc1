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

from darts_fast.kernels.torch_backend import Normalizer
from darts_fast.kernels.triton_launch import (
    ACCUMULATORS,
    Table,
    accumulator,
    counters,
    elementwise_tile,
    images,
    last_program,
    launch,
    load_normalizer,
    pick,
    splits_of,
    sum_of_rows,
)


@triton.jit
def mix_fwd_kernel(
    p_candidates,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weights,  # [candidates]
    p_out,  # [positions, C]
    positions,
    NORMS: tl.constexpr,  # which candidates are normalised
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
    b_total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for k in tl.static_range(len(p_candidates)):
        b_mean, b_r = load_normalizer(p_means[k], p_rs[k], NORMS[k], o_c, m_c, ACC)
        b_scale = tl.load(p_weights + k) * b_r  # [BLOCK_C]
        b_y = tl.load(p_candidates[k] + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        b_total += (b_y - b_mean[None, :]) * b_scale[None, :]
    tl.store(p_out + o, b_total.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def add_kernel(
    p_terms,  # tuple of [positions, C]
    p_out,  # [positions, C]
    positions,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (o_p < positions)[:, None] & (o_c < C)[None, :]
    o = o_p[:, None] * C + o_c[None, :]
    b_total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for k in tl.static_range(len(p_terms)):
        b_total += tl.load(p_terms[k] + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
    tl.store(p_out + o, b_total.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def norm_sums_kernel(
    p_g,  # tuple of g_k [positions, C]
    p_y,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weighed,  # [positions, C]; read if TANGENT
    p_partials,  # [2, or 4 if TANGENT, entries, splits, C]
    p_sums,  # [2 or 4, entries, C]: of g, g h, and if TANGENT of g * weighed, weighed
    p_counters,
    positions,
    splits,
    NORMS: tl.constexpr,
    TANGENT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_split, i_entry = tl.program_id(0), tl.program_id(1)
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
        b_g = tl.load(p_g_k + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        b_h = (tl.load(p_y_k + o, mask=m, other=0.0).to(ACC) - b_mean[None, :]) * b_r[None, :]
        b_s += b_g
        b_sh += b_g * b_h
        if TANGENT:
            b_v = tl.load(p_weighed + o, mask=m, other=0.0).to(ACC)
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
        for i_sum in tl.static_range(4 if TANGENT else 2):
            p_rows = p_partials + i_sum * stride + i_entry * splits * C
            b_sum = sum_of_rows(p_rows, splits, C, o_c, m_c, BLOCK_C, ACC)
            tl.store(p_sums + (i_sum * entries + i_entry) * C + o_c, b_sum, mask=m_c)


@triton.jit
def norm_bwd_kernel(
    p_g,  # tuple of g_k [positions, C]
    p_y,  # tuple of y_k [positions, C]
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weights,  # [entries]; read if WEIGHTED
    p_sums,  # [2, entries, C]: of g, g h; if TANGENT and not WEIGHTED [4, ...]: then of first h, first hd;
    # read if BATCH
    p_yd,  # tuple of yd_k [positions, C]; read if TANGENT
    p_yd_sums,  # [2, entries, C]: of yd, yd h; read if TANGENT; if WEIGHTED [4, ...]: then of yd first, first
    p_first,  # [positions, C], the first adjoint; read if TANGENT and WEIGHTED, as the next
    p_first_sums,  # [entries, C]: of first h
    p_found,  # [entries, positions, C]
    positions,
    NORMS: tl.constexpr,
    HAS_YD: tl.constexpr,
    BATCH: tl.constexpr,  # the statistics move with y
    WEIGHTED: tl.constexpr,
    TANGENT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_entry = tl.program_id(1)
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
        stride = tl.num_programs(1) * C
        p_sums_k = p_sums + i_entry * C + o_c
        m_norm = m_c & (has_norm > 0)
        b_m = tl.load(p_sums_k, mask=m_norm, other=0.0) / positions  # mean(g)
        b_mh = tl.load(p_sums_k + stride, mask=m_norm, other=0.0) / positions  # mean(g h)
        b_h = (tl.load(p_y_k + o, mask=m, other=0.0).to(ACC) - b_mean[None, :]) * b_r[None, :]
        b_found = b_found - b_m[None, :] - b_h * b_mh[None, :]
        if TANGENT:
            m_yd = m_norm & (pick(HAS_YD, i_entry) > 0)
            p_yd_sums_k = p_yd_sums + i_entry * C + o_c
            b_md = tl.load(p_yd_sums_k, mask=m_yd, other=0.0) / positions
            b_t = tl.load(p_yd_sums_k + stride, mask=m_yd, other=0.0) / positions
            if WEIGHTED:
                b_s = tl.load(p_first_sums + i_entry * C + o_c, mask=m_yd, other=0.0) / positions
                b_u = tl.load(p_yd_sums_k + 2 * stride, mask=m_yd, other=0.0) / positions
                b_mf = tl.load(p_yd_sums_k + 3 * stride, mask=m_yd, other=0.0) / positions
                b_u = b_r * (b_u - b_mf * b_md - b_s * b_t)
                b_first = tl.load(p_first + o, mask=m & m_yd[None, :], other=0.0).to(ACC)
                b_found -= (b_first - b_mf[None, :] - b_h * b_s[None, :]) * (b_r * b_t)[None, :]
            else:
                b_s = tl.load(p_sums_k + 2 * stride, mask=m_yd, other=0.0) / positions
                b_u = tl.load(p_sums_k + 3 * stride, mask=m_yd, other=0.0) / positions
            b_yd = tl.load(pick(p_yd, i_entry) + o, mask=m & m_yd[None, :], other=0.0).to(ACC)
            b_hd = (b_yd - b_md[None, :] - b_h * b_t[None, :]) * b_r[None, :]
            b_found -= b_s[None, :] * b_hd + b_u[None, :] * b_h
    if WEIGHTED:
        b_r = b_r * tl.load(p_weights + i_entry)
    p_out = p_found + tl.cast(i_entry, tl.int64) * positions * C
    tl.store(p_out + o, (b_found * b_r[None, :]).to(p_found.dtype.element_ty), mask=m)


@triton.jit
def mix_tangent_kernel(
    p_candidates,  # tuple of y_k [positions, C]
    p_tangents,  # tuple of yd_k
    p_means,  # tuple of [C]; so is the next
    p_rs,
    p_weights,  # [candidates]
    p_gh_sums,  # [candidates, C]: of G h
    p_sums,  # [4, candidates, C]: of yd, yd h, yd G, G
    p_out,  # [positions, C]: od
    p_weights_gained,  # [c blocks, candidates]
    positions,
    NORMS: tl.constexpr,
    HAS_TANGENT: tl.constexpr,
    BATCH: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_tile, i_c = tl.program_id(0), tl.program_id(1)
    o_p = tl.cast(i_tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m = (o_p < positions)[:, None] & m_c[None, :]
    o = o_p[:, None] * C + o_c[None, :]
    stride = len(p_candidates) * C
    b_total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for k in tl.static_range(len(p_candidates)):
        if HAS_TANGENT[k]:
            b_weight = tl.load(p_weights + k)
            b_mean, b_r = load_normalizer(p_means[k], p_rs[k], NORMS[k], o_c, m_c, ACC)
            p_sums_k = p_sums + k * C + o_c
            b_u = tl.load(p_sums_k + 2 * stride, mask=m_c, other=0.0) / positions  # mean(G yd)
            b_hd = tl.load(p_tangents[k] + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            if NORMS[k] and BATCH:
                b_md = tl.load(p_sums_k, mask=m_c, other=0.0) / positions
                b_t = tl.load(p_sums_k + stride, mask=m_c, other=0.0) / positions
                b_mg = tl.load(p_sums_k + 3 * stride, mask=m_c, other=0.0) / positions
                b_s = tl.load(p_gh_sums + k * C + o_c, mask=m_c, other=0.0) / positions
                b_u = b_u - b_mg * b_md - b_s * b_t
                b_y = tl.load(p_candidates[k] + o, mask=m, other=0.0).to(ACC)
                b_h = (b_y - b_mean[None, :]) * b_r[None, :]
                b_hd = b_hd - b_md[None, :] - b_h * b_t[None, :]
            b_total += b_hd * (b_r * b_weight)[None, :]
            if i_tile == 0:
                p_gained = p_weights_gained + i_c * len(p_candidates) + k
                tl.store(p_gained, tl.sum(b_u * b_r, axis=0) * positions)
        else:
            if i_tile == 0:
                tl.store(p_weights_gained + i_c * len(p_candidates) + k, 0.0)
    tl.store(p_out + o, b_total.to(p_out.dtype.element_ty), mask=m)


def mix_forward(candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor) -> Tensor:
    """o in the candidates' dtype; p [candidates]. One read of each candidate."""
    y = candidates[0]
    (out,) = images(1, y.shape, y.dtype, y.device)
    table = Table.of(normalizers, candidates)
    sizes, (tiles, blocks) = _sizes(y, unrolled=True)
    launch(
        mix_fwd_kernel,
        (tiles, blocks),
        {
            "p_candidates": tuple(candidates),
            "p_means": table.means,
            "p_rs": table.rs,
            "p_weights": p.contiguous(),
            "p_out": out,
            "positions": _positions(y),
        },
        {"NORMS": table.norms, **sizes},
    )
    return out


def add(terms: Sequence[Tensor]) -> Tensor:
    """The sum of two or more tensors, in their dtype. One read of each."""
    y = terms[0]
    (out,) = images(1, y.shape, y.dtype, y.device)
    sizes, grid = _sizes(y, unrolled=True)
    launch(add_kernel, grid, {"p_terms": tuple(terms), "p_out": out, "positions": _positions(y)}, sizes)
    return out


def mix_backward(
    candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor, g: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of every candidate, p_k B_k(g), and the sums of g h_k: [candidates, C]."""
    gs = [g] * len(candidates)
    sums = norm_sums(gs, candidates, normalizers)
    return norm_backward(gs, candidates, normalizers, sums, p), sums[1]


class _Left(NamedTuple):
    """What the tangent sweep of a mix leaves for its second backward sweep."""

    g: Tensor
    sums: Tensor  # [candidates, C]: of g h
    tangents: Sequence[Tensor | None]  # yd
    tangent_sums: Tensor  # [4, candidates, C]: of yd, yd h, yd g, g


def mix_tangent_forward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    sums: Tensor,
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, _Left]:
    """od, what dL/dp gains, and what `mix_second` needs; `sums` are what `mix_backward` returned. A tangent
    that is None is zero."""
    y = candidates[0]
    g = g.contiguous(memory_format=torch.channels_last)
    has = tuple(int(yd is not None) for yd in tangents)
    tangents = [None if yd is None else yd.contiguous(memory_format=torch.channels_last) for yd in tangents]
    given = _where(has, tangents, candidates)
    table = Table.of(normalizers, candidates)
    (out,) = images(1, y.shape, y.dtype, y.device)
    sizes, (tiles, blocks) = _sizes(y, unrolled=True)
    p_gained = p.new_empty(blocks, len(candidates))
    left = _Left(g, sums, tangents, norm_sums(given, candidates, normalizers, g))
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
            "p_gh_sums": sums,
            "p_sums": left.tangent_sums,
            "p_out": out,
            "p_weights_gained": p_gained,
            "positions": _positions(y),
        },
        {"NORMS": table.norms, "HAS_TANGENT": has, "BATCH": table.batch, **sizes},
    )
    return out, p_gained.view(-1) if blocks == 1 else p_gained.sum(0), left


def mix_second(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    left: _Left,
) -> tuple[list[Tensor], Tensor]:
    """The second adjoint of every candidate, and the sums of g h_k: [candidates, C]; g is the node's."""
    gs = [g] * len(candidates)
    sums = norm_sums(gs, candidates, normalizers)
    return norm_backward(gs, candidates, normalizers, sums, p, left.tangents, left.tangent_sums, left), sums[
        1
    ]


def norm_sums(
    gs: Sequence[Tensor],
    ys: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    weighed: Tensor | None = None,
) -> Tensor:
    """Per channel, the sums of g and g h; with `weighed` also of g * weighed and of weighed: [sums, k, C]."""
    y, entries = ys[0], len(ys)
    table = Table.of(normalizers, ys)
    sizes, (tiles, blocks) = _sizes(y)
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
            "p_weighed": y if weighed is None else weighed,
            "p_partials": partials,
            "p_sums": sums,
            "p_counters": counters(y, entries * blocks),
            "positions": _positions(y),
            "splits": splits,
        },
        {"NORMS": table.norms, "TANGENT": weighed is not None, **sizes},
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
    mix: _Left | None = None,
) -> list[Tensor]:
    """p_k B_k(g_k), see `Normalizer.adjoint`; with tangents yd, less r_k (s_k hd_k + u_k h_k); of a mix then
    also less p_k r_k t_k B_k(G), which a separable half takes from g before.

    Args:
        sums: of g, g h; with tangents then of G h, G hd, G the adjoint of h: s and u times the positions. (Of
            a mix they are in what its tangent sweep left.)
        yd_sums: of yd and yd h.
    """
    y, entries = ys[0], len(ys)
    table = Table.of(normalizers, ys)
    found = images(entries, y.shape, y.dtype, y.device)
    sizes, (tiles, blocks) = _sizes(y)
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
            "p_first": mix.g if mix else gs[0],
            "p_first_sums": mix.sums if mix else sums,
            "p_found": found,
            "positions": _positions(y),
        },
        {
            "NORMS": table.norms,
            "HAS_YD": tuple(int(yd is not None) for yd in yds_given),
            "BATCH": table.batch,
            "WEIGHTED": p is not None,
            "TANGENT": yds is not None,
            **sizes,
        },
    )
    return list(found.unbind())


def _where(flags: Sequence[int], tensors: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t if flag else o for flag, t, o in zip(flags, tensors, others, strict=True))


def _positions(y: Tensor) -> int:
    return y.shape[0] * y.shape[2] * y.shape[3]


def _sizes(y: Tensor, unrolled: bool = False) -> tuple[dict, tuple[int, int]]:
    """The sizes that are compiled in, and the grid that covers y.

    A kernel that is `unrolled` over its candidates loads them ahead: it takes 4 elements a thread of each, in
    one load. With 16, 14 candidates spilled; with 8, 35 did.
    """
    c = y.shape[1]
    block_p, block_c = elementwise_tile(c, 512) if unrolled else elementwise_tile(c)
    sizes = {"C": c, "BLOCK_P": block_p, "BLOCK_C": block_c, "ACC": ACCUMULATORS[accumulator(y.dtype)]}
    return sizes, (triton.cdiv(_positions(y), block_p), triton.cdiv(c, block_c))
