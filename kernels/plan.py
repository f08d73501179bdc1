"""Sweeps as lists of calls on buffers with static addresses.

The calls of a network's sweeps (cell.py) are on meta tensors, whose storages stand for buffers. `place` finds
from the calls when each buffer is written first and read last, and places it:

    kept by a sweep     what a later sweep reads: one behind the other in that sweep's block, small ones first
    within a sweep      in the scratch block of the sweep, over what is no longer read

Blocks are made once and used again, so a sweep allocates no buffer and addresses do not change: the calls of
a sweep are bound to them once and replayed.
"""

import inspect
import weakref
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darts_fast.kernels.types import Backend, Call, tensors

ALIGNMENT = 256  # bytes, of a buffer: what CUDA's allocator gives, and more than a cache line


@cache
def _parameters(function: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of what a backend's function reads, and of what it writes."""
    parameters = list(inspect.signature(getattr(Backend, function)).parameters.values())[1:]
    written = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return tuple(p.name for p in parameters if p.name not in written), written


class Recorder:
    """A `Backend` whose functions do nothing but record their calls."""

    def __init__(self):
        self.calls: list[Call] = []

    def __getattr__(self, function: str) -> Callable[..., None]:
        reads, writes = _parameters(function)

        def record(*arguments: Any, **written: Any) -> None:
            if set(written) != set(writes):
                raise TypeError(f"{function} writes {writes}, not {tuple(written)}")
            self.calls.append(Call(function, dict(zip(reads, arguments, strict=True)), written))

        return record


def needed(calls: Sequence[Call], results: Iterable[Tensor]) -> list[Call]:
    """Those of the calls that the results depend on."""
    wanted, found = {_storage(t) for t in results}, []
    for call in reversed(calls):
        if any(_storage(t) in wanted for t in tensors(call.writes)):
            wanted.update(map(_storage, tensors(call.reads)))
            found.append(call)
    return found[::-1]


# Placing buffers


class Place(NamedTuple):
    """Where a buffer lies: in which block, from which byte on."""

    block: str
    offset: int


class Layout(NamedTuple):
    """Where every buffer of some sweeps lies, by the number of its storage, and the size of each block."""

    places: dict[int, Place]
    sizes: dict[str, int]

    def number(self, t: Tensor) -> tuple[str, int]:
        """The block of a tensor, and the place of its first number there, in numbers of its type."""
        block, offset = self.places[_storage(t)]
        return block, offset // t.element_size() + int(t.storage_offset())


class _Life(NamedTuple):
    """From when to when a buffer is in use; a time is (number of the sweep, number of the call in it)."""

    size: int
    first: tuple[int, int]  # when it is written
    last: tuple[int, int]  # when it is read or written last


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _lives(
    sweeps: Sequence[Sequence[Call]], given: Sequence[Iterable[Tensor]], results: Sequence[Iterable[Tensor]]
) -> dict[int, _Life]:
    found: dict[int, _Life] = {}

    def note(t: Tensor, when: tuple[int, int]) -> None:
        key = _storage(t)
        life = found.get(key)
        size = -(-t.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        found[key] = life._replace(last=max(life.last, when)) if life else _Life(size, when, when)

    for i, (calls, before, after) in enumerate(zip(sweeps, given, results, strict=True)):
        for t in before:
            note(t, (i, -1))
        for j, call in enumerate(calls):
            for t in tensors(call.reads):
                if _storage(t) not in found:
                    raise RuntimeError(f"{call.function} reads a tensor that nothing has written")
                note(t, (i, j))
            for t in tensors(call.writes):
                note(t, (i, j))
        for t in after:
            note(t, (i, len(calls)))
    return found


class _Scratch:
    """Offsets in a block of buffers that live for a while."""

    def __init__(self):
        self.size = 0
        self._free: list[tuple[int, int]] = []  # offset, size; in order of the offsets, none touch

    def take(self, size: int) -> int:
        fits = [(length, offset) for offset, length in self._free if length >= size]
        if fits:
            length, offset = min(fits)
            self._free.remove((offset, length))
            if length > size:
                insort(self._free, (offset + size, length - size))
            return offset
        if self._free and sum(self._free[-1]) == self.size:  # the end is free: the block grows from there
            offset, _ = self._free.pop()
        else:
            offset = self.size
        self.size = offset + size
        return offset

    def give(self, offset: int, size: int) -> None:
        insort(self._free, (offset, size))
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged


def place(
    names: Sequence[str],
    sweeps: Sequence[Sequence[Call]],
    given: Sequence[Iterable[Tensor]],
    results: Sequence[Iterable[Tensor]],
    kept: Mapping[int, Place] | None = None,
) -> Layout:
    """Places the buffers of sweeps that follow one another, see the head of this file.

    Args:
        given: for each sweep the tensors that are written before it begins.
        results: for each sweep the tensors that are read after it has ended.
        kept: buffers that are placed already, in the block of the first sweep.
    """
    lives = _lives(sweeps, given, results)
    places: dict[int, Place] = dict(kept or {})
    sizes = {f"{name} {what}": 0 for name in names for what in ("kept", "scratch")}
    by_birth: dict[tuple[int, int], list[int]] = {}
    by_death: dict[tuple[int, int], list[int]] = {}
    for key, life in sorted(lives.items(), key=lambda item: item[1].size):
        if key in places:
            continue
        sweep = life.first[0]
        if life.last[0] > sweep:
            block = f"{names[sweep]} kept"
            places[key] = Place(block, sizes[block])
            sizes[block] += life.size
        else:
            by_birth.setdefault(life.first, []).append(key)
            by_death.setdefault(life.last, []).append(key)
    for i, calls in enumerate(sweeps):
        scratch, block = _Scratch(), f"{names[i]} scratch"
        for j in range(-1, len(calls) + 1):
            for key in by_birth.get((i, j), ()):
                places[key] = Place(block, scratch.take(lives[key].size))
            for key in by_death.get((i, j), ()):
                scratch.give(places[key].offset, lives[key].size)
        sizes[block] = scratch.size
    return Layout(places, sizes)


# Blocks


class Blocks:
    """Memory of a device for the blocks of plans whose sweeps run one after the other. A block is kept when
    it is given back: a new one costs page faults on a CPU, and other addresses everywhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self._blocks: list[Tensor] = []
        self._in_use: list[bool] = []

    def take(self, size: int) -> Tensor:
        """At least `size` uninitialised bytes: the smallest free block that has as many, or a new one."""
        free = [i for i, used in enumerate(self._in_use) if not used and self._blocks[i].numel() >= size]
        if free:
            i = min(free, key=lambda i: self._blocks[i].numel())
            self._in_use[i] = True
            return self._blocks[i]
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
            self._blocks.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        self._in_use.append(True)
        return self._blocks[-1]

    def give(self, block: Tensor) -> None:
        """Takes the block back, for others."""
        (i,) = (i for i, other in enumerate(self._blocks) if other is block)
        self._in_use[i] = False


class Lease:
    """A block that is given back when nothing refers to this object any more."""

    def __init__(self, blocks: Blocks, size: int):
        self.block = blocks.take(size)
        weakref.finalize(self, blocks.give, self.block).atexit = False


class Binding:
    """Turns meta tensors into real ones, which lie in the blocks where a layout places them."""

    def __init__(self, layout: Layout, blocks: Mapping[str, Tensor]):
        self._layout, self._blocks = layout, blocks
        self._typed: dict[tuple[str, torch.dtype], Tensor] = {}
        # By the id of a tensor or tuple, which must stay alive for it: itself, and what it is in real tensors
        self._found: dict[int, tuple[Any, Any]] = {}

    def __call__(self, tree: Any) -> Any:
        """The same nested tuples, lists and dictionaries, with real tensors in place of the meta ones."""
        if isinstance(tree, list):
            return [self(part) for part in tree]
        if isinstance(tree, Mapping):
            return {name: self(part) for name, part in tree.items()}
        if not isinstance(tree, (Tensor, tuple)):
            return tree
        if id(tree) not in self._found:
            if isinstance(tree, Tensor):
                found: Any = self._tensor(tree)
            else:
                parts = [self(part) for part in tree]
                found = type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
            self._found[id(tree)] = tree, found
        return self._found[id(tree)][1]

    @torch.inference_mode(False)  # see `Blocks.take`
    def _tensor(self, t: Tensor) -> Tensor:
        block, start = self._layout.number(t)
        typed = self._typed.get((block, t.dtype))
        if typed is None:
            typed = self._typed[block, t.dtype] = self._blocks[block].view(t.dtype)
        return typed.as_strided(t.shape, t.stride(), start)
