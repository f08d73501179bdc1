"""Tensors that several mixes read, without parameters of their own: the pools of a state and its skip."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.backends import backend
from darts_fast.kernels.first_derivative import refuse_second_derivative
from darts_fast.kernels.handover import Handover, Last, Link, Reader
from darts_fast.kernels.torch_backend import Normalizer

Rows = Sequence[Sequence[Link]]


def spread(
    tensors: Sequence[Tensor], statistics: Sequence[Tensor | None], links: Rows
) -> list[tuple[Tensor, ...]]:
    """The tensors y_c once for each reader j, all of which are mixes that name them in their `links`.

    A mix weighs a candidate's adjoint by p and takes it through its batch norm; for a candidate from here it
    gives the node's adjoint G_j as it is, and this takes B_c(sum over j of p_jc G_j) once for all readers:
    batch norm is linear in the adjoint, and its statistics are the same on every edge. The sums that B_c
    needs are those of the mixes. Only where `backends.second_backward_in_one` says so.

    Args:
        tensors: y_c, [N, C, H, W] each, channels-last.
        statistics: for each, what the mixes normalise it by, [3, C], its own in this batch; or None.
        links: for each reader, one for each tensor.

    Raises:
        RuntimeError: when the tensors are differentiated and not every reader has an adjoint.
    """
    handed = _Spread.apply(tuple(statistics), links, *tensors)
    n = len(tensors)
    return [handed[j * n : (j + 1) * n] for j in range(len(links))]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, statistics: tuple[Tensor | None, ...], links: Rows, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.links, ctx.handover = links, Handover()
        ctx.set_materialize_grads(False)
        token = tensors[0].new_empty(0)
        ctx.save_for_backward(*statistics, token, *tensors)
        return *(t.view_as(t) for _ in links for t in tensors), token

    @staticmethod
    def backward(ctx: FunctionCtx, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        n, adjoints = len(ctx.saved_tensors) // 2, adjoints[:-1]
        statistics, (token, *tensors) = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        if any(g is None for g in adjoints):
            raise RuntimeError("a tensor that is spread has no adjoint: no mix was given it")
        left = ctx.handover.take()
        if not left:
            found = _SpreadBackward.apply(statistics, ctx.links, ctx.handover, token, *tensors, *adjoints)
            return None, None, *found

        def second() -> tuple[Tensor, ...]:
            seconds = _readers(ctx.links, adjoints, [row[0].sums for row in ctx.links])
            firsts, tangents = left[0]
            tangent_sums = [row[0].tangent_sums for row in ctx.links]
            norms = _normalizers(statistics)
            return tuple(
                backend(token).spread_second(tensors, norms, seconds, firsts, tangents, tangent_sums)
            )

        if len(left) > 1:
            refuse_second_derivative("two of its backward passes at once")
        return None, None, *Last.apply(second, *tensors, *adjoints)


class _SpreadBackward(torch.autograd.Function):
    """The first backward sweep. Its own backward, the tangent sweep, hands the tangents on."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        statistics: tuple[Tensor | None, ...],
        links: Rows,
        handover: Handover,
        token: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        n = len(statistics)
        tensors, adjoints = tensors[:n], tensors[n:]
        ctx.links, ctx.handover = links, handover
        ctx.sums = [row[0].sums for row in links]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*adjoints)
        readers = _readers(links, adjoints, ctx.sums)
        return tuple(backend(token).spread_backward(tensors, _normalizers(statistics), readers))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        firsts = _readers(ctx.links, ctx.saved_tensors, ctx.sums)
        ctx.handover.leave((firsts, tangents))
        token = ctx.saved_tensors[0].new_empty(0)
        return None, None, None, token, *[None] * len(tangents), *(tangents * len(ctx.links))


def _readers(links: Rows, adjoints: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Reader]:
    """`adjoints` are by reader, then by tensor: a mix gives the same to all."""
    n = len(adjoints) // len(links)
    given = [g.contiguous(memory_format=torch.channels_last) for g in adjoints[::n]]
    return [
        Reader(g, s, row[0].weights, tuple(link.index for link in row))
        for g, s, row in zip(given, sums, links, strict=True)
    ]


def _normalizers(statistics: Sequence[Tensor | None]) -> list[Normalizer | None]:
    return [None if s is None else Normalizer(*s.unbind(), True) for s in statistics]
