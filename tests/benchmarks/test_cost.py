"""The cost benchmark: its tables, its plot, and one short measurement."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import cost
from benchmarks.children import BenchmarkError
from benchmarks.cost import FIGURES, Plan, Results
from benchmarks.load import Kind
from benchmarks.measure import (
    measure_answers,
    measure_burst,
    measure_start,
    paced_worker,
)
from benchmarks.plot import plot
from benchmarks.proxies import Prototype

NAMES = ["hub", "nginx"]


@pytest.fixture
def results() -> Results:
    """Values of three rounds, of which one is missing; nginx assembles nothing."""
    made: Results = {
        figure.name: {"hub": [30.0, 10.0, 20.0], "nginx": [10.0, None, 5.0]}
        for figure in FIGURES
    }
    made["chat_1"]["nginx"] = []
    return made


def test_a_table_of_medians(results: Results) -> None:
    lines = cost.cost_table(results, NAMES).splitlines()
    assert lines[0] == "|  | hub | nginx | goal |"
    assert lines[2] == "| short request, keep-alive, µs | 20 | 8 | ≤ 75 |"
    assert "| chat of 1 token in one piece, µs | 20 | – | ≤ 260 |" in lines


def test_ratios_are_of_figures_of_the_same_round(results: Results) -> None:
    lines = cost.ratio_table(results, NAMES).splitlines()
    assert lines[0] == "|  | hub / nginx |"
    assert lines[2] == "| short request, keep-alive | 3.50 (3.00 - 4.00) |"
    assert "| chat of 1 token in one piece | – |" in lines


def test_the_json_file_has_every_value(results: Results) -> None:
    made = cost.document(results, {"date": "2026-11-29"}, Plan(3, 1.0, 4000))
    figure = json.loads(json.dumps(made))["figures"]["request"]
    assert figure["rounds"] == results["request"]
    assert (figure["unit"], figure["goal"]) == ("µs", 75)


def test_the_plot_is_xml_with_a_bar_for_each_median(results: Results) -> None:
    root = ElementTree.fromstring(plot(cost.panels(results)))  # noqa: S314 (ours)
    space = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{space}g")
    assert len(panels) == len(FIGURES)
    bars = [len(panel.findall(f"{space}rect")) for panel in panels]
    assert bars == [1 if figure.name == "chat_1" else 2 for figure in FIGURES]


def test_a_report_replaces_the_one_before_it() -> None:
    text = f"above\n{cost.BEGIN}\nold\n{cost.END}\nbelow\n"
    for report in ("new", "newer"):
        text = cost.insert(text, report)
    assert text.startswith(f"above\n{cost.BEGIN}\n\nnewer\n")
    assert text.endswith(f"{cost.END}\nbelow\n")
    assert "old" not in text
    with pytest.raises(BenchmarkError, match="has no <!-- cost: begin"):
        cost.insert("no marks", "new")


@pytest.mark.parametrize(
    ("arguments", "flaw"),
    [
        (["--rounds", "0"], "--rounds 0: must be above 0"),
        (["--streams", "4097"], "--streams 4097: must be from 40 to 4096"),
        (["--output", "/nowhere"], "--output /nowhere: must be a folder to write to"),
        (["--only", "apache"], "invalid choice: 'apache'"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], flaw: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cost._parse(arguments)
    assert caught.value.code == 2
    assert flaw in capsys.readouterr().err


async def test_answers_streams_and_starts_are_measured(tmp_path: Path) -> None:
    async with paced_worker(50.0, tmp_path) as port:
        assert await measure_start(Prototype([port], tmp_path)) > 0
        proxy = Prototype([port], tmp_path)
        async with proxy.running():
            for kind in (Kind.EMBEDDING, Kind.STREAM):
                sample = await measure_answers(proxy, kind, kind == Kind.STREAM, 0.1)
                assert sample.microseconds > 0
            assert await measure_burst(proxy, 8, 21) > 0


async def test_an_answer_that_is_lost_fails_the_measurement(tmp_path: Path) -> None:
    async with paced_worker(50.0, tmp_path) as port:
        proxy = Prototype([port], tmp_path)
        async with proxy.running():
            with pytest.raises(BenchmarkError, match=r"lost answers: .*tokens missing"):
                # The worker's own answer in one piece has none of the words.
                await measure_answers(proxy, Kind.CHAT, 5, 0.1)
