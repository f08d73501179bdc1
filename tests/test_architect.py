"""Architecture gradients against the official code's numbers, and against numerical derivatives."""

import math

import pytest
import torch
from conftest import relative_error
from official import everything, flat, official_network, three_steps
from torch import nn

from darts_fast import architect
from darts_fast.genotype import derive
from darts_fast.interop import load_official_search
from darts_fast.supernet import Supernet


def test_float64_matches_the_official_code(golden_search):
    network = official_network(golden_search, torch.float64)
    found = everything(network, golden_search, torch.float64)
    expected = golden_search.group("float64", torch.float64)
    assert set(found) == set(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert all(error < 1e-9 for error in errors.values()), errors


@pytest.fixture(scope="module")
def trajectory(golden_search):
    return three_steps(golden_search)


def test_three_steps_follow_the_official_trajectory(golden_search, trajectory):
    losses, network = trajectory
    expected = golden_search.group("trajectory_fd", torch.float64)
    assert relative_error(losses, expected["train_losses"]) < 1e-9
    # The official weights are stored in float32. The last weight step is taken at the third step's alphas.
    official = {k.removeprefix("weights/"): v for k, v in expected.items() if k.startswith("weights/")}
    final = {**golden_search.group("init", torch.float64), **official}
    alphas = final.pop("alphas_normal"), final.pop("alphas_reduce")
    found = network.weights()
    for name, weight in load_official_search(final, *alphas).weights().items():
        assert relative_error(found[name], weight) < 1e-7, name
    assert flatten(derive(*network.alphas().values())) == golden_search.text("trajectory_fd/genotype")


def test_the_golden_trajectory_does_not_hold_its_own_alphas(golden_search):
    """Why the alphas of the three steps are held against `steps_by_hand` below: where the file should have
    them it repeats the alphas of its derivation test (standard normal, not near 1e-3)."""
    expected = torch.stack(
        [golden_search[f"trajectory_fd/{name}"] for name in ("alphas_normal", "alphas_reduce")]
    )
    assert torch.equal(expected, golden_search["derive/alphas"])


def steps_by_hand(golden):
    """The same three steps written out as the official code does them, in place, tensor by tensor: weights
    moved and moved back for the finite difference, Adam, clipping and SGD from their formulas."""
    meta = golden.meta
    network = official_network(golden, torch.float64)
    w, a = list(network.weights().values()), list(network.alphas().values())
    buffers = [torch.zeros_like(t) for t in w]
    first, second = ([torch.zeros_like(t) for t in a] for _ in range(2))
    xi, decay, momentum = meta["xi"], meta["weight_decay"], meta["momentum"]
    beta1, beta2 = meta["alpha_betas"]

    def gradient(batch, inputs):
        return torch.autograd.grad(torch.nn.functional.cross_entropy(network(batch[0]), batch[1]), inputs)

    def norm(tensors):
        return sum((t**2).sum() for t in tensors).sqrt()

    for index in range(meta["steps"]):
        train, validation = (golden.batch(2 * index + k, torch.float64) for k in range(2))
        kept = [t.detach().clone() for t in w]
        g = gradient(train, w)
        with torch.no_grad():
            for t, b, d in zip(w, buffers, g, strict=True):
                t -= xi * (momentum * b + d + decay * t)
        found = gradient(validation, a + w)
        direction, v = list(found[:2]), found[2:]
        epsilon = 1e-2 / norm(v)
        with torch.no_grad():
            for t, k in zip(w, kept, strict=True):
                t.copy_(k)
        for sign in (1, -1):
            with torch.no_grad():
                for t, k, d in zip(w, kept, v, strict=True):
                    t.copy_(k + sign * epsilon * d)
            for d, found in zip(direction, gradient(train, a), strict=True):
                d -= sign * xi * found / (2 * epsilon)
        with torch.no_grad():
            for t, k in zip(w, kept, strict=True):
                t.copy_(k)
            for t, d, m1, m2 in zip(a, direction, first, second, strict=True):
                d = d + meta["alpha_weight_decay"] * t
                m1.mul_(beta1).add_((1 - beta1) * d)
                m2.mul_(beta2).add_((1 - beta2) * d**2)
                corrected = m1 / (1 - beta1 ** (index + 1)), m2 / (1 - beta2 ** (index + 1))
                t -= meta["alpha_lr"] * corrected[0] / (corrected[1].sqrt() + 1e-8)
        g = gradient(train, w)
        clip = min(1.0, meta["grad_clip"] / (norm(g) + 1e-6))
        with torch.no_grad():
            for t, b, d in zip(w, buffers, g, strict=True):
                b.mul_(momentum).add_(clip * d + decay * t)
                t -= xi * b
    return network


def test_three_steps_by_hand_give_the_same_alphas_and_weights(golden_search, trajectory):
    _, network = trajectory
    by_hand, found = steps_by_hand(golden_search), network.state_dict()
    for name, tensor in {**by_hand.alphas(), **by_hand.weights()}.items():
        assert relative_error(found[name], tensor) < 1e-9, name


def flatten(genotype):
    """The official code's flat notation."""
    flat_cells = {
        name: [pair for node in getattr(genotype, name) for pair in node] for name in ("normal", "reduce")
    }
    return str(genotype._replace(**flat_cells))


def smooth(network):
    """The same network without kinks: softplus for ReLU, average for max pool."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, child.stride, padding=1))
    return network


@pytest.fixture
def smooth_problem():
    torch.manual_seed(3)
    network = smooth(Supernet(channels=2, classes=4, layers=3, image_channels=2)).double()
    batches = [(torch.randn(4, 2, 8, 8).double(), torch.randint(4, (4,))) for _ in range(2)]
    losses = [lambda w, a, b=batch: network.loss(*b, w, a) for batch in batches]
    return network, *losses


def along(function, alphas, direction, h):
    """Five-point central difference of a function of the alphas."""
    shifted = {
        k: function({name: alphas[name].detach() + k * h * direction[name] for name in alphas})
        for k in (-2, -1, 1, 2)
    }
    return (8 * (shifted[1] - shifted[-1]) - (shifted[2] - shifted[-2])) / (12 * h)


def test_exact_hvp_is_the_numerical_derivative_on_a_smooth_network(smooth_problem):
    network, train_loss, _ = smooth_problem
    weights, alphas = architect.leaves(network.weights()), architect.leaves(network.alphas())
    v = {name: torch.randn_like(w) for name, w in weights.items()}
    direction = {name: torch.randn_like(a) for name, a in alphas.items()}
    w_gradients = architect.gradients(train_loss(weights, alphas), weights, create_graph=True)
    exact = architect.exact_hvp(w_gradients, alphas, v)
    expected = sum((exact[name] * direction[name]).sum() for name in alphas)

    def slope(a):
        return sum((g * v[k]).sum() for k, g in architect.gradients(train_loss(weights, a), weights).items())

    assert relative_error(along(slope, alphas, direction, 1e-3), expected) < 1e-8
    # and central differences along v agree with it here, where there is no kink
    by_differences = architect.finite_difference_hvp(train_loss, architect.detached(weights), alphas, v)
    assert relative_error(flat(by_differences), flat(exact)) < 1e-3


def test_second_order_is_the_derivative_of_the_loss_one_step_ahead(smooth_problem):
    network, train_loss, validation_loss = smooth_problem
    weights, alphas = network.weights(), network.alphas()
    momenta = {name: 0.1 * torch.randn_like(w) for name, w in weights.items()}
    step = architect.VirtualStep(lr=0.05, momentum=0.9, weight_decay=3e-3)
    direction = {name: torch.randn_like(a) for name, a in alphas.items()}
    found = architect.second_order_exact(train_loss, validation_loss, weights, alphas, momenta, step)

    def loss_ahead(a):
        w = architect.leaves(weights)
        w_gradients = architect.gradients(train_loss(w, a), w)
        return validation_loss(step(w, w_gradients, momenta), a).detach()

    expected = along(loss_ahead, alphas, direction, 1e-3)
    assert relative_error(sum((found[n] * direction[n]).sum() for n in alphas), expected) < 1e-8


def test_beta_decay_is_part_of_the_derivative_of_the_loss_one_step_ahead(smooth_problem):
    network, train_loss, validation_loss = smooth_problem
    weights, strength = network.weights(), torch.tensor(2.0).double()
    alphas = {name: a + torch.randn_like(a) for name, a in network.alphas().items()}
    step = architect.VirtualStep(lr=0.05, momentum=0.9, weight_decay=3e-3)
    direction = {name: torch.randn_like(a) for name, a in alphas.items()}
    decayed = architect.with_penalty(validation_loss, lambda a: strength * architect.beta_penalty(a))

    def penalty(a):  # as the paper writes it
        rows = [row for of_cell in a.values() for row in of_cell]
        return sum(row.exp().sum().log() for row in rows) / len(rows)

    def loss(a, xi):
        w = architect.leaves(weights)
        w_gradients = architect.gradients(train_loss(w, a), w)
        ahead = step._replace(lr=xi)(w, w_gradients, {})
        return (validation_loss(ahead, a) + strength * penalty(a)).detach()

    for found, xi in (
        (architect.first_order(decayed, weights, alphas), 0.0),
        (architect.second_order_exact(train_loss, decayed, weights, alphas, {}, step), 0.05),
    ):
        expected = along(lambda a, xi=xi: loss(a, xi), alphas, direction, 1e-4)
        assert relative_error(sum((found[n] * direction[n]).sum() for n in alphas), expected) < 1e-8


def test_alphas_at_minus_infinity_add_nothing_to_the_penalty():
    alphas = {"one": torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)}
    penalty = architect.beta_penalty(alphas)
    assert float(penalty.detach()) == pytest.approx(math.log(math.e + math.e**2))
    (gradient,) = torch.autograd.grad(penalty, alphas["one"])
    assert gradient[0, 1] == 0 and torch.isfinite(gradient).all()
