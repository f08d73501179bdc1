"""Whole protocols on tiny settings: what is chosen by what, killed and resumed, failed seeds, bad input."""

import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SPACE, same
from processes import start

from darts_fast import InputError, ProtocolConfig, RunError, SearchConfig, load_genotype, plot
from darts_fast import protocol as module
from darts_fast.protocol import Protocol, compute, protocol, random_cell, resume_protocol
from darts_fast.runs import METRICS, Locked, Run, Stopped, lock, run_program
from darts_fast.search import Search, SearchResult
from darts_fast.train import Training

CELLS = "init_channels=2 layers=3 batch_size=16"
SPACE = shlex.quote(f"space={SMALL_SPACE}")
PLAIN = f"lr=0.1 cutout_length=0 drop_path_prob=0 {CELLS}"
TINY = ProtocolConfig(
    searches=2,
    trainings=2,
    search_settings=f"epochs=1 order=1 {CELLS} {SPACE}",
    brief_settings=f"epochs=2 train_portion=0.4 {PLAIN}",
    train_settings=f"epochs=2 {PLAIN}",
)
REPORT = ("report.md", "report.json", "curves.png", "found.svg", "random.svg")

pytestmark = pytest.mark.usefixtures("no_heat_maps")


@pytest.fixture(scope="module")
def data():
    """80 images to train, 40 to test, of four classes that differ in their brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    images = torch.randint(0, 100, (120, 1, 8, 8), generator=generator) + 40 * labels[:, None, None, None]
    return images[:80].byte(), labels[:80], images[80:].byte(), labels[80:]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The result and the folder of a protocol that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        result = protocol(TINY, data)
        return result._replace(path=result.path.resolve())


def accuracies(run, key):
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def settings(run):
    return json.loads((run / "config.json").read_text())


def report(path):
    return json.loads((path / "report.json").read_text())


def test_the_best_on_validation_images_is_trained_with_every_seed(whole):
    path, content = whole.path, report(whole.path)
    seeds = {"found": [2, 3], "random": [None, None]}
    for group, result in (("found", whole[:3]), ("random", whole[3:6])):
        part = content[group]
        brief = [path / "brief" / f"{group}-{i}" for i in (1, 2)]
        validation = [accuracies(run, "val_top1")[-1] for run in brief]
        assert [c["validation_top1"] for c in part["candidates"]] == validation
        assert [c.get("seed") for c in part["candidates"]] == seeds[group]
        assert [settings(run)["seed"] for run in brief] == [2, 2]
        assert validation[0] != validation[1]
        chosen = validation.index(max(validation))
        assert part["chosen"] == f"{group}-{chosen + 1}"
        genotypes = [settings(run)["genotype"] for run in brief]
        assert genotypes == [c["genotype"] for c in part["candidates"]]
        runs = [path / "trainings" / f"{group}-seed-{seed}" for seed in (2, 3)]
        assert [settings(run)["seed"] for run in runs] == [2, 3]
        assert {settings(run)["genotype"] for run in runs} == {genotypes[chosen]}
        assert {settings(run)["train_portion"] for run in runs} == {1.0}
        test = [accuracies(run, "test_top1")[-1] for run in runs]
        assert [t["top1"] for t in part["trainings"]] == test
        assert test[0] != test[1]
        assert part["mean"] == pytest.approx(sum(test) / 2)
        deviation = (sum((t - sum(test) / 2) ** 2 for t in test) / (2 - 1)) ** 0.5
        assert part["deviation"] == pytest.approx(deviation)
        assert result == (load_genotype(genotypes[chosen]), part["mean"], part["deviation"])
        assert (path / f"{group}.svg").read_bytes().startswith(b"<?xml")
    found, other = content["found"], content["random"]
    assert content["difference"] == found["mean"] - other["mean"]
    error = (found["deviation"] ** 2 / 2 + other["deviation"] ** 2 / 2) ** 0.5
    assert content["standard_error"] == pytest.approx(error)
    for i, candidate in enumerate(found["candidates"]):
        run = path / "searches" / f"found-{i + 1}"
        assert settings(run)["seed"] == 2 + i
        assert candidate["supernet_top1"] == max(accuracies(run, "val_top1"))
        assert candidate["genotype"] == str(load_genotype(run))
    assert [c["genotype"] for c in other["candidates"]] == [str(random_cell(TINY, i)) for i in range(2)]


def test_the_report_says_the_same_as_its_figures(whole):
    text, content = (whole.path / "report.md").read_text(), report(whole.path)
    for part in (content["found"], content["random"]):
        assert f"**{100 * part['mean']:.2f} ± {100 * part['deviation']:.2f} %**" in text
        for candidate in part["candidates"]:
            line = next(line for line in text.splitlines() if line.startswith(f"| {candidate['cell']} |"))
            assert f"{100 * candidate['validation_top1']:.2f} %" in line
            assert ("**chosen**" in line) == (candidate["cell"] == part["chosen"])
    for j, seed in enumerate((2, 3)):
        figures = [content[group]["trainings"][j]["top1"] for group in ("found", "random")]
        assert f"| {seed} | " + " | ".join(f"{100 * value:.2f} %" for value in figures) + " |" in text
    assert "on 32 of the 80 training images; the other 48 give their validation accuracy" in text
    hours = json.loads((whole.path / "hours.json").read_text())
    assert len(hours) == 2 + 4 + 4 and all(known["hours"] > 0 for known in hours.values())


def test_the_test_images_have_no_part_in_the_choice(whole, data, in_tmp):
    """With other test labels all runs before the trainings, and the choice, are the same to the bit, and so
    are the weights that are trained; only their test figures are others."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    other = protocol(TINY, (*data[:3], data[3][order])).path
    one, two = report(whole.path), report(other)
    for group in ("found", "random"):
        for key in ("candidates", "chosen"):
            assert one[group][key] == two[group][key]
        assert one[group]["trainings"] != two[group]["trainings"]
    for run in ("searches/found-1", "searches/found-2", "brief/found-1", "brief/random-2"):
        assert (whole.path / run / METRICS).read_bytes() == (other / run / METRICS).read_bytes()
    states = [
        torch.load(p / "trainings/found-seed-3/final.pt", weights_only=True) for p in (whole.path, other)
    ]
    assert same(states[0]["state_dict"], states[1]["state_dict"])


