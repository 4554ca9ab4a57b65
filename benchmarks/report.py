"""How figures of several rounds are told."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table


def table(title: str, *headings: str) -> Table:
    """Make a table whose first column has names and whose others have figures."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    made.add_column("")
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Spell a table whose first column has names and whose others have figures."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = (headings, rule, *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Tell the median, and the lowest and the highest."""
    middle, low, high = (f"{value:.{digits}f}" for value in _marks(values))
    return f"{middle} ({low} - {high})"


def signed_spread(values: Sequence[float], digits: int) -> str:
    """Tell the same of differences, which may be on both sides of zero."""
    middle, low, high = (f"{value:+z.{digits}f}" for value in _marks(values))
    return f"{middle} ({low} to {high})"


def _marks(values: Sequence[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
