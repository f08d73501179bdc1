"""One command for a machine with a GPU: everything that is to be known of it, in so many minutes.

    python benchmarks/gpu_report.py --minutes 8 --out DIR [--data_path P]
    python benchmarks/gpu_report.py --device cpu --quick --out DIR     (a dry run of every section)

Sections, most important first: the environment and the measured ceilings (copy, matrix products, launches);
the Triton kernels compiled on all processors at once; fused against the reference in float32, TF32, bfloat16
and float16, captured against uncaptured, determinism; one second-order step, every variant (step.py); every
kernel against its roofline; the captured step's time line; the CIFAR-10 search and the training of DARTS_V2,
projected from timed steps and then, in what time is left, whole epochs; the GPU tests; torch.compile. Real
images from `--data_path`, without it random ones of the same size.

DIR gets report.md, report.json, three pictures and profile/ (8 files). Each section runs in a process of its
own with a limit: what fails, hangs or crashes leaves its error and what it had measured in the report, which
is written anew every few seconds, and the next section runs. A section takes the time that it needs, also
where no kernel was ever compiled, before a later one has any: there the last ones may be left out, and
`--only tests torch.compile` runs them afterwards. Exits with 1 if any failed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import draw  # noqa: E402
import step as race  # noqa: E402
import traffic  # noqa: E402

from darts_fast import profiling  # noqa: E402
from darts_fast.config import SearchConfig, TrainConfig  # noqa: E402
from darts_fast.data import Dataset  # noqa: E402
from darts_fast.kernels.backends import collected, using  # noqa: E402
from darts_fast.kernels.types import Call, launches  # noqa: E402
from darts_fast.precision import FIRST_LOSS_SCALE, TYPES, strict_float32  # noqa: E402
from darts_fast.search import SearchStep  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# Nothing here asks for CUDA when it is imported: each section is a fork of this process.

Part = dict[str, Any]  # what a section has found so far; it is written by `save`


class Bench:
    """What a section is given: the arguments, the device, the setting, and its part of the report."""

    def __init__(self, args: argparse.Namespace, path: Path, seconds: float):
        self.args, self.path, self.end = args, path, time.monotonic() + seconds
        self.device, self.quick = torch.device(args.device), args.quick
        self.cuda = self.device.type == "cuda"
        self.setting = race.Setting(2, 4, 3, 8, 1) if args.quick else race.Setting(64, 16, 8, 32, 1)
        self.part: Part = {}

    def left(self) -> float:
        """Seconds until the section is stopped."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Whole or not at all: the section may be killed while it writes."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.part))
        part.replace(self.path)

    def table(self, name: str, header: list[str], rows: list[list[str]]) -> None:
        self.part.setdefault("tables", {})[name] = [header, rows]
        self.save()

    def fact(self, name: str, value: object) -> None:
        self.part.setdefault("facts", {})[name] = value
        self.save()

    def results(self, section: str) -> Part:
        """What an earlier section found: {} where it found nothing."""
        path = self.path.with_name(f"{section}.json")
        return json.loads(path.read_text()) if path.exists() else {}


# Sections


def environment(bench: Bench) -> None:
    """Device, versions, and the ceilings that everything is measured against."""
    for name, value in race.environment(bench.device).items():
        bench.fact(name, value)
    if bench.cuda:
        import triton

        properties = torch.cuda.get_device_properties(0)
        bench.fact("triton", triton.__version__)
        bench.fact("cuda", torch.version.cuda)
        bench.fact("capability", f"sm_{properties.major}{properties.minor}")
        bench.fact("multiprocessors", properties.multi_processor_count)
        bench.fact("memory, GiB", round(properties.total_memory / 2**30, 1))
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = "driver_version,clocks.sm,clocks.mem,power.limit,utilization.gpu,memory.used"
            command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=20)
            bench.fact(f"nvidia-smi ({asked})", found.stdout.strip().replace("\n", "; "))
    bench.fact("processors", os.cpu_count())
    from darts_fast import kernels

    bench.fact("kernels of float32", kernels.used(bench.device, torch.float32))
    bench.part["copy"] = profiling.copy_rate(bench.device)
    bench.fact("copy, GB/s read and written", f"{bench.part['copy'] / 1e9:.1f}")
    bench.part["matmul"] = {}
    side = 128 if bench.quick else 8192 if bench.cuda else 1024
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("float16", torch.float16, False),
        ("bfloat16", torch.bfloat16, False),
    ):
        if (tf32 or dtype != torch.float32) and not bench.cuda:
            continue
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        seconds = timed(lambda a=a, b=b: a @ b, bench.cuda, repeats=5, inner=2)
        torch.backends.cuda.matmul.allow_tf32 = False
        bench.part["matmul"][name] = 2 * side**3 / seconds
        bench.fact(f"matrix product {side}^3, {name}, TFLOP/s", f"{2 * side**3 / seconds / 1e12:.3g}")
    x = torch.zeros(1, device=bench.device)
    start, count = time.perf_counter(), 2000
    for _ in range(count):
        x.add_(1)
    float(x)
    bench.fact(
        "a small operation launched by PyTorch, us", f"{1e6 * (time.perf_counter() - start) / count:.1f}"
    )


