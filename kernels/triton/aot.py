"""Compiles the Triton kernels without a GPU and says what became of them.

    python -m darts_fast.kernels.aot [--arch sm_80 sm_90 sm_100] [--dtype bfloat16 ...] [--quick]
        [--kernel NAME ...] [--json F]

Every kernel is compiled as the launchers launch it at the paper's settings: the search (16 channels, 8
layers) and, but for float64, the training of a derived network (36 channels, 20 layers); the number of images
is not compiled in. The launches are recorded from the backend's own functions, run on tensors without data.
Printed for each: registers a thread, shared memory, stack and local memory, spill instructions, the
narrowest and widest global loads in bits, tensor-core instructions, and the share of a multiprocessor's
threads that can be resident.
Exits with 1 where a kernel spills, uses local memory or has no room in a multiprocessor. `--quick` takes the
search at 16 channels and one task list.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from darts_fast.kernels import Slices, compilation, triton_backend
from darts_fast.kernels.compilation import source, unique
from darts_fast.kernels.handover import Link, Reader
from darts_fast.kernels.sepconv import owns_of, parts
from darts_fast.kernels.torch_backend import Normalizer, Task
from darts_fast.kernels.triton_launch import Launch, observed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARED_MEMORY = {80: 164, 90: 228, 100: 228}  # KiB of a multiprocessor; a block takes 1 KiB besides its own

# The stages of the paper's supernet: nodes' channels and image size, and the channels that preprocessing
# reads (the stem's 48; the cells before have 4 times their nodes' channels).
STAGES = ((16, 32, (48, 64)), (32, 16, (64, 128)), (64, 8, (128, 256)))
BATCH = 64

NODES = (14, 21, 28, 35)  # candidates of a cell's nodes: seven an edge, and an edge from every state before

# The same of a derived network of 36 channels.
DERIVED_STAGES = ((36, 32, (108, 144)), (72, 16, (144, 288)), (144, 8, (288, 576)))


def supernet_launches(dtype: torch.dtype, quick: bool = False) -> list[Launch]:
    """The launches of a search step that differ in anything that is compiled in."""
    found: list[Launch] = []
    with observed(found.append), torch.device("meta"):
        for c, size, wide in STAGES[: 1 if quick else None]:
            states = (4,) if quick else (4, 3, 2, 1, 0)
            for state in states:
                _convolutions(dtype, c, size, state, stride=1)
                _spread(dtype, c, size, state, stride=1)
                if c > 16 and state < 2:  # of a reduction cell
                    _convolutions(dtype, c, 2 * size, state, stride=2)
                    _spread(dtype, c, size, state, stride=2)
            for channels in wide:
                before = 2 * size if channels == 2 * c else size  # of a reduction cell, or a normal one
                _sepconv([_image(dtype, channels, before)], [Task()], [None], c, readers=[(1, 0)])
            if c > 16:
                halved = [Task(stride=2), Task(stride=2, offset=1)]
                # Skips; preprocessing.
                for channels, readers in ((c, _places(0, 2)), (c, _places(1, 2)), (2 * c, [(1, 0)])):
                    tasks = halved * len(readers)
                    source = [_image(dtype, channels, 2 * size)]
                    _sepconv(source, tasks, [None] * len(tasks), c // 2, readers=readers, join=2)
            for stride in (1, 2) if c > 16 else (1,):
                _pool(_image(dtype, c, size * stride), stride)
            for count in (1,) if quick else (1, *NODES):
                for reduction in (False, True) if c > 16 and count > 1 else (False,):
                    _mix(dtype, c, size, count, reduction)
    return unique(found)


def derived_launches(dtype: torch.dtype) -> list[Launch]:
    """The same of a training step of a derived network that has every operation of the search space. It calls
    the kernels once an operation, without links: its batch norms are affine."""
    found: list[Launch] = []
    with observed(found.append), torch.device("meta"):
        for c, size, wide in DERIVED_STAGES:
            for stride in (1, 2) if c > 36 else (1,):  # 2: states 0 and 1 of a reduction cell
                x = _image(dtype, c, stride * size)
                for kernel, dilation in ((3, 1), (5, 1), (3, 2), (5, 2)):
                    _trained(x, [Task(0, stride, dilation)], kernel, c)
                maximum, average, position, _ = triton_backend.pool_forward(x, stride)
                triton_backend.pool_backward(x, position, stride, maximum, average)
            for channels in wide:
                _trained(_image(dtype, channels, size), [Task()], None, c)
            if c > 36:
                _trained(_image(dtype, 2 * c, 2 * size), [Task()], None, c)
                halves = [Task(stride=2), Task(stride=2, offset=1)]
                for channels in (c, 2 * c):  # skips; preprocessing
                    _trained(_image(dtype, channels, 2 * size), halves, None, c // 2)
    return unique(found)


def _trained(x: Tensor, tasks: list[Task], kernel: int | None, k: int) -> None:
    """The first two sweeps; two tasks are side by side."""
    c, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    depthwise = [None if kernel is None else torch.empty(c, 1, kernel, kernel, dtype=wide) for _ in tasks]
    arguments = [x], [None], tasks, depthwise, [torch.empty(k, c, 1, 1, dtype=wide) for _ in tasks]
    outputs, _ = triton_backend.sepconv_forward(*arguments, len(tasks))
    triton_backend.sepconv_backward(*arguments, parts(outputs, len(tasks)), True)


def _image(dtype: torch.dtype, c: int, size: int) -> Tensor:
    return torch.empty(BATCH, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _normalizer(dtype: torch.dtype, c: int) -> Normalizer:
    return Normalizer(torch.empty(3, c, dtype=torch.promote_types(dtype, torch.float32)), True)


def _places(state: int, *candidates: int) -> list[tuple[int, int]]:
    """How many candidates the node has that each edge from a state goes to, and which of them is the edge's
    so-manieth: pools, skip, separable, dilated."""
    return [(count, 7 * state + i) for count in NODES[max(0, state - 1) :] for i in candidates]


def _weights(dtype: torch.dtype, count: int) -> Tensor:
    """p of a node; its place in memory is where the fused cell has it."""
    wide = torch.promote_types(dtype, torch.float32)
    by_node = dict(zip(NODES, torch.empty(sum(NODES), dtype=wide).split(NODES), strict=True))
    return by_node.get(count, torch.empty(1, dtype=wide))


def _adjoint(like: Tensor, candidates: int) -> Tensor:
    """G of a node of so many candidates: the last node's is a slice of the cell's."""
    if candidates != NODES[-1]:
        return like
    c = like.shape[1]
    return _image(like.dtype, len(NODES) * c, like.shape[2])[:, -c:]


def _convolutions(dtype: torch.dtype, c: int, size: int, state: int, stride: int) -> None:
    edges = len(_places(state, 0))
    tasks = [Task(0, stride, dilation) for dilation in (1, 1, 2, 2)] * edges
    # The dilated ones go to a mix, the separable ones to their second halves.
    halves, dilated = [(-2 * edges, i) for i in range(2 * edges)], _places(state, 5, 6)
    readers = [of_one for i in range(0, 2 * edges, 2) for of_one in (*halves[i : i + 2], *dilated[i : i + 2])]
    _sepconv([_image(dtype, c, size)], tasks, [3, 5, 3, 5] * edges, c, None, readers)
    if stride == 1:
        count = 2 * edges
        _sepconv(
            [_image(dtype, c, size) for _ in range(count)],
            [Task(i) for i in range(count)],
            [3, 5] * edges,
            c,
            [_normalizer(dtype, c) for _ in range(count)],
            _places(state, 3, 4),
        )


def _sepconv(
    sources: list[Tensor],
    tasks: list[Task],
    kernels: list[int | None],
    k: int,
    norms: list[Normalizer] | None = None,
    readers: Sequence[tuple[int, int]] = (),
    join: int = 1,
) -> None:
    """`readers`: how many candidates the node has that each output goes to by a link (negative: how many
    sources the second halves have), and which of them it is."""
    c, wide = sources[0].shape[1], torch.promote_types(sources[0].dtype, torch.float32)
    depthwise = [None if s is None else torch.empty(c, 1, s, s, dtype=wide) for s in kernels]
    pointwise = [torch.empty(k, c, 1, 1, dtype=wide) for _ in tasks]
    arguments = sources, norms or [None] * len(sources), tasks, depthwise, pointwise
    outputs, statistics = triton_backend.sepconv_forward(*arguments, join)
    owns = []
    for y, found, (candidates, place) in zip(outputs, statistics, readers, strict=True):
        link = Link()
        link.weights = _weights(y.dtype, candidates) if candidates > 0 else None
        link.index = place
        link.norm = Normalizer(found, True)
        link.tangent_sums = found.new_empty(4, abs(candidates), join * k)
        link.sums = found.new_empty(2, abs(candidates), join * k)
        owns += owns_of(link, y, join)
    source_links = [Link() for _ in sources] if norms else []
    adjoints = [_adjoint(y, candidates) for y, (candidates, _) in zip(outputs, readers, strict=True)]
    adjoints = parts(adjoints, join)
    for weight_gradients in (True, False):
        triton_backend.sepconv_backward(*arguments, adjoints, weight_gradients, owns, source_links)
    yd, left = triton_backend.sepconv_tangent_forward(
        *arguments,
        adjoints,
        sources,
        depthwise,
        pointwise,
        owns,
        join,
        source_links,
        sources[: len(source_links)],
    )
    triton_backend.sepconv_second(*arguments, adjoints, left)


def _pool(x: Tensor, stride: int) -> None:
    maximum, average, position, _ = triton_backend.pool_forward(x, stride)
    triton_backend.pool_backward(x, position, stride, maximum, average)
    triton_backend.pool_tangent(x, position, stride)


def _mix(dtype: torch.dtype, c: int, size: int, count: int, reduction: bool) -> None:
    """A node of so many candidates; of one: batch norm."""
    y = [_image(dtype, c, size) for _ in range(count)]
    # Only the stride-1 skip has no batch norm.
    without = range(16 if reduction else 2, count, 7)
    norms = [None if i in without else _normalizer(dtype, c) for i in range(count)]
    p = _weights(dtype, count)
    outputs = Slices(len(NODES)).outputs(NODES.index(count), y[0], count < NODES[-1]) if count > 1 else ()
    triton_backend.mix_forward(y, norms, p, outputs)
    links, g = [Link() for _ in y] if count > 1 else [None], _adjoint(y[0], count)
    _, sums, _ = triton_backend.mix_backward(y, norms, p, g, links)
    _, left = triton_backend.mix_tangent_forward(y, norms, p, g, sums, y, outputs=outputs)
    triton_backend.mix_second(y, norms, p, g, left, links)
    if count > 1:
        triton_backend.add(y[: count // 7])


def _spread(dtype: torch.dtype, c: int, size: int, state: int, stride: int) -> None:
    pools, norms = [_image(dtype, c, size) for _ in range(2)], [_normalizer(dtype, c) for _ in range(2)]
    x, wide = _image(dtype, c, stride * size), torch.promote_types(dtype, torch.float32)
    # The adjoints of the convolutions and factorized reduces; of the cell's output, where a state is in it.
    terms = [x, x] if stride > 1 else [x] if state < 2 else [_image(dtype, 4 * c, size)[:, :c], x]
    readers = [
        Reader(
            _adjoint(_image(dtype, c, size), count),
            torch.empty(2, count, c, dtype=wide),
            _weights(dtype, count),
            tuple(range(place, place + (3 if stride == 1 else 2))),
        )
        for count, place in _places(state, 0)
    ]
    tensors, norms = ([*pools, x], [*norms, None]) if stride == 1 else (pools, norms)
    found = triton_backend.spread_backward(tensors, norms, readers)
    sums = [torch.empty(4, reader.sums.shape[1], c, dtype=wide) for reader in readers]
    tangents = [*pools, None][: len(tensors)]
    triton_backend.spread_second(tensors, norms, readers, readers[:], tangents, sums)
    position = torch.empty_like(pools[0], dtype=torch.int8)
    triton_backend.pool_backward(x, position, stride, *found[:2], [*found[2:], *terms])


# Compilation


class Report(NamedTuple):
    """What became of a kernel: registers a thread; bytes; instructions; bits; a share."""

    kernel: str
    setting: str
    arch: str
    registers: int
    shared: int
    stack: int
    local: int
    spills: int
    narrowest_load: int
    widest_load: int
    tensor_core: int
    occupancy: float


def report(planned: Launch, arch: int, _: str = "") -> Report:
    """Compiles for sm_<arch>, or finds it compiled, and reads the machine code."""
    binary = compilation.compiled(source(planned), planned.warps, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")
    )
    # LDG.E loads 32 bits, LDG.E.64 and .128 more, .U8 and .U16 less; LDGSTS loads to shared memory.
    widths = [_bits(suffixes) for suffixes in re.findall(r"\bLDG(?:STS)?\.E([\w.]*)", code)] or [0]
    shared = binary.metadata.shared
    return Report(
        planned.kernel.fn.__name__,
        setting(planned),
        f"sm_{arch}",
        registers,
        shared,
        stack,
        local,
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        min(widths),
        max(widths),
        len(re.findall(r"\b(?:HMMA|DMMA|HGMMA|UTC\w*MMA)\b", code)),
        occupancy(registers, shared, planned.warps, arch),
    )


def _bits(suffixes: str) -> int:
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", suffixes)
    return int(found.group(1)) if found else 32


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def occupancy(registers: int, shared: int, warps: int, arch: int) -> float:
    """Resident threads of a multiprocessor over its 2,048: 65,536 registers, given out by 256 to a warp."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_MEMORY[arch] * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 2048 // (32 * warps), 32) * 32 * warps / 2048


