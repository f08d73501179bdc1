"""Triton's launches without a GPU: a stand-in for the CUDA driver that records what the launcher hands to it.

`build` compiles it and gives the environment in which a process finds it. There, `install` makes it Triton's
driver: kernels are compiled for sm_80 and launched on tensors of the CPU, and each launch is a `Record`.
Nothing is executed, unless by who is told of the launches.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

ARCH = 80
STREAM = 0x5EED  # the current stream, as PyTorch would name it
SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = "libcuda.so.1"


class Code(NamedTuple):
    """A compiled kernel."""

    name: str
    ptx: str
    metadata: dict  # as Triton writes it beside the code: "shared", "num_warps", "hash" ...


class Record(NamedTuple):
    """A launch as the driver got it. `parameters` are in the order in which the code declares them, each of
    the bytes that it declares: values of integers, addresses of tensors, and at the end Triton's two scratch
    buffers, which are 0."""

    code: Code
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes, dynamic
    stream: int
    parameters: tuple[bytes, ...]


def compiler() -> str:
    """The C compiler that Triton takes."""
    return os.environ.get("CC") or shutil.which("gcc") or "clang"


def build(folder: Path) -> dict[str, str]:
    """Compiles the stand-in into `folder`; the environment of a process that is to find it in place of a
    driver, with a cache of its own for what Triton compiles."""
    include = Path(nvidia.__file__).with_name("include")  # cuda.h
    command = [compiler(), "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", f"-I{include}"]
    subprocess.run([*command, "-o", folder / LIBRARY, SOURCE], check=True)
    (folder / "libcuda.so").symlink_to(LIBRARY)  # the name that Triton 3.5 links
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **kept,
        "TRITON_LIBCUDA_PATH": str(folder),  # what Triton links against; below, what it loads
        "LD_LIBRARY_PATH": ":".join([str(folder), *filter(None, [kept.get("LD_LIBRARY_PATH")])]),
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }


def declared(ptx: str) -> list[int]:
    """Bytes of each parameter of the code's one kernel."""
    (entry,) = re.findall(r"\.entry\s+\w+\(([^)]*)\)", ptx)
    found = [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z](\d+)\b", entry)]
    assert len(found) == entry.count(".param"), entry
    return found


def install(launched: Callable[[Record], object]) -> None:
    """Makes the stand-in Triton's driver as long as this process lives. `launched` is called for each launch
    while its caller waits, so that it may read and write what the parameters point to; what it raises is
    printed and goes no further."""
    loaded: dict[int, Code] = {}  # by the driver's handle

    def load(module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
        paths = {Path(path).suffix: Path(path) for path in files.values()}
        loaded[function] = Code(name, paths[".ptx"].read_text(), json.loads(paths[".json"].read_text()))

    @RECORDER
    def record(function: int, stream: int | None, numbers: Any, addresses: Any) -> None:
        code = loaded[function]
        parameters = tuple(ctypes.string_at(addresses[i], n) for i, n in enumerate(declared(code.ptx)))
        launched(Record(code, tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6], stream or 0, parameters))

    active = nvidia.CudaDriver()
    active.get_current_device = lambda: 0  # in place of PyTorch, which sees no GPU
    active.get_current_stream = lambda device: STREAM
    active.get_device_capability = lambda device: divmod(ARCH, 10)
    driver.set_active(active)
    knobs.runtime.kernel_load_end_hook.add(load)
    ctypes.CDLL(LIBRARY).stand_in_record(record)
    _alive.append(record)


# The stand-in's `recorder_t`; and those that it may still call.
RECORDER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
)
_alive: list[Any] = []
