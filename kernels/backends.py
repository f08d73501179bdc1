"""Which backend computes what."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from darts_fast.kernels import aten, native
from darts_fast.kernels.types import Backend, Call, tensors

_chosen: list[Backend] = []


def backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that computes on activations of this device and type: chosen by them and by what was built
    when darts_fast was installed (or by `using`), never by what failed elsewhere.

        CUDA            triton
        CPU, float32    native, where its library was built
        anything else   aten
    """
    if _chosen:
        return _chosen[-1]
    if device.type == "cuda":
        from darts_fast.kernels import triton

        return triton
    if device.type == "cpu" and dtype == torch.float32 and native.level() is not None:
        return native
    return aten


@contextmanager
def using(chosen: Backend) -> Iterator[None]:
    """Within, this backend computes on every device: for tests (Triton's interpreter on the CPU), for
    benchmarks, and for counting and compiling launches without data."""
    _chosen.append(chosen)
    try:
        yield
    finally:
        _chosen.pop()


def used(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for this device and type in a few words; and why it is not the fastest one there, if it is
    not."""
    level = native.level()
    if backend(device, dtype) is native and level is not None:
        return f"native (C++, {native.LEVELS[level]})"
    if device.type == "cuda":
        return "triton"
    if device.type == "cpu" and dtype == torch.float32:
        return f"aten (native is faster but {native.absence()})"
    return "aten"


def available() -> dict[str, str]:
    """Each backend with what it is used for on this machine, or why it is not."""
    found = {"triton": "CUDA" if torch.cuda.is_available() else "no CUDA device"}
    level = native.level()
    if level is None:
        return {**found, "native": str(native.absence()), "aten": "everything on the CPU"}
    found["native"] = f"float32 on the CPU, {native.LEVELS[level]}"
    return {**found, "aten": "everything else on the CPU"}


_collections: list[list[Call]] = []


@contextmanager
def collected() -> Iterator[list[Call]]:
    """Within, the calls of every program that runs are appended to the list: for counting and for compiling
    ahead."""
    calls: list[Call] = []
    _collections.append(calls)
    try:
        yield calls
    finally:
        _collections.remove(calls)


def program(chosen: Backend, calls: Sequence[Call]) -> Callable[[], None]:
    """Returns a function that runs the calls. On meta tensors it computes nothing."""
    meta = any(t.is_meta for call in calls for t in tensors(call.writes))
    compute = (lambda: None) if meta else chosen.program(calls)

    def run() -> None:
        for collection in _collections:
            collection.extend(calls)
        compute()

    return run
