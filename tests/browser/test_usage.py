"""What was used is shown to operators for all subjects, and to each subject its own."""

from __future__ import annotations

from pathlib import Path

from playwright.async_api import Browser, expect

from tests.browser.dashboard import BROWSER, PHONE, dashboard
from tests.browser.fleet import settings_file
from tests.control.test_admin import ADMIN
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import running_hub
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER


async def test_usage_is_a_chart_and_a_table(browser: Browser, tmp_path: Path) -> None:
    async with ScriptedWorker() as worker:
        file = settings_file(tmp_path, {"desk": worker})
        async with running_hub(file=file) as hub:
            for subject in ("ann", "bob", "bob"):
                await hub.post(CHAT, STREAM, hub.token(subject))
            admin = hub.token("operator", **ADMIN)
            async with dashboard(browser, hub, admin, view="#/usage") as page:
                table = page.page.get_by_role("region", name="Table")
                rows = table.locator("tbody tr")
                await expect(rows.filter(has_text="ann")).to_have_count(1)
                await expect(rows.filter(has_text="bob")).to_contain_text("2")
                await expect(page.page.get_by_role("img").first).to_be_visible()
                for scheme in ("light", "dark"):
                    await page.page.emulate_media(color_scheme=scheme)
                    assert await page.violations() == []
                await page.page.get_by_label("By", exact=True).select_option("model")
                await expect(rows.filter(has_text="tiny")).to_have_count(1)
                await page.page.set_viewport_size(PHONE)
                assert await page.overflow() == 0
            async with dashboard(browser, hub, hub.token("ann")) as page:
                await page.open("#/usage")
                table = page.page.get_by_role("region", name="Table")
                await expect(table).to_contain_text("tiny")
                await expect(page.page.locator("main")).not_to_contain_text("bob")
                assert await page.violations() == []
