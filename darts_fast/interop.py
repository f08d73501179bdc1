"""Reads what other DARTS implementations saved."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from darts_fast.errors import InputError
from darts_fast.space import CANDIDATES
from darts_fast.supernet import STEM_MULTIPLIER, Supernet


def load_official_search(
    state_dict: Mapping[str, Tensor], alphas_normal: Tensor, alphas_reduce: Tensor, fused: bool = False
) -> Supernet:
    """Our supernet with the weights, running statistics and alphas of the official code's search network.

    Args:
        state_dict: of `cnn/model_search.py`'s `Network`, in any floating dtype; the supernet has the same.
        alphas_normal, alphas_reduce: [14, 8], which the official code keeps outside its state.
        fused: as in `Supernet`.

    Raises:
        InputError: a tensor is missing, left over or of another shape; the message names it.
    """
    stem, classifier = _required(state_dict, "stem.0.weight"), _required(state_dict, "classifier.weight")
    layers = len({name.split(".")[1] for name in state_dict if name.startswith("cells.")})
    network = Supernet(stem.shape[0] // STEM_MULTIPLIER, classifier.shape[0], layers, stem.shape[1], fused)
    network.to(stem.dtype)
    renamed = {_search_name(name): tensor for name, tensor in state_dict.items()}
    renamed |= {"alphas_normal": alphas_normal, "alphas_reduce": alphas_reduce}
    load_exactly(network, renamed)
    return network


def load_exactly(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies `state` into the network; every name and shape must match.

    Raises:
        InputError: names the first tensor that is missing, left over or of another shape.
    """
    own = network.state_dict()
    for name, tensor in own.items():
        found = _required(state, name)
        if found.shape != tensor.shape:
            raise InputError(
                f"the state's '{name}' has shape {list(found.shape)}; this network needs {list(tensor.shape)}"
            )
    left_over = sorted(set(state) - set(own))
    if left_over:
        raise InputError(f"the state has a tensor that this network does not: '{left_over[0]}'")
    with torch.no_grad():
        network.load_state_dict(dict(state))


def _search_name(official: str) -> str:
    """cells.0._ops.3._ops.4.op.1.weight -> cells.0.edges.3.sep_conv_3x3.1.weight"""
    parts = official.split(".")
    if parts[0] != "cells":
        return official
    if parts[2] == "_ops":
        candidates = list(CANDIDATES)
        edge, candidate, rest = parts[3], candidates[int(parts[5])], parts[6:]
        parts = [*parts[:2], "edges", edge, candidate, *rest]
    return ".".join(part for part in parts if part != "op")


def _required(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise InputError(f"the state has no tensor '{name}', so it is not of the expected network")
    return state[name]
