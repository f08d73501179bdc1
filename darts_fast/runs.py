"""A run folder: log, metrics, TensorBoard, pictures, checkpoints; how a run stops and is resumed.

Log, metrics and events are only ever appended to. A checkpoint records how long each of them was; resuming
cuts them back to that length, so that a step which is computed again is written once.
"""

import dataclasses
import io
import json
import math
import os
import platform
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text as text_summary
from tqdm import tqdm

from darts_fast.config import ProtocolConfig, RunConfig
from darts_fast.distributed import Ranks, connect, say_once, world_size
from darts_fast.errors import DamagedImage, InputError, RunError, one_line
from darts_fast.files import Unreadable, read_json, read_tensors
from darts_fast.state import check_keys, check_number

try:
    import fcntl
except ImportError:  # not on Windows: there, nothing keeps two processes out of one run folder
    fcntl = None  # type: ignore[assignment]  # the usual way to say so

AnyConfig = TypeVar("AnyConfig", bound=RunConfig | ProtocolConfig)

CHECKPOINT = "checkpoint.pt"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
EVENTS = "tb/events.out.tfevents.0.darts_fast"  # TensorBoard reads every file with "tfevents" in its name


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, of this number."""

    def __init__(self, signal_number: int, message: str = ""):
        super().__init__(message)
        self.signal_number = signal_number


class Stopped(Interrupted):
    """Ctrl-C or SIGTERM: the step was finished and the run saved. The message says how to resume.

    Args:
        where: what was finished, such as "after 5 steps".
        path: the folder of the run.
        function: the one that resumes it, such as "darts_fast.resume_search".
        own_images: whether that needs the user's own images again, as a command cannot.
        signal_number: of the signal.
    """

    def __init__(self, where: str, path: Path, function: str, own_images: bool, signal_number: int):
        self.where, self.path, self.own_images = where, path, own_images
        call = f"{function}({str(path)!r}{', data' if own_images else ''})"
        super().__init__(signal_number, self._sentence(call))
        self.exit_code = 128 + signal_number

    def to_resume_by(self, command: str) -> str:
        """The message of a program whose command resumes its runs by --resume."""
        return (
            str(self)
            if self.own_images
            else self._sentence(f"{command} --resume {shlex.quote(str(self.path))}")
        )

    def _sentence(self, how: str) -> str:
        return one_line(f"stopped and saved {self.where}; go on with: {how}")


class Locked(InputError):
    """Another process is in the folder."""


class Run(NamedTuple):
    """A search or a training that is a part of something larger: all that a process needs to compute it."""

    key: str  # such as "searches/found-1"
    folder: Path  # absolute: another process may have another working directory
    config: RunConfig


class RunFolder:
    """The files of one run. Make one with `create` or `reopen`; close it (it is a context manager)."""

    environment: dict[str, str]  # versions, device and commit that the run began with

    def __init__(self, path: Path, name: str):
        self.path = path
        self._console = True
        with writing(path):
            for folder in ("tb", "plots"):
                (path / folder).mkdir(exist_ok=True)
            self._files = {file: (path / file).open("ab") for file in appended(name)}
        self._log, self._metrics, self._events = self._files.values()
        self._records = RecordWriter(self._events)
        try:
            lock(self._log, path)
        except InputError:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        config: RunConfig,
        default_name: str,
        parent: str | Path | None = None,
        ranks: Ranks | None = None,
    ) -> "RunFolder":
        """The folder that `new_folder` makes, opened; its `parent` is searchs/ or augments/ if not given. Of
        several `ranks` the first one makes it, and the others have a `SilentFolder` of its path.

        Raises:
            InputError: the name is no folder name, the folder exists, or it cannot be written.
        """
        ranks = ranks or Ranks()
        folder: RunFolder = SilentFolder(Path())
        with ranks.together():
            if ranks.rank == 0:
                folder = cls._create(config, default_name, parent or config.FOLDER)
        folder.path = Path(os.fsdecode(ranks.bytes_of_first(os.fsencode(folder.path))))
        return folder

    @classmethod
    def _create(cls, config: RunConfig, default_name: str, parent: str | Path) -> "RunFolder":
        path, environment_now = new_folder(config, default_name, parent)
        try:
            folder = cls(path, path.name)
            folder.environment = environment_now
            folder._event(file_version="brain.Event:2")
            return folder
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # nothing of a run that never began is left behind
            raise

    @classmethod
    def reopen(
        cls, path: str | Path, kind: type[AnyConfig], ranks: Ranks | None = None
    ) -> tuple["RunFolder", AnyConfig, dict[str, Any]]:
        """The folder of an earlier run, its configuration and its checkpoint. Nothing is changed yet: call
        `cut_back` once the checkpoint has been taken up. Of several `ranks` the first one reads it; the
        others get what it has read, and a `SilentFolder`.

        Raises:
            InputError: it is no folder of such a run, or has no checkpoint that can be read.
        """
        ranks = ranks or Ranks()
        with ranks.together():
            if ranks.rank == 0:
                folder, config, checkpoint = cls._reopen(Path(path), kind)
        if ranks.size == 1:
            return folder, config, checkpoint
        buffer = io.BytesIO()
        if ranks.rank == 0:
            torch.save({"settings": dataclasses.asdict(config), "checkpoint": checkpoint}, buffer)
        content = ranks.bytes_of_first(buffer.getvalue())
        if ranks.rank == 0:
            return folder, config, checkpoint
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return SilentFolder(Path(path)), kind(**found["settings"]), found["checkpoint"]

    @classmethod
    def _reopen(cls, path: Path, kind: type[AnyConfig]) -> tuple["RunFolder", AnyConfig, dict[str, Any]]:
        config, environment_then = read_config(path, kind)
        if not os.path.lexists(path / CHECKPOINT):
            raise InputError(
                f"{path} has no {CHECKPOINT}: it stopped before its first step; delete it and start again"
            )
        for file in appended(config.name):
            if not (path / file).is_file():
                raise InputError(f"{path / file} is missing; put it back, or start a new run")
            if (path / file).is_symlink():  # it would be cut to a length that the folder says
                raise InputError(f"{path / file} is a symbolic link; put the file itself there")
        folder = cls(path, config.name)  # locked from here on: nobody else writes a newer checkpoint
        folder.environment = environment_then
        try:
            return folder, config, folder._read_checkpoint()
        except BaseException:
            folder.close()
            raise

    def cut_back(self, lengths: dict[str, int]) -> None:
        """Drops what log, metrics and TensorBoard hold of the steps after the checkpoint of these lengths."""
        with writing(self.path):
            for name, file in self._files.items():
                file.truncate(lengths[name])

    def _read_checkpoint(self) -> dict[str, Any]:
        path = self.path / CHECKPOINT
        try:
            checkpoint = read_tensors(path, "a checkpoint")
            check_keys(checkpoint.get("lengths"), self._files, "lengths")
            for name, length in checkpoint["lengths"].items():
                check_number(length, int, 0, math.inf, f"lengths.{name}")
        except (Unreadable, ValueError) as error:
            why = error if isinstance(error, Unreadable) else f"cannot be read as a checkpoint ({error})"
            raise InputError(f"{path} {why}; put the run's own back, or start a new run") from error
        for name, length in checkpoint["lengths"].items():
            size = os.path.getsize(self.path / name)
            if size < length:
                raise InputError(
                    f"{self.path / name} has {size} bytes, but had {length} when {CHECKPOINT} was written; "
                    "put the whole file back, or start a new run"
                )
        return checkpoint

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (RunError, DamagedImage, Stopped)):  # the console has it from `run_program`
            line = f"stopped and saved {error.where}" if isinstance(error, Stopped) else str(error)
            self._log.write(_stamped(line).encode() + b"\n")
        self.close()

    def close(self) -> None:
        """Closes the files; another process may open the folder."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk was reported when the write failed
                pass

    def log(self, line: str, stamp: bool = True, shown: bool = True) -> None:
        """A line to the log, with the time before it, and where it is `shown` to the console."""
        line = one_line(line)
        text = _stamped(line) if stamp else line
        with writing(self.path):
            self._log.write(text.encode() + b"\n")
            self._log.flush()
        if self._console and shown:
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
            write_atomically(self.path / "plots" / file_name, png)

    def text(self, tag: str, step: int, markdown: str) -> None:
        """A text for TensorBoard."""
        self._event(step=step, summary=text_summary(tag, markdown))

    def write_json(self, name: str, content: Any) -> None:
        """A whole file, replaced at once."""
        write_json(self.path / name, content)

    def save_tensors(self, name: str, state: dict[str, Any]) -> None:
        """A file of tensors and plain values, replaced at once."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with writing(self.path / name):
            write_atomically(self.path / name, buffer.getbuffer())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces checkpoint.pt by `state` (tensors and plain values) at once: a kill or a full disk at any
        moment leaves the old one or the new one."""
        with writing(self.path / CHECKPOINT):
            lengths = {}
            for name, file in self._files.items():
                file.flush()
                os.fsync(file.fileno())
                lengths[name] = os.path.getsize(file.name)
        self.save_tensors(CHECKPOINT, {**state, "lengths": lengths})

    def _event(self, **fields: Any) -> None:
        with writing(self.path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._events.flush()


class SilentFolder(RunFolder):
    """What every rank but the first has in place of the run folder: nothing is written or printed."""

    def __init__(self, path: Path):
        self.path, self.environment = path, {}

    def _nothing(self, *_: object, **__: object) -> None:
        pass

    log = metrics = scalars = picture = text = write_json = save_tensors = save_checkpoint = _nothing
    cut_back = close = __exit__ = _nothing


def new_folder(
    config: RunConfig | ProtocolConfig, default_name: str, parent: str | Path
) -> tuple[Path, dict[str, str]]:
    """Makes the folder of config.name below `parent`, or where config has no name the first that is free of
    default_name, default_name-2, ..., with a config.json in it. Returns its path and the environment.

    Raises:
        InputError: the name is no folder name, the folder exists, or it cannot be written.
    """
    name = config.name
    if name is not None and not is_folder_name(name):
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
        environment_now = environment(config.device)
        write_json(
            path / CONFIG, {**dataclasses.asdict(config), "name": path.name, "environment": environment_now}
        )
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path, environment_now


def lock(file: IO[bytes], path: Path) -> None:
    """Keeps a second process out of the folder `path` for as long as `file`, which is in it, is open here; a
    kill closes it, too.

    Raises:
        Locked: another process is in it.
    """
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(f"another process is writing {path}; wait for it or stop it first") from None
    except OSError:  # a file system without locks
        pass


def appended(name: str) -> tuple[str, str, str]:
    """The files of the run of that name which only grow: log, metrics, events; relative to its folder."""
    return f"{name}.log", METRICS, EVENTS


def is_folder_name(name: str) -> bool:
    """Whether it names a folder directly below another one, in characters that can be shown."""
    forbidden = not name.strip() or name in (".", "..") or set(name) & set("/\\")
    return not forbidden and name.isprintable() and len(name.encode()) <= 200  # file systems end at 255


def _stamped(line: str) -> str:
    return f"{time.strftime('%m/%d %H:%M:%S')} | {line}"


def read_config(path: Path, kind: type[AnyConfig]) -> tuple[AnyConfig, dict[str, str]]:
    """The settings in the config.json of a run folder, and the environment the run began in.

    Raises:
        InputError: the folder or the file is not there, or is not one of such a run.
    """
    if not os.path.isdir(path):  # unlike Path's, false of a path that is too long or forbidden
        raise InputError(f"{path} is not a folder; name the folder of a run, such as {kind.FOLDER}/digits")
    try:
        content = read_json(path / CONFIG)
        if not isinstance(content, dict):
            raise Unreadable(f"is not a {kind.WORD}'s")
        then = content.pop("environment", {})
        if not isinstance(then, dict) or not all(isinstance(value, str) for value in then.values()):
            raise Unreadable("holds no environment of a run")
        try:
            config = kind(**content)
        except TypeError:  # settings of another kind of run
            raise Unreadable(f"is not a {kind.WORD}'s") from None
        except InputError as error:
            raise Unreadable(f"cannot be read ({error})") from error
        if not config.name or not is_folder_name(config.name):
            raise Unreadable("holds no name of a run")
    except Unreadable as error:
        raise InputError(f"{path} is not the folder of a {kind.WORD}: its {CONFIG} {error}") from error
    return config, then


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


def write_json(path: Path, content: Any) -> None:
    """A whole file, replaced at once. Raises InputError where it cannot be written."""
    with writing(path):
        write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")


def write_atomically(path: Path, content: bytes | memoryview, shared: bool = False) -> None:
    """Writes a temporary file beside `path`, forces it to the disk, then renames it over `path`. `shared`:
    other processes may write it at the same time (a kill then leaves the temporary file)."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # never through a link or into a pipe that lies there
    try:
        with temporary.open("xb") as file:
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
        "darts_fast": version("darts_fast"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": f"{device} ({name or platform.machine()})",
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def differences(then: dict[str, str], now: dict[str, str]) -> str:
    """What of one environment is not as in another, in words; empty where all is."""
    return ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key])


def _commit() -> str:
    """The checkout's commit, with `+` where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


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

    2: bad input; 1: a run that cannot go on; 130 or 143: stopped by Ctrl-C or SIGTERM. One of the processes
    that torchrun has started prints the line.

    Args:
        name: what a person types to call it (of a script without "python"), such as "darts-fast search".
        main: the program, which reads `sys.argv`.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115  open until the end
        if hasattr(getattr(sys, stream), "reconfigure"):
            # A console that cannot show a name's letters shows "?".
            getattr(sys, stream).reconfigure(errors="replace")
    connect()  # before anything can fail: see `say_once`
    try:
        main()
        return 0
    except InputError as error:
        code, why = 2, str(error)
    except RunError as error:
        code, why = 1, str(error)
    except Stopped as stop:
        program = "python" if world_size() == 1 else "torchrun ..."
        command = f"{program} {name}" if name.endswith(".py") or world_size() > 1 else name
        code, why = stop.exit_code, stop.to_resume_by(command)
    except KeyboardInterrupt:
        code, why = 130, "stopped at once; what was saved before is intact"

    def say(who: str) -> None:
        with suppress(OSError):  # a full disk; the exit code still says it
            print(f"{name}: {who}{why}", file=sys.stderr, flush=True)

    say_once(say)
    return code
