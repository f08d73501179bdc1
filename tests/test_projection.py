"""DARTS-PT: edges decided one at a time by the accuracy that is lost without an operation."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import checkpoint, same

from darts_fast import InputError, SearchConfig, load_genotype, resume_search, search
from darts_fast.projection import all_decided, decided_round, genotype_of, nothing_decided, rounds
from darts_fast.runs import Stopped
from darts_fast.search import Search
from darts_fast.space import CANDIDATES, DARTS, EDGES
from darts_fast.spaces import SPACES
from darts_fast.supernet import Supernet

pytestmark = pytest.mark.usefixtures("no_heat_maps")


def like(space=DARTS):
    shape = len(space.edges), len(space.candidates)
    return {name: torch.zeros(shape) for name in Supernet.ALPHAS}


def weighed_by(worth):
    """A supernet whose accuracy is the sum of its operations' worth, by the names of the alphas."""

    def measure(decisions):
        total = sum(
            float(((kept + added) * worth[name]).sum())
            for (name, kept), added in zip(decisions.kept.items(), decisions.added.values(), strict=True)
        )
        return -total, total

    return measure


@pytest.mark.parametrize("name", ["darts", "s1", "s3"])
def test_what_is_worth_most_stays(name):
    space, generator = SPACES[name], torch.Generator().manual_seed(0)
    worth = {n: torch.rand(t.shape, generator=generator) for n, t in like(space).items()}
    worth = {n: t * torch.tensor(p) for (n, t), p in zip(worth.items(), space.present(), strict=True)}
    if "none" in space.candidates:
        for tensor in worth.values():
            tensor[:, space.candidates.index("none")] = 9  # it is never taken all the same
    decisions = nothing_decided(like(space))
    for number in range(rounds(space)):
        assert not all_decided(decisions, space)
        before = decisions.copy()
        after, said = decided_round(number, decisions, space, weighed_by(worth), generator)
        assert len(said) == 2 and all(map(torch.equal, before.kept.values(), decisions.kept.values()))
        decisions = after
    assert all_decided(decisions, space)
    genotype = genotype_of(decisions, space)
    for gene, values in zip((genotype.normal, genotype.reduce), worth.values(), strict=True):
        values = values.clone()
        if "none" in space.candidates:
            values[:, space.candidates.index("none")] = -1
        best, operation = values.max(dim=1)
        for node, pairs in enumerate(gene):
            edges = [e for e, (_, target) in enumerate(space.edges) if target == node]
            strongest = sorted(edges, key=lambda e: -best[e])[:2]
            expected = {(space.candidates[operation[e]], space.edges[e][0]) for e in strongest}
            assert set(pairs) == expected


def test_of_equal_accuracy_the_loss_decides():
    space, favourite = SPACES["s2"], 1
    decisions = nothing_decided(like(space))

    def measure(trial):
        return -float(sum((kept + added)[:, favourite].sum() for kept, added in zip(
            trial.kept.values(), trial.added.values(), strict=True
        ))), 0.5  # fmt: skip

    for number in range(len(space.edges)):
        decisions, _ = decided_round(number, decisions, space, measure, torch.Generator().manual_seed(number))
    assert all(added[:, favourite].all() for added in decisions.added.values())


def test_a_decided_network_is_that_of_its_operations():
    """The mixture is 1 at each of the genotype's operations, and 0 else; its gradient reaches no alpha."""
    network = Supernet(2, 3, 3)
    decisions = nothing_decided({name: alphas.detach() for name, alphas in network.alphas().items()})
    genotype = load_genotype("DARTS_V2")
    for name, gene in zip(network.ALPHAS, (genotype.normal, genotype.reduce), strict=True):
        pairs = {(source, node): operation for node, pairs in enumerate(gene) for operation, source in pairs}
        for edge, connection in enumerate(EDGES):
            operation = pairs.get(connection)
            decisions.decide(name, edge, None if operation is None else list(CANDIDATES).index(operation))
    assert all_decided(decisions, DARTS)
    found = genotype_of(decisions, DARTS)
    for gene, other in zip((found.normal, found.reduce), (genotype.normal, genotype.reduce), strict=True):
        assert [set(node) for node in gene] == [set(node) for node in other]
    network.kept, network.added = decisions
    for p in network.mixture():
        assert p.sum() == 8 and set(p.unique().tolist()) == {0.0, 1.0}
    loss = network(torch.randn(2, 3, 8, 8)).square().sum()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(network.alphas().values())))


SETTINGS = {
    "epochs": 1, "init_channels": 2, "layers": 3, "batch_size": 16, "order": 1, "fused": True,
    "derive": "perturbation", "projection_epochs": 2, "space": "s2",
}  # fmt: skip


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.arange(32) % 3


def test_a_search_stopped_in_a_decision_ends_in_the_same_genotype(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SearchConfig(**SETTINGS)
    whole = search(dataclasses.replace(config, name="whole"), data)
    assert whole.epoch == 1 + 16 * 2 and whole.genotype == whole.final_genotype
    decided = "genotype: decided by perturbation after epoch 1, in 17 rounds with 2 epochs between two\n"
    assert decided in (whole.path / "whole.log").read_text()
    rows = [json.loads(line) for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
    entropies = [row["normal_entropy"] for row in rows if "normal_entropy" in row]
    # An edge decided in each of the first 14 rounds, the others all but equal
    of_edges = [math.log(2) * max(0, 13 - epoch // 2) / 14 for epoch in range(len(entropies))]
    assert entropies == pytest.approx(of_edges, abs=1e-2) and entropies[-1] == 0
    decide = Search._decide

    def stopping(self, number):
        if number == 3:
            self.stop.received = 15
        return decide(self, number)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Search, "_decide", stopping)
        search(dataclasses.replace(config, name="stopped"), data)
    resumed = resume_search("searchs/stopped", data)
    assert resumed.genotype == whole.genotype
    assert (resumed.path / "metrics.jsonl").read_text() == (whole.path / "metrics.jsonl").read_text()
    ends = [checkpoint(result.path) for result in (resumed, whole)]
    assert all(same(ends[0][name], ends[1][name]) for name in ("network", "projection"))


def test_stops_that_need_a_cell_are_refused():
    with pytest.raises(InputError, match="leave out --stop_at_skips"):
        SearchConfig(derive="perturbation", stop_at_skips=3)
