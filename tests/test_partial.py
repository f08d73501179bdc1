"""PC-DARTS (partial channels, edge normalisation): on the kernels as in PyTorch, derived, searched."""

import copy
import functools

import pytest
import torch
from conftest import SMALL_SPACE, events, relative_error

from darts_fast import InputError, SearchConfig, architect
from darts_fast.genotype import derive
from darts_fast.kernels import aten, native, triton
from darts_fast.kernels.backends import using
from darts_fast.reference import MixedOp, edge_weights
from darts_fast.search_step import SearchStep
from darts_fast.space import CANDIDATES, DARTS, EDGES, Space
from darts_fast.state import copy_state
from darts_fast.supernet import Supernet

pytestmark = pytest.mark.usefixtures("no_heat_maps")

SMALL = Space(  # for Triton's interpreter: two nodes, so that one reads another, few candidates
    normal=(
        ("max_pool_3x3", "skip_connect"), ("none", "sep_conv_3x3"), *[("avg_pool_3x3", "skip_connect")] * 3,
    ),
    reduce=(
        ("max_pool_3x3", "skip_connect"), ("none", "dil_conv_3x3"), *[("avg_pool_3x3", "skip_connect")] * 3,
    ),
    nodes=2,
)  # fmt: skip


def pair(partial_channels, channels, dtype=torch.float64, space=DARTS):
    """The same network on the reference cell and on the fused one, with alphas and betas of any size."""
    networks = []
    for fused in (False, True):
        torch.manual_seed(0)
        network = Supernet(channels, 5, 3, fused=fused, space=space, partial_channels=partial_channels)
        with torch.no_grad():
            for alphas in network.alphas().values():
                alphas.normal_()
        networks.append(network.to(dtype))
    return networks


def batch(seed, dtype=torch.float64, images=3, side=12):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(images, 3, side, side, dtype=torch.float64, generator=generator)
    return drawn.to(dtype), torch.randint(5, (images,), generator=generator)


def quantities(network, images, labels):
    """Loss, all gradients, and the exact product along a direction, by name."""
    weights, alphas = {"weights": network.flat_weights}, network.alphas()
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(network.flat_weights.shape, dtype=torch.float64, generator=generator)
    with network.frozen_statistics():
        loss = network.loss(images, labels, weights, alphas)
        first = torch.autograd.grad(loss, list(alphas.values()), retain_graph=True)
        gradients = architect.gradients(loss, weights, create_graph=True)
        product = architect.exact_hvp(gradients, alphas, {"weights": v.to(images.dtype)})
    found = {"loss": loss, "weights": gradients["weights"], **dict(zip(alphas, first, strict=True))}
    return {**found, **{f"product, {name}": t for name, t in product.items()}}


def errors(found, expected):
    assert list(found) == list(expected) and len(found) == 10
    return {name: relative_error(found[name], expected[name]) for name in expected}


@pytest.mark.parametrize(("partial_channels", "channels"), [(2, 4), (4, 4), (3, 6)])
def test_the_kernels_compute_what_the_reference_does(partial_channels, channels):
    reference, fused = pair(partial_channels, channels)
    assert list(fused.state_dict()) == list(reference.state_dict())
    found = errors(*(quantities(network, *batch(0)) for network in (fused, reference)))
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("backend", [aten, native], ids=["aten", "native"])
def test_float32_is_as_near_as_the_references_rounding_allows(backend):
    """Of float64; no kink is between the two here, as tests/test_float32.py has to allow for."""
    if backend is native and native.level() is None:
        # Optional: without a compiler the install has no C++ library; the ATen half of this test still runs.
        pytest.skip(f"the C++ library {native.absence()}")
    exact = quantities(pair(2, 4)[0], *batch(0))
    reference, fused = pair(2, 4, torch.float32)
    allowed = errors(quantities(reference, *batch(0, torch.float32)), exact)
    with using(backend):
        found = errors(quantities(fused, *batch(0, torch.float32)), exact)
    assert all(error <= max(10 * allowed[name], 1e-6) for name, error in found.items()), (found, allowed)


@pytest.mark.usefixtures("no_overflow_checks")
def test_the_triton_kernels_compute_what_the_reference_does():
    """In float64, on the interpreter where there is no GPU."""
    reference, fused = pair(2, 4, space=SMALL)
    data = batch(0, images=2, side=4)
    expected = quantities(reference, *data)
    with using(triton):
        found = errors(quantities(fused, *data), expected)
    assert max(found.values()) < 1e-9, found


def test_evaluation_and_running_statistics_are_the_references():
    networks = pair(2, 4)
    images, _ = batch(0)
    with torch.no_grad():
        for network in networks:
            network(images)
            network.eval()
        logits = [network(images) for network in networks]
    assert relative_error(logits[1], logits[0]) < 1e-9
    expected = networks[0].state_dict()
    for name, tensor in networks[1].state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("name", ["alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"])
