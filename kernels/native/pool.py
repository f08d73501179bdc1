"""3x3 max and average pool, see `types.Backend`."""

from collections.abc import Sequence

from torch import Tensor

from darts_fast.kernels.native import table
from darts_fast.kernels.native.table import Launch, Table, image, numbers, pixels, read_in_tangent, reader
from darts_fast.kernels.types import Reader, tensors


def pool_forward(
    x: Tensor, stride: int, *, pools: Tensor, position: Tensor, statistics: Tensor | None
) -> list[Launch]:
    return _pool("pool_forward", x, stride, pools, position, statistics=statistics)


def pool_backward(
    position: Tensor, stride: int, pools: Tensor, terms: Sequence[Tensor], *, out: Tensor
) -> list[Launch]:
    return _pool("pool_backward", out, stride, pools, position, terms=terms)


def pool_tangent(
    tangent: Tensor,
    position: Tensor,
    stride: int,
    readers: Sequence[Sequence[Reader]],
    *,
    pools: Tensor,
    sums: Sequence[Sequence[Tensor]],
) -> list[Launch]:
    return _pool("pool_tangent", tangent, stride, pools, position, readers=readers, sums=sums)


def _pool(
    name: str,
    x: Tensor,
    stride: int,
    pools: Tensor,
    position: Tensor,
    statistics: Tensor | None = None,
    terms: Sequence[Tensor] = (),
    readers: Sequence[Sequence[Reader]] = ((), ()),
    sums: Sequence[Sequence[Tensor]] = ((), ()),
) -> list[Launch]:
    """`x` is the pooled image, its tangent or its adjoint."""
    (n, c, height, width), (maximum, average), of_terms = x.shape, pools, Table([pixels(t) for t in terms])
    of_maximum, of_average = readers
    read = [read_in_tangent(of_one) for of_one in (*of_maximum, *of_average)]
    pairs = zip(read, (*sums[0], *sums[1]), strict=True)
    of_readers = Table([reader(of_one, its_sums) for of_one, its_sums in pairs])
    call = table.Pool(
        x=image(x),
        maximum=image(maximum),
        average=image(average),
        position=numbers(position.permute(0, 2, 3, 1)),
        statistics=numbers(statistics),
        terms=of_terms.address,
        n_terms=of_terms.count,
        readers=of_readers.address,
        of_maximum=len(of_maximum),
        of_average=len(of_average),
        n=n,
        h=height,
        w=width,
        c=c,
        stride=stride,
    )
    found = list(tensors([x, pools, position, statistics, terms, read, sums]))
    return [Launch(name, found, Table([call]), [of_terms, of_readers])]
