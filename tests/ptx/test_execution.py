"""The Triton kernels as they are compiled for sm_80, executed on the CPU (execution.py): cases against their
equations in float64, in several orders of blocks; whole steps, call by call (proofs.py); what is found where
a kernel is damaged.

CI runs a part, in minutes; `pytest tests/ptx --whole` runs everything.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed on Linux only")

import cuda_stand_in  # noqa: E402

from darts_fast.kernels.triton import compilation  # noqa: E402
from ptx import proofs  # noqa: E402

LACKING = compilation.missing_for_launches()
# Triton compiles its launcher with the host's compiler and Python's headers, here as on a GPU.
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"Triton's launcher needs {LACKING}")

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """A function: calls one of proofs.py, by its name, in a process whose launches are executed."""
    environment = cuda_stand_in.build(tmp_path_factory.mktemp("driver"))
    process = subprocess.Popen(
        [sys.executable, "-m", "ptx.proofs"],
        cwd=TESTS,
        env={**environment, "TRITON_INTERPRET": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(function, *arguments):
        process.stdin.write(json.dumps([function, *arguments]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, "the process that executes has ended"
        answer = json.loads(line)
        if "error" in answer:
            pytest.fail(answer["error"])
        return answer["result"]

    with process:
        yield call
        process.stdin.close()


def pytest_generate_tests(metafunc):
    whole = metafunc.config.getoption("whole")
    every_type = list(proofs.DTYPES) if whole else ["float32"]
    values = {
        "case": [
            (name, dtype)
            for name in proofs.CASES
            for dtype in proofs.DTYPES
            if (name, dtype) not in proofs.NO_ROOM
        ]
        if whole
        else proofs.SHORT,
        "several": [(name, dtype) for name in proofs.SEVERAL_PROGRAMS for dtype in every_type],
        "step": [(name, dtype) for name in proofs.STEPS for dtype in proofs.DTYPES]
        if whole
        else proofs.SHORT_STEPS,
        "damage": list(proofs.DAMAGES),
    }
    for name in metafunc.fixturenames:
        if name in values:
            ids = [value if isinstance(value, str) else ", ".join(value) for value in values[name]]
            metafunc.parametrize(name, values[name], ids=ids)


def test_function(case, execute):
    execute("checked", *case)


def test_no_order_of_blocks_changes_a_bit(several, execute):
    """Where at least three programs add to every sum."""
    launches = execute("ordered", *several, 3)
    assert launches and all(grid[0] >= 3 for _, grid in launches), launches


def test_a_whole_step(step, execute):
    name, dtype = step
    counted = execute(*proofs.STEPS[name][:1], dtype, *proofs.STEPS[name][1:])
    assert counted["launches"] > counted["calls"] > 20, counted


def test_damage_is_found(damage, execute):
    with pytest.raises(pytest.fail.Exception, match=proofs.DAMAGES[damage].found_by):
        execute("damaged", damage)


def test_no_order_depends_on_the_first_level_cache(execute):
    """`.cg` is for the speed of it: PTX orders loads of every kind by the counter alike."""
    execute("uncached", "norm of several tiles", "float32")
