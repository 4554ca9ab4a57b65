"""A chat on the page: its answer, where it comes from, and what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from playwright.async_api import Browser, Locator, Route, expect

from tests.browser.dashboard import BROWSER, PHONE, Dashboard, dashboard
from tests.browser.fleet import settings_file
from tests.control.test_admin import ADMIN, begun, endless
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import running_hub
from tests.fakes.replies import error_reply
from tests.fakes.script import chat_stream, send
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import LlamaServer

pytestmark = BROWSER

ANSWER = """Here is **some** code:

```python
print('<b>')
```

| a | b |
|---|---|
| 1 | 2 |
"""


async def ask(page: Dashboard, text: str) -> Locator:
    """Send a message, and return its answer."""
    words = page.page.get_by_label("Your message")
    await expect(page.page.get_by_label("Model", exact=True)).to_be_enabled()
    await words.fill(text)
    await words.press("Enter")
    answer = page.page.get_by_role("article").last
    await expect(answer).to_be_visible()
    return answer


def facts(answer: Locator) -> Locator:
    return answer.get_by_role("list", name="About this answer")


async def test_a_message_is_sent_once_the_models_are_listed(
    browser: Browser, tmp_path: Path
) -> None:
    listed = asyncio.Event()

    async def list_later(route: Route) -> None:
        await listed.wait()
        await route.continue_()

    async with ScriptedWorker("qwen") as worker:
        worker.default(*chat_stream(["Yes."]))
        file = settings_file(tmp_path, {"desk": worker})
        async with running_hub(file=file) as hub:
            user = hub.token("ann")
            async with dashboard(browser, hub, user, view="#/usage") as page:
                await page.page.route("**/v1/models", list_later)
                await page.open("#/playground")
                words = page.page.get_by_label("Your message")
                await words.fill("Early?")
                await words.press("Enter")
                await expect(words).to_have_value("Early?")
                listed.set()
                answer = page.page.get_by_role("article")
                await expect(answer).to_contain_text("Yes.")
                assert len(worker.requests) == 1


async def test_a_chat_shows_its_answer_and_where_it_is_from(
    browser: Browser, tmp_path: Path
) -> None:
    async with ScriptedWorker("qwen", "llama") as worker:
        worker.default(
            *chat_stream([ANSWER[:9], ANSWER[9:40], ANSWER[40:]], usage=True)
        )
        file = settings_file(tmp_path, {"desk": worker})
        async with running_hub(file=file) as hub:
            user = hub.token("ann")
            async with dashboard(browser, hub, user, view="#/playground") as page:
                await page.page.get_by_text("Settings", exact=True).click()
                await page.page.get_by_label("System prompt").fill("Be brief.")
                await page.page.get_by_label("Temperature").fill("0.5")
                answer = await ask(page, "Write code")
                await expect(answer.locator("strong")).to_have_text("some")
                await expect(answer.locator("pre code")).to_contain_text("print('<b>')")
                await expect(answer.get_by_role("table")).to_contain_text("2")
                await expect(facts(answer)).to_contain_text("desk")
                await expect(facts(answer)).to_contain_text("first token after")
                sent = worker.requests[-1].json()
                assert sent["messages"] == [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Write code"},
                ]
                assert sent["temperature"] == 0.5
                assert await page.violations() == []
                await page.page.emulate_media(color_scheme="dark")
                assert await page.violations() == []
                # The next turn has the first one in it, and both models are compared.
                await page.page.get_by_label("Compare with").select_option("llama")
                await ask(page, "Again")
                await expect(page.page.get_by_role("article")).to_have_count(3)
                last = page.page.get_by_role("article", name="Answer of llama")
                await expect(facts(last)).to_contain_text("desk")
                models = {each.json()["model"] for each in worker.requests[-2:]}
                assert models == {"qwen", "llama"}
                assert len(worker.requests[-1].json()["messages"]) == 4
                await page.page.set_viewport_size(PHONE)
                assert await page.overflow() == 0
                assert await page.kept() == ""


async def test_an_answer_is_stopped(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        endless(worker)
        user = hub.token("ann")
        async with dashboard(browser, hub, user, view="#/playground") as page:
            answer = await ask(page, "Tell me everything")
            await expect(answer).to_contain_text("ab")
            await page.page.get_by_role("button", name="Stop").click()
            await expect(facts(answer)).to_contain_text("stopped")
            await expect(answer).to_contain_text("ab")
            # Its worker is free again, and the next message can be sent.
            worker.default(*chat_stream(["fine"]))
            answer = await ask(page, "Are you well?")
            await expect(answer).to_contain_text("fine")


async def test_the_place_in_the_queue_is_shown(browser: Browser) -> None:
    async with ScriptedWorker(slots=1) as worker:
        endless(worker)
        async with running_hub(worker) as hub:
            user = hub.token("ann")
            async with dashboard(browser, hub, user, view="#/playground") as page:
                async with await hub.open(CHAT, STREAM) as wire:
                    await begun(wire)
                    worker.default(*chat_stream(["at last"]))
                    answer = await ask(page, "Is it my turn?")
                    place = "place 1 of 1 in the queue"
                    await expect(facts(answer)).to_contain_text(place)
                await expect(answer).to_contain_text("at last")


async def test_what_goes_wrong_is_explained(browser: Browser) -> None:
    async with ScriptedWorker() as worker:
        once = {"retry__attempts": 1, "rescue__enabled": False}
        async with running_hub(worker, **once) as hub:
            worker.script(send(error_reply(500, "out of memory")))
            user = hub.token("ann")
            async with dashboard(browser, hub, user, view="#/playground") as page:
                page.expect_problem("50.: /v1/chat/completions")
                answer = await ask(page, "Hello")
                await expect(answer.get_by_role("alert")).to_contain_text(
                    "hub’s message"
                )
                assert await page.violations() == []
                worker.default(*chat_stream(["it works"]))
                await page.page.get_by_role("button", name="Try again").click()
                await expect(page.page.get_by_role("article")).to_contain_text(
                    "it works"
                )


async def test_an_answer_of_a_killed_llama_server_is_continued_by_another(
    browser: Browser,
    tmp_path: Path,
    slow_model: Path,
    llama_server: Callable[..., LlamaServer],
) -> None:
    servers = {name: llama_server(slow_model, slots=1, ctx=8192) for name in ("a", "b")}
    file = settings_file(tmp_path, servers)
    async with running_hub(file=file) as hub:
        await hub.hub.known()
        admin = hub.token("operator", **ADMIN)
        async with dashboard(browser, hub, admin, view="#/playground") as page:
            # It is so long that it is killed in its middle, however slow the page is.
            answer = await ask(page, "Tell me a story")
            await expect(facts(answer)).to_contain_text("first token after")
            first = await facts(answer).get_by_role("listitem").first.inner_text()
            servers[first].kill()
            other = {"a": "b", "b": "a"}[first]
            await expect(facts(answer)).to_contain_text(f"{first} → {other}")
            await expect(facts(answer)).to_contain_text("rescued")
            before = len(await answer.inner_text())
            await page.page.wait_for_function(_GROWN, arg=before)
            await page.page.get_by_role("button", name="Stop").click()
            await answer.get_by_role("link", name="what happened").click()
            main = page.page.locator("main")
            await expect(main).to_contain_text(f"{other} continues the answer.")
            await expect(main).to_contain_text("The client left")
            assert await page.violations() == []


_GROWN = "before => document.querySelector('article').innerText.length > before"
