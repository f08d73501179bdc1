"""What a search says after every epoch of its cells."""

import math

import pytest
import torch

from darts_fast import load_genotype
from darts_fast.diagnosis import diagnosis, operations
from darts_fast.space import CANDIDATES

EQUAL = torch.full((14, 8), 1 / 8)


def counts(**found):
    return {kind: found.get(kind, 0) for kind in operations([])}


# What DARTS found in S1 on CIFAR-10 in the first of RobustDARTS's searches (their results_arch.yaml).
COLLAPSED = (
    "Genotype(normal=[('skip_connect', 1), ('dil_conv_3x3', 0), ('skip_connect', 2), ('skip_connect', 0), "
    "('skip_connect', 0), ('skip_connect', 2), ('skip_connect', 2), ('skip_connect', 1)], "
    "normal_concat=range(2, 6), reduce=[('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0), "
    "('max_pool_3x3', 1)], reduce_concat=range(2, 6))"
)


@pytest.mark.parametrize(
    ("name", "normal", "reduce", "collapsed"),
    [  # counted by hand from the genotypes as they were published
        ("DARTS_V1", {"skip": 3, "sep_conv": 5}, {"skip": 3, "max_pool": 4, "avg_pool": 1}, (False, False)),
        ("DARTS_V2", {"skip": 2, "sep_conv": 5, "dil_conv": 1}, {"skip": 3, "max_pool": 5}, (False, False)),
        (COLLAPSED, {"skip": 7, "dil_conv": 1}, {"skip": 2, "max_pool": 6}, (True, False)),
    ],
)
def test_operations_of_published_genotypes(name, normal, reduce, collapsed):
    genotype, equal = load_genotype(name), EQUAL
    found = [diagnosis(gene, equal) for gene in (genotype.normal, genotype.reduce)]
    assert [f.operations for f in found] == [counts(**normal), counts(**reduce)]
    assert tuple(f.collapsed for f in found) == collapsed


def test_entropy_and_none():
    gene = load_genotype("DARTS_V2").normal
    equal = diagnosis(gene, EQUAL)
    assert equal.entropy == pytest.approx(math.log(8)) and equal.none == pytest.approx(1 / 8)
    p = torch.zeros(14, 8)
    p[:13, 3] = 1  # the last edge has been decided to go
    certain = diagnosis(gene, p)
    assert certain.entropy == 0 and certain.none == 0
    # Two edges that differ: 3/4 and 1/4 of `none` and the skip on one, all equal on the others
    p = EQUAL.clone()
    p[0] = 0
    p[0, 0], p[0, 3] = 0.75, 0.25
    mixed = diagnosis(gene, p)
    of_first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert mixed.entropy == pytest.approx((of_first + 13 * math.log(8)) / 14)
    assert mixed.none == pytest.approx((0.75 + 13 / 8) / 14)


def test_half_of_the_operations_are_skips():
    def cell(skips):
        names = ["skip_connect"] * skips + ["sep_conv_3x3"] * (8 - skips)
        return [[(names[2 * node], 0), (names[2 * node + 1], 1)] for node in range(4)]

    assert [diagnosis(cell(n), EQUAL).collapsed for n in (3, 4, 8)] == [False, True, True]


def test_skips_come_first_and_every_candidate_but_none_has_a_kind():
    kinds = list(operations([]))
    assert kinds[0] == "skip" and set(kinds) == {c.kind for c in CANDIDATES.values()} - {"none"}
