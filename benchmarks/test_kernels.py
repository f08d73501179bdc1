"""Each kernel against the composition of PyTorch's operations that it replaces; a mixed cell.

    pytest benchmarks/test_kernels.py --benchmark-only [--device cuda] [--benchmark-json F]

`forward` computes the outputs; `backward` the first derivatives from given adjoints; `second` what the exact
Hessian-vector product makes of these: the derivatives of <first derivatives, v>, for which the kernels have
the tangent and the second sweep. Batch 16, 16 channels, 32x32, float32, channels-last. The fused sepconv and
pool give the statistics of their outputs, and the sepconv the sums of their tangents, besides, and the fused
mix is given both, as in a cell; PyTorch's batch norm takes its own. Results are held against float64 before
anything is timed.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from darts_fast import kernels
from darts_fast.fused import FusedMixedCells
from darts_fast.kernels import aten
from darts_fast.kernels.aten.batch_norm import statistics_of
from darts_fast.kernels.backends import using
from darts_fast.kernels.plan import Recorder
from darts_fast.kernels.types import Reader, SecondReader, Source, Task, Weights, images
from darts_fast.reference import MixedCell

N, C, SIZE = 16, 16, 32
SHAPE = f"batch {N}, {C} channels, {SIZE}x{SIZE}"
KINDS = [(3, 1), (5, 1), (3, 2), (5, 2)]  # of one edge's convolutions: kernel size, dilation
CANDIDATES = 14  # of a node with two edges


# What PyTorch computes: functions of a list of tensors -> outputs.


def plain_sepconv(tensors):
    """Four first halves from one source."""
    x, *weights = tensors
    a, outputs = F.relu(x), []
    for (k, dilation), d, p in zip(KINDS, weights[:4], weights[4:], strict=True):
        z = F.conv2d(a, d, None, 1, dilation * (k // 2), dilation, groups=C)
        outputs.append(F.conv2d(z, p))
    return outputs


def plain_pool(tensors):
    average = F.avg_pool2d(tensors[0], 3, 1, 1, count_include_pad=False)
    return [F.max_pool2d(tensors[0], 3, 1, 1), average]


def plain_mix(tensors):
    p, *candidates = tensors
    return [sum(w * F.batch_norm(y, None, None, training=True) for w, y in zip(p, candidates, strict=True))]


def plain_sweeps(function, tensors, first, second, adjoints, v):
    """What each sweep computes, as functions without arguments: outputs; derivatives by all tensors; those of
    <derivatives by `first`, v> by `second`, and by the adjoints, which are the tangents of the outputs."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    given = [g.detach().requires_grad_() for g in adjoints]
    outputs = function(leaves)
    found = torch.autograd.grad(outputs, leaves[first], given, create_graph=True)
    return {
        "forward": lambda: function([t.detach() for t in tensors]),
        "backward": lambda: torch.autograd.grad(outputs, leaves, adjoints, retain_graph=True),
        "second": lambda: torch.autograd.grad(found, [*leaves[second], *given], v, retain_graph=True),
    }


# The same on the kernels: sweep -> its calls, and what is found. Second adjoints are zero.


def empty(count, like):
    return images(count, like.shape, like.dtype, like.device)


def fused_sepconv(tensors, adjoints, v):
    (x, *weights), (xd, *tangents) = tensors, v
    tasks = [
        Task(0, Weights(d, p), dilation=dilation)
        for (_, dilation), d, p in zip(KINDS, weights[:4], weights[4:], strict=True)
    ]
    call = {name: Recorder() for name in ("forward", "backward", "second")}
    y, adjoint, yd, second = empty(4, x), empty(1, x), empty(4, x), empty(1, x)
    statistics, gradients = x.new_empty(4, 3, C), x.new_empty(4, C * C + C * 25)
    directions = [Weights(d, p) for d, p in zip(tangents[:4], tangents[4:], strict=True)]
    readers = [Reader(own, None, 0, g, None, None) for own, g in zip(y, adjoints, strict=True)]
    seconds = [
        SecondReader(reader, tangent, None, torch.zeros_like(reader.adjoint), None)
        for reader, tangent in zip(readers, yd, strict=True)
    ]
    sources = [Source(x)]
    call["forward"].sepconv_forward(sources, tasks, y=y, statistics=statistics)
    call["backward"].sepconv_backward(
        sources, tasks, readers, [()], adjoint=adjoint, sums=None, gradients=gradients
    )
    sums = list(x.new_empty(4, 3, C))
    call["second"].sepconv_tangent(sources, tasks, [xd], None, directions, readers, y=yd, sums=sums)
    call["second"].sepconv_second(sources, tasks, directions, seconds, [()], adjoint=second, sums=None)
    of_depthwise = [g[C * C :][: d.numel()].view_as(d) for g, d in zip(gradients, weights[:4], strict=True)]
    of_pointwise = [g[: C * C].view_as(p) for g, p in zip(gradients, weights[4:], strict=True)]
    found = [*y], [adjoint[0], *of_depthwise, *of_pointwise], [second[0], *yd]
    return {name: (r.calls, f) for (name, r), f in zip(call.items(), found, strict=True)}


