"""Simulated llama-servers: slots, two speeds, a prompt cache, and no sockets.

A machine reads prompts and writes answers.  All prompts share its reading speed.  Of n
answers each is written at `writes / (1 + sharing * (n - 1))`: a large card notices
others little (`sharing` near 0), a processor divides its speed (near 1).  While a
prompt is read, llama-server writes one token for each batch of it, so answers come
slowly.

Each slot keeps the state of its last conversation, and `kept` more are kept in memory
(llama-server's `--cache-ram`); the least recently used one is evicted first.  Of any
other conversation only the common system prompt is there.  Requests beyond the slots
wait in the machine, first come, first served.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gollama_proxy.config.settings import Health, Origin, WorkerConfig
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.wire.answer import Prefill
from gollama_proxy.wire.description import Check, Description, Model

MODEL = "simulated"
BYTES_PER_TOKEN = 4
WHILE_READING = 0.2  # of the writing speed


@dataclass(frozen=True)
class Kind:
    """A kind of machine; speeds in tokens/s."""

    name: str
    slots: int
    reads: float
    writes: float  # of a single answer
    sharing: float
    kept: int  # states of conversations, beside those in the slots
    weight: float  # as its owner would declare it

    def seconds(self, prompt: float, answer: float) -> float:
        """Return the seconds of work that a request takes when all slots are busy."""
        each = self.writes / (1 + self.sharing * (self.slots - 1))
        return prompt / self.reads + answer / (each * self.slots)


@dataclass(eq=False)
class Request:
    """One request, and what became of it; times in seconds, lengths in tokens."""

    conversation: int
    turn: int  # from 1
    turns: int
    subject: str
    system: int  # tokens of the prompt that many others share
    prompt: int
    answer: int
    arrived: float = 0.0
    first_token: float = math.nan  # since it arrived
    cached: int = 0
    ended: float = math.inf
    began: float = 0.0
    lease: Lease | None = field(default=None, repr=False)


class Machine:
    """One simulated llama-server, and the hub's record of it."""

    def __init__(self, kind: Kind, index: int, clock: Callable[[], float]) -> None:
        self.kind = kind
        self.version = 0  # of what happens next
        self._busy = 0.0  # slots times seconds
        self._clock = clock
        self._moved_at = 0.0
        self._states: OrderedDict[int, int] = OrderedDict()
        self._line: deque[Request] = deque()
        self._reading = _Share()
        self._writing = _Share()
        origin = Origin("http", "127.0.0.1", index, "")
        config = WorkerConfig("", origin, f"{kind.name}-{index}", weight=kind.weight)
        self.worker = Worker(config, Health(), clock, index)
        description = Description((Model(MODEL),), slots=kind.slots)
        self.worker.observe(Check.OK, "ok", description)

    def __repr__(self) -> str:
        return f"<Machine {self.worker.name} {self._reading!r} {self._writing!r}>"

    def taken(self) -> float:
        """Return the average share of its slots that were taken so far."""
        self._move()
        return self._busy / self.kind.slots / self._clock()

    # --- Called by the hub --------------------------------------------------------

    def begin(self, request: Request) -> None:
        """Put a request into a slot, or let it wait for one."""
        self._move()
        request.lease = lease = self.worker.lease(MODEL)
        lease.prompt_bytes = request.prompt * BYTES_PER_TOKEN
        request.began = self._clock()
        self._line.append(request)
        self._fill()

    # --- The passing of time --------------------------------------------------

    def next_at(self) -> float:
        """Return the time of the next event, if no request arrives before."""
        reading, writing = self._reading.left(), self._writing.left()
        read_rate, write_rate = self._rates()
        soonest = min(reading / read_rate, writing / write_rate)
        return self._moved_at + soonest

    def step(self) -> Request | None:
        """Carry out what is due; return the request that was completed, if any."""
        self._move()
        begun = self._reading.pop()
        if begun is not None:
            assert begun.lease
            now = self._clock()
            begun.first_token = now - begun.arrived
            begun.lease.first_token = now - begun.began
            begun.lease.prefill = Prefill(
                begun.prompt - begun.cached, begun.cached, begun.lease.first_token
            )
            self._writing.add(begun.answer, begun)
        ended = self._writing.pop()
        if ended is not None:
            lease = ended.lease
            assert lease
            ended.ended = self._clock()
            lease.tokens = ended.answer
            lease.seconds = self._clock() - ended.began - lease.first_token
            lease.release(Result.COMPLETE)
            self._states[ended.conversation] = ended.prompt + ended.answer
            self._evict()
            self._fill()
        return ended

    def _fill(self) -> None:
        while self._line and self._running < self.kind.slots:
            request = self._line.popleft()
            request.cached = self._find(request)
            self._reading.add(request.prompt - request.cached, request)

    @property
    def _running(self) -> int:
        return len(self._reading) + len(self._writing)

    def _move(self) -> None:
        elapsed = self._clock() - self._moved_at
        read_rate, write_rate = self._rates()
        self._reading.move(elapsed * read_rate)
        self._writing.move(elapsed * write_rate)
        self._busy += elapsed * self._running
        self._moved_at += elapsed

    def _rates(self) -> tuple[float, float]:
        kind, reading, writing = self.kind, len(self._reading), len(self._writing)
        writes = kind.writes / (1 + kind.sharing * max(writing - 1, 0))
        slowed = WHILE_READING if reading else 1.0
        return kind.reads / max(reading, 1), writes * slowed

    def _find(self, request: Request) -> int:
        """Take the state that a request can continue from; return its tokens."""
        if request.conversation in self._states:
            state = self._states.pop(request.conversation)
            self._evict()
            return min(state, request.prompt - 1)
        found = request.system if self._states else 0
        self._evict()
        return found

    def _evict(self) -> None:
        room = self.kind.slots + self.kind.kept - self._running
        while len(self._states) > room:
            self._states.popitem(last=False)


class _Share:
    """Requests that progress at the same rate; `done` is how far one would be by now.

    A request that joins is ready when `done` has grown by its own amount, so only the
    next one has to be looked at.
    """

    def __init__(self) -> None:
        self._done = 0.0
        self._heap: list[tuple[float, int, Request]] = []
        self._count = 0

    def __repr__(self) -> str:
        return f"{len(self)} at {self._done:.0f}"

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, amount: float, request: Request) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self._done + amount, self._count, request))

    def left(self) -> float:
        return self._heap[0][0] - self._done if self._heap else math.inf

    def move(self, amount: float) -> None:
        self._done += amount

    def pop(self) -> Request | None:
        if self._heap and self._heap[0][0] - self._done < 1e-6:
            return heapq.heappop(self._heap)[2]
        return None
