"""Cells as data, lowered to the calls of their four sweeps.

A network is a tuple of `Cell`s, each of which reads the outputs of the two cells before it. `Sweeps` turns it
into four lists of calls of a backend's functions (types.Backend) on meta tensors, which stand for the buffers
that plan.py places in memory:

    forward     x     activations
    backward    X     adjoints, and the gradients of weights and p
    tangent     xd    derivatives of the activations along v
    second      Xd    derivatives of the adjoints along v, and those of the gradients of p

To be read beside docs/mathematics.md. Every class below is a part of a cell; its methods are its part of each
sweep. The forward sweep is its constructor.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from darts_fast.kernels.plan import Recorder
from darts_fast.kernels.types import (
    Call,
    Reader,
    SecondReader,
    Source,
    Task,
    Weights,
    accumulator,
    images,
    refuse_odd_size,
    refuse_single_value,
)

# A cell as data


class Parameter(NamedTuple):
    """A weight's place in the tensor that holds all weights of the cells."""

    offset: int
    shape: tuple[int, ...]


class Half(NamedTuple):
    """ReLU, depthwise convolution (None: there is none), pointwise convolution, batch norm."""

    depthwise: Parameter | None
    pointwise: Parameter
    norm: int  # number of its batch norm, as of all that follow
    stride: int = 1
    dilation: int = 1


class Convolution(NamedTuple):
    """A separable convolution (two halves), a dilated one, or a 1x1 convolution (one half)."""

    halves: tuple[Half, ...]


class FactorizedReduce(NamedTuple):
    """ReLU, two 1x1 convolutions of stride 2 that start a pixel apart, side by side; batch norm."""

    pointwise: tuple[Parameter, Parameter]
    norm: int


class Pool(NamedTuple):
    """3x3 max (0) or average (1) pool, batch norm."""

    kind: int
    norm: int


class Identity(NamedTuple):
    """The skip connection of stride 1."""


Operation = Convolution | FactorizedReduce | Pool | Identity


class Edge(NamedTuple):
    """From a state to a node, with the candidate operations that p weighs (`none` is not among them)."""

    source: int
    node: int
    stride: int
    operations: tuple[Operation, ...]


class Cell(NamedTuple):
    """Two preprocessed states and nodes behind them; state 2 + n is node n.

    Edges are in the order of their nodes. p of a cell is one vector: its edges one after the other, each with
    its candidates.
    """

    channels: int
    preprocessing: tuple[Convolution | FactorizedReduce, Convolution | FactorizedReduce]
    edges: tuple[Edge, ...]
    nodes: int
    kind: int  # 0 (normal) or 1 (reduction): cells of a kind are weighed by one vector p

    def stride(self, state: int) -> int:
        """That of the edges which leave the state: they share what they compute of it."""
        (found,) = {edge.stride for edge in self.edges if edge.source == state}
        return found


# A network's sweeps


