"""The dashboard shows what happened to each request, and what one would get now."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, expect

from tests.behaviour.test_rescue import BREAKS, asked, continued, pool
from tests.browser.dashboard import BROWSER, PHONE, Dashboard, dashboard
from tests.control.test_admin import complete
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER

MARKUP = "<img src=x onerror=alert(1)>"


@asynccontextmanager
async def troubled() -> AsyncIterator[
    tuple[ScriptedWorker, ScriptedWorker, RunningHub]
]:
    """Run a hub that has had three requests: a rescued, a good and a refused one."""
    async with pool() as ([bad, good], hub):
        bad.script(*BREAKS["reset"])
        good.script(*continued())
        await asked(hub)
        bad.default(*complete())
        good.default(*complete())
        await hub.post(CHAT, STREAM, hub.token("bob"))
        await hub.post(CHAT, STREAM, hub.token(MARKUP, models=[]))
        await until(lambda: hub.hub.recent.count == 3)
        yield bad, good, hub


async def shoot(page: Dashboard, name: str) -> None:
    """Keep a picture, where someone wants to look at it."""
    if folder := os.environ.get("GOLLAMA_SHOTS"):
        await page.page.screenshot(path=f"{folder}/{name}.png", full_page=True)


async def test_requests_are_listed_and_filtered(browser: Browser) -> None:
    async with troubled() as (bad, _good, hub):
        token = hub.token("root", scope="monitor")
        async with dashboard(browser, hub, token, view="#/requests") as page:
            rows = page.page.locator("tbody tr")
            await expect(rows).to_have_count(3)
            await expect(rows.nth(0)).to_contain_text(MARKUP)
            await expect(rows.nth(0)).to_contain_text("model_not_allowed")
            await expect(rows.nth(2)).to_contain_text("rescued")
            await shoot(page, "requests")
            await page.page.get_by_label("Subject", exact=True).first.fill("bob")
            await page.page.get_by_role("button", name="Show", exact=True).click()
            await expect(rows).to_have_count(1)
            assert page.page.url.endswith("#/requests?subject=bob")
            await page.page.get_by_role("button", name="Clear").click()
            await expect(rows).to_have_count(3)
            await page.page.get_by_label("Worker").fill(bad.name)
            await page.page.keyboard.press("Enter")
            await expect(rows).to_have_count(2)
            await hub.post(CHAT, STREAM, hub.token("eve"))
            await page.page.get_by_role("button", name="Clear").click()
            await expect(rows.nth(0)).to_contain_text("eve")


async def test_a_request_is_shown_step_by_step(browser: Browser) -> None:
    async with troubled() as (bad, good, hub):
        token = hub.token("root", scope="monitor")
        async with dashboard(browser, hub, token, view="#/requests") as page:
            await page.page.locator("tbody tr").nth(2).get_by_role("link").click()
            steps = page.page.locator("ol.steps li")
            await expect(steps).to_contain_text(
                [
                    f"{bad.name} gets it.",
                    "The first token arrives.",
                    f"{bad.name} fails: the connection was lost",
                    f"{good.name} continues the answer.",
                    "It ends: the answer is complete.",
                ]
            )
            await shoot(page, "request")
            assert await page.violations() == []
            await page.page.get_by_role("link", name="All requests").click()
            await expect(page.page.locator("tbody tr")).to_have_count(3)


async def test_a_request_that_is_not_known_is_explained(browser: Browser) -> None:
    async with troubled() as (_bad, _good, hub):
        token = hub.token("root", scope="monitor")
        view = "#/requests/no%2Fsuch"
        async with dashboard(browser, hub, token, view=view) as page:
            text = "The hub does not know this request"
            await expect(page.page.get_by_text(text)).to_be_visible()


async def test_the_hub_explains_what_a_request_would_get(browser: Browser) -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker("big") as two,
        running_hub(one, two) as hub,
    ):
        token = hub.token("root", scope="monitor")
        async with dashboard(browser, hub, token, view="#/requests") as page:
            await page.page.get_by_text("What would a request get now?").click()
            model = page.page.locator("#explain-model")
            await expect(page.page.locator("datalist option")).to_have_count(2)
            await model.fill("tiny")
            await page.page.locator("#explain-prompt").fill("Why is the sky blue?")
            await page.page.get_by_role("button", name="Explain").click()
            result = page.page.locator(".explain [role=status]")
            await expect(result).to_contain_text("would get it now.")
            await expect(result).to_contain_text("The prompt has")
            assert await page.violations() == []
            await shoot(page, "explain")
            await model.fill(MARKUP)
            await page.page.get_by_role("button", name="Explain").click()
            await expect(result).to_contain_text(f"The model '{MARKUP}' does not exist")


async def test_requests_fit_a_phone_and_the_dark(browser: Browser) -> None:
    async with troubled() as (_bad, _good, hub):
        token = hub.token("root", scope="monitor")
        async with dashboard(
            browser, hub, token, view="#/requests", dark=True, size=PHONE
        ) as page:
            await expect(page.page.locator("tbody tr")).to_have_count(3)
            assert await page.overflow() == 0
            assert await page.violations() == []
            await shoot(page, "requests-phone")
            await page.page.locator("tbody tr").nth(2).get_by_role("link").click()
            await expect(page.page.locator("ol.steps li")).to_have_count(5)
            assert await page.overflow() == 0
            assert await page.violations() == []
            await shoot(page, "request-phone")
