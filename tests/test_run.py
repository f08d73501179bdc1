"""run.py as a person calls it: bad input is one sentence, exit code 2, nothing written."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SMALL_SPACE, assert_same_run

from darts_fast.runs import run_program, write_atomically

ROOT = Path(__file__).resolve().parent.parent
TINY = "--epochs 2 --init_channels 2 --layers 3 --batch_size 256 --order 1 --space".split() + [SMALL_SPACE]


def load_program(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*arguments, **more):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refused)


def call(monkeypatch, capsys, *arguments, program="run"):
    """Exit code, stdout and stderr of the program in this process."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments])
    code = run_program(f"{program}.py", load_program(program).main)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_two_processes_may_replace_one_file(tmp_path, monkeypatch):
    """One begins while the other's temporary file is half written: the last one's content is there, whole."""
    path, plain = tmp_path / "table.md", os.fsync

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", plain)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            write_atomically(path, b"other", shared=True)
        assert path.read_bytes() == b"other"
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(path, b"own", shared=True)
    assert path.read_bytes() == b"own" and list(tmp_path.iterdir()) == [path]


BAD = {
    "--epochs abc": "invalid int value: 'abc'",
    "--epochs 0": "epochs must be at least 1, not 0",
    "--batch_size 0": "batch_size must be at least 1",
    "--batch_size 1.5": "invalid int value",
    "--init_channels 3": "init_channels must be an even number",
    "--layers 2": "layers must be from 3",
    "--stream": "stream is for the data set folder only",
    "--dataset folder --workers 1001": "workers must be from 0 to 1000",
    "--dataset folder --color_jitter 0.4": "color_jitter is for images that are streamed: give --stream, too",
    "--dataset folder --stream --color_jitter -0.1": "color_jitter must be from 0 to 1",
    "--projection_epochs 0": "projection_epochs must be at least 1, not 0",
    "--auxiliary_skip -1": "auxiliary_skip must be 0 or more",
    "--macs_target 3": "macs_target is for macs_weight",
    "--macs_weight -1": "macs_weight must be 0 or more",
    "--macs_weight 1 --macs_target 0": "macs_target must be above 0",
    "--macs_weight 1 --space nasbench201": "macs_weight is for the cells of DARTS",
    "--perturb some": "invalid choice: 'some'",
    "--perturb_epsilon -0.1": "perturb_epsilon must be 0 or more",
    "--derive perturbation --stop_at_skips 2": "leave out --stop_at_skips",
    "--space s9": "space must be darts, s1, s2, s3, s4, nasbench201, or a JSON file; there is no file 's9'",
    "--space nasbench201 --layers 0": "layers must be from 1 (cell a stage) to 1000, not 0",
    "--space nasbench201 --layers 1001": "layers must be from 1 (cell a stage) to 1000, not 1001",
    "--space nasbench201 --fused": "the kernels have no dense convolutions",
    "--space nasbench201 --fused --amp": "leave out --fused",
    "--space nasbench201 --derive perturbation": "of nasbench201 keeps all: leave it out",
    "--space nasbench201 --amp": "amp is for the fused cells",
    "--space nasbench201 --init_channels 2000000": "a supernet of 1 layers and 2000000 channels for digits",
    "--partial_channels 0": "partial_channels must be at least 1, not 0",
    "--partial_channels 3": "partial_channels must divide init_channels (4), not be 3",
    "--partial_channels 2 --derive raw": "with partial_channels derive must be softmax",
    "--space nasbench201 --partial_channels 2": "partial_channels is for the cells of DARTS",
    "--layers 1001": "layers must be from 3 (normal and reduction cells) to 1000",
    "--init_channels 2000000": "a supernet of 3 layers and 2000000 channels for digits cannot be made on cpu",
    "--batch_size 100000000000000000000": "batch_size must be at most 4294967295",
    "--cutout_length 100000000000000000000000": "cutout_length must be at most 4294967295",
    "--w_lr nan": "w_lr must be a finite number",
    "--w_lr 0": "w_lr must be above 0",
    "--w_lr_min -1": "w_lr_min must be 0 or more",
    "--w_lr_min 1": "w_lr_min must be at most w_lr",
    "--w_momentum 1": "w_momentum must be from 0 to below 1",
    "--w_weight_decay -1": "w_weight_decay must be 0 or more",
    "--w_grad_clip 0": "w_grad_clip must be above 0",
    "--alpha_lr inf": "alpha_lr must be a finite number",
    "--alpha_weight_decay -1": "alpha_weight_decay must be 0 or more",
    "--print_freq 0": "print_freq must be at least 1",
    "--seed -1": "seed must be from 0",
    "--seed 4294967296": "seed must be at most 4294967295",
    "--train_portion 1": "train_portion must be above 0 and below 1",
    "--train_portion 0.001": "gives 1 of 1437 images to the weights",
    "--cutout_length -1": "cutout_length must be 0 or an even number",
    "--order 3": "invalid choice",
    "--stop_at_eigenvalue 1": "stop_at_eigenvalue must be above 0 and below 1",
    "--beta_decay -1": "beta_decay must be 0 or more",
    "--alpha_warmup -1": "alpha_warmup must be 0 or more",
    "--alpha_warmup 5": "alpha_warmup must be below epochs (5), not 5",
    "--alpha_warmup 1 --profile": "leave out one of the two",
    "--profile -1": "profile must be 0 or more",
    "--hvp approximate": "invalid choice",
    "--derive both": "invalid choice",
    "--alpha_lr 1e300": "alpha_lr must be a finite number, at most 1e30",
    "--cutout_length 3": "cutout_length must be 0 or an even number",
    "--device cpu:0": "device must be cpu, cuda or cuda:N",
    "--device cuda:99999999999": "device must be cpu, cuda or cuda:N",
    "--dataset cifar10 --data_path ~nosuchuser/x": "~nosuchuser/x/cifar-10-batches-py",
    f"--resume {'d' * 5000}": "is not a folder",
    "--device tpu": "device must be cpu, cuda or cuda:N",
    "--device cuda:99": "CUDA devices",
    "--dataset imagenet": "no data set 'imagenet'",
    "--dataset cifar-10": "no data set 'cifar-10' (did you mean cifar10?)",
    "--dataset folder --data_path nowhere": "nowhere could not be read",
    "--dataset folder --image_size 30": "image_size must be divisible by 4, from 8 to 1024, not 30",
    "--dataset folder --image_size 2000000000": "image_size must be divisible by 4, from 8 to 1024",
    "--image_size 32": "image_size is for the data set folder only; images of digits keep their size",
    "--name a/b": "name must be the name of a new folder",
    "--name ..": "name must be the name of a new folder",
    "--name a\x1b[31m": "name must be the name of a new folder",
    "--name a\udc80": "name must be the name of a new folder",
    f"--name {'n' * 300}": "name must be the name of a new folder",
    f"--dataset cifar10 --data_path {'d' * 300}": "File name too long",
    "--resume nowhere": "nowhere is not a folder",
    "--resume nowhere --epochs 3": "leave out --epochs",
    "--fused 1": "unrecognized arguments: 1",
    "--amp": "amp is for the fused cells: give --fused, too",
    "--amp_dtype float16": "amp is for the fused cells",
    "--fused --amp_dtype float32": "invalid choice",
    "--epoch 3": "unrecognized arguments: --epoch 3",
    "digits": "unrecognized arguments: digits",
    "--name": "expected one argument",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_sentence(arguments, monkeypatch, capsys, in_tmp):
    code, out, err = call(monkeypatch, capsys, *arguments.split())
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("run.py: ") and BAD[arguments] in err
    assert os.listdir(in_tmp) == []


# Linux's /dev/full is a disk without space; the redirections are bash's.
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, where every write fails")
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- 2>&-", "| true"])
def test_output_that_goes_nowhere_is_no_traceback(redirection, in_tmp):
    command = f"{sys.executable} {ROOT / 'visualize.py'} DARTS_V2 --out a.svg {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (in_tmp / "a.svg").read_bytes().startswith(b"<?xml")


def test_an_empty_name_is_refused(monkeypatch, capsys, in_tmp):
    code, _, err = call(monkeypatch, capsys, "--name", "")
    assert code == 2 and "name must be" in err and os.listdir(in_tmp) == []


def test_help_shows_every_default(monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        call(monkeypatch, capsys, "-h")
    text = capsys.readouterr().out
    assert done.value.code == 0
    from darts_fast import SearchConfig

    for field in dataclasses.fields(SearchConfig):
        about = re.search(rf"(?ms)^  --{field.name} (.*?)(?=^  -|\Z)", text)[1]
        about = " ".join(about.split())
        assert about.endswith(f"(default: {field.metadata['shown'] or field.default})"), field.name


def test_a_search_writes_its_folder_and_is_not_overwritten(monkeypatch, capsys, in_tmp):
    code, out, err = call(monkeypatch, capsys, *TINY, "--name", "one")
    assert code == 0
    folder = in_tmp / "searchs" / "one"
    log = (folder / "one.log").read_text().splitlines()
    genotype = json.loads((folder / "genotype.json").read_text())
    from darts_fast import Genotype

    assert log[-1] == str(Genotype.from_json(genotype["best"]["genotype"])) == out.splitlines()[-1]
    assert genotype["final"]["epoch"] == 2
    for name, value in json.loads((folder / "config.json").read_text()).items():
        if name != "environment":
            assert any(line.endswith(f"| {name} = {value}") for line in log), name
    assert {"EP01-genotype.png", "EP02-alphas_normal.png"} <= set(os.listdir(folder / "plots"))

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, out, err = call(monkeypatch, capsys, *TINY, "--name", "one")
    assert code == 2 and err.count("\n") == 1 and "searchs/one exists and is not overwritten" in err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("no_heat_maps")
def test_fused_is_the_same_search(monkeypatch, capsys, in_tmp):
    """To the rounding of float32, which three steps do not yet magnify."""
    found = {}
    for name in ("reference", "fused"):
        arguments = [*TINY, "--order", "2", "--epochs", "1", "--name", name]
        assert call(monkeypatch, capsys, *arguments, *["--fused"] * (name == "fused"))[0] == 0
        lines = (in_tmp / "searchs" / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
        assert json.loads((in_tmp / "searchs" / name / "config.json").read_text())["fused"] == (
            name == "fused"
        )
    assert len(found["fused"]) == len(found["reference"]) == 5  # three steps, the validation, the cells
    for a, b in zip(found["fused"], found["reference"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if "loss" in key:
                assert a[key] == pytest.approx(b[key], rel=1e-4), key


@pytest.mark.usefixtures("no_heat_maps")
def test_without_a_name_folders_are_numbered(monkeypatch, capsys, in_tmp):
    for _ in range(2):
        assert call(monkeypatch, capsys, *TINY, "--epochs", "1", "--fused")[0] == 0
    assert sorted(os.listdir("searchs")) == ["digits", "digits-2"]


# Permissions do not stop root, who runs many containers; the kernel's own files do.
@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs /sys, a folder nobody can write in")
def test_a_read_only_disk(monkeypatch, capsys):
    monkeypatch.chdir("/sys/kernel")
    code, _, err = call(monkeypatch, capsys, *TINY)
    assert code == 2 and err.count("\n") == 1 and "cannot write searchs" in err


@contextmanager
def largest_file(size):
    """Within, no file of this process may grow beyond so many bytes, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# RLIMIT_FSIZE stands in for a full disk; Windows has no limit on the size of a process's files.
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by POSIX's setrlimit")
def test_a_disk_that_is_full_from_the_start(monkeypatch, capsys, in_tmp):
    with largest_file(100):
        code, _, err = call(monkeypatch, capsys, *TINY)
    assert code == 2 and "cannot write searchs/digits/config.json" in err
    assert err.count("\n") == 1 and os.listdir("searchs") == []


# RLIMIT_FSIZE stands in for a full disk; Windows has no limit on the size of a process's files.
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by POSIX's setrlimit")
def test_a_disk_that_fills_up_leaves_a_run_that_can_be_resumed(monkeypatch, capsys, in_tmp):
    """TensorBoard's events are the largest file; the limit is hit while the second epoch writes, and lies
    above the size of a checkpoint, which does not grow."""
    arguments = [*TINY, "--fused", "--space", "darts"]
    assert call(monkeypatch, capsys, *arguments, "--name", "whole")[0] == 0
    whole = in_tmp / "searchs" / "whole"
    size = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    limit = (size + (whole / "checkpoint.pt").stat().st_size) // 2
    assert limit < size
    with largest_file(limit):
        code, _, err = call(monkeypatch, capsys, *arguments, "--name", "cut")
    assert code == 2 and "File too large" in err, err
    assert err.startswith("run.py: ") and "Traceback" not in err
    assert call(monkeypatch, capsys, "--resume", "searchs/cut")[0] == 0
    assert_same_run(whole, in_tmp / "searchs" / "cut")
