"""A person signs in, and sees what the token allows."""

from __future__ import annotations

import time

from playwright.async_api import Browser, expect

from tests.browser.dashboard import BROWSER, Dashboard, dashboard
from tests.control.test_admin import call
from tests.fakes.hub import running_hub
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER

OTHER_SECRET = "another secret" * 4


async def views(page: Dashboard) -> list[str]:
    """List the views that the page offers."""
    await expect(page.page.get_by_role("navigation", name="Views")).to_be_visible()
    return await page.page.locator("nav a").all_inner_texts()


async def refused(page: Dashboard, token: str) -> str:
    """Sign in with a token that is not accepted; return the explanation."""
    await page.sign_in(token)
    alert = page.page.get_by_role("alert")
    await expect(alert).not_to_be_empty()
    return await alert.inner_text()


async def test_a_wrong_token_is_explained(browser: Browser) -> None:
    async with running_hub() as hub, dashboard(browser, hub) as page:
        page.expect_problem("401: /dashboard/session")
        assert await page.violations() == []
        await page.page.emulate_media(color_scheme="dark")
        assert await page.violations() == []
        assert "three parts" in await refused(page, "hello")
        hour_ago = int(time.time()) - 3600
        assert "expired 1 h ago" in await refused(page, hub.token(exp=hour_ago))
        await page.sign_in(hub.token(secret=OTHER_SECRET))
        await expect(page.page.get_by_role("alert")).to_contain_text("another hub")
        # The token that is accepted is in the memory of the page alone.
        await page.sign_in(hub.token("ann", scope="admin"))
        await expect(page.account).to_contain_text("ann")
        assert await page.kept() == ""
        await page.page.reload()
        await expect(page.page.get_by_label("Token", exact=True)).to_be_visible()


async def test_a_tab_stays_signed_in_if_its_user_wants_that(browser: Browser) -> None:
    async with running_hub() as hub, dashboard(browser, hub) as page:
        # By keyboard alone.
        await expect(page.page.get_by_label("Token", exact=True)).to_be_focused()
        token = hub.token("ann", scope="monitor")
        await page.page.keyboard.insert_text(token)
        await page.page.keyboard.press("Tab")
        await page.page.keyboard.press("Space")
        await page.page.keyboard.press("Enter")
        await expect(page.account).to_contain_text("read only")
        await page.page.reload()
        await expect(page.account).to_contain_text("read only")
        assert token not in page.page.url
        await page.page.get_by_role("button", name="Sign out").click()
        await expect(page.page.get_by_label("Token", exact=True)).to_be_visible()
        assert await page.kept() == ""


async def test_a_link_signs_in_once(browser: Browser) -> None:
    async with running_hub() as hub:
        link = (await call(hub, "POST", "/admin/links")).json()["path"]
        async with dashboard(browser, hub, view=link.lstrip("/")) as page:
            await expect(page.account).to_contain_text("root")
            assert "sign-in" not in page.page.url
            await page.page.go_back()
            assert "sign-in" not in page.page.url
        async with dashboard(browser, hub, view=link.lstrip("/")) as page:
            page.expect_problem("401: /dashboard/sign-in")
            alert = page.page.get_by_role("alert")
            await expect(alert).to_contain_text("This link was used before")


async def test_a_link_of_no_use_changes_nothing_in_a_tab_that_is_signed_in(
    browser: Browser,
) -> None:
    async with running_hub() as hub:
        async with dashboard(browser, hub, hub.token("ann", scope="monitor")) as page:
            page.expect_problem("401: /dashboard/sign-in")
            page.expect_problem("413: /dashboard/sign-in")
            await expect(page.account).to_contain_text("ann")
            for code in ("", "%E0%A4%A", "<b>x", "a&b", "x" * 2000):
                await page.page.evaluate(f"location.hash = '#sign-in={code}'")
                await expect(page.toasts).to_contain_text("This link was used before")
                assert "sign-in" not in page.page.url
                await page.toasts.get_by_role("button").click()
                await expect(page.toasts).to_be_empty()
            await expect(page.account).to_contain_text("ann")


async def test_a_link_for_another_subject_replaces_all_that_was_shown(
    browser: Browser,
) -> None:
    """It may be a link of a stranger, so the page names the new subject."""
    async with running_hub() as hub:
        async with dashboard(browser, hub, hub.token("ann", scope="monitor")) as page:
            await expect(page.account).to_contain_text("ann")
            await page.open("#/playground")
            await page.page.get_by_label("Your message").fill("a secret of ann")
            link = (await call(hub, "POST", "/admin/links")).json()["path"]
            await page.page.evaluate(f"location.hash = '{link.lstrip('/')}'")
            await expect(page.toasts).to_contain_text("You are signed in as root.")
            await expect(page.account).to_contain_text("root")
            await page.open("#/playground")
            await expect(page.page.get_by_label("Your message")).to_be_empty()


async def test_a_token_without_a_scope_sees_the_playground_and_its_own_usage(
    browser: Browser,
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with dashboard(browser, hub, hub.token("bob")) as page:
            assert await views(page) == ["Playground", "Usage"]
            await expect(page.page.get_by_label("Your message")).to_be_visible()
            await page.open("#/requests")
            await expect(
                page.page.get_by_text("needs the scope monitor")
            ).to_be_visible()
            assert await page.violations() == []
        for path in ("/admin/workers", "/admin/events", "/admin/usage"):
            assert (await hub.get(path, hub.token("bob"))).status == 403


async def test_a_monitor_sees_everything_and_changes_nothing(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        [known] = hub.hub.registry.workers
        token = hub.token("eve", scope="monitor")
        async with dashboard(browser, hub, token) as page:
            assert "Requests" in await views(page)
            await expect(page.worker(known.name)).to_contain_text("Ready")
            for name in ("Add worker", "Reload settings", f"Actions for {known.name}"):
                button = page.page.get_by_role("button", name=name)
                await expect(button).not_to_be_visible()
        answer = await hub.post(f"/admin/workers/{known.name}/drain", {}, token)
        assert answer.status == 403
        assert known.held == "none"


async def test_a_hub_without_authentication_asks_for_no_token(browser: Browser) -> None:
    async with running_hub(auth__mode="off") as hub, dashboard(browser, hub) as page:
        assert "Overview" in await views(page)
        await expect(page.account).to_contain_text("no sign-in needed")
