"""Halves of separable convolutions: [batch norm] -> ReLU -> depthwise -> pointwise."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from darts_fast.kernels.backends import backend, second_backward_in_one
from darts_fast.kernels.first_derivative import differentiable_once, refuse_second_derivative, weights_wanted
from darts_fast.kernels.handover import Handover, Last, Link
from darts_fast.kernels.torch_backend import Normalizer, Task


def sepconv(
    sources: Sequence[Tensor],
    tasks: Sequence[Task],
    depthwise: Sequence[Tensor | None],
    pointwise: Sequence[Tensor],
    statistics: Sequence[Tensor] | None = None,
    batch_statistics: bool = True,
    links: Sequence[Link | None] = (),
) -> tuple[list[Tensor], Tensor]:
    """y_t = P_t (D_t * relu(h)) for every task t; h is source number `task.source`, or its batch norm.

    Differentiable once with respect to the weights, and their gradients once more with respect to the
    sources: the four sweeps of docs/mathematics.md.

    Args:
        sources: [N, C, H, W] each, float64, float32, bfloat16 or float16, in any memory layout.
        tasks: which source each reads, with what stride and dilation. One source's ReLU is computed once.
        depthwise: [C, 1, k, k] each with k odd, padded to `same`; None: no depthwise convolution, the
            pixels (offset + stride * i, offset + stride * j) are read, and sizes must divide by the stride.
        pointwise: [K, C, 1, 1] each. Weights are float64 for float64 sources, else float32.
        statistics: for each source, [3, C]: mean, biased variance and 1 / sqrt(variance + 1e-5) to normalise
            it by on load; not differentiated, see `batch_statistics`. None: sources are read as they are.
        batch_statistics: that `statistics` are those of the sources themselves, so that the derivative is
            batch norm's in training; else they are constants.
        links: for each task, by which link a mix reads its output, normalised by the statistics returned
            here; None: it is read as any tensor is. (): no task has one. Only where
            `backends.second_backward_in_one` says so.

    Returns:
        y of each task, [N, K, H / stride, W / stride] (rounded up), channels-last, in the sources' dtype;
        and their statistics [tasks, 3, K] as above, not differentiable.

    Raises:
        ValueError: a size does not divide by the stride of a task without depthwise part; or a single
            value a channel, which has no variance.
        RuntimeError: when a second derivative with respect to a weight is asked for.
    """
    for task, d in zip(tasks, depthwise, strict=True):
        height, width = sources[task.source].shape[2:]
        if d is None and (height % task.stride or width % task.stride):
            raise ValueError(f"a {height}x{width} image cannot be halved: its sizes must be even")
    weights = differentiable_once([*depthwise, *pointwise])
    sources = [x.contiguous(memory_format=torch.channels_last) for x in sources]
    given = None if statistics is None else tuple(statistics)
    *outputs, found, _ = _SepConv.apply(
        tuple(tasks), batch_statistics, given, tuple(links), *sources, *weights
    )
    return outputs, found


class Own(NamedTuple):
    """Of an output with a link: what its batch norm is taken of and by, and the sums of the first sweep."""

    y: Tensor
    mean: Tensor
    variance: Tensor
    r: Tensor
    link: Link
    first: Tensor  # [2, candidates, C]: of G, G h


class _SepConv(torch.autograd.Function):
    """Tensors are the sources, then each task's depthwise and each task's pointwise weight."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tasks: tuple[Task, ...],
        batch: bool,
        statistics: tuple[Tensor, ...] | None,
        links: tuple[Link | None, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.tasks, ctx.batch, ctx.handover = tasks, batch, Handover()
        ctx.set_materialize_grads(False)  # else: zeros for the statistics, one launch a call
        token = tensors[0].new_empty(0)
        outputs, found = backend(tensors[0]).sepconv_forward(*_arguments(tasks, batch, statistics, tensors))
        ctx.mark_non_differentiable(found)
        ctx.statistics, ctx.links, ctx.shape = statistics, links, outputs[0].shape
        ctx.found = found if links else None
        ctx.save_for_backward(*tensors, token, *(outputs if links else ()))
        return *outputs, found, token

    @staticmethod
    def backward(ctx: FunctionCtx, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(ctx.tasks)
        saved, outputs = (saved[:-count], saved[-count:]) if ctx.links else (saved, ())
        *tensors, token = saved
        adjoints, left = adjoints[:-2], ctx.handover.take()
        if not left:
            owns = [
                link and Own(y.detach(), *found.unbind(), link, link.first)
                for link, y, found in zip(ctx.links, outputs, ctx.found if ctx.links else (), strict=True)
            ]
            if any(own and y is None for own, y in zip(owns, adjoints, strict=bool(owns))):
                raise RuntimeError("an output with a link has no adjoint: no mix was given it")
            adjoints = [tensors[0].new_zeros(ctx.shape) if y is None else y for y in adjoints]
            found = _SepConvBackward.apply(
                ctx.tasks,
                ctx.batch,
                weights_wanted(ctx.next_functions[len(tensors) - 2 * count :]),
                ctx.handover,
                ctx.statistics,
                owns,
                token,
                *tensors,
                *adjoints,
            )
            return None, None, None, None, *found

        def second() -> tuple[Tensor | None, ...]:
            arguments = _arguments(ctx.tasks, ctx.batch, ctx.statistics, tensors)
            sources = backend(tensors[0]).sepconv_second(*arguments, adjoints, left[0])
            return *sources, *[None] * (2 * len(ctx.tasks))

        if len(left) > 1:
            refuse_second_derivative("two of its backward passes at once")
        return None, None, None, None, *Last.apply(second, *tensors, *adjoints)


class _SepConvBackward(torch.autograd.Function):
    """The first backward sweep. Its own backward is the tangent forward sweep."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tasks: tuple[Task, ...],
        batch: bool,
        weight_gradients: bool,
        handover: Handover,
        statistics: tuple[Tensor, ...] | None,
        owns: list["Own | None"],
        token: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.tasks, ctx.batch, ctx.handover = tasks, batch, handover
        ctx.set_materialize_grads(False)
        ctx.statistics, ctx.owns = statistics, owns
        ctx.save_for_backward(*tensors)
        tensors, adjoints = tensors[: -len(tasks)], tensors[-len(tasks) :]
        sources, d, p = backend(adjoints[0]).sepconv_backward(
            *_arguments(tasks, batch, statistics, tensors),
            adjoints,
            weight_gradients,
            *([owns] if owns else []),
        )
        return *sources, *d, *p

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.tasks)
        tensors = ctx.saved_tensors
        tensors, adjoints = tensors[:-n], tensors[-n:]
        first = 1 + len(tensors) - 2 * n  # after the token and the sources
        if weights_wanted(ctx.next_functions[first:-n]):
            refuse_second_derivative("its weights")
        given = (
            *_arguments(ctx.tasks, ctx.batch, ctx.statistics, tensors),
            adjoints,
            tangents[: -2 * n],
            tangents[-2 * n : -n],
            tangents[-n:],
        )
        if second_backward_in_one(adjoints[0]):
            outputs, left = backend(adjoints[0]).sepconv_tangent_forward(*given, ctx.owns)
            ctx.handover.leave(left)
            token, sources = adjoints[0].new_empty(0), [None] * (len(tensors) - 2 * n)
        else:
            outputs, sources = backend(adjoints[0]).sepconv_tangent(*given)
            token = None
        return None, None, None, None, None, None, token, *sources, *[None] * (2 * n), *outputs


def _arguments(
    tasks: tuple[Task, ...],
    batch: bool,
    statistics: Sequence[Tensor] | None,
    tensors: Sequence[Tensor | None],
) -> tuple:
    """What every function of a backend begins with: sources, normalizers, tasks, both kinds of weights."""
    n = len(tasks)
    sources = tensors[: -2 * n]
    normalizers = (
        [None] * len(sources) if statistics is None else [Normalizer(*s.unbind(), batch) for s in statistics]
    )
    return sources, normalizers, tasks, tensors[-2 * n : -n], tensors[-n:]
