"""The autograd function of a network's cells: what it can and cannot be asked for, and its memory."""

import gc

import pytest
import torch
from conftest import relative_error
from test_cell import everything, network

from darts_fast.kernels import Plan, aten, cells
from darts_fast.kernels.plan import Blocks

SHAPE = 2, 5, 8, 8


@pytest.fixture
def setting(monkeypatch):
    """A plan whose blocks are full of NaN when they are taken, x, weights and p."""
    take = Blocks.take

    def poisoned(self, size):
        return take(self, size).fill_(0xFF)

    monkeypatch.setattr(Blocks, "take", poisoned)
    torch.manual_seed(0)
    book, data = network(2, everything, True)
    plan = Plan(data, [SHAPE], torch.float64, book.size, book.channels, 2, Blocks(torch.device("cpu")), aten)
    lengths = {cell.kind: sum(len(edge.operations) for edge in cell.edges) for cell in data}
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    weights = (0.5 * torch.randn(book.size, dtype=torch.float64)).requires_grad_()
    p = {kind: torch.rand(n, dtype=torch.float64, requires_grad=True) for kind, n in lengths.items()}
    return plan, x, weights, p


def loss_of(plan, x, weights, p):
    return cells(plan, x, weights, p)[0].tanh().pow(2).sum()


def product(loss, weights, p, v):
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    return torch.autograd.grad(gradient, list(p.values()), v)


def test_numerical_derivatives(setting):
    """Of the gradients of x, weights and p, and of the exact product, along a direction."""
    plan, x, weights, p = setting
    v = torch.randn_like(weights)
    found = product(loss_of(plan, x, weights, p), weights, p, v)
    step = 1e-6
    difference = 0.0
    for sign in (1, -1):
        shifted = (weights + sign * step * v).detach()
        gradients = torch.autograd.grad(loss_of(plan, x, shifted, p), list(p.values()))
        difference = difference + sign * torch.cat(gradients) / (2 * step)
    assert relative_error(torch.cat(found), difference) < 1e-6


def test_a_loss_that_is_linear_in_the_output(setting):
    """Its second adjoint of the output is zero; the product is not."""
    plan, x, weights, p = setting
    v = torch.randn_like(weights)

    def loss(w):
        output = cells(plan, x, w, p)[0]
        return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()

    found = product(loss(weights), weights, p, v)
    step, difference = 1e-6, 0.0
    for sign in (1, -1):
        gradients = torch.autograd.grad(loss((weights + sign * step * v).detach()), list(p.values()))
        difference = difference + sign * torch.cat(gradients) / (2 * step)
    assert relative_error(torch.cat(found), difference) < 1e-6


def test_two_passes_at_once_do_not_touch_each_other(setting):
    """The validation pass runs between the training batch's backward and its product."""
    plan, x, weights, p = setting
    v = torch.randn_like(weights)
    alone = product(loss_of(plan, x, weights, p), weights, p, v)
    loss = loss_of(plan, x, weights, p)
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    before = gradient.detach().clone()
    torch.autograd.grad(loss_of(plan, 2 * x, 0.5 * weights, p), [x, weights, *p.values()])
    together = torch.autograd.grad(gradient, list(p.values()), v)
    assert torch.equal(gradient, before)
    assert all(map(torch.equal, alone, together))


def test_the_output_stays_as_long_as_its_graph(setting):
    plan, x, weights, p = setting
    output, _ = cells(plan, x, weights, p)
    kept = output.detach().clone()
    product(output.tanh().pow(2).sum(), weights, p, torch.randn_like(weights))
    torch.autograd.grad(loss_of(plan, 2 * x, weights, p), [weights, *p.values()])
    assert torch.equal(output, kept)


def test_a_step_makes_no_new_block_after_the_first(setting):
    plan, x, weights, p = setting

    def step():
        v = torch.randn_like(weights)
        loss = loss_of(plan, x, weights, p)
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        torch.autograd.grad(loss_of(plan, x, weights, p), [weights, *p.values()])
        torch.autograd.grad(gradient, list(p.values()), v)

    step()
    gc.collect()
    blocks, bound = len(plan.blocks._blocks), len(plan._bound)
    for _ in range(2):
        step()
        gc.collect()
    assert not any(plan.blocks._in_use)
    assert (len(plan.blocks._blocks), len(plan._bound)) == (blocks, bound)


def test_a_graph_can_be_differentiated_twice_over(setting):
    plan, x, weights, p = setting
    v = torch.randn_like(weights)
    loss = loss_of(plan, x, weights, p)
    found = []
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True, retain_graph=True)
        found.append(torch.autograd.grad(gradient, list(p.values()), v, retain_graph=True))
    assert all(map(torch.equal, *found))


