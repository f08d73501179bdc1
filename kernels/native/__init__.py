"""The kernels in C++ for CPU: the functions of `torch_backend`, for float32. In place of `..._tangent` of the
mix and of sepconv there are `..._tangent_forward`, which gives the tangents of the outputs, and `..._second`,
the second backward sweep whole; and a candidate's adjoint is made where `sepconv` loads it (see `handover`).

setup.py compiles the sources beside this file once per processor level, where there is a compiler; the widest
that this processor runs is loaded, by ctypes. A call makes a table of C structures from tensors and runs all
its tasks on `torch.get_num_threads()` threads; the bits of the result do not depend on how many.

Tensors are float32 [N, C, H, W] in channels-last memory, what C++ sees as [n, h, w, c].
"""

import ctypes
import os
from array import array
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from darts_fast.kernels.handover import Link
from darts_fast.kernels.torch_backend import Normalizer, Task
from darts_fast.kernels.torch_backend import add as add  # a plain sum is nowhere faster

if TYPE_CHECKING:
    from darts_fast.kernels.sepconv import Own  # which imports this module

LEVELS = {4: "x86-64-v4", 3: "x86-64-v3", 0: "portable"}
_NAMES = {4: "_v4", 3: "_v3", 0: "_portable"}


def _path(level: int) -> Path | None:
    here = Path(os.environ.get("DARTS_NATIVE_FOLDER") or Path(__file__).resolve().parent)  # see sanitize.sh
    paths = [here / (_NAMES[level] + suffix) for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.exists()), None)


@cache
def level() -> int | None:
    """The key of LEVELS that is used on this machine; None where the library was not built."""
    portable = _path(0)
    if portable is None:
        return None
    most = ctypes.CDLL(str(portable)).darts_level()
    return max(found for found in LEVELS if found <= most and _path(found) is not None)


def library_of(level: int) -> ctypes.CDLL:
    """The library of a processor level, which must have been built."""
    library = ctypes.CDLL(str(_path(level)))
    library.darts_keep_memory()
    sweeps = ["forward", "backward", "tangent", "second"]
    of_sepconv, of_others = [c_void_p, c_int64] * 2, [c_void_p]
    for name, table, last in (("sepconv", of_sepconv, 4), ("pool", of_others, 3), ("mix", of_others, 4)):
        for sweep in sweeps[:last]:
            function = getattr(library, f"darts_{name}_{sweep}")
            function.argtypes, function.restype = [*table, c_int], None
    return library


@cache
def _library() -> ctypes.CDLL:
    return library_of(level())


