"""The space of NAS-Bench-201: notation, network, search."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from darts_fast import InputError, architect
from darts_fast.nasbench201 import CANDIDATES, Cell, SearchNetwork, derive

BEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"


def cell_of(key):
    return Cell(tuple(CANDIDATES[int(digit)] for digit in key))


def certain(key):
    """Alphas whose softmax is 1 for the operations of this cell, and 0 for the others."""
    alphas = torch.full((6, 5), -torch.inf, dtype=torch.float64)
    alphas[torch.arange(6), torch.tensor([int(digit) for digit in key])] = 0
    return alphas


def test_the_notation_and_the_key_of_a_cell():
    cell = cell_of("333132")
    assert str(cell) == BEST and cell.key == "333132" and Cell.from_json(BEST) == cell
    keys = ["".join(digits) for digits in itertools.product("01234", repeat=6)][::7]
    cells = [cell_of(key) for key in keys]
    assert [Cell.from_json(str(cell)) for cell in cells] == cells and [cell.key for cell in cells] == keys


@pytest.mark.parametrize(
    "text",
    [
        "", "333132", 7, None, BEST + "|", BEST.replace("~2", "~1"), BEST.replace("nor_", "sep_"),
        BEST.replace("nor_conv_1x1~2|", ""), BEST.replace("+", " + "), BEST.upper(), "|" * 100_000,
    ],
    ids=lambda text: str(text)[:40],
)  # fmt: skip
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(InputError, match="found must be a cell of NAS-Bench-201") as error:
        Cell.from_json(text, "found")
    assert len(str(error.value)) < 700


def test_derive_takes_the_strongest_of_all_five():
    alphas = torch.zeros(6, 5)
    for edge, candidate in enumerate((0, 4, 3, 2, 1, 0)):
        alphas[edge, candidate] = 1e-3
    assert derive(alphas).key == "043210"
    assert derive(torch.zeros(6, 5)).key == "000000"


def by_hand(state, images, probabilities, cells):
    """The network of a state dict in training mode, from the paper's figure 1 and its operations' formulas, a
    function of every edge's name as the benchmark's code writes it."""

    def batch_norm(x, name=None):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / (variance + 1e-5).sqrt()
        if name is None:
            return x
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def average(x):
        """Of the pixels of a 3x3 window that lie in the image."""
        ones = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
        sums, counts = (F.conv2d(y, ones, padding=1, groups=x.shape[1]) for y in (x, torch.ones_like(x)))
        return sums / counts

    def cell(x, name):
        nodes, row = {0: x}, 0
        for i in range(1, 4):
            nodes[i] = 0
            for j in range(i):
                at, p, x = f"{name}.edges.{row}", probabilities[row], nodes[j]
                nodes[i] = nodes[i] + p[1] * x + p[4] * average(x)
                for column, size in ((2, 1), (3, 3)):
                    kernel = state[f"{at}.nor_conv_{size}x{size}.1.weight"]
                    y = batch_norm(F.conv2d(x.clamp(min=0), kernel, padding=size // 2))
                    nodes[i] = nodes[i] + p[column] * y
                row += 1
        return nodes[3]

    def reduction(x, name):
        first, second = (f"{name}.convolutions.{index}" for index in (0, 1))
        y = F.conv2d(x.clamp(min=0), state[f"{first}.1.weight"], padding=1, stride=2)
        y = batch_norm(y, f"{first}.2").clamp(min=0)
        y = batch_norm(F.conv2d(y, state[f"{second}.1.weight"], padding=1), f"{second}.2")
        n, c, h, w = x.shape
        quarters = x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
        return y + F.conv2d(quarters, state[f"{name}.shortcut.1.weight"])

    x = batch_norm(F.conv2d(images, state["stem.0.weight"], padding=1), "stem.1")
    for index in range(3 * cells + 2):
        place = f"body.{index}"
        x = reduction(x, place) if index % (cells + 1) == cells else cell(x, place)
    x = batch_norm(x, "head.0").clamp(min=0).mean((2, 3))
    return x @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = SearchNetwork(2, 4, 2, image_channels=3).double()
    with torch.no_grad():
        for name, tensor in {**made.weights(), **made.alphas()}.items():
            tensor.add_((1.0 if name == "alphas_normal" else 0.1) * torch.randn_like(tensor))
    return made


def batch(n=5):
    return torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.randint(4, (n,))


def test_the_network_is_the_papers(network):
    """Logits and every gradient against a second implementation."""
    images, labels = batch()
    inputs = {**network.weights(), **network.alphas()}
    found = architect.gradients(F.cross_entropy(network(images), labels), inputs)
    logits = by_hand(inputs, images, network.alphas_normal.softmax(-1), 2)
    expected = architect.gradients(F.cross_entropy(logits, labels), inputs)
    assert relative_error(network(images), logits) < 1e-12
    assert all(relative_error(found[name], expected[name]) < 1e-9 for name in inputs)
    # as a function of the flat weights, too
    flat = {"weights": network.flat_weights.detach().clone()}
    assert relative_error(network.logits(images, flat, network.alphas()), logits) < 1e-12


def test_the_parameters_of_the_benchmarks_network():
    """The best cell's network has 1.073466 M parameters in the benchmark's table, with the affine batch norms
    of a network that is trained alone: 16 channels, 5 cells a stage."""
    weights = SearchNetwork(16, 10, 5).weights()
    kept = {f"edges.{edge}.{name}." for edge, name in enumerate(cell_of("333132").operations)}
    of_cells = {name for name in weights if "edges" in name}
    of_best = {name for name in of_cells if any(operation in name for operation in kept)}
    total = sum(w.numel() for name, w in weights.items() if name not in of_cells - of_best)
    affine = 2 * (16 + 32 + 64) * len(of_best) // 3
    assert total + affine == 1_073_466


@pytest.mark.parametrize(
    ("key", "connected"),
    [("000300", True), ("003000", False), ("300010", True), ("300200", True), ("310000", False)],
)
def test_which_cells_see_the_image(key, connected, network):
    """Rows of the alphas, columns, digits and the benchmark's edges are one order."""
    alphas = {"alphas_normal": certain(key)}
    images, weights = batch()[0].requires_grad_(), network.weights()
    logits = network.logits(images, weights, alphas)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    assert gradient.abs().max() > 1e-6 if connected else gradient.abs().max() == 0


