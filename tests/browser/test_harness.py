"""The harness notices what goes wrong in a page."""

from __future__ import annotations

import pytest
from playwright.async_api import Browser

from tests.browser.dashboard import BROWSER, dashboard
from tests.fakes.hub import running_hub

pytestmark = BROWSER


async def test_a_failing_page_fails_the_test(browser: Browser) -> None:
    async with running_hub() as hub:
        with pytest.raises(AssertionError, match=r"in the page: .*error: oops"):
            async with dashboard(browser, hub) as page:
                async with page.page.expect_event("pageerror"):
                    await page.page.evaluate(
                        "setTimeout(() => { throw Error('oops') })"
                    )


async def test_an_unexpected_answer_fails_the_test(browser: Browser) -> None:
    async with running_hub() as hub:
        with pytest.raises(AssertionError, match="404: /dashboard/none"):
            async with dashboard(browser, hub) as page:
                await page.page.evaluate("fetch('/dashboard/none')")


async def test_axe_reports_violations(browser: Browser) -> None:
    async with running_hub() as hub, dashboard(browser, hub) as page:
        assert await page.violations() == []
        await page.page.evaluate("document.body.append(document.createElement('img'))")
        assert any(each.startswith("image-alt") for each in await page.violations())


async def test_markup_that_is_made_of_text_fails_the_test(browser: Browser) -> None:
    async with running_hub() as hub:
        with pytest.raises(AssertionError, match="TrustedHTML"):
            async with dashboard(browser, hub) as page:
                await page.page.evaluate(
                    "try { document.body.innerHTML = '<b>x' } catch {}"
                )
