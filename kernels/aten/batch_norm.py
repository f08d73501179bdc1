"""Loads, batch norm and its sums, and the adjoint p B(G) of what a reader reads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast.kernels.types import EPSILON, Reader, SecondReader, Source, accumulator

aten = torch.ops.aten


def wide(x: Tensor) -> Tensor:
    """Returns x in channels-last memory, in float32 or wider. It may be x itself."""
    return x.to(accumulator(x.dtype)).contiguous(memory_format=torch.channels_last)


def per_channel(x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]"""
    return x[None, :, None, None]


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
    return F.batch_norm(x, source.statistics[0], source.statistics[1], training=False, eps=EPSILON)


def _norm_backward(g: Tensor, source: Source, output_mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns B(g), and the sums of g h and of g per channel; None where `output_mask` is False.

    The batch norm has a weight of ones: on CUDA, ATen returns no gradient of a weight that is None.
    """
    x = wide(source.x)
    one = x.new_ones(x.shape[1])
    mean, r = (torch.zeros_like(one), one) if source.statistics is None else source.statistics[::2]
    return aten.native_batch_norm_backward(g, x, one, mean, r, mean, r, True, EPSILON, output_mask)


def sums_with(g: Tensor, source: Source) -> Tensor:
    """Returns the sums of g and of g h per channel, [2, C], without writing the product g h."""
    _, products, sums = _norm_backward(g, source, [False, True, True])
    return torch.stack([sums, products])


def normalise_tangent(tangent: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """Returns hd = B(yd) of a source whose tangent is yd, and the sums of yd and of yd h per channel, [2, C].

    B is its own transpose, so ATen's backward pass of batch norm computes it.
    """
    if source.statistics is None:
        return wide(tangent), sums_with(wide(tangent), source)
    hd, products, sums = _norm_backward(wide(tangent), source, [True, True, True])
    return hd, torch.stack([sums, products])


class Terms(NamedTuple):
    """A sum `constant + y_factor y + factor x + ...`, of which the constant and all factors are [C]."""

    others: list[tuple[Tensor, Tensor]]  # x, factor
    constant: Tensor | None = None  # None: the sum has neither a constant nor y
    y_factor: Tensor | None = None


def first_terms(reader: Reader) -> Terms:
    """Returns p B(G), see `types.Reader`."""
    g = wide(reader.adjoint)
    p = g.new_ones(()) if reader.weights is None else reader.weights[reader.index]
    if reader.statistics is None:
        return Terms([(g, p.expand(g.shape[1]))])
    mean, _, r = reader.statistics
    g_mean, s = reader.sums[:, reader.index] / (g.numel() / g.shape[1])
    return _with_h([(g, p * r)], -p * r * g_mean, -p * r * s, mean, r)


def second_terms(reader: SecondReader) -> Terms:
    """Returns p ( B(Gd) - r (t B(G) + s hd + u h) ), see `types.SecondReader`, multiplied out."""
    first, index = reader.first, reader.first.index
    gd = wide(reader.adjoint)
    p = gd.new_ones(()) if first.weights is None else first.weights[index]
    if first.statistics is None:
        return Terms([(gd, p.expand(gd.shape[1]))])
    mean, _, r = first.statistics
    m = gd.numel() / gd.shape[1]
    s = first.sums[1, index] / m
    yd_mean, t, g_yd, g_mean = reader.tangent_sums[:, index] / m
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
        others.insert(0, (wide(y), sum(part.y_factor for part in parts if part.y_factor is not None)))
    constant = sum(constants) if constants else others[0][1].new_zeros(y.shape[1])
    total = per_channel(constant)
    (x, factor), *others = others
    total = torch.addcmul(total, x, per_channel(factor))
    for x, factor in others:
        total.addcmul_(x, per_channel(factor))
    return total
