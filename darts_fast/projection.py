"""DARTS-PT (arXiv 2108.04392): the genotype decided edge by edge, by what a supernet loses without an
operation.

The strength of an operation is not its alpha, but how much lower the supernet's validation accuracy is when
it is left out of its edge. In each round an edge of both cells, drawn at random, is given its strongest
operation alone, and the supernet is trained on for some epochs. Once every edge has one, a round is a node,
whose two strongest edges stay: one by one, the edge whose absence costs the least accuracy goes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from darts_fast.architect import Tensors
from darts_fast.genotype import EDGES_KEPT, Gene, Genotype, drawn
from darts_fast.space import Space

Measure = Callable[["Decisions"], tuple[float, float]]  # loss and accuracy of the supernet so decided


class Decisions(NamedTuple):
    """What the candidates are weighed by: kept * softmax(alpha) + added, by the names of the alphas, shaped
    as these. The row of an edge that is decided is 0 in `kept`, and 1 at its operation in `added` if the edge
    stays."""

    kept: Tensors
    added: Tensors

    def copy(self) -> "Decisions":
        return Decisions(*({name: t.clone() for name, t in tensors.items()} for tensors in self))

    def decide(self, name: str, edge: int, operation: int | None) -> None:
        """The edge has this operation alone; None: it goes."""
        self.kept[name][edge] = 0
        self.added[name][edge] = 0
        if operation is not None:
            self.added[name][edge, operation] = 1


def nothing_decided(like: Tensors) -> Decisions:
    """The decisions before the first round, shaped as the alphas `like`."""
    return Decisions(
        {name: torch.ones_like(tensor) for name, tensor in like.items()},
        {name: torch.zeros_like(tensor) for name, tensor in like.items()},
    )


def rounds(space: Space) -> int:
    """The number of rounds: one for each edge, then one for each node of more than two edges."""
    return len(space.edges) + space.nodes - 1  # the first node has two


def decided_round(
    number: int, before: Decisions, space: Space, measure: Measure, generator: torch.Generator
) -> tuple[Decisions, list[str]]:
    """The decisions after this round, and in words what it decided of each cell. `generator` (of the host)
    draws the edge or the node."""
    found, said = before.copy(), []
    present = dict(zip(found.kept, space.present(), strict=True))
    for name in found.kept:
        if number < len(space.edges):
            open_edges = found.kept[name].any(dim=1).nonzero().flatten().tolist()
            said.append(
                _decide_edge(name, drawn(open_edges, generator), found, space, present[name], measure)
            )
        else:
            left = [node for node in range(space.nodes) if len(_edges_of(node, found.added[name], space)) > 2]
            said.append(_decide_node(name, drawn(left, generator), found, space, measure))
    return found, said


def all_decided(decisions: Decisions, space: Space) -> bool:
    """Whether every edge is decided, and every node has no more edges than a genotype keeps."""
    return not any(kept.any() for kept in decisions.kept.values()) and all(
        len(_edges_of(node, added, space)) <= EDGES_KEPT
        for added in decisions.added.values()
        for node in range(space.nodes)
    )


def genotype_of(decisions: Decisions, space: Space) -> Genotype:
    """The genotype of decisions that are all made."""
    normal, reduce = (_gene(added, space) for added in decisions.added.values())
    return Genotype(normal, space.concat, reduce, space.concat)


def _decide_edge(
    name: str, edge: int, found: Decisions, space: Space, present: list[list[bool]], measure: Measure
) -> str:
    candidates = [
        k for k, candidate in enumerate(space.candidates) if present[edge][k] and candidate != "none"
    ]

    def without(operation: int) -> tuple[float, float]:
        trial = found.copy()
        trial.kept[name][edge, operation] = 0
        return _badness(measure(trial))

    strongest = max(candidates, key=without) if len(candidates) > 1 else candidates[0]
    found.decide(name, edge, strongest)
    source, node = space.edges[edge]
    return f"{name}: the edge from state {source} to node {node} is {space.candidates[strongest]}"


def _decide_node(name: str, node: int, found: Decisions, space: Space, measure: Measure) -> str:
    def without(edge: int) -> tuple[float, float]:
        trial = found.copy()
        trial.decide(name, edge, None)
        return _badness(measure(trial))

    while len(left := _edges_of(node, found.added[name], space)) > EDGES_KEPT:
        found.decide(name, min(left, key=without), None)
    return f"{name}: node {node} reads states {' and '.join(str(space.edges[edge][0]) for edge in left)}"


def _badness(measured: tuple[float, float]) -> tuple[float, float]:
    """By which two supernets are compared: the less accurate one is worse; of equals, that of higher loss."""
    loss, top1 = measured
    return -top1, loss


def _edges_of(node: int, added: Tensor, space: Space) -> list[int]:
    """The decided edges of a node that stay."""
    stays = added.any(dim=1).tolist()
    return [edge for edge in space.incoming(node) if stays[edge]]


def _gene(added: Tensor, space: Space) -> Gene:
    gene = []
    for node in range(space.nodes):
        edges = _edges_of(node, added, space)
        operations = added.argmax(dim=1).tolist()
        gene.append([(space.candidates[operations[edge]], space.edges[edge][0]) for edge in edges])
    return gene
