"""Whole searches: resumed to the same bits, stopped by signals, killed, and going wrong."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SPACE, assert_same_run, checkpoint, events, log_lines, relative_error, same
from processes import killed_twice_and_resumed, start_program
from test_run import call

from darts_fast import (
    InputError,
    RunError,
    SearchConfig,
    architect,
    curvature,
    load_genotype,
    resume_search,
    search,
)
from darts_fast.curvature import largest_eigenvalue
from darts_fast.data import Batches
from darts_fast.diagnosis import operations
from darts_fast.plot import alpha_heat_map
from darts_fast.runs import METRICS, RunFolder, Stopped
from darts_fast.search import Search
from darts_fast.search_step import SearchStep
from darts_fast.spaces import read_space
from darts_fast.supernet import Supernet

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "epochs": 2, "init_channels": 2, "layers": 3, "batch_size": 8, "train_portion": 0.6, "cutout_length": 2,
    "print_freq": 2, "order": 1, "space": SMALL_SPACE,
}  # fmt: skip
SPACE = read_space(SMALL_SPACE)
TINY = SearchConfig(**SETTINGS)  # 2 epochs of 4 steps, the last one of 6 images
CHEAP = "--epochs 1 --init_channels 2 --layers 3 --batch_size 256 --order 1 --print_freq 1".split()
CONFIGS = {
    "first order": TINY,
    "second order": SearchConfig(**{**SETTINGS, "order": 2}),
    "second order, fused": SearchConfig(**{**SETTINGS, "order": 2, "space": "darts"}, fused=True),
    "warm-up, Beta-DARTS, eigenvalue": SearchConfig(
        **{**SETTINGS, "epochs": 3}, fused=True, alpha_warmup=1, beta_decay=5.0, stop_at_eigenvalue=0.1
    ),
}

pytestmark = pytest.mark.usefixtures("no_heat_maps")


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 4, (50,), generator=generator)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A function: the result of one of CONFIGS' searches when nothing disturbs it. Each is run once."""

    @functools.cache
    def run(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("undisturbed"))
            result = search(CONFIGS[name], data)
            return result._replace(path=result.path.resolve())

    return run


@pytest.fixture
def finished(undisturbed, in_tmp):
    """The folder of a finished search: a copy, which the test may change."""
    return shutil.copytree(undisturbed("first order").path, Path("searchs") / "tensors")


# In the middle of an epoch, between two lines of the log, and in the last step of an epoch
STOPS = [(1, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("name", "at", "number"),
    [
        *(("first order", *stop) for stop in STOPS),
        ("second order", *STOPS[1]),
        *(("second order, fused", *stop) for stop in STOPS),
        ("warm-up, Beta-DARTS, eigenvalue", 2, signal.SIGTERM),
        ("warm-up, Beta-DARTS, eigenvalue", 7, signal.SIGINT),
    ],
)
def test_a_signal_saves_and_resume_gives_the_same_bits(
    name, at, number, data, undisturbed, in_tmp, signal_at
):
    config, whole = CONFIGS[name], undisturbed(name)
    signal_at(Search, at, number)
    expected = rf"after {at} steps; go on with: darts_fast.resume_search\('searchs/tensors', data\)"
    with pytest.raises(Stopped, match=expected) as stop:
        search(config, data)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers are as they were
    state = checkpoint(in_tmp / "searchs/tensors")
    assert state["epoch"] * 4 + state["step"] == at
    torch.manual_seed(at)  # whatever else the process draws does not matter
    result = resume_search("searchs/tensors", data)
    assert_same_run(whole.path, result.path)
    assert result.genotype == whole.genotype and result.final_genotype == whole.final_genotype


@pytest.mark.parametrize("name", ["first order", "second order, fused"])
def test_a_signal_in_an_evaluation_saves_too(name, data, undisturbed, in_tmp, monkeypatch):
    config, whole = CONFIGS[name], undisturbed(name)
    plain, calls = Batches.prepared, []

    def prepared(self, images, augment):
        if not augment:
            calls.append(None)
            if len(calls) == 2:  # of the three batches of the first epoch's evaluation
                os.kill(os.getpid(), signal.SIGINT)
        return plain(self, images, augment)

    monkeypatch.setattr(Batches, "prepared", prepared)
    with pytest.raises(Stopped, match="after 4 steps"):
        search(config, data)
    assert_same_run(whole.path, resume_search("searchs/tensors", data).path)


def test_a_checkpoint_of_before_is_resumed_to_the_same_bits(data, undisturbed, in_tmp, signal_at):
    """An older checkpoint has the optimizers' settings beside their states, no `final`, no later setting."""
    signal_at(Search, 3, signal.SIGINT)
    with pytest.raises(Stopped):
        search(CONFIGS["first order"], data)
    path = in_tmp / "searchs/tensors/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert state.pop("final") is None and state["settings"].pop("stop_at_skips") is None
    later = ("stop_at_skips", "eigenvalue", "stop_at_eigenvalue", "beta_decay", "alpha_warmup")
    for name in later[1:]:
        assert not state["settings"].pop(name)
    settings = path.with_name("config.json")
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: value for name, value in content.items() if name not in later}))
    for name in ("weight_optimizer", "alpha_optimizer"):
        state[name] = {"state": state[name], "param_groups": [{"lr": 0.025, "params": [0]}]}
    torch.save(state, path)
    assert_same_run(undisturbed("first order").path, resume_search("searchs/tensors", data).path)


