"""A failing worker gets no traffic until it has proved itself.

The watchdog runs once a second; here it runs when a test calls it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gollama_proxy.fleet import health
from gollama_proxy.fleet.breaker import Breaker, BreakerState, Verdict
from tests.fakes.asks import CHAT, EMBED, RARELY, STREAM, WHOLE
from tests.fakes.clock import Clock
from tests.fakes.exchange import Request
from tests.fakes.hub import RunningHub, relays, running_hub, shown
from tests.fakes.replies import (
    chunk,
    done,
    error_reply,
    finish,
    head,
    last_chunk,
    loading,
    ping,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    Script,
    answer,
    chat_stream,
    close,
    expect_eof,
    notify,
    reset,
    send,
    stall,
    stream_of,
    wait,
)
from tests.fakes.waiting import settled, until
from tests.fakes.worker import ScriptedWorker

# Requests that are all alike go to the workers in turn, not to the good one only.
TRIES: dict[str, Any] = {
    "retry__ratio": 1,
    "retry__floor": 1000,
    "routing__policy": "round_robin",
}
# A request is one call, which the breaker counts: no second one makes up for it.
ONE_CALL: dict[str, Any] = {"retry__attempts": 1, "rescue__enabled": False}
FAILURES = 5  # in a row open a breaker
OPEN = 10  # seconds
SHORT = {"breaker__open": OPEN, "breaker__open_max": OPEN, "breaker__jitter": 0}
BEGUN = role() + token("a")


@pytest.fixture(autouse=True)
def _no_sweep_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PERIOD", RARELY)


def breaker_of(hub: RunningHub, worker: ScriptedWorker) -> Breaker:
    [breaker] = (w.breaker for w in hub.hub.registry.workers if w.name == worker.name)
    return breaker


def count(breaker: Breaker, verdict: Verdict) -> int:
    failed, slow = shown(breaker, "failed"), shown(breaker, "slow")
    match verdict:
        case Verdict.FAILURE:
            return failed
        case Verdict.SLOW:
            return slow
    return shown(breaker, "calls") - failed - slow


def is_canary(request: Request) -> bool:
    body = json.loads(request.body)
    return bool(body.get("max_tokens") == 1 and body["messages"][0]["content"] == "hi")


async def proofs(hub: RunningHub) -> None:
    """Run a round of the watchdog, and wait for the canaries that it sends."""
    hub.hub.watchdog.round()
    await no_canaries(hub)


async def no_canaries(hub: RunningHub) -> None:
    await until(lambda: shown(hub.hub.watchdog, "canaries") == 0)


@asynccontextmanager
async def broken(
    *models: str, state: BreakerState = BreakerState.OPEN, **settings: Any
) -> AsyncIterator[tuple[ScriptedWorker, RunningHub]]:
    """Run a hub with one worker, which its breaker has taken out.

    The worker has been repaired since.
    """
    settings = {"health__interval": RARELY} | SHORT | ONE_CALL | settings
    async with (
        ScriptedWorker(*models) as worker,
        running_hub(worker, clock=Clock(), **settings) as hub,
    ):
        worker.default(reset())
        for _ in range(FAILURES):
            assert (await hub.post(CHAT, STREAM)).status == 502
        breaker = breaker_of(hub, worker)
        assert breaker.transitions[BreakerState.OPEN] == 1
        worker.default(*answer({"choices": []}))
        worker.requests.clear()
        if state is BreakerState.HALF_OPEN:
            hub.advance(OPEN)
        assert breaker.state is state
        yield worker, hub


# --- Out --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [(reset(),), (send(b"garbage\r\n\r\n"), close())], ids=["reset", "garbage"]
)
async def test_a_healthy_worker_that_cannot_generate_is_taken_out(
    fault: Script,
) -> None:
    """And stays out: a ping proves nothing about what it does not use."""
    async with (
        ScriptedWorker() as bad,
        ScriptedWorker() as good,
        running_hub(bad, good, health__interval=0.02, breaker__open=60, **TRIES) as hub,
    ):
        bad.default(*fault)
        for _ in range(3 * FAILURES):
            assert (await hub.post(CHAT, STREAM)).status == 200
        assert len(bad.requests) == FAILURES
        assert breaker_of(hub, bad).state is BreakerState.OPEN
        await bad.pinged(9)
        await proofs(hub)
        for _ in range(20):
            response = await hub.post(CHAT, STREAM)
            assert response.header("x-gollama-attempts") == "1"
        assert len(bad.requests) == FAILURES
        [record, _] = hub.hub.registry.workers
        assert record.state.value == "ready"


async def test_a_broken_worker_gets_only_canaries() -> None:
    """Its health is good; each failed canary opens the breaker again."""
    async with (
        ScriptedWorker() as bad,
        ScriptedWorker() as good,
        running_hub(
            bad,
            good,
            clock=Clock(),
            health__interval=0.02,
            **SHORT,
            **TRIES,
        ) as hub,
    ):
        bad.default(reset())
        while len(bad.requests) < FAILURES:
            assert (await hub.post(CHAT, STREAM)).status == 200
        breaker = breaker_of(hub, bad)
        for _ in range(5):
            hub.advance(OPEN)
            assert breaker.state is BreakerState.HALF_OPEN
            for _ in range(4):
                assert (await hub.post(CHAT, STREAM)).status == 200
            await proofs(hub)
            assert breaker.reason == "the proof failed"
        assert len(bad.requests) == FAILURES + 5
        assert all(map(is_canary, bad.requests[FAILURES:]))


@pytest.mark.parametrize(
    "fault",
    [
        (reset(),),
        (send(loading()),),
        (send(error_reply(429, "no", "rate_limit_error")),),
        (send(error_reply(500, "no")),),
    ],
    ids=["reset", "503", "429", "500"],
)
async def test_a_worker_that_fails_fast_attracts_no_load(fault: Script) -> None:
    """Failing is the quickest way to be done."""
    async with (
        ScriptedWorker() as bad,
        ScriptedWorker() as good,
        running_hub(
            bad, good, health__interval=RARELY, breaker__busy_max=60, **TRIES
        ) as hub,
    ):
        bad.default(*fault)
        for _ in range(60):
            assert (await hub.post(CHAT, STREAM)).status == 200
        assert 0 < len(bad.requests) <= FAILURES
        assert len(good.requests) == 60


async def test_open_breakers_are_reported_immediately_with_retry_after() -> None:
    """No worker is tried in the hope that it may work."""
    async with broken(breaker__open=60, breaker__open_max=60) as (worker, hub):
        for _ in range(3):
            response = await hub.post(CHAT, STREAM)
            assert response.status == 503
            error = response.json()["error"]
            assert error["code"] == "no_worker_available"
            assert "1 serve it (1 breaker open)" in error["message"]
            assert 30 <= int(response.header("retry-after") or "") <= 60
        assert not worker.requests
        assert (await hub.get("/readyz", None)).status == 503


# The end of a request, and whether it counts as a failure.
ENDS: dict[str, tuple[Script, bool]] = {
    "reset": ((reset(),), True),
    "closed": ((close(),), True),
    "garbage": ((send(b"SSH-2.0\r\n\r\n"), close()), True),
    "cut": ((send(sse_head() + chunk(BEGUN)), reset()), True),
    "ended early": ((send(sse_head() + chunk(BEGUN) + last_chunk()), close()), True),
    "401": ((send(error_reply(401, "no", "authentication_error")),), True),
    "400": ((send(error_reply(400, "no", "invalid_request_error")),), False),
    "404": ((send(error_reply(404, "no", "not_found_error")),), False),
    "429": ((send(error_reply(429, "no", "rate_limit_error")),), False),
    "500": ((send(error_reply(500, "no")),), False),
    "501": ((send(error_reply(501, "no", "not_supported_error")),), False),
    "loading": ((send(loading()),), False),
    "good": (stream_of(2), False),
}


@pytest.mark.parametrize("end", ENDS)
async def test_what_a_breaker_counts_as_a_failure(end: str) -> None:
    script, failed = ENDS[end]
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_CALL) as hub:
        worker.script(*script)
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_to_end()
        breaker = breaker_of(hub, worker)
        await until(lambda: not hub.hub.registry.workers[0].in_flight)
        assert count(breaker, Verdict.FAILURE) == int(failed)
        assert count(breaker, Verdict.SUCCESS) == int(end == "good")
        assert count(breaker, Verdict.SLOW) == 0


async def test_clients_that_disconnect_do_not_open_a_breaker() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, breaker__minimum_calls=1) as hub,
    ):
        worker.default(notify("here"), *stream_of(2, "never"))
        for n in range(2 * FAILURES):
            wire = await hub.open(CHAT, STREAM)
            await worker.received(n + 1)
            if n % 2:
                await wire.read_event()
            wire.abort()
            await until(lambda: not hub.hub.registry.workers[0].in_flight)
        breaker = breaker_of(hub, worker)
        assert breaker.available
        assert not any(count(breaker, v) for v in (Verdict.FAILURE, Verdict.SLOW))


# --- Back in ----------------------------------------------------------------------


async def test_a_client_that_disconnects_after_a_hang_counts_against_the_worker() -> (
    None
):
    """Within the allowance no worker is blamed; after it, the worker is."""
    clock = Clock()
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, health__interval=RARELY) as hub,
    ):
        [record] = hub.hub.registry.workers
        record.clock = clock
        breaker = record.breaker
        for waited, slow in ((5, 0), (30, 1)):
            worker.script(notify("here"), expect_eof())
            async with await hub.open(CHAT, STREAM) as wire:
                await worker.reached("here")
                worker.event("here").clear()
                clock.advance(waited)
                wire.abort()
            await until(lambda: not record.in_flight)
            assert count(breaker, Verdict.SLOW) == slow
            assert count(breaker, Verdict.FAILURE) == 0


async def test_no_user_request_reaches_a_worker_whose_breaker_is_half_open() -> None:
    async with broken(state=BreakerState.HALF_OPEN) as (worker, hub):
        responses = await asyncio.gather(*(hub.post(CHAT, STREAM) for _ in range(50)))
        for response in responses:
            assert response.status == 503
            assert "1 breaker half-open" in response.json()["error"]["message"]
        assert not worker.requests


async def test_good_canaries_close_a_breaker() -> None:
    async with broken(state=BreakerState.HALF_OPEN) as (worker, hub):
        breaker = breaker_of(hub, worker)
        worker.script(*answer({"choices": []}))
        worker.script(notify("second"), wait("go"), *answer({"choices": []}))
        hub.hub.watchdog.round()
        await worker.reached("second")  # at once behind the first
        assert breaker.state is BreakerState.HALF_OPEN
        assert (await hub.post(CHAT, STREAM)).status == 503
        worker.release("go")
        await no_canaries(hub)
        assert breaker.closed
        assert len(worker.requests) == 2
        assert all(map(is_canary, worker.requests))
        worker.default(*stream_of(2))
        assert (await hub.post(CHAT, STREAM)).status == 200
        assert (await hub.get("/readyz", None)).status == 200


async def test_the_watchdog_sends_canaries_periodically(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "PERIOD", 0.01)
    async with broken() as (worker, hub):
        hub.advance(OPEN)
        await until(lambda: breaker_of(hub, worker).closed)
        assert [is_canary(request) for request in worker.requests] == [True, True]


async def test_there_is_one_canary_at_a_time() -> None:
    async with broken(state=BreakerState.HALF_OPEN) as (worker, hub):
        worker.default(wait("go"), *answer({"choices": []}))
        for _ in range(10):
            hub.hub.watchdog.round()
        await worker.received(1)
        for _ in range(10):
            hub.hub.watchdog.round()
        assert shown(hub.hub.watchdog, "canaries") == 1
        assert len(worker.requests) == 1
        worker.release("go")
        await no_canaries(hub)
        assert len(worker.requests) == 2


@pytest.mark.parametrize(
    "failing",
    [
        (reset(),),
        (send(error_reply(500, "no")),),
        (stall(),),
        (send(head(200, [("Content-Length", "99")]) + b"{"), reset()),
    ],
    ids=["reset", "500", "silent", "cut"],
)
async def test_a_canary_that_dies_opens_the_breaker_again(failing: Script) -> None:
    """A silent one has the time that the first token of a prompt has."""
    async with broken(state=BreakerState.HALF_OPEN, timeouts__allowance=0.2) as (
        worker,
        hub,
    ):
        worker.default(*failing)
        breaker = breaker_of(hub, worker)
        await proofs(hub)
        assert breaker.transitions[BreakerState.OPEN] == 2
        assert breaker.reason == "the proof failed"


async def test_a_hub_that_stops_does_not_wait_for_its_canaries() -> None:
    async with broken(state=BreakerState.HALF_OPEN) as (worker, hub):
        worker.default(expect_eof())
        hub.hub.watchdog.round()
        await worker.received(1)
    # Leaving the hub's block finds no task of it.


async def test_what_a_breaker_does_shows_in_the_metrics_and_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """BreakerState, transitions and causes, of the machine and of a model."""
    async with broken(metrics__open=True) as (worker, hub):
        [record] = hub.hub.registry.workers
        record.breaker_of("tiny").record(Verdict.FAILURE)
        page = (await hub.get("/metrics")).body.decode()
    machine, model = (f'model="{name}"' for name in ("", "tiny"))
    where = f'worker="{worker.name}"'
    cause = 'cause="consecutive"'
    for line in (
        f'gollama_breaker_state{{{machine},state="open",{where}}} 1.0',
        f'gollama_breaker_state{{{model},state="closed",{where}}} 1.0',
        f'gollama_breaker_transitions_total{{{machine},state="open",{where}}} 1.0',
        f"gollama_breaker_openings_total{{{cause},{machine},{where}}} 1.0",
    ):
        assert line in page
    expected = f"worker {worker.name}: breaker closed -> open (5 failures in a row)"
    assert expected in caplog.messages


# --- Without canaries -------------------------------------------------------------


async def test_without_canaries_one_request_at_a_time_proves_a_worker() -> None:
    """A hundred at once: one goes there, the others do not wait for what it shows."""
    async with broken(state=BreakerState.HALF_OPEN, breaker__canary=False) as (
        worker,
        hub,
    ):
        worker.default(notify("here"), wait("go"), *answer({"choices": []}))
        first = asyncio.create_task(hub.post(CHAT, WHOLE))
        await worker.reached("here")
        others = await asyncio.gather(*(hub.post(CHAT, WHOLE) for _ in range(99)))
        assert {response.status for response in others} == {503}
        worker.release("go")
        assert (await first).status == 200
        assert len(worker.requests) == 1
        breaker = breaker_of(hub, worker)
        assert breaker.state is BreakerState.HALF_OPEN
        assert (await hub.post(CHAT, WHOLE)).status == 200
        assert breaker.state is BreakerState.CLOSED
        await proofs(hub)
        assert len(worker.requests) == 2


async def test_a_request_that_proves_a_worker_bad_goes_to_the_next_one() -> None:
    async with (
        ScriptedWorker() as bad,
        ScriptedWorker() as good,
        running_hub(
            bad,
            good,
            clock=Clock(),
            health__interval=RARELY,
            breaker__canary=False,
            **SHORT,
            **TRIES,
        ) as hub,
    ):
        bad.default(reset())
        breaker = breaker_of(hub, bad)
        while breaker.state is not BreakerState.OPEN:
            assert (await hub.post(CHAT, STREAM)).status == 200
        hub.advance(OPEN)
        bad.requests.clear()
        for _ in range(2):  # one of them has the turn of the bad one
            assert (await hub.post(CHAT, STREAM)).status == 200
        assert breaker.reason == "the proof failed"
        assert len(bad.requests) == 1


@pytest.mark.parametrize("leaves", [True, False])
async def test_an_inconclusive_proof_returns_its_permit(
    leaves: bool,
) -> None:
    """The permit comes back, whether the client leaves or has asked for too much."""
    async with broken(state=BreakerState.HALF_OPEN, breaker__canary=False) as (
        worker,
        hub,
    ):
        if leaves:
            worker.script(notify("here"), expect_eof())
            async with await hub.open(CHAT, STREAM) as wire:
                await worker.reached("here")
                wire.abort()
            await worker.idle()
        else:
            for _ in range(2):  # once more as the client has written it
                worker.script(send(error_reply(400, "no", "invalid_request_error")))
            assert (await hub.post(CHAT, WHOLE)).status == 400
        [record] = hub.hub.registry.workers
        await until(lambda: not record.in_flight)
        assert breaker_of(hub, worker).state is BreakerState.HALF_OPEN
        assert (await hub.post(CHAT, WHOLE)).status == 200


async def test_a_request_can_prove_a_model() -> None:
    """A 5xx fails the proof, whatever its cause."""
    settings: dict[str, Any] = {
        "breaker__consecutive": 1,
        "breaker__canary": False,
        "health__interval": RARELY,
        **SHORT,
        **TRIES,
    }
    async with (
        ScriptedWorker() as bad,
        ScriptedWorker() as good,
        running_hub(bad, good, clock=Clock(), **settings) as hub,
    ):
        bad.default(send(error_reply(500, "no")))
        record = hub.hub.registry.workers[0]
        while record.breaker_of("tiny").state is not BreakerState.OPEN:
            assert (await hub.post(CHAT, STREAM)).status == 200
        breaker = record.breaker_of("tiny")
        hub.advance(OPEN)
        assert breaker.state is BreakerState.HALF_OPEN
        assert record.breaker.state is BreakerState.CLOSED
        for _ in range(2):
            assert (await hub.post(CHAT, STREAM)).status == 200
        assert breaker.reason == "the proof failed"
        hub.advance(OPEN)
        assert breaker.state is BreakerState.HALF_OPEN
        bad.default(*answer({"choices": []}))
        while breaker.state is BreakerState.HALF_OPEN:
            assert (await hub.post(CHAT, STREAM)).status == 200
        assert breaker.state is BreakerState.CLOSED


# --- Models -----------------------------------------------------------------------


async def test_a_failing_model_does_not_affect_the_other_models_of_its_worker() -> None:
    """And the canary asks for this very model."""
    async with (
        ScriptedWorker("ill", "well") as bad,
        ScriptedWorker("ill") as good,
        running_hub(
            bad,
            good,
            clock=Clock(),
            health__interval=RARELY,
            **SHORT,
            **TRIES,
        ) as hub,
    ):
        bad.default(send(error_reply(500, "no")))
        ill = {"model": "ill", **STREAM}
        while len(bad.requests) < FAILURES:
            assert (await hub.post(CHAT, ill)).status == 200
        [record, _] = hub.hub.registry.workers
        assert not record.can_serve("ill")
        bad.default(*stream_of(2))
        response = await hub.post(CHAT, {"model": "well", **STREAM})
        assert response.header("x-gollama-worker") == bad.name
        breaker = record.breaker_of("ill")
        bad.default(*answer({"choices": []}))
        bad.requests.clear()
        hub.advance(OPEN)
        assert breaker.state is BreakerState.HALF_OPEN
        await proofs(hub)
        await proofs(hub)
        assert breaker.closed
        assert [request.json()["model"] for request in bad.requests] == ["ill", "ill"]


async def test_a_model_that_stays_unavailable_opens_its_breaker() -> None:
    """Its canaries find its return; until then they are all that it is asked."""
    async with (
        ScriptedWorker("ill", "well") as worker,
        running_hub(
            worker,
            clock=Clock(),
            health__interval=RARELY,
            breaker__busy_max=0,
            breaker__consecutive=3,
            **SHORT,
        ) as hub,
    ):
        worker.default(send(error_reply(503, "no")))
        [record] = hub.hub.registry.workers
        breaker = record.breaker_of("ill")
        for _ in range(3):
            if breaker.closed:
                await hub.post(CHAT, {"model": "ill", **STREAM})
        assert breaker.transitions[BreakerState.OPEN] == 1
        worker.default(*stream_of(2))
        assert (await hub.post(CHAT, {"model": "well", **STREAM})).status == 200
        worker.default(*answer({"choices": []}))
        hub.advance(OPEN)
        assert breaker.state is BreakerState.HALF_OPEN
        await proofs(hub)
        await proofs(hub)
        assert breaker.closed


# --- Slow -------------------------------------------------------------------------


@asynccontextmanager
async def watched(
    **settings: Any,
) -> AsyncIterator[tuple[ScriptedWorker, RunningHub, Clock]]:
    """Run a worker and a hub; the test advances the clock of the watchdog."""
    settings = {"health__interval": RARELY} | ONE_CALL | settings
    async with ScriptedWorker() as worker, running_hub(worker, **settings) as hub:
        clock = Clock(time.monotonic())
        hub.hub.clock = clock
        yield worker, hub, clock


async def test_a_stalled_stream_is_ended_and_its_worker_counts_as_slow() -> None:
    """After 30 s without an event: an error, and the generation is cancelled."""
    async with watched() as (worker, hub, clock):
        worker.script(send(sse_head() + chunk(role() + token("a"))), expect_eof())
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_event()
            await wire.read_event()
            hub.hub.watchdog.round()
            clock.advance(30)
            hub.hub.watchdog.round()
            assert hub.hub.registry.workers[0].in_flight == 1
            clock.advance(0.1)
            hub.hub.watchdog.round()
            ending = await wire.read_to_end()
        assert not ending.clean
        assert b"worker_slow" in ending.raw
        assert b"[DONE]" not in ending.raw
        await worker.idle()
        breaker = breaker_of(hub, worker)
        assert count(breaker, Verdict.SLOW) == 1
        assert count(breaker, Verdict.FAILURE) == 0
        [record] = hub.hub.registry.workers
        await until(lambda: not record.in_doubt)  # it was checked at once


async def test_occasional_events_keep_a_stream_alive() -> None:
    async with watched() as (worker, hub, clock):
        pace = asyncio.Semaphore(0)
        worker.script(*stream_of(6, pace))
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_event()
            await wire.read_event()
            for _ in range(5):
                hub.hub.watchdog.round()
                clock.advance(29)
                hub.hub.watchdog.round()
                pace.release()
                await wire.read_event()
            ending = await wire.read_to_end()
        assert ending.clean
        assert count(breaker_of(hub, worker), Verdict.SUCCESS) == 1


async def test_slow_answers_open_a_breaker() -> None:
    """Four of five in the window, once there are enough of them."""
    async with watched(breaker__minimum_calls=5) as (worker, hub, clock):
        worker.script(*stream_of(2))
        await hub.post(CHAT, STREAM)
        worker.default(send(sse_head() + chunk(BEGUN)), expect_eof())
        for _ in range(4):
            assert breaker_of(hub, worker).closed
            async with await hub.open(CHAT, STREAM) as wire:
                await wire.read_event()
                hub.hub.watchdog.round()
                clock.advance(31)
                hub.hub.watchdog.round()
                await wire.read_to_end()
        assert breaker_of(hub, worker).state is BreakerState.OPEN
        assert breaker_of(hub, worker).reason == "4 of 5 slow in 30 s"


async def test_comments_show_that_a_worker_lives_but_not_that_it_makes_progress() -> (
    None
):
    """Pings do not count as events, or a stuck GPU would be waited for in vain."""
    async with watched() as (worker, hub, clock):
        pings = asyncio.Semaphore(0)
        steps = [step for _ in range(4) for step in (wait(pings), send(chunk(ping())))]
        worker.script(send(sse_head() + chunk(BEGUN)), *steps, expect_eof())
        async with await hub.open(CHAT, STREAM) as wire:
            for _ in range(2):
                await wire.read_event()
            hub.hub.watchdog.round()
            for _ in range(3):
                clock.advance(10)
                pings.release()
                assert await wire.read_event() == ping()
                hub.hub.watchdog.round()
            clock.advance(1)
            pings.release()
            assert await wire.read_event() == ping()
            hub.hub.watchdog.round()
            ending = await wire.read_to_end()
        assert not ending.clean
        assert b"worker_slow" in ending.raw
        assert count(breaker_of(hub, worker), Verdict.SLOW) == 1


async def test_an_answer_in_one_piece_may_be_silent_for_a_while_and_no_longer() -> None:
    """Only its bytes show progress; it has no place for an error, so it is cut."""
    async with watched() as (worker, hub, clock):
        reply = head(
            200, [("Content-Type", "application/json"), ("Content-Length", "9")]
        )
        worker.script(send(reply + b"{"), expect_eof())
        async with await hub.open(EMBED, {"input": "hello"}) as wire:
            await wire.read_until(b"\r\n\r\n{")
            hub.hub.watchdog.round()
            clock.advance(44)
            hub.hub.watchdog.round()
            assert hub.hub.registry.workers[0].in_flight == 1
            clock.advance(2)
            hub.hub.watchdog.round()
            ending = await wire.read_to_end()
        assert not ending.clean
        assert count(breaker_of(hub, worker), Verdict.SLOW) == 1


async def test_a_refusal_that_stalls_is_not_awaited() -> None:
    async with watched() as (worker, hub, clock):
        error = head(500, [("Content-Length", "99")])
        worker.script(send(error + b"{"), expect_eof())
        async with await hub.open(CHAT, STREAM) as wire:
            await until(lambda: shown(hub.hub.proxy, "running") == 1)
            await until(lambda: any(relay.status for relay in relays(hub)))
            hub.hub.watchdog.round()
            clock.advance(46)
            hub.hub.watchdog.round()
            response = await wire.read_response()
        assert response.status == 504
        assert response.json()["error"]["code"] == "worker_slow"


async def test_a_client_that_does_not_read_does_not_count_against_its_worker() -> None:
    """While the client blocks, the clocks are stopped; then they restart from zero."""
    text = "x" * 60_000
    many = 300
    async with watched() as (worker, hub, clock):
        worker.script(
            send(sse_head()),
            *(send(chunk(token(text))) for _ in range(many)),
            notify("sent"),
            wait("end"),
            send(chunk(finish() + done()) + last_chunk()),
            close(),
        )
        async with await hub.open(CHAT, STREAM, receive_buffer=4096) as wire:
            await wire.read_event()
            await settled(lambda: worker.requests[0].sent)
            for _ in range(10):
                hub.hub.watchdog.round()
                clock.advance(29)
            hub.hub.watchdog.round()
            assert not worker.event("sent").is_set()
            for _ in range(many - 1):
                assert await wire.read_event()
            hub.hub.watchdog.round()
            clock.advance(29)
            hub.hub.watchdog.round()
            worker.release("end")
            ending = await wire.read_to_end()
        assert ending.clean
        breaker = breaker_of(hub, worker)
        assert count(breaker, Verdict.SLOW) == 0
        assert count(breaker, Verdict.SUCCESS) == 1


async def test_an_ended_answer_is_no_longer_watched() -> None:
    async with watched() as (worker, hub, clock):
        worker.default(*chat_stream(["a", "b"]))
        for _ in range(3):
            assert (await hub.post(CHAT, STREAM)).status == 200
        await until(lambda: shown(hub.hub.proxy, "running") == 0)
        clock.advance(1000)
        hub.hub.watchdog.round()
        assert count(breaker_of(hub, worker), Verdict.SUCCESS) == 3
