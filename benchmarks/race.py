"""A race of one second-order step, or of a training step: the variants, that their results agree, and their
times in turns.

`step.py` is the command; `race_tables.py` shows what comes out.
"""

import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
import traffic
from textbook import Batch, TextbookStep, TextbookTraining
from torch import Tensor

from darts_fast import architect, load_genotype
from darts_fast import network as network_of
from darts_fast.capture import Captured
from darts_fast.config import SearchConfig, TrainConfig
from darts_fast.derived import DerivedNetwork, auxiliary_fits
from darts_fast.kernels import native
from darts_fast.kernels.backends import using
from darts_fast.kernels.types import Backend, Call
from darts_fast.profiling import observed_phases
from darts_fast.runs import processor
from darts_fast.search_step import SearchStep
from darts_fast.supernet import Supernet
from darts_fast.train_step import TrainStep

LR = 0.025
TOLERANCE = 1e-9  # relative norm, float64
EVALUATION = "evaluation"  # seconds of one of a batch, with `--train`
OUTSIDE = "outside kernels"  # seconds of a step that no program of the kernels takes


class Variant(NamedTuple):
    """A way to take the step."""

    kernels: str | None = None  # "aten", "native" or "triton"; None: the textbook's cells
    amp_dtype: str | None = None
    captured: bool = False
    channels_last: bool = False
    compiled: bool = False


# The first is what the others are compared with.
VARIANTS = {
    "textbook": Variant(),
    "textbook, channels-last": Variant(channels_last=True),
    "textbook, torch.compile": Variant(compiled=True),
    "fused, ATen": Variant("aten"),
    "fused, C++": Variant("native"),
    "fused, Triton": Variant("triton"),
    "fused, Triton, captured": Variant("triton", captured=True),
    "fused, Triton, float16": Variant("triton", "float16"),
    "fused, Triton, float16, captured": Variant("triton", "float16", captured=True),
    "fused, Triton, bfloat16, captured": Variant("triton", "bfloat16", captured=True),
}


class Setting(NamedTuple):
    """The sizes of one race. `size` is the side of the square images; `partial_channels` is PC-DARTS's K, for
    searches alone."""

    batch_size: int = 16
    init_channels: int = 16
    layers: int = 8
    size: int = 32
    threads: int = 1
    partial_channels: int = 1

    @property
    def label(self) -> str:
        shown = self if self.partial_channels > 1 else self[:-1]
        return "-".join(f"{letter}{value}" for letter, value in zip("bclstk", shown, strict=False))


_SMALL = SearchConfig.SMALL
DIGITS = Setting(SearchConfig().batch_size, _SMALL["init_channels"], _SMALL["layers"], 8)


def missing(variant: Variant, device: torch.device) -> str | None:
    """Returns why a variant cannot run on this device; None where it can."""
    if variant.kernels == "triton" and device.type != "cuda":
        return "the Triton kernels run on CUDA"
    if variant.kernels == "native" and device.type != "cpu":
        return "the C++ kernels run on the CPU"
    if variant.kernels == "native" and native.level() is None:
        return "the C++ kernels were not built"
    return None


def supernet(
    channels: int, layers: int, fused: bool, dtype: torch.dtype, partial_channels: int = 1
) -> Supernet:
    torch.manual_seed(0)
    return Supernet(channels, 10, layers, fused=fused, partial_channels=partial_channels).to(dtype)


def batches(size: int, side: int, dtype: torch.dtype) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(size, 3, side, side, dtype=dtype), torch.randint(10, (size,))) for _ in range(2)]


def derived(channels: int, layers: int, size: int, fused: bool, dtype: torch.dtype) -> DerivedNetwork:
    """The network of DARTS_V2, with the auxiliary head where images of this size are large enough for it."""
    torch.manual_seed(0)
    genotype, auxiliary = load_genotype("DARTS_V2"), auxiliary_fits(size, size, "cifar")
    return network_of(genotype, 10, channels, layers, auxiliary=auxiliary, fused=fused).to(dtype)


# That the results agree


def error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    difference: Any = sum(((found[name] - expected[name]) ** 2).sum() for name in expected)
    return float((difference / sum((t**2).sum() for t in expected.values())).sqrt().detach())


