"""The tables that C++ reads: structures of addresses and whole numbers, 8 bytes each.

tables.h has the same structures with the same fields in the same order, and says what they mean; `library_of`
compares the sizes. 0 is the null pointer.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from darts_fast.kernels import types


class Matrix(NamedTuple):
    data: int = 0
    stride: int = 0


class Reader(NamedTuple):
    y: Matrix = Matrix()
    statistics: Matrix = Matrix()
    adjoint: Matrix = Matrix()
    sums: Matrix = Matrix()
    weight: Matrix = Matrix()
    gamma: int = 0
    tangent: Matrix = Matrix()
    tangent_sums: Matrix = Matrix()
    second: Matrix = Matrix()
    second_sums: Matrix = Matrix()


class Source(NamedTuple):
    x: int = 0
    statistics: Matrix = Matrix()
    affine: Matrix = Matrix()
    tangent: int = 0
    tangent_sums: Matrix = Matrix()
    terms: int = 0
    n_terms: int = 0
    adjoint: int = 0
    sums: Matrix = Matrix()
    n: int = 0
    h: int = 0
    w: int = 0
    c: int = 0


class Task(NamedTuple):
    source: int = 0
    kernel: int = 0
    stride: int = 0
    dilation: int = 0
    offset: int = 0
    k: int = 0
    d: int = 0
    p: int = 0
    d_tangent: int = 0
    p_tangent: int = 0
    y: Matrix = Matrix()
    statistics: Matrix = Matrix()
    reader: Reader = Reader()
    p_gradient: int = 0
    d_gradient: int = 0


class SepConv(NamedTuple):
    sources: int = 0
    n_sources: int = 0
    tasks: int = 0
    n_tasks: int = 0


class Candidate(NamedTuple):
    y: int = 0
    statistics: Matrix = Matrix()
    affine: Matrix = Matrix()
    weight: Matrix = Matrix()
    tangent: int = 0


class Mix(NamedTuple):
    candidates: int = 0
    count: int = 0  # type: ignore[assignment]  # in place of tuple's method
    m: int = 0
    c: int = 0
    pixels: int = 0
    adjoint: Matrix = Matrix()
    outs: int = 0
    n_outs: int = 0
    sums: Matrix = Matrix()
    first_sums: Matrix = Matrix()
    tangent_sums: Matrix = Matrix()
    products: int = 0
    weight_gradient: int = 0


class Shared(NamedTuple):
    y: int = 0
    readers: int = 0
    n_readers: int = 0
    out: int = 0


class FanOut(NamedTuple):
    tensors: int = 0
    count: int = 0  # type: ignore[assignment]  # in place of tuple's method
    m: int = 0
    c: int = 0
    pixels: int = 0


class Sum(NamedTuple):
    terms: int = 0
    n_terms: int = 0
    out: int = 0
    m: int = 0
    c: int = 0


class Pool(NamedTuple):
    x: int = 0
    maximum: int = 0
    average: int = 0
    position: int = 0
    statistics: int = 0
    terms: int = 0
    n_terms: int = 0
    readers: int = 0
    of_maximum: int = 0
    of_average: int = 0
    n: int = 0
    h: int = 0
    w: int = 0
    c: int = 0
    stride: int = 0


class Record(NamedTuple):
    function: int = 0
    call: int = 0


STRUCTURES = Matrix, Reader, Source, Task, SepConv, Candidate, Mix, Shared, FanOut, Sum, Pool, Record


def _fields(structure: tuple) -> list[int]:
    found = []
    for field in structure:
        if isinstance(field, tuple):
            found += _fields(field)
        else:
            found.append(field)
    return found


def size_of(structure: type[tuple]) -> int:
    """The bytes of a structure."""
    return 8 * len(_fields(structure()))


class Table:
    """An array of structures of one kind, which C++ reads at `address` as long as this lives."""

    def __init__(self, structures: Sequence[tuple]):
        self._fields = array("q", _fields(tuple(structures)))
        self.address, self.count = self._fields.buffer_info()[0], len(structures)


@dataclass
class Launch(types.Launch):
    """One call of the C++ function of this name."""

    call: Table  # the one structure that the function takes
    tables: Sequence[Table]  # to which the structure points


def read_of(reader: types.Reader | types.SecondReader) -> tuple:
    """What the backward sweeps read of a reader: where it has no statistics, neither y nor what belongs to a
    batch norm."""
    first = reader.first if isinstance(reader, types.SecondReader) else reader
    return reader if first.statistics is not None else (reader.adjoint, first.weights)


def read_in_tangent(reader: types.Reader) -> types.Reader:
    """What the tangent sweep reads of a reader: G and y, the latter also where there are no statistics."""
    return reader._replace(sums=None, weights=None)


# Addresses of tensors; None is null. What lies otherwise in memory than is said raises a ValueError.


def pixels(x: Tensor | None) -> Matrix:
    """float32 [N, C, H, W] in channels-last memory, or a slice of the channels of such a tensor."""
    if x is None:
        return Matrix()
    if x.dtype is not torch.float32:
        raise TypeError(f"the native kernels compute in float32, not {x.dtype}")
    return Matrix(x.data_ptr(), types.row_stride(x))


def image(x: Tensor | None) -> int:
    """The address of such a tensor with all channels."""
    found = pixels(x)
    if x is not None and found.stride != x.shape[1]:
        raise ValueError(f"strides {x.stride()} of {tuple(x.shape)}: a slice of channels is not taken here")
    return found.data


def rows(x: Tensor | None) -> Matrix:
    """[rows, C]: statistics or sums."""
    if x is None:
        return Matrix()
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"strides {x.stride()} of {tuple(x.shape)}: the channels of a row are apart")
    return Matrix(x.data_ptr(), x.stride(0))


def weight(weights: Tensor | None, entry: int) -> Matrix:
    """p of an entry, of [entries], one number for all images, or of [entries, N]."""
    if weights is None:
        return Matrix()
    of_entry = weights[entry]
    return Matrix(numbers(of_entry), of_entry.dim())


def numbers(x: Tensor | None) -> int:
    """Weights, gradients or positions, one behind the other."""
    if x is None:
        return 0
    if not x.is_contiguous():
        raise ValueError(f"strides {x.stride()} of {tuple(x.shape)} are not those of contiguous memory")
    return x.data_ptr()


def reader(read: types.Reader | types.SecondReader, tangent_sums: Tensor | None = None) -> Reader:
    """The structure of a reader; `tangent_sums` [3, C] are those that the tangent sweep writes for it."""
    second = read if isinstance(read, types.SecondReader) else types.SecondReader(read, *[None] * 4)  # type: ignore[arg-type]
    first = second.first

    def sums_of(sums: Tensor | None) -> Matrix:
        return rows(None if sums is None else sums[:, first.index])

    return Reader(
        y=pixels(first.y),
        statistics=rows(first.statistics),
        adjoint=pixels(first.adjoint),
        sums=sums_of(first.sums),
        weight=weight(first.weights, first.index),
        gamma=numbers(first.gamma),
        tangent=pixels(second.tangent),
        tangent_sums=sums_of(second.tangent_sums) if tangent_sums is None else rows(tangent_sums),
        second=pixels(second.adjoint),
        second_sums=sums_of(second.sums),
    )
