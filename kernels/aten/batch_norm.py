"""Loads, batch norm and its sums, and the adjoint p B(G) of what a reader reads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast.kernels.types import EPSILON, Reader, SecondReader, Source, accumulator

aten = torch.ops.aten


def wide(x: Tensor) -> Tensor:
    """Returns x in channels-last memory, in float32 or wider. It may be x itself."""
    return x.to(accumulator(x.dtype)).contiguous(memory_format=torch.channels_last)


def per_channel(x: Tensor) -> Tensor:
    """[C] or, by image, [N, C] -> [1 or N, C, 1, 1]"""
    return x[..., None, None] if x.dim() == 2 else x[None, :, None, None]


def statistics_of(y: Tensor) -> Tensor:
    """Returns mean, biased variance (about the mean, which is stable) and r of each channel: [3, C]."""
    if y.is_meta:  # for which PyTorch has no shapes of `batch_norm_update_stats`; this is one launch, too
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    else:
        mean, variance = torch.batch_norm_update_stats(y, None, None, 0.0)
    return torch.stack([mean, variance, (variance + EPSILON).rsqrt()])


def normalise(source: Source) -> Tensor:
    """Returns h of a source. It may be `source.x` itself."""
    x = wide(source.x)
    if source.statistics is None:
        return x
    gamma, beta = (None, None) if source.affine is None else source.affine
    mean, variance, _ = source.statistics
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=EPSILON)


def sums_with(g: Tensor, source: Source) -> Tensor:
    """Returns the sums of g and of g u per channel, [2, C], without writing the product g u: the gradients of
    a bias and of a weight of the batch norm."""
    x = wide(source.x)
    one = x.new_ones(x.shape[1])  # the weight: on CUDA, ATen returns no gradient of one that is None
    mean, r = (torch.zeros_like(one), one) if source.statistics is None else source.statistics[::2]
    wanted = [False, True, True]
    _, products, sums = aten.native_batch_norm_backward(g, x, one, mean, r, mean, r, True, EPSILON, wanted)
    return torch.stack([sums, products])


def write_tangent_sums(tangent: Tensor, reader: Reader, sums: Tensor) -> None:
    """Writes the sums of yd, yd h and yd G per channel, [3, C], for what reads y."""
    yd = wide(tangent)
    sums[:2] = sums_with(yd, Source(reader.y, reader.statistics))
    sums[2] = sums_with(yd, Source(reader.adjoint))[1]


def normalise_tangent(tangent: Tensor, source: Source, sums: Tensor | None) -> Tensor:
    """Returns hd = r (yd - mean(yd) - h mean(yd h)) of a source whose tangent is yd; `sums` [3, C] are those
    of yd, yd h and yd G. It may be `tangent` itself."""
    yd = wide(tangent)
    if source.statistics is None:
        return yd
    assert sums is not None
    mean, _, r = source.statistics
    yd_mean, t, _ = sums / (yd.numel() / yd.shape[1])
    return evaluate(source.x, [_with_h([(yd, r)], -r * yd_mean, -r * t, mean, r)])


class Terms(NamedTuple):
    """A sum `constant + y_factor y + factor x + ...`, of which the constant and all factors are [C]; a factor
    may be by image, [N, C]."""

    others: list[tuple[Tensor, Tensor]]  # x, factor
    constant: Tensor | None = None  # None: the sum has neither a constant nor y
    y_factor: Tensor | None = None


def first_terms(reader: Reader) -> Terms:
    """Returns gamma B(p G), see `types.Reader`."""
    g = wide(reader.adjoint)
    p = g.new_ones(()) if reader.weights is None else reader.weights[reader.index]
    if reader.statistics is None:
        return Terms([(g, p[..., None].expand(*p.shape, g.shape[1]))])
    assert reader.sums is not None
    mean, _, r = reader.statistics
    g_mean, s = reader.sums[:, reader.index] / (g.numel() / g.shape[1])
    scale = r if reader.gamma is None else r * reader.gamma
    if p.dim():  # by image: the sums are of p G
        return _with_h([(g, p[:, None] * scale)], -scale * g_mean, -scale * s, mean, r)
    return _with_h([(g, p * scale)], -p * scale * g_mean, -p * scale * s, mean, r)


def second_terms(reader: SecondReader) -> Terms:
    """Returns p ( B(Gd) - r (t B(G) + s hd + u h) ), see `types.SecondReader`, multiplied out."""
    first, index = reader.first, reader.first.index
    gd = wide(reader.adjoint)
    p = gd.new_ones(()) if first.weights is None else first.weights[index]
    if first.statistics is None:
        return Terms([(gd, p.expand(gd.shape[1]))])
    assert first.sums is not None and reader.tangent_sums is not None and reader.sums is not None
    mean, _, r = first.statistics
    m = gd.numel() / gd.shape[1]
    g_mean, s = first.sums[:, index] / m
    yd_mean, t, g_yd = reader.tangent_sums[:, index] / m
    gd_mean, gd_h = reader.sums[:, index] / m
    u = r * (g_yd - g_mean * yd_mean - s * t)
    others = [
        (gd, p * r),
        (wide(first.adjoint), -p * r * r * t),
        (wide(reader.tangent), -p * r * r * s),
    ]
    constant = p * r * (r * (t * g_mean + s * yd_mean) - gd_mean)
    return _with_h(others, constant, p * r * (2 * r * s * t - gd_h - u), mean, r)


def _with_h(
    others: list[tuple[Tensor, Tensor]], constant: Tensor, h_factor: Tensor, mean: Tensor, r: Tensor
) -> Terms:
    """Returns the sum `others + constant + h_factor h`, with h = (y - mean) r."""
    return Terms(others, constant - h_factor * r * mean, h_factor * r)


def evaluate(y: Tensor, parts: Sequence[Terms]) -> Tensor:
    """Returns the value of the sum of all parts, like y in shape; y is read once."""
    others = [term for part in parts for term in part.others]
    constants = [part.constant for part in parts if part.constant is not None]
    if constants:
        y_factor: Any = sum(part.y_factor for part in parts if part.y_factor is not None)
        others.insert(0, (wide(y), y_factor))
    constant: Any = sum(constants) if constants else others[0][1].new_zeros(y.shape[1])
    total = per_channel(constant)
    (x, factor), *others = others
    total = torch.addcmul(total, x, per_channel(factor))
    for x, factor in others:
        total.addcmul_(x, per_channel(factor))
    return total
