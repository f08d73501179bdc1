"""Loss and accuracies of a network."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from darts_fast.data import Batches, seeded
from darts_fast.distributed import Ranks

Metrics = tuple[float, float, float]  # loss, top-1 and top-5 accuracy (0 to 1), over some images

EVALUATION_NOISE = 0  # seeds what networks with the operation `noise` draw in an evaluation


def num_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels are the first, and among the first five, of the logits [N, classes]: two scalars."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return ranked[:, 0].sum(), ranked.sum()


@torch.no_grad()
def evaluated(
    network: Any,  # a module with a `noise_generator`
    batches: Batches,
    order: Tensor,
    batch_size: int,
    after_batch: Callable[[int], None] = lambda images: None,
    training: bool = False,
    ranks: Ranks | None = None,
) -> Metrics:
    """Mean loss and accuracies of a network in evaluation mode, or in training mode, on the images of `order`
    (int64, on the host), not augmented. `after_batch` is told how many are done. Of several `ranks` each
    takes a part of each batch, which may be empty. What the network draws (`noise_generator`) is the same in
    every evaluation, and nothing of the training's."""
    ranks = ranks or Ranks()
    before, drawn_from = network.training, network.noise_generator
    network.train(training)
    network.noise_generator = seeded(batches.device, EVALUATION_NOISE, ranks.rank)
    sums, done = torch.zeros(3, dtype=torch.float64, device=batches.device), 0
    picked = batches.picked(order, ranks.parts(len(order), batch_size))
    try:
        for images, labels in picked:
            if len(images):
                logits = network(batches.prepared(images, augment=False))
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([loss, *num_correct(logits, labels)])
            done = min(done + batch_size, len(order))
            after_batch(done)
    finally:
        picked.close()
        network.noise_generator = drawn_from
    network.train(before)
    loss, top1, top5 = (ranks.sum(sums) / len(order)).tolist()
    return loss, top1, top5
