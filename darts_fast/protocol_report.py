"""The report of a protocol: its figures as JSON, as Markdown and as pictures, from the outcomes of its runs.

Nothing in it depends on when the runs ran, or on how often they were stopped and resumed.
"""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darts_fast import plot
from darts_fast.config import HIDDEN, ProtocolConfig
from darts_fast.errors import InputError, RunError, first_line
from darts_fast.genotype import Genotype
from darts_fast.runs import METRICS, write_atomically, write_json, writing
from darts_fast.tables import markdown_table, mean_and_deviation
from darts_fast.train import split

Outcome = dict[str, Any]  # of a run, plain values: what its kind ends in, or `failed`, the reason

COLOURS = {"found": "#0067A5", "random": "#B5381B"}


@dataclass
class Candidate:
    """A genotype that may be chosen."""

    search: Outcome | None  # None of a random genotype
    genotype: Genotype | None  # None where its search failed
    brief: Outcome | None = None  # None where there is no genotype to train

    @property
    def failed(self) -> str | None:
        """The reason why it cannot be chosen."""
        outcomes = (outcome for outcome in (self.search, self.brief) if outcome)
        return next((outcome["failed"] for outcome in outcomes if "failed" in outcome), None)


@dataclass
class Group:
    """The genotypes of the searches, or the random ones, and the trainings of the chosen one."""

    candidates: list[Candidate]
    trainings: list[Outcome] = field(default_factory=list)

    @property
    def chosen(self) -> int | None:
        """The candidate whose brief training has the best validation accuracy after its last epoch, the first
        of equals; None where every one failed."""
        top1 = {i: c.brief["top1"] for i, c in enumerate(self.candidates) if c.brief and not c.failed}
        return max(top1, key=top1.__getitem__) if top1 else None

    @property
    def genotype(self) -> Genotype | None:
        """That of the chosen candidate."""
        return None if self.chosen is None else self.candidates[self.chosen].genotype

    @property
    def top1(self) -> list[float]:
        """Test accuracies of the trainings that came to their end."""
        return [outcome["top1"] for outcome in self.trainings if "failed" not in outcome]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.top1) if self.top1 else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None of fewer than two trainings."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


Groups = dict[str, Group]  # "found" and "random"


def write_report(
    path: Path,
    config: ProtocolConfig,
    environment: dict[str, str],
    images: tuple[int, int],
    groups: Groups,
) -> None:
    """Writes report.json, report.md, found.svg, random.svg and curves.png into the protocol's folder.

    `images`: how many the data set has to train, and to test. A picture that cannot be drawn is left out.
    """
    pictures = {}
    for name, group in groups.items():
        file = path / f"{name}.svg"
        if group.genotype is not None:
            try:
                plot.save(group.genotype, file)
                pictures[name] = file.name
            except RunError:  # no Graphviz
                pass
    picture = plot.curves(_panels(path, config, groups))
    with writing(path / "curves.png"):
        write_atomically(path / "curves.png", picture)
    write_json(path / "report.json", as_json(config, environment, images, groups))
    text = "\n".join(_markdown(config, environment, images, groups, pictures)) + "\n"
    with writing(path / "report.md"):
        write_atomically(path / "report.md", text.encode())


def as_json(
    config: ProtocolConfig, environment: dict[str, str], images: tuple[int, int], groups: Groups
) -> dict[str, Any]:
    """The content of report.json: accuracies from 0 to 1, None where there is none."""
    content = {}
    for name, group in groups.items():
        content[name] = {
            "candidates": [
                {"cell": f"{name}-{i + 1}"}
                | ({} if c.search is None else _of_search(c.search, config.seed + i))
                | {
                    "genotype": None if c.genotype is None else str(c.genotype),
                    "validation_top1": (c.brief or {}).get("top1"),
                    "failed": c.failed,
                }
                for i, c in enumerate(group.candidates)
            ],
            "chosen": None if group.chosen is None else f"{name}-{group.chosen + 1}",
            "trainings": [
                {"seed": config.seed + j}
                | {key: outcome.get(key) for key in ("top1", "top5", "parameters", "multiply_adds", "failed")}
                for j, outcome in enumerate(group.trainings)
            ],
            "mean": group.mean,
            "deviation": group.deviation,
        }
    difference, error = compared(groups)
    return {
        **content,
        "difference": difference,
        "standard_error": error,
        "images": dict(zip(("train", "test"), images, strict=True)),
        "settings": _settings(config),
        "environment": environment,
    }


