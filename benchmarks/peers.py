"""Counts the launches and the bytes of one second-order step of the official code and of pt.darts, each in a
checkout of its own, beside the textbook step of benchmarks/textbook.py; with `--race` times them on a CPU.

    git clone https://github.com/quark0/darts && git clone https://github.com/khanrc/pt.darts
    python benchmarks/peers.py --official darts --pt_darts pt.darts
        [--batch_size 64 --init_channels 16 --layers 8]
    python benchmarks/peers.py --official darts --pt_darts pt.darts --race --batch_size 16
        [--repeats 5] [--threads N]

Their modules and their `Architect` are imported as they are; the weight step, which is in the middle of their
programs, is written out here. They run on the CPU: `.cuda()` does nothing meanwhile. Launches do not depend
on the number of pixels and bytes are linear in it, so two steps on one and on two images of 8x8 give the
counts of larger ones. A race takes its steps on images of 32x32 in turns with the textbook's and the fused
one; printed are the medians, and the ratios to the fused one, pair by pair, as p50 (p20 to p80).
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from race import Runner, Setting, batches, environment, percentiles, timed  # noqa: E402
from traffic import search_step  # noqa: E402

from darts_fast.config import SearchConfig  # noqa: E402
from darts_fast.precision import strict_float32  # noqa: E402
from darts_fast.process import freed_memory_kept, nothing_old_collected  # noqa: E402
from darts_fast.traffic import Count, Traffic  # noqa: E402

SETTINGS, SIDE, CPU = SearchConfig(), 8, torch.device("cpu")
FUSED = "fused, C++"
Step = Callable[[Tensor, Tensor], None]


@contextmanager
def modules_of(folder: Path, *names: str) -> Iterator[list[ModuleType]]:
    """Within, these modules of a checkout are imported. They and what they import from it are forgotten
    afterwards, because two checkouts have modules of the same names."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", None)):
                del sys.modules[name]


def weight_step(network: nn.Module, weights: list[Tensor], optimizer: torch.optim.Optimizer) -> Step:
    """The last part of a step of both programs, as a function of images and labels."""

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        nn.utils.clip_grad_norm_(weights, SETTINGS.w_grad_clip, foreach=False)
        optimizer.step()

    return step


def sgd(weights: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        weights, SETTINGS.w_lr, SETTINGS.w_momentum, weight_decay=SETTINGS.w_weight_decay, foreach=False
    )


def official(folder: Path, channels: int, layers: int) -> Step:
    """A step of `cnn/train_search.py --unrolled`."""
    with modules_of(folder / "cnn", "model_search", "architect") as (model_search, architect):
        network = model_search.Network(channels, 10, layers, nn.CrossEntropyLoss())
        optimizer = sgd(list(network.parameters()))
        arguments = SimpleNamespace(
            momentum=SETTINGS.w_momentum,
            weight_decay=SETTINGS.w_weight_decay,
            arch_learning_rate=SETTINGS.alpha_lr,
            arch_weight_decay=SETTINGS.alpha_weight_decay,
        )
        architecture = architect.Architect(network, arguments)
    step_weights = weight_step(network, list(network.parameters()), optimizer)

    def step(images: Tensor, labels: Tensor) -> None:
        architecture.step(images, labels, images, labels, SETTINGS.w_lr, optimizer, unrolled=True)
        step_weights(images, labels)

    return step


def pt_darts(folder: Path, channels: int, layers: int) -> Step:
    """A step of `search.py`."""
    with modules_of(folder, "models.search_cnn", "architect") as (search_cnn, architect):
        network = search_cnn.SearchCNNController(
            3, channels, 10, layers, nn.CrossEntropyLoss(), device_ids=[0]
        )
        architecture = architect.Architect(network, SETTINGS.w_momentum, SETTINGS.w_weight_decay)
    weights = list(network.weights())
    optimizer = sgd(weights)
    alphas = torch.optim.Adam(
        network.alphas(),
        SETTINGS.alpha_lr,
        (0.5, 0.999),
        weight_decay=SETTINGS.alpha_weight_decay,
        foreach=False,
    )
    step_weights = weight_step(network, weights, optimizer)

    def step(images: Tensor, labels: Tensor) -> None:
        alphas.zero_grad()
        architecture.unrolled_backward(images, labels, images, labels, SETTINGS.w_lr, optimizer)
        alphas.step()
        step_weights(images, labels)

    return step


