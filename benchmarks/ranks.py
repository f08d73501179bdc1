"""Times one fused second-order step of a batch that is shared out to ranks of one thread each, against that
of one process with as many threads, on a CPU and in turns.

    torchrun --nproc_per_node 2 benchmarks/ranks.py [--batch_size 16 --init_channels 16 --layers 8 --size 32]
        [--repeats 10]

That both end at the same weights is tested in tests/test_distributed.py. While rank 0 takes the step alone,
the others sleep. Printed by rank 0: p50 of both in milliseconds, and the ratio, pair by pair, p50 (p20 to
p80).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from race import LR, batches, environment, percentiles, supernet, timed  # noqa: E402

from darts_fast.config import SearchConfig  # noqa: E402
from darts_fast.distributed import joined  # noqa: E402
from darts_fast.precision import strict_float32  # noqa: E402
from darts_fast.process import freed_memory_kept, nothing_old_collected  # noqa: E402
from darts_fast.search_step import SearchStep  # noqa: E402

CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10, help="timed pairs of steps, after one not timed")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    one, many = [], []
    with joined() as ranks, strict_float32(), nothing_old_collected(), freed_memory_kept():  # as a run has it
        if ranks.size == 1:
            parser.error("start it by torchrun --nproc_per_node 2")
        whole_train, whole_validation = batches(args.batch_size, args.size, torch.float32)
        own_train, own_validation = (
            (ranks.part(images), ranks.part(labels)) for images, labels in (whole_train, whole_validation)
        )
        ranks.set_share(args.batch_size)
        networks = [supernet(args.init_channels, args.layers, True, torch.float32) for _ in range(2)]
        config = SearchConfig(fused=True)
        shared, alone = (
            SearchStep(networks[0], config, average=ranks.average),
            SearchStep(networks[1], config),
        )
        for _ in range(1 + args.repeats):
            torch.set_num_threads(1)
            ranks.largest(0)  # all begin together
            many.append(timed(lambda: shared(own_train, own_validation, LR), CPU, phases=False)["step"])
            ranks.largest(0)
            if ranks.rank == 0:
                torch.set_num_threads(ranks.size)
                one.append(timed(lambda: alone(whole_train, whole_validation, LR), CPU, phases=False)["step"])
    if ranks.rank == 0:
        print(
            f"one fused second-order step, float32: batch {args.batch_size}, {args.init_channels} channels, "
            f"{args.layers} layers, {args.size} x {args.size} pixels"
        )
        print(", ".join(f"{key} {value}" for key, value in environment(CPU).items()))
        print(f"one process of {ranks.size} threads: {1e3 * percentiles(one[1:])[1]:.4g} ms")
        print(f"{ranks.size} ranks of one thread: {1e3 * percentiles(many[1:])[1]:.4g} ms")
        low, middle, high = percentiles([a / b for a, b in zip(one[1:], many[1:], strict=True)])
        print(f"the ranks are {middle:.2f} ({low:.2f}-{high:.2f}) times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
