"""A page of one hub shows all hubs that share a store, and what its loss means."""

from __future__ import annotations

from pathlib import Path

from playwright.async_api import Browser, expect

from tests.behaviour.test_hubs_as_one import name_of, running, two_hubs
from tests.browser.dashboard import BROWSER, PHONE, dashboard
from tests.control.test_admin import ADMIN, endless
from tests.control.test_replies import join
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.valkey import running_store
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER


def operator(hub: RunningHub) -> str:
    return hub.token("operator", **ADMIN)


async def test_requests_of_both_hubs_are_shown_and_cancelled(
    browser: Browser, tmp_path: Path
) -> None:
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker(slots=4) as worker,
        two_hubs(server, worker) as (one, two),
        dashboard(browser, one, operator(one)) as page,
    ):
        endless(worker)
        hubs = page.page.get_by_role("list", name="Hubs")
        await expect(hubs).to_contain_text("Store ✓ connected")
        await expect(hubs).to_contain_text(f"{name_of(two)} 0 running")
        flight = page.page.get_by_role("region", name="Requests in flight")
        async with running(one, "first"), running(two, "second") as wire:
            await expect(hubs).to_contain_text(f"{name_of(two)} 1 running")
            for hub in (one, two):
                row = flight.get_by_role("row").filter(has_text=name_of(hub))
                await expect(row).to_contain_text("bob")
            card = page.page.locator("[data-worker]")
            await expect(card).to_contain_text("2 of 4 slots busy")
            await expect(card).to_contain_text(f"{name_of(two)}: 1")
            assert await page.violations() == []
            row = flight.get_by_role("row").filter(has_text=name_of(two))
            await row.get_by_role("button").click()
            button = page.page.get_by_role("button", name="Cancel request")
            await button.click()
            assert b"request_cancelled" in (await wire.read_to_end()).raw
        await until(lambda: one.hub.recent.count and two.hub.recent.count)
        await page.page.get_by_role("link", name="Requests", exact=True).click()
        ended = page.page.get_by_role("region", name="Requests that have ended")
        await expect(ended).to_contain_text(name_of(one))
        row = ended.get_by_role("row").filter(has_text=name_of(two))
        await row.get_by_role("link").click()
        await expect(page.page.locator("main")).to_contain_text(name_of(two))


async def test_a_hub_that_does_not_answer_is_named(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        join(hub, "gateway-b")
        async with dashboard(browser, hub, operator(hub), size=PHONE) as page:
            hubs = page.page.get_by_role("list", name="Hubs")
            await expect(hubs).to_contain_text("gateway-b ▲ does not answer")
            assert await page.overflow() == 0
            assert await page.violations() == []
            await page.open("#/requests")
            status = page.page.get_by_text("without those of gateway-b")
            await expect(status).to_be_visible()
            await page.open("#/requests/unknown")
            note = page.page.get_by_text("gateway-b did not answer, and may know it")
            await expect(note).to_be_visible()


async def test_requests_of_a_hub_that_answers_too_late_stay(browser: Browser) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker) as one,
        running_hub(worker) as two,
    ):
        join(one, b=two)
        endless(worker)
        async with (
            running(two, "hello"),
            dashboard(browser, one, operator(one)) as page,
        ):
            flight = page.page.get_by_role("region", name="Requests in flight")
            await expect(flight.get_by_role("row")).to_have_count(2)
            join(one, "b")
            # The first one has been shown when the second one is asked for.
            for _ in range(2):
                async with page.page.expect_response("**/admin/exchanges"):
                    pass
            await expect(flight.get_by_role("row")).to_have_count(2)


async def test_the_loss_of_the_store_is_explained(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        peers = join(hub, "gateway-b")
        peers.store = {"mode": "down", "reason": "connection refused"}
        async with dashboard(browser, hub, operator(hub)) as page:
            verdict = page.page.get_by_role("region", name="Verdict")
            await expect(verdict).to_contain_text(
                "The store cannot be reached: connection refused. Each hub goes on"
            )
            hubs = page.page.get_by_role("list", name="Hubs")
            await expect(hubs).to_contain_text("Store ▲ not connected")
            assert await page.violations() == []


async def test_a_hub_alone_shows_nothing_of_hubs(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with dashboard(browser, hub, operator(hub)) as page:
            await expect(page.page.locator("[data-worker]")).to_contain_text("Ready")
            await expect(page.page.locator(".hubs")).to_be_hidden()
            columns = page.page.get_by_role("columnheader", name="Hub")
            await expect(columns).to_have_count(0)
