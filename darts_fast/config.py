"""Settings of a run: frozen dataclasses, checked when made; the command line is generated from them."""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from darts_fast.errors import InputError

Check = tuple[Callable[[Any], bool], str]  # a test of the value, and what it has to be

POSITIVE: Check = (lambda value: value > 0, "above 0")
NOT_NEGATIVE: Check = (lambda value: value >= 0, "0 or more")
AT_LEAST_1: Check = (lambda value: value >= 1, "at least 1")
FRACTION: Check = (lambda value: 0 < value < 1, "above 0 and below 1")
BELOW_1: Check = (lambda value: 0 <= value < 1, "from 0 to below 1")
EVEN: Check = (lambda value: value >= 2 and value % 2 == 0, "an even number, at least 2")
AT_LEAST_3: Check = (lambda value: value >= 3, "at least 3, so that there are normal and reduction cells")
SEED: Check = (lambda value: 0 <= value < 2**32, "from 0 to 4294967295")


def option(
    default: Any, meaning: str, check: Check | None = None, choices: Sequence | None = None, shown: str = ""
) -> Any:
    """A field: its default, its help text, what its value must satisfy; `shown` describes a None."""
    metadata = {"meaning": meaning, "check": check, "choices": choices, "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


class Config:
    """What the settings of the two programs share: checks, and defaults that depend on the data set."""

    SMALL: typing.ClassVar[dict[str, Any]]  # where the setting is None: for digits
    PAPER: typing.ClassVar[dict[str, Any]]  # and for every other data set

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            wanted = plain_type(hints[field.name])
            if wanted is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if type(value) is not wanted:
                raise InputError(f"{field.name} must be {NOUNS[wanted]}, not {value!r}")
            if wanted is float and not math.isfinite(value):
                raise InputError(f"{field.name} must be a finite number, not {value!r}")
            choices, check = field.metadata["choices"], field.metadata["check"]
            if choices and value not in choices:
                raise InputError(f"{field.name} must be {' or '.join(map(str, choices))}, not {value!r}")
            if check and not check[0](value):
                raise InputError(f"{field.name} must be {check[1]}, not {value!r}")

    def resolved(self, dataset: str) -> "Config":
        """The same with no None left but `name`: the data set's sizes, the device that is there.

        Raises:
            InputError: the device asked for is not there.
        """
        sizes = self.SMALL if dataset == "digits" else self.PAPER
        chosen = {name: value for name, value in sizes.items() if getattr(self, name) is None}
        return dataclasses.replace(self, dataset=dataset, device=str(available_device(self.device)), **chosen)


@dataclass(frozen=True)
class SearchConfig(Config):
    """Settings of a search. Flags of pt.darts keep their names and defaults."""

    name: str | None = option(
        None, "run folder, below searchs/", shown="the data set's name, numbered where that is taken"
    )
    dataset: str = option("digits", "data set: digits (embedded, no download) or cifar10")
    data_path: str = option("data", "folder of the data set's files; downloaded there if absent")
    batch_size: int = option(64, "images a batch, of the training and of the validation half", AT_LEAST_1)
    epochs: int | None = option(None, "passes over the training half", AT_LEAST_1, shown="digits 5, else 50")
    init_channels: int | None = option(
        None, "width of a node in the first cell", EVEN, shown="digits 4, else 16"
    )
    layers: int | None = option(None, "number of cells", AT_LEAST_3, shown="digits 3, else 8")
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
    fused: bool = option(False, "compute the cells in a few calls: the same search, faster")
    derive: str = option(
        "softmax",
        "edges are ranked by softmaxed alphas (official) or by raw ones (pt.darts)",
        None,
        ("softmax", "raw"),
    )
    train_portion: float = option(
        0.5, "share of the images that trains weights; the rest trains alphas", FRACTION
    )
    cutout_length: int = option(0, "side of the square that cutout blanks, in pixels; 0: none", NOT_NEGATIVE)
    print_freq: int = option(50, "steps between two lines of the log", AT_LEAST_1)
    seed: int = option(2, "seed of weights, alphas, data order and augmentation", SEED)
    device: str | None = option(None, "cpu, cuda or cuda:N", shown="cuda where there is one, else cpu")

    def __post_init__(self):
        super().__post_init__()
        if self.w_lr_min > self.w_lr:
            raise InputError(f"w_lr_min must be at most w_lr ({self.w_lr}), not {self.w_lr_min}")

    SMALL = {"epochs": 5, "init_channels": 4, "layers": 3}
    PAPER = {"epochs": 50, "init_channels": 16, "layers": 8}


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
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or name.endswith(":"):
        raise InputError(f"device must be cpu, cuda or cuda:N, not {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices; "
            "cpu is always there"
        )
    return torch.device(name)


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence: an InputError, no usage block."""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (-h lists the options)")


def argument_parser(config: type[Config], description: str) -> argparse.ArgumentParser:
    """A parser with one flag for every field of `config`; what is not given is absent from its result."""
    parser = OneSentenceParser(description=description, allow_abbrev=False)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        shown = field.metadata["shown"] or field.default
        given = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['meaning']} (default: {shown})".replace("%", "%%"),
        }
        kind, choices = plain_type(hints[field.name]), field.metadata["choices"]
        if kind is bool:  # the flag alone turns it on
            parser.add_argument(f"--{field.name}", action="store_true", **given)
        else:
            metavar = None if choices else field.name.upper()
            parser.add_argument(f"--{field.name}", type=kind, choices=choices, metavar=metavar, **given)
    return parser
