"""A protocol on a local Ray of two workers: the same report to the byte, also when a worker dies."""

import dataclasses
import os
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("ray", reason='Ray is not installed: pip install "darts_fast[cluster]"')

from test_protocol import REPORT, TINY, data, whole  # noqa: F401  the fixtures

from darts_fast import InputError, RunError
from darts_fast.cluster import Cluster
from darts_fast.protocol import Run, protocol, resume_protocol
from darts_fast.runs import Stopped
from darts_fast.search import Search
from darts_fast.train import Training

pytestmark = [
    pytest.mark.usefixtures("no_heat_maps"),
    pytest.mark.skipif(os.name != "posix", reason="kills and stops by POSIX signals"),
]


@dataclasses.dataclass(frozen=True)
class Disturbed(Cluster):
    """A cluster in whose workers `disturb(function, run)` is called in place of `function(run)`."""

    disturb: object = None

    @contextmanager
    def started(self, device):
        with super().started(device) as mapped:
            yield lambda function, runs: mapped(partial(self.disturb, function), runs)


def at_step(loop, number, do):
    """Has `do(run)` called before a step of that number is taken, counted from the beginning of the run."""
    plain = loop.take_step

    def step(self, *arguments):
        if self.steps_done == number:
            do(self)
        return plain(self, *arguments)

    loop.take_step = step


def die_once(marks, function, run):
    """Kills the process in the second epoch of two of the runs, the first time that it is there."""
    mark = marks / run.folder.name

    def die(_):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if run.key in ("brief/random-1", "trainings/found-seed-3") and not mark.exists():
        at_step(Training, 3 if run.key.startswith("brief") else 7, die)
    return function(run)


def wait_once(marks, function, run):
    """The searches wait in their second step until they are told to stop."""
    mark = marks / run.folder.name

    def wait(loop):
        mark.touch()
        while loop.stop.received is None:
            time.sleep(0.01)

    at_step(Search, 1, wait)
    return function(run)


def test_the_same_report_when_workers_are_killed(whole, data, in_tmp, capsys):  # noqa: F811
    disturb = partial(die_once, in_tmp)
    result = protocol(TINY, data, Disturbed(disturb=disturb))
    assert result._replace(path=whole.path) == whole
    for name in REPORT:
        assert (result.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    for key, steps in (("brief/random-1", 2), ("trainings/found-seed-3", 5)):
        assert (in_tmp / Path(key).name).exists()
        folder = result.path / key
        assert f"Resumed after {steps} steps" in (folder / f"{folder.name}.log").read_text()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Protocol: ")]
    assert len(lines) == 10 + 2 + 10
    assert lines[0].endswith(" begins; 2 of 2 left in this phase")
    assert lines[-1].endswith(" ended; 0 of 4 left in this phase")
    # Two at a time: the second begins before the first has ended.
    assert [line.split()[2].strip(";") for line in lines[:4]] == ["begins", "begins", "ended", "ended"]


def test_stopped_runs_are_saved_and_go_on_without_a_cluster(whole, data, in_tmp):  # noqa: F811
    names = ("found-1", "found-2")

    def stop():
        while not all((in_tmp / name).exists() for name in names):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(
        Stopped, match="stopped and saved within searches/found-., searches/found-.; "
    ) as stopped:
        protocol(TINY, data, Disturbed(disturb=partial(wait_once, in_tmp)))
    assert stopped.value.exit_code == 143
    for name in names:
        log = in_tmp / "protocols" / "tensors" / "searches" / name / f"{name}.log"
        assert "stopped and saved after 2 steps" in log.read_text()
    result = resume_protocol("protocols/tensors", data)
    for name in REPORT:
        assert (result.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def act(run):
    """What the key of the run says."""
    (run.folder / "calls").open("a").write("x")
    if run.key == "refuses":
        raise InputError("the disk is full")
    if run.key == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if run.key == "has a bug":
        raise KeyError("a bug")
    return {"threads": os.environ["OMP_NUM_THREADS"]}


def test_what_ends_a_phase(in_tmp):
    def outcomes(*keys):
        for key in keys:
            (in_tmp / key).mkdir(exist_ok=True)
        return dict(mapped(act, [Run(key, in_tmp / key, None) for key in keys]))

    with Cluster(cpus=2).started("cpu") as mapped:
        assert outcomes("one", "two") == {"one": {"threads": "2"}, "two": {"threads": "2"}}
        with pytest.raises(InputError, match="^the disk is full$"):
            outcomes("refuses", "three")
        with pytest.raises(KeyError, match="a bug"):
            outcomes("has a bug")
        with pytest.raises(RunError, match="^dies lost 3 workers without a new checkpoint"):
            outcomes("dies")
        assert (in_tmp / "dies" / "calls").read_text() == "xxx"


def test_a_cluster_that_is_not_there_is_one_sentence(in_tmp):
    for arguments, device, sentence in (
        ({"cpus": 0}, "cpu", "cpus must be at least 1, not 0"),
        ({"address": "ray://host:10001"}, "cpu", "--cluster takes HOST:PORT of a Ray cluster"),
        ({}, "cuda:1", "give --device cuda, not cuda:1"),
        ({"cpus": 5000}, "cpu", "no machine of the cluster has 5000 processors; the largest has "),
        ({"address": "127.0.0.1:1"}, "cpu", "no Ray at 127.0.0.1:1"),
    ):
        with pytest.raises(InputError, match=sentence) as error, Cluster(**arguments).started(device):
            pass
        assert "\n" not in str(error.value)
