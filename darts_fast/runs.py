"""A run folder: log, metrics, TensorBoard, pictures, checkpoints; how a run stops and is resumed.

Everything but the checkpoint is only ever appended to. A checkpoint records how long each of those files
was; resuming cuts them back to that length, so that a step which is computed again is written once.
"""

import io
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text as text_summary
from tqdm import tqdm

import darts_fast
from darts_fast.errors import InputError, RunError

CHECKPOINT = "checkpoint.pt"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
EVENTS = "tb/events.out.tfevents.0.darts_fast"  # TensorBoard reads every file with "tfevents" in its name


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and the run saved. The message says how to resume."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class RunFolder:
    """The files of one run. Make one with `create` or `reopen`; close it (it is a context manager)."""

    def __init__(self, path: Path, name: str):
        self.path = path
        self._console = True
        with writing(path):
            for folder in ("tb", "plots"):
                (path / folder).mkdir(exist_ok=True)
            self._log = (path / f"{name}.log").open("ab")
            self._metrics = (path / METRICS).open("ab")
            self._events = (path / EVENTS).open("ab")
        self._records = RecordWriter(self._events)
        if self._events.tell() == 0:
            self._event(file_version="brain.Event:2")

    @classmethod
    def create(cls, parent: str, name: str | None, default_name: str, config: dict[str, Any]) -> "RunFolder":
        """A new folder `parent/name`; without a name the first free of default_name, default_name-2, ...

        Raises:
            InputError: the name is no folder name, the folder exists, or it cannot be written.
        """
        if name is not None and (not name.strip() or name in (".", "..") or set(name) & set("/\\\0\n")):
            raise InputError(f"name must be the name of a new folder below {parent}, not {name!r}")
        path = Path(parent, name or default_name)
        number = 1
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    if name is not None:
                        raise InputError(
                            f"{path} exists and is not overwritten; choose another --name, "
                            f"or go on with it by --resume {path}"
                        ) from None
                number += 1
                path = Path(parent, f"{default_name}-{number}")
        try:
            content = {**config, "name": path.name, "environment": environment(config["device"])}
            with writing(path / CONFIG):
                write_atomically(path / CONFIG, json.dumps(content, indent=2).encode() + b"\n")
            return cls(path, path.name)
        except InputError:
            shutil.rmtree(path, ignore_errors=True)  # nothing of a run that never began is left behind
            raise

    @classmethod
    def reopen(cls, path: str | Path) -> tuple["RunFolder", dict[str, Any], dict[str, Any]]:
        """The folder of an earlier run, its configuration and its checkpoint. Nothing is changed yet: call
        `cut_back` once the checkpoint has been taken up.

        Raises:
            InputError: it is no run folder, or has no checkpoint that can be read.
        """
        path = Path(path)
        config = read_config(path)
        try:
            checkpoint = torch.load(path / CHECKPOINT, map_location="cpu", weights_only=True)
            checkpoint["lengths"].items()
        except FileNotFoundError:
            raise InputError(
                f"{path} has no {CHECKPOINT}: it stopped before its first step; delete it and start again"
            ) from None
        except Exception as error:  # whatever a damaged file makes of torch's reader
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path / CHECKPOINT} cannot be read as a checkpoint ({reason})") from error
        return cls(path, config["name"]), config, checkpoint

    def cut_back(self, lengths: dict[str, int]) -> None:
        """Drops what log, metrics and TensorBoard hold of the steps after the checkpoint of these lengths."""
        with writing(self.path):
            for file in (self._log, self._metrics, self._events):
                length = lengths[self._name(file)]
                if os.path.getsize(file.name) > length:
                    file.truncate(length)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._log, self._metrics, self._events):
            try:
                file.close()
            except OSError:  # a full disk was reported when the write failed
                pass

    def log(self, line: str, stamp: bool = True) -> None:
        """A line to the log and to the console, with the time before it."""
        text = f"{time.strftime('%m/%d %H:%M:%S')} | {line}" if stamp else line
        with writing(self.path):
            self._log.write(text.encode() + b"\n")
            self._log.flush()
        if self._console:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError:  # the terminal or pipe is gone; the search and its log go on
                self._console = False

    def metrics(self, **values: Any) -> None:
        """A line of metrics.jsonl."""
        with writing(self.path):
            self._metrics.write(json.dumps(values).encode() + b"\n")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """TensorBoard scalars by tag."""
        tagged = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._event(step=step, summary=Summary(value=tagged))

    def picture(self, tag: str, step: int, file_name: str, png: bytes) -> None:
        """A PNG for TensorBoard and below plots/."""
        width, height = struct.unpack(">II", png[16:24])  # of the header chunk
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        self._event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))
        with writing(self.path):
            (self.path / "plots" / file_name).write_bytes(png)

    def text(self, tag: str, step: int, markdown: str) -> None:
        """A text for TensorBoard."""
        self._event(step=step, summary=text_summary(tag, markdown))

    def write_json(self, name: str, content: Any) -> None:
        """A whole file, replaced at once."""
        with writing(self.path / name):
            write_atomically(self.path / name, json.dumps(content, indent=2).encode() + b"\n")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces checkpoint.pt by `state` (tensors and plain values) at once: a kill or a full disk at any
        moment leaves the old one or the new one."""
        with writing(self.path / CHECKPOINT):
            lengths = {}
            for file in (self._log, self._metrics, self._events):
                file.flush()
                os.fsync(file.fileno())
                lengths[self._name(file)] = os.path.getsize(file.name)
            buffer = io.BytesIO()
            torch.save({**state, "lengths": lengths}, buffer)
            write_atomically(self.path / CHECKPOINT, buffer.getbuffer())

    def _name(self, file: io.BufferedWriter) -> str:
        return os.path.relpath(file.name, self.path)

    def _event(self, **fields: Any) -> None:
        with writing(self.path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._events.flush()


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run folder, `environment` included.

    Raises:
        InputError: the folder or the file is not there, or is not one of ours.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; name the folder of a run, such as searchs/digits")
    try:
        config = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not the folder of a run: its {CONFIG} cannot be read ({error})"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise InputError(f"{path} is not the folder of a run: its {CONFIG} holds no settings with a name")
    return config


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or path}: {error.strerror or error}; "
            "what was saved before is intact"
        ) from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary file beside `path`, forces it to the disk, then renames it over `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # gives a full disk its space back
        raise
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself is durable once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def environment(device: str) -> dict[str, str]:
    """What a figure of this run depends on: versions, device, threads, commit."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    return {
        "darts_fast": darts_fast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": f"{device} ({name or platform.machine()})",
        "threads": str(torch.get_num_threads()),
    }


def _commit() -> str:
    """The checkout's commit, with `+` where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() if (root / ".git").exists() and done.returncode == 0 else "unknown"


class StopSignal:
    """Within, Ctrl-C and SIGTERM only set `received`, once; a second one acts as it would have."""

    received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        # Only the main thread may set handlers; in another thread signals go where they always went.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        self.__exit__()


def run_program(name: str, main: Callable[[], None]) -> int:
    """Runs a program and returns its exit code; what a user caused is one line on stderr, no traceback.

    2: bad input; 1: a run that cannot go on; 130 or 143: stopped by Ctrl-C or SIGTERM.
    """
    try:
        main()
        return 0
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"{name}: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print(f"{name}: stopped before a step was done", file=sys.stderr)
        return 130
