"""The space of NAS-Bench-201: notation, network, search."""

import dataclasses
import itertools
import json
import os
import re
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_run, checkpoint, events, log_lines, relative_error
from test_run import call

from darts_fast import InputError, SearchConfig, architect, plot, resume_search, search
from darts_fast.data import from_tensors
from darts_fast.nasbench201 import CANDIDATES, EDGES, Cell, SearchNetwork, derive
from darts_fast.runs import Stopped
from darts_fast.search import Search

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
    now = network.state_dict()  # the buffers themselves
    before = {name: tensor.clone() for name, tensor in now.items() if "running" in name}
    with network.frozen_statistics():
        network(batch()[0])
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    network(batch()[0])
    assert all(not torch.equal(now[name], tensor) for name, tensor in before.items())


# The search

SETTINGS = {
    "space": "nasbench201", "epochs": 2, "init_channels": 2, "layers": 1, "batch_size": 8,
    "train_portion": 0.6, "print_freq": 2,
}  # fmt: skip
ORDERS = {
    "first order": {"order": 1},
    "finite differences": {"hvp": "finite-difference"},
    "exact product": {},
}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 4, (50,), generator=generator)


@pytest.mark.usefixtures("no_heat_maps")
@pytest.mark.parametrize("order", ORDERS)
def test_a_search_stopped_and_resumed_gives_the_same_bits(order, data, in_tmp, signal_at):
    config = SearchConfig(**SETTINGS, **ORDERS[order], name="whole")
    whole = search(config, data)
    signal_at(Search, 3, signal.SIGTERM)
    with pytest.raises(Stopped, match="after 3 steps"):
        search(dataclasses.replace(config, name="stopped"), data)
    result = resume_search("searchs/stopped", data)
    assert_same_run(whole.path, result.path)
    assert result[:-1] == whole[:-1] and isinstance(result.genotype, Cell)

    # What was written of each epoch is of the cell that the alphas make.
    rows = [json.loads(line) for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
    of_cells = [row for row in rows if "genotype" in row]
    assert [row["epoch"] for row in of_cells] == [1, 2]
    alphas = checkpoint(whole.path)["network"]["alphas_normal"]
    assert alphas.shape == (6, 5) and Cell.from_json(of_cells[-1]["genotype"]) == derive(alphas)
    operations = derive(alphas).operations
    assert of_cells[-1]["normal_skip"] == operations.count("skip_connect")
    assert of_cells[-1]["normal_conv"] == sum("conv" in name for name in operations)
    assert of_cells[-1]["normal_avg_pool"] == operations.count("avg_pool_3x3")
    p = alphas.double().softmax(1)
    assert of_cells[-1]["normal_none"] == pytest.approx(float(p[:, 0].mean()))
    assert log_lines(whole.path)[-1] == str(whole.genotype)
    kept = json.loads((whole.path / "genotype.json").read_text())
    assert kept["final"]["genotype"] == of_cells[-1]["genotype"]
    assert {"EP01-genotype.png", "EP02-alphas_normal.png"} <= set(os.listdir(whole.path / "plots"))
    tags = {tag for _, tag, _ in events(whole.path)}
    assert len([tag for tag in tags if tag.startswith("z_alphas_normal/")]) == 30
    assert "z_alphas_normal/1 to 2/nor_conv_3x3" in tags


def test_the_orders_differ(data, in_tmp):
    """In the alphas, after the first step already."""
    found = []
    for order in ORDERS.values():
        run = Search(SearchConfig(**SETTINGS, **order), from_tensors(*data))
        run.begin_epoch()
        run.take_step(0.1)
        found.append(run.network.alphas_normal.detach().clone())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_what_else_weighs_the_candidates(network, data):
    """An auxiliary skip connection adds to the weight of every edge's skip; perturbations change the step."""
    images, labels = batch()
    added = torch.zeros(6, 5, dtype=torch.float64)
    added[:, 1] = 0.7
    with network.weighed({}, {"alphas_normal": added}):
        found = network(images)
    inputs = {**network.weights(), **network.alphas()}
    expected = by_hand(inputs, images, network.alphas_normal.softmax(-1) + added, 2)
    assert relative_error(found, expected) < 1e-12
    weights = []
    for settings in ({}, {"auxiliary_skip": 1.0}, {"perturb": "random"}, {"perturb": "adversarial"}):
        run = Search(SearchConfig(**{**SETTINGS, "order": 1}, **settings), from_tensors(*data))
        run.begin_epoch()
        run.take_step(0.1)
        assert run.network.flat_weights.isfinite().all()
        weights.append(run.network.flat_weights.detach().clone())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


@pytest.mark.usefixtures("no_heat_maps")
def test_a_search_with_a_penalty_a_warm_up_and_the_eigenvalue(data, in_tmp):
    """The alphas are trained in the second epoch, to others than without the penalty; the eigenvalue is that
    of the alphas' Hessian, by autograd."""
    found = []
    for number, penalty in enumerate((0.0, 50.0)):
        settings = {**SETTINGS, "order": 1, "alpha_warmup": 1, "name": f"run{number}"}
        found.append(search(SearchConfig(**settings, beta_decay=penalty, stop_at_eigenvalue=0.75), data))
    states = [checkpoint(run.path)["network"] for run in found]
    assert not torch.equal(*(state["alphas_normal"] for state in states))
    rows = [json.loads(line) for line in (found[1].path / "metrics.jsonl").read_text().splitlines()]
    last = [row["eigenvalue"] for row in rows if "eigenvalue" in row][-1]
    run = Search(SearchConfig(**SETTINGS), from_tensors(*data))
    run.network.load_state_dict(states[1])
    images, labels = run.batches.cut(run.validation_half[:8], augment=False)
    network = run.network.double()

    def loss(alphas):
        return network.loss(
            images.double(), labels, {"weights": network.flat_weights.detach()}, {"alphas_normal": alphas}
        )

    hessian = torch.autograd.functional.hessian(loss, network.alphas_normal.detach()).view(30, 30)
    assert last == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)


