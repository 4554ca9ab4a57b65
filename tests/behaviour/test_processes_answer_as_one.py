"""Whichever process of a group answers, operators and Prometheus see the whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.behaviour.test_processes import Group, running
from tests.control.test_admin import ADMIN, endless
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.client import Response
from tests.fakes.hub import mint
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker


class Operator:
    """Asks whichever process accepts the connection, until the answer is as expected.

    A process that is busy does not answer the others in time, so it may be missing for
    a moment.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    async def ask(self, path: str, method: str = "GET", body: Any = None) -> Response:
        token = mint(sub="root", **ADMIN)
        async with await self.group.connect() as wire:
            if body is None:
                await wire.get(path, token, method=method)
            else:
                await wire.post(path, body, token)
            return await wire.read_response()

    async def exchanges(self) -> list[Any]:
        answer = await self.ask("/admin/exchanges")
        found: list[Any] = answer.json()["exchanges"]
        return found

    async def sees(self, count: int) -> None:
        """Wait until so many requests run, whichever process answers."""
        async with asyncio.timeout(DEADLINE):
            while len(await self.exchanges()) != count:
                await asyncio.sleep(0.01)

    async def cancels(self, identity: str) -> None:
        async with asyncio.timeout(DEADLINE):
            path = f"/admin/exchanges/{identity}"
            while (await self.ask(path, "DELETE")).status != 200:
                await asyncio.sleep(0.01)

    async def counts(self, expected: float, metric: str, **labels: str) -> None:
        """Wait until the sum of the series with these labels is as expected."""
        async with asyncio.timeout(DEADLINE):
            while await self._sum(metric, labels) != expected:
                await asyncio.sleep(0.01)

    async def _sum(self, metric: str, labels: dict[str, str]) -> float:
        page = (await self.ask("/metrics")).body.decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        )


@contextlib.asynccontextmanager
async def streams(operator: Operator) -> AsyncIterator[list[str]]:
    """Have a stream on both processes; yields the ids of all."""
    identities: list[str] = []
    hubs: set[str] = set()
    async with contextlib.AsyncExitStack() as stack:
        while len(hubs) < 2:
            assert len(identities) < 150, "one process gets all connections"
            identities.append(f"stream-{len(identities)}")
            wire = await stack.enter_async_context(await operator.group.connect())
            headers = [("X-Request-Id", identities[-1])]
            await wire.post(CHAT, STREAM, mint(sub="bob"), headers=headers)
            await wire.read_event()
            hubs |= {each["hub"] for each in await operator.exchanges()}
        yield identities


async def test_any_process_answers_for_all(tmp_path: Path) -> None:
    async with (
        ScriptedWorker(slots=200) as worker,
        running(tmp_path, worker.url) as group,
    ):
        endless(worker)
        operator = Operator(group)
        async with streams(operator) as identities:
            count = len(identities)
            for _ in range(4):
                await operator.sees(count)
                await operator.counts(count, "gollama_in_flight")
            for identity in identities:
                await operator.cancels(identity)
            await operator.sees(0)
        cancelled = {"outcome": "request_cancelled"}
        await operator.counts(count, "gollama_outcomes_total", **cancelled)
        # What a process has counted stays when it ends.
        group.hubs()[2].kill()
        await group.program.until(r"started process 2, (.*\n)+.*started process 2, ")
        for _ in range(4):
            await operator.counts(count, "gollama_outcomes_total", **cancelled)


async def test_a_link_and_a_reload_hold_for_all_processes(tmp_path: Path) -> None:
    async with running(tmp_path) as group:
        operator = Operator(group)
        await operator.counts(2, "gollama_hubs")
        link = (await operator.ask("/admin/links", "POST")).json()
        code = {"code": link["code"]}
        answer = await operator.ask("/dashboard/sign-in", "POST", code)
        assert answer.status == 200
        (tmp_path / "gollama.toml").write_text("[queue]\nsize = 7\n")
        assert (await operator.ask("/admin/reload", "POST")).status == 200
        await operator.counts(14, "gollama_queue_limit")
