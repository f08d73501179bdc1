"""What Triton's launcher hands to the driver, seen by a stand-in for the driver (cuda_stand_in.py).

Run as a program, in the environment that `cuda_stand_in.build` gives, this file makes the launches and checks
them.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from darts_fast.config import SearchConfig, TrainConfig
from darts_fast.datasets import read_data
from darts_fast.loop import Loop
from darts_fast.search import Search
from darts_fast.train import Training

pytest.importorskip("triton", reason="Triton is installed on Linux only")

import cuda_stand_in  # noqa: E402
import triton.compiler  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from darts_fast.kernels import triton as kernels_in_triton  # noqa: E402
from darts_fast.kernels.backends import using  # noqa: E402
from darts_fast.kernels.triton import compilation  # noqa: E402
from darts_fast.kernels.triton.launch import Launch  # noqa: E402
from darts_fast.kernels.types import Call, images, launches  # noqa: E402

LACKING = compilation.missing_for_launches()
# Triton compiles its launcher with the host's compiler and Python's headers, here as on a GPU.
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"Triton's launcher needs {LACKING}")

MOST = 4096  # bytes of parameters that a kernel may have

# Every operation of the search space, in both cells.
NODES = [
    [("sep_conv_3x3", 0), ("dil_conv_3x3", 1)],
    [("sep_conv_5x5", 0), ("max_pool_3x3", 1)],
    [("skip_connect", 0), ("avg_pool_3x3", 1)],
    [("dil_conv_5x5", 0), ("skip_connect", 2)],
]
CONCAT = "range(2, 6)"
GENOTYPE = f"Genotype(normal={NODES}, normal_concat={CONCAT}, reduce={NODES}, reduce_concat={CONCAT})"


class Expected(NamedTuple):
    """What the driver is to get for a launch: of each parameter that is not compiled in, in the order of the
    kernel's declaration, its value and whether the compiler is told that 16 divides it."""

    planned: Launch
    values: list[int]
    divisible: list[bool]


def expected(planned: Launch) -> Expected:
    divisors, values, divisible = compilation.attributes(planned), [], []

    def add(value: Any, kind: Any, place: tuple[int, ...]) -> None:
        if isinstance(kind, tuple):
            for j, (one, kind_of_one) in enumerate(zip(value, kind, strict=True)):
                add(one, kind_of_one, (*place, j))
        elif kind != "constexpr":
            values.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)
            divisible.append(divisors[place] == [["tt.divisibility", 16]])

    for i, (name, kind) in enumerate(compilation.signature(planned).items()):
        add(planned.arguments.get(name), kind, (i,))
    return Expected(planned, values, divisible)


