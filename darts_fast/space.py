"""The search space of DARTS as one table (arXiv 1806.09055, section 3.1), and what another space is."""

from typing import NamedTuple

NODES = 4  # intermediate nodes of a cell; their outputs are concatenated into the cell's output
STEM_MULTIPLIER = 3  # the stem (of CIFAR networks) is this many times as wide as a node of the first cell
INPUTS = 2  # a cell reads the outputs of the two cells before it: states 0 and 1


class Primitive(NamedTuple):
    """An operation: what it is, its kernel size and its dilation (0 where it has none)."""

    kind: str
    kernel: int = 0
    dilation: int = 0


# Every operation of the official code; and noise, which RobustDARTS adds (arXiv 1909.09656, section 3).
PRIMITIVES: dict[str, Primitive] = {
    "none": Primitive("none"),
    "max_pool_3x3": Primitive("max_pool", 3),
    "avg_pool_3x3": Primitive("avg_pool", 3),
    "skip_connect": Primitive("skip"),
    "sep_conv_3x3": Primitive("sep_conv", 3, 1),
    "sep_conv_5x5": Primitive("sep_conv", 5, 1),
    "dil_conv_3x3": Primitive("dil_conv", 3, 2),
    "dil_conv_5x5": Primitive("dil_conv", 5, 2),
    "sep_conv_7x7": Primitive("sep_conv", 7, 1),
    "conv_7x1_1x7": Primitive("conv", 7, 1),
    "noise": Primitive("noise"),
}

# The eight candidates of every mixed op, in the order of the official code: column k of the alphas
# belongs to the k-th name. The other two of the official code occur in NASNet and AmoebaNet only.
CANDIDATES: dict[str, Primitive] = {
    name: primitive
    for name, primitive in PRIMITIVES.items()
    if name not in ("sep_conv_7x7", "conv_7x1_1x7", "noise")
}


def edges(nodes: int) -> tuple[tuple[int, int], ...]:
    """Edges of a cell, in the order of the alphas' rows: (source state, node). Node n is state n + 2 and has
    an edge from every state before it."""
    return tuple((source, node) for node in range(nodes) for source in range(INPUTS + node))


EDGES = edges(NODES)

Candidates = tuple[tuple[str, ...], ...]  # of each edge, in the order of PRIMITIVES


class Names(NamedTuple):
    """What the alphas of a space are called."""

    edges: tuple[str, ...]  # of the rows
    candidates: tuple[str, ...]  # of the columns
    kinds: dict[str, str]  # the kind of every operation that a cell can keep


class Space(NamedTuple):
    """A search space: cells of so many nodes, and the candidates of each of their edges."""

    normal: Candidates
    reduce: Candidates
    nodes: int = NODES

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        return edges(self.nodes)

    def incoming(self, node: int) -> list[int]:
        """The edges that enter a node."""
        return [edge for edge, (_, target) in enumerate(self.edges) if target == node]

    @property
    def concat(self) -> range:
        """The states that are the cell's output: its nodes."""
        return range(INPUTS, INPUTS + self.nodes)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Of any edge: column k of the alphas belongs to the k-th."""
        found = {name for of_edge in (*self.normal, *self.reduce) for name in of_edge}
        return tuple(name for name in PRIMITIVES if name in found)

    @property
    def names(self) -> Names:
        inputs = "c_k-2", "c_k-1"
        edges = [
            f"{inputs[source] if source < INPUTS else source - INPUTS} to {node}"
            for source, node in self.edges
        ]
        left_out = {"none", "conv"} | ({"noise"} - set(self.candidates))
        kinds = {name: kind for name, (kind, *_) in PRIMITIVES.items() if kind not in left_out}
        skip_first = {"skip_connect": "skip", **kinds}
        return Names(tuple(edges), self.candidates, skip_first)

    def present(self) -> tuple[list[list[bool]], list[list[bool]]]:
        """Of normal and reduction cells: whether an edge has a candidate, shaped as the alphas."""
        names = self.candidates
        normal, reduce = (
            [[name in of_edge for name in names] for of_edge in of_kind]
            for of_kind in (self.normal, self.reduce)
        )
        return normal, reduce


# The paper's: every edge has the eight.
DARTS = Space((tuple(CANDIDATES),) * len(EDGES), (tuple(CANDIDATES),) * len(EDGES))


def reduction_layers(layers: int) -> tuple[int, int]:
    """Indices of the two cells that halve the image and double the channels."""
    return layers // 3, 2 * layers // 3
