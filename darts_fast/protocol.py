"""Searches, chooses, trains and tests as the DARTS paper does, with random cells beside."""

import argparse
import dataclasses
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from darts_fast.config import (
    ProtocolConfig,
    SearchConfig,
    argument_parser,
    available_device,
    refuse_settings,
)
from darts_fast.data import fingerprint, seeded
from darts_fast.datasets import read_data
from darts_fast.distributed import refuse_ranks
from darts_fast.errors import InputError, RunError, one_line
from darts_fast.files import Unreadable, read_json
from darts_fast.genotype import Genotype, random_genotype
from darts_fast.loop import MOVABLE, duration, is_lost_worker, is_out_of_memory, with_later_settings
from darts_fast.protocol_report import Candidate, Group, Outcome, in_words, write_report
from darts_fast.runs import (
    CHECKPOINT,
    CONFIG,
    Interrupted,
    Run,
    Stopped,
    appended,
    differences,
    lock,
    new_folder,
    read_config,
    run_program,
    write_json,
    writing,
)
from darts_fast.search import Search, resume_search, search
from darts_fast.spaces import read_space, written_out
from darts_fast.state import check_keys, check_number
from darts_fast.train import Data, Training, resume_training, train

if TYPE_CHECKING:  # it needs Ray, which is optional
    from darts_fast.cluster import Cluster

RUNS, HOURS = "runs.json", "hours.json"


class ProtocolResult(NamedTuple):
    """What a protocol ended in. Accuracies are of the test images after the last epoch, 0 to 1."""

    genotype: Genotype  # the chosen one of the searches
    top1: float  # the mean of its trainings
    deviation: float | None  # their sample standard deviation; None of one training
    random_genotype: Genotype  # the chosen one of the random genotypes
    random_top1: float
    random_deviation: float | None
    path: Path  # the folder; report.json in it has every figure


# Maps a function over runs: yields a run's key and None when it begins (and when it begins again, because its
# process died), then its key and the function's value.
Mapped = Generator[tuple[str, Outcome | None], None, None]
Map = Callable[[Callable[[Run], Outcome], Sequence[Run]], Mapped]


def protocol(
    config: ProtocolConfig, data: Data | None = None, cluster: "Cluster | None" = None
) -> ProtocolResult:
    """The protocol of the paper's section 3.

    Searches run with different seeds. The genotype of each is trained briefly on a part of the training
    images, and the best on the other training images is chosen. That one is trained on all training images
    with different seeds, and tested. As many random genotypes go the same way. Writes the folder
    `protocols/<name>/` with all runs in it, report.md, report.json and pictures.

    A run whose loss is not finite is reported with its reason, and the protocol goes on without it.

    Args:
        config: the settings; what is None takes the data set's default.
        data: the user's own images (uint8 [N, channels, H, W]) and labels (integers [N]), to train and to
            test, used instead of `config.dataset`. The test images are not used before the choice.
        cluster: where the runs of a phase are computed side by side, to the same report; None: in this
            process, one after the other.

    Raises:
        InputError: bad settings or data, the folder exists or cannot be written, or there is no such cluster.
        RunError: no genotype of a search, or no random one, was trained to the end (the report is written);
            the device ran out of memory.
        Stopped: Ctrl-C or SIGTERM; the run was saved.
    """
    refuse_ranks("the protocol runs")
    dataset = read_data(config, data)
    config = dataclasses.replace(config.resolved(dataset.name), stream=dataset.streamed is not None)
    given = config.of_run("search").space
    space = written_out(read_space(given))
    if given != space:  # a file, which may be another one, or elsewhere, when the protocol is resumed
        settings = f"{config.search_settings} {shlex.quote(f'space={space}')}"
        config = dataclasses.replace(config, search_settings=settings)
    # What a run of the last phase refuses is refused before the first.
    Search(config.of_run("search"), dataset)
    for phase in ("brief", "train"):
        Training(config.of_run(phase, genotype=random_cell(config, 0)), dataset)
    with _mapping(cluster, config) as mapped:
        path, environment = new_folder(config, dataset.name, config.FOLDER)
        with Protocol(path, dataclasses.replace(config, name=path.name), environment, data) as run:
            return run.run(mapped)


def resume_protocol(
    path: str | Path,
    data: Data | None = None,
    device: str | None = None,
    cluster: "Cluster | None" = None,
) -> ProtocolResult:
    """Goes on with the protocol of a folder, from the checkpoints of the runs that were under way, to the
    same report as if it had never stopped. `data` as in `protocol`, where it was given; `device`, if another
    than it began on (then to other bits); `cluster` as in `protocol`, wherever it began. Raises what
    `protocol` raises.
    """
    refuse_ranks("the protocol runs")
    config, environment = read_config(Path(path), ProtocolConfig)
    config = dataclasses.replace(config, device=str(available_device(device or config.device)))
    with (
        Protocol(Path(path), config, environment, data, resumed=True) as run,
        _mapping(cluster, config) as mapped,
    ):
        return run.run(mapped)


