"""Hundreds of requests with faults leave nothing in the hub: no file, task or object.

`make soak` is the same with twenty thousand, in a separate process, and its memory.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import Any

import psutil
import pytest

from gollama_proxy.config.settings import STREAMED
from tests.fakes.faults import Faults
from tests.fakes.hub import RunningHub, running_hub, shown
from tests.fakes.replies import MODEL
from tests.fakes.visitors import Visitors
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker
from tests.soak import EXECUTIONS, RATE, SETTINGS

pytestmark = pytest.mark.usefixtures("frequent_rounds")

REQUESTS = 600
LONG = 60.0  # seconds: to take stock takes long where other tests have the machine
WARM_UP = 200
# Less than one for each request: only the series of the metrics become more.
OBJECTS = 800
# What the hub learns is bounded by its workers, their models and its parallel answers.
LEARNT = {"Breaker", "SlidingWindow", "_Baseline"}
# Of metrics and of lines of the log.
SERIES = ("Histogram", "_Count", "_Counts", "_Group", "_Series", "_Tokens", "_Usage")
QUICK: dict[str, Any] = {
    **SETTINGS,
    "timeouts__gap": 0.1,
    "timeouts__allowance": 0.1,
    "timeouts__first_token": 0.4,
    "timeouts__silence": 0.4,
    "server__keepalive": 5,  # what is only kept is released by the deadline
    "rescue__enabled": True,
    "upstream__assemble": STREAMED,
    "routing__policy": "round_robin",  # others remember conversations, up to a number
    "health__interval": 3600,  # no ping is under way when stock is taken
}


class Inventory:
    """The files, tasks and objects of this process at one moment."""

    def __init__(self) -> None:
        gc.collect()
        objects = gc.get_objects()
        kinds = (type(obj) for obj in objects)
        self.ours = Counter(
            kind.__name__
            for kind in kinds
            if "gollama_proxy" in str(kind.__module__) and kind.__name__ not in LEARNT
        )
        self.objects = len(objects)
        self.files = psutil.Process().num_fds()
        self.tasks = sorted(task.get_name() for task in asyncio.all_tasks())

    def __repr__(self) -> str:
        return f"<Inventory {self.objects} objects, {self.files} files, {self.tasks}>"


async def stock_of_rest(
    hub: RunningHub, faults: Faults, workers: list[ScriptedWorker]
) -> Inventory:
    """Wait until nothing runs and idle connections are closed; list what is left."""
    inside = hub.hub
    known = inside.registry.workers
    await until(lambda: not faults.running)
    await until(lambda: not any(worker.in_flight for worker in known))
    for worker in workers:
        await worker.down()
        await worker.up()
        worker.requests.clear()
        worker.control.clear()
    for connections in inside.connections.values():
        connections.close()
    await until(lambda: all(worker.can_serve(MODEL) for worker in known))
    await until(lambda: not any(worker.open for worker in workers))
    await until(lambda: repr(inside.proxy) == "<Proxy running=0>")
    await until(lambda: repr(inside.watchdog) == "<Watchdog canaries=0>")
    held = {"Connection", "_Protocol"}
    await until(lambda: not (Inventory().ours.keys() & held), timeout=LONG)
    # The task of a connection whose client has just left may not have ended yet.
    # Nor may the usage of the last second have been saved.
    await until(
        lambda: (
            not any(
                task.cancelling() or task.get_name() == "saving of usage"
                for task in asyncio.all_tasks()
            )
        )
    )
    return Inventory()


@pytest.mark.timeout(4 * LONG)
async def test_hundreds_of_requests_leave_nothing_behind() -> None:
    faults = Faults("soak", RATE)
    async with faults.workers() as workers, running_hub(*workers, **QUICK) as hub:
        clients = Visitors(hub.port, faults, seed=1, visitors=16)
        await clients.send(WARM_UP)
        before = await stock_of_rest(hub, faults, workers)
        kept = shown(hub.hub.recent, "requests")
        await clients.send(REQUESTS)
        await stock_of_rest(hub, faults, workers)
        after = Inventory()
        assert not clients.flaws
        # What is learnt, and pings, come and go; a leak would be of each request.
        grown = after.ours - before.ours
        # Of combinations of labels that had not been seen yet.
        series = [grown.pop(each, 0) for each in SERIES]
        assert sum(series) < REQUESTS // 3, series
        steps = grown.pop("Step", 0)  # kept with the recent requests
        assert grown.total() < REQUESTS // 100, grown
        assert after.tasks == before.tasks
        assert after.files <= before.files
        kept = shown(hub.hub.recent, "requests") - kept  # up to a number
        assert steps < kept * EXECUTIONS
        # Each of these requests may have a list of steps, too.
        assert after.objects - 2 * kept - steps < before.objects + OBJECTS
        assert max(faults.executions.values()) <= EXECUTIONS
