import pytest
import torch

from darts_fast import InputError
from darts_fast.interop import load_official_search


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
