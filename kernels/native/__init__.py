"""The kernels in C++ for CPU: the functions of `torch_backend`, for float32.

setup.py compiles the sources beside this file once per processor level, where there is a compiler; the widest
that this processor runs is loaded, by ctypes. A call makes a table of C structures from tensors and runs all
its tasks on `torch.get_num_threads()` threads; the bits of the result do not depend on how many.

Tensors are float32 [N, C, H, W] in channels-last memory, what C++ sees as [n, h, w, c].
"""

import ctypes
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


class _Source(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "x_tangent", "mean", "r", "adjoint")),
        *((name, c_int64) for name in ("batch", "n", "h", "w", "c")),
    ]


class _Task(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("source", "kernel", "stride", "dilation", "offset", "k")),
        *((name, c_void_p) for name in ("d", "p", "d_tangent", "p_tangent", "y_adjoint")),
        *((name, c_void_p) for name in ("y", "statistics", "d_gradient", "p_gradient")),
    ]


class _Pool(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "maximum", "average", "position", "statistics", "adjoint")),
        *((name, c_int64) for name in ("n", "h", "w", "c", "stride")),
    ]


class _Candidate(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("y", "mean", "r", "tangent", "adjoint")),
        ("batch", c_int64),
    ]


class _Mix(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("candidates", "p", "g", "out", "sums", "p_gained")),
        *((name, c_int64) for name in ("count", "m", "c")),
    ]


def _path(level: int) -> Path | None:
    here = Path(__file__).resolve().parent
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


