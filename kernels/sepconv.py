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
    join: int = 1,
    source_links: Sequence[Link] = (),
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
        links: for each output, by which link a mix, or another call, reads it, normalised by the statistics
            returned here; None: it is read as any tensor is. (): none has one. Only where
            `backends.second_backward_in_one` says so.
        join: this many tasks, neighbours, give one output: their channels side by side.
        source_links: by which links the sources come from another call, which is then given the adjoints of
            their batch norms; where the statistics are theirs. (): the sources are any tensors.

    Returns:
        y of each task, [N, K, H / stride, W / stride] (rounded up), channels-last, in the sources' dtype,
        joined to [N, join * K, ...]; and their statistics [outputs, 3, join * K] as above, not
        differentiable.

    Raises:
        ValueError: a size does not divide by the stride of a task without depthwise part; or a single
            value a channel, which has no variance.
        RuntimeError: when a second derivative with respect to a weight is asked for.
    """
    for task, d in zip(tasks, depthwise, strict=True):
        height, width = sources[task.source].shape[2:]
        if d is None and (height % task.stride or width % task.stride):
            raise ValueError(f"a {height}x{width} image cannot be halved: its sizes must be even")
    weights = differentiable_once([w if w is None else w.contiguous() for w in (*depthwise, *pointwise)])
    sources = [x.contiguous(memory_format=torch.channels_last) for x in sources]
    given = None if statistics is None else tuple(statistics)
    *outputs, found, _ = _SepConv.apply(
        tuple(tasks), batch_statistics, given, tuple(links), join, tuple(source_links), *sources, *weights
    )
    return outputs, found


class Own(NamedTuple):
    """Of a task whose output has a link: what its batch norm is taken of and by, and the sums of the first
    sweep; all of the task's channels alone."""

    y: Tensor
    statistics: Tensor  # [3, C]
    link: Link
    first: Tensor  # [2, candidates, C]: of G, G h
    channels: slice = slice(None)  # of the output, those that are the task's


