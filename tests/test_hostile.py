"""What somebody else may have put into a run folder: one sentence, exit code 2, and nothing in it changed."""

import json
import math
import os
import pickle
import runpy
import shutil
import signal
import socket
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import SMALL_SPACE, checkpoint
from test_run import call

from darts_fast import (
    InputError,
    SearchConfig,
    TrainConfig,
    evaluate,
    load_genotype,
    load_network,
    resume_search,
    resume_training,
    search,
    train,
)
from darts_fast.errors import one_line
from darts_fast.notation import NAMED
from darts_fast.plot import MOST_DRAWN
from darts_fast.runs import Stopped
from darts_fast.search import Search
from darts_fast.train import Training

SETTINGS = {"epochs": 2, "init_channels": 2, "layers": 3, "batch_size": 8}


class Run(NamedTuple):
    """A run that was stopped after the first step of its second epoch, of four steps each."""

    path: Path
    data: tuple
    program: str

    def resume(self, path=None):
        return (resume_search if self.program == "run" else resume_training)(path or self.path, self.data)


def stopped(loop, program, folder, data, start):
    plain, calls = loop.take_step, []

    def step(self, *arguments):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(loop, "take_step", step)
        with pytest.raises(Stopped):
            start()
    return Run(next(folder.glob("*/tensors")), data, program)


