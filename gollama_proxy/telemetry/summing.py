"""The metrics of several processes, as those of one.

Counters and histograms are summed.  Of a gauge, its family states what the whole has:
the sum, such as of requests in flight, or the highest or lowest value, such as of the
state of a worker, which each process sees for itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gollama_proxy.telemetry.exposition import (
    Collected,
    Exemplar,
    Family,
    Histogram,
)

MOST_ROWS = 500  # of one piece: less than a millisecond

# A family as plain values: its name, and of each series the labels and the value; of a
# histogram the buckets and the sum, and exemplars by bucket.  A long one is in pieces.
Plain = list[Any]
# What a process has, and whether it has ended.
Part = tuple[Sequence[Plain], bool]


def to_plain(collected: Iterable[Collected]) -> Iterator[Plain]:
    """Yield each family as values that can be sent to another process."""
    for family, series in collected:
        rows: list[Any] = []
        for each in series:
            if isinstance(each, Histogram):
                each.count()
                noted = [[i, *e] for i, e in (each.exemplars or {}).items()]
                rows.append([each.labels, each.buckets[:], each.sum, noted])
            else:
                rows.append([each[0], each[1]])
            if len(rows) >= MOST_ROWS:
                yield [family.name, rows]
                rows = []
        yield [family.name, rows]


class Sums:
    """Adds up what processes have collected.

    `families` are those that are known: what a process of another version adds to them
    is left out.
    """

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = {family.name: family for family in families}
        # By family and labels, in the order of their first appearance.
        self._series: dict[str, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"<Sums of {len(self._series)} families>"

    def add(self, plain: Sequence[Plain], *, ended: bool = False) -> None:
        """Add what one process has; of one that has `ended`, what was counted."""
        for name, rows in plain:
            family = self._families.get(name)
            if family is None or (ended and family.type == "gauge"):
                continue
            series = self._series.setdefault(name, {})
            for labels, *values in rows:
                if family.type == "histogram":
                    _add_histogram(family, series, labels, *values)
                elif labels in series:
                    series[labels] = _JOIN[family.whole](series[labels], values[0])
                else:
                    series[labels] = values[0]

    def collect(self) -> Iterator[Collected]:
        """Return the sums, for the page."""
        for name, series in self._series.items():
            family = self._families[name]
            if family.type == "histogram":
                yield family, [*series.values()]
            else:
                yield family, [*series.items()]


def _add_histogram(
    family: Family,
    series: dict[str, Any],
    labels: str,
    buckets: Sequence[int],
    total: float,
    noted: Iterable[Sequence[Any]],
) -> None:
    if len(buckets) != len(family.bounds) + 1:
        return  # of another version
    found = series.get(labels)
    if found is None:
        found = series[labels] = Histogram(family._replace(labels=()))
        found.labels = labels  # as they are written
    found.buckets = [a + b for a, b in zip(found.buckets, buckets, strict=True)]
    found.sum += total
    for bucket, *exemplar in noted:
        found.exemplars = found.exemplars or {}
        kept = found.exemplars.get(bucket)
        if kept is None or kept.at < exemplar[2]:
            found.exemplars[bucket] = Exemplar(*exemplar)


_JOIN: dict[str, Callable[[float, float], float]] = {
    "sum": operator.add,
    "highest": max,
    "lowest": min,
}
