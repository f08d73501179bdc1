"""Whether a search collapses: what can be seen of it after every epoch, from the alphas and the genotype.

Gradient descent on the alphas often ends in cells of skip connections: they help the supernet, and make poor
networks (arXiv 1909.06035, DARTS+; arXiv 1909.09656, RobustDARTS). Nothing but `--stop_at_skips` decides
anything by it.
"""

from typing import NamedTuple

from torch import Tensor

from darts_fast.genotype import Gene
from darts_fast.space import DARTS, Names


class Diagnosis(NamedTuple):
    """What is seen of the cells of one kind, normal or reduction."""

    operations: dict[str, int]  # how many of the genotype's are of each kind
    # Of the softmaxed alphas of an edge, the mean over edges, in nats: at most ln 8 = 2.079 of 8 candidates
    entropy: float
    none: float  # softmaxed alpha of `none`, the mean over edges; 0 where no edge has it

    def scalars(self) -> dict[str, float]:
        return {**self.operations, "entropy": self.entropy, "none": self.none}

    @property
    def collapsed(self) -> bool:
        """Half of the operations are skip connections. (DARTS+ stops at two of a cell's eight.)"""
        return 0 < sum(self.operations.values()) <= 2 * self.operations["skip"]


def operations(gene: Gene, names: Names = DARTS.names) -> dict[str, int]:
    """How many of the operations of one of a genotype's cells are of each kind."""
    kinds = [names.kinds[name] for node in gene for name, _ in node]
    return {kind: kinds.count(kind) for kind in names.kinds.values()}


def diagnosis(gene: Gene, p: Tensor, names: Names = DARTS.names) -> Diagnosis:
    """The diagnosis of a genotype's cell and of the softmaxed alphas [edges, candidates] of its kind."""
    return Diagnosis(
        operations(gene, names),
        float(-(p * p.log()).nansum(dim=-1).mean()),  # of p = 0 nothing is added
        float(p[:, names.candidates.index("none")].mean()) if "none" in names.candidates else 0.0,
    )
