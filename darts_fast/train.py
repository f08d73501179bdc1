"""Trains the network of a genotype on the whole training set (arXiv 1806.09055, section 3.2)."""

import dataclasses
import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darts_fast import capture, plot, precision
from darts_fast.capture import Captured
from darts_fast.config import TrainConfig, available_device
from darts_fast.data import Batches, Dataset, ImageFiles, check_for_network, fingerprint, permutation, seeded
from darts_fast.datasets import read_data
from darts_fast.derived import (
    SIZE_MULTIPLE,
    DerivedNetwork,
    auxiliary_fits,
    multiply_adds,
    network,
    packed,
    parameter_count,
    unpacked,
)
from darts_fast.distributed import Ranks
from darts_fast.errors import InputError
from darts_fast.evaluation import Metrics, evaluated
from darts_fast.fused import kernels_on, missing_on
from darts_fast.loop import MEASURED, Loop, cosine, refusing_what_does_not_fit
from darts_fast.notation import load_genotype
from darts_fast.precision import strict_float32
from darts_fast.profiling import phase
from darts_fast.runs import environment, read_config
from darts_fast.state import check_keys, check_number
from darts_fast.stream import Stream
from darts_fast.train_step import TrainStep

# Streams of random numbers, told apart by the second number of a seed.
TRAIN_ORDER, AUGMENTATION, DROP_PATH, SPLIT, NOISE = range(5)

BEST, FINAL, AVERAGE = "best.pt", "final.pt", "ema.pt"

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # training images and labels, test images and labels


class TrainResult(NamedTuple):
    """What a training ended in. Accuracies are of the test images, 0 to 1; with a `train_portion` below 1, of
    the training images that were held out."""

    top1: float  # after the last epoch
    top5: float
    best_top1: float  # the best of all epochs: chosen on the test images, so a little too good
    best_epoch: int  # counted from 1
    parameters: int  # without the auxiliary head
    multiply_adds: int  # of one image
    path: Path  # the run folder
    ema_top1: float | None = (
        None  # of the moving average of the weights after the last epoch; None without it
    )


def train(config: TrainConfig, data: Data | None = None, parent: str | Path | None = None) -> TrainResult:
    """Trains a genotype; writes the run folder `augments/<name>/` with best.pt and final.pt, and with
    a moving average of the weights ema.pt.

    Args:
        config: the settings; what is None takes the data set's default.
        data: the user's own images (uint8 [N, channels, H, W]) and labels (integers [N]), to train and to
            test, used instead of `config.dataset`.
        parent: where the run folder is made; None: augments/.

    Raises:
        InputError: bad settings or data, or the folder exists or cannot be written.
        RunError: the loss is no longer finite, or the device ran out of memory.
        Stopped: Ctrl-C or SIGTERM; the run was saved.
    """
    if config.genotype is None:
        raise InputError("genotype must be given: --genotype DARTS_V2, --genotype searchs/digits, ...")
    config = dataclasses.replace(config, genotype=str(load_genotype(config.genotype)))
    return Training.begin(config, data, parent)


def resume_training(path: str | Path, data: Data | None = None, device: str | None = None) -> TrainResult:
    """Goes on with the training of a run folder from its checkpoint, to the same bits as if it had never
    stopped. `data` as in `train`, where the training was given it; `device`, if another than it began on
    (then to other bits, which the log says). Raises what `train` raises.
    """
    return Training.go_on(TrainConfig, path, data, device)