def test_resuming_a_finished_search_changes_nothing(data, undisturbed, finished):
    before = log_lines(finished)
    again = resume_search(finished, data)
    assert again == undisturbed("first order")._replace(path=finished) and log_lines(finished) == before


def test_every_step_is_recorded_once(undisturbed):
    path = undisturbed("second order, fused").path
    rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 8]
    tags = {tag for _, tag, _ in events(path)}
    assert {"train/lr", "train/loss", "train/top1", "train/top5", "val/loss", "val/top1", "val/top5"} <= tags
    of_cells = {
        f"x_cells/{cell}_{what}"
        for cell in ("normal", "reduce")
        for what in (*operations([]), "entropy", "none")
    } | {"x_cells/macs", "x_cells/expected_macs"}
    assert of_cells <= tags and "z_alphas_normal/c_k-1 to 2/sep_conv_5x5" in tags
    assert len(tags) == 7 + len(of_cells) + 2 * 14 * 8
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in sorted(tags)))  # as TensorBoard shows them
    assert groups == ["train", "val", "x_cells", "z_alphas_normal", "z_alphas_reduce"]
    assert sorted({step for step, tag, _ in events(path) if tag == "train/loss"}) == list(range(1, 9))


@pytest.mark.parametrize("batch_size", [8, 30])  # four steps an epoch; one
def test_the_rate_is_that_of_the_steps_taken(batch_size, data, in_tmp, monkeypatch):
    """The first step is slower, and counts only where the epoch has no other."""
    take, rates, clock = Search.take_step, [], [0.0]

    def slow(self, lr):
        clock[0] += 0.05 if clock[0] else 3
        return take(self, lr)

    monkeypatch.setattr(Search, "take_step", slow)
    monkeypatch.setattr("darts_fast.loop.time.perf_counter", lambda: clock[0])
    report = Search._report
    monkeypatch.setattr(Search, "_report", lambda self: rates.append(self.seconds_per_step) or report(self))
    search(dataclasses.replace(TINY, epochs=1, batch_size=batch_size, print_freq=9), data)
    assert rates == [pytest.approx(3 if batch_size == 30 else 0.05)]


def test_what_each_epoch_says_of_its_cells(undisturbed):
    """Against the genotypes in the log, and the alphas of the last checkpoint."""
    path = undisturbed("second order, fused").path
    rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    rows = [row for row in rows if "normal_skip" in row]
    log = log_lines(path)
    genotypes = [line.partition("genotype = ")[2] for line in log if "genotype = " in line]
    assert [row["epoch"] for row in rows] == [1, 2] and len(genotypes) == 2
    for row, text in zip(rows, genotypes, strict=True):
        for cell, part in zip(("normal", "reduce"), text.split("reduce="), strict=True):
            assert row[f"{cell}_skip"] == part.count("skip_connect")
            assert row[f"{cell}_dil_conv"] == part.count("dil_conv")
    alphas = checkpoint(path)["network"]["alphas_reduce"].double()
    p = alphas.exp() / alphas.exp().sum(1, keepdim=True)
    assert rows[-1]["reduce_entropy"] == pytest.approx(float(-(p * p.log()).sum(1).mean()))
    assert rows[-1]["reduce_none"] == pytest.approx(float(p[:, 0].mean()))
    assert sum(line.startswith(("    normal: ", "    reduce: ")) for line in log) == 4


