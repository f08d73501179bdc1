"""Computes independent runs side by side on a Ray cluster, and goes on with the run of a worker that died.

Every machine has darts_fast installed and sees the run folders at the same paths (a shared file system).
"""

import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import ERROR
from pathlib import Path
from typing import Any

import torch

from darts_fast.errors import InputError, RunError, first_line
from darts_fast.runs import CHECKPOINT, Interrupted, Locked, Run, Stopped, StopSignal

# Before the import, which reads it: a search reports nothing to Ray's makers unless the user asks for it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError
except ModuleNotFoundError as error:
    raise InputError(
        '--cluster needs Ray, which is not installed: pip install "darts_fast[cluster]"'
    ) from error

DEATHS = 3  # of a run's workers without a new checkpoint between them, before the others are stopped, too
LEASE = 120  # seconds; NFS keeps the lock of a machine that died for its lease, 90 seconds by default


# A run's key and None when it begins, its key and its value when it ends
Mapped = Generator[tuple[str, Any], None, None]


@dataclass(frozen=True)
class Cluster:
    """Where runs are computed.

    Args:
        address: HOST:PORT of a Ray cluster of which this machine is one; None: Ray is started on this machine
            alone, and ended afterwards.
        cpus: processors and threads of a run.
    """

    address: str | None = None
    cpus: int = 1

    def __post_init__(self):
        if self.cpus < 1:
            raise InputError(f"cpus must be at least 1, not {self.cpus}")
        if self.address is not None and not re.fullmatch(r"[^:/]+:[0-9]{1,5}", self.address):
            raise InputError(
                f"--cluster takes HOST:PORT of the Ray cluster that this machine is in, not {self.address}"
            )

    @contextmanager
    def started(self, device: str) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Run]], Mapped]]:
        """Connects to Ray, and yields a function that maps a function over runs, each with `cpus` processors
        and, on CUDA, a GPU of its own. Within, this process has as many threads as a run, so that its
        environment is a run's, and Ctrl-C and SIGTERM stop the runs.

        Raises:
            InputError: there is no such cluster, or none of its machines has what a run needs.
        """
        gpus = int(device.startswith("cuda"))
        if device not in ("cpu", "cuda", "cuda:0"):
            raise InputError(f"Ray gives each run its GPU: with --cluster give --device cuda, not {device}")
        try:
            if self.address:  # Ray itself tries for ten minutes and more
                host, port = self.address.split(":")
                socket.create_connection((host, int(port)), 10).close()
            ray.init(
                self.address or "local", include_dashboard=False, log_to_driver=False, logging_level=ERROR
            )
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            where = f"at {self.address}" if self.address else "on this machine"
            raise InputError(f"no Ray {where} ({first_line(error)})") from error
        threads = torch.get_num_threads()
        torch.set_num_threads(self.cpus)
        try:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            machines = [machine.get("CPU", 0) for machine in machines if machine.get("GPU", 0) >= gpus]
            if max(machines, default=0) < self.cpus:
                raise InputError(
                    f"no machine of the cluster has {self.cpus} processors{' and a GPU' * gpus}; "
                    f"the largest{' with a GPU' * gpus} has {max(machines, default=0):.0f}"
                )
            task = ray.remote(
                num_cpus=self.cpus,
                num_gpus=gpus,
                num_returns="streaming",
                max_retries=0,  # `_mapped` begins it again, and says so
                max_calls=gpus,  # a process that ends gives its memory of the GPU back; 0: no limit
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self.cpus)}},
            )(_in_worker)
            with StopSignal() as stop:
                yield partial(_mapped, task, stop)
        finally:
            torch.set_num_threads(threads)
            ray.shutdown()


def _in_worker(function: Callable[[Any], Any], run: Run) -> Iterator[Any]:
    """Yields True when the run begins, then its value, its InputError or RunError; None of one that was told
    to stop. Ray stops a task as Ctrl-C does, which makes a run finish its step and save."""
    yield True
    since = time.monotonic()
    while True:
        try:
            yield function(run)
            return
        except Locked as error:  # by the worker before, which is ending
            if time.monotonic() - since > LEASE:
                yield error
                return
            time.sleep(1)
        except (InputError, RunError) as error:
            yield error
            return
        except Stopped:
            yield None
            return


def _mapped(task: Any, stop: StopSignal, function: Callable[[Any], Any], runs: Sequence[Run]) -> Mapped:
    """Of every run its key and None when it begins, also when it begins again because its worker died; then
    its key and the value of `function(run)`, which is never None. All runs are handed to Ray at once, which
    computes as many at a time as the cluster has processors or GPUs for.

    Raises, once all other runs are stopped and saved:
        InputError, RunError: `function` raised it.
        RunError: the workers of a run die again and again.
        Interrupted: Ctrl-C or SIGTERM.
    """
    shared = ray.put(function)
    under_way: dict[Any, Run] = {task.remote(shared, run): run for run in runs}
    deaths: dict[str, tuple[int | None, int]] = {}  # the checkpoint at the last one, how many there were
    end: BaseException | None = None  # why no other run begins
    while under_way:
        if end is None and stop.received is not None:
            end = Interrupted(stop.received)
            _cancel(under_way)
        ready: list[Any]
        ready, _ = ray.wait(list(under_way), timeout=0.5)
        for values in ready:
            run, why = under_way[values], "it was told to stop"
            value: Any
            try:
                value = ray.get(next(values))
            except StopIteration:  # it was told to stop, and Ray left out its last value
                value = None
            except RayError as error:
                value, why = None, first_line(error)
                if isinstance(error, RayTaskError) and not isinstance(error, TaskCancelledError):
                    value = error
            if value is True:
                yield run.key, None
                continue
            del under_way[values]
            if value is None and end is None:
                checkpoint = _time_of(run.folder / CHECKPOINT)
                before, count = deaths.get(run.key, (None, 0))
                deaths[run.key] = checkpoint, count + 1 if checkpoint == before else 1
                if deaths[run.key][1] < DEATHS:
                    under_way[task.remote(shared, run)] = run
                    continue
                value = RunError(f"{run.key} lost {DEATHS} workers without a new checkpoint ({why})")
            if isinstance(value, Exception) and end is None:
                end = value
                _cancel(under_way)
            elif value is not None and not isinstance(value, Exception):
                yield run.key, value
    if end is not None:
        raise end


def _cancel(under_way: dict[Any, Run]) -> None:
    for values in under_way:
        ray.cancel(values, recursive=False)


def _time_of(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
