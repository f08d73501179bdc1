"""Halves of separable convolutions and 1x1 convolutions in Triton.

Notation of docs/mathematics.md: a = relu(h), z = D * a, y = P z; capitals are adjoints, a trailing d is a
tangent. The four sweeps are three kernels, a file each, launched once for all tasks of a call:

    sepconv_fwd_kernel            y = P (D * a) and its statistics; as tangent yd = P (D * ad + Dd * a) + Pd z
                                  and its sums
    sepconv_bwd_pointwise_kernel  Z = P' Y, and the weight gradients; as tangent also Zd = P' Yd + Pd' Y
    sepconv_bwd_kernel            H = [h > 0] D' * Z, summed over a source's tasks; as tangent Hd
"""

from collections.abc import Sequence

from torch import Tensor

from darts_fast.kernels.triton.launch import Launch
from darts_fast.kernels.triton.sepconv_bwd import depthwise
from darts_fast.kernels.triton.sepconv_bwd_pointwise import pointwise
from darts_fast.kernels.triton.sepconv_call import Call
from darts_fast.kernels.triton.sepconv_fwd import Tangents, forward
from darts_fast.kernels.types import Reader, SecondReader, Source, Task, Weights, images


def sepconv_forward(
    sources: Sequence[Source], tasks: Sequence[Task], *, y: Tensor, statistics: Tensor | None
) -> list[Launch]:
    return [forward(Call.of(sources, tasks), y, statistics)]


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
    return _backward(Call.of(sources, tasks), readers, None, None, terms, adjoint, sums, gradients)


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
    tangents = Tangents(source_tangents, source_sums, weight_tangents, readers, sums)
    return [forward(Call.of(sources, tasks), y, None, tangents)]


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
    firsts = [reader.first for reader in readers]
    return _backward(Call.of(sources, tasks), firsts, readers, weight_tangents, terms, adjoint, sums, None)


def _backward(
    call: Call,
    firsts: Sequence[Reader],
    seconds: Sequence[SecondReader] | None,
    weight_tangents: Sequence[Weights] | None,
    terms: Sequence[Sequence[Tensor]],
    adjoint: Tensor,
    sums: Tensor | None,
    gradients: Tensor | None,
) -> list[Launch]:
    """Returns the launches of the second backward sweep if there are `seconds`, else of the first."""
    if call.direct():
        return [pointwise(call, firsts, seconds, weight_tangents, terms, adjoint, gradients)]
    n, _, height, width = call.out_shape
    x, count, layers = call.sources[0], len(call.tasks), 1 if seconds is None else 2
    z = images(layers * count, (n, x.shape[1], height, width), x.dtype, x.device).unflatten(
        0, (layers, count)
    )
    return [
        pointwise(call, firsts, seconds, weight_tangents, None, z, gradients),
        depthwise(call, z, weight_tangents, terms, adjoint, sums),
    ]
