"""Whatever workers do, an answer is complete and correct, or ends with an error.

Each seed is a pool of workers, a row of tasks and a schedule of faults.  Time decides
only what cannot be seen from outside, so a seed that fails is likely to fail again:

    pytest tests/behaviour/test_fault_schedules.py -k 'schedule and 31'
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from gollama_proxy.config.settings import STREAMED, Rescue
from gollama_proxy.fleet.worker import Worker
from tests.fakes.books import Books
from tests.fakes.faults import Fault, Faults
from tests.fakes.generation import Task
from tests.fakes.hub import RunningHub, running_hub, shown
from tests.fakes.replies import MODEL
from tests.fakes.traffic import Visitor, random_leave, random_task
from tests.fakes.verdict import Verdict
from tests.fakes.waiting import until

pytestmark = pytest.mark.usefixtures("frequent_rounds")

SEEDS = range(24, 32)  # which draw every fault there is
TASKS = 40  # of each seed
VISITORS = 8  # at once
# Executions that an answer may cause beyond its attempts, to go on after it broke.
RESCUES = Rescue().attempts

# So short that what stalls is soon over, and so long that little else is taken for it.
TIMEOUTS: dict[str, Any] = {
    "timeouts__gap": 0.1,
    "timeouts__allowance": 0.1,
    "timeouts__first_token": 0.4,
    "timeouts__silence": 0.4,
    "timeouts__connect": 0.5,
    "health__interval": 0.05,
    "health__recheck": 0.02,
    "retry__patience": 0.2,
    "breaker__busy_max": 0.05,
}
# What a breaker may be like: in the way all the time, or never.
BREAKERS: list[dict[str, Any]] = [
    {"breaker__open": 0.02, "breaker__open_max": 0.1, "breaker__ramp": 0.1},
    {"breaker__open": 0.02, "breaker__open_max": 0.05, "breaker__consecutive": 2},
    {"breaker__consecutive": 1000, "breaker__minimum_calls": 10_000},
]
# A budget for every retry, or one that is spent soon.
BUDGETS: list[dict[str, Any]] = [
    {"retry__ratio": 1, "retry__floor": 1000},
    {"retry__ratio": 0.2, "retry__floor": 3},
]


class Plan(NamedTuple):
    """What a seed stands for."""

    contexts: list[int]  # of each worker
    settings: dict[str, Any]
    rate: float

    @property
    def attempts(self) -> int:
        return int(self.settings["retry__attempts"])

    @classmethod
    def of(cls, seed: int) -> Plan:
        rng = random.Random(seed)
        settings = TIMEOUTS | rng.choice(BREAKERS) | rng.choice(BUDGETS)
        settings["upstream__assemble"] = STREAMED if rng.random() < 0.7 else ()
        settings["rescue__enabled"] = rng.random() < 0.8
        if rng.random() < 0.3:
            settings["limits__replay_window"] = 4096
        contexts = [rng.choice([1024, 4096]) for _ in range(rng.randint(2, 4))]
        rate = rng.choice([0.1, 0.2, 0.3, 0.5])
        settings["retry__attempts"] = rng.choice([2, 3])
        return cls(contexts, settings, rate)


class Run:
    """One seed at work, and what came of it."""

    def __init__(self, hub: RunningHub, faults: Faults, books: Books) -> None:
        self.hub = hub
        self.faults = faults
        self.books = books
        self.verdicts: dict[int, Verdict] = {}

    def __repr__(self) -> str:
        return f"<Run of {self.faults!r}, {len(self.verdicts)} tasks ended>"

    @property
    def workers(self) -> list[Worker]:
        return self.hub.hub.registry.workers

    async def have_done(self, tasks: list[Task], rng: random.Random) -> None:
        waiting = iter([(task, random_leave(rng, task)) for task in tasks])

        async def visit_all(name: int) -> None:
            habits = random.Random(f"{self.faults.seed} {name}")
            visitor = Visitor(self.hub.port, self.hub.token(), self.faults, habits)
            with contextlib.closing(visitor):
                for task, leave in waiting:
                    self.verdicts[task.key] = await visitor.visit(task, leave)

        async with asyncio.TaskGroup() as group:
            for name in range(VISITORS):
                group.create_task(visit_all(name))
        await until(lambda: self.books.count == len(self.verdicts))


@contextlib.asynccontextmanager
async def running(seed: int, plan: Plan) -> AsyncIterator[Run]:
    faults = Faults(seed, plan.rate)
    async with (
        faults.workers(plan.contexts) as workers,
        running_hub(*workers, **plan.settings) as hub,
    ):
        with Books() as books:
            yield Run(hub, faults, books)


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_fault_schedule_leads_to_a_dishonest_answer(seed: int) -> None:
    rng = random.Random(f"tasks of {seed}")
    tasks = [random_task(rng, 1000 + number) for number in range(TASKS)]
    plan = Plan.of(seed)
    async with running(seed, plan) as run:
        await run.have_done(tasks, rng)
        check_books(run, tasks)
        check_executions(run, tasks, plan.attempts)
        await check_nothing_is_held(run)
        await check_recovery(run)


# --- What is checked --------------------------------------------------------------

# What a request may be called in the access log, by what its client has seen.
CALLED = {
    Verdict.COMPLETE: {"complete"},
    Verdict.REFUSED: {"error", "refused"},
    Verdict.BROKEN: {"error"},
    Verdict.LEFT: {"client_gone", "complete", "error", "refused"},
}


def check_books(run: Run, tasks: list[Task]) -> None:
    """Every request ends in exactly one outcome, which is the one its client saw."""
    assert set(run.verdicts) == {task.key for task in tasks}
    for key, verdict in run.verdicts.items():
        [record] = run.books.records[f"task-{key}"]
        assert record["outcome"] in CALLED[verdict], (key, verdict, record)
    assert len(run.books.records) == run.books.count == len(tasks)
    assert metric(run, "gollama_requests_total") == len(tasks)
    assert metric(run, "gollama_outcomes_total") == len(tasks)


def metric(run: Run, name: str) -> float:
    """Add up all series of a metric."""
    lines = "".join(run.hub.hub.telemetry.pieces()).splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")
    )


def check_executions(run: Run, tasks: list[Task], attempts: int) -> None:
    """A stream that was refused has not begun anywhere, so nothing went on."""
    for task in tasks:
        refused = task.stream and run.verdicts[task.key] is Verdict.REFUSED
        most = attempts if refused else attempts + RESCUES
        assert run.faults.executions[task.key] <= most, task


async def check_nothing_is_held(run: Run) -> None:
    """No lease, answer, canary or permit is left while the hub keeps running."""
    hub = run.hub.hub
    await until(lambda: not any(worker.in_flight for worker in run.workers))
    await until(lambda: not run.faults.running)
    await until(lambda: shown(hub.proxy, "running") == 0)
    await until(lambda: shown(hub.watchdog, "canaries") == 0)
    for worker in run.workers:
        for breaker in (worker.breaker, *worker.model_breakers.values()):
            assert not breaker._permit_out, breaker


async def check_recovery(run: Run) -> None:
    """Where nothing fails any more, the hub is soon as good as new."""
    run.faults.heal()
    for worker in run.workers:
        await until(functools.partial(worker.can_serve, MODEL))
    tasks = [Task(key, words=9, chat=key % 2 == 0) for key in range(20)]
    async with contextlib.AsyncExitStack() as stack:
        visitor = Visitor(run.hub.port, run.hub.token(), run.faults, random.Random(0))
        stack.callback(visitor.close)
        for task in tasks:
            assert await visitor.visit(task) is Verdict.COMPLETE


# --- The schedules themselves -----------------------------------------------------


def test_the_seeds_cover_every_fault_and_outcome() -> None:
    faults, leaves, kinds = set(), set(), set()
    for seed in SEEDS:
        rng = random.Random(f"tasks of {seed}")
        schedule = Faults(seed, Plan.of(seed).rate)
        for task in [random_task(rng, 1000 + number) for number in range(TASKS)]:
            leaves.add(type(random_leave(rng, task)))
            kinds.add((task.chat, task.stream, task.usage, task.limit is None))
            faults.add(schedule.fault_of(task.key, 1))
    assert faults == {None, *Fault}
    assert leaves == {type(None), str, int}
    assert len(kinds) == 12
