"""Whole trainings: against a loop written out by hand, resumed to the same bits, and what is refused."""

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_run, checkpoint, events, relative_error, same
from PIL import Image
from processes import killed_twice_and_resumed
from test_run import call

from darts_fast import (
    Genotype,
    InputError,
    RunError,
    TrainConfig,
    evaluate,
    load_genotype,
    load_network,
    network,
    resume_training,
    train,
)
from darts_fast.data import from_tensors, permutation
from darts_fast.runs import METRICS, Stopped
from darts_fast.train import TRAIN_ORDER, Training, scheduled
from darts_fast.train_step import TrainStep

ROOT = Path(__file__).resolve().parent.parent
TINY = TrainConfig(
    genotype="DARTS_V1",
    epochs=2,
    init_channels=2,
    layers=3,
    batch_size=8,
    cutout_length=2,
    drop_path_prob=0.3,
    print_freq=2,
)  # 2 epochs of 4 steps, the last one of 6 images


@pytest.fixture(scope="module")
def data():
    """30 images to train, 20 to test; of 24 x 24 pixels, so that the auxiliary head is there."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 24, 24), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 6, (50,), generator=generator)
    return images[:30], labels[:30], images[30:], labels[30:]


def test_the_loop_written_out_by_hand(in_tmp, monkeypatch):
    """Without crop, flip, cutout and drop path, which draw random numbers."""
    plain = Training._batches

    def uncropped(self, *arguments):
        batches = plain(self, *arguments)
        batches.crop_padding = 0
        return batches

    monkeypatch.setattr(Training, "_batches", uncropped)
    images = torch.randint(0, 256, (50, 1, 24, 24), generator=torch.Generator().manual_seed(1)).byte()
    labels = torch.arange(50) % 6
    config = TrainConfig(
        genotype="DARTS_V2", epochs=2, init_channels=2, layers=3, batch_size=8, cutout_length=0,
        drop_path_prob=0, aux_weight=0.3, grad_clip=0.5, lr=0.1, weight_decay=0.01, seed=7,
    )  # fmt: skip
    result = train(config, (images[:30], labels[:30], images[30:], labels[30:]))

    torch.manual_seed(7)
    module = network(load_genotype("DARTS_V2"), 6, 2, 3, image_channels=1, auxiliary=True)
    initial = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pixels = images.double()
    normalised = ((pixels - pixels[:30].mean()) / pixels[:30].std(unbiased=False)).float()
    weights = list(module.parameters())
    buffers = [torch.zeros_like(w) for w in weights]
    for epoch in range(2):
        lr = 0.1 * (1 + math.cos(math.pi * epoch / 2)) / 2
        for indices in permutation(30, 7, TRAIN_ORDER, epoch).split(8):
            losses = [F.cross_entropy(logits, labels[indices]) for logits in module(normalised[indices])]
            gradients = torch.autograd.grad(losses[0] + 0.3 * losses[1], weights)
            clip = min(1.0, 0.5 / (torch.stack([g.norm() for g in gradients]).norm().item() + 1e-6))
            with torch.no_grad():
                for w, b, g in zip(weights, buffers, gradients, strict=True):
                    b.mul_(0.9).add_(clip * g + 0.01 * w)
                    w -= lr * b
    found = load_network(result.path / "final.pt").state_dict()
    for name, w in module.named_parameters():  # in float32, after eight steps, kinks included
        assert relative_error(found[name] - initial[name], w - initial[name]) < 2e-2, name
    expected = module.state_dict()
    statistics = [name for name in initial if "running" in name]
    assert all(relative_error(found[name], expected[name]) < 2e-2 for name in statistics)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        result = train(TINY, data)
        return result._replace(path=result.path.resolve())


@pytest.mark.parametrize(("at", "number"), [(1, signal.SIGTERM), (3, signal.SIGINT), (6, signal.SIGTERM)])
def test_a_signal_saves_and_resume_gives_the_same_bits(at, number, data, undisturbed, in_tmp, signal_at):
    """Drop path, crop, flip and cutout draw random numbers in every step."""
    signal_at(Training, at, number)
    expected = rf"after {at} steps; go on with: darts_fast.resume_training\('augments/tensors', data\)"
    with pytest.raises(Stopped, match=expected):
        train(TINY, data)
    torch.manual_seed(at)
    result = resume_training("augments/tensors", data)
    assert_same_run(undisturbed.path, result.path)
    assert result._replace(path=undisturbed.path) == undisturbed
    again = resume_training(result.path, data)
    assert again == result


def test_a_checkpoint_of_before_is_resumed_to_the_same_bits(data, undisturbed, in_tmp, signal_at):
    """An older checkpoint lacks the settings that came later."""
    signal_at(Training, 3, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(TINY, data)
    path = in_tmp / "augments" / "tensors"
    state, settings = checkpoint(path), json.loads((path / "config.json").read_text())
    later = {
        "label_smoothing": 0.0, "ema": 0.0, "train_portion": 1.0, "schedule": "cosine", "warmup_epochs": 0,
        "stream": False, "color_jitter": 0.0, "amp": False, "amp_dtype": None,
    }  # fmt: skip
    for name, value in later.items():
        assert state["settings"].pop(name) == settings.pop(name) == value
    torch.save(state, path / "checkpoint.pt")
    (path / "config.json").write_text(json.dumps(settings))
    assert_same_run(undisturbed.path, resume_training(path, data).path)


def test_random_numbers_of_another_kind_of_device_begin_anew_from_the_position(data, in_tmp, signal_at):
    """A generator's state has 5,056 bytes on a CPU and 16 on CUDA."""
    for number, at in enumerate((3, 3, 4)):
        signal_at(Training, at, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(dataclasses.replace(TINY, name=str(number)), data)
        folder = in_tmp / "augments" / str(number)
        state = checkpoint(folder)
        for name in ("augmentation", "drop_path"):
            assert state[name].numel() == 5056
            state[name] = torch.full((16,), number, dtype=torch.uint8)
        torch.save(state, folder / "checkpoint.pt")
        resume_training(folder, data)
        log = (folder / f"{number}.log").read_text()
        assert log.count("the checkpoint's random numbers are another kind of device's than cpu's: ") == 1
        assert log.count(f"drawn from here on depends on seed 2, epoch 1 and step {at} alone") == 1
    one, two, other = ((in_tmp / "augments" / n / METRICS).read_text().splitlines() for n in "012")
    assert one == two and one[:3] == other[:3] and one[4:] != other[4:]


def test_what_a_run_folder_holds(undisturbed, data):
    path = undisturbed.path
    rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["lr"] for row in rows if "loss" in row] == [0.025] * 4 + [0.0125] * 4
    assert [row["test_top1"] for row in rows if "test_loss" in row][-1] == undisturbed.top1
    tags = {tag for _, tag, _ in events(path)}
    assert tags == {f"{kind}/{what}" for kind in ("train", "test") for what in ("loss", "top1", "top5")} | {
        "train/lr"
    }
    assert (path / "plots" / "genotype.png").exists()
    assert load_genotype(path) == load_genotype("DARTS_V1")  # from its log
    config = json.loads((path / "config.json").read_text())
    assert config["genotype"] == str(load_genotype("DARTS_V1"))
    log = (path / "tensors.log").read_text()
    assert "with auxiliary head" in log and f"Test top-1 {undisturbed.top1:.2%}" in log.splitlines()[-1]


