"""The fused cell against the reference cell and the official code's numbers."""

import copy
import pickle

import pytest
import torch
from conftest import relative_error
from official import everything, official_network, three_steps

from darts_fast.config import SearchConfig
from darts_fast.search_step import SearchStep
from darts_fast.state import copy_state
from darts_fast.supernet import Supernet


def pair(dtype=torch.float64, channels=4, layers=3):
    """The same network on the reference cell and on the fused one."""
    torch.manual_seed(0)
    networks = [Supernet(channels, 5, layers, fused=fused).to(dtype) for fused in (False, True)]
    networks[1].load_state_dict(networks[0].state_dict())
    return networks


def batch(size=3, side=12, dtype=torch.float64):
    return torch.randn(size, 3, side, side, dtype=dtype), torch.randint(5, (size,))


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        if tensor.any():
            assert relative_error(found[name], tensor) < 1e-9, name
        else:
            assert not found[name].any(), name


def test_names_and_initial_values_are_the_references():
    networks = []
    for fused in (False, True):
        torch.manual_seed(0)
        networks.append(Supernet(4, 5, 4, fused=fused))
    states = [network.state_dict() for network in networks]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_float64_matches_the_official_code(golden_search):
    """Logits, all gradients, the exact product and both forms of the unrolled gradient."""
    found = everything(
        official_network(golden_search, torch.float64, fused=True), golden_search, torch.float64
    )
    expected = golden_search.group("float64", torch.float64)
    assert set(found) == set(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert all(error < 1e-9 for error in errors.values()), errors


def test_three_steps_are_the_references(golden_search):
    """Weights, alphas, running statistics and losses; the reference's own are held to the official code's."""
    losses, reference = three_steps(golden_search, "exact")
    found, network = three_steps(golden_search, "exact", fused=True)
    assert relative_error(found, losses) < 1e-9
    assert_same_state(network.state_dict(), reference.state_dict())


def test_every_gradient_is_the_references():
    """By loss.backward(), where nothing says which gradients are wanted."""
    networks = pair()
    images, labels = batch()
    for network in networks:
        torch.nn.functional.cross_entropy(network(images), labels).backward()
    expected = dict(networks[0].named_parameters())
    for name, parameter in networks[1].named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) < 1e-9, name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_the_running_statistics_of_a_copy_are_its_own(copied):
    """They are views of one tensor, which a copy must have anew."""
    reference, network = pair()
    before, other = copy.deepcopy(network.state_dict()), copied(network)
    images, _ = batch()
    with torch.no_grad():
        reference(images)
        other(images)
    assert_same_state(other.state_dict(), reference.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_running_statistics_and_evaluation_are_the_references():
    """Also where an edge's statistics are not those of the other edges from its state."""
    networks = pair()
    images, _ = batch()
    with torch.no_grad():
        for network in networks:
            network(images)
            with network.frozen_statistics():
                network(2 * images)
    states = [network.state_dict() for network in networks]
    assert_same_state(states[1], states[0])
    with torch.no_grad():
        for edge, mixed in enumerate(networks[0].cells[0].edges):
            mixed["avg_pool_3x3"][1].running_mean += 0.1 * edge
    networks[1].load_state_dict(networks[0].state_dict())
    logits, gradients = [], []
    for network in networks:
        network.eval()
        logits.append(network(images))
        gradients.append(torch.autograd.grad(logits[-1].pow(2).sum(), network.alphas_normal)[0])
    assert relative_error(logits[1], logits[0]) < 1e-9
    assert relative_error(gradients[1], gradients[0]) < 1e-9
    expected = networks[0].state_dict()
    for name, tensor in networks[1].state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_one_resumes_in_the_other():
    networks = pair()
    batches = [batch() for _ in range(4)]
    steps = [SearchStep(network, SearchConfig()) for network in networks]
    for step in steps:
        step(*batches[:2], 0.025)
    states = [copy.deepcopy(step.state_dict()) for step in steps]
    swapped = [SearchStep(network, SearchConfig()) for network in pair()]
    for step, state in zip(swapped, reversed(states), strict=True):
        copy_state(step.state_dict(), state)
    for step in (*steps, *swapped):
        step(*batches[2:], 0.02)
    for step in (steps[1], *swapped):
        assert_same_state(step.network.state_dict(), networks[0].state_dict())


def test_a_network_without_normal_cells():
    """Of one layer, which is a reduction cell."""
    images, labels = batch(side=8)
    found = []
    for network in pair(layers=1):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        alphas = list(network.alphas().values())
        of_normal, of_reduce = torch.autograd.grad(loss, alphas, allow_unused=True)
        assert of_normal is None or not of_normal.any()
        found.append(of_reduce)
    assert relative_error(found[1], found[0]) < 1e-9


def test_a_second_weight_gradient_of_the_network_raises():
    _, network = pair()
    images, labels = batch()
    loss = network.loss(images, labels, network.weights(), network.alphas())
    weights = {n: w for n, w in network.weights().items() if n.startswith("cells")}
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative with respect to its weights"):
        torch.autograd.grad(sum(g.sum() for g in gradients), list(weights.values()))


def saved_bytes(network, images):
    """Of the distinct storages that the forward pass keeps for the backward pass, weights left out."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    return sum(storage.nbytes() for storage in kept.values())


def test_the_forward_pass_keeps_at_most_40_percent_of_what_the_references_keeps():
    images, _ = batch(4, 32, torch.float32)
    reference, fused = (saved_bytes(n, images) for n in pair(torch.float32, channels=16, layers=3))
    assert 0 < fused <= 0.4 * reference, fused / reference
