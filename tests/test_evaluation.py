"""Loss and accuracies of a network, against PyTorch's on all images at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from darts_fast.data import Batches, channel_statistics, seeded
from darts_fast.evaluation import evaluated, num_correct


class Linear(nn.Linear):
    noise_generator = None

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return super().forward(images.flatten(1))


def test_the_mean_over_all_images_in_batches_of_any_size():
    """Of a part of the images, in another order, normalised and not augmented; some batches are smaller."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8)
    labels, order = torch.randint(0, 9, (30,)), torch.randperm(30)[:22]
    mean, std = channel_statistics(images)
    batches = Batches(images, labels, torch.device("cpu"), (mean, std), seeded("cpu", 0), 1, True, 2)
    network, done = Linear(16, 9).train(), []
    logits = F.linear((images[order].flatten(1) - mean.float()) / std.float(), network.weight, network.bias)
    ranks = logits.argsort(dim=1, descending=True)
    found = (ranks == labels[order, None]).float()
    shares = found[:, 0].mean().item(), found[:, :5].sum(1).mean().item()
    expected = (F.cross_entropy(logits, labels[order]).item(), *shares)
    for batch_size in (1, 8, 22, 100):
        assert evaluated(network, batches, order, batch_size, done.append) == pytest.approx(expected)
        assert done[-1] == 22 and network.training
    assert done[22:25] == [8, 16, 22]


def test_of_fewer_than_five_classes():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, 2.0]])
    assert list(map(int, num_correct(logits, torch.tensor([1, 0])))) == [1, 2]
