"""Single calls of the kernels as autograd functions, differentiable once: what derived networks use."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.backends import backend, program
from darts_fast.kernels.plan import Recorder
from darts_fast.kernels.types import (
    Reader,
    Source,
    Task,
    Weights,
    accumulator,
    images,
    refuse_odd_size,
    refuse_single_value,
)


class Geometry(NamedTuple):
    """How a half walks its source, see `types.Task`."""

    stride: int = 1
    dilation: int = 1
    offset: int = 0


def sepconv(
    x: Tensor, tasks: Sequence[Geometry], depthwise: Sequence[Tensor | None], pointwise: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """P_t (D_t * relu(x)) of all tasks, their channels side by side, and the statistics.

    Args:
        x: [N, C, H, W], float64, float32, bfloat16 or float16, in any memory layout.
        depthwise, pointwise: the weights of each, see `types.Weights`, of the type `accumulator(x.dtype)`.

    Returns:
        [N, tasks * K, H / stride, W / stride] (rounded up), channels-last, in x's dtype; and its mean, biased
        variance and 1 / sqrt(variance + 1e-5), [3, tasks * K], not differentiable.

    Raises:
        ValueError: a size does not divide by the stride of a task without depthwise part; or a single value a
            channel, which has no variance.
    """
    height, width = x.shape[2:]
    for task, d in zip(tasks, depthwise, strict=True):
        if d is None:
            refuse_odd_size(height, width, task.stride)
    x = x.contiguous(memory_format=torch.channels_last)
    return _SepConv.apply(x, tuple(tasks), *depthwise, *pointwise)


class _SepConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, tasks: tuple[Geometry, ...], *weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        count = len(tasks)
        weights = [w if w is None else w.contiguous() for w in weights]
        of_tasks = map(Weights, weights[:count], weights[count:])
        ctx.tasks = tuple(Task(0, w, *geometry) for geometry, w in zip(tasks, of_tasks, strict=True))
        n, _, height, width = x.shape
        stride, channels = tasks[0].stride, count * weights[count].shape[0]
        (y,) = found = images(1, (n, channels, -(-height // stride), -(-width // stride)), x.dtype, x.device)
        refuse_single_value(y.numel() // channels)
        statistics = x.new_empty(1, 3, channels, dtype=accumulator(x.dtype))
        _run(x, "sepconv_forward", ((Source(x),), ctx.tasks), y=found, statistics=statistics)
        ctx.save_for_backward(x, y)
        ctx.mark_non_differentiable(statistics)
        return y, statistics[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, adjoint: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        pairs = [task.weights for task in ctx.tasks]
        k, c = pairs[0].pointwise.shape[:2]
        taps = max(1 if w.depthwise is None else w.depthwise[0].numel() for w in pairs)
        gradients = x.new_empty(len(pairs), c * (k + taps), dtype=accumulator(x.dtype))
        found = images(1, x.shape, x.dtype, x.device)
        adjoint = adjoint.contiguous(memory_format=torch.channels_last)
        reader = Reader(y, None, 0, adjoint, None, None)
        reads = (Source(x),), ctx.tasks, (reader,)
        _run(x, "sepconv_backward", reads, adjoint=found, sums=None, gradients=gradients)
        of_depthwise = [
            None if w.depthwise is None else g[k * c :][: w.depthwise.numel()].view(w.depthwise.shape)
            for g, w in zip(gradients, pairs, strict=True)
        ]
        of_pointwise = [g[: k * c].view(w.pointwise.shape) for g, w in zip(gradients, pairs, strict=True)]
        return found[0], None, *of_depthwise, *of_pointwise


def pool(x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """3x3 max pool and average pool (padding 1, over the pixels that are there) with their statistics.

    Of equal values the first in row-major order is the maximum.

    Args:
        x: [N, C, H, W], float64, float32, bfloat16 or float16, in any memory layout.
        stride: 1 or 2.

    Returns:
        maximum and average, [N, C, H / stride, W / stride] (rounded up) each, channels-last, in x's dtype;
        and of each the mean, biased variance and 1 / sqrt(variance + 1e-5), [2, 3, C], not differentiable.

    Raises:
        ValueError: a single value a channel, which has no variance.
    """
    return _Pool.apply(x.contiguous(memory_format=torch.channels_last), stride)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        n, c, height, width = x.shape
        shape = n, c, -(-height // stride), -(-width // stride)
        pools = images(2, shape, x.dtype, x.device)
        refuse_single_value(pools[0].numel() // c)
        position = images(1, shape, torch.uint8, x.device)[0]
        statistics = x.new_empty(2, 3, c, dtype=accumulator(x.dtype))
        _run(x, "pool_forward", (x, stride), pools=pools, position=position, statistics=statistics)
        ctx.stride, ctx.like = stride, (x.shape, x.dtype, x.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(position)
        ctx.mark_non_differentiable(statistics)
        return *pools, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *adjoints: Tensor | None) -> tuple[Tensor, None]:
        (position,), (shape, dtype, device) = ctx.saved_tensors, ctx.like
        pools = images(2, position.shape, dtype, device)
        for pool, adjoint in zip(pools, adjoints[:2], strict=True):
            pool.zero_() if adjoint is None else pool.copy_(adjoint)
        (out,) = images(1, shape, dtype, device)
        _run(out, "pool_backward", (position, ctx.stride, pools, ()), out=out)
        return out, None


def _run(like: Tensor, function: str, reads: tuple, **writes: Tensor | None) -> None:
    recorder = Recorder()
    getattr(recorder, function)(*reads, **writes)
    program(backend(like.device, like.dtype), recorder.calls)()
