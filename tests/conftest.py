import ast
import dataclasses
import gc
import io
import json
import os
import re
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; for the programs that tests start, too

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from darts_fast import resume_search, search
from darts_fast.runs import EVENTS, METRICS, Stopped
from darts_fast.search import Search

# No deadline: a busy machine is no failure. No database: tests that list a folder find only their own files.
settings.register_profile("darts_fast", deadline=None, database=None)
settings.load_profile("darts_fast")

if not torch.cuda.is_available():
    # Triton's kernels run under its interpreter here; read when they are decorated, so before any import.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """Python's garbage collector leaves alone what is imported by now: to walk it takes 0.2 seconds or more,
    in each full collection, and so at the beginning of each of the hundreds of small runs."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption(
        "--whole", action="store_true", help="of tests/ptx, everything, in place of what CI has time for"
    )


GOLDEN = Path(__file__).parent / "golden"


def two_nodes(candidates):
    """A space, as `--space FILE` reads it, of two nodes, and so of five edges a cell, each with these
    candidates. With all eight, a step takes about a third of one in the paper's space of four nodes."""
    return json.dumps({"nodes": 2, "normal": candidates, "reduce": candidates})


# For tests of what is around a step (epochs, checkpoints, reports); a step in plain PyTorch takes a fifth of
# the time.
SMALL_SPACE = two_nodes(["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"])


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


def synthetic_state(shapes, seed):
    """A state dict of these shapes (by name), in float64, that depends on the seed alone: for golden files
    that hold outputs without the weights."""
    random, state = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
        elif name.endswith("running_var"):
            state[name] = torch.from_numpy(random.uniform(0.5, 1.5, shapes[name]))
        else:
            state[name] = torch.from_numpy(0.5 * random.standard_normal(shapes[name]))
    return state


@pytest.fixture(scope="session")
def golden_search():
    return Golden("official_search_c4_l4.npz")


def relative_error(found, expected):
    """|found - expected| / |expected|, in float64; NaN anywhere gives NaN, which passes no bound."""
    found = torch.as_tensor(found).detach().double().flatten()
    expected = torch.as_tensor(expected).detach().double().flatten()
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs the test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fast_interpreter(monkeypatch):
    """Triton's interpreter without half of its time, in which it patches the language anew for every call of
    a device function."""
    import triton
    from triton.runtime import interpreter

    patch, scopes = interpreter._patch_lang, []

    def patch_once(function):
        if scopes and function.__globals__.get("tl") is triton.language:  # a device function of ours
            return scopes[0]
        scope = patch(function)
        if scope is not None and not scopes:  # Triton 3.5 patches for good
            restore = scope.restore
            scope.restore = lambda: (scopes.clear(), restore())
            scopes.append(scope)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture
def no_overflow_checks(fast_interpreter, monkeypatch):
    """Triton's interpreter without its checks of integer overflow, half of the rest of its time. The larger
    cases of tests/test_triton.py have them: those of several tiles, and of several blocks of channels."""
    from triton.runtime import interpreter

    monkeypatch.setitem(vars(interpreter.interpreter_builder.options), "sanitize_overflow", False)


@pytest.fixture
def no_heat_maps(monkeypatch):
    """One pixel in place of each heat map of the alphas, which take a third of the time of a tiny search. The
    searches of test_run.py draw them."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    monkeypatch.setattr("darts_fast.plot.alpha_heat_map", lambda *_: pixel.getvalue())


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(one, two):
    """Equal to the bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def events(folder):
    """Every scalar of TensorBoard but the times, in order."""
    found = []
    for event in EventFileLoader(str(folder / EVENTS)).Load():
        for value in event.summary.value:
            if not value.tag.startswith("x_time/") and value.metadata.plugin_data.plugin_name == "scalars":
                found.append((event.step, value.tag, value.tensor.float_val[0]))
    return found


def log_lines(folder):
    """The log without what may differ: times, names, and that it was resumed."""
    stamp = re.compile(r"^\d\d/\d\d \d\d:\d\d:\d\d \| ")
    lines = [stamp.sub("", line) for line in next(folder.glob("*.log")).read_text().splitlines()]
    kept = [
        line
        for line in lines
        if not line.startswith(("name =", "data_path =", "Resumed", "not where")) and "run folder" not in line
    ]
    return [line.split("  lr ")[0] for line in kept]


def assert_same_run(one, two):
    first, second = checkpoint(one), checkpoint(two)
    for state in (first, second):
        state.pop("lengths")
    assert same(first, second)
    assert (one / METRICS).read_text() == (two / METRICS).read_text()
    assert events(one) == events(two)
    assert log_lines(one) == log_lines(two)
    for name in ("genotype.json", "best.pt", "final.pt", "ema.pt"):
        assert (one / name).exists() == (two / name).exists()
        if name.endswith(".pt") and (one / name).exists():
            assert same(*(torch.load(folder / name, weights_only=True) for folder in (one, two)))
        elif (one / name).exists():
            assert (one / name).read_text() == (two / name).read_text()


@pytest.fixture
def signal_at(monkeypatch):
    """Sends this process a signal within the n-th step from now of a Search or a Training."""

    def arrange(loop, n, number):
        plain, calls = loop.take_step, []

        def step(self, *arguments):
            calls.append(None)
            if len(calls) == n:
                os.kill(os.getpid(), number)
            return plain(self, *arguments)

        monkeypatch.setattr(loop, "take_step", step)

    return arrange


@pytest.fixture
def resumed_like_undisturbed(signal_at, in_tmp):
    """A function: the results of two searches of these settings, one undisturbed, the other stopped within
    step number `at` and resumed, which it holds to the same bits. `between` is called before that."""

    def run(config, data, at, between=lambda: None):
        whole = search(dataclasses.replace(config, name="whole"), data)
        signal_at(Search, at, signal.SIGTERM)
        with pytest.raises(Stopped):
            search(dataclasses.replace(config, name="stopped"), data)
        between()
        resumed = resume_search("searchs/stopped", data)
        assert_same_run(whole.path, resumed.path)
        return whole, resumed

    return run
