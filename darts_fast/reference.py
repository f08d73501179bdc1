"""The mixed cell in textbook PyTorch: the oracle that every faster implementation is held against.

Written to be read beside the paper (arXiv 1806.09055, sections 2.1, 2.2 and 3.1; partial channels: arXiv
1907.05737, section 3), with nothing shared between edges and nothing fused. All tensors are NCHW, of any
floating dtype.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darts_fast.space import DARTS, INPUTS, PRIMITIVES, Space


def relu_conv_bn(
    in_channels: int, channels: int, affine: bool, kernel: int = 1, stride: int = 1
) -> nn.Sequential:
    """ReLU -> convolution -> batch norm; `same` padding."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


class FactorizedReduce(nn.Module):
    """ReLU -> two 1x1 convolutions of stride 2, one shifted by a pixel, side by side -> batch norm.

    [N, in_channels, H, W] -> [N, channels, H/2, W/2]; H and W must be even. The stride is taken before the
    convolutions, which is the same sum: PyTorch's weight gradient of a strided 1x1 convolution writes past
    its memory on CPUs (docs/differences.md).
    """

    def __init__(self, in_channels: int, channels: int, affine: bool):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(in_channels, channels // 2, 1, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, channels // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        even, odd = x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]
        return self.bn(torch.cat([self.conv_1(even), self.conv_2(odd)], dim=1))


class Zero(nn.Module):
    """The candidate `none`: no connection."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class Noise(nn.Module):
    """The candidate `noise` (RobustDARTS, arXiv 1909.09656, section 3): of what it reads the shape alone is
    used, and each number is drawn from N(0, 1).

    `drawn` [N, channels, H/stride, W/stride] is what the network drew for the batch, see `CellNoise`; without
    it every call draws anew.
    """

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.channels, self.stride = channels, stride
        self.drawn: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride]) if self.drawn is None else self.drawn


class CellNoise:
    """What the `noise` operations of a network's cells draw for a batch: one tensor, which all passes of the
    batch are given, so that a loss is a function of weights and alphas.

    In it the operations follow one another in the order of the cells and of their edges, each with the
    numbers of its output as [N, H, W, C].

    Args:
        cells: with `reduction` each.
    """

    def __init__(self, cells: Iterable[nn.Module]):
        self._of_cells = [
            (cell.reduction, [module for module in cell.modules() if isinstance(module, Noise)])
            for cell in cells
        ]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(operations for _, operations in self._of_cells)

    def draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """For x [N, C, H, W], of the size of what the first cell reads: [numbers] of its dtype and device.
        None: the cells have no noise. `generator`: of the device; None: PyTorch's own."""
        if not self:
            return None
        numbers = sum(math.prod(shape) for _, shape in self._shapes(x))
        return torch.randn(numbers, generator=generator, dtype=x.dtype, device=x.device)

    @contextmanager
    def placed(self, noise: Tensor | None, x: Tensor) -> Iterator[None]:
        """Within, the operations give what `draw` drew for such an x."""
        if noise is None:
            yield
            return
        found = list(self._shapes(x))
        parts = noise.split([math.prod(shape) for _, shape in found])
        for (operation, shape), part in zip(found, parts, strict=True):
            operation.drawn = part.view(shape).permute(0, 3, 1, 2).contiguous()
        try:
            yield
        finally:
            for operation, _ in found:
                operation.drawn = None

    def _shapes(self, x: Tensor) -> Iterator[tuple[Noise, tuple[int, int, int, int]]]:
        """The operations and the shapes [N, H, W, C] of what they draw: those of their cell's nodes."""
        n, _, height, width = x.shape
        for reduction, operations in self._of_cells:
            if reduction:
                height, width = height // 2, width // 2
            for operation in operations:
                yield operation, (n, height, width, operation.channels)


def separable_half(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU -> depthwise -> pointwise -> batch norm; `same` padding."""
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def operation(name: str, channels: int, stride: int, affine: bool, pool_batch_norm: bool) -> nn.Module:
    """The primitive of that name: maps [N, channels, H, W] to [N, channels, H/stride, W/stride].

    `affine`: the batch norms have parameters. `pool_batch_norm`: one stands behind every pool, too.
    """
    kind, kernel, dilation = PRIMITIVES[name]
    same = kernel // 2
    if kind == "none":
        return Zero(stride)
    if kind == "noise":
        return Noise(channels, stride)
    if kind == "skip":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)
    if kind in ("max_pool", "avg_pool"):
        pool: nn.Module
        if kind == "max_pool":
            pool = nn.MaxPool2d(kernel, stride, padding=same)
        else:
            pool = nn.AvgPool2d(kernel, stride, padding=same, count_include_pad=False)
        return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=affine)) if pool_batch_norm else pool
    if kind == "conv":
        return nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, (1, kernel), (1, stride), (0, same), bias=False),
            nn.Conv2d(channels, channels, (kernel, 1), (stride, 1), (same, 0), bias=False),
            nn.BatchNorm2d(channels, affine=affine),
        )
    half = separable_half(channels, kernel, stride, dilation, affine)
    if kind == "sep_conv":  # the separable convolution is applied twice; only the first may stride
        half += separable_half(channels, kernel, 1, dilation, affine)
    return nn.Sequential(*half)


class MixedOp(nn.ModuleDict):
    """Equation 2: the sum over all candidates o of p_o * o(x).

    Batch norm without affine parameters, also behind the pools: only so the candidates share one scale.
    `names` are the edge's candidates, `columns` those of the whole space.

    With `partial_channels` K above 1 (PC-DARTS, arXiv 1907.05737, section 3.1) the candidates read the first
    C / K channels; the others pass by, with stride 2 through a 2x2 max pool; and the channels of both, side
    by side, are shuffled with K groups.
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        names: tuple[str, ...],
        columns: tuple[str, ...],
        partial_channels: int = 1,
    ):
        width = channels // partial_channels
        super().__init__(
            {name: operation(name, width, stride, False, pool_batch_norm=True) for name in names}
        )
        self.columns, self.width, self.stride, self.groups = columns, width, stride, partial_channels

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """x [N, C, H, W] and the edge's softmaxed alphas [columns] -> [N, C, H/stride, W/stride]."""
        if self.groups == 1:
            return self._sum(x, probabilities)
        mixed, passed = self._sum(x[:, : self.width], probabilities), x[:, self.width :]
        if self.stride == 2:
            passed = F.max_pool2d(passed, 2)
        return F.channel_shuffle(torch.cat([mixed, passed], dim=1), self.groups)

    def _sum(self, x: Tensor, probabilities: Tensor) -> Tensor:
        p = zip(self.columns, probabilities, strict=True)
        return sum(p_o * self[name](x) for name, p_o in p if name in self)


class MixedCell(nn.Module):
    """A cell with a mixed op on every edge (equation 1): node = sum of its edges; output = all nodes.

    `channels` is the width of every node; the cell's output has `space.nodes` times as many. The factorized
    reduce before state 0 is there where the previous cell halved the image. `partial_channels` is that of the
    mixed ops.
    """

    def __init__(
        self,
        channels_before_previous: int,
        channels_previous: int,
        channels: int,
        reduction: bool,
        previous_reduction: bool,
        space: Space = DARTS,
        partial_channels: int = 1,
    ):
        super().__init__()
        self.reduction, self.space, self.partial_channels = reduction, space, partial_channels
        self.preprocess0: nn.Module
        if previous_reduction:
            self.preprocess0 = FactorizedReduce(channels_before_previous, channels, affine=False)
        else:
            self.preprocess0 = relu_conv_bn(channels_before_previous, channels, affine=False)
        self.preprocess1 = relu_conv_bn(channels_previous, channels, affine=False)
        candidates = space.reduce if reduction else space.normal
        self.edges = nn.ModuleList(
            MixedOp(
                channels,
                2 if reduction and source < INPUTS else 1,
                names,
                space.candidates,
                partial_channels,
            )
            for (source, _), names in zip(space.edges, candidates, strict=True)
        )

    def forward(
        self,
        before_previous: Tensor,
        previous: Tensor,
        probabilities: Tensor,
        edge_weights: Tensor | None = None,
    ) -> Tensor:
        """Outputs of the two cells before, and the softmaxed alphas [edges, candidates] of `space`
        -> [N, nodes * channels, H', W'].

        `edge_weights` [edges] weigh the edges in the sums of their nodes (None: by 1): see the function of
        this name.
        """
        states = [self.preprocess0(before_previous), self.preprocess1(previous)]

        def weighed(edge: int) -> Tensor:
            found = self.edges[edge](states[self.space.edges[edge][0]], probabilities[edge])
            return found if edge_weights is None else edge_weights[edge] * found

        for node in range(self.space.nodes):
            states.append(sum(weighed(edge) for edge in self.space.incoming(node)))
        return torch.cat(states[INPUTS:], dim=1)


def edge_weights(betas: Tensor, space: Space) -> Tensor:
    """Edge normalisation (PC-DARTS, arXiv 1907.05737, section 3.2): the softmax of the betas [edges] over the
    edges that enter the same node, [edges]."""
    of_nodes = betas.split([len(space.incoming(node)) for node in range(space.nodes)])
    return torch.cat([of_node.softmax(dim=0) for of_node in of_nodes])
