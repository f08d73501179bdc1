"""Whether a fused search goes where the reference's does: the directions in which the alphas move.

    python benchmarks/trajectories.py [--data_path data --images 5000 --epochs 2 --init_channels 4 --layers 3]

Three second-order searches (exact product, float32) on the first images of CIFAR-10, side by side on the same
batches: the reference; the reference with its initial weights moved by 1e-6, relative, because float32 alone
parts two searches; and the fused one. Prints the cosine of the alphas' displacement with the reference's of
the other two, and CPU times; ends with exit code 1 where the fused one's cosine is below the other's less
0.02.
"""

import argparse
import dataclasses
import sys
import time

import torch
from torch import Tensor

from darts_fast.config import SearchConfig
from darts_fast.datasets import load
from darts_fast.precision import strict_float32
from darts_fast.search import Search

ALLOWANCE = 0.02


def alphas(search: Search) -> Tensor:
    return torch.cat([a.detach().reshape(-1) for a in search.network.alphas().values()])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", default="data")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--init_channels", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args()
    data = load("cifar10", args.data_path)
    data = dataclasses.replace(data, images=data.images[: args.images], labels=data.labels[: args.images])
    print(f"{vars(args)}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    searches, seconds = {}, {}
    for name in ("reference", "moved", "fused"):
        config = SearchConfig(
            dataset="cifar10",
            epochs=args.epochs,
            init_channels=args.init_channels,
            layers=args.layers,
            fused=name == "fused",
            device="cpu",
        )
        searches[name], seconds[name] = Search(config, data), 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in searches["moved"].network.weights().values():
            w.mul_(1 + 1e-6 * torch.randn(w.shape, generator=generator))
    start, cosines = alphas(searches["reference"]), {}
    with strict_float32():
        for epoch in range(args.epochs):
            for step in range(searches["reference"].steps_per_epoch):
                for name, search in searches.items():
                    search.epoch, search.step = epoch, step
                    if step == 0:
                        search.begin_epoch()
                    before = time.process_time()
                    search.take_step(search.learning_rate())
                    seconds[name] += time.process_time() - before
                if (step + 1) % 10 == 0 or step + 1 == searches["reference"].steps_per_epoch:
                    moved = {name: (alphas(search) - start).double() for name, search in searches.items()}
                    for name in ("moved", "fused"):
                        cosines[name] = float(torch.cosine_similarity(moved[name], moved["reference"], dim=0))
                    print(
                        f"epoch {epoch + 1}, step {step + 1}: cosine with the reference: moved by 1e-6 "
                        f"{cosines['moved']:.4f}, fused {cosines['fused']:.4f}; CPU seconds so far: "
                        f"reference {seconds['reference']:.0f}, fused {seconds['fused']:.0f}",
                        flush=True,
                    )
    print(f"reference over fused, CPU time: {seconds['reference'] / seconds['fused']:.2f}")
    return 0 if cosines["fused"] >= cosines["moved"] - ALLOWANCE else 1


if __name__ == "__main__":
    sys.exit(main())