def compilation(bench: Bench) -> None:
    """Every Triton kernel of the steps below, compiled on all processors at once into Triton's cache: a step
    alone would compile some 400 kernels one after the other."""
    if not bench.cuda:  # kernels that are to be interpreted are no sources for a compiler
        os.environ.pop("TRITON_INTERPRET", None)
    from darts_fast.kernels.triton.compilation import compile_ahead, processes

    major, minor = torch.cuda.get_device_capability() if bench.cuda else (9, 0)
    count = 1 if bench.quick else processes()
    bench.part["facts"] = facts = {"processes": count, "kernels compiled": 0, "failed": []}
    started = time.monotonic()
    # In the order in which the sections below launch them.
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
        found = launches_of_a_training(kind.split()[1])
    else:
        settings = [bench.setting]
        if not bench.quick:
            one = bench.setting
            settings.append(one._replace(batch_size=16, layers=3))
        found = [planned for setting in settings for planned in launches_of_a_step(setting, kind)]
    return unique(found)[: 2 if bench.quick else None]


def launches_of_a_training(dtype: str) -> Iterator[Any]:
    """The Triton launches of a training step of DARTS_V2 at the paper's setting, on meta tensors."""
    from darts_fast import load_genotype, network

    with torch.device("meta"):
        module = network(load_genotype("DARTS_V2"), 10, 36, 20, auxiliary=True, fused=True)
        images = torch.zeros(96, 3, 32, 32)
    with collected() as calls:
        outputs = module(images, TYPES.get(dtype))
        torch.autograd.grad([y.sum() for y in outputs], list(module.parameters()), materialize_grads=True)
    return _launches(calls)


def launches_of_a_step(setting: race.Setting, dtype: str) -> Iterator[Any]:
    """The Triton launches of a search step, on meta tensors."""
    step, batch = traffic.step_and_batch("triton", *setting[:4], "meta", TYPES.get(dtype, torch.float32))
    with collected() as calls:
        step(batch, batch, race.LR)
    return _launches(calls)


def _launches(calls: list[Call]) -> Iterator[Any]:
    from darts_fast.kernels import triton

    return launches(triton, calls)


