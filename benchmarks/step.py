"""Times one second-order step, or a training step: the textbook's, and the ways to take it here, interleaved
in one process.

    python benchmarks/step.py [--device cpu] [--batch_size 16 --init_channels 16 --layers 8 --size 32]
        [--threads N] [--repeats 5] [--only VARIANT ...] [--compile_seconds 0] [--results DIR]
    python benchmarks/step.py --sweep batch_size=8,16,32,64 [--cpu_time] [--busy 1] ...
    python benchmarks/step.py --train ...

`--train` is the training of DARTS_V2, with drop path and (from 24 x 24 pixels on) the auxiliary head: the
textbook is the network in PyTorch's modules, NCHW, every weight updated by itself. An evaluation of the same
batch is timed behind every step.
Nothing is timed before the results agree (`check`, and on CUDA `check_on`; with `--train` `check_training`,
on the CPU alone). Printed: p20, p50 and p80 of each variant; the textbook's time over the variant's, pair by
pair; on a CPU the share of the time outside the kernels' programs (p50); peak memory, measured on CUDA and
else counted; launches and bytes, counted by traffic.py; the bandwidth that these bytes make, and its share of
the device's measured copy rate; the p50 of every phase. What cannot run here is named with the reason.
`--digits` takes the sizes of run.py's default.
`--partial_channels K` races PC-DARTS's searches; beside them, with no ratio, the fused ones of all channels.
`--sweep` races the variants at each value of batch_size, init_channels, layers, size or threads, all values
in turns, and draws a plot; over batch_size it also fits the part of a step that is the same for any number of
images. `--cpu_time` takes the seconds of the processor for those of the wall, on a machine with other work.
`--busy N` is that other work: N processes that each keep a processor busy meanwhile.
Every variant adds a line of JSON to a file in DIR (benchmarks/results) that is named by the conditions.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from race import (  # noqa: E402
    DIGITS,
    VARIANTS,
    Runner,
    Setting,
    TrainingRunner,
    check,
    check_on,
    check_training,
    environment,
    race,
    records,
    runners,
)
from race_tables import COLUMNS, evaluations, fits, growth, phase_table, plot, table  # noqa: E402

from darts_fast.precision import strict_float32  # noqa: E402
from darts_fast.process import freed_memory_kept, nothing_old_collected  # noqa: E402
from darts_fast.profiling import copy_rate  # noqa: E402
from darts_fast.tables import markdown_table  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, value in Setting._field_defaults.items():
        parser.add_argument(
            f"--{name}", type=int, default=torch.get_num_threads() if name == "threads" else value
        )
    parser.add_argument("--digits", action="store_true", help="the sizes of run.py's default, on digits")
    parser.add_argument("--train", action="store_true", help="a training step of DARTS_V2")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each, after one not timed")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--compile_seconds", type=int, default=0, help="what torch.compile may take; 0: it is left out"
    )
    parser.add_argument("--sweep", type=_sweep, metavar="NAME=A,B,...")
    parser.add_argument("--cpu_time", action="store_true", help="seconds of the processor, with one thread")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="other processes that compute")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), metavar="DIR")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    if args.init_channels % args.partial_channels or (args.train and args.partial_channels > 1):
        parser.error("--partial_channels must divide --init_channels, and is for a search's step")
    if args.busy < 0:
        parser.error("--busy must be at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if args.cpu_time:
        if (args.device, args.threads) != ("cpu", 1) or (args.sweep and args.sweep[0] == "threads"):
            parser.error("--cpu_time is for --device cpu --threads 1")
        Runner.clock = staticmethod(time.process_time)
    device = torch.device(args.device)
    base = DIGITS if args.digits else Setting(**{name: getattr(args, name) for name in Setting._fields})
    base = base._replace(threads=args.threads, partial_channels=args.partial_channels)
    name, values = args.sweep or ("batch_size", [base.batch_size])
    what = "training step of DARTS_V2" if args.train else "second-order step"
    with strict_float32(), nothing_old_collected(), freed_memory_kept():  # as a run has it
        check_training() if args.train else check(base.partial_channels)
        if device.type == "cuda" and not args.train:
            check_on(device, base.init_channels, 3, base.size, partial_channels=base.partial_channels)
        conditions = environment(device)
        beside = f", beside {args.busy} busy process{'es' * (args.busy > 1)}" if args.busy else ""
        print(f"results agree; one {what}, float32 where it says nothing else; {base}{beside}")
        print(", ".join(f"{key} {value}" for key, value in conditions.items()), flush=True)
        entrants: list[Runner] = []
        left_out: dict[str, str] = {}
        for value in values:
            kind = TrainingRunner if args.train else Runner
            setting = base._replace(**{name: value})
            more, reasons = runners(args.only, setting, device, args.compile_seconds, kind)
            entrants, left_out = entrants + more, left_out | reasons
        if base.partial_channels > 1 and not args.sweep:
            fused = [name for name in args.only if VARIANTS[name].kernels is not None]
            more, _ = runners(fused, base._replace(partial_channels=1), device)
            for runner in more:
                runner.name += ", all channels"
            entrants += more
        with neighbours(args.busy):
            rows = race(entrants, args.repeats)
        rate = copy_rate(device)
    for variant, reason in left_out.items():
        print(f"left out: {variant} ({reason})")
    # Counting takes seconds a variant and value; a sweep needs it for the line that `fits` prints.
    found = records(entrants, rows, rate, count=not args.sweep or name == "batch_size")
    if args.sweep:
        print(*markdown_table(*growth(found, name), numbers=True), sep="\n")
        if name == "batch_size" and len(values) > 1:
            print(*fits(found), sep="\n")
    else:
        print(*markdown_table(COLUMNS, table(found), numbers=True), sep="\n")
        print("", *markdown_table(*phase_table(found), numbers=True), sep="\n")
        if args.train:
            print(f"\nratio of an evaluation: {evaluations(found)}")
        print(f"(peak {'measured' if device.type == 'cuda' else 'counted'}; copy {rate / 1e9:.1f} GB/s)")
    clock = "cpu" if args.cpu_time else "wall"
    args.results.mkdir(parents=True, exist_ok=True)
    named = ("train-" if args.train else "") + file_name(args.sweep and name, base, conditions["device"])
    path = args.results / f"{named}{f'-busy{args.busy}' * (args.busy > 0)}.jsonl"
    with path.open("a") as file:
        for record in found:
            file.write(
                json.dumps(
                    {
                        **record,
                        **conditions,
                        "clock": clock,
                        "repeats": args.repeats,
                        "copy": rate,
                        "busy": args.busy,
                    }
                )
                + "\n"
            )
    print(f"added to {path}")
    if args.sweep:
        fixed = ", ".join(f"{key} {value}" for key, value in base._asdict().items() if key != name)
        fixed += ", CPU time" if args.cpu_time else ""
        fixed += beside
        path.with_suffix(".svg").write_text(plot(found, name, fixed))
        print(f"drawn: {path.with_suffix('.svg')}")
    return 0


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute meanwhile, without pause."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _sweep(text: str) -> tuple[str, list[int]]:
    name, _, values = text.partition("=")
    if name not in Setting._fields or not re.fullmatch(r"\d+(,\d+)*", values):
        raise argparse.ArgumentTypeError(f"NAME=A,B,... with NAME one of {', '.join(Setting._fields)}")
    return name, [int(value) for value in values.split(",")]


def file_name(swept: str | None, base: Setting, device: str) -> str:
    """The conditions, as a file may be named."""
    machine = re.sub(r"\W+", "_", device).strip("_")
    return f"sweep-{swept}-{machine}-{base.label}" if swept else f"step-{machine}-{base.label}"


if __name__ == "__main__":
    sys.exit(main())
