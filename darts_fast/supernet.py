"""The supernet: stem, a stack of mixed cells, classifier, and the alphas that weigh the candidates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import FunctionCtx

from darts_fast.fused import FusedMixedCells, fused_stem
from darts_fast.reference import MixedCell
from darts_fast.space import CANDIDATES, EDGES, NODES, STEM_MULTIPLIER, reduction_layers

ALPHAS = ("alphas_normal", "alphas_reduce")
CELLS = "cells."  # what the names of the cells' weights begin with


class Supernet(nn.Module):
    """The network of the search phase (arXiv 1806.09055, section 3.1 and appendix A.1.1).

    Args:
        channels: width of a node in the first cell; doubled by each of the two reduction cells. Even.
        classes: number of classes.
        layers: number of cells, at least 3; those at 1/3 and 2/3 of the depth halve the image.
        image_channels: channels of the input images.
        fused: compute the cells by `fused.FusedMixedCells` instead of their own `forward`: the same function
            of the same parameters, faster. (Not in evaluation mode where gradients are wanted.)

    The alphas `alphas_normal` and `alphas_reduce` ([14, 8] each: edges in the order of `space.EDGES`,
    candidates in the order of `space.CANDIDATES`) are parameters, initialised at 1e-3 * randn; `weights()`
    is every other parameter. All weights are views, contiguous, of the one tensor `flat_weights` (a leaf of
    its own, in the order of `weights()`): what changes it changes them. `.to()` and copies make it anew.
    """

    def __init__(
        self, channels: int, classes: int, layers: int, image_channels: int = 3, fused: bool = False
    ):
        super().__init__()
        self.fused = fused
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
            self.cells.append(MixedCell(before_previous, previous, channels, reduction, previous_reduction))
            before_previous, previous, previous_reduction = previous, NODES * channels, reduction
        self.classifier = nn.Linear(previous, classes)
        for name in ALPHAS:
            self.register_parameter(name, nn.Parameter(1e-3 * torch.randn(len(EDGES), len(CANDIDATES))))
        self._fused_cells = FusedMixedCells(self.cells) if fused else None
        # Those that are computed as modules; those that the kernels compute have one flag, see FusedCells.
        computed = self.stem if fused else self
        self._batch_norms = [module for module in computed.modules() if isinstance(module, nn.BatchNorm2d)]
        self._flatten()

    def _flatten(self) -> None:
        """Moves the weights into one new tensor."""
        weights = self.weights()
        self._like = {name: torch.empty_like(w, device="meta") for name, w in weights.items()}
        # Shapes as in `_like`, with the weights of all cells, which are neighbours, as one entry.
        numbers = sum(w.numel() for name, w in weights.items() if name.startswith(CELLS))
        self._pieces: dict[str, Tensor] = {}
        for name, like in self._like.items():
            if name.startswith(CELLS):
                self._pieces[CELLS] = like.new_empty(numbers)
            else:
                self._pieces[name] = like
        # Of each parameter: the dictionary that its module reads it from, and its name there.
        self._owners = {
            f"{prefix}{key}": (module._parameters, key)
            for prefix, module in ((f"{name}." if name else "", m) for name, m in self.named_modules())
            for key in module._parameters
        }
        flat = torch.cat([w.detach().flatten() for w in weights.values()])
        for name, view in self.split(flat).items():
            weights[name].data = view
        self.flat_weights = flat.requires_grad_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Supernet":
        super()._apply(fn, recurse)
        self._flatten()
        if self.fused:
            self._fused_cells = FusedMixedCells(self.cells)  # of the new tensors
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flatten()  # a copy's weights are copied one by one

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The weights by name, as views of a tensor such as `flat_weights`: differentiable any number of
        times, by one concatenation."""
        return dict(zip(self._like, _Split.apply(flat, tuple(self._like.values())), strict=True))

    def weights(self) -> dict[str, nn.Parameter]:
        """Every parameter but the alphas, by name, in the order of construction."""
        return {name: p for name, p in self.named_parameters() if name not in ALPHAS}

    def alphas(self) -> dict[str, nn.Parameter]:
        """The two alphas by name."""
        return {name: getattr(self, name) for name in ALPHAS}

    def forward(self, images: Tensor, activations: torch.dtype | None = None) -> Tensor:
        """Images [N, image_channels, H, W], H and W divisible by 4 -> logits [N, classes].

        `activations` is the type of what the cells compute, where it is not that of the weights (on kernels
        only); statistics, stem, classifier and logits are of the weights' in any case.
        """
        return self._forward(
            images, activations, self._joined(self.weights()) if self._on_kernels() else None
        )

    def _forward(self, images: Tensor, activations: torch.dtype | None, cells: Tensor | None) -> Tensor:
        """`cells`: the weights of all cells in a row, where these are computed by the kernels."""
        probabilities = self.alphas_normal.softmax(dim=-1), self.alphas_reduce.softmax(dim=-1)
        if cells is not None:
            # The stem runs in the images' own layout: channels-last, ATen's batch norm rounds more, and
            # float32 gradients crossed kinks that the reference's do not (tests/test_float32.py).
            stem = fused_stem(self.stem, images)
            output = self._fused_cells(stem, cells, probabilities, activations or stem.dtype)
        else:
            stem = before_previous = output = self.stem(images)
            for cell in self.cells:
                following = cell(before_previous, output, probabilities[int(cell.reduction)])
                before_previous, output = output, following
        return self.classifier(output.mean(dim=(2, 3), dtype=stem.dtype))

    def _on_kernels(self) -> bool:
        """The kernels have no derivatives in evaluation mode."""
        return self.fused and (self.training or not torch.is_grad_enabled())

    def _joined(self, weights: dict[str, Tensor]) -> Tensor:
        """The weights of the cells, of all weights by name, in a row."""
        return torch.cat([w.flatten() for name, w in weights.items() if name.startswith(CELLS)])

    def logits(
        self,
        images: Tensor,
        weights: dict[str, Tensor],
        alphas: dict[str, Tensor],
        activations: torch.dtype | None = None,
    ) -> Tensor:
        """Logits [N, classes] of the network with the given weights and alphas: a function of its arguments
        (but that batch norm updates its running statistics); the parameters are neither used nor touched.

        Args:
            weights: {"weights": a tensor such as `flat_weights`}; or by name, as `weights()`.
        """
        cells = None
        if "weights" in weights:
            flat = weights["weights"]
            if self._on_kernels():
                pieces = dict(
                    zip(self._pieces, _Split.apply(flat, tuple(self._pieces.values())), strict=True)
                )
                cells, weights = pieces.pop(CELLS), pieces
            else:
                weights = self.split(flat)
        elif self._on_kernels():
            cells = self._joined(weights)
            weights = {name: w for name, w in weights.items() if not name.startswith(CELLS)}
        given = {**weights, **alphas}
        places = [self._owners[name] for name in given]
        own = [owner[key] for owner, key in places]
        # What torch.func.functional_call does; that took 4.0 ms a call of 8 layers, this 0.3.
        try:
            for (owner, key), tensor in zip(places, given.values(), strict=True):
                owner[key] = tensor
            return self._forward(images, activations, cells)
        finally:
            for (owner, key), tensor in zip(places, own, strict=True):
                owner[key] = tensor

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        weights: dict[str, Tensor],
        alphas: dict[str, Tensor],
        activations: torch.dtype | None = None,
    ) -> Tensor:
        """Cross entropy (mean over the batch) of `logits`."""
        return F.cross_entropy(self.logits(images, weights, alphas, activations), labels)

    @contextmanager
    def frozen_statistics(self) -> Iterator[None]:
        """Within, batch norm still normalises by the batch but leaves its running statistics alone.

        For the passes of the architecture step: the running statistics are those of the weight step.
        """
        self._track_running_statistics(False)
        try:
            yield
        finally:
            self._track_running_statistics(True)

    def _track_running_statistics(self, track: bool) -> None:
        for module in self._batch_norms:
            module.track_running_stats = track
        if self._fused_cells:
            self._fused_cells.tracking = track


class _Split(torch.autograd.Function):
    """Consecutive parts of a tensor, shaped as `like`, as views.

    One node of the graph. The backward of a slice for each weight would write a tensor as long as all
    weights for each; of a view for each, it ran 5,600 nodes a step of 8 layers.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, flat: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ctx.like = like
        return tuple(_unflatten_dense_tensors(flat, like))

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Join.apply(ctx.like, *gradients), None


class _Join(torch.autograd.Function):
    """The inverse, and the transpose, of `_Split`."""

    @staticmethod
    def forward(ctx: FunctionCtx, like: tuple[Tensor, ...], *parts: Tensor) -> Tensor:
        ctx.like = like
        return _flatten_dense_tensors(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, flat: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Split.apply(flat, ctx.like)
