"""What the tangent sweep of a call leaves for its second backward sweep, so that one pass computes both.

Autograd would have the two as separate terms of an adjoint, written and then added: for a mix, 9 passes over
each candidate in place of 5. A call returns beside its outputs an empty tensor, its token, which its backward
is given; the tangent sweep (the backward of that backward) returns a gradient for it. So autograd runs the
second backward sweep of the call in every pass that ran its tangent sweep, and after it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from darts_fast.kernels.first_derivative import refuse_second_derivative
from darts_fast.kernels.torch_backend import Normalizer


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
    """Between a tensor that `sepconv` or `spread` gives and the one `mix`, or second half of a separable
    convolution, that normalises it on load. The reader gives the adjoint G of the normalised tensor, without
    its p, and the giver takes p B(G) of it where it loads it: no adjoint of a candidate is written. Here the
    reader leaves the per-channel sums that B needs, in the pass in which it hands G on.

    `weights` holds p at `index`; None: p is 1. `norm` is what the reader normalises it by. `sums`
    [2, candidates, C] are those of the adjoint that was handed on last, and of that times h; `tangent_sums`
    [4, candidates, C] those of the reader's last tangent sweep: of yd, yd h, yd G and G. The tensor's row in
    them is number `index`.
    """

    weights: Tensor | None
    index: int
    norm: Normalizer | None
    sums: Tensor | None = None
    tangent_sums: Tensor | None = None


class Reader(NamedTuple):
    """A mix that reads the tensors of a `spread`, in one sweep."""

    adjoint: Tensor  # the node's: G or Gd
    sums: Tensor  # [2, candidates, C]: of it, and of it times h
    weights: Tensor  # p [candidates]
    places: tuple[int, ...]  # where the tensors are among its candidates


class Last(torch.autograd.Function):
    """`function()`, a tuple that depends on `tensors`: the end of what can be differentiated."""

    @staticmethod
    def forward(ctx: FunctionCtx, function: Callable[[], tuple], *tensors: Tensor | None) -> tuple:
        return function()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> None:
        refuse_second_derivative("what a Hessian-vector product ends in")
