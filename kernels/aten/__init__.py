"""The kernels in ATen: the plain, portable twin of the other two backends, in every dtype, on every device.

2-byte activations are widened to float32 on load and narrowed on store; everything between is float32 or
wider.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from darts_fast.kernels.aten.convolution import convolution_backward, convolution_forward
from darts_fast.kernels.aten.mix import (
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
from darts_fast.kernels.aten.partial import (
    max_pool_2x2_backward,
    max_pool_2x2_forward,
    max_pool_2x2_tangent,
    shuffle,
)
from darts_fast.kernels.aten.pool import pool_backward, pool_forward, pool_tangent
from darts_fast.kernels.aten.sepconv import sepconv_backward, sepconv_forward, sepconv_second, sepconv_tangent
from darts_fast.kernels.types import Call, launches


def program(calls: Sequence[Call]) -> Callable[[], None]:
    """Returns a function that runs the calls one after the other, without recording them for autograd."""
    found: list[Any] = list(launches(sys.modules[__name__], calls))  # `AtenLaunch`es

    @torch.no_grad()
    def run() -> None:
        for launch in found:
            launch.run()

    return run
