"""Images that stay in their files: the same batches whoever decodes them, and runs that end saved."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, checkpoint, log_lines
from PIL import Image
from test_run import call

from darts_fast import (
    InputError,
    RunError,
    SearchConfig,
    TrainConfig,
    datasets,
    evaluate,
    resume_search,
    resume_training,
    search,
    train,
)
from darts_fast.data import IMAGENET_MEAN, IMAGENET_STD, fingerprint, permutation
from darts_fast.datasets import load
from darts_fast.distributed import Ranks
from darts_fast.errors import DamagedImage
from darts_fast.runs import Stopped
from darts_fast.search import Search
from darts_fast.stream import Stream
from darts_fast.train import TRAIN_ORDER, Training

CPU = torch.device("cpu")
PLAIN = (torch.zeros(3), torch.ones(3))  # statistics that leave pixel values as they are
SEED = (2, 0, 1)


def photograph(number, height, width):
    """Red grows to the right and green downwards, blue is the image's own."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    pixels[..., 2] = 4 * number
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """`data`: 22 images to train and 6 to test, in two classes, of 30 to 56 pixels; four kinds of files."""
    number = 0
    for split, count in (("train", 11), ("val", 3)):
        for name in ("a", "b"):
            path = tmp_path / "data" / split / name
            path.mkdir(parents=True)
            for i in range(count):
                file = path / f"{i:02d}.{('png', 'bmp', 'tiff', 'ppm')[number % 4]}"
                photograph(number, 30 + number, 56 - number).save(file)
                number += 1
    return tmp_path / "data"


def stream_of(folder, image_size=16, **settings):
    dataset = load("folder", folder, image_size, stream=True)
    return Stream(dataset.images, dataset.labels, CPU, PLAIN, torch.Generator(), **settings)


def walked(stream, order, parts, seed=SEED):
    return [(images.clone(), labels) for images, labels in stream.picked(order, parts, seed)]


def test_the_data_set_of_files(folder):
    dataset, again, read = (load("folder", folder, 16, stream=s) for s in (True, True, False))
    assert dataset.streamed == "--stream" and read.streamed is None
    assert dataset.images.shape == read.images.shape and dataset.test_images.shape == read.test_images.shape
    assert torch.equal(dataset.labels, read.labels) and torch.equal(dataset.test_labels, read.test_labels)
    assert dataset.images.path(21) == folder / "train" / "b" / "10.bmp"
    assert fingerprint(dataset) == fingerprint(again)
    os.rename(folder / "val/a/00.tiff", folder / "val/a/99.tiff")
    assert fingerprint(load("folder", folder, 16, stream=True)) != fingerprint(dataset)


def test_any_workers_ranks_and_starts_give_the_same_batches(folder):
    order = torch.randperm(22, generator=torch.Generator().manual_seed(3))
    parts = Ranks().parts(22, 6)
    assert parts == [range(0, 6), range(6, 12), range(12, 18), range(18, 22)]
    before = torch.random.get_rng_state()
    expected = walked(stream_of(folder, color_jitter=0.4), order, parts)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's
    labels = load("folder", folder, 16, stream=True).labels
    for (images, found), part in zip(expected, parts, strict=True):
        assert images.dtype == torch.uint8 and images.shape == (len(part), 3, 16, 16)
        assert torch.equal(found, labels[order[part.start : part.stop]])
    for workers in (1, 3):
        for start in (0, 2):
            stream = stream_of(folder, color_jitter=0.4, workers=workers)
            for one, two in zip(walked(stream, order, parts[start:]), expected[start:], strict=True):
                assert all(map(torch.equal, one, two))
    of_ranks = [
        walked(stream_of(folder, color_jitter=0.4), order, Ranks(r, 4).parts(22, 6)) for r in range(4)
    ]
    for number, whole in enumerate(expected):
        for together, of_whole in zip(
            zip(*(found[number] for found in of_ranks), strict=True), whole, strict=True
        ):
            assert torch.equal(torch.cat(together), of_whole)
    other_epoch = walked(stream_of(folder), order, parts, (2, 0, 2))
    assert not any(torch.equal(one[0], two[0]) for one, two in zip(other_epoch, expected, strict=True))


