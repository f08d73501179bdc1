"""Some steps of a run recorded by torch.profiler, and the names of their phases.

`trace.py` reads what is recorded, `report.py` says what it means.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

WARM_UP = 3  # steps before the first one that is recorded: libraries set themselves up, kernels are compiled
FOLDER = "profile"
STEP = "step"
UNCAPTURED = "a step, uncaptured"  # recorded once beside a captured one, see `Profiler`

_recording: list[torch.device] = []  # the device, while steps are recorded
_observers: list[Callable[[str], None]] = []


def phase(name: str) -> AbstractContextManager:
    """A part of a step by name: a range of the trace, while one is recorded, and what `observed_phases` tells
    of. Otherwise nothing."""
    return _range(name) if _recording or _observers else nullcontext()


@contextmanager
def observed_phases(ended: Callable[[str], None]) -> Iterator[None]:
    """Within, `ended` is called with the name of each phase that has ended."""
    _observers.append(ended)
    try:
        yield
    finally:
        _observers.pop()


@contextmanager
def _range(name: str) -> Iterator[None]:
    with ExitStack() as within:
        if _recording:
            within.enter_context(torch.profiler.record_function(name))
            if _recording[-1].type == "cuda":
                within.enter_context(torch.cuda.nvtx.range(name))
        yield
    for ended in _observers:
        ended(name)


class Profiler:
    """Records steps number WARM_UP + 1 to WARM_UP + `steps` of those that run within `step()`.

    Args:
        trial: for a step that is replayed as one CUDA graph: `Captured.trial`, which calls its argument with
            the uncaptured step and leaves no trace of it. That step is recorded first: a replay launches the
            same kernels in the same order, and only there it is seen which phase they belong to.
    """

    def __init__(self, steps: int, device: torch.device, trial: Callable[[Callable], Any] | None = None):
        self.steps, self.device, self.trial, self.taken = steps, device, trial, 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)

    @property
    def recorded(self) -> int:
        return max(0, self.taken - WARM_UP)

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of the run."""
        if self.taken == WARM_UP:
            self._wait()
            self._profile.start()
            _recording.append(self.device)
        try:
            if self.taken == WARM_UP and self.trial is not None:
                self.trial(self._uncaptured)
            with phase(STEP):
                yield
                if self.recorded == self.steps - 1 and self.taken >= WARM_UP:
                    self._wait()  # the last step ends when the device has done it
            self.taken += 1
        except BaseException:
            self.stop()
            raise
        if self.recorded == self.steps:
            self.stop()

    def _uncaptured(self, take: Callable[[], Any]) -> None:
        self._wait()
        with phase(UNCAPTURED):
            take()
            self._wait()

    def stop(self) -> None:
        """Ends the recording, if it was under way."""
        if _recording:
            _recording.clear()
            self._profile.stop()

    def save_trace(self, folder: Path) -> list[dict[str, Any]]:
        """trace.json.gz into `folder`, which is made; returns its events."""
        folder.mkdir(parents=True, exist_ok=True)
        plain = folder / "trace.json"
        self._profile.export_chrome_trace(str(plain))
        content = plain.read_bytes()
        with gzip.open(folder / "trace.json.gz", "wb", compresslevel=1) as file:
            file.write(content)
        plain.unlink()
        return json.loads(content)["traceEvents"]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for the caches: the best of five."""
    x = torch.zeros(2**26 if device.type == "cuda" else 2**24, device=device)  # 256 MiB, 64 MiB
    y, best = torch.empty_like(x), float("inf")
    for _ in range(6):
        start = perf_counter()
        y.copy_(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - start)
    return 2 * x.nbytes / best
