"""Z = P' Y with the weight gradients, or also Zd = P' Yd + Pd' Y, in Triton. Y is taken on load from what the
outputs' readers hand back."""

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
    norms_of,
    pick,
    sum_of_products,
    sum_of_rows,
    weights_row,
)
from darts_fast.kernels.triton.launch_table import (
    dot_channel_block,
    positions,
    power_of_two,
    splits_of,
    warps,
)
from darts_fast.kernels.triton.sepconv_call import Call, dot, of_terms
from darts_fast.kernels.types import (
    Reader,
    SecondReader,
    Source,
    Weights,
    accumulator,
    readers_of_tasks,
    row_stride,
)

# Numbers of a weight gradient that the last program adds at a time, over 16 programs (`ROWS` numbers).
COLUMNS = tl.constexpr(128)


@triton.jit
def sepconv_bwd_pointwise_kernel(
    p_x,  # tuples as in the forward kernel; this is read if WEIGHTS or DIRECT, the next five if WEIGHTS
    p_means,
    p_rs,
    p_gammas,
    p_betas,
    p_depthwise,
    p_pointwise,
    p_pointwise_d,  # read if TANGENT
    p_adjoints,  # tuple of G [N, HO, WO, G_ROWS[t] >= K]
    p_seconds,  # tuple of Gd; read if TANGENT
    p_mix_weights,  # tuple of p [candidates], or [candidates, weights_row >= N]; read where WEIGHED
    p_own,  # tuple of y; this and the next three are read where OWN_NORMS
    p_own_means,  # tuple of [K]; so is the next
    p_own_rs,
    p_own_gammas,  # tuple of [K]; read if OWN_AFFINE
    p_first_sums,  # tuple of [2, candidates, K]: of G, G u, where p is by image of p G, p G u
    p_own_d,  # tuple of yd; this and the next two are read where OWN_NORMS if TANGENT
    p_own_d_sums,  # tuple of [3, candidates, K]: of yd, yd h, yd G
    p_second_sums,  # tuple of [2, candidates, K]: of Gd, Gd h
    p_terms,  # tuple of [N, HO, WO, TERM_ROWS[k] >= C], added for task TERM_SOURCES[k] if DIRECT
    p_z,  # [1, or 2 if TANGENT and not DIRECT, tasks, N, HO, WO, C]: Z, Zd
    p_partials,  # [tasks, c blocks, splits, K + TAPS, BLOCK_C]: dP and dD of a program; written if WEIGHTS
    p_gradients,  # [tasks, gradients_row]: dP [K, C], dD [C, k * k]; written if WEIGHTS
    p_counters,
    positions,  # N * HO * WO
    tasks,
    weights_row,
    gradients_row,  # K * C + C * TAPS, or K * C if no task has a depthwise part
    NORMS: tl.constexpr,
    KERNELS: tl.constexpr,
    DILATIONS: tl.constexpr,
    SHIFTS: tl.constexpr,
    HAS_D: tl.constexpr,
    TERM_SOURCES: tl.constexpr,
    TERM_ROWS: tl.constexpr,
    OWN_NORMS: tl.constexpr,  # which tasks' outputs are normalised by their readers, and so have sums
    WEIGHED: tl.constexpr,  # which have a p: 1, or 2 if it is by image
    PLAIN: tl.constexpr,  # whether none are normalised, and none have a p: Y = G
    PLACES: tl.constexpr,  # the reader's index in the sums and in p
    CANDIDATES: tl.constexpr,  # entries of the sums
    WEIGHTS: tl.constexpr,
    TANGENT: tl.constexpr,
    DIRECT: tl.constexpr,  # `Call.direct`: write [h > 0] Z, or with TANGENT [h > 0] Zd, in place of Z
    NORMALIZE: tl.constexpr,
    AFFINE: tl.constexpr,  # the batch norms of the sources have gamma and beta
    OWN_AFFINE: tl.constexpr,  # those of the outputs have
    BY_IMAGE: tl.constexpr,  # p of some task is by image
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
        if AFFINE:
            b_gamma, b_beta = load_affine(pick(p_gammas, i_task), pick(p_betas, i_task), 1, o_c, m_c, ACC)
            b_r = b_r * b_gamma
        o_tap = tl.arange(0, BLOCK_TAPS)
        b_dp = tl.zeros([BLOCK_K, BLOCK_C], ACC)
        b_dd = tl.zeros([BLOCK_TAPS, BLOCK_C], ACC)
    if not PLAIN:
        m_own_k = m_k & (pick(OWN_NORMS, i_task) > 0)
        i_place, size = pick(PLACES, i_task), pick(CANDIDATES, i_task) * OWN_ROW
        o_sum = i_place * OWN_ROW + o_k
        b_own_mean = tl.load(pick(p_own_means, i_task) + o_k, mask=m_own_k, other=0.0)
        b_own_r = tl.load(pick(p_own_rs, i_task) + o_k, mask=m_own_k, other=1.0)
        m_weighed = m_k & (pick(WEIGHED, i_task) == 1)
        b_weight = tl.load(pick(p_mix_weights, i_task) + i_place + o_k * 0, mask=m_weighed, other=1.0)
        b_scale = b_weight * b_own_r  # gamma p r, [BLOCK_K]
        if OWN_AFFINE:
            b_scale = b_scale * tl.load(pick(p_own_gammas, i_task) + o_k, mask=m_k, other=1.0)
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
            if BY_IMAGE:
                p_weights = pick(p_mix_weights, i_task) + i_place * weights_row
                m_image = m_p & (pick(WEIGHED, i_task) == 2)
                b_p_image = tl.load(p_weights + (i_first + o_t) // (HO * WO), mask=m_image, other=1.0)
                b_y = b_y.to(ACC) * b_p_image[:, None]
            b_inner = b_y.to(ACC) - b_g_mean[None, :] - b_h * b_s[None, :]  # Y / b_scale
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
            b_adjoint = tl.where(b_x > 0.0, b_adjoint, 0.0)
            for k in tl.static_range(len(TERM_SOURCES)):
                m_term = m_out & (i_task == TERM_SOURCES[k])
                o_term = i_first * TERM_ROWS[k] + (o_t[:, None] * TERM_ROWS[k] + o_c[None, :])
                b_adjoint += tl.load(p_terms[k] + o_term, mask=m_term, other=0.0).to(ACC)
            tl.store(p_out + o_out, b_adjoint.to(element), mask=m_out)
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
                if AFFINE:
                    b_a += b_beta[None, :]
                b_a = tl.where(m & ~(b_a < 0.0), b_a, 0.0)  # [BLOCK_P, BLOCK_C]
                b_d = tl.load(p_d + o_c * (kernel * kernel) + i_tap, mask=m_d, other=1.0).to(ACC)
                b_forward += b_a * b_d[None, :]
                b_sum = sum_of_products(b_z, b_a)  # [BLOCK_C]
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


def pointwise(
    call: Call,
    firsts: Sequence[Reader],
    seconds: Sequence[SecondReader] | None,
    weight_tangents: Sequence[Weights] | None,
    terms: Sequence[Sequence[Tensor]] | None,
    z: Tensor,
    gradients: Tensor | None,
) -> Launch:
    """Returns the launch that writes z [1 or 2, tasks, N, C, HO, WO]: Z of the tasks, and with `seconds` Zd;
    or the sources' adjoints, to which the terms are added, see `Call.direct`."""
    x, count, k = call.sources[0], len(call.tasks), call.out_shape[1]
    c, dtype = x.shape[1], accumulator(x.dtype)
    taps = max(call.kernels()) ** 2
    block_c = dot_channel_block(c, x.dtype)
    case = call.case()._replace(weights=gradients is not None, tangent=seconds is not None)
    block_p = positions("sepconv_bwd_pointwise_kernel", case)
    splits = triton.cdiv(call.positions(), block_p)
    blocks = triton.cdiv(c, block_c)
    partials = counts = z  # stand in where they are not wanted
    if gradients is not None:
        # Two programs a multiprocessor, which is what 180 registers a thread let in: with 1,024 the partial
        # sums of a weight gradient at 64 channels were more bytes than its operands.
        splits = splits_of(splits, count * blocks, 264)
        partials = x.new_empty(count, blocks, splits, k + taps, block_c, dtype=dtype)
        counts = counters(x, count * blocks)
    depthwise, pointwise = call.weights()

    def of_sources(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The value of each task's source; without gradients stand-ins, which are not read."""
        return pointwise if gradients is None else call.of_tasks(values)

    p_terms, constants_of_terms = of_terms(terms, z)
    of_readers, constants_of_readers = _of_readers(firsts, seconds, count)
    arguments = {
        "p_x": call.sources if call.direct() else of_sources(call.sources),
        "p_means": of_sources(call.means),
        "p_rs": of_sources(call.rs),
        "p_gammas": of_sources(call.gammas),
        "p_betas": of_sources(call.betas),
        "p_depthwise": depthwise if gradients is not None else pointwise,
        "p_pointwise": pointwise,
        "p_pointwise_d": call.weights(weight_tangents)[1],
        **of_readers,
        "p_terms": p_terms,
        "p_z": z,
        "p_partials": partials,
        "p_gradients": z if gradients is None else gradients,
        "p_counters": counts,
        "positions": call.positions(),
        "tasks": count,
        "weights_row": weights_row(reader.weights for reader in firsts),
        "gradients_row": 0 if gradients is None else gradients.stride(0),
    }
    constants = {
        "NORMS": call.of_tasks(call.norms),
        **call.geometry(),
        **constants_of_terms,
        **constants_of_readers,
        "WEIGHTS": gradients is not None,
        "TANGENT": seconds is not None,
        "DIRECT": call.direct(),
        "NORMALIZE": any(call.norms),
        "AFFINE": call.affine,
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
    firsts: Sequence[Reader], seconds: Sequence[SecondReader] | None, count: int
) -> tuple[dict, dict]:
    """Returns the arguments and the constants that come from the readers of `count` tasks."""
    firsts = readers_of_tasks(firsts, count)
    of_seconds: list[SecondReader | None] = [None] * count
    if seconds:
        of_seconds = [*readers_of_tasks(seconds, count)]
    adjoints = tuple(reader.adjoint for reader in firsts)
    second_adjoints = tuple(g if s is None else s.adjoint for g, s in zip(adjoints, of_seconds, strict=True))
    rows = tuple(map(row_stride, adjoints))
    if rows != tuple(map(row_stride, second_adjoints)):
        raise ValueError("an adjoint and its derivative must have the same strides")
    means, rs, norms = norms_of([Source(reader.adjoint, reader.statistics) for reader in firsts])
    weighed = tuple(0 if reader.weights is None else reader.weights.dim() for reader in firsts)
    gammas = [reader.gamma for reader in firsts]
    if len({gamma is None for gamma in gammas}) > 1:
        raise ValueError("either all outputs of one Triton launch have a gamma, or none has")
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
        "p_own_gammas": means if gammas[0] is None else tuple(gammas),
        "p_first_sums": sums_of([r.sums for r in firsts]),
        "p_own_d": images_of(
            [g if s is None else s.tangent for g, s in zip(adjoints, of_seconds, strict=True)]
        ),
        "p_own_d_sums": sums_of([s and s.tangent_sums for s in of_seconds]),
        "p_second_sums": sums_of([s and s.sums for s in of_seconds]),
    }
    read = [norm or has_p for norm, has_p in zip(norms, weighed, strict=True)]
    constants = {
        "OWN_NORMS": norms,
        "WEIGHED": weighed,
        "PLAIN": not any(read),
        "OWN_AFFINE": gammas[0] is not None,
        "BY_IMAGE": 2 in weighed,
        "PLACES": tuple(r.index if is_read else 0 for r, is_read in zip(firsts, read, strict=True)),
        "CANDIDATES": tuple(0 if r.sums is None else r.sums.shape[1] for r in firsts),
        "G_ROWS": rows,
        "OWN_ROW": row_stride(firsts[0].y),
    }
    return arguments, constants
