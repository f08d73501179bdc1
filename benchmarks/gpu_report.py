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
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import draw  # noqa: E402
from gpu_bench import Bench, Part  # noqa: E402
from gpu_kernels import compilation, kernels  # noqa: E402
from gpu_sections import (  # noqa: E402
    agreement,
    compiled,
    environment,
    one_step,
    one_training_step,
    search,
    tests,
    time_line,
    training,
)

from darts_fast.tables import markdown_table  # noqa: E402

# Nothing here asks for CUDA when it is imported: each section is a fork of this process.

# Seconds that each may take, by estimate with room, for 16 processors and nothing in Triton's cache: 1,319
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
    "training step": (one_training_step, 60),
    "tests": (tests, 300),
    "torch.compile": (compiled, 180),
}


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
            lines += ["", f"**{title}**", "", *markdown_table(header, rows, numbers=True)]
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

    assert process.pid is not None  # it has begun
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
