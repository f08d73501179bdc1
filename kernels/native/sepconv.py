"""Separable halves, 1x1 convolutions and the pairs of a factorized reduce, see `types.Backend`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from darts_fast.kernels.native import table
from darts_fast.kernels.native.table import Launch, Table, image, numbers, pixels, reader, rows, tensors_in
from darts_fast.kernels.types import Reader, SecondReader, Source, Task, Weights


def sepconv_forward(
    sources: Sequence[Source], tasks: Sequence[Task], *, y: Tensor, statistics: Tensor | None
) -> list[Launch]:
    structures = [
        structure._replace(
            y=pixels(y[output, :, channels]),
            statistics=rows(None if statistics is None else statistics[output, :, channels]),
        )
        for structure, (output, channels) in zip(_tasks(tasks), _written_by(tasks, y), strict=True)
    ]
    return _launch("forward", _sources(sources), structures, sources, _weights(tasks), y, statistics)


def sepconv_backward(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    readers: Sequence[Reader],
    *,
    adjoint: Tensor,
    sums: Tensor | None,
    gradients: Tensor | None,
) -> list[Launch]:
    structures = _with_readers(_tasks(tasks), tasks, readers)
    if gradients is not None:
        for i, (task, row) in enumerate(zip(tasks, gradients, strict=True)):
            d, p = task.weights
            at = numbers(row), numbers(row[p.numel() :]) if d is not None else 0
            structures[i] = structures[i]._replace(p_gradient=at[0], d_gradient=at[1])
    given = _sources(sources, adjoint, sums)
    return _launch(
        "backward", given, structures, sources, _weights(tasks), readers, adjoint, sums, gradients
    )


def sepconv_tangent(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    source_tangents: Sequence[Tensor],
    weight_tangents: Sequence[Weights],
    adjoints: Tensor | None,
    *,
    y: Tensor,
    sums: Tensor | None,
) -> list[Launch]:
    given = [
        structure._replace(tangent=image(tangent))
        for structure, tangent in zip(_sources(sources, adjoints, sums), source_tangents, strict=True)
    ]
    structures = [
        structure._replace(y=pixels(y[output, :, channels]))
        for structure, (output, channels) in zip(
            _tasks(tasks, weight_tangents), _written_by(tasks, y), strict=True
        )
    ]
    tensors = sources, _weights(tasks), source_tangents, weight_tangents, adjoints, y, sums
    return _launch("tangent", given, structures, *tensors)


def sepconv_second(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    weight_tangents: Sequence[Weights],
    readers: Sequence[SecondReader],
    *,
    adjoint: Tensor,
    sums: Tensor | None,
) -> list[Launch]:
    structures = _with_readers(_tasks(tasks, weight_tangents), tasks, readers)
    given = _sources(sources, adjoint, sums)
    return _launch(
        "second", given, structures, sources, _weights(tasks), weight_tangents, readers, adjoint, sums
    )


def _sources(
    sources: Sequence[Source], adjoint: Tensor | None = None, sums: Tensor | None = None
) -> list[table.Source]:
    """`adjoint` [sources, N, C, H, W] and `sums` [rows, sources, C] are those of all sources."""
    structures = []
    for i, source in enumerate(sources):
        n, c, height, width = source.x.shape
        structures.append(
            table.Source(
                x=image(source.x),
                statistics=rows(source.statistics),
                adjoint=0 if adjoint is None else image(adjoint[i]),
                sums=rows(None if sums is None else sums[:, i]),
                n=n,
                h=height,
                w=width,
                c=c,
            )
        )
    return structures


def _tasks(tasks: Sequence[Task], tangents: Sequence[Weights] | None = None) -> list[table.Task]:
    return [
        table.Task(
            source=task.source,
            kernel=0 if task.weights.depthwise is None else task.weights.depthwise.shape[-1],
            stride=task.stride,
            dilation=task.dilation,
            offset=task.offset,
            k=task.weights.pointwise.shape[0],
            d=numbers(task.weights.depthwise),
            p=numbers(task.weights.pointwise),
            d_tangent=numbers(tangent.depthwise),
            p_tangent=numbers(tangent.pointwise),
        )
        for task, tangent in zip(tasks, tangents or [Weights(None, None)] * len(tasks), strict=True)
    ]


def _with_readers(
    structures: Sequence[table.Task], tasks: Sequence[Task], readers: Sequence[Reader | SecondReader]
) -> list[table.Task]:
    return [
        structure._replace(reader=reader(readers[output], channels))
        for structure, (output, channels) in zip(structures, _written_by(tasks, readers), strict=True)
    ]


def _written_by(tasks: Sequence[Task], outputs: Sequence) -> list[tuple[int, slice]]:
    """The output of every task, and the channels of it: neighbouring tasks share an output."""
    joined, k = len(tasks) // len(outputs), tasks[0].weights.pointwise.shape[0]
    return [(i // joined, slice(i % joined * k, (i % joined + 1) * k)) for i in range(len(tasks))]


def _weights(tasks: Sequence[Task]) -> list[Weights]:
    return [task.weights for task in tasks]


def _launch(
    sweep: str, sources: Sequence[table.Source], tasks: Sequence[table.Task], *arguments: Any
) -> list[Launch]:
    of_sources, of_tasks = Table(sources), Table(tasks)
    call = table.SepConv(of_sources.address, of_sources.count, of_tasks.address, of_tasks.count)
    name = f"sepconv_{sweep}"
    return [Launch(name, list(tensors_in(arguments)), name, Table([call]), [of_sources, of_tasks])]
