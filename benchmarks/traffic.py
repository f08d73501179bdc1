"""Counts the launches and the bytes of one second-order step, or of a training step, without a GPU and
without computing anything.

    python benchmarks/traffic.py [--batch_size 64 --init_channels 16 --layers 8] [--partial_channels 1]
        [--json F]
    python benchmarks/traffic.py --train [--batch_size 96 --init_channels 36 --layers 20]

`--train` is the training of DARTS_V2 with auxiliary head and drop path.
The step runs on meta tensors, which have shapes and no data. A launch is one ATen operation that is no view
(darts_fast/traffic.py), or one that a backend returns for the calls of the cells' sweeps (kernels/plan.py;
of what it leaves to ATen, ATen's operations are counted);
its bytes are those of the distinct elements of its tensor arguments and results; its operations, where
Triton's kernels are counted, are those of the equations. The peak is that of live storages, the plan's blocks
among them, and of what the call with the most temporary memory allocates besides.
tests/test_benchmarks.py holds these counts against real runs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from textbook import TextbookStep, TextbookTraining  # noqa: E402

from darts_fast import load_genotype, network  # noqa: E402
from darts_fast.config import SearchConfig, TrainConfig  # noqa: E402
from darts_fast.derived import auxiliary_fits  # noqa: E402
from darts_fast.kernels import Plan  # noqa: E402
from darts_fast.kernels.aten.launch import AtenLaunch  # noqa: E402
from darts_fast.kernels.backends import collected, using  # noqa: E402
from darts_fast.kernels.types import Call, Launch, launches, tensors  # noqa: E402
from darts_fast.precision import type_name  # noqa: E402
from darts_fast.profiling import observed_phases  # noqa: E402
from darts_fast.search_step import SearchStep  # noqa: E402
from darts_fast.space import STEM_MULTIPLIER, reduction_layers  # noqa: E402
from darts_fast.supernet import Supernet  # noqa: E402
from darts_fast.traffic import Count, Traffic  # noqa: E402
from darts_fast.train_step import TrainStep  # noqa: E402


class Counted(NamedTuple):
    """What `count` found of a step."""

    phases: dict[str, Count]
    total: Count
    peak: int  # bytes
    by_name: dict[str, Count]  # of ATen's operations and of the kernels
    operations: tuple[int, int]  # of the separable halves, see `operations`
    kept: int  # bytes that the cells' forward sweep keeps for later ones


def operations(launch: Any) -> tuple[int, int]:
    """Returns the floating-point operations of the depthwise and of the pointwise convolutions in a launch of
    Triton, by the equations (a multiply-add is two); (0, 0) for the kernels that only move and add."""
    constants = launch.constants
    if not {"KERNELS", "HAS_D", "C"} <= constants.keys():
        return 0, 0
    per = 2 * launch.arguments["positions"] * constants["C"] * (1 + constants["TANGENT"])
    taps = sum(k * k for k, has in zip(constants["KERNELS"], constants["HAS_D"], strict=True) if has)
    depthwise, pointwise = per * taps, per * constants.get("K", 0) * len(constants["KERNELS"])
    if launch.name == "sepconv_bwd_kernel":
        return depthwise, 0
    if launch.name == "sepconv_bwd_pointwise_kernel":
        weights = constants["WEIGHTS"]  # their gradients, too
        return 2 * depthwise * weights, pointwise * (1 + weights)
    return depthwise, pointwise


class Idle:
    """A `Backend` that computes nothing."""

    def program(self, calls: Sequence[Call]) -> Callable[[], None]:
        return lambda: None


def temporaries(call: Call, found: Iterable[Launch]) -> int:
    """Returns the bytes that a call's launches allocate besides what the call reads and writes."""
    own = {t.untyped_storage()._cdata for t in tensors([call.reads, call.writes])}
    storages = [t.untyped_storage() for launch in found for t in launch.tensors]
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in own}.values())


