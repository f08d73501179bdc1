"""A step of the search: the architecture step on the alphas, then the weight step (arXiv 1806.09055,
algorithm 1)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast import architect, precision
from darts_fast.config import SearchConfig
from darts_fast.cost import Cost
from darts_fast.evaluation import num_correct
from darts_fast.flat import FlatNetwork
from darts_fast.perturb import adversarial_perturbation, random_perturbation
from darts_fast.precision import LossScale
from darts_fast.profiling import phase

Batch = tuple[Tensor, Tensor, Tensor | None]  # images, labels, noise


class SearchStep:
    """One step of the search on a supernet: architecture step, then weight step, with both optimizers.

    Nothing in `take` is read back to the host or moves in memory, so that it can be captured: the learning
    rate and the optimizers' counters are on the device, and weights, alphas, their gradients and moments
    stay where they are.

    Args:
        network: the supernet, of any floating dtype.
        config: learning rates, order, form of the Hessian-vector product, precision.
        generator: of the device; what `config.perturb` draws from. None: PyTorch's own.
        cost: of the cells; needed where `config.macs_weight` is not 0.
        average: of a batch shared among several processes, see `architect`: all gradients are averaged.
    """

    def __init__(
        self,
        network: FlatNetwork,
        config: SearchConfig,
        generator: torch.Generator | None = None,
        cost: Cost | None = None,
        average: architect.Average = architect.alone,
    ):
        self.network, self.config, self.generator, self.average = network, config, generator, average
        self.cost = None if cost is None else cost.to(network.flat_weights)
        if self.cost is not None and config.macs_weight:
            equal = {name: torch.zeros_like(alphas) for name, alphas in network.alphas().items()}
            self.equal_cost = self.cost.expected(*network.probabilities(equal))
        self.weights, self.alphas = {"weights": network.flat_weights}, network.alphas()
        flat = network.flat_weights
        self.activations = precision.activations(config.amp, config.amp_dtype, flat.device)
        self.loss_scale = LossScale(flat.device) if self.activations == torch.float16 else None
        self.lr = torch.tensor(config.w_lr, dtype=flat.dtype, device=flat.device)
        self.epsilon = torch.tensor(config.perturb_epsilon, dtype=flat.dtype, device=flat.device)
        self.beta = torch.zeros_like(self.lr)  # strength of `beta_decay`'s penalty, which an epoch sets
        self._make_optimizers()

    def _make_optimizers(self) -> None:
        """With gradients and all state, which stay where they are."""
        config, flat = self.config, self.network.flat_weights
        fused = flat.device.type in ("cpu", "cuda")  # meta tensors, which only count, have no such optimizer
        self.weight_optimizer = torch.optim.SGD(
            [flat],
            self.lr if fused else config.w_lr,
            config.w_momentum,
            weight_decay=config.w_weight_decay,
            fused=fused,
        )
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas.values(),
            config.alpha_lr,
            (0.5, 0.999),
            weight_decay=config.alpha_weight_decay,
            fused=fused,
            capturable=fused,
        )
        # The optimizers would make these in their first step.
        self.weight_optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat)
        for alpha in self.alphas.values():
            self.alpha_optimizer.state[alpha] = {
                "step": torch.zeros((), device=alpha.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(alpha),
                "exp_avg_sq": torch.zeros_like(alpha),
            }
        flat.grad = self.weight_gradient = torch.zeros_like(flat)
        self.alpha_gradients = {name: torch.zeros_like(alpha) for name, alpha in self.alphas.items()}
        for name, alpha in self.alphas.items():
            alpha.grad = self.alpha_gradients[name]

    def __call__(self, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], lr: float) -> Tensor:
        """`lr` is the learning rate of the weights and the paper's xi. Returns what `take` returns."""
        self.lr.fill_(lr)
        return self.take(*train, *validation)

    def take(
        self,
        train_images: Tensor,
        train_labels: Tensor,
        validation_images: Tensor,
        validation_labels: Tensor,
    ) -> Tensor:
        """Both steps. Returns the loss of the training batch in the weight step, and how many of its images
        are correct by top-1 and by top-5, [3], on the device."""
        train = self._batch(train_images, train_labels)
        self._architecture_step(train, self._batch(validation_images, validation_labels))
        with phase("weight update"):
            return self._weight_step(*train)

    def take_weights(self, train_images: Tensor, train_labels: Tensor) -> Tensor:
        """The weight step alone, as in the epochs of `alpha_warmup`; returns what `take` returns."""
        with phase("weight update"):
            return self._weight_step(*self._batch(train_images, train_labels))

    def _batch(self, images: Tensor, labels: Tensor) -> Batch:
        """The batch with the noise that all its passes see in this step."""
        return images, labels, self.network.noise(images)

    def tensors(self) -> list[Tensor]:
        """Every tensor that `take` changes, except gradients."""
        moments = [
            tensor
            for optimizer in (self.weight_optimizer, self.alpha_optimizer)
            for state in optimizer.state.values()
            for tensor in state.values()
        ]
        scale = [] if self.loss_scale is None else [self.loss_scale.value]
        return [self.network.flat_weights, *self.alphas.values(), *self.network.buffers(), *moments, *scale]

    def state_dict(self) -> dict[str, Any]:
        """Weights, running statistics, alphas, the moments of both optimizers, and float16's loss scale: the
        tensors themselves, no copies."""
        state = {
            "network": self.network.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict()["state"],
            "alpha_optimizer": self.alpha_optimizer.state_dict()["state"],
        }
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.value
        return state

    def loss(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> architect.Loss:
        """The loss of a batch as a function of weights and alphas, for the architecture step."""
        # Differences of 2-byte losses along a step of 0.01 are rounding (docs/differences.md).
        differences = self.config.order == 2 and self.config.hvp == "finite-difference"
        activations = None if differences else self.activations
        return partial(self.network.loss, images, labels, activations=activations, noise=noise)

    @property
    def scale(self) -> Tensor | None:
        return None if self.loss_scale is None else self.loss_scale.value

    def _architecture_step(self, train: Batch, validation: Batch) -> None:
        """Adam on the alphas; the paper's xi is the learning rate of the weights."""
        train_loss, validation_loss = self.loss(*train), self.loss(*validation)
        if self.config.beta_decay or self.config.macs_weight:
            validation_loss = architect.with_penalty(validation_loss, self.penalty)
        with self.network.frozen_statistics():
            if self.config.order == 1:
                found = architect.first_order(
                    validation_loss, self.weights, self.alphas, self.scale, self.average
                )
            else:
                step = architect.VirtualStep(self.lr, self.config.w_momentum, self.config.w_weight_decay)
                momenta = {"weights": self.momentum_buffer}
                arguments = train_loss, validation_loss, self.weights, self.alphas, momenta, step
                if self.config.hvp == "exact":
                    found = architect.second_order_exact(*arguments, self.scale, self.average)
                else:
                    found = architect.second_order_finite_difference(*arguments, self.average)
        with phase("architecture update"):
            self._alpha_step(found)

    def penalty(self, alphas: architect.Tensors) -> Tensor:
        """What is added to the validation loss: Beta-DARTS's penalty, and the weighed cost."""
        config, terms = self.config, []
        if config.beta_decay:
            terms.append(self.beta * architect.beta_penalty(self.network.present(alphas)))
        if config.macs_weight:
            assert self.cost is not None  # see the class
            expected = self.cost.expected(*self.network.probabilities(alphas))
            if config.macs_target is None:
                terms.append(config.macs_weight * expected / self.equal_cost)
            else:
                terms.append(config.macs_weight * (expected / (1e6 * config.macs_target) - 1).relu())
        return torch.stack(terms).sum()

    def _alpha_step(self, gradients: architect.Tensors) -> None:
        for name, own in self.alpha_gradients.items():
            own.copy_(gradients[name])
        if self.loss_scale is not None:
            self.loss_scale.check(self.alpha_optimizer)
        self.alpha_optimizer.step()

    def _weight_step(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """SGD on the weights at the new alphas; returns what `take` returns."""
        alphas, network = architect.detached(self.alphas), self.network
        with network.perturbed(self._perturbation(images, labels, noise)):
            logits = network.logits(images, self.weights, alphas, self.activations, noise)
        loss = F.cross_entropy(logits, labels)
        found = architect.gradients(architect.times(loss, self.scale), self.weights)
        self.weight_gradient.copy_(self.average(architect.divided(found, self.scale))["weights"])
        if self.loss_scale is not None:
            self.loss_scale.check(self.weight_optimizer)
        torch.nn.utils.clip_grad_norm_([network.flat_weights], self.config.w_grad_clip)
        self.weight_optimizer.step()
        return torch.stack([loss.detach(), *num_correct(logits.detach(), labels)])

    def _perturbation(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> architect.Tensors:
        """The delta of SmoothDARTS for this batch, see `perturb`; {} where the settings ask for none."""
        network, epsilon, generator = self.network, self.epsilon, self.generator
        if self.config.perturb is None:
            return {}
        with torch.no_grad():
            p = network.kept_probabilities()  # p + delta stays in [0, 1], whatever is added beside it
        if self.config.perturb == "random":
            return random_perturbation(p, epsilon, generator)
        weights, alphas = architect.detached(self.weights), architect.detached(self.alphas)

        def loss(delta: architect.Tensors) -> Tensor:
            with network.perturbed(delta):
                found = network.loss(images, labels, weights, alphas, self.activations, noise)
            return architect.times(found, self.scale)

        with network.frozen_statistics():
            return adversarial_perturbation(loss, p, epsilon, generator, self.average)

    @property
    def momentum_buffer(self) -> Tensor:
        return self.weight_optimizer.state[self.network.flat_weights]["momentum_buffer"]
