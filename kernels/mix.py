"""The mix: candidates, batch-normalised on load, weighed and summed into a node."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.backends import backend, second_backward_in_one
from darts_fast.kernels.concatenate import Place
from darts_fast.kernels.first_derivative import refuse_second_derivative
from darts_fast.kernels.handover import Handover, Last, Link
from darts_fast.kernels.torch_backend import Normalizer


def mix(
    candidates: Sequence[Tensor],
    statistics: Sequence[Tensor | None],
    weights: Tensor,
    batch_statistics: bool = True,
    links: Sequence[Link | None] = (),
    place: Place | None = None,
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
        links: by which `Link` each candidate comes from `sepconv` or `spread`, which are then given o's
            adjoint as it is; None: it is any tensor. (): no candidate has one.
        place: where o is to be written for `concatenate`, too, or alone. Only where
            `backends.second_backward_in_one` says so.

    Returns:
        o [N, C, H, W], channels-last, in the candidates' dtype; with a `place` that nothing else is to read,
        a slice of a tensor that is.

    Raises:
        RuntimeError: when a gradient of p is differentiated again.
    """
    candidates = [y.contiguous(memory_format=torch.channels_last) for y in candidates]
    return _Mix.apply(tuple(statistics), batch_statistics, tuple(links), place, weights, *candidates)[0]


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        statistics: tuple[Tensor | None, ...],
        batch: bool,
        links: tuple[Link | None, ...],
        place: Place | None,
        weights: Tensor,
        *candidates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.norms, ctx.links, ctx.handover = _normalizers(statistics, batch), links, Handover()
        ctx.place = place
        held = weights.detach()
        for k, (link, norm) in enumerate(zip(links, ctx.norms, strict=bool(links))):
            if link is not None:
                link.weights, link.index, link.norm = held, k, norm
        ctx.set_materialize_grads(False)
        token = weights.new_empty(0)
        ctx.save_for_backward(weights, *candidates, token)
        outputs = [place.outputs(candidates[0])] if place else []
        return backend(candidates[0]).mix_forward(candidates, ctx.norms, weights, *outputs), token

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, *candidates, token = ctx.saved_tensors
        g = torch.zeros_like(candidates[0]) if g is None else backend(g).in_rows(g)
        weights_wanted, left = ctx.needs_input_grad[4], ctx.handover.take()
        if not left:
            found = _MixBackward.apply(
                ctx.norms,
                ctx.links,
                ctx.place,
                weights_wanted,
                ctx.handover,
                token,
                weights,
                g,
                *candidates,
            )
            return None, None, None, None, *found

        def second() -> tuple[Tensor | None, ...]:
            adjoints, gained = backend(g).mix_second(
                candidates, ctx.norms, weights, g, left[0], *_given(ctx.links)
            )
            return gained if weights_wanted else None, *adjoints

        if len(left) > 1:
            refuse_second_derivative("two of its backward passes at once")
        return None, None, None, None, *Last.apply(second, g, weights, *candidates)


class _MixBackward(torch.autograd.Function):
    """The first backward sweep. Its own backward is the tangent forward sweep."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        norms: list[Normalizer | None],
        links: tuple[Link | None, ...],
        place: Place | None,
        weights_wanted: bool,
        handover: Handover,
        token: Tensor,
        weights: Tensor,
        g: Tensor,
        *candidates: Tensor,
    ) -> tuple[Tensor | None, ...]:
        adjoints, sums, *gained = backend(g).mix_backward(candidates, norms, weights, g, *_given(links))
        ctx.norms, ctx.links, ctx.handover, ctx.place = norms, links, handover, place
        ctx.set_materialize_grads(False)
        kept = [] if second_backward_in_one(g) else adjoints
        ctx.save_for_backward(*candidates, weights, g, sums, *kept)
        if weights_wanted and not gained:
            gained = [sums.sum(1).to(weights.dtype)]
        return gained[0] if weights_wanted else None, *adjoints

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, weights_tangent: Tensor | None, *tangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if weights_tangent is not None:
            refuse_second_derivative("the weights of a mix")
        norms, saved = ctx.norms, ctx.saved_tensors
        n = len(norms)
        candidates, (weights, g, sums, *adjoints) = saved[:n], saved[n:]
        if second_backward_in_one(g):
            outputs = ctx.place.outputs(candidates[0]) if ctx.place else ()
            output, left = backend(g).mix_tangent_forward(
                candidates, norms, weights, g, sums, tangents, ctx.links, outputs
            )
            ctx.handover.leave(left)
            return *[None] * 5, weights.new_empty(0), None, output, *[None] * n
        output, gained, weights_gained = backend(g).mix_tangent(
            candidates, norms, weights, g, adjoints, sums, tangents
        )
        return *[None] * 6, weights_gained, output, *gained


def _given(links: tuple[Link | None, ...]) -> list[tuple[Link | None, ...]]:
    """The argument of the backends that know of links."""
    return [links] if any(links) else []


def _normalizers(statistics: Sequence[Tensor | None], batch: bool) -> list[Normalizer | None]:
    return [None if s is None else Normalizer(s, batch) for s in statistics]
