"""The metrics of several processes, as those of one.

Counters and histograms are summed.  Of a gauge, its family states what the whole has:
the sum, such as of requests in flight, or the highest or lowest value, such as of the
state of a worker, which each process sees for itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from gollama_proxy.telemetry.exposition import (
    Collected,
    Exemplar,
    Family,
    Histogram,
)

MOST_ROWS = 500  # of one piece: less than a millisecond

# A family as plain values: its name, the labels of its series and their values; of a
# histogram the buckets of all, one after the other, the sums, and the exemplars, each
# with the numbers of its series and its bucket.  There are few lists, as a hundred
# thousand would keep the garbage collector busy.  A long family is in pieces.
Plain = list[Any]
# What a process has, and whether it has ended.
Part = tuple[Sequence[Plain], bool]


def to_plain(collected: Iterable[Collected]) -> Iterator[Plain]:
    """Yield each family as values that can be sent to another process."""
    for family, series in collected:
        rows = iter(series)
        piece: list[Any] = [*islice(rows, MOST_ROWS)]
        while True:
            if family.type == "histogram":
                yield _plain_histograms(family, piece)
            else:
                yield [family.name, [r[0] for r in piece], [r[1] for r in piece]]
            if not (piece := [*islice(rows, MOST_ROWS)]):
                break


def _plain_histograms(family: Family, series: Sequence[Histogram]) -> Plain:
    buckets: list[int] = []
    noted: list[list[Any]] = []
    for number, each in enumerate(series):
        each.count()
        buckets += each.buckets
        if each.exemplars:
            noted += ([number, i, *e] for i, e in each.exemplars.items())
    labels = [each.labels for each in series]
    return [family.name, labels, buckets, [each.sum for each in series], noted]


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
        for name, labels, values, *more in plain:
            family = self._families.get(name)
            if family is None or (ended and family.type == "gauge"):
                continue
            series = self._series.setdefault(name, {})
            if family.type == "histogram":
                _add_histograms(family, series, labels, values, *more)
                continue
            join = _JOIN[family.whole]
            for label, value in zip(labels, values, strict=True):
                known = series.get(label)
                series[label] = value if known is None else join(known, value)

    def collect(self) -> Iterator[Collected]:
        """Return the sums, for the page."""
        for name, series in self._series.items():
            family = self._families[name]
            if family.type == "histogram":
                yield family, [*series.values()]
            else:
                yield family, [*series.items()]


def _add_histograms(
    family: Family,
    series: dict[str, Any],
    labels: Sequence[str],
    buckets: Sequence[int],
    sums: Sequence[float],
    noted: Iterable[Sequence[Any]],
) -> None:
    size = len(family.bounds) + 1
    if len(buckets) != size * len(labels):
        return  # of another version
    for number, (label, total) in enumerate(zip(labels, sums, strict=True)):
        found = series.get(label)
        if found is None:
            found = series[label] = Histogram(family._replace(labels=()))
            found.labels = label  # as they are written
        begin = number * size
        added = buckets[begin : begin + size]
        found.buckets = [*map(operator.add, found.buckets, added)]
        found.sum += total
    for number, bucket, *exemplar in noted:
        found = series[labels[number]]
        found.exemplars = found.exemplars or {}
        kept = found.exemplars.get(bucket)
        if kept is None or kept.at < exemplar[2]:
            found.exemplars[bucket] = Exemplar(*exemplar)


_JOIN: dict[str, Callable[[float, float], float]] = {
    "sum": operator.add,
    "highest": max,
    "lowest": min,
}
