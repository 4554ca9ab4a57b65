"""Tasks, faults and the clients that see through them have to be right themselves."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable

import pytest

from gollama_proxy.wire.partial import Partial, ask_for_rest, can_continue, exhausted
from gollama_proxy.wire.resume import Resumer
from tests.fakes.asks import CHAT
from tests.fakes.client import Ending, Response
from tests.fakes.faults import Fault, Faults
from tests.fakes.generation import Order, Task, generate, stream_events, word
from tests.fakes.replies import done, error_event, finish, role, token
from tests.fakes.traffic import Leave, Visitor
from tests.fakes.verdict import DishonestError, Verdict, judge
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

TASK = Task(key=7, words=30)
KINDS = [
    Task(7, 30, limit, chat=chat, stream=stream, usage=usage)
    for limit in (None, 12)
    for chat in (True, False)
    for stream, usage in ((True, True), (True, False), (False, False))
]


@contextlib.asynccontextmanager
async def direct(
    faults: Faults,
) -> AsyncIterator[tuple[ScriptedWorker, Visitor]]:
    """Run a worker, and a client without a hub in between."""
    async with faults.workers([1024]) as [worker]:
        visitor = Visitor(worker.port, "token", faults, random.Random(1))
        with contextlib.closing(visitor):
            yield worker, visitor


class Always(Faults):
    """A schedule of one fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__("always", 1.0)
        self._fault = fault

    def fault_of(self, key: int, time: int) -> Fault | None:
        return self._fault


# --- Generation -------------------------------------------------------------------


def test_no_rest_of_a_text_begins_as_the_text_does() -> None:
    words = [word(7, place) for place in range(500)]
    assert len(set(words)) == 500
    assert not any(later.startswith("T") for later in words[1:])


def test_a_text_is_continued_after_any_character() -> None:
    whole = generate(7, 30, "", None)
    for place in range(len(whole.text) + 1):
        begun = whole.text[:place]
        rest = generate(7, 30, begun, None)
        assert begun + rest.text == whole.text
        assert rest.before + rest.tokens == 30
        limited = generate(7, 30, begun, 30 - rest.before)
        assert (limited.texts, limited.reason) == (rest.texts, "length")


@pytest.mark.parametrize(
    ("limit", "tokens", "reason"),
    [(None, 5, "stop"), (6, 5, "stop"), (5, 5, "length"), (2, 2, "length")],
)
def test_a_text_ends_by_itself_or_at_the_limit(
    limit: int | None, tokens: int, reason: str
) -> None:
    generated = generate(7, 5, "", limit)
    assert (len(generated.texts), generated.reason) == (tokens, reason)
    assert generated.tokens == tokens


def test_a_wrong_beginning_is_not_continued() -> None:
    for begun in ("x", word(7, 0) + word(7, 2), generate(7, 3, "", None).text + "."):
        with pytest.raises(ValueError, match="not the beginning"):
            generate(7, 3, begun, None)


def test_what_is_no_task_is_none() -> None:
    assert Order.read("/v1/embeddings", {"input": "hello"}) is None
    canary = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert Order.read(CHAT, canary) is None


def stream_by(name: str, order: Order, *, echo: bool = False) -> bytes:
    return b"".join(map(b"".join, stream_events(order, name, echo=echo)))


@pytest.mark.parametrize("task", [task for task in KINDS if task.stream], ids=repr)
@pytest.mark.parametrize("echo", [True, False], ids=["echo", "no echo"])
def test_a_broken_answer_can_be_continued(task: Task, echo: bool) -> None:
    """Wherever it was cut, as the hub asks for it."""
    body = json.dumps(task.payload).encode()
    order = Order.read(task.path, task.payload)
    assert order is not None
    stream = stream_by("first", order)
    continued = 0
    for place in range(0, len(stream), 61):
        begun = Partial.parse(stream[:place])
        if not begun or begun.finished or exhausted(body, begun):
            continue
        if begun.halved and task.limit is not None and begun.tokens >= task.limit:
            continue  # what the other half takes, every worker counts for itself
        goes_on = can_continue(body, begun, task.chat) and (echo or not task.chat)
        asked = ask_for_rest(body, begun, task.chat) if goes_on else body
        order = Order.read(task.path, json.loads(asked))
        assert order is not None
        resumer = Resumer(begun, task.chat, regenerate=not goes_on)
        rest = stream_by("second", order, echo=goes_on)
        begun_more = b"".join(resumer.feed(rest)) + resumer.finish()
        answer = stream[:place] + begun.mend + begun_more
        assert judge(task, ended(answer)) is Verdict.COMPLETE
        continued += 1
    assert continued > 12