def compared(groups: Groups) -> tuple[float | None, float | None]:
    """The mean test accuracy of the search's genotype less that of the random one, and the standard error of
    this difference, sqrt(s1^2 / n1 + s2^2 / n2); None where a group has too few trainings."""
    found, random = groups["found"], groups["random"]
    if found.mean is None or random.mean is None:
        return None, None
    if found.deviation is None or random.deviation is None:
        return found.mean - random.mean, None
    variance = found.deviation**2 / len(found.top1) + random.deviation**2 / len(random.top1)
    return found.mean - random.mean, math.sqrt(variance)


def in_words(groups: Groups) -> str:
    """One sentence on what came out."""
    parts = []
    for name, noun in (("found", "the searches' best cell"), ("random", "the best random cell")):
        group = groups[name]
        if group.mean is None:
            parts.append(f"{noun}: none was trained to the end")
        else:
            parts.append(f"{noun}: test top-1 {_spread(group)} ({_count(len(group.top1), 'training')})")
    difference, error = compared(groups)
    if difference is not None:
        parts.append(
            f"difference {100 * difference:+.2f} points"
            + ("" if error is None else f", its standard error {100 * error:.2f}")
        )
    return "; ".join(parts)


def _of_search(search: Outcome, seed: int) -> dict[str, Any]:
    return {"seed": seed, "supernet_top1": search.get("top1"), "supernet_epoch": search.get("epoch")}


def _settings(config: ProtocolConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in HIDDEN}


def _spread(group: Group) -> str:
    """98.33 ± 0.21 %"""
    return mean_and_deviation([100 * top1 for top1 in group.top1]) + " %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


Rows = list[tuple[object, ...]]


def _result_rows(config: ProtocolConfig, groups: Groups) -> Rows:
    """A row a group: what came out."""
    rows: Rows = []
    for name, group in groups.items():
        count = len(group.candidates)
        noun = (
            f"{count} search{'' if count == 1 else 'es'}" if name == "found" else _count(count, "random cell")
        )
        ended = [outcome for outcome in group.trainings if "failed" not in outcome]
        rows.append(
            (
                f"**the best of {noun}**",
                f"**{_spread(group)}**" if ended else "none",
                f"{len(ended)} of {config.trainings}",
                f"{ended[0]['parameters'] / 1e6:.3g} M" if ended else "",
                f"{ended[0]['multiply_adds'] / 1e6:.3g} M" if ended else "",
            )
        )
    return rows


def _candidate_rows(config: ProtocolConfig, groups: Groups) -> Rows:
    """A row a candidate: its search, its brief training, whether it was chosen."""
    rows: Rows = []
    for name, group in groups.items():
        for i, c in enumerate(group.candidates):
            searched = c.search or {}
            of_search = (
                f"{_percent(searched['top1'])}, epoch {searched['epoch']}" if "top1" in searched else ""
            )
            seed = config.seed + i if c.search else ""
            note = f"failed: {c.failed}" if c.failed else "**chosen**" if i == group.chosen else ""
            rows.append((f"{name}-{i + 1}", seed, of_search, _percent((c.brief or {}).get("top1")), note))
    return rows


def _training_rows(config: ProtocolConfig, groups: Groups) -> Rows:
    """A row a seed, a column a group; then mean and deviation."""
    rows: Rows = []
    for j in range(config.trainings):
        outcomes = [group.trainings[j] if group.trainings else {} for group in groups.values()]
        cells = [f"failed: {o['failed']}" if "failed" in o else _percent(o.get("top1")) for o in outcomes]
        rows.append((config.seed + j, *cells))
    for noun, values in (
        ("mean", [group.mean for group in groups.values()]),
        ("standard deviation", [group.deviation for group in groups.values()]),
    ):
        rows.append((f"**{noun}**", *(f"**{_percent(v)}**" if v is not None else "" for v in values)))
    return rows