class Step(NamedTuple):
    """A step on a new network, and the plan of its cells, where kernels compute them."""

    take: Callable[[], object]
    plan: Plan | None


def search_step(
    kernels: str | None,
    batch_size: int,
    channels: int,
    layers: int,
    size: int,
    device: str,
    dtype: torch.dtype,
    partial_channels: int = 1,
) -> Step:
    """Makes a search step, whose optimizers have momenta as if it were not the first."""
    with torch.device(device):
        supernet = Supernet(
            channels, 10, layers, fused=kernels is not None, partial_channels=partial_channels
        )
        batch = torch.zeros(batch_size, 3, size, size), torch.zeros(batch_size, dtype=torch.int64)
    if kernels is not None:
        step = SearchStep(supernet, SearchConfig(fused=True, amp_dtype=_amp_dtype(dtype)))
        step.loss_scale = None  # the optimizers of meta tensors know of none
        stem = batch_size, STEM_MULTIPLIER * channels, size, size
        assert supernet._fused_cells is not None
        plan = supernet._fused_cells.plan([stem], dtype, torch.device(device), 2)
        return Step(lambda: step(batch, batch, 0.025), plan)
    textbook = TextbookStep(supernet, SearchConfig())
    for w in supernet.weights().values():
        textbook.weight_optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)
    return Step(lambda: textbook(batch, batch, 0.025), None)


def training_step(
    kernels: str | None,
    batch_size: int,
    channels: int,
    layers: int,
    size: int,
    device: str,
    dtype: torch.dtype,
) -> Step:
    """Makes a training step of DARTS_V2, with drop path, and with the auxiliary head where the images are
    large enough for it."""
    auxiliary = auxiliary_fits(size, size, "cifar")
    with torch.device(device):
        module = network(
            load_genotype("DARTS_V2"), 10, channels, layers, auxiliary=auxiliary, fused=kernels is not None
        )
        images, labels = torch.zeros(batch_size, 3, size, size), torch.zeros(batch_size, dtype=torch.int64)
    module.to(device)  # a buffer of it is made on the host
    if kernels is not None:
        step = TrainStep(module, TrainConfig(fused=True, amp_dtype=_amp_dtype(dtype), drop_path_prob=0.2))
        step.loss_scale = None
        stem = batch_size, STEM_MULTIPLIER * channels, size, size
        outputs = ([reduction_layers(layers)[1]] if auxiliary else []) + [layers - 1]
        plan = module.cells_on_kernels().plan([stem], dtype, torch.device(device), 1, True, tuple(outputs))
        return Step(lambda: step.take(images, labels), plan)
    textbook = TextbookTraining(module, TrainConfig())
    module.drop_path_prob = torch.zeros((), device=device)
    for w in textbook.weights:
        textbook.optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)
    return Step(lambda: textbook.take(images, labels), None)


def _amp_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype == torch.float32 else type_name(dtype)


