"""The kernels in C++ for CPU: the functions of `torch_backend`, for float32. In place of `..._tangent` of the
mix and of sepconv there are `..._tangent_forward`, which gives the tangents of the outputs, and `..._second`,
the second backward sweep whole; and a linked tensor's adjoint is made where `sepconv` or `spread` loads it
(see `handover`). What a link holds here is not the sums but the factors that they come to: `sums` is
[tensors, 3, C] in the first sweep and [tensors, 5, C] in the second, see lanes.h.

setup.py compiles the sources beside this file once per processor level, where there is a compiler; the widest
that this processor runs is loaded, by ctypes. A call makes a table of C structures from tensors and runs all
its tasks on `torch.get_num_threads()` threads; the bits of the result do not depend on how many.

Tensors are float32 [N, C, H, W] in channels-last memory, what C++ sees as [n, h, w, c].
"""

import ctypes
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from darts_fast.kernels.handover import Link, Reader
from darts_fast.kernels.torch_backend import Normalizer, Task
from darts_fast.kernels.torch_backend import add as add  # a plain sum is nowhere faster
from darts_fast.kernels.torch_backend import in_rows as in_rows

if TYPE_CHECKING:
    from darts_fast.kernels.sepconv import Own  # which imports this module

LEVELS = {4: "x86-64-v4", 3: "x86-64-v3", 0: "portable"}
_NAMES = {4: "_v4", 3: "_v3", 0: "_portable"}


def _path(level: int) -> Path | None:
    here = Path(os.environ.get("DARTS_NATIVE_FOLDER") or Path(__file__).resolve().parent)  # see sanitize.sh
    paths = [here / (_NAMES[level] + suffix) for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.exists()), None)


def _digest() -> str:
    """Of the sources beside this file, as setup.py takes it; empty where there are none (a wheel)."""
    here = Path(__file__).resolve().parent
    sources = sorted(path for end in ("cpp", "h") for path in here.glob(f"*.{end}"))
    return hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest() if sources else ""


@cache
def absence() -> str | None:
    """Why there are no kernels in C++; None where there are."""
    if _path(0) is None:
        return "was not built: no C++ compiler with OpenMP when darts_fast was installed"
    built = ctypes.CDLL(str(_path(0))).darts_sources
    built.restype = ctypes.c_char_p
    # The tables that C++ reads are laid out by Python: of other sources the result would be garbage.
    if built() and _digest() not in ("", built().decode()):
        return "was built of other sources than are here: install darts_fast again"
    return None


@cache
def level() -> int | None:
    """The key of LEVELS that is used on this machine; None where there is none, see `absence`."""
    if absence() is not None:
        return None
    most = ctypes.CDLL(str(_path(0))).darts_level()
    return max(found for found in LEVELS if found <= most and _path(found) is not None)


def library_of(level: int) -> ctypes.CDLL:
    """The library of a processor level, which must have been built."""
    library = ctypes.CDLL(str(_path(level)))
    sweeps = ["forward", "backward", "tangent", "second"]
    of_sepconv, of_others = [c_void_p, c_int64] * 2, [c_void_p]
    for name, table, last in (("sepconv", of_sepconv, 4), ("pool", of_others, 3), ("mix", of_others, 4)):
        for sweep in sweeps[:last]:
            function = getattr(library, f"darts_{name}_{sweep}")
            function.argtypes, function.restype = [*table, c_int], None
    library.darts_spread.argtypes, library.darts_spread.restype = [c_void_p, c_int], None
    library.darts_multiply_adds.argtypes, library.darts_multiply_adds.restype = [c_int64], c_int64
    return library


@cache
def _library() -> ctypes.CDLL:
    return library_of(level())


_observers: list[Callable[[str, int], None]] = []


