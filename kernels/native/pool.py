"""3x3 max and average pool, see `types.Backend`."""

from collections.abc import Sequence

from torch import Tensor

from darts_fast.kernels.native import table
from darts_fast.kernels.native.table import Launch, Table, image, numbers, pixels
from darts_fast.kernels.types import tensors


def pool_forward(
    x: Tensor, stride: int, *, pools: Tensor, position: Tensor, statistics: Tensor | None
) -> list[Launch]:
    return _pool("pool_forward", x, stride, pools, position, statistics=statistics)


def pool_backward(
    position: Tensor, stride: int, pools: Tensor, terms: Sequence[Tensor], *, out: Tensor
) -> list[Launch]:
    return _pool("pool_backward", out, stride, pools, position, terms=terms)


def pool_tangent(tangent: Tensor, position: Tensor, stride: int, *, pools: Tensor) -> list[Launch]:
    return _pool("pool_tangent", tangent, stride, pools, position)


def _pool(
    name: str,
    x: Tensor,
    stride: int,
    pools: Tensor,
    position: Tensor,
    statistics: Tensor | None = None,
    terms: Sequence[Tensor] = (),
) -> list[Launch]:
    """`x` is the pooled image, its tangent or its adjoint."""
    (n, c, height, width), (maximum, average), of_terms = x.shape, pools, Table([pixels(t) for t in terms])
    call = table.Pool(
        x=image(x),
        maximum=image(maximum),
        average=image(average),
        position=numbers(position.permute(0, 2, 3, 1)),
        statistics=numbers(statistics),
        terms=of_terms.address,
        n_terms=of_terms.count,
        n=n,
        h=height,
        w=width,
        c=c,
        stride=stride,
    )
    found = list(tensors([x, pools, position, statistics, terms]))
    return [Launch(name, found, Table([call]), [of_terms])]
