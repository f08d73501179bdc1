"""New processes for tests that kill, stop or connect them.

They are forks of one process that has imported what a run imports and has done nothing else: PyTorch, its
optimizers' compiler, scikit-learn, matplotlib, which are four seconds of a processor.
"""

import multiprocessing
import os
import random
import runpy
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import checkpoint

# Windows has no fork: there each imports it all.
_CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    _CONTEXT.set_forkserver_preload(
        [
            "darts_fast.protocol", "torch._dynamo", "sklearn.datasets", "pygraphviz", "matplotlib.figure",
            "matplotlib.backends.backend_agg",
            # What tests/conftest.py imports, besides
            "hypothesis", "pytest", "tensorboard.backend.event_processing.event_file_loader",
        ]
    )  # fmt: skip


def start(work, *arguments, output: str | Path = os.devnull) -> BaseProcess:
    """Calls `work(*arguments)`, a function of a module, in a new process and in the current folder. What it
    prints is appended to the file `output`."""
    process = _CONTEXT.Process(target=_call, args=(work, arguments, os.getcwd(), str(output)))
    process.start()
    return process


def start_program(program: Path, *arguments: str, output: str | Path = os.devnull) -> BaseProcess:
    """As `python program arguments` in the current folder."""
    return start(_run, str(program), arguments, output=output)


def killed_twice_and_resumed(program: Path, arguments: list[str], run: Path, later: float) -> None:
    """Runs `python program arguments` to its end, but kills it twice, at random moments up to so many seconds
    after it has written a checkpoint in its run folder, which then can be read and gone on from."""
    rng = random.Random(1)
    process = start_program(program, *arguments)
    for _ in range(2):
        kill_at_work(process, run, later * rng.random())
        checkpoint(run)
        process = start_program(program, "--resume", str(run))
    process.join()
    assert process.exitcode == 0


def kill_at_work(process: BaseProcess, run: Path, later: float) -> None:
    """Kills it so many seconds after it has written the checkpoint of its run folder once more."""
    file = run / "checkpoint.pt"
    while not file.exists():
        assert process.exitcode is None
        time.sleep(0.01)
    seen = file.stat().st_mtime_ns
    while file.stat().st_mtime_ns == seen:
        assert process.exitcode is None
        time.sleep(0.002)
    time.sleep(later)
    assert process.exitcode is None  # it is killed at work, not after it
    process.kill()
    process.join()


def _call(work, arguments, folder, output):
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    work(*arguments)


def _run(program, arguments):
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
