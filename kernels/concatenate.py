"""Concatenation of channels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Slices:
    """One tensor whose channels are shared out to several mixes of a forward pass. Each writes its result
    into its part in the pass that computes it, and `concatenate` of the results has nothing to move; so with
    their tangents. Only where `backends.second_backward_in_one` says so."""

    def __init__(self, parts: int):
        self._parts = parts
        self._whole: Tensor | None = None
        self._pass: int | None = None  # which pass it is of: the number of a backward one, or -1
        # By part, where the result is that it is or has a copy of. The tensor would be a cycle: its graph
        # holds this.
        self._written: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def part(self, i: int, like: Tensor) -> Tensor:
        """Uninitialised, one part: a tensor such as `like` [N, C, H, W], but for its strides."""
        n, c, height, width = like.shape
        if self._pass != torch._C._current_graph_task_id():  # what a pass that broke off left is given up
            self._pass, self._written = torch._C._current_graph_task_id(), {}
            whole = like.new_empty(n, height, width, self._parts * c)
            self._whole = whole.permute(0, 3, 1, 2)
        return self._whole[:, i * c : (i + 1) * c]

    def outputs(self, i: int, like: Tensor, read: bool) -> list[Tensor]:
        """Uninitialised, what a mix writes: its part, which is its result, or, if something else is to read
        that, before it a tensor of its own. Parts are rows of C in rows of `parts` C values: where a stencil
        reads them, a warp's 128-bit loads of 16 channels of 2 bytes touch 16 cache lines in place of 4."""
        part = self.part(i, like)
        n, c, height, width = like.shape
        own = [like.new_empty(n, height, width, c).permute(0, 3, 1, 2)] if read else []
        self._written[i] = _place([*own, part][0])
        return [*own, part]

    def whole(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The whole, whose parts are these tensors (None: zero): what was not written there is copied."""
        like = next(t for t in tensors if t is not None)
        parts = [self.part(i, like) for i in range(self._parts)]
        for i, (part, t) in enumerate(zip(parts, tensors, strict=True)):
            if t is None:
                part.zero_()
            elif i not in self._written or not _same(self._written[i], _place(t)):
                part.copy_(t)
        whole, self._whole, self._pass, self._written = self._whole, None, None, {}
        return whole


def _place(t: Tensor) -> tuple[torch.UntypedStorage, int]:
    return t.untyped_storage(), t.storage_offset()


def _same(a: tuple[torch.UntypedStorage, int], b: tuple[torch.UntypedStorage, int]) -> bool:
    return a[0]._cdata == b[0]._cdata and a[1] == b[1]


class Place(NamedTuple):
    """Where a mix is to write its result: a part of `slices`, see `Slices.outputs`."""

    slices: Slices
    part: int
    read: bool

    def outputs(self, like: Tensor) -> list[Tensor]:
        return self.slices.outputs(self.part, like, self.read)


def concatenate(tensors: Sequence[Tensor], slices: Slices | None = None) -> Tensor:
    """[N, C_i, H, W] each -> [N, sum of C_i, H, W], channels-last. Differentiable any number of times.

    `torch.cat`, but the tangent of its backward is one concatenation, too: autograd pads every slice with
    zeros and adds them (108 launches and 1.6 GB of a step of the paper's network). With the `slices` that the
    tensors were written to, of equal C_i, nothing is launched.
    """
    return _Concatenate.apply(slices, [t.shape[1] for t in tensors], *tensors)


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, slices: Slices | None, sizes: list[int], *tensors: Tensor | None) -> Tensor:
        ctx.slices, ctx.sizes = slices, sizes
        if slices is not None:
            return slices.whole(tensors)
        like = next(t for t in tensors if t is not None)
        n, _, height, width = like.shape
        given = [
            like.new_zeros(n, size, height, width) if t is None else t
            for t, size in zip(tensors, sizes, strict=True)
        ]
        return torch.cat(given, dim=1).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_Split.apply(g, ctx.slices, ctx.sizes)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, g: Tensor, slices: Slices | None, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.slices, ctx.sizes = slices, sizes
        return tuple(g.contiguous(memory_format=torch.channels_last).split(sizes, dim=1))

    @staticmethod
    def backward(ctx: FunctionCtx, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        return _Concatenate.apply(ctx.slices, ctx.sizes, *tangents), None, None