def check(partial_channels: int = 1) -> None:
    """On the CPU, on a small network in float64: the fused step with finite differences must end where the
    textbook's does, and its exact product must be automatic differentiation's on the reference cell. Raises
    AssertionError where they do not."""
    dtype, (train, validation) = torch.float64, batches(4, 8, torch.float64)
    networks = [supernet(4 * partial_channels, 3, fused, dtype, partial_channels) for fused in (False, True)]
    differences = SearchConfig(hvp="finite-difference")
    steps = TextbookStep(networks[0], differences), SearchStep(networks[1], differences)
    for _ in range(2):
        for step in steps:
            step(train, validation, LR)
    for kind in ("weights", "alphas"):
        found, expected = (getattr(network, kind)() for network in networks[::-1])
        assert error(found, expected) < TOLERANCE, f"{kind} after two steps: {error(found, expected):.3g}"

    networks = [supernet(4 * partial_channels, 3, fused, dtype, partial_channels) for fused in (False, True)]
    products = [quantities(network, (train, validation)) for network in networks]
    for name, expected in products[0].items():
        found = error({name: products[1][name]}, {name: expected})
        assert found < TOLERANCE, f"{name}: {found:.3g}"


def check_training() -> None:
    """On the CPU, on a small network in float64: two training steps, with drop path and auxiliary head, and
    an evaluation after them must end where the textbook's do. Raises AssertionError where they do not."""
    config, ((images, labels), _) = TrainConfig(drop_path_prob=0.2), batches(4, 24, torch.float64)
    modules = [derived(4, 3, 24, fused, torch.float64) for fused in (False, True)]
    for module in modules:
        module.drop_path_generator = torch.Generator().manual_seed(2)
    steps: list[Any] = [TextbookTraining(modules[0], config), TrainStep(modules[1], config)]
    for _ in range(2):
        for step, module in zip(steps, modules, strict=True):
            module.drop_path_prob = torch.tensor(0.3)
            step.take(images, labels)
    found, expected = (dict(module.state_dict()) for module in modules[::-1])
    assert error(found, expected) < TOLERANCE, f"weights after two steps: {error(found, expected):.3g}"
    with torch.no_grad():
        logits = [{"logits": module.eval()(images)} for module in modules]
    assert error(logits[1], logits[0]) < TOLERANCE, f"an evaluation: {error(logits[1], logits[0]):.3g}"


