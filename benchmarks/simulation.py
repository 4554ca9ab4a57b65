"""A run of one policy in simulated time, and its result."""

from __future__ import annotations

import gc
import heapq
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from statistics import quantiles

import msgspec

from benchmarks.machines import MODEL, Kind, Machine, Request
from benchmarks.workload import (
    ANSWER,
    FIRST_TOKENS,
    SYSTEM,
    ask_of,
    next_turn,
    workload,
)
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.affinity import Affinity
from gollama_proxy.scheduling.policies import Ask, Fits, Policy

WARM_UP = 0.2  # of the requests: not counted, as the workers are still unknown
PICKS = 4000  # to measure, and how many times
ROUNDS = 5
ASKED = 64  # requests at the head of the queue that are offered a free slot

Clock = Callable[[], float]
Maker = Callable[[Clock, random.Random], Policy]


class LeastConnections(Policy):
    """nginx's least_conn: the fewest open connections, in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        self._turn += 1
        first = self._turn % len(workers)
        return min(chain(workers[first:], workers[:first]), key=_in_flight)


class Patient(Affinity):
    """Affinity for requests that can all wait for their worker."""

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        return super().pick(
            msgspec.structs.replace(ask, patience=math.inf), workers, fits
        )


# --- The run ----------------------------------------------------------------------


@dataclass
class Run:
    """One policy at work.

    Events are `(when, order, machine or None, its version, request or None)`: something
    happens on a machine, or a request arrives.
    """

    make: Maker
    kinds: list[Kind]
    seed: int
    now: float = 0.0
    requests: list[Request] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  # when no more clients come

    def __post_init__(self) -> None:
        self.policy = self.make(lambda: self.now, random.Random(self.seed))
        self.machines = [
            Machine(kind, index, lambda: self.now)
            for index, kind in enumerate(self.kinds)
        ]
        self.workers = tuple(machine.worker for machine in self.machines)
        self._events: list[tuple[float, int, Machine | None, int, Request | None]] = []
        self._order = 0
        self._free = sum(kind.slots for kind in self.kinds)
        self._blind = isinstance(self.policy, LeastConnections)
        self._patient = isinstance(self.policy, Patient)
        self._line: deque[Request] = deque()

    def go(
        self, arrivals: Iterator[Request], clients: int = 0, most: float = math.inf
    ) -> None:
        """Serve all requests, as they arrive or from a number of clients in a loop.

        It stops early when `most` requests have arrived.
        """
        self._arrivals, self._closed = arrivals, clients > 0
        for _ in range(clients or 1):
            self._await_arrival()
        while self._events:
            if len(self.requests) >= most:
                return
            self.now, _, machine, version, request = heapq.heappop(self._events)
            if request is not None:
                if request.turn == 1 and not self._closed:
                    self._await_arrival()
                self._arrive(request)
            elif machine is not None and version == machine.version:
                self._step(machine)
        assert all(request.ended < math.inf for request in self.requests)

    def _await_arrival(self) -> None:
        request = next(self._arrivals, None)
        if request is not None:
            if self._closed:
                request.arrived = self.now
            self._push(request.arrived, None, request)
        elif not self.busy:
            self.busy = [machine.taken() for machine in self.machines]

    def _push(
        self, when: float, machine: Machine | None, request: Request | None
    ) -> None:
        self._order += 1
        version = machine.version if machine else 0
        heapq.heappush(self._events, (when, self._order, machine, version, request))

    def _step(self, machine: Machine) -> None:
        ended = machine.step()
        self._schedule(machine)
        if ended is not None:
            self._free += 1
            self._learn(ended, machine.worker)
            if ended.turn < ended.turns:
                request = next_turn(ended, self.now)
                self._push(request.arrived, None, request)
            elif self._closed:
                self._await_arrival()
            self._offer(machine.worker)

    def _schedule(self, machine: Machine) -> None:
        machine.version += 1  # what was planned next is cancelled
        when = machine.next_at()
        if when < math.inf:
            self._push(when, machine, None)

    def _arrive(self, request: Request) -> None:
        self.requests.append(request)
        line = self._line
        # Requests ahead of it wait for any worker, unless the policy is patient.
        if self._blind or (self._free and (not line or self._patient)):
            worker = self.policy.pick(ask_of(request), self.workers, _fits)
            if worker is not None:
                self._begin(request, worker)
                return
        line.append(request)

    def _offer(self, worker: Worker) -> None:
        """Give a free slot to the first request in the queue that accepts it."""
        for place, request in enumerate(islice(self._line, ASKED)):
            if self.policy.pick(ask_of(request), (worker,), _fits) is not None:
                del self._line[place]
                self._begin(request, worker)
                return

    def _begin(self, request: Request, worker: Worker) -> None:
        self._free -= 1
        machine = self.machines[worker.index]
        machine.begin(request)
        self._schedule(machine)

    def _learn(self, request: Request, worker: Worker) -> None:
        if isinstance(self.policy, Affinity):
            ask = ask_of(request)
            self.policy.learn(ask, worker, request.cached, request.prompt)


def _has_room(worker: Worker) -> bool:
    return worker.free > 0


def _in_flight(worker: Worker) -> int:
    return len(worker.leases)


def _fits(worker: Worker) -> bool:
    return worker.free > 0 and worker.can_serve(MODEL)


# --- What came of it --------------------------------------------------------------


@dataclass
class Result:
    """The result of a run, without its warm-up."""

    first_token: list[float]  # percentiles, seconds
    throughput: float  # tokens/s of answers
    cached: float  # part of the prompt tokens of second turns
    busy: list[float]  # part of the slots that was taken, of each machine
    pick: float  # seconds


def simulate(
    make: Maker,
    kinds: list[Kind],
    streams: int,
    load: float,
    seed: int,
    clients: int = 0,
) -> Result:
    """Let a policy serve so many requests, at a part of what the pool can bear."""
    rate = load * sum(1 / k.seconds(SYSTEM + FIRST_TOKENS, ANSWER) for k in kinds)
    run, stopped = Run(make, kinds, seed), Run(make, kinds, seed)
    gc.disable()  # nothing here is garbage
    try:
        run.go(workload(streams, rate, random.Random(seed)), clients)
        stopped.go(workload(streams, rate, random.Random(seed)), clients, streams // 8)
        pick = cost_of_a_pick(stopped)
    finally:
        gc.enable()
    count = len(run.requests)
    counted = run.requests[int(WARM_UP * count) :]
    second = [request for request in counted if request.turn == 2]
    # The middle of it, when the pool is as full as it gets.
    began, ended = counted[0].arrived, run.requests[int(0.8 * count)].arrived
    done = sum(r.answer for r in run.requests if began <= r.ended < ended)
    return Result(
        quantiles([request.first_token for request in counted], n=100),
        done / (ended - began),
        sum(r.cached for r in second) / sum(r.prompt for r in second),
        run.busy,
        pick,
    )


def cost_of_a_pick(run: Run) -> float:
    """Measure the seconds of a pick, in a run that was stopped in its middle.

    What it takes to see whether a worker fits is the caller's, and is left out as far
    as it can be.  Where all are busy, any worker will do.
    """
    asks = [ask_of(request) for request in run.requests[-PICKS:]]
    fits = _has_room if any(map(_has_room, run.workers)) else lambda worker: True
    costs = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for ask in asks:
            run.policy.pick(ask, run.workers, fits)
        costs.append((time.process_time() - began) / len(asks))
    return min(costs)
