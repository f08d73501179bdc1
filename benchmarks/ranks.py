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
from race import LR, Setting, batches, environment, percentiles, supernet, timed  # noqa: E402

from darts_fast.config import SearchConfig  # noqa: E402
from darts_fast.distributed import joined  # noqa: E402
from darts_fast.loop import freed_memory_kept, nothing_old_collected  # noqa: E402
from darts_fast.precision import strict_float32  # noqa: E402
from darts_fast.search import SearchStep  # noqa: E402

CPU = torch.device("cpu")
SIZES = ("batch_size", "init_channels", "layers", "size")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default=Setting._field_defaults[name])
    parser.add_argument("--repeats", type=int, default=10, help="timed pairs of steps, after one not timed")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    with joined() as ranks, strict_float32(), nothing_old_collected(), freed_memory_kept():  # as a run has it
        if ranks.size == 1:
            parser.error("start it by torchrun --nproc_per_node 2")
        setting = Setting(**{name: getattr(args, name) for name in SIZES}, threads=ranks.size)
        config = SearchConfig(fused=True)

        def network() -> torch.nn.Module:
            return supernet(setting.init_channels, setting.layers, True, torch.float32)

        whole = batches(setting.batch_size, setting.size, torch.float32)
        own = [(ranks.part(images), ranks.part(labels)) for images, labels in whole]
        ranks.set_share(setting.batch_size)
        shared = SearchStep(network(), config, average=ranks.average)
        alone = SearchStep(network(), config)
        pairs = []
        for _ in range(1 + args.repeats):
            torch.set_num_threads(1)
            ranks.largest(0)  # all begin together
            both = timed(lambda: shared(*own, LR), CPU, phases=False)["step"]
            ranks.largest(0)
            if ranks.rank == 0:
                torch.set_num_threads(ranks.size)
                pairs.append((timed(lambda: alone(*whole, LR), CPU, phases=False)["step"], both))
    if ranks.rank == 0:
        one, many, ratio = zip(*((a, b, a / b) for a, b in pairs[1:]), strict=True)
        print(f"one fused second-order step, float32; {setting}")
        print(", ".join(f"{key} {value}" for key, value in environment(CPU).items()))
        print(f"one process of {ranks.size} threads: {1e3 * percentiles(one)[1]:.4g} ms")
        print(f"{ranks.size} ranks of one thread: {1e3 * percentiles(many)[1]:.4g} ms")
        low, middle, high = percentiles(ratio)
        print(f"the ranks are {middle:.2f} ({low:.2f}-{high:.2f}) times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
