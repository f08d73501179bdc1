"""The bilevel search loop (arXiv 1806.09055, algorithm 1)."""

import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from darts_fast import architect, plot
from darts_fast.config import SearchConfig
from darts_fast.data import (
    Batches,
    Dataset,
    channel_statistics,
    check_for_network,
    fingerprint,
    from_tensors,
    load,
    permutation,
    seeded,
)
from darts_fast.errors import InputError, RunError
from darts_fast.fused import kernels_on
from darts_fast.genotype import Genotype, derive
from darts_fast.precision import strict_float32
from darts_fast.runs import CHECKPOINT, RunFolder, Stopped, StopSignal, environment
from darts_fast.space import CANDIDATES, EDGES
from darts_fast.supernet import Supernet

# Streams of random numbers, told apart by the second number of a seed.
SPLIT, TRAIN_ORDER, VALIDATION_ORDER, AUGMENTATION = range(4)

SECOND_ORDER = {
    "exact": architect.second_order_exact,
    "finite-difference": architect.second_order_finite_difference,
}

Batch = tuple[Tensor, Tensor]  # images, labels


class SearchResult(NamedTuple):
    """What a search found: the genotype of the epoch with the best validation accuracy, and the last one."""

    genotype: Genotype
    top1: float  # of that epoch, on the validation half, 0 to 1
    epoch: int  # that epoch, counted from 1
    final_genotype: Genotype
    path: Path  # the run folder


def search(config: SearchConfig, data: tuple[Tensor, Tensor] | None = None) -> SearchResult:
    """Searches for an architecture; writes the run folder `searchs/<name>/`.

    Args:
        config: the settings; what is None takes the data set's default.
        data: the user's own training images (uint8 [N, channels, H, W]) and labels (integers [N]), used
            instead of `config.dataset`.

    Raises:
        InputError: bad settings or data, or the folder exists or cannot be written.
        RunError: the loss is no longer finite.
        Stopped: Ctrl-C or SIGTERM; the run was saved.
    """
    dataset = from_tensors(*data) if data is not None else load(config.dataset, config.data_path)
    check_for_network(dataset)
    check_split(config, dataset)
    config = config.resolved(dataset.name)
    folder = RunFolder.create("searchs", config.name, dataset.name, dataclasses.asdict(config))
    config = dataclasses.replace(config, name=folder.path.name)
    with folder:
        return Search(config, dataset, folder).run()


def resume(path: str | Path, data: tuple[Tensor, Tensor] | None = None) -> SearchResult:
    """Goes on with the search of a run folder from its checkpoint, to the same bits as if it had never
    stopped. `data` as in `search`, where the search was given it. Raises what `search` raises.
    """
    folder, saved, checkpoint = RunFolder.reopen(path)
    with folder:
        then = saved.pop("environment", {})
        try:
            config = SearchConfig(**saved)
        except TypeError as error:
            raise InputError(f"{folder.path} is not the folder of a search ({error})") from error
        if (config.dataset == "tensors") != (data is not None):
            raise InputError(
                f"{folder.path} searched on tensors; resume it with darts_fast.resume(path, data)"
                if data is None
                else f"{folder.path} searched on {config.dataset}; resume it without data"
            )
        dataset = from_tensors(*data) if data is not None else load(config.dataset, config.data_path)
        run = Search(config.resolved(dataset.name), dataset, folder)
        run.load(checkpoint)
        now = environment(run.config.device)
        changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
        if changed:
            folder.log(f"not where it began ({', '.join(changed)}): the bits may differ")
        return run.run()


