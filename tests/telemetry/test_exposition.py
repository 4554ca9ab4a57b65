"""The metrics of several processes are those of one that did all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gollama_proxy.telemetry import exposition
from gollama_proxy.telemetry.exposition import (
    Collected,
    Family,
    Histogram,
    Sums,
    to_plain,
)
from gollama_proxy.telemetry.families import METRICS

COUNTED = Family("c_total", "counter", "Counted.", ("a",))
TIMES = Family("t_seconds", "histogram", "Took.", ("a",), (1, 10))
RUNS = Family("runs", "gauge", "Run.", ("a",))
UP = Family("up", "gauge", "Up.", ("a",), whole="highest")
VALID = Family("valid", "gauge", "Valid.", whole="lowest")
ALL = (COUNTED, TIMES, RUNS, UP, VALID)


def process(
    *times: float, counted: float = 1, up: int = 1, valid: int = 1, a: str = "x"
) -> list[Any]:
    """Return what a process has collected, as another one reads it."""
    histogram = Histogram(TIMES, a)
    histogram.values += times
    found: list[Collected] = [
        (COUNTED, [(COUNTED.at(a), counted)]),
        (TIMES, [histogram]),
        (RUNS, [(RUNS.at(a), 2)]),
        (UP, [(UP.at(a), up)]),
        (VALID, [("", valid)]),
    ]
    made: list[Any] = json.loads(json.dumps([*to_plain(found)]))
    return made


def page_of(sums: Sums, *, open_metrics: bool = False) -> list[str]:
    text = "".join(exposition.pieces([sums.collect], open_metrics=open_metrics))
    return [line for line in text.splitlines() if line[0] != "#"]


def test_counters_are_summed_and_gauges_follow_their_families() -> None:
    sums = Sums(ALL)
    sums.add(process(0.5, counted=3, up=0))
    sums.add(process(5, 50, counted=4, valid=0))
    assert page_of(sums) == [
        'c_total{a="x"} 7.0',
        't_seconds_bucket{a="x",le="1.0"} 1.0',
        't_seconds_bucket{a="x",le="10.0"} 2.0',
        't_seconds_bucket{a="x",le="+Inf"} 3.0',
        't_seconds_count{a="x"} 3.0',
        't_seconds_sum{a="x"} 55.5',
        'runs{a="x"} 4.0',
        'up{a="x"} 1.0',
        "valid 0.0",
    ]


def test_series_of_one_process_alone_are_there() -> None:
    sums = Sums(ALL)
    sums.add(process(0.5))
    sums.add(process(0.5, a="y"))
    assert {'c_total{a="x"} 1.0', 'c_total{a="y"} 1.0'} < {*page_of(sums)}


def test_a_process_that_has_ended_keeps_what_it_counted() -> None:
    sums = Sums(ALL)
    sums.add(process(0.5, counted=3))
    sums.add(process(5, counted=4, valid=0), ended=True)
    lines = page_of(sums)
    assert 'c_total{a="x"} 7.0' in lines
    assert 't_seconds_count{a="x"} 2.0' in lines
    assert 'runs{a="x"} 2.0' in lines
    assert "valid 1.0" in lines


def test_the_newest_exemplar_of_a_bucket_stays() -> None:
    def with_exemplar(trace: str, value: float) -> list[Any]:
        histogram = Histogram(TIMES, "x")
        histogram.values.append(value)
        histogram.exemplify(trace, value)
        return json.loads(json.dumps([*to_plain([(TIMES, [histogram])])]))

    sums = Sums(ALL)
    one, two = with_exemplar("one", 0.5), with_exemplar("two", 0.25)
    sums.add(two)
    sums.add(one)
    [line] = [line for line in page_of(sums, open_metrics=True) if "trace_id" in line]
    assert 'trace_id="two"' in line


def test_what_another_version_has_besides_is_left_out() -> None:
    sums = Sums((TIMES,))
    sums.add([["new_total", ['a="x"'], [1]]])
    sums.add([["t_seconds", ['a="x"'], [1, 2], [3.0], []]])  # of other buckets
    assert page_of(sums) == []
    assert repr(sums) == "<Sums of 1 families>"


def test_the_page_of_one_process_stays_as_it_is() -> None:
    def collect() -> Iterator[Collected]:
        for family in METRICS:
            values = [f'{name} \\ "1"\n' for name in family.labels]
            if family.type == "histogram":
                histogram = Histogram(family, *values)
                histogram.values += [0.001, 1, 1e9]
                yield family, [histogram]
            else:
                yield family, [(family.at(*values), 1.5)]

    sums = Sums(METRICS)
    sums.add(json.loads(json.dumps([*to_plain(collect())])))
    for open_metrics in (False, True):
        alone = "".join(exposition.pieces([collect], open_metrics=open_metrics))
        summed = "".join(exposition.pieces([sums.collect], open_metrics=open_metrics))
        assert summed == alone


def test_a_family_without_series_is_named() -> None:
    sums = Sums(ALL)
    sums.add(json.loads(json.dumps([*to_plain([(COUNTED, []), (TIMES, [])])])))
    text = "".join(exposition.pieces([sums.collect], open_metrics=False))
    assert "# TYPE c_total counter" in text
    assert "# TYPE t_seconds histogram" in text


def test_long_families_are_in_pieces() -> None:
    series = [(RUNS.at(str(number)), number) for number in range(1200)]
    pieces = [*to_plain([(RUNS, series)])]
    assert [len(labels) for _, labels, _ in pieces] == [500, 500, 200]
    sums = Sums(ALL)
    sums.add(pieces)
    assert len(page_of(sums)) == 1200
