"""The kernels in ATen: portable and plain; no function here is differentiated by autograd.

Every op has three functions: `..._forward`, `..._backward`, and `..._tangent`, which is the backward of the
backward: it takes the derivative of every input along v and gives the derivative of the output along v (the
tangent forward sweep) together with what the second backward sweep adds to each adjoint. The rest of that
sweep is `..._backward` again, without weight gradients. docs/mathematics.md derives the formulas.

Tensors are [N, C, H, W] in channels-last memory. 2-byte activations are widened to float32 on load and
narrowed on store; everything between is float32 or wider.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5  # of every batch norm, nn.BatchNorm2d's default

aten = torch.ops.aten


class Task(NamedTuple):
    """One half of a separable convolution: which source it reads, and how its depthwise part walks it."""

    source: int = 0
    stride: int = 1
    dilation: int = 1
    offset: int = 0  # of the first pixel read, in x and y; only where there is no depthwise part


# Loads and stores


def wide(x: Tensor) -> Tensor:
    """`x` channels-last, in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous(memory_format=torch.channels_last)


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C]; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image(x: Tensor, like: Tensor) -> Tensor:
    """[N * H * W, C] -> [N, C, H, W] with N, H, W of `like`."""
    n, _, height, width = like.shape
    return x.view(n, height, width, -1).permute(0, 3, 1, 2)


def channel_sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3))


