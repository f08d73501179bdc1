"""The Triton kernels on a GPU, at the sizes of the paper's supernet, against ATen in float64 there.

    pytest -n0 -x tests/gpu -k smallest     a launch, in seconds: does anything run?
    pytest -n8 tests/gpu                    all; most of the time goes into compiling each kernel once

The first lines of a failure say whether the kernels are wrong or ATen, which they are held against.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import relative_error

# Real sizes and compiled kernels; tests/test_triton.py has the interpreter's tiny sizes.
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels need a CUDA GPU")

# Triton is a dependency on Linux alone (setup.py).
triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

from test_triton import (  # noqa: E402
    concatenated_mixes,
    expected_last_sweeps_of_mix,
    expected_last_sweeps_of_sepconv,
    images,
    last_sweeps_of_mix,
    last_sweeps_of_sepconv,
    linked_case,
    linked_sweeps,
    narrowed,
    normalizer,
    weight,
    widened,
)

from darts_fast import architect, kernels  # noqa: E402
from darts_fast.kernels import Task, torch_backend, triton_backend  # noqa: E402
from darts_fast.kernels.backends import using  # noqa: E402
from darts_fast.precision import strict_float32  # noqa: E402
from darts_fast.supernet import Supernet  # noqa: E402

# float32 accumulates over up to 65,536 positions; 2-byte types round each value, and both factors of a
# pointwise product.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SIZES = [(64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8), (3, 20, 15, 9)]


def named(value):
    """float32, 64x16x32x32: for the names of the tests."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


types = pytest.mark.parametrize("dtype", BOUNDS, ids=named)
shapes = pytest.mark.parametrize("shape", SIZES, ids=named)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """cuDNN's own choice, for the stem, is TF32 and weight gradients whose bits change."""
    with strict_float32():
        yield


