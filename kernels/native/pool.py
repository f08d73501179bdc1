"""3x3 max and average pool, see `types.Backend`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from darts_fast.kernels.native import table
from darts_fast.kernels.native.table import Launch, Table, image, numbers, pixels, tensors_in


def pool_forward(
    x: Tensor, stride: int, *, pools: Tensor, position: Tensor, statistics: Tensor | None
) -> list[Launch]:
    call = _pool(x, stride, pools, position)._replace(x=image(x), statistics=numbers(statistics))
    return _launch("forward", call, (), x, pools, position, statistics)


def pool_backward(
    position: Tensor, stride: int, pools: Tensor, terms: Sequence[Tensor], *, out: Tensor
) -> list[Launch]:
    of_terms = Table([pixels(term) for term in terms])
    call = _pool(out, stride, pools, position)._replace(
        adjoint=image(out), terms=of_terms.address, n_terms=of_terms.count
    )
    return _launch("backward", call, [of_terms], position, pools, terms, out)


def pool_tangent(tangent: Tensor, position: Tensor, stride: int, *, pools: Tensor) -> list[Launch]:
    call = _pool(tangent, stride, pools, position)._replace(x=image(tangent))
    return _launch("tangent", call, (), tangent, position, pools)


def _pool(x: Tensor, stride: int, pools: Tensor, position: Tensor) -> table.Pool:
    """`x` is the pooled image, or one like it."""
    n, c, height, width = x.shape
    maximum, average = pools
    if not position.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError(f"strides {position.stride()} of the positions are not those of channels-last memory")
    return table.Pool(
        maximum=image(maximum),
        average=image(average),
        position=position.data_ptr(),
        n=n,
        h=height,
        w=width,
        c=c,
        stride=stride,
    )


def _launch(sweep: str, call: table.Pool, tables: Sequence[Table], *arguments: Any) -> list[Launch]:
    name = f"pool_{sweep}"
    return [Launch(name, list(tensors_in(arguments)), name, Table([call]), tables)]
