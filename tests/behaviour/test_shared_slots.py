"""Several hubs use the slots of the same workers, and never more than there are."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.scheduling import sharing
from gollama_proxy.scheduling.sharing import Sharing
from gollama_proxy.state import slots
from tests.fakes.answers import CONTROL
from tests.fakes.asks import CHAT
from tests.fakes.client import Response
from tests.fakes.exchange import Request
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.script import Script, answer, wait
from tests.fakes.valkey import StoreServer, running_store
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let leases last for long, so that a busy machine changes nothing."""
    lasting(monkeypatch, DEADLINE)


def lasting(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in slots, sharing:
        monkeypatch.setattr(module, "LIFETIME", seconds)


class CountingWorker(ScriptedWorker):
    """Answers when the test lets it, and knows how many requests run on it."""

    def __init__(self, slots: int = 4) -> None:
        super().__init__(slots=slots)
        self.running = self.most = 0
        self._finished = asyncio.Semaphore(0)

    def answer(self, request: Request) -> Script:
        if request.path in CONTROL:
            return super().answer(request)
        self.running += 1
        self.most = max(self.most, self.running)
        return (wait(self._finished), *answer({"choices": []}))

    def finish(self, number: int = 1) -> None:
        """Answer so many of the requests that run."""
        for _ in range(min(number, self.running)):
            self.running -= 1
            self._finished.release()

    async def busy(self, number: int) -> None:
        """Wait until so many requests run."""
        await until(lambda: self.running == number, f"{number} running on {self!r}")


def shared(hub: RunningHub) -> Sharing:
    assert hub.hub.cluster is not None
    return hub.hub.cluster.sharing


@asynccontextmanager
async def hubs(
    number: int, store: StoreServer, *workers: ScriptedWorker, **settings: Any
) -> AsyncIterator[list[RunningHub]]:
    async with AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(
                running_hub(*workers, state__url=store.url, **settings)
            )
            for _ in range(number)
        ]
        await until(lambda: not any(shared(each).alone for each in running))
        yield running


def chat(hub: RunningHub, subject: str = "alice") -> asyncio.Task[Response]:
    ask = {"messages": [{"role": "user", "content": "hello"}]}
    posted = hub.post(CHAT, ask, hub.token(subject))
    return asyncio.create_task(posted, name=f"fake client {subject}")


async def all_good(clients: Sequence[asyncio.Task[Response]]) -> None:
    assert Counter(each.status for each in await asyncio.gather(*clients)) == {
        200: len(clients)
    }


async def test_two_hubs_never_use_more_slots_than_there_are(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as store,
        CountingWorker(slots=4) as worker,
        hubs(2, store, worker) as both,
    ):
        clients = [chat(hub) for hub in both for _ in range(20)]
        for _ in clients:
            await until(lambda: worker.running > 0)
            worker.finish()
        await all_good(clients)
        assert worker.most <= 4
