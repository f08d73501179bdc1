"""The expected multiply-adds of what a search derives, and their weight in its objective."""

import copy
import itertools
import json

import pytest
import torch
from conftest import relative_error

from darts_fast import SearchConfig, network, search
from darts_fast.cost import cost
from darts_fast.derived import multiply_adds
from darts_fast.genotype import Genotype
from darts_fast.search_step import SearchStep
from darts_fast.space import DARTS, Space
from darts_fast.supernet import Supernet

pytestmark = pytest.mark.usefixtures("no_heat_maps")

TWO = Space(  # two nodes: the second has three edges, of which a genotype keeps two
    normal=(("none", "skip_connect", "sep_conv_5x5"),) * 5,
    reduce=(("skip_connect", "dil_conv_3x3", "sep_conv_7x7"),) * 5,
    nodes=2,
)


def certain(space, choice):
    """p of 1 for one candidate an edge, by the index among the edge's own."""
    found = []
    for of_kind in (space.normal, space.reduce):
        p = torch.zeros(len(space.edges), len(space.candidates), dtype=torch.float64)
        for edge, names in enumerate(of_kind):
            p[edge, space.candidates.index(names[choice[edge] % len(names)])] = 1
        found.append(p)
    return found


def genotypes(space, choice):
    """All that keep two edges a node, of these operations."""
    cells = []
    for of_kind in (space.normal, space.reduce):
        nodes = []
        for node in range(space.nodes):
            edges = [e for e, (_, target) in enumerate(space.edges) if target == node]
            pairs = []
            for kept in itertools.combinations(edges, 2):
                names = [(of_kind[e][choice[e] % len(of_kind[e])], space.edges[e][0]) for e in kept]
                pairs.append(names)
            nodes.append(pairs)
        cells.append(list(itertools.product(*nodes)))
    concat = range(2, 2 + space.nodes)
    for normal, reduce in itertools.product(*cells):
        yield Genotype(list(normal), concat, list(reduce), concat)


@pytest.mark.parametrize("choice", [(1, 2, 1, 2, 1), (2, 2, 2, 1, 1), (1, 1, 1, 1, 1)])
def test_it_is_the_mean_over_the_genotypes(choice):
    """Counted by PyTorch's counter, on a network of two reductions and odd sizes of layers."""
    found = cost(TWO, 4, 4, 3, 5, 16, 12).expected(*certain(TWO, choice))
    counted = [multiply_adds(network(genotype, 5, 4, 4), 16, 12) for genotype in genotypes(TWO, choice)]
    assert float(found) == pytest.approx(sum(counted) / len(counted), rel=1e-12)


def test_it_is_linear_in_p():
    """Between two certain choices it is between their costs: so its mean over any p is its value at p."""
    of = cost(DARTS, 4, 3, 1, 10, 8, 8)
    one, other = (certain(DARTS, choice) for choice in ([3] * 14, [4] * 14))
    mixed = [0.25 * a + 0.75 * b for a, b in zip(one, other, strict=True)]
    expected = 0.25 * of.expected(*one) + 0.75 * of.expected(*other)
    assert relative_error(of.expected(*mixed), expected) < 1e-12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("settings", [{"order": 1}, {}, {"hvp": "finite-difference"}], ids=str)
def test_the_derivative_of_the_objective_has_that_of_the_cost(fused, settings):
    """In each form of the architecture gradient: that of the weighed cost, numerically, and nothing else."""
    torch.manual_seed(0)
    plain = Supernet(2, 3, 3, fused=fused).double()
    with torch.no_grad():
        for alphas in plain.alphas().values():
            alphas.normal_()
    of = cost(DARTS, 2, 3, 3, 3, 8, 8)
    batches = [(torch.randn(4, 3, 8, 8).double(), torch.randint(3, (4,))) for _ in range(2)]
    start = float(of.expected(*(torch.full((14, 8), 1 / 8).double() for _ in range(2))))
    direction = {name: torch.randn(14, 8).double() for name in plain.ALPHAS}
    before = {name: alphas.detach().clone() for name, alphas in plain.alphas().items()}

    def expected(size):
        p = [(before[name] + size * direction[name]).softmax(dim=1) for name in plain.ALPHAS]
        return float(of.expected(*p))

    for target in (None, start / 3e6, 3 * start / 1e6):
        found = []
        for weight in (0.0, 2.0):
            config = SearchConfig(
                fused=fused, macs_weight=weight, macs_target=target if weight else None, **settings
            )
            step = SearchStep(copy.deepcopy(plain), config, cost=of)
            step._architecture_step(*batches)
            found.append({name: alpha.grad for name, alpha in step.alphas.items()})
        added = sum(float(((found[1][n] - found[0][n]) * direction[n]).sum()) for n in plain.ALPHAS)
        slope = (expected(1e-5) - expected(-1e-5)) / 2e-5
        scale = {None: 2 / start}.get(target, 2 / (1e6 * (target or 1)))
        if target is not None and expected(0) < 1e6 * target:
            assert added == 0
        else:
            assert added == pytest.approx(scale * slope, rel=1e-6)


def test_a_search_that_is_charged_more_derives_less(tmp_path, monkeypatch):
    """And says in metrics.jsonl what the genotype's network costs."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data, costs = (images, torch.arange(32) % 3), []
    for weight in (0.0, 1000.0):
        settings = SearchConfig(
            epochs=2,
            init_channels=2,
            layers=3,
            batch_size=4,
            order=1,
            alpha_lr=0.2,
            fused=True,
            macs_weight=weight,
        )
        result = search(settings, data)
        lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "macs" in line][-1]
        counted = multiply_adds(network(result.final_genotype, 3, 2, 3, image_channels=1), 8, 8)
        assert last["macs"] == counted
        costs.append(last)
    assert costs[1]["macs"] < costs[0]["macs"] and costs[1]["expected_macs"] < 0.7 * costs[0]["expected_macs"]
