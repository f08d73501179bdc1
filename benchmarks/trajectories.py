"""Whether the alphas of fused searches end as near to those of references as references end to each other:
several searches of each kind for every seed. (curves.py follows one search of each kind, step by step.)

    python benchmarks/trajectories.py [--data_path data --images 5000 --epochs 1 --init_channels 4 --layers 3]

Second-order searches (exact product, float32) on the first images of CIFAR-10. Float32 alone parts two
searches, so one pair says little: for every seed there are `--copies` of the reference and as many of the
fused search, side by side on the same batches, all but the first of each kind with initial weights moved by
1e-6, relative. Prints the cosine of the alphas' displacements between two references, and between a fused
search and a reference: of all pairs the mean and the range. Ends with exit code 1 where the mean over all
seeds of the second is below that of the first less 0.02.

CPU and wall time are of all copies of a kind; the peak of memory is that of a process that takes two steps,
beyond what it had before them.
"""

import argparse
import itertools
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from curves import ALLOWANCE, alphas, first_images, move_weights, take_step  # noqa: E402

from darts_fast.config import SearchConfig  # noqa: E402
from darts_fast.precision import strict_float32  # noqa: E402
from darts_fast.search import Search  # noqa: E402

KINDS = ("reference", "fused")


def made(args: argparse.Namespace, kind: str, seed: int, copy: int = 0) -> Search:
    config = SearchConfig(
        dataset="cifar10",
        epochs=args.epochs,
        init_channels=args.init_channels,
        layers=args.layers,
        seed=seed,
        fused=kind == "fused",
        device="cpu",
    )
    search = Search(config, first_images("cifar10", args))
    if copy:
        move_weights(search, copy)
    return search


def peak_of_memory(args: argparse.Namespace, kind: str) -> int:
    """Returns the bytes by which two steps raise the peak of this process's memory."""
    torch.set_num_threads(args.threads)
    with strict_float32():
        search = made(args, kind, 0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for step in range(2):
            take_step(search, 0, step)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def cosines(args: argparse.Namespace, seed: int) -> list[list[float]]:
    """Takes all steps of one seed's searches; returns the cosines of all pairs of references, and of all
    pairs of a fused search with a reference."""
    searches = {(kind, copy): made(args, kind, seed, copy) for kind in KINDS for copy in range(args.copies)}
    start, spent = alphas(searches["reference", 0]), {kind: [0.0, 0.0] for kind in KINDS}
    for epoch, step in itertools.product(range(args.epochs), range(searches["fused", 0].steps_per_epoch)):
        for (kind, _), search in searches.items():
            before = time.process_time(), time.perf_counter()
            take_step(search, epoch, step)
            spent[kind][0] += time.process_time() - before[0]
            spent[kind][1] += time.perf_counter() - before[1]
    moved = {key: (alphas(search) - start).double() for key, search in searches.items()}
    references = [moved["reference", copy] for copy in range(args.copies)]
    fused = [moved["fused", copy] for copy in range(args.copies)]
    found = [
        [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
        for pairs in (itertools.combinations(references, 2), itertools.product(fused, references))
    ]
    times = "; ".join(f"{kind} {cpu:.0f} s CPU, {wall:.0f} s wall" for kind, (cpu, wall) in spent.items())
    print(
        f"seed {seed}: references {told(found[0])}; fused {told(found[1])}; {times} "
        f"(CPU ratio {spent['reference'][0] / spent['fused'][0]:.2f})",
        flush=True,
    )
    return found


def told(values: list[float]) -> str:
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", default="data")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--init_channels", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    print(f"{vars(args)}, torch {torch.__version__}", flush=True)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {kind: pool.apply(peak_of_memory, (args, kind)) for kind in KINDS}
    print("; ".join(f"{kind}: at most {peak / 1e6:.0f} MB" for kind, peak in peaks.items()), flush=True)
    with strict_float32():
        found = [cosines(args, seed) for seed in args.seeds]
    references, fused = ([value for row in found for value in row[i]] for i in (0, 1))
    print(f"all seeds: references {told(references)}; fused {told(fused)}")
    return 0 if mean(fused) >= mean(references) - ALLOWANCE else 1


if __name__ == "__main__":
    sys.exit(main())
