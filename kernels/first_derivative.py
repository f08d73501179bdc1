"""Which derivatives the autograd pass under way ends in, and those that are refused."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node


class _Same(torch.autograd.Function):
    """Returns the tensor as it is. It is a node of the graph, from which the function that uses the tensor
    sees whether the pass under way ends in its gradient. (`ctx.needs_input_grad` does not tell: it says what
    could be differentiated, not what is, and weights always could.)"""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


def with_node(x: Tensor) -> Tensor:
    """The tensor, for a function whose backward asks `wanted`: a leaf gets a node of its own."""
    return _Same.apply(x) if x.is_leaf and x.requires_grad else x


def wanted(next_functions: Sequence[tuple[Node | None, int]]) -> bool:
    """Whether the backward pass under way goes on to one of these of `ctx.next_functions`."""
    nodes = {node for node, _ in next_functions if node is not None}
    return any(torch._C._will_engine_execute_node(node) for node in nodes)


def refuse_second_derivative(what: str) -> None:
    raise RuntimeError(
        f"a fused network has no second derivative with respect to {what}: it can be differentiated once "
        "with respect to its weights and alphas, and the weight gradients once more with respect to its "
        "inputs and alphas"
    )
