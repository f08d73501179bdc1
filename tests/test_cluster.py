"""A protocol on a local Ray of two workers: the same report to the byte, also when a worker dies."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
from test_protocol import REPORT, TINY, data  # noqa: F401  a fixture

from darts_fast import InputError, RunError, plot
from darts_fast.protocol import protocol, resume_protocol
from darts_fast.runs import Run, Stopped
from darts_fast.train import Training

pytestmark = [
    pytest.mark.usefixtures("no_heat_maps"),
    # An extra, which only --cluster needs; without it there is no cluster to compare with.
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason='Ray is not installed: pip install "darts_fast[cluster]"',
    ),
    # A worker is killed by SIGKILL, and the driver stopped by SIGTERM; Windows has neither.
    pytest.mark.skipif(os.name != "posix", reason="kills and stops by POSIX signals"),
]

SETTINGS = dataclasses.replace(TINY, searches=1, trainings=1)  # a search, two brief trainings, two trainings


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):  # noqa: F811
    """The result and the folder of the protocol without a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        result = protocol(SETTINGS, data)
        return result._replace(path=result.path.resolve())


@pytest.fixture
def started():
    """`Cluster(...).started("cpu")`, in whose workers `disturb(function, run)` is called in place of
    `function(run)`."""
    import ray

    from darts_fast.cluster import Cluster

    @contextmanager
    def start(device="cpu", disturb=None, **arguments):
        with Cluster(**arguments).started(device) as mapped:
            yield lambda function, runs: mapped(partial(disturb, function) if disturb else function, runs)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this module
    yield start
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Disturbed:
    """A cluster for `protocol`."""

    def __init__(self, started, disturb):
        self.started = partial(started, disturb=disturb)


def same_report(one, two):
    for name in REPORT:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def at_step(number, do):
    """Has `do(run)` called before a training takes a step of that number, from 0, of the whole run."""
    plain = Training.take_step

    def step(self, *arguments):
        if self.steps_done == number:
            do(self)
        return plain(self, *arguments)

    Training.take_step = step


def die_once(marks, function, run):
    """Kills the process in the second epoch of a brief training, the first time that it is there."""
    mark = marks / run.folder.name

    def die(_):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    plot.alpha_heat_map = lambda *_: bytes(24)  # as in `no_heat_maps`
    if run.key == "brief/random-1" and not mark.exists():
        at_step(3, die)
    return function(run)


def wait(marks, function, run):
    """Waits in a training's second step until it is told to stop, so that two of them run at once."""

    def until_told(training):
        (marks / run.folder.name).touch()
        while training.stop.received is None:
            time.sleep(0.01)

    at_step(1, until_told)
    return function(run)


def test_the_same_report_when_a_worker_is_killed(whole, data, in_tmp, started, capsys):  # noqa: F811
    result = protocol(SETTINGS, data, Disturbed(started, partial(die_once, in_tmp)))
    assert result._replace(path=whole.path) == whole
    same_report(result.path, whole.path)
    assert (in_tmp / "random-1").exists()
    assert "Resumed after 2 steps" in (result.path / "brief/random-1/random-1.log").read_text()
    runs = [json.loads((path / "runs.json").read_text())["runs"] for path in (result.path, whole.path)]
    assert runs[0] == runs[1]
    hours = json.loads((result.path / "hours.json").read_text())
    assert hours.keys() == runs[0].keys() and all(h["since"] is None for h in hours.values())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Protocol: ")]
    assert len(lines) == 5 + 1 + 5
    assert "Protocol: brief/random-1 goes on, because its process died; " in "".join(lines)
    assert lines[0] == "Protocol: searches/found-1 begins; 1 of 1 left in this phase"
    assert lines[1] == "Protocol: searches/found-1 ended; 0 of 1 left in this phase"
    assert [line for line in lines if " ended; 1 of 2 left in this phase, about " in line]
    assert lines[-1].endswith(" ended; 0 of 2 left in this phase")