def test_what_is_returned_is_not_overwritten(setting):
    plan, x, weights, p = setting
    inputs = [x, weights, *p.values()]
    found = torch.autograd.grad(loss_of(plan, x, weights, p), inputs)
    copies = [t.clone() for t in found]
    torch.autograd.grad(loss_of(plan, 2 * x, weights, p), inputs)
    assert all(map(torch.equal, found, copies))


def test_tangents_that_are_zero(setting):
    """A product along x alone, or along the weights alone: their sum is that along both."""
    plan, x, weights, p = setting
    loss = loss_of(plan, x, weights, p)
    of_x, of_weights = torch.autograd.grad(loss, [x, weights], create_graph=True)
    along = [(of_x, torch.randn_like(x)), (of_weights, torch.randn_like(weights))]
    inputs = list(p.values())

    def along_all(pairs):
        gradients, directions = zip(*pairs, strict=True)
        return torch.cat(torch.autograd.grad(gradients, inputs, directions, retain_graph=True))

    apart = along_all(along[:1]) + along_all(along[1:])
    assert relative_error(apart, along_all(along)) < 1e-12


def test_x_in_another_type_and_layout(setting):
    plan, x, weights, p = setting
    narrow = x.detach().float().contiguous(memory_format=torch.channels_last).requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    (found,), (expected,) = (torch.autograd.grad(loss_of(plan, t, weights, p), t) for t in (narrow, wide))
    assert torch.equal(found, expected.float())
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)


def test_p_in_another_order_and_of_a_kind_that_no_cell_has(setting):
    plan, x, weights, p = setting
    v = torch.randn_like(weights)
    expected = product(loss_of(plan, x, weights, p), weights, p, v)
    other = torch.rand(3, dtype=torch.float64, requires_grad=True)
    turned = {3: other, **dict(reversed(p.items()))}
    (gradient,) = torch.autograd.grad(loss_of(plan, x, weights, turned), weights, create_graph=True)
    unused, *found = torch.autograd.grad(gradient, list(turned.values()), v, allow_unused=True)
    assert unused is None
    assert all(map(torch.equal, reversed(found), expected))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "its weights"),
        ("p", "the gradients of its alphas"),
        ("both", "two of its backward passes"),
    ],
)
def test_other_derivatives_are_refused(setting, what, message):
    plan, x, weights, p = setting
    loss = loss_of(plan, x, weights, p)
    of_weights, of_p = torch.autograd.grad(loss, [weights, p[0]], create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        if what == "weights":
            torch.autograd.grad(of_weights.sum(), weights)
        elif what == "p":
            torch.autograd.grad(of_p.sum(), p[0])
        else:
            (again,) = torch.autograd.grad(loss, weights, create_graph=True)
            torch.autograd.grad(of_weights.sum() + again.pow(2).sum(), p[0])


def test_evaluation_is_not_differentiated(setting):
    plan, x, weights, p = setting
    book, data = network(2, everything, True)
    evaluation = Plan(
        data, [SHAPE], torch.float64, book.size, book.channels, 0, Blocks(torch.device("cpu")), aten
    )
    constants = torch.ones(3, sum(book.channels), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="in training mode only"):
        cells(evaluation, x, weights, p, constants)
    with torch.no_grad():
        first, _ = cells(evaluation, x, weights, p, constants)
        kept = first.clone()
        cells(evaluation, 2 * x, weights, p, constants)
    assert torch.equal(first, kept)


def test_an_evaluation_in_inference_mode(setting):
    """Its memory serves what comes after outside of that mode: the same evaluation, and training."""
    training, x, weights, p = setting
    book, data = network(2, everything, True)
    sizes = torch.float64, book.size, book.channels
    evaluation = Plan(data, [SHAPE], *sizes, 0, training.blocks, aten)
    constants = torch.ones(3, sum(book.channels), dtype=torch.float64)
    with torch.inference_mode():
        first, _ = cells(evaluation, x, weights, p, constants)
        kept = first.clone()
    with torch.no_grad():
        second, _ = cells(evaluation, x, weights, p, constants)
    assert torch.equal(second, kept)
    v = torch.randn_like(weights)
    found = product(loss_of(training, x, weights, p), weights, p, v)
    fresh = Plan(data, [SHAPE], *sizes, 2, Blocks(torch.device("cpu")), aten)
    assert all(map(torch.equal, found, product(loss_of(fresh, x, weights, p), weights, p, v)))