def _markdown(
    config: ProtocolConfig,
    environment: dict[str, str],
    images: tuple[int, int],
    groups: Groups,
    pictures: dict[str, str],
) -> list[str]:
    phases = {phase: config.of_run(phase).resolved(config.dataset) for phase in config.PHASES}
    sizes = {
        phase: f"{_count(c.epochs, 'epoch')}, {c.init_channels} channels, {c.layers} cells"
        for phase, c in phases.items()
    }
    kept, held_out = map(len, split(images[0], phases["brief"].train_portion))
    difference, error = compared(groups)
    in_short, cells = [], []
    if difference is not None and error is not None:
        in_short = [
            "",
            f"The first mean less the second is {100 * difference:+.2f} points, with a standard error of "
            f"{100 * error:.2f}; a difference of less than two standard errors may well be chance.",
        ]
    titles = {name: f"{name}-{g.chosen + 1}" for name, g in groups.items() if g.chosen is not None}
    for name, title in titles.items():
        cells += [f"{title}:", "", "```", str(groups[name].genotype), "```", ""]
        if name in pictures:
            cells += [f"![{title}]({pictures[name]})", ""]
    return [
        f"# The protocol of DARTS on {config.dataset}",
        "",
        "The cells of several searches are trained briefly; the best on validation images is chosen and "
        "trained to the end with several seeds. Random cells go the same way. Accuracies are those after the "
        "last epoch; ± is the sample standard deviation over the seeds.",
        "",
        *markdown_table(
            ("test top-1", "mean ± deviation", "trainings", "parameters", "multiply-adds"),
            _result_rows(config, groups),
        ),
        *in_short,
        "",
        "## The choice",
        "",
        f"Searches: {sizes['search']}. Brief trainings: {sizes['brief']}, all with seed {config.seed}, on "
        f"{kept} of the {images[0]} training images; the other {held_out} give their validation accuracy. "
        "The test images had no part in the choice.",
        "",
        *markdown_table(
            (
                "cell",
                "seed of the search",
                "supernet's validation top-1",
                "brief training's validation top-1",
                "",
            ),
            _candidate_rows(config, groups),
        ),
        "",
        "## The trainings of the chosen cells",
        "",
        f"{sizes['train']}, on all {images[0]} training images; tested on {images[1]}.",
        "",
        *markdown_table(
            ("seed", *(f"test top-1 of {titles[name]}" if name in titles else "" for name in groups)),
            _training_rows(config, groups),
        ),
        "",
        "![Accuracy by epoch](curves.png)",
        "",
        "## The chosen cells",
        "",
        *cells,
        "## Settings",
        "",
        *markdown_table(("setting", "value"), (_settings(config) | environment).items()),
        "",
        "All settings of a run are in the config.json of its folder; the hours of each are in hours.json.",
    ]


def _panels(path: Path, config: ProtocolConfig, groups: Groups) -> list[plot.Panel]:
    """Accuracy by epoch of every run that came to its end, of the three phases."""
    searches, brief, trainings = [], [], []
    for name, group in groups.items():
        colour, dashed = COLOURS[name], name == "random"
        others = f"the other {name} cells"
        for i, c in enumerate(group.candidates):
            width, label = (2.6, f"{name}-{i + 1}, chosen") if i == group.chosen else (1, others)
            if c.search and "failed" not in c.search:
                values = _accuracies(path / f"searches/{name}-{i + 1}", "val_top1")
                searches.append(plot.Curve(values, colour, dashed, width, label))
            if not c.failed:
                values = _accuracies(path / f"brief/{name}-{i + 1}", "val_top1")
                brief.append(plot.Curve(values, colour, dashed, width, label))
        runs = [
            _accuracies(path / f"trainings/{name}-seed-{config.seed + j}", "test_top1")
            for j, outcome in enumerate(group.trainings)
            if "failed" not in outcome
        ]
        trainings += [plot.Curve(values, colour, dashed, 0.7, "") for values in runs]
        if runs and group.chosen is not None:
            mean = [statistics.fmean(values) for values in zip(*runs, strict=True)]
            label = f"{name}-{group.chosen + 1}, mean of {_count(len(runs), 'training')}"
            trainings.append(plot.Curve(mean, colour, dashed, 2.6, label))
    return [
        plot.Panel("Searches: supernet on its validation half", searches),
        plot.Panel("Brief trainings: held-out training images", brief),
        plot.Panel("Trainings of the chosen cells: test images", trainings),
    ]


def _accuracies(path: Path, key: str) -> list[float]:
    """After each epoch, in percent, from the metrics of a run. Raises InputError where they are damaged."""
    try:
        rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
        return [100 * row[key] for row in rows if key in row]
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path / METRICS} cannot be read ({first_line(error)}); put the run's own back"
        ) from error