def test_random_crops_are_windows_of_the_image_and_half_are_mirrored(folder):
    """Read from the colours: red is the position from left to right, green from top to bottom."""
    stream, sides = stream_of(folder, image_size=32), []
    dataset = load("folder", folder, 16, stream=True)
    for epoch in range(12):
        ((images, _),) = walked(stream, torch.arange(22), [range(22)], (2, 0, epoch))
        for number, image in enumerate(images.double()):
            assert (image[2] == 4 * number).all()
            across, down = image[0].mean(0), image[1].mean(1)
            assert (image[0] - across).abs().max() <= 1 and (image[1].T - down).abs().max() <= 1
            mirrored = bool(across[-1] < across[0])
            across = across.flip(0) if mirrored else across
            assert (across.diff() >= -1).all() and (down.diff() >= -1).all()
            width, height = Image.open(dataset.images.path(number)).size
            # The slope within, where the window's border has no part
            window = [float(line[-8] - line[8]) / 16 * 32 / 255 for line in (across, down)]
            sides.append((mirrored, window[0] * window[1], window[0] * width / (window[1] * height)))
    mirrored, area, ratio = (np.array(column) for column in zip(*sides, strict=True))
    assert 0.4 < mirrored.mean() < 0.6
    assert 0.05 < area.min() < 0.2 and 0.85 < area.max() < 1.1 and 0.45 < area.mean() < 0.6
    assert 0.6 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.7


