"""Which module computes on which device."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from darts_fast.kernels import torch_backend

_chosen: list[ModuleType] = []


def backend(device: torch.device) -> ModuleType:
    """The module that computes on `device`: Triton on CUDA, ATen elsewhere; chosen by the device alone (or by
    `using`), never by what failed elsewhere. A backend has the functions of `torch_backend`.
    """
    if _chosen:
        return _chosen[-1]
    if device.type == "cuda":
        from darts_fast.kernels import triton_backend

        return triton_backend
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
