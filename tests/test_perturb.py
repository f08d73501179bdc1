"""The perturbations of SmoothDARTS, and the auxiliary skip connection of DARTS-: what weighs the candidates
beside the softmax."""

import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint, relative_error, same

from darts_fast import SearchConfig, architect, search
from darts_fast.perturb import ATTACK_STEPS, adversarial_perturbation, projected, random_perturbation
from darts_fast.search import Search
from darts_fast.search_step import SearchStep
from darts_fast.space import CANDIDATES
from darts_fast.spaces import SPACES
from darts_fast.supernet import Supernet

pytestmark = pytest.mark.usefixtures("no_heat_maps")
SKIP = list(CANDIDATES).index("skip_connect")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(seed, size=3):
    drawn = generator(seed)
    images = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=drawn)
    return images, torch.randint(5, (size,), generator=drawn)


def network_of(fused=False, space="darts", seed=0):
    torch.manual_seed(seed)
    network = Supernet(2, 5, 3, fused=fused, space=SPACES[space]).double()
    with torch.no_grad():
        for alphas in network.alphas().values():
            alphas.normal_()
    return network


def probabilities(space="darts"):
    network = network_of(space=space)
    with torch.no_grad():
        return dict(zip(network.ALPHAS, network.probabilities(), strict=True))


@pytest.mark.parametrize("space", ["darts", "s1"])
def test_a_random_perturbation_stays_where_it_may_be(space):
    p, epsilon = probabilities(space), torch.tensor(0.3, dtype=torch.float64)
    delta = random_perturbation(p, epsilon, generator())
    for name, d in delta.items():
        assert (d.abs() <= epsilon).all() and (p[name] + d >= 0).all() and (p[name] + d <= 1).all()
        assert not d[p[name] == 0].any()
    again = random_perturbation(p, epsilon, generator())
    assert all(torch.equal(delta[name], again[name]) for name in p)


def test_a_random_perturbation_is_uniform():
    """Where nothing of it is cut off."""
    p = {"half": torch.full((4000,), 0.5, dtype=torch.float64)}
    delta = random_perturbation(p, torch.tensor(0.3, dtype=torch.float64), generator())["half"]
    assert delta.mean().abs() < 0.01 and delta.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.03)
    assert delta.max() > 0.29 and delta.min() < -0.29


def test_an_adversarial_perturbation_of_a_linear_loss_is_the_corner():
    """The maximum of <c, delta> over the cube, cut off where p + delta would leave [0, 1]."""
    p, epsilon = probabilities("s1"), torch.tensor(0.2, dtype=torch.float64)
    c = {name: torch.randn(t.shape, generator=generator(1), dtype=t.dtype) for name, t in p.items()}
    calls = []

    def loss(delta):
        calls.append(1)
        return sum((c[name] * delta[name]).sum() for name in delta)

    found = adversarial_perturbation(loss, p, epsilon, generator())
    corner = projected({name: epsilon * c[name].sign() for name in c}, p, epsilon)
    assert all(torch.allclose(found[name], corner[name], atol=1e-12) for name in p)
    assert len(calls) == ATTACK_STEPS + 2


def test_an_ascent_that_does_not_raise_the_loss_is_none():
    p, epsilon = probabilities(), torch.tensor(0.2, dtype=torch.float64)
    found = adversarial_perturbation(
        lambda d: -sum(t.abs().sum() for t in d.values()), p, epsilon, generator()
    )
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("fused", [False, True])
def test_an_adversarial_perturbation_raises_a_networks_loss(fused):
    """By more than random ones of the same size do, and no running statistics move."""
    network, (images, labels) = network_of(fused), batch(0)
    step = SearchStep(network, SearchConfig(perturb="adversarial"), generator())
    step.epsilon.fill_(0.1)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    with torch.no_grad():
        p = dict(zip(network.ALPHAS, network.probabilities(), strict=True))

    def loss(delta):
        with network.perturbed(delta), network.frozen_statistics(), torch.no_grad():
            return network.loss(images, labels, step.weights, step.alphas)

    adversarial = loss(step._perturbation(images, labels))
    drawn = [loss(random_perturbation(p, step.epsilon, generator(seed))) for seed in range(5)]
    assert adversarial > max(drawn) and adversarial > loss({})
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_the_weight_step_is_at_perturbed_weights_of_the_candidates(fused):
    """Its loss is that of cells called one by one with p + delta."""
    network, other, (images, labels) = network_of(fused), network_of(), batch(0)
    step = SearchStep(network, SearchConfig(perturb="random"), generator(3))
    step.epsilon.fill_(0.2)
    loss, _, _ = step._weight_step(images, labels)
    p = dict(zip(other.ALPHAS, other.probabilities(), strict=True))
    delta = random_perturbation(p, step.epsilon, generator(3))
    moved = [p[name] + delta[name] for name in other.ALPHAS]
    before = x = other.stem(images)
    for cell in other.cells:
        before, x = x, cell(before, x, moved[int(cell.reduction)])
    expected = F.cross_entropy(other.classifier(x.mean(dim=(2, 3))), labels)
    assert relative_error(loss, expected.detach()) < 1e-9
    assert not network.added


