"""The overview shows what the hub does and what is wrong, for no or 1,000 workers."""

from __future__ import annotations

from pathlib import Path

from playwright.async_api import Browser, expect

from tests.browser.dashboard import BROWSER, PHONE, TABLET, Dashboard, dashboard
from tests.browser.fleet import many_workers, settings_file
from tests.control.test_admin import ADMIN, begun, endless
from tests.fakes.asks import CHAT, RARELY, STREAM
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.registry import trip
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER

# A breaker that a test opens stays open.
OPEN = {"breaker__open": RARELY, "breaker__open_max": RARELY}


def operator(hub: RunningHub) -> str:
    return hub.token("operator", **ADMIN)


async def live(page: Dashboard) -> None:
    """Wait until the figures are those of the present."""
    await expect(page.page.get_by_text("Live", exact=True)).to_be_visible()


async def test_an_empty_hub_explains_how_to_add_a_worker(browser: Browser) -> None:
    async with running_hub() as hub, dashboard(browser, hub, operator(hub)) as page:
        heading = page.page.get_by_role("heading", level=1)
        await expect(heading).to_contain_text("This hub has no workers yet")
        body = page.page.locator("main")
        await expect(body).to_contain_text("llama-server -m model.gguf")
        await expect(body).to_contain_text("gollama-proxy workers add")
        assert await page.violations() == []


async def test_three_workers_with_one_breaker_open(
    browser: Browser, tmp_path: Path
) -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        ScriptedWorker() as bad,
    ):
        fleet = {"desk": one, "attic": bad, "server-1": two}
        file = settings_file(tmp_path, fleet)
        async with running_hub(file=file, **OPEN) as hub:
            trip(hub.hub.registry.workers[1])
            async with dashboard(browser, hub, operator(hub)) as page:
                heading = page.page.get_by_role("heading", level=1)
                await expect(heading).to_contain_text("1 of 3 workers")
                await expect(heading).to_contain_text("attic")
                await expect(page.worker("attic")).to_contain_text("Breaker open")
                await expect(page.worker("attic")).to_contain_text("Tried again in")
                for name in ("desk", "server-1"):
                    await expect(page.worker(name)).to_contain_text("Ready")
                    await expect(page.worker(name)).to_contain_text("0 of 4 slots")
                    await expect(page.worker(name)).to_contain_text("tiny")
                assert await page.violations() == []
                await page.page.emulate_media(color_scheme="dark")
                assert await page.violations() == []


async def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Browser, tmp_path: Path
) -> None:
    async with ScriptedWorker(
        "qwen2.5-coder-32b-instruct-q4_k_m-00001-of-00002"
    ) as one:
        file = settings_file(
            tmp_path, {"a-worker-with-a-rather-long-name-of-a-host": one}
        )
        async with running_hub(file=file, **OPEN) as hub:
            trip(*hub.hub.registry.workers)
            async with dashboard(browser, hub, operator(hub), size=PHONE) as page:
                await expect(page.page.locator("[data-worker]")).to_be_visible()
                assert await page.overflow() == 0
                await page.page.get_by_role("button", name="Add worker").click()
                await expect(page.page.get_by_role("dialog")).to_be_visible()
                assert await page.overflow() == 0


async def test_running_and_waiting_requests_are_shown(browser: Browser) -> None:
    async with ScriptedWorker(slots=1) as worker, running_hub(worker) as hub:
        endless(worker)
        async with dashboard(browser, hub, operator(hub)) as page:
            await live(page)
            flight = page.page.get_by_role("region", name="Requests in flight")
            queue = page.page.get_by_role("region", name="Queue")
            async with await hub.open(CHAT, STREAM, hub.token("bob")) as wire:
                await begun(wire)
                await expect(flight).to_contain_text("bob")
                async with await hub.open(CHAT, STREAM, hub.token("ann")):
                    await until(lambda: hub.hub.queue.admission.waiting == 1)
                    await expect(queue).to_contain_text("ann")
                    assert await page.violations() == []
            await expect(flight).to_contain_text("No request is being answered.")
            await expect(queue).to_contain_text("Nothing waits for a slot.")


async def test_a_worker_that_dies_is_shown_within_a_second(browser: Browser) -> None:
    often = {"health__interval": 0.02}
    async with ScriptedWorker() as worker, running_hub(worker, **often) as hub:
        [known] = hub.hub.registry.workers
        async with dashboard(browser, hub, operator(hub), clock=True) as page:
            await live(page)
            await expect(page.worker(known.name)).to_contain_text("✓ Ready")
            await page.stop_clock()
            change = await page.next_event("worker")
            await worker.down()
            assert (await change())["state"] == "down"
            await page.page.clock.run_for(1000)
            assert "✕ Down" in await page.worker(known.name).inner_text()


async def test_forty_workers_have_a_card_each(browser: Browser) -> None:
    async with many_workers(40) as urls, running_hub(*urls) as hub:
        async with dashboard(browser, hub, operator(hub)) as page:
            heading = page.page.get_by_role("heading", level=1)
            await expect(heading).to_have_text("✓All 40 workers are ready")
            await expect(page.page.locator("article[data-worker]")).to_have_count(40)
            assert await page.violations() == []
            for size in (PHONE, TABLET):
                await page.page.set_viewport_size(size)
                assert await page.overflow() == 0


async def test_a_thousand_workers_stay_usable(browser: Browser) -> None:
    async with (
        many_workers(1000) as urls,
        running_hub(*urls, ready=False, **OPEN) as hub,
    ):
        async with dashboard(browser, hub, operator(hub)) as page:
            tiles = page.page.locator("[data-worker]")
            await expect(tiles).to_have_count(1000)
            await hub.hub.ready()
            heading = page.page.get_by_role("heading", level=1)
            await expect(heading).to_have_text("✓All 1,000 workers are ready")
            # One of them fails: it comes first, and hardly anything else is touched.
            victim = hub.hub.registry.workers[700]
            changes = await page.count_changes()
            trip(victim)
            await expect(heading).to_contain_text(victim.name)
            await expect(tiles.first).to_contain_text("Fails")
            assert await changes() < 1000
            await expect(
                page.page.get_by_role("button", name="Idle 999")
            ).to_be_visible()
            find = page.page.get_by_label("Find a worker or model")
            await find.fill(victim.name)
            await expect(tiles).to_have_count(1)
            await tiles.click()
            dialog = page.page.get_by_role("dialog", name=victim.name)
            await expect(dialog).to_contain_text("Breaker open")
            await page.page.keyboard.press("Escape")
            await page.page.get_by_role("button", name="In trouble").click()
            await find.fill(hub.hub.registry.workers[7].name)
            await expect(tiles).to_have_count(0)
            await find.fill("")
            await expect(tiles).to_have_count(1)
            await page.page.set_viewport_size(PHONE)
            assert await page.overflow() == 0
            assert await page.violations() == []


async def test_the_first_view_is_small(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        [known] = hub.hub.registry.workers
        async with dashboard(browser, hub, operator(hub)) as page:
            await live(page)
            await expect(page.worker(known.name)).to_contain_text("Ready")
            assert 10_000 < await page.transferred() < 100_000
