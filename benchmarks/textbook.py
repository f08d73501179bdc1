"""The steps of a search and of a training as the official code and its ports compute them: the peers that
every ratio is taken against.

NCHW, every weight a tensor of its own, optimizers tensor by tensor; in the search a second network that holds
w', the Hessian-vector product by finite differences on weights that are moved and moved back in place.
Nothing here is slowed: benchmarks/traffic.py counts launches and bytes, and a test holds those of the search
to the published port's.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast.config import SearchConfig, TrainConfig
from darts_fast.derived import DerivedNetwork
from darts_fast.profiling import phase
from darts_fast.supernet import Supernet

Batch = tuple[Tensor, Tensor]


class TextbookStep:
    """One second-order step on a supernet of reference cells, which it changes in place."""

    def __init__(self, network: Supernet, config: SearchConfig):
        self.network, self.config = network, config
        self.virtual = copy.deepcopy(network)
        self.weights, self.alphas = list(network.weights().values()), list(network.alphas().values())
        self.weight_optimizer = torch.optim.SGD(
            self.weights, config.w_lr, config.w_momentum, weight_decay=config.w_weight_decay, foreach=False
        )
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas, config.alpha_lr, (0.5, 0.999), weight_decay=config.alpha_weight_decay, foreach=False
        )

    def __call__(self, train: Batch, validation: Batch, lr: float) -> None:
        with phase("virtual step"):
            self._virtual_step(train, lr)
        with phase("validation pass"):
            alpha_gradients, v = self._validation_pass(validation)
        with phase("hessian-vector product"):
            product = self._hessian_vector_product(train, v)
        with phase("architecture update"):
            for alpha, found, h in zip(self.alphas, alpha_gradients, product, strict=True):
                alpha.grad = found - lr * h
            self.alpha_optimizer.step()
        with phase("weight update"):
            self._weight_step(train, lr)

    def _virtual_step(self, train: Batch, lr: float) -> None:
        gradients = torch.autograd.grad(_loss(self.network, train), self.weights)
        with torch.no_grad():
            for w, copied, g in zip(self.weights, self.virtual.weights().values(), gradients, strict=True):
                momentum = self.weight_optimizer.state[w].get("momentum_buffer", 0.0)
                momentum = momentum * self.config.w_momentum
                copied.copy_(w - lr * (momentum + g + self.config.w_weight_decay * w))
            for alpha, copied in zip(self.alphas, self.virtual.alphas().values(), strict=True):
                copied.copy_(alpha)

    def _validation_pass(self, validation: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        alphas = list(self.virtual.alphas().values())
        found = torch.autograd.grad(
            _loss(self.virtual, validation), [*alphas, *self.virtual.weights().values()]
        )
        return found[: len(alphas)], found[len(alphas) :]

    def _hessian_vector_product(self, train: Batch, v: Sequence[Tensor]) -> list[Tensor]:
        epsilon = 0.01 / torch.cat([d.reshape(-1) for d in v]).norm()
        self._move(v, epsilon)
        plus = torch.autograd.grad(_loss(self.network, train), self.alphas)
        self._move(v, -2.0 * epsilon)
        minus = torch.autograd.grad(_loss(self.network, train), self.alphas)
        self._move(v, epsilon)
        return [(p - n) / (2.0 * epsilon) for p, n in zip(plus, minus, strict=True)]

    @torch.no_grad()
    def _move(self, v: Sequence[Tensor], epsilon: Tensor) -> None:
        for w, d in zip(self.weights, v, strict=True):
            w.add_(epsilon * d)

    def _weight_step(self, train: Batch, lr: float) -> None:
        self.weight_optimizer.zero_grad()
        _loss(self.network, train).backward(inputs=self.weights)
        torch.nn.utils.clip_grad_norm_(self.weights, self.config.w_grad_clip, foreach=False)
        for group in self.weight_optimizer.param_groups:
            group["lr"] = lr
        self.weight_optimizer.step()


class TextbookTraining:
    """One step on the network of a genotype, which it changes in place."""

    def __init__(self, network: DerivedNetwork, config: TrainConfig):
        self.network, self.config = network, config
        self.weights = list(network.parameters())
        self.optimizer = torch.optim.SGD(
            self.weights, config.lr, config.momentum, weight_decay=config.weight_decay, foreach=False
        )

    def take(self, images: Tensor, labels: Tensor) -> None:
        with phase("forward"):
            outputs = self.network(images)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = F.cross_entropy(logits, labels)
            for other in auxiliary:
                loss = loss + self.config.aux_weight * F.cross_entropy(other, labels)
        with phase("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with phase("weight update"):
            torch.nn.utils.clip_grad_norm_(self.weights, self.config.grad_clip, foreach=False)
            self.optimizer.step()


def _loss(network: Supernet, batch: Batch) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])
