"""Genotype: the discrete architecture that a search ends in, and what a valid one is."""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from darts_fast.errors import InputError
from darts_fast.space import DARTS, INPUTS, PRIMITIVES, Candidates, Space

EDGES_KEPT = 2  # incoming edges that each node keeps (section 2.4)
OPERATIONS = tuple(name for name in PRIMITIVES if name != "none")  # what an edge of a genotype may be

Gene = list[list[tuple[str, int]]]
Choice = TypeVar("Choice")


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

    def flat(self) -> str:
        """The flat notation of the official code: the pairs of all nodes in one list, two a node.

        Raises:
            InputError: a node has another number of pairs.
        """
        for cell, gene in (("normal", self.normal), ("reduce", self.reduce)):
            for number, node in enumerate(gene):
                if len(node) != EDGES_KEPT:
                    raise InputError(
                        f"no flat notation: node {number} of {cell} has {len(node)} pairs, not {EDGES_KEPT}"
                    )
        flat = {
            name: [pair for node in getattr(self, name) for pair in node] for name in ("normal", "reduce")
        }
        return str(self._replace(**flat))

    def as_json(self) -> dict[str, list]:
        """Plain lists, for a JSON file."""
        return {
            "normal": [[list(pair) for pair in node] for node in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [[list(pair) for pair in node] for node in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    @classmethod
    def from_json(cls, content: Any, place: str = "genotype") -> "Genotype":
        """The inverse of `as_json`. `place` says in an error where the content was found.

        Raises:
            InputError: `content` is anything else, or no valid genotype.
        """
        if not isinstance(content, dict) or set(content) != set(cls._fields):
            raise InputError(f"{place} must have {', '.join(cls._fields)} and nothing else")
        return assemble({field: _item(content[field], f"{place}.{field}") for field in cls._fields})


class Item(NamedTuple):
    """A part of a written genotype, and where it stands, for errors. A valid one holds text, a whole number,
    a list of items, or a range of whole numbers."""

    content: Any
    place: str


def assemble(fields: dict[str, Item]) -> Genotype:
    """The genotype of the fields `normal`, `normal_concat`, `reduce` and `reduce_concat`. A gene is nested, a
    list of nodes that are lists of (operation, source) pairs, or flat, a list of two pairs a node.

    Raises:
        InputError: a field is no gene or concat, an operation is unknown, or a state does not exist there.
    """
    normal = _gene(fields["normal"])
    normal_concat = _concat(fields["normal_concat"], len(normal))
    reduce = _gene(fields["reduce"])
    return Genotype(normal, normal_concat, reduce, _concat(fields["reduce_concat"], len(reduce)))


def _gene(item: Item) -> Gene:
    entries = _entries(item, "a list of nodes or pairs")
    if type(entries[0].content) is list and entries[0].content and type(entries[0].content[0].content) is str:
        if len(entries) % 2:
            last = entries[-1]
            raise InputError(
                f"{last.place}: a flat list has two pairs a node, and the last, {shown(last)}, is alone"
            )
        nodes = [entries[start : start + 2] for start in range(0, len(entries), 2)]
    else:
        nodes = [_entries(entry, "a node, which is a list of pairs") for entry in entries]
    return [[_pair(entry, number) for entry in node] for number, node in enumerate(nodes)]


def _pair(item: Item, node: int) -> tuple[str, int]:
    parts = item.content if type(item.content) is list else []
    if [type(part.content) for part in parts] != [str, int]:
        raise InputError(f"{item.place}: expected an (operation, source state) pair, found {shown(item)}")
    (name, name_place), (source, source_place) = parts
    if name == "none":
        raise InputError(f"{name_place}: 'none' is no operation of a genotype, which leaves the edge out")
    if name not in OPERATIONS:
        raise InputError(f"{name_place}: {shown(name)} is no operation{suggestion(name, OPERATIONS)}")
    if not 0 <= source < INPUTS + node:
        raise InputError(
            f"{source_place}: node {node} reads the states before it, 0 to {INPUTS + node - 1}, "
            f"not {shown(source)}"
        )
    return name, source


def _concat(item: Item, nodes: int) -> range | list[int]:
    states: dict[int, None] = {}
    entries: Iterable[Item]
    if type(item.content) is range:  # lazily: a long one ends at its first state that does not exist
        entries = (Item(state, item.place) for state in item.content)
    else:
        entries = _entries(item, "a list of states, or a range")
    for state, place in entries:
        if type(state) is not int or not INPUTS <= state < INPUTS + nodes:
            raise InputError(
                f"{place}: a concat is made of the nodes' states, {INPUTS} to {INPUTS + nodes - 1}, "
                f"not {shown(state)}"
            )
        if state in states:
            raise InputError(f"{place}: state {state} is twice in the concat")
        states[state] = None
    if not states:
        raise InputError(f"{item.place}: the concat is empty")
    return _range_if_consecutive(list(states))


def _entries(item: Item, noun: str) -> list[Item]:
    if type(item.content) is not list or not item.content:
        raise InputError(f"{item.place}: expected {noun}, found {shown(item)}")
    return item.content


def _item(content: Any, place: str, depth: int = 0) -> Item:
    """The item of a JSON value. No deeper than a gene's pairs: what is below is refused as it is."""
    if type(content) is list and depth < 3:
        content = [_item(part, f"{place}[{index}]", depth + 1) for index, part in enumerate(content)]
    return Item(content, place)


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: a likely spelling, else all that is known."""
    spelling = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), spelling, n=1)
    return f"; did you mean {spelling[close[0]]}?" if close else f"; known: {', '.join(spelling.values())}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def shown(fragment: Any) -> str:
    """Somebody's input as a quotation: printable and short."""
    return _short.repr(_plain(fragment))


def _plain(fragment: Any) -> Any:
    """The content of an item and of its parts; what is no item is somebody's own, nested to any depth."""
    if not isinstance(fragment, Item):
        return fragment
    content = fragment.content
    return [_plain(part) for part in content] if type(content) is list else content


def in_short(gene: Gene) -> str:
    """A cell in a line of a terminal, for people: `sep3 0, skip 1 | max3 0, dil5 2 | ...`, an operation and
    the state that it reads, the nodes parted by bars."""
    return " | ".join(", ".join(f"{_short_name(name)} {source}" for name, source in node) for node in gene)


def _short_name(operation: str) -> str:
    for part in ("_connect", "_conv", "_pool", "_"):
        operation = operation.replace(part, "")
    return re.sub(r"(\d)x\1$", r"\1", operation)  # a square kernel by its side


def derive(
    alphas_normal: Tensor,
    alphas_reduce: Tensor,
    rule: str = "softmax",
    space: Space = DARTS,
    edge_weights: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Genotype:
    """The genotype of the alphas ([edges, candidates] of the space each): section 2.4 of the paper.

    Every edge keeps its strongest candidate other than `none`, every node its two strongest edges,
    strongest first. Strength is the softmaxed alpha over the edge's candidates, `none` among them, under the
    rule "softmax" (the official code), the alpha itself under "raw" (pt.darts): they choose other edges where
    the weight of `none` differs between edges. Ties go to the lower index. The alpha of a candidate that an
    edge does not have is -inf. `edge_weights` ([edges] each) multiply the strengths of their edges (PC-DARTS,
    arXiv 1907.05737).
    """
    strengths: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda alphas: alphas.softmax(dim=-1),
        "raw": lambda alphas: alphas,
    }
    genes = []
    for alphas, of_edges in zip((alphas_normal, alphas_reduce), edge_weights, strict=True):
        strength = strengths[rule](alphas.detach())
        if of_edges is not None:
            strength = of_edges.detach()[:, None] * strength
        genes.append(_strongest(strength.tolist(), space))
    normal, reduce = genes
    return Genotype(normal, space.concat, reduce, space.concat)


def _strongest(strength: list[list[float]], space: Space) -> Gene:
    names, connections = space.candidates, space.edges
    choices = [k for k, name in enumerate(names) if name != "none"]
    best = [max(choices, key=row.__getitem__) for row in strength]  # max() takes the first of equals
    gene = []
    for node in range(space.nodes):
        # Stable: equals stay in order
        edges = sorted(space.incoming(node), key=lambda edge: -strength[edge][best[edge]])
        gene.append([(names[best[edge]], connections[edge][0]) for edge in edges[:EDGES_KEPT]])
    return gene


def random_genotype(generator: torch.Generator, space: Space = DARTS) -> Genotype:
    """A random genotype of the space: each node reads two different states before it, every two of them with
    the same probability, and each by one of the edge's candidates other than `none`, every one of these with
    the same probability.

    generator: of the CPU.
    """

    def gene(candidates: Candidates) -> Gene:
        names = {
            edge: [name for name in of_edge if name != "none"]
            for edge, of_edge in zip(space.edges, candidates, strict=True)
        }
        return [
            [
                (drawn(names[source, node], generator), source)
                for source in torch.randperm(INPUTS + node, generator=generator)[:EDGES_KEPT].tolist()
            ]
            for node in range(space.nodes)
        ]

    return Genotype(gene(space.normal), space.concat, gene(space.reduce), space.concat)


def drawn(choices: Sequence[Choice], generator: torch.Generator) -> Choice:
    """One of them, each with the same probability. `generator`: of the CPU."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def _range_if_consecutive(states: list[int]) -> range | list[int]:
    """Equal genotypes compare equal and print alike, however their concat was written."""
    run = range(states[0], states[0] + len(states)) if states else range(0)
    return run if list(run) == list(states) and states else list(states)
