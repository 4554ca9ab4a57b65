"""Listeners get events in time or not at all; without listeners they cost nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gollama_proxy.control import events
from gollama_proxy.wire import sse
from tests.control.test_admin import ADMIN, CALM, call, complete, endless, error_of
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.client import Wire
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.registry import trip
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker

Event = tuple[str, Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have samples taken more often."""
    monkeypatch.setattr(events, "EVERY", 0.05)


class Listener:
    """Reads the events of a hub."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def next(self, *wanted: str) -> Event:
        """Return the next event of one of these names."""
        while (event := await self.wire.read_event()) is not None:
            name = event.partition(b"\n")[0].removeprefix(b"event: ").decode()
            data = sse.data_of(event.removesuffix(b"\n\n"))
            assert data is not None
            if name in wanted:
                return name, json.loads(data)
        raise AssertionError(f"the stream ended before {wanted}")


@contextlib.asynccontextmanager
async def listening(hub: RunningHub, **options: Any) -> AsyncIterator[Listener]:
    async with await hub.wire(**options) as wire:
        await wire.get("/admin/events", hub.token("root", **ADMIN))
        head = await wire.read_head()
        assert head.status == 200
        assert head.header("content-type") == "text/event-stream"
        assert head.header("cache-control") == "no-cache"
        yield Listener(wire)


# --- Events -----------------------------------------------------------------------


async def test_a_request_is_followed_from_its_start_to_its_end() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        async with listening(hub) as listener:
            await hub.post(CHAT, STREAM, hub.token("bob"))
            seen = [(await listener.next("exchange"))[1] for _ in range(3)]
            assert [each["change"] for each in seen] == ["started", "attempt", "ended"]
            assert {(each["subject"], each["model"]) for each in seen} == {
                ("bob", "tiny")
            }
            assert len({each["id"] for each in seen}) == 1
            assert (seen[2]["status"], seen[2]["outcome"]) == (200, "complete")


async def test_a_request_that_waits_is_an_event() -> None:
    async with ScriptedWorker(slots=1) as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with await hub.open(CHAT, STREAM), listening(hub) as listener:
            await until(lambda: len(worker.requests) == 1)
            async with await hub.open(CHAT, STREAM):
                _, shown = await listener.next("queue")
                assert shown["change"] == "joined"


async def test_changes_of_workers_are_events() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        [known] = hub.hub.registry.workers
        async with listening(hub) as listener:
            await listener.next("sample")
            await call(hub, "POST", f"/admin/workers/{known.name}/pause")
            seen: dict[str, Any] = {}
            while seen.keys() != {"worker", "change"}:  # in any order
                name, data = await listener.next("worker", "change")
                seen[name] = data
            assert seen["worker"]["hold"] == "paused"
            assert seen["change"]["action"] == "hold worker"
            assert seen["change"]["subject"] == "root"
            trip(known)
            _, shown = await listener.next("worker")
            while shown["breaker"]["state"] != "open":
                _, shown = await listener.next("worker")
            await call(hub, "DELETE", f"/admin/workers/{known.name}")
            for change in ("removed", "gone"):
                _, shown = await listener.next("fleet")
                assert shown == {"change": change, "worker": known.name}
            row = {"url": "http://127.0.0.1:9", "name": "new"}
            await call(hub, "POST", "/admin/workers", row)
            _, shown = await listener.next("fleet")
            assert shown == {"change": "added", "worker": "new"}


async def test_a_sample_comes_each_second() -> None:
    async with ScriptedWorker(slots=2) as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with listening(hub) as listener:
            _, sample = await listener.next("sample")
            assert (sample["running"], sample["waiting"]) == (0, 0)
            [shown] = sample["workers"]
            assert (shown["state"], shown["slots"]) == ("ready", 2)
            async with await hub.open(CHAT, STREAM):
                tokens = 0.0
                while not tokens:
                    _, sample = await listener.next("sample")
                    tokens = sample["tokens_per_second"]
                assert sample["running"] == 1
                assert sample["workers"][0]["tokens_per_second"] == tokens
                while sample["tokens_per_second"]:
                    _, sample = await listener.next("sample")


async def test_without_listeners_nothing_observes() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        assert hub.hub.proxy.observer is None
        async with listening(hub) as one, listening(hub) as two:
            await one.next("sample")
            await two.next("sample")
            assert hub.hub.proxy.observer is not None
        await until(lambda: hub.hub.proxy.observer is None)
        assert repr(hub.hub.events) == "<Events listeners=0>"


async def test_of_very_many_requests_only_some_have_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "EVERY", 3600.0)
    monkeypatch.setattr(events, "MOST_REQUESTS", 2)
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        await until(lambda: hub.hub.history.names)  # the only sample
        async with listening(hub) as listener:
            for number in range(4):
                await hub.post(CHAT, STREAM, hub.token(f"user {number}"))
            await until(lambda: hub.hub.recent.count == 4)
            hub.hub.events.publish("exchange", {"subject": "last", "change": ""})
            seen = [(await listener.next("exchange"))[1] for _ in range(7)]
            assert [(each["subject"], each["change"]) for each in seen] == [
                *(("user 0", change) for change in ("started", "attempt", "ended")),
                *(("user 1", change) for change in ("started", "attempt", "ended")),
                ("last", ""),
            ]


async def test_a_mistake_in_an_event_does_not_reach_a_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("a bug")

    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        async with listening(hub) as listener:
            await listener.next("sample")
            monkeypatch.setattr(hub.hub.views, "exchange", fail)
            monkeypatch.setattr(hub.hub.history, "take", fail)
            assert (await hub.post(CHAT, STREAM)).status == 200
            await until(lambda: "was lost" in caplog.text)
            await until(lambda: "samples" in caplog.text)
            monkeypatch.undo()
            await listener.next("sample")


async def test_the_number_of_listeners_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "MOST_LISTENERS", 1)
    async with running_hub(ready=False) as hub, listening(hub):
        answer = await hub.get("/admin/events", hub.token(**ADMIN))
        assert error_of(answer, 429)[0] == "rate_limit_exceeded"


async def test_a_listener_that_does_not_read_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "MOST_EVENTS", 10)
    async with running_hub(ready=False) as hub:
        async with listening(hub, receive_buffer=4096) as slow:
            for _ in range(1000):
                hub.hub.events.publish("change", {"filler": "x" * 10_000})
                await asyncio.sleep(0)
            assert not hub.hub.events.listeners
            name, data = await slow.next("dropped", "closed")
            assert (name, list(data)) == ("dropped", ["reason"])
            assert await slow.wire.read_event() is None


async def test_the_end_of_the_hub_ends_the_stream() -> None:
    async with running_hub(ready=False) as hub, listening(hub) as listener:
        async with asyncio.timeout(DEADLINE):
            await hub.hub.drain()
        assert (await listener.next("closed"))[1] == {"reason": "the hub shuts down"}
        assert await listener.wire.read_event() is None


async def test_a_token_that_is_revoked_ends_the_stream() -> None:
    async with running_hub(ready=False) as hub, listening(hub) as listener:
        await hub.hub.revoke("sub", "root")
        _, data = await listener.next("closed")
        assert data == {"reason": "the token is no longer valid"}


async def test_an_old_client_gets_a_stream_that_ends_with_its_connection() -> None:
    async with running_hub(ready=False) as hub, await hub.wire() as wire:
        token = hub.token(**ADMIN)
        await wire.send(
            f"GET /admin/events HTTP/1.0\r\nHost: x\r\n"
            f"Authorization: Bearer {token}\r\n\r\n".encode()
        )
        head = await wire.read_until(b"\r\n\r\n")
        assert b"chunked" not in head
        assert (await wire.read_until(b"\n\n")).startswith(b"event: sample\n")


async def test_a_head_request_does_not_listen() -> None:
    async with running_hub(ready=False) as hub, await hub.wire() as wire:
        await wire.get("/admin/events", hub.token(**ADMIN), method="HEAD")
        answer = await wire.read_response()
        assert (answer.status, answer.body) == (200, b"")
        assert not hub.hub.events.listeners