class _Tensors:
    """The tensors whose addresses C++ has during one call: they live as long as this does."""

    def __init__(self):
        self.kept: list[Tensor] = []

    def image(self, tensor: Tensor | None) -> int | None:
        """The address of activations [N, C, H, W], in channels-last memory."""
        if tensor is None:
            return None
        if tensor.dtype is not torch.float32 or tensor.is_cuda:
            raise TypeError(
                f"the native kernels take float32 on the CPU, not {tensor.dtype} on {tensor.device}"
            )
        tensor = tensor.contiguous(memory_format=torch.channels_last)
        self.kept.append(tensor)
        return tensor.data_ptr()

    def __call__(self, tensor: Tensor | None) -> int | None:
        """The address of weights, their gradients or statistics, in the order of their dimensions."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()


def _image(n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), dtype=torch.float32, memory_format=torch.channels_last)


def _source(keep: _Tensors, x: Tensor, norm: Normalizer | None) -> _Source:
    n, c, h, w = x.shape
    found = _Source(x=keep.image(x), n=n, h=h, w=w, c=c)
    if norm is not None:
        found.mean, found.r, found.batch = keep(norm.mean), keep(norm.r), norm.batch
    return found


def _task(keep: _Tensors, task: Task, d: Tensor | None, p: Tensor) -> _Task:
    kernel = 0 if d is None else d.shape[-1]
    return _Task(*task[:1], kernel, *task[1:], p.shape[0], keep(d), keep(p))


def _sepconv(sweep: str, sources: list[_Source], tasks: list[_Task]) -> None:
    getattr(_library(), f"darts_sepconv_{sweep}")(
        (_Source * len(sources))(*sources),
        len(sources),
        (_Task * len(tasks))(*tasks),
        len(tasks),
        torch.get_num_threads(),
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
    keep = _Tensors()
    in_c = [_source(keep, x, norm) for x, norm in zip(sources, normalizers, strict=True)]
    outputs, table = [], []
    statistics = torch.empty(len(tasks), 3, pointwise_weights[0].shape[0])
    for index, (task, d, p) in enumerate(zip(tasks, depthwise_weights, pointwise_weights, strict=True)):
        n, _, h, w = sources[task.source].shape
        y = _image(n, p.shape[0], -(-h // task.stride), -(-w // task.stride))
        _refuse_one_value(y)
        found = _task(keep, task, d, p)
        found.y, found.statistics = keep.image(y), keep(statistics[index])
        outputs.append(y)
        table.append(found)
    _sepconv("forward", in_c, table)
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
    keep = _Tensors()
    found = [torch.empty_like(x, memory_format=torch.channels_last) for x in sources]
    in_c = []
    for x, norm, adjoint in zip(sources, normalizers, found, strict=True):
        in_c.append(_source(keep, x, norm))
        in_c[-1].adjoint = keep.image(adjoint)
    table = []
    d_gradients: list[Tensor | None] = [None] * len(tasks)
    p_gradients: list[Tensor | None] = [None] * len(tasks)
    for index, task in enumerate(tasks):
        d, p = depthwise_weights[index], pointwise_weights[index]
        table.append(_task(keep, task, d, p))
        table[-1].y_adjoint = keep.image(adjoints[index])
        if weight_gradients:
            p_gradients[index] = torch.empty(p.shape)
            table[-1].p_gradient = keep(p_gradients[index])
            if d is not None:
                d_gradients[index] = torch.empty(d.shape)
                table[-1].d_gradient = keep(d_gradients[index])
    _sepconv("backward", in_c, table)
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
    keep = _Tensors()
    weights_move = [False] * len(sources)  # a source has a task whose weights have a tangent
    for task, dd, pd in zip(tasks, depthwise_tangents, pointwise_tangents, strict=True):
        weights_move[task.source] |= dd is not None or pd is not None
    in_c, gained = [], []
    for index, (x, norm, xd) in enumerate(zip(sources, normalizers, source_tangents, strict=True)):
        bends = norm is not None and norm.batch and xd is not None
        adjoint = torch.empty_like(x, memory_format=torch.channels_last)
        in_c.append(_source(keep, x, norm))
        in_c[-1].x_tangent, in_c[-1].adjoint = keep.image(xd), keep.image(adjoint)
        gained.append(adjoint if weights_move[index] or bends else None)
    outputs: list[Tensor | None] = []
    table = []
    for index, task in enumerate(tasks):
        dd, pd = depthwise_tangents[index], pointwise_tangents[index]
        table.append(_task(keep, task, depthwise_weights[index], pointwise_weights[index]))
        table[-1].y_adjoint = keep.image(adjoints[index])
        table[-1].d_tangent, table[-1].p_tangent = keep(dd), keep(pd)
        moves = any(t is not None for t in (dd, pd, source_tangents[task.source]))
        outputs.append(_image(*adjoints[index].shape) if moves else None)
        table[-1].y = keep.image(outputs[-1])
    _sepconv("tangent", in_c, table)
    return outputs, gained


def pool_forward(x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum and average, [N, C, ceil(H / stride), ceil(W / stride)]; the maximum's position in its window,
    uint8, 0 to 8 in row-major order, of equal values the first; and the statistics of both, [2, 3, C].

    Raises:
        ValueError: a single value a channel, which has no variance.
    """
    keep = _Tensors()
    n, c, h, w = x.shape
    maximum = _image(n, c, -(-h // stride), -(-w // stride))
    _refuse_one_value(maximum)
    average, statistics = torch.empty_like(maximum), torch.empty(2, 3, c)
    position = torch.empty_like(maximum, dtype=torch.uint8)
    _pool(
        "forward",
        x.shape,
        stride,
        x=keep.image(x),
        maximum=keep.image(maximum),
        average=keep.image(average),
        position=position.data_ptr(),
        statistics=keep(statistics),
    )
    return maximum, average, position, statistics


def pool_backward(x: Tensor, position: Tensor, stride: int, maximum: Tensor, average: Tensor) -> Tensor:
    """The adjoint of x from those of the two pools. Of x only the shape is used."""
    keep = _Tensors()
    found = torch.empty_like(x, memory_format=torch.channels_last)
    _pool(
        "backward",
        x.shape,
        stride,
        maximum=keep.image(maximum),
        average=keep.image(average),
        position=position.data_ptr(),
        adjoint=keep.image(found),
    )
    return found


def pool_tangent(xd: Tensor, position: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The tangents of the two pools: both are linear once the positions are held."""
    keep = _Tensors()
    maximum, average = _image(*position.shape), _image(*position.shape)
    _pool(
        "tangent",
        xd.shape,
        stride,
        x=keep.image(xd),
        maximum=keep.image(maximum),
        average=keep.image(average),
        position=position.data_ptr(),
    )
    return maximum, average


def _pool(sweep: str, shape: torch.Size, stride: int, **addresses: int) -> None:
    n, c, h, w = shape
    call = _Pool(**addresses, n=n, h=h, w=w, c=c, stride=stride)
    getattr(_library(), f"darts_pool_{sweep}")(ctypes.byref(call), torch.get_num_threads())


def _refuse_one_value(y: Tensor) -> None:
    if y.numel() == y.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}"
        )


def mix_forward(candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor) -> Tensor:
    """o = sum over k of p_k h_k, [N, C, H, W]; p [candidates], float32."""
    keep = _Tensors()
    table = _candidates(keep, candidates, normalizers)
    out = _image(*candidates[0].shape)
    _mix("forward", table, out, p=keep(p), out=keep.image(out))
    return out


def mix_backward(
    candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None], p: Tensor, g: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of every candidate, p_k B_k(g), and the sums of g h_k: [candidates, C]."""
    keep = _Tensors()
    table = _candidates(keep, candidates, normalizers)
    adjoints, sums = [_image(*g.shape) for _ in candidates], torch.empty(len(table), g.shape[1])
    for row, adjoint in zip(table, adjoints, strict=True):
        row.adjoint = keep.image(adjoint)
    _mix("backward", table, g, p=keep(p), g=keep.image(g), sums=keep(sums))
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
    keep = _Tensors()
    table = _candidates(keep, candidates, normalizers)
    out, p_gained = _image(*g.shape), torch.empty_like(p)
    gained: list[Tensor | None] = []
    for row, norm, tangent in zip(table, normalizers, tangents, strict=True):
        bends = norm is not None and norm.batch and tangent is not None
        gained.append(_image(*g.shape) if bends else None)
        row.tangent, row.adjoint = keep.image(tangent), keep.image(gained[-1])
    _mix(
        "tangent",
        table,
        g,
        p=keep(p),
        g=keep.image(g),
        out=keep.image(out),
        sums=keep(sums),
        p_gained=keep(p_gained),
    )
    return out, gained, p_gained


def _candidates(
    keep: _Tensors, candidates: Sequence[Tensor], normalizers: Sequence[Normalizer | None]
) -> list[_Candidate]:
    found = []
    for y, norm in zip(candidates, normalizers, strict=True):
        row = _Candidate(y=keep.image(y))
        if norm is not None:
            row.mean, row.r, row.batch = keep(norm.mean), keep(norm.r), norm.batch
        found.append(row)
    return found


def _mix(sweep: str, table: list[_Candidate], like: Tensor, **addresses: int) -> None:
    rows = (_Candidate * len(table))(*table)
    c = like.shape[1]
    call = _Mix(ctypes.addressof(rows), **addresses, count=len(table), m=like.numel() // c, c=c)
    getattr(_library(), f"darts_mix_{sweep}")(ctypes.byref(call), torch.get_num_threads())
