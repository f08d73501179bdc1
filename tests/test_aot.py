"""A part of the kernels, compiled without a GPU: no spills, vector loads, tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_report  # noqa: E402

KERNELS = ["sepconv_fwd_kernel", "sepconv_bwd_kernel", "mix_tangent_kernel"]


# Triton is a dependency on Linux alone (setup.py), and ptxas and cuobjdump come with its wheel.
on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="Triton and its ptxas are installed on Linux only"
)


@on_linux
def test_kernels_compile_for_sm_90(tmp_path):
    file = tmp_path / "table.json"
    command = ["-m", "darts_fast.kernels.aot", "--arch", "sm_90", "--dtype", "bfloat16", "--quick"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--kernel", *KERNELS, "--json", str(file)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(file.read_text())["kernels"]
    assert {row["kernel"] for row in table} == set(KERNELS)
    for row in table:
        assert row["spills"] == row["local"] == 0, row
        assert row["widest_load"] == 128, row
        assert (row["tensor_core"] > 0) == (row["kernel"] == "sepconv_fwd_kernel"), row


def test_under_the_interpreter_it_says_that_it_cannot():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "darts_fast.kernels.aot", "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@on_linux
@pytest.mark.parametrize("launches", ["supernet_launches", "derived_launches"])
def test_a_smaller_last_batch_compiles_nothing(launches, monkeypatch):
    from darts_fast.kernels import aot

    whole = {aot.key(planned) for planned in getattr(aot, launches)(torch.bfloat16)}
    monkeypatch.setattr(aot, "BATCH", 39)  # of 64, of which nothing but the images' sizes is a factor
    assert {aot.key(planned) for planned in getattr(aot, launches)(torch.bfloat16)} == whole


@on_linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_has_every_launch_of_a_training(dtype):
    from darts_fast.kernels import aot

    table = {aot.key(planned) for planned in aot.derived_launches(getattr(torch, dtype))}
    launches = gpu_report.launches_of_a_training(dtype)
    assert len(launches) > 500
    missing = [planned for planned in launches if aot.key(planned) not in table]
    assert not missing, missing[0]