@pytest.mark.parametrize("collapse", [1, 2, 3, 4])
def test_a_search_ends_at_skip_connections(collapse, data, in_tmp, monkeypatch, signal_at):
    """It ends after the epoch that collapses, with the best genotype of those before it; up to there its
    steps are those of a search without the setting."""
    plain = Search.begin_epoch

    def begin_epoch(self):
        plain(self)
        if self.step == 0 and self.epoch in (0, collapse - 1):
            with torch.no_grad():
                skip = self.network.alphas_normal[:, SPACE.candidates.index("skip_connect")]
                skip += 10 if self.epoch + 1 == collapse else -1

    monkeypatch.setattr(Search, "begin_epoch", begin_epoch)
    config = dataclasses.replace(TINY, epochs=3)
    whole = search(config, data)
    stopping = dataclasses.replace(config, stop_at_skips=3, name="stopping")
    result = search(stopping, data)
    rows, expected = (
        [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
        for path in (result.path, whole.path)
    )
    assert all(
        row["normal_skip"] < 3 for row in expected if row.get("epoch", 9) < collapse and "normal_skip" in row
    )
    if collapse > 3:
        assert rows == expected and result[:-1] == whole[:-1]
        return
    assert rows == [row for row in expected if row["step"] <= 4 * collapse] and rows[-1]["normal_skip"] == 4
    assert result.epoch < collapse or collapse == 1
    log = log_lines(result.path)
    assert "The search ends here: skip connections of the normal cell: 4; stop_at_skips: 3" in log
    assert resume_search(result.path, data) == result and log_lines(result.path) == log

    # In the middle of an epoch nothing is decided.
    signal_at(Search, 4 * collapse - 1, signal.SIGTERM)
    with pytest.raises(Stopped):
        search(dataclasses.replace(stopping, name="again"), data)
    assert resume_search("searchs/again", data)[:-1] == result[:-1]
    assert_same_run(result.path, Path("searchs/again"))


def lines_of(path, key):
    """The lines of metrics.jsonl that have the key."""
    rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    return [row for row in rows if key in row]


def test_the_eigenvalue_changes_nothing_of_a_search(data, in_tmp, monkeypatch):
    """It is that of the whole validation loss in float64, on the first images of the validation half."""
    config, expected = dataclasses.replace(CONFIGS["second order, fused"], space=SMALL_SPACE), []
    whole = search(dataclasses.replace(config, name="whole"), data).path
    plain = Search.finish_epoch

    def finish_epoch(self, found):
        network = Supernet(2, 4, 3, space=SPACE).double()
        network.load_state_dict(self.network.state_dict())
        images, labels = self.batches.cut(self.validation_half[:8], augment=False)
        weights = architect.detached(network.weights())
        expected.append(
            largest_eigenvalue(lambda a: network.loss(images.double(), labels, weights, a), network.alphas())
        )
        plain(self, found)

    monkeypatch.setattr(Search, "finish_epoch", finish_epoch)
    path = search(dataclasses.replace(config, eigenvalue=True), data).path
    kept = lines_of(path, "eigenvalue")
    assert [row["epoch"] for row in kept] == [1, 2] and [row["step"] for row in kept] == [4, 8]
    assert [row["eigenvalue"] for row in kept] == pytest.approx(expected, rel=1e-4)
    assert [(s, v) for s, tag, v in events(path) if tag == "val/eigenvalue"] == [
        (row["step"], pytest.approx(row["eigenvalue"])) for row in kept
    ]
    assert sum("largest eigenvalue of the Hessian" in line for line in log_lines(path)) == 2
    rows = [row for row in lines_of(path, "epoch") if "eigenvalue" not in row]
    assert rows == lines_of(whole, "epoch")
    one, two = checkpoint(whole), checkpoint(path)
    for state in (one, two):
        state.pop("lengths"), state.pop("settings")
    assert same(one, two)


def test_a_signal_while_the_eigenvalue_is_computed(data, undisturbed, in_tmp, monkeypatch):
    name = "warm-up, Beta-DARTS, eigenvalue"
    plain, calls = curvature.largest_eigenvalue, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(curvature, "largest_eigenvalue", interrupted)
    with pytest.raises(Stopped, match="after 8 steps"):
        search(CONFIGS[name], data)
    assert_same_run(undisturbed(name).path, resume_search("searchs/tensors", data).path)


def test_an_eigenvalue_that_is_not_finite_stops_before_it_is_recorded(data, in_tmp, monkeypatch):
    monkeypatch.setattr(curvature, "largest_eigenvalue", lambda *arguments: float("nan"))
    with pytest.raises(RunError, match=r"the largest eigenvalue is nan at step 4 \(epoch 1\)"):
        search(dataclasses.replace(TINY, eigenvalue=True), data)
    assert not lines_of(in_tmp / "searchs/tensors", "val_loss")


# Twelve epochs: after the tenth that counts, their means are 1 and 1.6.
RISING = [1.0] * 7 + [2.0] * 5


@pytest.mark.parametrize("warm_up", [0, 1])
def test_a_search_ends_where_the_eigenvalue_has_risen(warm_up, data, in_tmp, monkeypatch, signal_at):
    """It goes back to the middle of the five epochs before the rise; up to its end its steps are those of a
    search without the setting."""
    values = [50.0] * warm_up + RISING
    monkeypatch.setattr(Search, "_eigenvalue", lambda self: values[self.epoch])
    config = dataclasses.replace(
        TINY,
        epochs=len(values),
        alpha_warmup=warm_up,
        alpha_lr=0.3,
        eigenvalue=True,
        batch_size=15,
        fused=True,
    )
    whole = search(config, data)
    ending = dataclasses.replace(config, eigenvalue=False, stop_at_eigenvalue=0.75, name="ending")
    result = search(ending, data)
    end, back = 10 + warm_up, 3 + warm_up
    rows = lines_of(whole.path, "epoch")
    assert lines_of(result.path, "epoch") == [row for row in rows if row["epoch"] <= end]
    log = log_lines(result.path)
    why = (
        "the mean of the largest eigenvalue has risen from 1 in epochs "
        f"{1 + warm_up} to {5 + warm_up} to 1.6 "
        f"in epochs {6 + warm_up} to {end}; stop_at_eigenvalue: 0.75; back to epoch {back}"
    )
    assert f"The search ends here: {why}" in log
    genotypes = [line.partition("genotype = ")[2] for line in log if "genotype = " in line]
    top1 = lines_of(whole.path, "val_top1")[back - 1]["val_top1"]
    assert len(set(genotypes)) > 5 and genotypes[back - 1] == str(result.genotype) == log[-1]
    assert (result.epoch, result.top1) == (back, top1)
    record = json.loads((result.path / "genotype.json").read_text())
    assert record["stopped"] == why and record["final"]["epoch"] == end
    assert record["best"] == {"epoch": back, "top1": top1, "genotype": result.genotype.as_json()}
    assert load_genotype(str(result.path)) == result.genotype
    assert resume_search(result.path, data) == result and log_lines(result.path) == log

    # Resumed between two epochs, of which one would not have stopped, and in the middle of one
    signal_at(Search, 2 * end - 1, signal.SIGTERM)
    with pytest.raises(Stopped):
        search(dataclasses.replace(ending, name="again"), data)
    for change, sentence in (
        (lambda recent: recent[1:], "recent is no list of the last 9 epochs"),
        (lambda recent: [*recent[:-1], {**recent[-1], "eigenvalue": float("nan")}], "eigenvalue is nan"),
        (
            lambda recent: [*recent[1:], recent[0]],
            "is 2, not a whole number from 1 to 1" if not warm_up else "",
        ),
        (lambda recent: [{**recent[0], "genotype": 3}, *recent[1:]], "genotype must have normal"),
    ):
        path = Path("searchs/again/checkpoint.pt")
        kept = path.read_bytes()
        state = checkpoint(path.parent)
        torch.save({**state, "recent": change(state["recent"])}, path)
        with pytest.raises(InputError, match=f"does not fit the settings beside it .*{sentence}"):
            resume_search("searchs/again", data)
        path.write_bytes(kept)
    assert resume_search("searchs/again", data)[:-1] == result[:-1]
    assert_same_run(result.path, Path("searchs/again"))


def test_in_the_warm_up_only_the_weights_are_trained(data, in_tmp, monkeypatch):
    """To the weights of PyTorch's own SGD on the same batches; afterwards the alphas move."""
    plain, batches, networks = SearchStep._weight_step, [], []

    def weight_step(self, images, labels, noise):
        batches.append((images.clone(), labels.clone()))
        return plain(self, images, labels, noise)

    finish = Search.finish_epoch

    def finish_epoch(self, found):
        networks.append(copy.deepcopy(self.network.state_dict()))
        finish(self, found)

    monkeypatch.setattr(SearchStep, "_weight_step", weight_step)
    monkeypatch.setattr(Search, "finish_epoch", finish_epoch)
    config = dataclasses.replace(TINY, epochs=3, alpha_warmup=2, w_lr_min=TINY.w_lr, stop_at_skips=1)
    torch.manual_seed(TINY.seed)
    network = Supernet(2, 4, 3, space=SPACE)
    start = copy.deepcopy(network.alphas())
    path = search(config, data).path
    assert len(lines_of(path, "val_loss")) == 3  # in the warm-up nothing is decided by the genotype
    for state in networks[:2]:
        assert all(torch.equal(state[name], alpha) for name, alpha in start.items())
    assert all((networks[2][name] != alpha).all() for name, alpha in start.items())
    moments = checkpoint(path)["alpha_optimizer"]
    assert all(state["step"] == 4 for state in moments.values())  # of the third epoch alone

    weights = list(network.weights().values())
    sgd = torch.optim.SGD(weights, config.w_lr, config.w_momentum, weight_decay=config.w_weight_decay)
    for images, labels in batches[:8]:
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(weights, config.w_grad_clip)
        sgd.step()
    for name, weight in network.weights().items():
        assert relative_error(networks[1][name], weight) < 1e-4, name
    record = json.loads((path / "genotype.json").read_text())
    assert record["best"]["epoch"] == 3  # the alphas of the others were not trained
    assert "    alpha warm-up: only the weights are trained up to epoch 2" in log_lines(path)


def test_beta_decay_grows_from_nothing(data, undisturbed, in_tmp, monkeypatch):
    """The first epoch is as without it."""
    plain, strengths = SearchStep.take, []

    def take(self, **batches):
        strengths.append(float(self.beta))
        return plain(self, **batches)

    monkeypatch.setattr(SearchStep, "take", take)
    path = search(dataclasses.replace(CONFIGS["first order"], beta_decay=3.0), data).path
    assert strengths == [0.0] * 4 + [1.5] * 4
    whole = undisturbed("first order").path
    found, expected = (lines_of(folder, "epoch") for folder in (path, whole))
    assert [row for row in found if row["epoch"] == 1] == [row for row in expected if row["epoch"] == 1]
    assert found[-1] != expected[-1]
    one, two = (checkpoint(folder)["network"]["alphas_normal"] for folder in (path, whole))
    assert (one - two).abs().max() > 1e-5


def test_same_seed_same_bits_other_seed_others(data, undisturbed, in_tmp):
    """Whatever the caller's generator holds, which stays as it was."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    path = search(TINY, data).path
    assert torch.equal(torch.rand(3), expected)
    assert_same_run(undisturbed("first order").path, path)
    other = search(SearchConfig(**{**vars(TINY), "seed": 3}), data)
    assert not same(checkpoint(path)["network"], checkpoint(other.path)["network"])


def test_no_memory_is_a_sentence(data, in_tmp, monkeypatch):
    """What the host's allocator says (shown on 64 channels with an address space of 6 GiB)."""

    def step(self, **batches):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nframe"
        )

    monkeypatch.setattr(SearchStep, "take", step)
    with pytest.raises(
        RunError, match=r"cpu ran out of memory after step 0; try a smaller --batch_size"
    ) as e:
        search(TINY, data)
    assert "\n" not in str(e.value)


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(data, in_tmp, monkeypatch):
    plain, calls = SearchStep.take, []

    def step(self, **batches):
        calls.append(None)
        row = plain(self, **batches)
        return row * float("nan") if len(calls) == 7 else row

    monkeypatch.setattr(SearchStep, "take", step)
    with pytest.raises(
        RunError, match=r"loss is nan at step 7 \(epoch 2\).*checkpoint.pt; try a smaller --w_lr"
    ):
        search(TINY, data)
    state = checkpoint(in_tmp / "searchs" / "tensors")
    assert state["epoch"] == 1 and all(torch.isfinite(t).all() for t in state["network"].values())
    log = (in_tmp / "searchs" / "tensors" / "tensors.log").read_text()
    assert "loss is nan at step 7" in log.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.chdir(in_tmp)
    assert resume_search("searchs/tensors", data).final_genotype  # the checkpoint named can go on