def setting(planned: Launch) -> str:
    """What tells this compilation from the kernel's others, in short."""
    constants, dtypes = planned.constants, {t.dtype for t in planned.tensors()}
    entries = max((len(v) for v in planned.arguments.values() if isinstance(v, tuple)), default=1)
    narrow = min(dtypes - {torch.int8, torch.int32}, key=lambda d: d.itemsize)
    flags = [name.lower() for name, value in constants.items() if value is True]
    sizes = [f"{name}{constants[name]}" for name in ("C", "K", "STRIDE") if name in constants]
    return " ".join([str(narrow).removeprefix("torch."), *sizes, f"x{entries}", *flags])


def table(dtypes: list[torch.dtype], quick: bool, kernels: list[str] | None) -> list[Launch]:
    launches = []
    for dtype in dtypes:
        launches += supernet_launches(dtype, quick)
        if not quick and dtype != torch.float64:  # float64 is for tests, and no training computes in it
            launches += derived_launches(dtype)
    return [planned for planned in launches if kernels is None or planned.kernel.fn.__name__ in kernels]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [f"sm_{arch}" for arch in SHARED_MEMORY]
    parser.add_argument("--arch", nargs="+", choices=names, default=names)
    dtypes = {str(d).removeprefix("torch."): d for d in DTYPES}
    parser.add_argument("--dtype", nargs="+", choices=list(dtypes), default=list(dtypes))
    parser.add_argument("--quick", action="store_true", help="16 channels and one task list only")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these kernels")
    parser.add_argument("--json", metavar="F", help="write the table there too")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET is set: the interpreter's kernels cannot be compiled", file=sys.stderr)
        return 2
    print(
        f"{'arch':<7}{'regs':>5}{'shared':>8}{'stack':>6}{'local':>6}{'spill':>6}{'loads':>9}{'mma':>5}{'occ':>5}"
        "  kernel"
    )
    found = []
    archs = [int(arch[3:]) for arch in args.arch]
    launches = table([dtypes[d] for d in args.dtype], args.quick, args.kernel)
    with closing(compilation.compile_ahead(launches, archs, compilation.processes(), report)) as reports:
        for r in reports:
            found.append(r)
            print(
                f"{r.arch:<7}{r.registers:>5}{r.shared:>8}{r.stack:>6}{r.local:>6}{r.spills:>6}"
                f"{f'{r.narrowest_load}-{r.widest_load}':>9}{r.tensor_core:>5}{r.occupancy:>5.0%}"
                f"  {r.kernel} {r.setting}",
                flush=True,
            )
    bad = [r for r in found if r.spills or r.local or not r.occupancy]
    print(f"{len(found)} compilations, {len(bad)} with spills, local memory or no room for a block")
    if args.json:
        result = {"triton": triton.__version__, "kernels": [r._asdict() for r in found]}
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
