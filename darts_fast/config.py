"""Settings of a run: frozen dataclasses, checked when made; the command line is generated from them."""

import argparse
import dataclasses
import os
import re
import reprlib
import shlex
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from darts_fast.errors import InputError, say

Check = tuple[Callable[[Any], bool], str]  # a test of the value, and what it has to be
Kind = typing.TypeVar("Kind", bound="Config")

POSITIVE: Check = (lambda value: value > 0, "above 0")
NOT_NEGATIVE: Check = (lambda value: value >= 0, "0 or more")
AT_LEAST_1: Check = (lambda value: value >= 1, "at least 1")
FRACTION: Check = (lambda value: 0 < value < 1, "above 0 and below 1")
BELOW_1: Check = (lambda value: 0 <= value < 1, "from 0 to below 1")
EVEN: Check = (lambda value: value >= 2 and value % 2 == 0, "an even number, at least 2")
ZERO_OR_EVEN: Check = (lambda value: value >= 0 and value % 2 == 0, "0 or an even number")
SKIPS: Check = (lambda value: 1 <= value <= 8, "from 1 to 8")
LAYERS: Check = (lambda value: 3 <= value <= 1000, "from 3 (normal and reduction cells) to 1000")
NASBENCH201_LAYERS: Check = (lambda value: 1 <= value <= 1000, "from 1 (cell a stage) to 1000")
IMAGE_SIZE: Check = (lambda value: 8 <= value <= 1024 and value % 4 == 0, "divisible by 4, from 8 to 1024")
UP_TO_1: Check = (lambda value: 0 <= value <= 1, "from 0 to 1")
WORKERS: Check = (lambda value: 0 <= value <= 1000, "from 0 to 1000")
PORTION: Check = (lambda value: 0 < value <= 1, "above 0, at most 1")
SEED: Check = (lambda value: value >= 0, "from 0 to 4294967295")

FOLDER_IMAGE_SIZE = 32  # of the data set `folder`, whose files may be of any size
IMAGENET_IMAGE_SIZE = 224  # the same with the ImageNet stem

HIDDEN = ("name", "data_path", "profile")  # settings that say nothing about the figures of a run

LARGEST = 2**32 - 1  # of a whole number: torch and numpy take no larger seed, and nothing needs a larger size


