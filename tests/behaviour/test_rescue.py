"""A worker dies in mid-answer, and its client gets the whole answer all the same."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest

from gollama_proxy.config.settings import STREAMED
from gollama_proxy.wire.partial import Partial
from tests.behaviour.test_retries import InOrder
from tests.fakes import replies
from tests.fakes.asks import CHAT, RARELY, STREAM, TEXT
from tests.fakes.client import Ending
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, relays, running_hub, shown
from tests.fakes.replies import (
    chunk,
    done,
    error_event,
    error_reply,
    event,
    finish,
    last_chunk,
    ping,
    role,
    sse_head,
    token,
    usage_of,
)
from tests.fakes.script import (
    Script,
    Step,
    answer,
    chat_stream,
    close,
    expect_eof,
    notify,
    reset,
    send,
    stall,
    wait,
)
from tests.fakes.streams import arguments, call, chat_event, read_calls
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

BODY = {"model": "tiny", **STREAM}
FIRST = [" One", " day", ", a", " fox", " met"]  # what the first worker writes
REST = [" a", " crow", "."]
WHOLE = "".join(FIRST + REST)
_RESCUER = re.compile(r"(?<=rescued [0-9]) by \S+$")  # its name has a test below


class Seen(NamedTuple):
    """What a client makes of a stream."""

    text: str
    roles: int
    reasons: list[str]
    ids: set[str]
    usages: list[dict[str, Any]]
    comments: list[str]
    done: int
    errors: list[dict[str, Any]]


def read(ending: Ending) -> Seen:
    """Read a stream strictly: each event is JSON, a comment, or `[DONE]` at the end."""
    events = ending.response.body.decode().split("\n\n")
    assert events.pop() == ""
    comments = [e.removeprefix(":").strip() for e in events if e.startswith(":")]
    data = [e.removeprefix("data: ") for e in events if e.startswith("data: ")]
    if "[DONE]" in data:
        assert data[-1] == "[DONE]"
    chunks = [json.loads(each) for each in data if each != "[DONE]"]
    choices = [c for each in chunks for c in each.get("choices", ())]
    return Seen(
        "".join(c.get("delta", c).get("content") or c.get("text", "") for c in choices),
        sum("role" in c.get("delta", ()) for c in choices),
        [c["finish_reason"] for c in choices if c["finish_reason"]],
        {each["id"] for each in chunks if "id" in each},
        [each["usage"] for each in chunks if each.get("usage")],
        [_RESCUER.sub("", comment) for comment in comments if comment],
        data.count("[DONE]"),
        [each["error"] for each in chunks if "error" in each],
    )


def complete(ending: Ending, *, rescued: int = 1) -> bool:
    """Check that this is the whole answer, sent once."""
    assert ending.clean, ending.raw
    seen = read(ending)
    assert seen == Seen(
        WHOLE,
        1,
        ["stop"],
        {replies.ID},
        seen.usages,
        [f"gollama rescued {number}" for number in range(1, rescued + 1)],
        1,
        [],
    )
    return True


def partial(
    *ends: Step, texts: Iterable[str] = FIRST, tail: bytes = b""
) -> tuple[Step, ...]:
    """Stream the beginning of an answer, and then play the steps of `ends`."""
    written = [
        role() + token(text) if not n else token(text) for n, text in enumerate(texts)
    ]
    extra = (send(chunk(tail)),) if tail else ()
    return (send(sse_head()), *(send(chunk(each)) for each in written), *extra, *ends)


def continued(
    *, echo: Iterable[str] = ("".join(FIRST),), rest: Iterable[str] = REST, **more: Any
) -> Script:
    """Continue it as llama-server does: the text so far is its first piece."""
    return chat_stream([*echo, *rest], **more)


@asynccontextmanager
async def pool(
    *workers: ScriptedWorker, **settings: Any
) -> AsyncIterator[tuple[list[ScriptedWorker], RunningHub]]:
    """Run a hub that rescues, and asks its workers in their order."""
    settings = {
        "rescue__enabled": True,
        "retry__attempts": 3,
        "retry__ratio": 0,
        "retry__floor": 0,  # a rescue is not paid from the budget
        "health__interval": RARELY,
        **settings,
    }
    async with AsyncExitStack() as stack:
        made = list(workers) or [ScriptedWorker(), ScriptedWorker()]
        for worker in made:
            await stack.enter_async_context(worker)
        hub = await stack.enter_async_context(running_hub(*made, **settings))
        hub.hub.balancer.policy = InOrder()
        yield made, hub


async def asked(
    hub: RunningHub, body: dict[str, Any] = BODY, path: str = CHAT
) -> Ending:
    async with await hub.open(path, body) as wire:
        return await wire.read_to_end()


async def asked_past_a_gap(hub: RunningHub) -> Ending:
    """Let more time pass than there may be between two events: behind `FIRST`."""
    async with await hub.open(CHAT, BODY) as wire:
        await until(lambda: sum(relay.events for relay in relays(hub)) > len(FIRST))
        hub.pass_time(0)
        hub.pass_time(31)
        return await wire.read_to_end()


# --- How an answer breaks ---------------------------------------------------------


HALF = token(" met")[:40]
BREAKS: dict[str, Script] = {
    "reset": partial(reset()),
    "closed": partial(close()),
    "ended without its mark": partial(send(last_chunk()), close()),
    "garbage for a chunk": partial(send(b"zzz\r\n"), close()),
    "in half a chunk": partial(send(b"ff\r\n" + HALF), reset(), texts=FIRST[:4]),
    "in half an event": partial(reset(), texts=FIRST, tail=token(" a")[:-30]),
    "behind a ping": partial(send(chunk(ping())), reset()),
    "in half a ping": partial(send(chunk(b":")), reset()),
    "a router whose child died": partial(
        send(chunk(b"proxy error: Failed to read connection")),
        send(last_chunk()),
        close(),
    ),
}


async def test_a_comment_names_the_worker_that_continues_an_answer() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*BREAKS["reset"])
        good.script(*continued())
        ending = await asked(hub)
    assert ending.response.header("x-gollama-worker") == bad.name
    comment = f": gollama rescued 1 by {good.name}\n\n"
    assert ending.response.body.count(comment.encode()) == 1


@pytest.mark.parametrize("end", BREAKS)
async def test_another_worker_continues_a_broken_answer(end: str) -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*BREAKS[end])
        cut = end in ("in half a chunk", "in half an event")
        given = {"in half a chunk": FIRST[:4], "in half an event": [*FIRST, " a"]}
        echo = "".join(given.get(end, FIRST))
        good.script(*continued(echo=[echo], rest=[WHOLE[len(echo) :]] if cut else REST))
        assert complete(await asked(hub))
        [request] = good.requests
        assert request.json()["messages"][1:] == [
            {"role": "assistant", "content": echo},
        ]
        assert request.json()["continue_final_message"] is True
        assert request.json()["add_generation_prompt"] is False


async def test_an_answer_that_stalls_is_continued_elsewhere() -> None:
    """Its connection is closed, which ends its generation; it counts as slow."""
    async with pool(clock=Clock()) as ([bad, good], hub):
        bad.script(*partial(expect_eof()))
        good.script(*continued())
        assert complete(await asked_past_a_gap(hub))
        [record, _] = hub.hub.registry.workers
        assert shown(record.breaker, "slow") == 1


# --- How another worker goes on ---------------------------------------------------

WAYS: dict[str, str] = {
    "with all of it": "".join(FIRST),
    "without the space in front": "".join(FIRST).lstrip(),
    "with another space in front": " " + "".join(FIRST),
    "with all of it and a word": "".join(FIRST) + " a",
    "behind thoughts of nothing": "<think></think>" + "".join(FIRST),
    "behind a line that its template adds": "assistant\n" + "".join(FIRST),
}


@pytest.mark.parametrize("way", WAYS)
async def test_text_that_was_sent_is_not_sent_again(way: str) -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        rest = REST[1:] if "word" in way else REST
        good.script(*continued(echo=[WAYS[way]], rest=rest))
        assert complete(await asked(hub))
        assert len(good.requests) == 1


UNPROVED: dict[str, list[str]] = {
    "without a word of it": REST,
    "in pieces": FIRST + REST,
    "in pieces behind a line that its template adds": ["assistant\n", *FIRST, *REST],
    "in another form": [" <p>One day</p>, a fox met", *REST],
    "behind too much": ["x" * 200 + "".join(FIRST), *REST],
}


@pytest.mark.parametrize(
    "build", [replies.BUILD, ""], ids=["llama-server", "another server"]
)
@pytest.mark.parametrize("way", UNPROVED)
async def test_an_unproven_continuation_is_not_used(way: str, build: str) -> None:
    """All of it is asked for again, and that is no other attempt."""
    bad, good = ScriptedWorker(), ScriptedWorker(build=build)
    async with pool(bad, good, rescue__attempts=1) as (_, hub):
        bad.script(*partial(reset()))
        good.script(*chat_stream(UNPROVED[way]))
        good.script(*chat_stream(FIRST + REST))
        assert complete(await asked(hub))
        assert good.requests[1].json() == BODY


async def test_one_token_is_not_enough_proof() -> None:
    """Any answer may begin and continue with it."""
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset(), texts=FIRST[:1]))
        good.script(*chat_stream(FIRST + REST))
        assert complete(await asked(hub))
        assert good.requests[0].json() == BODY


async def test_a_text_is_continued_after_its_prompt() -> None:
    def part(text: str) -> bytes:
        return event(replies.text_completion(text, reason=None, last=False))

    last = event(replies.text_completion("", reason="stop"))
    body = {"model": "tiny", "prompt": "Once", "stream": True}
    async with pool() as ([bad, good], hub):
        bad.script(
            send(sse_head()), *(send(chunk(part(text))) for text in FIRST), reset()
        )
        good.script(
            send(sse_head()),
            *(send(chunk(part(text))) for text in REST),
            send(chunk(last + done()) + last_chunk()),
            close(),
        )
        ending = await asked(hub, body, TEXT)
        assert good.requests[0].json()["prompt"] == "Once" + "".join(FIRST)
    assert ending.clean
    seen = read(ending)
    assert (seen.text, seen.reasons, seen.done) == (WHOLE, ["stop"], 1)


async def test_a_continuation_asks_for_the_remaining_tokens_and_reports_all() -> None:
    body = BODY | {"max_tokens": 20, "stream_options": {"include_usage": True}}
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        counted = usage_of(4, 20 + len(FIRST))
        good.script(
            *partial(
                send(chunk(finish(usage=counted))),
                send(chunk(done()) + last_chunk()),
                close(),
                texts=["".join(FIRST), *REST],
            )
        )
        ending = await asked(hub, body)
        assert complete(ending)
        assert good.requests[0].json()["max_tokens"] == 20 - len(FIRST)
    [usage] = read(ending).usages
    assert usage["completion_tokens"] == 4 + len(FIRST)
    assert usage["prompt_tokens"] == 20
    assert usage["total_tokens"] == 24 + len(FIRST)


async def test_an_incomplete_last_token_is_continued() -> None:
    async with pool() as ([bad, good], hub):
        half = token(" fox").partition(b"ox")[0]
        bad.script(*partial(close(), texts=FIRST[:3], tail=half))
        good.script(*continued(echo=[" One day, a f"], rest=["ox"], reason="length"))
        ending = await asked(hub, BODY | {"max_tokens": 4})
        assert good.requests[0].json()["max_tokens"] == 1
    assert ending.clean
    seen = read(ending)
    assert (seen.text, seen.reasons) == (" One day, a fox", ["length"])


async def test_an_answer_that_lacks_only_its_end_is_completed_by_the_hub() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset(), texts=[*FIRST, *REST]))
        ending = await asked(hub, BODY | {"max_tokens": len(FIRST + REST)})
        assert not good.requests
    assert ending.clean
    seen = read(ending)
    assert (seen.text, seen.reasons, seen.done) == (WHOLE, ["length"], 1)


async def test_a_broken_event_of_the_second_worker_is_no_reason_to_break_off() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(
            *partial(
                send(chunk(b"data: {nonsense\n\n")),
                send(chunk(finish() + done()) + last_chunk()),
                close(),
                texts=["".join(FIRST), *REST],
            )
        )
        ending = await asked(hub)
    assert ending.clean
    assert b"data: {nonsense\n\n" in ending.raw
    assert b"[DONE]" in ending.raw


# --- Workers that continue --------------------------------------------------------


async def test_the_second_worker_may_break_off_as_well() -> None:
    workers = [ScriptedWorker() for _ in range(3)]
    async with pool(*workers) as ([one, two, three], hub):
        one.script(*partial(reset(), texts=FIRST[:2]))
        two.script(*partial(reset(), texts=["".join(FIRST[:2]), *FIRST[2:]]))
        three.script(*continued())
        assert complete(await asked(hub), rescued=2)


async def test_a_worker_that_broke_off_may_continue_after_another_one() -> None:
    async with pool() as ([one, two], hub):
        one.script(*partial(reset(), texts=FIRST[:2]))
        two.script(*partial(reset(), texts=["".join(FIRST[:2]), *FIRST[2:]]))
        one.script(*continued())
        assert complete(await asked(hub), rescued=2)


async def test_an_unreachable_worker_is_skipped() -> None:
    workers = [ScriptedWorker() for _ in range(3)]
    async with pool(*workers) as ([bad, gone, good], hub):
        bad.script(*partial(notify("begun"), wait("go"), reset()))
        good.script(*continued())
        async with await hub.open(CHAT, BODY) as wire:
            await bad.reached("begun")
            await gone.down()
            bad.release("go")
            assert complete(await wire.read_to_end())


async def test_a_rescue_waits_a_while_for_a_worker() -> None:
    """A worker that was killed is often started again at once."""
    async with pool(health__interval=0.05, health__recheck=0.05) as (workers, hub):
        bad, good = workers
        bad.script(*partial(notify("begun"), wait("go"), reset()))
        good.script(*continued())
        async with await hub.open(CHAT, BODY) as wire:
            await bad.reached("begun")
            await good.down()
            await until(lambda: hub.hub.registry.workers[1].is_down)
            bad.script(reset())
            bad.release("go")
            await bad.received(2)  # it is asked itself, and fails
            await bad.down()
            await until(lambda: not hub.hub.registry.ready)
            await good.up()
            assert complete(await wire.read_to_end())


async def test_a_rescue_does_not_wait_without_limit() -> None:
    async with pool(ScriptedWorker(), retry__patience=0.5) as ([only], hub):
        only.script(*partial(notify("begun"), wait("go"), reset()))
        async with await hub.open(CHAT, BODY) as wire:
            await only.reached("begun")
            breaker = hub.hub.registry.workers[0].breaker
            breaker.busy(60)
            only.release("go")
            assert broken_off(await wire.read_to_end(), "worker_connection_lost")


async def test_the_only_worker_continues_its_answer_if_it_is_alive() -> None:
    async with pool(ScriptedWorker()) as ([only], hub):
        only.script(*partial(reset()))
        only.script(*continued())
        assert complete(await asked(hub))


async def test_the_only_worker_is_not_asked_again_when_it_has_stalled() -> None:
    alone = ScriptedWorker()
    async with pool(alone, clock=Clock(), retry__patience=0) as ([only], hub):
        only.script(*partial(stall()))
        ending = await asked_past_a_gap(hub)
        assert len(only.requests) == 1
    assert broken_off(ending, "worker_slow")


async def test_the_number_of_continuations_is_limited() -> None:
    async with pool(rescue__attempts=2) as (workers, hub):
        one, two = workers
        one.script(*partial(reset(), texts=FIRST[:1]))
        two.script(*partial(reset(), texts=["".join(FIRST[:1]), FIRST[1]]))
        one.script(*partial(reset(), texts=["".join(FIRST[:2]), FIRST[2]]))
        ending = await asked(hub)
        assert len(one.requests) + len(two.requests) == 3
    assert broken_off(ending, "worker_connection_lost", "".join(FIRST[:3]))


async def test_a_fallback_continues_before_the_same_worker_does() -> None:
    """Its events have its own model name."""
    big, small = ScriptedWorker("big"), ScriptedWorker("small")
    async with pool(big, small, models__fallbacks="big=small") as (_, hub):
        big.script(*partial(reset()))
        small.script(*continued(model="small"))
        ending = await asked(hub, BODY | {"model": "big"})
        assert complete(ending)
        assert small.requests[0].json()["model"] == "small"
        assert len(big.requests) == 1
    assert b'"model":"small"' in ending.raw


async def test_a_fallback_continues_before_a_worker_that_has_failed_the_answer() -> (
    None
):
    """Two workers of the model have, and the fallback has not."""
    one, two, small = ScriptedWorker("big"), ScriptedWorker("big"), ScriptedWorker("s")
    async with pool(one, two, small, models__fallbacks="big=s") as (_, hub):
        one.script(*partial(reset(), texts=FIRST[:2]))
        two.script(*partial(reset(), texts=["".join(FIRST[:2]), *FIRST[2:]]))
        small.script(*continued(model="s"))
        assert complete(await asked(hub, BODY | {"model": "big"}), rescued=2)
        assert (len(one.requests), len(two.requests)) == (1, 1)


async def test_a_refusal_does_not_count_as_a_continuation() -> None:
    """So that it can still be asked for the whole answer again."""
    async with pool(rescue__attempts=1) as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(send(error_reply(400, "no prefill", "invalid_request_error")))
        good.script(*chat_stream(FIRST + REST))
        assert complete(await asked(hub))


# --- Workers that do not continue an answer ---------------------------------------


@pytest.mark.parametrize("status", [400, 422, 500])
async def test_a_worker_that_refuses_to_continue_is_asked_for_the_whole_answer(
    status: int,
) -> None:
    """Its refusal is nothing that the client gets to see."""
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(send(error_reply(status, "no prefill", "invalid_request_error")))
        good.script(*chat_stream(FIRST + REST))
        assert complete(await asked(hub))
        assert good.requests[1].json() == BODY


async def test_a_worker_that_begins_a_new_turn_is_asked_for_the_whole_answer() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(*chat_stream(["".join(FIRST)[:17], "ouse?"]))
        good.script(*chat_stream(FIRST + REST))
        assert complete(await asked(hub))


async def test_a_regenerated_answer_that_differs_ends_with_an_error() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(send(error_reply(400, "no prefill", "invalid_request_error")))
        good.script(*chat_stream([*FIRST[:3], " wolf", " met", " a", " crow"]))
        ending = await asked(hub)
    assert broken_off(ending, "worker_connection_lost")


@pytest.mark.parametrize("status", [400, 500])
async def test_a_refusal_to_continue_costs_no_attempt(status: int) -> None:
    async with pool(rescue__attempts=1) as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(send(error_reply(status, "no prefill", "invalid_request_error")))
        good.script(*chat_stream(FIRST + REST))
        assert complete(await asked(hub))


async def test_what_one_worker_continues_differently_another_may_continue() -> None:
    workers = [ScriptedWorker() for _ in range(3)]
    async with pool(*workers) as ([bad, other, good], hub):
        bad.script(*partial(reset()))
        other.script(send(error_reply(400, "no prefill", "invalid_request_error")))
        other.script(*chat_stream(["Another", " one"]))
        good.script(*continued())
        assert complete(await asked(hub))


# --- Thoughts ---------------------------------------------------------------------

THOUGHTS = ["two and", " two"]


def thought(text: str) -> bytes:
    return chat_event(reasoning_content=text).replace(b"chatcmpl-1", ID)


ID = replies.ID.encode()
THINKING = [role(), *map(thought, THOUGHTS)]


def stream_of(*events: bytes, then: tuple[Step, ...] | None = None) -> tuple[Step, ...]:
    """Send events; the steps of `then` follow instead of an end."""
    sent = (send(chunk(each.replace(b"chatcmpl-1", ID))) for each in events)
    end = (send(chunk(done()) + last_chunk()), close())
    return (send(sse_head()), *sent, *(end if then is None else then))


def reasoning_of(ending: Ending) -> str:
    """Read what the client got before the end, or before an error."""
    reported = Partial.parse(ending.response.body.partition(b'data: {"error"')[0])
    assert reported is not None
    return reported.reasoning


async def test_an_answer_is_continued_after_its_reasoning() -> None:
    """Without it, the model would continue as if it had not reasoned."""
    async with pool() as ([bad, good], hub):
        bad.script(*stream_of(*THINKING, *map(token, FIRST), then=(reset(),)))
        again = [role(), thought("".join(THOUGHTS)), token("".join(FIRST) + REST[0])]
        good.script(*stream_of(*again, *map(token, REST[1:]), finish()))
        ending = await asked(hub)
        [request] = good.requests
    assert complete(ending)
    assert reasoning_of(ending) == "".join(THOUGHTS)
    assert request.json()["messages"][-1] == {
        "role": "assistant",
        "content": "".join(FIRST),
        "reasoning_content": "".join(THOUGHTS),
    }


async def test_broken_reasoning_is_regenerated() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*stream_of(*THINKING, then=(reset(),)))
        answer = map(token, FIRST + REST)
        good.script(*stream_of(*THINKING, thought("."), *answer, finish()))
        ending = await asked(hub)
        assert good.requests[0].json() == BODY
    assert complete(ending)
    assert reasoning_of(ending) == "".join(THOUGHTS) + "."


async def test_different_reasoning_ends_the_answer() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*stream_of(*THINKING, then=(reset(),)))
        good.script(*stream_of(role(), thought("two or"), token(" 3"), finish()))
        ending = await asked(hub)
    assert broken_off(ending, "worker_connection_lost", "")
    assert reasoning_of(ending) == "".join(THOUGHTS)


# --- Tools ------------------------------------------------------------------------

AGENT = BODY | {"tools": [{"type": "function", "function": {"name": "paint"}}]}
CALLING = [
    role(),
    *map(token, FIRST),
    call("paint", "{", id="first"),
    arguments('"colour"'),
    arguments(': "red"}'),
]
CALLED = {0: ("first", "paint", '{"colour": "red"}')}
SAME_CALL = [each.replace(b'"first"', b'"second"') for each in CALLING]
END_OF_CALL = chat_event("tool_calls")


async def test_an_agents_answer_is_continued_as_any_other() -> None:
    """As long as it has called no tool; it may call one afterwards."""
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        again = [role(), token("".join(FIRST)), *CALLING[1 + len(FIRST) :]]
        good.script(*stream_of(*again, END_OF_CALL))
        ending = await asked(hub, AGENT)
        [request] = good.requests
    assert request.json()["tools"] == AGENT["tools"]
    assert request.json()["messages"][-1]["content"] == "".join(FIRST)
    assert ending.clean
    assert read_calls(ending.response.body) == CALLED
    seen = read(ending)
    assert (seen.text, seen.reasons, seen.done) == ("".join(FIRST), ["tool_calls"], 1)


@pytest.mark.parametrize("place", range(2 + len(FIRST), len(CALLING) + 1))
async def test_a_broken_tool_call_is_regenerated(place: int) -> None:
    """It continues under the id that the client knows."""
    body = AGENT | {"seed": 7, "temperature": 0.5, "max_tokens": 99}
    async with pool() as ([bad, good], hub):
        bad.script(*stream_of(*CALLING[:place], then=(reset(),)))
        good.script(*stream_of(*SAME_CALL, END_OF_CALL))
        ending = await asked(hub, body)
        assert [each.json() for each in good.requests] == [body]
    assert ending.clean
    assert read_calls(ending.response.body) == CALLED
    seen = read(ending)
    assert (seen.text, seen.roles, seen.done) == ("".join(FIRST), 1, 1)
    assert seen.reasons == ["tool_calls"]
    assert seen.comments == ["gollama rescued 1"]


async def test_a_different_tool_call_ends_the_answer() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*stream_of(*CALLING[:-1], then=(reset(),)))
        other = arguments('"color": "red"}')
        good.script(*stream_of(*SAME_CALL[:-2], other, END_OF_CALL))
        ending = await asked(hub, AGENT)
    assert broken_off(ending, "worker_connection_lost")
    assert read_calls(ending.response.body) == {0: ("first", "paint", '{"colour"')}


# --- Answers in a form --------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    {"json_schema": {"type": "object"}},
    {"grammar": 'root ::= "a"'},
    {"tool_choice": "required"},
    {"messages": [{"role": "assistant", "content": "I"}]},
]


@pytest.mark.parametrize("fields", FORMS, ids=str)
async def test_an_answer_held_to_a_grammar_is_regenerated(
    fields: dict[str, Any],
) -> None:
    """It would begin in the middle of the text."""
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(*chat_stream(FIRST + REST))
        assert complete(await asked(hub, AGENT | fields))
        assert [each.json() for each in good.requests] == [AGENT | fields]


@pytest.mark.parametrize("fields", FORMS[:1], ids=str)
async def test_a_different_text_held_to_a_grammar_ends_the_answer(
    fields: dict[str, Any],
) -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(*chat_stream([*FIRST[:-1], " ate", *REST]))
        ending = await asked(hub, BODY | fields)
    assert broken_off(ending, "worker_connection_lost")


# --- What is not continued --------------------------------------------------------


def broken_off(ending: Ending, code: str, text: str = "".join(FIRST)) -> bool:
    """Check that the client got an error event and no end."""
    assert not ending.clean
    seen = read(ending)
    assert seen.text == text
    assert [error["code"] for error in seen.errors] == [code]
    assert not seen.done
    return True


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": True},
    ],
    ids=str,
)
async def test_an_answer_that_cannot_be_continued_ends_with_an_error(
    fields: dict[str, Any],
) -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        ending = await asked(hub, BODY | fields)
        assert not good.requests
    assert broken_off(ending, "worker_connection_lost")


async def test_an_error_from_the_worker_itself_ends_the_answer() -> None:
    async with pool() as ([bad, good], hub):
        error = send(chunk(error_event("oh")) + last_chunk())
        bad.script(*partial(wait("read"), error, close()))
        async with await hub.open(CHAT, BODY) as wire:
            await wire.read_event()
            bad.release("read")
            ending = await wire.read_to_end()
        assert not good.requests
    assert not ending.clean
    assert ending.raw.count(b'"error"') == 1


@pytest.mark.parametrize(
    "settings", [{"rescue__enabled": False}, {"rescue__kept": 1024}]
)
async def test_rescues_can_be_switched_off_and_have_a_limit(
    settings: dict[str, Any],
) -> None:
    async with pool(**settings) as ([bad, good], hub):
        bad.script(*partial(reset()))
        ending = await asked(hub)
        assert not good.requests
    assert broken_off(ending, "worker_connection_lost")


async def test_a_long_answer_within_the_limit_is_continued() -> None:
    words = [f" w{n}" for n in range(900)]
    async with pool() as ([bad, good], hub):
        bad.script(*partial(close(), texts=words))
        good.script(*continued(echo=["".join(words)], rest=[" end"]))
        ending = await asked(hub)
        assert good.requests[0].json()["messages"][1]["content"] == "".join(words)
    assert ending.clean
    assert read(ending).text == "".join(words) + " end"


async def test_a_client_that_disconnects_cancels_a_rescue() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(notify("asked"), expect_eof())
        async with await hub.open(CHAT, BODY) as wire:
            await good.reached("asked")
            wire.abort()
        await good.idle()


async def test_a_client_gets_an_error_when_the_time_runs_out_during_a_rescue() -> None:
    for limit in (0.3, 2, 8):  # seconds of real time; at last the rescue has begun
        async with pool(timeouts__request=limit) as ([bad, good], hub):
            bad.script(*partial(reset()))
            good.script(stall())
            ending = await asked(hub)
            if good.requests and ending.response.status == 200:
                assert broken_off(ending, "request_timeout")
                return
    raise AssertionError("no rescue has begun within the limit")


# --- Answers in one piece ---------------------------------------------------------

ASSEMBLING: dict[str, Any] = {"upstream__assemble": STREAMED}
PIECE = {key: value for key, value in BODY.items() if key != "stream"}


async def test_an_answer_in_one_piece_is_continued_as_well() -> None:
    async with pool(**ASSEMBLING) as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(*continued(usage=True))
        response = await hub.post(CHAT, PIECE)
        assert good.requests[0].json()["messages"][1]["content"] == "".join(FIRST)
    assert response.status == 200
    assert response.json()["choices"][0]["message"]["content"] == WHOLE
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert response.json()["usage"]["completion_tokens"] == len(FIRST) + 1 + len(REST)
    assert response.header("x-gollama-attempts") == "2"
    assert response.header("x-gollama-worker") == good.name


async def test_an_answer_in_one_piece_that_cannot_be_continued_starts_over() -> None:
    """The client has nothing of it yet."""
    async with pool(**ASSEMBLING, retry__floor=9) as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(*chat_stream(FIRST + REST, usage=True))
        response = await hub.post(
            CHAT, PIECE | {"response_format": {"type": "json_object"}}
        )
        assert good.requests[0].json()["messages"] == PIECE["messages"]
    assert response.json()["choices"][0]["message"]["content"] == WHOLE


async def test_an_answer_in_one_piece_that_no_worker_continues_starts_over() -> None:
    """It may even be another one."""
    async with pool(**ASSEMBLING) as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(send(error_reply(400, "no", "invalid_request_error")))
        good.script(*chat_stream(["Another"], usage=True))
        response = await hub.post(CHAT, PIECE)
        assert good.requests[1].json()["messages"] == PIECE["messages"]
    assert response.status == 200
    assert response.json()["choices"][0]["message"]["content"] == "Another"


async def test_a_broken_tool_call_in_one_piece_starts_over() -> None:
    """No worker has to make the same one, as the client has nothing of it."""
    async with pool(**ASSEMBLING, retry__floor=9) as ([bad, good], hub):
        bad.script(*stream_of(*CALLING[:-1], then=(reset(),)))
        usage = finish(usage=usage_of())
        good.script(*stream_of(role(), call("wash", "{}"), END_OF_CALL, usage))
        response = await hub.post(CHAT, PIECE | {"tools": AGENT["tools"]})
    [called] = response.json()["choices"][0]["message"]["tool_calls"]
    assert called["function"] == {"name": "wash", "arguments": "{}"}


async def test_a_worker_that_answers_in_one_piece_does_not_continue() -> None:
    async with pool(retry__attempts=2) as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.default(*answer({"choices": []}))
        ending = await asked(hub)
    assert broken_off(ending, "worker_connection_lost")


# --- Reports ----------------------------------------------------------------------


async def test_a_rescue_shows_in_the_metrics() -> None:
    async with pool(metrics__open=True) as ([bad, good], hub):
        bad.script(*partial(reset()))
        good.script(*continued())
        await asked(hub)
        page = (await hub.get("/metrics")).body.decode()
    assert 'gollama_rescues_total{model="tiny",outcome="complete"} 1.0' in page