def test_numerical_derivatives(name):
    """Of the reference's validation loss at w - lr grad L_train(w, a), which the virtual step leads to."""
    network, _ = pair(2, 4)
    weights, alphas = {"weights": network.flat_weights}, network.alphas()
    losses = [functools.partial(network.loss, *batch(i)) for i in range(2)]
    step = architect.VirtualStep(0.01, 0.9, 3e-4)
    exact = architect.second_order_exact(*losses, weights, alphas, {}, step)[name]

    def after(shift):
        moved = {**alphas, name: alphas[name].detach() + shift}
        leaf = architect.leaves(weights)
        ahead = step(leaf, architect.gradients(losses[0](leaf, moved), leaf), {})
        return losses[1](ahead, moved).detach()

    torch.manual_seed(1)
    direction, size = torch.randn_like(exact), 1e-6  # small enough for no kink on the way
    numerical = (after(size * direction) - after(-size * direction)) / (2 * size)
    assert relative_error(numerical, (exact * direction).sum()) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_the_mixed_op_by_hand(stride):
    """Channel c K + g is channel c of the mixed candidates (g = 0), or of the g-th block that passes."""
    torch.manual_seed(0)
    mixed = MixedOp(6, stride, ("skip_connect",), tuple(CANDIDATES), 3).double()
    x, p = torch.randn(2, 6, 4, 4, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    out, k = mixed(x, p), list(CANDIDATES).index("skip_connect")
    for c in range(2):
        assert torch.equal(out[:, 3 * c], p[k] * mixed["skip_connect"](x[:, :2])[:, c])
        for g in (1, 2):
            passed = x[:, 2 * g + c]
            if stride == 2:
                passed = passed.unflatten(1, (2, 2)).unflatten(3, (2, 2)).amax((2, 4))
            assert torch.equal(out[:, 3 * c + g], passed)


def test_the_edges_of_a_node_have_weights_that_add_up_to_1():
    betas = torch.randn(len(EDGES))
    found = edge_weights(betas, DARTS)
    for node in range(4):
        own = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
        assert torch.allclose(found[own], betas[own].softmax(0)) and found[own].sum() == pytest.approx(1)


def test_betas_choose_between_edges_whose_candidates_are_as_strong():
    alphas, betas = torch.zeros(14, 8), torch.zeros(14)
    betas[[2, 4]] = 1.0  # of the three edges into node 1, from states 0, 1, 2
    weights = edge_weights(betas, DARTS)
    found = derive(alphas, alphas, edge_weights=(weights, weights))
    assert [source for _, source in found.normal[1]] == [0, 2] == [source for _, source in found.reduce[1]]
    assert [source for _, source in derive(alphas, alphas).normal[1]] == [0, 1]
    alphas[3, 3] = 3.0  # a strong candidate outweighs that its edge is weighed less
    assert derive(alphas, alphas, edge_weights=(weights, weights)).normal[1][0] == ("skip_connect", 1)


def test_three_steps_end_at_the_references_alphas_and_betas():
    networks = pair(2, 4)
    steps = [SearchStep(network, SearchConfig(partial_channels=2)) for network in networks]
    before = copy.deepcopy(networks[0].alphas())
    for number in range(3):
        for step in steps:
            step(batch(2 * number), batch(2 * number + 1), 0.025)
    for name, expected in networks[0].alphas().items():
        moved = expected - before[name]
        assert moved.any()
        assert relative_error(networks[1].alphas()[name] - before[name], moved) < 1e-7, name


def test_a_checkpoint_of_one_resumes_in_the_other():
    networks, swapped = pair(2, 4), pair(2, 4)
    steps, others = ([SearchStep(n, SearchConfig()) for n in group] for group in (networks, swapped))
    for step in steps:
        step(batch(0), batch(1), 0.025)
    for step, other in zip(steps, reversed(others), strict=True):
        copy_state(other.state_dict(), step.state_dict())
    for step in (*steps, *others):
        step(batch(2), batch(3), 0.02)
    expected = networks[0].state_dict()
    for network in (networks[1], *swapped):
        for name, tensor in network.state_dict().items():
            assert torch.allclose(tensor, expected[name], rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("fused", [False, True])
def test_a_search_is_resumed_to_the_same_bits(fused, resumed_like_undisturbed):
    """And says what it does; its betas are in TensorBoard."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = images, torch.arange(24) % 3
    config = SearchConfig(
        partial_channels=2, epochs=2, init_channels=4, layers=3, batch_size=6, fused=fused,
        auxiliary_skip=1.0, space=SMALL_SPACE,
    )  # fmt: skip
    whole, _ = resumed_like_undisturbed(config, data, 1)
    log = (whole.path / "whole.log").read_text()
    assert "candidates read 1/2 of the channels" in log and "edges by softmaxed betas" in log
    recorded = {tag: value for _, tag, value in events(whole.path) if tag.startswith("z_betas_")}
    assert len(recorded) == 2 * 5  # edges
    assert sum(recorded.values()) == pytest.approx(2 * 2)  # 1 a node


def test_what_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"partial_channels must divide init_channels \(4\), not be 3"):
        SearchConfig(partial_channels=3, init_channels=4)
    with pytest.raises(InputError, match=r"partial_channels must divide init_channels \(16\), not be 3"):
        SearchConfig(partial_channels=3).resolved("cifar10")
    for rule in ("raw", "perturbation"):
        with pytest.raises(InputError, match="derive must be softmax"):
            SearchConfig(partial_channels=2, derive=rule)
