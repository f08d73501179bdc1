"""The C++ separable halves against the processor's multiply-adds, and a fused cell against ATen's.

    OMP_NUM_THREADS=1 pytest -n0 benchmarks/test_native_peak.py [--benchmark-json F]

The setting is the search's first cells: batch 16, 16 channels, 32x32, one thread. Results are held against
float64 before anything is timed. The peak is the rate of a loop that does nothing but multiply-adds, taken in
turns with the function, as is PyTorch's 1024^3 float32 matrix product, which does not reach it everywhere;
multiply-adds are those of the equations, without what a function computes again, batch norm, ReLU and
statistics. Ratios are of CPU time, so that other work on the machine counts little; each is in the
benchmark's extra_info and is printed (-s).
"""

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from darts_fast.fused import FusedCell
from darts_fast.kernels import native, torch_backend
from darts_fast.kernels.torch_backend import Normalizer, Task
from darts_fast.reference import MixedCell

N, C, SIZE, TASKS = 16, 16, 32, 4
REPEATS = 15
ROUNDS = 1 << 20  # of multiply-adds, some ms


def image() -> Tensor:
    return torch.randn(N, C, SIZE, SIZE).contiguous(memory_format=torch.channels_last)


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


# Without a compiler the install succeeds and has no C++ kernels to time.
@pytest.mark.skipif(native.level() is None, reason="the C++ kernels were not built")
@pytest.mark.parametrize("sweep", ["forward", "backward", "both last sweeps"])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_share_of_the_peak(benchmark, kernel, dilation, sweep):
    x, tasks = image(), [Task(0, 1, dilation)] * TASKS
    norms = [Normalizer(torch_backend.statistics_of([x])[0], True)]
    d, dd = ([torch.randn(C, 1, kernel, kernel) for _ in tasks] for _ in range(2))
    p, pd = ([torch.randn(C, C, 1, 1) for _ in tasks] for _ in range(2))
    arguments = [[x], norms, tasks, d, p]
    if sweep != "forward":
        arguments.append([image() for _ in tasks])
    last = [[image()], dd, pd, [image() for _ in tasks]]
    arguments += {"forward": [], "backward": [True], "both last sweeps": last}[sweep]
    units = {"forward": 1, "backward": 2, "both last sweeps": 4}[sweep]
    if sweep == "both last sweeps":
        function, oracle = native_last, oracle_last
    else:
        function, oracle = (getattr(module, f"sepconv_{sweep}") for module in (native, torch_backend))

    for found, exact in zip(tensors(function(*arguments)), tensors(oracle(*wide(arguments))), strict=True):
        assert (found - exact).norm() <= 1e-5 * exact.norm()

    square = torch.randn(1024, 1024)
    own, loop, product = least(
        lambda: function(*arguments), lambda: native.multiply_adds(ROUNDS), lambda: square @ square
    )
    rate = 2 * TASKS * N * SIZE**2 * C * units * (kernel**2 + C) / own
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
    benchmark.pedantic(function, arguments, rounds=REPEATS)


def native_last(*arguments: object) -> object:
    """The tangent and the second backward sweep."""
    *arguments, seconds = arguments
    yd, left = native.sepconv_tangent_forward(*arguments)
    return yd, native.sepconv_second(*arguments[:5], seconds, left)


def oracle_last(*arguments: object) -> object:
    *arguments, seconds = arguments
    yd, gained = torch_backend.sepconv_tangent(*arguments)
    found, *_ = torch_backend.sepconv_backward(*arguments[:5], seconds, False)
    return yd, [f + g for f, g in zip(found, gained, strict=True)]


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_a_cell_against_aten(benchmark, reduction):
    """Forward and backward: the reference cell on channels-last images and the fused one."""
    plain, fused = (kind(4 * C, 4 * C, C, reduction, False) for kind in (MixedCell, FusedCell))
    fused.load_state_dict(plain.state_dict())
    states = [torch.randn(N, 4 * C, SIZE, SIZE).to(memory_format=torch.channels_last) for _ in range(2)]
    p = torch.randn(14, 8).softmax(1)
    plain.to(memory_format=torch.channels_last)

    def step(cell: MixedCell, states: list[Tensor] = states, p: Tensor = p) -> list[Tensor]:
        output = cell(*states, p)
        return [output, *torch.autograd.grad(output.square().sum(), list(cell.parameters()))]

    # Kinks of ReLU and max pool move float32 gradients: the reference's own error is the measure.
    def gradients(cell: MixedCell, states: list[Tensor] = states, p: Tensor = p) -> Tensor:
        return torch.cat([t.double().flatten() for t in step(cell, states, p)[1:]])

    exact = gradients(copy.deepcopy(plain).double(), [s.double() for s in states], p.double())
    reference = gradients(plain, [s.contiguous() for s in states])
    assert (gradients(fused) - exact).norm() <= 2 * (reference - exact).norm()

    own, aten = least(lambda: step(fused), lambda: step(plain))
    benchmark.extra_info.update(ratio=aten / own)
    print(f"\nreduction {reduction}: ATen channels-last takes {aten / own:.2f} times as long")
    benchmark.pedantic(step, [fused], rounds=REPEATS)


def tensors(tree: object) -> list[Tensor]:
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in tensors(item)]
    return [tree]


def wide(tree: object) -> object:
    """The same in float64."""
    if isinstance(tree, Tensor):
        return tree.double()
    if isinstance(tree, Normalizer):
        return Normalizer(wide(tree.statistics), tree.batch)
    return [wide(item) for item in tree] if isinstance(tree, list) and not isinstance(tree, Task) else tree
