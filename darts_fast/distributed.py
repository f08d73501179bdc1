"""One run computed by several processes, the ranks, which torchrun starts.

Every rank has the whole data set, all weights, alphas and optimizers. It computes the loss of its part of
each batch; gradients are averaged over the ranks, weighted by their shares of the batch, so that all ranks
take the same step. Without torchrun's environment variables, or with WORLD_SIZE=1, nothing here does
anything.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from darts_fast.errors import InputError, RunError, first_line

Result = TypeVar("Result")
Images = TypeVar("Images", Tensor, range)

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's

# Ranks wait for each other that long at most: while the first one downloads a data set, compiles or draws.
LONGEST_WAIT = timedelta(minutes=30)
# A rank whose process does not answer at all is given up much sooner, see `Pulse`.
BEAT, LOST = 1.0, 20.0  # seconds
SAYING = 5.0  # seconds in which rank 0 says why a run ends, before another one does

ENDED = "ended"  # key of the store: rank 0 has said why
SENTENCE_BYTES = 2000


def _variable(name: str) -> int:
    return int(os.environ[name])


def world_size() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return _variable("WORLD_SIZE") if all(name in os.environ for name in VARIABLES) else 1


def local_world_size() -> int:
    """How many of them torchrun has started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def refuse_ranks(what: str) -> None:
    """Raises InputError under torchrun with more than one process. `what`: "the protocol runs"."""
    if world_size() > 1:
        raise InputError(f"{what} in one process: start it by python, not by torchrun")


