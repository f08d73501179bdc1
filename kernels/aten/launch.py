"""A launch of this backend: a function of ATen operations, and the arguments that it will be called with."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from darts_fast.kernels.types import Launch


@dataclass
class AtenLaunch(Launch):
    """`run` computes, and writes the results into the tensors that the launch was made for."""

    run: Callable[[], None]


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested sequences and structures, in order."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from tensors_in(argument)


def as_launch(function: Callable[..., None]) -> Callable[..., list[Launch]]:
    """Turns a function that computes at once into one that returns the launch which will compute."""

    @functools.wraps(function)
    def launch(*reads: Any, **named: Any) -> list[Launch]:
        tensors = list(tensors_in([*reads, *named.values()]))
        return [AtenLaunch(function.__name__, tensors, functools.partial(function, *reads, **named))]

    return launch
