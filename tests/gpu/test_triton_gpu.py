"""The Triton kernels on a GPU, at the sizes of the paper's supernet, against their equations in float64."""

import os
import shutil
import subprocess
import sys

import pytest
import sweeps
import torch
from conftest import relative_error
from sweeps import Add, FanOut, Kind, Mix, Norm, Pool, Sepconv

# Real sizes and compiled kernels; tests/test_triton.py has the interpreter's tiny sizes.
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels need a CUDA GPU")

# Triton is a dependency on Linux alone (setup.py).
pytest.importorskip("triton", reason="Triton is installed on Linux only")

from darts_fast import architect  # noqa: E402
from darts_fast.kernels import aten, triton  # noqa: E402
from darts_fast.kernels.backends import using  # noqa: E402
from darts_fast.kernels.types import Call, Reader, Source, Task, Weights, images, tensors  # noqa: E402
from darts_fast.supernet import Supernet  # noqa: E402

DEVICE = "cuda"
SIZES = [(64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8), (3, 20, 15, 9)]
OF_SECOND_HALVES = Kind(3), Kind(5, 1, 1), Kind(3, 1, 2), Kind(5, 1, 3)

CASES = dict(sweeps.CASES)
for shape in SIZES:
    c, even = shape[1], shape if shape[2] % 2 == 0 else (3, 20, 16, 10)
    CASES |= {
        f"first halves {shape}": Sepconv(shape, sweeps.ALL_KINDS * 2, sliced=True),
        f"first halves {shape}, stride 2": Sepconv(shape, sweeps.ALL_KINDS * 2, stride=2),
        f"second halves {shape}": Sepconv(shape, OF_SECOND_HALVES, norm="batch", sliced=True),
        f"1x1 {shape}": Sepconv(
            (shape[0], 4 * c, *shape[2:]), (Kind(0), Kind(0, source=1)), outputs=c, in_mix=False
        ),
        f"factorized reduces {even}": Sepconv(even, sweeps.PAIR * 4, stride=2, outputs=c // 2, joined=2),
        f"mix of 35 into slices {shape}": Mix(shape, (True, True, False, True, True, True, True) * 5, "is"),
        f"norm {shape}": Norm(shape, 2),
        f"fan out {shape}": FanOut(shape, (4, 4, 4), (True, True, False), sliced=True),
        f"pools {shape}": Pool(shape, 1, terms=2),
        f"pools {shape}, stride 2": Pool(shape, 2, terms=2),
        f"add {shape}": Add(shape, 3),
    }


@pytest.mark.parametrize("dtype", sweeps.BOUNDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_function(name, dtype):
    sweeps.check(triton, dtype, CASES[name], DEVICE)


def test_the_variance_is_stable_at_a_large_mean():
    sweeps.check_large_mean(triton, torch.float32, DEVICE)


def test_nan_is_not_hidden():
    sweeps.check_nan(triton, torch.float32, DEVICE)


@pytest.mark.parametrize("size", [32, 12])
def test_hessian_vector_product_of_a_supernet(size):
    """Of a whole network, twice: the same bits."""
    torch.manual_seed(0)
    network = Supernet(16, 10, 3, fused=True).double().to(DEVICE)
    batch, labels = torch.randn(4, 3, size, size).double().to(DEVICE), torch.arange(4).to(DEVICE)
    v = {name: torch.randn_like(w) for name, w in network.weights().items()}

    def product():
        with network.frozen_statistics():
            weights, alphas = architect.leaves(network.weights()), architect.leaves(network.alphas())
            loss = network.loss(batch, labels, weights, alphas)
            gradients = architect.gradients(loss, weights, create_graph=True)
            of_weights = [*architect.detached(gradients).values()]
            return [loss.detach(), *of_weights, *architect.exact_hvp(gradients, alphas, v).values()]

    results, again = product(), product()
    with using(aten):
        expected = product()
    for f, a, e in zip(results, again, expected, strict=True):
        assert relative_error(f.cpu(), e.cpu()) <= 1e-9
        assert torch.equal(f, a), "two runs differ"


# Calls that were checked, repeated in other surroundings

REPEATED = {
    name: CASES[name]
    for shape in (SIZES[0], SIZES[3])
    for name in (f"second halves {shape}", f"mix of 35 into slices {shape}", f"fan out {shape}",
                 f"pools {shape}, stride 2", f"norm {shape}")
} | {"factorized reduces": CASES[f"factorized reduces {SIZES[0]}"]}  # fmt: skip


class Recording:
    """The backend, and the calls that its programs run."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, function):
        return getattr(triton, function)

    def program(self, calls):
        self.calls += calls
        return triton.program(calls)


def checked_calls(name, dtype):
    recording = Recording()
    sweeps.check(recording, dtype, REPEATED[name], DEVICE)
    return recording.calls


def copies(calls, copy):
    """The calls on other tensors, of which those that are written are poisoned."""
    return [
        Call(
            call.function,
            sweeps.mapped(call.reads, copy),
            sweeps.mapped(call.writes, lambda t: sweeps.poison(copy(t))),
        )
        for call in calls
    ]


def written(calls):
    return list(tensors([call.writes for call in calls]))


def assert_same(one, other):
    for a, b in zip(written(one), written(other), strict=True):
        assert sweeps.same_bits(a, b), "two runs differ"


def duplicate(t):
    """A copy with the same strides."""
    return like(t, 0).copy_(t)


def like(t, pad):
    """An uninitialised tensor with the same strides, between two pads of NaN (integers: 99)."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    buffer = sweeps.poison(torch.empty_strided((span + 2 * pad,), (1,), dtype=t.dtype, device=t.device))
    return buffer.as_strided(t.shape, t.stride(), pad)


@pytest.mark.parametrize("dtype", sweeps.BOUNDS, ids=str)
@pytest.mark.parametrize("name", REPEATED)
def test_two_streams_at_once_and_a_graph_replayed_twice(name, dtype):
    calls, at_once = checked_calls(name, dtype), []
    for stream in [torch.cuda.Stream() for _ in range(2)]:
        at_once.append(copies(calls, duplicate))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            triton.program(at_once[-1])()
    torch.cuda.synchronize()
    for repeated in at_once:
        assert_same(calls, repeated)
    captured, graph = copies(calls, duplicate), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton.program(captured)()
    for _ in range(2):
        for t in written(captured):
            sweeps.poison(t)
        graph.replay()
        assert_same(calls, captured)


PAD = 1024  # elements before and behind every tensor: aligned as the allocator's


@pytest.mark.parametrize("dtype", sweeps.BOUNDS, ids=str)
@pytest.mark.parametrize("name", REPEATED)
def test_nothing_is_read_or_written_beside_a_tensor(name, dtype, monkeypatch):
    """Every tensor lies between two pads, partial sums do, too: what is read there spoils the results, and
    what is written there is seen. So does what is read before it was written."""
    calls, buffers = checked_calls(name, dtype), []

    def padded(t):
        buffers.append(like(t, PAD))
        return buffers[-1]

    def allocating(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return padded(tensor) if tensor.device.type == DEVICE and tensor.numel() else tensor

        return allocated

    repeated = copies(calls, lambda t: padded(t).copy_(t))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", allocating(torch.empty))
        patched.setattr(torch.Tensor, "new_empty", allocating(torch.Tensor.new_empty))
        triton.program(repeated)()
    assert_same(calls, repeated)
    assert len(buffers) > 10
    for t in buffers:
        buffer = t._base
        pads = torch.cat([buffer[:PAD], buffer[-PAD:]])
        assert pads.isnan().all() if buffer.is_floating_point() else (pads == 99).all()


# Large tensors


def test_offsets_beyond_32_bits():
    """The last images of a batch of 2^31 elements and more give what they give alone."""
    n, c, size, last = 2**31 // (16 * 32 * 32) + 72, 16, 32, 64
    # 2^31 elements are 4 GB in bfloat16, and each of the three functions has up to six such tensors alive.
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    offsets_beyond_32_bits(n, c, size, last)


def offsets_beyond_32_bits(n, c, size, last):
    random = torch.Generator().manual_seed(0)
    (x,) = images(1, (n, c, size, size), torch.bfloat16, DEVICE)
    x[:-last] = 1.0
    x[-last:] = torch.randn((last, c, size, size), generator=random).to(x)
    weights = Weights(*(torch.randn(s, generator=random).to(DEVICE) for s in ((c, 1, 3, 3), (c, c, 1, 1))))
    ones = torch.ones(3, c, device=DEVICE)

    def sepconv(x):
        calls, (y, adjoint) = ([Source(x)], [Task(0, weights)]), (images_like(x) for _ in range(2))
        run("sepconv_forward", *calls, y=y, statistics=None)
        reader = Reader(x, None, 0, x, None, None)
        run("sepconv_backward", *calls, [reader], [()], adjoint=adjoint, sums=None, gradients=None)
        return y[0], adjoint[0]

    def mix(x):
        (out,) = images_like(x)
        run("mix_forward", [Source(x, ones), Source(x)], ones[0, :2], outs=[out])
        return (out,)

    def pool(x):
        pools, out = images_like(x, 2), images_like(x)[0]
        (position,) = images(1, x.shape, torch.uint8, DEVICE)
        run("pool_forward", x, 1, pools=pools, position=position, statistics=None)
        run("pool_backward", position, 1, pools, [x], out=out)
        return *pools, position, out

    for function in (sepconv, mix, pool):
        for whole, alone in zip(function(x), function(x[-last:]), strict=True):
            assert torch.equal(whole[-last:], alone), function.__name__


def images_like(x, count=1):
    return images(count, x.shape, x.dtype, x.device)


def run(function, *reads, **writes):
    names = sweeps.signature(function)
    triton.program([Call(function, dict(zip(names, reads, strict=False)), writes)])()


# Run without the allocator's cache, so that each tensor is an allocation of its own: a capture needs that
# cache, and these make none.
SANITIZED = [test_nothing_is_read_or_written_beside_a_tensor]


# A tool of the CUDA toolkit, which the driver and Triton do without.
@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer of the CUDA toolkit is not on PATH"
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_sanitizer_finds_nothing(tool):
    chosen = [f"{__file__}::{test.__name__}" for test in SANITIZED]
    command = [sys.executable, "-m", "pytest", "-n0", "-q", *chosen, "-k", "20 and not float64"]
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