def agreement(bench: Bench) -> None:
    """The same gradients as the reference in float64 on this device, in each precision."""
    device = bench.device
    layers, channels, size = 3, bench.setting.init_channels, bench.setting.size
    batch_size = 4 if bench.quick else 16
    pair = [(x.to(device), y.to(device)) for x, y in race.batches(batch_size, size, torch.float64)]
    narrow = [(x.float(), y) for x, y in pair]
    reference = race.supernet(channels, layers, False, torch.float32)

    def network(fused: bool) -> race.Supernet:
        return race.supernet(channels, layers, fused, torch.float32).to(device)

    with strict_float32():
        exact = race.quantities(reference.double().to(device), *pair)
        rows, header = [], ["precision", *(f"{name}: error, cosine" for name in exact)]

        def add(name: str, found: dict[str, torch.Tensor]) -> None:
            cells = [name]
            for key, expected in exact.items():
                value = found[key].double()
                cosine = torch.nn.functional.cosine_similarity(value, expected, dim=0)
                relative = (value - expected).norm() / expected.norm()
                cells.append(f"{float(relative):.2g}, {float(cosine):.5f}")
            rows.append(cells)
            bench.table("against the reference in float64", header, rows)

        add("fused, float32", race.quantities(network(True), *narrow))
        again = [race.quantities(network(True), *narrow) for _ in range(2)]
        same = all(torch.equal(again[0][name], again[1][name]) for name in exact)
        bench.fact("fused, float32: twice the same bits", same)
        add("reference, float32", race.quantities(network(False), *narrow))
        beyond = None
        try:
            found = race.check_on(device, channels, layers, size, 4 if bench.quick else 8)
            for name, (value, allowed) in found.items():
                bench.fact(f"{name}, float32", f"error {value:.2g}, allowed {allowed:.2g}")
        except AssertionError as error:  # the other types are compared all the same
            beyond = error
            bench.fact("float32, beyond what is allowed", str(error))
        if bench.cuda:
            bench.fact("captured as uncaptured, float32", _captured_alike(bench, None))
        for name in ["bfloat16"] if bench.quick else ["float16", "bfloat16"]:
            dtype, scale = TYPES[name], FIRST_LOSS_SCALE if name == "float16" else None
            add(f"fused, {name}", race.quantities(network(True), *narrow, dtype, scale))
            with torch.autocast(device.type, dtype=dtype):
                add(f"reference, {name}, autocast", race.quantities(network(False), *narrow, None, scale))
            if bench.cuda:
                bench.fact(f"captured as uncaptured, {name}", _captured_alike(bench, name))
        if bench.cuda:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            add("reference, TF32", race.quantities(network(False), *narrow))
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not same or any(str(v).startswith("no") for v in bench.part["facts"].values()):
        raise RuntimeError("two runs, or captured and uncaptured, differ")
    if beyond:
        raise beyond


