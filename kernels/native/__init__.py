"""The kernels in C++ for CPU: the functions of `torch_backend`, for float32.

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

import torch
from torch import Tensor

from darts_fast.kernels.torch_backend import Normalizer, Task
from darts_fast.kernels.torch_backend import add as add  # a plain sum is nowhere faster

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
    for sweep in ("forward", "backward", "tangent"):
        for name, table in (("sepconv", [c_void_p, c_int64] * 2), ("pool", [c_void_p]), ("mix", [c_void_p])):
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


def _source(rows: _Rows, x: Tensor, norm: Normalizer | None, xd: Tensor | None, adjoint: int) -> None:
    n, c, h, w = x.shape
    mean, r, batch = rows.norm(norm)
    rows.append(rows.image(x), rows.image(xd), mean, r, adjoint, batch, n, h, w, c)


def _task(
    rows: _Rows,
    task: Task,
    weights: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None] = (None, None),
    y_adjoint: Tensor | None = None,
    outputs: Sequence[int] = (0, 0, 0, 0),
) -> None:
    """weights: depthwise and pointwise; outputs: y or its tangent, statistics, gradients of the weights."""
    source, stride, dilation, offset = task
    d, p = weights
    kernel = 0 if d is None else d.shape[-1]
    rows.append(source, kernel, stride, dilation, offset, p.shape[0])
    rows.append(*map(rows.vector, weights), *map(rows.vector, tangents), rows.image(y_adjoint), *outputs)


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
        _source(inputs, x, norm, None, 0)
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
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """H = [h > 0] D' * P' Y of every source, summed over its tasks, back through its batch norm; and the
    gradients dP = P' z and dD of the weights (docs/mathematics.md), None where they are not asked for.

    Args:
        adjoints: Y of each task, as y.
    """
    found = [_image(*x.shape) for x in sources]
    inputs, table = _Rows(), _Rows()
    for x, norm, adjoint in zip(sources, normalizers, found, strict=True):
        _source(inputs, x, norm, None, adjoint.data_ptr())
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
        _task(table, task, (d, p), y_adjoint=adjoints[index], outputs=(0, 0, d_at, p_at))
    _sepconv("backward", inputs, len(sources), table, len(tasks))
    return found, d_gradients, p_gradients


def sepconv_tangent(
    sources: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    tasks: Sequence[Task],
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    source_tangents: Sequence[Tensor | None],
    depthwise_tangents: Sequence[Tensor | None],
    pointwise_tangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """yd of every task, and what the sources' second adjoints gain. A tangent that is None is zero, and so
    is a result that is None.

        yd = P (D * ad + Dd * a) + Pd (D * a)      gained to A: Dd' * (P' Y) + D' * (Pd' Y)
    """
    weights_move = [False] * len(sources)  # a source has a task whose weights have a tangent
    for task, dd, pd in zip(tasks, depthwise_tangents, pointwise_tangents, strict=True):
        weights_move[task.source] |= dd is not None or pd is not None
    inputs, table = _Rows(), _Rows()
    gained: list[Tensor] = []
    bend: list[bool] = []  # whether it is zero otherwise
    for index, (x, norm, xd) in enumerate(zip(sources, normalizers, source_tangents, strict=True)):
        bends = norm is not None and norm.batch and xd is not None
        gained.append(_image(*x.shape))
        _source(inputs, x, norm, xd, gained[-1].data_ptr())
        bend.append(weights_move[index] or bends)
    outputs: list[Tensor | None] = []
    for index, task in enumerate(tasks):
        dd, pd = depthwise_tangents[index], pointwise_tangents[index]
        moves = any(t is not None for t in (dd, pd, source_tangents[task.source]))
        outputs.append(_image(*adjoints[index].shape) if moves else None)
        weights = depthwise_weights[index], pointwise_weights[index]
        y_at = outputs[-1].data_ptr() if moves else 0
        _task(table, task, weights, (dd, pd), adjoints[index], (y_at, 0, 0, 0))
    _sepconv("tangent", inputs, len(sources), table, len(tasks))
    return outputs, [adjoint if nonzero else None for adjoint, nonzero in zip(gained, bend, strict=True)]


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
    table, out = _Rows(), _image(*candidates[0].shape)
    for y, norm in zip(candidates, normalizers, strict=True):
        _candidate(table, y, norm)
    _mix("forward", table, len(candidates), p, out, out=out)
    return out


def mix_backward(
    candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor, g: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of every candidate, p_k B_k(g), and the sums of g h_k: [candidates, C]."""
    table, sums = _Rows(), torch.empty(len(candidates), g.shape[1])
    adjoints = [_image(*g.shape) for _ in candidates]
    for y, norm, adjoint in zip(candidates, normalizers, adjoints, strict=True):
        _candidate(table, y, norm, None, adjoint)
    _mix("backward", table, len(candidates), p, g, g=g, sums=sums)
    return adjoints, sums


def mix_tangent(
    candidates: Sequence[Tensor],
    normalizers: Sequence[Normalizer | None],
    p: Tensor,
    g: Tensor,
    adjoints: Sequence[Tensor],
    sums: Tensor,
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """od = sum over k of p_k hd_k, what the candidates' second adjoints gain, and what dL/dp gains. A tangent
    that is None is zero, and so is a gain that is None.

    `sums` is what `mix_backward` returned; the adjoints it returned are computed again from g, which all
    candidates share, rather than read.
    """
    table, out, p_gained = _Rows(), _image(*g.shape), torch.empty_like(p)
    gained: list[Tensor | None] = []
    for y, norm, tangent in zip(candidates, normalizers, tangents, strict=True):
        bends = norm is not None and norm.batch and tangent is not None
        gained.append(_image(*g.shape) if bends else None)
        _candidate(table, y, norm, tangent, gained[-1])
    _mix("tangent", table, len(candidates), p, g, g=g, out=out, sums=sums, p_gained=p_gained)
    return out, gained, p_gained


def _candidate(
    rows: _Rows,
    y: Tensor,
    norm: Normalizer | None,
    tangent: Tensor | None = None,
    adjoint: Tensor | None = None,
) -> None:
    mean, r, batch = rows.norm(norm)
    rows.append(
        rows.image(y), mean, r, rows.image(tangent), 0 if adjoint is None else adjoint.data_ptr(), batch
    )


def _mix(
    sweep: str,
    candidates: _Rows,
    count: int,
    p: Tensor,
    like: Tensor,
    g: Tensor | None = None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
    p_gained: Tensor | None = None,
) -> None:
    call, c = _Rows(), like.shape[1]
    call.append(candidates.address, call.vector(p), call.image(g), call.image(out))
    call.append(call.vector(sums), call.vector(p_gained), count, like.numel() // c, c)
    getattr(_library(), f"darts_mix_{sweep}")(call.address, torch.get_num_threads())
