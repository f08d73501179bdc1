"""What the three backends share: the arguments of their functions, and the functions that each of them has.

Names are those of docs/mathematics.md. A trailing `d` there is `tangent` here, a capital is an `adjoint`, and
a capital with a `d` is a second adjoint. Activations are [N, C, H, W] in channels-last memory, float64,
float32, bfloat16 or float16; where it is said, they may be a slice of the channels of such a tensor. Weights,
statistics, sums and p are float64 for float64 activations, else float32 (`accumulator`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

EPSILON = 1e-5  # of every batch norm, nn.BatchNorm2d's default


class Source(NamedTuple):
    """A tensor that is read as h: as it is, or normalised on load."""

    x: Tensor  # [N, C, H, W]
    statistics: Tensor | None = None  # [3, C]: mean, biased variance, r; u = (x - mean) r. None: h is x
    # [2, C]: gamma, beta; h = gamma u + beta. None: h is u. The last two sweeps take none.
    affine: Tensor | None = None


class Weights(NamedTuple):
    """The weights of a task, or their tangents."""

    depthwise: Tensor | None  # [C, 1, k, k], k odd; None: there is no depthwise convolution
    pointwise: Tensor  # [K, C, 1, 1]


class Task(NamedTuple):
    """One half of a separable convolution, y = P (D * relu(h)), or a 1x1 convolution, y = P relu(h).

    The depthwise convolution is padded to `same`. Without one the pixels (offset + stride * i, offset +
    stride * j) are read, and the image's sizes must divide by the stride.
    """

    source: int  # its number among the sources of the call
    weights: Weights
    stride: int = 1
    dilation: int = 1
    offset: int = 0


class Reader(NamedTuple):
    """A part of a cell that reads a tensor y: a node, of which y is a candidate, the second half of a
    separable convolution, or the batch norm that preprocessing ends in; y is number `index` there. The part
    hands back the adjoint G of what it reads, so that dL/dy = gamma B(p G):

        B(G) = r (G - mean(G) - u mean(G u)),    u = (y - mean) r

    Without statistics B(G) is G.
    """

    y: Tensor
    statistics: Tensor | None  # [3, C], of y itself
    index: int  # type: ignore[assignment]  # in place of tuple's method
    adjoint: Tensor  # G, like y; may be a slice of channels
    # [2, entries, C]: of G, G u, where p is by image of p G, p G u; None: y has no statistics, and they are
    # not read
    sums: Tensor | None
    weights: Tensor | None  # p [entries], or by image [entries, N]; None: p is 1
    gamma: Tensor | None = None  # [C]; None: 1


class SecondReader(NamedTuple):
    """A reader in the second backward sweep, where u is h. It hands back the derivative Gd of G along v, so
    that the derivative of dL/dy is that of p B(G),

        p ( B(Gd) - r (t B(G) + s hd + u h) ),    t = mean(h yd), s = mean(G h), u = mean(G hd)

    Without statistics it is p Gd.
    """

    first: Reader
    tangent: Tensor  # yd
    tangent_sums: Tensor | None  # [3, entries, C]: of yd, yd h, yd G
    adjoint: Tensor  # Gd, as `first.adjoint`
    sums: Tensor | None  # [2, entries, C]: of Gd, Gd h


AnyReader = TypeVar("AnyReader", bound=Reader | SecondReader)


@dataclass
class Launch:
    """One launch of a kernel, one call of C++, or one function of the ATen backend."""

    name: str
    tensors: Sequence[Tensor]  # that it reads or writes

    @property
    def bytes(self) -> int:
        """The bytes of the distinct elements that it reads and writes: a kernel touches its tensors whole."""
        found = {(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t for t in self.tensors}
        return sum(t.numel() * t.element_size() for t in found.values())


class Call(NamedTuple):
    """A call of a backend's function: its name, what it reads and what it writes."""

    function: str
    reads: Mapping[str, Any]
    writes: Mapping[str, Any]


