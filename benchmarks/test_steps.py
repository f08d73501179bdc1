"""Steps of a search and of a training, and the images they consume.

    pytest benchmarks/ --benchmark-only [--device cuda] [--benchmark-json F]

The sizes take a CPU seconds; benchmarks/step.py races the search step at the paper's width.
"""

import pytest
import torch
import torch.nn.functional as F
from race import VARIANTS, Runner, Setting, batches, check, check_on, missing, summary

from darts_fast import load_genotype, network
from darts_fast.data import Batches

CPU, GPU = Setting(16, 16, 3, 16), Setting(64, 16, 8, 32)


def words(setting):
    batch, channels, layers, size, *_ = setting
    return f"batch {batch}, {channels} channels, {layers} layers, {size}x{size}"


@pytest.fixture(scope="module")
def setting(device):
    return (CPU if device.type == "cpu" else GPU)._replace(threads=torch.get_num_threads())


@pytest.fixture(scope="module")
def checked(device):
    """Nothing is timed before the results agree."""
    check()
    if device.type == "cuda":
        check_on(device, 16, 3, 32)


def runner(name, setting, device):
    reason = missing(VARIANTS[name], device)
    if reason:  # the machine lacks what the variant runs on: a CUDA device, or a compiler at install
        pytest.skip(reason)
    # 3 layers, batch 4, 16x16 were not done after 2.5 minutes of one thread; the whole suite takes as long.
    if VARIANTS[name].compiled and device.type == "cpu":
        pytest.skip("compiling its cells takes minutes on a CPU")
    try:
        return Runner(name, setting, device, compile_seconds=120)
    except TimeoutError as late:  # of torch.compile, which is a peer here; the error says what took how long
        pytest.skip(str(late))


@pytest.mark.parametrize("name", VARIANTS)
def test_search_step(benchmark, timed, checked, setting, device, name):
    """Whole; the p50 of its phases is in the JSON."""
    benchmark.group = f"second-order search step: {words(setting)}"
    taken = runner(name, setting, device)
    found = []
    timed(lambda: found.append(taken.take()), rounds=3 if device.type == "cpu" else 20)
    benchmark.extra_info["seconds"] = {name: middle for name, (_, middle, _) in summary(found).items()}
    if taken.peak is not None:
        benchmark.extra_info["peak bytes"] = taken.peak


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_training_step(benchmark, timed, setting, device, fused):
    benchmark.group = f"training step of DARTS_V2: {words(setting)}"
    torch.manual_seed(0)
    modules = [
        network(load_genotype("DARTS_V2"), 10, setting.init_channels, setting.layers, fused=f).to(device)
        for f in dict.fromkeys([False, fused])
    ]
    modules[-1].load_state_dict(modules[0].state_dict())
    images, labels = (t.to(device) for t in batches(setting.batch_size, setting.size, torch.float32)[0])
    outputs = [module(images).detach() for module in modules]
    assert (outputs[-1] - outputs[0]).norm() <= 1e-4 * outputs[0].norm()
    optimizer = torch.optim.SGD(modules[-1].parameters(), 0.025, 0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(modules[-1](images), labels).backward()
        optimizer.step()

    timed(step, rounds=10, warmup_rounds=2)


def test_images(benchmark, timed, setting, device):
    """A search step's two batches, cropped, flipped and cut out; and what of a step that takes."""
    benchmark.group = f"two batches of {setting.batch_size} images, augmented"
    size, count = setting.size, setting.batch_size
    images = torch.randint(256, (2048, 3, size, size), dtype=torch.uint8)
    statistics = torch.full((3,), 128.0), torch.full((3,), 64.0)
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.zeros(2048, dtype=torch.int64)
    data = Batches(images, labels, device, statistics, generator, 4, True, size // 2)
    found, _ = data.cut(data.placed(torch.arange(count)), augment=False)
    assert torch.allclose(found.cpu(), (images[:count].float() - 128) / 64)
    orders = data.placed(torch.randperm(2048)).split(count)
    timed(lambda: [data.cut(order, augment=True) for order in orders[:2]], rounds=50, warmup_rounds=2)
    fastest = "fused, Triton, float16, captured" if device.type == "cuda" else "fused, C++"
    if benchmark.stats and not missing(VARIANTS[fastest], device):
        step = Runner(fastest, setting, device).take()["step"]
        mean = benchmark.stats.stats.median
        benchmark.extra_info["images a second"] = 2 * count / mean
        benchmark.extra_info["images a second that the step consumes"] = 2 * count / step
