"""Reads files that somebody else may have written: nothing in them is run, none is waited for, none fills the
memory by being small."""

import json
import os
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGEST_JSON = 2**20  # bytes; ours have some thousands


class Unreadable(Exception):
    """Its text continues a sentence that begins with the file: "is not a regular file"."""


def read_file(path: Path, largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes. Raises Unreadable."""
    try:
        _check_regular(path)
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from error
    if len(content) > largest:
        raise Unreadable(f"has more than {largest >> 20} MiB, too much to be one")
    return content


def read_json(path: Path) -> Any:
    """The value in a JSON file of at most LARGEST_JSON bytes. Raises Unreadable."""
    content = read_file(path, LARGEST_JSON)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # no JSON, no Unicode, nested without end
        raise Unreadable(f"cannot be read as JSON ({error})") from error


def read_tensors(path: Path, noun: str) -> dict[str, Any]:
    """The dictionary of tensors (on the host) and plain values that `torch.save` wrote.

    Raises:
        Unreadable: it "cannot be read as" what the noun says.
    """
    try:
        _check_regular(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        # `torch.save` compresses nothing: what says that it unpacks to more than the file was made to.
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise ValueError("compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("no dictionary")
        return content
    except OSError as error:
        raise Unreadable(f"cannot be read as {noun} ({error.strerror or error})") from error
    except Unreadable:
        raise
    except Exception as error:  # whatever a damaged file makes of torch's reader, which advises to run it
        raise Unreadable(
            f"cannot be read as {noun} (it is damaged, or holds something other than tensors and plain "
            "values, which is never loaded)"
        ) from error


def read_safetensors(path: Path, noun: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the host) and the metadata of a safetensors file.

    Raises:
        Unreadable: it "cannot be read as" what the noun says, or the package safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise Unreadable(
            "cannot be read: the package safetensors is not installed (pip install safetensors)"
        ) from error
    try:
        _check_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned: the tensors of an open file are its pages in memory, which follow what is written to it.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except OSError as error:
        raise Unreadable(f"cannot be read as {noun} ({error.strerror or error})") from error
    except Unreadable:
        raise
    except Exception as error:  # the package's own error, or torch's of a type it does not have
        raise Unreadable(f"cannot be read as {noun} (it is damaged, or no safetensors file)") from error


def _check_regular(path: Path) -> None:
    """A pipe would be waited for, a device might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unreadable("is not a regular file")