def test_colours_change_by_no_more_than_was_asked(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            Image.new("RGB", (16, 16), (100, 100, 100)).save(tmp_path / name / f"{i}.png")
    order, parts = torch.arange(64), [range(64)]
    ((plain, _),) = walked(stream_of(tmp_path), order, parts)
    assert (plain == 100).all()
    ((changed, _),) = walked(stream_of(tmp_path, color_jitter=0.2), order, parts)
    grey = changed[:, :, 0, 0].double()
    assert (grey == grey[:, :1]).all()  # which saturation and hue leave as it is
    # Contrast moves towards the mean, which is the pixel itself; brightness is a factor.
    assert 79 <= grey.min() < 85 and 115 < grey.max() <= 121


def test_images_that_are_not_augmented_are_resized_and_cropped_at_the_centre(folder):
    stream = stream_of(folder, image_size=28)
    ((images, labels),) = walked(stream, torch.tensor([20, 3]), [range(2)], seed=None)
    assert labels.tolist() == [1, 0]
    for image, number in zip(images, (20, 3), strict=True):
        whole = Image.open(stream.files.path(number)).convert("RGB")
        side = min(whole.size)
        # The middle 7/8 of the shorter side, and as many pixels of the longer one
        left, top = ((length - side * 7 / 8) / 2 for length in whole.size)
        box = (left, top, left + side * 7 / 8, top + side * 7 / 8)
        expected = whole.resize((28, 28), Image.Resampling.BILINEAR, box)
        difference = np.abs(np.asarray(expected, float) - image.permute(1, 2, 0).numpy())
        assert difference.max() <= 6 and difference.mean() < 2  # the crop is rounded to whole pixels
    cut, _ = stream.cut(torch.tensor([20, 3]), augment=False)
    assert torch.equal(cut, images.float())


def test_cutout_is_on_the_device_and_nothing_is_cropped_twice(folder):
    stream = stream_of(folder, cutout_length=4)
    stream.generator.manual_seed(5)
    ((images, _),) = walked(stream, torch.arange(22), [range(22)])
    found = stream.prepared(images, augment=True)
    blank = (found == 0).all(dim=1)
    assert blank.any(dim=(1, 2)).all() and torch.equal(found[:, 2][~blank], images[:, 2].float()[~blank])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_when_it_is_needed(folder, workers):
    victim = folder / "train/a/08.png"
    victim.write_bytes(victim.read_bytes()[:100])
    found = stream_of(folder, workers=workers).picked(torch.arange(22), Ranks().parts(22, 6), SEED)
    assert len(next(found)[0]) == 6
    with pytest.raises(DamagedImage) as refused:
        next(found)
    assert str(refused.value).startswith(f"{victim} could not be read as an image (")
    assert "\n" not in str(refused.value) and "Traceback" not in str(refused.value)


def test_a_bomb_and_a_missing_file(folder, monkeypatch):
    stream = stream_of(folder)
    os.remove(folder / "train/a/00.png")
    with pytest.raises(DamagedImage, match=r"00.png could not be read as an image \(.*No such file"):
        walked(stream, torch.arange(2), [range(2)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        DamagedImage, match="01.bmp could not be read as an image .it has more than 1000 pixels"
    ):
        walked(stream, torch.arange(2), [range(1, 2)])


# When it streams


def test_a_set_larger_than_half_of_the_memory_streams(folder, monkeypatch):
    needed = 28 * 3 * 32 * 32
    monkeypatch.setattr(datasets, "memory", lambda: 2 * needed)
    assert load("folder", folder, 32, stream=None).streamed is None
    monkeypatch.setattr(datasets, "memory", lambda: 2 * needed - 1)
    expected = "28 images of 32 x 32 would take 8.6e-05 GB, more than half of the 0.000172 GB that a process"
    assert load("folder", folder, 32, stream=None).streamed.startswith(expected)
    assert load("folder", folder, 32, stream=False).streamed is None
    monkeypatch.setattr(datasets, "memory", lambda: 4 * needed - 1)
    monkeypatch.setattr(datasets, "local_world_size", lambda: 2)
    assert load("folder", folder, 32, stream=None).streamed


# The second opinion is the kernel's own file, which only Linux has.
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_is_that_of_the_machine_or_less():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 2**28 < datasets.memory() <= total * 1.001


# Whole runs

TRAINING = TrainConfig(
    genotype="DARTS_V1", dataset="folder", stream=True, workers=2, image_size=16, epochs=2, init_channels=2,
    layers=3, batch_size=6, aux_weight=0, cutout_length=2, drop_path_prob=0.3, color_jitter=0.4, ema=0.9,
    print_freq=2, device="cpu", name="run",
)  # fmt: skip
# 22 images: 4 steps an epoch
SEARCH = SearchConfig(
    dataset="folder", stream=True, workers=1, image_size=16, epochs=2, init_channels=2, layers=3,
    batch_size=4, train_portion=0.6, fused=True, print_freq=2, device="cpu", name="run",
)  # fmt: skip
# 13 images train and 9 validate: 4 steps an epoch
RUNS = {
    "training": (train, resume_training, TRAINING, Training),
    "search": (search, resume_search, SEARCH, Search),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_resumed_in_the_middle_of_an_epoch_with_other_workers(
    kind, folder, in_tmp, signal_at, no_heat_maps
):
    begin, go_on, config, loop = RUNS[kind]
    config = dataclasses.replace(config, data_path=str(folder))
    whole = begin(config, parent="whole")
    assert not multiprocessing.active_children()
    assert any(
        "images: streamed from their files (--stream), decoded by" in line for line in log_lines(whole.path)
    )
    log = next(whole.path.glob("*.log")).read_text()
    assert log.count("% waiting for images, ") == 4
    signal_at(loop, 6, signal.SIGTERM)
    with pytest.raises(Stopped):
        begin(config, parent="stopped")
    settings = json.loads(Path("stopped/run/config.json").read_text())
    Path("stopped/run/config.json").write_text(json.dumps(settings | {"workers": 0}))
    resumed = go_on("stopped/run")
    assert_same_run(whole.path, resumed.path)
    if kind == "training":
        found = evaluate(whole.path)
        assert found["final.pt"][1] == whole.top1 and found["ema.pt"][1] == whole.ema_top1
        state = torch.load(whole.path / "final.pt", weights_only=True)
        assert state["mean"].tolist() == list(IMAGENET_MEAN) and state["std"].tolist() == list(IMAGENET_STD)


def test_it_streams_by_itself_says_why_and_only_a_new_run_does(folder, in_tmp, monkeypatch, signal_at):
    config = dataclasses.replace(
        TRAINING, stream=False, color_jitter=0.0, workers=0, epochs=1, data_path=str(folder)
    )
    signal_at(Training, 2, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(config, parent="small")
    monkeypatch.setattr(datasets, "memory", lambda: 1000.0)
    resumed = resume_training("small/run")  # in memory, as it began
    assert not any("streamed" in line for line in log_lines(resumed.path))
    streamed = train(config, parent="large")
    (line,) = [line for line in log_lines(streamed.path) if "streamed" in line]
    assert "(28 images of 16 x 16 would take 2.15e-05 GB, more than half of the 1e-06 GB that" in line
    assert "decoded by this process; random resized crop, flip" in line
    assert json.loads((streamed.path / "config.json").read_text())["stream"] is True
    monkeypatch.setattr(datasets, "memory", lambda: math.inf)
    assert resume_training(streamed.path) == streamed


@pytest.mark.parametrize("victim", ["train", "val"])
def test_a_damaged_file_ends_a_run_saved_and_repaired_it_goes_on(
    victim, folder, in_tmp, monkeypatch, capsys, signal_at
):
    config = dataclasses.replace(TRAINING, data_path=str(folder))
    whole = train(config, parent="whole")
    file = folder / "val/b/02.ppm"
    if victim == "train":
        file = file_at(13, folder)  # in the third step
    intact = file.read_bytes()
    file.write_bytes(intact[: len(intact) // 2])
    given = {name: v for name, v in dataclasses.asdict(config).items() if v is not None}
    words = [f"--{name}={value}" for name, value in given.items() if type(value) is not bool]
    code, _, err = call(monkeypatch, capsys, *words, "--stream", program="run_from")
    steps = 2 if victim == "train" else 4
    assert code == 2 and err.count("\n") == 1
    assert f"{file} could not be read as an image (" in err
    assert f"the run was saved after {steps} steps: put an intact image in its place and go on with" in err
    assert (checkpoint(Path("augments/run"))["epoch"], checkpoint(Path("augments/run"))["step"]) == (0, steps)
    assert err.split(": ", 1)[1].strip() in Path("augments/run/run.log").read_text()
    assert not multiprocessing.active_children()
    file.write_bytes(intact)
    resumed = resume_training("augments/run")
    assert_same_run(whole.path, resumed.path)


def file_at(position, folder):
    """In the order of the first epoch of TRAINING."""
    index = permutation(22, TRAINING.seed, TRAIN_ORDER, 0)[position]
    return load("folder", folder, 16, stream=True).images.path(int(index))


# A group of their own keeps Ctrl-C from the workers; Windows has no process groups to ask for.
@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
def test_workers_are_in_groups_of_their_own_and_a_killed_one_ends_the_run(folder, in_tmp, monkeypatch):
    plain, groups = Training.take_step, []

    def step(self, lr):
        found = plain(self, lr)
        workers = multiprocessing.active_children()
        groups.extend(os.getpgid(worker.pid) == worker.pid for worker in workers)
        if self.step == 1:
            os.kill(workers[0].pid, signal.SIGKILL)
            workers[0].join()
        return found

    monkeypatch.setattr(Training, "take_step", step)
    config = dataclasses.replace(TRAINING, data_path=str(folder), workers=1, batch_size=2)
    with pytest.raises(
        RunError, match="a process that decodes images has ended after step .*go on from the last"
    ):
        train(config)
    assert groups and all(groups)


def test_nothing_is_warned_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walked(stream_of(folder, workers=5), torch.arange(4), [range(2), range(2, 4)])


def test_what_is_refused():
    for settings, sentence in (
        ({"stream": True}, "stream is for the data set folder only; digits is read into memory"),
        ({"color_jitter": 0.1}, "color_jitter is for images that are streamed: give --stream, too"),
    ):
        with pytest.raises(InputError, match=sentence):
            SearchConfig(**settings)
