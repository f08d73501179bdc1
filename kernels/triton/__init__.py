"""The kernels in Triton: what CUDA tensors are computed by.

One file for each kind of operation, read downwards from kernels to the functions that launch them; launch.py
has what they share, and launch_table.py their tiles. 2-byte activations are widened to float32 on load and
narrowed on store, except that both factors of a pointwise product are 2 bytes wide for the tensor cores. No
result depends on the order in which programs run: sums over positions are partial sums of programs, added in
a fixed order.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from darts_fast.kernels.aten.convolution import convolution_backward, convolution_forward
from darts_fast.kernels.aten.partial import (
    max_pool_2x2_backward,
    max_pool_2x2_forward,
    max_pool_2x2_tangent,
    shuffle,
)
from darts_fast.kernels.triton.mix import (
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
from darts_fast.kernels.triton.pool import pool_backward, pool_forward, pool_tangent
from darts_fast.kernels.triton.sepconv import (
    sepconv_backward,
    sepconv_forward,
    sepconv_second,
    sepconv_tangent,
)
from darts_fast.kernels.types import Call, launches


def program(calls: Sequence[Call]) -> Callable[[], None]:
    """Returns a function that launches the calls one after the other. Partial sums, and other tensors that
    only one call needs, are allocated when it is launched, and freed behind it."""

    @torch.no_grad()
    def run() -> None:
        launch: Any  # Triton's, or ATen's
        for launch in launches(sys.modules[__name__], calls):
            launch.run()

    return run
