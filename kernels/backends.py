"""Which module computes what."""

from types import ModuleType

import torch
from torch import Tensor

from darts_fast.kernels import native, torch_backend


def backend(like: Tensor) -> ModuleType:
    """The module that computes on activations such as `like`: chosen by device, dtype and what was built when
    darts_fast was installed, never by what failed elsewhere. All have the functions of `torch_backend`.

        CPU, float32    native, where its library was built
        anything else   torch_backend
    """
    if like.device.type == "cpu" and like.dtype == torch.float32 and native.level() is not None:
        return native
    return torch_backend


def pools_normalized_once(like: Tensor) -> bool:
    """Whether to normalise a pool once for all edges from its state (by `mix` alone) is faster than to leave
    it to the mix of each: not in C++, where a mix reads its candidates once either way, and the normalised
    copies were 10 of the 16 mixes of a cell."""
    return backend(like) is not native


def used(like: Tensor) -> str:
    """What `backend(like)` is, in a few words, and where it is not the fastest for its device: why."""
    if backend(like) is native:
        return f"native (C++, {native.LEVELS[native.level()]})"
    if like.device.type == "cpu" and like.dtype == torch.float32:
        return f"torch (ATen; native is faster but {NOT_BUILT})"
    return "torch (ATen)"


NOT_BUILT = "was not built: no C++ compiler with OpenMP when darts_fast was installed"


def available() -> dict[str, str]:
    """Each backend with what it is used for on this machine, or why it is not."""
    if native.level() is None:
        return {"native": NOT_BUILT, "torch": "everything"}
    return {"native": f"float32 on the CPU, {native.LEVELS[native.level()]}", "torch": "everything else"}
