"""What an operator does on the page: each action asks once, and is in the audit log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from tests.browser.dashboard import BROWSER, Dashboard, dashboard
from tests.browser.fleet import settings_file
from tests.control.test_admin import ADMIN, begun, endless
from tests.fakes.asks import CHAT, RARELY, STREAM
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.registry import trip
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER

OPEN = {"breaker__open": RARELY, "breaker__open_max": RARELY}


def operator(hub: RunningHub) -> str:
    return hub.token("operator", **ADMIN)


def audited(caplog: pytest.LogCaptureFixture) -> list[str]:
    """List the actions in the audit log; they are all the operator's."""
    records = [each for each in caplog.records if each.name == "gollama_proxy.audit"]
    fields = [record.__dict__["fields"] for record in records]
    assert all(each["subject"] == "operator" for each in fields)
    return [each["action"] for each in fields]


async def answer(page: Dashboard, button: str) -> None:
    """Press a button of the dialog that is open, which closes it."""
    dialog = page.page.get_by_role("dialog")
    await dialog.get_by_role("button", name=button, exact=True).click()
    await expect(dialog).to_have_count(0)


async def act(page: Dashboard, worker: str, action: str) -> None:
    """Choose an action from the menu of a worker, and confirm it."""
    await page.page.get_by_role("button", name=f"Actions for {worker}").click()
    await page.page.get_by_role("menuitem", name=action, exact=True).click()
    await answer(page, action)


async def test_a_worker_is_held_and_released(
    browser: Browser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.audit")
    async with ScriptedWorker() as worker:
        file = settings_file(tmp_path, {"desk": worker})
        async with running_hub(file=file, **OPEN) as hub:
            [known] = hub.hub.registry.workers
            async with dashboard(browser, hub, operator(hub)) as page:
                card = page.worker("desk")
                await act(page, "desk", "Pause")
                await expect(card).to_contain_text("Paused by an operator")
                assert known.held == "paused"
                await expect(page.toasts).to_contain_text("desk is paused")
                await act(page, "desk", "Unpause")
                await expect(card).not_to_contain_text("Paused by an operator")
                await act(page, "desk", "Drain")
                await expect(card).to_contain_text("Draining")
                await act(page, "desk", "Undrain")
                await expect(card).not_to_contain_text("Draining")
                trip(known)
                await expect(card).to_contain_text("Breaker open")
                await act(page, "desk", "Reset breaker")
                await expect(card).not_to_contain_text("Breaker open")
                assert known.breaker.closed
    assert audited(caplog) == [*["hold worker"] * 4, "reset breaker"]


async def test_an_action_that_is_not_confirmed_changes_nothing(
    browser: Browser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedWorker() as worker:
        file = settings_file(tmp_path, {"desk": worker})
        async with running_hub(file=file) as hub:
            async with dashboard(browser, hub, operator(hub)) as page:
                menu = page.page.get_by_role("button", name="Actions for desk")
                # By keyboard alone: the menu opens, and Escape closes the dialog.
                await menu.focus()
                await page.page.keyboard.press("Enter")
                await expect(page.page.get_by_role("menuitem").first).to_be_focused()
                await page.page.keyboard.press("Enter")
                await expect(page.page.get_by_role("dialog")).to_be_visible()
                assert await page.violations() == []
                await page.page.keyboard.press("Escape")
                await expect(page.page.get_by_role("dialog")).to_have_count(0)
                await menu.click()
                await page.page.get_by_role("menuitem", name="Remove…").click()
                await answer(page, "Cancel")
            assert [each.name for each in hub.hub.registry.workers] == ["desk"]
    assert audited(caplog) == []


async def test_a_worker_is_added_and_removed(
    browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.audit")
    async with ScriptedWorker() as worker, running_hub() as hub:
        async with dashboard(browser, hub, operator(hub)) as page:
            page.expect_problem("422: /admin/workers|400: /admin/workers")
            await page.page.get_by_role("button", name="Add worker").click()
            dialog = page.page.get_by_role("dialog")
            await dialog.get_by_label("Address", exact=True).fill("ftp://nowhere")
            await dialog.get_by_label("Name", exact=True).fill("attic")
            await dialog.get_by_role("button", name="Add worker").click()
            await expect(dialog.get_by_role("alert")).to_contain_text("ftp://nowhere")
            assert hub.hub.registry.workers == []
            await dialog.get_by_label("Address", exact=True).fill(worker.url)
            await dialog.get_by_role("button", name="Add worker").click()
            await expect(dialog).to_have_count(0)
            await expect(page.worker("attic")).to_contain_text("Ready")
            await act(page, "attic", "Remove…")
            await expect(page.worker("attic")).to_have_count(0)
            assert hub.hub.registry.workers == []
    assert audited(caplog) == ["add worker", "remove worker"]


async def test_a_request_is_cancelled(
    browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.audit")
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        endless(worker)
        async with dashboard(browser, hub, operator(hub)) as page:
            fields = [("X-Request-Id", "mine")]
            token = hub.token("bob")
            async with await hub.open(CHAT, STREAM, token, headers=fields) as wire:
                await begun(wire)
                name = "Cancel the request mine of bob"
                await page.page.get_by_role("button", name=name).click()
                await answer(page, "Cancel request")
                ending = await wire.read_to_end()
                assert b"request_cancelled" in ending.raw
            flight = page.page.get_by_role("region", name="Requests in flight")
            await expect(flight).to_contain_text("No request is being answered.")
    assert audited(caplog) == ["cancel request"]


async def test_settings_are_read_again(
    browser: Browser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.audit")
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        file = settings_file(tmp_path, {"desk": one})
        async with running_hub(file=file) as hub:
            async with dashboard(browser, hub, operator(hub)) as page:
                await expect(page.worker("desk")).to_contain_text("Ready")
                settings_file(tmp_path, {"desk": one, "attic": two})
                await page.page.get_by_role("button", name="Reload settings").click()
                await answer(page, "Reload settings")
                await expect(page.worker("attic")).to_contain_text("Ready")
                file.write_text("nonsense")
                page.expect_problem(": /admin/reload")
                await page.page.get_by_role("button", name="Reload settings").click()
                await answer(page, "Reload settings")
                await expect(page.toasts).to_contain_text("gollama.toml")
                await until(lambda: len(hub.hub.registry.workers) == 2)
    assert "reload" in audited(caplog)[0]
