"""The states of a request, what its answer has from the hub, and those that run."""

from __future__ import annotations

import asyncio
import itertools
import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gollama_proxy.edge.response import SERVER
from gollama_proxy.proxy.state import (
    MOST_STEPS,
    TRANSITIONS,
    Exchange,
    Running,
    State,
    draining,
    took_too_long,
)
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.tasks import spawn
from gollama_proxy.telemetry.accesslog import Outcome, Step
from gollama_proxy.wire.errors import Code, RequestError
from tests.fakes import requests
from tests.fakes.cases import case


def request() -> Exchange:
    return Exchange(requests.request("POST", "/"), 0.0)


# --- States -----------------------------------------------------------------------


def test_a_state_follows_another_as_the_table_has_it() -> None:
    for one, other in [*itertools.product(State, State)]:
        with case((one, other)):
            x = request()
            x.state = one
            if other in TRANSITIONS[one]:
                x.enter(other)
                assert x.state is other
            else:
                with pytest.raises(RuntimeError, match=f"cannot become {other.name}"):
                    x.enter(other)


def test_every_state_is_reached_and_all_but_the_last_may_end() -> None:
    reached = set(itertools.chain(*TRANSITIONS.values()))
    assert reached | {State.READING} == set(State) == set(TRANSITIONS)
    ends = {state for state, after in TRANSITIONS.items() if State.ENDED in after}
    assert ends == set(State) - {State.ENDED}
    assert repr(request()) == "<Exchange  READING attempts=0>"


def test_the_first_outcome_is_the_only_one() -> None:
    x = request()
    x.fail(RequestError(Code.BAD_REQUEST, "no", detail="why"))
    assert (x.state, x.outcome) == (State.ENDED, Outcome.ERROR)
    x.end(Outcome.CLIENT_GONE, "client_stalled")
    assert (x.outcome, x.error, x.detail) == (Outcome.ERROR, Code.BAD_REQUEST, "why")
    y = request()
    y.end(Outcome.COMPLETE)
    y.fail(RequestError(Code.BAD_REQUEST, "no"))
    assert (y.outcome, y.error, y.detail) == (Outcome.COMPLETE, "", "")


def test_an_outcome_without_an_error_keeps_what_is_known() -> None:
    x = request()
    x.error, x.detail = "worker_lost", "the connection was reset"
    x.end(Outcome.ERROR)
    assert (x.error, x.detail) == ("worker_lost", "the connection was reset")


# --- One request ------------------------------------------------------------------


@pytest.mark.parametrize("remote", ["10.0.0.9", ""])
def test_a_request_begins_with_what_its_head_has(remote: str) -> None:
    head = SimpleNamespace(method="PUT", remote=remote or None)
    x = Exchange(cast(Any, head), 7.0)
    assert (x.id, x.method, x.remote, x.started) == ("", "PUT", remote, 7.0)
    assert (x.state, x.priority) == (State.READING, Priority.INTERACTIVE)
    assert (x.choices, x.max_concurrency, x.attempts) == (1, 0, 0)
    assert x.needs_slot
    flags = ("answered", "counted", "hides_usage", "keep_alive", "loading", "rewritten")
    assert not any(getattr(x, name) for name in flags)
    assert (x.forwarded, x.sent, x.lines, x.asked, x.alias) == (b"", b"", "", "", "")
    assert (x.waited, x.waiting_since, x.noticed_at, x.repeated) == (0, 0, 0, 0)
    assert x.body_so_far is None
    x.body = cast(Any, "body")
    assert cast(Any, x.body_so_far) == "body"


def test_steps_are_kept_up_to_a_limit() -> None:
    x = Exchange(requests.request(), 5.0)
    x.note(7.5, "failed", "w0", "reset")
    x.note(8.0, "queued")
    assert x.steps == (Step(2.5, "failed", "w0", "reset"), Step(3.0, "queued"))
    for number in range(MOST_STEPS):
        x.note(9.0, "attempt", f"w{number}")
    assert len(x.steps) == MOST_STEPS
    assert x.steps[-1].worker == f"w{MOST_STEPS - 3}"


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("fed", [False, True])
def test_how_much_of_its_answer_is_out(begun: bool, fed: bool) -> None:
    x = request()
    assert (x.begun, x.fed) == (False, False)
    x.delivery = cast(Any, SimpleNamespace(begun=begun, fed=fed))
    assert (x.begun, x.fed) == (begun, fed)


