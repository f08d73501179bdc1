"""The Triton kernels on a GPU, at the sizes of the paper's supernet, against ATen in float64 there."""

import pytest
import torch
from conftest import relative_error

# Real sizes and compiled kernels; tests/test_triton.py has the interpreter's tiny sizes.
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels need a CUDA GPU")

# Triton is a dependency on Linux alone (setup.py).
triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

from test_triton import (  # noqa: E402
    expected_last_sweeps_of_mix,
    expected_last_sweeps_of_sepconv,
    images,
    last_sweeps_of_mix,
    last_sweeps_of_sepconv,
    narrowed,
    normalizer,
    weight,
    widened,
)

from darts_fast import architect  # noqa: E402
from darts_fast.kernels import Task, torch_backend, triton_backend  # noqa: E402
from darts_fast.kernels.backends import using  # noqa: E402
from darts_fast.supernet import Supernet  # noqa: E402

# float32 accumulates over up to 65,536 positions; 2-byte types round each value, and both factors of a
# pointwise product.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SIZES = [(64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8), (3, 20, 15, 9)]


def to_cuda(tree):
    if isinstance(tree, torch.Tensor):
        return tree.cuda()
    if isinstance(tree, torch_backend.Normalizer):
        return torch_backend.Normalizer(*(t.cuda() for t in tree[:3]), tree.batch)
    if isinstance(tree, Task):
        return tree
    return type(tree)(to_cuda(t) for t in tree) if isinstance(tree, (list, tuple)) else tree


def leaves(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from leaves(branch)


def check(function, arguments, dtype, expected=None):
    """Against ATen in float64, and twice: the same bits."""
    run = getattr(triton_backend, function) if isinstance(function, str) else function
    found, again = run(*arguments), run(*arguments)
    for first, second in zip(leaves(found), leaves(again), strict=True):
        assert torch.equal(first, second), "two runs differ"
    if expected is None:
        expected = getattr(torch_backend, function)(*widened(arguments))
    for f, e in zip(leaves(found), leaves(expected), strict=True):
        assert relative_error(f.cpu(), e.cpu()) <= BOUNDS[dtype], function
    return found, expected


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("normalised", [False, True])
def test_sepconv(shape, stride, normalised, dtype):
    c, count = shape[1], 4
    sources = [images(shape, dtype, i) for i in range(count if normalised else 1)]
    norms = [narrowed(normalizer(x, True), dtype) if normalised else None for x in sources]
    kernels = [3, 5, 3, 5]
    tasks = [Task(i if normalised else 0, stride, 1 + i // 2) for i in range(count)]
    d = [weight((c, 1, k, k), dtype, 10 + i) for i, k in enumerate(kernels)]
    p = [weight((c, c, 1, 1), dtype, 20 + i) for i in range(count)]
    arguments = to_cuda((sources, norms, tasks, d, p))
    y, _ = check("sepconv_forward", arguments, dtype)[0]
    adjoints = [images(t.shape, dtype, 30 + i).cuda() for i, t in enumerate(y)]
    for weight_gradients in (True, False):
        check("sepconv_backward", (*arguments, adjoints, weight_gradients), dtype)
    tangents = to_cuda(
        (
            [images(shape, dtype, 40 + i) for i in range(len(sources))],
            [weight(x.shape, dtype, 50 + i) for i, x in enumerate(d)],
            [weight(x.shape, dtype, 60 + i) for i, x in enumerate(p)],
        )
    )
    seconds = [images(t.shape, dtype, 70 + i).cuda() for i, t in enumerate(y)]
    given = arguments, adjoints, tangents, seconds
    expected = expected_last_sweeps_of_sepconv(*widened(given))
    check(last_sweeps_of_sepconv, given, dtype, expected)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
def test_pool(shape, stride, dtype):
    x = images(shape, dtype, 0).relu().cuda()
    maximum, average, position, statistics = triton_backend.pool_forward(x, stride)
    expected = torch_backend.pool_forward(x.double(), stride)
    for f, e in ((maximum, expected[0]), (average, expected[1]), (statistics, expected[3])):
        assert relative_error(f.cpu(), e.cpu()) <= BOUNDS[dtype]
    g = [images(maximum.shape, dtype, i).cuda() for i in (1, 2)]
    adjoint = torch_backend.pool_backward(x.double(), expected[2], stride, *(t.double() for t in g))
    check("pool_backward", (x, position, stride, *g), dtype, adjoint)
    xd = images(shape, dtype, 3).cuda()
    check(
        "pool_tangent",
        (xd, position, stride),
        dtype,
        torch_backend.pool_tangent(xd.double(), expected[2], stride),
    )


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("count", [1, 35])
def test_mix(shape, count, dtype):
    candidates = [images(shape, dtype, i) for i in range(count)]
    norms = [None if i % 7 == 2 else narrowed(normalizer(y, True), dtype) for i, y in enumerate(candidates)]
    arguments = to_cuda((candidates, norms, weight((count,), dtype, 50)))
    check("mix_forward", arguments, dtype)
    g = images(shape, dtype, 51).cuda()
    expected = torch_backend.mix_backward(*widened(arguments), g.double())
    found, _ = check("mix_backward", (*arguments, g), dtype, (*expected, expected[1].sum(1)))
    sums = found[1]
    tangents = [images(shape, dtype, 60 + i).cuda() for i in range(count)]
    second = images(shape, dtype, 52).cuda()
    reference = expected_last_sweeps_of_mix(widened(arguments), *widened((g, *expected, tangents, second)))
    check(last_sweeps_of_mix, (arguments, g, sums, tangents, second), dtype, reference)


@pytest.mark.parametrize("size", [32, 12])
def test_hessian_vector_product_of_a_supernet(size):
    """What the tests above leave out: links and spreads join several functions. Twice: the same bits."""
    torch.manual_seed(0)
    network = Supernet(16, 10, 3, fused=True).double().cuda()
    images, labels = torch.randn(4, 3, size, size).double().cuda(), torch.arange(4).cuda()
    v = {name: torch.randn_like(w) for name, w in network.weights().items()}

    def product():
        with network.frozen_statistics():
            weights, alphas = architect.leaves(network.weights()), architect.leaves(network.alphas())
            loss = network.loss(images, labels, weights, alphas)
            gradients = architect.gradients(loss, weights, create_graph=True)
            found = [*architect.detached(gradients).values()]
            return [loss.detach(), *found, *architect.exact_hvp(gradients, alphas, v).values()]

    found, again = product(), product()
    with using(torch_backend):
        expected = product()
    for f, a, e in zip(found, again, expected, strict=True):
        assert relative_error(f.cpu(), e.cpu()) <= 1e-9
        assert torch.equal(f, a), "two runs differ"
