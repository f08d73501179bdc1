"""What a run does to the process that it is in."""

import ctypes
import gc
import subprocess
import sys
import weakref

import pytest

from darts_fast.process import nothing_old_collected

# A tensor of 64 MB, 16,384 pages, made, written and freed ten times: how many pages were new without
# `freed_memory_kept` and within it; and how many are still there in the end and behind it.
PAGES = """
import resource
import torch
from darts_fast.process import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

without, start = faults(), resident()
with freed_memory_kept():
    within, kept = faults(), resident() - start
print(without, within, kept, resident() - start)
"""


class Node:
    """Garbage that only the collector frees: it refers to itself."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def nothing_frozen():
    """As in a process of its own, and not as tests/conftest.py leaves this one."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_a_run_collects_what_is_garbage_before_it_and_leaves_the_rest_alone(nothing_frozen):
    garbage, old = weakref.ref(Node()), Node()
    kept = weakref.ref(old)
    with nothing_old_collected():
        assert garbage() is None
        new = weakref.ref(Node())
        del old
        gc.collect()
        assert kept() is not None and new() is None
    gc.collect()
    assert kept() is None and gc.get_freeze_count() < 1000  # in Python 3.12 some always are


def test_what_the_caller_of_a_run_has_frozen_stays_frozen(nothing_frozen):
    gc.freeze()
    before = gc.get_freeze_count()
    with nothing_old_collected():
        pass
    assert gc.get_freeze_count() == before > 0


# Elsewhere there is no mallopt: `freed_memory_kept` does nothing then, so there is nothing to test.
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt"
)
def test_a_run_keeps_the_memory_that_it_frees_and_gives_it_back_at_its_end():
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    without, within, kept, left = map(int, done.stdout.split())
    # 640 MiB are 163,840 faults in pages of 4 KiB. In huge pages, which a system may be set to give everyone,
    # they are some 320, whether the memory is kept or not, and the comparison would say nothing.
    if without < 100_000:
        pytest.skip("the system gives huge pages, of which there are few in any case")
    assert within < without / 2 and kept > 16_000 and left < 4_000, done.stdout
