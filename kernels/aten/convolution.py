"""Factorized convolutions, ReLU -> 1 x k -> k x 1, by ATen: for every backend. No published search space but
NASNet's has them, and on a GPU they are cuDNN's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast.kernels.aten.batch_norm import aten, evaluate, first_terms, statistics_of, wide
from darts_fast.kernels.aten.launch import as_launch
from darts_fast.kernels.types import Reader


@as_launch
def convolution_forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    stride: int,
    *,
    middle: Tensor,
    y: Tensor,
    statistics: Tensor | None,
) -> None:
    first, second = (w.to(x.dtype) for w in weights)
    same = first.shape[3] // 2
    middle.copy_(F.conv2d(x.relu(), first, None, (1, stride), (0, same)))
    y.copy_(F.conv2d(middle, second, None, (stride, 1), (same, 0)))
    if statistics is not None:
        statistics.copy_(statistics_of(wide(y)))


@as_launch
def convolution_backward(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    stride: int,
    middle: Tensor,
    reader: Reader,
    *,
    adjoint: Tensor,
    gradients: tuple[Tensor, Tensor],
) -> None:
    first, second = (w.to(x.dtype) for w in weights)
    same = first.shape[3] // 2

    def differentiate(
        g: Tensor, read: Tensor, w: Tensor, strides: list[int], padding: list[int], gradient: Tensor
    ) -> Tensor:
        which = [True, True, False]
        of_read, of_w, _ = aten.convolution_backward(
            g, read, w, None, strides, padding, [1, 1], False, [0, 0], 1, which
        )
        gradient.copy_(of_w)
        return of_read

    g = evaluate(reader.y, [first_terms(reader)]).to(x.dtype)
    g = differentiate(g, middle, second, [stride, 1], [same, 0], gradients[1])
    a = torch.relu(x)
    g = differentiate(g, a, first, [1, stride], [0, same], gradients[0])
    adjoint.copy_(aten.threshold_backward(g, a, 0))
