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


def available() -> dict[str, str]:
    """Each backend with what it is used for on this machine, or why it is not."""
    found = {}
    if native.level() is None:
        found["native"] = "not built: no C++ compiler with OpenMP when darts_fast was installed"
    else:
        found["native"] = f"float32 on the CPU, {native.LEVELS[native.level()]}"
    found["torch"] = "everything else" if native.level() is not None else "everything"
    return found