def evaluate(path: str | Path, device: str | None = None, data: Data | None = None) -> dict[str, Metrics]:
    """Loss, top-1 and top-5 accuracy (0 to 1) of the networks saved in a run folder, on its test images, also
    where it was trained on a part of the training images and judged by the others.

    A training with `fused` is tested by the fused kernels, too, where this machine has them, and else by
    PyTorch's modules, to rounding with the same result.

    Args:
        path: the folder of a training.
        device: cpu, cuda or cuda:N; None: cuda where there is one, else cpu.
        data: as in `train`, where the training was given it.

    Returns:
        By file name: final.pt (where the training has ended), best.pt, and ema.pt (where it has ended and
        had a moving average).

    Raises:
        InputError: no such folder, no network saved in it yet, or other images.
    """
    path = Path(path)
    config, _ = read_config(path, TrainConfig)
    files = [name for name in (FINAL, BEST, AVERAGE) if os.path.lexists(path / name)]
    if not files:
        raise InputError(f"{path} has no {FINAL} or {BEST} yet: no epoch was finished; resume it first")
    dataset, where = read_data(config, data, resumed=path), available_device(device)
    check_test_images(dataset)
    checksum, found = fingerprint(dataset), {}
    for name in files:
        module, content = unpacked(path / name)
        if content["data"] != checksum:
            raise InputError(
                f"{path / name} was trained with other images than {dataset.name} holds now; restore them, "
                "or load it by darts_fast.load_network and test it on yours"
            )
        statistics = content["mean"], content["std"]
        arguments = dataset.test_labels, where, statistics, seeded(where, 0)
        if isinstance(dataset.test_images, ImageFiles):
            batches: Batches = Stream(dataset.test_images, *arguments, workers=config.workers)
        else:
            batches = Batches(dataset.test_images, *arguments)
        order = torch.arange(len(dataset.test_labels))
        module.fused = config.fused and missing_on(where) is None
        what = f"a batch of {config.batch_size} images"
        with strict_float32(), refusing_what_does_not_fit(what, where):
            found[name] = evaluated(module.to(where), batches, order, config.batch_size)
    return found


def check_test_images(dataset: Dataset) -> None:
    """Raises InputError where there are none."""
    if not len(dataset.test_labels):
        remedy = "give them and their labels as the third and fourth tensor of data"
        if dataset.name == "folder":
            remedy = "put some into test/CLASS/, or at least five images into a CLASS/"
        raise InputError(f"{dataset.name} has no test images; {remedy}")


def split(images: int, train_portion: float) -> tuple[Tensor, Tensor]:
    """Indices (int64) of so many training images that are trained on, and of those held out. They do not
    depend on a run's seed, so that trainings can be compared.

    Raises:
        InputError: fewer than two are left to train on, or none of a portion below 1 is held out.
    """
    if train_portion == 1:
        return torch.arange(images), torch.arange(0)
    order, size = permutation(images, SPLIT), int(train_portion * images)
    if size < 2 or size == images:
        raise InputError(
            f"train_portion {train_portion} gives {size} of {images} images to the training and "
            f"{images - size} to judge it by; it needs at least 2 and 1"
        )
    return order[:size], order[size:]


