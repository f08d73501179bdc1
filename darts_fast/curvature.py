"""The curvature of the validation loss in the alphas, and when a search stops by it (RobustDARTS, arXiv
1909.09656). Functions of a loss and of numbers: nothing here knows a network.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from darts_fast.architect import Tensors, gradients, leaves

TOLERANCE = 1e-3  # of the eigenvalue, relative; the error is of the order of its square, see below
WINDOW = 5  # epochs that an eigenvalue is averaged over: the paper's k


def largest_eigenvalue(
    loss: Callable[[Tensors], Tensor],
    alphas: Tensors,
    seed: int = 0,
    after_product: Callable[[int], None] = lambda products: None,
) -> float:
    """The largest eigenvalue (with its sign, not by magnitude) of the Hessian of `loss` at `alphas`.

    By Lanczos' method with full reorthogonalisation on exact Hessian-vector products: the graph of the
    gradient is built once, and each product reverses it. It ends when |H x - value x| is at most TOLERANCE
    |value| for the unit vector x that belongs to the value (whose error is at most that, and of second order
    in it), or after as many products as there are alphas.

    Args:
        loss: twice differentiable function of alphas by name -> scalar.
        alphas: by name, of any shapes, of one floating dtype and device.
        seed: of the vector that it starts from.
        after_product: is told how many products there were; it may raise, to break off.

    Returns:
        The eigenvalue; NaN where a product is not finite.
    """
    alphas = leaves(alphas)
    gradient = _flat(gradients(loss(alphas), alphas, create_graph=True).values())
    start = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vector = start / start.norm()
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        basis.append(vector)
        found = torch.autograd.grad(
            gradient, list(alphas.values()), vector.to(gradient), retain_graph=True, materialize_grads=True
        )
        product = _flat(found).to("cpu", torch.float64)
        after_product(len(basis))
        if not torch.isfinite(product).all():
            return float("nan")
        diagonal.append(vector @ product)
        known = torch.stack(basis)
        for _ in range(2):  # what is left after once is not orthogonal to the basis to rounding
            product = product - known.T @ (known @ product)
        norm = product.norm()
        matrix = torch.diag(torch.stack(diagonal))
        if beside:
            matrix += torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
        values, vectors = torch.linalg.eigh(matrix)
        residual = norm * vectors[-1, -1].abs()
        if len(basis) == len(gradient) or residual <= TOLERANCE * values[-1].abs():
            return float(values[-1])
        beside.append(norm)
        vector = product / norm


def has_risen(eigenvalues: Sequence[float], ratio: float) -> bool:
    """Whether the search stops after the last of these epochs, an eigenvalue each (the paper's section 4.3):

        mean(i - WINDOW) / mean(i) < ratio

    mean(i) is that of the WINDOW epochs around epoch i, the last of which is the last one here. Never before
    there are 2 WINDOW epochs. (Written as a product: no eigenvalue is negative but by rounding, as adding a
    number to all alphas of an edge changes no loss.)
    """
    means = window_means(eigenvalues)
    return means is not None and means[0] < ratio * means[1]


def window_means(eigenvalues: Sequence[float]) -> tuple[float, float] | None:
    """mean(i - WINDOW) and mean(i) of `has_risen`; None where there are too few eigenvalues."""
    if len(eigenvalues) < 2 * WINDOW:
        return None
    before, now = eigenvalues[-2 * WINDOW : -WINDOW], eigenvalues[-WINDOW:]
    return sum(before) / WINDOW, sum(now) / WINDOW


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
