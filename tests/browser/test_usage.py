"""The dashboard shows what was used, as a chart, a table and a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.async_api import Browser, ViewportSize, expect

from gollama_proxy.telemetry.accesslog import Record
from tests.browser.dashboard import BROWSER, DESK, PHONE, Dashboard, dashboard
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.state.test_ledger import NOON, TODAY

pytestmark = BROWSER

MARKUP = "<img src=x onerror=alert(1)>"
DAY = 86_400


async def use(hub: RunningHub, days: int = 5) -> None:
    """Let some subjects use two models on some days, up to the 29th of November."""
    ledger = hub.hub.ledger
    subjects = [
        "alice",
        "bob",
        MARKUP,
        "=HYPERLINK(1)",
        *(f"user {n}" for n in range(9)),
    ]
    for back in reversed(range(days)):
        ledger.clock = Clock(NOON - back * DAY)
        for number, subject in enumerate(subjects, 1):
            for model in ("qwen3-8b", "gpt-oss-20b"):
                size = (days - back) * 100_000 // number
                record = Record("1", "POST", subject=subject, model=model)
                record.prompt_tokens, record.cached_tokens = 3 * size, 2 * size
                record.tokens, record.slot_seconds = size, size / 40
                ledger.add(record, failed=number == 2 and back == 1)


async def shoot(page: Dashboard, name: str) -> None:
    """Keep a picture, where someone wants to look at it."""
    if folder := os.environ.get("GOLLAMA_SHOTS"):
        await page.page.screenshot(path=f"{folder}/{name}.png", full_page=True)


async def test_usage_is_added_up_as_asked(browser: Browser) -> None:
    async with running_hub() as hub:
        await use(hub)
        token = hub.token("root", scope="monitor")
        async with dashboard(browser, hub, token, view="#/usage") as page:
            rows = page.page.locator("tbody tr")
            await expect(rows).to_have_count(13)
            await expect(rows.nth(0)).to_contain_text("alice")
            await expect(rows.nth(1).locator("td").nth(2)).to_have_text("2")
            await expect(rows.nth(2)).to_contain_text(MARKUP)
            chart = page.page.get_by_role("img", name="Bar chart: Tokens by subject")
            await expect(chart.locator("rect")).to_have_count(39)
            await expect(page.page.locator(".usage [role=status]")).to_contain_text(
                "in 130 requests, 2 of them with an error, from Nov 23 to Nov 29"
            )
            await shoot(page, "usage")
            assert await page.violations() == []

            await page.page.get_by_label("By", exact=True).select_option("day,subject")
            await expect(rows).to_have_count(5 * 13)
            chart = page.page.get_by_role("img", name="Bar chart: Tokens by day and")
            await expect(chart.locator("rect")).to_have_count(5 * 8)
            await expect(page.page.locator(".usage-key li")).to_have_count(8)
            assert page.page.url.endswith("#/usage?by=day%2Csubject&since=6d")
            await shoot(page, "usage-days")
            assert await page.violations() == []

            await page.page.get_by_label("Chart of").select_option("slot_seconds")
            await expect(
                page.page.get_by_role("img", name="Bar chart: Time on slots")
            ).to_be_visible()
            await page.page.get_by_label("When").select_option("own")
            await page.page.get_by_label("From (UTC)").fill("2026-11-27")
            await page.page.get_by_label("To, with that day").fill("2026-11-28")
            await expect(rows).to_have_count(2 * 13)
            await page.page.get_by_label("From (UTC)").fill("2026-11-29")
            await expect(page.page.get_by_role("alert")).to_contain_text(
                "must be before until"
            )
            page.expect_problem("400: /(admin|v1)/usage")
            await page.page.get_by_label("Of", exact=True).select_option("own")
            await page.page.get_by_label("To, with that day").fill("2026-11-29")
            await expect(page.page.get_by_text("Nothing was used")).to_be_visible()


async def test_the_file_has_every_row_and_no_formula(
    browser: Browser, tmp_path: Path
) -> None:
    async with running_hub() as hub:
        await use(hub)
        token = hub.token("root", scope="monitor")
        async with dashboard(browser, hub, token, view="#/usage") as page:
            async with page.page.expect_download() as started:
                await page.page.get_by_role("button", name="Download as CSV").click()
            download = await started.value
            assert download.suggested_filename == "usage-2026-11-23-to-2026-11-29.csv"
            await download.save_as(tmp_path / "usage.csv")
    lines = (tmp_path / "usage.csv").read_bytes().decode().split("\r\n")
    assert lines[0] == (
        "subject,requests,errors,prompt_tokens,cached_tokens,completion_tokens,"
        "slot_seconds"
    )
    assert lines[1] == "alice,10,0,9000000,6000000,3000000,75000"
    assert len(lines) == 1 + 13 + 1
    assert any(line.startswith("'=HYPERLINK(1),") for line in lines)


@pytest.mark.parametrize(
    ("size", "dark"), [(DESK, False), (PHONE, True)], ids=["desk", "phone in the dark"]
)
async def test_a_subject_sees_its_own_usage_and_limits(
    browser: Browser, size: ViewportSize, dark: bool
) -> None:
    async with running_hub() as hub:
        await use(hub)
        token = hub.token("bob", tokens_per_day=3_000_000, tokens_per_month=1_000_000)
        async with dashboard(
            browser, hub, token, view="#/usage", size=size, dark=dark
        ) as page:
            await expect(page.page.locator("tbody tr")).to_have_count(2)
            await expect(page.page.get_by_label("Of", exact=True)).to_have_count(0)
            limits = page.page.get_by_role("region", name="Limits")
            await expect(limits).to_contain_text(
                "tokens a day, all of them again in 12 h"
            )
            await expect(limits).to_contain_text("0 of 1,000,000 tokens a month")
            await expect(page.page.get_by_text("alice")).to_have_count(0)
            await page.page.get_by_label("By", exact=True).select_option("day")
            await expect(page.page.locator("tbody tr")).to_have_count(5)
            assert await page.overflow() == 0
            assert await page.violations() == []
            await shoot(page, f"usage-own-{size['width']}")


async def test_a_hub_without_usage_states_when_there_will_be_some(
    browser: Browser,
) -> None:
    async with running_hub() as hub:
        hub.hub.ledger.clock = Clock(TODAY * DAY + 1.0)
        token = hub.token("root", scope="monitor")
        async with dashboard(browser, hub, token, view="#/usage?since=0d") as page:
            await expect(page.page.get_by_text("Nothing was used")).to_be_visible()
            await expect(page.page.get_by_text("no request on Nov 29")).to_be_visible()
            button = page.page.get_by_role("button", name="Download as CSV")
            await expect(button).to_be_disabled()
            assert await page.violations() == []
