"""Pictures and sound go to workers that take them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.asks import CHAT
from tests.fakes.hub import running_hub
from tests.fakes.worker import ScriptedWorker

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
RESULT = {"type": "tool_result", "content": [{"type": "image", "source": {}}]}
WORDS = {"type": "text", "text": "What is that?"}


def ask(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [WORDS, *parts]}]}


async def test_a_picture_goes_to_a_worker_that_takes_it() -> None:
    async with (
        ScriptedWorker("tiny") as blind,
        ScriptedWorker("tiny", takes=("vision",)) as seeing,
        running_hub(blind, seeing) as hub,
    ):
        for _ in range(3):
            reply = await hub.post(CHAT, ask(PICTURE))
            assert reply.status == 200
            assert reply.header("x-gollama-worker") == seeing.name
        for path, body in (
            ("/v1/messages", ask({"type": "image", "source": {}})),
            ("/v1/messages", ask(RESULT)),
            ("/v1/responses", {"input": ask({"type": "input_image"})["messages"]}),
        ):
            reply = await hub.post(path, body)
            assert reply.header("x-gollama-worker") == seeing.name
        assert not blind.requests


@pytest.mark.parametrize(
    ("path", "parts", "kinds"),
    [
        (CHAT, [PICTURE], "image"),
        (CHAT, [SOUND], "audio"),
        (CHAT, [PICTURE, SOUND], "audio and image"),
        ("/v1/messages", [{"type": "image", "source": {}}], "image"),
    ],
)
async def test_what_no_worker_takes_is_refused_and_sent_nowhere(
    path: str, parts: list[dict[str, Any]], kinds: str
) -> None:
    async with ScriptedWorker("tiny") as worker, running_hub(worker) as hub:
        reply = await hub.post(path, ask(*parts))
        assert reply.status == 400
        message = f"No worker takes {kinds} input for the model 'tiny'."
        assert reply.json()["error"]["message"] == message
        assert not worker.requests


async def test_a_picture_goes_to_a_fallback_that_takes_it() -> None:
    async with (
        ScriptedWorker("tiny") as blind,
        ScriptedWorker("large", takes=("vision",)) as seeing,
        running_hub(blind, seeing, models__fallbacks="tiny=large") as hub,
    ):
        reply = await hub.post(CHAT, ask(PICTURE) | {"model": "tiny"})
        assert reply.header("x-gollama-worker") == seeing.name
        reply = await hub.post(CHAT, ask() | {"model": "tiny"})
        assert reply.header("x-gollama-worker") == blind.name


async def test_a_text_about_pictures_is_a_text() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    parts = [{"type": "text", "text": '{"type": "image_url"}'}]
    async with ScriptedWorker("tiny") as worker, running_hub(worker) as hub:
        reply = await hub.post(CHAT, ask(*parts) | {"tools": [tool]})
        assert reply.status == 200
