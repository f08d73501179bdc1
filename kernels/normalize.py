"""Batch norm with affine parameters."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from darts_fast.kernels.first_derivative import refuse_second_derivative, wanted
from darts_fast.kernels.types import EPSILON

aten = torch.ops.aten


def normalize(y: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight h + bias, h the batch norm of y: `nn.BatchNorm2d` in training whose statistics are known.

    ATen's own passes, on every backend; what is saved is the one that finds the statistics. Differentiable
    once with respect to y, weight and bias, and the gradients once more with respect to the adjoint that they
    came from: what a Hessian-vector product needs of a layer below which there are weights alone.

    Args:
        y: [N, C, H, W], float64, float32, bfloat16 or float16, in any memory layout.
        statistics: [3, C], those of y: mean, biased variance and 1 / sqrt(variance + 1e-5).
        weight, bias: [C]. They and the statistics are float64 for float64 y, else float32.

    Returns:
        [N, C, H, W], in y's dtype and memory layout.

    Raises:
        RuntimeError: when a second derivative with respect to y or weight is asked for.
    """
    return _Normalize.apply(y, statistics, weight, bias)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(y, statistics, weight)
        mean, variance, _ = statistics.unbind()
        return torch.batch_norm(y, weight, bias, mean, variance, False, 0.0, EPSILON, False)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, statistics, weight = ctx.saved_tensors
        found, *gradients = _NormalizeBackward.apply(y, statistics, weight, g)
        return found, None, *gradients


class _NormalizeBackward(torch.autograd.Function):
    """weight B(g), and the sums of g h and of g per channel; linear in g."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, statistics: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(y, statistics, weight)
        return _batch_norm_backward(y, statistics, weight, g, [True, True, True])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, tangent: Tensor, weight_tangent: Tensor, bias_tangent: Tensor
    ) -> tuple[Tensor | None, ...]:
        """weight B(tangent) + weight_tangent h + bias_tangent: B is its own transpose."""
        if wanted(ctx.next_functions[:-1]):
            refuse_second_derivative("the input or the weight of an affine batch norm")
        y, statistics, weight = ctx.saved_tensors
        mean, variance, _ = statistics.unbind()
        found, _, _ = _batch_norm_backward(y, statistics, weight, tangent, [True, False, False])
        h = torch.batch_norm(y, weight_tangent, bias_tangent, mean, variance, False, 0.0, EPSILON, False)
        return None, None, None, found.add_(h)


def _batch_norm_backward(
    y: Tensor, statistics: Tensor, weight: Tensor, g: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance, r = statistics.unbind()
    if y.is_contiguous(memory_format=torch.channels_last):  # else ATen mixes layouts slowly
        g = g.contiguous(memory_format=torch.channels_last)
    return aten.native_batch_norm_backward(g, y, weight, mean, variance, mean, r, True, EPSILON, wanted)