def fused_pool(tensors, adjoints, v):
    (x,), call = tensors, {name: Recorder() for name in ("forward", "backward", "second")}
    pools, tangents, statistics = empty(2, x), empty(2, x), x.new_empty(2, 3, C)
    position = images(1, x.shape, torch.uint8, x.device)[0]
    out, given = empty(1, x)[0], empty(2, x).copy_(torch.stack(adjoints))
    call["forward"].pool_forward(x, 1, pools=pools, position=position, statistics=statistics)
    call["backward"].pool_backward(position, 1, given, [], out=out)
    call["second"].pool_tangent(v[0], position, 1, [[], []], pools=tangents, sums=[[], []])
    found = [*pools], [out], [*tangents]
    return {name: (r.calls, f) for (name, r), f in zip(call.items(), found, strict=True)}


def fused_mix(tensors, adjoints, v):
    """With what the readers of a node's candidates do: their derivatives by the sums of the mix."""
    (p, *ys), (g,), count = tensors, adjoints, CANDIDATES
    call = {name: Recorder() for name in ("forward", "backward", "second")}
    candidates = [Source(y, statistics_of(y)) for y in ys]
    outs, tangents, zero = empty(1, g), empty(1, g), torch.zeros_like(g)
    sums, sums_d = (g.new_empty(2, count, C) for _ in range(2))
    products = g.new_empty(count, C)
    of_p, of_p_second = torch.empty_like(p), torch.empty_like(p)
    tangent_sums = torch.stack([tangent_sums_of(yd, y, g) for yd, y in zip(v, ys, strict=True)], dim=1)
    adjoint, second = empty(count, g), empty(count, g)
    readers = [Reader(y, s, i, g, sums, p) for i, (y, s, _) in enumerate(candidates)]
    seconds = [
        SecondReader(reader, yd, tangent_sums, zero, sums_d) for reader, yd in zip(readers, v, strict=True)
    ]
    call["forward"].mix_forward(candidates, p, outs=[outs[0]])
    call["backward"].mix_backward(candidates, None, g, sums=sums, weight_gradient=of_p)
    call["backward"].fan_out_backward(candidates, [[reader] for reader in readers], out=adjoint)
    call["second"].mix_tangent(candidates, p, v, tangent_sums, g, outs=[tangents[0]], products=products)
    reads = candidates, zero, sums, tangent_sums, products
    call["second"].mix_second(*reads, sums=sums_d, weight_gradient=of_p_second)
    call["second"].fan_out_second(candidates, [[reader] for reader in seconds], out=second)
    found = [outs[0]], [of_p, *adjoint], [of_p_second, *second, tangents[0]]
    return {name: (r.calls, f) for (name, r), f in zip(call.items(), found, strict=True)}


def tangent_sums_of(yd, y, g):
    """Those of yd, yd h and yd G, which what writes yd takes."""
    h = F.batch_norm(y, None, None, training=True)
    return torch.stack([yd.sum((0, 2, 3)), (yd * h).sum((0, 2, 3)), (yd * g).sum((0, 2, 3))])


def image():
    return torch.randn(N, C, SIZE, SIZE).contiguous(memory_format=torch.channels_last)


