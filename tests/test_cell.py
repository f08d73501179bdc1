"""Cells of other shapes than the search's, lowered, against the same cells in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from darts_fast.kernels import Blocks, Plan, aten, cells
from darts_fast.kernels.cell import (
    Cell,
    Convolution,
    Edge,
    FactorizedReduce,
    Half,
    Identity,
    Noise,
    Norm,
    Parameter,
    Pool,
    Sweeps,
)


class Book:
    """Gives weights and batch norms their places."""

    def __init__(self):
        self.size, self.channels = 0, []

    def parameter(self, *shape):
        start, self.size = self.size, self.size + torch.Size(shape).numel()
        return Parameter(start, shape)

    def norm(self, c):
        self.channels.append(c)
        return Norm(len(self.channels) - 1)

    def pointwise(self, c, k):
        return Convolution((Half(None, self.parameter(k, c, 1, 1), self.norm(k)),))

    def separable(self, c, kernel, stride=1, dilation=1, halves=2):
        strides = [stride] + [1] * (halves - 1)
        return Convolution(
            tuple(
                Half(
                    self.parameter(c, 1, kernel, kernel),
                    self.parameter(c, c, 1, 1),
                    self.norm(c),
                    s,
                    dilation,
                )
                for s in strides
            )
        )

    def reduce(self, c, k):
        return FactorizedReduce(
            (self.parameter(k // 2, c, 1, 1), self.parameter(k // 2, c, 1, 1)), self.norm(k)
        )

    def pool(self, kind, c):
        return Pool(kind, self.norm(c))


def plain(cell, inputs, weights, p, noise):
    """The cell's output: equations 1 and 2 of the paper over its candidates. The list `noise` holds numbers
    that are left; what the cell takes is taken out of it."""

    def weight(parameter):
        return weights[parameter.offset :][: torch.Size(parameter.shape).numel()].view(parameter.shape)

    def normalise(y):
        return F.batch_norm(y, None, None, training=True)

    def compute(operation, x, stride):
        if isinstance(operation, Identity):
            return x
        if isinstance(operation, Noise):
            n, c, height, width = x[:, :, ::stride, ::stride].shape
            taken, noise[:] = noise[: n * c * height * width], noise[n * c * height * width :]
            return torch.stack(taken).view(n, height, width, c).permute(0, 3, 1, 2)
        if isinstance(operation, Pool):
            pool = F.avg_pool2d if operation.kind else F.max_pool2d
            options = {"count_include_pad": False} if operation.kind else {}
            return normalise(pool(x, 3, stride, 1, **options))
        if isinstance(operation, FactorizedReduce):
            first, second = (weight(w) for w in operation.pointwise)
            a = x.relu()
            return normalise(
                torch.cat([F.conv2d(a[..., ::2, ::2], first), F.conv2d(a[..., 1::2, 1::2], second)], 1)
            )
        for half in operation.halves:
            x = x.relu()
            if half.depthwise:
                d = weight(half.depthwise)
                padding = half.dilation * (d.shape[-1] // 2)
                x = F.conv2d(x, d, None, half.stride, padding, half.dilation, x.shape[1])
            x = normalise(F.conv2d(x, weight(half.pointwise)))
        return x

    states = [compute(part, x, 1) for part, x in zip(cell.preprocessing, inputs, strict=True)]
    groups, p = cell.partial_channels, iter(p)
    first = cell.channels // groups
    mixed = [[next(p) for _ in edge.operations] for edge in cell.edges]
    for node in range(cell.nodes):
        total = 0
        for edge, of_edge in zip(cell.edges, mixed, strict=True):
            if edge.node == node:
                x = states[edge.source][:, :first]
                total = total + sum(
                    q * compute(op, x, edge.stride) for q, op in zip(of_edge, edge.operations, strict=True)
                )
        if groups > 1:
            passed = 0
            for edge in cell.edges:
                if edge.node == node:
                    x = states[edge.source][:, first:]
                    passed = passed + next(p) * (F.max_pool2d(x, 2) if edge.stride == 2 else x)
            total = F.channel_shuffle(torch.cat([total, passed], dim=1), groups)
        states.append(total)
    return torch.cat(states[2:], dim=1)


def search_edges(book, c, nodes, stride, operations):
    return tuple(
        Edge(source, node, stride if source < 2 else 1, operations(book, c, stride if source < 2 else 1))
        for node in range(nodes)
        for source in range(2 + node)
    )


def everything(book, c, stride):
    skip = Identity() if stride == 1 else book.reduce(c, c)
    return (
        book.pool(0, c),
        book.pool(1, c),
        skip,
        book.separable(c, 3, stride),
        book.separable(c, 5, stride, 2, 1),
    )


def without_pools(book, c, stride):
    return Identity() if stride == 1 else book.reduce(c, c), book.separable(c, 3, stride)


def one_pool(book, c, stride):
    return (book.pool(1, c), book.separable(c, 7, stride, 1, 1))


def convolutions(book, c, stride):
    return book.separable(c, 3, stride), book.separable(c, 3, stride, 2, 1)


def with_noise(book, c, stride):
    return book.separable(c, 3, stride, 1, 1), Noise()


MIXED = everything, one_pool, without_pools, convolutions, with_noise


def network(nodes, operations, reduction, partial=1):
    """Three cells, the second of which may halve the image; images have 5 channels. With partial channels the
    operations have the same widths, the nodes wider ones."""
    book, c, concat = Book(), 4, tuple(range(2, 2 + nodes))
    first = Cell(
        c * partial,
        (book.pointwise(5, c * partial), book.pointwise(5, c * partial)),
        search_edges(book, c, nodes, 1, operations),
        concat,
        0,
        partial,
    )
    stride = 2 if reduction else 1
    k = 6
    second = Cell(
        k * partial,
        (book.pointwise(5, k * partial), book.pointwise(nodes * c * partial, k * partial)),
        search_edges(book, k, nodes, stride, operations),
        concat,
        int(reduction),
        partial,
    )
    third = Cell(
        k * partial,
        (
            (book.reduce if reduction else book.pointwise)(nodes * c * partial, k * partial),
            book.pointwise(nodes * k * partial, k * partial),
        ),
        # Edges with different candidates: a state that only some nodes read by a pool, or by the identity.
        tuple(
            Edge(source, node, 1, MIXED[(source + node) % len(MIXED)](book, k, 1))
            for node in range(nodes)
            for source in range(2 + node)
        ),
        concat,
        2,
        partial,
    )
    return book, [first, second, third]


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
@pytest.mark.parametrize("operations", [everything, without_pools, one_pool, convolutions, with_noise])
@pytest.mark.parametrize("nodes, partial", [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_all_sweeps_are_automatic_differentiation(nodes, partial, operations, reduction):
    torch.manual_seed(0)
    book, data = network(nodes, operations, reduction, partial)
    shape = 2, 5, 8, 6
    plan = Plan(data, [shape], torch.float64, book.size, book.channels, 2, Blocks(torch.device("cpu")), aten)
    lengths = {cell.kind: cell.weights for cell in data}
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = (0.5 * torch.randn(book.size, dtype=torch.float64)).requires_grad_()
    p = {kind: torch.rand(n, dtype=torch.float64, requires_grad=True) for kind, n in lengths.items()}
    v, found = torch.randn_like(weights), []
    noise = torch.randn(sum(t.numel() for t in plan.sweeps.noise), dtype=torch.float64)
    direction = None
    for fused in (False, True):
        if fused:
            y, _ = cells(plan, x, weights, p, noise=noise)
        else:
            outputs, left = [x, x], list(noise)
            for cell in data:
                outputs.append(plain(cell, outputs[-2:], weights, p[cell.kind], left))
            assert not left
            y = outputs[-1]
        direction = torch.randn_like(y) if direction is None else direction
        loss = (y.tanh() * direction).sum()
        inputs = [x, weights, *p.values()]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(first[1], [x, *p.values()], v)
        found.append([y, *first, *second])
    errors = [relative_error(a, b) for a, b in zip(found[1], found[0], strict=True)]
    assert max(errors) < 1e-9, errors


def test_every_weight_has_one_gradient():
    """In a network with every operation, no two weights are given the same place among the gradients."""
    book, data = network(3, everything, True)
    sweeps = Sweeps(data, [(2, 5, 8, 8)], torch.float64, book.size, book.channels, 2)
    order = sweeps.gradient_order()
    assert order.shape == (book.size,) and order.unique().numel() == book.size


def test_a_weight_that_no_operation_has():
    """And one of the same size that two have: there are as many numbers as gradients."""
    book, data = network(1, convolutions, False)
    first, second = (part.halves[0] for part in data[0].preprocessing)
    shared = Convolution((second._replace(pointwise=first.pointwise),))
    data[0] = data[0]._replace(preprocessing=(data[0].preprocessing[0], shared))
    sweeps = Sweeps(data, [(2, 5, 8, 8)], torch.float64, book.size, book.channels, 2)
    with pytest.raises(ValueError, match="weights that no operation of the cells has, or several"):
        sweeps.gradient_order()


def test_sizes_that_cannot_be_halved():
    book, data = network(1, everything, True)
    with pytest.raises(ValueError, match="a 7x8 image cannot be halved"):
        Sweeps(data, [(2, 5, 7, 8)], torch.float64, book.size, book.channels, 2)


def test_a_single_value_a_channel():
    book, data = network(1, convolutions, False)
    with pytest.raises(ValueError, match="more than one value a channel"):
        Sweeps(data, [(1, 5, 1, 1)], torch.float64, book.size, book.channels, 2)
