"""The Triton kernels as they are compiled for sm_80, executed on the CPU (proofs.py says of what, execution.py
how): against their equations in float64, in several orders of blocks, and what is found where one is damaged.

Without `--whole` only what CI has time for: of each kernel one case or two.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed on Linux only")

import cuda_stand_in  # noqa: E402
from ptx import proofs  # noqa: E402

from darts_fast.kernels.triton import compilation  # noqa: E402

LACKING = compilation.missing_for_launches()
# Triton compiles its launcher with the host's compiler and Python's headers, here as on a GPU.
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"Triton's launcher needs {LACKING}")

TESTS = Path(__file__).resolve().parent.parent


class Failure(AssertionError):
    """What a function of proofs.py raised, in words."""


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """A function: calls one of proofs.py, by its name, in a process in which launches are executed."""
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
        answer = json.loads(process.stdout.readline())
        if "error" in answer:
            raise Failure(answer["traceback"])
        return answer["result"]

    with process:
        yield call
        process.stdin.close()


def pytest_generate_tests(metafunc):
    whole = metafunc.config.getoption("whole")
    chosen = {
        "case": [(name, dtype) for name in proofs.CASES for dtype in proofs.DTYPES] if whole else proofs.SHORT,
        "damage": list(proofs.DAMAGES),
    }
    for name, values in chosen.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=[v if isinstance(v, str) else ", ".join(v) for v in values])


def test_function(case, execute):
    execute("checked", *case)


def test_damage_is_found(damage, execute):
    with pytest.raises(Failure, match=proofs.DAMAGES[damage].found_by):
        execute("damaged", damage)
