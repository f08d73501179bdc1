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


def in_rows(x: Tensor) -> Tensor:
    """x as these functions read it: in channels-last memory. Triton's also read a slice of its channels."""
    return x.contiguous(memory_format=torch.channels_last)


def wide(x: Tensor) -> Tensor:
    """`x` channels-last, in float32 or wider."""
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return x.contiguous(memory_format=torch.channels_last)


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C]; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image(x: Tensor, like: Tensor) -> Tensor:
    """[N * H * W, C] -> [N, C, H, W] with N, H, W of `like`."""
    n, _, height, width = like.shape
    return x.view(n, height, width, -1).permute(0, 3, 1, 2)


def channel_dot(x: Tensor, y: Tensor) -> Tensor:
    """The sum of x y per channel, [C]: the gradient of a batch norm's weight where mean is 0 and r is 1,
    because that pass writes no product."""
    zero, one = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    return aten.native_batch_norm_backward(
        x, y, one, zero, one, zero, one, True, EPSILON, [False, True, False]
    )[1]


def per_channel(x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]"""
    return x[None, :, None, None]


# Batch norm without affine parameters: h = (y - mean) r


class Normalizer(NamedTuple):
    """`statistics` [3, C] are the mean, biased variance and r that y is normalised by; `batch` says that they
    are those of y itself, so that they move with it, and not constants (evaluation mode)."""

    statistics: Tensor
    batch: bool

    @property
    def mean(self) -> Tensor:
        return self.statistics[0]

    @property
    def variance(self) -> Tensor:
        return self.statistics[1]

    @property
    def r(self) -> Tensor:
        return self.statistics[2]

    def apply(self, y: Tensor) -> Tensor:
        """h"""
        return F.batch_norm(y, self.mean, self.variance, training=False, eps=EPSILON)

    def adjoint(self, g: Tensor, y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """weight B(g) with B(g) = r (g - mean(g) - h mean(g h)), and the sum of g h per channel.

        B is its own transpose: it also takes the tangent of y to the tangent of h. `weight` is [C] and
        contiguous: with an expanded one ATen returns garbage for channels-last input.
        """
        found, sums, _ = aten.native_batch_norm_backward(
            g,
            y,
            # Without a weight ATen's CUDA kernels give no sums: an empty tensor, or an error.
            torch.ones_like(self.r) if weight is None else weight,
            self.mean,
            self.variance,
            self.mean,
            self.r,
            self.batch,
            EPSILON,
            [True, True, False],
        )
        return found, sums


def second_adjoint(
    y: Tensor, norm: Normalizer, weight: Tensor, adjoint: Tensor, s: Tensor, hd: Tensor, t: Tensor, u: Tensor
) -> Tensor | None:
    """How weight B(g) changes with y, along yd: - r (t weight B(g) + s weight hd + u weight h). None (zero)
    where the statistics are constants.

    Args:
        weight: a number or [C].
        adjoint: weight B(g).
        s, t, u: mean(g h), mean(h yd), mean(g hd), [C].
        hd: the tangent of h.
    """
    if not norm.batch:
        return None
    minus_r = -norm.r
    scale = minus_r * norm.r * weight * u
    found = torch.addcmul(per_channel(-scale * norm.mean), y, per_channel(scale))
    found.addcmul_(adjoint, per_channel(minus_r * t))
    return found.addcmul_(hd, per_channel(minus_r * weight * s))


def statistics_of(outputs: Sequence[Tensor]) -> Tensor:
    """Mean, biased variance (about the mean, which is stable) and r of each channel: [outputs, 3, C].

    Raises ValueError where a channel has a single value.
    """
    n, _, height, width = outputs[0].shape
    if n * height * width == 1:
        raise ValueError(
            f"batch norm in training needs more than one value a channel, not {outputs[0].shape}"
        )
    found = torch.stack([part for y in outputs for part in torch.batch_norm_update_stats(y, None, None, 0.0)])
    found = found.view(len(outputs), 2, -1)
    return torch.cat([found, (found[:, 1:] + EPSILON).rsqrt()], dim=1)


# Separable half: [h = batch norm of x] -> a = relu(h) -> z = D * a (depthwise) -> y = P z (pointwise)


def depthwise(a: Tensor, weight: Tensor | None, task: Task) -> Tensor:
    """z = D * a; without D, the pixels that the stride reads."""
    if weight is None:
        return a[:, :, task.offset :: task.stride, task.offset :: task.stride]
    padding = task.dilation * (weight.shape[-1] // 2)
    return F.conv2d(a, weight, None, task.stride, padding, task.dilation, groups=a.shape[1])


def depthwise_adjoint(
    z: Tensor, weight: Tensor | None, task: Task, like: Tensor, total: Tensor | None
) -> Tensor:
    """total + D' * z, of the shape of `like`; `total` (None: zero) is overwritten.

    A forward convolution with the flipped kernel: ATen's own backward of a dilated depthwise convolution
    took 1438 us where this took 174 us (3x3, batch 16, 16 channels, 32x32, one CPU core). With a stride and
    no dilation it is ATen's own, which took 110 us where zeros between the pixels took 160 us (3x3, batch
    16, 32 channels, to 32x32); dilated it took 4.9 ms.
    """
    if weight is not None and task.stride > 1 and task.dilation == 1:
        rest = [(size - 1) % task.stride for size in like.shape[2:]]
        z = F.conv_transpose2d(z, weight, None, task.stride, weight.shape[-1] // 2, rest, z.shape[1])
        return z if total is None else total.add_(z)
    if task.stride > 1:
        spread = total
        if weight is not None or total is None:
            spread = torch.zeros_like(like, memory_format=torch.channels_last)
        spread[:, :, task.offset :: task.stride, task.offset :: task.stride] += z
        if weight is None:
            return spread
        z = spread
    if weight is not None:
        padding = task.dilation * (weight.shape[-1] // 2)
        z = F.conv2d(z, weight.flip(2, 3), None, 1, padding, task.dilation, groups=z.shape[1])
    return z if total is None else total.add_(z)


def depthwise_weight_gradient(z: Tensor, planes: Tensor, weight: Tensor, task: Task) -> Tensor:
    """dD: z correlated with a, as a forward convolution too: every channel of every image is a channel, z is
    the kernel, stride and dilation change places. ATen's own backward took 1.2 to 3.0 ms where this took 0.8
    to 1.1 ms (5x5 or dilated, batch 16, 16 channels, 32x32, one CPU core), with up to 4 times its rounding.

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
    if plus is None and z.dtype == torch.float32:
        # By products of matrices benchmarks/step.py took 4.17 s, by this 3.97 (one thread of an AMD EPYC).
        return F.conv2d(z.contiguous(memory_format=torch.channels_last), weight)
    weight = weight.flatten(1).t()
    return image(rows(z) @ weight if plus is None else torch.addmm(rows(plus), rows(z), weight), z)


