"""Figures of benchmarks as SVG text: lines on logarithmic axes, and horizontal bars."""

import html
import math
from collections.abc import Mapping, Sequence

# Each on white has a contrast of at least 4.5:1 (WCAG AA); told apart by dash, too.
COLOURS = ("#0067A5", "#B5381B", "#00784F", "#8A6100", "#A2337E", "#606060")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
STYLE = "font-family='Helvetica,Arial,sans-serif' font-size='13'"


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    width: int = 720,
) -> str:
    """A line a series through its points (x, y), all positive; both axes are logarithmic and have a tick at
    each x and at 1, 2 and 5 times each power of ten."""
    points = [point for line in series.values() for point in line]
    xs = sorted({x for x, _ in points})
    low, high = min(y for _, y in points), max(y for _, y in points)
    ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
    low = max((t for t in ticks if t <= low), default=low)
    high = min((t for t in ticks if t >= high and t > low), default=high)
    left, top, right, bottom = 70, 40, width - 20, 340
    below = bottom + 60 + 20 * len(series)

    def across(x: float) -> float:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return left + 10 + (right - left - 20) * math.log(x / xs[0]) / span

    def up(y: float) -> float:
        return bottom - (bottom - top) * math.log(y / low) / math.log(high / low)

    parts = [_text(10, 22, title, "font-weight='bold'")]
    for tick in ticks:
        if low <= tick <= high:
            y = up(tick)
            parts.append(f"<path d='M{left} {y:.1f}H{right}' stroke='#d8d8d8'/>")
            parts.append(_text(left - 6, y + 4, f"{tick:g}", "text-anchor='end'"))
    for x in xs:
        parts.append(f"<path d='M{across(x):.1f} {bottom}v5' stroke='#333'/>")
        parts.append(_text(across(x), bottom + 19, f"{x:g}", "text-anchor='middle'"))
    parts.append(_text((left + right) / 2, bottom + 38, x_label, "text-anchor='middle'"))
    middle = (top + bottom) / 2
    parts.append(_text(18, middle, y_label, f"text-anchor='middle' transform='rotate(-90 18 {middle})'"))
    for index, (name, line) in enumerate(series.items()):
        look = f"stroke='{COLOURS[index % 6]}' stroke-width='2' stroke-dasharray='{DASHES[index % 4]}'"
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in sorted(line))
        parts.append(f"<polyline points='{path}' fill='none' {look}/>")
        parts += [
            f"<circle cx='{across(x):.1f}' cy='{up(y):.1f}' r='3' fill='{COLOURS[index % 6]}'/>"
            for x, y in line
        ]
        y = bottom + 60 + 20 * index
        parts.append(f"<path d='M{left} {y - 4}h30' {look}/>" + _text(left + 38, y, name))
    return _figure(width, below, parts)


def bars(title: str, rows: Sequence[tuple[str, float, str]], full: float, width: int = 760) -> str:
    """A bar a row (name, value, its text) beside its name; `full` is the value of the longest possible."""
    start = 300
    parts = [_text(10, 22, title, "font-weight='bold'")]
    for index, (name, value, text) in enumerate(rows):
        y = 40 + 24 * index
        length = max(0.0, min(1.0, value / full if full else 0.0)) * (width - start - 150)
        parts.append(
            _text(start - 8, y + 13, name if len(name) < 40 else name[:38] + "…", "text-anchor='end'")
        )
        parts.append(f"<rect x='{start}' y='{y}' width='{length:.1f}' height='17' fill='{COLOURS[0]}'/>")
        parts.append(_text(start + length + 6, y + 13, text))
    return _figure(width, 50 + 24 * len(rows), parts)


def lanes(title: str, rows: dict[str, Sequence[tuple[float, float]]], width: int = 960) -> str:
    """A lane a name, in which a rectangle stands for each (start, length)."""
    start, end = 300, max((a + b for row in rows.values() for a, b in row), default=1.0) or 1.0
    scale = (width - start - 30) / end
    parts = [_text(10, 22, title, "font-weight='bold'")]
    for index, (name, row) in enumerate(rows.items()):
        y = 40 + 24 * index
        parts.append(
            _text(start - 8, y + 13, name if len(name) < 40 else name[:38] + "…", "text-anchor='end'")
        )
        path = "".join(
            f"M{start + scale * a:.2f} {y}h{max(0.3, scale * b):.2f}v17H{start + scale * a:.2f}z"
            for a, b in row
        )
        parts.append(f"<path d='{path}' fill='{COLOURS[index % 6]}'/>")
    below = 40 + 24 * len(rows)
    for tick in range(5):
        x = start + (width - start - 30) * tick / 4
        parts.append(f"<path d='M{x:.1f} 36V{below}' stroke='#d8d8d8'/>")
        parts.append(_text(x, below + 16, f"{end * tick / 4:.3g}", "text-anchor='middle'"))
    return _figure(width, below + 26, parts)


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {more}>{html.escape(text)}</text>"


def _figure(width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' {STYLE}>"
        f"<rect width='{width}' height='{height}' fill='#fff'/>" + "\n".join(parts) + "</svg>\n"
    )
