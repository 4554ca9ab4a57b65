"""The charts of the page: what they keep of the values of each second."""

from __future__ import annotations

from typing import Any

from playwright.async_api import Browser

from tests.browser.dashboard import BROWSER, dashboard
from tests.fakes.hub import running_hub

pytestmark = BROWSER

_SERIES = """
async ([options, loaded, pushed]) => {
  const {Series} = await import('/dashboard/charts.js');
  const series = new Series(options);
  if (loaded) series.load(loaded);
  const changed = pushed.map((each) => series.push(each));
  return [series.values, changed, series.first, series.last, series.top];
}
"""
_PATHS = """
async ([values, options]) => {
  const {Chart, Series} = await import('/dashboard/charts.js');
  const series = new Series({size: values.length, step: 60});
  series.load(values);
  const chart = new Chart({series: [series], describe: () => 'A chart', ...options});
  return [chart.node.querySelector('.a').getAttribute('d'), chart.top, chart.span];
}
"""


async def test_a_step_is_the_mean_of_its_seconds_or_the_highest(
    browser: Browser,
) -> None:
    cases: list[tuple[list[Any], list[Any]]] = [
        (
            [{"size": 3, "step": 2}, None, [1, 3, 8]],
            [[None, 2, 8], [True, True, True], 1, 8, 8],
        ),
        (
            [{"size": 3, "step": 2, "highest": True}, None, [3, 1, None, 2]],
            [[None, 3, 2], [True, False, True, True], 1, 2, 3],
        ),
        # What was loaded is complete: the next second begins a step.
        ([{"size": 3, "step": 5}, [1, 2, 3, 4], [9]], [[3, 4, 9], [True], 0, 9, 9]),
        ([{"size": 2, "step": 5}, [7], [None]], [[7, None], [True], 0, 7, 7]),
        ([{"size": 2, "step": 5}, [], []], [[None, None], [], 2, None, 0]),
    ]
    async with running_hub() as hub, dashboard(browser, hub) as page:
        for given, expected in cases:
            assert await page.page.evaluate(_SERIES, given) == expected


async def test_a_gap_stays_one_unless_it_is_short(browser: Browser) -> None:
    async with running_hub() as hub, dashboard(browser, hub) as page:
        values = [10, None, 5, None, None, 0, 0]
        for bridge, path in (
            (0, "M0 0L25 0M75 20L125 20M250 40L300 40"),
            (1, "M0 0L100 20M250 40L300 40"),
            (2, "M0 0L100 20L250 40L300 40"),
        ):
            found = await page.page.evaluate(_PATHS, [values, {"bridge": bridge}])
            assert found == [path, 10, 420]


async def test_a_chart_begins_with_the_first_value(browser: Browser) -> None:
    async with running_hub() as hub, dashboard(browser, hub) as page:
        values = [*[None] * 12, 2, 3, 1]
        path, top, span = await page.page.evaluate(_PATHS, [values, {"least": 4}])
        assert (path, top, span) == ("M0 20L150 10L300 30", 4, 180)