def scheduled(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch e, counted from 0, of E, with a warm-up of W epochs:

    s(e) min(1, (e + 1) / W),  s(e) = lr (1 + cos(pi e / E)) / 2,  or of the linear schedule lr (1 - e / E).
    """
    if config.schedule == "linear":
        lr = config.lr * (1 - epoch / config.epochs)
    else:
        lr = cosine(config.lr, 0.0, epoch, config.epochs)
    return lr * (epoch + 1) / config.warmup_epochs if epoch < config.warmup_epochs else lr


class Training(Loop):
    """A training under way: the network, its optimizer, and the position in the schedule.

    Raises:
        InputError: the images have a size that the stem does not take, there are none to test or too few to
            train on, or the data or the network do not fit the memory.
    """

    function = "resume_training"
    remedy = "a smaller --lr or --grad_clip"
    config: TrainConfig
    network: DerivedNetwork

    @staticmethod
    def files(config: TrainConfig) -> list[tuple[str, str]]:
        return [(BEST, "best"), (FINAL, "final"), *([(AVERAGE, "final")] if config.ema else [])]

    def __init__(self, config: TrainConfig, dataset: Dataset, ranks: Ranks | None = None):
        check_for_network(dataset, SIZE_MULTIPLE[config.stem])
        if config.train_portion == 1:
            check_test_images(dataset)
        config = config.resolved(dataset.name)
        self.train_part, held_out = split(len(dataset.labels), config.train_portion)
        super().__init__(config, dataset, ranks or Ranks(), len(self.train_part), config.seed, AUGMENTATION)
        # What the network is judged by after an epoch: its key in MEASURED, the images, and which of them.
        if config.train_portion < 1:
            self.judge, self.judge_batches, self.judge_order = "val", self.batches, held_out
        else:
            self.judge, self.judge_order = "test", torch.arange(len(dataset.test_labels))
            self.judge_batches = self._batches(dataset.test_images, dataset.test_labels)
        assert config.genotype is not None  # `train` has seen to it
        self.genotype = load_genotype(config.genotype)
        self.height, self.width = dataset.images.shape[2:]
        self.auxiliary = config.aux_weight > 0 and auxiliary_fits(self.height, self.width, config.stem)
        if self.auxiliary and 1 in self.part_sizes(self.train_images):
            share = "" if self.ranks.size == 1 else f" for one of {self.ranks.size} processes"
            raise InputError(
                f"{self.train_images} images in batches of {config.batch_size} end in a batch of one{share}, "
                "which has no variance for the auxiliary head's batch norm; choose another --batch_size, or "
                "--aux_weight 0"
            )
        what = f"a network of {config.layers} layers and {config.init_channels} channels for {dataset.name}"
        with (
            refusing_what_does_not_fit(what, self.device),
            torch.random.fork_rng(devices=[]),  # the caller's generator is left as it was
        ):
            torch.default_generator.manual_seed(config.seed)
            self.network = self._network().to(self.device)
            average = self._network().to(self.device).requires_grad_(False).eval() if config.ema else None
        if average is not None:
            average.load_state_dict(self.network.state_dict())
        self.drop_path = seeded(self.device, *self.of_this_rank(config.seed, DROP_PATH))
        self.network.drop_path_generator = self.drop_path
        self.noise_seed = self.of_this_rank(config.seed, NOISE)
        self.noise = self.network.noise_generator = seeded(self.device, *self.noise_seed)
        self.parameters = parameter_count(self.network)
        self.multiply_adds = multiply_adds(self.network, self.height, self.width)
        self.train_step = TrainStep(self.network, config, average, self.ranks.average)
        images, labels = self.buffers(self.part_sizes(self.train_images)[0])
        self.take = Captured(
            self._take,
            {"images": images, "labels": labels},
            self.train_step.tensors,
            self.captured,
            [generator for generator, _ in self.generators().values()],
        )

    def begin_epoch(self) -> None:
        order = permutation(self.train_images, self.config.seed, TRAIN_ORDER, self.epoch)
        self.train_batches = self.walk(self.train_part[order], TRAIN_ORDER)
        if isinstance(self.network.drop_path_prob, Tensor):
            self.network.drop_path_prob.fill_(self.config.drop_path_prob * self.epoch / self.config.epochs)

    def take_step(self, lr: float) -> tuple[Tensor, int]:
        with phase("data"):
            images, labels = next(self.train_batches)
        self.train_step.lr.fill_(lr)
        if self.train_step.average is not None:
            self.train_step.set_average_share(self.steps_done)
        whole = self.batch_images
        self.ranks.set_share(whole)
        return self.take(whole, images=images, labels=labels), whole

    def _take(self, images: Tensor, labels: Tensor) -> Tensor:
        """`TrainStep.take` of images (uint8) as they were picked."""
        with phase("data"):
            images = self.batches.prepared(images, augment=True)
        return self.train_step.take(images, labels)

    def evaluate(self) -> dict[str, Metrics]:
        networks, average = {self.judge: self.network}, self.train_step.average
        if average is not None:
            networks["ema"] = average
        return self.measured(networks, self.judge_batches, self.judge_order)

    def finish_epoch(self, found: dict[str, Metrics]) -> None:
        """Records the epoch; keeps its network where it is the best so far, or the last."""
        self.record_evaluation(found)
        tested = {
            name: {"epoch": self.epoch + 1, "loss": loss, "top1": top1, "top5": top5}
            for name, (loss, top1, top5) in found.items()
        }
        this = tested[self.judge] | ({"ema_top1": tested["ema"]["top1"]} if "ema" in tested else {})
        self.keep(this)
        if self.best is this:
            self._save_network(BEST, self.network, tested[self.judge])
        if self.final is this:
            self._save_network(FINAL, self.network, tested[self.judge])
            if self.train_step.average is not None:
                self._save_network(AVERAGE, self.train_step.average, tested["ema"])

    def result(self) -> TrainResult:
        best, final = self.best, self.final
        assert best is not None and final is not None
        average = final.get("ema_top1")
        of_average = "" if average is None else f"; moving average top-1 {average:.2%}"
        judge = MEASURED[self.judge].capitalize()
        self.folder.log(
            f"{judge} top-1 {final['top1']:.2%}, top-5 {final['top5']:.2%} after the last epoch{of_average}; "
            f"best top-1 {best['top1']:.2%}, in epoch {best['epoch']}; {self._size()}"
        )
        return TrainResult(
            final["top1"],
            final["top5"],
            best["top1"],
            best["epoch"],
            self.parameters,
            self.multiply_adds,
            self.folder.path,
            average,
        )

    def learning_rate(self) -> float:
        return scheduled(self.config, self.epoch)

    def state(self) -> dict[str, Any]:
        return self.train_step.state_dict()

    def generators(self) -> dict[str, tuple[torch.Generator, tuple[int, ...]]]:
        seed = self.of_this_rank(self.config.seed, DROP_PATH)
        noise = {"noise": (self.noise, self.noise_seed)} if self.network.cell_noise else {}
        return {**super().generators(), "drop_path": (self.drop_path, seed), **noise}

    def check_record(self, record: Any, name: str) -> None:
        average = ("ema_top1",) if self.config.ema else ()
        check_keys(record, ("epoch", "loss", "top1", "top5", *average), name)
        for key in average:
            check_number(record[key], float, 0, 1, f"{name}.{key}")
        check_number(record["loss"], float, -math.inf, math.inf, f"{name}.loss")
        check_number(record["top5"], float, 0, 1, f"{name}.top5")
        check_number(record["top1"], float, 0, record["top5"], f"{name}.top1")

    @property
    def activations(self) -> torch.dtype | None:
        return self.train_step.activations

    def rehearse(self) -> None:
        module, shape = self._network(), self.dataset.images.shape[1:]
        if self.config.drop_path_prob:
            module.drop_path_prob = torch.zeros(())
        for size in self.part_sizes(self.train_images):
            outputs = module(torch.zeros(size, *shape), self.train_step.activations)
            heads = outputs if isinstance(outputs, tuple) else (outputs,)
            total = torch.stack([y.sum() for y in heads]).sum()
            torch.autograd.grad(total, list(module.parameters()), materialize_grads=True)
        module.eval()
        with torch.no_grad():
            for size in self.part_sizes(len(self.judge_order)):
                module(torch.zeros(size, *shape))

    def _network(self) -> DerivedNetwork:
        """A new network of the genotype, on PyTorch's default device."""
        config, dataset = self.config, self.dataset
        return network(
            self.genotype,
            dataset.classes,
            config.init_channels,
            config.layers,
            dataset.images.shape[1],
            config.stem,
            self.auxiliary,
            fused=config.fused,
        )

    def announcement(self) -> str:
        config = self.config
        auxiliary = "no auxiliary head"
        if self.auxiliary:
            auxiliary = "with auxiliary head"
        elif config.aux_weight > 0:
            auxiliary = f"no auxiliary head (images of {self.height} x {self.width} are too small for it)"
        return (
            f"{self.dataset.name}: {self.train_images} images to train, {len(self.judge_order)} "
            f"{'to test' if self.judge == 'test' else 'held out of the training images'}; "
            f"{self._size()}, {auxiliary}; "
            f"{config.epochs} epochs of {self.steps_per_epoch} steps"
        )

    def engine(self) -> dict[str, str]:
        config, activations = self.config, self.train_step.activations
        cells = "PyTorch's operations"
        if config.fused:
            dtype = activations or torch.float32
            cells = f"fused, kernels: {kernels_on(self.device, dtype)}"
            if "conv_7x1_1x7" in str(self.genotype):
                cells += "; 1x7 convolutions: ATen"
        return {
            "device": environment(config.device)["device"],
            "cells": cells,
            "precision": precision.in_words(config.amp, activations),
            "learning rate": f"{config.lr}, {config.schedule} to 0"
            + (f", after a warm-up of {config.warmup_epochs} epochs" if config.warmup_epochs else ""),
            "optimizer": f"SGD, momentum {config.momentum}, weight decay {config.weight_decay}, "
            f"gradient norm at most {config.grad_clip}",
            "loss": f"label smoothing {config.label_smoothing}, auxiliary head "
            f"{config.aux_weight if self.auxiliary else 'none'}, drop path {config.drop_path_prob}",
            "step": capture.in_words(self.captured),
        }

    def announce(self) -> None:
        super().announce()
        self.draw("genotype", "genotype.png", partial(plot.genotype_png, self.genotype))

    def _size(self) -> str:
        millions = self.parameters / 1e6, self.multiply_adds / 1e6
        return "{:.3g} M parameters, {:.3g} M multiply-adds an image".format(*millions)

    def _save_network(self, name: str, module: DerivedNetwork, means: dict[str, float]) -> None:
        mean, std = self.statistics
        self.folder.save_tensors(
            name, packed(module, mean, std, self.fingerprint, means, (self.height, self.width))
        )