def option(
    default: Any,
    meaning: str,
    check: Check | None = None,
    choices: Sequence | None = None,
    shown: str = "",
    alone: Any = None,
) -> Any:
    """A field: its default, its help text, what its value must satisfy; `shown` describes a None,
    and `alone` is the value of the flag without one."""
    metadata = {"meaning": meaning, "check": check, "choices": choices, "shown": shown, "alone": alone}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """What the settings of the two programs share: the data, checks, defaults that depend on the data set.

    The default of some fields is None, though their type is not: `resolved`, or the folder that is made for
    a run without a name, puts a value in its place.
    """

    FOLDER: typing.ClassVar[str]  # where the run folders are
    WORD: typing.ClassVar[str]  # what such a run is called
    SMALL: typing.ClassVar[dict[str, Any]]  # where the setting is None: for digits
    PAPER: typing.ClassVar[dict[str, Any]]  # and for every other data set

    dataset: str = option(
        "digits",
        "data set: digits (embedded, no download), cifar10, cifar100, mnist, fashionmnist, svhn, or folder: "
        "images in train/CLASS/ and test/CLASS/, or all in CLASS/, below data_path",
    )
    data_path: str = option(
        "data", "folder of the data set's files; published ones are downloaded there if absent"
    )
    image_size: int | None = option(
        None,
        "side to which the images of the data set folder are resized and cropped",
        IMAGE_SIZE,
        shown="folder 32, with the ImageNet stem 224; other data sets have their own",
    )
    stream: bool = option(
        False,
        "leave the images of the data set folder in their files, and decode every batch when it is needed; "
        "without it only where they would take more than half of the memory",
    )
    workers: int = option(
        4, "processes that decode the images of a stream (a search has two); 0: the program itself", WORKERS
    )
    color_jitter: float = option(
        0.0,
        "with stream: by how much brightness, contrast and saturation of the training images are changed at "
        "random, 0 to 1, and the hue by half of it; ImageNet's is 0.4",
        UP_TO_1,
    )
    device: str = option(None, "cpu, cuda or cuda:N", shown="cuda where there is one, else cpu")
    fused: bool = option(False, "compute the cells by kernels: the same run, faster")
    amp: bool = option(False, "with fused: activations in 2 bytes (on a CPU, where that is slower: float32)")
    amp_dtype: str | None = option(
        None,
        "2-byte type of the activations, on any device; implies amp",
        None,
        ("bfloat16", "float16"),
        shown="float16 with amp",
    )
    no_graph: bool = option(False, "with fused on CUDA: do not capture the step as one CUDA graph")
    profile: int = option(
        0,
        "steps to record after a warm-up, into profile/ of the run folder: a trace, and a report of what "
        "bounds the run; without a number: 5",
        NOT_NEGATIVE,
        shown="none",
        alone=5,
    )

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            wanted = plain_type(hints[field.name])
            if wanted is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            found = type(value)
            if found is not wanted:
                raise InputError(f"{field.name} must be {NOUNS[wanted]}, not {reprlib.repr(value)}")
            if wanted is int and value > LARGEST:
                raise InputError(f"{field.name} must be at most {LARGEST}, not {reprlib.repr(value)}")
            if wanted is float and not abs(value) <= 1e30:  # near the end of float32
                raise InputError(f"{field.name} must be a finite number, at most 1e30, not {value!r}")
            if wanted is str and "\0" in value:
                raise InputError(f"{field.name} must not hold a null character")
            choices, check = field.metadata["choices"], field.metadata["check"]
            if choices and value not in choices:
                known = " or ".join(map(str, choices))
                raise InputError(f"{field.name} must be {known}, not {reprlib.repr(value)}")
            if check and not check[0](value):
                raise InputError(f"{field.name} must be {check[1]}, not {reprlib.repr(value)}")
        if (self.amp or self.amp_dtype) and not self.fused:
            raise InputError("amp is for the fused cells: give --fused, too")
        if self.image_size is not None and self.dataset.lower() != "folder":
            raise InputError(
                f"image_size is for the data set folder only; images of {self.dataset} keep their size"
            )
        if self.stream and self.dataset.lower() != "folder":
            raise InputError(f"stream is for the data set folder only; {self.dataset} is read into memory")
        if self.color_jitter and not self.stream:
            raise InputError("color_jitter is for images that are streamed: give --stream, too")

    def sizes(self, dataset: str) -> dict[str, Any]:
        """The data set's values of what is None."""
        sizes = self.SMALL if dataset == "digits" else self.PAPER
        return sizes | {"image_size": FOLDER_IMAGE_SIZE} if dataset == "folder" else sizes

    def resolved(self: Kind, dataset: str) -> Kind:
        """The same with the data set's sizes and the device that is there in place of None, and an absolute
        path of the data.

        `name` may stay None, and so does `image_size` where the images have their own.

        Raises:
            InputError: the device asked for is not there.
        """
        sizes = self.sizes(dataset).items()
        chosen = {name: value for name, value in sizes if getattr(self, name) is None}
        chosen["data_path"] = os.path.abspath(
            os.path.expanduser(self.data_path)
        )  # a run may be resumed elsewhere
        return dataclasses.replace(self, dataset=dataset, device=str(available_device(self.device)), **chosen)


