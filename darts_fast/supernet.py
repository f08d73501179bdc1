"""The supernet: stem, a stack of mixed cells, classifier, and the alphas that weigh the candidates."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from darts_fast.fused import FusedCell
from darts_fast.reference import MixedCell
from darts_fast.space import CANDIDATES, EDGES, NODES, STEM_MULTIPLIER, reduction_layers

ALPHAS = ("alphas_normal", "alphas_reduce")


class Supernet(nn.Module):
    """The network of the search phase (arXiv 1806.09055, section 3.1 and appendix A.1.1).

    Args:
        channels: width of a node in the first cell; doubled by each of the two reduction cells. Even.
        classes: number of classes.
        layers: number of cells, at least 3; those at 1/3 and 2/3 of the depth halve the image.
        image_channels: channels of the input images.
        fused: compute the cells by `fused.FusedCell` instead of `reference.MixedCell`: the same function of
            the same parameters, faster.

    The alphas `alphas_normal` and `alphas_reduce` ([14, 8] each: edges in the order of `space.EDGES`,
    candidates in the order of `space.CANDIDATES`) are parameters, initialised at 1e-3 * randn; `weights()`
    is every other parameter.
    """

    def __init__(
        self, channels: int, classes: int, layers: int, image_channels: int = 3, fused: bool = False
    ):
        super().__init__()
        self.fused = fused
        cell_class = FusedCell if fused else MixedCell
        width = STEM_MULTIPLIER * channels
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        before_previous, previous, previous_reduction = width, width, False
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in reduction_layers(layers)
            if reduction:
                channels *= 2
            self.cells.append(cell_class(before_previous, previous, channels, reduction, previous_reduction))
            before_previous, previous, previous_reduction = previous, NODES * channels, reduction
        self.classifier = nn.Linear(previous, classes)
        for name in ALPHAS:
            self.register_parameter(name, nn.Parameter(1e-3 * torch.randn(len(EDGES), len(CANDIDATES))))
        self._batch_norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def weights(self) -> dict[str, nn.Parameter]:
        """Every parameter but the alphas, by name, in the order of construction."""
        return {name: p for name, p in self.named_parameters() if name not in ALPHAS}

    def alphas(self) -> dict[str, nn.Parameter]:
        """The two alphas by name."""
        return {name: getattr(self, name) for name in ALPHAS}

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, image_channels, H, W], H and W divisible by 4 -> logits [N, classes]."""
        normal, reduce = self.alphas_normal.softmax(dim=-1), self.alphas_reduce.softmax(dim=-1)
        # The stem runs in the images' own layout: channels-last, ATen's batch norm rounds four times as much
        # (4e-6 of the gradient against 1e-6), and 9 of 24 float32 runs crossed a kink, against none.
        before_previous = previous = self.stem(images)
        for cell in self.cells:
            output = cell(before_previous, previous, reduce if cell.reduction else normal)
            before_previous, previous = previous, output
        return self.classifier(previous.mean(dim=(2, 3)))

    def loss(
        self, images: Tensor, labels: Tensor, weights: dict[str, Tensor], alphas: dict[str, Tensor]
    ) -> Tensor:
        """Cross entropy (mean over the batch) of the network with the given weights and alphas.

        A function of its arguments: the module's own parameters are neither used nor touched.
        """
        # No weights are tied here; looking for tied ones took 27 ms a call of an 8-layer network.
        logits = functional_call(self, {**weights, **alphas}, (images,), tie_weights=False)
        return F.cross_entropy(logits, labels)

    @contextmanager
    def frozen_statistics(self) -> Iterator[None]:
        """Within, batch norm still normalises by the batch but leaves its running statistics alone.

        For the passes of the architecture step: the running statistics are those of the weight step.
        """
        for module in self._batch_norms:
            module.track_running_stats = False
        try:
            yield
        finally:
            for module in self._batch_norms:
                module.track_running_stats = True
