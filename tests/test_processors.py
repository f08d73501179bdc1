"""How many processors a process may use: its affinity, and the quotas of its control groups."""

import os

import pytest

from darts_fast.kernels import native
from darts_fast.kernels.processors import processors

ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ALLOWED),
        ({"groups": "0::/\n"}, ALLOWED),
        ({"groups": "0::/\n", "cpu.max": "max 100000\n"}, ALLOWED),
        ({"groups": "0::/\n", "cpu.max": "100000 100000\n"}, 1),
        ({"groups": "0::/\n", "cpu.max": "5000 100000\n"}, 1),  # a part of one
        ({"groups": "0::/\n", "cpu.max": "10000000 100000\n"}, ALLOWED),
        # The group's own quota, one around it, and a path that is not seen from inside
        ({"groups": "0::/a/b\n", "a/b/cpu.max": "70000 100000\n", "a/cpu.max": "max 100000"}, 1),
        ({"groups": "0::/a/b\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "90000 100000"}, 1),
        ({"groups": "0::/of/the/host\n", "cpu.max": "90000 100000"}, 1),
        # Version 1
        (
            {
                "groups": "5:memory:/m\n4:cpu,cpuacct:/c\n0::/\n",
                "cpu,cpuacct/c/cpu.cfs_quota_us": "100000\n",
                "cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {"groups": "1:cpu:/\n", "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            ALLOWED,
        ),
        ({"groups": "0::/\n", "cpu.max": "garbage"}, ALLOWED),
    ],
)
def test_quotas_of_control_groups(tmp_path, files, expected):
    write(tmp_path, files)
    assert processors(tmp_path / "groups", tmp_path) == expected


def test_two_and_a_half_processors_are_three(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write(tmp_path, {"groups": "0::/\n", "cpu.max": "250000 100000"})
    assert processors(tmp_path / "groups", tmp_path) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity to set")
def test_affinity_counts():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(native.level() is None, reason=f"the C++ library {native.absence()}")
def test_a_sweep_has_no_more_threads_than_processors(monkeypatch):
    made = []
    monkeypatch.setattr(native, "processors", lambda: 3)
    monkeypatch.setattr(native.torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(native.loaded(), "darts_sweep", lambda records, count, threads: made.append(threads))
    native.program([])()
    assert made == [3]
