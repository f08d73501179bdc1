"""What is executed (execution.py): cases of the kernels, whole steps, and damaged kernels.

Run as a program in the environment of the stand-in for the driver, it calls its functions: a line of JSON on
standard input names one and gives its arguments, a line on standard output answers (see `answer`).
"""

import json
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import sweeps
import torch
import triton.language as tl
from conftest import relative_error
from cuda_stand_in import ARCH
from sweeps import Add, Factorized, FanOut, Genotype, Kind, MaxPool2x2, Mix, Norm, Pool, Sepconv, Shuffle

import darts_fast
from darts_fast.config import SearchConfig, TrainConfig
from darts_fast.derived import network
from darts_fast.kernels import aten, triton
from darts_fast.kernels.backends import using
from darts_fast.kernels.triton import compilation
from darts_fast.kernels.triton.launch import Launch, _counters
from darts_fast.kernels.types import Call, Task, tensors
from darts_fast.search_step import SearchStep
from darts_fast.space import CANDIDATES, Space, edges
from darts_fast.supernet import Supernet
from darts_fast.train_step import TrainStep
from ptx.execution import Execution, unchanged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Every path of the functions, on images of one or two tiles; those which Triton leaves to ATen are left out.
PATHS = {
    name: case
    for name, case in sweeps.CASES.items()
    if not isinstance(case, (Factorized, MaxPool2x2, Shuffle))
}
# At least three programs add to every sum, and the last of them has a tile that is not full.
SEVERAL_PROGRAMS = {
    "halves of several tiles": Sepconv((3, 16, 9, 11), (Kind(3), Kind(3, 2)), norm="batch"),
    "1x1 of several tiles": Sepconv((3, 32, 9, 11), (Kind(0),), outputs=16, in_mix=False),
    "mix of several tiles": Mix((3, 16, 9, 11), (True, False)),
    "norm of several tiles": Norm((3, 16, 9, 11), 2),
    "fan out of several tiles": FanOut((3, 16, 9, 11), (2, 1), (True, False)),
    "pools of several tiles": Pool((3, 16, 9, 11), 1, terms=1),
    "add of several tiles": Add((3, 16, 9, 11), 2),
}
# The widths of the paper's supernet and of derived networks, at which rows are loaded in 128 bits.
WIDTHS = {}
for c in (16, 32, 64):
    shape = (2, c, 6, 7)
    WIDTHS |= {
        f"first halves of {c}": Sepconv(shape, (Kind(3), Kind(5, 2))),
        f"first halves of {c}, stride 2": Sepconv(shape, (Kind(5), Kind(3, 2)), 2, sliced=True),
        f"second halves of {c}": Sepconv(shape, (Kind(3), Kind(5, source=1)), norm="batch", sliced=True),
        f"1x1 of {4 * c} to {c}": Sepconv((2, 4 * c, 6, 7), (Kind(0),), outputs=c, in_mix=False),
        f"factorized reduces of {c}": Sepconv((2, c, 6, 8), sweeps.PAIR * 2, 2, c // 2, 2, sliced=True),
        f"mix of {c}": Mix(shape, (True, False, True, True), "is"),
        f"norm of {c}": Norm(shape, 2),
        f"fan out of {c}": FanOut(shape, (2, 1, 2), (True, True, False), sliced=True),
        f"pools of {c}": Pool(shape, 1, terms=2),
        f"pools of {c}, stride 2": Pool(shape, 2, terms=2),
        f"add of {c}": Add(shape, 3),
    }
for c in (36, 72, 144):
    WIDTHS |= {
        f"genotype of {c}": Genotype((2, c, 5, 6), (Kind(3), Kind(5, 2, 1))),
        f"genotype of {c}, stride 2, no drop path": Genotype(
            (2, c, 6, 8), (Kind(5), Kind(3, 2, 1)), 2, drop_path=False
        ),
        f"pools of {c}": Pool((2, c, 5, 6), 1, terms=1),
    }
    WIDTHS[f"1x1 of {3 * c} to {c}"] = Sepconv((2, 3 * c, 5, 6), (Kind(0),), outputs=c, in_mix=False)
NO_ROOM = {("1x1 of 432 to 144", "float32")}  # in a block of sm_80: its second sweep, of no derived network
# 35 candidates, as the last node of a search has; and tensors wider than a block of channels.
LARGE = {
    "mix of 35": Mix((1, 16, 6, 7), (True, True, False, True, True, True, True) * 5, "is"),
    "halves of 70 channels": Sepconv((1, 70, 3, 3), (Kind(3),), outputs=5, norm="batch"),
    "mix of 130 channels": Mix((1, 130, 3, 3), (True,)),
    "norm of 70 channels": Norm((2, 70, 3, 3), 1),
    "fan out of 70 channels": FanOut((1, 70, 3, 3), (2,), (True,)),
    "pools of 70 channels": Pool((1, 70, 3, 4), 1, terms=1),
    "add of 70 channels": Add((1, 70, 3, 3), 2),
}
CASES = PATHS | SEVERAL_PROGRAMS | WIDTHS | LARGE

# What CI has time for: every path in one of the types, and of the widths those with the most in one kernel.
SHORT = [(name, list(DTYPES)[i % 3]) for i, name in enumerate(PATHS)] + [
    ("second halves of 64", "bfloat16"),
    ("1x1 of 64 to 16", "float16"),
    ("mix of 35", "bfloat16"),
    ("genotype of 36", "bfloat16"),
]


def checked(execution: Execution, name: str, dtype: str) -> list[list]:
    """Checks a case, in which each function is launched twice, in other orders of blocks and warps: to the
    same bits. Returns name and grid of each launch."""
    execution.launched.clear()
    sweeps.check(triton, DTYPES[dtype], CASES[name])
    assert not _counters(torch.device("cpu")).any(), "a counter is not zero"
    return [[planned.name, planned.grid] for planned in execution.launched]


def ordered(execution: Execution, name: str, dtype: str, orders: int) -> list[list]:
    """Checks a case in so many pairs of orders of blocks and warps, which must all give the same bits.
    Returns what `checked` does."""
    execution.launched.clear()
    written = [sweeps.check(triton, DTYPES[dtype], CASES[name]) for _ in range(orders)]
    for other in written[1:]:
        assert all(map(sweeps.same_bits, other, written[0])), "another order of blocks gives other bits"
    return [[planned.name, planned.grid] for planned in execution.launched]


# Whole steps


class CallByCall:
    """Triton's backend; what each call writes is compared with what ATen makes of the same in float64."""

    def __init__(self, dtype: torch.dtype):
        self.bound, self.calls, self.worst = sweeps.BOUNDS[dtype], 0, {}

    def __getattr__(self, function: str) -> Any:
        return getattr(triton, function)

    def program(self, calls: list[Call]) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                twin = Call(call.function, widened(call.reads), widened(call.writes))
                with torch.no_grad():
                    aten.program([twin])()
                triton.program([call])()
                self.calls += 1
                for name in call.writes:
                    pairs = zip(tensors(call.writes[name]), tensors(twin.writes[name]), strict=True)
                    for found, expected in pairs:
                        if name == "gradients" and "tasks" in call.reads:
                            found, expected = (used(t, call.reads["tasks"]) for t in (found, expected))
                        self.compare(f"{call.function}, {name}", found, expected)

        return run

    def compare(self, what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        neither = found.isnan() & expected.isnan()  # wrote it: nobody reads the place
        found, expected = found.masked_fill(neither, 0), expected.masked_fill(neither, 0)
        error = relative_error(found, expected) if expected.any() else float(found.double().norm())
        self.worst[what] = max(self.worst.get(what, 0.0), error)
        assert error <= self.bound, (what, error)


def used(gradients: torch.Tensor, tasks: list[Task]) -> torch.Tensor:
    """Of [tasks, as many as the largest has], without what the others leave."""
    counts = [sum(w.numel() for w in task.weights if w is not None) for task in tasks]
    return torch.cat([row[:count] for row, count in zip(gradients, counts, strict=True)])


def widened(tree: Any) -> Any:
    """Copies, in float64 where they are floats, with the same strides."""

    def copy(t: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if t.is_floating_point() else t.dtype
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t)

    return sweeps.mapped(tree, copy)


COPIES = 8
EVERY_OPERATION = [
    [("sep_conv_3x3", 0), ("dil_conv_3x3", 1)],
    [("sep_conv_5x5", 0), ("max_pool_3x3", 1)],
    [("skip_connect", 0), ("avg_pool_3x3", 1)],
    [("dil_conv_5x5", 0), ("skip_connect", 2)],
]


def search_step(execution: Execution, dtype: str, nodes: int) -> dict[str, Any]:
    """A second-order step of a supernet of three cells, with all candidates on every edge; in float32 its
    gradients are as near to float64's as the reference's rounding allows (tests/test_float32.py)."""
    space = Space(*((tuple(CANDIDATES),) * len(edges(nodes)) for _ in range(2)), nodes)
    torch.manual_seed(0)
    state = Supernet(4, 3, 3, space=space).state_dict()
    batches = [(torch.randn(3, 3, 8, 8), torch.randint(3, (3,))) for _ in range(2)]

    def gradients(
        in_type: torch.dtype, moved: float = 0.0, fused: bool = False, **settings: Any
    ) -> torch.Tensor:
        module = Supernet(4, 3, 3, space=space, fused=fused)
        module.load_state_dict(state)
        with torch.no_grad():
            for w in module.weights().values():
                w *= 1 + moved * torch.randn(w.shape)
        step = SearchStep(module.to(in_type), SearchConfig(fused=fused, **settings))
        step(*((images.to(in_type), labels) for images, labels in batches), 0.025)
        return torch.cat([t.grad.flatten() for t in (*step.alphas.values(), module.flat_weights)])

    return of_step(execution, dtype, gradients)


def training_step(execution: Execution, dtype: str) -> dict[str, Any]:
    """A step of a network of three cells with every operation, with drop path; in float32 as there."""
    concat = range(2, 6)
    genotype = darts_fast.Genotype(EVERY_OPERATION, concat, EVERY_OPERATION, concat)
    torch.manual_seed(0)
    state = network(genotype, 3, 4, 3).state_dict()
    images, labels = torch.randn(3, 3, 8, 8), torch.randint(3, (3,))

    def gradients(
        in_type: torch.dtype, moved: float = 0.0, fused: bool = False, **settings: Any
    ) -> torch.Tensor:
        module = network(genotype, 3, 4, 3, fused=fused)
        module.load_state_dict(state)
        with torch.no_grad():
            for w in module.parameters():
                w *= 1 + moved * torch.randn(w.shape)
        module.drop_path_generator = torch.Generator().manual_seed(1)
        config = TrainConfig(genotype="DARTS_V2", drop_path_prob=0.2, fused=fused, **settings)
        step = TrainStep(module.to(in_type), config)
        module.drop_path_prob.fill_(0.2)
        step.take(images.to(in_type), labels)
        return step.weights.grad.clone()

    return of_step(execution, dtype, gradients)


STEPS = {
    "search": ("search_step", 4),
    "search of one node": ("search_step", 1),
    "training": ("training_step",),
}
SHORT_STEPS = [("search of one node", "float32"), ("training", "bfloat16")]


def of_step(execution: Execution, dtype: str, gradients: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Executes a step, call by call. Returns the numbers of calls and launches, and the largest errors."""
    execution.launched.clear()
    checking = CallByCall(DTYPES[dtype])
    settings = {} if dtype == "float32" else {"amp_dtype": dtype}
    with using(checking):
        found = gradients(torch.float32, fused=True, **settings)
    assert found.isfinite().all()
    if dtype == "float32":
        exact = gradients(torch.float64)
        error, allowed = relative_error(found, exact), 0.0
        for _ in range(COPIES):
            allowed = max(allowed, 2 * relative_error(gradients(torch.float32, moved=6e-8), exact))
            if error <= allowed:
                break
        assert error <= allowed, (error, allowed)
    return {"calls": checking.calls, "launches": len(execution.launched), "worst": checking.worst}


# Damaged kernels

Change = Callable[[Launch, str], str]  # given a launch and its PTX, the PTX that is executed in its place


class Damage(NamedTuple):
    """A change of the PTX that must be found when a case is checked: `found_by` matches the words for it."""

    change: Change
    case: str
    dtype: str
    found_by: str


def replaced(pattern: str, replacement: str = "") -> Change:
    """Everywhere in the PTX; `.` is no end of a line."""
    return lambda planned, ptx: re.sub(pattern, replacement, ptx)


def recompiled(constants: dict[str, Any], aligned: bool = False) -> Change:
    """Compiled with other constants, or told that every tensor is aligned to 16 bytes."""

    def change(planned: Launch, ptx: str) -> str:
        given = compilation.source(
            Launch(
                planned.kernel, planned.grid, planned.arguments, planned.constants | constants, planned.warps
            )
        )
        if aligned:
            for place in given.attrs:
                value = planned.arguments.get(planned.kernel.arg_names[place[0]])
                if isinstance(value, (tuple, torch.Tensor)):
                    given.attrs[place] = [["tt.divisibility", 16]]
        return compilation.compiled(given, planned.warps, ARCH).asm["ptx"]

    return change


def fused_sums(planned: Launch, ptx: str) -> str:
    """Where a thread adds its own product to what another has, it does not round the product."""
    for product, x, y in re.findall(r"fma\.rn\.f32\s+(%r\d+), (%r\d+), (%r\d+), 0f00000000;", ptx):
        shuffled = rf"(shfl\.sync\.bfly\.b32\s+(%r\d+), {product}, [^;]*;[\s\S]*?)"
        added = rf"add\.f32(\s+%r\d+), {product}, \2;"
        ptx = re.sub(shuffled + added, rf"\1fma.rn.f32\3, {x}, {y}, \2;", ptx)
    return ptx


COUNT = r"atom\.global\.gpu\.acq_rel\.add\.u32"
BARRIER = r"bar\.sync\s+0;"
DAMAGES = {
    "no barrier before a program counts itself": Damage(
        replaced(rf"{BARRIER}((?:(?!{BARRIER})[\s\S])*?{COUNT})", r"\1"), "norm of 64", "float32", "race"
    ),
    "a counter left at one": Damage(
        replaced(rf"({COUNT} \S+ \[ (%rd\d+) [\s\S]*?)(@%p\d+ st\.global\.b32 \[ \2 \+ 0 \], {{ (%r\d+) }};)",
                 r"\1mov.b32 \4, 1;\n\t\3"), "norm of several tiles", "float32", "race"
    ),
    "a load without its mask": Damage(
        replaced(r"@%p\d+ (ld\.global\.)", r"\1"), "add of several tiles", "float32", "out of bounds"
    ),
    "a store without its mask": Damage(
        replaced(r"@%p\d+ (st\.global\.)", r"\1"), "add of several tiles", "float32", "out of bounds"
    ),
    "an alignment that is not there": Damage(
        recompiled({}, aligned=True), "norm of several tiles", "float32", "misaligned"
    ),
    "a sum across threads that rounds the product of one and not of the other": Damage(
        fused_sums, "1x1", "float32", "race: threads store different bits"
    ),
    "an accumulator of 2 bytes": Damage(
        recompiled({"ACC": tl.float16}), "add of several tiles", "float32", "AssertionError: ..sum"
    ),
}  # fmt: skip


def damaged(execution: Execution, name: str) -> None:
    """Checks the damage's case; some launch must have changed."""
    damage, changed = DAMAGES[name], []

    def change(planned: Launch, ptx: str) -> str:
        after = damage.change(planned, ptx)
        changed.append(after != ptx)
        return after

    execution.change = change
    try:
        checked(execution, damage.case, damage.dtype)
    finally:
        execution.change = unchanged
        _counters(torch.device("cpu")).zero_()
    assert any(changed), "nothing was damaged"


def uncached(execution: Execution, name: str, dtype: str) -> None:
    """Checks a case whose loads past the first-level cache are made plain ones."""
    execution.change = replaced(r"ld\.global\.cg", "ld.global")
    try:
        checked(execution, name, dtype)
    finally:
        execution.change = unchanged


def answer(line: str, execution: Execution) -> dict[str, Any]:
    name, *arguments = json.loads(line)
    try:
        return {"result": globals()[name](execution, *arguments)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.use_deterministic_algorithms(True)  # memory that an allocation does not write is NaN
    execution = Execution()
    for line in sys.stdin:
        print(json.dumps(answer(line, execution)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
