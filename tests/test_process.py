"""What a run does to the process that it is in."""

import ctypes
import subprocess
import sys

import pytest

# A tensor of 64 MB, 16,384 pages, made, written and freed ten times: how many pages were new.
PAGES = """
import resource
from contextlib import nullcontext
import torch
from darts_fast.process import freed_memory_kept

def faults(within):
    with within:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.zeros(2**24).add_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(nullcontext()), faults(freed_memory_kept()), faults(nullcontext()))
"""


# Elsewhere there is no mallopt: `freed_memory_kept` does nothing then, so there is nothing to test.
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt"
)
def test_a_run_keeps_the_memory_that_it_frees():
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, within, behind = map(int, done.stdout.split())
    # 640 MiB are 163,840 faults in pages of 4 KiB. In huge pages, which a system may be set to give everyone,
    # they are some 320, whether the memory is kept or not, and the comparison would say nothing.
    if before < 100_000:
        pytest.skip("the system gives huge pages, of which there are few in any case")
    assert within < before / 2 and behind > 100_000
