"""The architecture gradient of DARTS (arXiv 1806.09055, section 2.3), first and second order.

Everything here is a function of a loss: it knows no network. `weights`, `alphas` and `momenta` are
tensors by name; a loss is a callable (weights, alphas) -> scalar tensor. Nothing passed in is changed.

`scale` is for a loss computed in float16, whose derivatives would vanish: losses are multiplied by it before
they are differentiated, v by another power of two, and what is found is divided by both. (Everything here is
linear in the loss and in v, and multiplying by a power of two does not round.)

`average` is for several processes that compute the losses of different images: it takes gradients by name to
their mean over the processes. It is applied to the gradient of the virtual step, to v before the
Hessian-vector product, and to what is returned, which so is the architecture gradient of the mean losses,
exactly.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from darts_fast.profiling import phase

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]
Average = Callable[[Tensors], Tensors]

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
        return {name: self._of(w, gradients[name], momenta.get(name)) for name, w in weights.items()}

    @torch.no_grad()
    def _of(self, w: Tensor, gradient: Tensor, momentum: Tensor | None) -> Tensor:
        """In one new tensor: of six, as the formula stands, it took 89 ms of 8.8 million weights, of one 20
        (one thread of an AMD EPYC)."""
        found = torch.add(gradient, w, alpha=self.weight_decay)
        if momentum is not None:
            found.add_(momentum, alpha=self.momentum)
        return found.mul_(-self.lr).add_(w)


def gradients(loss: Tensor, inputs: Tensors, create_graph: bool = False) -> Tensors:
    """d loss / d inputs, by name."""
    values = torch.autograd.grad(loss, list(inputs.values()), create_graph=create_graph)
    return dict(zip(inputs, values, strict=True))


def alone(tensors: Tensors) -> Tensors:
    """The `average` of one process."""
    return tensors


def first_order(
    validation_loss: Loss,
    weights: Tensors,
    alphas: Tensors,
    scale: Tensor | None = None,
    average: Average = alone,
) -> Tensors:
    """grad_a L_val(w, a): equation 7 with xi = 0."""
    alphas = leaves(alphas)
    with phase("validation pass"):
        found = gradients(times(validation_loss(detached(weights), alphas), scale), alphas)
        return average(divided(found, scale))


def second_order_exact(
    train_loss: Loss,
    validation_loss: Loss,
    weights: Tensors,
    alphas: Tensors,
    momenta: Tensors,
    step: VirtualStep,
    scale: Tensor | None = None,
    average: Average = alone,
) -> Tensors:
    """d/da L_val(w'(a), a), w' the virtual step, by automatic differentiation (equation 7, exact):

    grad_a L_val(w', a) - lr * d2 L_train(w, a) / (da dw) . v,    v = grad_w' L_val(w', a)
    """
    weights, alphas = leaves(weights), leaves(alphas)
    with phase("virtual step"):
        loss = times(train_loss(weights, alphas), scale)
        w_gradients = gradients(loss, weights, create_graph=True)
        virtual_weights = step(weights, average(divided(detached(w_gradients), scale)), momenta)
    with phase("validation pass"):
        alpha_gradient, v = _at_virtual_weights(validation_loss, virtual_weights, alphas, scale)
        v = average(v)
    with phase("hessian-vector product"):
        product = exact_hvp(w_gradients, alphas, v, scale)
        return average(_combine(alpha_gradient, product, step.lr))


def second_order_finite_difference(
    train_loss: Loss,
    validation_loss: Loss,
    weights: Tensors,
    alphas: Tensors,
    momenta: Tensors,
    step: VirtualStep,
    average: Average = alone,
) -> Tensors:
    """The same with the Hessian-vector product by central differences, as published (equation 8)."""
    weights, alphas = leaves(weights), leaves(alphas)
    with phase("virtual step"):
        w_gradients = gradients(train_loss(weights, alphas), weights)
        virtual_weights = step(weights, average(w_gradients), momenta)
    with phase("validation pass"):
        alpha_gradient, v = _at_virtual_weights(validation_loss, virtual_weights, alphas)
        v = average(v)
    with phase("hessian-vector product"):
        product = finite_difference_hvp(train_loss, detached(weights), alphas, v)
        return average(_combine(alpha_gradient, product, step.lr))


def with_penalty(loss: Loss, penalty: Callable[[Tensors], Tensor]) -> Loss:
    """The loss plus a penalty on the alphas. It does not depend on the weights: the second order's v and its
    Hessian-vector product stay as they are."""
    return lambda weights, alphas: loss(weights, alphas) + penalty(alphas)


def beta_penalty(alphas: Tensors) -> Tensor:
    """L_Beta (Beta-DARTS, arXiv 2203.01665) of alphas by name, [edges, candidates] each: the mean over all
    edges of log sum_k exp(a_k), a smooth maximum. Its gradient is softmax(a) / edges. A candidate at -inf
    adds nothing."""
    return torch.cat([of_edges.logsumexp(dim=-1) for of_edges in alphas.values()]).mean()


def exact_hvp(w_gradients: Tensors, alphas: Tensors, v: Tensors, scale: Tensor | None = None) -> Tensors:
    """d/da <grad_w L, v>: reverses the graph that computed `w_gradients` (made with create_graph=True, of
    the loss times `scale`).

    `alphas` are the leaves that graph was built on; `v` has the names and shapes of the weights.
    """
    if scale is not None:
        # |v| becomes 1/16 to 1/8: tangents and second adjoints stay well below activations and adjoints. (At
        # 1 to 2 plain PyTorch's second derivative of batch norm overflows under float16 autocast.)
        v_scale = power_of_two(1 / norm(v)) / 16
        v, scale = {name: tensor * v_scale for name, tensor in v.items()}, scale * v_scale
    values = torch.autograd.grad(
        list(w_gradients.values()), list(alphas.values()), [v[name] for name in w_gradients]
    )
    return divided(dict(zip(alphas, values, strict=True)), scale)


def finite_difference_hvp(
    train_loss: Loss, weights: Tensors, alphas: Tensors, v: Tensors, size: float = FINITE_DIFFERENCE_STEP
) -> Tensors:
    """(grad_a L(w + e v, a) - grad_a L(w - e v, a)) / 2e with e = size / |v|.

    On networks with ReLU and max pooling this is a poor estimate of the exact product, see
    docs/differences.md; it is here to reproduce the paper.
    """
    epsilon = size / norm(v)
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


def norm(tensors: Tensors) -> Tensor:
    """Of all of them together."""
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


def power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two above x, for x > 0."""
    return x / torch.frexp(x).mantissa


def times(loss: Tensor, scale: Tensor | None) -> Tensor:
    return loss if scale is None else loss * scale


def divided(tensors: Tensors, scale: Tensor | None) -> Tensors:
    return tensors if scale is None else {name: tensor / scale for name, tensor in tensors.items()}


def _at_virtual_weights(
    validation_loss: Loss, virtual_weights: Tensors, alphas: Tensors, scale: Tensor | None = None
) -> tuple[Tensors, Tensors]:
    """grad_a L_val(w', a) and v = grad_w' L_val(w', a)."""
    virtual_weights = leaves(virtual_weights)
    inputs = [*alphas.values(), *virtual_weights.values()]
    found = torch.autograd.grad(times(validation_loss(virtual_weights, alphas), scale), inputs)
    return (
        divided(dict(zip(alphas, found[: len(alphas)], strict=True)), scale),
        divided(dict(zip(virtual_weights, found[len(alphas) :], strict=True)), scale),
    )


def _combine(alpha_gradient: Tensors, product: Tensors, lr: float | Tensor) -> Tensors:
    return {name: alpha_gradient[name] - lr * product[name] for name in alpha_gradient}