def test_a_validation_loss_that_is_not_finite_stops_before_it_is_recorded(data, in_tmp, monkeypatch):
    plain = Search.evaluate
    monkeypatch.setattr(
        Search, "evaluate", lambda self: {"val": (float("inf"), 0.1, 0.1)} if self.epoch else plain(self)
    )
    with pytest.raises(RunError, match=r"loss after the epoch is inf at step 8 \(epoch 2\)"):
        search(TINY, data)
    path = in_tmp / "searchs" / "tensors"
    assert checkpoint(path)["epoch"] == 1
    assert json.loads((path / "genotype.json").read_text())["final"]["epoch"] == 1


@pytest.mark.parametrize("what", ["alphas_normal", "stem.1.running_var"])
def test_a_signal_never_saves_what_is_not_finite(what, data, in_tmp, monkeypatch):
    """The loss of the step was finite; its update was not."""
    plain, calls = SearchStep.take, []

    def poisoned(self, **batches):
        row = plain(self, **batches)
        calls.append(None)
        if len(calls) == 3:
            self.network.state_dict()[what].view(-1)[0] = float("nan")
            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(SearchStep, "take", poisoned)
    with pytest.raises(RunError, match=rf"{what} is not finite at step 3"):
        search(TINY, data)
    assert checkpoint(in_tmp / "searchs" / "tensors")["step"] == 0


