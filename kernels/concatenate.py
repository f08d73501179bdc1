"""Concatenation of channels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """[N, C_i, H, W] each -> [N, sum of C_i, H, W], channels-last. Differentiable any number of times.

    `torch.cat`, but the tangent of its backward is one concatenation, too: autograd pads every slice with
    zeros and adds them (108 launches and 1.6 GB of a step of the paper's network).
    """
    return _Concatenate.apply(*tensors)


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> Tensor:
        ctx.sizes = [t.shape[1] for t in tensors]
        return torch.cat(tensors, dim=1).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor, ...]:
        return _Split.apply(g, ctx.sizes)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, g: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.shape = sizes, g.shape
        return tuple(g.contiguous(memory_format=torch.channels_last).split(sizes, dim=1))

    @staticmethod
    def backward(ctx: FunctionCtx, *tangents: Tensor | None) -> tuple[Tensor, None]:
        n, _, height, width = ctx.shape
        like = next(t for t in tangents if t is not None)
        given = [
            like.new_zeros(n, size, height, width) if t is None else t
            for t, size in zip(tangents, ctx.sizes, strict=True)
        ]
        return _Concatenate.apply(*given), None
