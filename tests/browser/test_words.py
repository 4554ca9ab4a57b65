"""The words of the overview for workers in each state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from playwright.async_api import Browser

from tests.browser.dashboard import BROWSER, dashboard
from tests.fakes.hub import running_hub

pytestmark = BROWSER

CLOSED = {"state": "closed", "reason": "never tripped", "since": None, "opens_in": 0}
OPEN = {"state": "open", "reason": "5 failures in a row", "since": 3.0, "opens_in": 8.5}
FAILED = "5 failures in a row; it is tried again in 9 s"
TRIED = {"state": "half-open", "reason": "slow rate 60 %", "since": 1.0, "opens_in": 0}
DOWN = {"state": "down", "reason": "connection refused", "since": 130.0}
HOT = {"devices": [{"name": "GPU 0", "celsius": 93.4}]}


def worker(name: str, **given: Any) -> dict[str, Any]:
    """Make a worker as the admin API shows it, as far as words are about it."""
    return {
        "name": name,
        "state": "ready",
        "since": 100.0,
        "reason": "it answers",
        "hold": "",
        "breaker": CLOSED,
        "models": [model(name="tiny")],
        "agent": None,
        "slots": 4,
        "running": 0,
        **given,
    }


def model(**given: Any) -> dict[str, Any]:
    return {"name": "big", "loaded": True, "progress": None, "breaker": CLOSED, **given}


# The call is made at once with the time that the worker is from: no second passes.
_VERDICT = """
async ([workers, totals, queue]) => {
  const words = await import('/dashboard/words.js');
  const at = words.now();
  const known = new Map(workers.map((each) => [each.name, {...each, at}]));
  const {level, text, list} = words.verdictOf(known, totals, queue);
  return [level, text, list.map((each) => `${each.name ?? ''} ${each.text}`.trim())];
}
"""

VERDICTS: list[tuple[Sequence[Mapping[str, Any]], str, str, Sequence[str]]] = [
    ([], "", "This hub has no workers yet", []),
    ([worker("a")], "good", "The worker a is ready", []),
    ([worker("a"), worker("b")], "good", "Both workers are ready", []),
    ([worker(each) for each in "abc"], "good", "All 3 workers are ready", []),
    (
        [worker("a"), worker("gpu-2", **DOWN), worker("c")],
        "bad",
        "1 of 3 workers is down: gpu-2, connection refused, for 2 min",
        [],
    ),
    (
        [worker("a", **DOWN)],
        "bad",
        "The worker a is down: connection refused, for 2 min",
        [],
    ),
    (
        [worker("a"), worker("b", breaker=OPEN)],
        "bad",
        f"1 of 2 workers gets no requests: b, {FAILED}",
        [],
    ),
    (
        [worker("a", **DOWN), worker("b", breaker=OPEN), worker("c")],
        "bad",
        "2 of 3 workers are down or fail",
        [
            "a is down: connection refused, for 2 min",
            f"b gets no requests: {FAILED}",
        ],
    ),
    (
        [worker("a", **DOWN), worker("b", **DOWN)],
        "bad",
        "Both workers are down",
        [f"{name} is down: connection refused, for 2 min" for name in "ab"],
    ),
    (
        [worker("a"), worker("b", state="loading", models=[model(loaded=False)])],
        "warn",
        "1 of 2 workers is ready; b is loading its model, for 2 min",
        [],
    ),
    (
        [worker("a", state="starting"), worker("b", state="starting")],
        "warn",
        "No worker is ready yet",
        [f"{name} is not reached yet, for 2 min" for name in "ab"],
    ),
    (
        [worker("a"), worker("b", breaker=TRIED), worker("c", agent=HOT)],
        "warn",
        "3 of 3 workers are ready",
        ["b is tried again: slow rate 60 %", "c is hot: GPU 0 is at 93 °C"],
    ),
    (
        [worker("a"), worker("b", models=[model(breaker=OPEN)])],
        "warn",
        "2 of 2 workers are ready; b gets no requests for big: 5 failures in a row",
        [],
    ),
    (
        [worker("a"), worker("b", hold="paused"), worker("c", state="asleep")],
        "good",
        "1 of 3 workers is ready; 1 paused or drained, 1 asleep",
        [],
    ),
    (
        [worker("a", hold="draining"), worker("b", hold="paused")],
        "bad",
        "No worker takes requests: 2 of 2 paused or drained",
        [],
    ),
    (
        # The breaker of a model is that of its worker where it has none.
        [worker("a"), worker("b", breaker=TRIED, models=[model(breaker=TRIED)])],
        "warn",
        "2 of 2 workers are ready; b is tried again: slow rate 60 %",
        [],
    ),
]


async def test_the_verdict_names_what_is_wrong(browser: Browser) -> None:
    async with running_hub() as hub, dashboard(browser, hub) as page:
        for workers, level, text, lines in VERDICTS:
            given = [list(workers), {"waiting": 0}, []]
            found = await page.page.evaluate(_VERDICT, given)
            assert found == [level, text, list(lines)]


@pytest.mark.parametrize(
    ("queue", "level", "line"),
    [
        (
            [{"waited": 4.0, "expected": 2.0}],
            "good",
            "1 request waits, the longest for 4 s; the last gets its slot in about 2 s",
        ),
        (
            [{"waited": 31.0, "expected": None}, {"waited": 0.2, "expected": None}],
            "warn",
            "2 requests wait, the longest for 31 s",
        ),
    ],
)
async def test_the_verdict_mentions_a_queue(
    browser: Browser, queue: list[Any], level: str, line: str
) -> None:
    async with running_hub() as hub, dashboard(browser, hub) as page:
        given = [[worker("a")], {"waiting": len(queue)}, queue]
        found = await page.page.evaluate(_VERDICT, given)
        assert found == [level, "The worker a is ready", [line]]
