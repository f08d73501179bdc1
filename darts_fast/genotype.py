"""Genotype: the discrete architecture that a search ends in."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from darts_fast.space import CANDIDATES, EDGES, INPUTS, NODES

EDGES_KEPT = 2  # incoming edges that each node keeps (section 2.4)

Gene = list[list[tuple[str, int]]]


class Genotype(NamedTuple):
    """Two cells. Each is a list of nodes; a node is the sum of its (operation, source state) pairs.

    States 0 and 1 are the outputs of the two cells before; state n + 2 is node n. The states in `concat`
    are concatenated into the cell's output. `str()` is the nested notation, for instance
    `Genotype(normal=[[('sep_conv_3x3', 0), ('sep_conv_3x3', 1)], ...], normal_concat=range(2, 6), ...)`.
    """

    normal: Gene
    normal_concat: range | list[int]
    reduce: Gene
    reduce_concat: range | list[int]

    def as_json(self) -> dict[str, list]:
        """Plain lists, for a JSON file."""
        return {
            "normal": [[list(pair) for pair in node] for node in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [[list(pair) for pair in node] for node in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    @classmethod
    def from_json(cls, content: dict[str, list]) -> "Genotype":
        """The inverse of `as_json`."""
        return cls(
            [[(name, source) for name, source in node] for node in content["normal"]],
            _range_if_consecutive(content["normal_concat"]),
            [[(name, source) for name, source in node] for node in content["reduce"]],
            _range_if_consecutive(content["reduce_concat"]),
        )


def derive(alphas_normal: Tensor, alphas_reduce: Tensor, rule: str = "softmax") -> Genotype:
    """The genotype of the alphas ([14, 8] each): section 2.4 of the paper.

    Every edge keeps its strongest candidate other than `none`, every node its two strongest edges,
    strongest first. Strength is the softmaxed alpha over all eight candidates under the rule "softmax"
    (the official code), the alpha itself under "raw" (pt.darts): they choose other edges where the weight
    of `none` differs between edges. Ties go to the lower index.
    """
    strengths: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda alphas: alphas.softmax(dim=-1),
        "raw": lambda alphas: alphas,
    }
    concat = range(INPUTS, INPUTS + NODES)
    normal, reduce = (
        _strongest(strengths[rule](alphas.detach()).tolist()) for alphas in (alphas_normal, alphas_reduce)
    )
    return Genotype(normal, concat, reduce, concat)


def _strongest(strength: list[list[float]]) -> Gene:
    names = list(CANDIDATES)
    choices = [k for k, name in enumerate(names) if name != "none"]
    best = [max(choices, key=row.__getitem__) for row in strength]  # max() takes the first of equals
    gene = []
    for node in range(NODES):
        edges = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
        edges.sort(key=lambda edge: -strength[edge][best[edge]])  # stable: equals stay in order
        gene.append([(names[best[edge]], EDGES[edge][0]) for edge in edges[:EDGES_KEPT]])
    return gene


def _range_if_consecutive(states: list[int]) -> range | list[int]:
    """Equal genotypes compare equal and print alike, however their concat was written."""
    run = range(states[0], states[0] + len(states)) if states else range(0)
    return run if list(run) == list(states) and states else list(states)
