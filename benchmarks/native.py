"""Times the C++ kernels, function by function, against ATen's and against the processor's multiply-adds;
then a training step of the network of a genotype, plain and fused.

    python benchmarks/native.py [--batch_size 16 --channels 16 --size 32 --repeats 20]

The peak is the rate of a 1024^3 float32 matrix product of ATen, taken anew before every row. Times are the
least of the repeats, interleaved. Multiply-adds are those of the equations: what a function computes again,
and batch norm, ReLU and statistics, are not counted. tests/test_kernels.py holds the results right.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast import network
from darts_fast.kernels import aten, native
from darts_fast.kernels.aten.batch_norm import statistics_of
from darts_fast.kernels.plan import Recorder
from darts_fast.kernels.types import Call, Reader, SecondReader, Source, Task, Weights, images
from darts_fast.notation import NAMED

TASKS = 4  # a call, all on one source


def least(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Returns the least seconds of each function, called in turns."""
    found = [float("inf")] * len(functions)
    for _ in range(repeats + 1):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            found[index] = min(found[index], time.perf_counter() - start)
    return found


def random_images(count: int, n: int, c: int, size: int) -> Tensor:
    return images(count, (n, c, size, size), torch.float32).normal_()


def halves(kernel: int, dilation: int, n: int, c: int, size: int) -> dict[str, list[Call]]:
    """The calls of the four sweeps of second halves of separable convolutions, which a mix reads.

    In this order each reads what the ones before it wrote.
    """
    (x, xd), p = random_images(2, n, c, size), torch.rand(TASKS)
    g, gd, y, yd = (random_images(TASKS, n, c, size) for _ in range(4))
    adjoint, second = (random_images(1, n, c, size) for _ in range(2))
    weights, tangents = (
        [Weights(torch.randn(c, 1, kernel, kernel), torch.randn(c, c, 1, 1)) for _ in range(TASKS)]
        for _ in range(2)
    )
    sources, tasks = [Source(x, statistics_of(x))], [Task(0, w, dilation=dilation) for w in weights]
    # Of the outputs, as the mix would write them; the tangent sweep writes `tangent_sums`.
    sums, second_sums, tangent_sums = (n * torch.randn(count, TASKS, c) for count in (2, 2, 3))
    statistics, gradients = torch.empty(TASKS, 3, c), torch.empty(TASKS, c * (c + kernel**2))
    (own, own_second), source_sums = torch.empty(2, 2, 1, c), n * torch.randn(3, 1, c)
    readers = [Reader(y[i], statistics[i], i, g[i], sums, p) for i in range(TASKS)]
    seconds = [SecondReader(read, yd[i], tangent_sums, gd[i], second_sums) for i, read in enumerate(readers)]
    sweeps = {name: Recorder() for name in ("forward", "backward", "tangent", "second")}
    sweeps["forward"].sepconv_forward(sources, tasks, y=y, statistics=statistics)
    sweeps["backward"].sepconv_backward(
        sources, tasks, readers, [()], adjoint=adjoint, sums=own, gradients=gradients
    )
    reads = sources, tasks, [xd], source_sums, tangents, readers
    sweeps["tangent"].sepconv_tangent(*reads, y=yd, sums=list(tangent_sums.unbind(1)))
    sweeps["second"].sepconv_second(sources, tasks, tangents, seconds, [()], adjoint=second, sums=own_second)
    return {name: recorder.calls for name, recorder in sweeps.items()}


def multiply_adds(sweep: str, kernel: int, n: int, c: int, size: int) -> int:
    """Returns the multiply-adds of a sweep of `halves`, by its equations."""
    return (
        {"forward": 1, "backward": 2, "tangent": 2, "second": 2}[sweep]
        * TASKS
        * n
        * size**2
        * c
        * (kernel**2 + c)
    )