def test_autocast_of_the_caller_changes_nothing(data, undisturbed, in_tmp):
    with torch.autocast("cpu"):
        path = search(TINY, data).path
    assert same(checkpoint(undisturbed("first order").path)["network"], checkpoint(path)["network"])


def test_two_processes_never_write_one_folder(data, finished):
    folder, _, _ = RunFolder.reopen(finished, SearchConfig)
    with pytest.raises(InputError, match="another process is writing searchs/tensors"):
        resume_search(finished, data)
    folder.close()
    assert resume_search(finished, data).path == finished


# An epoch has two heat maps of alphas and a picture of the genotype.
@pytest.mark.parametrize(
    ("missing", "pictures"),
    [(["pygraphviz"], 1), (["graphviz"], 1), (["graphviz", "matplotlib"], 3)],
    ids=str,
)
def test_a_picture_that_cannot_be_drawn_is_a_line_of_the_log(missing, pictures, data, in_tmp, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("darts_fast.plot.alpha_heat_map", alpha_heat_map)
    for name in list(sys.modules):
        if name.split(".")[0] in missing:
            monkeypatch.delitem(sys.modules, name)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    path = search(SearchConfig(**{**vars(TINY), "epochs": 1}), data).path
    assert sum("no picture EP01" in line for line in log_lines(path)) == pictures


def test_refusals_of_resume_change_nothing(data, finished):
    path = finished

    def refused(sentence, *arguments):
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        with pytest.raises(InputError, match=sentence) as error:
            resume_search(*arguments)
        assert "\n" not in str(error.value)
        assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    refused("began with tensors", path)
    refused("began with other images", path, (255 - data[0], data[1]))
    for name, length in checkpoint(path)["lengths"].items():
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: length - 1])
        refused(f"{name} has {length - 1} bytes, but had {length}", path, data)
        (path / name).unlink()
        refused(f"{name} is missing", path, data)
        (path / name).write_bytes(whole)
    whole = (path / "checkpoint.pt").read_bytes()
    for damaged in (whole[:1000], b"", b"\x00" * 1000):
        (path / "checkpoint.pt").write_bytes(damaged)
        refused("cannot be read as a checkpoint .*; put the run's own back, or start", path, data)
    (path / "checkpoint.pt").unlink()
    refused("stopped before its first step", path, data)
    (path / "checkpoint.pt").write_bytes(whole)
    state = checkpoint(path)
    for part, junk in [("epoch", "x"), ("network", [1]), ("alpha_optimizer", 3), ("best", {}), ("totals", 1)]:
        torch.save({**state, part: junk}, path / "checkpoint.pt")
        refused("checkpoint.pt does not fit the settings beside it", path, data)
    for junk in (3, {"lengths": 3}, {"lengths": {METRICS: 1}}):
        torch.save(junk, path / "checkpoint.pt")
        refused("cannot be read as a checkpoint .*; put the run's own back, or start", path, data)
    (path / "checkpoint.pt").write_bytes(whole)
    config = json.loads((path / "config.json").read_text())
    for name, value in (
        ("layers", 4),
        ("epochs", 3),
        ("epochs", None),
        ("batch_size", 9),
        ("w_momentum", 0.5),
    ):
        (path / "config.json").write_text(json.dumps({**config, name: value}))
        refused(f"says {name} = .*, but the run began with {config[name]}", path, data)
    (path / "config.json").write_text(json.dumps({**config, "name": "../../other"}))
    refused("holds no name of a run", path, data)
    (path / "config.json").write_text(json.dumps({**config, "colour": 4}))
    refused("not the folder of a search", path, data)
    (path / "config.json").write_text("[" * 100_000)
    refused("not the folder of a search", path, data)
    (path / "config.json").write_text("{")
    refused("not the folder of a search", path, data)