@dataclass(frozen=True)
class SearchConfig(Config):
    """Settings of a search. Flags of pt.darts keep their names and defaults."""

    FOLDER, WORD = "searchs", "search"
    SMALL = {"epochs": 5, "init_channels": 4, "layers": 3}
    PAPER = {"epochs": 50, "init_channels": 16, "layers": 8}

    name: str = option(
        None, "run folder, below searchs/", shown="the data set's name, numbered where that is taken"
    )
    batch_size: int = option(64, "images a batch, of the training and of the validation half", AT_LEAST_1)
    epochs: int = option(None, "passes over the training half", AT_LEAST_1, shown="digits 5, else 50")
    init_channels: int = option(
        None, "width of a node in the first cell", EVEN, shown="digits 4, else and in nasbench201 16"
    )
    layers: int = option(
        None,
        "number of cells; in the space nasbench201 of those in each of three stages",
        shown="digits 3, else 8; in nasbench201 digits 1, else 5",
    )
    w_lr: float = option(0.025, "learning rate of the weights, at the first epoch", POSITIVE)
    w_lr_min: float = option(0.001, "what the cosine schedule brings it down to", NOT_NEGATIVE)
    w_momentum: float = option(0.9, "momentum of the weights", BELOW_1)
    w_weight_decay: float = option(3e-4, "weight decay of the weights", NOT_NEGATIVE)
    w_grad_clip: float = option(5.0, "largest norm of the weights' gradient", POSITIVE)
    alpha_lr: float = option(3e-4, "learning rate of the alphas (Adam)", POSITIVE)
    alpha_weight_decay: float = option(1e-3, "weight decay of the alphas", NOT_NEGATIVE)
    order: int = option(
        2, "architecture gradient: 1 (xi = 0) or 2 (looks one weight step ahead)", None, (1, 2)
    )
    hvp: str = option(
        "exact",
        "Hessian-vector product of the second order: exact, or finite-difference as published",
        None,
        ("exact", "finite-difference"),
    )
    space: str = option(
        "darts",
        "candidates of each edge: darts, the spaces s1 to s4 of RobustDARTS, or a JSON file with nodes, "
        "normal and reduce; or nasbench201, cells and network (see docs/search_quality.md)",
    )
    partial_channels: int = option(
        1,
        "PC-DARTS: the candidates of an edge read one channel in so many, and the edges that enter a node "
        "are weighed by betas, which are trained as the alphas; must divide init_channels",
        AT_LEAST_1,
    )
    derive: str = option(
        "softmax",
        "edges are ranked by softmaxed alphas (official) or by raw ones (pt.darts); perturbation: after the "
        "last epoch, decided one by one by the validation accuracy lost without an operation (DARTS-PT)",
        None,
        ("softmax", "raw", "perturbation"),
    )
    projection_epochs: int = option(
        5, "with derive perturbation: epochs of the supernet's training between two decisions", AT_LEAST_1
    )
    auxiliary_skip: float = option(
        0.0,
        "weight of a further skip connection on every edge that has one, in the first epoch; it falls to 0 "
        "in the last (DARTS-); without a number: 1",
        NOT_NEGATIVE,
        alone=1.0,
    )
    perturb: str | None = option(
        None,
        "train the weights at perturbed softmaxed alphas: random, or adversarial (SmoothDARTS)",
        None,
        ("random", "adversarial"),
        shown="not",
    )
    perturb_epsilon: float = option(
        0.3, "the largest perturbation, nearly reached in the last epoch", NOT_NEGATIVE
    )
    stop_at_skips: int | None = option(
        None,
        "end the search after the first epoch whose normal cell has at least so many skip connections (of 8 "
        "operations), and take the best epoch before it",
        SKIPS,
        shown="never",
    )
    eigenvalue: bool = option(
        False,
        "after every epoch: the largest eigenvalue of the Hessian of the validation loss in the alphas",
    )
    stop_at_eigenvalue: float | None = option(
        None,
        "end the search where the eigenvalue (implied) has risen: its mean over 5 epochs is less than this "
        "share of its mean over the next 5; take the genotype from the middle of the first 5; without a "
        "number: 0.75",
        FRACTION,
        shown="never",
        alone=0.75,
    )
    beta_decay: float = option(
        0.0,
        "weight of Beta-DARTS's penalty on the alphas; it grows linearly from 0 at the first epoch towards "
        "this; 0: none",
        NOT_NEGATIVE,
    )
    macs_weight: float = option(
        0.0,
        "weight in the validation loss of the derived network's expected multiply-adds, relative to those of "
        "equal alphas; 0: none",
        NOT_NEGATIVE,
    )
    macs_target: float | None = option(
        None,
        "with macs_weight: millions of multiply-adds, at the search's own size, which only what is above is "
        "weighed by, relative to them",
        POSITIVE,
        shown="none",
    )
    alpha_warmup: int = option(
        0, "epochs at the beginning in which only the weights are trained", NOT_NEGATIVE
    )
    train_portion: float = option(
        0.5, "share of the images that trains weights; the rest trains alphas", FRACTION
    )
    cutout_length: int = option(0, "side of the square that cutout blanks, in pixels; 0: none", ZERO_OR_EVEN)
    print_freq: int = option(50, "steps between two lines of the log", AT_LEAST_1)
    seed: int = option(2, "seed of weights, alphas, data order and augmentation", SEED)

    def __post_init__(self):
        super().__post_init__()
        holds, what = NASBENCH201_LAYERS if self.space == "nasbench201" else LAYERS
        if self.layers is not None and not holds(self.layers):
            raise InputError(f"layers must be {what}, not {self.layers}")
        if self.space == "nasbench201" and self.fused:
            raise InputError(
                "the kernels have no dense convolutions, of which the cells of nasbench201 are made: leave "
                "out --fused"
            )
        if self.w_lr_min > self.w_lr:
            raise InputError(f"w_lr_min must be at most w_lr ({self.w_lr}), not {self.w_lr_min}")
        if self.derive == "perturbation" and self.space == "nasbench201":
            raise InputError(
                "derive perturbation keeps two edges a node, a cell of nasbench201 keeps all: leave it out"
            )
        if self.derive == "perturbation" and (
            self.stop_at_skips is not None or self.stop_at_eigenvalue is not None
        ):
            raise InputError(
                "derive perturbation chooses no cell before the last epoch: leave out --stop_at_skips and "
                "--stop_at_eigenvalue"
            )
        if self.epochs is not None and self.alpha_warmup >= self.epochs:
            raise InputError(f"alpha_warmup must be below epochs ({self.epochs}), not {self.alpha_warmup}")
        if self.alpha_warmup and self.profile:
            raise InputError(
                "profile records the first steps, which with alpha_warmup are not whole ones: leave out one "
                "of the two"
            )
        if self.init_channels is not None and self.init_channels % self.partial_channels:
            raise InputError(
                f"partial_channels must divide init_channels ({self.init_channels}), not be "
                f"{self.partial_channels}"
            )
        if self.macs_target is not None and not self.macs_weight:
            raise InputError("macs_target is for macs_weight: give --macs_weight, too")
        if self.macs_weight and self.space == "nasbench201":
            raise InputError("macs_weight is for the cells of DARTS: leave it out, or --space nasbench201")
        if self.partial_channels > 1 and self.space == "nasbench201":
            raise InputError(
                "partial_channels is for the cells of DARTS: leave it out, or --space nasbench201"
            )
        if self.partial_channels > 1 and self.derive != "softmax":
            raise InputError(
                f"with partial_channels derive must be softmax, which the betas weigh, not {self.derive}"
            )

    def sizes(self, dataset: str) -> dict[str, Any]:
        of_space = {"init_channels": 16, "layers": 1 if dataset == "digits" else 5}
        return super().sizes(dataset) | (of_space if self.space == "nasbench201" else {})


