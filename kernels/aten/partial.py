"""Partial channels (arXiv 1907.05737) by ATen, for every backend: the 2x2 max pool of the channels that pass
by the operations of stride 2, and the channel shuffle of a node."""

from collections.abc import Sequence

import torch
from torch import Tensor

from darts_fast.kernels.aten.batch_norm import wide
from darts_fast.kernels.aten.launch import as_launch


@as_launch
def max_pool_2x2_forward(x: Tensor, *, y: Tensor, position: Tensor) -> None:
    maximum, index = torch.stack(_window(x)).max(0)  # of equal values the first
    y.copy_(maximum)
    position.copy_(index)


@as_launch
def max_pool_2x2_backward(position: Tensor, adjoint: Tensor, *, out: Tensor) -> None:
    for i, pixels in enumerate(_window(out)):
        pixels.copy_(torch.where(position == i, adjoint, 0))


@as_launch
def max_pool_2x2_tangent(tangent: Tensor, position: Tensor, *, y: Tensor) -> None:
    y.copy_(torch.stack(_window(tangent)).gather(0, position.long()[None])[0])


def _window(x: Tensor) -> list[Tensor]:
    """Returns the first, second, ... pixels of all windows, views of x."""
    return [x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]


@as_launch
def shuffle(sources: Sequence[Sequence[Tensor]], groups: int, *, outs: Sequence[Sequence[Tensor]]) -> None:
    total, *others = [torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0] for parts in sources]
    for other in others:
        total = wide(total) + other
    # [N, H, W, C / groups, groups]: the channels of a pixel in their new order, a view
    shuffled = total.movedim(1, 3).unflatten(3, (groups, -1)).transpose(3, 4)
    for parts in outs:
        sizes = [out.shape[1] for out in parts]
        if any(size % groups for size in sizes):
            for out, channels in zip(parts, shuffled.flatten(3).split(sizes, dim=3), strict=True):
                out.copy_(channels.movedim(3, 1))
            continue
        rows = shuffled.split([size // groups for size in sizes], dim=3)
        for out, channels in zip(parts, rows, strict=True):
            out.movedim(1, 3).unflatten(3, (-1, groups)).copy_(channels)
