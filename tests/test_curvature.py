"""The largest eigenvalue against whole matrices, and when a search stops by it."""

import math

import pytest
import torch
from conftest import relative_error

from darts_fast import curvature
from darts_fast.curvature import has_risen, largest_eigenvalue
from darts_fast.supernet import Supernet

SHAPES = {"one": (3, 4), "two": (2, 5)}
SIZE = 22


def quadratic(eigenvalues, seed=0):
    """x.T H x / 2 + b.T x of alphas of SHAPES, H symmetric with these eigenvalues; and a point."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(SIZE, SIZE + 2, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(normal[:, :SIZE])
    h, b, point = q @ torch.diag(torch.tensor(eigenvalues).double()) @ q.T, normal[:, -1], normal[:, -2]

    def loss(alphas):
        x = torch.cat([alphas[name].flatten() for name in SHAPES])
        return x @ h @ x / 2 + b @ x

    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = zip(SHAPES.items(), point.split(sizes), strict=True)
    return loss, {name: part.view(shape) for (name, shape), part in parts}


SPECTRA = {
    "spread": [k / SIZE for k in range(SIZE)],
    "two close ones": [0.1] * 20 + [0.99, 1.0],
    "a larger one below zero": [-5.0, 2.0] + [0.0] * 20,
    "all below zero": [-1.0 - k for k in range(SIZE)],
    "all the same": [0.7] * SIZE,
    "one": [0.0] * 21 + [3e-6],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_largest_of_a_matrix(name, dtype):
    """With its sign: RobustDARTS's is the largest, not the one of the largest magnitude."""
    loss, alphas = quadratic(SPECTRA[name])
    alphas = {key: alpha.to(dtype) for key, alpha in alphas.items()}
    before = {key: alpha.clone() for key, alpha in alphas.items()}
    found = largest_eigenvalue(lambda a: loss({k: v.double() for k, v in a.items()}), alphas)
    assert found == pytest.approx(max(SPECTRA[name]), rel=1e-4)
    assert found == largest_eigenvalue(lambda a: loss({k: v.double() for k, v in a.items()}), alphas)
    assert all(torch.equal(alphas[key], before[key]) and alphas[key].grad is None for key in before)


def test_a_flat_loss_has_none():
    loss, alphas = quadratic([0.0] * SIZE)
    assert abs(largest_eigenvalue(loss, alphas)) < 1e-12


def test_it_takes_few_products_of_a_matrix_with_a_gap_and_can_be_broken_off():
    loss, alphas = quadratic([0.01 * k for k in range(21)] + [4.0])
    products = []
    largest_eigenvalue(loss, alphas, after_product=products.append)
    assert products == list(range(1, len(products) + 1)) and len(products) <= 5

    def broken_off(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        largest_eigenvalue(loss, alphas, after_product=broken_off)


def test_what_is_not_finite_is_said():
    assert math.isnan(largest_eigenvalue(lambda a: (a["x"] ** 1.5).sum(), {"x": torch.zeros(3)}))


def supernet_loss(dtype):
    torch.manual_seed(1)
    network = Supernet(channels=2, classes=3, layers=3, image_channels=1)
    images, labels = torch.randn(6, 1, 4, 4).to(dtype), torch.randint(3, (6,))
    with torch.no_grad():
        for alpha in network.alphas().values():
            alpha.normal_()
    network.to(dtype)
    weights = {"weights": network.flat_weights.detach()}
    return (lambda alphas: network.loss(images, labels, weights, alphas)), network.alphas()


def test_it_is_the_largest_of_the_whole_hessian_of_a_supernet():
    loss, alphas = supernet_loss(torch.float64)
    flat = torch.cat([alpha.detach().flatten() for alpha in alphas.values()])

    def of_flat(x):
        parts = zip(alphas.items(), x.split(14 * 8), strict=True)
        return loss({name: part.view_as(alpha) for (name, alpha), part in parts})

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(of_flat, flat, vectorize=True))
    # To add a number to all alphas of an edge changes nothing: an eigenvalue of 0 for each of the 28 edges.
    assert (values.abs() < 1e-12 * values[-1]).sum() >= 28 and values[-1] > 0
    products = []
    found = largest_eigenvalue(loss, alphas, after_product=products.append)
    assert relative_error(found, values[-1]) < 1e-5 and len(products) < 50
    # and from another start in float32, in which a search computes it
    assert found == pytest.approx(largest_eigenvalue(*supernet_loss(torch.float32), seed=1), rel=1e-4)


RISES = [  # eigenvalues, and whether the search has stopped by a ratio of 0.75
    ([], False),
    ([1.0] * 9, False),
    ([1.0] * 4 + [9.0] * 5, False),  # nine epochs are no two windows
    ([1.0] * 5 + [1.3] * 5, False),  # 1 / 1.3 = 0.77
    ([1.0] * 5 + [1.34] * 5, True),  # 1 / 1.34 = 0.746
    ([1.0] * 5 + [0.9, 1.0, 1.1, 1.2, 2.51], True),  # a mean of 1.342
    ([9.0] * 5 + [1.0] * 5, False),
    ([1.0] * 5 + [2.0] * 5 + [2.0] * 5, False),  # only the last ten count
    ([9.0] * 7 + [1.0] * 5 + [2.0] * 5, True),
    ([0.0] * 10, False),  # no division by 0
    ([0.0] * 5 + [1e-9] * 5, True),
]


@pytest.mark.parametrize(("eigenvalues", "expected"), RISES)
def test_the_rule(eigenvalues, expected):
    assert has_risen(eigenvalues, 0.75) == expected
    means = curvature.window_means(eigenvalues)
    assert (means is None) == (len(eigenvalues) < 10)
    if means and means[1] > 0:  # as the paper writes it
        assert expected == (means[0] / means[1] < 0.75)