def test_the_smallest_launch():
    """Where this fails so does all else: the driver, the compiler of Triton's launchers, the installation."""
    x = torch.arange(256.0, device="cuda").view(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(triton_backend.add((x, x)), 2 * x)


def to_cuda(tree):
    if isinstance(tree, torch.Tensor):
        return tree.cuda()
    if isinstance(tree, torch_backend.Normalizer):
        return torch_backend.Normalizer(tree.statistics.cuda(), tree.batch)
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
    name = function if isinstance(function, str) else function.__name__
    found, again = run(*arguments), run(*arguments)
    same_bits(name, leaves(found), leaves(again))
    if expected is None:
        expected = getattr(torch_backend, function)(*widened(arguments))
    agree(name, leaves(found), leaves(expected), BOUNDS[dtype])
    return found, expected


def agree(name, found, expected, bound):
    for number, (f, e) in enumerate(zip(found, expected, strict=True)):
        what = f"{name}, output {number} of shape {tuple(e.shape)}"
        assert e.isfinite().all(), f"{what}: ATen's is not finite, which is no fault of the kernels"
        error = relative_error(f.cpu(), e.cpu())
        assert error <= bound, f"{what}: relative error {error:.3g}, allowed {bound:.3g}"


def same_bits(name, one, two):
    for number, (f, s) in enumerate(zip(one, two, strict=True)):
        count = int((f != s).sum())
        assert torch.equal(f, s), (
            f"{name}, output {number}: two runs differ in {count} of {f.numel()} numbers"
        )


@types
@shapes
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


@types
@shapes
@pytest.mark.parametrize("stride", [1, 2])
def test_pool(shape, stride, dtype):
    x = images(shape, dtype, 0).relu().cuda()
    maximum, average, position, statistics = triton_backend.pool_forward(x, stride)
    expected = torch_backend.pool_forward(x.double(), stride)
    agree("pool_forward", (maximum, average, statistics), (*expected[:2], expected[3]), BOUNDS[dtype])
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


@types
@shapes
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
    agree("loss, gradients, product", found, expected, 1e-9)
    same_bits("loss, gradients, product", found, again)


@types
@shapes
def test_mixes_write_the_slices_of_their_concatenation(shape, dtype):
    n, c, height, width = shape
    y, p = [images(shape, dtype, i) for i in range(3)], [weight((2,), dtype, 10 + i) for i in range(2)]
    arguments = to_cuda((y, p, images((n, 2 * c, height, width), dtype, 20)))
    with using(torch_backend):
        expected = concatenated_mixes(*widened(arguments), None)

    def in_slices(*arguments):
        return concatenated_mixes(*arguments, kernels.Slices(2))

    check(in_slices, arguments, dtype, expected)


@types
def test_add(dtype):
    terms = [images((64, 16, 32, 32), dtype, i).cuda() for i in range(3)]

    def add(*given):
        return triton_backend.add(given)

    check(add, terms, dtype, sum(t.double() for t in terms))


@types
@pytest.mark.parametrize("shape", SIZES[:3], ids=named)
def test_factorized_reduces_of_a_state_in_one_call(shape, dtype):
    c = shape[1]
    tasks = [Task(stride=2, offset=offset) for _ in range(4) for offset in (0, 1)]
    p = [weight((c // 2, c, 1, 1), dtype, 20 + i) for i in range(8)]
    arguments = to_cuda(([images(shape, dtype, 0)], [None], tasks, [None] * 8, p))
    y, statistics = torch_backend.sepconv_forward(*widened(arguments))
    y = [torch.cat(y[i : i + 2], dim=1) for i in range(0, 8, 2)]
    statistics = statistics.unflatten(0, (4, 2)).transpose(1, 2).flatten(2)
    check("sepconv_forward", (*arguments, 2), dtype, (y, statistics))


@types
@shapes
def test_links_and_spread(shape, dtype):
    """In float64 against ATen (narrower types cross kinks, see tests/test_float32.py); in each type the same
    bits twice."""
    given = to_cuda(linked_case(shape, dtype))
    found, again = (linked_sweeps(triton_backend, *given, True) for _ in range(2))
    assert all(f.isfinite().all() for f in found)
    same_bits("links and spread", found, again)
    if dtype == torch.float64:
        agree("links and spread", found, linked_sweeps(torch_backend, *given, False), 1e-9)


@types
@shapes
def test_two_streams_at_once_and_a_graph_give_the_same_bits(shape, dtype):
    given = to_cuda(linked_case(shape, dtype))

    def sweeps():
        return linked_sweeps(triton_backend, *given, True)

    found, at_once = sweeps(), []
    for stream in [torch.cuda.Stream() for _ in range(2)]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            at_once.append(sweeps())
    torch.cuda.synchronize()
    for again in at_once:
        same_bits("on another stream", found, again)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sweeps()
    for _ in range(2):
        graph.replay()
        same_bits("replayed", found, captured)


PAD = 1024  # elements before and behind every tensor: aligned as the allocator's


@types
@pytest.mark.parametrize("shape", [SIZES[0], SIZES[3]], ids=named)
def test_nothing_is_read_or_written_beside_a_tensor(shape, dtype, monkeypatch):
    """Every tensor lies between two pads of NaN (integers: 99): what is read there spoils the results, and
    what is written there is seen. So does what is read before it was written."""
    buffers = []

    def padded(t):
        fill = float("nan") if t.is_floating_point() else 99
        buffer = torch.full((t.numel() + 2 * PAD,), fill, dtype=t.dtype, device=t.device)
        buffers.append(buffer)
        return buffer.as_strided(t.shape, t.stride(), PAD)

    def allocating(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return padded(tensor) if tensor.is_cuda and tensor.numel() else tensor

        return allocated

    given = linked_case(shape, dtype)
    expected = linked_sweeps(triton_backend, *to_cuda(given), True)
    monkeypatch.setattr(torch, "empty", allocating(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", allocating(torch.Tensor.new_empty))

    def guarded(tree):
        return padded(tree).copy_(tree) if isinstance(tree, torch.Tensor) else [guarded(t) for t in tree]

    found = linked_sweeps(triton_backend, *guarded(to_cuda(given)), True)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)
    assert len(buffers) > 50
    for buffer in buffers:
        pads = torch.cat([buffer[:PAD], buffer[-PAD:]])
        assert pads.isnan().all() if buffer.is_floating_point() else (pads == 99).all()


def test_offsets_beyond_32_bits():
    """The last images of a batch of 2^31 elements and more give what they give alone."""
    n, c, size, last = 2**31 // (16 * 32 * 32) + 72, 16, 32, 64
    # 2^31 elements are 4 GB in bfloat16, and each of the three functions has up to six such tensors alive.
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.empty(n, size, size, c, **like).permute(0, 3, 1, 2)
    x[:-last] = 1.0
    x[-last:] = images((last, c, size, size), torch.bfloat16, 0).cuda()
    end = x[-last:]
    d, p = [weight((c, 1, 3, 3), x.dtype, 1).cuda()], [weight((c, c, 1, 1), x.dtype, 2).cuda()]

    def sepconv(x):
        y, _ = triton_backend.sepconv_forward([x], [None], [Task()], d, p)
        return y[0], *triton_backend.sepconv_backward([x], [None], [Task()], d, p, [x], False)[0]

    def mix(x):
        norm = torch_backend.Normalizer(torch.ones(3, c, device="cuda"), True)
        return triton_backend.mix_forward([x, x], [norm, None], torch.ones(2, device="cuda"))

    def pool(x):
        maximum, average, position, _ = triton_backend.pool_forward(x, 1)
        return maximum, average, position, triton_backend.pool_backward(x, position, 1, maximum, average)

    for function in (sepconv, mix, pool):
        for whole, alone in zip(leaves(function(x)), leaves(function(end)), strict=True):
            assert torch.equal(whole[-last:], alone), function.__name__
        torch.cuda.empty_cache()


# Run without the allocator's cache, so that each tensor is an allocation of its own: a capture needs that
# cache, and these make none. Not in float64, where ATen's kernels would be judged, too.
SANITIZED = [test_links_and_spread]


# A tool of the CUDA toolkit, which the driver and Triton do without.
@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer of the CUDA toolkit is not on PATH"
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_sanitizer_finds_nothing(tool):
    chosen = [f"{__file__}::{test.__name__}" for test in SANITIZED]
    command = [sys.executable, "-m", "pytest", "-n0", "-q", *chosen, "-k", "3x20x15x9 and not float64"]
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "3 passed" in done.stdout, done.stdout[-4000:]  # one a type
