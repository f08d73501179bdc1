"""3x3 max and average pool, padding 1, over the pixels that are there."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast.kernels.aten.batch_norm import aten, statistics_of, wide, write_tangent_sums
from darts_fast.kernels.aten.launch import as_launch
from darts_fast.kernels.types import Reader


@as_launch
def pool_forward(
    x: Tensor, stride: int, *, pools: Tensor, position: Tensor, statistics: Tensor | None
) -> None:
    x = wide(x)
    maximum, index = F.max_pool2d(x, 3, stride, 1, return_indices=True)
    average = F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    top, left = _first_pixels(position, stride)
    position.copy_(3 * (index // x.shape[3] - top) + index % x.shape[3] - left)
    for number, pool in enumerate((maximum, average)):
        pools[number].copy_(pool)
        if statistics is not None:
            statistics[number].copy_(statistics_of(pool))


@as_launch
def pool_backward(
    position: Tensor, stride: int, pools: Tensor, terms: Sequence[Tensor], *, out: Tensor
) -> None:
    maximum, average = map(wide, pools)
    like = torch.empty_like(out, dtype=maximum.dtype)  # ATen reads the shape alone
    window = [3, 3], [stride, stride], [1, 1]
    index = _plane_index(position, stride, out.shape[3])
    total = aten.max_pool2d_with_indices_backward(maximum, like, *window, [1, 1], False, index)
    total.add_(aten.avg_pool2d_backward(average, like, *window, False, False, None))
    for term in terms:
        total.add_(term)
    out.copy_(total)


@as_launch
def pool_tangent(
    tangent: Tensor,
    position: Tensor,
    stride: int,
    readers: Sequence[Sequence[Reader]],
    *,
    pools: Tensor,
    sums: Sequence[Sequence[Tensor]],
) -> None:
    tangent = wide(tangent)
    index = _plane_index(position, stride, tangent.shape[3])
    pools[0].copy_(tangent.flatten(2).gather(2, index.flatten(2)).view(position.shape))
    pools[1].copy_(F.avg_pool2d(tangent, 3, stride, 1, count_include_pad=False))
    for pool, of_readers, of_sums in zip(pools, readers, sums, strict=True):
        for reader, of_reader in zip(of_readers, of_sums, strict=True):
            write_tangent_sums(pool, reader, of_reader)


def _first_pixels(position: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Returns row [H', 1] and column [W'] of the first pixel of every window; -1 is in the padding."""
    top, left = (torch.arange(size, device=position.device) * stride - 1 for size in position.shape[2:])
    return top[:, None], left


def _plane_index(position: Tensor, stride: int, width: int) -> Tensor:
    """Returns the positions as ATen counts them in a plane, row * width + column, int64."""
    top, left = _first_pixels(position, stride)
    position = position.long()
    return (top + position // 3) * width + left + position % 3
