"""Kernels compiled ahead, in several processes, into Triton's cache."""

import os
import subprocess
import sys
import sysconfig

import pytest
import torch

from darts_fast import fused, loop
from darts_fast.config import SearchConfig
from darts_fast.datasets import read_data
from darts_fast.errors import InputError, RunError
from darts_fast.runs import CHECKPOINT, RunFolder
from darts_fast.search import Search, search

pytest.importorskip("triton", reason="Triton is installed on Linux only")

from darts_fast.kernels import triton  # noqa: E402
from darts_fast.kernels.backends import collected  # noqa: E402
from darts_fast.kernels.triton import compilation  # noqa: E402
from darts_fast.kernels.types import launches  # noqa: E402

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

# Two kernels in two processes; then again here, which finds them; then one that no compiler takes.
AHEAD = """
import copy, os, torch
from darts_fast.kernels.triton import aot, compilation
cache = os.environ["TRITON_CACHE_DIR"]
table = aot.supernet_launches(torch.float16, quick=True)
pools = [planned for planned in table if planned.name == "pool_fwd_kernel"]
done = list(compilation.compile_ahead(pools, [90, 100], 2, lambda *result: result))
assert done == [(planned, arch, "") for planned in pools for arch in (90, 100)], done
before = sorted(os.listdir(cache))
assert len(before) >= 4
for planned, arch, _ in done:
    compilation.compiled(compilation.source(planned), planned.warps, arch)
assert sorted(os.listdir(cache)) == before
bad = copy.copy(pools[0])
bad.constants = {**bad.constants, "BLOCK_C": 3}
for error in compilation.compile_ahead([bad, pools[0]], [90], 1, lambda planned, arch, error: error):
    print("error" if error else "done")
given = (pools, 90), (pools, 100), (pools[:1], 90), ([bad], 90)
notes = [compilation.note(*one) for one in given]
assert len(set(notes)) == 4 and notes[0] == compilation.note(pools, 90), notes
assert {str(note.parent) for note in notes} == {cache}, notes
"""

# Each launch of the paper's search, as the launcher gives it to the compiler, and as compilation.py does.
LAUNCHER = """
import torch, triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:  # where there is no GPU to ask
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

class Given(Exception):
    pass

def compile(source, **options):
    raise Given(source)

triton.compiler.compile = compile
driver.set_active(Driver())
from darts_fast.kernels.triton import aot, compilation
count = 0
for planned in aot.supernet_launches(torch.float16):
    try:
        planned.kernel.warmup(grid=(1,), **planned.arguments, **planned.constants, num_warps=planned.warps)
    except Given as given:
        assert given.args[0].hash() == compilation.source(planned).hash(), planned
        count += 1
print(count)
"""