def nodes(n: int, c: int, size: int) -> dict[str, list[Call]]:
    """The calls of a node's four sweeps, with 21 candidates, and of a state's pools."""
    ys, tangents = random_images(21, n, c, size), random_images(21, n, c, size)
    (g, gd, out, state), p = random_images(4, n, c, size), torch.rand(21)
    candidates = [Source(y, statistics_of(y)) for y in ys]
    (sums, second_sums), tangent_sums = torch.empty(2, 2, 21, c), torch.randn(3, 21, c)
    (of_p, of_p_second), products = torch.empty(2, 21), torch.empty(21, c)
    pools, statistics = random_images(2, n, c, size), torch.empty(2, 3, c)
    position = images(1, state.shape, torch.uint8)[0]
    readers = [
        [Reader(y, s, 0, g, None, None) for g in random_images(4, n, c, size)] for y, s, _ in candidates[:2]
    ]
    of_readers = [list(torch.empty(4, 3, c)) for _ in readers]
    found = Recorder()
    found.mix_forward(candidates, p, outs=[out])
    found.mix_backward(candidates, None, g, sums=sums, weight_gradient=of_p)
    found.mix_tangent(candidates, p, list(tangents), tangent_sums, g, outs=[out], products=products)
    reads = candidates, gd, sums, tangent_sums, products
    found.mix_second(*reads, sums=second_sums, weight_gradient=of_p_second)
    found.pool_forward(state, 1, pools=pools, position=position, statistics=statistics)
    found.pool_backward(position, 1, pools, [g, gd], out=out)
    found.pool_tangent(state, position, 1, readers, pools=pools, sums=of_readers)
    return {call.function: [call] for call in found.calls}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    level = native.level()
    if level is None:
        parser.error("the C++ kernels were not built")
    shape, square = (args.batch_size, args.channels, args.size), torch.randn(1024, 1024)
    print(
        f"{native.LEVELS[level]}, {torch.get_num_threads()} threads, torch {torch.__version__}, {vars(args)}"
    )
    print(f"{'':<34}{'native ms':>10}{'ATen ms':>10}{'ratio':>7}{'GFLOP/s':>9}{'of peak':>9}")

    def row(label: str, calls: list[Call], counted: float = 0) -> None:
        """`counted`: multiply-adds."""
        functions: list[Callable[[], object]] = [native.program(calls), aten.program(calls)]
        functions.append(lambda: square @ square)
        own, plain, peak = least(functions, args.repeats)
        rates = ""
        if counted:
            rate = 2 * counted / own
            rates = f"{rate / 1e9:>9.0f}{rate / (2 * 1024**3 / peak):9.0%}"
        print(f"{label:<34}{own * 1e3:>10.2f}{plain * 1e3:>10.2f}{plain / own:>7.1f}{rates}", flush=True)

    for kernel, dilation in product((3, 5), (1, 2)):
        for sweep, calls in halves(kernel, dilation, *shape).items():
            counted = multiply_adds(sweep, kernel, *shape)
            row(f"sepconv_{sweep} {kernel}x{kernel}, dilation {dilation}", calls, counted)
            if sweep == "backward":
                calls = [call._replace(writes={**call.writes, "gradients": None}) for call in calls]
                row("  without weight gradients", calls, counted // 2)
    for label, calls in nodes(*shape).items():
        row(f"{label}, 21 candidates" if "mix" in label else label, calls)
    derived(args.repeats)


def derived(repeats: int) -> None:
    """Times forward and backward of DARTS_V2 with auxiliary head and drop path, and prints the ratios."""
    batch, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    modules = []
    for fused in (False, False, True):
        torch.manual_seed(0)
        modules.append(network(NAMED["DARTS_V2"], 10, 16, 8, auxiliary=True, fused=fused))
        modules[-1].drop_path_prob = 0.2
    modules[1].to(memory_format=torch.channels_last)
    inputs = [batch, batch.contiguous(memory_format=torch.channels_last), batch]

    def step(index: int) -> None:
        logits, auxiliary_logits = modules[index](inputs[index])
        loss = F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary_logits, labels)
        loss.backward()

    planar, channels_last, on_kernels = least([partial(step, index) for index in range(3)], repeats)
    print(
        f"DARTS_V2, 16 channels, 8 layers, batch 32: {on_kernels * 1e3:.0f} ms a training step; PyTorch "
        f"channels-last {channels_last / on_kernels:.2f} times that, NCHW {planar / on_kernels:.2f} times"
    )


if __name__ == "__main__":
    main()