class _Rows:
    """A table of C structures whose fields all are 8 bytes wide, addresses and whole numbers, in the order of
    the C++ sources. It keeps the copies alive that it had to make, so it has to live until C++ returns.
    (ctypes.Structure, field by field, took three times as long: a twentieth of a search step.)"""

    def __init__(self):
        self.values, self.copies = array("q"), []

    def image(self, tensor: Tensor | None) -> int:
        """The address of activations [N, C, H, W], in channels-last memory."""
        if tensor is None:
            return 0
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            raise TypeError(
                f"the native kernels take float32 on the CPU, not {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.copies.append(tensor)
        return tensor.data_ptr()

    def vector(self, tensor: Tensor | None) -> int:
        """The address of weights or statistics, in the order of their dimensions."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.copies.append(tensor)
        return tensor.data_ptr()

    def norm(self, norm: Normalizer | None) -> tuple[int, int, int]:
        """Addresses of mean and r, and whether they are those of the batch."""
        return (0, 0, 0) if norm is None else (self.vector(norm.mean), self.vector(norm.r), norm.batch)

    def append(self, *fields: int) -> None:
        self.values.extend(fields)

    @property
    def address(self) -> int:
        return self.values.buffer_info()[0]


def _image(n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), dtype=torch.float32, memory_format=torch.channels_last)


def _source(
    rows: _Rows, x: Tensor, norm: Normalizer | None, xd: Tensor | None, adjoint: int, bends: int
) -> None:
    n, c, h, w = x.shape
    mean, r, batch = rows.norm(norm)
    rows.append(rows.image(x), rows.image(xd), mean, r, adjoint, bends, batch, n, h, w, c)


class _Adjoint(NamedTuple):
    """Of an output of sepconv, in the order of the C++ structure."""

    y: int = 0
    second: int = 0
    own: int = 0
    own_mean: int = 0
    own_tangent: int = 0
    factors: int = 0
    second_factors: int = 0

    @classmethod
    def of(
        cls,
        rows: _Rows,
        y: Tensor,
        own: "Own | None",
        second: Tensor | None = None,
        tangent: Tensor | None = None,
    ) -> "_Adjoint":
        """Args: tangent: that of the output, where it has a link."""
        if own is None:
            return cls(rows.image(y), rows.image(second))
        at, c = own.link.index, y.shape[1] * 4  # bytes
        factors = own.first.data_ptr() + at * _FIRST_FACTORS * c
        if second is None:
            return cls(rows.image(y), 0, rows.image(own.y), rows.vector(own.mean), 0, factors)
        second_factors = own.link.second.data_ptr() + at * _FACTORS * c
        images = rows.image(y), rows.image(second), rows.image(own.y)
        return cls(*images, rows.vector(own.mean), rows.image(tangent), factors, second_factors)


_FIRST_FACTORS, _FACTORS, _BENDS = 3, 5, 5  # rows, see lanes.h and mix.cpp


def _task(
    rows: _Rows,
    task: Task,
    weights: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None] = (None, None),
    adjoint: Sequence[int] = (0,) * 7,
    outputs: Sequence[int] = (0, 0, 0, 0),
) -> None:
    """weights: depthwise and pointwise; adjoint: an _Adjoint; outputs: y or its tangent, statistics, and the
    gradients of the weights."""
    source, stride, dilation, offset = task
    d, p = weights
    kernel = 0 if d is None else d.shape[-1]
    rows.append(source, kernel, stride, dilation, offset, p.shape[0])
    rows.append(*map(rows.vector, weights), *map(rows.vector, tangents), *adjoint, *outputs)


def _sepconv(sweep: str, sources: _Rows, n_sources: int, tasks: _Rows, n_tasks: int) -> None:
    getattr(_library(), f"darts_sepconv_{sweep}")(
        sources.address, n_sources, tasks.address, n_tasks, torch.get_num_threads()
    )


def sepconv_forward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """y_t = P_t (D_t * relu(h)) of every task, and the statistics.

    Returns:
        y of each task, [N, K, ceil(H / stride), ceil(W / stride)]; and of each the mean, biased variance
        and 1 / sqrt(variance + 1e-5), [tasks, 3, K].

    Raises:
        ValueError: a single value a channel, which has no variance.
    """
    inputs, table, outputs = _Rows(), _Rows(), []
    for x, norm in zip(sources, normalizers, strict=True):
        _source(inputs, x, norm, None, 0, 0)
    statistics = torch.empty(len(tasks), 3, pointwise_weights[0].shape[0])
    of_task, row = statistics.data_ptr(), statistics.stride(0) * statistics.itemsize
    for task, d, p in zip(tasks, depthwise_weights, pointwise_weights, strict=True):
        n, _, h, w = sources[task.source].shape
        y = _image(n, p.shape[0], -(-h // task.stride), -(-w // task.stride))
        _refuse_one_value(y)
        _task(table, task, (d, p), outputs=(y.data_ptr(), of_task, 0, 0))
        of_task += row
        outputs.append(y)
    _sepconv("forward", inputs, len(sources), table, len(tasks))
    return outputs, statistics


def sepconv_backward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    weight_gradients: bool,
    owns: "Sequence[Own | None]" = (),
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """H = [h > 0] D' * P' Y of every source, summed over its tasks, back through its batch norm; and the
    gradients dP = P' z and dD of the weights (docs/mathematics.md), None where they are not asked for.

    Args:
        adjoints: Y of each task, as y; of one with a link, which is in `owns`, that of the node.
    """
    found = [_image(*x.shape) for x in sources]
    inputs, table = _Rows(), _Rows()
    for x, norm, adjoint in zip(sources, normalizers, found, strict=True):
        _source(inputs, x, norm, None, adjoint.data_ptr(), 0)
    d_gradients: list[Tensor | None] = [None] * len(tasks)
    p_gradients: list[Tensor | None] = [None] * len(tasks)
    for index, task in enumerate(tasks):
        d, p = depthwise_weights[index], pointwise_weights[index]
        d_at = p_at = 0
        if weight_gradients:
            p_gradients[index] = torch.empty(p.shape)
            p_at = p_gradients[index].data_ptr()
            if d is not None:
                d_gradients[index] = torch.empty(d.shape)
                d_at = d_gradients[index].data_ptr()
        adjoint = _Adjoint.of(table, adjoints[index], owns[index] if owns else None)
        _task(table, task, (d, p), adjoint=adjoint, outputs=(0, 0, d_at, p_at))
    _sepconv("backward", inputs, len(sources), table, len(tasks))
    return found, d_gradients, p_gradients


class _SepConvLeft(NamedTuple):
    """What the tangent sweep leaves for the second backward sweep."""

    adjoints: Sequence[Tensor]
    source_tangents: Sequence[Tensor | None]
    depthwise_tangents: Sequence[Tensor | None]
    pointwise_tangents: Sequence[Tensor | None]
    bends: Tensor  # [sources, 2, C], where batch norm moves with the source
    outputs: Sequence[Tensor | None]  # yd
    owns: "Sequence[Own | None]"


def sepconv_tangent_forward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    source_tangents: Sequence[Tensor | None],
    depthwise_tangents: Sequence[Tensor | None],
    pointwise_tangents: Sequence[Tensor | None],
    owns: "Sequence[Own | None]" = (),
) -> tuple[list[Tensor | None], _SepConvLeft]:
    """yd of every task, and what `sepconv_second` needs. A tangent that is None is zero, and so is a yd.

    yd = P (D * ad + Dd * a) + Pd (D * a)
    """
    bends = torch.empty(len(sources), 2, sources[0].shape[1])
    inputs, table, outputs = _Rows(), _Rows(), []
    _sources_with_tangents(inputs, sources, normalizers, source_tangents, bends)
    for index, task in enumerate(tasks):
        dd, pd = depthwise_tangents[index], pointwise_tangents[index]
        moves = any(t is not None for t in (dd, pd, source_tangents[task.source]))
        outputs.append(_image(*adjoints[index].shape) if moves else None)
        weights = depthwise_weights[index], pointwise_weights[index]
        y_at = outputs[-1].data_ptr() if moves else 0
        _task(table, task, weights, (dd, pd), outputs=(y_at, 0, 0, 0))
    _sepconv("tangent", inputs, len(sources), table, len(tasks))
    return outputs, _SepConvLeft(
        adjoints, source_tangents, depthwise_tangents, pointwise_tangents, bends, outputs, owns
    )


def sepconv_second(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor | None],
    left: _SepConvLeft,
) -> list[Tensor]:
    """The second adjoint of every source, from those of the outputs, `adjoints` (None: zero):

    [h > 0] ( D' * (P' Yd + Pd' Y) + Dd' * P' Y ), back through its batch norm, which moves.
    """
    found = [_image(*x.shape) for x in sources]
    inputs, table = _Rows(), _Rows()
    _sources_with_tangents(inputs, sources, normalizers, left.source_tangents, left.bends, found)
    owns = left.owns or [None] * len(tasks)
    for index, task in enumerate(tasks):
        weights = depthwise_weights[index], pointwise_weights[index]
        tangents = left.depthwise_tangents[index], left.pointwise_tangents[index]
        adjoint = _Adjoint.of(table, left.adjoints[index], owns[index], adjoints[index], left.outputs[index])
        _task(table, task, weights, tangents, adjoint)
    _sepconv("second", inputs, len(sources), table, len(tasks))
    return found


def _sources_with_tangents(
    rows: _Rows,
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tangents: Sequence[Tensor | None],
    bends: Tensor,
    adjoints: Sequence[Tensor | None] = (),
) -> None:
    at, row = bends.data_ptr(), bends.stride(0) * bends.itemsize
    for index, (x, norm, xd) in enumerate(zip(sources, normalizers, tangents, strict=True)):
        moves = xd is not None and norm is not None and norm.batch
        adjoint = adjoints[index].data_ptr() if adjoints else 0
        _source(rows, x, norm, xd, adjoint, at + index * row if moves else 0)


def pool_forward(x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum and average, [N, C, ceil(H / stride), ceil(W / stride)]; the maximum's position in its window,
    uint8, 0 to 8 in row-major order, of equal values the first; and the statistics of both, [2, 3, C].

    Raises:
        ValueError: a single value a channel, which has no variance.
    """
    n, c, h, w = x.shape
    maximum = _image(n, c, -(-h // stride), -(-w // stride))
    _refuse_one_value(maximum)
    average, statistics = torch.empty_like(maximum), torch.empty(2, 3, c)
    position = torch.empty_like(maximum, dtype=torch.uint8)
    rows = _Rows()
    outputs = (tensor.data_ptr() for tensor in (maximum, average, position, statistics))
    rows.append(rows.image(x), *outputs, 0, n, h, w, c, stride)
    _pool("forward", rows)
    return maximum, average, position, statistics


def pool_backward(x: Tensor, position: Tensor, stride: int, maximum: Tensor, average: Tensor) -> Tensor:
    """The adjoint of x from those of the two pools. Of x only the shape is used."""
    n, c, h, w = x.shape
    rows, found = _Rows(), _image(n, c, h, w)
    pools = rows.image(maximum), rows.image(average), position.data_ptr()
    rows.append(0, *pools, 0, found.data_ptr(), n, h, w, c, stride)
    _pool("backward", rows)
    return found


def pool_tangent(xd: Tensor, position: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The tangents of the two pools: both are linear once the positions are held."""
    n, c, h, w = xd.shape
    rows, maximum, average = _Rows(), _image(*position.shape), _image(*position.shape)
    outputs = (tensor.data_ptr() for tensor in (maximum, average, position))
    rows.append(rows.image(xd), *outputs, 0, 0, n, h, w, c, stride)
    _pool("tangent", rows)
    return maximum, average


def _pool(sweep: str, rows: _Rows) -> None:
    getattr(_library(), f"darts_pool_{sweep}")(rows.address, torch.get_num_threads())


def _refuse_one_value(y: Tensor) -> None:
    if y.numel() == y.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}"
        )


def mix_forward(candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor) -> Tensor:
    """o = sum over k of p_k h_k, [N, C, H, W]; p [candidates], float32."""
    rows, out = _Rows(), _image(*candidates[0].shape)
    for y, norm, at in zip(candidates, normalizers, _places(rows, p), strict=True):
        _candidate(rows, y, norm, at)
    _mix("forward", rows, candidates, out=out)
    return out


def mix_backward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    spread: Sequence[bool | Link] = (),
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of every candidate, p_k B_k(g), or g where it is `spread`; and the sums of g h_k:
    [candidates, C]."""
    rows = _Rows()
    adjoints, factors, sums = _backward(
        rows, candidates, normalizers, _places(rows, p), [g] * len(candidates), spread
    )
    for link in _links(spread):
        link.first = factors
    return adjoints, sums


def _backward(
    rows: _Rows,
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    weights: Sequence[int],
    gs: Sequence[Tensor],
    spread: Sequence[bool | Link] = (),
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Adjoints, factors and sums, of candidates with an adjoint each."""
    count, c = len(candidates), candidates[0].shape[1]
    sums, factors = torch.empty(count, c), torch.empty(count, _FIRST_FACTORS, c)
    adjoints = _adjoints(gs, spread)
    for k, (y, norm, at) in enumerate(zip(candidates, normalizers, weights, strict=True)):
        adjoint = 0 if spread and spread[k] else adjoints[k].data_ptr()
        _candidate(rows, y, norm, at, rows.image(gs[k]), adjoint=adjoint)
    _mix("backward", rows, candidates, sums=sums, factors=factors)
    return adjoints, factors, sums


def _adjoints(gs: Sequence[Tensor], spread: Sequence[bool | Link]) -> list[Tensor]:
    """What a candidate is given: g where it is `spread`, else a tensor to write."""
    return [g if spread and spread[k] else _image(*g.shape) for k, g in enumerate(gs)]


def _links(spread: Sequence[bool | Link]) -> list[Link]:
    return [link for link in spread if isinstance(link, Link)]


class _MixLeft(NamedTuple):
    """What the tangent sweep of a mix leaves for its second backward sweep."""

    g: Tensor
    tangents: Sequence[Tensor | None]  # yd
    bends: Tensor


def mix_tangent_forward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    sums: Tensor,
    tangents: Sequence[Tensor | None],
    spread: Sequence[bool | Link] = (),
) -> tuple[Tensor, Tensor, _MixLeft]:
    """od = sum over k of p_k hd_k, what dL/dp gains, and what `mix_second` needs; `sums` are what
    `mix_backward` returned. A tangent that is None is zero."""
    rows, out, p_gained = _Rows(), _image(*g.shape), torch.empty_like(p)
    gs = [g] * len(candidates)
    bends = _tangent(rows, candidates, normalizers, _places(rows, p), gs, sums, tangents, out, p_gained)
    return out, p_gained, _MixLeft(g, tangents, bends)


def _tangent(
    rows: _Rows,
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    weights: Sequence[int],
    gs: Sequence[Tensor],
    sums: Tensor,
    tangents: Sequence[Tensor | None],
    out: Tensor | None = None,
    p_gained: Tensor | None = None,
) -> Tensor:
    bends = torch.empty(len(candidates), _BENDS, candidates[0].shape[1])
    for y, norm, at, g, yd in zip(candidates, normalizers, weights, gs, tangents, strict=True):
        _candidate(rows, y, norm, at, rows.image(g), rows.image(yd))
    _mix("tangent", rows, candidates, out=out, sums=sums, bends=bends, p_gained=p_gained)
    return bends


def mix_second(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    left: _MixLeft,
    spread: Sequence[bool | Link] = (),
) -> tuple[list[Tensor], Tensor]:
    """The second adjoint of every candidate (or g where it is `spread`), and the sums of g h_k:
    [candidates, C]; g is the node's second adjoint."""
    rows, count = _Rows(), len(candidates)
    adjoints, factors, sums = _second(
        rows,
        candidates,
        normalizers,
        _places(rows, p),
        [g] * count,
        [left.g] * count,
        left.tangents,
        left.bends,
        spread,
    )
    for link in _links(spread):
        link.second = factors
    return adjoints, sums


def _second(
    rows: _Rows,
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    weights: Sequence[int],
    gs: Sequence[Tensor],
    firsts: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    bends: Tensor,
    spread: Sequence[bool | Link] = (),
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Second adjoints, factors and sums, of candidates with first and second adjoints each."""
    count, c = len(candidates), candidates[0].shape[1]
    sums, factors = torch.empty(count, c), torch.empty(count, _FACTORS, c)
    adjoints = _adjoints(gs, spread)
    for k, (y, norm, at) in enumerate(zip(candidates, normalizers, weights, strict=True)):
        images = map(rows.image, (firsts[k], tangents[k], gs[k]))
        _candidate(rows, y, norm, at, *images, 0 if spread and spread[k] else adjoints[k].data_ptr())
    _mix("second", rows, candidates, sums=sums, bends=bends, factors=factors)
    return adjoints, factors, sums


# Spread: tensors that several mixes read


def spread_backward(
    tensors: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    weights: Tensor,
    places: Sequence[int],
    adjoints: Sequence[Tensor],
) -> tuple[list[Tensor] | Tensor, ...]:
    """B_c(G_c) of every tensor, with G_c the sum over readers j of p_jc G_j; and for `spread_second` the G_c
    of those that are normalised, and the sums of G_c h_c.

    `places` and `adjoints` are by reader, then by tensor."""
    found, normed = _weighed(weights, places, adjoints, len(tensors)), _normed(normalizers)
    if not normed:
        return found, weights.new_empty(0)
    given, norms, gs = _at(normed, tensors), _at(normed, normalizers), _at(normed, found)
    adjoints, _, sums = _backward(_Rows(), given, norms, [0] * len(normed), gs)
    for c, adjoint in zip(normed, adjoints, strict=True):
        found[c] = adjoint
    return found, *gs, sums


def spread_second(
    tensors: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    weights: Tensor,
    places: Sequence[int],
    adjoints: Sequence[Tensor],
    *left: Tensor | Sequence[Tensor | None],
) -> list[Tensor]:
    """The second adjoint of every tensor; `left` is what `spread_backward` returned after the adjoints, and
    the tensors' tangents."""
    found, normed = _weighed(weights, places, adjoints, len(tensors)), _normed(normalizers)
    if not normed:
        return found
    *firsts, sums, tangents = left
    given, norms, moved = _at(normed, tensors), _at(normed, normalizers), _at(normed, tangents)
    ones = [0] * len(normed)
    bends = _tangent(_Rows(), given, norms, ones, firsts, sums, moved)
    gs = _at(normed, found)
    for c, adjoint in zip(
        normed, _second(_Rows(), given, norms, ones, gs, firsts, moved, bends)[0], strict=True
    ):
        found[c] = adjoint
    return found


def _weighed(
    weights: Tensor, places: Sequence[int], adjoints: Sequence[Tensor], tensors: int
) -> list[Tensor]:
    """The sum over readers of p_jc G_j, of every tensor."""
    found = []
    for c in range(tensors):
        rows, out = _Rows(), _image(*adjoints[c].shape)
        at = rows.vector(weights)
        for place, g in zip(places[c::tensors], adjoints[c::tensors], strict=True):
            _candidate(rows, g, None, at + 4 * place)
        _mix("forward", rows, adjoints[c::tensors], out=out)
        found.append(out)
    return found


def _normed(normalizers: Sequence[Normalizer | None]) -> list[int]:
    return [c for c, norm in enumerate(normalizers) if norm is not None]


def _at(indices: Sequence[int], values: Sequence) -> list:
    return [values[index] for index in indices]


def _places(rows: _Rows, p: Tensor) -> range:
    """The addresses of p's numbers."""
    start = rows.vector(p)
    return range(start, start + 4 * p.numel(), 4)


def _candidate(
    rows: _Rows,
    y: Tensor,
    norm: Normalizer | None,
    weight: int,
    g: int = 0,
    tangent: int = 0,
    second: int = 0,
    adjoint: int = 0,
) -> None:
    mean, r, batch = rows.norm(norm)
    rows.append(rows.image(y), mean, r, weight, g, tangent, second, adjoint, batch)


def _mix(
    sweep: str,
    rows: _Rows,
    candidates: Sequence[Tensor],
    out: Tensor | None = None,
    sums: Tensor | None = None,
    bends: Tensor | None = None,
    factors: Tensor | None = None,
    p_gained: Tensor | None = None,
) -> None:
    n, c, h, w = candidates[0].shape
    call = _Rows()
    call.append(
        rows.address, *(0 if t is None else t.data_ptr() for t in (out, sums, bends, factors, p_gained))
    )
    call.append(len(candidates), n * h * w, c)
    getattr(_library(), f"darts_mix_{sweep}")(call.address, torch.get_num_threads())
