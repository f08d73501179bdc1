"""How far is each form of the Hessian-vector product, in each precision, from the exact one in float64?

    python benchmarks/hvp_forms.py [--layers 4] [--channels 4] [--batches 10] [--steps 0] [--epsilons]

On a network with random weights, or after `--steps` steps of search, and real images (scikit-learn's digits,
enlarged to 16x16, 3 channels): for each pair of batches v is the gradient of the validation loss at the
virtual weights, and all of it is computed in the precision of the row. `--epsilons` prints instead what the
finite difference makes of an ever smaller epsilon, in float64, on tests/golden/official_search_c4_l4.npz.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from darts_fast import architect
from darts_fast.config import SearchConfig
from darts_fast.data import channel_statistics, permutation
from darts_fast.datasets import read_data
from darts_fast.interop import load_official_search
from darts_fast.precision import FIRST_LOSS_SCALE, strict_float32
from darts_fast.search_step import SearchStep
from darts_fast.supernet import Supernet
from darts_fast.tables import markdown_table

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "official_search_c4_l4.npz"
STEP = architect.VirtualStep(lr=0.025, momentum=0.9, weight_decay=3e-4)
Batch = tuple[Tensor, Tensor]
aten = torch.ops.aten


class TF32(TorchDispatchMode):
    """Convolutions and their derivatives with every operand rounded to TF32's 10 bits of mantissa, as a GPU
    with `torch.backends.cudnn.allow_tf32` (PyTorch's default) computes them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (aten.convolution.default, aten.convolution_backward.default):
            args = tuple(tf32(a) if isinstance(a, Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))


def tf32(x: Tensor) -> Tensor:
    """The nearest number with 10 bits of mantissa, ties to even; float32."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Form(NamedTuple):
    """A row of the table."""

    name: str
    fused: bool = False
    exact: bool = True
    dtype: torch.dtype = torch.float32
    activations: torch.dtype | None = None  # of the fused cells
    around: Callable = nullcontext  # the context that all runs in
    scale: float | None = None


def autocast(dtype: torch.dtype) -> Callable:
    return partial(torch.autocast, "cpu", dtype=dtype)


TRUTH = Form("float64", dtype=torch.float64)
FORMS = [
    Form("exact, float32"),
    Form("exact, float32, fused", fused=True),
    Form("exact, TF32", around=TF32),
    Form("exact, float16, autocast", around=autocast(torch.float16), scale=FIRST_LOSS_SCALE),
    Form("exact, float16, fused", fused=True, activations=torch.float16, scale=FIRST_LOSS_SCALE),
    Form("exact, bfloat16, autocast", around=autocast(torch.bfloat16)),
    Form("exact, bfloat16, fused", fused=True, activations=torch.bfloat16),
    Form("finite difference, float64", exact=False, dtype=torch.float64),
    Form("finite difference, float32", exact=False),
    Form("finite difference, TF32", exact=False, around=TF32),
    Form("finite difference, bfloat16, autocast", exact=False, around=autocast(torch.bfloat16)),
]  # fmt: skip


def product(form: Form, network: Supernet, train: Batch, validation: Batch) -> Tensor:
    """The Hessian-vector product, float64 [2 * 14 * 8]; the network is of the form's dtype and cells."""

    def loss(batch: Batch) -> architect.Loss:
        images = batch[0].to(form.dtype)
        return lambda w, a: network.loss(images, batch[1], w, a, form.activations)

    scale = None if form.scale is None else torch.tensor(form.scale)
    weights = architect.leaves({"weights": network.flat_weights})
    alphas = architect.leaves(network.alphas())
    with form.around(), network.frozen_statistics():
        scaled = architect.times(loss(train)(weights, alphas), scale)
        gradients = architect.gradients(scaled, weights, create_graph=form.exact)
        virtual = STEP(weights, architect.divided(architect.detached(gradients), scale), {})
        _, v = architect._at_virtual_weights(loss(validation), virtual, alphas, scale)
        if form.exact:
            found = architect.exact_hvp(gradients, alphas, v, scale)
        else:
            found = architect.finite_difference_hvp(loss(train), architect.detached(weights), alphas, v)
    return torch.cat([t.flatten() for t in found.values()]).double()


def digits(batch_size: int, batches: int) -> list[Batch]:
    dataset = read_data(SearchConfig(), None)
    assert isinstance(dataset.images, Tensor)
    mean, std = channel_statistics(dataset.images)
    images = (dataset.images.double() - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear").expand(-1, 3, -1, -1)
    order = permutation(len(images), 0)[: batch_size * batches].split(batch_size)
    return [(images[indices], dataset.labels[indices]) for indices in order]


def trained(layers: int, channels: int, steps: int, batch_size: int) -> Supernet:
    """A fused network, float32, after some steps of search on digits."""
    torch.manual_seed(0)
    network = Supernet(channels, 10, layers, fused=True)
    step = SearchStep(network, SearchConfig(fused=True))
    batches = [(x.float(), y) for x, y in reversed(digits(batch_size, 60))]
    for index in range(steps):
        step(batches[2 * index % 60], batches[(2 * index + 1) % 60], 0.025)
    return network


def like(network: Supernet, fused: bool, dtype: torch.dtype) -> Supernet:
    """The same weights in other cells and another dtype."""
    width, image_channels, *_ = network.weights()["stem.0.weight"].shape
    found = Supernet(width // 3, network.classifier.out_features, len(network.cells), image_channels, fused)
    found.load_state_dict(network.state_dict())
    return found.to(dtype)


class Row(NamedTuple):
    """Medians over the batches."""

    cosine: float
    error: float  # relative norm
    seconds: float  # of one process, single-threaded


def table(network: Supernet, batches: list[Batch], forms: list[Form] = FORMS) -> dict[str, Row]:
    """`batches` are taken in pairs: one trains, the next validates."""
    pairs = list(zip(batches[::2], batches[1::2], strict=True))
    reference = like(network, False, torch.float64)
    truth = [product(TRUTH, reference, *pair) for pair in pairs]
    found = {}
    for form in forms:
        candidate, rows = like(network, form.fused, form.dtype), []
        for pair, expected in zip(pairs, truth, strict=True):
            start = time.process_time()
            h = product(form, candidate, *pair)
            seconds = time.process_time() - start
            cosine = torch.nn.functional.cosine_similarity(h, expected, dim=0)
            rows.append((float(cosine), float((h - expected).norm() / expected.norm()), seconds))
        found[form.name] = Row(*(median(column) for column in zip(*rows, strict=True)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--batches", type=int, default=10, help="pairs of batches, of which the median is taken"
    )
    parser.add_argument("--steps", type=int, default=0, help="steps of search before")
    parser.add_argument("--epsilons", action="store_true")
    args = parser.parse_args()
    if args.epsilons:
        return epsilons()
    torch.set_num_threads(1)
    with strict_float32():
        network = trained(args.layers, args.channels, args.steps, args.batch_size)
        found = table(network, digits(args.batch_size, 2 * args.batches))
    print(
        f"torch {torch.__version__}, CPU, one thread; {args.layers} layers, {args.channels} channels, batch "
        f"{args.batch_size}, after {args.steps} steps; medians of {args.batches} pairs of batches"
    )
    rows = [
        (name, f"{row.cosine:.4f}", f"{row.error:.2g}", f"{row.seconds:.2f}") for name, row in found.items()
    ]
    print(*markdown_table(("form, precision", "cosine", "error", "seconds"), rows), sep="\n")


def epsilons() -> None:
    """Prints the finite difference of ever smaller epsilons against the exact product."""
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
    virtual = architect.leaves(STEP(weights, architect.detached(w_gradients), {}))
    v = architect.gradients(loss(1)(virtual, alphas), virtual)
    exact = torch.cat([t.flatten() for t in architect.exact_hvp(w_gradients, alphas, v).values()])
    print(
        f"torch {torch.__version__}, float64, 4 layers, 4 channels, batch 8; exact: norm {exact.norm():.4g}"
    )
    rows = []
    for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        found = architect.finite_difference_hvp(loss(0), architect.detached(weights), alphas, v, size)
        flat = torch.cat([t.flatten() for t in found.values()])
        cosine = torch.nn.functional.cosine_similarity(flat, exact, dim=0)
        rows.append((f"{size:g}", f"{cosine:.3f}", f"{flat.norm() / exact.norm():.2f}"))
    print(*markdown_table(("epsilon * |v|", "cosine with exact", "norm / exact norm"), rows), sep="\n")


if __name__ == "__main__":
    main()
