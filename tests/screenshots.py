"""Renew the pictures of the dashboard: `python -m tests.screenshots docs/images`.

A hub with three busy workers, one of which fails in the end.  The time that the charts
show passes faster.  Nothing in the pictures is from this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import random
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop
from playwright.async_api import Browser, ViewportSize, expect

from gollama_proxy.control import history
from tests.browser.dashboard import Dashboard, chromium, dashboard
from tests.browser.fleet import settings_file
from tests.fakes.agent import HandAgent
from tests.fakes.asks import CHAT
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.registry import trip
from tests.fakes.script import Script, chat_stream, reset
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

BUILD = "b10068"
CODER, CHATTY = "qwen3-coder-30b", "gemma-3-12b"
SIZE = ViewportSize(width=1200, height=680)
DEVICE = {"name": "RTX 3090", "memory_gib": 24.0, "used_gib": 19.4, "busy": 0.82}
MACHINE = {"host": "server-1", "load": 0.31, "devices": [DEVICE | {"celsius": 68}]}
SUBJECTS = {"ann": CODER, "ben": CODER, "nightly-ci": CODER, "notes-app": CHATTY}
QUESTION = "How do I retry a flaky download in Python?"
ANSWER = """Wrap it in a loop, and wait a little longer after **each** failure:

```python
for attempt in range(5):
    try:
        return download(url)
    except OSError:
        time.sleep(2 ** attempt)
raise DownloadError(url)
```

- Retry only what may succeed the second time: a lost connection, or a `503`.
- Add some randomness, so that many clients do not come back at the same moment.
"""


async def take(seconds: float) -> dict[str, bytes]:
    """Return the pictures, by the names of their files, after seconds of traffic."""
    history.EVERY = 0.25
    rng = random.Random(7)
    with tempfile.TemporaryDirectory() as name:
        async with (
            chromium() as browser,
            ScriptedWorker(CODER, slots=4, n_ctx=32768, build=BUILD) as desk,
            ScriptedWorker(CHATTY, slots=2, n_ctx=8192, build=BUILD) as attic,
            ScriptedWorker(CODER, CHATTY, slots=8, n_ctx=65536, build=BUILD) as server,
        ):
            desk.default(*answers(rng, CODER, 0.012))
            attic.default(*answers(rng, CHATTY, 0.03))
            server.default(*answers(rng, CODER, 0.006))
            file = settings_file(Path(name), {"desk": desk, "attic": attic})
            async with running_hub(file=file, agents__lease=3600) as hub:
                agent = HandAgent(hub, server.url, "server-1")
                async with agent.answering(), traffic(hub, rng):
                    answer = await agent.put(report=MACHINE)
                    assert answer.status < 300, answer.body
                    await asyncio.sleep(seconds)
                    pictures = await overview(browser, hub)
                return pictures | await chat(browser, hub, [desk, server])


def answers(rng: random.Random, model: str, pace: float) -> Script:
    """Return an answer of a few hundred tokens."""
    return chat_stream([" word"] * rng.randint(150, 300), model=model, pace=pace)


@contextlib.asynccontextmanager
async def traffic(hub: RunningHub, rng: random.Random) -> AsyncIterator[None]:
    """Let each subject ask again and again, with pauses."""

    async def ask(subject: str, model: str) -> None:
        body = {"model": model, "stream": True}
        body["messages"] = [{"role": "user", "content": "x" * rng.randint(50, 5000)}]
        while True:
            with contextlib.suppress(Exception):
                await hub.post(CHAT, body, hub.token(subject))
            await asyncio.sleep(rng.expovariate(1.5))

    tasks = [
        asyncio.create_task(ask(subject, model), name="fake client")
        for subject, model in [*SUBJECTS.items()] * 3
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def overview(browser: Browser, hub: RunningHub) -> dict[str, bytes]:
    """Take the overview, with a worker in trouble."""
    token = hub.token("operator", scope="admin")
    async with dashboard(browser, hub, token, size=SIZE) as page:
        await expect(page.worker("server-1")).to_contain_text("RTX 3090")
        await asyncio.sleep(3)  # some samples
        trip(next(each for each in hub.hub.registry.workers if each.name == "attic"))
        await expect(page.worker("attic")).to_contain_text("Breaker open")
        return {"overview.webp": await picture(page)}


async def chat(
    browser: Browser, hub: RunningHub, workers: list[ScriptedWorker]
) -> dict[str, bytes]:
    """Take a chat whose answer is continued by another worker, and what happened."""
    pieces = [ANSWER[at : at + 4] for at in range(0, len(ANSWER), 4)]
    half = len(pieces) // 2
    [*begun] = chat_stream(pieces[:half], model=CODER, pace=0.01)[: 2 * half]
    rest = chat_stream(
        ["".join(pieces[:half]), *pieces[half:]], model=CODER, pace=0.01, usage=True
    )
    token = hub.token("operator", scope="admin")
    async with dashboard(
        browser, hub, token, size=SIZE, dark=True, view="#/playground"
    ) as page:
        for worker in workers:  # the one that is asked first breaks off
            worker.default(*begun, reset())
        once = asyncio.create_task(_mend(workers, rest), name="fake repair")
        await page.page.get_by_label("Your message").fill(QUESTION)
        await page.page.keyboard.press("Enter")
        article = page.page.get_by_role("article")
        await expect(article).to_have_attribute("aria-busy", "false")
        await once
        answered = await picture(page)
        await article.get_by_role("link", name="what happened").click()
        await expect(page.page.locator("main")).to_contain_text("It ends")
        return {"playground.webp": answered, "requests.webp": await picture(page)}


async def _mend(workers: list[ScriptedWorker], rest: Script) -> None:
    """Let all continue the answer, once one of them has got the question."""
    before = [len(worker.requests) for worker in workers]
    await until(lambda: [len(worker.requests) for worker in workers] != before)
    for worker in workers:
        worker.default(*rest)


async def picture(page: Dashboard) -> bytes:
    """Return what the window shows, with addresses of a usual network."""
    await page.page.evaluate(_MOVE)
    session = await page.page.context.new_cdp_session(page.page)
    shot = await session.send(
        "Page.captureScreenshot", {"format": "webp", "quality": 85}
    )
    return base64.b64decode(shot["data"])


# The page goes on, so that what it writes is changed each time before it is shown.
_MOVE = """
() => {
  const hosts = new Map();
  const move = () => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode());) {
      const moved = node.data.replace(/127\\.0\\.0\\.1(:\\d+)?/g, (found, port) => {
        if (!hosts.has(found)) hosts.set(found, `10.0.0.${11 + hosts.size}`);
        return hosts.get(found) + (port ? ":8080" : "");
      });
      if (moved !== node.data) node.data = moved;
    }
  };
  move();
  const changes = {subtree: true, childList: true, characterData: true};
  new MutationObserver(move).observe(document.body, changes);
}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0, help="of traffic")
    options = parser.parse_args()
    pictures = uvloop.run(take(options.seconds))
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (options.folder / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
