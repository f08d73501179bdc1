"""Whether the alphas of a fused search move as those of the reference's do, step by step: one search of each
kind, in float32 and with 2-byte activations. (trajectories.py has more searches of each, and their spread.)

    python benchmarks/curves.py [--dataset cifar10 --data_path data --images 5000 --epochs 2]
        [--init_channels 4 --layers 3 --amp_dtype bfloat16 float16 --figure F]

Second-order searches (exact product) on the first images of each data set, side by side on the same batches:
the reference in float32; the same with its initial weights moved by 1e-6, relative, because float32 alone
parts two searches; the fused one; and with `--amp_dtype` the fused one with activations of each type. Prints
the cosine of the alphas' displacement with the reference's, CPU times, and how many validation images are
classified right in the end; ends with exit code 1 where a fused one's cosine is below the moved one's less
0.02. `--figure` draws the training loss and the cosine of every step.
"""

import argparse
import dataclasses
import sys
import time
from typing import Any

import torch
from torch import Tensor

from darts_fast.config import SearchConfig
from darts_fast.data import Dataset
from darts_fast.datasets import load
from darts_fast.evaluation import evaluated
from darts_fast.precision import TYPES, strict_float32
from darts_fast.search import Search

ALLOWANCE = 0.02
REFERENCE, MOVED = "reference, float32", "weights moved by 1e-6"

Curve = list[tuple[float, float]]  # of each step: training loss, cosine of the displacement


def alphas(search: Search) -> Tensor:
    """A copy of all alphas, in a row."""
    return torch.cat([a.detach().reshape(-1) for a in search.network.alphas().values()])


def first_images(dataset: str, args: argparse.Namespace) -> Dataset:
    """The data set with the first `--images` of its training images."""
    data = load(dataset, args.data_path)
    assert isinstance(data.images, Tensor)
    return dataclasses.replace(data, images=data.images[: args.images], labels=data.labels[: args.images])


def move_weights(search: Search, seed: int) -> None:
    """Moves every weight by 1e-6, relative: less than a search in float32 can tell."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in search.network.weights().values():
            w.mul_(1 + 1e-6 * torch.randn(w.shape, generator=generator))


def take_step(search: Search, epoch: int, step: int) -> float:
    """Takes a step of an epoch, both counted from 0; its training loss."""
    search.epoch, search.step = epoch, step
    if step == 0:
        search.begin_epoch()
    (loss, *_), _ = search.take_step(search.learning_rate())
    return float(loss)


def searches(dataset: str, args: argparse.Namespace) -> dict[str, Search]:
    """By name, the reference first."""
    data = first_images(dataset, args)
    variants: dict[str, dict[str, Any]] = {REFERENCE: {}, MOVED: {}, "fused, float32": {"fused": True}}
    variants |= {f"fused, {name}": {"fused": True, "amp_dtype": name} for name in args.amp_dtype}
    common = {name: getattr(args, name) for name in ("epochs", "init_channels", "layers")}
    found = {
        name: Search(SearchConfig(dataset=dataset, device="cpu", **common, **settings), data)
        for name, settings in variants.items()
    }
    move_weights(found[MOVED], 0)
    return found


def race(dataset: str, args: argparse.Namespace) -> dict[str, Curve]:
    """The searches' curves by name."""
    found = searches(dataset, args)
    reference = found[REFERENCE]
    start, seconds = alphas(reference), dict.fromkeys(found, 0.0)
    curves: dict[str, Curve] = {name: [] for name in found}
    for epoch in range(args.epochs):
        for step in range(reference.steps_per_epoch):
            for name, search in found.items():
                before = time.process_time()
                loss = take_step(search, epoch, step)
                seconds[name] += time.process_time() - before
                moved, expected = ((alphas(s) - start).double() for s in (search, reference))
                along = torch.cosine_similarity(moved, expected, dim=0)
                curves[name].append((loss, float(along)))
        print(f"{dataset}, epoch {epoch + 1}, step {step + 1}:", flush=True)
        for name, search in found.items():
            loss, cosine = curves[name][-1]
            _, top1, _ = evaluated(search.network, search.batches, search.validation_half, 64)
            print(
                f"    {name:<24} cosine with the reference {cosine:.4f}, loss {loss:.3f}, validation top-1 "
                f"{top1:.1%}, {seconds[name]:.0f} CPU seconds so far",
                flush=True,
            )
    return curves


def draw(path: str, found: dict[str, dict[str, Curve]]) -> None:
    """A column a data set: loss above, cosine below."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "darts_fast"  # the same file for the same curves
    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(2, len(found), sharex="col", squeeze=False)
    for (dataset, curves), (above, below) in zip(found.items(), grid.T, strict=True):
        for (name, curve), (colour, line) in zip(curves.items(), STYLES, strict=False):
            steps, (losses, cosines) = range(1, len(curve) + 1), zip(*curve, strict=True)
            above.plot(steps, losses, line, color=colour, label=name, linewidth=1.4)
            if name != REFERENCE:
                below.plot(steps, cosines, line, color=colour, label=name, linewidth=1.4)
        above.set(title=dataset, ylabel="training loss")
        below.set(xlabel="step", ylabel="cosine of the alphas' displacement")
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None, dpi=150)


STYLES = [("#202020", "-"), ("#8A8A8A", ":"), ("#0067A5", "--"), ("#B5381B", "-"), ("#00784F", "-.")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", nargs="+", default=["cifar10"])
    parser.add_argument("--data_path", default="data")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--init_channels", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--amp_dtype", nargs="+", choices=list(TYPES), default=[])
    parser.add_argument("--figure", metavar="F", help="draw the curves into this .svg or .png")
    args = parser.parse_args()
    print(f"{vars(args)}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with strict_float32():
        found = {dataset: race(dataset, args) for dataset in args.dataset}
    if args.figure:
        draw(args.figure, found)
    below = []
    for dataset, curves in found.items():
        cosines = {name: curve[-1][1] for name, curve in curves.items()}
        below += [f"{dataset}: {n}" for n in cosines if not cosines[n] >= cosines[MOVED] - ALLOWANCE]
    print(f"below {MOVED} less {ALLOWANCE}: {', '.join(below) or 'none'}")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
