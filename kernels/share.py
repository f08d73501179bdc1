"""A tensor that several functions read, whose adjoints are summed in one pass."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from darts_fast.kernels.backends import backend


def share(x: Tensor, readers: int) -> tuple[Tensor, ...]:
    """x [N, C, H, W] once for each reader. Differentiable any number of times.

    Autograd sums the adjoints of a tensor with n readers in n - 1 passes over three tensors each; handed out
    here they are summed in one pass over n + 1.
    """
    return _Share.apply(x, readers)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, readers: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(readers))

    @staticmethod
    def backward(ctx: FunctionCtx, *adjoints: Tensor | None) -> tuple[Tensor | None, None]:
        given = [g for g in adjoints if g is not None]
        return (_Sum.apply(*given) if len(given) > 1 else given[0] if given else None), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *terms: Tensor) -> Tensor:
        ctx.terms = len(terms)
        return backend(terms[0]).add(terms)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor, ...]:
        return (g,) * ctx.terms
