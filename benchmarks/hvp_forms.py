"""How far is the finite-difference Hessian-vector product from the exact one? In float64, on the network and
the batches of tests/golden/official_search_c4_l4.npz: cosine and ratio of norms, as epsilon shrinks.

    python benchmarks/hvp_forms.py
"""

from pathlib import Path

import numpy as np
import torch

from darts_fast import architect
from darts_fast.interop import load_official_search

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "official_search_c4_l4.npz"


def main() -> None:
    arrays = np.load(GOLDEN)
    state = {}
    for name in arrays.files:
        if name.startswith("init/"):
            tensor = torch.from_numpy(np.asarray(arrays[name]))
            state[name[5:]] = tensor.double() if tensor.is_floating_point() else tensor
    network = load_official_search(state, state.pop("alphas_normal"), state.pop("alphas_reduce"))
    weights, alphas = architect.leaves(network.weights()), architect.leaves(network.alphas())

    def loss(batch: int) -> architect.Loss:
        images = torch.from_numpy(arrays[f"batch/{batch}/images"]).double()
        labels = torch.from_numpy(arrays[f"batch/{batch}/labels"])
        return lambda w, a: network.loss(images, labels, w, a)

    w_gradients = architect.gradients(loss(0)(weights, alphas), weights, create_graph=True)
    step = architect.VirtualStep(lr=0.025, momentum=0.9, weight_decay=3e-4)
    virtual = architect.leaves(step(weights, architect.detached(w_gradients), {}))
    v = architect.gradients(loss(1)(virtual, alphas), virtual)
    exact = torch.cat([t.flatten() for t in architect.exact_hvp(w_gradients, alphas, v).values()])
    print(
        f"torch {torch.__version__}, float64, 4 layers, 4 channels, batch 8; exact: norm {exact.norm():.4g}"
    )
    print("| epsilon * \\|v\\| | cosine with exact | norm / exact norm |")
    print("|---|---|---|")
    for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        found = architect.finite_difference_hvp(loss(0), architect.detached(weights), alphas, v, size)
        found = torch.cat([t.flatten() for t in found.values()])
        cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
        print(f"| {size:g} | {cosine:.3f} | {found.norm() / exact.norm():.2f} |")


if __name__ == "__main__":
    main()