def per_channel(x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]"""
    return x[None, :, None, None]


# Batch norm without affine parameters: h = (y - mean) r


class Normalizer(NamedTuple):
    """The mean and reciprocal standard deviation [C] that y is normalised by; `batch` says that they are
    those of y itself, so that they move with it, and not constants (evaluation mode)."""

    mean: Tensor
    variance: Tensor
    r: Tensor
    batch: bool

    @classmethod
    def of(cls, statistics: Tensor, batch: bool) -> "Normalizer":
        mean, variance = statistics
        return cls(mean, variance, (variance + EPSILON).rsqrt(), batch)

    def apply(self, y: Tensor) -> Tensor:
        """h"""
        return F.batch_norm(y, self.mean, self.variance, training=False, eps=EPSILON)

    def adjoint(self, g: Tensor, y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """weight B(g) with B(g) = r (g - mean(g) - h mean(g h)), and the sum of g h per channel.

        B is its own transpose: it also takes the tangent of y to the tangent of h.
        """
        if weight is not None:
            # Contiguous: with an expanded weight ATen returns garbage for channels-last input.
            weight = weight.expand(y.shape[1]).contiguous()
        found, sums, _ = aten.native_batch_norm_backward(
            g,
            y,
            weight,
            self.mean,
            self.variance,
            self.mean,
            self.r,
            self.batch,
            EPSILON,
            [True, True, False],
        )
        return found, sums

    def second(
        self, y: Tensor, adjoint: Tensor, s: Tensor, hd: Tensor, t: Tensor, u: Tensor, weight: Tensor
    ) -> Tensor | None:
        """How weight B(g) changes with y, along yd: - r (t weight B(g) + s weight hd + u weight h).

        Args:
            adjoint: weight B(g).
            s, t, u: mean(g h), mean(h yd), mean(g hd), [C].
            hd: the tangent of h.
        """
        if not self.batch:
            return None
        scale = -self.r * self.r * weight * u
        found = torch.addcmul(per_channel(-scale * self.mean), y, per_channel(scale))
        found.addcmul_(adjoint, per_channel(-self.r * t))
        return found.addcmul_(hd, per_channel(-self.r * weight * s))


def statistics_of(y: Tensor) -> Tensor:
    """Mean and biased variance per channel, the variance about the mean: [2, C]."""
    mean, variance = torch.batch_norm_update_stats(y, None, None, 0.0)
    return torch.stack([mean, variance])


# Separable half: [h = batch norm of x] -> a = relu(h) -> z = D * a (depthwise) -> y = P z (pointwise)


def depthwise(a: Tensor, weight: Tensor | None, task: Task) -> Tensor:
    """z = D * a; without D, the pixels that the stride reads."""
    if weight is None:
        return a[:, :, task.offset :: task.stride, task.offset :: task.stride]
    padding = task.dilation * (weight.shape[-1] // 2)
    return F.conv2d(a, weight, None, task.stride, padding, task.dilation, groups=a.shape[1])


def depthwise_adjoint(z: Tensor, weight: Tensor | None, task: Task, like: Tensor) -> Tensor:
    """A = D' * z, of the shape of `like`, as a forward convolution with the flipped kernel: ATen's own
    backward of a dilated depthwise convolution took 1438 us where this took 174 us (3x3, batch 16, 16
    channels, 32x32, one CPU core)."""
    if task.stride > 1:
        spread = torch.zeros_like(like, memory_format=torch.channels_last)
        spread[:, :, task.offset :: task.stride, task.offset :: task.stride] = z
        z = spread
    if weight is None:
        return z
    padding = task.dilation * (weight.shape[-1] // 2)
    return F.conv2d(z, weight.flip(2, 3), None, 1, padding, task.dilation, groups=z.shape[1])


def depthwise_weight_gradient(z: Tensor, planes: Tensor, weight: Tensor, task: Task) -> Tensor:
    """dD: z correlated with a, as a forward convolution too: every channel of every image is a channel, z is
    the kernel, stride and dilation change places. ATen's own backward took 1.2 to 3.0 ms where this took 0.8
    to 1.1 ms (5x5 or dilated, batch 16, 16 channels, 32x32, one CPU core), and had 4 times its rounding.

    Args:
        planes: a, contiguous in [N, C, H, W].
    """
    n, c, height, width = planes.shape
    found = F.conv2d(
        planes.view(1, n * c, height, width),
        z.reshape(n * c, 1, *z.shape[2:]),
        stride=task.dilation,
        padding=task.dilation * (weight.shape[-1] // 2),
        dilation=task.stride,
        groups=n * c,
    )
    found = found.view(n, *weight.shape[:2], *found.shape[2:])
    return found[..., : weight.shape[2], : weight.shape[3]].sum(0)


def pointwise(z: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """P z, plus another if given; P is [K, C, 1, 1]."""
    weight = weight.flatten(1).t()
    return image(rows(z) @ weight if plus is None else torch.addmm(rows(plus), rows(z), weight), z)


def pointwise_adjoint(y: Tensor, weight: Tensor) -> Tensor:
    """P' y"""
    return image(rows(y) @ weight.flatten(1), y)


def masked(x: Tensor, a: Tensor) -> Tensor:
    """[h > 0] x, with a = relu(h)."""
    return aten.threshold_backward(x, a, 0)


def sepconv_forward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """y of every task in the sources' dtype, and their statistics [tasks, 2, K]."""
    inputs = [_rectified(x, norm) for x, norm in zip(sources, normalizers, strict=True)]
    outputs, statistics = [], []
    for task, d, p in zip(tasks, depthwise_weights, pointwise_weights, strict=True):
        y = pointwise(depthwise(inputs[task.source], d, task), p)
        statistics.append(statistics_of(y))
        outputs.append(y.to(sources[task.source].dtype))
    return outputs, torch.stack(statistics)


