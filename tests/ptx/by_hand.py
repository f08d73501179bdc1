"""PTX written by hand, for the tests of the executor."""

from typing import NamedTuple

import numpy as np
import torch

from ptx import machine
from ptx.memory import Memory
from ptx.parse import parse

HEAD = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry by_hand({parameters})
.reqntid {threads}
{{
    .reg .pred %p<99>;
    .reg .b16 %rs<99>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
    .loc 1 7 0
"""


class Launch(NamedTuple):
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: tuple[bytes, ...]


def run(
    body: str, *tensors: torch.Tensor, threads: int = 32, blocks: int = 1, shared: int = 0, seed: int = 0
):
    """Runs `body`, the parameters p0, p1, ... of which are pointers to tensors. %r0 is the thread in its
    block, %r1 the block's x; %rd0, %rd1, ... are the pointers."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(len(tensors)))
    pointers = "".join(f"ld.param.b64 %rd{i}, [p{i}];\n" for i in range(len(tensors)))
    text = (
        HEAD.format(parameters=parameters, threads=threads) + "mov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\n"
    )
    text = '.file 1 "by_hand.py"\n' + text + pointers + body.replace(";", ";\n") + "\nret;\n}\n"
    memory = Memory()
    for i, tensor in enumerate(tensors):
        memory.add_tensor(tensor, f"tensor {i}")
    addresses = tuple(tensor.data_ptr().to_bytes(8, "little") for tensor in tensors)
    grid = (blocks, 1, 1) if isinstance(blocks, int) else blocks
    launch = Launch(grid, (threads, 1, 1), shared, addresses)
    machine.run(parse(text), launch, memory, seed)


PREFIXES = {16: "%rs", 32: "%r", 64: "%rd"}


def registers(sizes: list[int], start: int) -> list[str]:
    return [f"{PREFIXES[size]}{start + i}" for i, size in enumerate(sizes)]


def compute(instruction: str, inputs: list[np.ndarray], outputs: list[type]) -> list[np.ndarray]:
    """What an instruction makes of unsigned inputs [n], n a multiple of 32, and bool for predicates; {0},
    {1}, ... of its text are the outputs and then the inputs."""
    count = len(inputs[0])
    given = [np.ascontiguousarray(x.astype(np.uint16) if x.dtype == bool else x) for x in inputs]
    results = [np.zeros(count, np.uint16 if t is bool else t) for t in outputs]
    arrays = results + given
    kinds = list(outputs) + [bool if x.dtype == bool else x.dtype.type for x in inputs]
    names, loads, stores = [], "", ""
    for i, (array, kind) in enumerate(zip(arrays, kinds, strict=True)):
        bits = 8 * array.itemsize
        holder = f"{PREFIXES[bits]}{20 + i}"
        names.append(f"%p{20 + i}" if kind is bool else holder)
        place = f"mad.wide.u32 %rd{50 + i}, %r2, {array.itemsize}, %rd{i};\n"
        if i < len(results):
            taken = f"selp.b16 {holder}, 1, 0, {names[i]};\n" if kind is bool else ""
            stores += place + taken + f"st.global.b{bits} [%rd{50 + i}], {holder};\n"
        else:
            loads += place + f"ld.global.b{bits} {holder}, [%rd{50 + i}];\n"
            loads += f"setp.ne.b16 {names[i]}, {holder}, 0;\n" if kind is bool else ""
    threads = next(n for n in (256, 32) if count % n == 0)
    body = f"mad.lo.s32 %r2, %r1, {threads}, %r0;\n{loads}{instruction.format(*names)};\n{stores}"
    tensors = [torch.from_numpy(array) for array in arrays]
    run(body, *tensors, threads=threads, blocks=count // threads)
    return [x.astype(bool) if t is bool else x for x, t in zip(results, outputs, strict=True)]
