"""The functions of `torch_backend` as Triton kernels: what CUDA tensors are computed by. In place of
`..._tangent` of the mix and of sepconv there are `..._tangent_forward`, which gives the tangents of the
outputs, and `..._second`, the second backward sweep whole.

One file an op, read downwards from kernel to launch: sepconv_triton.py, pool_triton.py, mix_triton.py;
triton_launch.py has what they share. Tensors are [N, C, H, W] in channels-last memory; 2-byte activations are
widened to float32 on load and narrowed on store, except that both factors of a pointwise product are 2 bytes
wide for the tensor cores. No result depends on the order in which programs run: sums over positions are
partial sums of programs, added in a fixed order.
"""

from darts_fast.kernels.mix_triton import (
    add,
    mix_backward,
    mix_forward,
    mix_second,
    mix_tangent_forward,
    spread_backward,
    spread_second,
)
from darts_fast.kernels.pool_triton import pool_backward, pool_forward, pool_tangent
from darts_fast.kernels.sepconv_triton import (
    sepconv_backward,
    sepconv_forward,
    sepconv_second,
    sepconv_tangent_forward,
)
from darts_fast.kernels.triton_launch import in_rows

__all__ = [
    "add",
    "in_rows",
    "mix_backward",
    "mix_forward",
    "mix_second",
    "mix_tangent_forward",
    "pool_backward",
    "pool_forward",
    "pool_tangent",
    "sepconv_backward",
    "sepconv_forward",
    "sepconv_second",
    "sepconv_tangent_forward",
    "spread_backward",
    "spread_second",
]