# On PyTorch; on the kernels; tensors; which of them have a direction v; by which <., v> is differentiated.
OPERATIONS = {
    "sepconv": (
        plain_sepconv,
        fused_sepconv,
        lambda: [image(), *(0.3 * torch.randn(C, 1, k, k) for k, _ in KINDS), *torch.randn(4, C, C, 1, 1)],
        slice(None),
        slice(0, 1),  # the source
    ),
    "pool": (plain_pool, fused_pool, lambda: [image()], slice(None), slice(0, 0)),
    "mix": (
        plain_mix,
        fused_mix,
        lambda: [torch.randn(CANDIDATES).softmax(0), *(image() for _ in range(CANDIDATES))],
        slice(1, None),  # the candidates
        slice(None),
    ),
}
BACKENDS = ["PyTorch", "fused, ATen", "fused"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sweep", ["forward", "backward", "second"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernel(benchmark, timed, device, name, sweep, backend):
    benchmark.group = f"{name}, {sweep}: {SHAPE}"
    plain, fused, make, first, second = OPERATIONS[name]
    torch.manual_seed(0)
    tensors = [t.to(device) for t in make()]
    adjoints = [torch.randn_like(y) for y in plain(tensors)]
    v = [torch.randn_like(t) for t in tensors[first]]
    arguments = (tensors, first, second, adjoints, v)
    wide = [t if isinstance(t, slice) else [x.double() for x in t] for t in arguments]
    expected = plain_sweeps(plain, *wide)[sweep]()
    if backend == "PyTorch":
        run = plain_sweeps(plain, *arguments)[sweep]
        found = run()
    else:
        module = aten if backend == "fused, ATen" else kernels.backend(device, torch.float32)
        calls = fused(tensors, adjoints, v)
        for before in ("forward", "backward"):  # of which the second sweep reads what they write
            module.program(calls[before][0])()
        run, found = module.program(calls[sweep][0]), calls[sweep][1]
        run()
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-5 * e.norm()
    timed(run, rounds=15, warmup_rounds=2)


def plain_cell_step(cell, state, p):
    """The gradients of a cell's weights, in a row; the cell reads the state twice."""
    output = cell(state, state, p)
    found = torch.autograd.grad(output.square().sum(), list(cell.parameters()))
    return torch.cat([t.flatten() for t in found])


def fused_cell_step(cells, weights, state, p):
    plan = cells.plan([state.shape], state.dtype, state.device, 2)
    output, _ = kernels.cells(plan, state, weights, {cells.cells[0].kind: p[:, 1:].reshape(-1)})
    return torch.autograd.grad(output.square().sum(), weights)[0]


def cell_and_state(reduction, device):
    torch.manual_seed(0)
    cell = MixedCell(4 * C, 4 * C, C, reduction, False).to(device)
    state = torch.randn(N, 4 * C, SIZE, SIZE, device=device)
    return cell, state, torch.randn(14, 8, device=device).softmax(1)


def channels_last(state):
    return state.contiguous(memory_format=torch.channels_last)


@cache
def exact_and_allowed(reduction, device):
    """Kinks of ReLU and max pool move float32 gradients: an error may be twice the reference's largest over
    eight copies of the weights moved by 6e-8 relative, in both layouts."""
    cell, state, p = cell_and_state(reduction, device)
    exact = plain_cell_step(copy.deepcopy(cell).double(), state.double(), p.double())
    allowed = 0.0
    for layout in [torch.clone, channels_last] * 4:
        moved = copy.deepcopy(cell)
        with torch.no_grad():
            for w in moved.parameters():
                w.mul_(1 + 6e-8 * torch.randn_like(w))
        error = plain_cell_step(moved, layout(state), p) - exact
        allowed = max(allowed, 2 * float(error.norm()))
    return exact, allowed


@pytest.mark.parametrize("backend", ["PyTorch, NCHW", "PyTorch, channels-last", "fused, ATen", "fused"])
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_mixed_cell(benchmark, timed, device, reduction, backend):
    """Forward and backward."""
    benchmark.group = f"a {'reduction' if reduction else 'normal'} cell, forward and backward: {SHAPE}"
    exact, allowed = exact_and_allowed(reduction, device)
    cell, state, p = cell_and_state(reduction, device)
    step: Callable[..., torch.Tensor] = plain_cell_step
    arguments: tuple = (cell, state, p)
    if backend != "PyTorch, NCHW":
        arguments = (cell, channels_last(state), p)
    if backend.startswith("fused"):
        weights = torch.cat([w.detach().flatten() for w in cell.parameters()]).requires_grad_()
        step, arguments = fused_cell_step, (FusedMixedCells([cell]), weights, *arguments[1:])
    with using(aten) if backend == "fused, ATen" else nullcontext():
        assert (step(*arguments) - exact).norm() <= allowed
        timed(step, arguments, rounds=5, warmup_rounds=1)
