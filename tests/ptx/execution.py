"""Launches of the Triton kernels, executed on the CPU: Triton compiles each for sm_80, the stand-in for the
driver (cuda_stand_in.py) records what the launcher hands over, and machine.py runs the PTX on the tensors.
"""

from collections.abc import Callable, Iterator

import cuda_stand_in
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend

from darts_fast.kernels.triton.launch import Launch
from ptx import machine
from ptx.memory import Memory
from ptx.parse import parse


class Execution:
    """Every launch of this process, from now on: `Launch.run` computes, and raises what the machine finds.

    `seed` orders blocks and warps of the next launch, and is another one for each; `change` is given a launch
    and its PTX, and returns the PTX that is executed in its place; `launched` are the launches so far.
    """

    def __init__(self, seed: int = 0):
        self.seed, self.launched = seed, []
        self.change: Callable[[Launch, str], str] = unchanged
        self._programs, self._planned, self._error = {}, None, None
        launch = Launch.run

        def run(planned: Launch) -> None:
            self._planned, self._error = planned, None
            launch(planned)
            self.launched.append(planned)
            if self._error is not None:
                raise self._error

        Launch.run = run
        # Half of the time: the machine code, of which the stand-in looks at the first bytes alone.
        CUDABackend.make_cubin = lambda *_: b"\177ELF"
        cuda_stand_in.install(self._execute)

    def _execute(self, record: cuda_stand_in.Record) -> None:
        try:
            self.seed += 1
            ptx = self.change(self._planned, record.code.ptx)
            if ptx not in self._programs:
                self._programs[ptx] = parse(ptx)
            memory = Memory()
            for name, tensor in tensors(self._planned):
                memory.add_tensor(tensor, name)
            machine.run(self._programs[ptx], record, memory, self.seed)
        except Exception as error:  # a callback of C cannot raise
            self._error = error


def unchanged(planned: Launch, ptx: str) -> str:
    return ptx


def tensors(planned: Launch) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a launch by the names of the kernel's parameters, `p_x[1]` of a tuple's."""
    for name, value in planned.arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from (
                (f"{name}[{i}]", tensor) for i, tensor in enumerate(value) if isinstance(tensor, Tensor)
            )
