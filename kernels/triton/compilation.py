"""What Triton's compiler is given for a launch, without a GPU; and many of them compiled at a time.

`python -m darts_fast.kernels.triton.compilation` is a worker of `compile_ahead`.
"""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource

from darts_fast.kernels import types
from darts_fast.kernels.processors import processors
from darts_fast.kernels.triton.launch import SLICES_OF_VECTORS, Launch

T = TypeVar("T")

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


def signature(planned: Launch) -> dict[str, Any]:
    """Parameter types as the launch would specialise them: an integer that is 1 is compiled in."""
    types = {name: _type(value) for name, value in planned.arguments.items()}
    types.update(dict.fromkeys(planned.constants, "constexpr"))
    return {name: types[name] for name in planned.kernel.arg_names}


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(v) for v in value)
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "constexpr" if value == 1 else "i32" if value < 2**31 else "i64"


def _aligned(value: Any) -> bool:
    if value is None:
        return False
    if isinstance(value, Tensor):  # allocations are aligned to far more than 16 bytes
        return int(value.storage_offset()) * value.element_size() % 16 == 0
    return value != 1 and value % 16 == 0


def attributes(planned: Launch) -> dict[tuple[int, ...], list]:
    """Which parameters are divisible by 16, by place; as the launcher has them, so that it finds on disk what
    was compiled here for its device."""
    found: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(planned.kernel.arg_names):
        value = planned.arguments.get(name, 1)
        if not COMPILED_IN_ARE_LISTED and isinstance(value, int) and value == 1:
            continue
        if isinstance(value, tuple):
            found |= {(i, j): v for j, v in enumerate(value)}
        else:
            found[i,] = None if name in SLICES_OF_VECTORS else value
    return {place: [["tt.divisibility", 16]] if _aligned(value) else [] for place, value in found.items()}


# In the launcher's list of attributes, with none: so since Triton 3.7.
COMPILED_IN_ARE_LISTED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)

# Up to Triton 3.6 each signature has a launcher of its own, in C: half a second of the host's compiler.
LAUNCHERS_ARE_COMPILED = hasattr(driver, "make_launcher")


def source(planned: Launch) -> ASTSource:
    """What Triton's launcher would compile."""
    names = planned.kernel.arg_names
    constants = {(names.index(name),): value for name, value in planned.constants.items()}
    ones = [name for name, value in planned.arguments.items() if isinstance(value, int) and value == 1]
    constants |= {(names.index(name),): 1 for name in ones}
    return ASTSource(planned.kernel, signature(planned), constants, attributes(planned))


def key(planned: Launch) -> str:
    """A text that two launches share if what is compiled for one serves the other."""
    return f"{planned.name} {signature(planned)} {attributes(planned)} {planned.constants}"


def unique(launches: Iterable[types.Launch]) -> list[Launch]:
    """The launches of Triton without those for which one before them compiles everything."""
    found: dict[str, Launch] = {}
    for planned in launches:
        if isinstance(planned, Launch):  # else it is ATen's
            found.setdefault(key(planned), planned)
    return list(found.values())


def compiled(given: ASTSource, warps: int, arch: int) -> Any:
    """The kernel for sm_<arch>, from Triton's cache if it is there."""
    return triton.compile(given, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def missing_for_launches() -> str | None:
    """What Triton needs to compile its launchers and this machine lacks, in words; None: nothing."""
    named = os.environ.get("CC")
    candidates = ("gcc", "clang") if named is None else (named,)
    if not any(map(shutil.which, candidates)):
        return "a C compiler (gcc or clang)" if named is None else f"the C compiler {named!r} that CC names"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # as Triton does for Debian's Python
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return None if header.exists() else f"Python's headers ({header}; Debian's package python3-dev has them)"


# Compiling ahead


def processes() -> int:
    """How many processes compile at a time: one a processor that this one may use; each holds 0.75 GB."""
    return min(16, processors())


def note(launches: Sequence[Launch], arch: int) -> Path:
    """The path of a file in Triton's cache that says, where the caller has made it, that all of these were
    compiled for sm_<arch>. With another Triton or other sources of the kernels it is another path."""
    given = [triton.__version__, arch, *((source(planned).hash(), planned.warps) for planned in launches)]
    digest = hashlib.sha256(repr(given).encode()).hexdigest()
    return Path(triton.knobs.cache.dir) / f"darts_fast-{digest}"


def compile_ahead(
    launches: Sequence[Launch],
    archs: Sequence[int],
    count: int,
    then: Callable[[Launch, int, str], T],
    launchers: bool = False,
) -> Generator[T, None, None]:
    """Compiles each launch for each architecture in `count` processes, and yields, in order, what `then`
    returns for it. `then` is called in a thread when the kernel is in Triton's cache, with the launch, the
    architecture and ""; or, where it could not be compiled, with the reason (launching it would raise the
    same). With `launchers`, which need the driver's library, Triton's launcher of the kernel is brought into
    the cache, too.

    Raises:
        RuntimeError: a process that compiles ended.
    """
    workers: SimpleQueue = SimpleQueue()

    def one(job: tuple[Launch, int]) -> T:
        worker = workers.get()
        try:
            worker.stdin.write(_message(*job, launchers) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                raise RuntimeError("a process that compiles kernels ended before it was done")
        except BrokenPipeError:
            raise RuntimeError("a process that compiles kernels ended before it was asked") from None
        finally:
            workers.put(worker)
        return then(*job, answer.strip())

    # A worker sees no GPU, and compiles though this process interprets.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__]
    with ExitStack() as stack:
        for _ in range(count):
            worker = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the caller, who closes the pipes
                )
            )
            stack.callback(_end, worker)
            workers.put(worker)
        pool = stack.enter_context(ThreadPoolExecutor(count))
        stack.callback(pool.shutdown, cancel_futures=True)
        yield from pool.map(one, ((planned, arch) for planned in launches for arch in archs))


def _end(worker: subprocess.Popen) -> None:
    assert worker.stdin is not None
    with suppress(BrokenPipeError):  # it has ended, and did not read what was written
        worker.stdin.close()


def _message(planned: Launch, arch: int, launcher: bool) -> str:
    kernel, given = planned.kernel.fn, source(planned)
    constants = [[place, _plain(value)] for place, value in given.constants.items()]
    fields = kernel.__module__, kernel.__name__, given.signature, constants, list(given.attrs.items())
    return json.dumps([*fields, planned.warps, arch, launcher])


def _plain(value: Any) -> Any:
    return {"dtype": value.name} if isinstance(value, tl.dtype) else value


def _from_plain(value: Any) -> Any:
    """The value that `_plain` made JSON of, whose lists were tuples."""
    if isinstance(value, dict):
        return tl.dtype(value["dtype"])
    return tuple(map(_from_plain, value)) if isinstance(value, list) else value


def _work() -> None:
    for line in sys.stdin:
        module, name, signature, constants, attributes, warps, arch, launcher = json.loads(line)
        given = ASTSource(
            getattr(importlib.import_module(module), name),
            {key: _from_plain(value) for key, value in signature.items()},
            {tuple(place): _from_plain(value) for place, value in constants},
            {tuple(place): value for place, value in attributes},
        )
        try:
            binary = compiled(given, warps, arch)
            if launcher and LAUNCHERS_ARE_COMPILED:
                driver.CudaLauncher(given, binary.metadata)
        except Exception as error:  # whatever a compiler raises
            print(repr(error).replace("\n", " "), flush=True)
        else:
            print(flush=True)


if __name__ == "__main__":
    _work()
