"""What a cell costs: the expected multiply-adds of the derived network under the softmaxed alphas.

    E = fixed + sum over edges e and candidates o of p_eo M_eo

p are the softmaxed alphas. M_eo are the multiply-adds of the candidate on this edge in all cells of its kind,
times the share of its node's incoming edges that a genotype keeps: so E is the mean over genotypes whose
operations are drawn by p and whose edges are drawn evenly. `fixed` are those of the stem, of preprocessing
and of the classifier. As papers count: convolutions and the classifier, for one image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from darts_fast.genotype import EDGES_KEPT, Genotype
from darts_fast.space import INPUTS, PRIMITIVES, STEM_MULTIPLIER, Space, reduction_layers


class Cost(NamedTuple):
    """The multiply-adds of one image in the networks that a search may derive."""

    fixed: float
    normal: Tensor  # M [edges, candidates], float64 or the alphas' dtype
    reduce: Tensor

    def expected(self, normal: Tensor, reduce: Tensor) -> Tensor:
        """E, a scalar, of the softmaxed alphas [edges, candidates] of both kinds of cells; differentiable."""
        return self.fixed + (normal * self.normal).sum() + (reduce * self.reduce).sum()

    def of(self, genotype: Genotype, space: Space) -> float:
        """The multiply-adds of the network of a genotype."""
        found = self.fixed
        for m, gene in ((self.normal, genotype.normal), (self.reduce, genotype.reduce)):
            for node, pairs in enumerate(gene):
                for name, source in pairs:
                    edge = space.edges.index((source, node))
                    found += float(m[edge, space.candidates.index(name)]) / _shares(space)[edge]
        return found

    def to(self, like: Tensor) -> "Cost":
        """The same in the dtype and on the device of a tensor."""
        return Cost(self.fixed, self.normal.to(like), self.reduce.to(like))


def cost(
    space: Space, channels: int, layers: int, image_channels: int, classes: int, height: int, width: int
) -> Cost:
    """The cost of networks with the CIFAR stem, of these sizes, for images of `height` x `width`."""
    shares = _shares(space)
    shape = len(space.edges), len(space.candidates)
    found = {kind: torch.zeros(shape, dtype=torch.float64, device="cpu") for kind in (False, True)}
    before_previous = previous = STEM_MULTIPLIER * channels
    pixels = height * width
    fixed = image_channels * 9 * previous * pixels
    for layer in range(layers):
        reduction = layer in reduction_layers(layers)
        channels *= 2 if reduction else 1
        # Each preprocessing convolution is 1x1 (a factorized reduce is two halves of one), and its output has
        # the size of the cell before.
        fixed += (before_previous + previous) * channels * pixels
        after = pixels // 4 if reduction else pixels
        for edge, (source, _) in enumerate(space.edges):
            stride = 2 if reduction and source < INPUTS else 1
            for column, name in enumerate(space.candidates):
                found[reduction][edge, column] += shares[edge] * after * _of_pixel(name, channels, stride)
        before_previous, previous = previous, space.nodes * channels
        pixels = after
    return Cost(float(fixed + previous * classes), found[False], found[True])


def _shares(space: Space) -> list[float]:
    """For each edge, the share of its node's incoming edges that a genotype keeps."""
    return [EDGES_KEPT / len(space.incoming(node)) for _, node in space.edges]


def _of_pixel(name: str, channels: int, stride: int) -> int:
    """Multiply-adds of an operation for each of its output's pixels."""
    kind, kernel, _ = PRIMITIVES[name]
    half = channels * (kernel * kernel + channels)  # depthwise, pointwise
    if kind == "skip" and stride == 2:
        return channels * channels
    return {"sep_conv": 2 * half, "dil_conv": half}.get(kind, 0)
