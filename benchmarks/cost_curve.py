"""What multiply-adds in the objective do: searches on the digits with growing --macs_weight, and the accuracy
of what each derives, trained.

    python benchmarks/cost_curve.py [--weights 0 0.1 1 10] [--seeds 2 3 4] [--out DIR]

Every search is run.py's default on the digits, every training run_from.py's with 20 epochs, 8 channels and 3
layers, on half of the training images and judged by the others. Writes cost_curve.md and cost_curve.svg, and
the run folders below searchs/ and augments/ of the current folder, which must be new.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from darts_fast import SearchConfig, TrainConfig, search, train
from darts_fast.config import OneSentenceParser
from darts_fast.errors import say
from darts_fast.runs import run_program, write_atomically, writing
from darts_fast.tables import markdown_table, mean_and_deviation

RESULTS = Path(__file__).parent / "results"
TRAINING: dict[str, Any] = {"epochs": 20, "init_channels": 8, "layers": 3, "train_portion": 0.5}


class Point(NamedTuple):
    macs: float  # multiply-adds of the genotype's network, at the training's size
    top1: float  # in percent


def point(weight: float, seed: int) -> Point:
    """What a search derives after its last epoch, trained."""
    settings: dict[str, Any] = {"seed": seed, "name": f"cost-{weight:g}-{seed}", "fused": True}
    found = search(SearchConfig(macs_weight=weight, **settings)).final_genotype
    result = train(TrainConfig(genotype=str(found), **settings, **TRAINING))
    return Point(result.multiply_adds, 100 * result.top1)


def main() -> None:
    parser = OneSentenceParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 1.0, 10.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    points = {weight: [point(weight, seed) for seed in args.seeds] for weight in args.weights}
    rows = [
        (
            f"{weight:g}",
            mean_and_deviation([p.macs / 1e6 for p in found]),
            mean_and_deviation([p.top1 for p in found]),
        )
        for weight, found in points.items()
    ]
    header = ("macs_weight", "multiply-adds, M", "validation top-1, %")
    seeds = ", ".join(map(str, args.seeds))
    head = f"Digits, seeds {seeds}, by `python benchmarks/cost_curve.py`; mean ± deviation."
    table = [head, "", *markdown_table(header, rows), ""]
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / "cost_curve.md", "\n".join(table).encode())
        draw(args.out / "cost_curve.svg", points)
    say("\n".join(table))


def draw(path: Path, points: dict[float, list[Point]]) -> None:
    """Accuracy over multiply-adds, a colour a weight."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "darts_fast"  # the same file for the same points
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    for number, (weight, found) in enumerate(points.items()):
        colour = colours(number / max(1, len(points) - 1) * 0.9)
        axes.scatter([p.macs / 1e6 for p in found], [p.top1 for p in found], color=colour, alpha=0.5, s=18)
        mean = fmean(p.macs for p in found) / 1e6, fmean(p.top1 for p in found)
        axes.scatter(
            *mean, color=colour, s=70, marker="D", label=f"macs_weight {weight:g}, mean of {len(found)}"
        )
    axes.set(xlabel="multiply-adds of an image, millions", ylabel="validation top-1, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(run_program("cost_curve.py", main))
