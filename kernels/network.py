"""The autograd functions through which a network calls the sweeps of its cells: that of a genotype's cells,
differentiable once, and that of a search's cells, differentiable twice:

    forward     output = cells(x, weights, p)
    backward    adjoints of x and p, gradients of the weights: itself a function, whose
    backward    is the tangent sweep; then autograd calls the first function's backward a second time in the
                same pass, with the second adjoint of the output: the second sweep

So `torch.autograd.grad(weight_gradients, alphas, grad_outputs=v)` is the exact Hessian-vector product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from darts_fast.kernels.backends import program
from darts_fast.kernels.cell import Cell, Sweeps
from darts_fast.kernels.first_derivative import refuse_second_derivative, wanted, with_node
from darts_fast.kernels.plan import Binding, Blocks, Layout, Lease, needed, place
from darts_fast.kernels.types import Backend, Call


class Plan:
    """The sweeps of a network's cells for one shape of what they read, bound to memory of a device.

    Args: `blocks` is the memory, `backend` computes; for the others see `cell.Sweeps`.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        parameters: int,
        norms: Sequence[int],
        derivatives: int,
        blocks: Blocks,
        backend: Backend,
        drop_path: bool = False,
        outputs: Sequence[int] | None = None,
    ):
        self.sweeps = s = Sweeps(cells, shapes, dtype, parameters, norms, derivatives, drop_path, outputs)
        self.backend, self.blocks = backend, blocks
        self._bound: dict[tuple, Bound] = {}
        self.layouts: dict[str, Layout] = {}  # "exact", with a second derivative, and "first order", without
        extra = [*s.noise, *(t for t in (s.constants, s.path_weights) if t is not None)]
        given = [[*s.inputs, s.weights, *s.p.values(), *extra]]
        results = [[*s.outputs, *s.batch_statistics.values()]]
        names, calls = list(s.calls), list(s.calls.values())
        if s.training:
            # The output is read as long as there is a graph: later sweeps must not write over it.
            given.append([*s.adjoints, *s.outputs])
            results.append([*s.input_adjoints, s.gradients, *s.p_gradients.values()])
        if derivatives == 2:
            given += [[*s.input_tangents, s.weight_tangents], s.seconds]
            results += [s.output_tangents, [*s.input_seconds, *s.p_seconds.values()]]
            exact = self.layouts["exact"] = place(names, calls, given, results)
        # Without a second derivative the backward sweep keeps nothing. What the forward sweep keeps lies in
        # the same places, because it is not known then whether there will be a second derivative.
        kept = None
        if derivatives == 2:
            kept = {key: at for key, at in exact.places.items() if at.block == "forward kept"}
        self.layouts["first order"] = place(names[:2], calls[:2], given[:2], results[:2], kept)
        # What is never alive at the same time has one size, so that one block serves it: the scratch of all
        # sweeps; and what the forward sweep of the validation batch and the tangent sweep of the training
        # batch keep.
        scratch = [f"{name} scratch" for name in names]
        for group in (scratch, ["forward kept", "tangent kept"]):
            most = max(layout.sizes.get(block, 0) for layout in self.layouts.values() for block in group)
            for layout in self.layouts.values():
                layout.sizes.update(dict.fromkeys(group, most))
        if s.training:
            self.gradient_order = s.gradient_order().to(blocks.device)
            self._find_statistics()

    def _find_statistics(self) -> None:
        s, order, unbiased, end = self.sweeps, [], [], 0
        for norm, of_batch in sorted(s.batch_statistics.items()):
            block, start = self.layouts["first order"].number(of_batch)
            if block != "forward kept":
                raise RuntimeError(f"the statistics of batch norm {norm} are not kept for the later sweeps")
            c, values = of_batch.shape[1], s.values[norm]
            end = max(end, start + 2 * c)
            order.append(torch.arange(start, start + 2 * c).view(2, c))
            unbiased.append(torch.full((c,), values / (values - 1), dtype=s.wide))
        # int64 [2, channels of all batch norms]: the places of their means and biased variances in what the
        # forward sweep keeps; how many numbers from its first on have them all; the unbiased variance of each
        # over its biased one
        self.statistics_order = torch.cat(order, dim=1).to(self.blocks.device)
        self.statistics_end = end
        self.unbiased = torch.cat(unbiased).to(self.blocks.device)

    def lease(self, layout: str, block: str) -> Lease:
        return Lease(self.blocks, self.layouts[layout].sizes[block])

    def bound(
        self, sweep: str, layout: str, leases: dict[str, Lease], of_weights: bool = True, of_x: bool = True
    ) -> "Bound":
        """A sweep on these blocks. Without `of_weights` the backward sweep leaves out the gradients of the
        weights; without `of_x` the second one all that only the second adjoint of x depends on."""
        blocks = {name: lease.block for name, lease in leases.items()}
        key = sweep, layout, of_weights, of_x, *map(id, blocks.values())
        if key not in self._bound:
            calls = self.sweeps.calls[sweep]
            if not of_weights:
                calls = [
                    call._replace(writes={**call.writes, "gradients": None})
                    if "gradients" in call.writes
                    else call
                    for call in calls
                ]
            if not of_x:
                calls = needed(calls, self.sweeps.p_seconds.values())
            self._bound[key] = Bound(self.backend, self.layouts[layout], blocks, calls)
        return self._bound[key]