class Ranks:
    """The ranks of a run, seen from one of them. Methods that exchange anything are called by all ranks in
    the same order. Of a single process they return what they are given.

    Args:
        rank: this one, from 0.
        size: number of ranks; 1: this process alone.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.share = torch.ones((), dtype=torch.float64)  # of this rank in the batch of the step

    # A batch's images, shared out

    def part(self, images: Images) -> Images:
        """This rank's consecutive part of a batch (its indices): parts differ by one image at most."""
        start, end = self._bounds(len(images))
        return images[start:end]

    def parts(self, images: int, batch_size: int) -> list[range]:
        """This rank's part of each batch that so many images are cut into, as positions; it may be empty."""
        return [
            self.part(range(images)[start : start + batch_size]) for start in range(0, images, batch_size)
        ]

    def share_of(self, images: int) -> float:
        """This rank's share, 0 to 1, of a batch of so many images."""
        start, end = self._bounds(images)
        return (end - start) / images

    def _bounds(self, images: int) -> tuple[int, int]:
        return images * self.rank // self.size, images * (self.rank + 1) // self.size

    def part_sizes(self, images: int) -> set[int]:
        """How many images of a batch of so many any rank has."""
        return {images // self.size, -(-images // self.size)}

    def set_share(self, images: int) -> None:
        """Before a step on a batch of so many images: what `average` weights this rank by."""
        if self.size > 1:
            self.share.fill_(self.share_of(images))

    def average(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """sum over ranks r of share_r * tensors_r, by name: one all-reduce of one flat buffer. The results
        are views of it, outside any graph, with the same bits on all ranks. Reads nothing back to the
        host."""
        if self.size == 1:
            return dict(tensors)
        parts = [tensor.detach().flatten() for tensor in tensors.values()]
        flat = (parts[0] if len(parts) == 1 else torch.cat(parts)) * self.share
        self._all_reduce(flat)
        split = flat.split([part.numel() for part in parts])
        return {name: part.view_as(tensors[name]) for name, part in zip(tensors, split, strict=True)}

    # Numbers and texts

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            self._all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers. On the host: it does not wait for a GPU."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        self._all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def of_first(self, number: float) -> float:
        """Rank 0's number."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.float64)
        with _answered():
            dist.broadcast(found, 0)
        return float(found)

    def bytes_of_first(self, content: bytes) -> bytes:
        """Rank 0's bytes; those of the other ranks are not used."""
        if self.size == 1:
            return content
        length = int(self.of_first(len(content)))
        found = torch.zeros(length, dtype=torch.uint8)
        if self.rank == 0:
            found = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        with _answered():
            dist.broadcast(found, 0)
        return found.numpy().tobytes()

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, of the same shape and dtype on all of them, on the host."""
        own = tensor.detach().cpu().contiguous()
        if self.size == 1:
            return [own]
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _answered():
            dist.all_gather(found, own)
        return found

    def _all_reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        with _answered():
            dist.all_reduce(tensor, operation)

    # One rank's trouble is everyone's

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, where nothing is exchanged, an InputError or a RunError of some ranks becomes one of all
        ranks: that of the first of them."""
        if self.size == 1:
            yield
            return
        own: InputError | RunError | None = None
        try:
            yield
        except (InputError, RunError) as error:
            own = error
        letter = "I" if isinstance(own, InputError) else "R"
        text = b"" if own is None else f"{letter}{own}".encode()[:SENTENCE_BYTES]
        padded = text.ljust(SENTENCE_BYTES, b"\0")
        found = self.gathered(torch.frombuffer(bytearray(padded), dtype=torch.uint8))
        for rank, content in enumerate(found):
            sentence = content.numpy().tobytes().rstrip(b"\0").decode(errors="replace")
            if sentence:
                kind = InputError if sentence[0] == "I" else RunError
                raise kind(sentence[1:] if rank == 0 else f"rank {rank}: {sentence[1:]}") from own

    def in_turn(self, use: Callable[[], Result]) -> Result:
        """Calls `use` on rank 0, then on the first rank of every other machine, then on all others, who find
        what the first ones leave on the disk: a download, compiled kernels."""
        if self.size == 1:
            return use()
        mine = min(self.rank, 1) + min(_variable("LOCAL_RANK"), 1)
        for turn in range(3):
            with self.together():
                if turn == mine:
                    found = use()
        return found

    # Devices

    def device(self, name: str | None, resumed: bool = False) -> str | None:
        """The device of this rank, where the settings say `name`: a GPU of its own, or the CPU.

        Args:
            resumed: `name` is that of an earlier run, of which only the kind counts.

        Raises:
            InputError: `name` is one GPU for all ranks, or there are fewer GPUs than ranks.
        """
        if self.size == 1:
            return name
        kind, _, index = (name or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
        if index and not resumed:
            raise InputError(f"under torchrun every rank takes a GPU of its own: leave out --device {name}")
        if kind == "cuda":
            local, there = _variable("LOCAL_RANK"), torch.cuda.device_count()
            if local >= there:
                raise InputError(
                    f"torchrun has started more processes on this machine than it has GPUs ({there}): give "
                    "--nproc_per_node so many, or --device cpu"
                )
            kind = f"cuda:{local}"
            torch.cuda.set_device(local)
        self.share = self.share.to(kind)
        return kind


@contextmanager
def _answered() -> Iterator[None]:
    """Turns a failed collective within into one sentence."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            "another process of this run has ended or does not answer; go on from the last checkpoint by "
            f"--resume ({first_line(error)})"
        ) from error


_connected: list[dist.Store] = []
_groups: list[None] = []  # an entry for each group that this process was in


def connect() -> dist.Store | None:
    """The store of torchrun, through which its processes find each other; None without it."""
    if world_size() == 1:
        return None
    if not _connected:
        _connected.append(next(dist.rendezvous("env://", timeout=LONGEST_WAIT))[0])
    return _connected[0]


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within, the ranks of this run: all processes that torchrun has started, by NCCL on CUDA and gloo on a
    CPU. They wait for each other at the end, unless it is an exception: then their group stays until the next
    one, because the others would be told that this rank has ended before it can say why (`say_once`)."""
    store, size = connect(), world_size()
    if store is None:
        yield Ranks()
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    _groups.append(None)
    store, rank = dist.PrefixStore(f"group {len(_groups)}", store), _variable("RANK")
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    ranks = Ranks(rank, size)
    with Pulse(store, rank, size):
        yield ranks
        ranks.largest(0)
    dist.destroy_process_group()


class Pulse:
    """Within, a thread tells the other ranks every second that this process lives, and ends it where the next
    rank says nothing for 20 seconds. (The others wait in a collective for a process that is suspended or
    unreachable.)"""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._store, self._rank, self._next = store, rank, (rank + 1) % size
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Pulse":
        self._store.set(f"beat {self._rank}", "0")
        self._store.wait([f"beat {self._next}"], LONGEST_WAIT)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # A thread that is still in a call of the store when Python ends would abort the process.
        self._thread.join(LOST)

    def _beat(self) -> None:
        beats, heard, since = 0, b"", time.monotonic()
        while not self._ended.wait(BEAT):
            beats += 1
            try:
                self._store.set(f"beat {self._rank}", str(beats))
                found = self._store.get(f"beat {self._next}")
            except RuntimeError:  # torchrun has ended, and its store
                self._give_up("torchrun has ended")
                return
            if found != heard:
                heard, since = found, time.monotonic()
            elif time.monotonic() - since > LOST:
                self._give_up(f"rank {self._next} has not answered for {LOST:.0f} seconds")

    def _give_up(self, why: str) -> None:
        if self._ended.is_set():
            return
        print(
            f"rank {self._rank}: {why}; go on from the last checkpoint by --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread may be in a collective that never returns


def say_once(say: Callable[[str], None]) -> None:
    """Lets rank 0 alone say why a program ends. torchrun ends all processes as soon as one has failed, so the
    others wait until rank 0 has said it; where it says nothing for some seconds, they do.

    Args:
        say: is called with what the sentence begins with, "" or, of another rank than 0, "rank 1: ".
    """
    store = connect()
    if store is None:
        say("")
        return
    rank = _variable("RANK")
    if rank == 0:
        say("")
        store.set(ENDED, "")
        return
    until = time.monotonic() + SAYING
    try:
        while time.monotonic() < until:
            if store.check([ENDED]):
                return
            time.sleep(0.05)
    except RuntimeError:  # torchrun has ended, and its store
        pass
    say(f"rank {rank}: ")