def _captured_alike(bench: Bench, amp_dtype: str | None) -> str:
    """Whether three captured steps end in the bits of three uncaptured ones."""
    from darts_fast.capture import Captured

    setting, ends = bench.setting, []
    names = ("train_images", "train_labels", "validation_images", "validation_labels")
    pair = race.batches(16, setting.size, torch.float32)
    inputs = dict(zip(names, [t.to(bench.device) for batch in pair for t in batch], strict=True))
    for graph in (False, True):
        module = race.supernet(setting.init_channels, 3, True, torch.float32).to(bench.device)
        step = SearchStep(module, SearchConfig(fused=True, amp_dtype=amp_dtype))
        buffers = {name: t.clone() for name, t in inputs.items()}
        take = Captured(step.take, buffers, step.tensors, graph)
        values = [take(**inputs) for _ in range(3)]
        ends.append([*values, *step.tensors()])
    differ = sum(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    return "the same bits" if not differ else f"no: {differ} of {len(ends[0])} tensors differ"


def one_step(bench: Bench) -> None:
    """benchmarks/step.py's race, all variants, and what each costs."""
    setting, rate = (
        bench.setting,
        bench.results("environment").get("copy") or profiling.copy_rate(bench.device),
    )
    bench.fact("setting", ", ".join(f"{name} {value}" for name, value in setting._asdict().items()))
    names = [name for name, variant in race.VARIANTS.items() if not variant.compiled]
    if bench.quick:
        names = ["textbook", "fused, ATen", "fused, C++"]
    if bench.cuda:  # captured last: the riskiest
        names.sort(key=lambda name: (race.VARIANTS[name].captured, race.VARIANTS[name].kernels == "aten"))
    entrants: list[race.Runner] = []
    with strict_float32():
        for name in names:
            started = time.monotonic()
            more, reasons = race.runners([name], setting, bench.device)
            bench.part.setdefault("left out", {}).update(reasons)
            entrants += more
            if more:
                seconds = f"{time.monotonic() - started:.1f} s to be ready"
                alone = [f"{1e3 * more[0].take()['step']:.4g} ms" for _ in range(1 if bench.quick else 3)]
                bench.fact(f"{name}, alone", f"{seconds}; {', '.join(alone)}")

        rows: dict[str, list[dict[str, float]]] = {runner.name: [] for runner in entrants}
        last = time.monotonic()
        for turn in range(1 if bench.quick else 30):
            for runner in list(entrants):
                try:
                    rows[runner.name].append(runner.take())
                except Exception as error:  # the others go on
                    bench.part["left out"][runner.name] = f"in turn {turn}: {error!r}"
                    entrants.remove(runner)
            times = [rows[runner.name] for runner in entrants]
            bench.part["records"] = race.records(entrants, times, rate, count=False)
            bench.part["facts"]["turns"] = turn + 1
            _show_records(bench)
            took, last = time.monotonic() - last, time.monotonic()
            if turn and bench.left() < 2 * took + 25:
                break
    # Counting takes the host some seconds a variant; the times are in the report already.
    for record, runner in zip(bench.part["records"], entrants, strict=True):
        if bench.left() > 15 and not (bench.quick and runner.variant.kernels is None):
            (own,) = race.records([runner], [rows[runner.name]], rate)
            record.update({key: value for key, value in own.items() if key != "ratio"})
            _show_records(bench)


def _show_records(bench: Bench) -> None:
    found = bench.part["records"]
    bench.part["tables"] = {
        "milliseconds, ratio to the textbook": [race.COLUMNS, race.table(found)],
        "phases": list(race.phase_table(found)),
    }
    bench.save()


def kernels(bench: Bench) -> None:
    """Each launch of a fused step that differs from the others, alone, against its roofline."""
    ceilings = bench.results("environment")
    copy = ceilings.get("copy") or profiling.copy_rate(bench.device)
    if not bench.cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # the interpreter's times say nothing: a dry run
    for dtype in ("float32",) if bench.quick else ("float16", "float32"):
        found = _observed(bench, dtype)
        dot, fma = (ceilings.get("matmul", {}).get(name) for name in (dtype, "float32"))
        rows = []
        for planned, count in found:
            if bench.left() < 8:
                bench.fact(f"{dtype}: not timed for want of time", len(found) - len(rows))
                break
            seconds = timed(
                lambda p=planned: _again(p),
                bench.cuda,
                repeats=5 if bench.cuda else 1,
                inner=10 if bench.cuda else 1,
            )
            depthwise, pointwise = traffic.operations(planned)
            least = {"bytes": planned.bytes / copy}
            if dot and fma:
                least["operations"] = depthwise / fma + pointwise / dot
            bound = max(least, key=least.get)
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
    from darts_fast.kernels import single, triton

    setting = bench.setting
    with strict_float32(), using(triton), collected() as calls:
        if bench.quick:  # a pair of 1x1 convolutions and both pools, under the interpreter
            x = torch.randn(2, setting.init_channels, 8, 8)
            weights = list(torch.randn(2, setting.init_channels, setting.init_channels, 1, 1))
            single.sepconv(x, [single.Geometry()] * 2, [None, None], weights)
            single.pool(x, 1)
        else:
            network = race.supernet(setting.init_channels, setting.layers, True, torch.float32)
            pair = race.batches(setting.batch_size, setting.size, torch.float32)
            batches = (tuple(t.to(bench.device) for t in batch) for batch in pair)
            config = SearchConfig(fused=True, amp_dtype=None if dtype == "float32" else dtype)
            SearchStep(network.to(bench.device), config)(*batches, race.LR)
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


def time_line(bench: Bench) -> None:
    """The captured step (on a CPU: the fused one) recorded by torch.profiler."""
    name = "fused, Triton, float16, captured"
    if not bench.cuda:
        name = "fused, ATen" if race.missing(race.VARIANTS["fused, C++"], bench.device) else "fused, C++"
    with strict_float32():
        runner = race.Runner(name, bench.setting, bench.device)
        trial = runner.graph and runner.graph.trial
        profiler = profiling.Profiler(1 if bench.quick else 3, bench.device, trial)
        for _ in range(profiling.WARM_UP + profiler.steps):
            with profiler.step():
                runner.take()
        folder = Path(bench.args.out) / "profile"
        settings = {"variant": name, "fused": True, "amp": True, "hvp": "exact", **bench.setting._asdict()}
        bench.fact("verdict", profiler.write(folder, settings, captured=True))
    import gzip

    events = json.loads(gzip.open(folder / "trace.json.gz").read())["traceEvents"]
    found = profiling.read_trace(events)
    bench.fact("variant", name)
    bench.fact("ms a step, under the profiler", f"{1e3 * found.seconds / found.steps:.2f}")
    bench.fact("the device computes for", f"{found.busy / found.seconds:.0%} of it")
    bench.part["lanes"] = lanes(events, bench.cuda)
    header, rows = ["phase", "launches a step", "ms a step"], []
    for row in found.phases:
        cells = f"{row.launches / found.steps:.0f}", f"{1e3 * row.seconds / found.steps:.3f}"
        rows.append([row.name, *cells])
    bench.table("phases, on the device", header, rows)
    header = ["operation", "launches a step", "ms a step", "of all"]
    total = sum(row.seconds for row in found.operations) or 1.0
    rows = [
        [
            row.name[:80], f"{row.launches / found.steps:.0f}",
            f"{1e3 * row.seconds / found.steps:.3f}", f"{row.seconds / total:.0%}",
        ]
        for row in found.operations[:20]
    ]  # fmt: skip
    bench.table("operations with most time", header, rows)


def lanes(events: list[dict], cuda: bool) -> dict[str, list[tuple[float, float]]]:
    """(start, length) in milliseconds of what ran in the last step, a lane each of the eight names with most
    time and one for the rest."""
    steps = [e for e in events if e.get("cat") == "user_annotation" and e.get("name") == profiling.STEP]
    if not steps:
        return {}
    last = max(steps, key=lambda e: e["ts"])
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    inside = [e for e in events if e.get("cat") in kinds and last["ts"] <= e["ts"] < last["ts"] + last["dur"]]
    totals: dict[str, float] = {}
    for e in inside:
        totals[e["name"]] = totals.get(e["name"], 0.0) + e["dur"]
    first = sorted(totals, key=totals.get, reverse=True)[:8]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in first}
    for e in inside[:20000]:
        lane = found.setdefault(e["name"] if e["name"] in first else "everything else", [])
        lane.append((round((e["ts"] - last["ts"]) / 1e3, 4), round(e["dur"] / 1e3, 4)))
    return found


