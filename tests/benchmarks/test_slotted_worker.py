"""A scripted llama-server over a socket, asked by the benchmark's own clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.chat import Exchange
from benchmarks.clients import connect
from benchmarks.engine import Pace
from benchmarks.llama_wire import WORD, pages
from benchmarks.slotted_worker import Connection, Server, Spec
from tests.fakes.waiting import DEADLINE

SPEC = Spec(Pace(0.002, 0.0, 0.00001), slots=1, kept=0, token=3.0)


@asynccontextmanager
async def worker() -> AsyncIterator[tuple[Server, int]]:
    server, answers = Server(SPEC), pages(SPEC.slots)
    listening = await asyncio.get_running_loop().create_server(
        lambda: Connection(server, answers), "127.0.0.1", 0
    )
    try:
        yield server, listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        await listening.wait_closed()


def ask(port: int, messages: list[dict[str, str]], tokens: int = 5) -> Exchange:
    return Exchange(port, "none", messages, tokens)


async def test_a_conversation_finds_its_first_turn() -> None:
    said = [{"role": "user", "content": "bo ke " * 50}]
    async with worker() as (_, port):
        first = ask(port, said)
        await connect(first, port)
        assert (first.flaw, first.answer) == ("", WORD * 5)
        said.append({"role": "assistant", "content": first.answer})
        said.append({"role": "user", "content": "more"})
        second = Exchange(port, "none", said, 5, first)
        await connect(second, port)
    assert first.timings
    assert second.timings
    assert first.timings.cache_n == 0
    assert second.timings.predicted_n == 5
    # All but a token at the cut, where characters are not tokens.
    assert abs(second.timings.cache_n - second.repeats) <= 1


async def test_a_waiting_client_gets_no_byte_until_a_slot_is_free() -> None:
    said = [{"role": "user", "content": "bo ke"}]
    async with worker() as (server, port):
        first, second = ask(port, said, tokens=20), ask(port, said)
        await asyncio.gather(connect(first, port), connect(second, port))
        assert repr(server) == "<Server <Engine 0 running, 0 waiting>>"
    assert first.flaw == second.flaw == ""
    assert second.arrivals[0] > first.arrivals[-2]


async def test_a_client_that_leaves_gives_its_slot_back() -> None:
    said = [{"role": "user", "content": "bo ke"}]
    async with worker() as (_, port):
        long, waits, last = ask(port, said, 50_000), ask(port, said), ask(port, said)
        tasks = [
            asyncio.ensure_future(connect(each, port)) for each in (long, waits, last)
        ]
        await asyncio.wait_for(long.started, DEADLINE)
        waits.give_up()
        long.give_up()
        _, late = await asyncio.wait(tasks, timeout=DEADLINE)
        last.give_up()  # should it still be waiting
        assert not late
    assert (long.flaw, waits.flaw) == ("no end in sight", "no end in sight")
    assert last.flaw == ""
