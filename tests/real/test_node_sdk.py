"""OpenAI's client for Node ignores comments of the hub, and sees what goes wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gollama_proxy.fleet import health
from gollama_proxy.proxy import attempt
from gollama_proxy.proxy.response import Stream
from tests.behaviour.test_queue import crowded, sent
from tests.fakes.node_sdk import NodeSdk, find_node, node_sdk
from tests.fakes.replies import error_reply
from tests.fakes.script import Script, chat_stream, close, reset, send, wait
from tests.fakes.waiting import until

TEXTS = ["a", ' "b"\n\n', " data: [DONE]\n\n", " : c", " é🦙"]


@pytest.fixture
def comments(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What a client gets while it waits, which is soon."""
    monkeypatch.setattr(health, "PERIOD", 0.02)
    monkeypatch.setattr(attempt, "PROCESSING_AFTER", 0.05)
    monkeypatch.setattr(attempt, "NOTICE_EVERY", 0.05)
    comments: list[bytes] = []
    notify = Stream.notify

    def noted(stream: Stream, comment: str) -> None:
        notify(stream, comment)
        comments.append(comment.encode())

    monkeypatch.setattr(Stream, "notify", noted)
    return comments


@asynccontextmanager
async def kept_waiting(comments: list[bytes], *script: Any) -> AsyncIterator[NodeSdk]:
    """Have it wait in line, and then for its prompt; then the worker plays `script`."""
    node = find_node()
    async with crowded(queue__notice=0.02) as (worker, hub, _):
        running = sent(hub, "a")
        await worker.received(1)
        async with node_sdk(node, hub, "b") as client:
            assert await client.seen() == {"begun": True}  # the head came with a notice
            assert comments == [b"queued 1/1"]
            worker.script(wait("read"), *script)
            worker.release("go")
            await until(lambda: b"processing" in comments)
            worker.release("read")
            yield client
        await running


async def test_the_node_sdk_skips_comments(comments: list[bytes]) -> None:
    async with kept_waiting(comments, *chat_stream(TEXTS)) as client:
        *texts, end = await client.rest()
    assert texts == [{"content": text} for text in TEXTS]
    assert end == {"ended": True}


BROKEN = chat_stream(["a", "b"])[:3]


@pytest.mark.parametrize(
    ("script", "texts", "code"),
    [
        ((send(error_reply(400, "no such thing")), close()), [], 400),
        ((*BROKEN, reset()), ["a", "b"], "worker_connection_lost"),
    ],
    ids=["refused", "broken off"],
)
async def test_the_node_sdk_sees_an_error_after_comments(
    comments: list[bytes], script: Script, texts: list[str], code: int | str
) -> None:
    async with kept_waiting(comments, *script) as client:
        *seen, error = await client.rest()
    assert seen == [{"content": text} for text in texts]
    assert error["name"] == "APIError"
    assert error["code"] == code
    assert error["message"]