class SearchStep:
    """One step of the search on a supernet: architecture step, then weight step, with both optimizers.

    Args:
        network: the supernet, of any floating dtype.
        config: learning rates, order, form of the Hessian-vector product.
    """

    def __init__(self, network: Supernet, config: SearchConfig):
        self.network, self.config = network, config
        self.weights, self.alphas = network.weights(), network.alphas()
        self.weight_optimizer = torch.optim.SGD(
            self.weights.values(), config.w_lr, config.w_momentum, weight_decay=config.w_weight_decay
        )
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas.values(), config.alpha_lr, (0.5, 0.999), weight_decay=config.alpha_weight_decay
        )

    def __call__(self, train: Batch, validation: Batch, lr: float) -> Tensor:
        """`lr` is the learning rate of the weights and the paper's xi.

        Returns [loss, top-1 hits, top-5 hits] of the training batch in the weight step, on the device.
        """
        self._architecture_step(train, validation, lr)
        return self._weight_step(*train, lr)

    def state_dict(self) -> dict[str, Any]:
        """Weights, running statistics, alphas, and both optimizers."""
        return {
            "network": self.network.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; raises RuntimeError or ValueError where it does not fit."""
        self.network.load_state_dict(state["network"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])

    def _architecture_step(self, train: Batch, validation: Batch, lr: float) -> None:
        """Adam on the alphas; the paper's xi is the learning rate of the weights."""
        train_loss = partial(self.network.loss, *train)
        validation_loss = partial(self.network.loss, *validation)
        with self.network.frozen_statistics():
            if self.config.order == 1:
                found = architect.first_order(validation_loss, self.weights, self.alphas)
            else:
                second_order = SECOND_ORDER[self.config.hvp]
                virtual_step = architect.VirtualStep(lr, self.config.w_momentum, self.config.w_weight_decay)
                found = second_order(
                    train_loss, validation_loss, self.weights, self.alphas, self._momenta(), virtual_step
                )
        for name, alpha in self.alphas.items():
            alpha.grad = found[name]
        self.alpha_optimizer.step()

    def _weight_step(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """SGD on the weights at the new alphas -> [loss, top-1 hits, top-5 hits], on the device."""
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        for name, gradient in architect.gradients(loss, self.weights).items():
            self.weights[name].grad = gradient
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.w_grad_clip)
        for group in self.weight_optimizer.param_groups:
            group["lr"] = lr
        self.weight_optimizer.step()
        return torch.stack([loss.detach(), *hits(logits.detach(), labels)])

    def _momenta(self) -> architect.Tensors:
        state = self.weight_optimizer.state
        return {name: state[w]["momentum_buffer"] for name, w in self.weights.items() if w in state}


class Search:
    """A search under way: the supernet, both optimizers, and the position in the schedule."""

    def __init__(self, config: SearchConfig, dataset: Dataset, folder: RunFolder):
        self.config, self.dataset, self.folder = config, dataset, folder
        device = torch.device(config.device)

        order = permutation(len(dataset.labels), config.seed, SPLIT)
        split = int(config.train_portion * len(order))
        self.train_half, self.validation_half = order[:split], order[split:]
        self.steps_per_epoch = math.ceil(split / config.batch_size)
        self.augmentation = seeded(device, config.seed, AUGMENTATION)
        self.batches = Batches(
            dataset.images,
            dataset.labels,
            device,
            channel_statistics(dataset.images),
            self.augmentation,
            dataset.crop_padding,
            dataset.flip,
            config.cutout_length,
        )

        with torch.random.fork_rng(devices=[]):  # the caller's generator is left as it was
            torch.manual_seed(config.seed)
            network = Supernet(
                config.init_channels, dataset.classes, config.layers, dataset.images.shape[1], config.fused
            )
        self.network = network.to(device)
        self.take_step = SearchStep(self.network, config)

        self.epoch = self.step = 0  # both finished: `step` steps of epoch number `epoch`, from 0
        self.totals = [0.0, 0, 0, 0]  # of this epoch's steps: loss * images, top-1 hits, top-5 hits, images
        self.best: dict[str, Any] | None = None
        self.unread: list[tuple[Tensor, int]] = []  # [loss, hits, hits] on the device, and the batch's size

    # The loop

    def run(self) -> SearchResult:
        """From where it stands to the end."""
        total = self.config.epochs * self.steps_per_epoch
        with (
            strict_float32(),
            StopSignal() as self.stop,
            tqdm(
                total=total, initial=self._steps_done(), unit="step", disable=None, dynamic_ncols=True
            ) as self.bar,
        ):
            if not (self.folder.path / CHECKPOINT).exists():
                self._announce()
                self._save()
            while self.epoch < self.config.epochs:
                self._train_epoch()
                self._finish_epoch(*self._validate())
        return self._finish()

    def _train_epoch(self) -> None:
        train_order = self._shuffled(self.train_half, TRAIN_ORDER)
        validation_order = self._shuffled(self.validation_half, VALIDATION_ORDER)
        lr = self._learning_rate()
        self.read_at = time.perf_counter()
        while self.step < self.steps_per_epoch:
            start = self.step * self.config.batch_size
            train_indices = train_order[start : start + self.config.batch_size]
            # The two halves are walked together; a shorter validation half is walked again.
            positions = torch.arange(start, start + len(train_indices)) % len(validation_order)
            train = self.batches.cut(train_indices, augment=True)
            validation = self.batches.cut(validation_order[positions], augment=True)
            self.unread.append((self.take_step(train, validation, lr), len(train_indices)))
            self.step += 1
            self.bar.update()
            if self.step % self.config.print_freq == 0 or self.step == self.steps_per_epoch:
                self._read_metrics(lr)
                self._report(lr)
            self._stop_if_asked(lr)

    @torch.no_grad()
    def _validate(self) -> tuple[float, float, float]:
        """Mean loss, top-1 and top-5 accuracy (0 to 1) on the validation half, not augmented."""
        self.network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.batches.device)
        for indices in self.validation_half.split(self.config.batch_size):
            images, labels = self.batches.cut(indices, augment=False)
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, *hits(logits, labels)])
            self._stop_if_asked(self._learning_rate())
        self.network.train()
        loss, top1, top5 = (sums / len(self.validation_half)).tolist()
        return loss, top1, top5

    def _finish_epoch(self, loss: float, top1: float, top5: float) -> None:
        """Records the epoch, keeps its genotype if it is the best so far, saves."""
        epoch, step = self.epoch + 1, self._steps_done()
        if not math.isfinite(loss):
            raise RunError(
                f"the validation loss is {loss} after epoch {epoch} (step {step}); the last good checkpoint "
                f"is {self.folder.path / CHECKPOINT}; try a smaller --w_lr or --w_grad_clip"
            )
        train_loss, train_top1, train_top5 = self._epoch_means()
        self.folder.log(
            f"Epoch {epoch}/{self.config.epochs}  train loss {train_loss:.4f}, top-1 {train_top1:.2%}, "
            f"top-5 {train_top5:.2%}  |  validation loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}"
        )
        genotype = self._genotype()
        self.folder.log(f"genotype = {genotype}")
        self.folder.metrics(epoch=epoch, step=step, val_loss=loss, val_top1=top1, val_top5=top5)
        self.folder.scalars(step, {"val/loss": loss, "val/top1": top1, "val/top5": top5})
        self._record_alphas(step)
        self._draw(genotype, epoch, step)
        if self.best is None or top1 > self.best["top1"]:
            self.best = {"epoch": epoch, "top1": top1, "genotype": genotype.as_json()}
        final = {"epoch": epoch, "top1": top1, "genotype": genotype.as_json()}
        self.folder.write_json("genotype.json", {"best": self.best, "final": final})
        self.epoch, self.step, self.totals = epoch, 0, [0.0, 0, 0, 0]
        self._save()

    def _finish(self) -> SearchResult:
        genotype = Genotype.from_json(self.best["genotype"])
        self.folder.log(
            f"Best validation top-1 {self.best['top1']:.2%}, in epoch {self.best['epoch']}; its genotype:"
        )
        self.folder.log(str(genotype), stamp=False)
        return SearchResult(
            genotype, self.best["top1"], self.best["epoch"], self._genotype(), self.folder.path
        )

    # Where it stands

    def _steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def _learning_rate(self) -> float:
        """Cosine by epoch, as the official code's schedule."""
        low, high = self.config.w_lr_min, self.config.w_lr
        return low + (high - low) * (1 + math.cos(math.pi * self.epoch / self.config.epochs)) / 2

    def _shuffled(self, half: Tensor, stream: int) -> Tensor:
        return half[permutation(len(half), self.config.seed, stream, self.epoch)]

    def _genotype(self) -> Genotype:
        return derive(self.network.alphas_normal, self.network.alphas_reduce, self.config.derive)

    def _epoch_means(self) -> tuple[float, float, float]:
        loss, top1, top5, images = self.totals
        return loss / images, top1 / images, top5 / images

    # Checkpoints

    def _save(self) -> None:
        self.folder.save_checkpoint(
            {
                "epoch": self.epoch,
                "step": self.step,
                "totals": self.totals,
                "best": self.best,
                **self.take_step.state_dict(),
                "augmentation": self.augmentation.get_state(),
                "data": fingerprint(self.dataset),
            }
        )

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the state that `_save` wrote.

        Raises:
            InputError: the checkpoint is of another data set or another network.
        """
        if checkpoint.get("data") != fingerprint(self.dataset):
            raise InputError(
                f"{self.folder.path} was searched on other images than {self.dataset.name} holds now; "
                "restore them, or start a new search"
            )
        try:
            self.take_step.load_state_dict(checkpoint)
            self.augmentation.set_state(checkpoint["augmentation"])
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            self.totals, self.best = checkpoint["totals"], checkpoint["best"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.folder.path / CHECKPOINT} does not fit the settings beside it "
                f"({str(error).splitlines()[0]})"
            ) from error
        self.folder.cut_back(checkpoint["lengths"])
        self.folder.log(
            f"Resumed after {self._steps_done()} steps (epoch {self.epoch + 1}, step {self.step})"
        )

    def _stop_if_asked(self, lr: float) -> None:
        if self.stop.received is None:
            return
        self._read_metrics(lr)
        self._save()
        how = f"python run.py --resume {self.folder.path}"
        if self.dataset.name == "tensors":
            how = f"darts_fast.resume({str(self.folder.path)!r}, data)"
        raise Stopped(
            f"stopped and saved after {self._steps_done()} steps; go on with: {how}",
            self.stop.received,
        )

    # What a person sees

    def _announce(self) -> None:
        """Every setting in force, and what is about to run."""
        config, folder = self.config, self.folder
        settings = dataclasses.asdict(config)
        folder.text("config", 0, markdown_table({**settings, **environment(config.device)}))
        for name, value in settings.items():
            folder.log(f"{name} = {value}")
        form = "first order" if config.order == 1 else f"second order, {config.hvp} Hessian-vector product"
        parameters = sum(w.numel() for w in self.network.weights().values())
        folder.log(
            f"{self.dataset.name}: {len(self.train_half)} images train {parameters:,} weights, "
            f"{len(self.validation_half)} train the alphas; {config.epochs} epochs of {self.steps_per_epoch} "
            f"steps, {form}, float32 on {config.device}; run folder {folder.path}"
        )
        if config.fused:
            folder.log(f"fused kernels: {kernels_on(next(self.network.parameters()))}")

    def _read_metrics(self, lr: float) -> None:
        """Brings the steps since the last call from the device and records them.

        Raises:
            RunError: a loss is not finite.
        """
        if not self.unread:
            return
        rows = torch.stack([values for values, _ in self.unread]).tolist()
        first = self._steps_done() - len(rows)
        for number, (row, (_, images)) in enumerate(zip(rows, self.unread, strict=True), start=first + 1):
            loss, top1, top5 = row[0], row[1] / images, row[2] / images
            if not math.isfinite(loss):
                raise RunError(
                    f"the training loss is {loss} at step {number} (epoch {self.epoch + 1}); the last good "
                    f"checkpoint is {self.folder.path / CHECKPOINT}; try a smaller --w_lr or --w_grad_clip"
                )
            self.folder.metrics(epoch=self.epoch + 1, step=number, lr=lr, loss=loss, top1=top1, top5=top5)
            self.folder.scalars(
                number, {"train/loss": loss, "train/top1": top1, "train/top5": top5, "train/lr": lr}
            )
            for index, value in enumerate((loss * images, row[1], row[2], images)):
                self.totals[index] += value
        self.seconds_per_step = (time.perf_counter() - self.read_at) / len(rows)
        self.images_per_second = sum(images for _, images in self.unread) / (
            self.seconds_per_step * len(rows)
        )
        self.folder.scalars(
            self._steps_done(),
            {
                "time/seconds_per_step": self.seconds_per_step,
                "time/images_per_second": self.images_per_second,
            },
        )
        self.unread.clear()
        self.read_at = time.perf_counter()

    def _report(self, lr: float) -> None:
        """A line of the log: the epoch so far, the rate, the time left."""
        loss, top1, top5 = self._epoch_means()
        left = self.seconds_per_step * (self.config.epochs * self.steps_per_epoch - self._steps_done())
        self.bar.set_postfix_str(f"loss {loss:.3f}, top-1 {top1:.1%}", refresh=False)
        self.folder.log(
            f"Epoch {self.epoch + 1}/{self.config.epochs} step {self.step}/{self.steps_per_epoch}  "
            f"loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}  lr {lr:.4f}  "
            f"{self.seconds_per_step:.3g} s/step, {self.images_per_second:.0f} images/s, "
            f"{duration(left)} left"
        )

    def _record_alphas(self, step: int) -> None:
        values = {}
        for name, alphas in self.network.alphas().items():
            rows = alphas.detach().softmax(dim=-1).tolist()
            for (source, node), row in zip(EDGES, rows, strict=True):
                for candidate, value in zip(CANDIDATES, row, strict=True):
                    values[f"{name}/{plot.edge_name(source, node)}/{candidate}"] = value
        self.folder.scalars(step, values)

    def _draw(self, genotype: Genotype, epoch: int, step: int) -> None:
        """Pictures of the cells and the alphas. A search never fails over one: a line says what failed."""
        try:
            for name, alphas in self.network.alphas().items():
                png = plot.alpha_heat_map(
                    alphas.detach().softmax(dim=-1).cpu().numpy(), f"{name}, epoch {epoch}"
                )
                self.folder.picture(f"{name}/heat_map", step, f"EP{epoch:02d}-{name}.png", png)
            png = plot.render(plot.source(genotype, f"epoch {epoch}"), "png")
            self.folder.picture("genotype", step, f"EP{epoch:02d}-genotype.png", png)
        except InputError:  # the disk's, not the picture's
            raise
        except Exception as error:
            self.folder.log(f"no picture of epoch {epoch}: {error}")


def check_split(config: SearchConfig, dataset: Dataset) -> None:
    """Raises InputError where a half has fewer than two images."""
    total = len(dataset.labels)
    split = int(config.train_portion * total)
    if min(split, total - split) < 2:
        raise InputError(
            f"train_portion {config.train_portion} gives {split} of {total} images to the weights and "
            f"{total - split} to the alphas; each needs at least 2"
        )


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels are the first, and among the first five, of the logits [N, classes]: two scalars."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return ranked[:, 0].sum(), ranked.sum()


def duration(seconds: float) -> str:
    """1h 02m, 3m 20s or 14s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def markdown_table(values: dict[str, Any]) -> str:
    """Two columns, for TensorBoard's text page."""
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in values.items())])
