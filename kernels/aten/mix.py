"""Mixes, batch norms, tensors that several nodes read, and sums of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from darts_fast.kernels.aten.batch_norm import (
    Terms,
    evaluate,
    first_terms,
    normalise,
    normalise_tangent,
    per_channel,
    second_terms,
    sums_with,
    wide,
)
from darts_fast.kernels.aten.launch import as_launch
from darts_fast.kernels.types import Reader, SecondReader, Source, accumulator

# A node: o = sum over candidates k of p_k h_k.


@as_launch
def mix_forward(candidates: Sequence[Source], weights: Tensor | None, *, outs: Sequence[Tensor]) -> None:
    like, factors = outs[0], []
    constant = torch.zeros(1, 1, 1, 1, dtype=accumulator(like.dtype), device=like.device)
    for k, candidate in enumerate(candidates):
        p = constant.new_ones(1) if weights is None else weights[k][..., None]
        scale = shift = None
        if candidate.statistics is not None:
            mean, _, r = candidate.statistics
            scale, shift = p * r, -p * r * mean
            if candidate.affine is not None:
                gamma, beta = candidate.affine
                scale, shift = scale * gamma, shift * gamma + p * beta
            constant = constant + per_channel(shift)
        factors.append(per_channel(p if scale is None else scale))
    total = torch.addcmul(constant, wide(candidates[0].x), factors[0])
    for candidate, factor in zip(candidates[1:], factors[1:], strict=True):
        total.addcmul_(wide(candidate.x), factor)
    for out in outs:
        out.copy_(total)


@as_launch
def mix_backward(
    candidates: Sequence[Source],
    weights: Tensor | None,
    adjoint: Tensor,
    *,
    sums: Tensor,
    weight_gradient: Tensor | None,
) -> None:
    g = wide(adjoint)
    for k, candidate in enumerate(candidates):
        sums[:, k] = sums_with(g if weights is None else g * weights[k][:, None, None, None], candidate)
    if weight_gradient is not None:
        torch.sum(sums[1], 1, out=weight_gradient)


@as_launch
def mix_tangent(
    candidates: Sequence[Source],
    weights: Tensor,
    tangents: Sequence[Tensor],
    tangent_sums: Tensor | None,
    adjoint: Tensor,
    *,
    outs: Sequence[Tensor],
    products: Tensor,
) -> None:
    total = None
    for k, (candidate, p, yd) in enumerate(zip(candidates, weights, tangents, strict=True)):
        hd = normalise_tangent(yd, candidate, None if tangent_sums is None else tangent_sums[:, k])
        total = hd * p if total is None else total.addcmul_(hd, p)
        if candidate.statistics is None:
            products[k] = sums_with(hd, Source(adjoint))[1]
    assert total is not None  # there is a candidate
    for out in outs:
        out.copy_(total)


@as_launch
def mix_second(
    candidates: Sequence[Source],
    adjoint: Tensor,
    first_sums: Tensor,
    tangent_sums: Tensor | None,
    products: Tensor,
    *,
    sums: Tensor,
    weight_gradient: Tensor,
) -> None:
    gd = wide(adjoint)
    m = gd.numel() / gd.shape[1]
    for k, candidate in enumerate(candidates):
        sums[:, k] = sums_with(gd, candidate)
        g_hd = products[k]
        if candidate.statistics is not None:
            assert tangent_sums is not None
            (g, g_h), (yd, yd_h, yd_g) = first_sums[:, k], tangent_sums[:, k]
            g_hd = candidate.statistics[2] * (yd_g - (g * yd + g_h * yd_h) / m)
        weight_gradient[k] = (sums[1, k] + g_hd).sum()


# Batch norm of several tensors alike, each by itself.


@as_launch
def norm_forward(sources: Sequence[Source], *, out: Tensor) -> None:
    for number, source in enumerate(sources):
        out[number].copy_(normalise(source))


@as_launch
def norm_backward(sources: Sequence[Source], adjoints: Sequence[Tensor], *, sums: Tensor) -> None:
    for number, (source, g) in enumerate(zip(sources, adjoints, strict=True)):
        sums[:, number] = sums_with(wide(g), source)


@as_launch
def norm_tangent(
    sources: Sequence[Source],
    tangents: Sequence[Tensor],
    sums: Tensor,
    *,
    out: Tensor,
) -> None:
    for number, (source, yd) in enumerate(zip(sources, tangents, strict=True)):
        out[number].copy_(normalise_tangent(yd, source, sums[:, number]))


# Tensors that several nodes read.


@as_launch
def fan_out_backward(sources: Sequence[Source], readers: Sequence[Sequence[Reader]], *, out: Tensor) -> None:
    for number, (source, its) in enumerate(zip(sources, readers, strict=True)):
        _write_sum(source, list(map(first_terms, its)), out[number])


@as_launch
def fan_out_second(
    sources: Sequence[Source], readers: Sequence[Sequence[SecondReader]], *, out: Tensor
) -> None:
    for number, (source, its) in enumerate(zip(sources, readers, strict=True)):
        _write_sum(source, list(map(second_terms, its)), out[number])


def _write_sum(source: Source, parts: Sequence[Terms], out: Tensor) -> None:
    if parts:
        out.copy_(evaluate(source.x, parts))
    else:
        out.zero_()


@as_launch
def add(terms: Sequence[Tensor], *, out: Tensor) -> None:
    total = wide(terms[0]) + terms[1]
    for term in terms[2:]:
        total.add_(term)
    out.copy_(total)