def quantities(
    network: Supernet,
    pair: Iterable[Batch],
    activations: torch.dtype | None = None,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """The virtual step's gradient, v, and the exact product of a training and a validation batch, each as one
    tensor; `activations` and `scale` (of the loss) as in `SearchStep`."""
    train, validation = pair
    loss = partial(network.loss, activations=activations)
    factor = None if scale is None else torch.tensor(scale, device=train[0].device)
    weights = architect.leaves({"weights": network.flat_weights})
    alphas = architect.leaves(network.alphas())
    step = architect.VirtualStep(LR, 0.9, 3e-4)
    with network.frozen_statistics():
        scaled = architect.times(loss(*train, weights, alphas), factor)
        gradients = architect.gradients(scaled, weights, create_graph=True)
        found = architect.divided(architect.detached(gradients), factor)
        virtual = step(weights, found, {})
        _, v = architect._at_virtual_weights(lambda w, a: loss(*validation, w, a), virtual, alphas, factor)
        product = architect.exact_hvp(gradients, alphas, v, factor)
    flat = torch.cat([t.flatten() for t in product.values()])
    return {"gradient": found["weights"], "v": v["weights"], "exact product": flat}


def check_on(
    device: torch.device, channels: int, layers: int, size: int, copies: int = 8, partial_channels: int = 1
) -> dict[str, list[float]]:
    """The fused network's `quantities` in float32 on a device against the reference's in float64 there, batch
    16: their errors may be twice the reference's largest over eight copies of the weights moved by 6e-8
    relative (kinks make float32 itself no better). Returns [error, that allowance]; raises AssertionError."""
    pair = [(x.to(device), y.to(device)) for x, y in batches(16, size, torch.float64)]
    narrow = [(x.float(), y) for x, y in pair]

    def made(fused: bool) -> Supernet:
        return supernet(channels, layers, fused, torch.float32, partial_channels)

    # The same weights for all three: drawn in float32, then widened.
    exact = quantities(made(False).double().to(device), pair)

    def errors(network: Supernet) -> dict[str, float]:
        found = quantities(network, narrow)
        return {name: error({name: found[name].double()}, {name: t}) for name, t in exact.items()}

    allowed = dict.fromkeys(exact, 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(copies):
        network = made(False)
        with torch.no_grad():
            network.flat_weights.mul_(1 + 6e-8 * torch.randn(network.flat_weights.shape, generator=generator))
        for name, value in errors(network.to(device)).items():
            allowed[name] = max(allowed[name], 2 * value)
    found = errors(made(True).to(device))
    for name, value in found.items():
        assert value <= allowed[name], f"{name} on {device}: {value:.3g}, allowed {allowed[name]:.3g}"
    return {name: [value, allowed[name]] for name, value in found.items()}


# The race


class Timed:
    """A `Backend` that computes by another one and adds up the seconds that its programs take on the host."""

    def __init__(self, backend: Backend, clock: Callable[[], float]):
        self.backend, self.clock, self.seconds = backend, clock, 0.0

    def program(self, calls: Sequence[Call]) -> Callable[[], None]:
        run, clock = self.backend.program(calls), self.clock

        def timed() -> None:
            start = clock()
            run()
            self.seconds += clock() - start

        return timed


class Runner:
    """A variant at a setting on a device, ready to take steps. `peak`: bytes at most allocated for it, on
    CUDA. `clock` gives seconds on a CPU."""

    clock = staticmethod(time.perf_counter)
    count = staticmethod(traffic.count)

    def __init__(self, name: str, setting: Setting, device: torch.device, compile_seconds: int = 0):
        self.name, self.variant, self.setting, self.device = name, VARIANTS[name], setting, device
        self.peak: int | None = None
        self.backend: Timed | None = None
        self.graph: Captured | None = None
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.fused = self.variant.kernels is not None
        if self.fused:
            self.backend = Timed(import_module(f"darts_fast.kernels.{self.variant.kernels}"), self.clock)
        self.network = self._network().to(device)
        pair = batches(setting.batch_size, setting.size, torch.float32)
        self.batches = [(x.to(device), y.to(device)) for x, y in pair]
        if self.variant.channels_last:
            self.batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in self.batches]
        limit: AbstractContextManager[None] = nullcontext()
        if self.variant.compiled:
            if not compile_seconds:
                raise TimeoutError("compiling its cells takes minutes: --compile_seconds N allows it N")
            torch._dynamo.config.recompile_limit = 64  # the cells differ in shape, and in mode
            for cell in self.network.cells:
                cell.compile()
            limit = time_limit(compile_seconds)
        self.step = self._step()
        with limit:
            self.take()
        if device.type == "cuda":
            self.take()
            self.peak = torch.cuda.max_memory_allocated(device) - before

    def take(self) -> dict[str, float]:
        """Takes a step; seconds of each phase, of the whole, and on a CPU outside the kernels' programs."""
        if self.device.type == "cpu" and torch.get_num_threads() != self.setting.threads:
            torch.set_num_threads(self.setting.threads)
        if self.backend is None:
            return timed(self.step, self.device, self.clock)
        before = self.backend.seconds
        with using(self.backend):  # type: ignore[arg-type]  # nothing but `program` is called
            found = timed(self.step, self.device, self.clock, phases=not self.variant.captured)
        if self.device.type == "cpu":
            found[OUTSIDE] = found["step"] - (self.backend.seconds - before)
        return found

    def _network(self) -> Any:
        setting = self.setting
        sizes = setting.init_channels, setting.layers
        return supernet(*sizes, self.fused, torch.float32, setting.partial_channels)

    def _step(self) -> Callable[[], object]:
        config = SearchConfig(fused=self.fused, amp_dtype=self.variant.amp_dtype)
        train, validation = self.batches
        if not self.fused:
            return partial(TextbookStep(self.network, config), train, validation, LR)
        step = SearchStep(self.network, config)
        if not self.variant.captured:
            return partial(step, train, validation, LR)
        step.lr.fill_(LR)
        names = "train_images", "train_labels", "validation_images", "validation_labels"
        return self._captured(step, dict(zip(names, (*train, *validation), strict=True)))

    def _captured(self, step: SearchStep | TrainStep, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        """The step as one CUDA graph, captured when it is first taken."""
        buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        self.graph = Captured(step.take, buffers, step.tensors, graph=True)
        return partial(self.graph, None, **inputs)


class TrainingRunner(Runner):
    """A `Runner` of a training step of DARTS_V2, with the auxiliary head where images are large enough for
    it, and of an evaluation of the same batch."""

    count = staticmethod(partial(traffic.count, train=True))

    def take(self) -> dict[str, float]:
        found = super().take()
        self.network.eval()
        backend: Any = self.backend
        with torch.no_grad(), nullcontext() if backend is None else using(backend):
            seconds = timed(lambda: self.network(self.batches[0][0]), self.device, self.clock, phases=False)
        self.network.train()
        return {**found, EVALUATION: seconds["step"]}

    def _network(self) -> Any:
        setting = self.setting
        module = derived(setting.init_channels, setting.layers, setting.size, self.fused, torch.float32)
        if self.variant.channels_last:
            module.to(memory_format=torch.channels_last)
        return module

    def _step(self) -> Callable[[], object]:
        config = TrainConfig(drop_path_prob=0.2, fused=self.fused, amp_dtype=self.variant.amp_dtype)
        step = TrainStep(self.network, config) if self.fused else None
        plain = TextbookTraining(self.network, config) if step is None else step
        self.network.drop_path_prob = torch.full((), 0.1, device=self.device)
        images, labels = self.batches[0]
        if step is not None and self.variant.captured:
            return self._captured(step, {"images": images, "labels": labels})
        return partial(plain.take, images, labels)


def timed(
    step: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    phases: bool = True,
) -> dict[str, float]:
    """Takes the step; returns the seconds of each phase, if they are wanted, and of the whole step, on CUDA
    by the device's own clock."""
    marks = [("", _mark(device, clock))]

    def ended(name: str) -> None:
        marks.append((name, _mark(device, clock)))

    with observed_phases(ended) if phases else nullcontext():
        step()
    ended("step")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found = {name: _between(a, b) for (_, a), (name, b) in pairwise(marks[:-1])}
    return {**found, "step": _between(marks[0][1], marks[-1][1])}


def _mark(device: torch.device, clock: Callable[[], float]) -> Any:
    if device.type != "cuda":
        return clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a: Any, b: Any) -> float:
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError within, after so many seconds (in the main thread, where there is SIGALRM)."""
    late = TimeoutError(f"it took more than {seconds} s")

    def over(*_: Any) -> None:
        raise late

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # again: what is raised may be swallowed
    try:
        yield
    except Exception as error:  # the compiler wraps what is raised within
        raise late if str(late) in str(error) or late is error.__cause__ else error from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def runners(
    names: list[str],
    setting: Setting,
    device: torch.device,
    compile_seconds: int = 0,
    kind: type[Runner] = Runner,
) -> tuple[list[Runner], dict[str, str]]:
    """Returns the variants that can run here, warmed up, and why the others are left out."""
    found, left_out = [], {}
    for name in names:
        reason = missing(VARIANTS[name], device)
        if reason is None:
            try:
                found.append(kind(name, setting, device, compile_seconds))
            except Exception as problem:  # the others are timed all the same, and the reason is told
                if name == next(iter(VARIANTS)):
                    raise
                first = (str(problem).strip().splitlines() or [""])[0]
                reason = first if isinstance(problem, TimeoutError) else f"{type(problem).__name__}: {first}"
        if reason is not None:
            left_out[name] = reason
    return found, left_out


def race(
    entrants: list[Runner], repeats: int, after: Callable[[list[list[dict[str, float]]]], None] | None = None
) -> list[list[dict[str, float]]]:
    """Takes `repeats` steps of each, in turns; `after` is called with all rows so far after each turn."""
    rows: list[list[dict[str, float]]] = [[] for _ in entrants]
    for _ in range(repeats):
        for runner, found in zip(entrants, rows, strict=True):
            found.append(runner.take())
        if after is not None:
            after(rows)
    return rows


def percentiles(values: list[float]) -> list[float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return values * 3
    cuts = quantiles(values, n=10, method="inclusive")
    return [cuts[1], cuts[4], cuts[7]]


def summary(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """p20, p50 and p80 of each phase."""
    return {name: percentiles([row[name] for row in rows]) for name in rows[0]}


def counted(runner: Runner) -> traffic.Counted | None:
    """Counts the variant's step by traffic.py; None where traffic.py cannot count it."""
    setting, variant = runner.setting, runner.variant
    if variant.compiled or variant.channels_last or variant.kernels == "aten":
        return None
    dtype = torch.float32 if variant.amp_dtype is None else torch.bfloat16  # as many bytes as float16
    sizes = setting.batch_size, setting.init_channels, setting.layers, setting.size
    partial_channels = setting.partial_channels
    return runner.count(variant.kernels, *sizes, dtype=dtype, partial_channels=partial_channels)


def records(
    entrants: list[Runner], rows: list[list[dict[str, float]]], rate: float, count: bool = True
) -> list[dict[str, Any]]:
    """What is known of each variant, as it is written to the results; `rate` is the copy rate, bytes a
    second. The ratio is of the textbook's step at the same setting, if it ran."""
    found = []
    for runner, own in zip(entrants, rows, strict=True):
        base = [
            r
            for other, r in zip(entrants, rows, strict=True)
            if other.setting == runner.setting and other.name == next(iter(VARIANTS))
        ]
        seconds = summary(own)
        record: dict[str, Any] = {"variant": runner.name, "setting": runner.setting._asdict()}
        record["seconds"] = seconds
        if OUTSIDE in own[0]:
            record[OUTSIDE] = percentiles([row[OUTSIDE] / row["step"] for row in own])[1]
        if base:
            for name, of in (("ratio", "step"), (f"ratio of {EVALUATION}", EVALUATION)):
                if of in own[0]:
                    record[name] = percentiles([b[of] / o[of] for b, o in zip(base[0], own, strict=True)])
        counts = counted(runner) if count else None
        if counts:
            record |= counts.total._asdict()
            record["bandwidth"] = counts.total.bytes / seconds["step"][1]
            record["of copy"] = record["bandwidth"] / rate
            record["peak counted"] = counts.peak
        if runner.peak is not None:
            record["peak measured"] = runner.peak
        found.append(record)
    return found


# Where it ran


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"
