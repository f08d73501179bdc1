"""Which module computes what."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from darts_fast.kernels import native, torch_backend

_chosen: list[ModuleType] = []


def backend(like: Tensor) -> ModuleType:
    """The module that computes on activations such as `like`: chosen by device, dtype and what was built when
    darts_fast was installed (or by `using`), never by what failed elsewhere. All have the functions of
    `torch_backend`.

        CUDA            triton_backend
        CPU, float32    native, where its library was built
        anything else   torch_backend
    """
    if _chosen:
        return _chosen[-1]
    if like.device.type == "cuda":
        from darts_fast.kernels import triton_backend

        return triton_backend
    if like.device.type == "cpu" and like.dtype == torch.float32 and native.level() is not None:
        return native
    return torch_backend


@contextmanager
def using(module: ModuleType) -> Iterator[None]:
    """Within, `module` computes on every device: for tests (Triton's interpreter on the CPU) and for counting
    and compiling its launches from tensors without data."""
    _chosen.append(module)
    try:
        yield
    finally:
        _chosen.pop()


def second_backward_in_one(like: Tensor) -> bool:
    """Whether the backend has `..._tangent_forward` and `..._second` in place of `..._tangent`: the second
    backward sweep takes in one pass what the tangent sweep adds to it, see `handover`."""
    return hasattr(backend(like), "mix_second")


def used(like: Tensor) -> str:
    """What `backend(like)` is, in a few words, and where it is not the fastest for its device: why."""
    if backend(like) is native:
        return f"native (C++, {native.LEVELS[native.level()]})"
    if like.device.type == "cuda":
        return "triton"
    if like.device.type == "cpu" and like.dtype == torch.float32:
        return f"torch (ATen; native is faster but {native.absence()})"
    return "torch (ATen)"


def available() -> dict[str, str]:
    """Each backend with what it is used for on this machine, or why it is not."""
    found = {"triton": "CUDA" if torch.cuda.is_available() else "no CUDA device"}
    if native.level() is None:
        return {**found, "native": native.absence(), "torch": "everything on the CPU"}
    level = native.LEVELS[native.level()]
    return {**found, "native": f"float32 on the CPU, {level}", "torch": "everything else on the CPU"}
