"""Steps of a search and of a training, and the images they consume, at a setting that takes a CPU seconds.

    pytest benchmarks/ --benchmark-only [--benchmark-json F]

benchmarks/step.py races the search step at the paper's width, phase by phase.
"""

import pytest
import torch
import torch.nn.functional as F
from step import LR, VARIANTS, batches, check, supernet

from darts_fast import load_genotype, network
from darts_fast.config import SearchConfig
from darts_fast.data import Batches
from darts_fast.kernels import native
from darts_fast.kernels.backends import using

BATCH, CHANNELS, LAYERS, SIZE = 16, 16, 3, 32
SETTING = f"batch {BATCH}, {CHANNELS} channels, {LAYERS} layers, {SIZE}x{SIZE}"


@pytest.fixture(scope="module")
def checked():
    """Nothing is timed before the results agree."""
    check()


@pytest.mark.benchmark(group=f"second-order search step, {SETTING}")
@pytest.mark.parametrize("name", VARIANTS)
def test_search_step(benchmark, checked, name):
    step, kernels = VARIANTS[name]
    # Without a compiler the install succeeds and has no C++ kernels to time.
    if kernels is native and native.level() is None:
        pytest.skip("the C++ kernels were not built")
    taken = step(supernet(CHANNELS, LAYERS, name != "textbook", torch.float32), SearchConfig())
    pair = batches(BATCH, SIZE, torch.float32)
    with using(kernels):
        benchmark.pedantic(lambda: list(taken.phases(*pair, LR)), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group=f"training step of DARTS_V2, {SETTING}")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_training_step(benchmark, fused):
    torch.manual_seed(0)
    modules = [
        network(load_genotype("DARTS_V2"), 10, CHANNELS, LAYERS, fused=f)
        for f in dict.fromkeys([False, fused])
    ]
    modules[-1].load_state_dict(modules[0].state_dict())
    images, labels = batches(BATCH, SIZE, torch.float32)[0]
    outputs = [module(images).detach() for module in modules]
    assert (outputs[-1] - outputs[0]).norm() <= 1e-4 * outputs[0].norm()
    optimizer = torch.optim.SGD(modules[-1].parameters(), 0.025, 0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(modules[-1](images), labels).backward()
        optimizer.step()

    benchmark.pedantic(step, rounds=10, warmup_rounds=2)


@pytest.mark.benchmark(group=f"a search step's two batches, cropped, flipped and cut out, batch {BATCH}")
def test_images(benchmark):
    images = torch.randint(256, (2048, 3, SIZE, SIZE), dtype=torch.uint8)
    statistics = torch.full((3,), 128.0), torch.full((3,), 64.0)
    generator = torch.Generator().manual_seed(0)
    data = Batches(
        images, torch.zeros(2048, dtype=torch.int64), torch.device("cpu"), statistics, generator, 4, True, 16
    )
    found, _ = data.cut(torch.arange(BATCH), augment=False)
    assert torch.allclose(found, (images[:BATCH].float() - 128) / 64)
    orders = torch.randperm(2048, generator=generator).split(BATCH)
    benchmark.pedantic(lambda: [data.cut(order, augment=True) for order in orders[:2]], rounds=50)
