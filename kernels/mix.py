"""The mix: candidates, batch-normalised on load, weighed and summed into a node."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.backends import backend
from darts_fast.kernels.first_derivative import refuse_second_derivative
from darts_fast.kernels.torch_backend import Normalizer


def mix(
    candidates: Sequence[Tensor],
    statistics: Sequence[Tensor | None],
    weights: Tensor,
    batch_statistics: bool = True,
) -> Tensor:
    """o = sum over k of p_k h_k, with h_k = (y_k - mean_k) / sqrt(variance_k + 1e-5), or y_k as it is.

    Equation 2 of the paper summed over a node's edges. With one candidate and p = 1 it is batch norm.
    Differentiable once with respect to p, and twice along the weights that the candidates come from: the
    four sweeps of docs/mathematics.md.

    Args:
        candidates: y_k, [N, C, H, W] each, float64, float32, bfloat16 or float16, in any memory layout.
        statistics: for each, [3, C]: mean, biased variance and 1 / sqrt(variance + 1e-5), not
            differentiated; None: h_k is y_k.
        weights: p [candidates], float64 for float64 candidates, else float32.
        batch_statistics: that the statistics are those of the candidates themselves, so that the derivative
            is batch norm's in training; else they are constants.

    Returns:
        o [N, C, H, W], channels-last, in the candidates' dtype.

    Raises:
        RuntimeError: when a gradient of p is differentiated again.
    """
    candidates = [y.contiguous(memory_format=torch.channels_last) for y in candidates]
    return _Mix.apply(tuple(statistics), batch_statistics, weights, *candidates)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        statistics: tuple[Tensor | None, ...],
        batch: bool,
        weights: Tensor,
        *candidates: Tensor,
    ) -> Tensor:
        ctx.batch = batch
        ctx.save_for_backward(*statistics, weights, *candidates)
        return backend(candidates[0]).mix_forward(candidates, _normalizers(statistics, batch), weights)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.saved_tensors) // 2
        statistics, (weights, *candidates) = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        return None, None, *_MixBackward.apply(statistics, ctx.batch, weights, g, *candidates)


class _MixBackward(torch.autograd.Function):
    """The first backward sweep. Its own backward is the tangent forward sweep."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        statistics: tuple[Tensor | None, ...],
        batch: bool,
        weights: Tensor,
        g: Tensor,
        *candidates: Tensor,
    ) -> tuple[Tensor, ...]:
        adjoints, sums = backend(g).mix_backward(
            candidates,
            _normalizers(statistics, batch),
            weights,
            g.contiguous(memory_format=torch.channels_last),
        )
        ctx.batch = batch
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*statistics, *adjoints, *candidates, weights, g, sums)
        return sums.sum(1).to(weights.dtype), *adjoints

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, weights_tangent: Tensor | None, *tangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if weights_tangent is not None:
            refuse_second_derivative("the weights of a mix")
        n = len(tangents)
        saved = ctx.saved_tensors
        statistics, adjoints, candidates = saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n]
        weights, g, sums = saved[3 * n :]
        output, gained, weights_gained = backend(g).mix_tangent(
            candidates, _normalizers(statistics, ctx.batch), weights, g, adjoints, sums, tangents
        )
        return None, None, weights_gained, output, *gained


def _normalizers(statistics: Sequence[Tensor | None], batch: bool) -> list[Normalizer | None]:
    return [None if s is None else Normalizer(*s.unbind(), batch) for s in statistics]
