"""The supernet: stem, a stack of mixed cells, classifier, and the alphas that weigh the candidates."""

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from darts_fast.flat import FlatNetwork, split
from darts_fast.fused import FusedMixedCells, fused_stem
from darts_fast.reference import CellNoise, MixedCell, edge_weights
from darts_fast.space import DARTS, STEM_MULTIPLIER, Space, reduction_layers

CELLS = "cells."  # what the names of the cells' weights begin with


class Supernet(FlatNetwork):
    """The network of the search phase (arXiv 1806.09055, section 3.1 and appendix A.1.1).

    Args:
        channels: width of a node in the first cell; doubled by each of the two reduction cells. Even.
        classes: number of classes.
        layers: number of cells, at least 3; those at 1/3 and 2/3 of the depth halve the image.
        image_channels: channels of the input images.
        fused: compute the cells by `fused.FusedMixedCells` instead of their own `forward`: the same function
            of the same parameters, faster. (Not in evaluation mode where gradients are wanted.)
        space: the candidates of each edge.
        partial_channels: K of PC-DARTS (arXiv 1907.05737): the candidates read 1 / K of the channels, and the
            edges that enter a node are weighed; K divides `channels`. 1: neither.

    The alphas `alphas_normal` and `alphas_reduce` ([edges, candidates] each, in the order of `space.edges`
    and of `space.candidates`: [14, 8] in the space of the paper) are parameters, initialised at 1e-3 * randn.
    That of a candidate which an edge does not have is in no softmax. With partial channels the betas
    `betas_normal` and `betas_reduce` ([edges] each), which weigh the edges, are among the `alphas()`.
    """

    ALPHAS = ("alphas_normal", "alphas_reduce")
    BETAS = ("betas_normal", "betas_reduce")

    def __init__(
        self,
        channels: int,
        classes: int,
        layers: int,
        image_channels: int = 3,
        fused: bool = False,
        space: Space = DARTS,
        partial_channels: int = 1,
    ):
        super().__init__()
        self.fused, self.space, self.partial_channels = fused, space, partial_channels
        self.candidates = space.candidates
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
            inputs = before_previous, previous
            cell = MixedCell(*inputs, channels, reduction, previous_reduction, space, partial_channels)
            self.cells.append(cell)
            before_previous, previous, previous_reduction = previous, space.nodes * channels, reduction
        self.classifier = nn.Linear(previous, classes)
        for name in self.ALPHAS:
            shape = len(space.edges), len(space.candidates)
            self.register_parameter(name, nn.Parameter(1e-3 * torch.randn(shape)))
        for name in self.BETAS if partial_channels > 1 else ():
            self.register_parameter(name, nn.Parameter(1e-3 * torch.randn(len(space.edges))))
        for name, present in zip(self.ALPHAS, space.present(), strict=True):
            # Added to the alphas: -inf where the edge does not have the candidate. None: every edge has all.
            everywhere = all(map(all, present))
            absent = None if everywhere else torch.where(torch.tensor(present), 0.0, -torch.inf)
            self.register_buffer(self._absent(name), absent, persistent=False)
        self._fused_cells = FusedMixedCells(self._mixed_cells()) if fused else None
        self._cell_noise = CellNoise(self._mixed_cells())
        self._flatten()

    def alphas(self) -> dict[str, nn.Parameter]:
        betas = self.BETAS if self.partial_channels > 1 else ()
        return super().alphas() | {name: getattr(self, name) for name in betas}

    def _flatten(self) -> None:
        super()._flatten()
        # Shapes as in `_like`, with the weights of all cells, which are neighbours, as one entry.
        numbers = sum(w.numel() for name, w in self._like.items() if name.startswith(CELLS))
        self._pieces: dict[str, Tensor] = {}
        for name, like in self._like.items():
            if name.startswith(CELLS):
                self._pieces[CELLS] = like.new_empty(numbers)
            else:
                self._pieces[name] = like

    def _modules_of_aten(self) -> Iterator[nn.Module]:
        return (self.stem if self.fused else self).modules()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Supernet":
        super()._apply(fn, recurse)
        if self.fused:
            self._fused_cells = FusedMixedCells(self._mixed_cells())  # of the new tensors
        return self

    def noise(self, images: Tensor) -> Tensor | None:
        return self._cell_noise.draw(images, self.noise_generator)

    def forward(
        self, images: Tensor, activations: torch.dtype | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Images [N, image_channels, H, W], H and W divisible by 4 -> logits [N, classes].

        `activations` is the type of what the cells compute, where it is not that of the weights (on kernels
        only); statistics, stem, classifier and logits are of the weights' in any case. `noise` is what the
        method of this name gave for the batch; None: it is drawn.
        """
        cells = self._joined(self.weights()) if self._on_kernels() else None
        return self._forward(images, activations, cells, noise)

    def _forward(
        self, images: Tensor, activations: torch.dtype | None, cells: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """`cells`: the weights of all cells in a row, where these are computed by the kernels."""
        p, weights = self.mixture(), self.edge_weights()
        noise = self.noise(images) if noise is None else noise
        if cells is not None:
            assert self._fused_cells is not None
            # The stem runs in the images' own layout: channels-last, ATen's batch norm rounds more, and
            # float32 gradients crossed kinks that the reference's do not (tests/test_float32.py).
            stem = fused_stem(self.stem, images)
            output = self._fused_cells(stem, cells, p, weights, activations or stem.dtype, noise)
        else:
            stem = before_previous = output = self.stem(images)
            with self._cell_noise.placed(noise, images):
                for cell in self._mixed_cells():
                    kind = int(cell.reduction)
                    following = cell(before_previous, output, p[kind], weights[kind])
                    before_previous, output = output, following
        return self.classifier(output.mean(dim=(2, 3), dtype=stem.dtype))

    def present(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        absent = {name: getattr(self, self._absent(name)) for name in self.ALPHAS}
        return {name: alphas[name] if a is None else alphas[name] + a for name, a in absent.items()}

    def edge_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """What the edges of normal and of reduction cells are weighed by in the sums of their nodes, [edges]
        each; None: by 1."""
        if self.partial_channels == 1:
            return None, None
        normal, reduce = (edge_weights(getattr(self, name), self.space) for name in self.BETAS)
        return normal, reduce

    def _mixed_cells(self) -> list[MixedCell]:
        return [cast(MixedCell, cell) for cell in self.cells]

    @staticmethod
    def _absent(name: str) -> str:
        return name.replace("alphas", "absent")

    def _on_kernels(self) -> bool:
        """The kernels have no derivatives in evaluation mode."""
        return self.fused and (self.training or not torch.is_grad_enabled())

    def _joined(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The weights of the cells, of all weights by name, in a row."""
        return torch.cat([w.flatten() for name, w in weights.items() if name.startswith(CELLS)])

    def logits(
        self,
        images: Tensor,
        weights: Mapping[str, Tensor],
        alphas: Mapping[str, Tensor],
        activations: torch.dtype | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        if not self._on_kernels():
            return super().logits(images, weights, alphas, activations, noise)
        if "weights" in weights:
            others = split(weights["weights"], self._pieces)
            cells = others.pop(CELLS)
        else:
            cells = self._joined(weights)
            others = {name: w for name, w in weights.items() if not name.startswith(CELLS)}
        with self._given({**others, **alphas}):
            return self._forward(images, activations, cells, noise)

    def _track_running_statistics(self, track: bool) -> None:
        super()._track_running_statistics(track)
        if self._fused_cells:
            self._fused_cells.tracking = track