def pointwise_adjoint(y: Tensor, weight: Tensor) -> Tensor:
    """P' y"""
    return pointwise(y, weight.transpose(0, 1))


def masked(x: Tensor, a: Tensor) -> Tensor:
    """[h > 0] x, with a = relu(h)."""
    return aten.threshold_backward(x, a, 0)


def masked_(x: Tensor, a: Tensor) -> Tensor:
    """The same in place."""
    return aten.threshold_backward.grad_input(x, a, 0, grad_input=x)


def sepconv_forward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """y of every task in the sources' dtype, and their statistics [tasks, 3, K]."""
    inputs = [_rectified(x, norm) for x, norm in zip(sources, normalizers, strict=True)]
    outputs = [
        pointwise(depthwise(inputs[task.source], d, task), p)
        for task, d, p in zip(tasks, depthwise_weights, pointwise_weights, strict=True)
    ]
    return [y.to(sources[0].dtype) for y in outputs], statistics_of(outputs)


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
    found: list[Tensor] = []
    d_gradients: list[Tensor | None] = [None] * len(tasks)
    p_gradients: list[Tensor | None] = [None] * len(tasks)
    for source, (x, norm) in enumerate(zip(sources, normalizers, strict=True)):
        a, total, planes = _rectified(x, norm), None, None
        for index, task in enumerate(tasks):
            if task.source != source:
                continue
            d, p, y = depthwise_weights[index], pointwise_weights[index], wide(adjoints[index])
            z = pointwise_adjoint(y, p)
            if weight_gradients:
                # The depthwise output is computed again rather than kept: keeping it would nearly double
                # what the forward pass saves.
                p_gradients[index] = (rows(y).t() @ rows(depthwise(a, d, task))).view_as(p)
                if d is not None:
                    planes = a.contiguous() if planes is None else planes
                    d_gradients[index] = depthwise_weight_gradient(z, planes, d, task)
            total = depthwise_adjoint(z, d, task, a, total)
        adjoint = masked_(total, a)
        if norm is not None:
            adjoint, _ = norm.adjoint(adjoint, wide(x))
        found.append(adjoint.to(x.dtype))
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
    outputs: list[Tensor | None] = [None] * len(tasks)
    gained: list[Tensor | None] = []
    for source, (x, xd, norm) in enumerate(zip(sources, source_tangents, normalizers, strict=True)):
        a = _rectified(x, norm)
        hd = ad = first = second = None
        if xd is not None:
            hd, t = (wide(xd), None) if norm is None else norm.adjoint(wide(xd), wide(x))
            ad = masked(hd, a)
        for index, task in enumerate(tasks):
            if task.source != source:
                continue
            d, p, y = depthwise_weights[index], pointwise_weights[index], wide(adjoints[index])
            dd, pd = depthwise_tangents[index], pointwise_tangents[index]
            z, zd, yd = pointwise_adjoint(y, p), None, None
            if ad is not None:
                zd = depthwise(ad, d, task)
            if dd is not None:
                term = depthwise(a, dd, task)
                zd = term if zd is None else zd.add_(term)
                second = depthwise_adjoint(z, dd, task, a, second)
            if zd is not None:
                yd = pointwise(zd, p)
            if pd is not None:
                yd = pointwise(depthwise(a, d, task), pd, yd)
                second = depthwise_adjoint(pointwise_adjoint(y, pd), d, task, a, second)
            if norm is not None and hd is not None:
                first = depthwise_adjoint(z, d, task, a, first)
            outputs[index] = None if yd is None else yd.to(x.dtype)
        if second is not None:
            second = masked_(second, a)
            if norm is not None:
                second, _ = norm.adjoint(second, wide(x))
        if first is not None:
            y, m = wide(x), x.numel() / x.shape[1]
            g = masked_(first, a)
            adjoint, s = norm.adjoint(g, y)
            term = second_adjoint(y, norm, s.new_ones(()), adjoint, s / m, hd, t / m, channel_dot(g, hd) / m)
            if term is not None:
                second = term if second is None else second.add_(term)
        gained.append(None if second is None else second.to(x.dtype))
    return outputs, gained


