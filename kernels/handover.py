"""What the tangent sweep of a call leaves for its second backward sweep, so that one pass computes both.

Autograd would have the two as separate terms of an adjoint, written and then added: for a mix, 9 passes over
each candidate in place of 5. A call returns beside its outputs an empty tensor, its token, which its backward
is given; the tangent sweep (the backward of that backward) returns a gradient for it. So autograd runs the
second backward sweep of the call in every pass that ran its tangent sweep, and after it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from darts_fast.kernels.first_derivative import refuse_second_derivative


class Handover:
    """Of one call. What a pass left and did not take (it ended before) is not given to another, nor kept: it
    holds the graph that holds this, a cycle through C++ that Python's collector does not see."""

    def __init__(self):
        self._left: list[tuple[int, Any]] = []

    def leave(self, what: Any) -> None:
        self._left = [(torch._C._current_graph_task_id(), what), *self._of_this_pass()]
        torch.autograd.Variable._execution_engine.queue_callback(self._left.clear)

    def take(self) -> list[Any]:
        """What this pass left: one thing, or more where a graph has several backwards of one call."""
        found, self._left = self._of_this_pass(), []
        return [what for _, what in found]

    def _of_this_pass(self) -> list[tuple[int, Any]]:
        return [pair for pair in self._left if pair[0] == torch._C._current_graph_task_id()]


class Link:
    """Between an output of `sepconv` and the one `mix` that reads it. The mix gives the node's adjoint G as
    it is, and `sepconv` takes p B(G) of it where it loads it: no adjoint of a candidate is written. Here the
    mix leaves the per-channel sums that B needs, in the very pass in which it hands on G.

    `weights` holds p at `index`; `first`, `tangent` and `second` are [2 or 4, candidates, C], see the
    backend.
    """

    weights: Tensor
    index: int
    first: Tensor | None = None
    tangent: Tensor | None = None
    second: Tensor | None = None


class Last(torch.autograd.Function):
    """`function()`, a tuple that depends on `tensors`: the end of what can be differentiated."""

    @staticmethod
    def forward(ctx: FunctionCtx, function: Callable[[], tuple], *tensors: Tensor | None) -> tuple:
        return function()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> None:
        refuse_second_derivative("what a Hessian-vector product ends in")
