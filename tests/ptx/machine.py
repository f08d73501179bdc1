"""Runs a program of PTX: all threads of several blocks at once, as vectors, with a mask where they diverge."""

from typing import Protocol

from ptx.memory import Memory
from ptx.parse import Program, Where


class Launch(Protocol):
    """What `run` needs of a launch; a `cuda_stand_in.Record` has it."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes, dynamic
    parameters: tuple[bytes, ...]


class Fault(Exception):
    """A program did what it must not do.

    `kind` is one of KINDS; `where` the line of Python, `thread` the number of the thread in its block, `block`
    the block's place in the grid, `address` that in the space of the access (or None).
    """

    KINDS = (
        "misaligned",
        "out of bounds",  # of the tensor of the pointer, or of shared memory
        "never written",  # a register or shared memory was read
        "barrier",  # that not all threads reach
        "race",
        "unknown instruction",
    )

    def __init__(
        self,
        kind: str,
        kernel: str,
        where: Where | None,
        thread: int | None,
        block: tuple[int, int, int] | None,
        address: int | None,
        detail: str,
    ):
        assert kind in self.KINDS, kind
        self.kind, self.kernel, self.where = kind, kernel, where
        self.thread, self.block, self.address, self.detail = thread, block, address, detail
        super().__init__(
            f"{kind}: {detail}; kernel {kernel}, {where}, thread {thread} of block {block}"
            + ("" if address is None else f", address {address:#x}")
        )


def run(program: Program, launch: Launch, memory: Memory, seed: int = 0) -> None:
    """Executes every block of a launch. The blocks' order, and how they are interleaved, depend on `seed`.

    Raises:
        Fault: see there.
    """
    raise NotImplementedError