def test_a_cell_of_none_alone_is_drawn_and_not_called_collapsed(data, in_tmp, monkeypatch):
    plain = Search.begin_epoch

    def begin_epoch(self):
        plain(self)
        with torch.no_grad():
            self.network.alphas_normal[:, 0] += 10

    monkeypatch.setattr(Search, "begin_epoch", begin_epoch)
    result = search(SearchConfig(**{**SETTINGS, "epochs": 1, "order": 1}), data)
    assert result.genotype.key == "000000"
    log = log_lines(result.path)
    assert not [line for line in log if "collapsed" in line or "no picture" in line]


def test_a_search_ends_at_skip_connections(data, in_tmp, monkeypatch, no_heat_maps):
    plain = Search.begin_epoch

    def begin_epoch(self):
        plain(self)
        with torch.no_grad():
            self.network.alphas_normal[:2, 1] += 10

    monkeypatch.setattr(Search, "begin_epoch", begin_epoch)
    result = search(SearchConfig(**{**SETTINGS, "order": 1}, stop_at_skips=2), data)
    assert any("The search ends here" in line for line in log_lines(result.path)) and result.epoch == 1


def test_defaults(in_tmp):
    """The benchmark's sizes; one cell a stage on the digits."""
    config = SearchConfig(space="nasbench201", device="cpu")
    for dataset, layers in {"digits": 1, "cifar10": 5}.items():
        resolved = config.resolved(dataset)
        assert (resolved.init_channels, resolved.layers) == (16, layers)
    given = SearchConfig(space="nasbench201", init_channels=4, layers=2, device="cpu").resolved("digits")
    assert (given.init_channels, given.layers, given.epochs) == (4, 2, 5)


def test_the_source_of_a_picture_has_every_edge_once():
    cell = cell_of("031342")
    source = plot.cell_source(cell)
    labels = dict(re.findall(r"(operation_\d_\d) \[label=(\w+)", source))
    into = dict(re.findall(r"(operation_\d_\d) -> node_(\d) ", source))
    out_of = {label: state for state, label in re.findall(r"node_(\d) -> (operation_\d_\d) ", source)}
    drawn = {(labels[key], int(out_of[key]), int(into[key])) for key in labels}
    edges = zip(cell.operations, EDGES, strict=True)
    assert drawn == {(name, *edge) for name, edge in edges if name != "none"} and len(drawn) == 5


@pytest.mark.parametrize("kind", ["folder", "json", "log", "text"])
@pytest.mark.parametrize("program", ["run_from", "visualize"])
def test_a_cell_is_no_genotype_to_train_or_draw(kind, program, in_tmp, monkeypatch, capsys):
    (in_tmp / "found").mkdir()
    record = {"epoch": 1, "top1": 0.5, "genotype": BEST}
    (in_tmp / "found/genotype.json").write_text(json.dumps({"best": record, "final": record}))
    (in_tmp / "found/found.log").write_text(f"genotype = {BEST}\n{BEST}\n")
    given = {"folder": "found", "json": "found/genotype.json", "log": "found/found.log", "text": BEST}[kind]
    arguments = ["--genotype"] * (program == "run_from") + [given]
    code, out, err = call(monkeypatch, capsys, *arguments, program=program)
    assert code == 2 and out == "" and err.count("\n") == 1 and "is a cell of NAS-Bench-201" in err
    assert os.listdir(in_tmp) == ["found"]
