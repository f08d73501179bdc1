"""Batch norm with affine parameters, for networks that are differentiated once."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.torch_backend import EPSILON, aten


def normalize(y: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight h + bias, h the batch norm of y: `nn.BatchNorm2d` in training whose statistics are known.

    ATen's own passes, on every backend; what is saved is the one that finds the statistics. Differentiable
    once, with respect to y, weight and bias.

    Args:
        y: [N, C, H, W], float64, float32, bfloat16 or float16, channels-last.
        statistics: [3, C], those of y: mean, biased variance and 1 / sqrt(variance + 1e-5).
        weight, bias: [C]. They and the statistics are float64 for float64 y, else float32.

    Returns:
        [N, C, H, W], channels-last, in y's dtype.
    """
    return _Normalize.apply(y, statistics, weight, bias)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(y, statistics, weight)
        mean, variance, _ = statistics.unbind()
        return torch.batch_norm(y, weight, bias, mean, variance, False, 0.0, EPSILON, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        y, statistics, weight = ctx.saved_tensors
        mean, variance, r = statistics.unbind()
        g = g.contiguous(memory_format=torch.channels_last)
        found, weight_gradient, bias_gradient = aten.native_batch_norm_backward(
            g, y, weight, mean, variance, mean, r, True, EPSILON, [True, True, True]
        )
        return found, None, weight_gradient, bias_gradient
