"""A state for all that read it: its pools and itself for mixes, and itself for others."""

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
    x: Tensor, stride: int, links: Rows, others: int
) -> tuple[list[tuple[Tensor, ...]], Tensor, tuple[Tensor, ...]]:
    """Both pools of x, see `pool`, and with stride 1 x itself, once for each of several mixes that name them
    in their `links`; and x for `others`.

    A mix weighs a candidate's adjoint by p and takes it through its batch norm; for a candidate from here it
    gives the node's adjoint G_j as it is, and this takes B_c(sum over j of p_jc G_j) once for all: batch norm
    is linear in the adjoint, and its statistics are the same on every edge. The sums that it needs are those
    of the mixes. The adjoint of x is summed in the pass that scatters the pools'. Only where
    `backends.second_backward_in_one` says so.

    Args:
        x: [N, C, H, W], float64, float32, bfloat16 or float16, in any memory layout.
        stride: 1 or 2, of the pools.
        links: for each mix j, one for each tensor c that it reads: maximum, average, with stride 1 also x.

    Returns:
        the tensors of each mix; the statistics of the pools [2, 3, C], by which the mixes normalise them; and
        x for the others.

    Raises:
        RuntimeError: when x is differentiated and not every mix has an adjoint.
        ValueError: a single value a channel, which has no variance.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    *handed, statistics, _ = _Spread.apply(stride, links, others, x)
    n = 3 if stride == 1 else 2
    end = n * len(links)
    return [tuple(handed[i : i + n]) for i in range(0, end, n)], statistics, tuple(handed[end:])


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, stride: int, links: Rows, others: int, x: Tensor) -> tuple[Tensor, ...]:
        ctx.stride, ctx.links, ctx.handover = stride, links, Handover()
        ctx.set_materialize_grads(False)
        *pools, position, statistics = backend(x).pool_forward(x, stride)
        tensors = [*pools, x] if stride == 1 else pools
        token = x.new_empty(0)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(x, position, token, statistics, *pools)
        handed = [t.view_as(t) for _ in links for t in tensors] + [x.view_as(x) for _ in range(others)]
        return *handed, statistics, token

    @staticmethod
    def backward(ctx: FunctionCtx, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        x, position, token, statistics, *pools = ctx.saved_tensors
        by_mix = len(ctx.links) * len(ctx.links[0])
        given, terms = adjoints[:by_mix], [g for g in adjoints[by_mix:-2] if g is not None]
        if any(g is None for g in given):
            raise RuntimeError("a tensor that is spread has no adjoint: no mix was given it")
        left = ctx.handover.take()
        if not left:
            return (
                None,
                None,
                None,
                _SpreadBackward.apply(
                    ctx.stride,
                    ctx.links,
                    ctx.handover,
                    token,
                    x.detach(),
                    position,
                    statistics,
                    *pools,
                    *given,
                    *terms,
                ),
            )

        def second() -> tuple[Tensor]:
            seconds = _readers(ctx.links, given, [row[0].sums for row in ctx.links])
            firsts, pool_tangents = left[0]
            tensors, norms = _tensors(x, pools, statistics, ctx.stride)
            tangents = [*pool_tangents, None][: len(tensors)]  # x itself has no batch norm, and needs none
            sums = [row[0].tangent_sums for row in ctx.links]
            found = backend(x).spread_second(tensors, norms, seconds, firsts, tangents, sums)
            return (_through_pools(x, position, ctx.stride, found, terms),)

        if len(left) > 1:
            refuse_second_derivative("two of its backward passes at once")
        return None, None, None, *Last.apply(second, x, *adjoints)


class _SpreadBackward(torch.autograd.Function):
    """The first backward sweep. Its own backward is the tangent forward sweep."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        stride: int,
        links: Rows,
        handover: Handover,
        token: Tensor,
        x: Tensor,
        position: Tensor,
        statistics: Tensor,
        maximum: Tensor,
        average: Tensor,
        *adjoints: Tensor,
    ) -> Tensor:
        by_mix = len(links) * len(links[0])
        given, terms = adjoints[:by_mix], adjoints[by_mix:]
        ctx.stride, ctx.links, ctx.handover, ctx.terms = stride, links, handover, len(terms)
        ctx.sums = [row[0].sums for row in links]
        ctx.save_for_backward(position, *given)
        tensors, norms = _tensors(x, [maximum, average], statistics, stride)
        found = backend(x).spread_backward(tensors, norms, _readers(links, given, ctx.sums))
        return _through_pools(x, position, stride, found, terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, tangent: Tensor) -> tuple[Tensor | None, ...]:
        position, *given = ctx.saved_tensors
        pools = backend(tangent).pool_tangent(tangent, position, ctx.stride)
        ctx.handover.leave((_readers(ctx.links, given, ctx.sums), pools))
        tangents = [*pools, tangent] if ctx.stride == 1 else pools
        return (
            *[None] * 3,
            tangent.new_empty(0),
            *[None] * 5,
            *(list(tangents) * len(ctx.links)),
            *[tangent] * ctx.terms,
        )


def _readers(links: Rows, adjoints: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Reader]:
    """`adjoints` are by mix, then by tensor: a mix gives the same to all."""
    given = [backend(g).in_rows(g) for g in adjoints[:: len(links[0])]]
    return [
        Reader(g, s, row[0].weights, tuple(link.index for link in row))
        for g, s, row in zip(given, sums, links, strict=True)
    ]


def _tensors(
    x: Tensor, pools: Sequence[Tensor], statistics: Tensor, stride: int
) -> tuple[list[Tensor], list[Normalizer | None]]:
    """What a mix reads, and what it normalises each by."""
    norms = [Normalizer(of_one, True) for of_one in statistics]
    return ([*pools, x], [*norms, None]) if stride == 1 else ([*pools], norms)


def _through_pools(
    x: Tensor, position: Tensor, stride: int, found: Sequence[Tensor], terms: Sequence[Tensor]
) -> Tensor:
    """The adjoint of x, from those of what a mix reads and from `terms`."""
    maximum, average, *itself = found
    return backend(x).pool_backward(x, position, stride, maximum, average, [*itself, *terms])
