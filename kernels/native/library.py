"""The library of C++ kernels that this processor runs. Where there is a compiler, setup.py compiles the
sources beside this file once per processor level."""

import ctypes
import hashlib
import os
import sys
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from darts_fast.kernels.native.table import STRUCTURES, size_of

LEVEL_VARIABLE = "DARTS_NATIVE_LEVEL"  # of the environment: the highest level that may be used
LEVELS = {4: "x86-64-v4", 3: "x86-64-v3", 0: "portable"}
_NAMES = {4: "_v4", 3: "_v3", 0: "_portable"}


def _path(level: int) -> Path | None:
    folder = Path(os.environ.get("DARTS_NATIVE_FOLDER") or Path(__file__).resolve().parent)  # see sanitize.sh
    path = folder / f"{_NAMES[level]}.so"
    return path if path.exists() else None


def _open(level: int) -> ctypes.CDLL:
    """Loads the library of a level with the OpenMP runtime that PyTorch uses, since two in one process would
    start twice the threads. PyTorch's wheels bring theirs, for some processors with a digest in its name, so
    that no library can be linked to it; other builds of PyTorch use the system's."""
    package = Path(torch.__file__).resolve().parent
    folders = package / "lib", package.with_name("torch.libs")
    brought = [path for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
    if sys.platform == "linux":
        ctypes.CDLL(str(brought[0]) if brought else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(_path(level)))


def _digest() -> str:
    """The digest that setup.py computes of the sources; empty where there are none (a wheel)."""
    folder = Path(__file__).resolve().parent
    sources = sorted(path for end in ("cpp", "h") for path in folder.glob(f"*.{end}"))
    return hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest() if sources else ""


@cache
def absence() -> str | None:
    """Why there are no kernels in C++; None where there are."""
    if _path(0) is None:
        return "was not built: no C++ compiler with OpenMP when darts_fast was installed"
    try:
        library = _open(0)
    except OSError as error:  # such as no OpenMP, neither PyTorch's nor the system's
        return f"cannot be loaded: {error}"
    library.darts_sources.restype = ctypes.c_char_p
    # C++ reads tables that Python lays out: from a library of other sources the result would be garbage.
    if library.darts_sources() and _digest() not in ("", library.darts_sources().decode()):
        return "was built of other sources than are here: install darts_fast again"
    if _highest_wanted() is None:
        wanted = os.environ[LEVEL_VARIABLE]
        return f"is not used: {LEVEL_VARIABLE} is {wanted!r}, which is none of {', '.join(LEVELS.values())}"
    return None


def _highest_wanted() -> int | None:
    """The key of LEVELS that the environment allows at most; None where it names no level."""
    levels = {name: key for key, name in LEVELS.items()}
    return levels.get(os.environ.get(LEVEL_VARIABLE, LEVELS[max(LEVELS)]))


@cache
def level() -> int | None:
    """The key of LEVELS that is used on this machine, DARTS_NATIVE_LEVEL at most; None where there is none,
    see `absence`."""
    if absence() is not None:
        return None
    highest = min(_open(0).darts_level(), _highest_wanted())
    return max(built for built in LEVELS if built <= highest and _path(built) is not None)


def library_of(level: int) -> ctypes.CDLL:
    """The library of a processor level, which must have been built.

    Raises:
        RuntimeError: its structures are not those of table.py.
    """
    library = _open(level)
    library.darts_sweep.argtypes, library.darts_sweep.restype = [c_void_p, c_int64, c_int], None
    library.darts_multiply_adds.argtypes, library.darts_multiply_adds.restype = [c_int64], c_int64
    for structure in STRUCTURES:
        if getattr(library, f"darts_size_of_{structure.__name__}")() != size_of(structure):
            raise RuntimeError(f"tables.h and table.py disagree about {structure.__name__}")
    return library


@cache
def loaded() -> ctypes.CDLL:
    """The library that is used on this machine."""
    used = level()
    assert used is not None, absence()
    return library_of(used)


@cache
def address_of(library: ctypes.CDLL, function: str) -> int:
    """The address of the C++ function `darts_...` of a launch."""
    address = ctypes.cast(getattr(library, f"darts_{function}"), c_void_p).value
    assert address is not None  # a null pointer
    return address


def multiply_adds(rounds: int) -> int:
    """Computes as many multiply-adds a second as one thread of this processor can, and returns how many they
    were: a measure for benchmarks."""
    return loaded().darts_multiply_adds(rounds)
