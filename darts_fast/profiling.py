"""Profile reports: some steps of a run recorded by torch.profiler, and what bounds them in one sentence.

Everything reported is read from the trace that is written beside the report, so that both tell the same.
"""

import gzip
import html
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

WARM_UP = 3  # steps before the first one that is recorded: libraries set themselves up, kernels are compiled
FOLDER = "profile"
STEP = "step"
REST = "rest of the step"
UNCAPTURED = "a step, uncaptured"  # recorded once beside a captured one, see `Profiler`

_recording: list[torch.device] = []  # the device, while steps are recorded
_observers: list[Callable[[str], None]] = []


def phase(name: str) -> AbstractContextManager:
    """A part of a step by name: a range of the trace, while one is recorded, and what `observed_phases` tells
    of. Otherwise nothing."""
    return _range(name) if _recording or _observers else nullcontext()


@contextmanager
def observed_phases(ended: Callable[[str], None]) -> Iterator[None]:
    """Within, `ended` is called with the name of each phase that has ended."""
    _observers.append(ended)
    try:
        yield
    finally:
        _observers.pop()


@contextmanager
def _range(name: str) -> Iterator[None]:
    with ExitStack() as within:
        if _recording:
            within.enter_context(torch.profiler.record_function(name))
            if _recording[-1].type == "cuda":
                within.enter_context(torch.cuda.nvtx.range(name))
        yield
    for ended in _observers:
        ended(name)


class Profiler:
    """Records steps number WARM_UP + 1 to WARM_UP + `steps` of those that run within `step()`.

    Args:
        trial: for a step that is replayed as one CUDA graph: `Captured.trial`, which calls its argument with
            the uncaptured step and leaves no trace of it. That step is recorded first: a replay launches the
            same kernels in the same order, and only there it is seen which phase they belong to.
    """

    def __init__(self, steps: int, device: torch.device, trial: Callable[[Callable], Any] | None = None):
        self.steps, self.device, self.trial, self.taken = steps, device, trial, 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)

    @property
    def recorded(self) -> int:
        return max(0, self.taken - WARM_UP)

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of the run."""
        if self.taken == WARM_UP:
            self._wait()
            self._profile.start()
            _recording.append(self.device)
        try:
            if self.taken == WARM_UP and self.trial is not None:
                self.trial(self._uncaptured)
            with phase(STEP):
                yield
                if self.recorded == self.steps - 1 and self.taken >= WARM_UP:
                    self._wait()  # the last step ends when the device has done it
            self.taken += 1
        except BaseException:
            self.stop()
            raise
        if self.recorded == self.steps:
            self.stop()

    def _uncaptured(self, take: Callable[[], Any]) -> None:
        self._wait()
        with phase(UNCAPTURED):
            take()
            self._wait()

    def stop(self) -> None:
        """Ends the recording, if it was under way."""
        if _recording:
            _recording.clear()
            self._profile.stop()

    def write(self, folder: Path, settings: dict[str, Any], captured: bool) -> str:
        """trace.json.gz, report.html and report.md into `folder`, which is made; returns the verdict.

        Args:
            settings: of the run, shown; `fused`, `hvp` and `amp` are read for the advice.
            captured: that the step is replayed as one CUDA graph, whose phases cannot be told apart.
        """
        folder.mkdir(parents=True, exist_ok=True)
        plain = folder / "trace.json"
        self._profile.export_chrome_trace(str(plain))
        content = plain.read_bytes()
        with gzip.open(folder / "trace.json.gz", "wb", compresslevel=1) as file:
            file.write(content)
        plain.unlink()
        profile = read_trace(json.loads(content)["traceEvents"])
        text = verdict(profile, settings, captured)
        arguments = profile, text, copy_rate(self.device), settings
        (folder / "report.md").write_text(markdown(*arguments), encoding="utf-8")
        (folder / "report.html").write_text(page(*arguments), encoding="utf-8")
        return text

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for the caches: the best of five."""
    x = torch.zeros(2**26 if device.type == "cuda" else 2**24, device=device)  # 256 MiB, 64 MiB
    y, best = torch.empty_like(x), float("inf")
    for _ in range(6):
        start = perf_counter()
        y.copy_(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - start)
    return 2 * x.nbytes / best


# What a trace holds


class Row(NamedTuple):
    """Of an operation or a phase, in all recorded steps."""

    name: str
    launches: int
    seconds: float  # of the device: on a CPU, of the operation without those it calls
    bytes: int  # of its tensor arguments, results left out: the trace does not have them


class Profile(NamedTuple):
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
    by_phase, by_name = summed((p, t, b) for _, p, t, b in found), summed((n, t, b) for n, _, t, b in found)
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


# What it means


def is_arithmetic(name: str) -> bool:
    """Whether an operation multiplies matrices; all others only move their operands. Triton's kernels of
    separable convolutions count with these: a step does 7 operations a byte (benchmarks/traffic.py)."""
    if name.startswith("sepconv_") and name.endswith("_kernel"):
        return False
    words = ("conv", "gemm", "::mm", "addmm", "::bmm", "sepconv", "fprop", "dgrad", "wgrad", "cutlass")
    return any(word in name.lower() for word in words)


