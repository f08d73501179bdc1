"""Launches, bytes and memory of a step against the committed ones: what a change costs, on any machine.

    python benchmarks/baseline.py [--update]

Prints what differs from benchmarks/baseline.json and exits with 1 if anything does; `--update` writes the
counts of now there. Counted on meta tensors, at the paper's channels, on 3 layers (traffic.py).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import traffic  # noqa: E402

VERSION = torch.__version__.split("+")[0]  # PyTorch's own operations differ between versions
FILE = Path(__file__).with_name("baseline.json")
SETTING = {"batch_size": 4, "channels": 16, "layers": 3, "size": 16}

Counts = dict[str, dict[str, int]]  # by "variant: phase", then by what is counted


def counted() -> Counts:
    """Of every variant and phase."""
    found = {}
    for variant, options in traffic.VARIANTS.items():
        step = traffic.count(**SETTING, **options)
        for phase, (launches, moved) in step["phases"].items():
            found[f"{variant}: {phase}"] = {"launches": launches, "bytes": moved}
        found[f"{variant}: whole step"] = {"peak live bytes": step["peak"]}
    return found


def differences(now: Counts, before: Counts) -> list[str]:
    """A line for each count that is not what it was."""
    lines = []
    for name in sorted({*now, *before}):
        for what in sorted({*now.get(name, {}), *before.get(name, {})}):
            new, old = (counts.get(name, {}).get(what) for counts in (now, before))
            if new == old:
                continue
            change = f" ({(new - old) / old:+.1%})" if new is not None and old else ""
            shown = ["absent" if value is None else f"{value:,}" for value in (old, new)]
            lines.append(f"{name}, {what}: {shown[0]} -> {shown[1]}{change}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the counts of now")
    args = parser.parse_args()
    now = counted()
    before = json.loads(FILE.read_text())["counts"] if FILE.exists() else {}
    lines = differences(now, before)
    print("\n".join(lines) or f"{len(now)} phases count what {FILE.name} says")
    if args.update:
        FILE.write_text(json.dumps({"torch": VERSION, "setting": SETTING, "counts": now}, indent=1) + "\n")
        return 0
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
