"""The dashboard in a real browser, and how a test watches it.

    async with dashboard(browser, hub, hub.token(scope="admin")) as page:
        await expect(page.worker("desk")).to_contain_text("ready")

A page that logs an error, violates its own content security policy, loads anything from
another origin, or gets an answer that it did not expect, fails the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Response,
    ViewportSize,
    async_playwright,
    expect,
)

from tests.fakes.hub import HasUrl
from tests.fakes.tools import require, require_node_module
from tests.fakes.waiting import DEADLINE

# For each module of tests: one event loop and one browser in each process.
BROWSER = pytest.mark.asyncio(loop_scope="session")
# The first one has no window to draw, so that the tests take half as long.
PROGRAMS = ("chromium-headless-shell", "chromium")
# As everywhere: no outcome depends on the speed of the machine.
expect.set_options(timeout=DEADLINE * 1000)

# Windows, in pixels.
PHONE = ViewportSize(width=360, height=740)
TABLET = ViewportSize(width=800, height=1200)
DESK = ViewportSize(width=1280, height=800)


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start the system's Chromium; without it, skip the test or fail, as in CI."""
    path = require(*PROGRAMS, package=PROGRAMS[0])
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path)
        yield browser
        await browser.close()


class Dashboard:
    """A page of the hub, in a browser context without cookies or stored data."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self._expected: list[re.Pattern[str]] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("requestfailed", self._failed)
        page.on("response", self._answered)

    def __repr__(self) -> str:
        return f"<Dashboard {self.url}, {len(self.problems)} problems>"

    async def open(self, fragment: str = "") -> None:
        """Load the page, or another view of it."""
        await self.page.goto(f"{self.url}/{fragment}")

    @contextlib.asynccontextmanager
    async def second(self) -> AsyncIterator[Dashboard]:
        """Open another tab beside it, in the same browser."""
        page = Dashboard(await self.page.context.new_page(), self.url)
        yield page
        await page.check()
        await page.page.close()

    async def sign_in(self, token: str) -> None:
        """Fill in the form, as a person would."""
        await self.page.get_by_label("Token", exact=True).fill(token)
        await self.page.get_by_role("button", name="Sign in", exact=True).click()

    @property
    def account(self) -> Locator:
        """Shows the subject of the token, and what it allows."""
        return self.page.locator("#account")

    @property
    def toasts(self) -> Locator:
        """Shows the results of actions for a while."""
        return self.page.locator("#toasts")

    def worker(self, name: str) -> Locator:
        """The card or the row of a worker."""
        return self.page.locator(f'[data-worker="{name}"]')

    async def violations(self) -> list[str]:
        """Check the page with axe-core for WCAG 2, level A and AA."""
        if not await self.page.evaluate("'axe' in window"):
            source = require_node_module("axe-core") / "axe.min.js"
            await self.page.evaluate(source.read_text())
        found: list[dict[str, Any]] = await self.page.evaluate(_AXE)
        return [
            f"{violation['id']}: {node['html']}: {node['failureSummary']}"
            for violation in found
            for node in violation["nodes"]
        ]

    async def kept(self) -> str:
        """Return all that the browser stores for the page."""
        text: str = await self.page.evaluate(
            "[...Object.values(sessionStorage), ...Object.values(localStorage),"
            " document.cookie].join(' ').trim()"
        )
        return text

    async def transferred(self) -> int:
        """Count the bytes that the page has loaded so far, as they were sent."""
        size: int = await self.page.evaluate(
            "performance.getEntries()"
            ".reduce((sum, {transferSize = 0}) => sum + transferSize, 0)"
        )
        return size

    async def overflow(self) -> int:
        """Count the pixels by which the page is wider than its window."""
        pixels: int = await self.page.evaluate(
            "() => { const root = document.documentElement;"
            " return root.scrollWidth - root.clientWidth }"
        )
        return pixels

    async def stop_clock(self) -> None:
        """Stop the time of the page; `page.clock.run_for()` lets some of it pass."""
        now: float = await self.page.evaluate("Date.now()")
        # It has to be a moment in the future, and less than the silence after which the
        # page connects again.
        await self.page.clock.pause_at(now / 1000 + 8)

    async def next_event(self, name: str) -> Callable[[], Awaitable[Any]]:
        """Return a function that waits for the first such event from now on."""
        event = await self.page.evaluate_handle(_NEXT, name)

        async def wait() -> Any:
            async with asyncio.timeout(DEADLINE):
                return await event.evaluate("({promise}) => promise")

        return wait

    async def count_changes(self) -> Callable[[], Awaitable[int]]:
        """Return a function that counts the nodes that were changed from now on."""
        count = await self.page.evaluate_handle(_COUNT)
        return lambda: count.evaluate("count => count()")

    def expect_problem(self, pattern: str) -> None:
        """Let what matches be no failure of the test: it is what the test provokes."""
        self._expected.append(re.compile(pattern))

    async def check(self) -> None:
        """Fail for what went wrong in the page so far."""
        if not self.page.is_closed():
            await self.page.evaluate("0")  # what it has reported before is here then
        unexpected = [
            problem
            for problem in self.problems
            if not any(pattern.search(problem) for pattern in self._expected)
        ]
        assert not unexpected, f"in the page: {unexpected}"

    def _heard(self, message: ConsoleMessage) -> None:
        # The answer itself is a problem with more in it than this line.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(f"console: {message.text}")

    def _failed(self, request: Request) -> None:
        # The page ends its own requests when a view is left.
        if request.failure != "net::ERR_ABORTED":
            self.problems.append(f"{request.failure}: {_where(request.url)}")

    def _answered(self, response: Response) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {_where(response.url)}")
        if not response.url.startswith((self.url, "data:", "blob:")):
            self.problems.append(f"another origin: {response.url}")


@contextlib.asynccontextmanager
async def dashboard(
    browser: Browser,
    hub: HasUrl,
    token: str | None = None,
    *,
    view: str = "",
    dark: bool = False,
    size: ViewportSize = DESK,
    clock: bool = False,
    permissions: Sequence[str] = (),
) -> AsyncIterator[Dashboard]:
    """Open the dashboard of a hub, signed in with the token if there is one.

    `view` is a fragment, as `#/usage`.  With `clock`, the page has one that can stop.
    Leaving the block closes the page, and fails for what went wrong in it.
    """
    context = await browser.new_context(
        viewport=size,
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        permissions=list(permissions),
    )
    context.set_default_timeout(DEADLINE * 1000)
    try:
        if clock:
            await context.clock.install()
        page = Dashboard(await context.new_page(), hub.url)
        await page.open(view)
        if token is not None:
            await page.sign_in(token)
        try:
            yield page
        except BaseException as error:
            error.add_note(f"in the page: {page.problems}")
            raise
        await page.check()
    finally:
        await context.close()


def _where(url: str) -> str:
    return urlsplit(url).path


# The page's own modules are what it imported itself.
_NEXT = """
async (name) => {
  const {app} = await import(new URL("dashboard/app.js", document.baseURI));
  const promise = new Promise((resolve) => {
    app.live.addEventListener(name, ({detail}) => resolve(detail), {once: true});
  });
  return {promise};
}
"""
_COUNT = """
() => {
  let count = 0;
  const add = (records) => {
    for (const {addedNodes, removedNodes} of records) {
      count += Math.max(addedNodes.length + removedNodes.length, 1);
    }
  };
  const observer = new MutationObserver(add);
  observer.observe(document, {
    subtree: true, childList: true, attributes: true, characterData: true,
  });
  return () => {
    add(observer.takeRecords());
    return count;
  };
}
"""
_AXE = """
async () => {
  const options = {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]};
  return (await axe.run(document, options)).violations;
}
"""
