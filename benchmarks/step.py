"""Times one second-order step on the CPU, textbook against fused, interleaved in one process.

    python benchmarks/step.py [--batch_size 16 --init_channels 16 --layers 8 --size 32 --repeats 5] [--json F]

Nothing is timed before the results agree: on a small network in float64 the fused step with finite
differences must end where the textbook's does, its exact product must be automatic differentiation's on the
reference cell, and its step by phases must be `SearchStep`'s to the bit.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import quantiles

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fused_step import Batch, FusedStep  # noqa: E402
from textbook import TextbookStep  # noqa: E402

from darts_fast import architect  # noqa: E402
from darts_fast.config import SearchConfig  # noqa: E402
from darts_fast.kernels import native, torch_backend  # noqa: E402
from darts_fast.kernels.backends import using  # noqa: E402
from darts_fast.precision import strict_float32  # noqa: E402
from darts_fast.search import SearchStep  # noqa: E402
from darts_fast.supernet import Supernet  # noqa: E402

# The variants, the first of which the others are compared with: the step, and the kernels it runs on.
VARIANTS = {
    "textbook": (TextbookStep, torch_backend),
    "fused, ATen": (FusedStep, torch_backend),
    "fused, C++": (FusedStep, native),
}
LR = 0.025
TOLERANCE = 1e-9  # relative norm, float64


def supernet(channels: int, layers: int, fused: bool, dtype: torch.dtype) -> Supernet:
    torch.manual_seed(0)
    return Supernet(channels, 10, layers, fused=fused).to(dtype)


def batches(size: int, side: int, dtype: torch.dtype) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(size, 3, side, side, dtype=dtype), torch.randint(10, (size,))) for _ in range(2)]


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum(((found[name] - expected[name]) ** 2).sum() for name in expected)
    return float((difference / sum((t**2).sum() for t in expected.values())).sqrt().detach())


def check() -> None:
    """Raises AssertionError where the two disagree."""
    dtype, (train, validation) = torch.float64, batches(4, 8, torch.float64)
    networks = [supernet(4, 3, fused, dtype) for fused in (False, True)]
    differences = SearchConfig(hvp="finite-difference")
    steps = TextbookStep(networks[0], differences), SearchStep(networks[1], differences)
    for _ in range(2):
        list(steps[0].phases(train, validation, LR))
        steps[1](train, validation, LR)
    for kind in ("weights", "alphas"):
        found, expected = (getattr(network, kind)() for network in networks[::-1])
        assert error(found, expected) < TOLERANCE, f"{kind} after two steps: {error(found, expected):.3g}"

    products = []
    for fused in (False, True):
        network = supernet(4, 3, fused, dtype)
        weights, alphas = architect.leaves(network.weights()), architect.leaves(network.alphas())
        gradients = architect.gradients(network.loss(*train, weights, alphas), weights, create_graph=True)
        _, v = architect._at_virtual_weights(
            partial(network.loss, *validation), architect.detached(weights), alphas
        )
        products.append(architect.exact_hvp(gradients, alphas, v))
    assert error(products[1], products[0]) < TOLERANCE, f"exact product: {error(*products[::-1]):.3g}"

    whole, phased = (supernet(4, 3, True, dtype) for _ in range(2))
    SearchStep(whole, SearchConfig())(train, validation, LR)
    list(FusedStep(phased, SearchConfig()).phases(train, validation, LR))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, phased.state_dict()[name]), f"by phases, {name} is not SearchStep's"


def timed(step: TextbookStep | FusedStep, train: Batch, validation: Batch) -> dict[str, float]:
    """Seconds of each phase of one step, and of the whole."""
    start = before = time.perf_counter()
    found = {}
    for name in step.phases(train, validation, LR):
        now = time.perf_counter()
        found[name], before = now - before, now
    return {**found, "step": before - start}


def summary(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """p20, p50 and p80 of each phase."""
    found = {}
    for name in rows[0]:
        cuts = quantiles([row[name] for row in rows], n=10, method="inclusive")
        found[name] = [cuts[1], cuts[4], cuts[7]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each, after one not timed")
    parser.add_argument("--json", metavar="F", help="write the times there too")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    with strict_float32():
        check()
        conditions = {
            "setting": vars(args),
            "cpu": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit(),
        }
        print("results agree; one second-order step, float32, " + str(conditions), flush=True)
        train, validation = batches(args.batch_size, args.size, torch.float32)
        steps, rows = {}, {}
        variants = [name for name in VARIANTS if name != "fused, C++" or native.level() is not None]
        for name in variants:
            step, kernels = VARIANTS[name]
            network = supernet(args.init_channels, args.layers, step is FusedStep, torch.float32)
            steps[name], rows[name] = step(network, SearchConfig()), []
            with using(kernels):
                timed(steps[name], train, validation)
        for _ in range(args.repeats):
            for name, step in steps.items():
                with using(VARIANTS[name][1]):
                    rows[name].append(timed(step, train, validation))
    results = {name: summary(found) for name, found in rows.items()}
    print(f"{'ms: p20, p50, p80':<24}" + "".join(f"{name:>24}{'ratio':>8}" for name in results))
    textbook = results["textbook"]
    for phase in textbook:
        cells = ""
        for found in results.values():
            times = "".join(f"{value * 1e3:>8.0f}" for value in found[phase])
            cells += f"{times}{textbook[phase][1] / found[phase][1]:>8.2f}"
        print(f"{phase:<24}{cells}")
    print("(the ratio is the textbook's p50 over the variant's)")
    if args.json:
        Path(args.json).write_text(json.dumps({**conditions, "seconds": results}))


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str:
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
