"""Each kernel against the composition of PyTorch's operations that it replaces; a mixed cell.

    pytest benchmarks/test_kernels.py --benchmark-only [--device cuda] [--benchmark-json F]

`forward` computes the outputs; `backward` the first derivatives from given adjoints; `second` what the exact
Hessian-vector product makes of these: the derivative of <first derivatives, v>. Batch 16, 16 channels, 32x32,
float32, channels-last. The fused sepconv and pool give the statistics of their outputs besides, and the fused
mix is given them, as in a cell; PyTorch's batch norm takes its own. Results are held against float64 before
anything is timed.
"""

import copy
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from darts_fast import kernels
from darts_fast.fused import FusedCell
from darts_fast.kernels import Task, torch_backend
from darts_fast.kernels.backends import using
from darts_fast.reference import MixedCell

N, C, SIZE = 16, 16, 32
SHAPE = f"batch {N}, {C} channels, {SIZE}x{SIZE}"
KINDS = [(3, 1), (5, 1), (3, 2), (5, 2)]  # of one edge's convolutions: kernel size, dilation
CANDIDATES = 14  # of a node with two edges


def statistics_of(y):
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return torch.stack([mean, variance, (variance + 1e-5).rsqrt()]).detach()


# Each: function of a list of tensors -> outputs; which of them are differentiated first; which then.


def plain_sepconv(tensors):
    """Four first halves from one source."""
    x, *weights = tensors
    a, outputs = F.relu(x), []
    for (k, dilation), d, p in zip(KINDS, weights[:4], weights[4:], strict=True):
        z = F.conv2d(a, d, None, 1, dilation * (k // 2), dilation, groups=C)
        outputs.append(F.conv2d(z, p))
    return outputs


def fused_sepconv(tensors):
    x, *weights = tensors
    tasks = [Task(0, 1, dilation) for _, dilation in KINDS]
    return list(kernels.sepconv([x], tasks, weights[:4], weights[4:])[0])


def plain_pool(tensors):
    average = F.avg_pool2d(tensors[0], 3, 1, 1, count_include_pad=False)
    return [F.max_pool2d(tensors[0], 3, 1, 1), average]


def fused_pool(tensors):
    return list(kernels.pool(tensors[0], 1)[:2])


def plain_mix(tensors):
    p, *candidates = tensors
    return [sum(w * F.batch_norm(y, None, None, training=True) for w, y in zip(p, candidates, strict=True))]


def fused_mix(tensors, statistics):
    p, *candidates = tensors
    return [kernels.mix(candidates, statistics, p)]


def image():
    return torch.randn(N, C, SIZE, SIZE).contiguous(memory_format=torch.channels_last)


OPERATIONS = {
    "sepconv": (
        plain_sepconv,
        fused_sepconv,
        lambda: [image(), *(0.3 * torch.randn(C, 1, k, k) for k, _ in KINDS), *torch.randn(4, C, C, 1, 1)],
        slice(1, None),  # the weights
        slice(0, 1),  # the source
    ),
    "pool": (plain_pool, fused_pool, lambda: [image()], slice(0, 1), slice(0, 0)),
    "mix": (
        plain_mix,
        fused_mix,
        lambda: [torch.randn(CANDIDATES).softmax(0), *(image() for _ in range(CANDIDATES))],
        slice(1, None),  # the candidates
        slice(0, 1),  # their weights
    ),
}
BACKENDS = ["PyTorch", "fused, ATen", "fused"]


def sweeps(function, tensors, first, second, adjoints, v):
    """What each sweep computes, as functions without arguments. The adjoints are differentiated, too: their
    derivative is the tangent."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    given = [g.detach().requires_grad_() for g in adjoints]
    outputs = function(leaves)
    found = torch.autograd.grad(outputs, leaves[first], given, create_graph=True)

    return {
        "forward": lambda: function([t.detach() for t in tensors]),
        "backward": lambda: torch.autograd.grad(outputs, leaves[first], adjoints, retain_graph=True),
        "second": lambda: torch.autograd.grad(found, [*leaves[second], *given], v, retain_graph=True),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sweep", ["forward", "backward", "second"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernel(benchmark, timed, device, name, sweep, backend):
    benchmark.group = f"{name}, {sweep}: {SHAPE}"
    plain, fused, make, first, second = OPERATIONS[name]
    torch.manual_seed(0)
    tensors = [t.to(device) for t in make()]
    if name == "mix":
        fused = partial(fused_mix, statistics=[statistics_of(y) for y in tensors[1:]])
    adjoints = [torch.randn_like(y) for y in plain(tensors)]
    v = [torch.randn_like(t) for t in tensors[first]]
    arguments = (tensors, first, second, adjoints, v)
    wide = [t if isinstance(t, slice) else [x.double() for x in t] for t in arguments]
    with using(torch_backend) if backend == "fused, ATen" else nullcontext():
        run = sweeps(plain if backend == "PyTorch" else fused, *arguments)[sweep]
        for found, expected in zip(run(), sweeps(plain, *wide)[sweep](), strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()
        timed(run, rounds=15, warmup_rounds=2)


def cell_step(cell, states, p):
    """The gradients of a cell's weights."""
    output = cell(*states, p)
    return torch.autograd.grad(output.square().sum(), list(cell.parameters()))


def cell_and_states(reduction, device):
    torch.manual_seed(0)
    cell = MixedCell(4 * C, 4 * C, C, reduction, False).to(device)
    states = [torch.randn(N, 4 * C, SIZE, SIZE, device=device) for _ in range(2)]
    return cell, states, torch.randn(14, 8, device=device).softmax(1)


def gradients(cell, states, p):
    return torch.cat([t.double().flatten() for t in cell_step(cell, states, p)])


def channels_last(states):
    return [s.contiguous(memory_format=torch.channels_last) for s in states]


@cache
def exact_and_allowed(reduction, device):
    """Kinks of ReLU and max pool move float32 gradients: an error may be twice the reference's largest over
    eight copies of the weights moved by 6e-8 relative, in both layouts."""
    cell, states, p = cell_and_states(reduction, device)
    exact = gradients(copy.deepcopy(cell).double(), [s.double() for s in states], p.double())
    allowed = 0.0
    for layout in [list, channels_last] * 4:
        moved = copy.deepcopy(cell)
        with torch.no_grad():
            for w in moved.parameters():
                w.mul_(1 + 6e-8 * torch.randn_like(w))
        allowed = max(allowed, 2 * float((gradients(moved, layout(states), p) - exact).norm()))
    return exact, allowed


@pytest.mark.parametrize("backend", ["PyTorch, NCHW", "PyTorch, channels-last", "fused, ATen", "fused"])
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_mixed_cell(benchmark, timed, device, reduction, backend):
    """Forward and backward."""
    benchmark.group = f"a {'reduction' if reduction else 'normal'} cell, forward and backward: {SHAPE}"
    exact, allowed = exact_and_allowed(reduction, device)
    cell, states, p = cell_and_states(reduction, device)
    if backend.startswith("fused"):
        plain, cell = cell, FusedCell(4 * C, 4 * C, C, reduction, False).to(device)
        cell.load_state_dict(plain.state_dict())
    if backend != "PyTorch, NCHW":
        states = channels_last(states)
    with using(torch_backend) if backend == "fused, ATen" else nullcontext():
        assert (gradients(cell, states, p) - exact).norm() <= allowed
        timed(cell_step, (cell, states, p), rounds=5, warmup_rounds=1)
