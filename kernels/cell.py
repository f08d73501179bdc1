"""Cells as data, lowered to the calls of their four sweeps.

A network is a tuple of `Cell`s, each of which reads the outputs of the two cells before it. `Sweeps` turns it
into four lists of calls of a backend's functions (types.Backend) on meta tensors, which stand for the buffers
that plan.py places in memory:

    forward     x     activations
    backward    X     adjoints, and the gradients of weights and p
    tangent     xd    derivatives of the activations along v
    second      Xd    derivatives of the adjoints along v, and those of the gradients of p

The cells of a search are weighed by p; those of a genotype have one operation an edge, batch norms with gamma
and beta, and the first two sweeps alone.

To be read beside docs/mathematics.md. Every class below is a part of a cell; its methods are its part of each
sweep. The forward sweep is its constructor.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
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

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Norm(NamedTuple):
    """A batch norm."""

    number: int  # among all batch norms of the network
    affine: Parameter | None = None  # [2, C]: gamma, beta


class Half(NamedTuple):
    """ReLU, depthwise convolution (None: there is none), pointwise convolution, batch norm."""

    depthwise: Parameter | None
    pointwise: Parameter
    norm: Norm
    stride: int = 1
    dilation: int = 1
    offset: int = 0  # without a depthwise convolution, of the first pixel that is read


class Convolution(NamedTuple):
    """A separable convolution (two halves), a dilated one, or a 1x1 convolution (one half)."""

    halves: tuple[Half, ...]


class FactorizedReduce(NamedTuple):
    """ReLU, two 1x1 convolutions of stride 2 that start a pixel apart, side by side; batch norm."""

    pointwise: tuple[Parameter, Parameter]
    norm: Norm

    @property
    def halves(self) -> tuple[Half, ...]:
        return tuple(Half(None, p, self.norm, 2, offset=offset) for offset, p in enumerate(self.pointwise))


class FactorizedConvolution(NamedTuple):
    """ReLU, a 1 x k convolution that strides over columns, a k x 1 one that strides over rows; batch norm."""

    weights: tuple[Parameter, Parameter]  # [C, C, 1, k], [C, C, k, 1]
    norm: Norm
    stride: int = 1


class Pool(NamedTuple):
    """3x3 max (0) or average (1) pool, batch norm (None: there is none)."""

    kind: int
    norm: Norm | None


class Identity(NamedTuple):
    """The skip connection of stride 1, which drop path never drops."""


class Noise(NamedTuple):
    """Numbers that are drawn before the sweeps and given to them. They depend on nothing: they have a
    tangent of zero, and nobody takes their adjoint."""


Operation = Convolution | FactorizedReduce | FactorizedConvolution | Pool | Identity | Noise


class Edge(NamedTuple):
    """An edge from a state to a node, with its operations (`none` is not among them)."""

    source: int
    node: int
    stride: int
    operations: tuple[Operation, ...]


class Cell(NamedTuple):
    """Two preprocessed states and nodes behind them; state 2 + n is node n.

    Edges are in the order of their nodes. p of a cell is one vector: its edges one after the other, each with
    its operations; with partial channels (arXiv 1907.05737) behind them one number an edge, the weight of the
    channels that pass by its operations.
    """

    channels: int
    preprocessing: tuple[Convolution | FactorizedReduce, Convolution | FactorizedReduce]
    edges: tuple[Edge, ...]
    concat: tuple[int, ...]  # the states that are the output, side by side: nodes
    # 0 (normal) or 1 (reduction): the cells of a kind are weighed by one vector p. None: not weighed
    kind: int | None = None
    # K: the operations of an edge read the first channels / K of its source, the others pass them by, and the
    # channels of every node are shuffled with K groups. 1: the operations read all, and nothing is shuffled
    partial_channels: int = 1

    @property
    def weights(self) -> int:
        """Numbers in p."""
        passing = len(self.edges) if self.partial_channels > 1 else 0
        return sum(len(edge.operations) for edge in self.edges) + passing

    @property
    def nodes(self) -> int:
        return 1 + max(edge.node for edge in self.edges)

    def stride(self, state: int) -> int:
        """The stride of the edges that leave the state. It is one, because they share what they compute of
        the state."""
        (found,) = {edge.stride for edge in self.edges if edge.source == state}
        return found


# A network's sweeps


class Sweeps:
    """The sweeps of a network's cells, on meta tensors.

    Args:
        cells: at least one.
        shapes: [N, C, H, W] of what the first cell reads: of one tensor, which it reads twice, or of two.
        dtype: of the activations.
        parameters: numbers in all weights of the cells.
        norms: channels of each batch norm, by its number.
        derivatives: 2 for all sweeps, 1 for the first two; 0 for the forward sweep of an evaluation, which
            normalises by constants. Else batch norms normalise by the batch.
        drop_path: every operation but the identity has a weight for each image.
        outputs: the numbers of the cells whose outputs are wanted; None: of the last.

    Raises:
        ValueError: sizes that cannot be halved, or a single value a channel, which has no variance.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        parameters: int,
        norms: Sequence[int],
        derivatives: int,
        drop_path: bool = False,
        outputs: Sequence[int] | None = None,
    ):
        self.derivatives, self.dtype, self.wide = derivatives, dtype, accumulator(dtype)
        self.training = derivatives > 0
        self.calls: dict[str, list[Call]] = {}
        self.batch_statistics: dict[int, Tensor] = {}  # [3, C] by number of the batch norm, of this pass
        self.values: dict[int, int] = {}  # by the same: images times pixels, of which they are
        # First numbers in `gradients`, each with the weight whose gradient begins there
        self._gradient_parts: list[tuple[int, Parameter]] = []
        self._gradient_size = 0  # numbers in `gradients`
        lengths = {cell.kind: cell.weights for cell in cells if cell.kind is not None}

        with self._sweep("forward"):
            self.inputs = [self.image(shape) for shape in shapes]
            self.weights = self.numbers(parameters)
            self.p = {kind: self.numbers(length) for kind, length in lengths.items()}
            # A row an edge, those of the first cell first. A row is a multiple of 64 bytes, so that no kernel
            # in Triton is compiled anew for another number of images.
            edges, n = sum(len(cell.edges) for cell in cells), shapes[0][0]
            self.path_weights = self.numbers(edges, -(-n // 16) * 16)[:, :n] if drop_path else None
            self.constants = None if self.training else self.numbers(3, sum(norms))
            self.noise: list[Tensor] = []  # of each cell that has some, [operations, N, C, H, W]
            self._norms = [slice(sum(norms[:i]), sum(norms[: i + 1])) for i in range(len(norms))]
            cells_of = {kind: sum(cell.kind == kind for cell in cells) for kind in lengths}
            self.p_gradients = {kind: self.numbers(cells_of[kind], n) for kind, n in lengths.items()}
            self.p_seconds = {kind: self.numbers(cells_of[kind], n) for kind, n in lengths.items()}
            read = [Image(x) for x in self.inputs]
            self._images = read.copy()  # what the first cell reads, then each cell's output
            read = read * 2 if len(read) == 1 else read
            self._cells: list[LoweredCell] = []
            for i, cell in enumerate(cells):
                row = sum(before.kind == cell.kind for before in cells[:i])
                path = sum(len(before.edges) for before in cells[:i])
                lowered = LoweredCell(self, cell, read[-2:], row, path)
                self._cells.append(lowered)
                self._images.append(lowered.output)
                read.append(lowered.output)
            # The numbers of the wanted outputs among `_images`
            self._wanted = [len(shapes) + i for i in outputs or [len(cells) - 1]]
            self.outputs = [self._images[i].y for i in self._wanted]
        if self.training:
            self._differentiate()

    def _differentiate(self) -> None:
        self.gradients = self.numbers(self._gradient_size)
        with self._sweep("backward"):
            self.adjoints = [self.image(y.shape) for y in self.outputs]
            self.input_adjoints = self._backward(self.adjoints, second=False)
        if self.derivatives == 1:
            return
        with self._sweep("tangent"):
            self.input_tangents = [self.image(x.shape) for x in self.inputs]
            self.weight_tangents = self.numbers(self.weights.numel())
            for image, tangent in zip(self._images, self.input_tangents, strict=False):
                image.tangent = tangent
            for cell in self._cells:
                cell.tangent()
            self.output_tangents = [self._images[i].tangent for i in self._wanted]
        with self._sweep("second"):
            self.seconds = [self.image(y.shape) for y in self.outputs]
            self.input_seconds = self._backward(self.seconds, second=True)

    def _backward(self, adjoints: Sequence[Tensor], second: bool) -> list[Tensor]:
        """The cells in reverse. A cell's output is read by the next two, whose adjoints of it are summed."""
        terms: list[list[Tensor]] = [[] for _ in self._images]
        for i, adjoint in zip(self._wanted, adjoints, strict=True):
            terms[i].append(adjoint)
        inputs = len(self.inputs)
        for i in reversed(range(len(self._cells))):
            own = i + inputs
            adjoint = self.sum(terms[own], self._images[own].y)
            read = max(own - 2, 0), own - 1
            given = [terms[j] for j in read]
            terms[read[0]], terms[read[1]] = [], []
            if read[0] == read[1]:
                given[1] = []
            for j, found in zip(read, self._cells[i].backward(adjoint, given, second), strict=True):
                terms[j].append(found)
        return [self.sum(terms[i], x) for i, x in enumerate(self.inputs)]

    @contextmanager
    def _sweep(self, name: str) -> Iterator[None]:
        self.k = Recorder()
        yield
        self.calls[name] = self.k.calls

    # What the parts make their tensors with

    def numbers(self, *shape: int) -> Tensor:
        """Uninitialised sums, statistics or weights, of the type that is beside the activations'."""
        return torch.empty(shape, dtype=self.wide, device="meta")

    def images(self, entries: int, shape: Sequence[int]) -> Tensor:
        return images(entries, shape, self.dtype, "meta")

    def image(self, shape: Sequence[int]) -> Tensor:
        return self.images(1, shape)[0]

    def sum(self, terms: Sequence[Tensor], like: Tensor) -> Tensor:
        """The sum of the adjoints that the readers of a tensor, of the shape of `like`, hand back; zeros if
        there are none."""
        if len(terms) == 1:
            return terms[0]
        if not terms:
            return self.fan_out([((), like)], second=False)[0]
        out = self.image(like.shape)
        self.k.add(tuple(terms), out=out)
        return out

    def fan_out(self, read: Sequence[tuple[Sequence["Image"], Tensor]], second: bool) -> Tensor:
        """The adjoints of tensors of one shape, or the second ones, [tensors, N, C, H, W]. `read` has each
        tensor with the images as which it is read: one, several with different batch norms, or none."""
        out = self.images(len(read), read[0][1].shape)
        sources = [images[0].source()._replace(affine=None) if images else Source(y) for images, y in read]
        readers = [
            tuple(reader for image in images for reader in (image.second() if second else image.first()))
            for images, _ in read
        ]
        function = self.k.fan_out_second if second else self.k.fan_out_backward
        function(tuple(sources), tuple(readers), out=out)
        return out

    def parameter(self, p: Parameter, of: Tensor) -> Tensor:
        """That weight of all weights, or of all tangents; or what lies there in `gradients`."""
        return of[p.offset : p.offset + p.size].view(p.shape)

    def normalised(self, y: Tensor, norm: Norm, of_batch: Tensor | None) -> "Image":
        """The image y, which its readers normalise by `norm`; in training by `of_batch`, the statistics of y,
        [3, C]."""
        if self.training:
            values = y.numel() // y.shape[1]
            refuse_single_value(values)
            assert of_batch is not None
            self.batch_statistics[norm.number], self.values[norm.number] = of_batch, values
        else:
            assert self.constants is not None
            of_batch = self.constants[:, self._norms[norm.number]]
        gamma_beta = None if norm.affine is None else self.parameter(norm.affine, self.weights)
        return Image(y, of_batch, norm.affine, gamma_beta)

    def _place(self, *shape: int) -> Parameter:
        """Room in `gradients`, which begins at a multiple of 16 bytes: every call's gradients are as aligned
        as the first's."""
        place = Parameter(self._gradient_size, shape)
        self._gradient_size += -(-place.size // 4) * 4
        return place

    def weights_of(self, half: Half, of: Tensor) -> Weights:
        """Those of all weights, or of all tangents."""
        depthwise = None if half.depthwise is None else self.parameter(half.depthwise, of)
        return Weights(depthwise, self.parameter(half.pointwise, of))

    def place_gradients(self, tasks: Sequence[Half]) -> Parameter:
        """Where the gradients of a call's weights go, a row a task."""
        k, c = tasks[0].pointwise.shape[:2]
        taps = max(1 if task.depthwise is None else math.prod(task.depthwise.shape[2:]) for task in tasks)
        row = c * (k + taps)
        place = self._place(len(tasks), row)
        for i, task in enumerate(tasks):
            start = place.offset + i * row
            self._gradient_parts.append((start, task.pointwise))
            if task.depthwise is not None:
                self._gradient_parts.append((start + k * c, task.depthwise))
        return place

    def place_gradient(self, p: Parameter) -> Parameter:
        """Where the gradient of a weight goes."""
        place = self._place(*p.shape)
        self._gradient_parts.append((place.offset, p))
        return place

    def place_sums(self, read: Sequence["Image"]) -> Parameter | None:
        """Where the sums [2, images, C] of a part that reads these images go, if some are gradients: a sum of
        G is the gradient of beta, a sum of G u that of gamma. None: none is."""
        if all(image.affine is None for image in read):
            return None
        c = read[0].y.shape[1]
        place = self._place(2, len(read), c)
        for i, image in enumerate(read):
            if image.affine is not None:
                gamma, start = image.affine.offset, place.offset + i * c
                self._gradient_parts.append((start + len(read) * c, Parameter(gamma, (c,))))
                self._gradient_parts.append((start, Parameter(gamma + c, (c,))))
        return place

    def sums(self, place: Parameter | None, entries: int, c: int) -> Tensor:
        """A tensor for the sums of G and G u, [2, entries, C], at the place that `place_sums` gave."""
        return self.numbers(2, entries, c) if place is None else self.parameter(place, self.gradients)

    def gradient_order(self) -> Tensor:
        """int64 [parameters]: gradients[order] is the gradient of the weights."""
        parts = sorted(self._gradient_parts, key=lambda part: part[1].offset)
        ends = accumulate((p.size for _, p in parts), initial=0)
        if [*(p.offset for _, p in parts), self.weights.numel()] != list(ends):
            raise ValueError("there are weights that no operation of the cells has, or several")
        return torch.cat([torch.arange(start, start + p.size) for start, p in parts])


# The parts of a cell


class Image:
    """A tensor of a cell, its tangent, and the parts that read it as a candidate or normalise it on load,
    each with the tensor's number there and its p (None: 1). They hand back the adjoint of what they read, see
    `types.Reader`."""

    tangent: Tensor  # from the tangent sweep on

    def __init__(
        self,
        y: Tensor,
        statistics: Tensor | None = None,
        affine: Parameter | None = None,
        gamma_beta: Tensor | None = None,
    ):
        """`affine` is the place of gamma and beta, `gamma_beta` are they, [2, C]."""
        self.y, self.statistics, self.affine, self.gamma_beta = y, statistics, affine, gamma_beta
        self.readers: list[tuple[Mix | Halves | Norms, int, Tensor | None]] = []

    def source(self) -> Source:
        return Source(self.y, self.statistics, self.gamma_beta)

    def first(self) -> tuple[Reader, ...]:
        gamma = None if self.gamma_beta is None else self.gamma_beta[0]
        normalised = self.statistics is not None
        return tuple(
            Reader(
                self.y,
                self.statistics,
                i,
                part.adjoints[i],
                part.sums if normalised else None,
                weights,
                gamma,
            )
            for part, i, weights in self.readers
        )

    def tangent_sums(self) -> tuple[Tensor, ...]:
        """For each reader its part [3, C] of the sums of the tangent, which whatever writes the tangent
        computes for it."""
        found = []
        for part, i, _ in self.readers:
            assert part.tangent_sums is not None
            found.append(part.tangent_sums[:, i])
        return tuple(found)

    def second(self) -> tuple[SecondReader, ...]:
        return tuple(
            SecondReader(first, self.tangent, part.tangent_sums, part.seconds[i], part.second_sums)
            for first, (part, i, _) in zip(self.first(), self.readers, strict=True)
        )


class Halves:
    """One call of halves of separable convolutions, 1x1 convolutions or factorized reduces, all of one stride
    and one number of output channels.

    y = P (D * relu(h)) of each; h is an input, or its batch norm.
    """

    def __init__(self, s: Sweeps, inputs: Sequence[Image], parts: Sequence[Half | FactorizedReduce]):
        """All parts read the only input, or each reads one of as many inputs."""
        self.s, self.inputs = s, inputs
        by_part = [part.halves if isinstance(part, FactorizedReduce) else (part,) for part in parts]
        numbered = [(i % len(inputs), half) for i, halves in enumerate(by_part) for half in halves]
        self.halves = [half for _, half in numbered]
        n, _, height, width = inputs[0].y.shape
        stride, k = self.halves[0].stride, self.halves[0].pointwise.shape[0]
        if self.halves[0].depthwise is None:
            refuse_odd_size(height, width, stride)
        shape = n, len(by_part[0]) * k, -(-height // stride), -(-width // stride)
        self.sources = tuple(image.source() for image in inputs)
        self.tasks = tuple(
            Task(i, s.weights_of(half, s.weights), half.stride, half.dilation, half.offset)
            for i, half in numbered
        )
        self.normalised = inputs[0].statistics is not None
        y = s.images(len(parts), shape)
        statistics = s.numbers(len(parts), 3, shape[1]) if s.training else None
        s.k.sepconv_forward(self.sources, self.tasks, y=y, statistics=statistics)
        self.outputs = [
            s.normalised(y[i], part.norm, None if statistics is None else statistics[i])
            for i, part in enumerate(parts)
        ]
        self.gradients_at = s.place_gradients(self.halves)
        if self.normalised:
            self.sums_at = s.place_sums(inputs)
            for i, image in enumerate(inputs):
                image.readers.append((self, i, None))

    def _adjoint(self) -> Tensor:
        return self.s.images(len(self.inputs), self.inputs[0].y.shape)

    def _sums(self, rows: int) -> Tensor | None:
        c = self.inputs[0].y.shape[1]
        return self.s.numbers(rows, len(self.inputs), c) if self.normalised else None

    def backward(self, terms: Sequence[Sequence[Tensor]]) -> Tensor:
        """The adjoint H of each input plus its terms, [inputs, N, C, H, W]."""
        s = self.s
        self.adjoints, self.tangent_sums = self._adjoint(), self._sums(3)
        c = self.inputs[0].y.shape[1]
        self.sums = s.sums(self.sums_at, len(self.inputs), c) if self.normalised else None
        s.k.sepconv_backward(
            self.sources,
            self.tasks,
            tuple(image.first()[0] for image in self.outputs),
            tuple(map(tuple, terms)),
            adjoint=self.adjoints,
            sums=self.sums,
            gradients=s.parameter(self.gradients_at, s.gradients),
        )
        return self.adjoints

    def tangent(self) -> None:
        s = self.s
        self.weight_tangents = tuple(s.weights_of(half, s.weight_tangents) for half in self.halves)
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

    def second(self, terms: Sequence[Sequence[Tensor]]) -> Tensor:
        """The second adjoint Hd of each input plus its terms, [inputs, N, C, H, W]."""
        self.seconds, self.second_sums = self._adjoint(), self._sums(2)
        self.s.k.sepconv_second(
            self.sources,
            self.tasks,
            self.weight_tangents,
            tuple(image.second()[0] for image in self.outputs),
            tuple(map(tuple, terms)),
            adjoint=self.seconds,
            sums=self.second_sums,
        )
        return self.seconds


class Norms:
    """Batch norms of several images alike, each by itself: what preprocessing ends in."""

    def __init__(self, s: Sweeps, inputs: Sequence[Image]):
        self.s, self.inputs = s, inputs
        self.sources = tuple(image.source() for image in inputs)
        self.shape = inputs[0].y.shape
        out = s.images(len(inputs), self.shape)
        s.k.norm_forward(self.sources, out=out)
        self.outputs = [Image(y) for y in out]
        self.sums_at = s.place_sums(inputs)
        for i, image in enumerate(inputs):
            image.readers.append((self, i, None))

    def backward(self, adjoints: Sequence[Tensor]) -> None:
        self.adjoints = tuple(adjoints)
        count, c = len(self.inputs), self.shape[1]
        self.sums, self.tangent_sums = self.s.sums(self.sums_at, count, c), self.s.numbers(3, count, c)
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


class Factorized:
    """A factorized convolution of a state. It has no part in the last two sweeps."""

    def __init__(self, s: Sweeps, state: Image, part: FactorizedConvolution):
        self.s, self.part, self.x = s, part, state.y
        n, c, height, width = state.y.shape
        first, second = part.weights
        self.weights = s.parameter(first, s.weights), s.parameter(second, s.weights)
        columns = -(-width // part.stride)
        self.middle = s.image((n, c, height, columns))
        y = s.image((n, c, -(-height // part.stride), columns))
        statistics = s.numbers(3, c) if s.training else None
        s.k.convolution_forward(
            self.x, self.weights, part.stride, middle=self.middle, y=y, statistics=statistics
        )
        self.output = s.normalised(y, part.norm, statistics)
        self.gradients_at = [s.place_gradient(p) for p in part.weights]

    def backward(self) -> Tensor:
        """The adjoint of the state."""
        s, adjoint = self.s, self.s.image(self.x.shape)
        s.k.convolution_backward(
            self.x,
            self.weights,
            self.part.stride,
            self.middle,
            self.output.first()[0],
            adjoint=adjoint,
            gradients=tuple(s.parameter(at, s.gradients) for at in self.gradients_at),
        )
        return adjoint


class Mix:
    """A node: o = sum over the candidates k of all its edges of p_k h_k (the paper's equations 1 and 2); in a
    genotype's cell the sum of its operations."""

    def __init__(
        self,
        s: Sweeps,
        candidates: Sequence[Image],
        p: Tensor | None,
        gradients: Sequence[Tensor],
        slot: Tensor | None = None,
        own: bool = True,
        kept: Sequence[int] = (),
    ):
        """
        Args:
            p: [candidates]; or [candidates, N], of drop path; None: 1.
            gradients: where both backward sweeps write the gradients of p; none of drop path.
            slot: the node's slice of the cell's output, into which it is written, if it has one.
            own: other nodes read it, and for them it is written into a tensor of its own, too. (A stencil on
                slices of 16 channels of 2 bytes in rows of 64 would touch 16 cache lines a load of a warp, in
                place of 4.)
            kept: numbers of the candidates that drop path never drops.
        """
        self.s, self.candidates, self.p, self.gradients = s, candidates, p, gradients
        self.sources = tuple(image.source() for image in candidates)
        self.own = own or slot is None
        outs = self._outs(slot)
        s.k.mix_forward(self.sources, p, outs=outs)
        self.output = Image(outs[0])
        for i, image in enumerate(candidates):
            image.readers.append((self, i, None if i in kept else p))
        # How many candidates, from the first on, the sums are computed of: where p has a gradient all, else
        # those up to the last that is normalised.
        self.summed = len(candidates)
        while not gradients and self.summed and candidates[self.summed - 1].statistics is None:
            self.summed -= 1
        self.sums_at = s.place_sums(candidates[: self.summed]) if self.summed else None

    def _outs(self, slot: Tensor | None) -> tuple[Tensor, ...]:
        own = [self.s.image(self.candidates[0].y.shape)] if self.own else []
        return (*own, *([] if slot is None else [slot]))

    def backward(self, adjoint: Tensor) -> None:
        count, c = len(self.candidates), adjoint.shape[1]
        self.adjoints = (adjoint,) * count
        self.sums, self.tangent_sums = self.s.sums(self.sums_at, self.summed, c), None
        if any(source.statistics is not None for source in self.sources):
            self.tangent_sums = self.s.numbers(3, count, c)
        if self.summed:
            self.s.k.mix_backward(
                self.sources[: self.summed],
                self.p[: self.summed] if self.p is not None and self.p.dim() == 2 else None,
                adjoint,
                sums=self.sums,
                weight_gradient=self.gradients[0] if self.gradients else None,
            )

    def tangent(self, slot: Tensor | None) -> None:
        outs = self._outs(slot)
        self.products = self.s.numbers(len(self.candidates), self.output.y.shape[1])
        self.s.k.mix_tangent(
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
        self._pools({key: op for key, op in operations.items() if isinstance(op, Pool)})
        identities = [key for key, op in operations.items() if isinstance(op, Identity)]
        self.identity: Image | None = None
        if identities:
            self.identity = Image(state.y)
            self.candidates |= dict.fromkeys(identities, self.identity)
        reduces = {key: op for key, op in operations.items() if isinstance(op, FactorizedReduce)}
        self.halves: list[Halves] = []
        if reduces:
            self._add([state], reduces)
        parts = {key: op.halves for key, op in operations.items() if isinstance(op, Convolution)}
        if parts:
            self._add([state], {key: halves[0] for key, halves in parts.items()})
        twice = {key: halves for key, halves in parts.items() if len(halves) > 1}
        factorized = {key: op for key, op in operations.items() if isinstance(op, FactorizedConvolution)}
        self.factorized = [Factorized(s, state, op) for op in factorized.values()]
        self.candidates |= zip(factorized, (part.output for part in self.factorized), strict=True)
        if twice:
            inputs = [self.candidates[key] for key in twice]
            self._add(inputs, {key: halves[1] for key, halves in twice.items()})

    def _pools(self, pools: dict[tuple[int, int], Pool]) -> None:
        # The images of the maximum, and those of the average: one where all edges read it alike, else one an
        # edge.
        self.pools: tuple[list[Image], list[Image]] = [], []
        self.position = None
        if not pools:
            return
        s, (n, c, height, width) = self.s, self.state.y.shape
        self.pooled = n, c, -(-height // self.stride), -(-width // self.stride)
        self.both = both = s.images(2, self.pooled)
        self.position = images(1, self.pooled, torch.uint8, "meta")[0]
        normalised = s.training and any(op.norm for op in pools.values())
        statistics = s.numbers(2, 3, c) if normalised else None
        s.k.pool_forward(self.state.y, self.stride, pools=both, position=self.position, statistics=statistics)
        for key, op in pools.items():
            y, found = both[op.kind], self.pools[op.kind]
            image = Image(y)
            if op.norm:
                image = s.normalised(y, op.norm, None if statistics is None else statistics[op.kind])
            # In training a batch norm without parameters is alike on every edge; in evaluation each has its
            # own statistics.
            alike = image.statistics is None or (s.training and image.affine is None)
            if not found or not alike:
                found.append(image)
            self.candidates[key] = found[-1]

    def _add(self, inputs: Sequence[Image], parts: Mapping[tuple[int, int], Half | FactorizedReduce]) -> None:
        halves = Halves(self.s, inputs, list(parts.values()))
        self.halves.append(halves)
        self.candidates |= zip(parts, halves.outputs, strict=True)

    def backward(self, terms: list[Tensor], second: bool) -> Tensor:
        """The adjoint of the state, or the second one; `terms` are added to it."""
        s = self.s
        terms += [part.backward() for part in self.factorized]
        if self.position is None:
            terms += self._adjoints_of_shared(second)[1]
        for halves in reversed(self.halves):
            # The last call of those that read the state adds the terms; of a pooled state its pools do.
            last = halves is self.halves[0] and self.position is None
            given = [terms if last else ()] + [()] * (len(halves.inputs) - 1)
            found = halves.second(given) if second else halves.backward(given)
            if last:
                return found[0]
            if halves.inputs[0] is self.state:
                terms.append(found[0])
        if self.position is None:
            return s.sum(terms, self.state.y)
        pools, others = self._adjoints_of_shared(second)
        found = s.image(self.state.y.shape)
        s.k.pool_backward(self.position, self.stride, pools, (*terms, *others), out=found)
        return found

    def _adjoints_of_shared(self, second: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The adjoints of what several nodes read: of both pools, [2, N, C, H', W'], if there are any; and
        those that the identity adds to the state's."""
        count = 0 if self.position is None else 2
        read: list[tuple[list[Image], Tensor]] = []  # tensors, each with the images that it is read as
        if count:
            read += zip(self.pools, self.both, strict=True)
        others: list[Tensor] = []
        if self.identity and all(p is None for *_, p in self.identity.readers):
            others = [reader.adjoint for reader in self.identity.first()]  # as they are
        elif self.identity:
            read.append(([self.identity], self.state.y))
        if not read:
            return None, others
        out = self.s.fan_out(read, second)
        return out[:count], [*others, *out[count:]]

    def tangent(self) -> None:
        s = self.s
        if self.position is not None:
            pools = s.images(2, self.pooled)
            s.k.pool_tangent(
                self.state.tangent,
                self.position,
                self.stride,
                tuple(tuple(r for image in of_kind for r in image.first()) for of_kind in self.pools),
                pools=pools,
                sums=tuple(
                    tuple(t for image in of_kind for t in image.tangent_sums()) for of_kind in self.pools
                ),
            )
            for of_kind, tangent in zip(self.pools, pools, strict=True):
                for image in of_kind:
                    image.tangent = tangent
        if self.identity:
            self.identity.tangent = self.state.tangent
        for halves in self.halves:
            halves.tangent()


class Passing:
    """The channels of a state that pass by the operations which read it; of stride 2, the maximum of every
    2x2 pixels of them."""

    def __init__(self, s: Sweeps, state: Image, stride: int):
        self.s, self.state, self.output, self.position = s, state, state, None
        if stride == 2:
            n, c, height, width = state.y.shape
            refuse_odd_size(height, width, 2)
            shape = n, c, height // 2, width // 2
            self.output = Image(s.image(shape))
            self.position = images(1, shape, torch.uint8, "meta")[0]
            s.k.max_pool_2x2_forward(state.y, y=self.output.y, position=self.position)

    def backward(self, second: bool) -> Tensor:
        """The adjoint of the state's channels, or the second one."""
        (of_output,) = self.s.fan_out([([self.output], self.output.y)], second)
        if self.position is None:
            return of_output
        adjoint = self.s.image(self.state.y.shape)
        self.s.k.max_pool_2x2_backward(self.position, of_output, out=adjoint)
        return adjoint

    def tangent(self) -> None:
        if self.position is not None:
            self.output.tangent = self.s.image(self.output.y.shape)
            self.s.k.max_pool_2x2_tangent(self.state.tangent, self.position, y=self.output.tangent)


class PartialStage:
    """A state whose operations read a part of its channels: its parts (the two sums of a node, or a
    preprocessed state alone) side by side, their channels shuffled; the first are for the `Stage` of the
    operations, the others pass by them."""

    def __init__(
        self,
        s: Sweeps,
        cell: Cell,
        state: int,
        parts: Sequence[Image],
        edges: dict[int, Edge],
        slot: Tensor | None,
    ):
        """`edges` leave the state (of the last node none do); `slot` is its slice of the cell's output, if it
        is a node."""
        self.s, self.parts, self.channels = s, parts, cell.channels
        self.groups = 1 if state < 2 else cell.partial_channels  # 1: a preprocessed state is not shuffled
        self.candidates: dict[tuple[int, int], Image] = {}
        self.passed: Image | None = None
        self.pieces: list[Image] = []  # what the operations read, and what passes by
        if edges:
            n, _, height, width = parts[0].y.shape
            first = cell.channels // cell.partial_channels
            widths = first, cell.channels - first
            self.pieces = [Image(s.image((n, c, height, width))) for c in widths]
        self._shuffle([part.y for part in parts], [piece.y for piece in self.pieces], slot)
        if edges:
            self.stage = Stage(s, self.pieces[0], cell.stride(state), edges)
            self.passing = Passing(s, self.pieces[1], cell.stride(state))
            self.candidates, self.passed = self.stage.candidates, self.passing.output

    def _shuffle(self, parts: Sequence[Tensor], pieces: Sequence[Tensor], slot: Tensor | None) -> None:
        outs = (*([tuple(pieces)] if pieces else []), *([] if slot is None else [(slot,)]))
        self.s.k.shuffle((tuple(parts),), self.groups, outs=outs)

    def backward(self, terms: Sequence[Tensor], second: bool) -> list[Tensor]:
        """The adjoints of the parts, or the second ones; `terms` are other adjoints of the shuffled state."""
        read: list[tuple[Tensor, ...]] = [(term,) for term in terms]
        if self.pieces:
            read.append((self.stage.backward([], second), self.passing.backward(second)))
        found = [self.s.image(part.y.shape) for part in self.parts]
        # Shuffling back is shuffling with as many groups as there were channels in one.
        self.s.k.shuffle(tuple(read), self.channels // self.groups, outs=(tuple(found),))
        return found

    def tangent(self, slot: Tensor | None) -> None:
        for piece in self.pieces:
            piece.tangent = self.s.image(piece.y.shape)
        self._shuffle([part.tangent for part in self.parts], [piece.tangent for piece in self.pieces], slot)
        if self.pieces:
            self.stage.tangent()
            self.passing.tangent()


class LoweredCell:
    """A cell in its sweeps."""

    output: Image

    def __init__(self, s: Sweeps, cell: Cell, inputs: Sequence[Image], row: int, path: int):
        """`inputs` are the outputs of the two cells before; `row` is the cell's row in the gradients of p,
        `path` the row of its first edge in the weights of drop path."""
        self.s, self.cell, self.inputs, self.row, self.path = s, cell, inputs, row, path
        self.partial = cell.partial_channels > 1
        self._preprocess()
        # The images that each state consists of: one; a node with partial channels of two, its sums
        states = [[image] for norms in self.norms for image in norms.outputs]
        n, c, height, width = self._node_shape(states[0][0])
        self.output = Image(s.image((n, len(cell.concat) * c, height, width)))
        self.noise = self._noise((n, c // cell.partial_channels, height, width))
        self.stages: dict[int, Stage | PartialStage] = {}
        self.nodes: list[list[Mix]] = []
        self.candidates: dict[int, list[Image]] = {}  # by edge
        self.passed: dict[int, Image] = {}  # with partial channels, by edge
        for state in range(2 + cell.nodes):
            slot = self._slot(self.output.y, state)
            read = {e: edge for e, edge in enumerate(cell.edges) if edge.source == state}
            if state >= 2:
                self.nodes.append(self._node(state - 2, slot, bool(read)))
                states.append([mix.output for mix in self.nodes[-1]])
            if self.partial:
                stage = PartialStage(s, cell, state, states[state], read, slot)
                self.stages[state] = stage
                if stage.passed is not None:
                    self.passed |= dict.fromkeys(read, stage.passed)
            elif read:
                self.stages[state] = Stage(s, states[state][0], cell.stride(state), read)
            for e, edge in read.items():
                found = self.noise | self.stages[state].candidates
                self.candidates[e] = [found[e, i] for i in range(len(edge.operations))]
        self.states = states

    def _noise(self, shape: tuple[int, int, int, int]) -> dict[tuple[int, int], Image]:
        """The noise of the cell, by edge and number of the operation."""
        keys = [
            (e, i)
            for e, edge in enumerate(self.cell.edges)
            for i, operation in enumerate(edge.operations)
            if isinstance(operation, Noise)
        ]
        if not keys:
            return {}
        drawn = self.s.images(len(keys), shape)
        self.s.noise.append(drawn)
        return {key: Image(y) for key, y in zip(keys, drawn, strict=True)}

    def _node(self, node: int, slot: Tensor | None, read: bool) -> list[Mix]:
        """The sum over the node's edges of their operations, written into `slot`; with partial channels that
        sum and the one of what passes by, and `slot` is written when both are shuffled. `read`: other nodes
        read the node."""
        s, cell = self.s, self.cell
        numbers = [e for e, edge in enumerate(cell.edges) if edge.node == node]
        mixed = [image for e in numbers for image in self.candidates[e]]
        start = sum(len(edge.operations) for edge in cell.edges[: numbers[0]])
        p, gradients = self._weights(start, len(mixed))
        if self.partial:
            passed = [self.passed[e] for e in numbers]
            of_passed = self._weights(cell.weights - len(cell.edges) + numbers[0], len(passed))
            return [Mix(s, mixed, p, gradients), Mix(s, passed, *of_passed)]
        kept: Sequence[int] = ()
        if cell.kind is None:
            kept = [i for i, e in enumerate(numbers) if isinstance(cell.edges[e].operations[0], Identity)]
        return [Mix(s, mixed, p, gradients, slot, read, kept)]

    def _weights(self, start: int, count: int) -> tuple[Tensor | None, Sequence[Tensor]]:
        """For the candidates numbered from `start` on: p, or with drop path their weights by image; and where
        both backward sweeps write the gradients of p."""
        s, kind, found = self.s, self.cell.kind, slice(start, start + count)
        if kind is not None:
            return s.p[kind][found], [of_p[kind][self.row][found] for of_p in (s.p_gradients, s.p_seconds)]
        if s.path_weights is None:
            return None, ()
        return s.path_weights[self.path + start : self.path + start + count], ()

    def _preprocess(self) -> None:
        """In one call for both inputs where they have one shape and 1x1 convolutions preprocess them."""
        s, parts = self.s, self.cell.preprocessing
        alike = self.inputs[0].y.shape == self.inputs[1].y.shape and all(
            isinstance(part, Convolution) for part in parts
        )
        halves = [part.halves[0] if isinstance(part, Convolution) else part for part in parts]
        if alike:
            self.preprocessing = [Halves(s, self.inputs, halves)]
        else:
            self.preprocessing = [
                Halves(s, [image], [part]) for image, part in zip(self.inputs, halves, strict=True)
            ]
        self.norms = [Norms(s, halves.outputs) for halves in self.preprocessing]

    def _node_shape(self, state: Image) -> tuple[int, int, int, int]:
        n, _, height, width = state.y.shape
        stride = self.cell.edges[0].stride  # the first node reads preprocessed states alone
        return n, self.cell.channels, -(-height // stride), -(-width // stride)

    def _slot(self, whole: Tensor, state: int) -> Tensor | None:
        """The channels of the cell's output, or of its adjoint, that are this state."""
        if state not in self.cell.concat:
            return None
        i, c = self.cell.concat.index(state), self.cell.channels
        return whole[:, i * c : (i + 1) * c]

    def backward(self, adjoint: Tensor, others: Sequence[Sequence[Tensor]], second: bool) -> list[Tensor]:
        """The adjoints of both inputs, or the second ones, from that of the output. `others` are further
        adjoints of each input, which are added."""
        of_states: list[Tensor] = []
        for state in reversed(range(len(self.states))):
            slot = self._slot(adjoint, state)
            terms = [] if slot is None else [slot]
            stage = self.stages.get(state)
            if isinstance(stage, PartialStage):
                found = stage.backward(terms, second)
            elif stage is not None:
                found = [stage.backward(terms, second)]
            else:
                found = [self.s.sum(terms, self.states[state][0].y)]
            if state < 2:
                of_states = found + of_states
                continue
            for mix, of_mix in zip(self.nodes[state - 2], found, strict=True):
                if second:
                    mix.second(of_mix)
                else:
                    mix.backward(of_mix)
        of_inputs: list[Tensor] = []
        for halves, norms in zip(self.preprocessing, self.norms, strict=True):
            count = len(norms.inputs)
            given, of_states = of_states[:count], of_states[count:]
            own, others = others[:count], others[count:]
            if second:
                norms.second(given)
                of_inputs += halves.second(own).unbind()
            else:
                norms.backward(given)
                of_inputs += halves.backward(own).unbind()
        return of_inputs

    def tangent(self) -> None:
        for halves, norms in zip(self.preprocessing, self.norms, strict=True):
            halves.tangent()
            norms.tangent()
        self.output.tangent = self.s.image(self.output.y.shape)
        if self.noise:  # one tangent for all, which the nodes read as any other
            drawn = next(iter(self.noise.values())).y
            zeros = self.s.sum([], drawn)
            for image in self.noise.values():
                image.tangent = zeros
        for state in range(len(self.states)):
            slot = self._slot(self.output.tangent, state)
            if state >= 2:
                for mix in self.nodes[state - 2]:
                    mix.tangent(None if self.partial else slot)
            stage = self.stages.get(state)
            if isinstance(stage, PartialStage):
                stage.tangent(slot)
            elif stage is not None:
                stage.tangent()
