"""Times the C++ kernels, function by function, against ATen's and against the processor's multiply-adds;
then a training step of the network of a genotype, plain and fused.

    python benchmarks/native.py [--batch_size 16 --channels 16 --size 32 --repeats 20]

The peak is the rate of a 1024^3 float32 matrix product of ATen, taken anew before every row. Times are the
least of the repeats, interleaved. Multiply-adds are those of the equations: what a function computes again,
and batch norm, ReLU and statistics, are not counted. tests/test_native.py holds the results right.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast import network
from darts_fast.kernels import native, torch_backend
from darts_fast.kernels.torch_backend import Normalizer, Task
from darts_fast.notation import NAMED

TASKS = 4  # a call, all on one source


def least(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each."""
    found = [float("inf")] * len(functions)
    for _ in range(repeats + 1):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            found[index] = min(found[index], time.perf_counter() - start)
    return found


def sepconv_last(module: ModuleType, start: tuple, y: list, tangents: tuple, seconds: list) -> object:
    """The tangent and the second backward sweep."""
    if module is native:
        _, left = native.sepconv_tangent_forward(*start, y, *tangents)
        return native.sepconv_second(*start, seconds, left)
    return torch_backend.sepconv_tangent(*start, y, *tangents), torch_backend.sepconv_backward(
        *start, seconds, False
    )


def mix_last(
    module: ModuleType, start: tuple, g: Tensor, first: tuple, tangents: list, second: Tensor
) -> object:
    if module is native:
        _, left = native.mix_tangent_forward(*start, g, first[1], tangents)
        return native.mix_second(*start, second, left)
    return torch_backend.mix_tangent(*start, g, *first[:2], tangents), torch_backend.mix_backward(
        *start, second
    )


SEVERAL = {"sepconv_last": sepconv_last, "mix_last": mix_last}


def run(module: ModuleType, name: str, arguments: tuple) -> object:
    if name in SEVERAL:
        return SEVERAL[name](module, *arguments)
    return getattr(module, name)(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if native.level() is None:
        parser.error("the C++ kernels were not built")
    n, c, size = args.batch_size, args.channels, args.size
    square = torch.randn(1024, 1024)
    print(
        f"{native.LEVELS[native.level()]}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{vars(args)}"
    )
    print(f"{'':<34}{'native ms':>10}{'ATen ms':>10}{'ratio':>7}{'GFLOP/s':>9}{'of peak':>9}")

    def image() -> Tensor:
        return torch.randn(n, c, size, size).contiguous(memory_format=torch.channels_last)

    def row(label: str, name: str, arguments: tuple, multiply_adds: float) -> None:
        own, aten, peak = least(
            [
                lambda: run(native, name, arguments),
                lambda: run(torch_backend, name, arguments),
                lambda: square @ square,
            ],
            args.repeats,
        )
        rate = 2 * multiply_adds / own
        share = f"{rate / (2 * 1024**3 / peak):9.0%}" if multiply_adds else ""
        print(
            f"{label:<34}{own * 1e3:>10.2f}{aten * 1e3:>10.2f}{aten / own:>7.1f}{rate / 1e9:>9.0f}{share}",
            flush=True,
        )

    for kernel, dilation in product((3, 5), (1, 2)):
        x, tasks, label = image(), [Task(0, 1, dilation)] * TASKS, f"{kernel}x{kernel}, dilation {dilation}"
        norms = [Normalizer(torch_backend.statistics_of([x])[0], True)]
        d, dd = ([torch.randn(c, 1, kernel, kernel) for _ in tasks] for _ in range(2))
        p, pd = ([torch.randn(c, c, 1, 1) for _ in tasks] for _ in range(2))
        start, y = ([x], norms, tasks, d, p), [image() for _ in tasks]
        pixels, taps = TASKS * n * size * size * c, kernel**2
        row(f"sepconv_forward {label}", "sepconv_forward", start, pixels * (taps + c))
        row(f"sepconv_backward {label}", "sepconv_backward", (*start, y, True), pixels * 2 * (taps + c))
        row("  without weight gradients", "sepconv_backward", (*start, y, False), pixels * (taps + c))
        row(
            f"both last sweeps {label}",
            "sepconv_last",
            (start, y, ([image()], dd, pd), [image() for _ in tasks]),
            pixels * 4 * (taps + c),
        )
    candidates = [image() for _ in range(21)]
    norms = [Normalizer(s, True) for s in torch_backend.statistics_of(candidates)]
    start = candidates, norms, torch.rand(21)
    g = image()
    first = native.mix_backward(*start, g)
    row("mix_forward, 21 candidates", "mix_forward", start, 0)
    row("mix_backward", "mix_backward", (*start, g), 0)
    row("both last sweeps", "mix_last", (start, g, first, [image() for _ in candidates], image()), 0)
    row("pool_forward", "pool_forward", (image(), 1), 0)
    derived(args.repeats)


def derived(repeats: int) -> None:
    """Forward and backward of DARTS_V2 with auxiliary head and drop path."""
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    modules = []
    for fused in (False, False, True):
        torch.manual_seed(0)
        modules.append(network(NAMED["DARTS_V2"], 10, 16, 8, auxiliary=True, fused=fused))
        modules[-1].drop_path_prob = 0.2
    modules[1].to(memory_format=torch.channels_last)
    inputs = [images, images.contiguous(memory_format=torch.channels_last), images]

    def step(index: int) -> None:
        logits, auxiliary_logits = modules[index](inputs[index])
        loss = F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary_logits, labels)
        loss.backward()

    planar, channels_last, fused = least([partial(step, index) for index in range(3)], repeats)
    print(
        f"DARTS_V2, 16 channels, 8 layers, batch 32: {fused * 1e3:.0f} ms a training step; PyTorch "
        f"channels-last {channels_last / fused:.2f} times that, NCHW {planar / fused:.2f} times"
    )


if __name__ == "__main__":
    main()