def test_evaluating_gives_what_the_training_reported(undisturbed, data):
    found = evaluate(undisturbed.path, data=data)
    assert found["final.pt"][1:] == (undisturbed.top1, undisturbed.top5)
    assert found["best.pt"][1] == undisturbed.best_top1
    module = load_network(undisturbed.path / "final.pt")
    content = torch.load(undisturbed.path / "final.pt", weights_only=True)
    mean, std = (content[key].float().view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = module((data[2].float() - mean) / std)
    assert float((logits.argmax(1) == data[3]).float().mean()) == pytest.approx(undisturbed.top1)


@pytest.mark.parametrize(
    ("schedule", "falling"),
    [
        ("cosine", [1, 0.5 + 3**0.5 / 4, 0.75, 0.5, 0.25, 0.5 - 3**0.5 / 4]),
        ("linear", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ],
)
@pytest.mark.parametrize(
    ("warmup_epochs", "factors"), [(0, [1] * 6), (1, [1] * 6), (3, [1 / 3, 2 / 3, 1, 1, 1, 1])]
)
def test_the_learning_rate_of_every_epoch(schedule, falling, warmup_epochs, factors, data, in_tmp):
    config = dataclasses.replace(
        TINY, epochs=6, lr=0.04, schedule=schedule, warmup_epochs=warmup_epochs, batch_size=30, print_freq=1,
        device="cpu",
    )  # fmt: skip
    expected = [0.04 * fall * factor for fall, factor in zip(falling, factors, strict=True)]
    assert [scheduled(config, epoch) for epoch in range(6)] == pytest.approx(expected, rel=1e-12)
    if schedule == "linear" and warmup_epochs == 3:
        path = train(config, data).path
        rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
        assert [row["lr"] for row in rows if "lr" in row] == pytest.approx(expected, rel=1e-12)


def test_the_optimizer_takes_the_rate_of_the_schedule(data, in_tmp, monkeypatch):
    taken, plain = [], TrainStep.take
    monkeypatch.setattr(
        TrainStep, "take", lambda self, *args: (taken.append(float(self.lr)), plain(self, *args))[1]
    )
    train(
        dataclasses.replace(TINY, epochs=3, lr=0.03, schedule="linear", warmup_epochs=2, batch_size=30), data
    )
    assert taken == pytest.approx([0.015, 0.02, 0.01])


def test_a_recipe_yields_to_what_is_given_beside_it():
    """The published values, of arXiv 1904.12760 and 1907.05737."""
    recipe = TrainConfig.of_recipe("imagenet", genotype="PC_DARTS_image")
    published = {
        "epochs": 250, "batch_size": 1024, "lr": 0.5, "momentum": 0.9, "weight_decay": 3e-5, "grad_clip": 5.0,
        "label_smoothing": 0.1, "aux_weight": 0.4, "init_channels": 48, "layers": 14, "warmup_epochs": 5,
        "schedule": "linear", "stem": "imagenet", "image_size": 224, "color_jitter": 0.4, "stream": True,
        "dataset": "folder", "drop_path_prob": 0.0, "cutout_length": 0,
    }  # fmt: skip
    settings = dataclasses.asdict(recipe)
    assert {name: settings[name] for name in published} == published
    given = {"lr": 0.1, "batch_size": 128, "color_jitter": 0.0, "dataset": "FOLDER", "weight_decay": 3e-4}
    other = dataclasses.asdict(TrainConfig.of_recipe("imagenet", genotype="PC_DARTS_image", **given))
    assert {name for name in other if other[name] != settings[name]} == set(given)
    assert all(other[name] == value for name, value in given.items())
    with pytest.raises(InputError, match="recipe must be imagenet, not 'cifar'"):
        TrainConfig.of_recipe("cifar")


def test_the_moving_average_is_that_of_the_steps(data, in_tmp, signal_at):
    """Of weights and running statistics, written out; the same bits when the run was stopped between."""
    config, decay = dataclasses.replace(TINY, ema=0.25), [min(0.25, (1 + t) / (10 + t)) for t in range(8)]
    averages, plain = [], Training.take_step

    def step(self, *arguments):
        if not averages:
            averages.append({name: t.double() for name, t in self.network.state_dict().items()})
        found, share = plain(self, *arguments), 1 - decay[len(averages) - 1]
        now = self.network.state_dict()
        averages.append({name: t + share * (now[name] - t) for name, t in averages[-1].items()})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "take_step", step)
        result = train(config, data)
    assert decay[:3] == [0.1, pytest.approx(2 / 11), 0.25] and len(averages) == 9
    found = load_network(result.path / "ema.pt").state_dict()
    for name, average in averages[-1].items():
        if "num_batches" not in name:
            assert relative_error(found[name], average) < 1e-6, name
    tested = evaluate(result.path, data=data)
    assert list(tested) == ["final.pt", "best.pt", "ema.pt"] and tested["ema.pt"][1] == result.ema_top1
    rows = [json.loads(line) for line in (result.path / METRICS).read_text().splitlines()]
    assert [row["ema_top1"] for row in rows if "ema_top1" in row][-1] == result.ema_top1
    assert f"moving average top-1 {result.ema_top1:.2%}" in (result.path / "tensors.log").read_text()
    assert "ema/top1" in {tag for _, tag, _ in events(result.path)}

    signal_at(Training, 3, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(config, data)
    again = resume_training("augments/tensors-2", data)
    assert again._replace(path=result.path) == result
    assert_same_run(result.path, again.path)
    (again.path / "ema.pt").unlink()
    with pytest.raises(InputError, match=r"ema\.pt is missing"):
        resume_training(again.path, data)


def test_drop_path_rises_linearly_and_the_first_epoch_has_none(data, in_tmp, monkeypatch):
    seen, plain = [], Training.take_step

    def step(self, *arguments):
        seen.append(float(self.network.drop_path_prob))
        return plain(self, *arguments)

    monkeypatch.setattr(Training, "take_step", step)
    train(TINY, data)
    assert seen == [0.0] * 4 + [pytest.approx(0.15)] * 4


def test_classes_too_small_for_a_test_split_are_refused(in_tmp):
    for file in ("a/0", "a/1", "b/0", "b/1"):
        (in_tmp / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(in_tmp / "data" / f"{file}.png")
    with pytest.raises(
        InputError, match="^folder has no test images; put some into test/CLASS/, or at least"
    ):
        train(dataclasses.replace(TINY, dataset="folder"))
    assert not (in_tmp / "augments").exists()


def test_a_genotype_object_and_an_imagenet_stem(in_tmp):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.arange(8) % 2
    config = TrainConfig(
        genotype=load_genotype("DARTS_V1"), stem="imagenet", layers=3, init_channels=4, epochs=1, batch_size=4
    )
    assert TrainConfig(stem="imagenet").resolved("cifar10").layers == 14
    result = train(config, (images, labels, images, labels))
    log = (result.path / "tensors.log").read_text()
    assert "no auxiliary head (images of 64 x 64 are too small for it)" in log
    with pytest.raises(InputError, match="both sides must be divisible by 32"):
        train(config, (images[:, :, :40], labels, images[:, :, :40], labels))


def test_a_loss_that_is_not_finite_stops(data, in_tmp, monkeypatch):
    plain, calls = Training.take_step, []

    def step(self, *arguments):
        row, images = plain(self, *arguments)
        calls.append(None)
        return (row * float("nan") if len(calls) == 5 else row), images

    monkeypatch.setattr(Training, "take_step", step)
    with pytest.raises(RunError, match=r"training loss is nan at step 5 .*try a smaller --lr or --grad_clip"):
        train(TINY, data)
    assert checkpoint(in_tmp / "augments" / "tensors")["epoch"] == 1


def test_refusals(data, undisturbed, in_tmp):
    def refused(sentence, function, *arguments, **more):
        with pytest.raises(InputError, match=sentence) as error:
            function(*arguments, **more)
        assert "\n" not in str(error.value)

    refused("genotype must be given", train, TrainConfig())
    refused("tensors has no test images; give them .* third and fourth tensor", train, TINY, data[:2])
    assert os.listdir(in_tmp) == []
    path = shutil.copytree(undisturbed.path, Path("augments") / "tensors")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    refused("began with tensors", resume_training, path)
    refused("began with tensors", evaluate, path)
    changed = (255 - data[0], *data[1:])
    refused("began with other images", resume_training, path, changed)
    refused("began with other images", resume_training, path, (*data[:2], 255 - data[2], data[3]))
    refused("was trained with other images", evaluate, path, data=changed)
    refused("ends? in a batch of one", train, dataclasses.replace(TINY, batch_size=29), data)
    refused("ends? in a batch of one", train, dataclasses.replace(TINY, batch_size=1), data)
    refused("data must be images and labels", train, TINY, data[:1])
    from darts_fast import resume_search

    refused("is not the folder of a search", resume_search, path)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    content = torch.load(path / "final.pt", weights_only=True)
    for key in ("mean", "data", "state_dict", "network"):
        torch.save({name: value for name, value in content.items() if name != key}, path / "final.pt")
        refused("final.pt cannot be read as a trained network", evaluate, path, data=data)
    (path / "final.pt").write_bytes(before[path / "final.pt"][:500])
    refused("final.pt cannot be read as a trained network", evaluate, path, data=data)
    for name in ("final.pt", "best.pt"):
        (path / name).unlink()
        refused(
            "best.pt is missing" if name == "best.pt" else "final.pt is missing", resume_training, path, data
        )
    refused("no final.pt or best.pt yet", evaluate, path, data=data)


BAD = {
    "": "genotype must be given",
    "--genotype DARTS_V3": "did you mean DARTS_V",
    "--genotype nowhere/x.json": "no file or folder 'nowhere/x.json'",
    "--genotype Genotype(normal=[])": "genotype, character 19: expected",
    "--genotype DARTS --lr 0": "lr must be above 0",
    "--genotype DARTS --weight_decay 1e308": "weight_decay must be a finite number, at most 1e30",
    f"--resume {'d' * 5000}": "is not a folder",
    f"--evaluate {'d' * 5000}": "is not a folder",
    "--genotype DARTS --amp": "amp is for the fused cells: give --fused, too",
    "--genotype DARTS --fused --amp_dtype float32": "invalid choice",
    "--genotype DARTS --drop_path_prob 1": "drop_path_prob must be from 0 to below 1",
    "--genotype DARTS --train_portion 0": "train_portion must be above 0, at most 1",
    "--genotype DARTS --train_portion 1.1": "train_portion must be above 0, at most 1",
    "--genotype DARTS --train_portion 0.001": "gives 1 of 1437 images to the training",
    "--genotype DARTS --aux_weight -1": "aux_weight must be 0 or more",
    "--genotype DARTS --stem mnist": "invalid choice",
    "--genotype DARTS --schedule step": "invalid choice: 'step'",
    "--genotype DARTS --warmup_epochs -1": "warmup_epochs must be 0 or more",
    "--genotype DARTS --warmup_epochs 3 --epochs 3": "warmup_epochs must be below epochs (3), not 3",
    "--genotype DARTS --recipe cifar": "invalid choice: 'cifar'",
    "--genotype DARTS --recipe imagenet --dataset cifar10": "recipe imagenet is for the data set folder",
    "--genotype DARTS --recipe imagenet --epochs 4": "warmup_epochs must be below epochs (4), not 5",
    "--genotype DARTS --recipe imagenet": "data could not be read ([Errno 2]",
    "--genotype DARTS --stream": "stream is for the data set folder only; digits is read into memory",
    "--genotype DARTS --dataset folder --color_jitter 0.4": "color_jitter is for images that are streamed",
    "--genotype DARTS --dataset folder --stream --color_jitter 1.1": "color_jitter must be from 0 to 1",
    "--genotype DARTS --dataset folder --stream --workers -1": "workers must be from 0 to 1000, not -1",
    "--resume nowhere --recipe imagenet": "leave out --recipe",
    "--genotype DARTS --stem imagenet": "both sides must be divisible by 32",
    "--genotype DARTS --init_channels 2000000": "a network of 5 layers and 2000000 channels",
    "--genotype DARTS --dataset cifar": "did you mean cifar10",
    "--genotype DARTS --name a/b": "name must be the name of a new folder below augments",
    "--evaluate nowhere": "nowhere is not a folder; name the folder of a run, such as augments/digits",
    "--evaluate nowhere --lr 1": "leave out --lr",
    "--evaluate nowhere --resume nowhere": "leave out --resume",
    "--resume nowhere": "nowhere is not a folder",
    "--resume nowhere --genotype DARTS": "leave out --genotype",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_sentence(arguments, monkeypatch, capsys, in_tmp):
    code, out, err = call(monkeypatch, capsys, *arguments.split(), program="run_from")
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("run_from.py: ") and BAD[arguments] in err
    assert os.listdir(in_tmp) == []


CHEAP = "--genotype DARTS_V2 --init_channels 2 --layers 3 --batch_size 480 --print_freq 1".split()


def test_the_program_trains_and_evaluates(monkeypatch, capsys, in_tmp):
    code, out, _ = call(
        monkeypatch, capsys, *CHEAP, "--epochs", "2", "--lr", "0.1", "--name", "one", program="run_from"
    )
    assert code == 0 and "no auxiliary head (images of 8 x 8 are too small for it)" in out
    reported = out.splitlines()[-1].split("Test top-1 ")[1].split(",")[0]
    code, out, _ = call(monkeypatch, capsys, "--evaluate", "augments/one", program="run_from")
    assert code == 0 and out.splitlines()[0].startswith("augments/one/final.pt: test loss ")
    assert f"top-1 {reported}," in out.splitlines()[0]
    code, _, err = call(monkeypatch, capsys, *CHEAP, "--name", "one", program="run_from")
    assert code == 2 and "augments/one exists and is not overwritten" in err


# A signal that cannot be caught is the point.
@pytest.mark.skipif(sys.platform == "win32", reason="kills by SIGKILL, a POSIX signal")
def test_killed_at_random_moments_and_resumed_gives_the_same_bits(monkeypatch, capsys, in_tmp):
    arguments = [*CHEAP, "--epochs", "8", "--drop_path_prob", "0.2", "--cutout_length", "2"]
    assert call(monkeypatch, capsys, *arguments, "--name", "whole", program="run_from")[0] == 0
    whole, cut = in_tmp / "augments" / "whole", in_tmp / "augments" / "cut"
    killed_twice_and_resumed(ROOT / "run_from.py", [*arguments, "--name", "cut"], cut, 0.2)
    assert_same_run(whole, cut)


def test_fused_is_the_same_training(monkeypatch, capsys, in_tmp):
    """Through run_from.py, to the rounding of float32; its final.pt is the plain network's file."""
    found = {}
    for name in ("plain", "fused"):
        arguments = ["--genotype", "DARTS_V2", "--epochs", "1", "--init_channels", "4", "--layers", "3"]
        arguments += ["--batch_size", "500", "--lr", "0.005", "--print_freq", "1", "--name", name]
        assert (
            call(monkeypatch, capsys, *arguments, *["--fused"] * (name == "fused"), program="run_from")[0]
            == 0
        )
        lines = (in_tmp / "augments" / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
        found[name + " log"] = (in_tmp / "augments" / name / f"{name}.log").read_text()
    assert len(found["fused"]) == len(found["plain"]) > 1
    for a, b in zip(found["fused"], found["plain"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if "loss" in key:
                assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert "cells: fused, kernels: " in found["fused log"]
    assert "cells: PyTorch's operations" in found["plain log"]
    images = torch.randn(5, 1, 8, 8)
    networks = [load_network(in_tmp / "augments" / name / "final.pt") for name in ("plain", "fused")]
    assert networks[0].arguments == networks[1].arguments
    assert relative_error(networks[1](images), networks[0](images)) < 1e-3


def test_amp_trains_as_float32_does(monkeypatch, capsys, in_tmp):
    """Through run_from.py: `--amp_dtype` forces 2 bytes on a CPU, and rounds no more than its type does;
    `--amp` alone computes in float32, to the bit, and says so."""
    losses, logs = {}, {}
    variants = {"float32": [], "amp": ["--amp"], "half": ["--amp_dtype", "float16", "--no_graph"]}
    for name, more in variants.items():
        arguments = ["--genotype", "DARTS_V2", "--epochs", "1", "--init_channels", "4", "--layers", "3"]
        arguments += ["--batch_size", "500", "--lr", "0.005", "--print_freq", "1", "--name", name, "--fused"]
        assert call(monkeypatch, capsys, *arguments, *more, program="run_from")[0] == 0
        folder = in_tmp / "augments" / name
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        losses[name] = [line.get("loss", line.get("test_loss")) for line in lines]
        logs[name] = (folder / f"{name}.log").read_text()
    assert losses["amp"] == losses["float32"] != losses["half"]
    assert losses["half"] == pytest.approx(losses["float32"], rel=1e-2)
    assert "precision: float32 (half precision is slower on a CPU" in logs["amp"]
    assert "precision: float16 activations in the cells, all else float32" in logs["half"]
    assert "step: not captured" in logs["half"]


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_fused_with_amp_resumes_to_the_same_bits_and_is_evaluated_right(amp_dtype, data, in_tmp, signal_at):
    config = dataclasses.replace(TINY, fused=True, amp_dtype=amp_dtype)
    result = train(config, data)
    whole = result.path.rename("whole")
    signal_at(Training, 6, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(config, data)
    resumed = resume_training("augments/tensors", data)
    assert_same_run(whole, resumed.path)
    assert ("loss_scale" in checkpoint(whole)) == (amp_dtype == "float16")
    # The file is a plain network's, which computes in float32.
    found = evaluate(resumed.path, data=data)["final.pt"]
    assert found[1:] == (resumed.top1, resumed.top5) == (result.top1, result.top5)


def test_an_operation_that_nothing_reads_is_trained_as_any_other(data, in_tmp):
    """Its gradient is zero."""
    nodes = [[("sep_conv_3x3", 0), ("skip_connect", 1)], [("max_pool_3x3", 0), ("skip_connect", 1)]]
    unread = Genotype(nodes, [3], nodes, [3])
    result = train(dataclasses.replace(TINY, genotype=unread, epochs=1), data)
    assert result.top1 == evaluate(result.path, data=data)["final.pt"][1]


def test_a_part_of_the_training_images_is_held_out_to_judge_by(data, in_tmp):
    """The part trains, the others judge, the test images do nothing; the same split for every seed."""
    config = dataclasses.replace(TINY, train_portion=0.7, ema=0.5, lr=0.3)
    run = Training(config, from_tensors(*data))
    held_out = run.judge_order
    assert len(held_out) == 9 and sorted([*run.train_part, *held_out]) == list(range(30))
    other = Training(dataclasses.replace(config, seed=3), from_tensors(*data))
    assert torch.equal(held_out, other.judge_order)

    def results(name, *data):
        result = train(dataclasses.replace(config, name=name), data)
        states = [torch.load(result.path / file, weights_only=True) for file in ("final.pt", "ema.pt")]
        return result._replace(path=None), [state["state_dict"] for state in states]

    result, states = results("one", *data)
    module = load_network(in_tmp / "augments/one/final.pt")
    content = torch.load(in_tmp / "augments/one/final.pt", weights_only=True)
    mean, std = (content[key].float().view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        found = module((data[0][held_out].float() - mean) / std).argmax(1) == data[1][held_out]
    assert float(found.float().mean()) == pytest.approx(result.top1)
    rows = [json.loads(line) for line in (in_tmp / "augments/one" / METRICS).read_text().splitlines()]
    assert [row["val_top1"] for row in rows if "val_top1" in row][-1] == result.top1
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))  # two epochs of 21 images by 8
    log = (in_tmp / "augments/one/one.log").read_text()
    assert "21 images to train, 9 held out of the training images" in log
    assert f"Validation top-1 {result.top1:.2%}" in log.splitlines()[-1]

    without, same_states = results("without-test", *data[:2])
    assert without == result and same(states, same_states)
    wrong = data[1].clone()
    wrong[held_out] = (wrong[held_out] + 1) % 6
    judged_wrong, same_states = results("wrong-labels", data[0], wrong, *data[2:])
    assert same(states, same_states) and judged_wrong.top1 != result.top1
    # Tested later, it is tested on the test images, which it never saw.
    assert evaluate("augments/one", data=data)["final.pt"][1] == pytest.approx(
        float((module((data[2].float() - mean) / std).argmax(1) == data[3]).float().mean())
    )
    with pytest.raises(InputError, match="no test images"):
        evaluate("augments/without-test", data=data[:2])
    with pytest.raises(InputError, match=r"gives 1 of 30 images to the training and 29 to judge it by"):
        train(dataclasses.replace(TINY, train_portion=0.04), data)
