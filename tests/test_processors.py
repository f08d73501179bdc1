"""How many processors a process may use: what control groups allow, and threads within that."""

import math
import os
import subprocess
import sys

import pytest
import torch

from darts_fast.kernels import native
from darts_fast.kernels.processors import processors, quota, threads
from darts_fast.kernels.types import Call, images
from darts_fast.process import within_quota

V1 = {"cpu/c/cpu.cfs_quota_us": "150000\n", "cpu/c/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"groups": "0::/\n"}, math.inf),
        ({"groups": "0::/\n", "cpu.max": "max 100000\n"}, math.inf),
        ({"groups": "0::/\n", "cpu.max": "200000 100000\n"}, 2),
        ({"groups": "0::/\n", "cpu.max": "250000 100000\n"}, 3),
        ({"groups": "0::/\n", "cpu.max": "5000 100000\n"}, 1),
        # The group's own quota, one around it, and a path that is not seen from inside
        ({"groups": "0::/a/b\n", "a/b/cpu.max": "70000 100000\n", "a/cpu.max": "max 100000"}, 1),
        ({"groups": "0::/a/b\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "390000 100000"}, 4),
        ({"groups": "0::/a/b\n", "a/b/cpu.max": "700000 100000\n", "a/cpu.max": "390000 100000"}, 4),
        ({"groups": "0::/of/the/host\n", "cpu.max": "90000 100000"}, 1),
        # Version 1, its controllers named in either order
        ({"groups": "5:memory:/m\n4:cpu,cpuacct:/c\n0::/\n", **V1}, 2),
        ({"groups": "4:cpuacct,cpu:/c\n", **V1}, 2),
        ({"groups": "4:cpuacct:/c\n", **V1}, math.inf),
        (
            {"groups": "1:cpu:/\n", "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
        # What nobody expects
        ({"groups": "0::/\n", "cpu.max": "garbage"}, math.inf),
        ({"groups": "garbage\n\n:\n0::/\n", "cpu.max": "200000 100000\n"}, 2),
    ],
)
def test_quotas_of_control_groups(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path / "groups", tmp_path) == expected


# Linux has it; macOS and Windows have no call that keeps a process to some processors.
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity to set")
def test_affinity_counts_for_processes_alone():
    """A thread that OpenMP has bound to one processor (OMP_PROC_BIND) is not all of them."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert processors() == 1 and threads() == min(torch.get_num_threads(), quota())
    finally:
        os.sched_setaffinity(0, before)


def test_bound_threads_are_not_taken_for_a_limit():
    code = "import torch; torch.set_num_threads(2)\n"
    code += "from darts_fast.kernels.processors import threads; print(threads())"
    environment = {**os.environ, "OMP_PROC_BIND": "true"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert int(found.stdout) == min(2, quota())


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr("darts_fast.kernels.processors.quota", lambda: 3)


# Without a compiler the install succeeds and there are no sweeps in C++. Any other absence fails in
# test_kernels.py.
@pytest.mark.skipif(native.level() is None, reason=f"the C++ library {native.absence()}")
def test_a_sweep_has_no_more_threads_than_the_quota(three, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(native.loaded(), "darts_sweep", lambda records, count, threads: made.append(threads))
    x, out = images(2, (1, 4, 2, 2), torch.float32)
    native.program([Call("add", {"terms": (x, x)}, {"out": out})])()
    assert made == [3]


def test_a_run_leaves_the_callers_threads_as_they_were(three):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        with within_quota() as said:
            assert torch.get_num_threads() == 3
            assert said == "3 threads in place of PyTorch's 5: the quota of this container is worth no more"
        assert torch.get_num_threads() == 5
        torch.set_num_threads(3)
        with within_quota() as said:
            assert said is None and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