def is_small(row: Row) -> bool:
    """Whether an operation on a CPU costs what any call costs, whatever it computes: it takes less than
    10 us, or its operands, 64 KiB at most, are read in 2 us and multiplied with each other in some 20 us."""
    return row.seconds / row.launches < 10e-6 or 0 < row.bytes / row.launches < 64 * 2**10


def verdict(profile: Profile, settings: dict[str, Any], captured: bool) -> str:
    """What bounds the run, and which flag would help: one sentence."""
    if not profile.steps:
        return "No step was recorded: the run was shorter than the warm-up."
    data = profile.host.get("data", 0.0) / profile.seconds
    busy = profile.busy / profile.seconds
    fused, cuda = settings.get("fused"), profile.device == "cuda"
    use_fused = "--fused computes the cells in fewer, larger launches"
    larger = "a larger --batch_size gives each launch more to do"
    if data > 0.3:
        return (
            f"Bound by the data: reading and augmenting batches takes {data:.0%} of a step; leave out "
            "--cutout_length, or run on a device that augments faster."
        )
    if cuda and busy < 0.7:
        advice = larger if fused and captured else use_fused
        if fused and settings.get("no_graph"):
            advice = "leave out --no_graph, which captures the step as one launch"
        return (
            f"Bound by launches: the GPU computes for only {busy:.0%} of a step and waits for the host the "
            f"rest of the time; {advice}."
        )
    total = sum(row.seconds for row in profile.operations) or 1.0
    small = sum(row.seconds for row in profile.operations if is_small(row)) / total
    idle = 1 - busy
    if not cuda and small * busy + idle > 0.5:
        return (
            f"Bound by dispatch: {small * busy + idle:.0%} of a step goes into operations so small that the "
            f"call is their cost, and into the Python between them; {larger if fused else use_fused}."
        )
    arithmetic = sum(row.seconds for row in profile.operations if is_arithmetic(row.name)) / total
    what = (
        f"arithmetic: convolutions and matrix products take {arithmetic:.0%} of the time in operations"
        if arithmetic > 0.5
        else f"memory traffic: {1 - arithmetic:.0%} of the time in operations goes into "
        + (
            "kernels that move more than they multiply"
            if cuda and fused
            else "batch norm, pools, sums and copies, which only move their operands"
        )
    )
    if not fused:
        advice = use_fused
    elif cuda and not (settings.get("amp") or settings.get("amp_dtype")) and "hvp" in settings:
        advice = "--amp halves the bytes of the activations"
    elif settings.get("hvp") == "finite-difference":
        advice = "--hvp exact needs two passes fewer"
    else:
        advice = "every flag that helps is on; fewer --init_channels or --layers cost less"
    return f"Bound by {what}; {advice}."


# How it is shown


def _tables(profile: Profile, rate: float) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header, rows of each table; numbers are of one step."""
    n, cuda = max(1, profile.steps), profile.device == "cuda"
    phases = []
    for row in profile.phases:
        host = profile.host[row.name]
        cells = [
            row.name,
            f"{1e3 * host / n:.2f}",
            f"{host / profile.seconds:.0%}",
            f"{row.launches / n:,.0f}",
        ]
        phases.append(cells + ([f"{1e3 * row.seconds / n:.2f}"] if cuda else []))
    calls = "launches" if cuda else "calls"
    header = ["phase", "host ms", "share", calls] + (["device ms"] if cuda else [])
    operations = []
    total = sum(row.seconds for row in profile.operations) or 1.0
    for row in profile.operations[:40]:
        speed = row.bytes / row.seconds if row.seconds else 0.0
        moved = [f"{row.bytes / n / 1e6:,.1f}", f"{speed / 1e9:.1f}", f"{speed / rate:.0%}"]
        operations.append(
            [
                row.name,
                f"{row.launches / n:,.0f}",
                f"{1e3 * row.seconds / n:.2f}",
                f"{row.seconds / total:.0%}",
            ]
            + (moved if row.bytes else ["", "", ""])
        )
    kind = "Kernels" if cuda else "Operations"
    columns = [kind.lower()[:-1], calls, "ms", "share", "MB read", "GB/s", "of copy"]
    return [("Phases", header, phases), (kind, columns, operations)]


def _facts(profile: Profile, rate: float, settings: dict[str, Any]) -> list[tuple[str, str]]:
    n = max(1, profile.steps)
    busy = "the device computes" if profile.device == "cuda" else "in operations"
    peak = max((size for _, size in profile.memory), default=0)
    return [
        ("a step", f"{1e3 * profile.seconds / n:.1f} ms, with the profiler's own cost"),
        (busy, f"{profile.busy / profile.seconds:.0%} of it" if profile.seconds else "-"),
        (
            f"{'launches' if profile.device == 'cuda' else 'operations called'} a step",
            f"{sum(row.launches for row in profile.operations) / n:,.0f}",
        ),
        ("peak memory", f"{peak / 2**20:,.1f} MiB on {profile.device}"),
        ("copy rate", f"{rate / 1e9:.1f} GB/s read and written, measured here"),
        ("recorded", f"{profile.steps} steps after {WARM_UP} of warm-up"),
    ]


NOTE = (
    "Numbers are of one step. Bytes are of the tensor arguments, from their shapes; results and lists of "
    "tensors are not in a trace, so a bandwidth is a lower bound. Above 100% of a copy, operands came from a "
    "cache."
)


def markdown(profile: Profile, text: str, rate: float, settings: dict[str, Any]) -> str:
    lines = ["# Profile", "", f"**{text}**", ""]
    lines += [f"- {name}: {value}" for name, value in _facts(profile, rate, settings)]
    for title, header, rows in _tables(profile, rate):
        lines += [
            "",
            f"## {title}",
            "",
            f"| {' | '.join(header)} |",
            "|---" + "|---:" * (len(header) - 1) + "|",
        ]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    lines += ["", NOTE, "", "## Settings", ""]
    lines += [f"- {name} = {value}" for name, value in settings.items()]
    lines += ["", "`trace.json.gz` opens in https://ui.perfetto.dev and chrome://tracing."]
    return "\n".join(lines) + "\n"


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --page: #ffffff; --line: #d0d7de;
  --bar: #0969da; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --page: #0d1117;
  --line: #30363d; --bar: #58a6ff; --card: #161b22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--page); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.verdict { border-left: 4px solid var(--bar); background: var(--card); padding: .75rem 1rem;
  font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .75rem;
  margin: 1rem 0; }
dl div { background: var(--card); padding: .5rem .75rem; border-radius: 6px; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere;
  min-width: 10rem; }
th { color: var(--soft); font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); }
.bars p { margin: .5rem 0 .1rem; display: flex; justify-content: space-between; gap: 1rem; font-size: .9rem; }
.bars rect, .fill { fill: var(--bar); } .track { fill: var(--card) !important; }
.fill { fill-opacity: .25; stroke: var(--bar); stroke-width: 1; vector-effect: non-scaling-stroke; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .85rem;
  margin: .2rem 0; }
p.note { color: var(--soft); font-size: .9rem; } summary { cursor: pointer; }
"""


