"""Chats in the playground: their settings, turns, figures, pictures and views."""

from __future__ import annotations

from typing import Any

from playwright.async_api import Browser, Locator, expect

from tests.behaviour.test_rescue import partial, thought
from tests.browser.dashboard import BROWSER, PHONE, Dashboard, dashboard
from tests.fakes import replies
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import role, token
from tests.fakes.script import (
    Script,
    chat_stream,
    chunk,
    close,
    last_chunk,
    send,
    sse_head,
    wait,
)
from tests.fakes.worker import ScriptedWorker

pytestmark = BROWSER

VIEW = "#/playground"
CODE = "# Hello\n\n```py\nprint(1)\n```\n\n- **one**\n- two"
ATTACK = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) <b>b</b>"


def opened(browser: Browser, hub: RunningHub, **options: Any) -> Any:
    """Open the playground with a token that has no scope."""
    return dashboard(browser, hub, hub.token("ann"), view=VIEW, **options)


async def ask(page: Dashboard, text: str) -> None:
    message = page.page.get_by_label("Your message")
    await expect(page.page.get_by_label("Model", exact=True)).to_be_enabled()
    await message.fill(text)
    await message.press("Enter")


def answer_in(page: Dashboard, number: int = 0) -> Locator:
    return page.page.locator("article.answer").nth(number)


async def finished(page: Dashboard, number: int = 0) -> Locator:
    found = answer_in(page, number)
    await expect(found).to_have_attribute("aria-busy", "false")
    return found


def messages(worker: ScriptedWorker, number: int = -1) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = worker.requests[number].json()["messages"]
    return asked


# --- One answer -------------------------------------------------------------------


