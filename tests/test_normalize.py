"""Affine batch norm against its equation in plain differentiable PyTorch, in float64."""

import pytest
import sweeps
import torch
import torch.nn.functional as F
from conftest import relative_error

from darts_fast import kernels


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def four_sweeps(y, weights, p):
    """Returns y, the gradients of a scalar of it, and the derivative of <the weights' gradients, v> by p."""
    generator = torch.Generator().manual_seed(1)

    def random_like(t):
        return torch.randn(t.shape, dtype=t.dtype, generator=generator)

    loss = (random_like(y) * y + (random_like(y) * y) ** 2).sum()
    gradients = torch.autograd.grad(loss, [*weights, p], create_graph=True)
    v = [random_like(w) for w in weights]
    return [y, *gradients, *torch.autograd.grad(gradients[: len(weights)], p, v)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_normalize(layout):
    """The first layers of a network are a convolution and an affine batch norm: their weight gradients
    are differentiated again with respect to the adjoint alone, here through p."""
    torch.manual_seed(0)
    images = torch.randn(3, 2, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    convolution, weight, bias, p = randn(4, 2, 3, 3), randn(4), randn(4), randn(4)

    def sweeps_of(norm):
        y = norm(F.conv2d(images, convolution, padding=1)) * p[:, None, None]
        return four_sweeps(y, [convolution, weight, bias], p)

    results = sweeps_of(lambda y: kernels.normalize(y, sweeps.statistics_of(y.detach()), weight, bias))
    expected = sweeps_of(lambda y: sweeps.normalised(y) * weight[:, None, None] + bias[:, None, None])
    for result, e in zip(results, expected, strict=True):
        assert relative_error(result, e) < 1e-9


def test_normalize_refuses_a_second_derivative_it_does_not_have():
    images, convolution = torch.randn(3, 2, 5, 7).double(), randn(4, 2, 1, 1)
    y = F.conv2d(images, convolution)
    z = kernels.normalize(y, sweeps.statistics_of(y.detach()), randn(4), randn(4))
    (gradient,) = torch.autograd.grad(z.pow(3).sum(), convolution, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative with respect to the input"):
        torch.autograd.grad(gradient.sum(), convolution)