def _mapping(cluster: "Cluster | None", config: ProtocolConfig) -> AbstractContextManager[Map]:
    return nullcontext(in_turn) if cluster is None else cluster.started(config.device)


def in_turn(function: Callable[[Run], Outcome], runs: Sequence[Run]) -> Mapped:
    """The `Map` of this process."""
    for run in runs:
        yield run.key, None
        yield run.key, function(run)


def compute(run: Run, data: Data | None) -> Outcome:
    """The outcome of a run, which is begun, or resumed where its folder has a checkpoint. `data` as in
    `protocol`.

    Raises:
        InputError: its folder cannot be written, or does not fit.
        Locked: another process is in it, such as a worker that a cluster has lost touch with.
        RunError: the device ran out of memory, or a process that decodes images was killed.
        Stopped: Ctrl-C or SIGTERM; the run was saved.
    """
    path, config = run.folder, run.config
    try:
        begun = _begun(path)
        if isinstance(config, SearchConfig):
            own = None if data is None else data[:2]
            found = resume_search(path, own, config.device) if begun else search(config, own, path.parent)
            return {"top1": found.top1, "epoch": found.epoch, "genotype": found.genotype.as_json()}
        trained = resume_training(path, data, config.device) if begun else train(config, data, path.parent)
        return {name: getattr(trained, name) for name in ("top1", "top5", "parameters", "multiply_adds")}
    except RunError as error:
        if is_out_of_memory(error.__cause__) or is_lost_worker(error.__cause__):  # not the seed's fault
            raise
        return {"failed": str(error).replace(f"{path.parent.parent}{os.sep}", "")}


def _begun(path: Path) -> bool:
    """Whether a run's folder has a checkpoint to go on from. Deletes the folder of a run that was killed
    before its first one; raises Locked where its process is still there."""
    if os.path.lexists(path) and not os.path.lexists(path / CHECKPOINT):
        log, *_ = appended(path.name)
        with writing(path):
            with suppress(FileNotFoundError), (path / log).open("r+b") as file:
                lock(file, path)
            if not os.path.lexists(path / CHECKPOINT):  # nor has it written one and ended meanwhile
                shutil.rmtree(path)
    return os.path.lexists(path / CHECKPOINT)


def random_cell(config: ProtocolConfig, number: int) -> Genotype:
    """The random genotype of that number, from 0, of the searches' space. It depends on nothing else but the
    seed."""
    return random_genotype(seeded("cpu", config.seed, number), read_space(config.of_run("search").space))


