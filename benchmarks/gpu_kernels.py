"""Sections of gpu_report.py on the Triton kernels: all compiled at once, and each against its roofline."""

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import race
import torch
import traffic
from gpu_bench import Bench, timed

from darts_fast import Genotype, network, profiling
from darts_fast.config import SearchConfig
from darts_fast.kernels.backends import collected, using
from darts_fast.kernels.types import Call, launches
from darts_fast.precision import TYPES, strict_float32
from darts_fast.search_step import SearchStep


def compilation(bench: Bench) -> None:
    """Every Triton kernel of the steps below, compiled on all processors at once into Triton's cache: a step
    alone would compile some 400 kernels one after the other."""
    if not bench.cuda:  # kernels that are to be interpreted are no sources for a compiler
        os.environ.pop("TRITON_INTERPRET", None)
    from darts_fast.kernels.triton.compilation import compile_ahead, processes

    major, minor = torch.cuda.get_device_capability() if bench.cuda else (9, 0)
    count = 1 if bench.quick else processes()
    facts: dict[str, Any] = {"processes": count, "kernels compiled": 0, "failed": []}
    bench.part["facts"] = facts
    started = time.monotonic()
    # In the order in which the other sections launch them.
    kinds = ["float16", "float32", "bfloat16", "training float16", "training float32"]
    for kind in kinds[: 1 if bench.quick else None]:
        planned = launches_to_compile(bench, kind)
        facts[f"{kind}: kernels"] = len(planned)
        with contextlib.closing(
            compile_ahead(planned, [10 * major + minor], count, _error, launchers=bench.cuda)
        ) as jobs:
            for error in jobs:
                facts["failed"] += [error] if error else []
                facts["kernels compiled"] += not error
                facts["seconds"] = round(time.monotonic() - started, 1)
                bench.save()
                if bench.left() < 10:
                    break
        if bench.left() < 10:
            bench.fact("ended for want of time", f"within {kind}; what is left compiles when it is launched")
            break
    if facts["failed"]:
        raise RuntimeError(f"{len(facts['failed'])} kernels were not compiled")


def _error(planned: Any, arch: int, error: str) -> str:
    return error and f"{planned.name}: {error[:500]}"


def launches_to_compile(bench: Bench, kind: str) -> list:
    """Those that differ for the compiler, with activations of a type: of the race (and of smaller batches of
    such images) and of the agreement; or of the training of DARTS_V2."""
    from darts_fast.kernels.triton.compilation import unique

    if kind.startswith("training"):
        found = list(launches_of_a_training(kind.split()[1]))
    else:
        settings = [bench.setting]
        if not bench.quick:
            one = bench.setting
            settings.append(one._replace(batch_size=16, layers=3))
        found = [planned for setting in settings for planned in launches_of_a_step(setting, kind)]
    return unique(found)[: 2 if bench.quick else None]


def launches_of_a_training(dtype: str) -> Iterator[Any]:
    """The Triton launches of a training step of DARTS_V2 at the paper's setting, on meta tensors."""
    return _launches_of(
        traffic.training_step("triton", 96, 36, 20, 32, "meta", TYPES.get(dtype, torch.float32))
    )


def launches_of_a_step(setting: race.Setting, dtype: str) -> Iterator[Any]:
    """The Triton launches of a search step, on meta tensors."""
    wide = TYPES.get(dtype, torch.float32)
    return _launches_of(traffic.search_step("triton", *setting[:4], "meta", wide))


def _launches_of(step: traffic.Step) -> Iterator[Any]:
    with collected() as calls:
        step.take()
    return _launches(calls)


def _launches(calls: list[Call]) -> Iterator[Any]:
    from darts_fast.kernels import triton

    return launches(triton, calls)