@pytest.fixture(scope="module")
def a_search(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    data = images, torch.arange(50) % 4
    config = SearchConfig(**SETTINGS, train_portion=0.6, order=1, space=SMALL_SPACE)
    return stopped(Search, "run", tmp_path_factory.mktemp("search"), data, lambda: search(config, data))


@pytest.fixture(scope="module")
def a_training(a_search, tmp_path_factory):
    images, labels = a_search.data
    data = images[:30], labels[:30], images[30:], labels[30:]
    config = TrainConfig(**SETTINGS, genotype="DARTS_V1", drop_path_prob=0.2)
    folder = tmp_path_factory.mktemp("training")
    return stopped(Training, "run_from", folder, data, lambda: train(config, data))


@pytest.fixture(scope="module")
def trained(a_training, tmp_path_factory):
    """The folder of the same training, gone to its end."""
    path = tmp_path_factory.mktemp("trained") / "tensors"
    shutil.copytree(a_training.path, path)
    a_training.resume(path)
    return path


@pytest.fixture(params=["a_search", "a_training"])
def a_run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def seconds():
    """A test that hangs fails."""
    if not hasattr(signal, "SIGALRM"):  # on Windows it hangs
        yield
        return

    def late(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def content(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refused(function, *arguments, **more):
    """What the InputError says: one line, and never that the file should be run."""
    with pytest.raises(InputError) as error:
        function(*arguments, **more)
    text = str(error.value)
    assert text.isprintable() and "weights_only" not in text and len(text) < 1000
    return text


def put(key, value):
    """Replaces what is below a key of a checkpoint; "a.b" is b of a."""

    def change(state):
        *owners, last = key.split(".") if isinstance(key, str) else key
        for owner in owners:
            state = state[int(owner) if owner.isdigit() else owner]
        state[last] = value(state[last]) if callable(value) else value

    return change


def without(key):
    def change(state):
        del state[key]

    return change


def flooded(value):
    """A tensor's first number replaced."""

    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


# Of both kinds of run. The sentence names what is wrong.
CHECKPOINTS = {
    "epoch -3": (put("epoch", -3), "epoch is -3, not a whole number from 0 to 2"),
    "epoch 1e9": (put("epoch", 10**9), "epoch is 1000000000, not a whole number from 0 to 2"),
    "epoch 1.0": (put("epoch", 1.0), "epoch is 1.0, not a whole number"),
    "epoch True": (put("epoch", True), "epoch is True, not a whole number"),
    "the last epoch": (put("epoch", 2), "step is 1, not a whole number from 0 to 0"),
    "the first epoch": (put("epoch", 0), "best is there after 0 epochs"),
    "step -5": (put("step", -5), "step is -5, not a whole number from 0 to 4"),
    "step 1e6": (put("step", 10**6), "step is 1000000, not a whole number from 0 to 4"),
    "step of many digits": (put("step", 10**5000), "checkpoint.pt"),
    "another step": (put("step", 2), "totals, images is 8.0, not a finite number from 16 to 16"),
    "totals too short": (put("totals", [0.0] * 3), "totals are not four numbers"),
    "totals a tensor": (put("totals", torch.zeros(4)), "totals are not four numbers"),
    "totals NaN": (put("totals", [math.nan, 0.0, 0.0, 8.0]), "totals, loss is nan, not a finite number"),
    "totals text": (put("totals", ["1", 0.0, 0.0, 8.0]), "totals, loss is '1', not a finite number"),
    "more hits than images": (put("totals", [1.0, 0.0, 9.0, 8.0]), "totals, top-5 is 9.0"),
    "best without its epoch": (put("best", lambda best: {"top1": best["top1"]}), "best has no epoch"),
    "best of the future": (put("best.epoch", 2), "best.epoch is 2, not a whole number from 1 to 1"),
    "best NaN": (put("best.top1", math.nan), "best.top1 is nan"),
    "best above one": (put("best.top1", 1.5), "best.top1 is 1.5, not a finite number from 0 to 1"),
    "best None": (put("best", None), "best is missing after 1 epochs"),
    "best with more": (put("best", lambda best: {**best, "x": 1}), "best has 'x', which does not belong"),
    "an end that is not there": (put("final", {}), "final"),
    "no epoch": (without("epoch"), "it has no epoch"),
    "no generator": (without("augmentation"), "it has no augmentation"),
    "something more": (put("epoch\n", 3), "checkpoint.pt"),
    "a generator too short": (put("augmentation", lambda state: state[:100]), "RNG state"),
    "a generator of floats": (put("augmentation", lambda state: state.float()), "augmentation is no state"),
    "a generator of zeros": (put("augmentation", torch.zeros_like), "checkpoint.pt does not fit"),
    "weights missing": (put("network", {}), "network has no "),
    "weights a list": (put("network", [1]), "network is no dictionary"),
    "a weight missing": (
        put("network", lambda n: dict(list(n.items())[:-1])),
        "network has no classifier.bias",
    ),
    "a weight more": (put("network", lambda n: {**n, "x": n["classifier.bias"]}), "network has 'x'"),
    "another shape": (
        put(("network", "classifier.bias"), torch.zeros(5)),
        "classifier.bias is float32 [5], not",
    ),
    "another dtype": (
        put(("network", "classifier.bias"), torch.zeros(4).double()),
        "is float64 [4], not float32",
    ),
    "no tensor": (put(("network", "classifier.bias"), [0.0] * 4), "classifier.bias is no tensor"),
    "no data": (put(("network", "classifier.bias"), torch.zeros(4, device="meta")), "is no tensor with data"),
    "sparse": (put(("network", "classifier.bias"), torch.zeros(4).to_sparse()), "is no tensor with data"),
    "NaN in a weight": (
        put(("network", "classifier.bias"), flooded(math.nan)),
        "classifier.bias is not finite",
    ),
    "a variance below 0": (put(("network", "stem.1.running_var"), flooded(-1.0)), "running_var is negative"),
    "settings a number": (put("settings", 3), "settings is no dictionary"),
    "a setting missing": (put("settings", lambda s: {**s, "seed": None}), "the run began with None"),
    "a setting of tensors": (put("settings.seed", torch.zeros(3)), "the run began with tensor"),
    "a setting without end": (put("settings.seed", "9" * 10**6), "the run began with '999"),
    "images a tensor": (put("data", torch.zeros(3)), "data is tensor"),
    "lengths below 0": (put(("lengths", "metrics.jsonl"), -1), "lengths.metrics.jsonl is -1"),
    "lengths a number": (put(("lengths", "metrics.jsonl"), 1.5), "lengths.metrics.jsonl is 1.5"),
    "lengths of other files": (put("lengths", {"../x": 1}), "lengths has no tensors.log"),
}
SEARCH = {
    "no moments": (put("weight_optimizer", {}), "weight_optimizer has no 0"),
    "moments of another shape": (
        put(("weight_optimizer", "0", "momentum_buffer"), torch.zeros(3)),
        "weight_optimizer.0.momentum_buffer is float32 [3], not",
    ),
    "moments NaN": (put(("alpha_optimizer", "1", "exp_avg"), flooded(math.nan)), "exp_avg is not finite"),
    "a second moment below 0": (put(("alpha_optimizer", "0", "exp_avg_sq"), flooded(-1.0)), "is negative"),
    "no genotype": (put(("best", "genotype", "normal"), []), "best.genotype.normal: expected a list"),
}
TRAINING = {
    "no moments": (put("optimizer", {"state": {}, "param_groups": []}), "optimizer has no 0"),
    "no drop path": (put("drop_path", None), "drop_path is no state of a generator"),
    "a loss without end": (put("best.loss", math.inf), "best.loss is inf, not a finite number"),
}


def refuse_checkpoint(run, change, sentence):
    file = run.path / "checkpoint.pt"
    whole = file.read_bytes()
    try:
        state = checkpoint(run.path)
        change(state)
        torch.save(state, file)
        before = content(run.path)
        text = refused(run.resume)
        assert sentence in text and any(
            word in text for word in ("checkpoint.pt", "the run began with", "final.pt")
        )
        assert content(run.path) == before
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_changed_checkpoint(name, a_run):
    refuse_checkpoint(a_run, *CHECKPOINTS[name])


@pytest.mark.parametrize("name", SEARCH)
def test_a_changed_checkpoint_of_a_search(name, a_search):
    refuse_checkpoint(a_search, *SEARCH[name])


@pytest.mark.parametrize("name", TRAINING)
def test_a_changed_checkpoint_of_a_training(name, a_training):
    refuse_checkpoint(a_training, *TRAINING[name])


@pytest.mark.parametrize("final", [None, {}, {"epoch": 1, "loss": 1.0, "top1": 0.1, "top5": 0.2}])
def test_a_checkpoint_of_the_end_without_it(final, a_training, trained):
    refuse_checkpoint(a_training._replace(path=trained), put("final", final), "final")


def test_the_same_checkpoint_unchanged_goes_on(a_run, tmp_path):
    shutil.copytree(a_run.path, tmp_path / "tensors")
    a_run.resume(tmp_path / "tensors")
    state = checkpoint(tmp_path / "tensors")
    assert (state["epoch"], state["step"]) == (2, 0)


class Trap:
    """Touches a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def write_bomb(path):
    """The same file and 64 MiB of zeros, compressed to 64 KiB."""
    with zipfile.ZipFile(path) as old:
        kept = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**kept, f"{next(iter(kept)).split('/')[0]}/data/9999": bytes(2**26)}.items():
            archive.writestr(name, data)


def write_truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def write_entry_missing(path):
    with zipfile.ZipFile(path) as old:
        kept = {name: old.read(name) for name in old.namelist() if not name.endswith("/data/3")}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in kept.items():
            new.writestr(name, data)


DAMAGES = {
    "runs code": lambda path: torch.save({"lengths": {}, "network": Trap(path.with_name("trapped"))}, path),
    "a pickle alone": lambda path: path.write_bytes(pickle.dumps(Trap(path.with_name("trapped")))),
    "an old file": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
    "a script": lambda path: torch.jit.save(torch.jit.script(torch.nn.ReLU()), path),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a bomb": write_bomb,
    "cut": write_truncated,
    "an entry missing": write_entry_missing,
    "nothing": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 100),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still written by somebody
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_checkpoint_or_network(damage, a_run, trained, capfd):
    file = a_run.path / "checkpoint.pt"
    whole = file.read_bytes()
    try:
        DAMAGES[damage](file)
        before = content(a_run.path)
        assert "cannot be read as a checkpoint" in refused(a_run.resume)
        assert content(a_run.path) == before
    finally:
        file.write_bytes(whole)
    file = trained / "final.pt"
    whole = file.read_bytes()
    try:
        DAMAGES[damage](file)
        text = refused(load_network, file)
        assert "final.pt cannot be read as a trained network" in text
    finally:
        file.write_bytes(whole)
    assert not list(trained.glob("trapped")) and not list(a_run.path.glob("trapped"))
    assert capfd.readouterr().err == ""


NETWORKS = {
    "layers 1e9": (
        put("network.layers", 10**9),
        "network.layers is 1000000000, not a whole number from 1 to 3",
    ),
    "layers -1": (put("network.layers", -1), "network.layers is -1"),
    "layers True": (put("network.layers", True), "network.layers is True"),
    "channels 1e6": (put("network.channels", 10**6), "state_dict.stem.0.weight is float32"),
    "channels 1e18": (put("network.channels", 10**18), "network.channels is 1000000000000000000"),
    "another stem": (put("network.stem", ["cifar"]), "network.stem is ['cifar']"),
    "auxiliary 1": (put("network.auxiliary", 1), "network.auxiliary is 1"),
    "no genotype": (put("network.genotype", "Genotype("), "expected 'normal', found the end"),
    "an argument more": (put("network", lambda n: {**n, "fused": True}), "network has 'fused'"),
    "NaN": (put(("state_dict", "classifier.bias"), flooded(math.nan)), "classifier.bias is not finite"),
    "weights a list": (put("state_dict", []), "state_dict is no dictionary"),
    "keys that are no text": (put("state_dict", lambda state: {**state, 3: 4}), "state_dict has 3"),
    "std 0": (put("std", torch.zeros(3).double()), "std is 0.0"),
    "mean NaN": (put("mean", flooded(math.nan)), "mean is not finite"),
    "data text": (put("data", "x"), "data is 'x'"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_changed_network(name, a_training, trained):
    change, sentence = NETWORKS[name]
    file = trained / "final.pt"
    whole = file.read_bytes()
    try:
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
        assert sentence in refused(evaluate, trained, data=a_training.data)
    finally:
        file.write_bytes(whole)


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def socket_file(path):
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(before)


def loop(path):
    path.symlink_to(path.name)


# Windows has no such files.
@pytest.mark.skipif(
    sys.platform == "win32", reason="makes pipes, sockets and links to devices, which are POSIX's"
)
@pytest.mark.parametrize("make", [pipe, device, socket_file, Path.mkdir, loop])
def test_what_is_no_regular_file_is_not_waited_for(make, a_search, a_training, trained, tmp_path):
    for run, names in ((a_search, ["checkpoint.pt", "config.json"]), (a_training, ["checkpoint.pt"])):
        for name in names:
            folder = tmp_path / name / run.program
            shutil.copytree(run.path, folder)
            (folder / name).unlink()
            make(folder / name)
            text = refused(run.resume, folder)
            assert name in text and ("is not a regular file" in text or "symbolic links" in text)
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    (folder / "final.pt").unlink()
    make(folder / "final.pt")
    for function, more in ((load_network, {}), (evaluate, {"data": a_training.data})):
        text = refused(function, folder / "final.pt" if function is load_network else folder, **more)
        assert "final.pt" in text and ("is not a regular file" in text or "symbolic links" in text)
    folder = tmp_path / "genotypes"
    folder.mkdir()
    for name in ("genotype.json", "a.log", "a.json"):
        make(folder / name)
        if make is not Path.mkdir or name == "genotype.json":
            text = refused(load_genotype, folder if name == "genotype.json" else folder / name)
            assert "is not a regular file" in text or "it has no genotype.json" in text or "no file" in text


# The test itself makes a symbolic link, which on Windows an ordinary user may not.
@pytest.mark.skipif(sys.platform == "win32", reason="makes links, for which Windows asks for a privilege")
def test_nothing_is_written_through_a_link(a_run, tmp_path):
    """Neither into what somebody's log is a link to, which would be cut, nor into what lies in the way."""
    mine = tmp_path / "mine"
    mine.write_bytes(bytes(10**6))
    folder = tmp_path / "tensors"
    shutil.copytree(a_run.path, folder)
    (folder / "checkpoint.pt.tmp").symlink_to(mine)
    (folder / "plots" / "EP02-genotype.png").symlink_to(mine)
    a_run.resume(folder)
    assert mine.read_bytes() == bytes(10**6)
    (folder / "tensors.log").unlink()
    (folder / "tensors.log").symlink_to(mine)
    assert "tensors.log is a symbolic link" in refused(a_run.resume, folder)
    assert mine.read_bytes() == bytes(10**6)


DEEP = "[" * 900 + "]" * 900
CONFIGS = {
    "[" * 100_000: "config.json cannot be read as JSON",
    "[]": "config.json is not a search's",
    DEEP: "config.json is not a search's",
    "\0\xff": "config.json cannot be read as JSON",
    f'{{"name": "tensors", "environment": {{"torch": {DEEP}}}}}': "config.json holds no environment",
    f'{{"name": "tensors", "layers": {DEEP}}}': "layers must be a whole number",
    '{"name": "tensors", "layers": 1e400}': "layers must be a whole number",
    '{"name": "tensors", "w_lr": NaN}': "w_lr must be a finite number",
    '{"name": "tensors", "order": %s}' % ("9" * 4000): "order must be at most",
    '{"name": "tensors", "hvp": "%s"}' % ("x" * 10**5): "hvp must be exact or finite-difference",
    '{"name": "tensors", "device": "%s"}' % ("x" * 10**5): "device must be cpu",
    '{"name": "ten\\nsors"}': "config.json holds no name of a run",
    '{"name": "tensors", "colour\\n": 3}': "config.json is not a search's",
    " " * 2**20 + "{}": "config.json has more than 1 MiB",
}


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_a_changed_configuration(text, a_search):
    file = a_search.path / "config.json"
    whole = file.read_bytes()
    try:
        if text.startswith('{"name"'):
            text_put = json.dumps({**json.loads(whole), **{"name": "tensors"}})[:-1] + ", " + text[1:]
            file.write_text(text_put)
        else:
            file.write_bytes(text.encode("latin-1"))
        before = content(a_search.path)
        assert CONFIGS[text] in refused(a_search.resume)
        assert content(a_search.path) == before
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("field", ["normal", "normal_concat", "reduce"])
def test_json_nested_deep(field, in_tmp):
    text = json.dumps({**NAMED["DARTS"].as_json(), field: "deep"}).replace('"deep"', "[" * 600 + "]" * 600)
    Path("a.json").write_text(text)
    assert "'a.json'" in refused(load_genotype, "a.json")


@pytest.mark.parametrize("nodes", [MOST_DRAWN + 1, 20_000])
def test_a_genotype_too_large_to_be_drawn(nodes, monkeypatch, capsys, in_tmp):
    cell, concat = [[["skip_connect", 0]]] * nodes, [2]
    small = NAMED["DARTS"].as_json()
    Path("a.json").write_text(json.dumps({**small, "reduce": cell, "reduce_concat": concat}))
    code, out, err = call(monkeypatch, capsys, "a.json", program="visualize")
    assert (code, out) == (2, "") and os.listdir() == ["a.json"]
    expected = f"the reduction cell has {nodes:,} operations, and at most {MOST_DRAWN} of a cell are drawn"
    assert err == f"visualize.py: {expected}\n"


def test_the_largest_genotype_that_is_drawn(monkeypatch, capsys, in_tmp):
    """A chain is what Graphviz takes longest for."""
    chain = [[["sep_conv_3x3", node + 1]] for node in range(MOST_DRAWN)]
    concat = list(range(2, 2 + MOST_DRAWN))
    genotype = {"normal": chain, "normal_concat": concat, "reduce": chain, "reduce_concat": concat}
    Path("a.json").write_text(json.dumps(genotype))
    assert call(monkeypatch, capsys, "a.json", program="visualize")[0] == 0


def test_a_training_is_not_drawn_where_its_genotype_is_too_large(a_training, in_tmp):
    cell = [[("skip_connect", 0)]] * (MOST_DRAWN + 1)
    genotype = NAMED["DARTS"]._replace(normal=cell, normal_concat=[2], reduce=cell, reduce_concat=[2])
    config = TrainConfig(**{**SETTINGS, "epochs": 1, "batch_size": 30}, genotype=genotype)
    path = train(config, a_training.data).path
    assert "no picture genotype.png: the normal cell has 41 operations" in (path / "tensors.log").read_text()


STEERING = "a\nb\r\x1b[31m\u202e"
SHOWN = r"a\nb\r\x1b[31m\u202e"


# Windows refuses such names.
@pytest.mark.skipif(sys.platform == "win32", reason="names that Windows does not allow")
def test_a_path_that_steers_the_terminal_is_one_line(a_training, trained, monkeypatch, capsys, in_tmp):
    for program, arguments in {
        "run": ["--resume", STEERING],
        "run_from": ["--evaluate", STEERING],
        "visualize": [f"{STEERING}/x"],
    }.items():
        code, out, err = call(monkeypatch, capsys, *arguments, program=program)
        assert (code, out, err.count("\n")) == (2, "", 1) and err[:-1].isprintable() and SHOWN in err
    for arguments in ([STEERING], ["--data_path", STEERING, "--dataset", "cifar10"], ["--name", STEERING]):
        code, out, err = call(monkeypatch, capsys, *arguments)
        assert code == 2 and err.count("\n") == 1 and err[:-1].isprintable()
    shutil.copytree(a_training.path, STEERING)
    a_training.resume(Path(STEERING))
    lines = capsys.readouterr().out.splitlines()
    log = Path(STEERING, "tensors.log").read_text()
    assert all(line.isprintable() for line in [*lines, *log.splitlines()])


def test_a_setting_with_a_line_break_is_one_line_of_the_log(a_search, in_tmp):
    config = SearchConfig(**{**SETTINGS, "epochs": 1, "batch_size": 30}, data_path="a\nb", order=1)
    path = search(config, a_search.data).path
    assert any(line.endswith(r"a\nb") for line in (path / "tensors.log").read_text().splitlines())


def test_one_line():
    assert one_line("Größe 'x' \u00a0") == r"Größe 'x' \xa0"
    assert one_line("a\udc80\x00\u2028") == r"a\udc80\x00\u2028"


# Linux's /dev/full is a disk without space.
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, where every write fails")
@pytest.mark.parametrize("program", ["run", "run_from", "visualize", "kernels"])
def test_what_was_asked_for_and_cannot_be_written(program, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        if program == "kernels":
            monkeypatch.setattr(sys, "argv", ["kernels"])
            with pytest.raises(SystemExit) as done:
                runpy.run_module("darts_fast.kernels", run_name="__main__")
            code, err = done.value.code, capsys.readouterr().err
        else:
            code, _, err = call(monkeypatch, capsys, "-h", program=program)
    assert code == 1 and err.count("\n") == 1
    assert "cannot write to the standard output: No space left on device" in err


# Linux's /dev/full is a disk without space.
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, where every write fails")
def test_an_error_that_cannot_be_written_keeps_its_exit_code(monkeypatch, capsys):
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115  closing it fails, too
    monkeypatch.setattr(sys, "stderr", full)
    assert call(monkeypatch, capsys, "--epochs", "0")[0] == 2
    with suppress(OSError):
        full.close()


@pytest.mark.parametrize("output", ["closed", "none"])
def test_the_kernels_have_nobody_to_tell(output, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels"])
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody if output == "closed" else None)
        with pytest.raises(SystemExit) as done:
            runpy.run_module("darts_fast.kernels", run_name="__main__")
    assert done.value.code == (1 if output == "closed" else 0)
    assert "Traceback" not in capsys.readouterr().err


def test_the_kernels_know_no_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "avail\nable"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("darts_fast.kernels", run_name="__main__")
    assert done.value.code == 2
    assert capsys.readouterr().err == "darts_fast.kernels takes no arguments, not 'avail\\nable'\n"