class Protocol:
    """A protocol under way: its folder, which it keeps other processes out of, and the outcomes of the runs
    that ended, by their folders, such as "searches/found-1"."""

    def __init__(
        self,
        path: Path,
        config: ProtocolConfig,
        environment: dict[str, str],
        data: Data | None,
        resumed: bool = False,
    ):
        self.path, self.config, self.environment, self.data = path, config, environment, data
        dataset = read_data(config, data, resumed=path if resumed else None)
        self.images = len(dataset.labels), len(dataset.test_labels)
        settings = dataclasses.asdict(config).items()
        self.origin: dict[str, Any] = {
            "data": fingerprint(dataset),
            "settings": {name: value for name, value in settings if name not in MOVABLE},
        }
        self.outcomes: dict[str, Outcome] = {}
        self.hours: dict[str, dict[str, Any]] = {}  # `hours`, and `since` when it goes on; None: it does not

    def __enter__(self) -> "Protocol":
        with writing(self.path):
            self._locked = (self.path / CONFIG).open("r+b")  # NFS locks no file that is open for reading
        try:
            lock(self._locked, self.path)
            self._read()
        except InputError:
            self._locked.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._locked.close()

    def run(self, mapped: Map) -> ProtocolResult:
        """From where it stands to the report."""
        config, path = self.config, self.path
        numbers = range(1, config.searches + 1)
        searches = {f"searches/found-{i}": {"seed": config.seed + i - 1} for i in numbers}
        found = self._phase("search", searches, mapped)
        groups = {
            "found": Group(
                [
                    Candidate(search, None if "failed" in search else Genotype.from_json(search["genotype"]))
                    for search in found
                ]
            ),
            "random": Group([Candidate(None, random_cell(config, i - 1)) for i in numbers]),
        }
        candidates = {
            f"brief/{name}-{i}": candidate
            for name, group in groups.items()
            for i, candidate in zip(numbers, group.candidates, strict=True)
            if candidate.genotype is not None
        }
        brief = {key: {"seed": config.seed, "genotype": c.genotype} for key, c in candidates.items()}
        for candidate, outcome in zip(candidates.values(), self._phase("brief", brief, mapped), strict=True):
            candidate.brief = outcome
        chosen = {name: group.genotype for name, group in groups.items() if group.genotype is not None}
        trainings = {
            f"trainings/{name}-seed-{seed}": {"seed": seed, "genotype": genotype}
            for name, genotype in chosen.items()
            for seed in range(config.seed, config.seed + config.trainings)
        }
        outcomes = self._phase("train", trainings, mapped)
        for name in chosen:
            groups[name].trainings, outcomes = outcomes[: config.trainings], outcomes[config.trainings :]
        write_report(path, config, self.environment, self.images, groups)
        _tell(f"{path / 'report.md'}: {in_words(groups)}; hours: {self._hours_in_words()}")
        values: list[tuple[Genotype, float, float | None]] = []
        for name, group in groups.items():
            if group.genotype is None or group.mean is None:
                raise RunError(
                    f"no {name} cell was trained to the end; the reasons are in {path / 'report.md'}"
                )
            values.append((group.genotype, group.mean, group.deviation))
        found_one, random_one = values
        return ProtocolResult(*found_one, *random_one, path)

    def _phase(self, phase: str, settings: dict[str, dict[str, Any]], mapped: Map) -> list[Outcome]:
        """The outcomes of the runs with these folders and settings of their own, in this order. A run whose
        outcome is not known yet is begun or resumed."""
        root = self.path.absolute()
        runs = [
            Run(key, root / key, self.config.of_run(phase, name=Path(key).name, **own))
            for key, own in settings.items()
            if key not in self.outcomes
        ]
        under_way: dict[str, float] = {}  # since when
        at_once = 1
        try:
            with closing(mapped(partial(compute, data=self.data), runs)) as events:
                for key, outcome in events:
                    if outcome is None:
                        what = "goes on, because its process died" if key in under_way else "begins"
                        self._begin_hours(key)
                        under_way[key] = time.time()
                        at_once = max(at_once, len(under_way))
                    else:
                        what = "failed" if "failed" in outcome else "ended"
                        del under_way[key]
                        self._end_hours(key)
                        self.outcomes[key] = outcome
                        write_json(self.path / RUNS, {**self.origin, "runs": self.outcomes})
                        what += self._elsewhere(key, phase)
                    _tell(f"Protocol: {key} {what}; {self._left(list(settings), under_way, at_once)}")
        except Interrupted as stop:
            where = f"within {', '.join(under_way)}" if under_way else "between two runs"
            function, own_images = "darts_fast.protocol.resume_protocol", self.data is not None
            raise Stopped(where, self.path, function, own_images, stop.signal_number) from stop
        finally:
            for key in under_way:
                self._end_hours(key)
        return [self.outcomes[key] for key in settings]

    def _elsewhere(self, key: str, phase: str) -> str:
        """What of a run's environment was not as the report says, in words."""
        _, environment = read_config(self.path / key, self.config.PHASES[phase][0])
        differs = differences(self.environment, environment)
        return f", not where the protocol began ({differs}): its bits may differ" if differs else ""

    def _left(self, keys: list[str], under_way: dict[str, float], at_once: int) -> str:
        """How many of the phase's runs are left, and for how long, by the mean of those that ended."""
        left = [key for key in keys if key not in self.outcomes]
        ended = [self.hours[key]["hours"] for key in keys if key in self.outcomes and key in self.hours]
        words = f"{len(left)} of {len(keys)} left in this phase"
        if not ended or not left:
            return words
        each, now = 3600 * sum(ended) / len(ended), time.time()
        seconds = sum(max(0.0, each - (now - under_way.get(key, now))) for key in left) / at_once
        return f"{words}, about {duration(seconds)}"

    # Hours, which differ between two runs of the same bits: in a file of their own

    def _begin_hours(self, key: str) -> None:
        """Counts what a session before, which was killed, did up to its last checkpoint."""
        known = self.hours.get(key, {"hours": 0.0, "since": None})
        hours, since = known["hours"], known["since"]
        if since is not None:
            with suppress(OSError):
                hours += max(0.0, (self.path / key / CHECKPOINT).stat().st_mtime - since) / 3600
        self.hours[key] = {"hours": hours, "since": time.time()}
        write_json(self.path / HOURS, self.hours)

    def _end_hours(self, key: str) -> None:
        known = self.hours[key]
        hours = max(0.0, time.time() - known["since"]) / 3600  # a clock may be set back
        self.hours[key] = {"hours": known["hours"] + hours, "since": None}
        write_json(self.path / HOURS, self.hours)

    def _hours_in_words(self) -> str:
        totals: dict[str, float] = {}
        for key, known in self.hours.items():
            phase = key.partition("/")[0]
            totals[phase] = totals.get(phase, 0.0) + known["hours"]
        return ", ".join(f"{phase} {hours:.3g}" for phase, hours in totals.items())

    # What was written before

    def _read(self) -> None:
        """Takes up the outcomes and hours that are in the folder.

        Raises:
            InputError: they are of other images or settings, or no protocol writes such.
        """
        if os.path.lexists(self.path / RUNS):
            with _reading(self.path / RUNS) as content:
                check_keys(content, (*self.origin, "runs"), "it")
                content["settings"] = with_later_settings(content["settings"], self.origin["settings"])
                check_keys(content["settings"], self.origin["settings"], "settings")
                if not isinstance(content["runs"], dict):
                    raise ValueError("runs is no dictionary")
                for key, outcome in content["runs"].items():
                    _check_outcome(outcome, key)
            self._check_origin(content)
            self.outcomes = content["runs"]
        if os.path.lexists(self.path / HOURS):
            with _reading(self.path / HOURS) as content:
                for key, known in content.items():
                    check_keys(known, ("hours", "since"), key)
                    check_number(known["hours"], float, 0, math.inf, f"{key}.hours")
                    if known["since"] is not None:
                        check_number(known["since"], float, 0, math.inf, f"{key}.since")
            self.hours = content

    def _check_origin(self, content: dict[str, Any]) -> None:
        if content["data"] != self.origin["data"]:
            raise InputError(
                f"{self.path} began with other images than {self.config.dataset} holds now; restore them, or "
                "start a new protocol"
            )
        for name, value in self.origin["settings"].items():
            if content["settings"][name] != value:
                raise InputError(
                    f"{self.path / CONFIG} says {name} = {value}, but the protocol began with "
                    f"{content['settings'][name]!r}; put that back, or start a new protocol"
                )


