"""Counts launches of ATen's operations, and the bytes that they read and write, while they happen.

A launch is one ATen operation that is no view; its bytes are those of the distinct elements of its tensor
arguments and results.
"""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Allocations and metadata: they launch nothing.
NOTHING = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten.is_same_size.default,
}


class Count(NamedTuple):
    """Launches, and bytes read and written."""

    launches: int = 0
    bytes: int = 0

    def plus(self, launches: int, moved: int) -> "Count":
        return Count(self.launches + launches, self.bytes + moved)


class Traffic(TorchDispatchMode):
    """Counts what runs within. `live` and `peak` are bytes of storages made within and not yet freed."""

    def __init__(self):
        super().__init__()
        self.total, self.live, self.peak = Count(), 0, 0
        self.by_name: dict[str, Count] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is aten.convolution.default and args[0].is_contiguous(memory_format=torch.channels_last):
            # On real tensors its result is channels-last, too; on meta tensors PyTorch leaves that out.
            found = found.contiguous(memory_format=torch.channels_last)
        if not func.is_view and func not in NOTHING:
            results = list(_tensors(found))
            if results:
                operands = {_place(t): t for t in [*_tensors(args), *_tensors(kwargs), *results]}
                moved = sum(elements(t) * t.element_size() for t in operands.values())
                self._add(func.name(), moved)
        if not func.is_view:
            for tensor in _tensors(found):
                self._watch(tensor.untyped_storage())
        return found

    def _add(self, name: str, moved: int) -> None:
        self.total = self.total.plus(1, moved)
        self.by_name[name] = self.by_name.get(name, Count()).plus(1, moved)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _place(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def elements(tensor: Tensor) -> int:
    """The distinct ones: an expanded dimension counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count
