"""The C++ separable halves against the processor's multiply-adds, and a fused cell against ATen's.

    OMP_NUM_THREADS=1 pytest -n0 benchmarks/test_native_peak.py [--benchmark-json F]

The setting is the search's first cells: batch 16, 16 channels, 32x32, one thread. Results are held against
float64 before anything is timed. The peak is the rate of a loop that does nothing but multiply-adds, taken in
turns with the function, as is PyTorch's 1024^3 float32 matrix product, which does not reach it everywhere;
multiply-adds are those of the equations, without what a function computes again, batch norm, ReLU and
statistics. Ratios are of CPU time, so that other work on the machine counts little; each is in the
benchmark's extra_info and is printed (-s).
"""

import time
from collections.abc import Callable

import pytest
import torch
from native import halves, multiply_adds
from test_kernels import (
    SIZE,
    C,
    N,
    cell_and_state,
    channels_last,
    exact_and_allowed,
    fused_cell_step,
    plain_cell_step,
)

from darts_fast.fused import FusedMixedCells
from darts_fast.kernels import aten, native

REPEATS = 15
ROUNDS = 1 << 20  # of multiply-adds, some ms


def least(*functions: Callable[[], object]) -> list[float]:
    """CPU seconds of each, the least of the repeats, taken in turns."""
    found = [float("inf")] * len(functions)
    for _ in range(REPEATS):
        for index, function in enumerate(functions):
            start = time.thread_time()
            function()
            found[index] = min(found[index], time.thread_time() - start)
    return found


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def wide(tree):
    """The same calls on copies of their tensors in float64."""
    if isinstance(tree, torch.Tensor):
        return tree.double()
    if isinstance(tree, dict):
        return {name: wide(part) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [wide(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else parts
    return tree


# Without a compiler the install succeeds and has no C++ kernels to time.
@pytest.mark.skipif(native.level() is None, reason="the C++ kernels were not built")
@pytest.mark.parametrize("sweep", ["forward", "backward", "tangent", "second"])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_share_of_the_peak(benchmark, kernel, dilation, sweep):
    sweeps = halves(kernel, dilation, N, C, SIZE)
    for name, calls in sweeps.items():  # each reads what the ones before it wrote
        exact, function = wide(calls), native.program(calls)
        aten.program(exact)()
        function()
        for written, expected in zip(calls[0].writes.items(), exact[0].writes.values(), strict=True):
            if written[0] != "sums":  # their terms cancel
                assert (written[1] - expected).norm() <= 1e-5 * expected.norm()
        if name == sweep:
            break

    square = torch.randn(1024, 1024)
    own, loop, product = least(function, lambda: native.multiply_adds(ROUNDS), lambda: square @ square)
    rate = 2 * multiply_adds(sweep, kernel, N, C, SIZE) / own
    peak, of_product = 2 * native.multiply_adds(ROUNDS) / loop, 2 * 1024**3 / product
    benchmark.extra_info.update(
        gflops=rate / 1e9,
        peak_gflops=peak / 1e9,
        share=rate / peak,
        matrix_product_gflops=of_product / 1e9,
        share_of_matrix_product=rate / of_product,
    )
    label = f"sepconv_{sweep} {kernel}x{kernel} dilation {dilation}"
    shares = f"{rate / peak:.0%} of the peak, {rate / of_product:.0%} of a matrix product"
    print(f"\n{label}: {rate / 1e9:.0f} GFLOP/s, {shares}")
    benchmark.pedantic(function, rounds=REPEATS)


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_a_cell_against_aten(benchmark, reduction):
    """Forward and backward: the reference cell on channels-last images and the fused one."""
    exact, allowed = exact_and_allowed(reduction, torch.device("cpu"))
    cell, state, p = cell_and_state(reduction, torch.device("cpu"))
    state = channels_last(state)
    weights = torch.cat([w.detach().flatten() for w in cell.parameters()]).requires_grad_()
    fused = FusedMixedCells([cell]), weights, state, p
    assert (fused_cell_step(*fused) - exact).norm() <= allowed

    own, plain = least(lambda: fused_cell_step(*fused), lambda: plain_cell_step(cell, state, p))
    benchmark.extra_info.update(ratio=plain / own)
    print(f"\nreduction {reduction}: ATen channels-last takes {plain / own:.2f} times as long")
    benchmark.pedantic(fused_cell_step, fused, rounds=REPEATS)