def test_stopped_on_a_cluster_and_resumed_without(whole, data, in_tmp, started):  # noqa: F811
    """The trainings, which wait for one another, of a protocol that began without a cluster."""
    path = shutil.copytree(whole.path, in_tmp / "tensors")
    shutil.rmtree(path / "trainings")
    content = json.loads((path / "runs.json").read_text())
    content["runs"] = {k: v for k, v in content["runs"].items() if not k.startswith("trainings")}
    (path / "runs.json").write_text(json.dumps(content))
    for name in REPORT:
        (path / name).unlink()
    names = ("found-seed-2", "random-seed-2")

    def stop():
        while not all((in_tmp / name).exists() for name in names):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    within = r"stopped and saved within trainings/\S+, trainings/\S+; go on with: "
    with pytest.raises(Stopped, match=within) as stopped:
        resume_protocol(path, data, cluster=Disturbed(started, partial(wait, in_tmp)))
    assert stopped.value.exit_code == 143
    for name in names:
        assert "stopped and saved after 2 steps" in (path / "trainings" / name / f"{name}.log").read_text()
    resume_protocol(path, data)
    same_report(path, whole.path)


def act(run):
    """What the key of the run says."""
    with (run.folder / "calls").open("a") as file:
        file.write("x")
    if run.key == "refuses":
        raise InputError("the disk is full")
    if run.key == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if run.key == "has a bug":
        raise KeyError("a bug")
    return {"threads": os.environ["OMP_NUM_THREADS"]}


def test_what_ends_a_phase(in_tmp, started, monkeypatch):
    def outcomes(*keys):
        for key in keys:
            (in_tmp / key).mkdir(exist_ok=True)
        return dict(mapped(act, [Run(key, in_tmp / key, None) for key in keys]))

    monkeypatch.setattr("darts_fast.cluster.DEATHS", 2)
    with started(cpus=2) as mapped:
        assert outcomes("one", "two") == {"one": {"threads": "2"}, "two": {"threads": "2"}}
        with pytest.raises(InputError, match="^the disk is full$"):
            outcomes("refuses", "three")
        with pytest.raises(KeyError, match="a bug"):
            outcomes("has a bug")
        with pytest.raises(RunError, match="^dies lost 2 workers without a new checkpoint"):
            outcomes("dies")
        assert (in_tmp / "dies" / "calls").read_text() == "xx"


def test_a_folder_that_another_process_is_leaving_is_waited_for(in_tmp, monkeypatch):
    from darts_fast import cluster
    from darts_fast.runs import lock

    run = Run("one", in_tmp, None)
    (in_tmp / "log").touch()

    def function(run):
        with (in_tmp / "log").open("ab") as file:
            lock(file, in_tmp)
            return {}

    with (in_tmp / "log").open("ab") as file:
        lock(file, in_tmp)
        monkeypatch.setattr("darts_fast.cluster.time.sleep", lambda _: file.close())
        assert list(cluster._in_worker(function, run)) == [True, {}]
    with (in_tmp / "log").open("ab") as file:
        lock(file, in_tmp)
        monkeypatch.setattr("darts_fast.cluster.LEASE", -1)
        begun, error = cluster._in_worker(function, run)
        assert begun is True and "another process is writing" in str(error)


def test_a_cluster_that_is_not_there_is_one_sentence(started, monkeypatch):
    nodes = [(True, {"CPU": 4.0}), (True, {"CPU": 2.0, "GPU": 1.0}), (False, {"CPU": 9.0, "GPU": 8.0})]
    nodes = [{"Alive": alive, "Resources": resources} for alive, resources in nodes]
    for name, value in (("init", None), ("shutdown", None), ("nodes", nodes)):
        monkeypatch.setattr(f"ray.{name}", lambda *_, value=value, **__: value)
    for arguments, sentence in (
        ({"cpus": 0}, "cpus must be at least 1, not 0"),
        ({"address": "ray://host:10001"}, "--cluster takes HOST:PORT of the Ray cluster"),
        ({"address": "127.0.0.1:99999"}, "no Ray at 127.0.0.1:99999"),
        ({"address": "127.0.0.1:1"}, "no Ray at 127.0.0.1:1"),
        ({"device": "cuda:1"}, "give --device cuda, not cuda:1"),
        ({"cpus": 5}, "^no machine of the cluster has 5 processors; the largest has 4$"),
        (
            {"cpus": 3, "device": "cuda"},
            "^no machine of the cluster has 3 processors and a GPU; the largest with a GPU has 2$",
        ),
    ):
        with pytest.raises(InputError, match=sentence) as error, started(**arguments):
            pass
        assert "\n" not in str(error.value)
