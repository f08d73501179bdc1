"""What searching and training have in common: epochs of steps, recorded in a run folder, stopped and resumed.

The position in the epoch is state: a loop that is stopped or killed anywhere goes on to the same bits.
"""

import dataclasses
import math
import reprlib
import shutil
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from darts_fast.capture import Captured
from darts_fast.config import RunConfig, SearchConfig, TrainConfig
from darts_fast.data import (
    Batches,
    Dataset,
    ImageFiles,
    Walk,
    fingerprint,
    reseeded,
    restored,
    seeded,
    statistics_of,
)
from darts_fast.datasets import read_data
from darts_fast.distributed import Ranks, joined
from darts_fast.errors import DamagedImage, InputError, RunError, first_line
from darts_fast.evaluation import Metrics, evaluated
from darts_fast.fused import compile_kernels, counted, missing_on
from darts_fast.precision import strict_float32
from darts_fast.process import freed_memory_kept, nothing_old_collected, within_quota
from darts_fast.profiling import FOLDER, WARM_UP, Profiler
from darts_fast.report import write_report
from darts_fast.runs import (
    CHECKPOINT,
    CONFIG,
    RunFolder,
    Stopped,
    StopSignal,
    differences,
    environment,
    writing,
)
from darts_fast.state import check_keys, check_number, check_state, copy_state, named_tensors
from darts_fast.stream import Stream
from darts_fast.tables import markdown_table

MOVABLE = (
    "name",
    "device",
    "data_path",
    "workers",
    "fused",
    "no_graph",
    "profile",
)  # settings that a resumed run may change

RUNNING = ("running_mean", "running_var")  # the last names of batch norm's running statistics
RANKS, STATISTICS = "ranks", "statistics"  # keys of a checkpoint of several ranks: what each of them had

# Settings that older checkpoints lack, with the values that those runs had
LATER_SETTINGS = {
    "space": "darts",
    "partial_channels": 1,
    "projection_epochs": 5,
    "auxiliary_skip": 0.0,
    "perturb": None,
    "perturb_epsilon": 0.3,
    "stop_at_skips": None,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "eigenvalue": False,
    "stop_at_eigenvalue": None,
    "beta_decay": 0.0,
    "alpha_warmup": 0,
    "macs_weight": 0.0,
    "macs_target": None,
    "train_portion": 1.0,
    "schedule": "cosine",
    "warmup_epochs": 0,
    "stream": False,
    "color_jitter": 0.0,
    "amp": False,
    "amp_dtype": None,
}

# What is measured after an epoch: its key in metrics.jsonl and TensorBoard, and its name in the log
MEASURED = {"val": "validation", "test": "test", "ema": "moving average:"}