class Backend(Protocol):
    """The functions of `kernels.aten`, `kernels.native` and `kernels.triton`, which are modules.

    Keyword-only arguments are written, all others are read. A function returns its launches, which
    `program` runs. Sums are over images and pixels.
    """

    def program(self, calls: Sequence[Call]) -> Callable[[], None]:
        """Returns a function that runs the calls one after the other, on the tensors that they name."""

    # Separable halves, 1x1 convolutions and the pairs of a factorized reduce. In a call all sources have one
    # shape, all outputs one shape, and all tasks one stride. `len(tasks) // len(y)` neighbouring tasks write
    # their channels side by side into one output.

    def sepconv_forward(
        self,
        sources: Sequence[Source],
        tasks: Sequence[Task],
        *,
        y: Tensor,  # [outputs, N, K, H', W'], each channels-last
        statistics: Tensor | None,  # [outputs, 3, K]: those of y; None: they are not wanted
    ) -> Sequence[Launch]: ...

    def sepconv_backward(
        self,
        sources: Sequence[Source],
        tasks: Sequence[Task],
        readers: Sequence[Reader],  # one an output
        terms: Sequence[Sequence[Tensor]],  # of each source that is not normalised, what is added to its H
        *,
        adjoint: Tensor,  # [sources, N, C, H, W]: H = dL/dh = [h > 0] (D' * P' Y), summed over the tasks
        sums: Tensor | None,  # [2, sources, C]: of H, H u; None: no source is normalised
        # [tasks, K C + C taps], taps being those of the call's largest kernel: dP [K, C], then dD [C, k k];
        # the rest of a row is undefined. None: the gradients are not wanted
        gradients: Tensor | None,
    ) -> Sequence[Launch]: ...

    def sepconv_tangent(
        self,
        sources: Sequence[Source],
        tasks: Sequence[Task],
        source_tangents: Sequence[Tensor],  # xd of each source
        # [3, sources, C]: of xd, xd h, xd H; None: no source is normalised
        source_sums: Tensor | None,
        weight_tangents: Sequence[Weights],  # Dd, Pd of each task
        readers: Sequence[Reader],  # one an output
        *,
        y: Tensor,  # [outputs, N, K, H', W']: yd = P (D * ad + Dd * a) + Pd (D * a)
        sums: Sequence[Tensor],  # [3, K] of each reader: of yd, yd h, yd G
    ) -> Sequence[Launch]: ...

    def sepconv_second(
        self,
        sources: Sequence[Source],
        tasks: Sequence[Task],
        weight_tangents: Sequence[Weights],
        readers: Sequence[SecondReader],  # one an output
        terms: Sequence[Sequence[Tensor]],  # as above, of Hd
        *,
        adjoint: Tensor,  # [sources, N, C, H, W]: Hd = [h > 0] (D' * (P' Yd + Pd' Y) + Dd' * P' Y), summed
        sums: Tensor | None,  # [2, sources, C]: of Hd, Hd h; None: no source is normalised
    ) -> Sequence[Launch]: ...

    # Factorized convolutions: relu(x) -> 1 x k, which strides over columns -> k x 1, which strides over rows;
    # padded to `same`. They have no part in the last two sweeps.

    def convolution_forward(
        self,
        x: Tensor,
        weights: tuple[Tensor, Tensor],  # [C, C, 1, k], [C, C, k, 1]
        stride: int,
        *,
        middle: Tensor,  # [N, C, H, W']: between both
        y: Tensor,  # [N, C, H', W']
        statistics: Tensor | None,  # [3, C]: those of y; None: they are not wanted
    ) -> Sequence[Launch]: ...

    def convolution_backward(
        self,
        x: Tensor,
        weights: tuple[Tensor, Tensor],
        stride: int,
        middle: Tensor,
        reader: Reader,
        *,
        adjoint: Tensor,  # [N, C, H, W]: dL/dx
        gradients: tuple[Tensor, Tensor],  # of the weights
    ) -> Sequence[Launch]: ...

    # A node: o = sum over candidates k of p_k h_k. In all sums u of a candidate without statistics is y.

    def mix_forward(
        self,
        candidates: Sequence[Source],
        weights: Tensor | None,  # p [candidates], or by image [candidates, N]; None: 1
        *,
        outs: Sequence[Tensor],  # o, written to each of these; they may be slices of channels
    ) -> Sequence[Launch]: ...

    def mix_backward(
        self,
        candidates: Sequence[Source],
        weights: Tensor | None,  # p by image [candidates, N]; None: it is not by image
        adjoint: Tensor,  # G = dL/do; may be a slice of channels
        *,
        sums: Tensor,  # [2, candidates, C]: of G, G u; where p is by image of p G, p G u
        weight_gradient: Tensor | None,  # dL/dp [candidates], without affine; None: it is not wanted
    ) -> Sequence[Launch]: ...

    def mix_tangent(
        self,
        candidates: Sequence[Source],
        weights: Tensor,
        tangents: Sequence[Tensor],  # yd of each candidate
        # [3, candidates, C]: of yd, yd h, yd G, where a candidate has statistics; None: none has
        tangent_sums: Tensor | None,
        adjoint: Tensor,  # G
        *,
        outs: Sequence[Tensor],  # od = sum over k of p_k hd_k
        products: Tensor,  # [candidates, C]: of yd G; written where a candidate has no statistics
    ) -> Sequence[Launch]: ...

    def mix_second(
        self,
        candidates: Sequence[Source],
        adjoint: Tensor,  # Gd
        first_sums: Tensor,  # what `mix_backward` wrote
        tangent_sums: Tensor | None,  # as in `mix_tangent`
        products: Tensor,  # what it wrote
        *,
        sums: Tensor,  # [2, candidates, C]: of Gd, Gd h
        weight_gradient: Tensor,  # [candidates]: Q_p, the sum of Gd h_k + G hd_k
    ) -> Sequence[Launch]: ...

    # Batch norm of several tensors alike, each by itself: preprocessing.

    def norm_forward(self, sources: Sequence[Source], *, out: Tensor) -> Sequence[Launch]:
        """out [sources, N, C, H, W]: h of each."""

    def norm_backward(
        self,
        sources: Sequence[Source],
        adjoints: Sequence[Tensor],  # G of each, or Gd
        *,
        sums: Tensor,  # [2, sources, C]: of G, G u
    ) -> Sequence[Launch]: ...

    def norm_tangent(
        self,
        sources: Sequence[Source],
        tangents: Sequence[Tensor],  # yd of each
        sums: Tensor,  # [3, sources, C]: of yd, yd h, yd G
        *,
        out: Tensor,  # [sources, N, C, H, W]: hd of each
    ) -> Sequence[Launch]: ...

    # Tensors that several nodes read: a state's pools, and with stride 1 the state itself.

    def fan_out_backward(
        self,
        sources: Sequence[Source],
        readers: Sequence[Sequence[Reader]],  # of each source; may be none
        *,
        out: Tensor,  # [sources, N, C, H, W]: the sum over readers of gamma B(p G)
    ) -> Sequence[Launch]: ...

    def fan_out_second(
        self,
        sources: Sequence[Source],
        readers: Sequence[Sequence[SecondReader]],
        *,
        out: Tensor,  # [sources, N, C, H, W]: its derivative along v, see `SecondReader`
    ) -> Sequence[Launch]: ...

    # 3x3 max and average pool of a state, padding 1, over the pixels that are there.

    def pool_forward(
        self,
        x: Tensor,
        stride: int,
        *,
        pools: Tensor,  # [2, N, C, H', W']: maximum, average
        # uint8 [N, C, H', W']: of the maximum in its window, 0 to 8, row-major; of equal values the first; of
        # NaNs, which are maxima, the last
        position: Tensor,
        statistics: Tensor | None,  # [2, 3, C]; None: they are not wanted
    ) -> Sequence[Launch]: ...

    def pool_backward(
        self,
        position: Tensor,
        stride: int,
        pools: Tensor,  # [2, N, C, H', W']: the adjoints of both, or the second ones
        terms: Sequence[Tensor],  # other adjoints of x, which are added; they may be slices of channels
        *,
        out: Tensor,  # [N, C, H, W]: the adjoint of x
    ) -> Sequence[Launch]: ...

    def pool_tangent(
        self,
        tangent: Tensor,  # of x
        position: Tensor,
        stride: int,
        readers: Sequence[Sequence[Reader]],  # of each pool; may be none
        *,
        pools: Tensor,  # [2, N, C, H', W']: the tangents of both, linear once the positions are held
        sums: Sequence[Sequence[Tensor]],  # [3, C] of each reader: of yd, yd h, yd G
    ) -> Sequence[Launch]: ...

    # Partial channels: what passes by the operations of stride 2, and nodes, whose channels are shuffled.

    def max_pool_2x2_forward(
        self,
        x: Tensor,  # H and W are even
        *,
        y: Tensor,  # [N, C, H / 2, W / 2]: the maximum of every 2x2 pixels
        # uint8, like y: of the maximum in its window, 0 to 3, row-major; of equal values the first
        position: Tensor,
    ) -> Sequence[Launch]: ...

    def max_pool_2x2_backward(
        self,
        position: Tensor,
        adjoint: Tensor,  # of y, or the second one
        *,
        out: Tensor,  # [N, C, H, W]: the adjoint of x
    ) -> Sequence[Launch]: ...

    def max_pool_2x2_tangent(
        self,
        tangent: Tensor,  # of x
        position: Tensor,
        *,
        y: Tensor,  # [N, C, H / 2, W / 2]: the tangent of y, linear once the positions are held
    ) -> Sequence[Launch]: ...

    def shuffle(
        self,
        sources: Sequence[Sequence[Tensor]],
        groups: int,
        *,
        outs: Sequence[Sequence[Tensor]],
    ) -> Sequence[Launch]:
        """The sum of the sources, each of which is tensors side by side, C channels together; channel `g *
        (C / groups) + c` of the sum becomes channel `c * groups + g` of every out, each of which is tensors
        side by side. All tensors may be slices of channels. It is linear, so it is its own tangent; its
        adjoint is the same function with C / groups groups."""

    def add(self, terms: Sequence[Tensor], *, out: Tensor) -> Sequence[Launch]:
        """The sum of two or more tensors, which may be slices of channels."""


