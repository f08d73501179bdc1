"""A network whose weights are one tensor, called as a function of weights and alphas: a supernet."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class FlatNetwork(nn.Module):
    """A network of weights and alphas.

    `weights()` is every parameter but the alphas; all of them are views, contiguous, of the one tensor
    `flat_weights` (a leaf of its own, in the order of `weights()`): what changes it changes them. `.to()` and
    copies make it anew.

    `kept` and `added` are empty unless something other than the softmax weighs the candidates, see `mixture`.
    `noise_generator` (of the device; None: PyTorch's own) is what `noise` draws from.

    A subclass names its alphas and their columns, calls `_flatten()` when it has made its parameters, and has
    a `forward(images, activations, noise)` that returns logits.
    """

    ALPHAS: tuple[str, ...]  # names of the parameters that weigh the candidates
    candidates: tuple[str, ...]  # names of the candidates, in the order of the alphas' columns

    def __init__(self):
        super().__init__()
        # By the names of the alphas, shaped as they, see `mixture`
        self.kept: Mapping[str, Tensor] = {}
        self.added: Mapping[str, Tensor] = {}
        self.noise_generator: torch.Generator | None = None

    def _flatten(self) -> None:
        """Moves the weights into one new tensor."""
        weights = self.weights()
        self._like = {name: torch.empty_like(w, device="meta") for name, w in weights.items()}
        # Of each parameter: the dictionary that its module reads it from, and its name there.
        self._owners = {
            f"{prefix}{key}": (module._parameters, key)
            for prefix, module in ((f"{name}." if name else "", m) for name, m in self.named_modules())
            for key in module._parameters
        }
        self._batch_norms = [
            module for module in self._modules_of_aten() if isinstance(module, nn.BatchNorm2d)
        ]
        flat = torch.cat([w.detach().flatten() for w in weights.values()])
        for name, view in self.split(flat).items():
            weights[name].data = view
        self.flat_weights = flat.requires_grad_()

    def _modules_of_aten(self) -> Iterator[nn.Module]:
        """The modules that are called as such, and not computed by the kernels."""
        return self.modules()

    def _apply(self, fn: Any, recurse: bool = True) -> "FlatNetwork":
        super()._apply(fn, recurse)
        self._flatten()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flatten()  # a copy's weights are copied one by one

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The weights by name, as views of a tensor such as `flat_weights`: differentiable any number of
        times, by one concatenation."""
        return split(flat, self._like)

    def weights(self) -> dict[str, nn.Parameter]:
        """Every parameter but the alphas, by name, in the order of construction."""
        alphas = self.alphas()
        return {name: p for name, p in self.named_parameters() if name not in alphas}

    def alphas(self) -> dict[str, nn.Parameter]:
        """The alphas by name."""
        return {name: getattr(self, name) for name in self.ALPHAS}

    def present(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of ALPHAS out of `alphas`, by name; -inf where an edge does not have the candidate."""
        return {name: alphas[name] for name in self.ALPHAS}

    def probabilities(self, alphas: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The softmax over an edge's candidates of these alphas (by name; None: the network's own), for each
        of ALPHAS and shaped as they; 0 where an edge does not have the candidate."""
        present = self.present(self.alphas() if alphas is None else alphas)
        return tuple(of_kind.softmax(dim=-1) for of_kind in present.values())

    def mixture(self) -> tuple[Tensor, ...]:
        """The weights of the candidates in the mixed operations, for each of ALPHAS and shaped as they:

            kept * softmax(alpha) + added

        In the paper they are the probabilities softmax(alpha) alone. `kept` is 0 for what DARTS-PT has left
        out or decided, and 1 else. `added` is the sum of what DARTS-PT has decided on, the auxiliary skip
        connection and, within `perturbed`, a perturbation.
        """
        p = self.kept_probabilities()
        return tuple(p[name] + self.added[name] if name in self.added else p[name] for name in self.ALPHAS)

    def kept_probabilities(self) -> dict[str, Tensor]:
        """The term of `mixture` that depends on the alphas, by the names of these."""
        p = dict(zip(self.ALPHAS, self.probabilities(), strict=True))
        return {name: p[name] * self.kept[name] if name in self.kept else p[name] for name in p}

    @contextmanager
    def weighed(self, kept: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, these stand in the place of `kept` and `added`."""
        own, (self.kept, self.added) = (self.kept, self.added), (kept, added)
        try:
            yield
        finally:
            self.kept, self.added = own

    def perturbed(self, delta: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within, delta is a part of `added`: a tensor for each of ALPHAS, shaped as they; or {}."""
        added = {name: self.added[name] + d if name in self.added else d for name, d in delta.items()}
        return self.weighed(self.kept, {**self.added, **added})

    @torch.no_grad()
    def set_auxiliary_skip(self, beta: float) -> None:
        """The auxiliary skip connection of DARTS- (arXiv 2009.01027): on every edge that has the candidate,
        `added` is beta for it; in place, because a captured step reads it."""
        if not self.added:
            self.added = {name: torch.zeros_like(getattr(self, name)) for name in self.ALPHAS}
        skips = [candidate == "skip_connect" for candidate in self.candidates]
        for name, present in self.present(self.alphas()).items():
            is_skip = torch.tensor(skips, device=present.device)
            self.added[name].copy_(present.isfinite() & is_skip).mul_(beta)

    def noise(self, images: Tensor) -> Tensor | None:
        """What the `noise` candidates give for a batch of images, drawn anew; None: there are no such
        candidates. All passes of a batch that are compared with each other are given the same."""
        return None

    def logits(
        self,
        images: Tensor,
        weights: Mapping[str, Tensor],
        alphas: Mapping[str, Tensor],
        activations: torch.dtype | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, classes] of the network with the given weights and alphas: a function of its arguments
        (but that batch norm updates its running statistics); the parameters are neither used nor touched.

        Args:
            weights: {"weights": a tensor such as `flat_weights`}; or by name, as `weights()`.
            noise: what `noise` gave for the batch; None: it is drawn.
        """
        if "weights" in weights:
            weights = self.split(weights["weights"])
        with self._given({**weights, **alphas}):
            return self(images, activations, noise)

    @contextmanager
    def _given(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, these stand in the place of the parameters of their names. What
        torch.func.functional_call does; that took 4.0 ms a call of 8 layers, this 0.3."""
        places = [self._owners[name] for name in tensors]
        own = [owner[key] for owner, key in places]
        try:
            for (owner, key), tensor in zip(places, tensors.values(), strict=True):
                owner[key] = tensor
            yield
        finally:
            for (owner, key), tensor in zip(places, own, strict=True):
                owner[key] = tensor

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        weights: Mapping[str, Tensor],
        alphas: Mapping[str, Tensor],
        activations: torch.dtype | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy (mean over the batch) of `logits`."""
        return F.cross_entropy(self.logits(images, weights, alphas, activations, noise), labels)

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


def split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Consecutive parts of a tensor by name, shaped as `like`, as views: differentiable any number of
    times."""
    return dict(zip(like, _Split.apply(flat, tuple(like.values())), strict=True))


class _Split(torch.autograd.Function):
    """Consecutive parts of a tensor, shaped as `like`, as views.

    One node of the graph. The backward of a slice for each weight would write a tensor as long as all
    weights for each; of a view for each, it ran 5,600 nodes a step of 8 layers.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ctx.like = like
        return tuple(_unflatten_dense_tensors(flat, like))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Join.apply(ctx.like, *gradients), None


class _Join(torch.autograd.Function):
    """The inverse, and the transpose, of `_Split`."""

    @staticmethod
    def forward(ctx: Any, like: tuple[Tensor, ...], *parts: Tensor) -> Tensor:
        ctx.like = like
        return _flatten_dense_tensors(parts)

    @staticmethod
    def backward(ctx: Any, flat: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Split.apply(flat, ctx.like)