async def test_an_answer_is_shown_with_its_figures(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        usage = replies.usage_of(40, prompt=120, cached=96)
        timings = replies.timings_of(40)
        ending = replies.finish("stop", timings, usage=usage)
        worker.default(
            send(sse_head()),
            send(chunk(role() + token(CODE[:20]) + token(CODE[20:]))),
            send(chunk(ending + replies.done()) + last_chunk()),
            close(),
        )
        async with opened(browser, hub) as page:
            await ask(page, "How?")
            shown = await finished(page)
            await expect(shown.get_by_role("heading", name="Hello")).to_be_visible()
            await expect(shown.locator("pre")).to_have_text("print(1)")
            await expect(shown.get_by_role("listitem").first).to_have_text("one")
            facts = shown.locator(".facts")
            await expect(facts).to_contain_text(worker.name)
            await expect(facts).to_contain_text("40 tokens")
            await expect(facts).to_contain_text("13,699 tokens/s")
            await expect(facts).to_contain_text("120 tokens, 96 from the cache")
            await expect(facts).to_contain_text("first token after")
            # What the operator may look up, this token may not.
            await expect(facts.get_by_role("link")).to_have_count(0)
            assert await page.violations() == []


async def test_settings_are_sent_and_a_turn_can_be_edited(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(*chat_stream(["Yes", "."]))
        async with opened(browser, hub) as page:
            view = page.page
            await view.locator("summary", has_text="Settings").click()
            await view.get_by_label("System prompt").fill("Be short.")
            await view.get_by_label("Temperature").fill("0.5")
            await view.get_by_label("Most tokens of an answer").fill("9")
            await ask(page, "One")
            await finished(page)
            body = worker.requests[-1].json()
            assert (body["temperature"], body["max_tokens"]) == (0.5, 9)
            assert body["stream_options"] == {"include_usage": True}
            system = {"role": "system", "content": "Be short."}
            assert body["messages"] == [system, {"role": "user", "content": "One"}]

            await ask(page, "Two")
            await finished(page, 1)
            sent = [each["content"] for each in messages(worker)]
            assert sent == ["Be short.", "One", "Yes.", "Two"]

            await view.get_by_role("button", name="Edit this message").click()
            await expect(view.get_by_label("Your message")).to_have_value("Two")
            await expect(view.locator("article.answer")).to_have_count(1)
            await view.get_by_label("Your message").press("Shift+Enter")
            await view.get_by_label("Your message").press_sequentially("and a half")
            await view.get_by_label("Your message").press("Enter")
            await finished(page, 1)
            assert messages(worker)[-1]["content"] == "Two\nand a half"

            await view.get_by_role("button", name="Try again").click()
            await expect(view.get_by_role("button", name="Stop")).to_be_hidden()
            await finished(page, 1)
            assert messages(worker, -1) == messages(worker, -2)


async def test_a_wrong_temperature_is_not_sent(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with opened(browser, hub) as page:
            temperature = page.page.get_by_label("Temperature")
            await page.page.locator("summary", has_text="Settings").click()
            await temperature.fill("7")
            await ask(page, "One")
            await expect(temperature).to_be_focused()
            assert not worker.requests


async def test_reasoning_is_folded(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        texts = ["<thi", "nk>by ta", "gs</th", "ink>\n\n", "Four"]
        field: Script = (
            send(sse_head()),
            send(chunk(role() + thought("by a field") + token("Five"))),
            send(chunk(replies.finish() + replies.done()) + last_chunk()),
            close(),
        )
        worker.script(*chat_stream(texts))
        worker.script(*field)
        async with opened(browser, hub) as page:
            for number, (thinking, text) in enumerate(
                [("by tags", "Four"), ("by a field", "Five")]
            ):
                await ask(page, "2 + 2?")
                shown = await finished(page, number)
                await expect(shown.locator(":scope > .text")).to_have_text(text)
                folded = shown.locator("details")
                await expect(folded.get_by_text(thinking)).to_be_hidden()
                await folded.get_by_text("Thinking").click()
                await expect(folded.get_by_text(thinking)).to_be_visible()
                assert await page.violations() == []
            assert [each["content"] for each in messages(worker)][1] == "Four"


async def test_markup_of_a_model_is_text(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(*chat_stream([ATTACK[:9], ATTACK[9:]]))
        async with opened(browser, hub) as page:
            await ask(page, ATTACK)
            shown = await finished(page)
            await expect(shown.locator(":scope > .text")).to_have_text(ATTACK)
            await expect(page.page.locator(".question")).to_have_text(ATTACK)
            assert await page.page.locator(".turn :is(img, b, a)").count() == 0


async def test_an_answer_that_breaks_off_is_not_taken_for_complete(
    browser: Browser,
) -> None:
    settings = {"retry__attempts": 1, "rescue__enabled": False}
    async with ScriptedWorker() as worker, running_hub(worker, **settings) as hub:
        worker.default(*partial(wait("die"), close()))
        async with opened(browser, hub) as page:
            page.expect_problem("ERR_INCOMPLETE_CHUNKED_ENCODING")
            await ask(page, "A story")
            # A browser drops what it has not read when a connection breaks.
            await expect(answer_in(page)).to_contain_text("One day, a fox met")
            worker.release("die")
            shown = await finished(page)
            await expect(shown).to_contain_text("One day, a fox met")
            await expect(shown.get_by_role("alert")).to_contain_text("broke off")


async def test_only_models_that_the_token_allows_are_offered(browser: Browser) -> None:
    async with ScriptedWorker("qwen", "phi") as worker, running_hub(worker) as hub:
        for models, names in ((["phi"], ["phi"]), (["x"], ["No model"])):
            key = hub.token("ann", models=models)
            async with dashboard(browser, hub, key, view=VIEW) as page:
                options = page.page.get_by_label("Model", exact=True).locator("option")
                await expect(options).to_have_text(names)
                if models == ["x"]:
                    alert = page.page.get_by_role("alert")
                    await expect(alert).to_contain_text("Your token allows")


# --- Two models -------------------------------------------------------------------


async def test_two_models_answer_side_by_side(browser: Browser) -> None:
    async with (
        ScriptedWorker("qwen") as one,
        ScriptedWorker("phi") as two,
        running_hub(one, two) as hub,
    ):
        one.default(*chat_stream(["I am ", "qwen"], model="qwen"))
        two.default(*chat_stream(["I am ", "phi"], model="phi"))
        for size in ({"width": 1280, "height": 800}, PHONE):
            async with opened(browser, hub, size=size) as page:
                await page.page.get_by_label("Compare with").select_option("phi")
                for number in (0, 2):
                    await ask(page, "Who?")
                    left = await finished(page, number)
                    right = await finished(page, number + 1)
                    await expect(left).to_contain_text("I am qwen")
                    await expect(left.locator(".facts")).to_contain_text(one.name)
                    await expect(right).to_contain_text("I am phi")
                    await expect(right.locator(".facts")).to_contain_text(two.name)
                # Each continues its own conversation.
                assert messages(one)[1]["content"] == "I am qwen"
                assert messages(two)[1]["content"] == "I am phi"
                first, second = await left.bounding_box(), await right.bounding_box()
                assert first is not None
                assert second is not None
                assert (first["y"] == second["y"]) == (size is not PHONE)
                assert await page.overflow() <= 0
                assert await page.violations() == []


# --- Pictures ---------------------------------------------------------------------

# Make a picture of this size in the page, and give it to the field for files.
ATTACH = """
async ([width, height, type]) => {
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  canvas.getContext("2d").fillRect(0, 0, 9, 9);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type));
  const data = new DataTransfer();
  data.items.add(new File([blob], "sea view", {type: blob.type}));
  const input = document.querySelector("input[type=file]");
  input.files = data.files;
  input.dispatchEvent(new Event("change"));
}
"""
MEASURE = """
(url) => new Promise((resolve) => {
  const image = new Image();
  image.onload = () => resolve([image.naturalWidth, image.naturalHeight]);
  image.src = url;
})
"""


async def test_a_picture_is_sent_to_a_model_that_takes_one(browser: Browser) -> None:
    async with (
        ScriptedWorker("eye", takes=("vision",)) as worker,
        running_hub(worker) as hub,
    ):
        worker.default(*chat_stream(["The ", "sea"], model="eye"))
        async with opened(browser, hub) as page:
            view = page.page
            await expect(
                view.get_by_role("button", name="Add a picture")
            ).to_be_visible()
            await view.evaluate(ATTACH, [4000, 1000, "image/webp"])
            await view.get_by_role("button", name="Remove sea view").click()
            await expect(view.get_by_alt_text("sea view")).to_have_count(0)
            await view.evaluate(ATTACH, [4000, 1000, "image/webp"])
            await view.evaluate(ATTACH, [30, 20, "image/png"])
            await expect(view.get_by_alt_text("sea view")).to_have_count(2)
            await ask(page, "What is this?")
            await finished(page)
            text, large, small = messages(worker)[0]["content"]
            assert text == {"type": "text", "text": "What is this?"}
            url = large["image_url"]["url"]
            assert url.startswith("data:image/jpeg;base64,")
            assert await view.evaluate(MEASURE, url) == [1536, 384]
            assert small["image_url"]["url"].startswith("data:image/png;base64,")
            await expect(view.locator(".question img")).to_have_count(2)


async def test_no_picture_is_offered_to_a_model_that_takes_none(
    browser: Browser,
) -> None:
    async with (
        ScriptedWorker("eye", takes=("vision",)) as one,
        ScriptedWorker("blind") as two,
        running_hub(one, two) as hub,
        opened(browser, hub) as page,
    ):
        button = page.page.get_by_role("button", name="Add a picture")
        await expect(button).to_be_visible()
        await page.page.get_by_label("Compare with").select_option("blind")
        await expect(button).to_be_hidden()


# --- Other views, and other people ------------------------------------------------


async def test_a_chat_survives_other_views_but_not_a_sign_out(browser: Browser) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        begun = role() + replies.token("One")
        worker.default(
            send(sse_head()),
            send(chunk(begun)),
            wait("go"),
            send(chunk(replies.token(" day") + replies.finish() + replies.done())),
            send(last_chunk()),
            close(),
        )
        token = hub.token("ann", scope="monitor")
        async with dashboard(browser, hub, token, view=VIEW) as page:
            await ask(page, "A story")
            await expect(answer_in(page)).to_contain_text("One")
            await page.page.get_by_role("link", name="Overview", exact=True).click()
            await expect(answer_in(page)).to_have_count(0)
            worker.release("go")
            await page.page.get_by_role("link", name="Playground").click()
            await finished(page)
            await expect(answer_in(page)).to_contain_text("One day")

            stored = await page.page.evaluate(
                "() => JSON.stringify([localStorage, sessionStorage])"
            )
            assert "One" not in stored
            await page.page.get_by_role("button", name="Sign out").click()
            await page.sign_in(hub.token("bob"))
            await expect(page.page.get_by_label("Your message")).to_be_visible()
            await expect(answer_in(page)).to_have_count(0)