class Loop(ABC):
    """Epochs of steps on a data set, each epoch followed by an evaluation.

    A subclass builds `network`, the optimizers and `take`, and says what a step is.
    """

    config: RunConfig
    folder: RunFolder  # set before anything is run or loaded
    network: nn.Module
    take: Captured  # a step, from images as they are stored
    function: str  # the function of `darts_fast` that resumes it
    remedy: str  # what to try where a number is not finite
    profiler: Profiler | None = None  # until its report is written

    def __init__(
        self, config: RunConfig, dataset: Dataset, ranks: Ranks, train_images: int, *augmentation_seed: int
    ):
        """Puts the data on the device.

        Args:
            ranks: the processes that compute the run together.
            train_images: how many images an epoch trains on.
            augmentation_seed: of the generator that augments the batches.

        Raises:
            InputError: the data do not fit the memory, the machine lacks what the kernels need, or the ranks
                cannot share the batches.
        """
        self.config, self.dataset, self.ranks = config, dataset, ranks
        self.device = torch.device(config.device)
        lacking = missing_on(self.device) if config.fused else None
        if lacking:
            raise InputError(
                f"--fused on a GPU needs {lacking}, which this machine lacks: Triton compiles with it what "
                "launches the kernels; install it, or run without --fused and --amp"
            )
        check_shares(config.batch_size, train_images, ranks.size)
        self.train_images = train_images
        self.steps_per_epoch = math.ceil(train_images / config.batch_size)
        # Whether a step is replayed as one CUDA graph.
        self.captured = config.fused and self.device.type == "cuda" and not config.no_graph
        self.augmentation_seed = self.of_this_rank(*augmentation_seed)
        self.augmentation = seeded(self.device, *self.augmentation_seed)
        self.statistics = statistics_of(dataset)
        self.fingerprint = fingerprint(dataset)
        with refusing_what_does_not_fit(f"{dataset.name} as one tensor", self.device):
            self.batches = self._batches(dataset.images, dataset.labels)
        self.walks: list[Walk] = []  # of this epoch

        self.epoch = self.step = 0  # both finished: `step` steps of epoch number `epoch`, from 0
        self.totals = [0.0] * 4  # of this epoch's steps: loss * images, correct top-1, correct top-5, images
        # What is kept of an epoch: of the best accuracy so far, and of the last one, once it has ended.
        self.best: dict[str, Any] | None = None
        self.final: dict[str, Any] | None = None
        self.reseeded = False  # generators were, because they were saved on another kind of device
        self.began_with_ranks = ranks.size  # the checkpoint that was loaded did
        self.evaluation_seconds = 0.0  # of the last epoch's evaluation, for the time left
        # The first step of a process is slow: whether it was taken, whether it is in `unread` (1 or 0), its
        # seconds.
        self.warm, self.cold_steps, self.cold_seconds = False, 0, 0.0
        # Of the steps since the last line of the log: [loss, correct top-1, correct top-5] on the device; the
        # batch's size.
        self.unread: list[tuple[Tensor, int]] = []

    @classmethod
    def begin(cls, config: RunConfig, data: tuple[Tensor, ...] | None, parent: str | Path | None) -> Any:
        """A new run to its end, in a new folder below `parent` (None: where such runs are). `data`: tensors
        of the user's own, see `datasets.read_data`."""
        with joined() as ranks:
            dataset = ranks.in_turn(lambda: read_data(config, data))
            with ranks.together():  # first: what cannot be made leaves no folder behind
                config = dataclasses.replace(config, stream=dataset.streamed is not None)
                run = cls._on(ranks.device(config.device), config, dataset, ranks)
            with RunFolder.create(run.config, run.dataset.name, parent, ranks) as run.folder:
                run.config = dataclasses.replace(run.config, name=run.folder.path.name)
                return run.run()

    @classmethod
    def go_on(
        cls,
        settings: type[SearchConfig] | type[TrainConfig],
        path: str | Path,
        data: tuple[Tensor, ...] | None,
        device: str | None,
    ) -> Any:
        """The run of a folder from its checkpoint to its end, on `device` if given."""
        with joined() as ranks:
            folder, config, checkpoint = RunFolder.reopen(path, settings, ranks)
            with folder:
                with ranks.together():
                    for name, key in cls.files(config) if ranks.rank == 0 else ():
                        if checkpoint.get(key) is not None and not (folder.path / name).exists():
                            missing = folder.path / name
                            raise InputError(f"{missing} is missing; put it back, or start a new run")
                dataset = ranks.in_turn(lambda: read_data(config, data, resumed=path))
                with ranks.together():
                    device = ranks.device(device or config.device, resumed=device is None)
                    run = cls._on(device, config, dataset, ranks)
                    run.folder = folder
                    run.load(checkpoint)
                return run.run()

    @classmethod
    def _on(cls, device: str | None, config: RunConfig, dataset: Dataset, ranks: Ranks) -> Any:
        make: Callable[[RunConfig, Dataset, Ranks], Loop] = cls  # type: ignore[assignment]  # a subclass's
        return make(config if device is None else dataclasses.replace(config, device=device), dataset, ranks)

    # What a subclass says

    @staticmethod
    def files(config: Any) -> Sequence[tuple[str, str]]:
        """Files of the run folder that a resumed run needs: their names, each with the record ("best" or
        "final") of the checkpoint that is saved after the file."""
        return ()

    @property
    def epochs(self) -> int:
        """The number of epochs of the whole run."""
        return self.config.epochs

    @abstractmethod
    def begin_epoch(self) -> None:
        """Anything that depends on the epoch alone: data order, drop-path probability."""

    @abstractmethod
    def take_step(self, lr: float) -> tuple[Tensor, int]:
        """Takes step number `self.step` of the epoch. Returns [loss, correct top-1, correct top-5] on the
        device, and the number of images."""

    @abstractmethod
    def evaluate(self) -> dict[str, Metrics]:
        """After an epoch, see `measured`."""

    @abstractmethod
    def finish_epoch(self, found: dict[str, Metrics]) -> None:
        """Records what `evaluate` gave, and calls `keep`."""

    def ends_early(self) -> bool:
        """Whether no other epoch begins, though there are some left. It depends on what a checkpoint holds
        alone, so that a resumed run decides the same."""
        return False

    @abstractmethod
    def result(self) -> Any:
        """Called after the last epoch: logs the closing lines, and returns what the caller gets."""

    @abstractmethod
    def learning_rate(self) -> float:
        """The learning rate of the weights in this epoch."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Every tensor that changes in a run, in nested dictionaries: the tensors themselves, no copies."""

    @abstractmethod
    def check_record(self, record: Any, name: str) -> None:
        """Raises ValueError where a checkpoint's `best` or `final` is not what `keep` was given, but for the
        number of its epoch."""

    @property
    @abstractmethod
    def activations(self) -> torch.dtype | None:
        """The 2-byte type of the cells' activations; None: float32."""

    @abstractmethod
    def rehearse(self) -> None:
        """Runs the passes of a step and of an evaluation, with batches of each size, on tensors without data:
        what they launch is compiled ahead. Called with the meta device as PyTorch's default device."""

    @abstractmethod
    def announcement(self) -> str:
        """One line on what is about to run."""

    @abstractmethod
    def engine(self) -> dict[str, str]:
        """What computes a step, and how, for the log: lines by their titles."""

    # The loop

    def run(self) -> Any:
        """From where it stands to the end."""
        with (
            strict_float32(),
            within_quota() as fewer_threads,
            nothing_old_collected(),
            freed_memory_kept(),
            StopSignal() as self.stop,
            tqdm(
                total=self.epochs * self.steps_per_epoch,
                initial=self.steps_done,
                unit="step",
                disable=None if self.ranks.rank == 0 else True,
                dynamic_ncols=True,
            ) as self.bar,
            self._failures_in_words(),
        ):
            self._check_same_data()
            if fewer_threads:
                self.folder.log(fewer_threads)
            if not self._is_there(CHECKPOINT):
                self.announce()
                self._save()
            else:
                self._compile_kernels()
            if self.config.profile and not self._is_there(FOLDER):
                trial = self.take.trial if self.captured else None
                self.profiler = Profiler(self.config.profile, self.device, trial)
            while self.epoch < self.epochs and not self.ends_early():
                self._train_epoch()
                self._average_statistics()
                self._compare_ranks()
                started = time.perf_counter()
                found = self.evaluate()
                self.evaluation_seconds = time.perf_counter() - started
                self._finish_epoch(found)
            self.bar.total = self.steps_done
            self.bar.refresh()
            self._write_profile()
        return self.result()

    @contextmanager
    def _failures_in_words(self) -> Iterator[None]:
        """Within, whatever ends the run ends its workers and its recording, too. Damaged images, workers that
        were killed and too little memory are sentences that say how the run goes on."""
        try:
            yield
        except DamagedImage as error:  # found before the step, or in an evaluation: nothing is half done
            self._read_metrics()
            self._save()
            raise DamagedImage(
                f"{error}; the run was saved after {self.steps_done} steps: put an intact image in its "
                f"place and go on with {self.folder.path} by --resume"
            ) from error
        except RuntimeError as error:
            if is_lost_worker(error):
                raise RunError(
                    f"a process that decodes images has ended after step {self.steps_done} "
                    f"({first_line(error)}); go on from the last checkpoint by --resume"
                ) from error
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"{self.device} ran out of memory after step {self.steps_done}; try a smaller "
                f"--batch_size, --init_channels or --layers ({first_line(error)})"
            ) from error
        finally:
            self._end_walks()
            if self.profiler is not None:
                self.profiler.stop()

    def buffers(self, size: int) -> tuple[Tensor, Tensor]:
        """For a captured step: zeros of so many images (uint8) and labels, on the device."""
        images, labels = self.dataset.images, self.dataset.labels
        return (
            torch.zeros(size, *images.shape[1:], dtype=images.dtype, device=self.device),
            torch.zeros(size, dtype=labels.dtype, device=self.device),
        )

    def traffic(self) -> str:
        """The launches and bytes of a step, in words. The step is taken, and undone."""
        dtype = self.activations or torch.float32

        def second(step: Callable[[], object]) -> Any:
            step()  # which makes what is made once
            return counted(step, self.device, dtype)

        found = self.take.trial(second)
        return f"{found.launches:,} launches, {found.bytes / 1e9:.3g} GB read and written"

    def _compile_kernels(self) -> None:
        """Compiles all Triton kernels of the run ahead of the first launch; on other devices nothing."""
        if self.config.fused and self.device.type == "cuda":
            # Ranks do not compile side by side, so within it they cannot agree on stopping.
            each = self._stop_if_asked if self.ranks.size == 1 else lambda: None
            self.ranks.in_turn(lambda: compile_kernels(self.rehearse, self.device, self.folder.log, each))

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def keep(self, record: dict[str, Any], eligible: bool = True) -> None:
        """Makes the record of this epoch `best` if its accuracy is the highest so far, and `final` if it is
        the last one. A record is plain values, among them `epoch`, from 1, and `top1`, which is compared. The
        best is one of the eligible epochs, if there is any."""
        if self.best is None or (eligible and record["top1"] > self.best["top1"]):
            self.best = record
        if record["epoch"] == self.epochs:
            self.final = record

    def generators(self) -> dict[str, tuple[torch.Generator, tuple[int, ...]]]:
        """All that random numbers are drawn from, by their names in a checkpoint, with the numbers that seed
        them."""
        return {"augmentation": (self.augmentation, self.augmentation_seed)}

    def common_generators(self) -> tuple[str, ...]:
        """Names of the generators from which all ranks draw the same numbers."""
        return ()

    def walk(self, order: Tensor, stream: int) -> Walk:
        """This rank's part of every batch of this epoch, from this step on: images (uint8) and labels, on the
        device. `order`: of the epoch's images, drawn from `stream` (the second number of a seed)."""
        parts = self.ranks.parts(len(order), self.config.batch_size)[self.step :]
        found = self.batches.picked(order, parts, (self.config.seed, stream, self.epoch))
        self.walks.append(found)
        return found

    def _end_walks(self) -> None:
        """Closes the batches of this epoch, also before their end, which ends their workers."""
        for walk in self.walks:
            walk.close()
        self.walks = []

    @property
    def batch_images(self) -> int:
        """How many images the training batch of this step has, of all ranks."""
        return min(self.config.batch_size, self.train_images - self.step * self.config.batch_size)

    def part_sizes(self, images: int) -> list[int]:
        """How many images of any batch a rank may have, where so many are cut into batches."""
        sizes = {s for n in batch_sizes(images, self.config.batch_size) for s in self.ranks.part_sizes(n)}
        return sorted(sizes - {0}, reverse=True)

    def of_this_rank(self, *seed: int) -> tuple[int, ...]:
        """The numbers that seed a generator of which every rank has its own."""
        return (*seed, self.ranks.rank) if self.ranks.size > 1 else seed

    def _is_there(self, name: str) -> bool:
        """Whether a file of this name is in the run folder, which only rank 0 may see."""
        return bool(self.ranks.of_first((self.folder.path / name).exists()))

    def _check_same_data(self) -> None:
        """Raises InputError where ranks have read different images."""
        first = int(self.ranks.of_first(self.fingerprint))
        with self.ranks.together():
            if first != self.fingerprint:
                raise InputError(
                    f"{self.dataset.name} holds other images here than for rank 0; make them equal"
                )

    def _statistics(self) -> list[Tensor]:
        """The running statistics of all batch norms, in which the ranks differ within an epoch."""
        named = named_tensors(self.state())
        return [tensor for name, tensor in named if name.rpartition(".")[2] in RUNNING]

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """After an epoch: the mean over the ranks, on all of them."""
        if self.ranks.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in self._statistics()])
        first, *others = self.ranks.gathered(flat)
        if all(torch.equal(first, other) for other in others):
            return  # They are the mean: the run was stopped in the evaluation. (x + x + x) / 3 need not be x.
        self._set_statistics(self.ranks.sum(flat) / self.ranks.size)

    def _set_statistics(self, flat: Tensor) -> None:
        own = self._statistics()
        for tensor, part in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def _compare_ranks(self) -> None:
        """Raises RunError where the state of a rank has other bits than rank 0's: its steps were others."""
        if self.ranks.size == 1:
            return
        named = dict(named_tensors(self.state()))
        arrays: list[Any] = [tensor.detach().cpu().contiguous().numpy() for tensor in named.values()]
        sums = torch.tensor([zlib.crc32(array) for array in arrays])
        first, *others = self.ranks.gathered(sums)
        for rank, found in enumerate(others, start=1):
            for name, same in zip(named, (found == first).tolist(), strict=True):
                if not same:
                    raise RunError(
                        f"{name} of rank {rank} differs from rank 0's after epoch {self.epoch + 1}, though "
                        "both took the same steps: a device or a link is faulty; the last good checkpoint is "
                        f"{self.folder.path / CHECKPOINT}"
                    )

    def _train_epoch(self) -> None:
        self._end_walks()
        self.begin_epoch()
        lr = self.learning_rate()
        self._start_clock()
        while self.step < self.steps_per_epoch:
            with self.profiler.step() if self.profiler else nullcontext():
                self.unread.append(self.take_step(lr))
            self.step += 1
            if not self.warm:  # the first step of a process makes what later ones find
                self.warm, self.cold_steps = True, 1
                self.cold_seconds = time.perf_counter() - self.read_at
                self.batches.waited = 0.0
            if self.profiler and self.profiler.recorded == self.config.profile:
                self._write_profile()
            self.bar.update()
            if self.step % self.config.print_freq == 0 or self.step == self.steps_per_epoch:
                self._read_metrics()
                self._report()
            self._stop_if_asked()

    def measured(
        self, networks: Mapping[str, nn.Module], batches: Batches, order: Tensor, training: bool = False
    ) -> dict[str, Metrics]:
        """`evaluated` of each, by its name; the bar shows how far it is, a signal stops it between two
        batches."""

        def after_batch(images: int) -> None:
            self.bar.set_postfix_str(f"tested {images}/{len(order)}", refresh=False)
            self.bar.update(0)
            self._stop_if_asked()

        return {
            name: evaluated(
                network, batches, order, self.config.batch_size, after_batch, training, self.ranks
            )
            for name, network in networks.items()
        }

    def _write_profile(self) -> None:
        """The report of the steps that were recorded, if it is not written yet."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        if not profiler.recorded:
            self.folder.log(f"no profile: the run has no step after the first {WARM_UP}")
            return
        if self.ranks.rank:  # it was recorded so that the ranks take the same steps
            return
        path = self.folder.path / FOLDER
        partial = path.with_name(f"{FOLDER}.partial")  # what is killed leaves this one, and no `path`
        with writing(path):
            shutil.rmtree(partial, ignore_errors=True)
            sentence = write_report(profiler, partial, dataclasses.asdict(self.config), self.captured)
            partial.rename(path)
        self.folder.log(f"Profile of {profiler.recorded} steps: {path / 'report.html'}; {sentence}")

    def _finish_epoch(self, found: dict[str, Metrics]) -> None:
        for loss, _, _ in found.values():
            if not math.isfinite(loss):
                raise self._not_finite(f"the loss after the epoch is {loss}", self.steps_done)
        self.finish_epoch(found)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, [0.0] * 4
        self._save()

    def _batches(self, images: Tensor | ImageFiles, labels: Tensor) -> Batches:
        if isinstance(images, ImageFiles):
            config, statistics = self.config, self.statistics
            return Stream(
                images, labels, self.device, statistics, self.augmentation, config.cutout_length,
                config.color_jitter, config.workers, self.ranks,
            )  # fmt: skip
        return Batches(
            images,
            labels,
            self.device,
            self.statistics,
            self.augmentation,
            self.dataset.crop_padding,
            self.dataset.flip,
            self.config.cutout_length,
        )

    def _not_finite(self, what: str, step: int) -> RunError:
        return RunError(
            f"{what} at step {step} (epoch {self.epoch + 1}); the last good checkpoint is "
            f"{self.folder.path / CHECKPOINT}; try {self.remedy} in a new run"
        )

    # Checkpoints

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the state that `_save` wrote, once all of it is found to be such a state.

        Raises:
            InputError: the checkpoint is of another data set or another network, or no run writes such a one.
        """
        own = self.state()
        checkpoint = as_saved_now(checkpoint, own, self._fixed_settings())
        of_ranks = checkpoint.pop(RANKS, None)
        for one, other in ((own, checkpoint), (checkpoint, own)):
            if "loss_scale" not in other:  # begun, or resumed, in float32
                one.pop("loss_scale", None)
        try:
            check_keys(checkpoint, [*self._position(), *own, *self.generators(), "lengths"], "it")
            self._check_origin(checkpoint)
            for name, tensors in own.items():
                check_state(checkpoint[name], tensors, name)
            self._check_position(checkpoint)
            if of_ranks is not None:
                self._check_ranks(of_ranks, checkpoint)
            self.began_with_ranks = 1 if of_ranks is None else len(of_ranks)
            self._restore_generators(
                checkpoint if of_ranks is None else of_ranks[self.ranks.rank % len(of_ranks)],
                (checkpoint["epoch"], checkpoint["step"]),
            )
        except InputError:
            raise
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.folder.path / CHECKPOINT} does not fit the settings beside it ({first_line(error)}); "
                "put the run's own back, or start a new run"
            ) from error
        copy_state(own, checkpoint)
        if of_ranks is not None:
            self._load_statistics([saved[STATISTICS] for saved in of_ranks])
        self.epoch, self.step, self.totals = (checkpoint[name] for name in ("epoch", "step", "totals"))
        self.best, self.final = checkpoint["best"], checkpoint["final"]
        self.folder.cut_back(checkpoint["lengths"])
        self._log_resumed()

    def _restore_generators(self, saved: dict[str, Any], position: tuple[int, int]) -> None:
        """From this rank's saved states, by name. What cannot be restored begins anew, from the seed and the
        position (epoch, step)."""
        for name, (generator, seed) in self.generators().items():
            if self.began_with_ranks != self.ranks.size and name not in self.common_generators():
                reseeded(generator, *seed, *position)
            else:
                self.reseeded |= not restored(generator, saved[name], *seed, *position)

    def _log_resumed(self) -> None:
        """Where the run goes on, and why its bits may differ from those of a run that never stopped."""
        self.folder.log(f"Resumed after {self.steps_done} steps (epoch {self.epoch + 1}, step {self.step})")
        changed = differences(self.folder.environment, environment(self.config.device))
        if changed:
            self.folder.log(f"not where it began ({changed}): the bits may differ")
        if self.began_with_ranks != self.ranks.size:
            self.folder.log(
                f"processes: {self.began_with_ranks} -> {self.ranks.size}; the bits differ from those of a "
                "run that never stopped, because each process has its own batch norm and random numbers"
            )
        if self.reseeded:
            self.folder.log(
                f"the checkpoint's random numbers are another kind of device's than {self.device}'s: what is "
                f"drawn from here on depends on seed {self.config.seed}, epoch {self.epoch + 1} and step "
                f"{self.step} alone"
            )

    def _fixed_settings(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name not in MOVABLE}

    def _position(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, generators and lengths of files."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.totals,
            "best": self.best,
            "final": self.final,
            "data": self.fingerprint,
            "settings": self._fixed_settings(),
        }

    def _check_origin(self, checkpoint: dict[str, Any]) -> None:
        """Raises InputError or ValueError where the run began with other images or settings."""
        check_number(checkpoint["data"], int, 0, 2**32 - 1, "data")
        if checkpoint["data"] != self.fingerprint:
            raise InputError(
                f"{self.folder.path} began with other images than {self.dataset.name} holds now; "
                "restore them, or start a new run"
            )
        began_with, settings = checkpoint["settings"], self._fixed_settings()
        check_keys(began_with, settings, "settings")
        for name, value in settings.items():
            if type(began_with[name]) is not type(value) or began_with[name] != value:
                raise InputError(
                    f"{self.folder.path / CONFIG} says {name} = {value}, but the run began with "
                    f"{reprlib.repr(began_with[name])}; put that back, or start a new run"
                )

    def _check_position(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where no run has such generators, such a position or such records."""
        for name in self.generators():
            state = checkpoint[name]
            if type(state) is not Tensor or state.dtype != torch.uint8 or state.ndim != 1:
                raise ValueError(f"{name} is no state of a generator")
        epoch, step, totals = (checkpoint[name] for name in ("epoch", "step", "totals"))
        check_number(epoch, int, 0, self.epochs, "epoch")
        ended = epoch == self.epochs
        check_number(step, int, 0, 0 if ended else self.steps_per_epoch, "step")
        if type(totals) is not list or len(totals) != 4:
            raise ValueError("totals are not four numbers")
        images = min(step * self.config.batch_size, self.train_images)
        check_number(totals[0], float, -math.inf, math.inf, "totals, loss")
        check_number(totals[3], float, images, images, "totals, images")
        check_number(totals[2], float, 0, images, "totals, top-5")
        check_number(totals[1], float, 0, totals[2], "totals, top-1")
        # The first epoch is the best as soon as it has ended.
        for name, there, first in (("best", epoch > 0, 1), ("final", ended, epoch)):
            record = checkpoint[name]
            if (record is not None) != there:
                raise ValueError(f"{name} is {'missing' if there else 'there'} after {epoch} epochs")
            if there:
                self.check_record(record, name)
                check_number(record["epoch"], int, first, epoch, f"{name}.epoch")

    def _check_ranks(self, found: Any, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError unless it is a list of what `_save` keeps of each of several ranks."""
        if type(found) is not list or len(found) < 2:
            raise ValueError(f"{RANKS} is no list of several")
        statistics = {STATISTICS: torch.cat([t.flatten() for t in self._statistics()])}
        for rank, saved in enumerate(found):
            name = f"{RANKS}.{rank}"
            check_keys(saved, [*statistics, *self.generators()], name)
            check_state({STATISTICS: saved[STATISTICS]}, statistics, name)
            for drawn in self.generators():
                own = checkpoint[drawn]
                if type(saved[drawn]) is not Tensor or (saved[drawn].dtype, saved[drawn].shape) != (
                    own.dtype,
                    own.shape,
                ):
                    raise ValueError(f"{name}.{drawn} is no state of a generator")

    @torch.no_grad()
    def _load_statistics(self, of_ranks: list[Tensor]) -> None:
        """This rank's own; with another number of ranks than saved them, their mean."""
        same = len(of_ranks) == self.ranks.size
        self._set_statistics(of_ranks[self.ranks.rank] if same else torch.stack(of_ranks).mean(dim=0))

    def _save(self) -> None:
        """Raises RunError, and keeps the checkpoint before, where a tensor is not finite."""
        state = self.state()
        with self.ranks.together():
            for name, tensor in named_tensors(state):
                if not torch.isfinite(tensor).all():
                    raise self._not_finite(f"{name} is not finite", self.steps_done)
        drawn = {name: generator.get_state() for name, (generator, _) in self.generators().items()}
        of_ranks = {}
        if self.ranks.size > 1:
            # What differs from rank to rank. (`state` and `drawn` have rank 0's.)
            own = drawn | {STATISTICS: torch.cat([t.flatten() for t in self._statistics()])}
            gathered = {name: self.ranks.gathered(tensor) for name, tensor in own.items()}
            each = zip(*gathered.values(), strict=True)
            of_ranks = {RANKS: [dict(zip(gathered, tensors, strict=True)) for tensors in each]}
        with self.ranks.together():
            self.folder.save_checkpoint({**self._position(), **state, **drawn, **of_ranks})

    def _stop_if_asked(self) -> None:
        """Collective: a signal to one rank stops all, after the same step."""
        received = self.ranks.largest(self.stop.received or 0)
        if not received:
            return
        self._read_metrics()
        self._save()
        raise Stopped(
            f"after {self.steps_done} steps",
            self.folder.path,
            f"darts_fast.{self.function}",
            self.dataset.name == "tensors",
            received,
        )

    # What a person sees

    def announce(self) -> None:
        """What is about to run, and in a block: what computes a step, and how. Every setting in force is in
        the log, those that differ from the defaults are shown, too."""
        settings = dataclasses.asdict(self.config)
        values = settings | environment(self.config.device)
        self.folder.text("config", 0, "\n".join(markdown_table(("setting", "value"), values.items())))
        default = dataclasses.asdict(type(self.config)().resolved(self.dataset.name))
        given = [
            f"{name} = {value}" if len(str(value)) <= 60 else f"{name} = {str(value)[:57]}..."
            for name, value in settings.items()
            if value != default[name] and name not in ("name", "genotype")
        ]
        for name, value in settings.items():
            self.folder.log(f"{name} = {value}", shown=False)
        what = ", ".join(given) or "none"
        self.folder.log(f"settings other than the defaults: {what}; all are in {CONFIG}")
        self.folder.log(f"{self.announcement()}; run folder {self.folder.path}")
        lines = self.engine()
        if self.dataset.streamed is not None:
            lines["images"] = self._streamed()
        if self.config.fused:
            self._compile_kernels()
            lines["traffic of a step"] = self.traffic()
        for what, value in lines.items():
            self.folder.log(f"    {what}: {value}", stamp=False)

    def _streamed(self) -> str:
        """That images are streamed, why and how, for the log."""
        workers, jitter = self.config.workers, self.config.color_jitter
        who = f"workers ({workers} for each stream)" if workers else "this process"
        changed = f", color jitter {jitter}" if jitter else ""
        return (
            f"streamed from their files ({self.dataset.streamed}), decoded by {who}; "
            f"random resized crop, flip{changed}"
        )

    def _start_clock(self) -> None:
        self.read_at, self.batches.waited = time.perf_counter(), 0.0

    def _read_metrics(self) -> None:
        """Brings the steps since the last call from the device and records them.

        Raises:
            RunError: a loss is not finite.
        """
        if not self.unread:
            return
        lr = self.learning_rate()
        stacked = torch.stack([values for values, _ in self.unread])
        if self.ranks.size > 1:
            # What is correct on all ranks, and the mean of their losses weighted by their shares
            shares = [self.ranks.share_of(images) for _, images in self.unread]
            stacked[:, 0] *= torch.tensor(shares, dtype=stacked.dtype, device=stacked.device)
        rows = self.ranks.sum(stacked).tolist()
        first = self.steps_done - len(rows)
        for number, (row, (_, images)) in enumerate(zip(rows, self.unread, strict=True), start=first + 1):
            loss, top1, top5 = row[0], row[1] / images, row[2] / images
            if not math.isfinite(loss):
                raise self._not_finite(f"the training loss is {loss}", number)
            self.folder.metrics(epoch=self.epoch + 1, step=number, lr=lr, loss=loss, top1=top1, top5=top5)
            self.folder.scalars(
                number, {"train/loss": loss, "train/top1": top1, "train/top5": top5, "train/lr": lr}
            )
            for index, value in enumerate((loss * images, row[1], row[2], images)):
                self.totals[index] += value
        # The rate leaves out the slow first step, unless there is no other.
        timed, seconds = self.unread[self.cold_steps :], time.perf_counter() - self.read_at
        if self.cold_steps and timed:
            seconds -= self.cold_seconds
        timed = timed or self.unread
        self.seconds_per_step = seconds / len(timed)
        self.images_per_second = sum(images for _, images in timed) / seconds
        self.share_waited = min(1.0, self.batches.waited / seconds)
        self.cold_steps = 0
        self.folder.scalars(
            self.steps_done,
            {
                "x_time/seconds_per_step": self.seconds_per_step,
                "x_time/images_per_second": self.images_per_second,
                **({"x_time/waiting_for_images": self.share_waited} if self.dataset.streamed else {}),
            },
        )
        self.unread.clear()
        self._start_clock()

    def epoch_means(self) -> Metrics:
        """Of this epoch's steps so far, on the augmented images."""
        loss, top1, top5, images = self.totals
        return loss / images, top1 / images, top5 / images

    def _report(self) -> None:
        """A line of the log: the epoch so far, the rate, the time left."""
        loss, top1, top5 = self.epoch_means()
        left = self.seconds_per_step * (self.epochs * self.steps_per_epoch - self.steps_done)
        left += self.evaluation_seconds * (self.epochs - self.epoch)
        waiting = f"{self.share_waited:.0%} waiting for images, " if self.dataset.streamed else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}, top-1 {top1:.1%}", refresh=False)
        self.folder.log(
            f"Epoch {self.epoch + 1}/{self.epochs} step {self.step}/{self.steps_per_epoch}  "
            f"loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}  lr {self.learning_rate():.4f}  "
            f"{self.seconds_per_step:.3g} s/step, {self.images_per_second:.0f} images/s, {waiting}"
            f"{duration(left)} left"
        )

    def draw(self, tag: str, file_name: str, make: Callable[[], bytes]) -> None:
        """A PNG for plots/ and TensorBoard. A run never fails over one: the log says what failed."""
        if self.ranks.rank:
            return
        try:
            self.folder.picture(tag, self.steps_done, file_name, make())
        except InputError:  # the disk's, not the picture's
            raise
        except Exception as error:
            self.folder.log(f"no picture {file_name}: {error}")

    def record_evaluation(self, found: dict[str, Metrics]) -> None:
        """The epoch's line of the log, its scalars and its line of metrics.jsonl; `found` is by a key of
        MEASURED."""
        epoch = self.epoch + 1
        parts = [("train", self.epoch_means()), *((MEASURED[name], means) for name, means in found.items())]
        texts = [
            f"{words} loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}"
            for words, (loss, top1, top5) in parts
        ]
        self.folder.log(f"Epoch {epoch}/{self.epochs}  " + "  |  ".join(texts))
        values = {
            (name, what): value
            for name, means in found.items()
            for what, value in zip(("loss", "top1", "top5"), means, strict=True)
        }
        self.folder.metrics(
            epoch=epoch, step=self.steps_done, **{f"{name}_{what}": v for (name, what), v in values.items()}
        )
        self.folder.scalars(self.steps_done, {f"{name}/{what}": v for (name, what), v in values.items()})