def page(profile: Profile, text: str, rate: float, settings: dict[str, Any]) -> str:
    """report.html: one file that asks for no other."""
    e = html.escape
    facts = "".join(f"<div><dt>{e(k)}</dt><dd>{e(v)}</dd></div>" for k, v in _facts(profile, rate, settings))
    parts = [
        f'<p class="verdict">{e(text)}</p><dl>{facts}</dl>',
        f"<h2>Time of a step on {profile.device}</h2>",
        _bars(profile),
    ]
    if profile.memory:
        parts += [f"<h2>Memory on {profile.device}</h2>", _curve(profile.memory)]
    for title, header, rows in _tables(profile, rate):
        head = "".join(f"<th>{e(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(
            f'<h2>{title}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    chosen = "".join(
        f"<div><dt>{e(name)}</dt><dd>{e(str(value))}</dd></div>" for name, value in settings.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Profile</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>Profile</h1>'
        + "".join(parts)
        + f'<p class="note">{e(NOTE)} The trace beside this page, trace.json.gz, opens in ui.perfetto.dev '
        f"and chrome://tracing.</p><details><summary>Settings</summary><dl>{chosen}</dl></details></body></html>\n"
    )


def _bars(profile: Profile) -> str:
    """A bar a phase: the host's time on a CPU, its kernels' on CUDA, and there what the device waits."""
    n, parts = max(1, profile.steps), []
    rows = [(row.name, row.seconds) for row in profile.phases]
    if profile.device == "cuda":
        rows.append(("the device waits", profile.seconds - profile.busy))
    for name, seconds in rows:
        share = seconds / profile.seconds if profile.seconds else 0.0
        parts.append(
            f"<p><span>{html.escape(name)}</span><span>{1e3 * seconds / n:.2f} ms, {share:.0%}</span></p>"
            '<svg viewBox="0 0 1000 14" preserveAspectRatio="none" style="height:14px" role="img" '
            f'aria-label="{share:.0%}"><rect class="track" width="1000" height="14"/>'
            f'<rect width="{1000 * share:.1f}" height="14"/></svg>'
        )
    return f'<div class="bars">{"".join(parts)}</div>'


def _curve(memory: list[tuple[float, int]], width: int = 1000, height: int = 160) -> str:
    """Bytes over time, the largest in each of at most `width` columns."""
    start, end = memory[0][0], memory[-1][0]
    span, peak = max(end - start, 1e-9), max(max(size for _, size in memory), 1)
    columns: dict[int, int] = {}
    for time, size in memory:
        x = int((time - start) / span * width)
        columns[x] = max(columns.get(x, 0), size)
    points = " ".join(f"{x},{height - size / peak * (height - 4):.1f}" for x, size in sorted(columns.items()))
    return (
        f'<p class="axis"><span>peak {peak / 2**20:,.1f} MiB</span></p>'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" style="height:160px" role="img" '
        f'aria-label="memory over time"><polygon class="fill" points="0,{height} {points} {width},{height}"/>'
        f'</svg><p class="axis"><span>0 s</span><span>{span:.3g} s</span></p>'
    )