class Sweeps:
    """The four sweeps of a network's cells, on meta tensors.

    Args:
        cells: at least one.
        shape: of x [N, C, H, W], which the first cell reads twice.
        dtype: of the activations.
        parameters: numbers in all weights of the cells.
        norms: channels of each batch norm, by its number.
        training: normalise by the batch. Else by constants, and there is the forward sweep alone.

    Raises:
        ValueError: sizes that cannot be halved, or a single value a channel, which has no variance.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        shape: Sequence[int],
        dtype: torch.dtype,
        parameters: int,
        norms: Sequence[int],
        training: bool,
    ):
        self.training, self.dtype, self.wide = training, dtype, accumulator(dtype)
        self.calls: dict[str, list[Call]] = {}
        self.batch_statistics: dict[int, Tensor] = {}  # [3, C] by number of the batch norm, of this pass
        self.values: dict[int, int] = {}  # images times pixels that these are of
        self._gradient_parts: list[tuple[int, Parameter]] = []  # where a gradient lies in `gradients`
        self._gradient_size = 0
        lengths = {cell.kind: sum(len(edge.operations) for edge in cell.edges) for cell in cells}

        with self._sweep("forward"):
            self.x = images(1, shape, dtype, "meta")[0]
            self.weights = self.numbers(parameters)
            self.p = {kind: self.numbers(length) for kind, length in lengths.items()}
            self.constants = None if training else self.numbers(3, sum(norms))
            self._norms = [slice(sum(norms[:i]), sum(norms[: i + 1])) for i in range(len(norms))]
            cells_of = {kind: sum(cell.kind == kind for cell in cells) for kind in lengths}
            self.p_gradients = {kind: self.numbers(cells_of[kind], n) for kind, n in lengths.items()}
            self.p_seconds = {kind: self.numbers(cells_of[kind], n) for kind, n in lengths.items()}
            rows = dict.fromkeys(lengths, 0)
            outputs = [Image(self.x)] * 2
            self._cells: list[LoweredCell] = []
            for cell in cells:
                lowered = LoweredCell(self, cell, outputs[-2:], rows[cell.kind])
                self._cells.append(lowered)
                outputs.append(lowered.output)
                rows[cell.kind] += 1
            self._outputs = outputs[1:]  # x, then each cell's
            self.output = outputs[-1].y
        if training:
            self._differentiate()

    def _differentiate(self) -> None:
        self.gradients = self.numbers(self._gradient_size)
        with self._sweep("backward"):
            self.adjoint = self.like(self.output)
            self.x_adjoint = self._backward(self.adjoint, second=False)
        with self._sweep("tangent"):
            self.x_tangent, self.weight_tangents = self.like(self.x), self.numbers(self.weights.numel())
            self._outputs[0].tangent = self.x_tangent
            for cell in self._cells:
                cell.tangent()
            self.output_tangent = self._outputs[-1].tangent
        with self._sweep("second"):
            self.second = self.like(self.output)
            self.x_second = self._backward(self.second, second=True)

    def _backward(self, adjoint: Tensor, second: bool) -> Tensor:
        """The cells in reverse. A cell's output is read by the next two, whose adjoints of it are summed."""
        terms: dict[int, list[Tensor]] = {i: [] for i in range(len(self._outputs))}
        terms[len(self._cells)].append(adjoint)
        for i in reversed(range(len(self._cells))):
            before_previous, previous = self._cells[i].backward(self.sum(terms.pop(i + 1)), second)
            terms[max(i - 1, 0)].append(before_previous)
            terms[i].append(previous)
        return self.sum(terms.pop(0))

    @contextmanager
    def _sweep(self, name: str) -> Iterator[None]:
        self.k = Recorder()
        yield
        self.calls[name] = self.k.calls

    # What the parts make their tensors with

    def numbers(self, *shape: int) -> Tensor:
        """Uninitialised sums, statistics or weights."""
        return torch.empty(shape, dtype=self.wide, device="meta")

    def images(self, entries: int, shape: Sequence[int]) -> Tensor:
        return images(entries, shape, self.dtype, "meta")

    def like(self, x: Tensor) -> Tensor:
        return self.images(1, x.shape)[0]

    def sum(self, terms: Sequence[Tensor]) -> Tensor:
        if len(terms) == 1:
            return terms[0]
        out = self.like(terms[0])
        self.k.add(tuple(terms), out=out)
        return out

    def parameter(self, p: Parameter | None, of: Tensor) -> Tensor | None:
        """That weight of all weights, or of all tangents."""
        return None if p is None else of[p.offset : p.offset + math.prod(p.shape)].view(p.shape)

    def statistics(self, norm: int, of_batch: Tensor | None, values: int) -> Tensor:
        """What a batch norm normalises by, [3, C]; `values` is how many values a channel has."""
        if not self.training:
            return self.constants[:, self._norms[norm]]
        refuse_single_value(values)
        self.batch_statistics[norm], self.values[norm] = of_batch, values
        return of_batch

    def place_gradients(self, tasks: Sequence["HalfTask"]) -> tuple[int, tuple[int, int]]:
        """Where the gradients of a call's weights go: first number, shape."""
        k, c = tasks[0].pointwise.shape[:2]
        taps = max(1 if task.depthwise is None else math.prod(task.depthwise.shape[2:]) for task in tasks)
        start, row = self._gradient_size, c * (k + taps)
        for i, task in enumerate(tasks):
            self._gradient_parts.append((start + i * row, task.pointwise))
            if task.depthwise is not None:
                self._gradient_parts.append((start + i * row + k * c, task.depthwise))
        # A multiple of 16 bytes: every call's gradients are as aligned as the first's.
        self._gradient_size = start + -(-len(tasks) * row // 4) * 4
        return start, (len(tasks), row)

    def gradient_order(self) -> Tensor:
        """int64 [parameters]: gradients[order] is the gradient of the weights."""
        if sum(math.prod(p.shape) for _, p in self._gradient_parts) != self.weights.numel():
            raise ValueError("there are weights that no operation of the cells has, or several")
        found = torch.empty(self.weights.numel(), dtype=torch.int64)
        for start, p in self._gradient_parts:
            size = math.prod(p.shape)
            found[p.offset : p.offset + size] = torch.arange(start, start + size)
        return found


# The parts of a cell


class Image:
    """A tensor of a cell, its tangent, and the parts that read it as a candidate or normalise it on load,
    each with its number there. They hand back the adjoint of what they read, see `types.Reader`."""

    def __init__(self, y: Tensor, statistics: Tensor | None = None):
        self.y, self.statistics = y, statistics
        self.tangent: Tensor | None = None
        self.readers: list[tuple[Mix | Halves | Norms, int]] = []

    def source(self) -> Source:
        return Source(self.y, self.statistics)

    def first(self) -> tuple[Reader, ...]:
        return tuple(
            Reader(self.y, self.statistics, i, part.adjoints[i], part.sums, part.p)
            for part, i in self.readers
        )

    def tangent_sums(self) -> tuple[Tensor, ...]:
        """Of each reader, [3, C]: the sums of the tangent that it needs, and that its writer takes."""
        return tuple(part.tangent_sums[:, i] for part, i in self.readers)

    def second(self) -> tuple[SecondReader, ...]:
        return tuple(
            SecondReader(first, self.tangent, part.tangent_sums, part.seconds[i], part.second_sums)
            for first, (part, i) in zip(self.first(), self.readers, strict=True)
        )


class HalfTask(NamedTuple):
    """A `types.Task` before its weights are tensors."""

    source: int
    depthwise: Parameter | None
    pointwise: Parameter
    stride: int = 1
    dilation: int = 1
    offset: int = 0


def tasks_of(part: Half | FactorizedReduce, source: int) -> list[HalfTask]:
    if isinstance(part, FactorizedReduce):
        return [HalfTask(source, None, p, 2, 1, offset) for offset, p in enumerate(part.pointwise)]
    return [HalfTask(source, part.depthwise, part.pointwise, part.stride, part.dilation)]


class Halves:
    """One call of halves of separable convolutions, 1x1 convolutions or factorized reduces, all of one stride
    and one number of output channels.

    y = P (D * relu(h)) of each; h is an input, or its batch norm.
    """

    p = None  # as a reader of its inputs

    def __init__(
        self, s: Sweeps, inputs: Sequence[Image], parts: Sequence[tuple[int, Half | FactorizedReduce]]
    ):
        """`parts` are each with the number of the input that it reads."""
        self.s, self.inputs = s, inputs
        specs = [tasks_of(part, source) for source, part in parts]
        flat = [spec for of_part in specs for spec in of_part]
        n, _, height, width = inputs[0].y.shape
        stride = flat[0].stride
        if flat[0].depthwise is None:
            refuse_odd_size(height, width, stride)
        shape = n, len(specs[0]) * flat[0].pointwise.shape[0], -(-height // stride), -(-width // stride)
        self.specs = flat
        self.sources = tuple(image.source() for image in inputs)
        self.tasks = tuple(
            Task(
                spec.source,
                Weights(s.parameter(spec.depthwise, s.weights), s.parameter(spec.pointwise, s.weights)),
                spec.stride,
                spec.dilation,
                spec.offset,
            )
            for spec in flat
        )
        self.normalised = inputs[0].statistics is not None
        y = s.images(len(parts), shape)
        statistics = s.numbers(len(parts), 3, shape[1]) if s.training else None
        s.k.sepconv_forward(self.sources, self.tasks, y=y, statistics=statistics)
        values = n * shape[2] * shape[3]
        self.outputs = [
            Image(y[i], s.statistics(part.norm, statistics[i] if s.training else None, values))
            for i, (_, part) in enumerate(parts)
        ]
        self.gradients_at = s.place_gradients(flat)
        if self.normalised:
            for i, image in enumerate(inputs):
                image.readers.append((self, i))

    def _adjoint_and_sums(self) -> tuple[Tensor, Tensor | None]:
        return self.s.images(len(self.inputs), self.inputs[0].y.shape), self._sums(2)

    def _sums(self, rows: int) -> Tensor | None:
        c = self.inputs[0].y.shape[1]
        return self.s.numbers(rows, len(self.inputs), c) if self.normalised else None

    def backward(self) -> Tensor:
        """H of each input, [inputs, N, C, H, W]."""
        s, (start, shape) = self.s, self.gradients_at
        self.adjoints, self.sums = self._adjoint_and_sums()
        self.tangent_sums = self._sums(3)
        s.k.sepconv_backward(
            self.sources,
            self.tasks,
            tuple(image.first()[0] for image in self.outputs),
            adjoint=self.adjoints,
            sums=self.sums,
            gradients=s.gradients[start : start + math.prod(shape)].view(shape),
        )
        return self.adjoints

    def tangent(self) -> None:
        s = self.s
        self.weight_tangents = tuple(
            Weights(
                s.parameter(spec.depthwise, s.weight_tangents), s.parameter(spec.pointwise, s.weight_tangents)
            )
            for spec in self.specs
        )
        y = s.images(len(self.outputs), self.outputs[0].y.shape)
        s.k.sepconv_tangent(
            self.sources,
            self.tasks,
            tuple(image.tangent for image in self.inputs),
            self.tangent_sums,
            self.weight_tangents,
            tuple(image.first()[0] for image in self.outputs),
            y=y,
            sums=tuple(image.tangent_sums()[0] for image in self.outputs),
        )
        for image, tangent in zip(self.outputs, y, strict=True):
            image.tangent = tangent

    def second(self) -> Tensor:
        """Hd of each input."""
        self.seconds, self.second_sums = self._adjoint_and_sums()
        self.s.k.sepconv_second(
            self.sources,
            self.tasks,
            self.weight_tangents,
            tuple(image.second()[0] for image in self.outputs),
            adjoint=self.seconds,
            sums=self.second_sums,
        )
        return self.seconds


class Norms:
    """Batch norms of several images alike, each by itself: what preprocessing ends in."""

    p = None

    def __init__(self, s: Sweeps, inputs: Sequence[Image]):
        self.s, self.inputs = s, inputs
        self.sources = tuple(image.source() for image in inputs)
        self.shape = inputs[0].y.shape
        out = s.images(len(inputs), self.shape)
        s.k.norm_forward(self.sources, out=out)
        self.outputs = [Image(y) for y in out]
        for i, image in enumerate(inputs):
            image.readers.append((self, i))

    def backward(self, adjoints: Sequence[Tensor]) -> None:
        self.adjoints = tuple(adjoints)
        self.sums, self.tangent_sums = (self.s.numbers(n, len(self.inputs), self.shape[1]) for n in (2, 3))
        self.s.k.norm_backward(self.sources, self.adjoints, sums=self.sums)

    def tangent(self) -> None:
        out = self.s.images(len(self.inputs), self.shape)
        tangents = tuple(image.tangent for image in self.inputs)
        self.s.k.norm_tangent(self.sources, tangents, self.tangent_sums, out=out)
        for image, tangent in zip(self.outputs, out, strict=True):
            image.tangent = tangent

    def second(self, seconds: Sequence[Tensor]) -> None:
        self.seconds, self.second_sums = tuple(seconds), self.s.numbers(2, len(self.inputs), self.shape[1])
        self.s.k.norm_backward(self.sources, self.seconds, sums=self.second_sums)


class Mix:
    """A node: o = sum over the candidates k of all its edges of p_k h_k (the paper's equations 1 and 2)."""

    def __init__(
        self, s: Sweeps, candidates: Sequence[Image], slot: Tensor, own: bool, p: Tensor, *gradients: Tensor
    ):
        """`slot` is the node's slice of the cell's output; `own`: it is read by other nodes, and is written
        by itself, too. (A stencil on slices of 16 channels of 2 bytes in rows of 64 would touch 16 cache
        lines a load of a warp, in place of 4.) `gradients`: those of p in both backward sweeps."""
        self.s, self.candidates, self.p, self.gradients = s, candidates, p, gradients
        self.sources = tuple(image.source() for image in candidates)
        self.own = own
        outs = (s.like(slot), slot) if own else (slot,)
        s.k.mix_forward(self.sources, p, outs=outs)
        self.output = Image(outs[0])
        for i, image in enumerate(candidates):
            image.readers.append((self, i))

    def backward(self, adjoint: Tensor) -> None:
        count, c = len(self.candidates), adjoint.shape[1]
        self.adjoints = (adjoint,) * count
        self.sums, self.tangent_sums = self.s.numbers(2, count, c), self.s.numbers(3, count, c)
        self.s.k.mix_backward(self.sources, adjoint, sums=self.sums, weight_gradient=self.gradients[0])

    def tangent(self, slot: Tensor) -> None:
        s = self.s
        outs = (s.like(slot), slot) if self.own else (slot,)
        self.products = s.numbers(len(self.candidates), slot.shape[1])
        s.k.mix_tangent(
            self.sources,
            self.p,
            tuple(image.tangent for image in self.candidates),
            self.tangent_sums,
            self.adjoints[0],
            outs=outs,
            products=self.products,
        )
        self.output.tangent = outs[0]

    def second(self, second: Tensor) -> None:
        count = len(self.candidates)
        self.seconds, self.second_sums = (second,) * count, self.s.numbers(2, count, second.shape[1])
        self.s.k.mix_second(
            self.sources,
            second,
            self.sums,
            self.tangent_sums,
            self.products,
            sums=self.second_sums,
            weight_gradient=self.gradients[1],
        )


class Stage:
    """Everything that the edges which leave one state compute of it, each thing once: both pools, the
    identity, factorized reduces, and all convolutions, in a few calls."""

    def __init__(self, s: Sweeps, state: Image, stride: int, edges: dict[int, Edge]):
        self.s, self.state, self.stride = s, state, stride
        self.candidates: dict[tuple[int, int], Image] = {}  # by edge and number of the operation
        operations = {(e, i): op for e, edge in edges.items() for i, op in enumerate(edge.operations)}
        self.fanned: list[Image] = []  # what several nodes read: pools, the identity
        self._pools({key: op for key, op in operations.items() if isinstance(op, Pool)})
        identities = [key for key, op in operations.items() if isinstance(op, Identity)]
        self.identity = Image(state.y) if identities else None
        if self.identity:
            self.fanned.append(self.identity)
            self.candidates |= dict.fromkeys(identities, self.identity)
        reduces = {key: op for key, op in operations.items() if isinstance(op, FactorizedReduce)}
        self.halves: list[Halves] = []
        if reduces:
            self._add([state], {key: (0, op) for key, op in reduces.items()})
        parts = {key: op.halves for key, op in operations.items() if isinstance(op, Convolution)}
        if parts:
            self._add([state], {key: (0, halves[0]) for key, halves in parts.items()})
        twice = {key: halves for key, halves in parts.items() if len(halves) > 1}
        if twice:
            inputs = [self.candidates[key] for key in twice]
            self._add(inputs, {key: (i, halves[1]) for i, (key, halves) in enumerate(twice.items())})

    def _pools(self, pools: dict[tuple[int, int], Pool]) -> None:
        self.position = None
        if not pools:
            return
        s, (n, c, height, width) = self.s, self.state.y.shape
        self.pooled = n, c, -(-height // self.stride), -(-width // self.stride)
        both = s.images(2, self.pooled)
        self.position = images(1, self.pooled, torch.uint8, "meta")[0]
        statistics = s.numbers(2, 3, c) if s.training else None
        s.k.pool_forward(self.state.y, self.stride, pools=both, position=self.position, statistics=statistics)
        if s.training:
            self.fanned += [Image(y, of_y) for y, of_y in zip(both, statistics, strict=True)]
        for key, op in pools.items():
            # In training a pool is normalised alike on every edge; in evaluation each edge has statistics.
            of_batch = statistics[op.kind] if s.training else None
            found = s.statistics(op.norm, of_batch, n * self.pooled[2] * self.pooled[3])
            self.candidates[key] = self.fanned[op.kind] if s.training else Image(both[op.kind], found)

    def _add(
        self, inputs: Sequence[Image], parts: dict[tuple[int, int], tuple[int, Half | FactorizedReduce]]
    ) -> None:
        halves = Halves(self.s, inputs, list(parts.values()))
        self.halves.append(halves)
        self.candidates |= zip(parts, halves.outputs, strict=True)

    def backward(self, terms: list[Tensor], second: bool) -> Tensor:
        """The adjoint of the state, or the second one; `terms` are added to it."""
        s = self.s
        for halves in reversed(self.halves):
            adjoints = halves.second() if second else halves.backward()
            if halves.inputs[0] is self.state:
                terms.append(adjoints[0])
        if not self.fanned:
            return s.sum(terms)
        out = s.images(len(self.fanned), self.fanned[0].y.shape)
        sources = tuple(image.source() for image in self.fanned)
        if second:
            s.k.fan_out_second(sources, tuple(image.second() for image in self.fanned), out=out)
        else:
            s.k.fan_out_backward(sources, tuple(image.first() for image in self.fanned), out=out)
        if self.identity:
            terms.append(out[-1])
        if self.position is None:
            return s.sum(terms)
        found = s.like(self.state.y)
        s.k.pool_backward(self.position, self.stride, out[:2], tuple(terms), out=found)
        return found

    def tangent(self) -> None:
        s = self.s
        if self.position is not None:
            pools, images = s.images(2, self.pooled), self.fanned[:2]
            s.k.pool_tangent(
                self.state.tangent,
                self.position,
                self.stride,
                tuple(image.first() for image in images),
                pools=pools,
                sums=tuple(image.tangent_sums() for image in images),
            )
            for image, tangent in zip(images, pools, strict=True):
                image.tangent = tangent
        if self.identity:
            self.identity.tangent = self.state.tangent
        for halves in self.halves:
            halves.tangent()


class LoweredCell:
    """A cell in its four sweeps."""

    def __init__(self, s: Sweeps, cell: Cell, inputs: Sequence[Image], row: int):
        """`inputs` are the outputs of the two cells before; `row` is the cell's in the gradients of p."""
        self.s, self.cell, self.inputs = s, cell, inputs
        self._preprocess()
        states = [image for norms in self.norms for image in norms.outputs]
        n, c, height, width = self._node_shape(states)
        self.output = Image(s.images(1, (n, cell.nodes * c, height, width))[0])
        self.stages: dict[int, Stage] = {}
        self.nodes: list[Mix] = []
        candidates: dict[int, list[Image]] = {}  # by edge
        start = 0
        for state in range(2 + cell.nodes):
            if state >= 2:
                node = state - 2
                mixed = [
                    image for e, edge in enumerate(cell.edges) if edge.node == node for image in candidates[e]
                ]
                p, *gradients = (
                    of_p[start : start + len(mixed)]
                    for of_p in (
                        s.p[cell.kind],
                        s.p_gradients[cell.kind][row],
                        s.p_seconds[cell.kind][row],
                    )
                )
                start += len(mixed)
                own = any(edge.source == state for edge in cell.edges)
                self.nodes.append(Mix(s, mixed, self._slot(self.output.y, node), own, p, *gradients))
                states.append(self.nodes[-1].output)
            edges = {e: edge for e, edge in enumerate(cell.edges) if edge.source == state}
            if edges:
                self.stages[state] = stage = Stage(s, states[state], cell.stride(state), edges)
                for e, edge in edges.items():
                    candidates[e] = [stage.candidates[e, i] for i in range(len(edge.operations))]
        self.states = states

    def _preprocess(self) -> None:
        """In one call for both inputs where they have one shape and 1x1 convolutions preprocess them."""
        s, parts = self.s, self.cell.preprocessing
        alike = self.inputs[0].y.shape == self.inputs[1].y.shape and all(
            isinstance(part, Convolution) for part in parts
        )
        halves = [part.halves[0] if isinstance(part, Convolution) else part for part in parts]
        if alike:
            self.preprocessing = [Halves(s, self.inputs, list(enumerate(halves)))]
        else:
            self.preprocessing = [
                Halves(s, [image], [(0, part)]) for image, part in zip(self.inputs, halves, strict=True)
            ]
        self.norms = [Norms(s, halves.outputs) for halves in self.preprocessing]

    def _node_shape(self, states: Sequence[Image]) -> tuple[int, int, int, int]:
        n, _, height, width = states[0].y.shape
        stride = self.cell.stride(0)
        return n, self.cell.channels, -(-height // stride), -(-width // stride)

    def _slot(self, whole: Tensor, node: int) -> Tensor:
        c = self.cell.channels
        return whole[:, node * c : (node + 1) * c]

    def backward(self, adjoint: Tensor, second: bool) -> list[Tensor]:
        """The adjoints of both inputs, or the second ones, from that of the output."""
        of_states: list[Tensor] = []
        for state in reversed(range(len(self.states))):
            terms = [self._slot(adjoint, state - 2)] if state >= 2 else []
            if state in self.stages:
                found = self.stages[state].backward(terms, second)
            else:
                (found,) = terms
            if state < 2:
                of_states.insert(0, found)
            elif second:
                self.nodes[state - 2].second(found)
            else:
                self.nodes[state - 2].backward(found)
        of_inputs: list[Tensor] = []
        for halves, norms in zip(self.preprocessing, self.norms, strict=True):
            given, of_states = of_states[: len(norms.inputs)], of_states[len(norms.inputs) :]
            if second:
                norms.second(given)
                of_inputs += halves.second().unbind()
            else:
                norms.backward(given)
                of_inputs += halves.backward().unbind()
        return of_inputs

    def tangent(self) -> None:
        for halves, norms in zip(self.preprocessing, self.norms, strict=True):
            halves.tangent()
            norms.tangent()
        self.output.tangent = self.s.like(self.output.y)
        for state in range(len(self.states)):
            if state >= 2:
                self.nodes[state - 2].tangent(self._slot(self.output.tangent, state - 2))
            if state in self.stages:
                self.stages[state].tangent()
