"""The Triton kernels under the interpreter, against their equations in float64 (sweeps.py).

On a machine with a GPU the same cases run there, see tests/gpu.
"""

import inspect
import json
from itertools import cycle

import numpy as np
import pytest
import sweeps
import torch
from conftest import relative_error
from sweeps import Add, FanOut, Kind, Mix, Norm, Pool, Sepconv
from test_kernels import poisoned  # noqa: F401  (a fixture)

from darts_fast import architect
from darts_fast.kernels.backends import using
from darts_fast.spaces import read_space
from darts_fast.supernet import Supernet

# Triton is a dependency on Linux alone (setup.py).
pytest.importorskip("triton", reason="Triton is installed on Linux only")

from triton.runtime import interpreter  # noqa: E402

from darts_fast.kernels import triton  # noqa: E402
from darts_fast.kernels.triton import (  # noqa: E402
    launch,
    mix,
    sepconv_bwd,
    sepconv_bwd_pointwise,
    sepconv_fwd,
)

# A kernel is interpreted or compiled from its decoration on: one process cannot have both.
pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="the interpreter is for machines without a GPU; tests/gpu runs there",
    ),
    pytest.mark.usefixtures("fast_interpreter"),
]

# What sweeps.CASES are too small for: at least three programs of float64 add to every sum, and the last of
# them has a tile that is not full. The interpreter checks these for integer overflow, too, as it does those
# of several blocks of channels.
SEVERAL_PROGRAMS = {
    "halves of several tiles": Sepconv((2, 3, 7, 10), (Kind(3), Kind(3, 2)), norm="batch"),
    "1x1 of several tiles": Sepconv((2, 3, 7, 10), (Kind(0),), in_mix=False),
    "mix of several tiles": Mix((2, 3, 7, 10), (True, False)),
    "norm of several tiles": Norm((2, 3, 7, 10), 2),
    "fan out of several tiles": FanOut((2, 3, 7, 10), (2, 1), (True, False)),
    "pools of several tiles": Pool((2, 3, 7, 10), 1, terms=1),
    "add of several tiles": Add((2, 3, 7, 10), 2),
}
# 64 channels are the most that a program has.
SEVERAL_BLOCKS_OF_CHANNELS = {
    "halves of 70 channels": Sepconv((1, 70, 3, 3), (Kind(3),), outputs=5, norm="batch"),
    "1x1 of 70 channels": Sepconv((2, 70, 3, 5), (Kind(0),), outputs=4, in_mix=False),
    "mix of 70 channels": Mix((2, 70, 3, 3), (True, False)),
    "mix of 130 channels": Mix((1, 130, 3, 3), (True,)),
    "norm of 70 channels": Norm((2, 70, 3, 3), 1),
    "fan out of 70 channels": FanOut((1, 70, 3, 3), (2,), (True,)),
    "pools of 70 channels": Pool((1, 70, 3, 4), 1, terms=1),
    "add of 70 channels": Add((1, 70, 3, 3), 2),
}


@pytest.fixture(autouse=True)
def counters_stay_zero():
    yield
    assert not launch._counters(torch.device("cpu")).any()


@pytest.fixture
def launches(monkeypatch):
    """Every launch that is made, in order."""
    found, run = [], launch.Launch.run

    def noted(self):
        found.append(self)
        run(self)

    monkeypatch.setattr(launch.Launch, "run", noted)
    return found


@pytest.mark.parametrize("name", sweeps.CASES)
@pytest.mark.usefixtures("no_overflow_checks")
def test_function(name):
    sweeps.check(triton, torch.float64, sweeps.CASES[name])


# Neighbours among the cases are mostly of one function, so that each function has both types.
@pytest.mark.parametrize(
    ("name", "dtype"), list(zip(sweeps.CASES, cycle([torch.bfloat16, torch.float32]), strict=False)), ids=str
)
@pytest.mark.usefixtures("no_overflow_checks")
def test_function_in_other_types(name, dtype):
    sweeps.check(triton, dtype, sweeps.CASES[name])


@pytest.mark.parametrize("name", SEVERAL_PROGRAMS)
def test_sums_of_several_programs(name, launches):
    sweeps.check(triton, torch.float64, SEVERAL_PROGRAMS[name])
    assert launches and all(made.grid[0] >= 3 for made in launches), [made.grid for made in launches]


@pytest.mark.parametrize("name", SEVERAL_BLOCKS_OF_CHANNELS)
def test_several_blocks_of_channels(name, launches):
    sweeps.check(triton, torch.float64, SEVERAL_BLOCKS_OF_CHANNELS[name])
    # All but sepconv_fwd_kernel have a dimension for them, the last one.
    assert all(made.grid[-1] >= 2 for made in launches if made.name != "sepconv_fwd_kernel")


