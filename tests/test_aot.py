"""A part of the kernels, compiled without a GPU: no spills, vector loads, tensor cores."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from darts_fast.config import SearchConfig, TrainConfig
from darts_fast.datasets import read_data
from darts_fast.kernels.backends import collected
from darts_fast.kernels.types import launches
from darts_fast.search import Search
from darts_fast.train import Training

# Compiles the first launch of a kernel as aot.py does, and as Triton's launcher does on an H100; prints both
# hashes, and the machine-independent code.
BOTH = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from darts_fast.kernels.triton import aot, compilation
launches = aot.supernet_launches(torch.bfloat16, quick=True)
planned = next(found for found in launches if found.name == "norm_sums_kernel")
here = compilation.compiled(compilation.source(planned), planned.warps, 90)

class Driver:  # where there is no GPU to ask
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Driver())
there = planned.kernel.warmup(
    grid=planned.grid, **planned.arguments, **planned.constants, num_warps=planned.warps
)
print(here.hash, there.hash)
print(here.asm["ptx"])
"""

KERNELS = ["sepconv_fwd_kernel", "sepconv_bwd_kernel", "mix_tangent_kernel"]


# Triton is a dependency on Linux alone (setup.py), and ptxas and cuobjdump come with its wheel.
on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="Triton and its ptxas are installed on Linux only"
)


def compiled(file, *arguments):
    """The rows of aot.py's table, which finds nothing wrong with them."""
    command = ["-m", "darts_fast.kernels.triton.aot", "--dtype", "bfloat16", "--quick", "--json", str(file)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())["kernels"]


@on_linux
def test_kernels_compile_for_sm_90(tmp_path):
    table = compiled(tmp_path / "table.json", "--arch", "sm_90", "--kernel", *KERNELS)
    assert {row["kernel"] for row in table} == set(KERNELS)
    for row in table:
        assert row["spills"] == row["local"] == 0, row
        assert row["widest_load"] == 128, row
        assert (row["tensor_core"] > 0) == (row["kernel"] == "sepconv_fwd_kernel"), row


@on_linux
def test_a_wide_search_has_room_in_a_block_of_sm_80(tmp_path):
    """The last cells of a search of 36 channels; a block has 163 KiB there."""
    wide = "--arch", "sm_80", "--channels", "144", "--kernel", "sepconv_bwd_pointwise_kernel"
    table = compiled(tmp_path / "table.json", *wide)
    assert any("tangent" in row["setting"] for row in table)
    assert all(row["shared"] <= 163 * 1024 for row in table), table


def test_under_the_interpreter_it_says_that_it_cannot():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "darts_fast.kernels.triton.aot", "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@on_linux
def test_the_launcher_compiles_the_same_and_the_last_program_sees_the_others_sums():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", BOTH], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    hashes, ptx = done.stdout.split("\n", 1)
    assert len(set(hashes.split())) == 1
    # The program's stores, a barrier, the count (one thread's, which releases and acquires), a barrier, and
    # loads past the first-level cache, which is not coherent.
    found = re.findall(r"\b(?:st\.global|bar\.sync|atom\.[\w.]+|ld\.global[\w.]*)", ptx)
    (count,) = [i for i, name in enumerate(found) if name.startswith("atom")]
    assert found[count].startswith("atom.global.gpu.acq_rel")
    assert found[count - 2 : count] == ["st.global", "bar.sync"] and found[count + 1] == "bar.sync"
    loads = [name for name in found[count:] if name.startswith("ld")]
    assert loads and all(name.startswith("ld.global.cg") for name in loads), loads


def made_table(network, dtype):
    """The keys of the table's launches of a network: "supernet" or "derived"."""
    from darts_fast.kernels.triton import aot
    from darts_fast.kernels.triton.compilation import key

    return {key(planned) for planned in getattr(aot, f"{network}_launches")(dtype)}


table = functools.cache(made_table)  # takes seconds


@on_linux
@pytest.mark.parametrize("network", ["supernet", "derived"])
def test_a_smaller_last_batch_compiles_nothing(network, monkeypatch):
    from darts_fast.kernels.triton import aot

    whole = table(network, torch.bfloat16)
    monkeypatch.setattr(aot, "BATCH", 39)  # of 64, of which nothing but the images' sizes is a factor
    assert made_table(network, torch.bfloat16) == whole


def run_at_the_papers_setting(network, dtype):
    """A search, or a training of DARTS_V2, that is not begun."""
    pixels = torch.zeros(192, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(192) % 10
    common = {"fused": True, "amp_dtype": None if dtype == "float32" else dtype}
    if network == "supernet":
        config = SearchConfig(batch_size=64, init_channels=16, layers=8, **common)
        return Search(config, read_data(config, (pixels, labels)))
    config = TrainConfig(genotype="DARTS_V2", batch_size=96, init_channels=36, layers=20, **common)
    return Training(config, read_data(config, (pixels, labels, pixels, labels)))


@on_linux
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("network", ["supernet", "derived"])
def test_the_table_has_every_launch_of_a_step_and_of_an_evaluation(network, dtype):
    from darts_fast.kernels import triton
    from darts_fast.kernels.triton.compilation import key

    run = run_at_the_papers_setting(network, dtype)
    with collected() as calls, torch.device("meta"):
        run.rehearse()
    made = list(launches(triton, calls))
    assert len(made) > 500
    # An evaluation is in float32.
    found = table(network, torch.float32) | table(network, getattr(torch, dtype))
    assert not set(map(key, made)) - found
