"""The two pools of a state, computed together."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.backends import backend


def pool(x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """3x3 max pool and average pool (padding 1, over the pixels that are there) with their statistics.

    Twice differentiable: both are linear once the positions of the maxima are held. Of equal values the
    first in row-major order is the maximum.

    Args:
        x: [N, C, H, W], float64, float32, bfloat16 or float16, in any memory layout.
        stride: 1 or 2.

    Returns:
        maximum and average, [N, C, H / stride, W / stride] (rounded up), channels-last, in x's dtype; and of
        each the mean, biased variance and 1 / sqrt(variance + 1e-5), [2, 3, C], not differentiable.

    Raises:
        ValueError: a single value a channel, which has no variance.
    """
    return _Pool.apply(x.contiguous(memory_format=torch.channels_last), stride)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        maximum, average, position, statistics = backend(x).pool_forward(x, stride)
        ctx.stride = stride
        ctx.set_materialize_grads(False)  # else: zeros for the statistics, one launch a call
        ctx.save_for_backward(x, position)
        ctx.mark_non_differentiable(statistics)
        return maximum, average, statistics

    @staticmethod
    def backward(
        ctx: FunctionCtx, maximum: Tensor | None, average: Tensor | None, _: None
    ) -> tuple[Tensor, None]:
        x, position = ctx.saved_tensors
        maximum, average = (x.new_zeros(position.shape) if g is None else g for g in (maximum, average))
        # The backward needs the shape of x and not its values: it is linear, and x has no part in its graph.
        return _PoolBackward.apply(x.detach(), position, ctx.stride, maximum, average), None


class _PoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, position: Tensor, stride: int, maximum: Tensor, average: Tensor
    ) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(position)
        return backend(x).pool_backward(x, position, stride, maximum, average)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, tangent: Tensor) -> tuple[Tensor | None, ...]:
        (position,) = ctx.saved_tensors
        return None, None, None, *backend(tangent).pool_tangent(tangent, position, ctx.stride)
