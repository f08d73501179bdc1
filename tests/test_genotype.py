"""Genotypes: how one is derived from the alphas, and random ones."""

from collections import Counter

import torch
from test_architect import flatten

from darts_fast import Genotype
from darts_fast.data import seeded
from darts_fast.genotype import derive, random_genotype
from darts_fast.space import CANDIDATES
from darts_fast.spaces import SPACES


def test_the_official_rule(golden_search):
    genotype = derive(*golden_search["derive/alphas"])
    assert flatten(genotype) == golden_search.text("derive/genotype")


def test_raw_alphas_rank_edges_without_the_weight_of_none():
    """A strong `none` lowers the softmaxed weight of its edge's other candidates, not their alphas."""
    names = list(CANDIDATES)
    alphas = torch.zeros(14, 8)
    strongest = [(2, "sep_conv_3x3", 3.0, 9.0), (3, "max_pool_3x3", 2.0, 0.0), (4, "skip_connect", 1.0, 0.0)]
    for edge, name, value, none in strongest:  # the three edges into node 1
        alphas[edge, names.index(name)] = value
        alphas[edge, names.index("none")] = none
    zero = torch.zeros(14, 8)
    assert derive(alphas, zero, "raw").normal[1] == [("sep_conv_3x3", 0), ("max_pool_3x3", 1)]
    assert derive(alphas, zero, "softmax").normal[1] == [("max_pool_3x3", 1), ("skip_connect", 2)]


def test_ties_go_to_the_first_edge_and_candidate_and_none_never_wins():
    alphas = torch.zeros(14, 8)
    alphas[:, 0] = 5.0  # none
    for node in derive(alphas, alphas).normal:
        assert node == [("max_pool_3x3", 0), ("max_pool_3x3", 1)]


def test_json_and_text():
    genotype = derive(torch.randn(14, 8), torch.randn(14, 8))
    assert Genotype.from_json(genotype.as_json()) == genotype
    assert str(genotype).startswith("Genotype(normal=[[('")
    assert "normal_concat=range(2, 6), reduce=[[('" in str(genotype)


def test_random_genotypes_are_valid_reproducible_and_uniform():
    """The two states of a node, and the operation at either place, in both cells, by chi-square below what
    chance exceeds once in 100,000 times."""
    drawn = [random_genotype(seeded("cpu", 5, i)) for i in range(2000)]
    assert drawn[:20] == [random_genotype(seeded("cpu", 5, i)) for i in range(20)]
    assert all(Genotype.from_json(genotype.as_json()) == genotype for genotype in drawn)
    limits = {0: 0, 2: 23.0, 5: 30.9, 9: 39.3, 6: 33.1}  # by degrees of freedom: scipy's chi2.isf(1e-5, n)

    def assert_uniform(found, categories):
        assert set(found) == set(categories)
        expected = len(found) / len(categories)
        counts = Counter(found)
        assert sum((counts[c] - expected) ** 2 / expected for c in categories) <= limits[len(categories) - 1]

    names = [name for name in CANDIDATES if name != "none"]
    for cell in ("normal", "reduce"):
        for number in range(4):
            nodes = [getattr(genotype, cell)[number] for genotype in drawn]
            pairs = [frozenset((a, b)) for b in range(2 + number) for a in range(b)]
            assert_uniform([frozenset(state for _, state in node) for node in nodes], pairs)
            for place in range(2):
                assert_uniform([node[place][0] for node in nodes], names)


def test_random_genotypes_of_a_space_read_each_edge_by_its_own_candidates():
    space, seen = SPACES["s1"], set()
    for i in range(300):
        genotype = random_genotype(seeded("cpu", 1, i), space)
        for kind in ("normal", "reduce"):
            for number, node in enumerate(getattr(genotype, kind)):
                for name, source in node:
                    assert name in getattr(space, kind)[space.edges.index((source, number))]
                    seen.add((kind, number, name, source))
    assert len(seen) == 2 * 2 * 14  # both candidates of each edge of both cells