@dataclass(frozen=True)
class TrainConfig(Config):
    """Settings of the training of a genotype. Flags of pt.darts keep their names and defaults."""

    FOLDER, WORD = "augments", "training"
    SMALL = {
        "epochs": 30, "init_channels": 16, "layers": 5, "cutout_length": 0, "drop_path_prob": 0.0,
    }  # fmt: skip
    PAPER = {
        "epochs": 600, "init_channels": 36, "layers": 20, "cutout_length": 16, "drop_path_prob": 0.2,
    }  # fmt: skip
    IMAGENET = {"init_channels": 48, "layers": 14}  # with the ImageNet stem, whatever the data set
    # Published settings that are given together. ImageNet's are those of P-DARTS and PC-DARTS (arXiv
    # 1904.12760, 1907.05737).
    RECIPES = {
        "imagenet": {
            "dataset": "folder", "stream": True, "stem": "imagenet", "image_size": IMAGENET_IMAGE_SIZE,
            "color_jitter": 0.4, "cutout_length": 0, "epochs": 250, "batch_size": 1024, "lr": 0.5,
            "schedule": "linear", "warmup_epochs": 5, "momentum": 0.9, "weight_decay": 3e-5,
            "grad_clip": 5.0, "label_smoothing": 0.1, "aux_weight": 0.4, "drop_path_prob": 0.0,
            "init_channels": 48, "layers": 14,
        }
    }  # fmt: skip

    genotype: str | None = option(
        None,
        "what to train: a genotype written out, the name of a published one, the folder of a search, a .json "
        "or a log",
        shown="none, one must be given",
    )
    name: str = option(
        None, "run folder, below augments/", shown="the data set's name, numbered where that is taken"
    )
    batch_size: int = option(96, "images a batch", AT_LEAST_1)
    lr: float = option(0.025, "learning rate, at the first epoch; the schedule brings it to 0", POSITIVE)
    schedule: str = option(
        "cosine", "how the learning rate falls, epoch by epoch: cosine or linear", None, ("cosine", "linear")
    )
    warmup_epochs: int = option(
        0,
        "epochs at the beginning in which the learning rate is that of the schedule times a factor, which "
        "grows in equal steps to 1 in the last of them",
        NOT_NEGATIVE,
    )
    momentum: float = option(0.9, "momentum", BELOW_1)
    weight_decay: float = option(3e-4, "weight decay", NOT_NEGATIVE)
    grad_clip: float = option(5.0, "largest norm of the gradient", POSITIVE)
    epochs: int = option(None, "passes over the training images", AT_LEAST_1, shown="digits 30, else 600")
    init_channels: int = option(
        None, "width of a node in the first cell", EVEN, shown="digits 16, ImageNet stem 48, else 36"
    )
    layers: int = option(None, "number of cells", LAYERS, shown="digits 5, ImageNet stem 14, else 20")
    train_portion: float = option(
        1.0,
        "share of the training images that is trained on; below 1 the network is tested on the others, in "
        "place of the test images; they are the same for every seed",
        PORTION,
    )
    label_smoothing: float = option(
        0.0,
        "share of a label that the training loss (not the test's) spreads evenly over all classes",
        BELOW_1,
    )
    ema: float = option(
        0.0,
        "decay a step of a moving average of the weights, tested beside them, such as 0.9999; 0: none",
        BELOW_1,
    )
    aux_weight: float = option(0.4, "weight of the auxiliary head's loss; 0: no auxiliary head", NOT_NEGATIVE)
    cutout_length: int = option(
        None,
        "side of the square that cutout blanks, in pixels; 0: none",
        ZERO_OR_EVEN,
        shown="digits 0, else 16",
    )
    drop_path_prob: float = option(
        None, "drop-path probability, reached linearly over the epochs", BELOW_1, shown="digits 0, else 0.2"
    )
    stem: str = option(
        "cifar",
        "cifar, for images of about 32 pixels, or imagenet, for about 224 (sides divisible by 32)",
        None,
        ("cifar", "imagenet"),
    )
    print_freq: int = option(200, "steps between two lines of the log", AT_LEAST_1)
    seed: int = option(2, "seed of weights, data order, augmentation and drop path", SEED)

    def __post_init__(self):
        if self.genotype is not None:  # a Genotype or a path is as good as its text
            object.__setattr__(self, "genotype", str(self.genotype))
        if self.stem == "imagenet" and str(self.dataset).lower() == "folder" and self.image_size is None:
            object.__setattr__(self, "image_size", IMAGENET_IMAGE_SIZE)
        super().__post_init__()
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs must be below epochs ({self.epochs}), not {self.warmup_epochs}")

    @classmethod
    def of_recipe(cls, recipe: str, **given: Any) -> "TrainConfig":
        """The settings of `RECIPES[recipe]`, but for those that are given.

        Raises:
            InputError: there is no such recipe, or the settings together are none.
        """
        if recipe not in cls.RECIPES:
            raise InputError(f"recipe must be {' or '.join(cls.RECIPES)}, not {reprlib.repr(recipe)}")
        settings = {**cls.RECIPES[recipe], **given}
        if str(settings["dataset"]).lower() != "folder":
            raise InputError(f"recipe {recipe} is for the data set folder: leave out the data set")
        return cls(**settings)

    def sizes(self, dataset: str) -> dict[str, Any]:
        return super().sizes(dataset) | (self.IMAGENET if self.stem == "imagenet" else {})


