"""A hub before real workers, of which one is stopped, and what its clients notice."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.children import BenchmarkError, until
from benchmarks.clients import Habit, Visit, connected, visiting
from benchmarks.llama import LlamaServer
from benchmarks.load import Job
from benchmarks.proxies import Hub

TOKENS = 32
PAUSE = 0.2
WARM_UP = 3.0
OUT_WITHIN = 120.0
BACK_WITHIN = 60.0
SHARE_SECONDS = 2.0
SHARES = 6
FEWEST = 20  # requests, for a 95th percentile


@dataclass(frozen=True)
class Calm:
    """The results of healthy workers in one round."""

    waits: list[float]  # seconds to the first token, of requests that were measured


@dataclass(frozen=True)
class Fault:
    """The results with a stopped worker among them, in one round."""

    waits: list[float]  # of requests that began while it was out
    asked: int  # requests in all, with those before and after
    failed: int  # without a token
    cut: int  # after some tokens
    longest: float  # seconds in which a client received nothing
    out_after: float  # seconds from the stop
    out_by: str  # "health" or "breaker"
    back_after: float  # seconds from the end of the stop
    shares: list[float]  # of the requests in each period, once it was back


# --- The two runs -----------------------------------------------------------------


class Scene:
    """The part that all rounds share; the last of the servers is the one to stop."""

    def __init__(
        self,
        servers: Sequence[LlamaServer],
        folder: Path,
        *,
        clients: int,
        seconds: float,
        allowance: float,
    ) -> None:
        self._servers = servers
        self._folder = folder
        self._clients = clients
        self._seconds = seconds
        self._allowance = allowance

    def __repr__(self) -> str:
        return f"<Scene {self._servers!r} {self._clients} clients>"

    async def calm(self, turn: int) -> Calm:
        """Measure the others alone.

        Raises:
            BenchmarkError: an answer was lost.
        """
        async with self._load(self._servers[:-1], turn) as (_, visits):
            await asyncio.sleep(WARM_UP)
            began = time.monotonic()
            await asyncio.sleep(self._seconds)
        flaws = {visit.flaw for visit in visits if visit.flaw}
        if flaws:
            raise BenchmarkError(f"healthy workers lost answers: {flaws}")
        return Calm(_waits(visits, began, began + self._seconds))

    async def fault(self, turn: int) -> Fault:
        """Stop one, measure, let it continue, and record its return."""
        victim = self._servers[-1]
        async with self._load(self._servers, turn) as (hub, visits):
            await asyncio.sleep(WARM_UP)
            with victim.stopped():
                stopped = time.monotonic()
                await until(
                    "worker taken out", lambda: _is_out(hub, victim), OUT_WITHIN
                )
                out_after = time.monotonic() - stopped
                by = "health" if await hub.breaker_closed(victim.port) else "breaker"
                # Until then, clients that wait for it are missing from the load.
                await asyncio.wait([visit.ended for visit in visits])
                began = time.monotonic()
                await asyncio.sleep(self._seconds)
            continued = time.monotonic()
            await until(
                "worker taken back", lambda: hub.sends_to(victim.port), BACK_WITHIN
            )
            back = time.monotonic()
            await asyncio.sleep(SHARES * SHARE_SECONDS)
        flawed = [visit for visit in visits if visit.flaw]
        cut = sum(visit.first is not None for visit in flawed)
        return Fault(
            waits=_waits(visits, began, began + self._seconds),
            asked=len(visits),
            failed=len(flawed) - cut,
            cut=cut,
            longest=max(visit.longest for visit in visits),
            out_after=out_after,
            out_by=by,
            back_after=back - continued,
            shares=_shares(visits, victim, back),
        )

    @contextlib.asynccontextmanager
    async def _load(
        self, workers: Sequence[LlamaServer], turn: int
    ) -> AsyncIterator[tuple[Hub, list[Visit]]]:
        """Run clients, and a new hub that has learnt nothing in earlier rounds."""
        hub = Hub([worker.port for worker in workers], self._folder)
        hub.settings["TIMEOUTS_ALLOWANCE"] = str(self._allowance)
        job = Job(hub.port, self._clients, max_tokens=TOKENS, bearers=hub.bearers)
        come = visiting(job, Habit(PAUSE, f"round {turn}"))
        async with hub.running(), connected(job.clients, come) as visits:
            yield hub, visits


async def _is_out(hub: Hub, worker: LlamaServer) -> bool:
    return not await hub.sends_to(worker.port)


# --- Evaluation -------------------------------------------------------------------


def _waits(visits: list[Visit], start: float, end: float) -> list[float]:
    firsts = [visit.first for visit in visits if start <= visit.began < end]
    waits = [first for first in firsts if first is not None]
    if len(waits) < FEWEST:
        raise BenchmarkError(f"{len(waits)} requests are too few to measure")
    return waits


def _shares(visits: list[Visit], worker: LlamaServer, start: float) -> list[float]:
    """Return the share of the requests that a worker had, period by period."""
    shares = []
    for span in range(SHARES):
        low = start + span * SHARE_SECONDS
        within = [v for v in visits if low <= v.began < low + SHARE_SECONDS]
        theirs = [float(visit.worker == worker.name) for visit in within]
        shares.append(fmean(theirs) if theirs else 0.0)
    return shares