def dataset(bench: Bench) -> Dataset:
    """CIFAR-10 from `--data_path`, or random images of its size (with --quick, of few)."""
    if bench.args.data_path and not bench.quick:
        from darts_fast.datasets import load

        return load("cifar10", bench.args.data_path)
    generator = torch.Generator().manual_seed(0)
    train, test, side = (40, 8, 8) if bench.quick else (50000, 10000, 32)
    parts = [
        part
        for n in (train, test)
        for part in (
            torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator),
            torch.randint(10, (n,), generator=generator),
        )
    ]
    return Dataset("random images", *parts, 10, 4, True)


def search(bench: Bench) -> None:
    """Steps of the search as run.py takes them, images included; projected, then whole epochs."""
    from darts_fast.search import Search

    data, makes = dataset(bench), {}
    for flags in ("--fused --amp", "--fused"):
        config = SearchConfig(
            dataset="cifar10", fused=True, amp="amp" in flags, device=bench.args.device, epochs=50,
            batch_size=bench.setting.batch_size, init_channels=bench.setting.init_channels,
            layers=bench.setting.layers,
        )  # fmt: skip
        makes[f"search on {data.name}, {flags}"] = lambda c=config: Search(c, data)
    _epochs_of_each(bench, makes)


def training(bench: Bench) -> None:
    """Steps of run_from.py on DARTS_V2, images, auxiliary head and drop path included."""
    from darts_fast.train import Training

    data, makes = dataset(bench), {}
    small = {"init_channels": 4, "layers": 3, "batch_size": 8} if bench.quick else {}
    for flags in ("--fused --amp", "--fused", "plain"):
        config = TrainConfig(
            genotype="DARTS_V2", dataset="cifar10", fused="fused" in flags, amp="amp" in flags,
            device=bench.args.device, epochs=600, **small,
        )  # fmt: skip
        makes[f"training of DARTS_V2 on {data.name}, {flags}"] = lambda c=config: Training(c, data)
    _epochs_of_each(bench, makes)


def _epochs_of_each(bench: Bench, makes: dict[str, Callable]) -> None:
    """The first, the fastest, takes a whole epoch where there is time; one that fails leaves the others."""
    errors = []
    for name, make in makes.items():
        try:
            _epochs(bench, name, make, whole=not errors and name == next(iter(makes)))
        except Exception as error:
            bench.fact(f"{name}: failed", repr(error)[:500])
            errors.append(error)
    if errors:
        raise errors[0]