def sepconv_backward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    weight_gradients: bool,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """The adjoint of every source, and the gradients of the weights: None where they are not asked for."""
    inputs = [_rectified(x, norm) for x, norm in zip(sources, normalizers, strict=True)]
    planes = [a.contiguous() for a in inputs] if weight_gradients else []
    found: list[Tensor | None] = [None] * len(sources)
    d_gradients: list[Tensor | None] = [None] * len(tasks)
    p_gradients: list[Tensor | None] = [None] * len(tasks)
    for index, task in enumerate(tasks):
        d, p, a, y = depthwise_weights[index], pointwise_weights[index], inputs[task.source], adjoints[index]
        y = wide(y)
        z = pointwise_adjoint(y, p)
        found[task.source] = _plus(found[task.source], depthwise_adjoint(z, d, task, a))
        if weight_gradients:
            # The depthwise output is computed again rather than kept: keeping it would double what the
            # forward pass saves.
            p_gradients[index] = (rows(y).t() @ rows(depthwise(a, d, task))).view_as(p)
            if d is not None:
                d_gradients[index] = depthwise_weight_gradient(z, planes[task.source], d, task)
    for index, (x, norm) in enumerate(zip(sources, normalizers, strict=True)):
        adjoint = masked(found[index], inputs[index])
        if norm is not None:
            adjoint, _ = norm.adjoint(adjoint, wide(x))
        found[index] = adjoint.to(x.dtype)
    return found, d_gradients, p_gradients


