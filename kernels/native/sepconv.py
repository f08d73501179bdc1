"""Separable halves, 1x1 convolutions and the pairs of a factorized reduce, see `types.Backend`."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from darts_fast.kernels.native import table
from darts_fast.kernels.native.table import (
    Launch,
    Table,
    image,
    numbers,
    pixels,
    read_in_tangent,
    read_of,
    reader,
    rows,
)
from darts_fast.kernels.types import (
    Reader,
    SecondReader,
    Source,
    Task,
    Weights,
    of_tasks,
    readers_of_tasks,
    tensors,
)


def sepconv_forward(
    sources: Sequence[Source], tasks: Sequence[Task], *, y: Tensor, statistics: Tensor | None
) -> list[Launch]:
    return _sepconv("sepconv_forward", sources, tasks, y=y, statistics=statistics)


def sepconv_backward(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    readers: Sequence[Reader],
    terms: Sequence[Sequence[Tensor]],
    *,
    adjoint: Tensor,
    sums: Tensor | None,
    gradients: Tensor | None,
) -> list[Launch]:
    reads: dict[str, Any] = {"readers": readers, "terms": terms}
    return _sepconv(
        "sepconv_backward", sources, tasks, **reads, adjoint=adjoint, sums=sums, gradients=gradients
    )


def sepconv_tangent(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    source_tangents: Sequence[Tensor],
    source_sums: Tensor | None,
    weight_tangents: Sequence[Weights],
    readers: Sequence[Reader],
    *,
    y: Tensor,
    sums: Sequence[Tensor],
) -> list[Launch]:
    tangents = source_tangents, source_sums, weight_tangents
    return _sepconv("sepconv_tangent", sources, tasks, *tangents, readers, y=y, tangent_sums=sums)


def sepconv_second(
    sources: Sequence[Source],
    tasks: Sequence[Task],
    weight_tangents: Sequence[Weights],
    readers: Sequence[SecondReader],
    terms: Sequence[Sequence[Tensor]],
    *,
    adjoint: Tensor,
    sums: Tensor | None,
) -> list[Launch]:
    reads: dict[str, Any] = {"weight_tangents": weight_tangents, "readers": readers, "terms": terms}
    return _sepconv("sepconv_second", sources, tasks, **reads, adjoint=adjoint, sums=sums)


def _sepconv(
    name: str,
    sources: Sequence[Source],
    tasks: Sequence[Task],
    source_tangents: Sequence[Tensor] | None = None,
    source_sums: Tensor | None = None,
    weight_tangents: Sequence[Weights] | None = None,
    readers: Sequence[Reader | SecondReader] | None = None,
    terms: Sequence[Sequence[Tensor]] | None = None,
    y: Tensor | None = None,
    statistics: Tensor | None = None,
    adjoint: Tensor | None = None,
    sums: Tensor | None = None,
    gradients: Tensor | None = None,
    tangent_sums: Sequence[Tensor] | None = None,
) -> list[Launch]:
    """The launch of the C++ function of this name, which reads only what is not None."""
    read: Sequence[tuple] = [read_of(of_one) for of_one in readers or ()]
    if tangent_sums is not None:
        read = readers = [read_in_tangent(cast(Reader, of_one)) for of_one in readers or ()]
    of_sources, of_terms = [], [Table([pixels(t) for t in its]) for its in terms or [()] * len(sources)]
    for i, source in enumerate(sources):
        n, c, height, width = source.x.shape
        of_sources.append(
            table.Source(
                x=image(source.x),
                statistics=rows(source.statistics),
                affine=rows(source.affine),
                tangent=image(source_tangents[i] if source_tangents else None),
                tangent_sums=rows(None if source_sums is None else source_sums[:, i]),
                terms=of_terms[i].address,
                n_terms=of_terms[i].count,
                adjoint=image(None if adjoint is None else adjoint[i]),
                sums=rows(None if sums is None else sums[:, i]),
                n=n,
                h=height,
                w=width,
                c=c,
            )
        )
    count, tasks_in_table = len(tasks), []
    task_readers = readers_of_tasks(readers, count) if readers else []
    task_y, task_statistics, task_sums = (
        [None] * count if outputs is None else of_tasks(outputs, count)
        for outputs in (y, statistics, tangent_sums)
    )
    for i, task in enumerate(tasks):
        (d, p), (dd, pd) = task.weights, weight_tangents[i] if weight_tangents else (None, None)
        row = None if gradients is None else gradients[i]
        tasks_in_table.append(
            table.Task(
                source=task.source,
                kernel=0 if d is None else d.shape[-1],
                stride=task.stride,
                dilation=task.dilation,
                offset=task.offset,
                k=p.shape[0],
                d=numbers(d),
                p=numbers(p),
                d_tangent=numbers(dd),
                p_tangent=numbers(pd),
                y=pixels(task_y[i]),
                statistics=rows(task_statistics[i]),
                reader=reader(task_readers[i], task_sums[i]) if task_readers else table.Reader(),
                p_gradient=numbers(row),
                d_gradient=numbers(None if row is None or d is None else row[p.numel() :]),
            )
        )
    tables = Table(of_sources), Table(tasks_in_table)
    call = table.SepConv(tables[0].address, tables[0].count, tables[1].address, tables[1].count)
    weights = [task.weights for task in tasks]
    reads = sources, weights, source_tangents, source_sums, weight_tangents, read, terms
    found = tensors([reads, y, statistics, adjoint, sums, gradients, tangent_sums])
    return [Launch(name, list(found), Table([call]), [*tables, *of_terms])]
