"""What a step costs against the committed figures, on any machine: launches, bytes, saved and live memory,
and registers and spills of the compiled kernels.

    python benchmarks/baseline.py [--update]

Prints what differs from benchmarks/baseline.json and exits with 1 if anything does; `--update` writes the
figures of now there. Counted on meta tensors, at the paper's channels, on 3 layers, and on 4 of a training
(traffic.py); one launch of every Triton kernel is compiled for sm_90 in bfloat16 (kernels/triton/aot.py).
Figures of other versions of PyTorch or Triton are not compared, which it says.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import traffic  # noqa: E402

from darts_fast.supernet import Supernet  # noqa: E402

FILE = Path(__file__).with_name("baseline.json")
SETTING: dict[str, Any] = {"batch_size": 16, "channels": 16, "layers": 3, "size": 16}
# With the auxiliary head
TRAINING: dict[str, Any] = {"batch_size": 16, "channels": 36, "layers": 4, "size": 32}

Counts = dict[str, dict[str, int]]  # by "variant: phase" or kernel, then by what is counted


def counted() -> Counts:
    """Counts every phase of a search step and of a training step, for each variant."""
    found = {}
    for variant, options in traffic.VARIANTS.items():
        step = traffic.count(**SETTING, **options)
        for phase, count in step.phases.items():
            found[f"{variant}: {phase}"] = count._asdict()
        saved = step.kept if options["kernels"] else saved_by_the_textbook()
        found[f"{variant}: whole step"] = {"peak live bytes": step.peak, "saved bytes": saved}
        step = traffic.count(**TRAINING, **options, train=True)
        for phase, count in step.phases.items():
            found[f"training, {variant}: {phase}"] = count._asdict()
        found[f"training, {variant}: whole step"] = {"peak live bytes": step.peak}
        if options["kernels"]:
            found[f"training, {variant}: whole step"]["saved bytes"] = step.kept
    return found


def saved_by_the_textbook() -> int:
    """Returns the bytes that one forward pass keeps for its backward pass, weights and images left out."""
    batch_size, channels, layers, size = SETTING.values()
    with torch.device("meta"):
        network = Supernet(channels, 10, layers)
        images = torch.zeros(batch_size, 3, size, size)
        labels = torch.zeros(batch_size, dtype=torch.int64)
    given = {t.untyped_storage()._cdata for t in (network.flat_weights, images, labels)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
    assert loss.requires_grad  # the graph, and so what it keeps, was alive until here
    return sum(kept.values())


def compiled() -> Counts:
    """Compiles the first launch of every kernel, at 16 channels."""
    from darts_fast.kernels.triton import aot

    first: dict[str, Any] = {}
    for planned in aot.supernet_launches(torch.bfloat16, quick=True):
        first.setdefault(planned.name, planned)
    found = {}
    for planned in first.values():
        report = aot.report(planned, 90)
        name = f"{report.kernel} {report.setting}, {report.arch}"
        found[name] = {"registers": report.registers, "spills": report.spills, "shared bytes": report.shared}
    return found


def versions() -> dict[str, str]:
    """Returns the versions that the figures depend on: each of PyTorch may make an operation of others, and
    each of Triton's compiler may allot other registers."""
    import triton

    return {"counts": f"torch {torch.__version__.split('+')[0]}", "compiled": f"triton {triton.__version__}"}


def differences(now: Counts, before: Counts) -> list[str]:
    """Returns a line for each count that is not what it was."""
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
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    found: dict[str, Any] = {"versions": versions(), "setting": SETTING, "training": TRAINING}
    lines = []
    for part, figures in (("counts", counted), ("compiled", compiled)):
        version, then = found["versions"][part], before.get("versions", {}).get(part)
        if then not in (version, None) and not args.update:
            print(f"{part}: not compared, {FILE.name} is of {then}, here is {version}")
            continue
        found[part] = figures()
        lines += differences(found[part], before.get(part, {}))
        print(f"{part}: {len(found[part])} lines compared, {version}")
    print("\n".join(lines) or "nothing differs")
    if args.update:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