def check(wanted: Expected, record: cuda_stand_in.Record) -> None:
    planned, parameters = wanted.planned, record.parameters
    name = planned.name
    assert record.code.name == name, (record.code.name, name)
    grid = (*planned.grid, 1, 1)[:3]
    assert record.grid == grid, (name, record.grid, grid)
    assert record.block == (32 * planned.warps, 1, 1), (name, record.block)
    assert record.shared == record.code.metadata["shared"] <= 163 * 1024, (name, record.shared)
    assert record.stream == cuda_stand_in.STREAM, (name, record.stream)
    values = [int.from_bytes(value, sys.byteorder, signed=len(value) == 4) for value in parameters]
    assert values == [*wanted.values, 0, 0], (name, values, wanted.values)  # two scratch buffers: none
    pairs = zip(values, wanted.divisible, strict=False)
    assert all(value % 16 == 0 for value, divisible in pairs if divisible), (name, values)
    size = 0
    for value in parameters:  # each at a multiple of its size
        size = -(-size // len(value)) * len(value) + len(value)
    assert size <= MOST, (name, size)


def search_and_training() -> None:
    """A step of a search and one of a training on the stand-in; prints how many launches each had, and the
    most bytes of shared memory of one.

    Launches whose parameters have the same types, divisible by 16 in the same places, share one compiled
    kernel, the first one's: the launcher treats them alike, and compiling each would take minutes. After the
    first of its name, a kernel is compiled without its body, of which the launcher sees the shared memory
    alone.
    """
    compile_one, compiled, names = triton.compiler.compile, {}, set()
    wanted: list[Expected] = []
    records: list[cuda_stand_in.Record] = []

    def compile_alike(source: Any, **options: Any) -> Any:
        ahead = compilation.source(wanted[-1].planned)
        assert source.hash() == ahead.hash(), f"{source.name} is compiled ahead otherwise than for its launch"
        alike = f"{source.name} {source.signature} {source.attrs} {options}"
        if alike not in compiled:
            given = without_body(source) if source.name in names else source
            compiled[alike] = compile_one(given, **options)
            names.add(source.name)
        return compiled[alike]

    def launch(planned: Launch) -> None:
        wanted.append(expected(planned))
        launch_one(planned)

    triton.compiler.compile = compile_alike
    launch_one, Launch.run = Launch.run, launch
    cuda_stand_in.install(records.append)
    for run in runs():
        with using(kernels_in_triton):
            run.begin_epoch()
            run.take_step(run.learning_rate())
        for pair in zip(wanted, records, strict=True):
            check(*pair)
        print(len(records), max(record.shared for record in records))
        wanted.clear()
        records.clear()


def without_body(source: ASTSource) -> ASTSource:
    kernel = copy.copy(source.fn)
    kernel._unsafe_update_src(f"def {kernel.__name__}({', '.join(kernel.arg_names)}):\n    pass\n")
    return ASTSource(kernel, source.signature, source.constants, source.attrs)


def runs() -> Iterator[Loop]:
    """On images of 8 x 8. In the training, 16 does not divide every number of positions."""
    images, labels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8)
    setting: dict[str, Any] = {"fused": True, "device": "cpu", "init_channels": 4, "layers": 3}
    search = SearchConfig(batch_size=4, **setting)
    yield Search(search, read_data(search, (images, labels)))
    training = TrainConfig(genotype=GENOTYPE, batch_size=2, **setting)
    yield Training(training, read_data(training, (images, labels, images, labels)))


def addition(device: str) -> Call:
    x, out = images(2, (2, 4, 8, 8), torch.float32, device)
    return Call("add", {"terms": (x, x)}, {"out": out})


def count(calls: Path) -> int:
    return len(calls.read_text().splitlines())


def compiled_ahead() -> None:
    """Prints how often the host's compiler was called: to compile a launch ahead, when Triton loaded the
    driver, and by the launch. The compiler is a script that notes its calls."""
    calls = Path(os.environ["CC"]).with_name("calls")
    calls.touch()
    planned = list(launches(kernels_in_triton, [addition("meta")]))
    errors = compilation.compile_ahead(planned, [80], 1, lambda *result: result[-1], launchers=True)
    assert list(errors) == [""]
    ahead = count(calls)
    records: list[cuda_stand_in.Record] = []
    cuda_stand_in.install(records.append)
    loaded = count(calls)
    kernels_in_triton.program([addition("cpu")])()
    assert len(records) == 1
    print(ahead, loaded - ahead, count(calls) - loaded)


def program(name: str, environment: dict[str, str]) -> list[list[int]]:
    """Runs a function of this file in a process of its own; the numbers that it prints."""
    done = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def test_the_driver_gets_what_was_planned(tmp_path):
    (searched, shared), (trained, _) = program("search_and_training", cuda_stand_in.build(tmp_path))
    assert searched > 700 and trained > 70 and shared > 0


def test_a_launch_compiles_nothing_that_was_to_be_compiled_ahead(tmp_path):
    environment = cuda_stand_in.build(tmp_path)
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nexec {cuda_stand_in.compiler()} "$@"\n')
    compiler.chmod(0o755)
    ((ahead, loaded, launched),) = program("compiled_ahead", {**environment, "CC": str(compiler)})
    assert ahead == (1 if compilation.LAUNCHERS_ARE_COMPILED else 0)
    assert loaded == 1 and launched == 0


if __name__ == "__main__":
    {"search_and_training": search_and_training, "compiled_ahead": compiled_ahead}[sys.argv[1]]()
