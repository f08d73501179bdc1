"""Tensors that several mixes read, without parameters of their own: the pools of a state and its skip."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.backends import backend
from darts_fast.kernels.first_derivative import refuse_second_derivative
from darts_fast.kernels.handover import Handover, Last
from darts_fast.kernels.torch_backend import Normalizer


def spread(
    tensors: Sequence[Tensor],
    statistics: Sequence[Tensor | None],
    weights: Tensor,
    places: Sequence[Sequence[int]],
) -> list[tuple[Tensor, ...]]:
    """The tensors y_c once for each reader j, all of which are mixes that name them in their `spread`.

    A mix weighs a candidate's adjoint by p and takes it through its batch norm; for a candidate from here it
    gives the node's adjoint G_j as it is, and this takes B_c(sum over j of p_jc G_j) once for all readers:
    batch norm is linear in the adjoint, and its statistics are the same on every edge. Only where
    `backends.second_backward_in_one` says so.

    Args:
        tensors: y_c, [N, C, H, W] each, channels-last.
        statistics: for each, what the mixes normalise it by, [3, C], its own in this batch; or None.
        weights: holds p_jc, at `weights.flatten()[places[j][c]]`. It has its gradient from the mixes.
    """
    handed = _Spread.apply(
        tuple(statistics), weights.detach(), tuple(i for row in places for i in row), *tensors
    )
    n = len(tensors)
    return [handed[j * n : (j + 1) * n] for j in range(len(places))]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        statistics: tuple[Tensor | None, ...],
        weights: Tensor,
        places: tuple[int, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.places, ctx.handover = places, Handover()
        ctx.set_materialize_grads(False)
        token = weights.new_empty(0)
        ctx.save_for_backward(*statistics, weights, token, *tensors)
        return *(t.view_as(t) for _ in range(len(places) // len(tensors)) for t in tensors), token

    @staticmethod
    def backward(ctx: FunctionCtx, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.saved_tensors) // 2 - 1
        statistics, (weights, token, *tensors) = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        left = ctx.handover.take()
        adjoints = [
            torch.zeros_like(tensors[i % n]) if g is None else g.contiguous(memory_format=torch.channels_last)
            for i, g in enumerate(adjoints[:-1])
        ]
        if not left:
            found = _SpreadBackward.apply(
                statistics, weights, ctx.places, ctx.handover, token, *tensors, *adjoints
            )
            return None, None, None, *found

        def second() -> tuple[Tensor, ...]:
            norms = _normalizers(statistics)
            return tuple(
                backend(tensors[0]).spread_second(tensors, norms, weights, ctx.places, adjoints, *left[0])
            )

        if len(left) > 1:
            refuse_second_derivative("two of its backward passes at once")
        return None, None, None, *Last.apply(second, *tensors, *adjoints)


class _SpreadBackward(torch.autograd.Function):
    """The first backward sweep. Its own backward, the tangent sweep, hands the tangents on."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        statistics: tuple[Tensor | None, ...],
        weights: Tensor,
        places: tuple[int, ...],
        handover: Handover,
        token: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        n = len(statistics)
        ctx.handover, ctx.readers = handover, len(places) // n
        ctx.set_materialize_grads(False)
        found, *kept = backend(token).spread_backward(
            tensors[:n], _normalizers(statistics), weights, places, tensors[n:]
        )
        ctx.save_for_backward(*kept)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.handover.leave((*ctx.saved_tensors, tangents))
        token = ctx.saved_tensors[0].new_empty(0)
        return None, None, None, None, token, *[None] * len(tangents), *(tangents * ctx.readers)


def _normalizers(statistics: Sequence[Tensor | None]) -> list[Normalizer | None]:
    return [None if s is None else Normalizer(*s.unbind(), True) for s in statistics]
