"""The kernels in C++, for float32 on the CPU.

A function makes tables of C structures from tensors (table.py), and a program runs the tables of all its
calls by one call of C++, on `torch.get_num_threads()` threads. The bits of the results do not depend on how
many.
Activations [N, C, H, W] are in channels-last memory: C++ sees [n, h, w, c].
"""

from collections.abc import Callable, Sequence

import torch

from darts_fast.kernels.native.library import (
    LEVELS,
    absence,
    address_of,
    level,
    library_of,
    loaded,
    multiply_adds,
)
from darts_fast.kernels.native.mix import (
    add,
    fan_out_backward,
    fan_out_second,
    mix_backward,
    mix_forward,
    mix_second,
    mix_tangent,
    norm_backward,
    norm_forward,
    norm_tangent,
)
from darts_fast.kernels.native.pool import pool_backward, pool_forward, pool_tangent
from darts_fast.kernels.native.sepconv import (
    sepconv_backward,
    sepconv_forward,
    sepconv_second,
    sepconv_tangent,
)
from darts_fast.kernels.native.table import Record, Table
from darts_fast.kernels.types import Call

__all__ = [
    "LEVELS",
    "absence",
    "add",
    "fan_out_backward",
    "fan_out_second",
    "level",
    "library_of",
    "mix_backward",
    "mix_forward",
    "mix_second",
    "mix_tangent",
    "multiply_adds",
    "norm_backward",
    "norm_forward",
    "norm_tangent",
    "pool_backward",
    "pool_forward",
    "pool_tangent",
    "program",
    "sepconv_backward",
    "sepconv_forward",
    "sepconv_second",
    "sepconv_tangent",
]


def program(calls: Sequence[Call]) -> Callable[[], None]:
    """Returns a function that runs the calls one after the other, in one call of C++.

    Raises:
        TypeError: a tensor is not on the CPU.
    """
    launches = [launch for call in calls for launch in globals()[call.function](**call.reads, **call.writes)]
    for launch in launches:
        for tensor in launch.tensors:
            if not tensor.is_cpu:
                raise TypeError(f"the native kernels compute on the CPU, not on {tensor.device}")
    library = loaded()
    records = Table([Record(address_of(library, launch.name), launch.call.address) for launch in launches])

    def run() -> None:
        library.darts_sweep(records.address, records.count, torch.get_num_threads())

    run.launches = launches  # which keep their tables and tensors
    return run
