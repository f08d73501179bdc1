"""Which module computes on which device."""

from types import ModuleType

import torch

from darts_fast.kernels import torch_backend


def backend(device: torch.device) -> ModuleType:
    """The module that computes on `device`: chosen by the device alone, never by what failed elsewhere.

    A backend has the functions of `torch_backend`, which is the only one so far and runs on every device.
    """
    return torch_backend
