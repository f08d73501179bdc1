"""What a run does to the process that it is in: its threads, its garbage, its memory."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from darts_fast.fused import allowed_threads

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@contextmanager
def within_quota() -> Iterator[str | None]:
    """Within, PyTorch has no more threads than a container's quota is worth: they would take turns. Yields a
    sentence on it where that makes a difference."""
    before, allowed = torch.get_num_threads(), allowed_threads()
    torch.set_num_threads(allowed)
    try:
        yield (
            f"{allowed} threads in place of PyTorch's {before}: the quota of this container is worth no more"
            if allowed < before
            else None
        )
    finally:
        torch.set_num_threads(before)


@contextmanager
def nothing_old_collected() -> Iterator[None]:
    """Within, Python's garbage collector leaves alone what is there at the start: to walk the 400,000 objects
    of torch's modules took 0.15 s every seventh step. Where the caller has frozen objects (`gc.freeze`),
    nothing is done, because Python can only unfreeze all of them together."""
    if gc.get_freeze_count() > 1000:  # in Python 3.12 375 always are
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, glibc keeps what the process frees, for its next allocations. By itself it gives tensors of 32
    MB and more back to the system at once, and a new one is a page fault for each 4 KB: at 64 channels, 35 MB
    of weights, that was 23 % of a step (one thread of an AMD EPYC). Other systems are left as they are."""
    c = ctypes.CDLL(None) if sys.platform == "linux" else None
    if c is None or not hasattr(c, "mallopt"):
        yield
        return
    # Before 2.35 glibc may refuse more than 32 MB, the most that its own rule comes to.
    if not c.mallopt(M_MMAP_THRESHOLD, 2**30):
        c.mallopt(M_MMAP_THRESHOLD, 2**25)
    c.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        c.mallopt(M_MMAP_THRESHOLD, 2**25)
        c.mallopt(M_TRIM_THRESHOLD, 2**26)
        c.malloc_trim(0)