# --- Faults -----------------------------------------------------------------------


@pytest.mark.parametrize("task", KINDS, ids=repr)
async def test_without_a_fault_a_task_is_done(task: Task) -> None:
    """However its chunks are cut."""
    faults = Faults("none", 0.0)
    async with direct(faults) as (worker, visitor):
        for _ in range(10):
            assert await visitor.visit(task) is Verdict.COMPLETE
            visitor.close()  # as the worker does, which has announced it
        assert len(worker.requests) == 10
    assert faults.executions == {7: 10}
    assert faults.drawn == {None: 10}


REFUSALS = {Fault.ERROR_500, Fault.LOADING, Fault.BUSY, Fault.OVERFLOW}
STALLS = (Fault.SILENT, Fault.STALL)


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in STALLS])
async def test_a_client_without_a_hub_sees_each_fault(fault: Fault) -> None:
    async with direct(Always(fault)) as (worker, visitor):
        for task in (TASK, Task(7, 30, chat=False)):
            if fault in REFUSALS:
                assert await visitor.visit(task) is Verdict.REFUSED
            else:
                with pytest.raises(DishonestError):
                    await visitor.visit(task)
            await until(lambda: worker.listening)
            visitor.close()


@pytest.mark.parametrize("fault", STALLS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_stalled_worker_waits_for_its_client_to_leave(
    fault: Fault, stream: bool
) -> None:
    faults = Always(fault)
    async with direct(faults) as (worker, visitor):
        task = Task(7, 30, stream=stream)
        assert await visitor.visit(task, "taken") is Verdict.LEFT
        await until(lambda: not faults.running)
        assert worker.requests[0].closed_by_peer.is_set()


async def test_one_that_vanishes_comes_back() -> None:
    faults = Always(Fault.VANISH)
    async with direct(faults) as (worker, visitor):
        with pytest.raises(DishonestError):
            await visitor.visit(TASK)
        with pytest.raises(ConnectionRefusedError):
            await visitor.visit(TASK)
        await until(lambda: worker.listening)
        faults.heal()
        assert "rate=0.0" in repr(faults)


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.HALF_EVENT])
def test_where_tokens_are_counted_none_is_cut_in_two(fault: Fault) -> None:
    for task in (Task(7, 30, 12), Task(7, 30, 12, chat=False), Task(7, 30, usage=True)):
        order = Order.read(task.path, task.payload)
        assert order is not None
        faults = Always(fault)
        for _ in range(50):
            half = faults.script(order)[-4 if fault is Fault.HALF_EVENT else -3]
            assert half.name == "send"
            assert len(half.arguments[0]) < 40  # the text begins later


