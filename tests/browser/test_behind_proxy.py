"""The dashboard works behind a proxy that serves the hub under a path prefix."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from playwright.async_api import Browser, expect

from tests.browser.dashboard import BROWSER, dashboard
from tests.fakes.hub import running_hub
from tests.fakes.nginx import STREAMING, running_nginx
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER

UNDER_A_PATH = STREAMING + "rewrite ^/llm/(.*)$ /$1 break;"


class Address(NamedTuple):
    url: str


async def test_every_address_of_the_page_is_relative(
    browser: Browser, tmp_path: Path
) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker) as hub,
        running_nginx(hub.port, tmp_path, UNDER_A_PATH) as port,
    ):
        [name] = [each.name for each in hub.hub.registry.workers]
        proxy = Address(f"http://127.0.0.1:{port}/llm")
        async with dashboard(browser, proxy, hub.token(scope="monitor")) as page:
            await expect(page.page.get_by_text(name).first).to_be_visible()
            await expect(page.page.get_by_text("Live", exact=True)).to_be_visible()
            await page.open("#/requests")
            text = "No request has ended yet."
            await expect(page.page.get_by_text(text)).to_be_visible()
