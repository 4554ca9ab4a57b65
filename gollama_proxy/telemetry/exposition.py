"""The page of metrics, of one process or several, for Prometheus or OpenMetrics.

A page of a thousand workers has 100,000 lines.  It is made in pieces, between which the
event loop relays tokens, and the text of a series' labels is made once.  So the hub
writes the format itself: `prometheus_client` needs ten times as long for a page, in one
go, and 3.4 MB and 20 ms for its import.  Tests compare the page with what its parsers
and `promtool` read.
"""

from __future__ import annotations

import operator
import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

MOST_VALUES = 64  # of a series, until they are counted: a large fleet has many of them
PIECE = 32 << 10  # characters, at least; about a quarter of a millisecond

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Family(NamedTuple):
    """The declaration of a metric."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()  # of a histogram's buckets, but for the last one
    # What several processes have together, if this is a gauge.
    whole: Literal["sum", "highest", "lowest"] = "sum"

    def at(self, *values: str) -> str:
        """Return the labels of a series as they are written, in alphabetical order."""
        pairs = sorted(zip(self.labels, values, strict=True))
        return ",".join(f'{name}="{v.translate(_ESCAPED)}"' for name, v in pairs)


class Exemplar(NamedTuple):
    """A request that stands for those of its bucket."""

    trace: str  # its id, in hexadecimal digits
    value: float
    at: float  # Unix time


class Histogram:
    """The counts of one series.

    Values are counted together when there are many of them, or when they are read: that
    takes a tenth of the time.
    """

    __slots__ = ("_bounds", "buckets", "exemplars", "labels", "sum", "values")

    def __init__(self, family: Family, *values: str) -> None:
        self.labels = family.at(*values)
        self._bounds = family.bounds
        self.buckets = [0] * (len(family.bounds) + 1)
        self.sum = 0.0
        self.values: list[float] = []  # not counted yet
        self.exemplars: dict[int, Exemplar] | None = None  # by the index of the bucket

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self.buckets) + len(self.values)}>"

    def add(self, values: Iterable[float]) -> None:
        """Take some values."""
        self.values += values
        if len(self.values) >= MOST_VALUES:
            self.count()

    def count(self) -> None:
        """Count the values, and forget them."""
        values, bounds = self.values, self._bounds
        if not values:
            return
        self.sum = sum(values, self.sum)
        values.sort()
        begin, number = 0, len(values)
        for bucket in range(bisect_left(bounds, values[0]), len(bounds)):
            end = bisect_right(values, bounds[bucket], begin)
            self.buckets[bucket] += end - begin
            begin = end
            if begin == number:  # most values are in a few buckets
                break
        self.buckets[-1] += number - begin
        values.clear()

    def exemplify(self, trace: str, value: float) -> None:
        """Keep a request as the example of its bucket, until the next one."""
        if self.exemplars is None:
            self.exemplars = {}
        bucket = bisect_left(self._bounds, value)
        self.exemplars[bucket] = Exemplar(trace, value, time.time())


# A family, and its series: labels with a value, or histograms.
Numbers = Iterable[tuple[str, float]]
Collected = tuple[Family, Numbers] | tuple[Family, Iterable[Histogram]]
Collect = Callable[[], Iterator[Collected]]


def pieces(sources: Iterable[Collect], *, open_metrics: bool) -> Iterator[str]:
    """Write the page; what happens between two pieces may show in the later one."""
    parts: list[str] = []
    size = 0
    for part in _parts(sources, open_metrics=open_metrics):
        parts.append(part)
        size += len(part)
        if size >= PIECE:
            yield "".join(parts)
            parts.clear()
            size = 0
    if open_metrics:
        parts.append("# EOF\n")
    yield "".join(parts)


def _parts(sources: Iterable[Collect], *, open_metrics: bool) -> Iterator[str]:
    for collect in sources:
        for family, series in collect():
            name = family.name
            of_family = name
            if open_metrics and family.type == "counter":
                of_family = name.removesuffix("_total")
            yield f"# HELP {of_family} {family.help}\n"
            yield f"# TYPE {of_family} {family.type}\n"
            bounds = [f'le="{float(bound)}"}} ' for bound in family.bounds]
            bounds.append('le="+Inf"} ')
            for each in series:
                if isinstance(each, Histogram):
                    yield _of_histogram(name, bounds, each, exemplars=open_metrics)
                elif each[0]:
                    yield f"{name}{{{each[0]}}} {float(each[1])}\n"
                else:
                    yield f"{name} {float(each[1])}\n"


def _of_histogram(
    name: str, bounds: list[str], histogram: Histogram, *, exemplars: bool
) -> str:
    histogram.count()
    labels, noted = histogram.labels, histogram.exemplars
    start = f"{name}_bucket{{{labels}," if labels else f"{name}_bucket{{"
    total, lines = 0, []
    for bound, count in zip(bounds, histogram.buckets, strict=True):
        total += count
        lines.append(f"{start}{bound}{total}.0\n")
    if exemplars and noted is not None:
        for index, (trace, value, at) in noted.items():
            line = lines[index][:-1]
            lines[index] = f'{line} # {{trace_id="{trace}"}} {value} {at:.3f}\n'
    of_all = f"{{{labels}}}" if labels else ""
    lines.append(f"{name}_count{of_all} {total}.0\n")
    lines.append(f"{name}_sum{of_all} {histogram.sum}\n")
    return "".join(lines)


# --- The format that a client prefers ---------------------------------------------


def prefers_open_metrics(accept: str) -> bool:
    """Return whether an `Accept` header prefers OpenMetrics to text.

    Without a preference it is text, which every client understands.
    """
    best = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for entry in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = 1.0
        for parameter in parameters:
            if found := re.fullmatch(r"q\s*=\s*([01](?:\.\d{0,3})?)", parameter):
                quality = float(found[1])
        if kind in best:
            best[kind] = max(best[kind], quality)
    return best["application/openmetrics-text"] > best["text/plain"]


# --- Several processes, as one ----------------------------------------------------
#
# Counters and histograms are summed.  Of a gauge, its family states what the whole has:
# the sum, such as of requests in flight, or the highest or lowest value, such as of the
# state of a worker, which each process sees for itself.

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
