"""A step of the training of a genotype's network."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darts_fast import architect, precision
from darts_fast.config import TrainConfig
from darts_fast.derived import DerivedNetwork
from darts_fast.evaluation import num_correct
from darts_fast.precision import LossScale
from darts_fast.profiling import phase


class TrainStep:
    """One step of the training of a network: the loss of its heads, the gradient, clipped, and SGD; and a
    moving average of the weights and running statistics, if there is one.

    Nothing in `take` is read back to the host or moves in memory, so that it can be captured: the learning
    rate, the drop-path probability and the share by which the average moves are on the device, and weights,
    their gradients and momenta stay where they are. All weights are views of one tensor, and so are their
    gradients and momenta: an update is a few operations, and not some for each weight.

    Args:
        network: in training mode, of any floating dtype; its drop-path probability becomes a tensor where
            the settings have one.
        config: learning rate, weights of the losses, precision.
        average: a network of the same kind, whose weights become the moving average.
        average_gradients: of a batch shared among several processes, see `architect`.
    """

    def __init__(
        self,
        network: DerivedNetwork,
        config: TrainConfig,
        average: DerivedNetwork | None = None,
        average_gradients: architect.Average = architect.alone,
    ):
        self.network, self.config, self.average = network, config, average
        self.average_gradients = average_gradients
        for module in (network, average):
            if module is not None and module.fused:
                module.cells_on_kernels()  # before the statistics are listed
        self.parameters = list(network.parameters())
        self.weights = flat = _joined(self.parameters)
        self.activations = precision.activations(config.amp, config.amp_dtype, flat.device)
        self.loss_scale = LossScale(flat.device) if self.activations == torch.float16 else None
        if config.drop_path_prob:
            network.drop_path_prob = torch.zeros((), device=flat.device)
        self.lr = torch.tensor(config.lr, dtype=flat.dtype, device=flat.device)
        fused = flat.device.type in ("cpu", "cuda")  # meta tensors, which only count, have no such optimizer
        lr = self.lr if fused else config.lr
        self.optimizer = torch.optim.SGD(
            [flat], lr, config.momentum, weight_decay=config.weight_decay, fused=fused
        )
        flat.grad = self.gradient = torch.zeros_like(flat)
        # The optimizer would make it in its first step.
        self.optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat)
        # What is differentiated by, and where the gradients go: with kernels the weights of all cells, which
        # are neighbours, are one of them.
        self.leaves: list[Tensor] = [*self.parameters]
        self.cells: Tensor | None = None
        if network.fused:
            names = [name for name, _ in network.named_parameters()]
            inside = [i for i, name in enumerate(names) if name.startswith("cells.")]
            before, behind = self.parameters[: inside[0]], self.parameters[inside[-1] + 1 :]
            start, end = (sum(p.numel() for p in self.parameters[:i]) for i in (inside[0], inside[-1] + 1))
            self.cells = flat.detach()[start:end].requires_grad_()
            self.leaves = [*before, self.cells, *behind]
        parts = self.gradient.split([t.numel() for t in self.leaves])
        self.gradients = [g.view_as(leaf) for g, leaf in zip(parts, self.leaves, strict=True)]
        self.average_share = torch.zeros((), dtype=flat.dtype, device=flat.device)
        self._averaged: list[list[Tensor]] = []  # the average's weights and statistics; those they follow
        if average is not None:
            for module, weights in ((average, _joined(list(average.parameters()))), (network, flat.detach())):
                self._averaged.append([weights, *(t for t in module.buffers() if t.is_floating_point())])

    def take(self, images: Tensor, labels: Tensor) -> Tensor:
        """The step on a batch of normalised images. Returns its loss, and how many of its images are correct
        by top-1 and by top-5, [3], on the device."""
        with phase("forward"):
            outputs = self.network(images, self.activations, self.cells)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            smoothing = self.config.label_smoothing
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            for other in auxiliary:
                of_other = F.cross_entropy(other, labels, label_smoothing=smoothing)
                loss = loss + self.config.aux_weight * of_other
        with phase("backward"):
            scaled = loss if self.loss_scale is None else loss * self.loss_scale.value
            # Zeros for what the genotype's cells leave unused.
            found = torch.autograd.grad(scaled, self.leaves, materialize_grads=True)
            with torch.no_grad():  # PyTorch 2.9's zeros want gradients themselves
                torch._foreach_copy_(self.gradients, found)
            averaged = self.average_gradients({"weights": self.gradient})["weights"]
            if averaged is not self.gradient:
                self.gradient.copy_(averaged)
        with phase("weight update"):
            if self.loss_scale is not None:
                self.gradient.div_(self.loss_scale.value)
                self.loss_scale.check(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.weights, self.config.grad_clip)
            self.optimizer.step()
            if self.average is not None:
                self._move_average()
            return torch.stack([loss.detach(), *num_correct(logits.detach(), labels)])

    def set_average_share(self, steps: int) -> None:
        """The share by which the step after so many steps moves the average, 1 - decay. The decay begins as
        (1 + steps) / (10 + steps), so that the weights before the training soon count for nothing."""
        self.average_share.fill_(1 - min(self.config.ema, (1 + steps) / (10 + steps)))

    @torch.no_grad()
    def _move_average(self) -> None:
        averages, sources = self._averaged
        differences = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(differences, self.average_share)
        torch._foreach_add_(averages, differences)

    def tensors(self) -> list[Tensor]:
        """Every tensor that `take` changes, except gradients and the state of the drop path's generator."""
        momentum = self.optimizer.state[self.weights]["momentum_buffer"]
        scale = [] if self.loss_scale is None else [self.loss_scale.value]
        average = [] if self.average is None else [*self.average.parameters(), *self.average.buffers()]
        return [self.weights, *self.network.buffers(), momentum, *scale, *average]

    def state_dict(self) -> dict[str, Any]:
        """Weights, running statistics, momenta, float16's loss scale, the moving average: the tensors
        themselves, no copies."""
        momentum = self.optimizer.state[self.weights]["momentum_buffer"]
        momenta = momentum.split([p.numel() for p in self.parameters])
        state = {
            "network": self.network.state_dict(),
            "optimizer": {
                i: {"momentum_buffer": m.view_as(p)}
                for i, (m, p) in enumerate(zip(momenta, self.parameters, strict=True))
            },
        }
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.value
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state


def _joined(parameters: list[nn.Parameter]) -> Tensor:
    """Moves the parameters into one new tensor, a leaf, of which they are views from here on."""
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = view.view_as(p)
    return flat.requires_grad_(parameters[0].requires_grad)
