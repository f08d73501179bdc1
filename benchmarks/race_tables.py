"""What a race found, shown: tables of the variants and their phases, the growth of a sweep and its plot."""

from typing import Any

import draw
import torch
from race import EVALUATION, OUTSIDE

COLUMNS = [
    "variant",
    "ms p20",
    "p50",
    "p80",
    "ratio",
    "p20-p80",
    OUTSIDE,
    "peak GB",
    "launches",
    "GB",
    "GB/s",
    "of copy",
]


def table(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row a variant, below COLUMNS."""
    rows = []
    for record in found:
        times = [f"{1e3 * t:.4g}" for t in record["seconds"]["step"]]
        low, middle, high = record.get("ratio", [None] * 3)
        ratio = ["", ""] if middle is None else [f"{middle:.2f}", f"{low:.2f}-{high:.2f}"]
        peak = record.get("peak measured", record.get("peak counted"))
        cells = [f"{record[OUTSIDE]:.1%}" if OUTSIDE in record else "", f"{peak / 1e9:.2f}" if peak else ""]
        if "launches" in record:
            cells += [f"{record['launches']:,}", f"{record['bytes'] / 1e9:.1f}"]
            cells += [f"{record['bandwidth'] / 1e9:.1f}", f"{record['of copy']:.0%}"]
        else:
            cells += [""] * 4
        rows.append([record["variant"], *times, *ratio, *cells])
    return rows


def evaluations(found: list[dict[str, Any]]) -> str:
    """The ratio of an evaluation of each variant, p50 and p20-p80."""
    ratios = {r["variant"]: r[f"ratio of {EVALUATION}"] for r in found if f"ratio of {EVALUATION}" in r}
    return "; ".join(f"{name} {p50:.2f} ({p20:.2f}-{p80:.2f})" for name, (p20, p50, p80) in ratios.items())


def phase_table(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: p50 of each phase in milliseconds, a column a variant whose phases were observed."""
    phased = [record for record in found if len(record["seconds"]) > 1]
    names = list(dict.fromkeys(name for record in phased for name in record["seconds"]))
    rows = [
        [name, *(f"{1e3 * r['seconds'][name][1]:.4g}" if name in r["seconds"] else "" for r in phased)]
        for name in names
    ]
    return ["p50, ms", *(record["variant"] for record in phased)], rows


def growth(found: list[dict[str, Any]], name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a sweep over `name`: p50 and ratio of each variant at each value."""
    variants = list(dict.fromkeys(record["variant"] for record in found))
    header = [name]
    for variant in variants:
        header += [f"{variant}, ms"] + ([] if variant == variants[0] else ["ratio"])
    rows = []
    for value in dict.fromkeys(record["setting"][name] for record in found):
        row = [str(value)]
        for variant in variants:
            (record,) = (r for r in found if r["variant"] == variant and r["setting"][name] == value)
            row.append(f"{1e3 * record['seconds']['step'][1]:.4g}")
            if variant != variants[0]:
                row.append(f"{record['ratio'][1]:.2f}" if "ratio" in record else "")
        rows.append(row)
    return header, rows


def fits(found: list[dict[str, Any]]) -> list[str]:
    """Of a sweep over batch_size, a line a variant: ms = a + b * images, by least squares of relative errors;
    and a over the launches: what one costs whatever it computes."""
    lines = []
    for variant in dict.fromkeys(record["variant"] for record in found):
        own = [record for record in found if record["variant"] == variant]
        n = torch.tensor([[1.0, r["setting"]["batch_size"]] for r in own], dtype=torch.float64)
        t = torch.tensor([[1e3 * r["seconds"]["step"][1]] for r in own], dtype=torch.float64)
        a, b = torch.linalg.lstsq(n / t, torch.ones_like(t)).solution.flatten().tolist()
        off = float((n @ torch.tensor([[a], [b]], dtype=torch.float64) / t - 1).abs().max())
        line = f"{variant}: {a:.0f} ms + {b:.1f} ms an image, within {off:.0%}"
        if "launches" in own[0]:
            line += f"; {1e3 * a / own[0]['launches']:.1f} us for each of {own[0]['launches']:,} launches"
            slope = (own[-1]["bytes"] - own[0]["bytes"]) / float(n[-1, 1] - n[0, 1])
            line += f", {slope / b / 1e6:.1f} GB/s"
        lines.append(line)
    return lines


def plot(found: list[dict[str, Any]], name: str, where: str) -> str:
    """A sweep as SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in found:
        point = record["setting"][name], 1e3 * record["seconds"]["step"][1]
        series.setdefault(record["variant"], []).append(point)
    return draw.lines(f"One step: {where}", name, "ms a step (p50)", series)
