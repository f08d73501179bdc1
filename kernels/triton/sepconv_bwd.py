"""H = [h > 0] D' * Z, or Hd, summed over a source's tasks, in Triton."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from darts_fast.kernels.triton.launch import (
    Launch,
    counters,
    last_program,
    load_affine,
    load_normalizer,
    pick,
    sum_of_products,
    sum_of_rows,
)
from darts_fast.kernels.triton.launch_table import tile
from darts_fast.kernels.triton.sepconv_call import Call, of_terms
from darts_fast.kernels.types import Weights


@triton.jit
def sepconv_bwd_kernel(
    p_x,  # tuple, as the next two one a source: [N, H, W, C]
    p_means,
    p_rs,
    p_gammas,  # tuple, one a source: [C]; this and the next are read if AFFINE
    p_betas,
    p_depthwise,  # tuple, one a task, as the next
    p_depthwise_d,  # read if TANGENT
    p_z,  # [1, or 2 if TANGENT, tasks, N, HO, WO, C]: Z, Zd
    p_terms,  # tuple of [N, H, W, TERM_ROWS[k] >= C], added to the adjoint of source TERM_SOURCES[k]
    p_adjoint,  # [sources, N, H, W, C]
    p_partials,  # [2, sources, tiles, C]; written if SUMS, as the next
    p_sums,  # [2, sources, C]: of H, H u
    p_counters,
    pixels,  # N * H * W
    positions,  # N * HO * WO
    SOURCES: tl.constexpr,
    NORMS: tl.constexpr,
    KERNELS: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HAS_D: tl.constexpr,
    TERM_SOURCES: tl.constexpr,
    TERM_ROWS: tl.constexpr,
    TANGENT: tl.constexpr,
    SUMS: tl.constexpr,
    AFFINE: tl.constexpr,  # the batch norms of the sources have gamma and beta
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
    b_u = tl.load(pick(p_x, i_source) + o, mask=m, other=0.0).to(ACC)
    b_u = (b_u - b_mean[None, :]) * b_r[None, :]
    b_h = b_u
    if AFFINE:
        b_gamma, b_beta = load_affine(pick(p_gammas, i_source), pick(p_betas, i_source), 1, o_c, m_c, ACC)
        b_h = b_u * b_gamma[None, :] + b_beta[None, :]
    b_adjoint = tl.where(m & (b_h > 0.0), b_adjoint, 0.0)
    entries = tl.num_programs(1)
    tiles = tl.num_programs(0)
    p_tile = p_partials + tl.cast(i_source * tiles + i_tile, tl.int64) * C + o_c
    stride = tl.cast(entries * tiles, tl.int64) * C
    if SUMS:
        tl.store(p_tile, tl.sum(b_adjoint, axis=0), mask=m_c)
        tl.store(p_tile + stride, sum_of_products(b_adjoint, b_u), mask=m_c)
    for k in tl.static_range(len(TERM_SOURCES)):
        m_term = m & (i_source == TERM_SOURCES[k])
        o_term = i_first * TERM_ROWS[k] + (o_t[:, None] * TERM_ROWS[k] + o_c[None, :])
        b_adjoint += tl.load(p_terms[k] + o_term, mask=m_term, other=0.0).to(ACC)
    p_out = p_adjoint + i_source.to(tl.int64) * pixels * C
    tl.store(p_out + o, b_adjoint.to(p_adjoint.dtype.element_ty), mask=m)
    if SUMS:
        if last_program(p_counters + i_source * tl.num_programs(2) + i_c, tiles):
            for i_sum in tl.static_range(2):
                p_rows = p_partials + i_sum * stride + tl.cast(i_source * tiles, tl.int64) * C
                b_sum = sum_of_rows(p_rows, tiles, C, o_c, m_c, BLOCK_C, ACC)
                tl.store(p_sums + (i_sum * entries + i_source) * C + o_c, b_sum, mask=m_c)


def depthwise(
    call: Call,
    z: Tensor,
    weight_tangents: Sequence[Weights] | None,
    terms: Sequence[Sequence[Tensor]],
    adjoint: Tensor,
    sums: Tensor | None,
) -> Launch:
    """Returns the launch that writes the sources' adjoints; with tangents, the second ones."""
    x, count = call.sources[0], len(call.sources)
    c = x.shape[1]
    block_p, block_c = tile("sepconv_bwd_kernel", call.case())
    tiles, blocks = triton.cdiv(call.pixels(), block_p), triton.cdiv(c, block_c)
    partials = counts = z  # stand in where they are not wanted
    if sums is not None:
        partials = x.new_empty(2, count, tiles, c, dtype=sums.dtype)
        counts = counters(x, count * blocks)
    p_terms, constants_of_terms = of_terms(terms, adjoint)
    arguments = {
        "p_x": call.sources,
        "p_means": call.means,
        "p_rs": call.rs,
        "p_gammas": call.gammas,
        "p_betas": call.betas,
        "p_depthwise": call.weights()[0],
        "p_depthwise_d": call.weights(weight_tangents)[0],
        "p_z": z,
        "p_terms": p_terms,
        "p_adjoint": adjoint,
        "p_partials": partials,
        "p_sums": z if sums is None else sums,
        "p_counters": counts,
        "pixels": call.pixels(),
        "positions": call.positions(),
    }
    constants = {
        "SOURCES": tuple(task.source for task in call.tasks),
        "NORMS": call.norms,
        **call.geometry(),
        **constants_of_terms,
        "TANGENT": weight_tangents is not None,
        "SUMS": sums is not None,
        "AFFINE": call.affine,
        **call.sizes(),
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    return Launch(sepconv_bwd_kernel, (tiles, count, blocks), arguments, constants)
