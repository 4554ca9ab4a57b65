"""Workers that do their tasks, or fail at them in a way that a seed decides.

    faults = Faults(seed=7, rate=0.3)
    async with faults.workers() as workers, running_hub(*workers) as hub:

What happens to the n-th time that a task comes to a worker is a function of the seed,
the task and n, whichever worker it is and whatever else is going on.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from tests.fakes import replies
from tests.fakes.answers import default_answer
from tests.fakes.generation import Order, stream_events, whole_answer
from tests.fakes.replies import chunk, last_chunk, sse_head
from tests.fakes.script import Script, Step, close, give_way, reset, send, stall
from tests.fakes.worker import ScriptedWorker

if TYPE_CHECKING:
    from tests.fakes.exchange import Exchange

OUTAGE = 0.05  # seconds for which a worker that vanishes refuses connections
# Part of the chunks that have a ping before them, or that are not as llama-server makes
# them: an event in two.
_ODD_CHUNKS = 0.1
# Bytes of an event, and of a chunk, that come before any text.
_BEFORE_TEXT = len(b'data: {"choices":[{"text":"')


class Fault(enum.Enum):
    """What a worker does instead of its task."""

    # Before the answer has begun.
    VANISH = "resets all its connections and refuses others for a while"
    RESET = "resets the connection instead of an answer"
    CLOSE = "closes the connection instead of an answer"
    HALF_HEAD = "resets the connection in the head of the answer"
    ONLY_HEAD = "resets the connection behind the head of the answer"
    NO_HTTP = "sends what is no HTTP"
    ERROR_500 = "answers with 500"
    LOADING = "answers that it is loading its model"
    BUSY = "answers with 429"
    OVERFLOW = "answers that the prompt is too long"
    ERROR_FIRST = "begins its stream with an error"
    SILENT = "answers nothing at all"
    # When it has.
    CUT = "resets the connection at any byte"
    RESET_LATER = "resets the connection behind an event"
    CLOSE_LATER = "closes the connection behind an event"
    HALF_EVENT = "ends the stream cleanly in the middle of an event"
    NO_MARK = "ends the stream cleanly behind an event"
    NO_CHUNK = "sends what is no chunk behind an event"
    ERROR_LATER = "ends its stream with an error instead of a finish_reason"
    STALL = "sends nothing any more behind an event"
    # At its end: these answers are complete.
    NO_DONE = "leaves out the end mark behind the finish_reason"
    NO_LAST_CHUNK = "closes the connection behind the end mark"


# One that vanishes takes others' answers along, which are not drawn.
_WEIGHTS = [0.25 if fault is Fault.VANISH else 1.0 for fault in Fault]


class Faults:
    """Has workers do their tasks, and keeps the books of what that came to."""

    def __init__(self, seed: object, rate: float) -> None:
        self.seed = seed
        self.rate = rate  # of the executions that fail
        self.drawn: Counter[Fault | None] = Counter()
        self.running = 0
        # Of each task.  One that came on a used connection, and had no byte of an
        # answer, does not count: it may be sent again (RFC 9112, 9.3.1).
        self.executions: Counter[int] = Counter()
        self.step = Step("do_the_task", (self,), self._play)  # any worker's default
        self._times: Counter[int] = Counter()
        self._taken = WeakValueDictionary[int, asyncio.Event]()

    def __repr__(self) -> str:
        return f"<Faults seed={self.seed} rate={self.rate} running={self.running}>"

    @contextlib.asynccontextmanager
    async def workers(
        self, contexts: Iterable[int] = (1024, 1024, 1024)
    ) -> AsyncIterator[list[ScriptedWorker]]:
        """Run a worker of each context size."""
        workers = [ScriptedWorker(n_ctx=context) for context in contexts]
        async with contextlib.AsyncExitStack() as stack:
            for worker in workers:
                worker.default(self.step)
                await stack.enter_async_context(worker)
            yield workers

    def taken(self, key: int) -> asyncio.Event:
        """Return the event of the next task that a worker gets."""
        return self._taken.setdefault(key, asyncio.Event())

    def heal(self) -> None:
        """Let nothing fail from now on."""
        self.rate = 0.0

    def fault_of(self, key: int, time: int) -> Fault | None:
        """Draw what happens to a task when it comes to a worker for the n-th time."""
        rng = random.Random(f"fault {self.seed} {key} {time}")
        if rng.random() >= self.rate:
            return None
        return rng.choices(list(Fault), _WEIGHTS)[0]

    def script(self, order: Order) -> Script:
        """Decide what is done with the task this time."""
        self._times[order.key] += 1
        time = self._times[order.key]
        fault = self.fault_of(order.key, time)
        self.drawn[fault] += 1
        if fault is Fault.OVERFLOW and order.begun:
            fault = Fault.ERROR_500  # the prompt has fitted a moment ago
        if fault in _BEFORE:
            return _BEFORE[fault]
        name = f"chatcmpl-{self.seed}-{order.key}-{time}"
        rng = random.Random(name)
        if order.stream:
            return _streamed(order, name, fault, rng)
        return _whole(whole_answer(order, name), fault, rng)

    async def _play(self, exchange: Exchange) -> None:
        worker, request = exchange.worker, exchange.request
        order = None
        if request.body:
            order = Order.read(request.path, json.loads(request.body))
        if order is None:
            await _play_all(default_answer(worker, request), exchange)
            return
        if (taken := self._taken.get(order.key)) is not None:
            taken.set()
        self.running += 1
        try:
            await _play_all(self.script(order), exchange)
        finally:
            self.running -= 1
            if request.sent or not request.reused:
                self.executions[order.key] += 1


async def _play_all(script: Script, exchange: Exchange) -> None:
    for step in script:
        await step.play(exchange)
        if exchange.transport.is_closing():
            return


# --- Before the answer has begun --------------------------------------------------


async def _vanish(exchange: Exchange) -> None:
    exchange.reset()
    worker = exchange.worker
    if worker.listening:
        await worker.down()
        await asyncio.sleep(OUTAGE)
        await worker.up()


def _refusal(status: int, kind: str) -> Script:
    return (send(replies.error_reply(status, "not today", kind)),)


_BEFORE: dict[Fault | None, Script] = {
    Fault.VANISH: (Step("vanish", (), _vanish),),
    Fault.RESET: (reset(),),
    Fault.CLOSE: (close(),),
    Fault.HALF_HEAD: (send(sse_head()[:30]), reset()),
    Fault.ONLY_HEAD: (send(sse_head()), reset()),
    Fault.NO_HTTP: (send(b"SSH-2.0-OpenSSH_9.2\r\n"), close()),
    Fault.ERROR_500: _refusal(500, "server_error"),
    Fault.LOADING: (send(replies.loading()),),
    Fault.BUSY: _refusal(429, "rate_limit_error"),
    Fault.OVERFLOW: _refusal(400, "exceed_context_size_error"),
    Fault.SILENT: (stall(),),
}


# --- When it has ------------------------------------------------------------------


def _whole(reply: bytes, fault: Fault | None, rng: random.Random) -> Script:
    if fault in (None, Fault.NO_DONE, Fault.NO_LAST_CHUNK):
        return (send(reply),)
    if fault in (Fault.ERROR_FIRST, Fault.ERROR_LATER):
        return _BEFORE[Fault.ERROR_500]
    # Garbage within a length would be no fault that anybody could see.
    end = {Fault.CLOSE_LATER: close(), Fault.STALL: stall()}.get(fault, reset())
    return (send(reply[: rng.randrange(1, len(reply))]), end)


def _streamed(
    order: Order, name: str, fault: Fault | None, rng: random.Random
) -> Script:
    groups = stream_events(order, name, echo=rng.random() < 0.5)
    begun = _number_begun(len(groups), fault, rng)
    chunks = _framed(groups[:begun], rng)
    if fault is Fault.HALF_EVENT:
        part = groups[begun][0]
        chunks.append(chunk(part[: _place_of_a_cut(part, order, rng)]))
    if fault is Fault.CUT:
        part = chunk(b"".join(groups[begun]))
        chunks.append(part[: _place_of_a_cut(part, order, rng)])
    # The hub gets a chance to see each part of it for itself.
    parts = [step for part in chunks for step in (send(part), give_way())]
    return (send(sse_head()), *parts, *_ENDS[fault])


_CLEAN: Script = (send(last_chunk()), close())
_ERROR: Script = (send(chunk(replies.error_event("not today"))), *_CLEAN)
_ENDS: dict[Fault | None, Script] = {
    None: _CLEAN,
    Fault.ERROR_FIRST: _ERROR,
    Fault.CUT: (reset(),),
    Fault.RESET_LATER: (reset(),),
    Fault.CLOSE_LATER: (close(),),
    Fault.HALF_EVENT: _CLEAN,
    Fault.NO_MARK: _CLEAN,
    Fault.NO_CHUNK: (send(b"what?\r\n"), close()),
    Fault.ERROR_LATER: _ERROR,
    Fault.STALL: (stall(),),
    Fault.NO_DONE: _CLEAN,
    Fault.NO_LAST_CHUNK: (close(),),
}


def _number_begun(groups: int, fault: Fault | None, rng: random.Random) -> int:
    """Return how many groups of events are sent.

    The last two are the reason and the mark: all there is where the text was sent.
    """
    match fault:
        case None | Fault.NO_LAST_CHUNK:
            return groups
        case Fault.NO_DONE:
            return groups - 1
        case Fault.ERROR_FIRST:
            return 0
        case Fault.CUT:
            return rng.randrange(groups)
        case Fault.ERROR_LATER:
            return rng.randint(0 if groups == 2 else 1, groups - 2)
        case _:
            return rng.randrange(1, groups)


def _place_of_a_cut(part: bytes, order: Order, rng: random.Random) -> int:
    """Choose where a chunk or an event is cut.

    Half a token cannot be counted.  So where tokens are, a cut leaves none of its text.
    """
    counted = order.limited or order.usage
    return rng.randrange(1, _BEFORE_TEXT if counted else len(part))


def _framed(groups: list[list[bytes]], rng: random.Random) -> list[bytes]:
    """Make chunks of the events: pings in between, and now and then odd ones."""
    chunks: list[bytes] = []
    for group in groups:
        events = b"".join(group)
        if rng.random() < _ODD_CHUNKS:
            chunks.append(chunk(replies.ping()))
        if rng.random() < _ODD_CHUNKS:
            at = rng.randrange(1, len(events))
            chunks += [chunk(events[:at]), chunk(events[at:])]
        else:
            chunks.append(chunk(events))
    return chunks