def count(
    kernels: str | None,
    batch_size: int,
    channels: int,
    layers: int,
    size: int = 32,
    device: str = "meta",
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    partial_channels: int = 1,
) -> Counted:
    """Counts one step of a search, or with `train` of a training.

    Args:
        kernels: "triton" or "native", on which the fused cells are counted; None: the textbook's step. On a
            real device, too, these kernels compute nothing.
        dtype: of the activations in the fused cells.
    """
    make: Callable[..., Step] = training_step if train else search_step
    traffic, marks = Traffic(), [("", 0, Count())]
    more = {} if train else {"partial_channels": partial_channels}
    with using(Idle()), collected() as calls:  # type: ignore[arg-type]  # nothing but `program` is called
        # The plan is made beforehand: its tensors only stand for buffers, and are no memory.
        step = make(kernels, batch_size, channels, layers, size, device, dtype, **more)
        kept = 0 if step.plan is None else step.plan.layouts["first order"].sizes["forward kept"]
        with traffic, observed_phases(lambda name: marks.append((name, len(calls), traffic.total))):
            step.take()
    by_name, done, most, phases = dict(traffic.by_name), [(0, 0)], 0, {}
    for (_, start, before), (name, end, after) in pairwise(marks):
        phases[name] = Count(after.launches - before.launches, after.bytes - before.bytes)
        for call in calls[start:end]:
            found = list(launches(import_module(f"darts_fast.kernels.{kernels}"), [call]))
            most = max(most, temporaries(call, found))
            for launch in found:
                if isinstance(launch, AtenLaunch):
                    with torch.no_grad(), Traffic() as own:
                        launch.run()
                    most = max(most, own.peak)
                    phases[name] = phases[name].plus(*own.total)
                    for operation, counted in own.by_name.items():
                        by_name[operation] = by_name.get(operation, Count()).plus(*counted)
                    continue
                phases[name] = phases[name].plus(1, launch.bytes)
                by_name[launch.name] = by_name.get(launch.name, Count()).plus(1, launch.bytes)
                if kernels == "triton":
                    done.append(operations(launch))
    assert marks[-1][1:] == (len(calls), traffic.total)  # nothing comes behind the last phase
    total = Count(*map(sum, zip(*phases.values(), strict=True)))
    arithmetic = sum(depthwise for depthwise, _ in done), sum(pointwise for _, pointwise in done)
    return Counted(phases, total, traffic.peak + most, by_name, arithmetic, kept)


VARIANTS: dict[str, dict[str, Any]] = {
    "textbook": {"kernels": None},
    "fused, Triton": {"kernels": "triton"},
    "fused, Triton, bfloat16": {"kernels": "triton", "dtype": torch.bfloat16},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="a training step of DARTS_V2")
    parser.add_argument("--batch_size", type=int, help="default 64, of --train 96")
    parser.add_argument("--init_channels", type=int, help="default 16, of --train 36")
    parser.add_argument("--layers", type=int, help="default 8, of --train 20")
    parser.add_argument("--partial_channels", type=int, default=1, help="of a search, PC-DARTS's K")
    parser.add_argument("--only", choices=list(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument("--top", type=int, default=8, help="operations that move most bytes, to be listed")
    parser.add_argument("--json", metavar="F", help="write the counts there too")
    args = parser.parse_args()
    defaults = (
        {"batch_size": 96, "init_channels": 36, "layers": 20}
        if args.train
        else {"batch_size": 64, "init_channels": 16, "layers": 8}
    )
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    setting = f"batch {args.batch_size}, {args.init_channels} channels, {args.layers} layers, 32x32"
    if args.partial_channels > 1:
        setting += f", candidates read 1/{args.partial_channels} of the channels"
    what = "training step of DARTS_V2" if args.train else "second-order step"
    print(f"one {what}, {setting}, torch {torch.__version__}, meta tensors")
    results = {}
    for name in args.only:
        found = count(
            batch_size=args.batch_size,
            channels=args.init_channels,
            layers=args.layers,
            train=args.train,
            partial_channels=args.partial_channels,
            **VARIANTS[name],
        )
        results[name] = found._asdict()
        print(f"\n{name:<32}{'launches':>10}{'GB':>9}")
        for phase, (number, moved) in [*found.phases.items(), ("total", found.total)]:
            print(f"{phase:<32}{number:>10,}{moved / 1e9:>9.1f}")
        print(f"{'peak of live bytes':<32}{'':>10}{found.peak / 1e9:>9.1f}")
        if any(found.operations):
            depthwise, pointwise = (f"{part / 1e9:,.0f}" for part in found.operations)
            print(f"GFLOP of separable halves: {depthwise} depthwise, {pointwise} pointwise")
        for operation, (number, moved) in sorted(
            found.by_name.items(), key=lambda item: item[1].bytes, reverse=True
        )[: args.top]:
            print(f"    {operation:<28}{number:>10,}{moved / 1e9:>9.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"setting": vars(args), "torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