def test_the_compiler_is_given_what_the_launcher_gives_it():
    done = subprocess.run([sys.executable, "-c", LAUNCHER], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 400


def test_a_slice_of_a_vector_may_begin_anywhere():
    """The nodes' p, and their gradients, are slices of one vector."""
    from darts_fast.kernels import triton
    from darts_fast.kernels.types import Source, images

    x, vector = images(2, (2, 4, 8, 8), torch.float32, "meta"), torch.empty(8, device="meta")
    adjoint = images(1, x[0].shape, x.dtype, "meta")[0]
    sums, tangent_sums, products = (torch.empty(*rows, 2, 4, device="meta") for rows in ((2,), (3,), ()))

    def keys(start):
        p = vector[start : start + 2]
        forward = triton.mix_forward([Source(y) for y in x], p, outs=[adjoint])
        reads = [Source(y) for y in x], adjoint, sums, tangent_sums, products
        second = triton.mix_second(*reads, sums=sums, weight_gradient=p)
        return list(map(compilation.key, forward + second))

    assert keys(0) == keys(1)


def test_what_processes_compile_is_found_by_others(tmp_path):
    environment = {**ENVIRONMENT, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AHEAD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["error", "done"]


def test_a_process_that_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(compilation, "_message", lambda *job: "")
    with pytest.raises(RuntimeError, match="a process that compiles kernels ended"):
        list(compilation.compile_ahead([None] * 3, [90], 2, print))


def test_what_a_machine_lacks_for_launches(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert compilation.missing_for_launches() == "a C compiler (gcc or clang)"
    monkeypatch.setenv("CC", "tcc")
    assert compilation.missing_for_launches() == "the C compiler 'tcc' that CC names"
    (tmp_path / "tcc").touch(0o755)
    assert compilation.missing_for_launches() is None
    (tmp_path / "Python.h").unlink()
    found = compilation.missing_for_launches()
    assert found.startswith(f"Python's headers ({tmp_path / 'Python.h'};")


def test_a_run_on_cuda_without_a_compiler_is_refused_before_anything_is_written(monkeypatch, in_tmp):
    monkeypatch.setenv("CC", "tcc-is-not-here")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert fused.missing_on(cpu) is None
    monkeypatch.setattr(loop, "missing_on", lambda device: fused.missing_on(cuda))
    with pytest.raises(InputError, match="^--fused on a GPU needs the C compiler 'tcc-is-not-here'"):
        search(SearchConfig(fused=True, init_channels=2, layers=3, device="cpu"))
    assert not list(in_tmp.iterdir())
    config = SearchConfig(init_channels=2, layers=3, device="cpu")
    Search(config, read_data(config, None))  # the reference's cells need none


class Machine:
    """One whose GPU is of this capability, and where nothing is compiled but it is noted."""

    def __init__(self, monkeypatch, tmp_path, capability=(9, 0)):
        self.said, self.compiled, self.error = [], [], None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(compilation, "compile_ahead", self.compile_ahead)
        monkeypatch.setattr(compilation, "note", lambda launches, arch: tmp_path / f"note-{arch}")

    def compile_ahead(self, launches, archs, count, then, launchers):
        assert launchers
        for planned in launches:
            self.compiled.append((planned.name, *archs))
            yield then(planned, *archs, "")
            if self.error:
                raise self.error

    def start(self, each=lambda: None):
        fused.compile_kernels(rehearse, torch.device("cuda"), self.said.append, each)


def rehearse():
    """The same launch twice, and another."""
    from darts_fast.kernels import aten
    from darts_fast.kernels.backends import program
    from darts_fast.kernels.types import Call

    for channels in (4, 4, 8):
        x, out = (torch.zeros(2, channels, 8, 8).to(memory_format=torch.channels_last) for _ in range(2))
        program(aten, [Call("add", {"terms": (x, x)}, {"out": out})])()


def test_kernels_are_compiled_once(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)
    machine.start()
    assert machine.compiled == [("add_kernel", 90)] * 2
    assert len(machine.said) == 1 and machine.said[0].startswith("compiling 2 kernels for sm_90")
    machine.start()
    assert len(machine.compiled) == 2 and len(machine.said) == 1


def test_what_was_broken_off_or_failed_is_compiled_next_time(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)

    for exception in (KeyboardInterrupt, RunError):  # a stop, and one that cannot be saved

        def stop(exception=exception):
            raise exception("stop")

        with pytest.raises(exception):
            machine.start(stop)
    machine.error = RuntimeError("out of memory")
    machine.start()
    assert machine.said[-1] == "each kernel is compiled when it is launched instead: out of memory"
    machine.error = None
    machine.start()
    assert len(machine.compiled) == 1 + 1 + 1 + 2


def test_the_smaller_batches_of_a_run_are_rehearsed_too(monkeypatch):
    """On images of 8 x 8 their kernels are others: the smallest cells have 4 positions an image."""
    config = SearchConfig(fused=True, init_channels=2, layers=3, device="cpu")
    run = Search(config, read_data(config, None))
    assert len(run.train_half) % 64 == 14 and len(run.validation_half) % 64 == 15

    def compiled():
        with collected() as calls, torch.device("meta"):
            run.rehearse()
        return set(map(compilation.key, launches(triton, calls)))

    everything, of_each = compiled(), []
    for sizes in ([64], [14]):
        monkeypatch.setattr(run, "part_sizes", lambda *_, sizes=sizes: sizes)
        of_each.append(compiled())
    assert everything >= of_each[0] | of_each[1] and of_each[1] - of_each[0]


@pytest.mark.parametrize(
    "given",
    [{"space": "s1", "perturb": "adversarial"}, {"space": "s1", "partial_channels": 2}, {"macs_weight": 1.0}],
    ids=str,
)
def test_every_method_is_rehearsed(given):
    """On PyTorch's meta device, which can read no number."""
    config = SearchConfig(fused=True, init_channels=4, layers=3, device="cpu", **given)
    run = Search(config, read_data(config, None))
    with collected() as calls, torch.device("meta"):
        run.rehearse()
    assert calls


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_on_cuda_compiles_before_its_first_launch(resumed, monkeypatch, tmp_path):
    class Launched(Exception):
        pass

    def compile_kernels(rehearsal, device, say, each):
        each()
        with torch.device("meta"):
            rehearsal()
        compiled.append(device.type)

    def launch(*arguments):
        raise Launched

    compiled = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "compile_kernels", compile_kernels)
    config = SearchConfig(fused=True, init_channels=2, layers=3, order=1, device="cpu")
    run = Search(config, read_data(config, None))
    run.device, run.traffic, run.take_step, run.engine = torch.device("cuda"), launch, launch, dict
    with RunFolder.create(run.config, "digits") as run.folder, pytest.raises(Launched):
        if resumed:
            (run.folder.path / CHECKPOINT).touch()
        run.run()
    assert compiled == ["cuda"]