def _check_outcome(outcome: Any, key: str) -> None:
    """Raises ValueError where it is not what `compute` gives."""
    if isinstance(outcome, dict) and "failed" in outcome:
        check_keys(outcome, ("failed",), key)
        if not isinstance(outcome["failed"], str):
            raise ValueError(f"{key}.failed is no text")
        return
    searched = key.startswith("searches/")
    counts = ("epoch",) if searched else ("parameters", "multiply_adds")
    check_keys(outcome, ("top1", *counts, "genotype" if searched else "top5"), key)
    for name in counts:
        check_number(outcome[name], int, 1, math.inf, f"{key}.{name}")
    for name in ("top1",) if searched else ("top1", "top5"):
        check_number(outcome[name], float, 0, 1, f"{key}.{name}")
    if searched:
        Genotype.from_json(outcome["genotype"], f"{key}.genotype")


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """The dictionary in a JSON file; within, a ValueError about it becomes an InputError."""
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError("it is no dictionary")
        yield content
    except Unreadable as error:
        raise InputError(
            f"{path} {error}; put the protocol's own back, or delete it: the runs stay"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{path} is not a protocol's ({error}); put the protocol's own back, or delete it: the runs stay"
        ) from error


def _tell(line: str) -> None:
    """To the console; a terminal or pipe that is gone ends no run."""
    with suppress(OSError):
        print(one_line(line), flush=True)


def main() -> None:
    parser = argument_parser(ProtocolConfig, __doc__)
    parser.add_argument(
        "--resume", metavar="DIR", help="go on with the protocol of this folder, on --device if given"
    )
    parser.add_argument(
        "--cluster",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="HOST:PORT",
        help="compute the runs of a phase side by side, to the same report, by Ray: on the cluster of this "
        "address, to which this machine belongs; without one on this machine",
    )
    parser.add_argument(
        "--cpus",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="with --cluster: processors and threads of a run; on CUDA it has a GPU, too (default: 1)",
    )
    given = vars(parser.parse_args())
    resumed, cluster = given.pop("resume"), _cluster(given)
    if resumed is not None:
        device = given.pop("device", None)
        refuse_settings("--resume", resumed, given)
        resume_protocol(resumed, device=device, cluster=cluster)
    else:
        protocol(ProtocolConfig(**given), cluster=cluster)


def _cluster(given: dict[str, Any]) -> "Cluster | None":
    """Takes what is said of a cluster out of the command line's values."""
    asked, cpus = "cluster" in given, given.pop("cpus", None)
    if not asked:
        if cpus is not None:
            raise InputError("--cpus is for --cluster: give it, too, or set OMP_NUM_THREADS")
        return None
    from darts_fast.cluster import Cluster

    return Cluster(given.pop("cluster"), 1 if cpus is None else cpus)


if __name__ == "__main__":
    # As the module itself and not as __main__: by this name another process imports what it computes.
    from darts_fast.protocol import main

    sys.argv[0] = "python -m darts_fast.protocol"
    sys.exit(run_program(sys.argv[0], main))
