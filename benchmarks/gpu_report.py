"""One command for a machine with a GPU: writes report.md and report.json into a folder.

    python benchmarks/gpu_report.py --out DIR [--batch_size 64 --init_channels 16 --layers 8] [--repeats 5]

Most important first: the environment, the GPU tests, one second-order step (textbook and fused, interleaved),
and every kernel of that step against the bandwidth of a copy. A section that fails leaves its error in the
report, and the next one runs. Exits with 1 if any failed, as all but the first do without a GPU.
"""

import argparse
import json
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import step as race  # noqa: E402
from fused_step import FusedStep  # noqa: E402
from textbook import TextbookStep  # noqa: E402

from darts_fast.config import SearchConfig  # noqa: E402
from darts_fast.precision import strict_float32  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def environment(args: argparse.Namespace) -> dict:
    found = {
        "commit": race.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "setting": {name: value for name, value in vars(args).items() if name != "out"},
    }
    if torch.cuda.is_available():
        import triton

        properties = torch.cuda.get_device_properties(0)
        found |= {
            "triton": triton.__version__,
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory, GiB": round(properties.total_memory / 2**30, 1),
        }
    return found


def tests(args: argparse.Namespace) -> dict:
    _need_gpu()
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-ra", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tail = done.stdout.strip().splitlines()[-40:]
    if done.returncode:
        raise RuntimeError("\n".join(tail))
    return {"pytest tests/gpu": tail[-1]}


def step(args: argparse.Namespace) -> dict:
    """Milliseconds of one float32 step by phase, p20, p50 and p80, after the two were seen to agree."""
    _need_gpu()
    with strict_float32():
        race.check()
        batches = race.batches(args.batch_size, 32, torch.float32)
        train, validation = (tuple(t.cuda() for t in batch) for batch in batches)
        steps, rows = {}, {"textbook": [], "fused": []}
        for name, kind in (("textbook", TextbookStep), ("fused", FusedStep)):
            network = race.supernet(args.init_channels, args.layers, name == "fused", torch.float32).cuda()
            steps[name] = kind(network, SearchConfig())
            _timed(steps[name], train, validation)  # compiles and warms up
        for _ in range(args.repeats):
            for name in steps:
                rows[name].append(_timed(steps[name], train, validation))
    found = {name: race.summary(times) for name, times in rows.items()}
    table = {
        phase: {
            name: " / ".join(f"{1e3 * seconds:.1f}" for seconds in found[name][phase]) for name in found
        } | {"ratio of p50": f"{found['textbook'][phase][1] / found['fused'][phase][1]:.2f}"}
        for phase in found["textbook"]
    }  # fmt: skip
    table["peak memory, GiB"] = {"both": f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"}
    return table


def kernels(args: argparse.Namespace) -> dict:
    """Each launch of a fused step that differs from the others, alone: microseconds (p50), and its bytes a
    second over those of a copy; the kernel with most time in a step first."""
    _need_gpu()
    from darts_fast.kernels import triton_launch

    found: dict[tuple, list] = {}

    def seen(planned: triton_launch.Launch) -> None:
        entry = found.setdefault(
            (planned.kernel.fn.__name__, planned.grid, str(planned.constants)), [planned, 0]
        )
        entry[1] += 1

    network = race.supernet(args.init_channels, args.layers, True, torch.float32).cuda()
    batches = race.batches(args.batch_size, 32, torch.float32)
    train, validation = (tuple(t.cuda() for t in batch) for batch in batches)
    with triton_launch.observed(seen):
        list(FusedStep(network, SearchConfig()).phases(train, validation, race.LR))
    copy = _copy_rate()
    rows = []
    for (name, grid, _), (planned, count) in found.items():
        time = _microseconds(
            lambda p=planned: p.kernel[p.grid](**p.arguments, **p.constants, num_warps=p.warps)
        )
        rows.append((time * count, name, grid, count, time, planned.bytes() / time / copy))
    table = {"copy": {"GB/s": f"{copy / 1e3:.0f}"}}
    for _, name, grid, count, time, share in sorted(rows, reverse=True):
        table[f"{name} {grid}"] = {"in a step": count, "us": f"{time:.1f}", "of copy": f"{share:.0%}"}
    return table


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA GPU")


def _timed(one: TextbookStep | FusedStep, train: race.Batch, validation: race.Batch) -> dict[str, float]:
    """Seconds of each phase and of the step, on the device's own clock."""
    events = [("", torch.cuda.Event(enable_timing=True))]
    events[0][1].record()
    for name in one.phases(train, validation, race.LR):
        events.append((name, torch.cuda.Event(enable_timing=True)))
        events[-1][1].record()
    torch.cuda.synchronize()
    found = {
        name: before.elapsed_time(after) / 1e3
        for (_, before), (name, after) in zip(events, events[1:], strict=False)
    }
    return {**found, "step": events[0][1].elapsed_time(events[-1][1]) / 1e3}


def _copy_rate() -> float:
    """Bytes a microsecond, read and written, of a copy of 1 GiB."""
    x = torch.empty(2**28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / _microseconds(lambda: y.copy_(x))


def _microseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """p50 of a call, with the cache of the device as the call before left it."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return median(times[3:])


SECTIONS = (environment, tests, step, kernels)


def markdown(sections: dict[str, dict]) -> str:
    lines = ["# GPU report"]
    for name, content in sections.items():
        lines += ["", f"## {name}", ""]
        if "error" in content:
            lines += ["It failed:", "", "```", content["error"].strip(), "```"]
            continue
        for key, value in content.items():
            cells = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            lines.append(f"- {key}: {cells}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for section in SECTIONS:
        try:
            found[section.__name__] = section(args)
        except Exception as error:  # the report says so, and the next section runs
            traceback.print_exc()
            found[section.__name__] = {"error": f"{type(error).__name__}: {error}"}
        (args.out / "report.json").write_text(json.dumps(found, indent=1))
        (args.out / "report.md").write_text(markdown(found))
    print((args.out / "report.md").read_text())
    return 1 if any("error" in content for content in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
