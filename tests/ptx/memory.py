"""The global memory of a launch: the tensors of the CPU that its kernel may read and write."""

import ctypes
from typing import NamedTuple

import numpy as np
from torch import Tensor

# All addresses of this process as an array, of which only registered ranges may be touched. (NumPy takes no
# array at address 0.)
FIRST = 4096
_ALL = np.frombuffer((ctypes.c_uint8 * (2**47 - FIRST)).from_address(FIRST), np.uint8)


def real_memory(size: int, count: int) -> np.ndarray:
    """The process's memory as rows of `count` numbers of `size` bytes each; the first is at address FIRST."""
    return _ALL[: len(_ALL) // 64 * 64].view(f"u{size}").reshape(-1, count)


class Range(NamedTuple):
    """Bytes of real memory that are one tensor's."""

    start: int
    end: int
    name: str


class Memory:
    """The tensors that a launch may touch; everything else is out of bounds.

    A pointer that the kernel is given belongs to one range, see `find`, and what the kernel computes from
    this pointer may touch that range alone: running over into the neighbour is a fault, though the neighbour
    is a tensor, too. Ranges may overlap, as those of two views of one tensor do.
    """

    def __init__(self) -> None:
        self.ranges: list[Range] = []

    def add(self, address: int, size: int, name: str) -> None:
        """Registers `size` bytes from `address` on."""
        self.ranges.append(Range(address, address + size, name))

    def add_tensor(self, tensor: Tensor, name: str) -> None:
        """Registers the bytes from the first to the last element of a tensor of the CPU (of a slice of
        channels also those between)."""
        assert tensor.device.type == "cpu", tensor.device
        if tensor.numel():
            last = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            self.add(tensor.data_ptr(), (last + 1) * tensor.element_size(), name)

    def find(self, address: int) -> Range | None:
        """The range of a pointer: the longest of those that begin there, else the shortest around it."""
        beginning = [one for one in self.ranges if one.start == address]
        if beginning:
            return max(beginning, key=lambda one: one.end)
        around = [one for one in self.ranges if one.start < address < one.end]
        return min(around, key=lambda one: one.end - one.start, default=None)
