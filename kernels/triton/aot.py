"""Compiles the Triton kernels without a GPU and says what became of them.

    python -m darts_fast.kernels.triton.aot [--arch sm_80 sm_90 sm_100] [--dtype bfloat16 ...] [--quick]
        [--channels 16] [--kernel NAME ...] [--json F]

Every kernel is compiled as it is launched at the paper's settings: the search (16 channels, 8 layers) and,
but for float64, the training of two derived networks (36 channels, 20 layers), with drop path and without;
with float32 their evaluation, too. The number of images is not compiled in. The launches are those of the
networks' calls on tensors without data.
Printed for each: registers a thread, shared memory, stack and local memory, spill instructions, the
narrowest and widest global loads in bits, tensor-core instructions, and the share of a multiprocessor's
threads that can be resident.
Exits with 1 where a kernel spills, uses local memory or has no room in a multiprocessor. `--quick` takes one
cell with one node. `--channels` takes another search alone: `--quick --channels 144` the last cells of one of
36 channels.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from darts_fast.kernels import triton as backend
from darts_fast.kernels.cell import (
    Cell,
    Convolution,
    Edge,
    FactorizedReduce,
    Half,
    Identity,
    Norm,
    Operation,
    Parameter,
    Pool,
    Sweeps,
)
from darts_fast.kernels.triton import compilation
from darts_fast.kernels.triton.compilation import source, unique
from darts_fast.kernels.triton.launch import Launch
from darts_fast.kernels.types import Call, launches

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARED_MEMORY = {80: 164, 90: 228, 100: 228}  # KiB of a multiprocessor; a block takes 1 KiB besides its own

BATCH = 64

# The edges of a normal and of a reduction cell: (state, node, its operations but `none`)
Edges = tuple[tuple[int, int, tuple[int, ...]], ...]
SEPARABLE, WIDER, DILATED, WIDER_DILATED, MAXIMUM, AVERAGE, SKIP = range(7)


def search(nodes: int) -> tuple[Edges, Edges]:
    candidates = MAXIMUM, AVERAGE, SKIP, SEPARABLE, WIDER, DILATED, WIDER_DILATED
    edges = tuple((state, node, candidates) for node in range(nodes) for state in range(2 + node))
    return edges, edges


def derived(*genotype: tuple[tuple[tuple[int, int], ...], ...]) -> tuple[Edges, Edges]:
    """Of a normal and a reduction cell, each of which has pairs of an operation and a state by node. Those
    that are normalised come first, as in the networks of darts_fast."""
    normal, reduction = (
        tuple(
            (state, node, (name,))
            for node, pairs in enumerate(cell)
            for name, state in sorted(pairs, key=lambda pair: pair[0] in (MAXIMUM, AVERAGE, SKIP))
        )
        for cell in genotype
    )
    return normal, reduction


# DARTS_V2, and one with what it lacks
GENOTYPES = (
    derived(
        (
            ((SEPARABLE, 0), (SEPARABLE, 1)),
            ((SEPARABLE, 0), (SEPARABLE, 1)),
            ((SEPARABLE, 1), (SKIP, 0)),
            ((SKIP, 0), (DILATED, 2)),
        ),
        (
            ((MAXIMUM, 0), (MAXIMUM, 1)),
            ((SKIP, 2), (MAXIMUM, 1)),
            ((MAXIMUM, 0), (SKIP, 2)),
            ((SKIP, 2), (MAXIMUM, 1)),
        ),
    ),
    derived(
        (((WIDER, 0), (DILATED, 1)), ((WIDER_DILATED, 2), (AVERAGE, 1)), ((SKIP, 2), (WIDER_DILATED, 3))),
        (((SEPARABLE, 0), (WIDER, 1)), ((SKIP, 0), (DILATED, 1)), ((WIDER_DILATED, 1), (AVERAGE, 0))),
    ),
)


class Network:
    """The cells of a network as data, and what `Sweeps` has to know of them. `affine`: it is a genotype's,
    whose batch norms have gamma and beta, and whose pools have none."""

    def __init__(self, kinds: tuple[Edges, Edges], channels: int, layers: int, affine: bool):
        self.channels, self.affine, self.parameters = channels, affine, 0
        self.norms: list[int] = []
        self.cells: list[Cell] = []
        before = [3 * channels, 3 * channels]  # the channels of the last two cells' outputs
        halved = False
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3) and layer > 0
            channels *= 2 if reduction else 1
            preprocess0 = self._reduce if halved else self._convolution
            preprocessing = preprocess0(before[-2], channels), self._convolution(before[-1], channels)
            edges = []
            for state, node, names in kinds[int(reduction)]:
                stride = 2 if reduction and state < 2 else 1
                operations = tuple(self._operation(name, channels, stride) for name in names)
                edges.append(Edge(state, node, stride, operations))
            nodes, kind = 1 + edges[-1].node, None if affine else int(reduction)
            self.cells.append(Cell(channels, preprocessing, tuple(edges), tuple(range(2, 2 + nodes)), kind))
            before.append(nodes * channels)
            halved = reduction

    def _operation(self, name: int, c: int, stride: int) -> Operation:
        if name == SKIP:
            return Identity() if stride == 1 else self._reduce(c, c)
        if name in (MAXIMUM, AVERAGE):
            return Pool(int(name == AVERAGE), None if self.affine else self._norm(c))
        kernel = 3 if name in (SEPARABLE, DILATED) else 5
        if name in (DILATED, WIDER_DILATED):
            return Convolution((self._half(c, kernel, stride, 2),))
        return Convolution((self._half(c, kernel, stride), self._half(c, kernel)))

    def _half(self, c: int, kernel: int, stride: int = 1, dilation: int = 1) -> Half:
        depthwise, pointwise = self._weight(c, 1, kernel, kernel), self._weight(c, c, 1, 1)
        return Half(depthwise, pointwise, self._norm(c), stride, dilation)

    def _convolution(self, c: int, k: int) -> Convolution:
        return Convolution((Half(None, self._weight(k, c, 1, 1), self._norm(k)),))

    def _reduce(self, c: int, k: int) -> FactorizedReduce:
        return FactorizedReduce((self._weight(k // 2, c, 1, 1), self._weight(k // 2, c, 1, 1)), self._norm(k))

    def _weight(self, *shape: int) -> Parameter:
        start, self.parameters = self.parameters, self.parameters + math.prod(shape)
        return Parameter(start, shape)

    def _norm(self, channels: int) -> Norm:
        self.norms.append(channels)
        affine = self._weight(2, channels) if self.affine else None
        return Norm(len(self.norms) - 1, affine)

    def calls(
        self,
        dtype: torch.dtype,
        derivatives: int,
        drop_path: bool = False,
        outputs: list[int] | None = None,
    ) -> list[Call]:
        shape = BATCH, 3 * self.channels, 32, 32
        sizes = self.parameters, self.norms
        sweeps = Sweeps(self.cells, [shape], dtype, *sizes, derivatives, drop_path, outputs)
        return [call for of_sweep in sweeps.calls.values() for call in of_sweep]


def supernet_launches(dtype: torch.dtype, quick: bool = False, channels: int = 16) -> list[Launch]:
    """The launches of a search step that differ in anything that is compiled in, with the gradients of the
    weights and without; with float32 also those of an evaluation."""
    layers, nodes = (1, 1) if quick else (8, 4)
    supernet, calls = Network(search(nodes), channels, layers, affine=False), []
    for derivatives in (2, 0) if dtype == torch.float32 and not quick else (2,):
        for call in supernet.calls(dtype, derivatives):
            calls.append(call)
            if call.writes.get("gradients") is not None:
                calls.append(call._replace(writes={**call.writes, "gradients": None}))
    return unique(launches(backend, calls))


def derived_launches(dtype: torch.dtype) -> list[Launch]:
    """The same of the training of derived networks of 36 channels and 20 layers, with drop path and without,
    and with float32 of their evaluation."""
    calls, variants = [], [(1, True), (1, False)]
    if dtype == torch.float32:
        variants.append((0, False))
    for genotype in GENOTYPES:
        network = Network(genotype, 36, 20, affine=True)
        for derivatives, drop_path in variants:
            for outputs in ([19], [13, 19]):  # without the auxiliary head, and with it
                calls += network.calls(dtype, derivatives, drop_path, outputs)
    return unique(launches(backend, calls))


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
        int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL")
    )
    # LDG.E loads 32 bits, LDG.E.64 and .128 more, .U8 and .U16 less; LDGSTS loads to shared memory.
    widths = [_bits(suffixes) for suffixes in re.findall(r"\bLDG(?:STS)?\.E([\w.]*)", code)] or [0]
    shared = binary.metadata.shared
    return Report(
        planned.name,
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
    constants, dtypes = planned.constants, {t.dtype for t in planned.tensors}
    entries = max((len(v) for v in planned.arguments.values() if isinstance(v, tuple)), default=1)
    narrow = min(dtypes - {torch.uint8, torch.int32}, key=lambda d: d.itemsize)
    flags = [name.lower() for name, value in constants.items() if value is True]
    sizes = [f"{name}{constants[name]}" for name in ("C", "K", "STRIDE") if name in constants]
    return " ".join([str(narrow).removeprefix("torch."), *sizes, f"x{entries}", *flags])


def table(dtypes: list[torch.dtype], quick: bool, channels: int, kernels: list[str] | None) -> list[Launch]:
    found = []
    for dtype in dtypes:
        found += supernet_launches(dtype, quick, channels)
        # float64 is for tests, and no training computes in it.
        if not quick and channels == 16 and dtype != torch.float64:
            found += derived_launches(dtype)
    return [planned for planned in found if kernels is None or planned.name in kernels]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [f"sm_{arch}" for arch in SHARED_MEMORY]
    parser.add_argument("--arch", nargs="+", choices=names, default=names)
    dtypes = {str(d).removeprefix("torch."): d for d in DTYPES}
    parser.add_argument("--dtype", nargs="+", choices=list(dtypes), default=list(dtypes))
    parser.add_argument("--quick", action="store_true", help="one cell and one node only")
    parser.add_argument(
        "--channels", type=int, default=16, metavar="C", help="those of another search, without trainings"
    )
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
    planned = table([dtypes[d] for d in args.dtype], args.quick, args.channels, args.kernel)
    for kernel in {one.kernel for one in planned}:
        # Made from the parsed source when it is first asked for. `report` asks in threads, and two that parse
        # at once may fail in CPython ("AST constructor recursion depth mismatch", gh-106905).
        _ = kernel.cache_key
    with closing(compilation.compile_ahead(planned, archs, compilation.processes(), report)) as reports:
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
