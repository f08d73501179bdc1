"""What the trace of a recording says: time, launches and bytes of each phase and operation."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch

from darts_fast.profiling import STEP, UNCAPTURED

REST = "rest of the step"


class Row(NamedTuple):
    """The totals of an operation or of a phase over all recorded steps."""

    name: str
    launches: int
    seconds: float  # of the device: on a CPU, of the operation without those it calls
    bytes: int  # of its tensor arguments: of a C++ kernel all, of ATen's without results, which a trace lacks


class Profile(NamedTuple):
    """What the trace of a recording says of its steps."""

    device: str  # "cpu" or "cuda"
    steps: int
    seconds: float  # wall clock, of all steps
    busy: float  # of that, seconds in which the device ran at least one kernel (on a CPU: an operation)
    phases: list[Row]  # in order; `seconds` is wall clock on the host, and on CUDA of their kernels
    host: dict[str, float]  # wall clock of each phase on the host
    operations: list[Row]  # the one with most seconds first
    memory: list[tuple[float, int]]  # seconds since the start, bytes allocated on the device


ITEM_SIZES = {
    "double": 8, "long int": 8, "float": 4, "int": 4, "c10::Half": 2, "c10::BFloat16": 2, "unsigned char": 1,
    "signed char": 1, "bool": 1,
}  # fmt: skip


@cache
def is_view(name: str) -> bool:
    """Whether that operation of a trace is one of ATen's that give views."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    return packet is not None and any(getattr(packet, o).is_view for o in packet.overloads())


def argument_bytes(arguments: dict[str, Any]) -> int:
    """Of the distinct elements of an operation's tensor arguments, lists of tensors left out."""
    total = 0
    types, shapes = arguments.get("Input type", []), arguments.get("Input Dims", [])
    strides = arguments.get("Input Strides") or [[]] * len(shapes)
    for kind, shape, stride in zip(types, shapes, strides, strict=False):
        if kind not in ITEM_SIZES:
            continue
        count = 1
        for index, size in enumerate(shape):
            if isinstance(size, int) and (index >= len(stride) or stride[index]):
                count *= size
        total += count * ITEM_SIZES[kind]
    return total


