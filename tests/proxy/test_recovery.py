"""What follows a failure, and the rest of a broken answer from other workers."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from gollama_proxy.config.settings import Config, Retry
from gollama_proxy.edge.response import Client, ReportedError, Response, Sent
from gollama_proxy.fleet.breaker import BreakerState, Verdict
from gollama_proxy.fleet.lease import Result
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.worker import LastError, Worker
from gollama_proxy.proxy import recovery
from gollama_proxy.proxy.attempt import Failure, failure_of
from gollama_proxy.proxy.body import Rewriter
from gollama_proxy.proxy.failures import Cause, DrainedError
from gollama_proxy.proxy.plan import PAUSE, Plan
from gollama_proxy.proxy.recovery import Resume
from gollama_proxy.proxy.response import Assembly, Stream
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.scheduling.balancer import RetryBudget
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.telemetry.accesslog import MOST_DETAIL, Outcome, Step
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import (
    OVERFLOW_TYPE,
    Code,
    NoWorkerError,
    Overflow,
    ProxyError,
    WorkerError,
)
from gollama_proxy.wire.folding import UnfoldableError
from gollama_proxy.wire.headers import TraceContext
from gollama_proxy.wire.partial import DivergedError
from gollama_proxy.wire.schema import ENDPOINTS
from tests.fakes import requests
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock
from tests.fakes.pool import worker
from tests.fakes.replies import done, finish, role, token

# Blanks that no program writes, by which an unchanged body is known.
BODY = b'{"model":"tiny" ,  "stream":true,"messages":[{"role":"user","content":"hi"}]}'
BEGUN = role() + token(" no") + token(" to")


class Recorder:
    """What a client of the hub has received."""

    def __init__(self) -> None:
        self.sent = b""
        self.failures: list[ProxyError] = []
        self.client = Client(self, self, self, chunked=False)
        self.paused = False

    def __repr__(self) -> str:
        return f"<Recorder {len(self.sent)} bytes>"

    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None:
        pass


def resumed(relayed: bytes = BEGUN) -> Resume:
    resume = Resume.begin(BODY, "tiny", True, relayed)
    assert resume is not None
    return resume


def rest_for(resume: Resume, recorder: Recorder, worker: str = "b") -> Client:
    return resume.client_of(
        recorder.client, "tiny", worker, fail=recorder.failures.append
    )


# --- Continuing an answer ---------------------------------------------------------


def test_the_whole_answer_is_asked_for_with_the_clients_own_bytes() -> None:
    resume = resumed()
    assert json.loads(resume.request("tiny"))["messages"][-1]["content"] == " no to"
    assert resume.ask_for_all()
    assert resume.request("tiny") == BODY
    assert not resume.ask_for_all()  # that was the last way
    resume = resumed()
    assert resume.ask_for_all()
    assert json.loads(resume.request("other"))["model"] == "other"


def test_a_continuation_drains_as_its_client_does_and_has_no_frames() -> None:
    recorder = Recorder()
    client = rest_for(resumed(), recorder)
    assert client.protocol is recorder
    assert client.writer is recorder
    assert client.chunked is False


def test_each_continuation_that_sent_something_is_counted() -> None:
    resume, recorder = resumed(), Recorder()
    for number in (1, 2, 3):
        resume.request("tiny")
        assert not resume.broke()  # nothing was sent
        client = rest_for(resume, recorder)
        assert not resume.broke()
        client = rest_for(resume, recorder)
        echo = token(resume.partial.text)
        client.send(role() + echo + token(f" wu{number}"))
        comment = f": gollama rescued {number} by b\n\n".encode()
        assert recorder.sent.count(comment) == 1
        assert resume.broke() is True
        assert not resume.broke()
        assert resume.count == number
    client = rest_for(resume, recorder)
    client.send(role() + token(resume.partial.text) + finish() + done())
    resume.finish()
    assert resume.count == 4
    assert recorder.sent.endswith(done())
    assert not recorder.failures


def test_after_another_answer_nothing_more_is_sent() -> None:
    resume, recorder = resumed(), Recorder()
    resume.request("tiny")
    client = rest_for(resume, recorder)
    client.send(role() + token("something else") + token(" altogether"))
    [failure] = recorder.failures
    assert isinstance(failure, DivergedError)
    client.send(token(" no to") + finish() + done())
    assert recorder.sent == b""
    assert len(recorder.failures) == 1
    with pytest.raises(WorkerError) as raised:
        resume.finish()
    assert raised.value is failure
    assert resume.count == 0


def test_an_answer_that_lacks_only_its_end_is_closed_as_its_api_does() -> None:
    chat = resumed(BEGUN + finish())
    assert chat.exhausted
    assert chat.closing().endswith(b"data: [DONE]\n\n")
    assert not resumed().exhausted
    full = Resume.begin(BODY.replace(b"{", b'{"max_tokens":2,', 1), "tiny", True, BEGUN)
    assert full is not None
    assert full.exhausted
    assert b'"delta"' in full.closing()


def test_the_end_that_a_worker_does_not_send_is_added() -> None:
    resume, recorder = resumed(), Recorder()
    resume.request("tiny")
    rest_for(resume, recorder).send(role() + token(" no to") + finish())
    assert not recorder.sent.endswith(done())
    resume.finish()
    assert recorder.sent.endswith(done())


def test_only_a_continued_answer_is_a_part_of_the_next_prompt() -> None:
    resume = resumed()
    resume.request("tiny")
    assert resume.repeated == 2  # tokens
    resume.ask_for_all()
    resume.request("tiny")
    assert resume.repeated == 0


def test_a_worker_that_was_asked_for_all_repeats_it_in_any_number_of_pieces() -> None:
    for whole in (True, False):
        resume, recorder = resumed(), Recorder()
        if whole:
            resume.ask_for_all()
        resume.request("tiny")
        rest_for(resume, recorder).send(BEGUN + token(" wu"))
        assert (token(" wu") in recorder.sent) is whole
        assert bool(recorder.failures) is not whole
        resume.request("tiny")  # a later one is for the rest again
        assert resume.repeated == 2


def test_the_rest_from_another_model_has_its_name() -> None:
    for model, expected in [("tiny", "of the first part"), ("other", "other")]:
        resume, recorder = (
            resumed(BEGUN.replace(b"tiny", b"of the first part")),
            Recorder(),
        )
        resume.request(model)
        client = resume.client_of(recorder.client, model, "b", recorder.failures.append)
        client.send(role() + token(" no to") + token(" wu"))
        event = recorder.sent.partition(b"data: ")[2]
        assert json.loads(event)["model"] == expected


# --- After a failure --------------------------------------------------------------

MESSAGES, NATIVE = "/v1/messages", "/completion"
BEGAN = 900.0  # the request, in the time of the clock
LOST = WorkerError(Code.WORKER_LOST, "It is gone.", detail="reset")
REFUSAL = Response(b'{"error":{"message":"no"}}', 400)
LOGGER = recovery.logger.name


class Stage:
    """A request whose first attempt is on the first of some workers."""

    def __init__(self, *workers: Worker, path: str = CHAT, **limits: Any) -> None:
        self.clock = Clock()
        self.workers = workers or (self.worker("a"), self.worker("b"))
        self.transport = Transport()
        request = requests.request("POST", path, transport=self.transport)
        self.x = x = Exchange(request, BEGAN)
        x.id, x.endpoint = "r1", ENDPOINTS[path]
        x.body = cast(Any, SimpleNamespace(untouched=True, stream=True))
        x.plan = Plan(
            [Pool("tiny", self.workers)],
            path,
            Config(retry=Retry(**limits)),
            RetryBudget(1.0, 1000, clock=self.clock),
            random.Random(7),
            Ask("tiny"),
        )
        self.begin(self.workers[0])
        self.rewriter = Rewriter(self.clock)

    def __repr__(self) -> str:
        return f"<Stage of {self.x!r}>"

    def worker(self, name: str) -> Worker:
        return worker(name=name, model="tiny", clock=self.clock)

    def begin(self, worker: Worker) -> None:
        self.x.plan.begin(worker)
        self.x.lease = worker.lease("tiny")
        self.x.state = State.WAITING

    def stream(self) -> None:
        """Have the client get the head of a stream, and nothing more."""
        self.x.delivery = Stream(self.x)
        self.x.delivery.notify("wait")

    def feed(self) -> Mock:
        """Have the client get a part of an answer."""
        self.x.delivery = stream = Mock(spec=Stream, begun=True, fed=True)
        stream.withdraw.return_value = b""
        return stream

    async def recover(self, failure: Failure) -> Response | Sent | None:
        lease = self.x.lease
        assert lease is not None
        return await recovery.recover(
            self.x, lease.worker, failure, self.rewriter, self.clock
        )

    def give_up(self, failure: Failure) -> Response | Sent:
        self.x.failure = failure
        return recovery.give_up(self.x)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before attempts in seconds, which take no time."""
    made: list[float] = []

    async def pause(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", pause)
    return made


class Transport(requests.Nowhere):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def __repr__(self) -> str:
        return f"<Transport, {len(self.written)} bytes>"

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0


async def test_a_lost_worker_is_noted_traced_logged_and_remembered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage()
    x, [a, b] = stage.x, stage.workers
    x.trace = TraceContext("1" * 32, "2" * 16, sampled=True, state="")
    x.spans = cast(Any, Mock())
    with caplog.at_level(logging.DEBUG, LOGGER):
        stage.clock.advance(7)
        assert await stage.recover(failure_of(LOST)) is None
    assert x.state is State.BROKEN
    reason = f"{Cause.LOST.value}: reset"
    first = (Step(100.0, "attempt", "a"), Step(107.0, "failed", "a", reason))
    assert x.steps == first
    cast(Any, x.spans).failed.assert_called_once_with("lost", reason)
    assert a.last_error == LastError(1007.0, Code.WORKER_LOST, "reset")
    fields = {"trace": "1" * 32}
    assert [
        (each.levelname, each.getMessage(), cast(Any, each).fields)
        for each in caplog.records
    ] == [
        ("DEBUG", f"request r1: worker a failed: {reason}", fields),
        ("WARNING", "worker a: lost while it had a request (reset)", fields),
    ]
    stage.begin(b)
    assert await stage.recover(Failure(Cause.REFUSED, REFUSAL)) == REFUSAL
    assert x.steps == (*first, Step(107.0, "failed", "b", Cause.REFUSED.value))


@pytest.mark.parametrize("code", [Code.WORKER_LOST, Code.WORKER_INCOMPLETE])
async def test_a_loss_without_a_detail_is_logged_with_its_code(
    code: Code, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    await stage.recover(failure_of(WorkerError(code, "It is gone.")))
    assert caplog.messages == [f"worker a: lost while it had a request ({code})"]
    assert stage.x.steps[-1].reason == Cause.LOST.value


async def test_a_long_detail_is_cut_in_the_steps() -> None:
    stage = Stage()
    error = WorkerError(Code.WORKER_LOST, "It is gone.", detail="x" * 999)
    await stage.recover(failure_of(error))
    assert stage.x.steps[-1].reason == f"{Cause.LOST.value}: {'x' * MOST_DETAIL}"


@pytest.mark.parametrize(
    ("failure", "remembered"),
    [
        (failure_of(DrainedError("a")), False),
        (Failure(Cause.STATUS, Response(b"", 500)), False),
        (Failure(Cause.MODEL, NoWorkerError(Code.NO_WORKER, "Another one.")), False),
        (failure_of(WorkerError(Code.WORKER_TIMEOUT, "It is late.")), True),
    ],
    ids=["drained", "answered", "other model", "timeout"],
)
async def test_other_failures_are_no_losses(
    failure: Failure, remembered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    assert await stage.recover(failure) is None
    assert (stage.workers[0].last_error is not None) is remembered
    assert caplog.messages == []


def test_a_worker_that_keeps_loading_is_left_alone_and_a_busy_one_is_not() -> None:
    for cause, closed in [(Cause.LOADING, False), (Cause.BUSY, True)]:
        stage = Stage()
        busy = stage.workers[0]
        for _ in range(busy.breaker_of("tiny").policy.consecutive):
            lease = busy.lease("tiny")
            failure = recovery.failed(stage.x, lease, Failure(cause, REFUSAL, busy=1e6))
            assert lease.result is Result.BUSY
            # A time that the worker asked for is limited.
            assert failure.busy == busy.breaker_of("tiny").policy.busy_max
            stage.clock.advance(failure.busy + 1)
        assert (busy.breaker_of("tiny").state is BreakerState.CLOSED) is closed


def test_the_context_that_a_worker_reports_is_learnt() -> None:
    stage = Stage()
    lease = stage.workers[0].lease("tiny")
    overflow = Overflow("too long", 600, 512)
    recovery.failed(stage.x, lease, Failure(Cause.CONTEXT, REFUSAL, overflow=overflow))
    assert stage.workers[0].context_of("tiny") == 512
    assert lease.result is Result.REFUSED


def test_a_stream_without_an_end_cannot_be_assembled() -> None:
    """llama-server marks the end; other servers may never do so."""
    incomplete = WorkerError(Code.WORKER_INCOMPLETE, "It ended too early.")
    stage = Stage()
    x, plain = stage.x, stage.workers[0]
    x.delivery = Assembly(x, Mock())
    failure = recovery.failure_on(x, plain, incomplete)
    assert (failure.cause, failure.lasting) == (Cause.UNFOLDABLE, True)
    assert isinstance(failure.answer, WorkerError)
    assert failure.answer.detail == "the stream has no end"
    assert recovery.failure_on(x, plain, LOST).cause is Cause.LOST
    x.resume = resumed()
    assert recovery.failure_on(x, plain, incomplete) == failure_of(incomplete)
    x.resume = None
    plain.observe(Check.OK, "ok", Description((Model("tiny"),), build="b1"))
    assert recovery.failure_on(x, plain, incomplete).cause is Cause.LOST
    x.delivery = Stream(x)
    assert recovery.failure_on(x, stage.workers[1], incomplete).cause is Cause.LOST


def test_a_stream_that_cannot_be_assembled_is_not_continued() -> None:
    stage = Stage()
    stage.x.delivery, stage.x.sent = Assembly(stage.x, Mock()), BODY
    incomplete = WorkerError(Code.WORKER_INCOMPLETE, "It ended too early.")
    relay = relayed(BEGUN)
    failure = recovery.broke_off(stage.x, stage.workers[0], relay, incomplete)
    assert failure.cause is Cause.UNFOLDABLE
    assert (stage.x.resume, stage.x.lost) == (None, None)


@pytest.mark.parametrize("lasting", [True, False])
async def test_a_worker_is_suspected_only_if_it_would_fail_again(lasting: bool) -> None:
    stage = Stage()
    x = stage.x
    x.rewritten = True
    answer = WorkerError(Code.WORKER_PROTOCOL, "It cannot be read.")
    failure = Failure(Cause.UNFOLDABLE, answer, lasting=lasting)
    assert await stage.recover(failure) is None
    assert (x.suspect is not None) is lasting
    assert x.plan.as_sent
    assert x.failure is failure


async def test_a_request_that_the_hub_rewrote_may_be_refused_for_that() -> None:
    for rewritten in (True, False):
        stage = Stage()
        stage.x.rewritten = rewritten
        response = await stage.recover(Failure(Cause.REFUSED, REFUSAL))
        assert stage.x.plan.as_sent is rewritten
        assert response == (None if rewritten else REFUSAL)


@pytest.mark.parametrize(
    ("untouched", "fed", "again"),
    [(True, False, True), (False, False, False), (True, True, False)],
)
async def test_a_request_is_sent_again_if_nothing_of_it_is_used_up(
    untouched: bool, fed: bool, again: bool
) -> None:
    stage = Stage()
    cast(Any, stage.x.body).untouched = untouched
    if fed:
        stage.feed()
    if again:
        assert await stage.recover(failure_of(LOST)) is None
        return
    with pytest.raises(WorkerError) as raised:
        await stage.recover(failure_of(LOST))
    assert raised.value is LOST


@pytest.mark.parametrize("tokens", [600, 0])
async def test_the_length_of_a_prompt_is_learnt_from_a_refusal(tokens: int) -> None:
    stage = Stage()
    overflow = Overflow("too long", tokens, 512)
    assert await stage.recover(Failure(Cause.CONTEXT, REFUSAL, overflow=overflow)) is (
        None
    )
    assert stage.x.plan.needs == ({"tiny": tokens} if tokens else {})


async def test_a_busy_worker_gets_the_request_after_the_time_it_asked_for(
    pauses: list[float],
) -> None:
    stage = Stage(worker(name="a", model="tiny"), patience=5)
    assert await stage.recover(Failure(Cause.BUSY, REFUSAL, busy=6)) == REFUSAL
    assert pauses == []
    stage = Stage(worker(name="a", model="tiny"), patience=5)
    assert await stage.recover(Failure(Cause.BUSY, REFUSAL, busy=4)) is None
    [seconds] = pauses
    assert 4 + PAUSE[0] <= seconds <= 4 + PAUSE[1]


# --- An answer that broke off -----------------------------------------------------


def relayed(data: bytes | None) -> Any:
    """Stand in for a relay that has passed on these bytes."""
    return SimpleNamespace(relayed=lambda: data)


def broken(data: bytes | None = BEGUN, *, fed: bool = True, names: str = "ab") -> Stage:
    """Make a request whose answer broke off behind these bytes."""
    stage = Stage(*(worker(name=name, model="tiny") for name in names))
    stage.feed().fed = fed
    stage.x.sent = BODY
    failure = recovery.broke_off(stage.x, stage.workers[0], relayed(data), LOST)
    assert failure == failure_of(LOST)
    return stage


def test_an_answer_that_broke_off_is_continued_elsewhere() -> None:
    stage = broken(BEGUN + b"data: {")
    x = stage.x
    assert x.lost is LOST
    assert x.resume is not None
    cast(Any, x.delivery).send.assert_called_once_with(x.resume.partial.mend)
    assert x.plan.can_wait(0)  # for any worker, as only broken answers do
    assert json.loads(x.resume.request("tiny"))["messages"][-1]["content"] == " no to"
    assert x.resume.ask_for_all()
    assert x.resume.request("tiny") == BODY


def test_what_the_client_does_not_get_is_not_continued() -> None:
    stage = Stage()
    cast(Any, stage.feed()).withdraw.return_value = token(" to")
    stage.x.sent = BODY
    recovery.broke_off(stage.x, stage.workers[0], relayed(BEGUN), LOST)
    assert stage.x.resume is not None
    assert stage.x.resume.partial.text == " no"


def test_some_answers_are_not_continued() -> None:
    assert broken(None).x.resume is None  # not all of it is known
    assert broken(b"{").x.resume is None  # not of events
    stage = Stage()
    stage.feed()
    recovery.broke_off(stage.x, stage.workers[0], relayed(BEGUN), LOST)
    assert stage.x.resume is None  # the request is not known
    stage.x.sent = BODY
    error = ReportedError(Code.WORKER_LOST, "It has sent an error.")
    recovery.broke_off(stage.x, stage.workers[0], relayed(BEGUN), error)
    assert stage.x.resume is None
    assert stage.x.lost is LOST  # the first one


async def test_a_worker_that_refuses_to_continue_is_asked_for_all(
    pauses: list[float],
) -> None:
    for cause in (Cause.REFUSED, Cause.DIVERGED, Cause.STATUS):
        stage = broken()
        [_, b] = stage.workers
        resume = stage.x.resume
        assert resume is not None
        stage.begin(b)
        resume.request("tiny")
        assert await stage.recover(Failure(cause, REFUSAL)) is None
        assert stage.x.state is State.RESUMING
        assert stage.x.plan.candidates() == [b]
        assert resume.request("tiny") == BODY
        assert pauses == []


async def test_a_worker_that_refuses_all_is_blamed_for_its_5xx_only() -> None:
    for cause, blamed in [(Cause.REFUSED, False), (Cause.STATUS, True)]:
        stage = broken()
        a, b = stage.workers
        x = stage.x
        assert x.resume is not None
        x.resume.ask_for_all()
        x.resume.request("tiny")
        stage.begin(b)
        assert await stage.recover(Failure(cause, REFUSAL)) is None
        stage.begin(a)
        assert x.plan.succeeded() == ([b] if blamed else [])


def test_another_workers_success_shows_that_a_5xx_was_the_workers_own_fault() -> None:
    stage = Stage()
    culprit, good = [each.breaker_of("tiny") for each in stage.workers]
    for _ in range(culprit.policy.consecutive - 1):
        culprit.record(Verdict.FAILURE)
        good.record(Verdict.FAILURE)
    stage.x.plan.retry_after(Cause.STATUS)
    stage.begin(stage.workers[1])
    for _ in range(100):  # as many slow answers would open it
        recovery.settle_blame(stage.x, stage.workers[1])
    good.record(Verdict.FAILURE)  # the first one in a row
    assert good.state is BreakerState.CLOSED
    assert culprit.state is BreakerState.OPEN


async def test_a_client_that_has_nothing_yet_may_get_another_answer() -> None:
    """The same worker gets the request as it was at first."""
    stage = broken(fed=False)
    assert stage.x.resume is not None
    stage.begin(stage.workers[1])
    assert await stage.recover(Failure(Cause.REFUSED, REFUSAL)) is None
    assert stage.x.resume is None
    assert stage.x.state is State.BROKEN
    assert stage.x.plan.candidates() == [stage.workers[1]]


def test_an_answer_that_breaks_off_once_more_is_continued_from_there() -> None:
    stage, recorder = broken(), Recorder()
    x, [a, b] = stage.x, stage.workers
    resume = x.resume
    assert resume is not None
    stage.begin(b)
    resume.request("tiny")
    recovery.broke_off(x, b, relayed(None), LOST)  # before it has sent anything
    assert (x.rescued, x.resume) == (0, resume)
    rest_for(resume, recorder).send(role() + token(" no to") + token(" wu"))
    recovery.broke_off(x, b, relayed(None), LOST)
    assert (x.rescued, x.resume) == (1, resume)
    assert resume.partial.text == " no to wu"
    assert x.plan.tried == (a, b)


@pytest.mark.parametrize("fed", [True, False])
async def test_a_worker_that_was_busy_then_continues_it_before_others(
    fed: bool,
) -> None:
    stage = broken(fed=fed, names="abc")
    x, [_, b, c] = stage.x, stage.workers
    assert x.resume is not None
    stage.begin(b)
    assert await stage.recover(Failure(Cause.BUSY, REFUSAL)) is None
    stage.begin(c)
    x.resume.request("tiny")
    rest_for(x.resume, Recorder()).send(role() + token(" no to") + token(" wu"))
    recovery.broke_off(x, c, relayed(None), LOST)
    assert x.resume is not None
    assert x.plan.candidates() == [b]


async def test_a_client_that_lacks_only_the_end_gets_it_from_the_hub() -> None:
    stage = broken(BEGUN + finish())
    x = stage.x
    assert x.resume is not None
    response = await stage.recover(failure_of(LOST))
    delivery = cast(Any, x.delivery)
    assert response is delivery.finish.return_value
    assert delivery.send.call_args.args == (x.resume.closing(),)


async def test_an_answer_that_cannot_be_assembled_after_all_is_requested_again() -> (
    None
):
    stage = broken(BEGUN + finish(), fed=False)
    cast(Any, stage.x.delivery).finish.side_effect = UnfoldableError("no")
    assert await stage.recover(failure_of(LOST)) is None
    assert stage.x.resume is None
    assert stage.x.plan.as_sent


# --- The end ----------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, NATIVE])
def test_a_prompt_that_is_too_long_is_an_error_in_the_shape_of_the_api(
    path: str,
) -> None:
    stage = Stage(path=path)
    overflow = Overflow("too long", 600, 512)
    with pytest.raises(ProxyError) as raised:
        stage.give_up(Failure(Cause.CONTEXT, REFUSAL, overflow=overflow))
    error = json.loads(raised.value.body())["error"]
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (600, 512)
    assert (error["type"] == OVERFLOW_TYPE) is (path == NATIVE)


def test_a_refusal_has_the_shape_of_the_api() -> None:
    plain, stage = Stage(), Stage(path=MESSAGES)
    assert plain.give_up(Failure(Cause.REFUSED, REFUSAL)) == REFUSAL
    assert plain.x.outcome is Outcome.REFUSED
    response = stage.give_up(Failure(Cause.REFUSED, REFUSAL))
    assert isinstance(response, Response)
    assert response.status == 400
    assert json.loads(response.body)["type"] == "error"
    assembled = Stage(path=MESSAGES)
    assembled.x.delivery = Assembly(assembled.x, Mock())
    assert assembled.give_up(Failure(Cause.REFUSED, REFUSAL)) == response


def test_a_refusal_after_the_head_is_an_event() -> None:
    stage = Stage()
    stage.stream()
    assert isinstance(stage.give_up(Failure(Cause.REFUSED, REFUSAL)), Sent)
    assert stage.x.outcome is Outcome.REFUSED
    assert b'data: {"error":' in stage.transport.written
    assert stage.transport.closed


def test_a_client_with_a_part_of_an_answer_gets_the_reason_of_its_end() -> None:
    stage = broken()
    with pytest.raises(WorkerError) as raised:
        stage.give_up(Failure(Cause.REFUSED, REFUSAL))
    assert raised.value is LOST
    stage = broken()
    stage.x.resume = None
    with pytest.raises(WorkerError):
        stage.give_up(Failure(Cause.REFUSED, REFUSAL))
    stage = broken(fed=False)
    with pytest.raises(WorkerError):  # another worker refused to continue it
        stage.give_up(Failure(Cause.REFUSED, REFUSAL))
    stage.x.resume, stage.x.delivery = None, None
    assert stage.give_up(Failure(Cause.REFUSED, REFUSAL)) == REFUSAL


def test_an_answer_that_is_broken_off_has_its_outcome() -> None:
    stage = Stage()
    stage.stream()
    assert isinstance(recovery.break_off(stage.x, LOST), Sent)
    assert (stage.x.outcome, stage.x.error, stage.x.detail) == (
        Outcome.ERROR,
        Code.WORKER_LOST,
        "reset",
    )
    assert b"It is gone." in stage.transport.written
    assert stage.transport.closed
