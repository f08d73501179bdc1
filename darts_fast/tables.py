"""Tables in Markdown, and the spread of repeated measurements in words."""

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev


def markdown_table(
    header: Sequence[object], rows: Iterable[Sequence[object]], numbers: bool = False
) -> list[str]:
    """The lines of a table. `numbers`: every column but the first is aligned to the right."""
    first, *others = (
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)
    )
    rule = "|---" + "|---:" * (len(header) - 1) + "|" if numbers else "|" + "---|" * len(header)
    return [first, rule, *others]


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """`98.33 ± 0.21`: the mean and the sample standard deviation, which a single value does not have."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"
