"""Weights that are differentiated once: what the Hessian-vector product of the architecture step needs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node


class _Weights(torch.autograd.Function):
    """Weights as they are; a node of the graph by which the functions that use them see whether the pass
    under way ends in weight gradients. (`ctx.needs_input_grad` does not tell: it says what could be
    differentiated, not what is, and the weights always could.)"""

    @staticmethod
    def forward(ctx: FunctionCtx, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def differentiable_once(weights: list[Tensor | None]) -> list[Tensor | None]:
    """The weights (None stays None), for a function whose backward asks `weights_wanted`: leaves get a node
    of their own, others (parts of one tensor that holds all weights) have one."""
    leaves = [w for w in weights if w is not None and w.is_leaf and w.requires_grad]
    if not leaves:
        return weights
    found = dict(zip(map(id, leaves), _Weights.apply(*leaves), strict=True))
    return [found.get(id(w), w) for w in weights]


def weights_wanted(next_functions: Sequence[tuple[Node | None, int]]) -> bool:
    """Whether the backward pass under way goes on to one of these `ctx.next_functions`, those of the weights
    a function was given."""
    nodes = {node for node, _ in next_functions if node is not None}
    return any(torch._C._will_engine_execute_node(node) for node in nodes)


def refuse_second_derivative(what: str) -> None:
    raise RuntimeError(
        f"the fused cell has no second derivative with respect to {what}: it can be differentiated once with "
        "respect to its weights and alphas, and the weight gradients once more with respect to its inputs "
        "and alphas"
    )
