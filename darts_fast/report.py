"""The report of a recording: what bounds the run in one sentence, and tables in Markdown and HTML.

Everything reported is read from the trace that is written beside the report, so that both tell the same.
"""

import html
from pathlib import Path
from typing import Any

from darts_fast.profiling import WARM_UP, Profiler, copy_rate
from darts_fast.tables import markdown_table
from darts_fast.trace import Profile, Row, read_trace


def write_report(profiler: Profiler, folder: Path, settings: dict[str, Any], captured: bool) -> str:
    """trace.json.gz, report.html and report.md into `folder`, which is made; returns the verdict.

    Args:
        settings: of the run, shown; `fused`, `hvp` and `amp` are read for the advice.
        captured: that the step is replayed as one CUDA graph, whose phases cannot be told apart.
    """
    profile = read_trace(profiler.save_trace(folder))
    text = verdict(profile, settings, captured)
    arguments = profile, text, copy_rate(profiler.device), settings
    (folder / "report.md").write_text(markdown(*arguments), encoding="utf-8")
    (folder / "report.html").write_text(page(*arguments), encoding="utf-8")
    return text


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
    columns = [kind.lower()[:-1], calls, "ms", "share", "MB of arguments", "GB/s", "of copy"]
    return [("Phases", header, phases), (kind, columns, operations)]


def _facts(profile: Profile, rate: float) -> list[tuple[str, str]]:
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
    lines += [f"- {name}: {value}" for name, value in _facts(profile, rate)]
    for title, header, rows in _tables(profile, rate):
        lines += ["", f"## {title}", "", *markdown_table(header, rows, numbers=True)]
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
    facts = "".join(f"<div><dt>{e(k)}</dt><dd>{e(v)}</dd></div>" for k, v in _facts(profile, rate))
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
