"""The kernels in C++, for float32 on the CPU.

A function makes tables of C structures from tensors (table.py), and a program runs the tables of all its
calls by one call of C++, on PyTorch's threads, but never more than a container's quota is worth. The bits of
the results do not depend on how many.
Activations [N, C, H, W] are in channels-last memory: C++ sees [n, h, w, c].
"""

import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch

from darts_fast.kernels.aten.convolution import convolution_backward, convolution_forward
from darts_fast.kernels.aten.launch import AtenLaunch
from darts_fast.kernels.aten.partial import (
    max_pool_2x2_backward,
    max_pool_2x2_forward,
    max_pool_2x2_tangent,
    shuffle,
)
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
from darts_fast.kernels.native.table import Launch, Record, Table, size_of
from darts_fast.kernels.processors import threads
from darts_fast.kernels.types import Call, launches


def program(calls: Sequence[Call]) -> Callable[[], None]:
    """Returns a function that runs the calls one after the other, in one call of C++, but where ATen computes
    between; under PyTorch's profiler in one each, so that its trace has them by name.

    Raises:
        TypeError: a tensor is not on the CPU.
    """
    found: list[Any] = list(launches(sys.modules[__name__], calls))
    for launch in found:
        for tensor in launch.tensors:
            if not tensor.is_cpu:
                raise TypeError(f"the native kernels compute on the CPU, not on {tensor.device}")
    library = loaded()
    # What C++ runs in a row, as a table and its launches, which keep their tables and tensors; or one launch
    # of ATen.
    parts: list[tuple[Table, list[Launch]] | AtenLaunch] = []
    for of_aten, group in groupby(found, lambda launch: isinstance(launch, AtenLaunch)):
        if of_aten:
            parts += group
            continue
        in_a_row = list(group)
        records = [Record(address_of(library, launch.name), launch.call.address) for launch in in_a_row]
        parts.append((Table(records), in_a_row))

    @torch.no_grad()
    def run() -> None:
        count, profiled = threads(), torch.autograd._profiler_enabled()
        for part in parts:
            if isinstance(part, AtenLaunch):
                part.run()
                continue
            table, of_part = part
            if not profiled:
                library.darts_sweep(table.address, table.count, count)
                continue
            for i, launch in enumerate(of_part):
                with torch._C._profiler._RecordFunctionFast(f"native::{launch.name}", [*launch.tensors]):
                    library.darts_sweep(table.address + i * size_of(Record), 1, count)

    return run
