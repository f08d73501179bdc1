"""The bilevel search (arXiv 1806.09055, algorithm 1)."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darts_fast import architect, capture, curvature, plot, precision
from darts_fast.capture import Captured
from darts_fast.cells import DartsCells, cells_of
from darts_fast.config import SearchConfig
from darts_fast.data import Dataset, check_for_network, permutation, seeded
from darts_fast.diagnosis import diagnosis, operations
from darts_fast.distributed import Ranks
from darts_fast.errors import InputError
from darts_fast.evaluation import Metrics
from darts_fast.flat import FlatNetwork
from darts_fast.fused import kernels_on
from darts_fast.genotype import Genotype, in_short
from darts_fast.loop import Loop, cosine, refusing_what_does_not_fit
from darts_fast.nasbench201 import Cell
from darts_fast.profiling import phase
from darts_fast.projection import Decisions, all_decided, decided_round, genotype_of, nothing_decided, rounds
from darts_fast.runs import environment
from darts_fast.search_step import SearchStep
from darts_fast.space import Space
from darts_fast.state import check_keys, check_number, copy_state
from darts_fast.supernet import Supernet

# Streams of random numbers, told apart by the second number of a seed.
SPLIT, TRAIN_ORDER, VALIDATION_ORDER, AUGMENTATION, PERTURBATION, PROJECTION, NOISE = range(7)

# TensorBoard sorts groups of tags by name: train and val come first, then what an epoch says of its cells,
# and last the alphas, of which there are 224 in the paper's space.
CELLS, LAST = "x_cells", "z_"

# Index in the earlier window of the epoch that `stop_at_eigenvalue` goes back to
MIDDLE = curvature.WINDOW // 2


class SearchResult(NamedTuple):
    """What a search found: the genotype of the epoch with the best validation accuracy (or of the epoch that
    `stop_at_eigenvalue` went back to), and the last one."""

    genotype: Genotype | Cell  # a Cell in the space of NAS-Bench-201
    top1: float  # of that epoch, on the validation half, 0 to 1
    epoch: int  # that epoch, counted from 1
    final_genotype: Genotype | Cell
    path: Path  # the run folder


def search(
    config: SearchConfig, data: tuple[Tensor, Tensor] | None = None, parent: str | Path | None = None
) -> SearchResult:
    """Searches for an architecture; writes the run folder `searchs/<name>/`.

    Args:
        config: the settings; what is None takes the data set's default.
        data: the user's own training images (uint8 [N, channels, H, W]) and labels (integers [N]), used
            instead of `config.dataset`.
        parent: where the run folder is made; None: searchs/.

    Raises:
        InputError: bad settings or data, or the folder exists or cannot be written.
        RunError: the loss is no longer finite, or the device ran out of memory.
        Stopped: Ctrl-C or SIGTERM; the run was saved.
    """
    return Search.begin(config, data, parent)


def resume_search(
    path: str | Path, data: tuple[Tensor, Tensor] | None = None, device: str | None = None
) -> SearchResult:
    """Goes on with the search of a run folder from its checkpoint, to the same bits as if it had never
    stopped. `data` as in `search`, where the search was given it; `device`, if another than it began on (then
    to other bits, which the log says). Raises what `search` raises.
    """
    return Search.go_on(SearchConfig, path, data, device)


class Search(Loop):
    """A search under way: the supernet, both optimizers, and the position in the schedule.

    Raises:
        InputError: a half has too few images; the data or the supernet do not fit the memory.
    """

    function = "resume_search"
    remedy = "a smaller --w_lr or --w_grad_clip"
    config: SearchConfig
    network: FlatNetwork
    eigenvalue: float | None = None  # of the epoch that is being finished

    def __init__(self, config: SearchConfig, dataset: Dataset, ranks: Ranks | None = None):
        check_for_network(dataset)
        check_split(config, dataset)
        self.cells = cells_of(config.space)
        for name in ("auxiliary_skip", "stop_at_skips"):
            if getattr(config, name) and "skip_connect" not in self.cells.names.candidates:
                raise InputError(
                    f"{name} is for spaces with skip_connect: leave it out, or give another --space"
                )
        config = dataclasses.replace(config.resolved(dataset.name), space=self.cells.written_out)
        order = permutation(len(dataset.labels), config.seed, SPLIT)
        split = int(config.train_portion * len(order))
        self.train_half, self.validation_half = order[:split], order[split:]
        super().__init__(config, dataset, ranks or Ranks(), split, config.seed, AUGMENTATION)
        what = f"a supernet of {config.layers} layers and {config.init_channels} channels for {dataset.name}"
        with (
            refusing_what_does_not_fit(what, self.device),
            torch.random.fork_rng(devices=[]),  # the caller's generator is left as it was
        ):
            torch.default_generator.manual_seed(config.seed)
            self.network = self.cells.network(config, dataset).to(self.device)
        self.perturbation = seeded(self.device, config.seed, PERTURBATION)
        self.noise_seed = self.of_this_rank(config.seed, NOISE)
        self.noise = self.network.noise_generator = seeded(self.device, *self.noise_seed)
        self.cost = self.cells.cost(config, dataset)
        self.search_step = SearchStep(self.network, config, self.perturbation, self.cost, self.ranks.average)
        self.decisions: Decisions | None = None  # of DARTS-PT
        if config.derive == "perturbation":
            self.decisions = nothing_decided(architect.detached(self.network.alphas()))
            self.network.kept, self.network.added = self.decisions
        self._set_strengths()  # of the first epoch, for the step whose launches the log counts
        self.decided: tuple[Decisions, list[str]] | None = None  # after this epoch, once it is evaluated
        names = ("train_images", "train_labels", "validation_images", "validation_labels")
        size = self.part_sizes(split)[0]
        buffers = (*self.buffers(size), *self.buffers(size))
        inputs = dict(zip(names, buffers, strict=True))
        generators = [generator for generator, _ in self.generators().values()]
        changed = self.search_step.tensors
        self.take = Captured(self._take, inputs, changed, self.captured, generators)
        self.warm_up: Captured | None = None
        if config.alpha_warmup:
            inputs = {name: inputs[name] for name in names[:2]}
            self.warm_up = Captured(self._take_weights, inputs, changed, self.captured, generators)
        # With `stop_at_eigenvalue`: records of the last epochs that count, each with its eigenvalue.
        self.recent: list[dict[str, Any]] = []

    def begin_epoch(self) -> None:
        if self.epoch >= self.config.alpha_warmup:
            self.warm_up = None  # and the memory of its graph
        train = self._shuffled(self.train_half, TRAIN_ORDER)
        validation = self._shuffled(self.validation_half, VALIDATION_ORDER)
        # The two halves are walked together; a shorter validation half is walked again.
        validation = validation[torch.arange(len(train)) % len(validation)]
        self.train_batches = self.walk(train, TRAIN_ORDER)
        self.validation_batches = self.walk(validation, VALIDATION_ORDER)
        self._set_strengths()

    def _set_strengths(self) -> None:
        """Sets the strengths that grow or fall with the epochs; in place, as a captured step reads them."""
        config, epochs = self.config, self.config.epochs
        done = min(self.epoch / epochs, 1)
        self.search_step.epsilon.fill_(config.perturb_epsilon * (0.1 + 0.9 * done))
        self.search_step.beta.fill_(config.beta_decay * done)
        if config.auxiliary_skip and self.epoch < epochs:
            # From all of it in the first epoch to 0 in the last
            left = 1 - self.epoch / (epochs - 1) if epochs > 1 else 1
            self.network.set_auxiliary_skip(config.auxiliary_skip * left)

    def take_step(self, lr: float) -> tuple[Tensor, int]:
        with phase("data"):
            train = next(self.train_batches)
            inputs = {"train_images": train[0], "train_labels": train[1]}
            if self.warm_up is None:
                validation = next(self.validation_batches)
                inputs |= {"validation_images": validation[0], "validation_labels": validation[1]}
        self.search_step.lr.fill_(lr)
        images = self.batch_images
        self.ranks.set_share(images)
        return (self.warm_up or self.take)(images, **inputs), images

    def _take(self, train_images: Tensor, validation_images: Tensor, **labels: Tensor) -> Tensor:
        """`SearchStep.take` of images (uint8) as they were picked."""
        with phase("data"):
            train, validation = (self.batches.prepared(x, True) for x in (train_images, validation_images))
        return self.search_step.take(train_images=train, validation_images=validation, **labels)

    def _take_weights(self, train_images: Tensor, train_labels: Tensor) -> Tensor:
        """`SearchStep.take_weights` of images (uint8) as they were picked."""
        with phase("data"):
            train = self.batches.prepared(train_images, True)
        return self.search_step.take_weights(train, train_labels)

    def evaluate(self) -> dict[str, Metrics]:
        found = self.measured({"val": self.network}, self.batches, self.validation_half)
        past = self.epoch + 1 - self.config.epochs
        if self.decisions and past >= 0 and past % self.config.projection_epochs == 0:
            self.decided = self._decide(past // self.config.projection_epochs)
        if self._wants_eigenvalue() and math.isfinite(found["val"][0]):
            self.eigenvalue = self._eigenvalue()
        return found

    def _wants_eigenvalue(self) -> bool:
        return self.config.eigenvalue or self.config.stop_at_eigenvalue is not None

    def _eigenvalue(self) -> float:
        """See `curvature`; of the first batch of the validation half, not augmented, with batch statistics.
        The kernels have no second derivative in the alphas alone, so a copy of the network on reference cells
        computes it; nothing of it is kept.

        Raises:
            RunError: it is not finite.
        """

        def after_product(products: int) -> None:
            self.bar.set_postfix_str(f"eigenvalue: {products} Hessian-vector products", refresh=False)
            self.bar.update(0)
            if self.ranks.size == 1:  # ranks may need different numbers of products
                self._stop_if_asked()

        with torch.random.fork_rng(devices=[]):
            reference = dataclasses.replace(self.config, fused=False, amp=False, amp_dtype=None)
            network = self.cells.network(reference, self.dataset).to(self.device)
        network.load_state_dict(self.network.state_dict())
        network.kept, network.added = self.network.kept, self.network.added
        network.noise_generator = seeded(self.device, self.config.seed, NOISE)
        indices = self.validation_half[: self.config.batch_size]
        batch = self.batches.cut(indices, augment=False)
        loss = partial(network.loss, *batch, {"weights": network.flat_weights.detach()})
        found = curvature.largest_eigenvalue(loss, network.alphas(), self.config.seed, after_product)
        found = self.ranks.of_first(found)  # all ranks decide by the same number
        if not math.isfinite(found):
            raise self._not_finite(f"the largest eigenvalue is {found}", self.steps_done)
        return found

    def _decide(self, number: int) -> tuple[Decisions, list[str]]:
        """The decisions of this round of DARTS-PT; nothing is changed. Batch norm normalises by the batch:
        the running statistics are those of the network as it was trained."""

        def measure(trial: Decisions) -> tuple[float, float]:
            with self.network.weighed(*trial), self.network.frozen_statistics():
                found = self.measured({"": self.network}, self.batches, self.validation_half, training=True)
            loss, top1, _ = found[""]
            return loss, top1

        before = self.decisions
        assert before is not None
        if number == 0:  # the auxiliary skip connections' part of `added` is over
            before = nothing_decided(before.kept)
        return decided_round(
            number, before, self.space, measure, seeded("cpu", self.config.seed, PROJECTION, number)
        )

    @property
    def space(self) -> Space:
        """The search space of DARTS's cells; those of NAS-Bench-201 have none."""
        assert isinstance(self.cells, DartsCells)
        return self.cells.space

    def _commit_decisions(self) -> None:
        """Takes over this epoch's decisions of DARTS-PT, in place. After the first ones a new descent of the
        weights begins: the momentum is set to 0."""
        if self.decided is None:
            return
        (decisions, said), self.decided = self.decided, None
        assert self.decisions is not None
        for own, tensors in zip(self.decisions, decisions, strict=True):
            copy_state(own, tensors)
        if self.epoch + 1 == self.config.epochs:
            self.search_step.momentum_buffer.zero_()
        for sentence in said:
            self.folder.log(sentence)

    def finish_epoch(self, found: dict[str, Metrics]) -> None:
        """Records the epoch, and keeps its genotype if it is the best so far."""
        self.record_evaluation(found)
        self._commit_decisions()
        epoch, genotype = self.epoch + 1, self._genotype()
        self.folder.log(f"genotype = {genotype}", shown=False)
        self._diagnose(genotype, epoch)
        self._record_eigenvalue(epoch)
        self._record_alphas(self.steps_done)
        self._draw(genotype, epoch)
        _, top1, _ = found["val"]
        final = {"epoch": epoch, "top1": top1, "genotype": genotype.as_json()}
        why = self._choose(final)
        if why is not None:
            self.folder.log(f"The search ends here: {why}")
        stopped = {} if why is None else {"stopped": why}
        self.folder.write_json("genotype.json", {"best": self.best, "final": final, **stopped})

    def _record_eigenvalue(self, epoch: int) -> None:
        if self.eigenvalue is None:
            return
        self.folder.log(
            f"largest eigenvalue of the Hessian of the validation loss in the alphas: {self.eigenvalue:.4g}"
        )
        self.folder.metrics(epoch=epoch, step=self.steps_done, eigenvalue=self.eigenvalue)
        self.folder.scalars(self.steps_done, {"val/eigenvalue": self.eigenvalue})

    def _choose(self, final: dict[str, Any]) -> str | None:
        """Makes `best` the record of the genotype that the search takes if no other epoch follows this one,
        whose record is `final`. Returns why no other one follows, in words."""
        epoch = final["epoch"]
        if epoch > self.config.alpha_warmup:
            if self.best is not None and self.best["epoch"] <= self.config.alpha_warmup:
                self.best = None  # the genotype of alphas that were not trained
            if self.config.stop_at_eigenvalue is not None:
                self.recent.append({**final, "eigenvalue": self.eigenvalue})
                self.recent = self.recent[-2 * curvature.WINDOW :]
        why = self._why_it_ends(epoch)
        self.keep(final, eligible=why is None)
        if self._eigenvalue_has_risen():
            self.best = {name: self.recent[MIDDLE][name] for name in final}
        if self.decisions and epoch == self.epochs:
            self.best = final
        return why

    def _why_it_ends(self, epochs: int) -> str | None:
        """Why no other epoch begins after so many, in words. (In the warm-up the alphas say nothing.)"""
        if epochs <= self.config.alpha_warmup:
            return None
        if self._eigenvalue_has_risen():
            means = curvature.window_means(self._recent_eigenvalues())
            assert means is not None  # where it has risen
            before, now = means
            first, middle, last = (self.recent[k]["epoch"] for k in (0, MIDDLE, curvature.WINDOW - 1))
            return (
                f"the mean of the largest eigenvalue has risen from {before:.4g} in epochs {first} to {last} "
                f"to {now:.4g} in epochs {last + 1} to {epochs}; stop_at_eigenvalue: "
                f"{self.config.stop_at_eigenvalue}; back to epoch {middle}"
            )
        limit = self.config.stop_at_skips
        if limit is None:
            return None
        skips = operations(self._genotype().normal, self.cells.names)["skip"]
        return (
            f"skip connections of the normal cell: {skips}; stop_at_skips: {limit}"
            if skips >= limit
            else None
        )

    def _eigenvalue_has_risen(self) -> bool:
        ratio = self.config.stop_at_eigenvalue
        return ratio is not None and curvature.has_risen(self._recent_eigenvalues(), ratio)

    def _recent_eigenvalues(self) -> list[float]:
        return [record["eigenvalue"] for record in self.recent]

    def ends_early(self) -> bool:
        return self.step == 0 and self._why_it_ends(self.epoch) is not None

    def load(self, checkpoint: dict[str, Any]) -> None:
        super().load(checkpoint)
        self.recent = checkpoint.get("recent", [])

    def _position(self) -> dict[str, Any]:
        recent = {} if self.config.stop_at_eigenvalue is None else {"recent": self.recent}
        return {**super()._position(), **recent}

    def _check_position(self, checkpoint: dict[str, Any]) -> None:
        super()._check_position(checkpoint)
        if self.config.stop_at_eigenvalue is None:
            return
        recent, ended = checkpoint["recent"], checkpoint["epoch"]
        length = min(max(0, ended - self.config.alpha_warmup), 2 * curvature.WINDOW)
        if type(recent) is not list or len(recent) != length:
            raise ValueError(f"recent is no list of the last {length} epochs")
        for epoch, record in enumerate(recent, start=ended - length + 1):
            name = f"recent, epoch {epoch}"
            check_keys(record, ("epoch", "top1", "genotype", "eigenvalue"), name)
            check_number(record["epoch"], int, epoch, epoch, f"{name}, epoch")
            check_number(record["eigenvalue"], float, -math.inf, math.inf, f"{name}, eigenvalue")
            self.check_record({key: record[key] for key in ("epoch", "top1", "genotype")}, name)

    def result(self) -> SearchResult:
        assert self.best is not None
        top1, epoch = self.best["top1"], self.best["epoch"]
        genotype = self.cells.read(self.best["genotype"])
        if self.decisions:
            self.folder.log(f"Decided by perturbation, validation top-1 {top1:.2%}; the genotype:")
        elif self._eigenvalue_has_risen():
            self.folder.log(
                f"Validation top-1 {top1:.2%} in epoch {epoch}, before the eigenvalue rose; its genotype:"
            )
        else:
            self.folder.log(f"Best validation top-1 {top1:.2%}, in epoch {epoch}; its genotype:")
        self.folder.log(str(genotype), stamp=False)
        return SearchResult(genotype, top1, epoch, self._genotype(), self.folder.path)

    def learning_rate(self) -> float:
        config, past = self.config, self.epoch - self.config.epochs
        if past < 0:
            return cosine(config.w_lr, config.w_lr_min, self.epoch, config.epochs)
        # Between the decisions of DARTS-PT, as in its authors' code
        high = config.w_lr / 10
        return cosine(high, min(config.w_lr_min, high), past, self.epochs - config.epochs)

    def generators(self) -> dict[str, tuple[torch.Generator, tuple[int, ...]]]:
        found = super().generators()
        if self.config.perturb:
            found["perturbation"] = self.perturbation, (self.config.seed, PERTURBATION)
        if "noise" in self.cells.names.candidates:
            found["noise"] = self.noise, self.noise_seed
        return found

    def common_generators(self) -> tuple[str, ...]:
        return ("perturbation",)  # one delta for the whole batch

    def state(self) -> dict[str, Any]:
        projection = {"projection": self.decisions._asdict()} if self.decisions else {}
        return self.search_step.state_dict() | projection

    def check_record(self, record: Any, name: str) -> None:
        check_keys(record, ("epoch", "top1", "genotype"), name)
        check_number(record["top1"], float, 0, 1, f"{name}.top1")
        try:
            self.cells.read(record["genotype"], f"{name}.genotype")
        except InputError as error:  # the whole sentence is about the checkpoint
            raise ValueError(str(error)) from error

    @property
    def epochs(self) -> int:
        if self.config.derive != "perturbation":
            return self.config.epochs
        return self.config.epochs + (rounds(self.space) - 1) * self.config.projection_epochs

    @property
    def activations(self) -> torch.dtype | None:
        return self.search_step.activations

    def rehearse(self) -> None:
        network, shape = self.cells.network(self.config, self.dataset), self.dataset.images.shape[1:]
        step = SearchStep(network, self.config, cost=self.cost)
        step.loss_scale = None  # the optimizers of meta tensors know of none
        for size in self.part_sizes(len(self.train_half)):
            images, labels = torch.zeros(size, *shape), torch.zeros(size, dtype=torch.int64)
            step.take(images, labels, images, labels)
        network.eval()
        with torch.no_grad():
            for size in self.part_sizes(len(self.validation_half)):
                network(torch.zeros(size, *shape))

    def announcement(self) -> str:
        parameters = sum(w.numel() for w in self.network.weights().values())
        return (
            f"{self.dataset.name}: {len(self.train_half)} images train {parameters:,} weights, "
            f"{len(self.validation_half)} train the alphas; {self.epochs} epochs of "
            f"{self.steps_per_epoch} steps"
        )

    def engine(self) -> dict[str, str]:
        config, lines = (
            self.config,
            {
                "device": environment(self.config.device)["device"],
                "cells": self._cells_in_words(),
                "precision": precision.in_words(self.config.amp, self.activations),
            },
        )
        beside = self._weights_beside_in_words()
        if beside:
            lines["weights beside the softmaxed alphas"] = "; ".join(beside)
        lines["architecture gradient"] = self._gradient_in_words()
        if config.alpha_warmup:
            lines["alpha warm-up"] = f"only the weights are trained up to epoch {config.alpha_warmup}"
        if self.decisions is not None:
            lines["genotype"] = (
                f"decided by perturbation after epoch {config.epochs}, in {rounds(self.space)} rounds with "
                f"{config.projection_epochs} epochs between two"
            )
        lines["step"] = capture.in_words(self.captured)
        return lines

    def _cells_in_words(self) -> str:
        cells, partial_channels = "reference cells", self.config.partial_channels
        if self.config.fused:
            cells = f"fused cells, kernels: {kernels_on(self.device, self.activations or torch.float32)}"
        if partial_channels > 1:
            cells += f"; candidates read 1/{partial_channels} of the channels"
        return cells

    def _weights_beside_in_words(self) -> list[str]:
        """What weighs candidates and edges beside the softmaxed alphas."""
        config, found = self.config, []
        if config.partial_channels > 1:
            found.append("edges by softmaxed betas")
        if config.auxiliary_skip:
            found.append(f"an auxiliary skip connection of weight {config.auxiliary_skip} falling to 0")
        if config.perturb:
            found.append(f"in the weight step {config.perturb} perturbations up to {config.perturb_epsilon}")
        return found

    def _gradient_in_words(self) -> str:
        config, form = self.config, "first order"
        if config.order == 2:
            form = f"second order, {config.hvp} Hessian-vector product"
            if self.activations is not None and config.hvp == "finite-difference":
                form += ", in float32: in 2 bytes the differences would be rounding"
        if config.macs_weight:
            target = config.macs_target
            relative_to = "those of equal alphas" if target is None else f"{target} M where above it"
            form += f", plus {config.macs_weight} times the expected multiply-adds, relative to {relative_to}"
        if config.beta_decay:
            form += f", Beta-DARTS's penalty, from 0 towards {config.beta_decay}"
        return form

    def _shuffled(self, half: Tensor, stream: int) -> Tensor:
        return half[permutation(len(half), self.config.seed, stream, self.epoch)]

    def _genotype(self) -> Genotype | Cell:
        if self.decisions and all_decided(self.decisions, self.space):
            return genotype_of(self.decisions, self.space)
        return self.cells.derive(self.network, "raw" if self.config.derive == "raw" else "softmax")

    @torch.no_grad()
    def _probabilities(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The softmaxed alphas, for each of ALPHAS; on an edge that DARTS-PT has decided, 1 at its operation,
        if the edge stays, and else 0."""
        present = self.network.present(self.network.alphas())
        found = {name: alphas.to(dtype).softmax(dim=-1) for name, alphas in present.items()}
        if self.decisions is not None:
            kept, added = self.decisions
            found = {
                name: torch.where(kept[name] == 0, added[name].to(dtype), p) for name, p in found.items()
            }
        return tuple(found.values())

    def _diagnose(self, genotype: Genotype | Cell, epoch: int) -> None:
        found = {}
        for alphas, p in zip(self.network.ALPHAS, self._probabilities(torch.float64), strict=True):
            name = alphas.removeprefix("alphas_")
            gene = getattr(genotype, name)
            found[name] = diagnosis(gene, p, self.cells.names)
            self.folder.log(f"    {name}: {in_short(gene)}", stamp=False)
        costs = self._costs(genotype)
        said = ["entropy " + ", ".join(f"{of_kind.entropy:.3f}" for of_kind in found.values())]
        if "none" in self.cells.names.candidates:
            said.append("none " + ", ".join(f"{of_kind.none:.1%}" for of_kind in found.values()))
        if costs:
            macs, expected = (f"{value / 1e6:.2f} M" for value in costs.values())
            said.append(f"multiply-adds {macs} (expected {expected})")
        self.folder.log("    " + "; ".join(said), stamp=False)
        for name, of_kind in found.items():
            if of_kind.collapsed:
                self.folder.log(
                    f"{name} cell looks collapsed: half of its operations or more are skip connections; "
                    "compare the genotypes of earlier epochs"
                )
        values = {
            f"{name}_{what}": value
            for name, of_kind in found.items()
            for what, value in of_kind.scalars().items()
        } | costs
        self.folder.metrics(epoch=epoch, step=self.steps_done, genotype=genotype.as_json(), **values)
        self.folder.scalars(self.steps_done, {f"{CELLS}/{name}": value for name, value in values.items()})

    def _costs(self, genotype: Any) -> dict[str, float]:
        """By their names in metrics.jsonl, the multiply-adds of the genotype's network at the search's own
        size, and the expected ones of the alphas; {} of NAS-Bench-201."""
        if self.cost is None or self.search_step.cost is None:
            return {}
        with torch.no_grad():
            expected = float(self.search_step.cost.expected(*self.network.probabilities()))
        return {"macs": self.cost.of(genotype, self.space), "expected_macs": expected}

    def _record_alphas(self, step: int) -> None:
        values = {}
        for name, rows in zip(self.network.ALPHAS, self._probabilities(), strict=True):
            for edge, row in zip(self.cells.names.edges, rows.tolist(), strict=True):
                for candidate, value in zip(self.cells.names.candidates, row, strict=True):
                    values[f"{LAST}{name}/{edge}/{candidate}"] = value
        if isinstance(self.network, Supernet):
            for name, of_edges in zip(self.network.BETAS, self.network.edge_weights(), strict=True):
                if of_edges is not None:
                    for edge, value in zip(self.cells.names.edges, of_edges.tolist(), strict=True):
                        values[f"{LAST}{name}/{edge}"] = value
        self.folder.scalars(step, values)

    def _draw(self, genotype: Any, epoch: int) -> None:
        for name, p in zip(self.network.ALPHAS, self._probabilities(), strict=True):
            title = f"{name}, epoch {epoch}"
            self.draw(
                f"{CELLS}/{name}",
                f"EP{epoch:02d}-{name}.png",
                partial(plot.alpha_heat_map, p.cpu().numpy(), title, self.cells.names),
            )
        picture = partial(self.cells.picture, genotype, f"epoch {epoch}")
        self.draw(f"{CELLS}/genotype", f"EP{epoch:02d}-genotype.png", picture)


def check_split(config: SearchConfig, dataset: Dataset) -> None:
    """Raises InputError where a half has fewer than two images."""
    total = len(dataset.labels)
    split = int(config.train_portion * total)
    if min(split, total - split) < 2:
        raise InputError(
            f"train_portion {config.train_portion} gives {split} of {total} images to the weights and "
            f"{total - split} to the alphas; each needs at least 2"
        )
