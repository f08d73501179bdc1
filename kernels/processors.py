"""How many processors this process may use, which may be fewer than the machine has."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch


def threads() -> int:
    """PyTorch's threads, but no more than the quota of this process's container is worth, which PyTorch does
    not know. (It knows the processors that `taskset` or a batch system leaves.)"""
    return int(min(torch.get_num_threads(), quota()))


def processors() -> int:
    """How many processors the system schedules this thread on, but no more than the quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(min(found, quota()))


@cache
def quota(
    groups: Path = Path("/proc/self/cgroup"), controllers: Path = Path("/sys/fs/cgroup")
) -> int | float:
    """What Linux's control groups allow this process in all, in processors, rounded up (`docker run --cpus
    1.5`); infinity where there is no such limit.

    Args:
        groups, controllers: the control groups of this process, and their settings.
    """
    return min((math.ceil(found) for found in _quotas(groups, controllers)), default=math.inf)


def _quotas(groups: Path, controllers: Path) -> Iterator[float]:
    """The quotas, in processors, of this process's control group and of the groups around it, of versions 1
    and 2 of control groups."""
    with suppress(OSError):
        for line in groups.read_text(errors="replace").splitlines():
            _, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            if names and "cpu" not in names.split(","):
                continue
            # Version 1 is mounted by its names in any order, with a link of each.
            root = controllers / "cpu" if names else controllers
            # A container sees its own group at the root, whatever its path is called.
            here = root / path.lstrip("/")
            for folder in (here, *here.parents):
                with suppress(OSError, ValueError):
                    if names:
                        limit = (folder / "cpu.cfs_quota_us").read_text()
                        period = (folder / "cpu.cfs_period_us").read_text()
                    else:
                        limit, period = (folder / "cpu.max").read_text().split()
                    if float(limit) > 0:  # a ValueError for "max"; version 1 says -1
                        yield float(limit) / float(period)
                if folder == root:
                    break
