import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run under its interpreter here; read when they are decorated, so before any import.
    os.environ["TRITON_INTERPRET"] = "1"

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """A file of tests/golden: the official implementation's state, inputs and outputs."""

    def __init__(self, name):
        self.arrays = dict(np.load(GOLDEN / name))
        self.meta = ast.literal_eval(str(self.arrays["meta"]))

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def text(self, key):
        return str(self.arrays[key])

    def group(self, prefix, dtype):
        """The tensors below a prefix, by the rest of their name, floats in `dtype`."""
        found = {}
        for key in self.arrays:
            if key.startswith(prefix + "/") and self.arrays[key].dtype.kind != "U":
                tensor = self[key]
                found[key[len(prefix) + 1 :]] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return found

    def batch(self, index, dtype):
        return self[f"batch/{index}/images"].to(dtype), self[f"batch/{index}/labels"]


@pytest.fixture(scope="session")
def golden_search():
    return Golden("official_search_c4_l4.npz")


def relative_error(found, expected):
    """|found - expected| / |expected|, in float64; NaN anywhere gives NaN, which passes no bound."""
    found = torch.as_tensor(found).detach().double().flatten()
    expected = torch.as_tensor(expected).detach().double().flatten()
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="session")
def float32_allowance(golden_search):
    """Half of what a float32 error against float64 may be: the reference's largest over eight copies of the
    weights moved by 6e-8."""
    from official import LAYOUTS, everything, official_network

    expected = golden_search.group("float64", torch.float64)
    generator = torch.Generator().manual_seed(0)
    allowed = dict.fromkeys(expected, 0.0)
    for copy in range(8):
        network = official_network(golden_search, torch.float32).to(memory_format=LAYOUTS[copy % 2])
        with torch.no_grad():
            for w in network.weights().values():
                w *= 1 + 6e-8 * torch.randn(w.shape, generator=generator)
        found = everything(network, golden_search, torch.float32)
        for name in expected:
            allowed[name] = max(allowed[name], relative_error(found[name], expected[name]))
    return allowed


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs the test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