def _epochs(bench: Bench, name: str, make: Callable, whole: bool) -> None:
    """Times steps of the Loop that `make` makes, projects its epochs, and with `whole` takes one in time."""
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    with strict_float32():
        loop = make()
        epochs = loop.config.epochs
        loop.begin_epoch()
        lr = loop.learning_rate()

        def steps(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                if loop.step == loop.steps_per_epoch:
                    loop.step = 0
                loop.take_step(lr)
                loop.step += 1
            if bench.cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        first = steps(1)
        bench.fact(f"{name}: first step, s", f"{first:.2f}")
        steps(1 if bench.quick else 3)
        seconds = min(steps(1), steps(1)) if bench.quick else median(steps(10) / 10 for _ in range(5))
        epoch = seconds * loop.steps_per_epoch
        bench.fact(f"{name}: ms a step", f"{1e3 * seconds:.2f}")
        bench.fact(
            f"{name}: projected", f"{epoch:.1f} s an epoch of {loop.steps_per_epoch} steps, "
            f"{epoch * epochs / 60:.1f} min for {epochs} epochs, without evaluation",
        )  # fmt: skip
        if bench.cuda:
            peak = torch.cuda.max_memory_allocated() / 2**30
            bench.fact(f"{name}: peak memory, GiB", f"{peak:.2f}")
        if whole and (bench.quick or bench.left() > 1.5 * epoch + 15):
            loop.step = 0
            loop.begin_epoch()
            took = steps(loop.steps_per_epoch)
            bench.fact(f"{name}: a whole epoch, s", f"{took:.2f}")


def tests(bench: Bench) -> None:
    """The tests that need a GPU (on a CPU they are skipped)."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider"]
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401

        command += ["-n", "0" if bench.quick else "8"]
    command += ["tests/gpu"] if bench.quick else ["tests/gpu", "tests/test_capture.py", "tests/test_data.py"]
    command += ["-k", "test_triton_gpu or captured_and or captured_on or too_large"]
    log = bench.path.with_suffix(".log")
    words = ("passed", "failed", "skipped", "error")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            text = log.read_text(errors="replace")
            for word in words:
                bench.part.setdefault("facts", {})[word] = text.count(f"{word.upper()} ")
            failed = [line for line in text.splitlines() if "FAILED" in line and "::" in line]
            bench.fact("those that failed", sorted(set(failed))[:20])
            if process.returncode is not None:
                break
    if process.returncode:
        raise RuntimeError("\n".join(text.splitlines()[-60:]))


def compiled(bench: Bench) -> None:
    """The textbook's cells by torch.compile, against the textbook."""
    seconds = 1 if bench.quick else max(1, int(bench.left() - 20))
    names = ["textbook", "textbook, torch.compile"]
    with strict_float32():
        entrants, reasons = race.runners(names, bench.setting, bench.device, seconds)
        bench.part["left out"] = reasons
        bench.save()
        if len(entrants) == 2:
            rows = race.race(entrants, 5)
            bench.part["records"] = race.records(entrants, rows, 1.0, count=False)
            _show_records(bench)


# Seconds that each may take, by estimate with room, for 16 processors and nothing in Triton's cache: 1,310
# kernels are to be compiled, a second of a processor each. They add up to more than 8 minutes: the first ones
# come first, and mostly leave much over.
SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "environment": (environment, 60),
    "compilation": (compilation, 200),
    "agreement": (agreement, 150),
    "step": (one_step, 120),
    "kernels": (kernels, 70),
    "time line": (time_line, 60),
    "search": (search, 60),
    "training": (training, 60),
    "tests": (tests, 300),
    "torch.compile": (compiled, 180),
}


def timed(call: Callable[[], object], cuda: bool, repeats: int, inner: int) -> float:
    """Seconds of a call, p50. On CUDA `inner` calls are captured as one graph, so that what is timed is the
    device and not the host that launches; caches are as the call before left them."""
    call()
    if not cuda:
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(inner):
                call()
            found.append((time.perf_counter() - start) / inner)
        return median(found)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    graph.replay()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / inner)
    return median(found)


# The report


def pictures(sections: dict[str, Part], out: Path) -> list[str]:
    """Draws what there is; the files' names."""
    found = {}
    records = sections.get("step", {}).get("records", [])
    rows = [
        (r["variant"], 1e3 * r["seconds"]["step"][1], f"{1e3 * r['seconds']['step'][1]:.4g} ms")
        for r in records
    ]
    if rows:
        found["step.svg"] = draw.bars("One second-order step", rows, max(row[1] for row in rows))
    for dtype, kernels_found in sections.get("kernels", {}).get("rooflines", {}).items():
        by_name: dict[str, list[float]] = {}
        for name, seconds, share in kernels_found:
            entry = by_name.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + seconds, entry[1] + seconds * share
        rows = [
            (n, s / t if t else 0.0, f"{s / t:.0%}, {1e3 * t:.2f} ms a step")
            for n, (t, s) in by_name.items()
            if t
        ]
        if rows and "kernels.svg" not in found:
            found["kernels.svg"] = draw.bars(f"Share of the roofline, {dtype}", rows, 1.0)
    lanes_found = sections.get("time line", {}).get("lanes", {})
    if lanes_found:
        found["timeline.svg"] = draw.lanes("One step on the device, ms", lanes_found)
    for name, text in found.items():
        (out / name).write_text(text)
    return list(found)


