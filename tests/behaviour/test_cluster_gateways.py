"""Two hubs behind a real HAProxy: what clients with the real SDK see of their ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.fakes.crowd import CountingWorker, acts_with, call, running_hubs
from tests.fakes.haproxy import Gateway, running_haproxy
from tests.fakes.hub import mint
from tests.fakes.process import HubProcess
from tests.fakes.replies import MODEL
from tests.fakes.script import chat_stream
from tests.fakes.valkey import StoreServer, running_store
from tests.fakes.waiting import DEADLINE, gone, until

if TYPE_CHECKING:  # as it is slow to import
    import openai


class Gateways(NamedTuple):
    front: Gateway
    hubs: list[HubProcess]
    store: StoreServer

    async def hub_of(self) -> HubProcess:
        """Return the hub that has the only request there is."""
        async with asyncio.timeout(DEADLINE):
            while True:
                shown = (await call(self.hubs[0], "GET", "/admin/exchanges")).json()
                names = [each["hub"] for each in shown["exchanges"]]
                for hub in self.hubs:
                    if any(name.endswith(f":{hub.port}") for name in names):
                        return hub
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def gateways(
    folder: Path, *workers: CountingWorker, **settings: Any
) -> AsyncIterator[Gateways]:
    urls = [worker.url for worker in workers]
    settings |= {"server__drain": 3600}
    async with (
        running_store(folder) as store,
        running_hubs(2, *urls, state__url=store.url, **settings) as hubs,
        running_haproxy([hub.port for hub in hubs], folder) as front,
    ):
        for hub in hubs:
            await acts_with(hub, 2)
        yield Gateways(front, hubs, store)


def sdk(front: Gateway, retries: int = 2) -> openai.AsyncOpenAI:
    import openai

    return openai.AsyncOpenAI(
        base_url=f"{front.url}/v1",
        api_key=mint(sub="alice"),
        timeout=DEADLINE,
        max_retries=retries,
    )


async def test_what_clients_see_when_a_hub_is_killed(tmp_path: Path) -> None:
    import openai

    gate = asyncio.Event()
    async with (
        CountingWorker(8) as worker,
        gateways(tmp_path, worker) as site,
        sdk(site.front) as client,
    ):
        worker.script(*chat_stream(["one", "two"], pace=gate))
        stream = await client.chat.completions.create(
            model=MODEL, messages=ask("stream 0"), stream=True
        )
        words = words_of(stream)
        assert await anext(words) == "one"
        dead = await site.hub_of()
        # Some of these are at the same hub: HAProxy gives each hub as many.
        worker.pace = gate
        whole = [f"whole {n}" for n in range(4)]
        async with asyncio.TaskGroup() as group:
            answers = [
                group.create_task(
                    client.chat.completions.create(model=MODEL, messages=ask(each)),
                    name=f"fake {each}",
                )
                for each in whole
            ]
            await until(lambda: len(worker.began) == len(whole))
            os.kill(dead.pid, signal.SIGKILL)
            # The stream ends with an error, so it is not mistaken for a whole one.
            with pytest.raises(openai.APIError):
                await anext(words)
            # The others are asked again, at the other hub.
            await until(lambda: len(worker.began) > len(whole))
            gate.set()
        assert [each.result().choices[0].message.content for each in answers] == whole
        # And new ones land there at once, without a second attempt of the SDK.
        once = client.with_options(max_retries=0)
        for _ in range(5):
            await once.chat.completions.create(model=MODEL, messages=ask("new 0"))


async def test_a_conversation_returns_to_its_worker_through_the_other_hub(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()
    async with (
        CountingWorker(2, gate) as left,
        CountingWorker(2, gate) as right,
        # Answers in one piece show nothing of how fast a worker writes: on a busy
        # machine, one of two like workers would seem fast enough to read all again.
        gateways(tmp_path, left, right, upstream__assemble="") as site,
        sdk(site.front) as client,
    ):

        async def turn(messages: list[Any]) -> tuple[str, str]:
            """Return the answer and the worker that gave it."""
            raw = await client.chat.completions.with_raw_response.create(
                model=MODEL, messages=messages
            )
            content = raw.parse().choices[0].message.content
            return content or "", raw.headers["X-Gollama-Worker"]

        openings = [ask(f"{n} " + f"word{n} " * 500) for n in range(4)]
        async with asyncio.TaskGroup() as group:
            first = [
                group.create_task(turn(each), name="fake turn") for each in openings
            ]
            await until(lambda: left.running == right.running == 2)
            gate.set()
        places = [each.result()[1] for each in first]
        assert sorted(places) == sorted([left.name, right.name] * 2)
        turns = [
            [
                *opening,
                {"role": "assistant", "content": each.result()[0]},
                *ask("And then?"),
            ]
            for opening, each in zip(openings, first, strict=True)
        ]
        dead, alive = site.hubs
        async with asyncio.timeout(DEADLINE):  # hubs exchange this every second
            while [await chosen(alive, each) for each in turns] != places:
                await asyncio.sleep(0.05)
        os.kill(dead.pid, signal.SIGKILL)
        left_over = await leases(site.store)
        await acts_with(alive, 1)
        async with asyncio.timeout(DEADLINE):  # the dead one has some of the slots
            while left_over & await leases(site.store):
                await asyncio.sleep(0.05)
        assert [(await turn(each))[1] for each in turns] == places


async def leases(store: StoreServer) -> set[tuple[bytes, ...]]:
    """Return the leases of slots with their ends, which move when they are renewed."""
    found: set[tuple[bytes, ...]] = set()
    seconds, micros = map(int, await store.ask("TIME"))
    for key in await store.ask("KEYS", "gollama:slots:leases:*"):
        lasting = (key, f"({seconds * 1000 + micros // 1000}", "+inf", "WITHSCORES")
        flat = await store.ask("ZRANGEBYSCORE", *lasting)
        found |= set(zip(flat[::2], flat[1::2], strict=True))
    return found


async def chosen(hub: HubProcess, messages: list[Any]) -> str:
    """Return the worker that a request of alice would get at a hub."""
    body = {"request": {"model": MODEL, "messages": messages}, "subject": "alice"}
    shown = (await call(hub, "POST", "/admin/explain", body)).json()
    return str(shown["worker"])


async def test_a_hub_that_drains_breaks_nothing(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        CountingWorker(8) as worker,
        gateways(tmp_path, worker) as site,
        sdk(site.front, retries=0) as client,
    ):
        worker.script(*chat_stream(["one", "two"], pace=gate))
        stream = await client.chat.completions.create(
            model=MODEL, messages=ask("stream 0"), stream=True
        )
        words = words_of(stream)
        assert await anext(words) == "one"
        leaving = await site.hub_of()
        os.kill(leaving.pid, signal.SIGTERM)
        for n in range(20):
            await client.chat.completions.create(model=MODEL, messages=ask(f"new {n}"))
        gate.set()
        assert [word async for word in words] == ["two"]
        await gone(leaving.pid)


async def words_of(stream: Any) -> AsyncIterator[str]:
    async with stream:
        async for each in stream:
            for choice in each.choices:
                if choice.delta.content:
                    yield choice.delta.content


def ask(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]
