"""Kernels of the mixed cell, installed as `darts_fast.kernels`: this is the whole interface.

    sepconv   halves of separable convolutions, a list of tasks in one call; also 1x1 convolutions and the
              two of a factorized reduce (tasks without a depthwise part)
    pool      max and average pool of a state
    share     a tensor for several readers, whose adjoints are then summed in one pass
    concatenate   channels of several tensors, cheaper to differentiate twice than torch.cat; of mixes that
              wrote them side by side (`Slices`), free
    spread    a state for all that read it: its pools and skip for mixes, and itself, whose adjoints then take
              one pass
    mix       batch norm and weighted sum of a node's candidates; with one candidate, batch norm
    normalize batch norm with affine parameters, of stems and of derived networks
    statistics_of   mean, variance and 1 / sqrt(variance) of each channel

All but the last can be differentiated twice, as far as the exact second-order architecture gradient needs
it, and raise where they cannot: `torch.autograd.grad(weight_gradients, alphas, grad_outputs=v)` runs the
tangent forward and the second backward sweep of docs/mathematics.md, without weight gradients.
"""

from darts_fast.kernels.backends import second_backward_in_one, used
from darts_fast.kernels.concatenate import Place, Slices, concatenate
from darts_fast.kernels.handover import Link
from darts_fast.kernels.mix import mix
from darts_fast.kernels.normalize import normalize
from darts_fast.kernels.pool import pool
from darts_fast.kernels.sepconv import sepconv
from darts_fast.kernels.share import share
from darts_fast.kernels.spread import spread
from darts_fast.kernels.torch_backend import Task, statistics_of

__all__ = [
    "Link",
    "Place",
    "Slices",
    "Task",
    "concatenate",
    "mix",
    "normalize",
    "pool",
    "second_backward_in_one",
    "sepconv",
    "share",
    "spread",
    "statistics_of",
    "used",
]
