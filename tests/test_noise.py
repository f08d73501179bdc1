"""The operation `noise`, and the space S4 of RobustDARTS, which has it on every edge."""

import functools
import json

import pytest
import torch
from conftest import checkpoint, relative_error

from darts_fast import InputError, SearchConfig, TrainConfig, architect, evaluate, search, train
from darts_fast.curvature import largest_eigenvalue
from darts_fast.data import Dataset, seeded
from darts_fast.distributed import Ranks
from darts_fast.evaluation import evaluated
from darts_fast.genotype import Genotype
from darts_fast.reference import CellNoise, MixedOp
from darts_fast.runs import METRICS
from darts_fast.search import NOISE, Search
from darts_fast.search_step import SearchStep
from darts_fast.space import Space
from darts_fast.spaces import SPACES
from darts_fast.supernet import Supernet

pytestmark = pytest.mark.usefixtures("no_heat_maps")

S4 = SPACES["s4"]
SMALL = Space(  # edges of noise alone, and noise beside a skip and a pool
    normal=(("noise",), ("sep_conv_3x3", "noise"), ("skip_connect", "noise"), ("none", "noise"), ("noise",)),
    reduce=(("max_pool_3x3", "noise"), *[("skip_connect", "noise")] * 4),
    nodes=2,
)
STEP = architect.VirtualStep(0.01, 0.9, 3e-4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network_of(fused=False, space=S4, partial_channels=1, dtype=torch.float64):
    """With alphas of any size; the same weights whatever computes them."""
    torch.manual_seed(0)
    network = Supernet(4, 5, 3, fused=fused, space=space, partial_channels=partial_channels).to(dtype)
    with torch.no_grad():
        for alphas in network.alphas().values():
            alphas.normal_()
    return network


def batches(images=3, side=8, dtype=torch.float64):
    """Two, of images and labels."""
    found = []
    for seed in range(2):
        x = torch.randn(images, 3, side, side, dtype=torch.float64, generator=generator(seed)).to(dtype)
        found.append((x, torch.randint(5, (images,), generator=generator(seed))))
    return found


def losses_of(network, data):
    """Of both batches, as functions of weights and alphas, with noise that depends on nothing else."""
    network.noise_generator = generator(1)
    noise = [network.noise(images) for images, _ in data]
    return [
        functools.partial(network.loss, *of_batch, noise=drawn)
        for of_batch, drawn in zip(data, noise, strict=True)
    ]


def quantities(network, data):
    """The loss, all its gradients, and the architecture gradients of both orders."""
    losses, weights, alphas = losses_of(network, data), {"weights": network.flat_weights}, network.alphas()
    with network.frozen_statistics():
        loss = losses[0](weights, alphas)
        first = torch.autograd.grad(loss, [*weights.values(), *alphas.values()])
        second = architect.second_order_exact(*losses, weights, alphas, {}, STEP)
    return [loss.detach(), *first, *second.values()]


@pytest.mark.parametrize(
    ("space", "partial_channels"), [(S4, 1), (S4, 2), (SMALL, 1)], ids=["s4", "partial", "small"]
)
def test_the_kernels_compute_what_the_reference_does(space, partial_channels):
    """Given the same noise; and in evaluation."""
    found = []
    for fused in (False, True):
        network = network_of(fused, space, partial_channels)
        found.append(quantities(network, batches()))
        network.noise_generator = generator(2)
        with torch.no_grad():
            found[-1].append(network.eval()(batches()[0][0]))
    for of_kernels, expected in zip(found[1], found[0], strict=True):
        assert relative_error(of_kernels, expected) < 1e-9


def test_float32():
    """On the kernels of this machine. (The reference's noise is the same numbers in the same type.)"""
    data = batches(dtype=torch.float32)
    expected, found = (quantities(network_of(fused, dtype=torch.float32), data) for fused in (False, True))
    assert max(map(relative_error, found, expected)) < 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_both_orders_are_numerical_derivatives(fused):
    """With the noise held: of L(w, a), and of L_val(w - lr grad L_train(w, a), a)."""
    network = network_of(fused)
    losses, weights = losses_of(network, batches()), {"weights": network.flat_weights}
    alphas = architect.detached(network.alphas())

    def ahead(alphas):
        leaf = architect.leaves(weights)
        return losses[1](STEP(leaf, architect.gradients(losses[0](leaf, alphas), leaf), {}), alphas)

    with network.frozen_statistics():
        exact = {
            "first": architect.first_order(losses[1], weights, alphas),
            "second": architect.second_order_exact(*losses, weights, alphas, {}, STEP),
        }
        values = {"first": lambda alphas: losses[1](weights, alphas), "second": ahead}
        direction = {
            name: torch.randn(t.shape, generator=generator(3), dtype=t.dtype) for name, t in alphas.items()
        }
        for order, value in values.items():
            size = 1e-6  # small enough for no kink on the way
            plus, minus = (
                value({name: alphas[name] + shift * direction[name] for name in alphas}).detach()
                for shift in (size, -size)
            )
            slope = sum((exact[order][name] * direction[name]).sum() for name in alphas)
            assert relative_error((plus - minus) / (2 * size), slope) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_the_mixed_op_by_hand(stride):
    """p_noise eps + p_sep sep(x); dL/dp_noise = <G, eps>, and nothing of it goes back to x."""
    mixed = MixedOp(4, stride, S4.normal[0], S4.candidates).double()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    eps = torch.randn(3, 4, 8 // stride, 8 // stride, dtype=torch.float64)
    p = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    mixed["noise"].drawn = eps
    assert S4.candidates == ("sep_conv_3x3", "noise")
    out, separable = mixed(x, p), mixed["sep_conv_3x3"](x)
    assert torch.allclose(out, 0.3 * separable + 0.7 * eps)
    adjoint = torch.randn_like(out)
    of_x, of_p = torch.autograd.grad(out, (x, p), adjoint, retain_graph=True)
    assert torch.allclose(of_p[1], (adjoint * eps).sum())
    assert torch.allclose(of_x, torch.autograd.grad(separable, x, 0.3 * adjoint)[0])
    mixed["noise"].drawn = None
    drawn = mixed["noise"](x)
    assert drawn.shape == eps.shape and not torch.equal(drawn, mixed["noise"](x))


def test_what_is_drawn():
    """N(0, 1), each operation its own, shaped as its output, in the order of cells and edges."""
    network, x = network_of(), torch.zeros(16, 3, 12, 12, dtype=torch.float64)
    network.noise_generator = generator()
    noise = network.noise(x)
    channels, sides = (4, 8, 16), (12, 6, 3)  # cells 1 and 2 of three are reductions
    numbers = [16 * c * side * side for c, side in zip(channels, sides, strict=True)]
    assert noise.dtype == torch.float64 and noise.shape == (14 * sum(numbers),)
    assert noise.mean().abs() < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.abs().max() > 4 and noise.unique().numel() == noise.numel()
    with CellNoise(network.cells).placed(noise, x):
        edges = [edge["noise"].drawn for cell in network.cells for edge in cell.edges]
    start = 0
    for number, drawn in enumerate(edges):
        c, side = channels[number // 14], sides[number // 14]
        assert drawn.shape == (16, c, side, side)
        part = noise[start : start + drawn.numel()]
        assert torch.equal(drawn, part.view(16, side, side, c).permute(0, 3, 1, 2))
        start += drawn.numel()
    assert all(edge["noise"].drawn is None for cell in network.cells for edge in cell.edges)
    assert not torch.equal(network.noise(x), noise)
    network.noise_generator = generator()
    assert torch.equal(network.noise(x), noise)
    assert Supernet(4, 5, 3).noise(x) is None


@pytest.mark.parametrize("hvp", ["exact", "finite-difference"])
def test_all_passes_of_a_batch_see_the_same(hvp, monkeypatch):
    """A step draws twice, once a batch: its passes differ in weights and alphas alone."""
    network = network_of(True)
    network.noise_generator, seen = generator(), []
    plain = network.logits

    def logits(images, weights, alphas, activations, noise):
        seen.append((images, noise))
        return plain(images, weights, alphas, activations, noise)

    monkeypatch.setattr(network, "logits", logits)
    (train_images, _), (validation_images, _) = data = batches()
    SearchStep(network, SearchConfig(hvp=hvp))(*data, lr=0.01)
    by_batch = [{id(n) for x, n in seen if x is images} for images in (train_images, validation_images)]
    assert len(seen) == {"exact": 3, "finite-difference": 5}[hvp]
    assert [len(of_batch) for of_batch in by_batch] == [1, 1] and by_batch[0] != by_batch[1]


# Whole runs


def rows_of(path):
    return [json.loads(line) for line in (path / METRICS).read_text().splitlines()]


SETTINGS = {"space": "s4", "epochs": 2, "init_channels": 2, "layers": 3, "batch_size": 8, "fused": True}


@pytest.fixture
def dataset(data):
    images, labels = data
    return Dataset("tensors", images, labels, images[:0], labels[:0], 3, 1, False)


@pytest.fixture
def data():
    images = torch.randint(0, 256, (32, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    return images, torch.arange(32) % 3


@pytest.mark.parametrize("given", [{}, {"fused": False, "perturb": "adversarial", "order": 1}])
def test_a_search_is_resumed_to_the_same_bits(given, data, resumed_like_undisturbed):
    """From its first step."""
    whole, _ = resumed_like_undisturbed(SearchConfig(**{**SETTINGS, **given}), data, 1)
    assert "noise" in checkpoint(whole.path)
    counts = [row["normal_noise"] for row in rows_of(whole.path) if "normal_noise" in row]
    of_last = sum(name == "noise" for node in whole.final_genotype.normal for name, _ in node)
    assert len(counts) == 2 and counts[-1] == of_last


def test_spaces_without_noise_keep_no_generator(data, in_tmp):
    found = search(SearchConfig(**{**SETTINGS, "space": "s2", "epochs": 1}), data)
    assert "noise" not in checkpoint(found.path)
    assert not any("noise" in name for row in rows_of(found.path) for name in row)


def test_ranks_draw_for_their_own_images(dataset):
    drawn = []
    for rank in range(2):
        run = Search(SearchConfig(**SETTINGS), dataset, Ranks(rank, 2))
        drawn.append(run.network.noise(torch.zeros(4, 1, 8, 8)))
    assert not torch.equal(*drawn)


def test_evaluations_draw_the_same_and_nothing_of_the_searchs(dataset):
    run = Search(SearchConfig(**SETTINGS), dataset)
    before, seen = run.noise.get_state(), []
    for _ in range(2):
        seen.append(evaluated(run.network, run.batches, run.validation_half, 8))
    assert seen[0] == seen[1]

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(run.network, run.batches, run.validation_half, 8, stop)
    assert run.network.noise_generator is run.noise and torch.equal(run.noise.get_state(), before)
    assert not torch.equal(*(run.network.eval()(dataset.images[:4].float()) for _ in range(2)))


@pytest.mark.parametrize("fused", [False, True])
def test_a_cell_with_noise_is_trained_and_tested_again(fused, data, in_tmp):
    node = [("noise", 0), ("sep_conv_3x3", 1)]
    genotype = Genotype([node], range(2, 3), [node], range(2, 3))
    config = TrainConfig(
        genotype=str(genotype), epochs=2, init_channels=4, layers=3, batch_size=8, drop_path_prob=0.2,
        ema=0.9, fused=fused,
    )  # fmt: skip
    found = train(config, (*data, *data))
    assert "noise" in checkpoint(found.path)
    tested = evaluate(found.path, data=(*data, *data))
    assert tested["final.pt"][1] == found.top1 and tested["ema.pt"][1] == found.ema_top1


# Methods against collapse

METHODS = {"order": 1, **SETTINGS}


@pytest.fixture(scope="module")
def alphas_without(tmp_path_factory):
    """What a search without any method ends in."""
    images = torch.randint(0, 256, (32, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    data = images, torch.arange(32) % 3
    found = search(SearchConfig(**METHODS), data, parent=tmp_path_factory.mktemp("searchs"))
    return checkpoint(found.path)["network"]["alphas_normal"]


@pytest.mark.parametrize(
    "given",
    [
        {"beta_decay": 50.0, "eigenvalue": True},
        {"perturb": "random", "alpha_warmup": 1, "partial_channels": 2},
        {"derive": "perturbation", "projection_epochs": 1},
        {"macs_weight": 1.0, "stop_at_eigenvalue": 0.75},
    ],
    ids=lambda given: ",".join(given),
)
def test_methods_against_collapse_in_s4(given, data, alphas_without, in_tmp):
    """Each changes what is found, or says what it measures, and the cell is one of the space."""
    found = search(SearchConfig(**METHODS, **given), data)
    assert not torch.equal(checkpoint(found.path)["network"]["alphas_normal"], alphas_without)
    values = [row["eigenvalue"] for row in rows_of(found.path) if "eigenvalue" in row]
    assert len(values) == (2 if {"eigenvalue", "stop_at_eigenvalue"} & given.keys() else 0)
    assert all(value > -1e-6 for value in values)
    names = {
        name for gene in (found.genotype.normal, found.genotype.reduce) for node in gene for name, _ in node
    }
    assert names <= set(S4.candidates)


@pytest.mark.parametrize("given", [{"auxiliary_skip": 1.0}, {"stop_at_skips": 2}])
def test_what_is_about_skip_connections_is_refused(given, data, in_tmp):
    with pytest.raises(InputError, match=f"{next(iter(given))} is for spaces with skip_connect"):
        search(SearchConfig(**SETTINGS, **given), data)
    assert not list(in_tmp.iterdir())


def test_the_eigenvalue_is_of_one_drawing(data, in_tmp, monkeypatch):
    """The same numbers in every epoch; in float64 the eigenvalue is the same."""
    expected, plain = [], Search.finish_epoch

    def finish_epoch(self, found):
        images, labels = self.batches.cut(self.validation_half[:8], augment=False)
        network = Supernet(2, 3, 3, 1, space=S4)
        network.load_state_dict(self.network.state_dict())
        network.noise_generator = seeded("cpu", self.config.seed, NOISE)
        noise, images, network = network.noise(images).double(), images.double(), network.double()
        weights = {"weights": network.flat_weights.detach()}
        loss = functools.partial(network.loss, images, labels, weights, noise=noise)
        expected.append(largest_eigenvalue(loss, network.alphas()))
        plain(self, found)

    monkeypatch.setattr(Search, "finish_epoch", finish_epoch)
    found = search(SearchConfig(**SETTINGS, eigenvalue=True, alpha_lr=0.1), data)
    kept = [row["eigenvalue"] for row in rows_of(found.path) if "eigenvalue" in row]
    assert len(kept) == 2 and kept == pytest.approx(expected, rel=1e-3)