class Bound:
    """A sweep on blocks: `run()` computes it, `at(t)` is the real tensor in the place of meta tensor `t`."""

    def __init__(self, backend: Backend, layout: Layout, blocks: dict[str, Tensor], calls: Sequence[Call]):
        self.at = Binding(layout, blocks)
        self.run = program(backend, [Call(*map(self.at, call)) for call in calls])


class Pass:
    """One forward pass and what follows from it. Its blocks are given back when nothing refers to it.

    `noise` is what the `Noise` operations give, see `cells`.
    """

    def __init__(self, plan: Plan, noise: Tensor | None = None):
        self.plan, self.noise = plan, noise
        self.leases = {"forward kept": plan.lease("first order", "forward kept")}
        # Between the tangent sweep and the second one: the autograd pass they are in, and the leases of both.
        self.pending: tuple[int, dict[str, Lease]] | None = None

    def forward(
        self,
        inputs: Sequence[Tensor],
        weights: Tensor,
        p: dict[int, Tensor],
        constants: Tensor | None = None,
        path_weights: Tensor | None = None,
    ) -> list[Tensor]:
        s, scratch = self.plan.sweeps, self.plan.lease("first order", "forward scratch")
        bound = self.plan.bound("forward", "first order", self.leases | {"forward scratch": scratch})
        self._inputs = [(x.shape, x.stride(), x.dtype) for x in inputs]
        self._p = [of_kind.shape for of_kind in p.values()]
        for slot, x in zip(s.inputs, inputs, strict=True):
            bound.at(slot).copy_(x)
        bound.at(s.weights).copy_(weights)
        for kind, of_kind in p.items():
            bound.at(s.p[kind]).view(of_kind.shape).copy_(of_kind)
        for given, value in ((s.constants, constants), (s.path_weights, path_weights)):
            if given is not None and value is not None:
                bound.at(given).copy_(value)
        if self.noise is not None:
            parts = self.noise.split([slot.numel() for slot in s.noise])
            for slot, part in zip(s.noise, parts, strict=True):
                bound.at(slot).movedim(2, -1).view(-1).copy_(part)
        bound.run()
        return [bound.at(y).detach() for y in s.outputs]  # tensors of their own: autograd hangs the graph on

    def statistics(self) -> Tensor:
        """The means and the unbiased variances of the batch, [2, channels of all batch norms]."""
        kept = self.leases["forward kept"].block
        kept, order = kept.view(self.plan.sweeps.wide), self.plan.statistics_order
        found = kept[: self.plan.statistics_end].index_select(0, order.flatten()).view(order.shape)
        found[1].mul_(self.plan.unbiased)
        return found

    def backward(
        self, adjoints: Sequence[Tensor | None], gradients: bool, exact: bool
    ) -> tuple[dict[str, Lease], list[Tensor], Tensor | None, list[Tensor]]:
        """Takes the adjoints of the outputs (None: zero). Returns the leases that the tangent sweep needs
        (with `exact`), the adjoints of the inputs, the gradient of the weights if it is wanted, and those of
        p."""
        plan, s = self.plan, self.plan.sweeps
        layout = "exact" if exact else "first order"
        kept = {"backward kept": plan.lease(layout, "backward kept")} if exact else {}
        leases = self.leases | kept
        scratch = {"backward scratch": plan.lease(layout, "backward scratch")}
        bound = plan.bound("backward", layout, leases | scratch, gradients)
        for slot, adjoint in zip(s.adjoints, adjoints, strict=True):
            _fill(bound.at(slot), adjoint)
        bound.run()
        of_weights = bound.at(s.gradients).index_select(0, plan.gradient_order) if gradients else None
        of_inputs = self._like_inputs(bound, s.input_adjoints)
        return leases, of_inputs, of_weights, self._like_p(bound, s.p_gradients)

    def tangent(self, leases: dict[str, Lease], x: Tensor | None, weights: Tensor | None) -> Tensor:
        """The tangent of the output, from those of x and the weights (None: zero)."""
        plan, s = self.plan, self.plan.sweeps
        leases = leases | {"tangent kept": plan.lease("exact", "tangent kept")}
        scratch = {"tangent scratch": plan.lease("exact", "tangent scratch")}
        bound = plan.bound("tangent", "exact", leases | scratch)
        _fill(bound.at(s.input_tangents[0]), x)
        _fill(bound.at(s.weight_tangents), weights)
        bound.run()
        self.pending = torch._C._current_graph_task_id(), leases
        return bound.at(s.output_tangents[0])

    def second(self, adjoint: Tensor | None, of_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The second adjoints of x, if it is wanted, and of p, from that of the output (None: zero)."""
        assert self.pending is not None  # the tangent sweep comes first
        plan, s, (_, leases) = self.plan, self.plan.sweeps, self.pending
        self.pending = None
        scratch = {"second scratch": plan.lease("exact", "second scratch")}
        bound = plan.bound("second", "exact", leases | scratch, of_x=of_x)
        _fill(bound.at(s.seconds[0]), adjoint)
        bound.run()
        of_inputs = self._like_inputs(bound, s.input_seconds) if of_x else [None]
        return of_inputs[0], self._like_p(bound, s.p_seconds)

    def _like_inputs(self, bound: Bound, adjoints: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.empty_strided(shape, stride, dtype=dtype, device=self.plan.blocks.device).copy_(
                bound.at(adjoint)
            )
            for (shape, stride, dtype), adjoint in zip(self._inputs, adjoints, strict=True)
        ]

    def _like_p(self, bound: Bound, by_kind: dict[int, Tensor]) -> list[Tensor]:
        """What the cells of each kind give, summed."""
        return [
            bound.at(of_cells).sum(0).view(shape)
            for of_cells, shape in zip(by_kind.values(), self._p, strict=True)
        ]


def _fill(slot: Tensor, value: Tensor | None) -> None:
    """With the value; None: with zeros."""
    slot.zero_() if value is None else slot.copy_(value)


def cells(
    plan: Plan,
    x: Tensor,
    weights: Tensor,
    p: dict[int, Tensor],
    constants: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Callable[[], Tensor] | None]:
    """The output of the last cell of a search.

    Differentiable once with respect to x, weights and p; and the gradients of x and weights once more with
    respect to x and p, along tangents of x and of the weights. (Their derivative with respect to the
    adjoint of the output is valid until the next pass.)

    Args:
        plan: with `derivatives` 2, or 0 in evaluation.
        x: [N, C, H, W] in the plan's dtype; the first cell reads it twice.
        weights: all weights of the cells, in a row: float64 for float64 x, else float32.
        p: by kind of cell, the probabilities of its candidates, of the weights' type; in any shape. A kind
            that no cell is of is left out.
        constants: in evaluation, what the batch norms normalise by: [3, channels of all batch norms]. Then
            nothing is differentiated.
        noise: what the cells' `Noise` operations give, in a row: in the order of the cells and of their
            edges, each as [N, H, W, C].

    Returns:
        [N, nodes * C, H, W], channels-last, valid as long as its graph; and in training a function that gives
        the means and the unbiased variances of the batch, [2, channels of all batch norms], as long.

    Raises:
        RuntimeError: when another derivative is asked for.
    """
    current = Pass(plan, noise)
    p = {kind: p[kind] for kind in plan.sweeps.p}  # gradients are returned in this order
    if not plan.sweeps.training:
        return _evaluated(current, [x], weights, p, constants, None)[0], None
    x, weights = with_node(x), with_node(weights)
    output, _ = _Cells.apply(current, tuple(p), x, weights, *p.values())
    return output, current.statistics


def derived_cells(
    plan: Plan,
    inputs: Sequence[Tensor],
    weights: Tensor,
    constants: Tensor | None = None,
    path_weights: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[list[Tensor], Callable[[], Tensor] | None]:
    """The outputs that the plan names, of cells of a genotype.

    Differentiable once with respect to the inputs and the weights.

    Args:
        plan: with `derivatives` 1, or 0 in evaluation.
        inputs: one or two [N, C, H, W] in the plan's dtype: what the first cell reads.
        weights, constants, noise, and what is returned: as in `cells`.
        path_weights: with drop path, [edges of all cells, N]: what each operation of each image is multiplied
            by. That of an identity is 1.

    Raises:
        RuntimeError: when another derivative is asked for.
    """
    current = Pass(plan, noise)
    if not plan.sweeps.training:
        return _evaluated(current, inputs, weights, {}, constants, path_weights), None
    outputs = _DerivedCells.apply(current, path_weights, weights, *inputs)
    return list(outputs), current.statistics


def _evaluated(
    current: Pass,
    inputs: Sequence[Tensor],
    weights: Tensor,
    p: dict[int, Tensor],
    constants: Tensor | None,
    path_weights: Tensor | None,
) -> list[Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, weights, *p.values())):
        raise RuntimeError("fused cells are differentiated in training mode only: use torch.no_grad()")
    return [y.clone() for y in current.forward(inputs, weights, p, constants, path_weights)]


class _DerivedCells(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, current: Pass, path_weights: Tensor | None, weights: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.current = current
        ctx.set_materialize_grads(False)
        return tuple(current.forward(inputs, weights, {}, path_weights=path_weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        _, of_inputs, of_weights, _ = ctx.current.backward(adjoints, gradients=True, exact=False)
        return None, None, of_weights, *of_inputs


class _Cells(torch.autograd.Function):
    """Returns beside the output an empty tensor, which `_CellsBackward` takes and for which its backward, the
    tangent sweep, returns a gradient. It is there for the order alone: autograd calls `backward` here behind
    the tangent sweep, in every pass that runs one."""

    @staticmethod
    def forward(
        ctx: Any, current: Pass, kinds: tuple[int, ...], x: Tensor, weights: Tensor, *p: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.current = current
        ctx.set_materialize_grads(False)
        token = x.new_empty(0)
        ctx.save_for_backward(token)
        (output,) = current.forward([x], weights, dict(zip(kinds, p, strict=True)))
        return output, token

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        current, of_weights = ctx.current, wanted(ctx.next_functions[1:2])
        if current.pending and current.pending[0] == torch._C._current_graph_task_id():
            if of_weights:
                refuse_second_derivative("its weights")
            x, p = current.second(adjoint, wanted(ctx.next_functions[:1]))
            return None, None, x, None, *p
        (token,) = ctx.saved_tensors
        return None, None, *_CellsBackward.apply(current, of_weights, torch.is_grad_enabled(), token, adjoint)


class _CellsBackward(torch.autograd.Function):
    """The backward sweep. Its own backward is the tangent sweep."""

    @staticmethod
    def forward(
        ctx: Any, current: Pass, gradients: bool, exact: bool, token: Tensor, adjoint: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.current = current
        ctx.set_materialize_grads(False)
        leases, (x,), weights, p = current.backward([adjoint], gradients, exact)
        ctx.leases = leases if exact else None
        return x, weights, *p

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, x: Tensor | None, weights: Tensor | None, *p: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(of_kind is not None for of_kind in p):
            refuse_second_derivative("the gradients of its alphas")
        current = ctx.current
        if current.pending and current.pending[0] == torch._C._current_graph_task_id():
            refuse_second_derivative("two of its backward passes at once")
        output = current.tangent(ctx.leases, x, weights)
        return None, None, None, output.new_empty(0), output
