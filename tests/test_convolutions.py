"""No operation makes PyTorch's convolutions write past their memory: malloc checks it while they run."""

import os
import subprocess
import sys
from ctypes.util import find_library

import pytest

INSTRUCTIONS = {"AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "all": {}}  # those that oneDNN may use
MALLOC_CHECKS = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"}

ONE_BYTE_TOO_FAR = """
from ctypes import addressof, c_char, memset
array = bytearray(4095)  # and a closing zero
memset(addressof(c_char.from_buffer(array)), 1, 4097)
del array
"""


def run_checked(*arguments, **environment):
    environment = {**os.environ, **MALLOC_CHECKS, **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


# The checks of every block that is freed are glibc's, in a library of its own since 2.34; other systems have
# none that can be asked for.
@pytest.mark.skipif(find_library("c_malloc_debug") is None, reason="needs glibc's libc_malloc_debug")
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_convolutions_stay_within_their_memory(instructions):
    assert run_checked("-c", ONE_BYTE_TOO_FAR).returncode < 0  # malloc does check
    done = run_checked(__file__, **INSTRUCTIONS[instructions])
    assert done.returncode == 0, f"at {done.stdout.splitlines()[-1:]}: {done.stderr[-500:]}"


def every_operation():
    """Forward, backward and second backward pass of all that the networks convolve by, at few channels and in
    both memory layouts; and the first two of a cell of the same by the kernels of ATen. Prints each before it
    runs."""
    import torch
    from torch import nn

    from darts_fast import Genotype
    from darts_fast.derived import DerivedCell
    from darts_fast.fused import FusedDerivedCells
    from darts_fast.kernels import aten
    from darts_fast.kernels.backends import using
    from darts_fast.reference import FactorizedReduce, operation, relu_conv_bn
    from darts_fast.space import PRIMITIVES

    def modules(channels):
        """By name; with the side of the images."""
        for stride in (1, 2):
            yield f"stem, stride {stride}", nn.Conv2d(channels, 2 * channels, 3, stride, padding=1), 8
            for name in [name for name, primitive in PRIMITIVES.items() if "conv" in primitive.kind]:
                yield f"{name}, stride {stride}", operation(name, channels, stride, True, False), 8
        yield "1x1 convolution", relu_conv_bn(channels, 2 * channels, affine=True), 8
        for side in (8, 64):  # wider images take another path with AVX-512
            yield f"factorized reduce of {side}", FactorizedReduce(channels, 2 * channels, affine=True), side

    for layout in (torch.contiguous_format, torch.channels_last):
        for channels in (1, 2, 3, 4, 5, 6, 7, 8, 12):
            for name, module, side in modules(channels):
                print(f"{name}, {channels} channels, {layout}", flush=True)
                x = torch.randn(2, channels, side, side).to(memory_format=layout).requires_grad_()
                operands = [x, *module.parameters()]
                gradients = torch.autograd.grad(module(x).pow(3).sum(), operands, create_graph=True)
                torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), operands)

    for channels in (1, 2, 3, 4, 5, 6, 7, 8, 12):
        for name in [name for name, primitive in PRIMITIVES.items() if "conv" in primitive.kind]:
            for reduction in (False, True):
                print(f"{name} on kernels, {channels} channels, reduction: {reduction}", flush=True)
                gene, previous_reduction = [[(name, 0), (name, 1)]], channels % 2 == 0
                genotype = Genotype(gene, [2], gene, [2])
                cell = DerivedCell(
                    genotype, channels, channels, channels, reduction, previous_reduction, False
                )
                halved, whole = (torch.randn(2, channels, side, side, requires_grad=True) for side in (8, 16))
                weights = torch.cat([p.flatten() for p in cell.parameters()])
                inputs = [whole if previous_reduction else halved, halved]
                with using(aten):
                    (y,) = FusedDerivedCells([cell])(inputs, weights, torch.float32, None, [0])
                    y.pow(3).sum().backward()


if __name__ == "__main__":
    every_operation()