@pytest.mark.parametrize("order", ["first", "exact", "finite-difference"])
def test_the_auxiliary_skip_connection_is_the_papers(order):
    """(beta + p_skip) x + the other candidates, through every form of the architecture gradient."""
    beta, found = 0.7, []
    for fused in (False, True):
        network = network_of(fused)
        network.set_auxiliary_skip(beta)
        found.append(architecture_gradient(network, order))
    network = network_of()
    for cell in network.cells:
        for mixed in cell.edges:
            mixed.forward = with_auxiliary(mixed, beta)
    expected = architecture_gradient(network, order)
    for gradients in found:
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) < 1e-8, name


def with_auxiliary(mixed, beta):
    def forward(x, p):
        return beta * mixed["skip_connect"](x) + sum(
            weight * operation(x) for weight, operation in zip(p, mixed.values(), strict=True)
        )

    return forward


def architecture_gradient(network, order):
    losses = [
        lambda w, a, images=images, labels=labels: network.loss(images, labels, w, a)
        for images, labels in (batch(0), batch(1))
    ]
    weights, alphas = {"weights": network.flat_weights}, network.alphas()
    with network.frozen_statistics():
        if order == "first":
            return architect.first_order(losses[1], weights, alphas)
        step = architect.VirtualStep(0.025, 0.9, 3e-4)
        second = {
            "exact": architect.second_order_exact,
            "finite-difference": architect.second_order_finite_difference,
        }[order]
        return second(*losses, weights, alphas, {}, step)


SETTINGS = {"epochs": 3, "init_channels": 2, "layers": 3, "batch_size": 8, "order": 1, "fused": True}


@pytest.fixture
def data():
    images = torch.randint(0, 256, (32, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    return images, torch.arange(32) % 3


def test_strength_zero_has_the_bits_of_none(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = []
    options = [{}, *({"perturb": how, "perturb_epsilon": 0.0} for how in ("random", "adversarial"))]
    for given in options:
        states.append(checkpoint(search(SearchConfig(**SETTINGS, **given), data).path))
    assert all(same(states[0]["network"], state["network"]) for state in states)
    assert all(same(states[0]["alpha_optimizer"], state["alpha_optimizer"]) for state in states)


@pytest.mark.parametrize("how", ["random", "adversarial"])
def test_what_is_added_beside_the_softmax_is_not_perturbed(how):
    """At strength 0 the auxiliary skip connection stays whole; at any, |delta| is at most epsilon."""
    network, (images, labels) = network_of(), batch(0)
    network.set_auxiliary_skip(1.0)
    step = SearchStep(network, SearchConfig(perturb=how), generator())
    for epsilon in (0.0, 0.1):
        step.epsilon.fill_(epsilon)
        delta, whole = step._perturbation(images, labels), network.mixture()
        assert all(d.abs().max() <= epsilon + 1e-12 for d in delta.values())
        with network.perturbed(delta):
            for name, p, perturbed in zip(network.ALPHAS, whole, network.mixture(), strict=True):
                assert torch.allclose(perturbed, p + delta[name]) and (epsilon == 0 or delta[name].any())
        assert all(map(torch.equal, network.mixture(), whole))


@pytest.mark.parametrize("given", [{"perturb": "adversarial"}, {"perturb": "random", "auxiliary_skip": 0.5}])
def test_resumed_to_the_same_bits(given, data, resumed_like_undisturbed):
    """From the second step of the second epoch."""
    resumed_like_undisturbed(SearchConfig(**SETTINGS, **given), data, 4)


def test_the_auxiliary_skip_connection_falls_to_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    begin = Search.begin_epoch

    def record(self):
        begin(self)
        seen.append({name: added.clone() for name, added in self.network.added.items()})

    monkeypatch.setattr(Search, "begin_epoch", record)
    search(SearchConfig(**SETTINGS, auxiliary_skip=0.8), data)
    for added, beta in zip(seen, (0.8, 0.4, 0.0), strict=True):
        for tensor in added.values():
            assert torch.allclose(tensor[:, SKIP], torch.tensor(beta))
            assert tensor.count_nonzero() == (14 if beta else 0)
