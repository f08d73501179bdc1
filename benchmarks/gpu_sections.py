"""Sections of gpu_report.py: what is measured, but for the kernels one by one (gpu_kernels.py)."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import race
import race_tables
import torch
from gpu_bench import Bench, timed

from darts_fast import profiling, trace
from darts_fast.config import SearchConfig, TrainConfig
from darts_fast.data import Dataset
from darts_fast.precision import FIRST_LOSS_SCALE, TYPES, strict_float32
from darts_fast.report import write_report
from darts_fast.search_step import SearchStep

ROOT = Path(__file__).resolve().parent.parent


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
        seconds = timed(partial(torch.matmul, a, b), bench.cuda, repeats=5, inner=2)
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
        exact = race.quantities(reference.double().to(device), pair)
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

        add("fused, float32", race.quantities(network(True), narrow))
        again = [race.quantities(network(True), narrow) for _ in range(2)]
        same = all(torch.equal(again[0][name], again[1][name]) for name in exact)
        bench.fact("fused, float32: twice the same bits", same)
        add("reference, float32", race.quantities(network(False), narrow))
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
            add(f"fused, {name}", race.quantities(network(True), narrow, dtype, scale))
            with torch.autocast(device.type, dtype=dtype):
                add(f"reference, {name}, autocast", race.quantities(network(False), narrow, None, scale))
            if bench.cuda:
                bench.fact(f"captured as uncaptured, {name}", _captured_alike(bench, name))
        if bench.cuda:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            add("reference, TF32", race.quantities(network(False), narrow))
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
        values = [take(None, **inputs) for _ in range(3)]
        ends.append([*values, *step.tensors()])
    differ = sum(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    return "the same bits" if not differ else f"no: {differ} of {len(ends[0])} tensors differ"


def one_step(bench: Bench) -> None:
    """benchmarks/step.py's race, all variants, and what each costs."""
    _race(bench, race.Runner, bench.setting)


def one_training_step(bench: Bench) -> None:
    """The same race of a training step of DARTS_V2, at the paper's setting, and of an evaluation."""
    _race(bench, race.TrainingRunner, bench.setting if bench.quick else race.Setting(96, 36, 20))


def _race(bench: Bench, kind: type[race.Runner], setting: race.Setting) -> None:
    rate = bench.results("environment").get("copy") or profiling.copy_rate(bench.device)
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
            more, reasons = race.runners([name], setting, bench.device, kind=kind)
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
        "milliseconds, ratio to the textbook": [race_tables.COLUMNS, race_tables.table(found)],
        "phases": list(race_tables.phase_table(found)),
    }
    bench.save()


def time_line(bench: Bench) -> None:
    """The captured step (on a CPU: the fused one) recorded by torch.profiler."""
    name = "fused, Triton, float16, captured"
    if not bench.cuda:
        name = "fused, ATen" if race.missing(race.VARIANTS["fused, C++"], bench.device) else "fused, C++"
    with strict_float32():
        runner = race.Runner(name, bench.setting, bench.device)
        trial = None if runner.graph is None else runner.graph.trial
        profiler = profiling.Profiler(1 if bench.quick else 3, bench.device, trial)
        for _ in range(profiling.WARM_UP + profiler.steps):
            with profiler.step():
                runner.take()
        folder = Path(bench.args.out) / "profile"
        settings = {"variant": name, "fused": True, "amp": True, "hvp": "exact", **bench.setting._asdict()}
        bench.fact("verdict", write_report(profiler, folder, settings, captured=True))
    import gzip

    events = json.loads(gzip.open(folder / "trace.json.gz").read())["traceEvents"]
    found = trace.read_trace(events)
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
    first = sorted(totals, key=totals.__getitem__, reverse=True)[:8]
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
    of_train, of_test = (
        (
            torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator),
            torch.randint(10, (n,), generator=generator),
        )
        for n in (train, test)
    )
    return Dataset("random images", *of_train, *of_test, 10, 4, True)


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
    small: dict[str, Any] = {"init_channels": 4, "layers": 3, "batch_size": 8} if bench.quick else {}
    for flags in ("--fused --amp", "--fused", "plain"):
        config = TrainConfig(
            genotype="DARTS_V2", dataset="cifar10", fused="fused" in flags, amp="amp" in flags,
            device=bench.args.device, epochs=600, **small,
        )  # fmt: skip
        makes[f"training of DARTS_V2 on {data.name}, {flags}"] = lambda c=config: Training(c, data)
    _epochs_of_each(bench, makes)


def _epochs_of_each(bench: Bench, makes: dict[str, Callable]) -> None:
    """The first, the fastest, takes a whole epoch where there is time; one that fails leaves the others."""
    errors: list[Exception] = []
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
