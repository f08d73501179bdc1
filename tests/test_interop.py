"""Networks of the official code and of pt.darts, loaded as ours."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, relative_error, synthetic_state

from darts_fast import InputError
from darts_fast.interop import load_official_search, load_pt_darts_augment, load_pt_darts_search
from darts_fast.notation import NAMED, parse


def official(golden, **changed):
    state = {**golden.group("init", torch.float32), **changed}
    return load_official_search(state, state.pop("alphas_normal"), state.pop("alphas_reduce"))


def test_every_tensor_of_the_official_state_arrives(golden_search):
    state = golden_search.group("init", torch.float32)
    ours = official(golden_search).state_dict()
    assert len(ours) == len(state)
    assert sum(float(t.double().sum()) for t in ours.values()) == pytest.approx(
        sum(float(t.double().sum()) for t in state.values()), rel=1e-12
    )
    name = "cells.2.edges.1.skip_connect.conv_2.weight"
    assert torch.equal(ours[name], state["cells.2._ops.1._ops.3.conv_2.weight"])


def test_a_state_that_does_not_fit_is_named(golden_search):
    with pytest.raises(InputError, match="shape"):
        official(golden_search, **{"classifier.bias": torch.zeros(3)})
    with pytest.raises(InputError, match="'extra'"):
        official(golden_search, extra=torch.zeros(3))
    state = golden_search.group("init", torch.float32)
    state.pop("stem.0.weight")
    with pytest.raises(InputError, match="no tensor 'stem.0.weight'"):
        load_official_search(state, state.pop("alphas_normal"), state.pop("alphas_reduce"))


@pytest.fixture(scope="module")
def pt_darts():
    return json.loads((GOLDEN / "pt_darts.json").read_text())


def inputs(recorded):
    """pt.darts's state dict and the images."""
    images = np.random.RandomState(recorded["seed"]).standard_normal((3, 2, *[recorded["size"]] * 2))
    return synthetic_state(recorded["shapes"], recorded["seed"]), torch.from_numpy(images)


def assert_same_logits(module, images, recorded):
    for mode, outputs in ((True, recorded["train"]), (False, recorded["eval"])):
        found = module.train(mode)(images)
        found = found if isinstance(found, tuple) else (found,)
        assert len(found) == len(outputs)
        for logits, expected in zip(found, outputs, strict=True):
            assert relative_error(logits, torch.tensor(expected, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_search_network_of_pt_darts(pt_darts, prefix):
    state, images = inputs(pt_darts["search"])
    module = load_pt_darts_search({prefix + name: tensor for name, tensor in state.items()})
    assert_same_logits(module, images, pt_darts["search"])


def test_an_augmented_network_of_pt_darts(pt_darts):
    """Its pools keep their batch norms, and its auxiliary head is there."""
    state, images = inputs(pt_darts["augment"])
    assert "cells.0.dag.0.0.0.bn.weight" in state and "aux_head.linear.weight" in state
    module = load_pt_darts_augment(state, parse(pt_darts["genotype"]))
    assert_same_logits(module, images, pt_darts["augment"])


def test_states_of_pt_darts_that_do_not_fit(pt_darts):
    genotype = parse(pt_darts["genotype"])
    state, _ = inputs(pt_darts["augment"])
    with pytest.raises(InputError, match="no tensor 'cells.0.edges.0.1.weight'"):
        load_pt_darts_augment(state, NAMED["DARTS_V2"])
    with pytest.raises(InputError, match="conv_7x1_1x7 of pt.darts is not the official one"):
        load_pt_darts_augment(state, NAMED["AmoebaNet"])
    with pytest.raises(InputError, match="'extra'"):
        load_pt_darts_augment({**state, "extra": torch.zeros(1)}, genotype)
    state, _ = inputs(pt_darts["search"])
    with pytest.raises(InputError, match="no tensor 'alpha_reduce.3'"):
        load_pt_darts_search({name: t for name, t in state.items() if name != "alpha_reduce.3"})
    with pytest.raises(InputError, match="not about 8 candidates"):
        load_pt_darts_search({**state, **{f"alpha_normal.{n}": torch.zeros(n + 2, 7) for n in range(4)}})
    for junk in ("net.cells.0.dag.7.0._ops.0.bn.weight", "net.cells.0.dag", "net.cells.0.dag.0.0._ops.x.y"):
        with pytest.raises(InputError):
            load_pt_darts_search({**state, junk: torch.zeros(1)})
