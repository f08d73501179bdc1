"""Batch norm with affine parameters: for networks that are differentiated once, and for the stem."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.first_derivative import refuse_second_derivative, weights_wanted
from darts_fast.kernels.torch_backend import EPSILON, aten, per_channel


def normalize(y: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight h + bias, h the batch norm of y: `nn.BatchNorm2d` in training whose statistics are known.

    ATen's own passes, on every backend; what is saved is the one that finds the statistics. Differentiable
    once, with respect to y, weight and bias.

    Args:
        y: [N, C, H, W], float64 or float32, channels-last.
        statistics: [3, C], those of y: mean, biased variance and 1 / sqrt(variance + 1e-5).
        weight, bias: [C], of y's dtype.

    Returns:
        [N, C, H, W], channels-last.
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


def normalize_stem(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    momentum: float,
) -> Tensor:
    """weight h + bias, h the batch norm of y: `nn.BatchNorm2d` in training, with running statistics or
    without, for a y on which no alpha has a part.

    ATen's own passes, on every backend. Differentiable once with respect to y, weight and bias, and their
    gradients once more with respect to the result's adjoint: the tangent sweep, by hand. (PyTorch's own
    second derivative of batch norm is 88 launches and 1.1 GB more of a step of the paper's network.)

    Args:
        y: [N, C, H, W], float64 or float32, in any memory layout, which is the result's too.
        weight, bias: [C], of y's dtype; so are running_mean and running_variance, which are updated.

    Raises:
        RuntimeError: when a second derivative with respect to y or weight is asked for.
    """
    return _NormalizeStem.apply(y, weight, bias, running_mean, running_variance, momentum)


class _NormalizeStem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, weight: Tensor, bias: Tensor, *running: Tensor | float
    ) -> Tensor:
        output, mean, r = aten.native_batch_norm(y, weight, bias, *running[:2], True, running[2], EPSILON)
        ctx.save_for_backward(y, weight, mean, r)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, mean, r = ctx.saved_tensors
        return *_NormalizeStemBackward.apply(g, y, weight, mean, r), None, None, None


class _NormalizeStemBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, g: Tensor, y: Tensor, weight: Tensor, mean: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(y, weight, mean, r)
        ctx.set_materialize_grads(False)
        return aten.native_batch_norm_backward(
            g, y, weight, None, None, mean, r, True, EPSILON, [True, True, True]
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, yd: Tensor | None, weight_d: Tensor | None, bias_d: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """od = weight hd + weight_d h + bias_d, with hd = r (yd - mean(yd) - h mean(h yd))."""
        if weights_wanted(ctx.next_functions[1:]):
            refuse_second_derivative("what the stem's batch norm is taken of")
        y, weight, mean, r = ctx.saved_tensors
        m = y.numel() // y.shape[1]
        slope = y.new_zeros(y.shape[1]) if weight_d is None else weight_d  # od = slope h + offset + scale yd
        offset = torch.zeros_like(slope) if bias_d is None else bias_d
        if yd is not None:
            scale = weight * r
            _, t, yd_mean = aten.native_batch_norm_backward(  # of ones as weights: the sums of yd h and yd
                yd, y, None, None, None, mean, r, True, EPSILON, [False, True, True]
            )
            slope, offset = (
                torch.addcmul(slope, scale, t, value=-1 / m),
                torch.addcmul(offset, scale, yd_mean, value=-1 / m),
            )
        od = torch.batch_norm(y, slope, offset, mean, r**-2 - EPSILON, False, 0.0, EPSILON, False)
        return (od if yd is None else od.addcmul_(yd, per_channel(scale))), None, None, None, None