@contextmanager
def observed(observer: Callable[[str, int], None]) -> Iterator[None]:
    """Within, `observer` is told of every call of C++ by a sweep, before it is made: its name, and the bytes
    of the distinct images that it reads and writes, without weights and statistics."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _call(name: str, images: Callable[[], dict[int, int]], *arguments: int) -> None:
    """Calls C++. `images` gives the address, or 0, of every image that is read or written, and its bytes."""
    for observer in _observers:
        observer(name, sum(size for address, size in images().items() if address))
    getattr(_library(), f"darts_{name}")(*arguments, torch.get_num_threads())


def multiply_adds(rounds: int) -> int:
    """Computes as many multiply-adds a second as one thread of this processor can, and returns how many they
    were: a measure for benchmarks."""
    return _library().darts_multiply_adds(rounds)


class _Rows:
    """A table of C structures whose fields all are 8 bytes wide, addresses and whole numbers, in the order of
    the C++ sources. It keeps the copies alive that it had to make, so it has to live until C++ returns.
    (ctypes.Structure, field by field, took three times as long: a twentieth of a search step.)"""

    def __init__(self):
        self.values: list[int] = []
        self.copies: list[Tensor | array] = []

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

    def part(self, tensor: Tensor | None, row: int) -> int:
        """The same of channels of an image of `row` channels."""
        if tensor is None or tensor.shape[1] == row:
            return self.image(tensor)
        n, c, h, w = tensor.shape
        strides = zip(tensor.shape, tensor.stride(), (h * w * row, 1, w * row, row), strict=True)
        if any(size > 1 and found != wanted for size, found, wanted in strides):
            whole = _image(n, row, h, w)
            whole[:, :c] = tensor
            tensor = whole
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
        if norm is None:
            return 0, 0, 0
        mean = self.vector(norm.statistics)
        return mean, mean + 2 * 4 * norm.statistics.shape[1], norm.batch

    def append(self, *fields: int) -> None:
        self.values += fields

    def column(self, field: int, width: int) -> list[int]:
        """That field of every structure, of `width` fields each."""
        return self.values[field::width]

    def address(self) -> int:
        """Of the table as it is now."""
        table = array("q", self.values)
        self.copies.append(table)
        return table.buffer_info()[0]


def _image(n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), dtype=torch.float32, memory_format=torch.channels_last)


def _images(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """One allocation each: for all together, of 12 MB, it goes back to the system when it is freed, and comes
    with page faults anew (sepconv's tangents took 168 ms of a step of 8 layers, then 227)."""
    return [_image(*shape) for shape in shapes]


def _like(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """A tensor for each, in one allocation."""
    return _unflatten_dense_tensors(torch.empty(sum(w.numel() for w in weights)), weights)


def _image_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _source(
    rows: _Rows,
    x: Tensor,
    norm: Normalizer | None,
    xd: Tensor | None = None,
    adjoint: int = 0,
    factors: int = 0,
    first: Tensor | None = None,
    bends: int = 0,
) -> None:
    n, c, h, w = x.shape
    mean, r, batch = rows.norm(norm)
    at = adjoint, factors, rows.image(first), bends
    rows.append(rows.image(x), rows.image(xd), mean, r, *at, batch, n, h, w, c)


_FIRST_FACTORS, _FACTORS, _BENDS = 3, 5, 5  # rows, see lanes.h


def _adjoint(
    rows: _Rows,
    y: Tensor,
    own: "Own | None",
    second: Tensor | None = None,
    tangent: Tensor | None = None,
) -> tuple[int, ...]:
    """Of an output of sepconv, in the order of the C++ structure: `row`, then the addresses.

    Args:
        tangent: that of the output, where it has a link.
    """
    if own is None:
        return y.shape[1], rows.image(y), rows.image(second), 0, 0, 0, 0, 0
    row = own.first.stride(-2)
    place = own.link.index * row * 4  # bytes, of a row of factors
    factors = own.first.data_ptr() + place * _FIRST_FACTORS
    images = (
        row,
        rows.part(y, row),
        rows.part(second, row),
        rows.part(own.y, row),
        rows.vector(own.statistics),
    )
    if second is None:
        return *images, 0, factors, 0
    seconds = own.link.sums.data_ptr() + place * _FACTORS + 4 * (own.channels.start or 0)
    return *images, rows.part(tangent, row), factors, seconds


def _task(
    rows: _Rows,
    task: Task,
    weights: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    adjoint: Sequence[int],
    outputs: Sequence[int] = (0, 0, 0, 0),
) -> None:
    """weights: depthwise and pointwise, contiguous; adjoint: see `_adjoint`; outputs: y or its tangent,
    statistics, and the gradients of the weights."""
    source, stride, dilation, offset = task
    d, p = weights
    size, at = (0, 0) if d is None else (d.shape[-1], d.data_ptr())
    rows.values += (source, size, stride, dilation, offset, p.shape[0], adjoint[0], at, p.data_ptr())
    rows.values += (rows.vector(tangents[0]), rows.vector(tangents[1]), *adjoint[1:], *outputs)


_NO_ADJOINT = (0,) * 7


class _Outputs:
    """Of tasks, the channels of `join` neighbours side by side in one tensor [N, join * K, HO, WO]."""

    def __init__(
        self, sources: Sequence[Tensor], tasks: Sequence[Task], pointwise: Sequence[Tensor], join: int
    ):
        self.join, self.k, shapes = join, pointwise[0].shape[0], []
        for task in tasks[::join]:
            n, _, h, w = sources[task.source].shape
            shapes.append((n, join * self.k, -(-h // task.stride), -(-w // task.stride)))
        self.tensors = _images(shapes)

    @property
    def row(self) -> int:
        return self.join * self.k

    def address(self, task: int) -> int:
        return self.tensors[task // self.join].data_ptr() + task % self.join * self.k * 4


def _sepconv(sweep: str, sources: _Rows, n_sources: int, tasks: _Rows, n_tasks: int) -> None:
    def images() -> dict[int, int]:
        found, sizes = {}, list(zip(*(sources.column(field, 13) for field in (9, 10, 11, 12)), strict=True))
        for field in (0, 1, 4, 6):  # x, its tangent, its adjoint, the first one
            for address, (n, h, w, c) in zip(sources.column(field, 13), sizes, strict=True):
                found[address] = 4 * n * h * w * c
        of_task = zip(*(tasks.column(field, 22) for field in (0, 2, 5)), strict=True)
        outputs = []
        for source, stride, k in of_task:
            n, h, w, _ = sizes[source]
            outputs.append(4 * n * -(-h // stride) * -(-w // stride) * k)
        for field in (11, 12, 13, 15, 18):  # both adjoints, the output, its tangent, what is written
            found |= zip(tasks.column(field, 22), outputs, strict=True)
        return found

    _call(f"sepconv_{sweep}", images, sources.address(), n_sources, tasks.address(), n_tasks)


def sepconv_forward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    join: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """y_t = P_t (D_t * relu(h)) of every task, and the statistics.

    Returns:
        y of each task, [N, K, ceil(H / stride), ceil(W / stride)]; and of each the mean, biased variance
        and 1 / sqrt(variance + 1e-5), [tasks, 3, K]. The channels of `join` neighbours are side by side.

    Raises:
        ValueError: a single value a channel, which has no variance.
    """
    inputs, table = _Rows(), _Rows()
    for x, norm in zip(sources, normalizers, strict=True):
        _source(inputs, x, norm)
    outputs = _Outputs(sources, tasks, pointwise_weights, join)
    _refuse_one_value(outputs.tensors[0])
    statistics = torch.empty(len(outputs.tensors), 3, outputs.row)
    start, size = statistics.data_ptr(), 4 * 3 * outputs.row
    for index, (task, d, p) in enumerate(zip(tasks, depthwise_weights, pointwise_weights, strict=True)):
        of_task = start + index // join * size + index % join * outputs.k * 4
        at = outputs.address(index), of_task, 0, 0
        _task(table, task, (d, p), (None, None), (outputs.row, *_NO_ADJOINT), at)
    _sepconv("forward", inputs, len(sources), table, len(tasks))
    return outputs.tensors, statistics


def sepconv_backward(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    weight_gradients: bool,
    owns: "Sequence[Own | None]" = (),
    source_links: Sequence[Link] = (),
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """H = [h > 0] D' * P' Y of every source, summed over its tasks, back through its batch norm; and the
    gradients dP = P' z and dD of the weights (docs/mathematics.md), None where they are not asked for.

    Args:
        adjoints: Y of each task, as y; of one with a link, which is in `owns`, what the reader hands back.
        source_links: with these H is not taken through the batch norm; the links' giver does.
    """
    found = _images([x.shape for x in sources])
    inputs, table = _Rows(), _Rows()
    factors = _factors(source_links, _FIRST_FACTORS, sources)
    for x, norm, adjoint, at in zip(sources, normalizers, found, factors, strict=True):
        _source(inputs, x, norm, None, adjoint.data_ptr(), at)
    weights = [w for w in (*depthwise_weights, *pointwise_weights) if w is not None]
    gradients = iter(_like(weights) if weight_gradients else ())
    d_gradients = [None if d is None else next(gradients, None) for d in depthwise_weights]
    p_gradients = [next(gradients, None) for _ in pointwise_weights]
    given = zip(tasks, depthwise_weights, pointwise_weights, d_gradients, p_gradients, strict=True)
    for index, (task, d, p, dd, dp) in enumerate(given):
        adjoint = _adjoint(table, adjoints[index], owns[index] if owns else None)
        written = (0 if gradient is None else gradient.data_ptr() for gradient in (dd, dp))
        _task(table, task, (d, p), (None, None), adjoint, (0, 0, *written))
    _sepconv("backward", inputs, len(sources), table, len(tasks))
    return found, d_gradients, p_gradients


def _factors(links: Sequence[Link], rows: int, sources: Sequence[Tensor]) -> Sequence[int]:
    """Has the links hold factors of their tensors, the sources, yet to be written; their addresses, or 0."""
    if not links:
        return [0] * len(sources)
    factors = torch.empty(len(links), rows, sources[0].shape[1])
    for link in links:
        link.sums = factors
    start, size = factors.data_ptr(), 4 * rows * factors.shape[2]
    return range(start, start + size * len(links), size)


class _SepConvLeft(NamedTuple):
    """What the tangent sweep leaves for the second backward sweep."""

    adjoints: Sequence[Tensor]
    source_tangents: Sequence[Tensor | None]
    depthwise_tangents: Sequence[Tensor | None]
    pointwise_tangents: Sequence[Tensor | None]
    bends: Tensor  # [sources, 5, C], where batch norm moves with the source
    outputs: Sequence[Tensor | None]  # yd of every task
    owns: "Sequence[Own | None]"
    source_links: Sequence[Link]


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
    join: int = 1,
    source_links: Sequence[Link] = (),
    firsts: Sequence[Tensor] = (),
) -> tuple[list[Tensor], _SepConvLeft]:
    """yd of every task, joined as the outputs are, and what `sepconv_second` needs. A tangent that is None is
    zero. `firsts` are the sources' adjoints that `sepconv_backward` gave, where they have links.

    yd = P (D * ad + Dd * a) + Pd (D * a)
    """
    bends = torch.empty(len(sources), _BENDS, sources[0].shape[1])
    inputs, table = _Rows(), _Rows()
    firsts = firsts or [None] * len(sources)
    addresses = _bends(bends, normalizers, source_tangents)
    for args in zip(sources, normalizers, source_tangents, firsts, addresses, strict=True):
        x, norm, xd, first, at = args
        _source(inputs, x, norm, xd, first=first, bends=at)
    outputs = _Outputs(sources, tasks, pointwise_weights, join)
    for index, task in enumerate(tasks):
        weights = depthwise_weights[index], pointwise_weights[index]
        tangents = depthwise_tangents[index], pointwise_tangents[index]
        at = outputs.address(index), 0, 0, 0
        _task(table, task, weights, tangents, (outputs.row, *_NO_ADJOINT), at)
    _sepconv("tangent", inputs, len(sources), table, len(tasks))
    by_task = [part for y in outputs.tensors for part in ((y,) if join == 1 else y.chunk(join, dim=1))]
    tangents = source_tangents, depthwise_tangents, pointwise_tangents
    return outputs.tensors, _SepConvLeft(adjoints, *tangents, bends, by_task, owns, source_links)


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

    [h > 0] ( D' * (P' Yd + Pd' Y) + Dd' * P' Y ), back through its batch norm, which moves, or with links
    left to their giver.
    """
    found = _images([x.shape for x in sources])
    inputs, table = _Rows(), _Rows()
    factors = _factors(left.source_links, _FACTORS, sources)
    addresses = _bends(left.bends, normalizers, left.source_tangents)
    given = sources, normalizers, left.source_tangents, found, factors, addresses
    for x, norm, xd, adjoint, at, bends in zip(*given, strict=True):
        _source(inputs, x, norm, xd, adjoint.data_ptr(), at, None, bends)
    owns = left.owns or [None] * len(tasks)
    for index, task in enumerate(tasks):
        weights = depthwise_weights[index], pointwise_weights[index]
        tangents = left.depthwise_tangents[index], left.pointwise_tangents[index]
        given = left.adjoints[index], owns[index], adjoints[index], left.outputs[index]
        _task(table, task, weights, tangents, _adjoint(table, *given))
    _sepconv("second", inputs, len(sources), table, len(tasks))
    return found


def _bends(
    bends: Tensor, normalizers: Sequence[Normalizer | None], tangents: Sequence[Tensor | None]
) -> list[int]:
    """The address of each source's; 0 where it has no batch norm that moves along the tangent."""
    start, size = bends.data_ptr(), bends.stride(0) * 4
    return [
        start + i * size if xd is not None and norm is not None and norm.batch else 0
        for i, (norm, xd) in enumerate(zip(normalizers, tangents, strict=True))
    ]


def pool_forward(x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum and average, [N, C, ceil(H / stride), ceil(W / stride)]; the maximum's position in its window,
    uint8, 0 to 8 in row-major order, of equal values the first; and the statistics of both, [2, 3, C].

    Raises:
        ValueError: a single value a channel, which has no variance.
    """
    n, c, h, w = x.shape
    maximum, average = _images([(n, c, -(-h // stride), -(-w // stride))] * 2)
    _refuse_one_value(maximum)
    statistics = torch.empty(2, 3, c)
    position = torch.empty_like(maximum, dtype=torch.uint8)
    rows = _Rows()
    outputs = (tensor.data_ptr() for tensor in (maximum, average, position, statistics))
    rows.append(rows.image(x), *outputs, 0, 0, 0, n, h, w, c, stride)
    _pool("forward", rows)
    return maximum, average, position, statistics


def pool_backward(
    x: Tensor,
    position: Tensor,
    stride: int,
    maximum: Tensor,
    average: Tensor,
    terms: Sequence[Tensor] = (),
) -> Tensor:
    """The adjoint of x from those of the two pools, and the sum of `terms`. Of x only the shape is used."""
    n, c, h, w = x.shape
    rows, table, found = _Rows(), _Rows(), _image(n, c, h, w)
    table.append(*map(rows.image, terms))
    pools = rows.image(maximum), rows.image(average), position.data_ptr()
    rows.append(0, *pools, 0, found.data_ptr(), table.address(), len(terms), n, h, w, c, stride)
    _pool("backward", rows, table)
    return found


def pool_tangent(xd: Tensor, position: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The tangents of the two pools: both are linear once the positions are held."""
    n, c, h, w = xd.shape
    rows, (maximum, average) = _Rows(), _images([position.shape] * 2)
    outputs = (tensor.data_ptr() for tensor in (maximum, average, position))
    rows.append(rows.image(xd), *outputs, 0, 0, 0, 0, n, h, w, c, stride)
    _pool("tangent", rows)
    return maximum, average


def _pool(sweep: str, rows: _Rows, terms: _Rows | None = None) -> None:
    def images() -> dict[int, int]:
        x, maximum, average, position, _, adjoint, _, _, n, h, w, c, stride = rows.values
        whole, pooled = n * h * w * c, n * -(-h // stride) * -(-w // stride) * c
        found = dict.fromkeys((x, adjoint, *(terms.values if terms else ())), 4 * whole)
        return found | {maximum: 4 * pooled, average: 4 * pooled, position: pooled}

    _call(f"pool_{sweep}", images, rows.address())


def _refuse_one_value(y: Tensor) -> None:
    if y.numel() == y.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}"
        )


def mix_forward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    outputs: Sequence[Tensor] = (),
) -> Tensor:
    """o = sum over k of p_k h_k, [N, C, H, W]; p [candidates], float32. `outputs`, an image, a slice of
    channels or both, are all written, and the first returned; else o is a new tensor."""
    rows, outputs = _Rows(), outputs or [_image(*candidates[0].shape)]
    for y, norm, at in zip(candidates, normalizers, _places(rows, p), strict=True):
        _candidate(rows, y, norm, at)
    _mix("forward", rows, candidates, outputs)
    return outputs[0]


def mix_backward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    links: Sequence[Link | None] = (),
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The adjoint of every candidate, p_k B_k(g), or g where it has a link; the sums of g h_k:
    [candidates, C]; and dL/dp, their sums over channels."""
    rows, count, c = _Rows(), len(candidates), g.shape[1]
    sums, gained = torch.empty(count, c), torch.empty(count)
    adjoints = _adjoints(g, count, links)
    g_at = rows.image(g)
    for y, norm, at, adjoint in zip(candidates, normalizers, _places(rows, p), adjoints, strict=True):
        _candidate(rows, y, norm, at, g_at, adjoint=0 if adjoint is g else adjoint.data_ptr())
    factors = _link_factors(links, _FIRST_FACTORS, count, c)
    _mix("backward", rows, candidates, sums=sums, factors=factors, p_gained=gained)
    return adjoints, sums, gained


def _adjoints(g: Tensor, count: int, links: Sequence[Link | None]) -> list[Tensor]:
    """What a candidate is given: g where it has a link, else a tensor to write."""
    if not links:
        return [_image_like(g) for _ in range(count)]
    return [_image_like(g) if link is None else g for link in links]


def _link_factors(links: Sequence[Link | None], rows: int, count: int, c: int) -> Tensor:
    factors = torch.empty(count, rows, c)
    for link in links:
        if link is not None:
            link.sums = factors
    return factors


class _MixLeft(NamedTuple):
    """What the tangent sweep of a mix leaves for its second backward sweep."""

    g: Tensor
    tangents: Sequence[Tensor | None]  # yd
    bends: Tensor
    gained: Tensor  # by dL/dp


def mix_tangent_forward(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    sums: Tensor,
    tangents: Sequence[Tensor | None],
    links: Sequence[Link | None] = (),
    outputs: Sequence[Tensor] = (),
) -> tuple[Tensor, _MixLeft]:
    """od = sum over k of p_k hd_k, and what `mix_second` needs; `sums` are what `mix_backward` returned,
    `outputs` as in `mix_forward`. A tangent that is None is zero."""
    rows, outputs, gained = _Rows(), outputs or [_image(*g.shape)], torch.empty_like(p)
    bends, g_at = torch.empty(len(candidates), _BENDS, g.shape[1]), rows.image(g)
    for y, norm, at, yd in zip(candidates, normalizers, _places(rows, p), tangents, strict=True):
        _candidate(rows, y, norm, at, g_at, rows.image(yd))
    _mix("tangent", rows, candidates, outputs, sums=sums, bends=bends, p_gained=gained)
    return outputs[0], _MixLeft(g, tangents, bends, gained)


def mix_second(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    left: _MixLeft,
    links: Sequence[Link | None] = (),
) -> tuple[list[Tensor], Tensor]:
    """The second adjoint of every candidate (or g where it has a link), and that of p, with what it gains in
    the tangent sweep; g is the node's second adjoint."""
    rows, count, gained = _Rows(), len(candidates), torch.empty_like(left.gained)
    adjoints = _adjoints(g, count, links)
    g_at, first = rows.image(g), rows.image(left.g)
    given = candidates, normalizers, _places(rows, p), left.tangents, adjoints
    for y, norm, at, yd, adjoint in zip(*given, strict=True):
        written = 0 if adjoint is g else adjoint.data_ptr()
        _candidate(rows, y, norm, at, first, rows.image(yd), g_at, written)
    factors = _link_factors(links, _FACTORS, count, g.shape[1])
    _mix(
        "second",
        rows,
        candidates,
        bends=left.bends,
        factors=factors,
        p_gained=gained,
        p_before=left.gained,
    )
    return adjoints, gained


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
    outputs: Sequence[Tensor] = (),
    sums: Tensor | None = None,
    bends: Tensor | None = None,
    factors: Tensor | None = None,
    p_gained: Tensor | None = None,
    p_before: Tensor | None = None,
) -> None:
    n, c, h, w = candidates[0].shape
    out = next((t for t in outputs if t.is_contiguous(memory_format=torch.channels_last)), None)
    part = next((t for t in outputs if t is not out), None)
    tensors = out, part, sums, bends, factors, p_gained, p_before
    call = _Rows()
    call.append(rows.address(), *(0 if t is None else t.data_ptr() for t in tensors))
    call.append(len(candidates), n * h * w, c, 0 if part is None else part.stride(3))

    def images() -> dict[int, int]:
        fields = (0, 4, 5, 6, 7)  # y, both adjoints of the node, the tangent of y, what is written
        places = [address for field in fields for address in rows.column(field, 9)]
        return dict.fromkeys([*places, *(t.data_ptr() for t in outputs)], 4 * n * c * h * w)

    _call(f"mix_{sweep}", images, call.address())


def spread_backward(
    tensors: Sequence[Tensor], normalizers: Sequence[Normalizer | None], readers: Sequence[Reader]
) -> list[Tensor]:
    """B_c of the sum over readers j of p_jc G_j, for every tensor."""
    return _spread(tensors, normalizers, readers, _FIRST_FACTORS)


def spread_second(
    tensors: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    seconds: Sequence[Reader],
    firsts: Sequence[Reader],
    tangents: Sequence[Tensor | None],
    tangent_sums: Sequence[None],
) -> list[Tensor]:
    """The second adjoint of every tensor, from its tangent; the factors hold what `tangent_sums` would."""
    return _spread(tensors, normalizers, seconds, _FACTORS, firsts, tangents)


def _spread(
    tensors: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    readers: Sequence[Reader],
    rows: int,
    firsts: Sequence[Reader] = (),
    tangents: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    n, c, h, w = tensors[0].shape
    found = _images([y.shape for y in tensors])
    of_readers, table, call = _Rows(), _Rows(), _Rows()
    given = [of_readers.image(reader.adjoint) for reader in readers]
    before = [of_readers.image(first.adjoint) for first in firsts] or [0] * len(readers)
    for i in range(len(tensors)):
        for g, first, reader in zip(given, before, readers, strict=True):
            of_readers.append(g, first, reader.sums.data_ptr() + reader.places[i] * rows * c * 4)
    size, start = len(of_readers.values) // len(tensors) * 8, of_readers.address()
    tangents = tangents or [None] * len(tensors)
    for i, (y, norm, yd, out) in enumerate(zip(tensors, normalizers, tangents, found, strict=True)):
        mean, _, _ = table.norm(norm)
        at = start + i * size
        table.append(table.image(y), mean, table.image(yd), out.data_ptr(), at)
    call.append(table.address(), len(tensors), len(readers), n * h * w, c)

    def images() -> dict[int, int]:
        places = [address for field in (0, 2, 3) for address in table.column(field, 5)]
        places += [address for field in (0, 1) for address in of_readers.column(field, 3)]
        return dict.fromkeys(places, 4 * n * c * h * w)

    _call("spread", images, call.address())
    return found