def sepconv_tangent(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    source_tangents: Sequence[Tensor | None],
    depthwise_tangents: Sequence[Tensor | None],
    pointwise_tangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """yd of every task, and what the sources' second adjoints gain. A tangent that is None is zero."""
    inputs = [_rectified(x, norm) for x, norm in zip(sources, normalizers, strict=True)]
    h_tangents: list[Tensor | None] = [None] * len(sources)
    a_tangents: list[Tensor | None] = [None] * len(sources)
    sums: list[Tensor | None] = [None] * len(sources)
    for index, (x, xd, norm) in enumerate(zip(sources, source_tangents, normalizers, strict=True)):
        if xd is not None:
            hd = wide(xd)
            if norm is not None:
                hd, sums[index] = norm.adjoint(hd, wide(x))
            h_tangents[index], a_tangents[index] = hd, masked(hd, inputs[index])
    outputs: list[Tensor | None] = []
    first: list[Tensor | None] = [None] * len(sources)  # the adjoint of relu(h), of the first backward
    second: list[Tensor | None] = [None] * len(sources)  # how it changes with the weights, along v
    for index, task in enumerate(tasks):
        d, p, y = depthwise_weights[index], pointwise_weights[index], wide(adjoints[index])
        a, ad = inputs[task.source], a_tangents[task.source]
        dd, pd = depthwise_tangents[index], pointwise_tangents[index]
        zd = None if ad is None else depthwise(ad, d, task)
        z = pointwise_adjoint(y, p)
        if dd is not None:
            zd = _plus(zd, depthwise(a, dd, task))
            second[task.source] = _plus(second[task.source], depthwise_adjoint(z, dd, task, a))
        yd = None if zd is None else pointwise(zd, p)
        if pd is not None:
            yd = pointwise(depthwise(a, d, task), pd, yd)
            gained = depthwise_adjoint(pointwise_adjoint(y, pd), d, task, a)
            second[task.source] = _plus(second[task.source], gained)
        if normalizers[task.source] is not None and h_tangents[task.source] is not None:
            first[task.source] = _plus(first[task.source], depthwise_adjoint(z, d, task, a))
        outputs.append(None if yd is None else yd.to(sources[task.source].dtype))
    for index, (x, norm) in enumerate(zip(sources, normalizers, strict=True)):
        gained = None if second[index] is None else masked(second[index], inputs[index])
        if norm is not None:
            if gained is not None:
                gained, _ = norm.adjoint(gained, wide(x))
            hd = h_tangents[index]
            if hd is not None:
                g = masked(first[index], inputs[index])
                adjoint, s = norm.adjoint(g, wide(x))
                m = x.numel() / x.shape[1]
                curvature = norm.second(
                    wide(x), adjoint, s / m, hd, sums[index] / m, channel_sum(g * hd) / m, hd.new_ones(())
                )
                gained = _plus(gained, curvature)
        second[index] = None if gained is None else gained.to(x.dtype)
    return outputs, second


def _rectified(x: Tensor, norm: Normalizer | None) -> Tensor:
    x = wide(x)
    return (x if norm is None else norm.apply(x)).relu()


def _plus(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """total + term, where None is zero; `total` is overwritten."""
    if total is None or term is None:
        return term if total is None else total
    return total.add_(term)


# Pools: 3x3, padding 1, over the pixels that are there


def pool_forward(x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum and average in x's dtype, the maximum's position, and the statistics of both [2, 2, C].

    Of equal values the first in row-major order is the maximum.
    """
    maximum, position = F.max_pool2d(wide(x), 3, stride, 1, return_indices=True)
    average = F.avg_pool2d(wide(x), 3, stride, 1, count_include_pad=False)
    statistics = torch.stack([statistics_of(maximum), statistics_of(average)])
    return maximum.to(x.dtype), average.to(x.dtype), position, statistics


def pool_backward(x: Tensor, position: Tensor, stride: int, maximum: Tensor, average: Tensor) -> Tensor:
    """The adjoint of x from those of the two pools."""
    window = [3, 3], [stride, stride], [1, 1]
    found = aten.max_pool2d_with_indices_backward(wide(maximum), wide(x), *window, [1, 1], False, position)
    found = found + aten.avg_pool2d_backward(wide(average), wide(x), *window, False, False, None)
    return found.to(x.dtype)


def pool_tangent(xd: Tensor, position: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The tangents of the two pools: both are linear once the positions are held."""
    average = F.avg_pool2d(wide(xd), 3, stride, 1, count_include_pad=False)
    maximum = xd.flatten(2).gather(2, position.flatten(2)).view(position.shape)
    return maximum.contiguous(memory_format=torch.channels_last), average.to(xd.dtype)


# Mix: o = sum over k of p_k h_k, h_k the batch norm of y_k, or y_k itself


def mix_forward(candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor) -> Tensor:
    """o in the candidates' dtype; p [candidates]."""
    total = per_channel(
        sum((-w * norm.r * norm.mean for w, norm in zip(p, normalizers, strict=True) if norm), p.new_zeros(1))
    )
    for y, w, norm in zip(candidates, p, normalizers, strict=True):
        scale = w if norm is None else per_channel(w * norm.r)
        # Out of place once, where the total is one number a channel yet.
        total = torch.addcmul(total, wide(y), scale, out=None if y is candidates[0] else total)
    return total.to(candidates[0].dtype)


def mix_backward(
    candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor, g: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of every candidate, p_k B_k(g), and the sums of g h_k: [candidates, C]."""
    g = wide(g)
    adjoints, sums = [], []
    for y, w, norm in zip(candidates, p, normalizers, strict=True):
        if norm is None:
            adjoint, total = g * w, channel_sum(g * wide(y))
        else:
            adjoint, total = norm.adjoint(g, wide(y), w)
        adjoints.append(adjoint.to(y.dtype))
        sums.append(total)
    return adjoints, torch.stack(sums)


def mix_tangent(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    adjoints: Sequence[Tensor],
    sums: Tensor,
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """od, what the candidates' second adjoints gain, and what dL/dp gains. A tangent that is None is zero.

    `adjoints` and `sums` are what `mix_backward` returned.
    """
    g, m = wide(g), g.numel() / g.shape[1]
    total = torch.zeros_like(g)
    gained: list[Tensor | None] = []
    p_gained = torch.zeros_like(p)
    for k, (y, w, norm, yd) in enumerate(zip(candidates, p, normalizers, tangents, strict=True)):
        if yd is None:
            gained.append(None)
            continue
        hd = wide(yd)
        if norm is not None:
            y = wide(y)
            hd, t = norm.adjoint(hd, y)
        total.addcmul_(hd, w)
        u = channel_sum(g * hd)
        p_gained[k] = u.sum()
        second = None
        if norm is not None:
            second = norm.second(y, wide(adjoints[k]), sums[k] / m, hd, t / m, u / m, w)
        gained.append(None if second is None else second.to(adjoints[k].dtype))
    return total.to(candidates[0].dtype), gained, p_gained