def test_a_checkpoint_is_never_unpickled_unsafely(data, finished, in_tmp):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (in_tmp / "trapped",))

    torch.save({"lengths": {}, "epoch": Trap()}, finished / "checkpoint.pt")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        resume_search(finished, data)
    assert not (in_tmp / "trapped").exists()


# A signal that cannot be caught is the point.
@pytest.mark.skipif(sys.platform == "win32", reason="kills by SIGKILL, a POSIX signal")
def test_killed_at_random_moments_and_resumed_gives_the_same_bits(monkeypatch, capsys, in_tmp):
    """From the first write of the run folder to the last: a kill may fall into a checkpoint's write."""
    arguments = [*CHEAP, "--epochs", "5", "--fused"]
    assert call(monkeypatch, capsys, *arguments, "--name", "whole")[0] == 0
    whole, cut = in_tmp / "searchs" / "whole", in_tmp / "searchs" / "cut"
    killed_twice_and_resumed(ROOT / "run.py", [*arguments, "--name", "cut"], cut, 0.4)
    assert_same_run(whole, cut)


# A signal that cannot be caught is the point.
@pytest.mark.skipif(sys.platform == "win32", reason="kills by SIGKILL, a POSIX signal")
def test_killed_while_it_starts(monkeypatch, capsys, in_tmp):
    """Whatever is there by then, --resume goes on or says in one sentence why not."""
    process = start_program(ROOT / "run.py", *CHEAP, "--name", "cut")
    while not (in_tmp / "searchs" / "cut").exists():
        assert process.exitcode is None
        time.sleep(0.0005)
    process.kill()
    process.join()
    code, _, err = call(monkeypatch, capsys, "--resume", "searchs/cut")
    assert code == 0 or (code == 2 and err.startswith("run.py: ") and err.count("\n") == 1), err