def of_tasks(outputs: Tensor | Sequence[Tensor], tasks: int) -> list[Tensor]:
    """The parts of outputs, [N, K, H, W] or [rows, K] each, that belong to each task of a call: neighbouring
    tasks have equal parts of the channels of one output."""
    return [part for output in outputs for part in output.chunk(tasks // len(outputs), dim=1)]


def readers_of_tasks(readers: Sequence[AnyReader], tasks: int) -> list[AnyReader]:
    """For each task of a call the reader of its part of an output: the outputs' readers, each with a part of
    its channels."""
    return [part for reader in readers for part in _parts(reader, tasks // len(readers))]


def _parts(reader: AnyReader, count: int) -> list[AnyReader]:
    if count == 1:
        return [reader]
    fields: list[Sequence[Any]] = []
    value: Any
    for name, value in zip(reader._fields, reader, strict=True):
        if name == "first":
            fields.append(_parts(value, count))
        elif isinstance(value, Tensor) and name != "weights":
            fields.append(value.chunk(count, dim=1 if value.dim() == 4 else -1))
        else:
            fields.append([value] * count)
    return [type(reader)(*values) for values in zip(*fields, strict=True)]


def row_stride(x: Tensor) -> int:
    """Numbers from one pixel of x, [N, C, H, W], to the next: C, or more where x is a slice of channels.

    Raises:
        ValueError: x is neither channels-last nor a slice of the channels of a tensor that is.
    """
    n, c, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return c
    # A dimension of one value may have any stride.
    row = x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0) if n > 1 else c
    expected = (height * width * row, 1, width * row, row)
    alike = all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), expected, strict=True))
    if not alike or row < c:
        raise ValueError(f"strides {x.stride()} of {tuple(x.shape)} are not those of channels-last memory")
    return row


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, statistics and weights where activations have this type: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def images(entries: int, shape: Sequence[int], dtype: torch.dtype, device: Any = None) -> Tensor:
    """Uninitialised [entries, N, C, H, W], each entry channels-last, one behind the other."""
    n, c, height, width = shape
    return torch.empty(entries, n, height, width, c, dtype=dtype, device=device).permute(0, 1, 4, 2, 3)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from tensors(part)
    elif isinstance(tree, Mapping):
        yield from tensors(tuple(tree.values()))


def launches(backend: Backend, calls: Sequence[Call]) -> Iterator[Launch]:
    """The launches of calls on the tensors that they name, which may be meta tensors: nothing is run."""
    for call in calls:
        yield from getattr(backend, call.function)(**call.reads, **call.writes)


def refuse_single_value(values: int) -> None:
    """Raises a ValueError where a channel has a single value, whose variance in training would be zero."""
    if values == 1:
        raise ValueError("batch norm in training needs more than one value a channel, not a single one")


def refuse_odd_size(height: int, width: int, stride: int) -> None:
    """Raises a ValueError where an image's sizes do not divide by the stride of a 1x1 convolution."""
    if height % stride or width % stride:
        raise ValueError(f"a {height}x{width} image cannot be halved: its sizes must be even")
