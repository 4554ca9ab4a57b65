"""The page of metrics, in the text format of Prometheus or in OpenMetrics.

A page of a thousand workers has 100,000 lines.  It is made in pieces, between which the
event loop relays tokens, and the text of a series' labels is made once.  So the hub
writes the format itself: `prometheus_client` needs ten times as long for a page, in one
go, and 3.4 MB and 20 ms for its import.  Tests compare the page with what its parsers
and `promtool` read.
"""

from __future__ import annotations

import functools
import operator
import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

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

    A request only appends what it has measured to `values`.  They are counted together
    when there are many of them, or when they are read: that takes a tenth of the time.
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

    def count(self) -> None:
        """Count the values, and forget them."""
        values = self.values
        # One after the other: the `sum` of Python 3.12 corrects what is rounded.
        self.sum = functools.reduce(operator.add, values, self.sum)
        values.sort()
        begin = 0
        for bucket, bound in enumerate(self._bounds):
            end = bisect_right(values, bound, begin)
            self.buckets[bucket] += end - begin
            begin = end
        self.buckets[-1] += len(values) - begin
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


# --- The format that a client prefers -----------------------------------------------


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