def counted(step: Step, images: int) -> Count:
    """Counts a second step: the optimizers have no momenta in the first one."""
    batch = torch.randn(images, 3, SIDE, SIDE), torch.zeros(images, dtype=torch.int64)
    step(*batch)
    with Traffic() as traffic:
        step(*batch)
    return traffic.total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, metavar="DIR", help="checkout of quark0/darts")
    parser.add_argument("--pt_darts", type=Path, metavar="DIR", help="checkout of khanrc/pt.darts")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--race", action="store_true", help="times the steps")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each, after one not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    sizes = args.init_channels, args.layers
    steps = {}
    if args.official:
        steps["official code"] = official(args.official.resolve(), *sizes)
    if args.pt_darts:
        steps["pt.darts"] = pt_darts(args.pt_darts.resolve(), *sizes)
    print(
        f"one second-order step, batch {args.batch_size}, {args.init_channels} channels, {args.layers} "
        "layers, 32x32, float32"
    )
    if args.race:
        race(steps, Setting(args.batch_size, *sizes, threads=args.threads), args.repeats)
    else:
        count(steps, args.batch_size, *sizes)


def count(steps: dict[str, Step], batch_size: int, channels: int, layers: int) -> None:
    found = {name: [counted(step, images) for images in (1, 2)] for name, step in steps.items()}
    found["textbook"] = []
    for images in (1, 2):
        step = search_step(None, images, channels, layers, SIDE, "cpu", torch.float32)
        with Traffic() as traffic:
            step.take()
        found["textbook"].append(traffic.total)
    print(f"torch {torch.__version__}\n\n{'':<16}{'launches':>10}{'GB':>9}")
    for name, (one, two) in found.items():
        assert one.launches == two.launches, name
        more = batch_size * 32**2 // SIDE**2 - 1  # images of 8x8
        print(f"{name:<16}{one.launches:>10,}{(one.bytes + more * (two.bytes - one.bytes)) / 1e9:>9.1f}")


def race(steps: dict[str, Step], setting: Setting, repeats: int) -> None:
    images, labels = batches(setting.batch_size, setting.size, torch.float32)[0]

    def seconds(step: Step) -> float:
        torch.set_num_threads(setting.threads)
        return timed(lambda: step(images, labels), CPU, phases=False)["step"]

    with strict_float32(), nothing_old_collected(), freed_memory_kept():  # as a run has it
        ours = {name: Runner(name, setting, CPU) for name in ("textbook", FUSED)}
        found: dict[str, list[float]] = {name: [] for name in (*steps, *ours)}
        for _ in range(1 + repeats):
            for name, step in steps.items():
                found[name].append(seconds(step))
            for name, runner in ours.items():
                found[name].append(runner.take()["step"])
    print(
        ", ".join(f"{key} {value}" for key, value in environment(CPU).items())
        + f", threads {setting.threads}"
    )
    for name, (_, *times) in found.items():
        low, middle, high = percentiles([t / fused for t, fused in zip(times, found[FUSED][1:], strict=True)])
        print(
            f"{name:<16}{1e3 * percentiles(times)[1]:>10,.0f} ms, {middle:.2f} ({low:.2f} to {high:.2f}) "
            f"times the time of {FUSED}"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of PyTorch, about the signatures that the official code calls
    with (
        mock.patch.object(Tensor, "cuda", lambda self: self),
        mock.patch.object(nn.Module, "cuda", lambda self: self),
    ):
        main()
