"""Single calls of the kernels as autograd functions, against the same in plain PyTorch, in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from darts_fast.kernels import pool, sepconv
from darts_fast.kernels.single import Geometry


def statistics(y):
    variance, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    return torch.stack([mean, variance, (variance + 1e-5).rsqrt()])


def compare(found, expected, inputs):
    """Values, and the gradients of a function of them; the inputs are leaves."""
    direction = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((y * direction).sum(), inputs, retain_graph=True) for y in (found, expected)
    ]
    assert relative_error(found, expected) < 1e-12
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-12


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(2), Geometry(1, 2), Geometry(2, 2)], ids=str)
@pytest.mark.parametrize("kernel", [3, 7])
def test_a_depthwise_half(geometry, kernel):
    torch.manual_seed(0)
    x, d, p = leaf(2, 3, 9, 7), leaf(3, 1, kernel, kernel), leaf(5, 3, 1, 1)
    y, found = sepconv(x, [geometry], [d], [p])
    padding = geometry.dilation * (kernel // 2)
    z = F.conv2d(x.relu(), d, None, geometry.stride, padding, geometry.dilation, 3)
    expected = F.conv2d(z, p)
    assert relative_error(found, statistics(expected)) < 1e-12
    compare(y, expected, [x, d, p])


def test_a_factorized_reduce():
    torch.manual_seed(0)
    x, first, second = leaf(2, 3, 8, 6), leaf(2, 3, 1, 1), leaf(2, 3, 1, 1)
    y, found = sepconv(x, [Geometry(2), Geometry(2, offset=1)], [None, None], [first, second])
    a = x.relu()
    expected = torch.cat([F.conv2d(a[..., ::2, ::2], first), F.conv2d(a[..., 1::2, 1::2], second)], 1)
    assert relative_error(found, statistics(expected)) < 1e-12
    compare(y, expected, [x, first, second])


@pytest.mark.parametrize("stride", [1, 2])
def test_pools(stride):
    torch.manual_seed(0)
    x = leaf(2, 3, 7, 5)
    *pools, found = pool(x, stride)
    expected = F.max_pool2d(x, 3, stride, 1), F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    assert relative_error(found, torch.stack([statistics(y) for y in expected])) < 1e-12
    compare(torch.stack(pools), torch.stack(expected), [x])
    for y, y_expected in zip(pool(x, stride)[:2], expected, strict=True):  # where only one of them is read
        compare(y, y_expected, [x])


def test_a_second_derivative_is_refused():
    x, p = leaf(2, 3, 4, 4), leaf(5, 3, 1, 1)
    (gradient,) = torch.autograd.grad(sepconv(x, [Geometry()], [None], [p])[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_sizes_that_have_no_result():
    p = leaf(5, 3, 1, 1)
    with pytest.raises(ValueError, match="a 5x4 image cannot be halved"):
        sepconv(leaf(2, 3, 5, 4), [Geometry(2)], [None], [p])
    with pytest.raises(ValueError, match="more than one value a channel"):
        sepconv(leaf(1, 3, 1, 1), [Geometry()], [None], [p])
    with pytest.raises(ValueError, match="more than one value a channel"):
        pool(leaf(1, 3, 2, 2), 2)
