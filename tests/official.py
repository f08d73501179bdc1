"""The network and the quantities of the golden file, computed by ours."""

import torch

from darts_fast import architect
from darts_fast.config import SearchConfig
from darts_fast.interop import load_official_search
from darts_fast.search_step import SearchStep

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def official_network(golden, dtype, fused=False):
    state = golden.group("init", dtype)
    return load_official_search(state, state.pop("alphas_normal"), state.pop("alphas_reduce"), fused)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def everything(network, golden, dtype, order=(0, 1), layout=torch.contiguous_format):
    """Every quantity of the golden file, computed by ours: batch 0 trains, batch 1 validates. `layout` is
    that of the images, and so of all activations of the reference."""
    meta = golden.meta
    weights, alphas = network.weights(), network.alphas()
    (x, y), (x_val, y_val) = (golden.batch(index, dtype) for index in order)
    x, x_val = (images.contiguous(memory_format=layout) for images in (x, x_val))

    def train_loss(w, a):
        return network.loss(x, y, w, a)

    def validation_loss(w, a):
        return network.loss(x_val, y_val, w, a)

    step = architect.VirtualStep(meta["xi"], meta["momentum"], meta["weight_decay"])
    w, a = architect.leaves(weights), architect.leaves(alphas)
    loss = train_loss(w, a)
    w_gradients = architect.gradients(loss, w, create_graph=True)
    virtual = step(w, architect.detached(w_gradients), {})
    alpha_gradient, v = architect._at_virtual_weights(validation_loss, virtual, a)
    return {
        "train_logits": network(x),
        "train_loss": loss,
        "weight_grad_norms": torch.stack([g.norm() for g in w_gradients.values()]),
        "alpha_grad_train": flat(architect.gradients(loss, a, create_graph=True)),
        "first_order_alpha_grad": flat(architect.first_order(validation_loss, weights, alphas)),
        "dalpha_val": flat(alpha_gradient),
        "val_direction_norm": flat(v).norm(),
        "hvp_exact": flat(architect.exact_hvp(w_gradients, a, v)),
        "unrolled_exact_alpha_grad": flat(
            architect.second_order_exact(train_loss, validation_loss, weights, alphas, {}, step)
        ),
        "unrolled_fd_alpha_grad": flat(
            architect.second_order_finite_difference(train_loss, validation_loss, weights, alphas, {}, step)
        ),
    }


def three_steps(golden, hvp="finite-difference", fused=False):
    """The golden file's three steps in float64 -> losses, network."""
    meta = golden.meta
    config = SearchConfig(
        hvp=hvp,
        w_lr=meta["xi"],
        w_momentum=meta["momentum"],
        w_weight_decay=meta["weight_decay"],
        w_grad_clip=meta["grad_clip"],
        alpha_lr=meta["alpha_lr"],
        alpha_weight_decay=meta["alpha_weight_decay"],
    )
    network = official_network(golden, torch.float64, fused)
    take_step = SearchStep(network, config)
    losses = []
    for index in range(meta["steps"]):
        train, validation = (golden.batch(2 * index + k, torch.float64) for k in range(2))
        losses.append(take_step(train, validation, meta["xi"])[0])
    return torch.stack(losses), network