@pytest.mark.parametrize(("loop", "at"), [(Search, 2), (Training, 6)])
def test_stopped_by_a_signal_and_resumed_gives_the_same_report(loop, at, whole, data, in_tmp, signal_at):
    signal_at(loop, at, signal.SIGTERM)
    sentence = (
        r"saved within .*; go on with: darts_fast.protocol.resume_protocol\('protocols/tensors', data\)"
    )
    with pytest.raises(Stopped, match=sentence) as stopped:
        protocol(TINY, data)
    assert stopped.value.exit_code == 143
    result = resume_protocol("protocols/tensors", data)
    assert result._replace(path=whole.path) == whole
    for name in REPORT:
        assert (result.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def call(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of the program in this process."""
    monkeypatch.setattr(sys, "argv", ["protocol", *arguments])
    code = run_program("protocol", module.main)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SMALL = [
    *("--searches", "1", "--trainings", "2", "--fused"),
    *("--search_settings", f"epochs=2 order=1 init_channels=2 batch_size=256 {SPACE}"),
    *("--brief_settings", "epochs=2 init_channels=2 layers=3 batch_size=256"),
    *("--train_settings", "epochs=2 init_channels=2 layers=3 batch_size=256"),
]


def kills_itself(run, number, arguments):
    """The program, which kills itself before a step, counted from 0, of one of its runs."""
    for loop in (Search, Training):

        def take_step(self, lr, plain=loop.take_step):
            if str(self.folder.path).endswith(run) and self.steps_done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, lr)

        loop.take_step = take_step
    plot.alpha_heat_map = lambda *_: bytes(24)  # as in `no_heat_maps`
    sys.argv = ["protocol", *arguments]
    module.main()


# A kill that the program cannot catch is the point; Windows has no such signal.
@pytest.mark.skipif(sys.platform == "win32", reason="kills by SIGKILL, a POSIX signal")
def test_killed_and_resumed_gives_the_same_report(monkeypatch, capsys, in_tmp):
    """In the middle of a search, of a brief training and of a training."""
    code, out, _ = call(monkeypatch, capsys, *SMALL, "--name", "whole")
    assert code == 0 and "protocols/whole/report.md: the searches' best cell: test top-1 " in out
    whole, cut = in_tmp / "protocols" / "whole", in_tmp / "protocols" / "cut"
    arguments = [*SMALL, "--name", "cut"]
    drawn = random.Random(0)
    for runs, steps in (
        (["searches/found-1"], 2 * 3),
        (["brief/found-1", "brief/random-1"], 2 * 3),
        ([f"trainings/{name}-seed-{seed}" for name in ("found", "random") for seed in (2, 3)], 2 * 6),
    ):
        run, number = drawn.choice(runs), drawn.randrange(1, steps)
        process = start(kills_itself, run, number, arguments)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        hours = json.loads((cut / "hours.json").read_text())
        assert list(hours)[-1] == run and hours[run]["since"] is not None
        arguments = ["--resume", "protocols/cut"]
    done = json.loads((cut / "runs.json").read_text())["runs"]
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    for name in REPORT:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    runs = [json.loads((path / "runs.json").read_text())["runs"] for path in (whole, cut)]
    assert runs[0] == runs[1] and len(done) < len(runs[1]) == 1 + 2 + 4
    before = (cut / "report.md").stat().st_mtime_ns
    assert call(monkeypatch, capsys, *arguments)[0] == 0  # of an ended one: the report again
    assert (cut / "report.md").stat().st_mtime_ns > before
    assert (cut / "report.md").read_bytes() == (whole / "report.md").read_bytes()


def test_a_run_that_another_process_still_computes_is_left_alone(tmp_path, monkeypatch):
    """A worker that Ray has lost touch with may be alive, before its first checkpoint."""
    run = Run("searches/one", tmp_path / "one", SearchConfig())
    begun = SearchResult(random_cell(TINY, 0), 0.5, 1, random_cell(TINY, 1), run.folder)
    monkeypatch.setattr(module, "search", lambda *_: begun)
    monkeypatch.setattr(module, "resume_search", lambda *_: begun._replace(epoch=2))
    run.folder.mkdir()
    log = run.folder / "one.log"
    with log.open("ab") as file:
        lock(file, run.folder)
        with pytest.raises(Locked, match="another process is writing"):
            compute(run, None)
        assert log.exists()
    assert compute(run, None)["epoch"] == 1 and not run.folder.exists()
    run.folder.mkdir()
    with log.open("ab") as file:  # it writes a checkpoint before it ends
        lock(file, run.folder)
        monkeypatch.setattr(module, "lock", lambda *_: (run.folder / "checkpoint.pt").touch())
        assert compute(run, None)["epoch"] == 2 and log.exists()


def failing(monkeypatch, loop, wanted):
    """Steps of the loop have a loss that is no number in the runs whose settings `wanted` says yes to."""
    plain = loop.take_step

    def step(self, *arguments):
        values, images = plain(self, *arguments)
        return (values * float("nan") if wanted(self.config) else values), images

    monkeypatch.setattr(loop, "take_step", step)


def test_a_seed_that_fails_is_reported_with_its_reason_and_the_rest_goes_on(whole, data, in_tmp, monkeypatch):
    failing(monkeypatch, Search, lambda config: config.seed == 3)
    failing(monkeypatch, Training, lambda config: config.train_portion == 1 and config.seed == 2)
    protocol(TINY, data)
    content, text = report(Path("protocols/tensors")), Path("protocols/tensors/report.md").read_text()
    reason = (
        "the training loss is nan at step {} (epoch 1); the last good checkpoint is {}/checkpoint.pt; try "
    )
    assert content["found"]["candidates"][1]["failed"].startswith(reason.format(1, "searches/found-2"))
    assert content["found"]["candidates"][1]["genotype"] is None and content["found"]["chosen"] == "found-1"
    assert "| found-2 | 3 |  |  | failed: the training loss is nan at step 1 (epoch 1)" in text
    assert [t["failed"] is None for t in content["random"]["trainings"]] == [False, True]
    assert content["random"]["mean"] == content["random"]["trainings"][1]["top1"]
    assert content["random"]["deviation"] is content["standard_error"] is None
    assert "| 1 of 2 |" in text and "| 2 | failed: the training loss is nan" in text
    # Whatever did not fail is as it was.
    assert content["random"]["candidates"] == report(whole.path)["random"]["candidates"]
    one, two = (
        (p / "brief/found-1" / METRICS).read_bytes() for p in (whole.path, in_tmp / "protocols/tensors")
    )
    assert one == two
    before = text
    resume_protocol("protocols/tensors", data)
    assert Path("protocols/tensors/report.md").read_text() == before


def test_all_seeds_fail(data, in_tmp, monkeypatch):
    failing(monkeypatch, Search, lambda config: True)
    with pytest.raises(
        RunError, match=r"no found cell was trained to the end; the reasons are in protocols/"
    ):
        protocol(dataclasses.replace(TINY, searches=1, trainings=1), data)
    content = report(Path("protocols/tensors"))
    assert content["found"]["chosen"] is content["found"]["mean"] is None and content["random"]["mean"] > 0
    assert "| **the best of 1 search** | none | 0 of 1 |" in Path("protocols/tensors/report.md").read_text()


def test_no_memory_is_not_the_seeds_fault(data, in_tmp, monkeypatch):
    plain = Training.take_step

    def step(self, *arguments):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(Training, "take_step", step)
    with pytest.raises(RunError, match="ran out of memory"):
        protocol(dataclasses.replace(TINY, searches=1, trainings=1), data)
    assert list(json.loads(Path("protocols/tensors/runs.json").read_text())["runs"]) == ["searches/found-1"]
    monkeypatch.setattr(Training, "take_step", plain)
    assert resume_protocol("protocols/tensors", data).top1 > 0


BAD = {
    "--searches 0": "searches must be at least 1, not 0",
    "--trainings 0": "trainings must be at least 1, not 0",
    "--seed 4294967293": "the last run's seed would be 4294967297, and must be at most 4294967295",
    "--seed -1": "seed must be from 0",
    "--search_settings epochs=0": "search_settings: epochs must be at least 1, not 0",
    "--search_settings epoch=1": "search_settings: no setting of a search is called 'epoch'",
    "--search_settings --epochs=1": "expected one argument",
    "--brief_settings epochs=x": "brief_settings: argument --epochs: invalid int value: 'x'",
    "--brief_settings order=1": "brief_settings: no setting of a training is called 'order'",
    "--brief_settings help": "brief_settings: no setting of a training is called 'help'",
    "--brief_settings 'epochs=1": "brief_settings: No closing quotation",
    "--brief_settings train_portion=1": "train_portion must be below 1, to choose by other images, not 1.0",
    "--train_settings train_portion=0.5": "train_settings: train_portion must be 1, not 0.5",
    "--search_settings space=s9": "space must be darts, s1, s2, s3",
    "--search_settings space=nasbench201": "the cells of nasbench201 are not trained here",
    "--train_settings seed=1": "train_settings: seed is the protocol's: it is not passed on",
    "--train_settings fused": "train_settings: fused is the protocol's: it is not passed on",
    "--train_settings genotype=DARTS": "train_settings: genotype is the protocol's: it is not passed on",
    "--train_settings init_channels=2000000": "a network of 5 layers and 2000000 channels",
    "--brief_settings train_portion=0.001": "train_portion 0.001 gives 1 of 1437 images to the training",
    "--train_settings stem=imagenet": "both sides must be divisible by 32",
    "--amp": "amp is for the fused cells: give --fused, too",
    "--dataset imagenet": "no data set 'imagenet'",
    "--dataset folder --data_path nowhere": "nowhere could not be read",
    "--name a/b": "name must be the name of a new folder below protocols",
    "--epochs 3": "unrecognized arguments: --epochs 3",
    "--resume nowhere": "nowhere is not a folder; name the folder of a run, such as protocols/digits",
    "--resume nowhere --searches 3": "leave out --searches",
    "--cpus 2": "--cpus is for --cluster: give it, too",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_sentence(arguments, monkeypatch, capsys, in_tmp):
    code, out, err = call(monkeypatch, capsys, *arguments.split())
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("protocol: ") and BAD[arguments] in err
    assert os.listdir(in_tmp) == []


@pytest.mark.parametrize("arguments", ["--cluster", "--cluster 10.0.0.1:6379 --cpus 2"])
def test_without_ray_a_cluster_is_refused_in_one_sentence(arguments, monkeypatch, capsys, in_tmp):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "darts_fast.cluster", raising=False)
    code, out, err = call(monkeypatch, capsys, *arguments.split())
    assert (code, out) == (2, "") and os.listdir(in_tmp) == []
    assert err == (
        'protocol: --cluster needs Ray, which is not installed: pip install "darts_fast[cluster]"\n'
    )


def test_what_does_not_fit_the_folder_is_refused(whole, data, in_tmp):
    path = shutil.copytree(whole.path, in_tmp / "protocols" / "tensors")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def refused(sentence, data=data):
        with pytest.raises(InputError, match=sentence) as error:
            resume_protocol(path, data)
        assert "\n" not in str(error.value)

    refused("began with tensors", None)
    refused("began with other images", (255 - data[0], *data[1:]))
    with pytest.raises(InputError, match="exists and is not overwritten"):
        protocol(dataclasses.replace(TINY, name="tensors"), data)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    changed = settings(path) | {"trainings": 3}
    (path / "config.json").write_text(json.dumps(changed))
    refused("says trainings = 3, but the protocol began with 2; put that back, or start a new protocol")
    (path / "config.json").write_bytes(before[path / "config.json"])
    for damage in (
        b"{",
        b"[]",
        b"{}",
        before[path / "runs.json"].replace(b'"runs": {', b'"runs": [], "more": {'),
        before[path / "runs.json"].replace(b'"top1": 0', b'"top1": 7', 1),
        before[path / "runs.json"].replace(b"skip_connect", b"skip"),
        before[path / "runs.json"].replace(b'"epoch": 1', b'"epoch": "1"'),
    ):
        assert damage != before[path / "runs.json"]
        (path / "runs.json").write_bytes(damage)
        refused(r"runs\.json .*put the protocol's own back, or delete it: the runs stay")
    # Without it, every run is asked for its outcome again.
    (path / "runs.json").unlink()
    resume_protocol(path, data)
    for name in (*REPORT, "runs.json"):
        assert (path / name).read_bytes() == before[path / name], name


def test_a_protocol_of_before_goes_on(whole, data, in_tmp):
    """Without the settings that came later."""
    path = shutil.copytree(whole.path, in_tmp / "protocols" / "tensors")
    later = {"stream": False, "color_jitter": 0.0}
    for name in ("config.json", "runs.json"):
        content = json.loads((path / name).read_text())
        found = content if name == "config.json" else content["settings"]
        assert {key: found.pop(key) for key in later} == later
        (path / name).write_text(json.dumps(content))
    assert resume_protocol(path, data)._replace(path=whole.path) == whole
    assert all((path / name).read_bytes() == (whole.path / name).read_bytes() for name in REPORT)


def test_a_second_process_is_kept_out(whole, data, in_tmp):
    from darts_fast.runs import CONFIG, lock

    path = shutil.copytree(whole.path, in_tmp / "protocols" / "tensors")
    with (path / CONFIG).open("rb") as file:
        lock(file, path)
        with pytest.raises(InputError, match="another process is writing"):
            resume_protocol(path, data)
    assert resume_protocol(path, data).top1 == whole.top1


def test_a_setting_that_is_passed_on_wins_over_the_default():
    config = ProtocolConfig(search_settings="order=1 w_lr=0.1", brief_settings="layers=5")
    assert (config.of_run("search").order, config.of_run("search").w_lr) == (1, 0.1)
    brief = config.of_run("brief")
    assert (brief.layers, brief.init_channels, brief.train_portion) == (5, 8, 0.5)
    paper = ProtocolConfig(dataset="cifar10", fused=True)
    phases = {name: paper.of_run(name).resolved("cifar10") for name in paper.PHASES}
    sizes = {name: (p.epochs, p.init_channels, p.layers) for name, p in phases.items()}
    assert sizes == {"search": (50, 16, 8), "brief": (100, 16, 8), "train": (600, 36, 20)}
    assert all(phase.fused for phase in phases.values())


def test_random_cells_are_of_the_searches_space(data, in_tmp, signal_at):
    """Also where its file is gone when the protocol is resumed."""
    space = {"nodes": 2, "normal": ["skip_connect", "sep_conv_3x3"], "reduce": ["none", "max_pool_3x3"]}
    Path("space.json").write_text(json.dumps(space))
    text = f"epochs=1 order=1 {CELLS} space=space.json"
    signal_at(Search, 2, signal.SIGTERM)
    with pytest.raises(Stopped):
        protocol(dataclasses.replace(TINY, search_settings=text, trainings=1), data)
    Path("space.json").unlink()
    resume_protocol("protocols/tensors", data)
    content = report(Path("protocols/tensors"))
    for group in ("found", "random"):
        for genotype in (load_genotype(c["genotype"]) for c in content[group]["candidates"]):
            assert [len(genotype.normal), len(genotype.reduce)] == [2, 2]
            assert {name for node in genotype.normal for name, _ in node} <= {"skip_connect", "sep_conv_3x3"}
            assert {name for node in genotype.reduce for name, _ in node} == {"max_pool_3x3"}


def test_hours_of_a_killed_run_count_up_to_its_last_checkpoint(whole, data, in_tmp):
    path = shutil.copytree(whole.path, in_tmp / "protocols" / "tensors")
    runs, hours = (json.loads((path / name).read_text()) for name in ("runs.json", "hours.json"))
    key, before = "trainings/random-seed-3", dict(hours)
    del runs["runs"][key]
    hours[key] = {"hours": 2.0, "since": 1000.0}
    (path / "runs.json").write_text(json.dumps(runs))
    (path / "hours.json").write_text(json.dumps(hours))
    os.utime(path / key / "checkpoint.pt", (4600, 4600))
    resume_protocol(path, data)
    after = json.loads((path / "hours.json").read_text())
    assert after[key]["since"] is None and 3 < after.pop(key)["hours"] < 3.1
    del before[key]
    assert after == before


def test_a_clock_that_is_set_back_takes_no_hours(whole, data, in_tmp):
    """Else hours.json would be refused."""
    path = shutil.copytree(whole.path, in_tmp / "protocols" / "tensors")
    run = Protocol(path, ProtocolConfig(**{**vars(TINY), "name": "tensors"}), {}, data)
    run.hours = {"searches/found-1": {"hours": 0.5, "since": time.time() + 1000}}
    run._end_hours("searches/found-1")
    assert run.hours == {"searches/found-1": {"hours": 0.5, "since": None}}
