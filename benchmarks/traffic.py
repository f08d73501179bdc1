"""Counts the launches and the bytes of one second-order step without a GPU and without computing anything.

    python benchmarks/traffic.py [--batch_size 64 --init_channels 16 --layers 8] [--json F]

The step runs on meta tensors, which have shapes and no data. A launch is one ATen operation that is no view,
or one of a Triton kernel as its launcher makes it; its bytes are those of the distinct elements of its tensor
arguments and results (darts_fast/traffic.py); its operations, where Triton's kernels are counted, are those
of the equations. tests/test_benchmarks.py holds both counts against real runs.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fused_step import FusedStep  # noqa: E402
from textbook import TextbookStep  # noqa: E402

from darts_fast.config import SearchConfig  # noqa: E402
from darts_fast.kernels import torch_backend  # noqa: E402
from darts_fast.kernels.backends import using  # noqa: E402
from darts_fast.precision import type_name  # noqa: E402
from darts_fast.supernet import Supernet  # noqa: E402
from darts_fast.traffic import Count, Traffic  # noqa: E402


def phases(step: Iterator[str], traffic: Traffic) -> dict[str, Count]:
    """Runs the step; the counts of each phase."""
    found, before = {}, traffic.total
    for name in step:
        found[name] = Count(traffic.total.launches - before.launches, traffic.total.bytes - before.bytes)
        before = traffic.total
    return found


def operations(planned: Any) -> tuple[int, int]:
    """Of the depthwise and of the pointwise parts of a launch, by the equations (a multiply-add is two);
    (0, 0) for the kernels that only move and add."""
    constants, name = planned.constants, planned.kernel.fn.__name__
    if not {"KERNELS", "HAS_D", "C"} <= constants.keys():
        return 0, 0
    per = 2 * planned.arguments["positions"] * constants["C"] * (1 + bool(constants.get("TANGENT")))
    taps = sum(k * k for k, has in zip(constants["KERNELS"], constants["HAS_D"], strict=True) if has)
    depthwise, pointwise = per * taps, per * constants.get("K", 0) * len(constants["KERNELS"])
    if name == "sepconv_bwd_kernel":
        return depthwise, 0
    if name == "sepconv_bwd_pointwise_kernel":
        weights = planned.arguments["p_partials"] is not planned.arguments["p_z"]  # their gradients, too
        return 2 * depthwise * weights, pointwise * (1 + weights)
    return depthwise, pointwise


def count(
    fused: bool,
    batch_size: int,
    channels: int,
    layers: int,
    size: int = 32,
    device: str = "meta",
    triton: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The counts of one step, not the first (there are momenta); on ATen, or with `triton` on that backend.

    With a 2-byte `dtype` the activations of the cells are of it.
    """
    with torch.device(device):
        network = Supernet(channels, 10, layers, fused=fused)
        images = torch.zeros(batch_size, 3, size, size)
        labels = torch.zeros(batch_size, dtype=torch.int64)
    amp_dtype = None if dtype == torch.float32 else type_name(dtype)
    config = SearchConfig(fused=fused, amp_dtype=amp_dtype)
    step = (FusedStep if fused else TextbookStep)(network, config)
    if not fused:
        for w in network.weights().values():
            step.weight_optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)
    batch = images, labels
    with ExitStack() as stack:
        traffic, done = Traffic(), []
        if triton:
            from darts_fast.kernels import triton_backend, triton_launch

            stack.enter_context(using(triton_backend))
            stack.enter_context(triton_launch.observed(traffic.launched))
            stack.enter_context(triton_launch.observed(lambda planned: done.append(operations(planned))))
        else:
            stack.enter_context(using(torch_backend))  # meta tensors have no C++ kernels
        stack.enter_context(traffic)
        found = phases(step.phases(batch, batch, 0.025), traffic)
    return {
        "phases": found,
        "total": traffic.total,
        "peak": traffic.peak,
        "by_name": traffic.by_name,
        "operations": [sum(part) for part in zip(*done, strict=True)],
    }


VARIANTS = {
    "textbook": {"fused": False},
    "fused, ATen": {"fused": True},
    "fused, ATen, bfloat16": {"fused": True, "dtype": torch.bfloat16},
    "fused, Triton": {"fused": True, "triton": True},
    "fused, Triton, bfloat16": {"fused": True, "triton": True, "dtype": torch.bfloat16},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", choices=list(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument("--top", type=int, default=8, help="operations that move most bytes, to be listed")
    parser.add_argument("--json", metavar="F", help="write the counts there too")
    args = parser.parse_args()
    setting = f"batch {args.batch_size}, {args.init_channels} channels, {args.layers} layers, 32x32"
    print(f"one second-order step, {setting}, torch {torch.__version__}, meta tensors")
    results = {}
    for name in args.only:
        found = count(
            batch_size=args.batch_size, channels=args.init_channels, layers=args.layers, **VARIANTS[name]
        )
        results[name] = found
        print(f"\n{name:<32}{'launches':>10}{'GB':>9}")
        for phase, (launches, moved) in [*found["phases"].items(), ("total", found["total"])]:
            print(f"{phase:<32}{launches:>10,}{moved / 1e9:>9.1f}")
        print(f"{'peak of live bytes':<32}{'':>10}{found['peak'] / 1e9:>9.1f}")
        if found["operations"]:
            depthwise, pointwise = (f"{part / 1e9:,.0f}" for part in found["operations"])
            print(f"GFLOP of separable halves: {depthwise} depthwise, {pointwise} pointwise")
        for operation, (launches, moved) in sorted(
            found["by_name"].items(), key=lambda item: item[1].bytes, reverse=True
        )[: args.top]:
            print(f"    {operation:<28}{launches:>10,}{moved / 1e9:>9.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"setting": vars(args), "torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