def markdown(sections: dict[str, Part], files: list[str]) -> str:
    lines = ["# GPU report", ""]
    lines += [f"- {name}: {part.get('state', 'not begun')}" for name, part in sections.items()]
    lines += [f"\n![{name}]({name})" for name in files]
    for name, part in sections.items():
        about = " ".join((SECTIONS[name][0].__doc__ or "").split())
        lines += ["", f"## {name}", "", about, ""]
        for key, value in part.get("facts", {}).items():
            lines.append(f"- {key}: {value}")
        for variant, reason in part.get("left out", {}).items():
            lines.append(f"- left out: {variant} ({reason})")
        for title, (header, rows) in part.get("tables", {}).items():
            lines += ["", f"**{title}**", "", race.markdown(header, rows)]
        if "error" in part:
            lines += ["", "Where it ended:", "", "```", part["error"].strip()[-6000:], "```"]
    return "\n".join(lines) + "\n"


def run_section(name: str, args: argparse.Namespace, path: Path, seconds: float) -> None:
    """In a process of its own: fills its part, and says what went wrong."""
    os.setsid()  # so that what it starts ends with it
    log = os.open(path.with_suffix(".out"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    bench = Bench(args, path, seconds)
    if bench.quick:
        torch.set_num_threads(1)
    try:
        SECTIONS[name][0](bench)
        bench.part["state"] = "done"
    except BaseException as error:
        bench.part["state"] = f"failed: {type(error).__name__}"
        bench.part["error"] = traceback.format_exc()
    bench.save()
    os._exit(0)  # not through libraries' own clean-up, which may hang after an error of the device


def supervised(name: str, args: argparse.Namespace, parts: Path, seconds: float) -> Iterator[Part]:
    """What the section has found, every few seconds and at its end."""
    path = parts / f"{name}.json"
    process = multiprocessing.get_context("fork").Process(
        target=run_section, args=(name, args, path, seconds)
    )
    process.start()
    end, state = time.monotonic() + seconds, ""

    def found() -> Part:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text())
        return {}

    try:
        while process.is_alive() and time.monotonic() < end:
            process.join(min(3.0, max(0.0, end - time.monotonic())))
            yield {**found(), "state": "under way"}
    finally:
        if process.is_alive():
            state = f"stopped after {seconds:.0f} s"
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            process.join(1)
    part = found()
    if state:
        part["state"] = state
    elif part.get("state") is None:
        part["state"] = f"failed: exit code {process.exitcode}"
        out = path.with_suffix(".out")
        part["error"] = out.read_text(errors="replace")[-4000:] if out.exists() else "no output"
    yield part


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--data_path", metavar="P", help="folder of cifar-10-batches-py")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a dry run")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    args = parser.parse_args()
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu is for a dry run: give --quick, too")
    deadline = time.monotonic() + 60 * args.minutes - 10
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Part] = {name: {} for name in args.only}

    def write() -> None:
        files = pictures(sections, args.out)
        (args.out / "report.json").write_text(json.dumps(sections, indent=1))
        (args.out / "report.md").write_text(markdown(sections, files))

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as parts:
        try:
            for name in args.only:
                left = deadline - time.monotonic()
                if left < 8:
                    sections[name] = {"state": f"left out: no time was left; --only {name!r} runs it"}
                    continue
                limit = min(left, SECTIONS[name][1] * max(1.0, args.minutes / 8))
                for part in supervised(name, args, Path(parts), limit):
                    sections[name] = part
                    write()
                took = f"{time.monotonic() - started:.0f} s"
                print(f"{took:>6}  {name}: {sections[name]['state']}", flush=True)
        except KeyboardInterrupt:
            print("stopped; the report has what there is", flush=True)
        write()
    print((args.out / "report.md").read_text())
    return 1 if any(str(part.get("state", "")).startswith("failed") for part in sections.values()) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
