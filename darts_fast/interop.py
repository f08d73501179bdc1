"""Reads what other DARTS implementations saved."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from darts_fast.derived import DerivedNetwork, network
from darts_fast.errors import InputError
from darts_fast.genotype import Genotype
from darts_fast.space import CANDIDATES, EDGES, NODES, STEM_MULTIPLIER, reduction_layers
from darts_fast.supernet import Supernet

PT_DARTS_CANDIDATES = [name for name in CANDIDATES if name != "none"] + ["none"]


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
    renamed = _renamed(_unwrapped(state_dict), _search_name)
    return _supernet({**renamed, "alphas_normal": alphas_normal, "alphas_reduce": alphas_reduce}, fused)


def load_official_eval(state_dict: Mapping[str, Tensor], genotype: Genotype) -> DerivedNetwork:
    """The network of a genotype with the weights and running statistics of the official code's.

    Args:
        state_dict: of `cnn/model.py`'s `NetworkCIFAR` or `NetworkImageNet`, with or without auxiliary head,
            in any floating dtype; ours has the same.
        genotype: the one it was trained with.

    Raises:
        InputError: a tensor is missing, left over or of another shape; the message names it.
    """
    state = _renamed(_unwrapped(state_dict), _eval_name)
    return _derived(state, genotype, pool_batch_norm=False)


def load_pt_darts_search(state_dict: Mapping[str, Tensor], fused: bool = False) -> Supernet:
    """Our supernet with the weights, running statistics and alphas of pt.darts's `SearchCNNController`, whose
    `none` is the last candidate and whose alphas are a tensor a node.

    pt.darts saves the module itself: load it beside its code, and give its `state_dict()`. `fused` as in
    `Supernet`.

    Raises:
        InputError: a tensor is missing, left over or of another shape; the message names it.
    """
    state = _unwrapped(state_dict)
    weights = {name: tensor for name, tensor in state.items() if not name.startswith("alpha_")}
    renamed = _renamed(weights, _pt_darts_search_name)
    order = [PT_DARTS_CANDIDATES.index(name) for name in CANDIDATES]
    for ours, theirs in (("alphas_normal", "alpha_normal"), ("alphas_reduce", "alpha_reduce")):
        alphas = torch.cat([_required(state, f"{theirs}.{node}") for node in range(NODES)])
        if alphas.shape[1:] != (len(order),):
            raise InputError(f"the state's '{theirs}' is not about {len(order)} candidates")
        renamed[ours] = alphas[:, order]
    return _supernet(renamed, fused)


def load_pt_darts_augment(state_dict: Mapping[str, Tensor], genotype: Genotype) -> DerivedNetwork:
    """The network of a genotype with the weights and running statistics of pt.darts's `AugmentCNN`, in
    which a batch norm stands behind every pool.

    pt.darts saves the module itself: load it beside its code, and give its `state_dict()`.

    Raises:
        InputError: a tensor is missing, left over or of another shape; the message names it. So does
            conv_7x1_1x7, whose padding in pt.darts enlarges the image: no network with it can run there.
    """
    if any(name == "conv_7x1_1x7" for node in genotype.normal + genotype.reduce for name, _ in node):
        raise InputError("conv_7x1_1x7 of pt.darts is not the official one and cannot be loaded")
    state = _unwrapped(state_dict)
    rename = partial(_pt_darts_augment_name, genotype=genotype, layers=_layers(state))
    state = _renamed(state, rename)
    return _derived(state, genotype, pool_batch_norm=True)


def _supernet(state: Mapping[str, Tensor], fused: bool) -> Supernet:
    """The supernet whose sizes are those of the state."""
    stem, classifier = _required(state, "stem.0.weight"), _required(state, "classifier.weight")
    channels = stem.shape[0] // STEM_MULTIPLIER
    supernet = Supernet(channels, classifier.shape[0], _layers(state), stem.shape[1], fused)
    supernet.to(stem.dtype)
    load_exactly(supernet, state)
    return supernet


def _derived(state: Mapping[str, Tensor], genotype: Genotype, pool_batch_norm: bool) -> DerivedNetwork:
    """The network of the genotype whose sizes are those of the state."""
    stem = "imagenet" if "stem0.0.weight" in state else "cifar"
    first = _required(state, "stem0.0.weight" if stem == "imagenet" else "stem.0.weight")
    channels = first.shape[0] * 2 if stem == "imagenet" else first.shape[0] // STEM_MULTIPLIER
    classes = _required(state, "classifier.weight").shape[0]
    auxiliary = any(name.startswith("auxiliary_head.") for name in state)
    derived = network(
        genotype, classes, channels, _layers(state), first.shape[1], stem, auxiliary, pool_batch_norm
    )
    derived.to(first.dtype)
    load_exactly(derived, state)
    return derived


def _layers(state: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("cells.")})


def _unwrapped(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DataParallel adds."""
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


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


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        try:
            renamed[rename(name)] = tensor
        except (IndexError, ValueError) as error:  # a number or a part of the name is not what it should be
            raise InputError(f"the state has a tensor that this network does not: '{name}'") from error
    return renamed


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