@pytest.fixture
def smooth(network):
    """The same without kinks: softplus for ReLU."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.Softplus())
    return network


def test_second_order_is_the_derivative_of_the_loss_one_step_ahead(smooth):
    train, validation = (partial(smooth.loss, *batch()) for _ in range(2))
    weights, alphas = {"weights": smooth.flat_weights}, smooth.alphas()
    momenta = {"weights": 0.1 * torch.randn_like(smooth.flat_weights)}
    step = architect.VirtualStep(lr=0.05, momentum=0.9, weight_decay=3e-3)
    arguments = train, validation, weights, alphas, momenta, step
    exact = architect.second_order_exact(*arguments)["alphas_normal"]

    def loss_ahead(a):
        w = architect.leaves(weights)
        gradients = architect.gradients(train(w, {"alphas_normal": a}), w)
        return validation(step(w, gradients, momenta), {"alphas_normal": a}).detach()

    direction, h, alpha = torch.randn(6, 5).double(), 3e-4, alphas["alphas_normal"].detach()
    f = {k: loss_ahead(alpha + k * h * direction) for k in (-2, -1, 1, 2)}
    expected = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
    assert relative_error((exact * direction).sum(), expected) < 1e-8
    # Here the published step of the differences is small enough to see the second-order term.
    by_differences = architect.second_order_finite_difference(*arguments)["alphas_normal"]
    first_order = architect.first_order(validation, weights, alphas)["alphas_normal"]
    assert relative_error(by_differences, exact) < 1e-2 < 0.1 < relative_error(first_order, exact)


def test_statistics_are_frozen_in_the_architecture_step(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if "running" in name}
    with network.frozen_statistics():
        network(batch()[0])
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    network(batch()[0])
    assert all(not torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
