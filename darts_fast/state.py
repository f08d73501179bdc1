"""State as nested dictionaries of tensors, such as `state_dict()` gives: checked against, and copied into,
that of a run that was just made."""

import math
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# The last names of tensors that hold variances, second moments and counts.
NEVER_NEGATIVE = ("running_var", "num_batches_tracked", "exp_avg_sq", "step", "loss_scale")


def named_tensors(state: Tensor | dict, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors with their keys, joined by dots."""
    if isinstance(state, Tensor):
        yield name, state
        return
    for key, value in state.items():
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def check_state(found: Any, own: Tensor | dict, name: str) -> None:
    """Raises ValueError unless `found` has the keys of `own` and on the host tensors of the same shapes and
    dtypes, and every number in them is finite and not negative where it never can be."""
    if isinstance(own, dict):
        check_keys(found, own.keys(), name)
        for key in own:
            check_state(found[key], own[key], f"{name}.{key}")
        return
    if type(found) is not Tensor or found.device.type != "cpu" or found.layout != torch.strided:
        raise ValueError(f"{name} is no tensor with data")
    if found.dtype != own.dtype or found.shape != own.shape:
        kinds = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (found, own)]
        raise ValueError(f"{name} is {kinds[0]}, not {kinds[1]}")
    if not torch.isfinite(found).all():
        raise ValueError(f"{name} is not finite")
    if name.rpartition(".")[2] in NEVER_NEGATIVE and (found < 0).any():
        raise ValueError(f"{name} is negative")


def check_keys(found: Any, keys: Collection, name: str) -> None:
    """Raises ValueError unless `found` is a dictionary with these keys and no other."""
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no dictionary")
    for key in keys:
        if key not in found:
            raise ValueError(f"{name} has no {key}")
    for key in found:
        if key not in keys:
            raise ValueError(f"{name} has {reprlib.repr(key)}, which does not belong there")


def check_number(found: Any, kind: type[int] | type[float], least: float, most: float, name: str) -> None:
    """Raises ValueError unless `found` is of the kind (int or float) and from `least` to `most`, which may be
    infinite; NaN and the infinities are no numbers."""
    if type(found) is not kind or not least <= found <= most or (kind is float and not math.isfinite(found)):
        noun = "a whole number" if kind is int else "a finite number"
        limits = "" if math.isinf(most) else f" from {least} to {most}"
        raise ValueError(f"{name} is {reprlib.repr(found)}, not {noun}{limits}")


@torch.no_grad()
def copy_state(own: Tensor | Mapping, found: Tensor | Mapping) -> None:
    """Copies the tensors of `found`, which `check_state` has let pass, into those of `own`."""
    if isinstance(own, Tensor):
        own.copy_(found)  # type: ignore[arg-type]  # a tensor, too: `check_state` has seen it
    else:
        for key, value in own.items():
            copy_state(value, found[key])