def _eval_name(official: str) -> str:
    """cells.0._ops.3.op.1.weight -> cells.0.edges.3.1.weight"""
    return official.replace("._ops.", ".edges.").replace(".op.", ".")


def _pt_darts_search_name(theirs: str) -> str:
    """net.cells.0.dag.1.2._ops.3.net.1.weight -> cells.0.edges.4.sep_conv_3x3.1.weight"""
    parts = theirs.removeprefix("net.").split(".")
    if parts[0] != "cells" or parts[2] != "dag":
        return _pt_darts_other_name(parts)
    edge, candidate = EDGES.index((int(parts[4]), int(parts[3]))), PT_DARTS_CANDIDATES[int(parts[6])]
    return ".".join([*parts[:2], "edges", str(edge), candidate, *_pt_darts_layer(candidate, parts[7:])])


def _pt_darts_augment_name(theirs: str, genotype: Genotype, layers: int) -> str:
    """cells.0.dag.1.0.0.net.1.weight -> cells.0.edges.2.1.weight; the last 0 is before the drop path."""
    parts = theirs.split(".")
    if parts[0] != "cells" or parts[2] != "dag":
        return _pt_darts_other_name(parts)
    gene = genotype.reduce if int(parts[1]) in reduction_layers(layers) else genotype.normal
    node, pair = int(parts[3]), int(parts[4])
    edge = sum(len(before) for before in gene[:node]) + pair
    layer = _pt_darts_layer(gene[node][pair][0], parts[6:])
    return ".".join([*parts[:2], "edges", str(edge), *layer])


def _pt_darts_layer(operation: str, parts: list[str]) -> list[str]:
    """A separable convolution is two sequences of four layers there (net.1.net.3.bias), one of eight here
    (7.bias); the batch norm behind a pool has a name there (bn.bias), a number here (1.bias)."""
    if parts[0] == "net" and parts[2] == "net":
        return [str(4 * int(parts[1]) + int(parts[3])), *parts[4:]]
    if parts[0] == "net":
        return parts[1:]
    if "pool" in operation and parts[0] == "bn":
        return ["1", *parts[1:]]
    return [{"conv1": "conv_1", "conv2": "conv_2"}.get(part, part) for part in parts]


def _pt_darts_other_name(parts: list[str]) -> str:
    """Stem, preprocessing, classifier and auxiliary head."""
    renamed = {
        "preproc0": "preprocess0", "preproc1": "preprocess1", "conv1": "conv_1", "conv2": "conv_2",
        "linear": "classifier", "aux_head": "auxiliary_head",
        "net": "features" if parts[0] == "aux_head" else "",
    }  # fmt: skip
    return ".".join(filter(None, (renamed.get(part, part) for part in parts)))


def _required(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise InputError(f"the state has no tensor '{name}', so it is not of the expected network")
    return state[name]
