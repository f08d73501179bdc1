"""The search step of `darts_fast.search.SearchStep` with the fused cell and the exact product, by phases."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from darts_fast import architect
from darts_fast.config import SearchConfig
from darts_fast.search import SearchStep
from darts_fast.supernet import Supernet

Batch = tuple[Tensor, Tensor]


class FusedStep:
    """The same operations in the same order as `SearchStep`, which benchmarks/step.py checks bit by bit."""

    def __init__(self, network: Supernet, config: SearchConfig):
        self.network, self.step = network, SearchStep(network, config)
        self.weight_optimizer = self.step.weight_optimizer
        self.virtual_step = partial(
            architect.VirtualStep, momentum=config.w_momentum, weight_decay=config.w_weight_decay
        )

    def phases(self, train: Batch, validation: Batch, lr: float) -> Iterator[str]:
        """Takes the step; yields each phase's name when it is done."""
        network, step = self.network, self.step
        step.lr.fill_(lr)
        with network.frozen_statistics():
            weights, alphas = architect.leaves(step.weights), architect.leaves(step.alphas)
            loss = architect.times(step.loss(*train)(weights, alphas), step.scale)
            gradients = architect.gradients(loss, weights, create_graph=True)
            found = architect.divided(architect.detached(gradients), step.scale)
            virtual = self.virtual_step(step.lr)(weights, found, step._momenta())
            yield "virtual step"
            found, v = architect._at_virtual_weights(step.loss(*validation), virtual, alphas, step.scale)
            yield "validation pass"
            product = architect.exact_hvp(gradients, alphas, v, step.scale)
            yield "hessian-vector product"
        step._alpha_step(architect._combine(found, product, step.lr))
        yield "alpha optimizer"
        del gradients, virtual, v  # their graph is gone when the weight step begins, as in `SearchStep`
        step._weight_step(*train)
        yield "weight step"
