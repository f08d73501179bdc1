"""How many processors this process may use, which may be fewer than the machine has."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def processors(groups: Path = Path("/proc/self/cgroup"), controllers: Path = Path("/sys/fs/cgroup")) -> int:
    """Those that the system schedules this process on (`taskset`, a batch system's cpuset), and at most as
    many as the quota of its container or of one around it is worth, rounded up (`docker run --cpus 1.5`).

    Args:
        groups, controllers: where Linux tells the control groups of this process and their settings.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([found, *(math.ceil(quota) for quota in _quotas(groups, controllers))])


def _quotas(groups: Path, controllers: Path) -> Iterator[float]:
    """In processors: of this process's control group and of those around it, in versions 1 and 2."""
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and "cpu" not in names.split(","):
                continue
            root = controllers / names if names else controllers
            # A container sees its own group at the root, whatever its path is called.
            here = root / path.lstrip("/")
            for folder in (here, *here.parents):
                with suppress(OSError, ValueError):
                    if names:
                        quota = (folder / "cpu.cfs_quota_us").read_text()
                        period = (folder / "cpu.cfs_period_us").read_text()
                    else:
                        quota, period = (folder / "cpu.max").read_text().split()
                    if float(quota) > 0:  # a ValueError for "max"; version 1 says -1
                        yield float(quota) / float(period)
                if folder == root:
                    break
