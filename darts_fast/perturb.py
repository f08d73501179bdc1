"""SmoothDARTS (arXiv 2002.05283): the weights are trained at perturbed weights of the candidates.

    w = argmin_w L_train(w, p + delta),    delta uniform in [-epsilon, epsilon]         (random)
    w = argmin_w max_{|delta| <= epsilon} L_train(w, p + delta)                         (adversarial)

p are the softmaxed alphas, and p + delta stays in [0, 1]. Here delta is found; it is a function of a loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from darts_fast.architect import Average, Tensors, alone, gradients, leaves

ATTACK_STEPS = 7  # of projected gradient ascent, each of 2 epsilon / 7


def random_perturbation(p: Tensors, epsilon: Tensor, generator: torch.Generator | None = None) -> Tensors:
    """delta, by the names and shaped as p, in whose zeros it is 0."""
    drawn = {}
    for name, tensor in p.items():
        uniform = torch.rand(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
        drawn[name] = epsilon * (2 * uniform.to(tensor.dtype) - 1)
    return projected(drawn, p, epsilon)


def adversarial_perturbation(
    loss: Callable[[Tensors], Tensor],
    p: Tensors,
    epsilon: Tensor,
    generator: torch.Generator | None = None,
    average: Average = alone,
) -> Tensors:
    """delta that raises the loss, a function of delta: ascent along the sign of its gradient from a random
    start, kept in the cube of epsilon; 0 where the loss is then lower than without. `average`: see
    `architect`.
    """
    nothing = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    delta = random_perturbation(p, epsilon, generator)
    for _ in range(ATTACK_STEPS):
        start = leaves(delta)
        ascended = {
            name: delta[name] + 2 * epsilon / ATTACK_STEPS * gradient.sign()
            for name, gradient in average(gradients(loss(start), start)).items()
        }
        delta = projected(ascended, p, epsilon)
    with torch.no_grad():
        losses = average({"perturbed": loss(delta), "not": loss(nothing)})
        worse = losses["perturbed"] >= losses["not"]
    return {name: torch.where(worse, tensor, nothing[name]) for name, tensor in delta.items()}


def projected(delta: Tensors, p: Tensors, epsilon: Tensor) -> Tensors:
    """The nearest that keeps |delta| <= epsilon, p + delta in [0, 1], and the zeros of p."""
    found = {}
    for name, tensor in delta.items():
        within = torch.minimum(torch.maximum(tensor, -epsilon), epsilon)
        found[name] = torch.where(p[name] == 0, 0, (p[name] + within).clamp(0, 1) - p[name])
    return found
