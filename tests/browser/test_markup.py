"""Markup in what the hub shows is shown as text, wherever it comes from."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from tests.browser.dashboard import Dashboard, dashboard
from tests.browser.fleet import settings_file
from tests.control.test_admin import ADMIN, begun, endless
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import running_hub
from tests.fakes.replies import error_reply
from tests.fakes.script import chat_stream, send
from tests.fakes.worker import ScriptedWorker

FILES = resources.files("gollama_proxy.control").joinpath("dashboard")
SOURCES = [
    each.name for each in FILES.iterdir() if each.name.endswith((".js", ".html"))
]


def payload(place: str) -> str:
    """Return markup that would run, or show an image, if it became part of the page."""
    return f"<img src=x onerror=stolen='{place}'>{place}</title></script>\"'`${{1}}"


async def assert_harmless(page: Dashboard) -> None:
    """Check that no payload has become an element, an attribute or a script."""
    found = await page.page.evaluate(
        "[typeof stolen, document.querySelectorAll('[onerror], img[src=x]').length]"
    )
    assert found == ["undefined", 0]


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_makes_markup_of_text(name: str) -> None:
    source = FILES.joinpath(name).read_text()
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser"
    forbidden += r"|createContextualFragment|setHTML|\beval\b|new Function|srcdoc"
    forbidden += r"|trustedTypes|javascript:|importScripts|\.cssText"
    assert not re.search(forbidden, source)
    assert not re.search(r"""setTimeout\(\s*['"`]|setInterval\(\s*['"`]""", source)
    # Nothing inline, which the content security policy would block.
    assert not re.search(r"<[a-z][^>]*\s(style|on[a-z]+)=", source)
    assert not re.search(r"""\bstyle:\s|setAttribute\(\s*['"](style|on)""", source)
    # Nothing from elsewhere: the only address is a name of SVG.
    addresses = set(re.findall(r"https?://[a-z0-9.-]+\.[a-z]+[^\s\"'`<>)]*", source))
    assert addresses <= {"http://www.w3.org/2000/svg"}


@pytest.mark.asyncio(loop_scope="session")
async def test_markup_from_everywhere_is_shown_as_text(
    browser: Browser, tmp_path: Path
) -> None:
    name, model, subject = payload("worker"), payload("model"), payload("subject")
    async with ScriptedWorker(model, slots=1, build=payload("build")) as worker:
        file = settings_file(tmp_path, {name: worker})
        async with running_hub(file=file, retry__attempts=1) as hub:
            body = {**STREAM, "model": model}
            worker.script(send(error_reply(500, payload("error"))))
            await hub.post(CHAT, body, hub.token(subject))
            endless(worker)
            token = hub.token(payload("operator"), **ADMIN)
            async with dashboard(browser, hub, token) as page:
                main = page.page.locator("main")
                await expect(page.account).to_contain_text(payload("operator"))
                await expect(main).to_contain_text(name)
                await expect(main).to_contain_text(model)
                await expect(main).to_contain_text(payload("build"))
                async with await hub.open(CHAT, body, hub.token(subject)) as wire:
                    await begun(wire)
                    flight = page.page.get_by_role("region", name="Requests in flight")
                    await expect(flight).to_contain_text(subject)
                    async with await hub.open(CHAT, body, hub.token(subject)):
                        queue = page.page.get_by_role("region", name="Queue")
                        await expect(queue).to_contain_text(subject)
                        await expect(queue).to_contain_text(model)
                await assert_harmless(page)
                button = page.page.get_by_role("button", name=f"Actions for {name}")
                await button.click()
                await page.page.get_by_role("menuitem", name="Pause").click()
                dialog = page.page.get_by_role("dialog")
                await expect(dialog).to_contain_text(name)
                await page.page.keyboard.press("Escape")
                await assert_harmless(page)

                await page.open("#/requests")
                await expect(main).to_contain_text(subject)
                await expect(main).to_contain_text(model)
                await page.page.locator("tbody a").first.click()
                await expect(page.page.get_by_role("heading", level=1)).to_be_visible()
                await expect(main).to_contain_text(subject)
                await expect(main).to_contain_text(name)
                await assert_harmless(page)

                await page.open("#/usage")
                table = page.page.get_by_role("region", name="Table")
                await expect(table).to_contain_text(subject)
                await page.page.get_by_label("By", exact=True).select_option("model")
                await expect(table).to_contain_text(model)
                await assert_harmless(page)

                link = "[link](javascript:stolen='link')"
                picture = "![picture](https://example.com/x.png)"
                text = f"{payload('answer')}\n\n{link} {picture}\n\n```\n</code>{name}"
                worker.default(*chat_stream([text], model=model))
                await page.open("#/playground")
                await page.page.get_by_label("Your message").fill(payload("question"))
                await page.page.keyboard.press("Enter")
                answer = page.page.get_by_role("article")
                await expect(answer).to_contain_text(payload("answer"))
                await expect(answer).to_contain_text(f"</code>{name}")
                await expect(main).to_contain_text(payload("question"))
                assert (
                    await page.page.locator("main a[href^='javascript']").count() == 0
                )
                assert await page.page.locator("main img").count() == 0
                await assert_harmless(page)
