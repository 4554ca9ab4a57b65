"""Tables of figures that were measured in several rounds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table


def table(title: str, *headings: str) -> Table:
    """Return a table for the terminal, with names in its first column."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    made.add_column("")
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, with names in its first column."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = (headings, rule, *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median with the lowest and the highest value."""
    middle, low, high = (
        f"{value:.{digits}f}" for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({low} - {high})"