def test_the_variance_is_stable_at_a_large_mean():
    sweeps.check_large_mean(triton, torch.float32)


def test_nan_is_not_hidden():
    sweeps.check_nan(triton, torch.float32)


# None has factorized reduces: of their sources half of the pixels are read, and counted whole.
BYTES = {
    "first halves": Sepconv((2, 16, 4, 8), (Kind(3), Kind(3, 2)), outputs=16),
    "second halves": Sepconv((2, 16, 4, 8), (Kind(3), Kind(3, source=1)), outputs=16, norm="batch"),
    "1x1": Sepconv((2, 48, 4, 8), (Kind(0),), outputs=16, in_mix=False),
    "mix": Mix((2, 16, 4, 8), (True, False, True)),
    "norm": Norm((2, 16, 4, 8), 2),
    "fan out": FanOut((2, 16, 8, 16), (2, 1, 2, 0), (True, True, False, True)),
    "pools": Pool((2, 16, 4, 8), 1, terms=1),
    "add": Add((2, 16, 4, 8), 3),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_launch_touches_the_bytes_that_are_counted(name, monkeypatch):
    """Distinct addresses of every load and store of the interpreter, against `Launch.bytes`."""
    builder, touched, made = interpreter.InterpreterBuilder, [], []
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        touched[-1].update((address, size) for address in pointers.data[live].tolist())

    def noted_load(self, pointers, mask, *rest):
        note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    run = launch.Launch.run

    def noted(self):
        made.append(self)
        touched.append(set())
        run(self)

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    monkeypatch.setattr(launch.Launch, "run", noted)
    sweeps.check(triton, torch.float32, BYTES[name])
    assert made
    for launched, addresses in zip(made, touched, strict=True):
        counted, found = launched.bytes, sum(size for _, size in addresses)
        # The variances [C] that lie between means and reciprocal deviations are not read.
        assert found <= counted <= 1.1 * found, (launched.name, counted, found)


def test_tensors_of_other_layouts_are_refused():
    contiguous = torch.zeros(2, 3, 4, 4)
    out = contiguous.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="channels-last"):
        triton.add([out, contiguous], out=out)


# Three nodes, so that the first is read by two others. Each candidate is on an edge or two of both kinds of
# cell, and a launch has several of them.
PAIRS = [
    ["max_pool_3x3", "sep_conv_3x3"], ["skip_connect", "dil_conv_5x5"], ["none", "sep_conv_5x5"],
    ["avg_pool_3x3", "dil_conv_3x3"],
]  # fmt: skip
SPACE = json.dumps({"nodes": 3, "normal": PAIRS + PAIRS + PAIRS[:1], "reduce": PAIRS[1:] + PAIRS + PAIRS[:2]})


@pytest.mark.usefixtures("no_overflow_checks")
def test_hessian_vector_product_of_a_supernet(monkeypatch):
    """The fused supernet on the interpreter against the reference and generic automatic differentiation."""
    # Most of the interpreter's time goes to checks of integer overflow and to the selects of `pick`, which
    # the tests above have.
    for module in (mix, sepconv_fwd, sepconv_bwd_pointwise, sepconv_bwd):
        monkeypatch.setattr(module, "pick", lambda values, i: values[int(i.handle.data.item())])
    torch.manual_seed(0)
    reference, fused = (Supernet(2, 3, 3, fused=f, space=read_space(SPACE)).double() for f in (False, True))
    fused.load_state_dict(reference.state_dict())
    images, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    v = {name: torch.randn_like(w) for name, w in reference.weights().items()}

    def product(network):
        with network.frozen_statistics():
            weights, alphas = architect.leaves(network.weights()), architect.leaves(network.alphas())
            loss = network.loss(images, labels, weights, alphas)
            gradients = architect.gradients(loss, weights, create_graph=True)
            return loss, architect.detached(gradients), architect.exact_hvp(gradients, alphas, v)

    expected = product(reference)
    with using(triton):
        found = product(fused)
    assert relative_error(found[0], expected[0]) <= 1e-9
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert set(f) == set(e)
        for name in f:
            assert relative_error(f[name], e[name]) <= 1e-9, name


def test_what_the_sanitizer_runs_captures_nothing():
    """On a GPU, without the allocator's cache, which a capture needs (tests/gpu)."""
    from gpu.test_triton_gpu import SANITIZED

    assert SANITIZED and not any("CUDAGraph" in inspect.getsource(test) for test in SANITIZED)