class _SepConv(torch.autograd.Function):
    """Tensors are the sources, then each task's depthwise and each task's pointwise weight."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tasks: tuple[Task, ...],
        batch: bool,
        statistics: tuple[Tensor, ...] | None,
        links: tuple[Link | None, ...],
        join: int,
        source_links: tuple[Link, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n = len(tensors) - 2 * len(tasks)
        norms = [None] * n if statistics is None else [Normalizer(s, batch) for s in statistics]
        ctx.tasks, ctx.norms, ctx.join, ctx.handover = tasks, norms, join, Handover()
        for i, link in enumerate(source_links):
            link.weights, link.index, link.norm = None, i, norms[i]
        ctx.set_materialize_grads(False)  # else: zeros for the statistics, one launch a call
        token = tensors[0].new_empty(0)
        arguments = _arguments(tasks, norms, tensors)
        if second_backward_in_one(tensors[0]):
            outputs, found = backend(tensors[0]).sepconv_forward(*arguments, join)
        else:
            outputs, found = backend(tensors[0]).sepconv_forward(*arguments)
            outputs = _side_by_side(outputs, join)
            found = found.unflatten(0, (-1, join)).transpose(1, 2).flatten(2)
        ctx.mark_non_differentiable(found)
        ctx.links, ctx.source_links, ctx.shape = links, source_links, outputs[0].shape
        ctx.save_for_backward(*tensors, token, *(outputs if links else ()))
        return *outputs, found, token

    @staticmethod
    def backward(ctx: FunctionCtx, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, count, join = ctx.saved_tensors, len(ctx.tasks), ctx.join
        linked = count // join if ctx.links else 0
        saved, outputs = saved[: len(saved) - linked], saved[len(saved) - linked :]
        *tensors, token = saved
        adjoints, left = adjoints[:-2], ctx.handover.take()
        if not left:
            if any(link and y is None for link, y in zip(ctx.links, adjoints, strict=bool(ctx.links))):
                raise RuntimeError("an output with a link has no adjoint: nothing was given it")
            owns = [
                own
                for link, y in zip(ctx.links, outputs, strict=True)
                for own in owns_of(link, y.detach(), join)
            ]
            adjoints = [tensors[0].new_zeros(ctx.shape) if y is None else y for y in adjoints]
            found = _SepConvBackward.apply(
                ctx.tasks,
                ctx.norms,
                weights_wanted(ctx.next_functions[len(tensors) - 2 * count :]),
                ctx.handover,
                owns,
                join,
                ctx.source_links,
                token,
                *tensors,
                *adjoints,
            )
            return None, None, None, None, None, None, *found

        def second() -> tuple[Tensor | None, ...]:
            arguments = _arguments(ctx.tasks, ctx.norms, tensors)
            sources = backend(tensors[0]).sepconv_second(*arguments, parts(adjoints, join), left[0])
            return *sources, *[None] * (2 * len(ctx.tasks))

        if len(left) > 1:
            refuse_second_derivative("two of its backward passes at once")
        return None, None, None, None, None, None, *Last.apply(second, *tensors, *adjoints)


class _SepConvBackward(torch.autograd.Function):
    """The first backward sweep. Its own backward is the tangent forward sweep."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tasks: tuple[Task, ...],
        norms: list[Normalizer | None],
        weight_gradients: bool,
        handover: Handover,
        owns: list[Own | None],
        join: int,
        source_links: tuple[Link, ...],
        token: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.tasks, ctx.norms, ctx.join, ctx.handover = tasks, norms, join, handover
        ctx.set_materialize_grads(False)
        ctx.owns, ctx.source_links = owns, source_links
        count, given = len(tasks) // join, tensors
        tensors, adjoints = tensors[:-count], tensors[-count:]
        sources, d, p = backend(adjoints[0]).sepconv_backward(
            *_arguments(tasks, norms, tensors),
            parts(adjoints, join),
            weight_gradients,
            *([owns, source_links] if owns else []),
        )
        ctx.save_for_backward(*given, *(sources if source_links else ()))
        return *sources, *d, *p

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        n, join, saved = len(ctx.tasks), ctx.join, ctx.saved_tensors
        end, count = len(saved) - len(ctx.source_links), n // join
        tensors, adjoints, firsts = saved[: end - count], saved[end - count : end], saved[end:]
        first = 1 + len(tensors) - 2 * n  # after the token and the sources
        if weights_wanted(ctx.next_functions[first:-count]):
            refuse_second_derivative("its weights")
        given = (
            *_arguments(ctx.tasks, ctx.norms, tensors),
            parts(adjoints, join),
            tangents[: -2 * n],
            tangents[-2 * n : -n],
            tangents[-n:],
        )
        if second_backward_in_one(adjoints[0]):
            outputs, left = backend(adjoints[0]).sepconv_tangent_forward(
                *given, ctx.owns, join, ctx.source_links, firsts
            )
            ctx.handover.leave(left)
            token, sources = adjoints[0].new_empty(0), [None] * (len(tensors) - 2 * n)
        else:
            outputs, sources = backend(adjoints[0]).sepconv_tangent(*given)
            outputs, token = _side_by_side(outputs, join), None
        return *[None] * 7, token, *sources, *[None] * (2 * n), *outputs


def _side_by_side(outputs: list[Tensor], join: int) -> list[Tensor]:
    """The channels of every `join` neighbours as one tensor's."""
    if join == 1:
        return outputs
    groups = [outputs[i : i + join] for i in range(0, len(outputs), join)]
    return [torch.cat(group, dim=1).contiguous(memory_format=torch.channels_last) for group in groups]


def parts(adjoints: Sequence[Tensor | None], join: int) -> list[Tensor | None]:
    """Of every task, views of its output's."""
    if join == 1:
        return list(adjoints)
    return [part for y in adjoints for part in ([None] * join if y is None else y.chunk(join, dim=1))]


def owns_of(link: Link | None, y: Tensor, join: int) -> list[Own | None]:
    """Of the tasks of one output."""
    if link is None:
        return [None] * join
    statistics = link.norm.statistics
    if join == 1:  # without slices, which took a hundredth of a step on the CPU
        return [Own(y, statistics, link, link.sums)]
    k = y.shape[1] // join
    parts = [slice(i, i + k) for i in range(0, y.shape[1], k)]
    return [Own(y[:, c], statistics[:, c], link, link.sums[..., c], c) for c in parts]


def _arguments(
    tasks: tuple[Task, ...], norms: list[Normalizer | None], tensors: Sequence[Tensor | None]
) -> tuple:
    """What every function of a backend begins with: sources, normalizers, tasks, both kinds of weights."""
    n = len(tasks)
    return tensors[: -2 * n], norms, tasks, tensors[-2 * n : -n], tensors[-n:]
