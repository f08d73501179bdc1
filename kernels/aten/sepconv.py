"""Separable halves, 1x1 convolutions and the pairs of a factorized reduce.

A task computes [h = batch norm of x] -> a = relu(h) -> z = D * a (depthwise) -> y = P z (pointwise).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast.kernels.aten.batch_norm import (
    aten,
    evaluate,
    first_terms,
    normalise,
    normalise_tangent,
    second_terms,
    statistics_of,
    sums_with,
    write_tangent_sums,
)
from darts_fast.kernels.aten.launch import as_launch
from darts_fast.kernels.types import (
    Reader,
    SecondReader,
    Source,
    Task,
    Weights,
    of_tasks,
    readers_of_tasks,
)


@as_launch
def sepconv_forward(
    sources: Sequence[Source], tasks: Sequence[Task], *, y: Tensor, statistics: Tensor | None
) -> None:
    inputs = [rectify(source) for source in sources]
    outputs = of_tasks(y, len(tasks))
    for index, task in enumerate(tasks):
        d, p = task.weights
        result = pointwise(depthwise(inputs[task.source], d, task), p)
        outputs[index].copy_(result)
        if statistics is not None:
            of_tasks(statistics, len(tasks))[index].copy_(statistics_of(result))


@as_launch
def sepconv_backward(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    readers: Sequence[Reader],
    terms: Sequence[Sequence[Tensor]],
    *,
    adjoint: Tensor,
    sums: Tensor | None,
    gradients: Tensor | None,
) -> None:
    readers = readers_of_tasks(readers, len(tasks))
    for number, source in enumerate(sources):
        a, total = rectify(source), None
        planes = a.contiguous() if gradients is not None else a
        for index, task in enumerate(tasks):
            if task.source != number:
                continue
            y = evaluate(readers[index].y, [first_terms(readers[index])])
            d, p = task.weights
            z = pointwise_adjoint(y, p)
            if gradients is not None:
                # The depthwise output is computed again rather than kept: keeping it would nearly double
                # what the forward pass saves.
                row = gradients[index]
                row[: p.numel()].view(p.shape[:2]).copy_(rows(y).t() @ rows(depthwise(a, d, task)))
                if d is not None:
                    gradient = depthwise_weight_gradient(z, planes, d, task)
                    row[p.numel() : p.numel() + d.numel()].view_as(d).copy_(gradient)
            total = depthwise_adjoint(z, d, task, a, total)
        _write_adjoint(total, a, source, number, terms[number], adjoint, sums)


@as_launch
def sepconv_tangent(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    source_tangents: Sequence[Tensor],
    source_sums: Tensor | None,
    weight_tangents: Sequence[Weights],
    readers: Sequence[Reader],
    *,
    y: Tensor,
    sums: Sequence[Tensor],
) -> None:
    outputs = of_tasks(y, len(tasks))
    for number, (source, xd) in enumerate(zip(sources, source_tangents, strict=True)):
        a = rectify(source)
        ad = masked(normalise_tangent(xd, source, None if source_sums is None else source_sums[:, number]), a)
        for index, task in enumerate(tasks):
            if task.source != number:
                continue
            (d, p), (dd, pd) = task.weights, weight_tangents[index]
            zd = depthwise(ad, d, task)
            if d is not None:
                zd.add_(depthwise(a, dd, task))
            outputs[index].copy_(pointwise(depthwise(a, d, task), pd, pointwise(zd, p)))
    for yd, reader, of_reader in zip(y, readers, sums, strict=True):
        write_tangent_sums(yd, reader, of_reader)


@as_launch
def sepconv_second(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    weight_tangents: Sequence[Weights],
    readers: Sequence[SecondReader],
    terms: Sequence[Sequence[Tensor]],
    *,
    adjoint: Tensor,
    sums: Tensor | None,
) -> None:
    readers = readers_of_tasks(readers, len(tasks))
    for number, source in enumerate(sources):
        a, total = rectify(source), None
        for index, task in enumerate(tasks):
            if task.source != number:
                continue
            reader = readers[index]
            y = evaluate(reader.first.y, [first_terms(reader.first)])
            yd = evaluate(reader.first.y, [second_terms(reader)])
            (d, p), (dd, pd) = task.weights, weight_tangents[index]
            zd = pointwise(yd, p.transpose(0, 1), pointwise_adjoint(y, pd))
            total = depthwise_adjoint(zd, d, task, a, total)
            if d is not None:
                total = depthwise_adjoint(pointwise_adjoint(y, p), dd, task, a, total)
        _write_adjoint(total, a, source, number, terms[number], adjoint, sums)


def _write_adjoint(
    total: Tensor | None,
    a: Tensor,
    source: Source,
    number: int,
    terms: Sequence[Tensor],
    adjoint: Tensor,
    sums: Tensor | None,
) -> None:
    """Writes [h > 0] total + terms for the source of this number, and its sums; `total` is overwritten."""
    assert total is not None  # every source is read by a task
    aten.threshold_backward.grad_input(total, a, 0, grad_input=total)
    for term in terms:
        total.add_(term)
    adjoint[number].copy_(total)
    if sums is not None:
        sums[:, number] = sums_with(total, source)


def rectify(source: Source) -> Tensor:
    """Returns a = relu(h)."""
    h = normalise(source)
    return h.relu() if source.statistics is None else h.relu_()


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C]; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image(x: Tensor, like: Tensor) -> Tensor:
    """[N * H * W, C] -> [N, C, H, W] with N, H, W of `like`."""
    n, _, height, width = like.shape
    return x.view(n, height, width, -1).permute(0, 3, 1, 2)


def depthwise(a: Tensor, weight: Tensor | None, task: Task) -> Tensor:
    """Returns z = D * a, or without D the pixels that the stride reads."""
    if weight is None:
        return a[:, :, task.offset :: task.stride, task.offset :: task.stride]
    padding = task.dilation * (weight.shape[-1] // 2)
    return F.conv2d(a, weight, None, task.stride, padding, task.dilation, groups=a.shape[1])


def depthwise_adjoint(
    z: Tensor, weight: Tensor | None, task: Task, like: Tensor, total: Tensor | None
) -> Tensor:
    """Returns total + D' * z, of the shape of `like`; `total` (None: zero) is overwritten.

    It is a forward convolution with the flipped kernel: ATen's own backward of a dilated depthwise
    convolution took 1438 us where this took 174 us (3x3, batch 16, 16 channels, 32x32, one CPU core). With a
    stride and no dilation it is ATen's own adjoint, which took 110 us where zeros between the pixels took
    160 us (3x3, batch 16, 32 channels, to 32x32); dilated it took 4.9 ms.
    """
    if weight is not None and task.stride > 1 and task.dilation == 1:
        rest = [(size - 1) % task.stride for size in like.shape[2:]]
        z = F.conv_transpose2d(z, weight, None, task.stride, weight.shape[-1] // 2, rest, z.shape[1])
        return z if total is None else total.add_(z)
    if task.stride > 1:
        if weight is None and total is not None:
            spaced = total
        else:
            spaced = torch.zeros_like(like, memory_format=torch.channels_last)
        spaced[:, :, task.offset :: task.stride, task.offset :: task.stride] += z
        if weight is None:
            return spaced
        z = spaced
    if weight is not None:
        padding = task.dilation * (weight.shape[-1] // 2)
        z = F.conv2d(z, weight.flip(2, 3), None, 1, padding, task.dilation, groups=z.shape[1])
    return z if total is None else total.add_(z)


def depthwise_weight_gradient(z: Tensor, planes: Tensor, weight: Tensor, task: Task) -> Tensor:
    """Returns dD, z correlated with a, by a forward convolution: every channel of every image is a channel,
    z is the kernel, stride and dilation change places. ATen's own backward took 1.2 to 3.0 ms where this took
    0.8 to 1.1 ms (5x5 or dilated, batch 16, 16 channels, 32x32, one CPU core), with up to 4 times its
    rounding.

    Args:
        planes: a, contiguous in [N, C, H, W].
    """
    n, c, height, width = planes.shape
    correlation = F.conv2d(
        planes.view(1, n * c, height, width),
        z.reshape(n * c, 1, *z.shape[2:]),
        stride=task.dilation,
        padding=task.dilation * (weight.shape[-1] // 2),
        dilation=task.stride,
        groups=n * c,
    )
    correlation = correlation.view(n, *weight.shape[:2], *correlation.shape[2:])
    return correlation[..., : weight.shape[2], : weight.shape[3]].sum(0)


def pointwise(z: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """Returns P z, plus another tensor if there is one; P is [K, C, 1, 1]."""
    if plus is None and z.dtype == torch.float32:
        # By products of matrices benchmarks/step.py took 4.17 s, by this 3.97 (one thread of an AMD EPYC).
        return F.conv2d(z.contiguous(memory_format=torch.channels_last), weight)
    weight = weight.flatten(1).t()
    return image(rows(z) @ weight if plus is None else torch.addmm(rows(plus), rows(z), weight), z)


def pointwise_adjoint(y: Tensor, weight: Tensor) -> Tensor:
    """Returns P' y."""
    return pointwise(y, weight.transpose(0, 1))


def masked(x: Tensor, a: Tensor) -> Tensor:
    """Returns [h > 0] x, with a = relu(h)."""
    return aten.threshold_backward(x, a, 0)
