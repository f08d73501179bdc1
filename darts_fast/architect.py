"""The architecture gradient of DARTS (arXiv 1806.09055, section 2.3), first and second order.

Everything here is a function of a loss: it knows no network. `weights`, `alphas` and `momenta` are dicts
of tensors by name; a loss is a callable (weights, alphas) -> scalar tensor. Nothing passed in is changed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]

FINITE_DIFFERENCE_STEP = 1e-2  # epsilon = this / |v|: the official code's `r`, footnote 2 of the paper


class VirtualStep(NamedTuple):
    """The weight step that the second order looks ahead by: lr is the paper's xi.

    w' = w - lr * (momentum * buffer + grad_w L_train(w, a) + weight_decay * w)
    """

    lr: float | Tensor
    momentum: float
    weight_decay: float

    def __call__(self, weights: Tensors, gradients: Tensors, momenta: Tensors) -> Tensors:
        """w' by name, detached. `momenta` are the optimizer's buffers; {} before its first step."""
        with torch.no_grad():
            return {
                name: w
                - self.lr
                * (
                    gradients[name]
                    + self.weight_decay * w
                    + (self.momentum * momenta[name] if name in momenta else 0.0)
                )
                for name, w in weights.items()
            }


def gradients(loss: Tensor, inputs: Tensors, create_graph: bool = False) -> Tensors:
    """d loss / d inputs, by name."""
    values = torch.autograd.grad(loss, list(inputs.values()), create_graph=create_graph)
    return dict(zip(inputs, values, strict=True))


def first_order(validation_loss: Loss, weights: Tensors, alphas: Tensors) -> Tensors:
    """grad_a L_val(w, a): equation 7 with xi = 0."""
    alphas = leaves(alphas)
    return gradients(validation_loss(detached(weights), alphas), alphas)


def second_order_exact(
    train_loss: Loss,
    validation_loss: Loss,
    weights: Tensors,
    alphas: Tensors,
    momenta: Tensors,
    step: VirtualStep,
) -> Tensors:
    """d/da L_val(w'(a), a), w' the virtual step, by automatic differentiation (equation 7, exact):

    grad_a L_val(w', a) - lr * d2 L_train(w, a) / (da dw) . v,    v = grad_w' L_val(w', a)
    """
    weights, alphas = leaves(weights), leaves(alphas)
    w_gradients = gradients(train_loss(weights, alphas), weights, create_graph=True)
    alpha_gradient, v = _at_virtual_weights(
        validation_loss, step(weights, detached(w_gradients), momenta), alphas
    )
    product = exact_hvp(w_gradients, alphas, v)
    return _combine(alpha_gradient, product, step.lr)


def second_order_finite_difference(
    train_loss: Loss,
    validation_loss: Loss,
    weights: Tensors,
    alphas: Tensors,
    momenta: Tensors,
    step: VirtualStep,
) -> Tensors:
    """The same with the Hessian-vector product by central differences, as published (equation 8)."""
    weights, alphas = leaves(weights), leaves(alphas)
    w_gradients = gradients(train_loss(weights, alphas), weights)
    alpha_gradient, v = _at_virtual_weights(validation_loss, step(weights, w_gradients, momenta), alphas)
    product = finite_difference_hvp(train_loss, detached(weights), alphas, v)
    return _combine(alpha_gradient, product, step.lr)


def exact_hvp(w_gradients: Tensors, alphas: Tensors, v: Tensors) -> Tensors:
    """d/da <grad_w L, v>: reverses the graph that computed `w_gradients` (made with create_graph=True).

    `alphas` are the leaves that graph was built on; `v` has the names and shapes of the weights.
    """
    values = torch.autograd.grad(
        list(w_gradients.values()), list(alphas.values()), [v[name] for name in w_gradients]
    )
    return dict(zip(alphas, values, strict=True))


def finite_difference_hvp(
    train_loss: Loss, weights: Tensors, alphas: Tensors, v: Tensors, size: float = FINITE_DIFFERENCE_STEP
) -> Tensors:
    """(grad_a L(w + e v, a) - grad_a L(w - e v, a)) / 2e with e = size / |v|.

    On networks with ReLU and max pooling this is a poor estimate of the exact product, see
    docs/differences.md; it is here to reproduce the paper.
    """
    norm = torch.stack([tensor.norm() for tensor in v.values()]).norm()
    epsilon = size / norm
    plus = {name: w + epsilon * v[name] for name, w in weights.items()}
    minus = {name: w - epsilon * v[name] for name, w in weights.items()}
    difference = [gradients(train_loss(shifted, alphas), alphas) for shifted in (plus, minus)]
    return {name: (difference[0][name] - difference[1][name]) / (2 * epsilon) for name in alphas}


def leaves(tensors: Tensors) -> Tensors:
    """The same values as leaves of a new graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def detached(tensors: Tensors) -> Tensors:
    """The same values outside any graph."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _at_virtual_weights(
    validation_loss: Loss, virtual_weights: Tensors, alphas: Tensors
) -> tuple[Tensors, Tensors]:
    """grad_a L_val(w', a) and v = grad_w' L_val(w', a)."""
    virtual_weights = leaves(virtual_weights)
    inputs = [*alphas.values(), *virtual_weights.values()]
    found = torch.autograd.grad(validation_loss(virtual_weights, alphas), inputs)
    return (
        dict(zip(alphas, found[: len(alphas)], strict=True)),
        dict(zip(virtual_weights, found[len(alphas) :], strict=True)),
    )


def _combine(alpha_gradient: Tensors, product: Tensors, lr: float | Tensor) -> Tensors:
    return {name: alpha_gradient[name] - lr * product[name] for name in alpha_gradient}