def test_a_client_has_left_with_its_connection() -> None:
    x = request()
    assert not x.client_left
    closing = SimpleNamespace(is_closing=lambda: True)
    for transport in (closing, None):
        x.request = cast(Any, SimpleNamespace(transport=transport))
        assert x.client_left


def test_an_answer_has_the_id_and_what_the_hub_adds() -> None:
    x = request()
    x.id, x.lines = "abc", "X-Other: 1\r\n"
    begin = f"Server: {SERVER}\r\nX-Request-Id: abc\r\nX-Other: 1\r\n"
    assert x.header_lines() == begin
    x.worker, x.attempts, x.queued = "w0", 2, 0.0126
    assert x.header_lines() == (
        f"{begin}X-Gollama-Worker: w0\r\nX-Gollama-Attempts: 2\r\n"
        "X-Gollama-Queue-Ms: 13\r\n"
    )


@pytest.mark.parametrize(
    ("alias", "asked", "model", "names"),
    [
        ("gpt", "qwen", "qwen", ("qwen", "gpt")),
        ("gpt", "qwen", "small", None),  # a fallback keeps its own name
        ("", "qwen", "qwen", None),
    ],
)
def test_an_answer_has_the_clients_name_of_the_model(
    alias: str, asked: str, model: str, names: tuple[str, str] | None
) -> None:
    x = request()
    x.alias, x.asked = alias, asked
    x.plan = cast(Any, SimpleNamespace(pool=SimpleNamespace(model=model)))
    assert x.names == names


# --- Those that run ---------------------------------------------------------------


class Requests(Running):
    """Requests that run until they may end, or are cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()
        self.cancelled: list[Exchange] = []

    async def begin(self, count: int) -> list[Exchange]:
        found = [request() for _ in range(count)]
        for x in found:
            task = spawn(self._serve(x), "request")
            self._running[task] = x
        await asyncio.sleep(0)  # each has begun
        return found

    async def _serve(self, x: Exchange) -> None:
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.append(x)
        finally:  # as in `Proxy.__call__`
            task = asyncio.current_task()
            assert task is not None
            del self._running[task]
            if self._idle is not None and not self._running:
                self._idle.set_result(None)
                self._idle = None


async def test_requests_that_run_have_the_time_to_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = Requests()
    await running.drain(60.0)  # there is none
    some = await running.begin(2)
    assert list(running.running) == some
    draining = spawn(running.drain(60.0), "drain")
    await asyncio.sleep(0)
    running.may_end.set()
    await draining
    assert not running.running
    assert not running.cancelled
    assert not caplog.messages


async def test_requests_that_take_longer_are_cut(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = Requests()
    one, other = await running.begin(2)
    reason = other.cut = took_too_long(1.0)
    await running.drain(0.0)
    assert running.cancelled == [one, other]
    assert not running.running
    assert one.cut is not None
    assert (one.cut.code, other.cut) == (Code.DRAINING, reason)
    assert caplog.record_tuples == [
        ("gollama_proxy.proxy.state", logging.WARNING, "cutting 2 running requests")
    ]


async def test_an_operator_cancels_one_request_once() -> None:
    running = Requests()
    one, other = await running.begin(2)
    running.cancel(one)
    reason = one.cut
    assert reason is not None
    assert (reason.code, reason.message) == (
        Code.CANCELLED,
        "An operator of the hub has cancelled this request.",
    )
    running.cancel(one)
    assert one.cut is reason
    running.cancel(request())  # which has ended
    await running.drain(0.0)
    assert running.cancelled == [one, other]
    assert (one.cut, other.cut is not None) == (reason, True)


async def test_a_request_is_cancelled_once() -> None:
    """A second time would cancel what writes the error to its client."""
    running = Requests()
    [x] = await running.begin(1)
    [task] = running._running
    running.cancel(x)
    running.cancel(x)
    assert task.cancelling() == 1
    await running.drain(60.0)


def test_the_errors_of_requests_that_are_cut() -> None:
    error = took_too_long(2.50)
    assert (error.code, error.message) == (
        Code.REQUEST_TIMEOUT,
        "The request took more than 2.5 s.",
    )
    error = draining()
    assert (error.code, error.message) == (
        Code.DRAINING,
        "The hub is shutting down.",
    )
    assert error.retry_after
