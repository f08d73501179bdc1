"""NAS-Bench-201 (arXiv 2001.00326): its cell, how the benchmark writes one, and the network that searches it.

Every one of the 15,625 cells of this space was trained, so that what a search finds can be looked up
(benchmarks/nasbench201.py). A cell has four nodes: node 0 is its input, each other node the sum of one
operation on every node before it, node 3 its output. All cells of a network are alike.
"""

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darts_fast.errors import InputError
from darts_fast.flat import FlatNetwork
from darts_fast.reference import relu_conv_bn
from darts_fast.space import Names

NAME = "nasbench201"  # of the space, as a setting
# The candidates of every edge, in the order of the benchmark: column k of the alphas belongs to the k-th
# name, and k is its digit in the benchmark's table.
CANDIDATES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NODES = 4
# In the order of the alphas' rows and of the table's digits: (source, node).
EDGES = tuple((source, node) for node in range(1, NODES) for source in range(node))
NAMES = Names(
    tuple(f"{source} to {node}" for source, node in EDGES),
    CANDIDATES,
    {"skip_connect": "skip", "nor_conv_1x1": "conv", "nor_conv_3x3": "conv", "avg_pool_3x3": "avg_pool"},
)


class Cell(NamedTuple):
    """A cell: the operation of every edge, one of CANDIDATES each, in the order of EDGES.

    `str()` is the benchmark's notation, a group a node, an operation and its source an edge:
    `|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|`.
    """

    operations: tuple[str, ...]

    def __str__(self) -> str:
        edges = list(zip(EDGES, self.operations, strict=True))
        nodes = [
            [f"{name}~{source}" for (source, target), name in edges if target == node]
            for node in range(1, NODES)
        ]
        return "+".join(f"|{'|'.join(node)}|" for node in nodes)

    @property
    def key(self) -> str:
        """Its six digits in the benchmark's table: 0 none, 1 skip, 2 and 3 convolutions, 4 average pool."""
        return "".join(str(CANDIDATES.index(name)) for name in self.operations)

    @property
    def normal(self) -> list[list[tuple[str, int]]]:
        """As in a `Genotype`: for each of the nodes 1 to 3 the (operation, source) of its edges, without
        `none`."""
        edges = list(zip(EDGES, self.operations, strict=True))
        return [
            [(name, source) for (source, target), name in edges if target == node and name != "none"]
            for node in range(1, NODES)
        ]

    def as_json(self) -> str:
        """Its notation, for a JSON file."""
        return str(self)

    @classmethod
    def from_json(cls, content: Any, place: str = "cell") -> "Cell":
        """The inverse of `str()`. `place` begins the sentence about an error.

        Raises:
            InputError: it is no cell in this notation.
        """
        names = re.findall(r"\|([a-z_0-9]{1,20})(?=~)", content) if isinstance(content, str) else []
        cell = cls(tuple(names))
        if len(names) != len(EDGES) or not set(names) <= set(CANDIDATES) or str(cell) != content:
            known = ", ".join(CANDIDATES)
            raise InputError(
                f"{place} must be a cell of NAS-Bench-201, such as {cls(CANDIDATES[3:4] * 6)}, with "
                f"operations among {known}, not {str(content)[:200]!r}"
            )
        return cell


def derive(alphas: Tensor) -> Cell:
    """The cell of the alphas [6, 5]: on every edge the strongest of all five candidates, `none` too, as the
    benchmark's authors do. Ties go to the lower index."""
    return Cell(tuple(CANDIDATES[row.index(max(row))] for row in alphas.tolist()))


class MixedOp(nn.Module):
    """An edge: the sum over all candidates o of p_o * o(x). `none` is zero and left out; no batch norm stands
    behind the pool, and those behind the convolutions have no affine parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.nor_conv_1x1 = relu_conv_bn(channels, channels, affine=False)
        self.nor_conv_3x3 = relu_conv_bn(channels, channels, affine=False, kernel=3)

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """x [N, C, H, W] and the edge's softmaxed alphas [5] -> [N, C, H, W]."""
        _, skip, conv_1x1, conv_3x3, avg_pool = probabilities
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return (
            skip * x + conv_1x1 * self.nor_conv_1x1(x) + conv_3x3 * self.nor_conv_3x3(x) + avg_pool * pooled
        )


class MixedCell(nn.Module):
    """A cell with a mixed op on every edge."""

    def __init__(self, channels: int):
        super().__init__()
        self.edges = nn.ModuleList(MixedOp(channels) for _ in EDGES)

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """x [N, C, H, W] and the softmaxed alphas [6, 5] -> [N, C, H, W]."""
        nodes = [x]
        for node in range(1, NODES):
            incoming = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
            nodes.append(sum(self.edges[e](nodes[EDGES[e][0]], probabilities[e]) for e in incoming))
        return nodes[-1]


class Reduction(nn.Module):
    """The residual block between two stages: [N, C, H, W] -> [N, 2 C, H/2, W/2]; not searched."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            relu_conv_bn(channels, 2 * channels, affine=True, kernel=3, stride=2),
            relu_conv_bn(2 * channels, 2 * channels, affine=True, kernel=3),
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, 2 * channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.convolutions(x)


class SearchNetwork(FlatNetwork):
    """The network that searches the space: the benchmark's own (arXiv 2001.00326, section 2.1), with mixed
    cells.

    Stem, three stages of cells with a reduction before the second and the third, batch norm and ReLU, mean
    over the image, classifier.

    Args:
        channels: width of the first stage; doubled by each reduction.
        classes: number of classes.
        cells: cells in a stage, the paper's N.
        image_channels: channels of the input images.

    `alphas_normal` ([6, 5]: edges in the order of EDGES, candidates in that of CANDIDATES) is a parameter,
    initialised at 1e-3 * randn, and weighs all cells.
    """

    ALPHAS = ("alphas_normal",)
    candidates = CANDIDATES

    def __init__(self, channels: int, classes: int, cells: int, image_channels: int = 3):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.body = nn.ModuleList()
        for stage in range(3):
            if stage:
                self.body.append(Reduction(channels))
                channels *= 2
            self.body.extend(MixedCell(channels) for _ in range(cells))
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, classes)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(len(EDGES), len(CANDIDATES)))
        self._flatten()

    def forward(
        self, images: Tensor, activations: torch.dtype | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Images [N, image_channels, H, W], H and W divisible by 4 -> logits [N, classes]. `activations` must
        be None: everything is of the weights' type; and so must `noise`, which no candidate is."""
        (p,) = self.mixture()
        x = self.stem(images)
        for module in self.body:
            x = module(x, p) if isinstance(module, MixedCell) else module(x)
        return self.classifier(self.head(x).mean(dim=(2, 3)))
