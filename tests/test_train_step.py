"""A step of the training on a small network. (Several of them are written out by hand in test_train.py.)"""

import torch
from conftest import relative_error

from darts_fast import TrainConfig, load_genotype, network
from darts_fast.train_step import TrainStep


def test_label_smoothing_is_that_of_the_paper():
    """Szegedy et al. (arXiv 1512.00567, section 7): the label's share is 1 - s + s / K, the others' s / K."""
    module = network(load_genotype("DARTS_V1"), 6, 2, 3, auxiliary=True).double()
    step = TrainStep(module, TrainConfig(label_smoothing=0.3, aux_weight=0.4))
    images, labels = torch.rand(8, 3, 24, 24, dtype=torch.float64), torch.randint(0, 6, (8,))
    share = torch.full((8, 6), 0.3 / 6, dtype=torch.float64)
    share[torch.arange(8), labels] += 0.7
    parts = [-(share * logits.log_softmax(1)).sum(1).mean() for logits in module(images)]
    expected = torch.autograd.grad(parts[0] + 0.4 * parts[1], step.parameters)
    norm = torch.stack([g.norm() for g in expected]).norm()
    loss, *_ = step.take(images, labels)
    assert relative_error(loss, (parts[0] + 0.4 * parts[1]).detach()) < 1e-12
    for found, g in zip(step.gradients, expected, strict=True):
        assert relative_error(found, g * min(1, 5 / (norm + 1e-6))) < 1e-9
