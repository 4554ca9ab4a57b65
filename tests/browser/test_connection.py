"""The page when its hub restarts, or is open twice."""

from __future__ import annotations

import contextlib
from pathlib import Path

from playwright.async_api import Browser, expect

from tests.browser.dashboard import BROWSER, dashboard
from tests.browser.fleet import settings_file
from tests.control.test_admin import ADMIN
from tests.fakes.hub import running_hub
from tests.fakes.script import chat_stream
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER


async def test_the_page_connects_again_after_a_restart_of_the_hub(
    browser: Browser, tmp_path: Path
) -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        ScriptedWorker(up=False) as place,  # it holds the port while no hub has it
    ):
        file = settings_file(tmp_path, {"desk": one})
        async with contextlib.AsyncExitStack() as stack:
            async with running_hub(file=file, port=place.port) as hub:
                token = hub.token("operator", **ADMIN)
                page = await stack.enter_async_context(dashboard(browser, hub, token))
                status = page.page.locator("#connection")
                await expect(status).to_have_text("Live")
                await expect(page.worker("desk")).to_contain_text("Ready")
                page.expect_problem("net::ERR_|503: /admin|console: ApiError")
            await expect(status).to_contain_text("Reconnecting…")
            await expect(page.worker("desk")).to_be_visible()  # what is known stays
            assert await page.violations() == []
            settings_file(tmp_path, {"desk": one, "attic": two})
            hub = await stack.enter_async_context(
                running_hub(file=file, port=place.port)
            )
            await expect(status).to_have_text("Live")
            await expect(page.worker("attic")).to_contain_text("Ready")
            # The page leaves before its hub does.
            await page.page.close()


async def test_two_tabs_do_not_disturb_each_other(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(*chat_stream(["one ", "answer"]))
        token = hub.token("operator", **ADMIN)
        [known] = hub.hub.registry.workers
        async with dashboard(browser, hub, token) as page:
            async with page.second() as other:
                await other.open("#/playground")
                await other.sign_in(token)
                await other.page.get_by_label("Your message").fill("Hello")
                await other.page.keyboard.press("Enter")
                answer = other.page.get_by_role("article")
                await expect(answer).to_contain_text("one answer")
                await expect(page.worker(known.name)).to_contain_text("Ready")
                await other.page.get_by_role("button", name="Sign out").click()
                await expect(
                    other.page.get_by_label("Token", exact=True)
                ).to_be_visible()
            # The other one is signed in still, and live.
            sample = await page.next_event("sample")
            await sample()
            await expect(page.account).to_contain_text("operator")