def _rectified(x: Tensor, norm: Normalizer | None) -> Tensor:
    """a = relu(h)"""
    return wide(x).relu() if norm is None else norm.apply(wide(x)).relu_()


# Pools: 3x3, padding 1, over the pixels that are there


def pool_forward(x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum and average in x's dtype, the maximum's position, and the statistics of both [2, 3, C].

    Of equal values the first in row-major order is the maximum.
    """
    maximum, position = F.max_pool2d(wide(x), 3, stride, 1, return_indices=True)
    average = F.avg_pool2d(wide(x), 3, stride, 1, count_include_pad=False)
    statistics = statistics_of([maximum, average])
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


# Share


def add(terms: Sequence[Tensor]) -> Tensor:
    """The sum of two or more tensors, in their dtype."""
    total = wide(terms[0]) + wide(terms[1])
    for term in terms[2:]:
        total.add_(term)
    return total.to(terms[0].dtype)


# Mix: o = sum over k of p_k h_k, h_k the batch norm of y_k, or y_k itself


def mix_forward(candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor) -> Tensor:
    """o in the candidates' dtype; p [candidates]."""
    scales, total = list(p), p.new_zeros(1, 1, 1, 1)
    normalized = [k for k, norm in enumerate(normalizers) if norm is not None]
    if normalized:
        chosen = torch.stack([scales[k] for k in normalized])
        factors = chosen[:, None] * torch.stack([normalizers[k].r for k in normalized])
        means = torch.stack([normalizers[k].mean for k in normalized])
        total = per_channel(-(factors * means).sum(0))
        for k, factor in zip(normalized, factors, strict=True):
            scales[k] = per_channel(factor)
    total = torch.addcmul(total, wide(candidates[0]), scales[0])
    for y, scale in zip(candidates[1:], scales[1:], strict=True):
        total.addcmul_(wide(y), scale)
    return total.to(candidates[0].dtype)


def mix_backward(
    candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor, g: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of every candidate, p_k B_k(g), and the sums of g h_k: [candidates, C]."""
    g = wide(g)
    weights = p[:, None].repeat(1, g.shape[1])
    adjoints, sums = [], []
    for y, w, row, norm in zip(candidates, p, weights, normalizers, strict=True):
        if norm is None:
            adjoint, total = g * w, channel_dot(g, wide(y))
        else:
            adjoint, total = norm.adjoint(g, wide(y), row)
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
    total, gained, p_gained = None, [], []
    for y, w, norm, adjoint, s, yd in zip(
        candidates, p, normalizers, adjoints, sums / m, tangents, strict=True
    ):
        second = None
        p_gained.append(torch.zeros_like(s))
        if yd is not None:
            y, hd = wide(y), wide(yd)
            if norm is not None:
                hd, t = norm.adjoint(hd, y)
            total = hd * w if total is None else total.addcmul_(hd, w)
            p_gained[-1] = u = channel_dot(g, hd)
            if norm is not None:
                second = second_adjoint(y, norm, w, wide(adjoint), s, hd, t / m, u / m)
        gained.append(None if second is None else second.to(adjoint.dtype))
    total = torch.zeros_like(g) if total is None else total
    return total.to(candidates[0].dtype), gained, torch.stack(p_gained).sum(1)
