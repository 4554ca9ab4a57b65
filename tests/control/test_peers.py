"""Hubs ask each other through a real store; one that is silent costs half a second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.control import peers
from gollama_proxy.control.merging import Answers
from gollama_proxy.control.peers import MOST_SENT, Peers, inflate
from gollama_proxy.state.members import Member
from gollama_proxy.state.store import Store
from tests.fakes.asks import RARELY
from tests.fakes.clock import Clock
from tests.fakes.valkey import connected, is_down, running_store
from tests.fakes.waiting import until


def member(
    run: str, name: str, group: str = "", pid: int = 1, url: str = "http://hub"
) -> Member:
    return Member(run=run, name=name, host="host", pid=pid, group=group, url=url)


class Seen:
    """The members as one hub knows them."""

    def __init__(self, me: Member, hubs: Mapping[str, Member]) -> None:
        self.me, self._hubs = me, hubs

    @property
    def others(self) -> Mapping[str, Member]:
        return {run: each for run, each in self._hubs.items() if each != self.me}


class Group:
    """All hubs, as each of them knows the others."""

    def __init__(self, *hubs: Member) -> None:
        self.hubs = {hub.run: hub for hub in hubs}
        self.news: dict[str, list[Any]] = {hub.run: [] for hub in hubs}

    def seen_by(self, run: str) -> Seen:
        return Seen(self.hubs[run], self.hubs)

    async def peer(
        self,
        store: Store,
        run: str,
        replies: Mapping[str, Callable[[dict[str, Any]], Any]],
        clock: Callable[[], float] = time.monotonic,
        patience: float = RARELY,
    ) -> Peers:
        def take(hub: str, events: Any) -> None:
            self.news[run].append((hub, events))

        made = Peers(store, self.seen_by(run), replies, take, patience, clock)
        await made.start()
        return made


A, B, C = member("1", "a"), member("2", "b"), member("3", "c")


@contextlib.asynccontextmanager
async def stores(folder: Path, count: int) -> AsyncIterator[list[Store]]:
    async with running_store(folder) as server, contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(connected(server.url)) for _ in range(count)
        ]


async def test_every_hub_answers(tmp_path: Path) -> None:
    async def later(arguments: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return arguments

    group = Group(A, B, C)
    async with stores(tmp_path, 3) as (one, two, three):
        asking = await group.peer(one, "1", {})
        await group.peer(two, "2", {"x": lambda arguments: [arguments["n"] + 1]})
        await group.peer(three, "3", {"x": later})
        assert await asking.ask("x", {"n": 1}) == Answers({"b": [2], "c": {"n": 1}}, [])
        assert repr(asking) == "<Peers of a others=2 asked=0>"
        assert asking.store == {"mode": "up", "reason": ""}


async def test_a_hub_alone_asks_nobody() -> None:
    store = Store("unix:///nowhere")
    alone = Peers(store, Group(A).seen_by("1"), {}, lambda *_: None)
    assert await alone.ask("x") == Answers({}, [])
    await alone.watch(1.0)


async def test_a_hub_that_does_not_listen_yet_is_not_asked(tmp_path: Path) -> None:
    async with stores(tmp_path, 1) as [store]:
        asking = await Group(A, member("2", "b", url="")).peer(store, "1", {})
        assert await asking.ask("x") == Answers({}, [])


async def test_a_silent_hub_is_missing(tmp_path: Path) -> None:
    group = Group(A, B, C)
    async with stores(tmp_path, 2) as (one, two):
        asking = await group.peer(one, "1", {})
        await group.peer(two, "2", {"x": lambda _: 7})
        # The third one is not there.
        answers = await asking.ask("x", patience=0.1)
        assert "c" in answers.missing
        assert "c" not in answers.found


async def test_a_hub_that_was_silent_is_waited_for_only_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it answers: it may have been held up, and not have been killed."""
    group = Group(A, B, C)
    async with stores(tmp_path, 3) as (one, two, three):
        asking = await group.peer(one, "1", {}, patience=0.01)
        assert await asking.ask("x") == Answers({}, ["b", "c"])  # not there yet
        monkeypatch.setattr(asking, "_patience", RARELY)
        assert await asking.ask("x") == Answers({}, ["b", "c"])
        await group.peer(two, "2", {"x": lambda _: 7})
        while "b" in (await asking.ask("x")).missing:
            pass  # its answer came later, so the next question waits for it
        assert await asking.ask("x") == Answers({"b": 7}, ["c"])
        await group.peer(three, "3", {"x": lambda _: 8})
        while (await asking.ask("x")).missing:
            pass
        assert await asking.ask("x") == Answers({"b": 7, "c": 8}, [])


