"""The functions of the backends, against their equations in float64 (sweeps.py). Triton: test_triton.py."""

import importlib
import inspect

import pytest
import sweeps
import torch

from darts_fast.kernels import aten, native, types

BACKENDS = {
    "aten-float64": (aten, torch.float64),
    "aten-float32": (aten, torch.float32),
    "aten-bfloat16": (aten, torch.bfloat16),
    "native-float32": (native, torch.float32),
}
CASES = sweeps.CASES | sweeps.MORE_CASES


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that an allocation does not write is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=BACKENDS)
def tested(request):
    """A backend and a dtype."""
    backend, dtype = BACKENDS[request.param]
    if backend is native and native.level() is None:
        # Without a compiler the install succeeds, and there is nothing to test; other absences fail below.
        pytest.skip(f"the C++ library {native.absence()}")
    return backend, dtype


def test_the_library_is_missing_only_where_it_was_not_built():
    """A library of other sources is not tested by mistake, nor skipped unseen."""
    assert (native.absence() or "was not built").startswith("was not built")


@pytest.mark.parametrize("name", CASES)
def test_function(name, tested):
    sweeps.check(*tested, CASES[name])


def test_float16():
    for case in sweeps.CASES.values():
        sweeps.check(aten, torch.float16, case)


def test_the_variance_is_stable_at_a_large_mean(tested):
    # Around the mean, 1,000, its numbers are 4 apart, while the values deviate from it by 1.
    if tested[1] == torch.bfloat16:
        pytest.skip("bfloat16 does not hold the values")
    sweeps.check_large_mean(*tested)


def test_nan_is_not_hidden(tested):
    sweeps.check_nan(*tested)


@pytest.mark.parametrize("name", ["aten", "native", "triton"])
def test_a_backend_has_the_functions_of_the_protocol(name):
    if name == "triton":
        pytest.importorskip("triton", reason="Triton is installed on Linux only")
    package = importlib.import_module(f"darts_fast.kernels.{name}")
    functions = [
        key for key, value in vars(types.Backend).items() if inspect.isfunction(value) and key[0] != "_"
    ]
    assert len(functions) == 24
    for function in functions:
        found = inspect.signature(getattr(package, function)).parameters.values()
        expected = sweeps.signature(function).values()
        assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in expected]
