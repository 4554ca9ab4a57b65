"""What happened to requests, and what one would get now."""

from __future__ import annotations

from pathlib import Path

from playwright.async_api import Browser, expect

from tests.browser.dashboard import BROWSER, PHONE, dashboard
from tests.browser.fleet import settings_file
from tests.control.test_admin import ADMIN
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import running_hub
from tests.fakes.replies import error_reply
from tests.fakes.script import send
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER


async def test_a_request_that_met_trouble_is_explained(
    browser: Browser, tmp_path: Path
) -> None:
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        file = settings_file(tmp_path, {"desk": one, "attic": two})
        async with running_hub(file=file) as hub:
            for worker in (one, two):
                worker.script(send(error_reply(503, "no memory")))
            for number, subject in enumerate(("ann", "bob", "bob")):
                fields = [("X-Request-Id", f"number-{number}")]
                await hub.post(CHAT, STREAM, hub.token(subject), headers=fields)
            admin = hub.token("operator", **ADMIN)
            async with dashboard(browser, hub, admin, view="#/requests") as page:
                rows = page.page.locator("tbody tr")
                await expect(rows).to_have_count(3)
                for dark in ("light", "dark"):
                    await page.page.emulate_media(color_scheme=dark)
                    assert await page.violations() == []
                await page.page.get_by_label("Subject").first.fill("ann")
                await page.page.get_by_role("button", name="Show").click()
                await expect(rows).to_have_count(1)
                assert "subject=ann" in page.page.url
                await page.open("#/requests/number-0")
                main = page.page.locator("main")
                await expect(main).to_contain_text("fails:")
                await expect(main).to_contain_text("ann")
                assert await page.violations() == []
                await page.page.set_viewport_size(PHONE)
                assert await page.overflow() == 0
                await page.open("#/requests/unknown")
                await expect(main).to_contain_text("does not know this request")


async def test_what_a_request_would_get_is_explained(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        [known] = hub.hub.registry.workers
        admin = hub.token("operator", **ADMIN)
        async with dashboard(browser, hub, admin, view="#/requests") as page:
            main = page.page.locator("main")
            await page.page.get_by_text("What would a request get now?").click()
            await expect(page.page.locator("#explain-model")).to_have_value("tiny")
            await page.page.get_by_label("Prompt").fill("Hello")
            await page.page.get_by_role("button", name="Explain").click()
            await expect(main).to_contain_text(f"{known.name} would get it now.")
            assert await page.violations() == []
            assert not worker.requests
            page.expect_problem("404: /admin/explain|400: /admin/explain")
            await page.page.locator("#explain-model").fill("nothing")
            await page.page.get_by_role("button", name="Explain").click()
            await expect(main).to_contain_text("nothing")
            await page.page.set_viewport_size(PHONE)
            assert await page.overflow() == 0
