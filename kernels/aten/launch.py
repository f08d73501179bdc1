"""A launch of this backend: a function of ATen operations, and the arguments that it will be called with."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from darts_fast.kernels.types import Launch, tensors


@dataclass
class AtenLaunch(Launch):
    """`run` computes, and writes the results into the tensors that the launch was made for."""

    run: Callable[[], None]


def as_launch(function: Callable[..., None]) -> Callable[..., list[Launch]]:
    """Turns a function that computes at once into one that returns the launch which will compute."""

    @functools.wraps(function)
    def launch(*reads: Any, **named: Any) -> list[Launch]:
        found = list(tensors([reads, named]))
        return [AtenLaunch(function.__name__, found, functools.partial(function, *reads, **named))]

    return launch