def test_a_schedule_is_a_function_of_its_seed() -> None:
    def drawn(seed: int) -> list[Fault | None]:
        return [Faults(seed, 0.5).fault_of(key, 1) for key in range(100)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 30 < sum(fault is not None for fault in drawn(1)) < 70


# --- Clients ----------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["at once", "taken", 1, 20])
async def test_a_client_leaves_when_it_is_to(leave: Leave) -> None:
    faults = Faults("none", 0.0)
    async with direct(faults) as (worker, visitor):
        assert await visitor.visit(TASK, leave) is Verdict.LEFT
        await until(lambda: not worker.open)
        # A client that expects more events than there are stays to the end.
        assert await visitor.visit(TASK, 1000) is Verdict.COMPLETE


def ended(body: bytes, *, clean: bool = True, status: int = 200) -> Ending:
    return Ending(body, clean, False, Response(status, [], body))


def stream_of(task: Task) -> list[bytes]:
    order = Order.read(task.path, task.payload)
    assert order is not None
    return [e for group in stream_events(order, "chatcmpl-1") for e in group]


def swapping(old: bytes, new: bytes) -> Callable[[list[bytes]], list[bytes]]:
    return lambda events: [event.replace(old, new) for event in events]


ERROR = error_event("sorry")
FLAWS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a token is missing": lambda events: events[:5] + events[6:],
    "a token came twice": lambda events: events[:5] + events[4:],
    "a character is missing": lambda e: [e[0], e[1].replace(b"T7", b"T"), *e[2:]],
    "two tokens changed places": lambda e: [*e[:3], e[4], e[3], *e[5:]],
    "another text": lambda events: [*events[:5], token("x"), *events[5:]],
    "no role": lambda events: events[1:],
    "two roles": lambda events: [role(), *events],
    "no reason": lambda e: [part for part in e if b'"stop"' not in part],
    "two reasons": lambda events: [*events[:-1], finish(), events[-1]],
    "another reason": swapping(b'"stop"', b'"length"'),
    "no end mark": lambda events: events[:-1],
    "two end marks": lambda events: [*events, done()],
    "something behind the end mark": lambda events: [*events, role()],
    "two usages": lambda events: [*events[:-1], events[-2], events[-1]],
    "miscounted": swapping(b'"completion_tokens":30', b'"completion_tokens":29'),
    "another id": lambda e: [*swapping(b"chatcmpl-1", b"chatcmpl-2")(e[:4]), *e[4:]],
    "an error and a clean end": lambda events: [*events[:-1], ERROR, events[-1]],
    "half an event": lambda events: [*events[:-1], events[-1][:-1]],
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_no_flaw_passes_for_a_complete_answer(flaw: str) -> None:
    task = Task(7, 30, usage=True)
    events = stream_of(task)
    assert judge(task, ended(b"".join(events))) is Verdict.COMPLETE
    flawed = FLAWS[flaw](events)
    assert flawed != events
    with pytest.raises(DishonestError):
        judge(task, ended(b"".join(flawed)))


def test_comments_are_no_part_of_an_answer() -> None:
    """Not even the hub's own comment that another worker continues."""
    events = stream_of(TASK)
    events[5:5] = [b":\n\n", b": gollama rescued 1\n\n"]
    assert judge(TASK, ended(b"".join(events))) is Verdict.COMPLETE


def test_usage_is_sent_on_request_only() -> None:
    events = stream_of(Task(7, 30, usage=True))
    with pytest.raises(DishonestError, match="not requested"):
        judge(TASK, ended(b"".join(events)))


@pytest.mark.parametrize(
    ("body", "honest"),
    [
        (b"".join(stream_of(TASK)[:5]) + ERROR, True),
        (b"".join(stream_of(TASK)[:5])[:-90] + b"\n\n" + ERROR, True),
        (b"".join(stream_of(TASK)[:5]), False),
        (b"".join(stream_of(TASK)[:5]) + ERROR[:-1], False),
        (b"".join(stream_of(TASK)[:5]) + done() + ERROR, False),
        (b"".join(stream_of(TASK)[:5] + stream_of(TASK)[4:6]) + ERROR, False),
        (b"", False),
    ],
)
def test_a_broken_answer_needs_an_error(body: bytes, honest: bool) -> None:
    """And what came of it has to be right."""
    with contextlib.nullcontext() if honest else pytest.raises(DishonestError):
        assert judge(TASK, ended(body, clean=False)) is Verdict.BROKEN


def test_an_error_has_a_status_and_a_body() -> None:
    body = b'{"error":{"message":"sorry"}}'
    assert judge(TASK, ended(body, status=502)) is Verdict.REFUSED
    for ending in (
        ended(body),
        ended(b"{}", status=502),
        ended(body, status=502, clean=False),
        ended(b"", status=0, clean=False),
    ):
        with pytest.raises(DishonestError):
            judge(TASK, ending)