def kernels(bench: Bench) -> None:
    """Each launch of a fused step that differs from the others, alone, against its roofline."""
    ceilings = bench.results("environment")
    copy = ceilings.get("copy") or profiling.copy_rate(bench.device)
    if not bench.cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # the interpreter's times say nothing: a dry run
    for dtype in ("float32",) if bench.quick else ("float16", "float32"):
        found = _observed(bench, dtype)
        dot, fma = (ceilings.get("matmul", {}).get(name) for name in (dtype, "float32"))
        rows: list[tuple[Any, int, float, float, str]] = []
        for planned, count in found:
            if bench.left() < 8:
                bench.fact(f"{dtype}: not timed for want of time", len(found) - len(rows))
                break
            seconds = timed(
                partial(_again, planned),
                bench.cuda,
                repeats=5 if bench.cuda else 1,
                inner=10 if bench.cuda else 1,
            )
            depthwise, pointwise = traffic.operations(planned)
            least = {"bytes": planned.bytes / copy}
            if dot and fma:
                least["operations"] = depthwise / fma + pointwise / dot
            bound = max(least, key=least.__getitem__)
            rows.append((planned, count, seconds, least[bound] / seconds, bound))
        rows.sort(key=lambda row: row[1] * row[2], reverse=True)
        bench.part.setdefault("rooflines", {})[dtype] = [
            (p.name, count * seconds, share) for p, count, seconds, share, _ in rows
        ]
        bench.fact(
            f"{dtype}: launches that differ", f"{len(found)}, in all {sum(n for _, n in found)} a step"
        )
        bench.fact(f"{dtype}: ms a step, each alone", f"{1e3 * sum(n * s for _, n, s, *_ in rows):.2f}")
        header = ["kernel", "ms a step", "launches", "us, of the slowest", "of its roofline", "bound by"]
        by_kernel: dict[str, list] = {}
        for row in rows:
            by_kernel.setdefault(row[0].name, []).append(row)
        summed = []
        for name, own in by_kernel.items():
            total = sum(n * s for _, n, s, *_ in own)
            share = sum(n * s * r for _, n, s, r, _ in own) / total
            launches, slowest = sum(n for _, n, *_ in own), max(s for _, _, s, *_ in own)
            bound = max(("bytes", "operations"), key=lambda b: sum(n * s for _, n, s, _, x in own if x == b))
            summed.append(
                [name, f"{1e3 * total:.3f}", str(launches), f"{1e6 * slowest:.1f}", f"{share:.0%}", bound]
            )
        bench.table(f"{dtype}, by kernel", header, summed)
        header = ["launch", "grid", "a step", "us", "MB", "GB/s", "of its roofline", "bound by"]
        header += ["registers", "spills"]
        shown = [
            [
                _label(p), "x".join(map(str, p.grid)), str(count), f"{1e6 * seconds:.1f}",
                f"{p.bytes / 1e6:.2f}", f"{p.bytes / seconds / 1e9:.0f}", f"{share:.0%}", bound,
                *_compiled(p),
            ]
            for p, count, seconds, share, bound in rows[:30]
        ]  # fmt: skip
        bench.table(f"{dtype}, the 30 launches with most time in a step", header, shown)


def _observed(bench: Bench, dtype: str) -> list[tuple[Any, int]]:
    """(launch, how often) of the launches of a step that differ, on this device."""
    from darts_fast.kernels import triton

    setting = bench.setting
    with strict_float32(), using(triton), collected() as calls:
        if bench.quick:  # an evaluation of the smallest genotype, under the interpreter
            node = [[("max_pool_3x3", 0)]]
            module = network(Genotype(node, [2], node, [2]), 10, 2, 3, 3, fused=True).eval()
            with torch.no_grad():
                module(torch.randn(1, 3, 8, 8))
        else:
            supernet = race.supernet(setting.init_channels, setting.layers, True, torch.float32)
            pair = race.batches(setting.batch_size, setting.size, torch.float32)
            train, validation = ((x.to(bench.device), y.to(bench.device)) for x, y in pair)
            config = SearchConfig(fused=True, amp_dtype=None if dtype == "float32" else dtype)
            SearchStep(supernet.to(bench.device), config)(train, validation, race.LR)
    found: dict[tuple, list] = {}
    for planned in _launches(calls):
        key = planned.name, planned.grid, str(planned.constants)
        found.setdefault(key, [planned, 0])[1] += 1
    return [(planned, count) for planned, count in found.values()]


def _again(planned: Any) -> Any:
    """Launches it; the compiled kernel."""
    return planned.kernel[planned.grid](**planned.arguments, **planned.constants, num_warps=planned.warps)


def _compiled(planned: Any) -> list[str]:
    """Registers a thread and spills; empty where the launcher does not tell."""
    found = _again(planned)
    return [str(getattr(found, name, "")) for name in ("n_regs", "n_spills")]


def _label(planned: Any) -> str:
    from darts_fast.kernels.triton import aot

    return f"{planned.name} {aot.setting(planned)}"