def read_trace(events: Iterable[dict[str, Any]]) -> Profile:
    """What a Chrome trace of `Profiler` says. On CUDA a kernel belongs to the phase that launched it; one of
    a graph to that of its counterpart in the uncaptured step, if that was recorded with as many kernels.
    """
    events = [e for e in events if e.get("ph") in ("X", "i")]
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") == "user_annotation" and "#" not in e["name"]  # an optimizer's own range
    )
    steps = [r for r in ranges if r[2] == STEP]
    trials = [r for r in ranges if r[2] == UNCAPTURED]
    phases = [r for r in ranges if r[2] not in (STEP, UNCAPTURED)]
    starts = [r[0] for r in phases]

    def phase_at(time: float, within: list[tuple[float, float, str]] = steps) -> str | None:
        """None: outside of all of `within`."""
        if not any(start <= time < end for start, end, _ in within):
            return None
        index = bisect_right(starts, time) - 1
        return phases[index][2] if index >= 0 and time < phases[index][1] else REST

    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    operations = [e for e in events if e.get("cat") == "cpu_op"]
    device = "cuda" if kernels else "cpu"
    found: list[tuple[str, str | None, float, int]] = []  # name, phase, microseconds, bytes
    if kernels:
        launched = {
            e["args"]["correlation"]: e["ts"]
            for e in events
            if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
        }
        graphs = [e for e in events if e["name"] in ("cudaGraphLaunch", "cuGraphLaunch")]
        replays: dict[Any, list[int]] = {e.get("args", {}).get("correlation"): [] for e in graphs}
        calls = {e["args"].get("External id"): e["args"] for e in operations}
        order = []  # of the phases of the uncaptured step's kernels
        for kernel in sorted(kernels, key=lambda e: e["ts"]):
            arguments = kernel.get("args", {})
            launch = launched.get(arguments.get("correlation"), kernel["ts"])
            moved = arguments.get("bytes") or argument_bytes(calls.get(arguments.get("External id"), {}))
            if phase_at(launch, trials) is not None:
                order.append(phase_at(launch, trials))
            if arguments.get("correlation") in replays:
                replays[arguments["correlation"]].append(len(found))
            found.append((kernel["name"], phase_at(launch), kernel["dur"], moved))
        for places in replays.values():
            if len(places) == len(order):
                for place, name in zip(places, order, strict=True):
                    if found[place][1] is not None:
                        found[place] = (found[place][0], name, *found[place][2:])
        intervals = [(e["ts"], e["ts"] + e["dur"]) for e in kernels]
    else:
        for event, own in self_times(operations):
            # An operation that only calls others, or gives a view, reads nothing itself.
            reads = own > event["dur"] / 2 and not is_view(event["name"])
            moved = argument_bytes(event["args"]) if reads else 0
            found.append((event["name"], phase_at(event["ts"]), own, moved))
        intervals = [(e["ts"], e["ts"] + e["dur"]) for e in operations]
    found = [entry for entry in found if entry[1] is not None]

    host: dict[str, float] = {}
    for start, end, name in phases:  # one of the uncaptured step alone takes a replay's host no time
        host[name] = host.get(name, 0.0) + ((end - start) / 1e6 if phase_at(start) is not None else 0.0)
    total = sum(end - start for start, end, _ in steps) / 1e6
    host[REST] = max(0.0, total - sum(host.values()))
    by_phase = summed((phase, time, moved) for _, phase, time, moved in found if phase is not None)
    by_name = summed((name, time, moved) for name, _, time, moved in found)
    zero = steps[0][0] if steps else 0.0
    rows = []
    for name, seconds in host.items():
        row = by_phase.get(name, Row(name, 0, 0.0, 0))
        rows.append(row if device == "cuda" else row._replace(seconds=seconds))
    inside = [(a, b) for a, b in intervals if phase_at(a) is not None]
    return Profile(
        device,
        len(steps),
        total,
        covered(inside) / 1e6,
        rows,
        host,
        sorted(by_name.values(), key=lambda row: row.seconds, reverse=True),
        memory_of(events, device, zero),
    )


def memory_of(events: list[dict[str, Any]], device: str, zero: float) -> list[tuple[float, int]]:
    kind = 1 if device == "cuda" else 0
    return sorted(
        ((e["ts"] - zero) / 1e6, e["args"]["Total Allocated"])
        for e in events
        if e["name"] == "[memory]" and e["args"]["Device Type"] == kind and e["ts"] >= zero
    )


def summed(entries: Iterable[tuple[str, float, int]]) -> dict[str, Row]:
    totals: dict[str, list] = defaultdict(lambda: [0, 0.0, 0])
    for name, microseconds, moved in entries:
        total = totals[name]
        total[0] += 1
        total[1] += microseconds / 1e6
        total[2] += moved
    return {name: Row(name, *total) for name, total in totals.items()}


def self_times(operations: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each operation with its microseconds less those of the operations that it calls."""
    by_thread: dict[Any, list] = defaultdict(list)
    for event in operations:
        by_thread[event["tid"]].append(event)
    for thread in by_thread.values():
        stack: list[list] = []  # [event, microseconds of its children]
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and event["ts"] >= stack[-1][0]["ts"] + stack[-1][0]["dur"]:
                done, children = stack.pop()
                yield done, max(0.0, done["dur"] - children)
            if stack:
                stack[-1][1] += event["dur"]
            stack.append([event, 0.0])
        for done, children in stack:
            yield done, max(0.0, done["dur"] - children)


def covered(intervals: list[tuple[float, float]]) -> float:
    """The length of their union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