def with_later_settings(found: Any, settings: dict[str, Any]) -> Any:
    """The settings that a run or a protocol of before has saved, with those of `settings` that came later."""
    if not isinstance(found, dict):
        return found
    return {name: value for name, value in LATER_SETTINGS.items() if name in settings} | found


def as_saved_now(checkpoint: dict[str, Any], own: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in today's form. Once the optimizers' states stood in it with their settings, and without
    moments before the first step; a search had no `final`, and some settings were not there."""
    found = {"final": None, **checkpoint}
    if "settings" in found:
        found["settings"] = with_later_settings(found["settings"], settings)
    begins = (found.get("epoch"), found.get("step")) == (0, 0)
    for name in own:
        if isinstance(found.get(name), dict) and found[name].keys() == {"state", "param_groups"}:
            moments = found[name]["state"]
            found[name] = own[name] if begins and moments == {} else moments
    return found


def check_shares(batch_size: int, images: int, ranks: int) -> None:
    """Raises InputError where batches of an epoch of so many images cannot be shared among so many ranks."""
    if batch_size % ranks:
        raise InputError(
            f"batch_size is that of all {ranks} processes together and must be divisible by {ranks}, not be "
            f"{batch_size}"
        )
    last = min(batch_sizes(images, batch_size))
    if last < ranks:
        raise InputError(
            f"{images} images in batches of {batch_size} end in a batch of {last}, which {ranks} processes "
            "cannot share; choose another --batch_size"
        )


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """Those of the batches that so many images are cut into, each once."""
    return sorted({min(images, batch_size), images % batch_size} - {0}, reverse=True)


def is_out_of_memory(error: BaseException | None) -> bool:
    """CUDA has an exception of its own; on the host it is told by its text."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_lost_worker(error: BaseException | None) -> bool:
    """Whether a process that decodes images was killed; PyTorch tells it by its text."""
    return str(error).startswith("DataLoader worker")


@contextmanager
def refusing_what_does_not_fit(what: str, device: torch.device) -> Iterator[None]:
    """Turns a failed allocation within into an InputError about `what`."""
    try:
        yield
    except RuntimeError as error:  # torch's word for no memory, and for sizes beyond any
        raise InputError(
            f"{what} cannot be made on {device} ({first_line(error)}); choose a smaller one"
        ) from error


def cosine(high: float, low: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch, counted from 0, on the cosine schedule (arXiv 1608.03983)."""
    return low + (high - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def duration(seconds: float) -> str:
    """1h 02m, 3m 20s or 14s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
