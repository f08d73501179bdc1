"""A step of the search on small supernets. (Whole steps against the official code's numbers are in
test_architect.py, with perturbed weights of the candidates in test_perturb.py.)"""

import copy

import pytest
import torch
from conftest import relative_error

from darts_fast.config import SearchConfig
from darts_fast.search_step import SearchStep
from darts_fast.spaces import SPACES
from darts_fast.supernet import Supernet


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("settings", [{"order": 1}, {}, {"hvp": "finite-difference"}], ids=str)
def test_beta_decay_adds_the_gradient_of_its_penalty(fused, settings):
    """In each form of the architecture gradient: strength * softmax / 28 edges, and nothing else."""
    torch.manual_seed(0)
    network = Supernet(2, 3, 3, fused=fused).double()
    with torch.no_grad():
        for alpha in network.alphas().values():
            alpha.normal_()
    batches = [(torch.randn(4, 3, 8, 8).double(), torch.randint(3, (4,))) for _ in range(2)]
    found = []
    for decay in (0.0, 7.0):
        steps = SearchStep(copy.deepcopy(network), SearchConfig(fused=fused, beta_decay=decay, **settings))
        steps.beta.fill_(3.0)
        steps._architecture_step(*batches)
        found.append({name: alpha.grad for name, alpha in steps.alphas.items()})
    for name, alpha in network.alphas().items():
        expected = 3.0 * alpha.detach().exp() / alpha.detach().exp().sum(1, keepdim=True) / 28
        assert relative_error(found[1][name] - found[0][name], expected) < 1e-9, name


def test_a_candidate_that_an_edge_lacks_is_not_penalised():
    network = Supernet(2, 3, 3, space=SPACES["s1"]).double()
    step = SearchStep(network, SearchConfig(beta_decay=1.0))
    step.beta.fill_(1.0)
    for (name, a), present in zip(network.alphas().items(), SPACES["s1"].present(), strict=True):
        (gradient,) = torch.autograd.grad(step.penalty(network.alphas()), a)
        expected = network.present(network.alphas())[name].exp()
        assert relative_error(gradient, expected / expected.sum(1, keepdim=True) / 28) < 1e-9
        assert torch.equal(gradient != 0, torch.tensor(present))


@pytest.mark.parametrize("hvp", ["exact", "finite-difference"])
def test_architecture_step_leaves_weights_and_statistics_alone(hvp):
    torch.manual_seed(0)
    network = Supernet(2, 3, 3)
    take_step = SearchStep(network, SearchConfig(hvp=hvp))
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(3, (4,))) for _ in range(2)]
    take_step(*batches, 0.025)  # so that there are momenta
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    take_step._architecture_step(*batches)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("alphas"), name
    take_step._weight_step(*batches[0])
    assert not torch.equal(network.state_dict()["stem.1.running_mean"], before["stem.1.running_mean"])
    assert network.state_dict()["stem.1.num_batches_tracked"] == 2