async def test_what_takes_long_is_waited_for_after_a_silence(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def later(_: object) -> int:
        await go.wait()
        return 7

    group = Group(A, B)
    async with stores(tmp_path, 2) as (one, two):
        asking = await group.peer(one, "1", {}, patience=0.01)
        assert await asking.ask("x") == Answers({}, ["b"])  # not there yet
        await group.peer(two, "2", {"reload": later})
        reload = asyncio.create_task(asking.ask("reload", patience=RARELY))
        assert await asking.ask("x", patience=RARELY) == Answers({}, ["b"])  # refused
        assert not reload.done()
        go.set()
        assert await reload == Answers({"b": 7}, [])


@pytest.mark.parametrize("what", ["fails", "unknown", "long"])
async def test_a_hub_that_cannot_answer_is_missing_at_once(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise OSError("broken")

    noise = os.urandom(MOST_SENT).hex()
    group = Group(A, B)
    async with stores(tmp_path, 2) as (one, two):
        asking = await group.peer(one, "1", {})
        await group.peer(two, "2", {"fails": fail, "long": lambda _: noise})
        assert await asking.ask(what) == Answers({}, ["b"])
    expected = {"fails": "'fails' of another", "long": "too long", "unknown": ""}
    assert expected[what] in caplog.text


async def test_long_answers_are_compressed(tmp_path: Path) -> None:
    group = Group(A, B)
    rows = [{"name": f"worker-{number}"} for number in range(5000)]
    async with stores(tmp_path, 2) as (one, two):
        sizes = []
        asking = await group.peer(one, "1", {})
        await one.listen(one.key("peers:1"), lambda data: sizes.append(len(data)))
        await group.peer(two, "2", {"x": lambda _: rows})
        assert (await asking.ask("x")).found == {"b": rows}
        assert sizes[0] < len(json.dumps(rows)) / 5


async def test_only_the_processes_of_a_group_are_asked(tmp_path: Path) -> None:
    group = Group(
        member("1", "box", "g", 11),
        member("2", "box", "g", 12),
        member("3", "c", "other"),
    )
    async with stores(tmp_path, 3) as (one, two, three):
        asking = await group.peer(one, "1", {})
        for store, run in ((two, "2"), (three, "3")):
            await group.peer(store, run, {"x": lambda _: 7})
        assert await asking.ask("x", group=True) == Answers({"box/12": 7}, [])
        assert asking.name == "box/11"


async def test_hubs_of_one_name_are_distinguished(tmp_path: Path) -> None:
    same = [
        member("1", "box"),
        member("2", "box"),
        member("3", "box", pid=7),
        member("4", "c"),
    ]
    group = Group(*same)
    async with stores(tmp_path, 1) as [store]:
        names = [(await group.peer(store, hub.run, {})).name for hub in same]
        assert names == ["box/1", "box/2", "box/7", "c"]


async def test_without_a_store_all_are_missing_at_once(tmp_path: Path) -> None:
    group = Group(A, B)
    async with running_store(tmp_path) as server, connected(server.url) as store:
        asking = await group.peer(store, "1", {})
        await server.kill()
        await is_down(store)
        assert await asking.ask("x") == Answers({}, ["b"])
        assert asking.store["mode"] != "up"
        await asking.stop()


async def test_garbage_and_late_answers_are_ignored(tmp_path: Path) -> None:
    group = Group(A, B)
    async with stores(tmp_path, 2) as (one, two):
        asking = await group.peer(one, "1", {})
        await group.peer(two, "2", {"x": lambda _: 7})
        for junk in (
            *(b"", b"\xff", b"{}", b"x\x9c", b'{"v":9}', b"[" * 50_000),
            b'{"v":1,"hub":"2","number":12345,"value":1}',
            b'{"v":1,"hub":"9","number":0,"value":[]}',
        ):
            for channel in ("peers", "peers:1", "peers:2"):
                await two.publish(two.key(channel), junk)
        assert await asking.ask("x") == Answers({"b": 7}, [])
        assert group.news == {"1": [], "2": []}


def test_a_bomb_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    monkeypatch.setattr(peers, "MOST_READ", 1000)
    assert inflate(zlib.compress(b"{" + b" " * 10_000)) == b""
    assert inflate(zlib.compress(b"{}")) == b"{}"
    assert inflate(b"{}") == b"{}"


async def test_events_are_sent_while_they_are_followed(tmp_path: Path) -> None:
    group, clock = Group(A, B), Clock()
    async with stores(tmp_path, 2) as (one, two):
        following = await group.peer(one, "1", {})
        other = await group.peer(two, "2", {}, clock)
        assert not other.watched
        await following.watch(5.0)
        await until(lambda: other.watched)
        assert not following.watched
        await other.send_news([("exchange", {"id": "1"})])
        await until(lambda: group.news["1"])
        assert group.news["1"] == [("b", [["exchange", {"id": "1"}]])]
        clock.now += 6
        assert not other.watched
        await other.send_news([("exchange", {"id": "2"})])
        assert len(group.news["1"]) == 1


async def test_events_of_another_version_harm_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group = Group(A, B)

    def fail(hub: str, events: Any) -> None:
        raise KeyError("workers")

    async with stores(tmp_path, 2) as (one, two):
        following = Peers(one, group.seen_by("1"), {}, fail, RARELY)
        await following.start()
        other = await group.peer(two, "2", {"x": lambda _: 7})
        await following.watch(5.0)
        await until(lambda: other.watched)
        await other.send_news([("sample", {})])
        await until(lambda: "events of another hub are lost" in caplog.text)
        assert await following.ask("x") == Answers({"b": 7}, [])