RunConfig = SearchConfig | TrainConfig


@dataclass(frozen=True)
class ProtocolConfig(Config):
    """Settings of the paper's protocol: searches, the choice of a cell, its trainings."""

    FOLDER, WORD = "protocols", "protocol"
    SMALL, PAPER = {}, {}
    # The runs of a phase: the kind of their settings, and which of these are not that kind's defaults, for
    # digits and for every other data set.
    PHASES: typing.ClassVar[dict[str, tuple[type[RunConfig], dict[str, Any], dict[str, Any]]]] = {
        "search": (SearchConfig, {}, {}),
        "brief": (
            TrainConfig,
            {"epochs": 20, "init_channels": 8, "layers": 3, "train_portion": 0.5},
            {"epochs": 100, "init_channels": 16, "layers": 8, "train_portion": 0.5},
        ),
        "train": (TrainConfig, {}, {}),
    }

    name: str = option(
        None, "folder, below protocols/", shown="the data set's name, numbered where that is taken"
    )
    searches: int = option(4, "searches, and random cells beside them", AT_LEAST_1)
    trainings: int = option(5, "trainings of the chosen cell, and of the chosen random one", AT_LEAST_1)
    seed: int = option(
        2,
        "seed of the first search, of every brief training and of the first training; the next search and "
        "training have the next number; random cells depend on it and their number",
        SEED,
    )
    search_settings: str = option(
        "",
        "settings of a search, for every search, such as 'epochs=20 order=1'",
        shown="a search's",
    )
    brief_settings: str = option(
        "",
        "settings of a training, for every brief one; its train_portion leaves images to choose by",
        shown="digits epochs=20 init_channels=8 layers=3, else epochs=100 init_channels=16 layers=8; "
        "train_portion=0.5",
    )
    train_settings: str = option(
        "",
        "settings of a training, for every one of a chosen cell",
        shown="a training's",
    )

    def __post_init__(self):
        super().__post_init__()
        last = self.seed + max(self.searches, self.trainings) - 1
        if last > LARGEST:
            raise InputError(f"the last run's seed would be {last}, and must be at most {LARGEST}")
        for phase in self.PHASES:
            self.of_run(phase)

    @typing.overload
    def of_run(self, phase: typing.Literal["search"], **own: Any) -> SearchConfig: ...

    @typing.overload
    def of_run(self, phase: typing.Literal["brief", "train"], **own: Any) -> TrainConfig: ...

    @typing.overload
    def of_run(self, phase: str, **own: Any) -> RunConfig: ...

    def of_run(self, phase: str, **own: Any) -> RunConfig:
        """The settings of a run of the phase, "search", "brief" or "train"; `own` are that run's, such as its
        seed.

        Raises:
            InputError: the settings that are passed on are none, or the protocol's own.
        """
        kind, small, paper = self.PHASES[phase]
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        field = f"{phase}_settings"
        try:
            words = shlex.split(getattr(self, field))
            for name in (word.partition("=")[0] for word in words):
                if name in (*shared, "name", "seed", "genotype"):
                    raise InputError(f"{name} is the protocol's: it is not passed on")
                if name not in {known.name for known in dataclasses.fields(kind)}:
                    raise InputError(f"no setting of a {kind.WORD} is called {reprlib.repr(name)}")
            given = vars(argument_parser(kind, "").parse_args([f"--{word}" for word in words]))
            defaults = small if self.dataset == "digits" else paper
            config = kind(**{**shared, **defaults, **given, **own})
        except ValueError as error:  # an InputError, or a quotation that does not end
            raise InputError(f"{field}: {error}") from error
        if isinstance(config, SearchConfig):
            if config.space == "nasbench201":
                raise InputError(
                    f"{field}: the cells of nasbench201 are not trained here: leave the space out"
                )
        elif (config.train_portion < 1) != (phase == "brief"):
            needed = "below 1, to choose by other images" if phase == "brief" else "1"
            raise InputError(f"{field}: train_portion must be {needed}, not {config.train_portion}")
        return config


NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def plain_type(annotation: Any) -> type:
    """int from `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def available_device(name: str | None) -> torch.device:
    """The device of that name; None: cuda where there is one, else cpu.

    Raises:
        InputError: it is no device of this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch("cpu|cuda(:[0-9]{1,4})?", name):
        raise InputError(f"device must be cpu, cuda or cuda:N, not {reprlib.repr(name)}")
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices; "
            "cpu is always there"
        )
    return torch.device(name)


def refuse_settings(flag: str, directory: str, given: dict[str, Any]) -> None:
    """Raises InputError where settings are given beside a flag that takes them from a run folder."""
    if given:
        raise InputError(
            f"{flag} takes its settings from {directory}/config.json; leave out --{next(iter(given))}"
        )


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence: an InputError, no usage block; a RunError where its
    help cannot be written."""

    def print_help(self, file: Any = None) -> None:
        say(self.format_help().removesuffix("\n"))

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (-h lists the options)")


def argument_parser(config: type[Config], description: str) -> argparse.ArgumentParser:
    """A parser with one flag for every field of `config`; what is not given is absent from its result."""
    parser = OneSentenceParser(description=description, allow_abbrev=False)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        shown = field.metadata["shown"] or field.default
        given: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['meaning']} (default: {shown})".replace("%", "%%"),
        }
        kind, choices = plain_type(hints[field.name]), field.metadata["choices"]
        if kind is bool:  # the flag alone turns it on
            parser.add_argument(f"--{field.name}", action="store_true", **given)
        else:
            metavar = None if choices else field.name.upper()
            if field.metadata["alone"] is not None:
                given |= {"nargs": "?", "const": field.metadata["alone"]}
            parser.add_argument(f"--{field.name}", type=kind, choices=choices, metavar=metavar, **given)
    return parser
