"""The connection to a store: real servers, which are killed, paused and cut off."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from valkey import Valkey

from gollama_proxy.config.addresses import parse_store_url
from gollama_proxy.state.link import Link, StoreDownError, StoreError
from gollama_proxy.state.store import Mode
from gollama_proxy.tasks import PUNCTUAL
from tests.fakes.valkey import (
    ENGINES,
    Partition,
    StoreServer,
    connected,
    is_down,
    is_up,
    running_store,
)
from tests.fakes.waiting import until


@pytest.mark.parametrize("engine", ENGINES)
async def test_commands_scripts_and_messages(tmp_path: Path, engine: str) -> None:
    async with running_store(tmp_path, engine) as server:
        async with connected(server.url) as store, connected(server.url) as other:
            assert store.server.startswith(engine)
            assert store.epoch == other.epoch != ""
            assert await store.call("SET", store.key("a"), 1) == b"OK"
            answers = await store.pipe([("GET", store.key("a")), ("GET", "b")])
            assert answers == [b"1", None]
            script = "return {KEYS[1], ARGV[1]}"
            assert await store.run(script, ["k"], ["é"]) == [b"k", "é".encode()]
            got: list[bytes] = []
            await other.listen(other.key("news"), got.append)
            await store.publish(store.key("news"), "1")
            await store.publish(store.key("news"), b"\xff")
            await until(lambda: got == [b"1", b"\xff"])
            with pytest.raises(StoreError, match="unknown command"):
                await store.call("NONSENSE")
            assert store.mode is Mode.UP


async def test_a_store_that_is_killed_and_comes_back_empty(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        modes: list[Mode] = []
        losses: list[str] = []
        store.subscribe_mode(modes.append)
        store.on_empty(lambda: losses.append(store.epoch))
        got: list[bytes] = []
        await store.listen(store.key("news"), got.append)
        epoch = store.epoch
        await server.kill()
        await is_down(store)
        with pytest.raises(StoreDownError):
            await store.call("PING")
        await server.start()
        await is_up(store)
        assert store.epoch != epoch
        assert losses == [store.epoch]
        assert modes[0] is Mode.DOWN
        assert modes[-1] is Mode.UP
        await store.publish(store.key("news"), "again")
        await until(lambda: got == [b"again"])


@pytest.mark.usefixtures("usual_timeouts")
async def test_a_store_that_is_paused(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        server.pause()
        with pytest.raises(StoreDownError, match="no answer within 50 ms"):
            await store.call("PING")
        await until(lambda: store.outages > 0)
        server.go_on()
        await is_up(store)


def hold_up(server: StoreServer, seconds: float = 4 * PUNCTUAL) -> None:
    """Block the event loop until a PING was answered, and some time has passed."""
    begun = time.monotonic()
    with Valkey(unix_socket_path=str(server.socket)) as client:
        while (
            "cmdstat_ping" not in client.info("commandstats")
            or time.monotonic() < begun + seconds
        ):
            time.sleep(0.01)


@pytest.mark.usefixtures("usual_timeouts")
async def test_a_hub_that_was_held_up_blames_no_store(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        call = asyncio.create_task(store.call("PING"))
        await asyncio.sleep(0)  # it is sent
        hold_up(server)
        # Its time limit passed long ago, and so did the answer.
        assert await call == b"PONG"
        assert (store.failures, store.outages) == (0, 0)


@pytest.mark.parametrize("steps", range(6))
async def test_an_answer_that_comes_as_the_connection_is_given_up(
    steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost: list[str] = []
    async with running_store(tmp_path) as server:
        address = parse_store_url("state.url", server.url)
        link = Link(
            address, lambda *_: None, lambda _, text: lost.append(text), time.monotonic
        )
        await link.open()
        call = asyncio.create_task(link.ask([("PING",)]))
        await asyncio.sleep(0)  # it is sent
        hold_up(server, 0.0)
        for _ in range(steps):
            await asyncio.sleep(0)
        link.end(StoreDownError("too late"))
        await asyncio.gather(call, return_exceptions=True)
        await link.close()
        assert lost == ["too late"]
    assert "failed" not in caplog.text


@pytest.mark.usefixtures("usual_timeouts")
async def test_a_network_that_loses_everything(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as server,
        Partition(server.socket, tmp_path / "net") as network,
        connected(network.url) as store,
    ):
        network.drop()
        with pytest.raises(StoreDownError):
            await store.call("PING")
        await is_down(store)
        network.heal()
        await is_up(store)
        network.cut()
        await is_down(store)
        await is_up(store)


async def test_a_store_that_is_not_there_yet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(f"unix://{tmp_path}/store.sock") as store:
        assert store.mode is Mode.DOWN
        assert "No such file or directory; going on without it" in caplog.text
        with pytest.raises(StoreDownError, match="No such file"):
            await store.call("PING")
        async with running_store(tmp_path):
            await is_up(store)


async def test_calls_at_once_have_one_answer_each(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        calls = (store.run("return ARGV[1]", [], [n]) for n in range(100))
        answers = await asyncio.gather(*calls)
        assert answers == [str(number).encode() for number in range(100)]
