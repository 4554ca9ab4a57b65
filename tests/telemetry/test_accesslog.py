"""Each request makes one line, without any text of its client's conversation."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from gollama_proxy.telemetry import accesslog
from gollama_proxy.telemetry.accesslog import LineTemplate, Outcome, Record, access
from gollama_proxy.telemetry.lines import (
    JournalFormatter,
    JsonFormatter,
    LineFormatter,
    TerminalFormatter,
    TextFormatter,
)
from gollama_proxy.telemetry.logs import BatchHandler
from gollama_proxy.wire.errors import Code
from gollama_proxy.wire.headers import TraceContext
from tests.fakes.asks import CHAT
from tests.fakes.client import Wire, request_head
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import (
    chat_completion,
    chunk,
    error_event,
    error_reply,
    head,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    Script,
    answer,
    chat_stream,
    close,
    event_stream,
    reset,
    send,
    stall,
    stream_of,
)
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

FULL = Record(
    id="0123456789abcdef",
    method="POST",
    route=CHAT,
    remote="10.0.0.7",
    subject="alice",
    model="qwen",
    worker="gpu1",
    attempts=2,
    status=502,
    outcome=Outcome.ERROR,
    error=Code.WORKER_LOST,
    detail="connection reset by peer",
    bytes=1234,
    tokens=7,
    started=1000.0,
    queued=0.25,
    first_byte=0.01234,
    duration=12.3456,
)
SHOWN = {
    "remote": "10.0.0.7",
    "subject": "alice",
    "method": "POST",
    "route": CHAT,
    "status": 502,
    "outcome": "error",
    "error": "worker_connection_lost",
    "detail": "connection reset by peer",
    "model": "qwen",
    "worker": "gpu1",
    "attempts": 2,
    "first_byte_ms": 12.3,
    "duration_ms": 12345.6,
    "tokens": 7,
    "bytes": 1234,
    "id": "0123456789abcdef",
}


TEXT, JSON = TextFormatter(), JsonFormatter()
JOURNAL = JournalFormatter(TEXT)
FORMS = (TEXT, JSON, JOURNAL, TerminalFormatter(colours=True))
TRACE = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", True, "")
NOW, TIME = 1_800_000_000.0429, "2027-01-15T08:00:00.042Z"


def logged(record: Record, form: LineFormatter) -> str:
    """Return the line of a record, at a fixed time."""
    return form.line(TIME, logging.INFO, "request", record.fields())


# --- A line -----------------------------------------------------------------------


def test_a_line_shows_the_fields_in_this_order() -> None:
    assert FULL.fields() == SHOWN
    assert list(FULL.fields()) == list(SHOWN)


def test_empty_fields_are_not_shown() -> None:
    assert Record("1", "GET").fields() == {"method": "GET", "route": "other", "id": "1"}
    # Zero milliseconds are not shown, a tenth of one is.
    assert "first_byte_ms" not in Record("1", "GET", first_byte=0.00001).fields()
    assert Record("1", "GET", first_byte=0.0001).fields()["first_byte_ms"] == 0.1


def test_a_line_as_text() -> None:
    assert logged(FULL, TEXT) == (
        f"{TIME} info request remote=10.0.0.7 subject=alice "
        f"method=POST route={CHAT} status=502 outcome=error "
        'error=worker_connection_lost detail="connection reset by peer" model=qwen '
        "worker=gpu1 attempts=2 first_byte_ms=12.3 duration_ms=12345.6 tokens=7 "
        "bytes=1234 id=0123456789abcdef"
    )


def test_a_line_as_json() -> None:
    line = logged(FULL, JSON)
    assert "\n" not in line
    entry = json.loads(line)
    begin = {"time": TIME, "level": "info", "message": "request"}
    assert entry == begin | SHOWN
    assert list(entry) == [*begin, *SHOWN]


TEXTS = st.text(max_size=8) | st.sampled_from(["alice", "10.0.0.7", "a b", "\ud800"])
NUMBERS = st.integers(0, 1 << 40)
SECONDS = st.floats(0, 1e6)
RECORDS = st.builds(
    Record,
    id=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    method=st.text(min_size=1),
    route=st.text(min_size=1),
    path=TEXTS | st.text(min_size=150, max_size=250),
    remote=TEXTS,
    subject=TEXTS,
    model=TEXTS,
    worker=TEXTS,
    attempts=NUMBERS,
    rescued=NUMBERS,
    fell_back=TEXTS,
    status=NUMBERS,
    outcome=st.none() | st.sampled_from(Outcome),
    error=st.sampled_from(["", "client_stalled", *Code]),
    detail=TEXTS | st.text(min_size=150, max_size=250),
    bytes=NUMBERS,
    tokens=NUMBERS,
    prompt_tokens=NUMBERS,
    cached_tokens=NUMBERS,
    first_byte=st.none() | SECONDS,
    duration=SECONDS,
)


def plainly(record: Record) -> dict[str, Any]:
    """Choose the fields of a record in the obvious way."""
    first_byte = record.first_byte
    shown = {
        "remote": record.remote,
        "subject": record.subject,
        "method": record.method,
        "route": record.route,
        "path": record.path[:200],
        "status": record.status,
        "outcome": record.outcome,
        "error": record.error,
        "detail": record.detail[:200],
        "model": record.model,
        "worker": record.worker,
        "attempts": record.attempts,
        "rescued": record.rescued,
        "fell_back": record.fell_back,
        "first_byte_ms": None if first_byte is None else round(first_byte * 1000, 1),
        "duration_ms": round(record.duration * 1000, 1),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "tokens": record.tokens,
        "bytes": record.bytes,
        "id": record.id,
    }
    return {key: value for key, value in shown.items() if value not in ("", None, 0)}


def quoted(value: object) -> str:
    plain = r"[a-zA-Z0-9_./:@+-]{1,128}"
    return str(value) if re.fullmatch(plain, str(value)) else json.dumps(value)


@hypothesis.given(RECORDS)
def test_a_plain_program_would_write_the_same_lines(
    record: Record,
) -> None:
    fields = plainly(record)
    assert list(record.fields().items()) == list(fields.items())
    begin = {"time": TIME, "level": "info", "message": "request"}
    assert logged(record, JSON) == json.dumps(begin | fields, separators=(",", ":"))
    pairs = [f"{key}={quoted(value)}" for key, value in fields.items()]
    assert logged(record, TEXT) == " ".join([TIME, "info request", *pairs])
    assert logged(record, JOURNAL) == f"<6>{logged(record, TEXT)}"


@hypothesis.given(RECORDS, st.none() | st.just(TRACE))
def test_fields_that_lines_have_in_common_are_written_as_the_others(
    record: Record, trace: TraceContext | None
) -> None:
    record.trace = trace
    template = LineTemplate(record)
    for form in FORMS:
        for _ in range(2):  # the second one finds what is remembered of the first
            written = template.line(record, form, NOW)
            when = form.stamp(NOW)
            fields = record.fields()
            assert written == form.line(when, template.level, "request", fields)


@pytest.mark.parametrize(
    ("status", "outcome", "level"),
    [
        (200, Outcome.COMPLETE, "info"),
        (200, Outcome.ERROR, "warning"),
        (200, Outcome.CLIENT_GONE, "info"),
        (400, Outcome.ERROR, "info"),
        (499, Outcome.CLIENT_GONE, "info"),
        (500, Outcome.ERROR, "warning"),
        (503, Outcome.REFUSED, "warning"),
        (0, None, "info"),
    ],
)
def test_the_handler_of_the_hub_and_any_other_write_the_same_line(
    status: int, outcome: Outcome, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record("1", "GET", status=status, outcome=outcome, subject="a b")
    monkeypatch.setattr(time, "time", lambda: NOW)
    streams = short, long = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(long)
    handler.setFormatter(TEXT)
    monkeypatch.setattr(access, "handlers", [BatchHandler(short, TEXT), handler])
    monkeypatch.setattr(access, "propagate", False)
    monkeypatch.setattr(access, "level", logging.INFO)
    access.manager._clear_cache()
    accesslog.write(record, LineTemplate(record))
    assert {stream.getvalue() for stream in streams} == {
        f"{TIME} {level} {logged(record, TEXT).partition(' info ')[2]}\n"
    }
    handler.setLevel(logging.ERROR)
    accesslog.write(record, LineTemplate(record))
    assert len(short.getvalue().splitlines()) == 2
    assert len(long.getvalue().splitlines()) == 1
    access.manager._clear_cache()


def test_the_repr_of_a_record_shows_no_text_of_a_user() -> None:
    record = Record("1", "GET", subject="canary", detail="canary", path="canary")
    assert repr(record) == "<Record 1 GET other>"


FORGED = [
    "alice\n2027-01-15T08:00:00.042Z info request subject=bob status=200",
    "alice\r\nx",
    "alice status=200",
    'alice" status=200 x="',
    "alice\\",
    "alice\x1b[31m",
    "alice\x00",
    "alice\tx",
    "",
    "x" * 1000,
    "Zoë 😀",
    "=",
]


@pytest.mark.parametrize("name", FORGED)
def test_a_name_cannot_forge_a_line(name: str) -> None:
    record = Record("1", "GET", subject=name, detail=name, status=401)
    text = logged(record, TEXT)
    assert not re.search(r"[\x00-\x1f]", text)
    assert [m[0] for m in re.finditer(r" status=\S+", _outside_quotes(text))] == [
        " status=401"
    ]
    if name:
        [shown] = re.findall(r' subject=("(?:[^"\\]|\\.)*"|\S+) method', text)
        assert (json.loads(shown) if shown[0] == '"' else shown) == name
    as_json = logged(record, JSON)
    assert not re.search(r"[\x00-\x1f]", as_json)
    assert json.loads(as_json).get("subject", "") == name


def _outside_quotes(text: str) -> str:
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)


# --- In a running hub -------------------------------------------------------------


class Collector(logging.Handler):
    """Keeps all records of all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.arrived = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.arrived.set()

    @property
    def access(self) -> list[logging.LogRecord]:
        return [r for r in self.records if r.name == "gollama_proxy.access"]

    async def lines(self, count: int) -> list[dict[str, Any]]:
        """Wait for `count` lines: an answer ends before its line is logged."""
        async with asyncio.timeout(DEADLINE):
            while len(self.access) < count:
                self.arrived.clear()
                await self.arrived.wait()
        lines = [vars(record)["fields"] for record in self.access]
        assert len(lines) == count, lines
        return lines


@pytest.fixture
def log() -> Iterator[Collector]:
    root, collector = logging.getLogger(), Collector()
    level = root.level
    root.addHandler(collector)
    root.setLevel(logging.DEBUG)
    try:
        yield collector
    finally:
        root.setLevel(level)
        root.removeHandler(collector)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/api/chat?key=secret", "/api/chat"),
        ("/v1/v1/models", "/v1/v1/models"),
        ("/a%0Ab/\x7f\xe9", "/a%0Ab/\x7f\xe9"),
        ("/" + "x" * 5000, "/" + "x" * (accesslog.MOST_PATH - 1)),
        ("http://user:password@hub/a", None),
        ("*", None),
    ],
)
async def test_an_unknown_path_is_logged_to_help_find_a_wrong_base_url(
    path: str, shown: str | None, log: Collector
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        wire = await hub.wire()
        head_ = f"GET {path} HTTP/1.1\r\nHost: hub\r\n\r\n"
        await wire.send(head_.encode("latin-1"))
        assert (await wire.read_response()).status in (400, 404)
        [line] = await log.lines(1)
    found = line.get("path")
    if shown is None or found is None or not shown.isascii():
        assert found is None or "password" not in found
    else:
        assert found == shown
    [entry] = log.access
    text = TEXT.format(entry)
    assert text.isascii()
    assert text.isprintable()


async def test_the_path_of_a_route_is_not_logged(log: Collector) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        await hub.get("/v1/models/some-name")
        [line] = await log.lines(1)
    assert "path" not in line
    assert "some-name" not in str(line)


HALF = (send(sse_head() + chunk(role() + token("a"))),)


@pytest.mark.parametrize(
    ("script", "level"),
    [
        (chat_stream(["a", "b"]), "INFO"),
        ((*HALF, reset()), "WARNING"),
        ((*HALF, send(chunk(error_event("no"))), close()), "WARNING"),
        ((send(error_reply(400, "no")),), "INFO"),
        ((send(error_reply(500, "no")),), "WARNING"),
        ((send(b"nonsense\r\n\r\n"), close()), "WARNING"),
    ],
)
async def test_a_broken_answer_is_a_warning(
    script: Script, level: str, log: Collector
) -> None:
    async with ScriptedWorker() as worker:
        worker.default(*script)
        # No retries or rescues, and the worker stays in use.
        async with running_hub(
            worker, retry__attempts=1, rescue__enabled=False, upstream__assemble=""
        ) as hub:
            ask = {"messages": [], "stream": True}
            async with await hub.open(CHAT, ask) as wire:
                await wire.read_to_end()
            await log.lines(1)
    [entry] = log.access
    assert entry.levelname == level


async def test_a_client_that_leaves_is_no_warning(log: Collector) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(*HALF, stall())
        async with await hub.open(CHAT, {"messages": [], "stream": True}) as wire:
            assert await wire.read_event()
        await log.lines(1)
    assert [entry.levelname for entry in log.access] == ["INFO"]


async def test_the_loss_of_a_busy_worker_is_logged_even_if_a_retry_succeeds(
    log: Collector,
) -> None:
    """Not only when a health check notices it, which may be much later."""
    async with (
        ScriptedWorker() as bad,
        ScriptedWorker() as good,
        # Only requests reveal the state of a worker.
        running_hub(
            bad, good, routing__policy="round_robin", health__interval=3600
        ) as hub,
    ):
        bad.default(reset())
        while not bad.requests:
            ask = {"messages": [], "stream": True}
            assert (await hub.post(CHAT, ask)).status == 200
    losses = [r for r in log.records if "lost while it had a request" in r.getMessage()]
    assert [record.levelname for record in losses] == ["WARNING"]
    assert losses[0].getMessage().startswith(f"worker {bad.name}: lost")


async def test_an_answer_makes_a_line(log: Collector) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        response = await hub.post(CHAT, {"messages": []})
        [line] = await log.lines(1)
        assert line == {
            "remote": "127.0.0.1",
            "subject": "alice",
            "method": "POST",
            "route": CHAT,
            "status": 200,
            "outcome": "complete",
            "model": "qwen",
            "worker": worker.name,
            "attempts": 1,
            "first_byte_ms": line["first_byte_ms"],
            "duration_ms": line["duration_ms"],
            "prompt_tokens": 20,
            "tokens": 3,
            "bytes": len(response.body),
            "id": response.header("x-request-id"),
        }
        assert 0 < line["first_byte_ms"] <= line["duration_ms"]


async def test_each_request_makes_one_line_with_its_outcome(
    log: Collector,
) -> None:
    stream = {"messages": [], "stream": True}
    # The faults of the worker are to reach the client.
    unrepaired = {"retry__attempts": 1, "rescue__enabled": False}
    async with (
        ScriptedWorker("qwen") as worker,
        running_hub(worker, **unrepaired) as hub,
    ):
        expected = []

        async def ends(outcome: str, status: int, error: str | None = None) -> None:
            expected.append((outcome, status, error))
            found = await log.lines(len(expected))
            last = found[-1]
            assert (last["outcome"], last["status"], last.get("error")) == expected[-1]

        await hub.get("/livez", None)
        await ends("complete", 200)
        await hub.get("/metrics", None)
        await ends("error", 401, "invalid_api_key")
        await hub.get("/nowhere")
        await ends("error", 404, "unknown_url")
        await hub.post(CHAT, b"[")
        await ends("error", 400, "invalid_json")
        await (await hub.open(CHAT, stream)).read_events()
        await ends("complete", 200)
        for _ in range(2):  # as a stream, and then as the client sent it
            worker.script(send(error_reply(400, "no", "invalid_request_error")))
        await hub.post(CHAT, {})
        await ends("refused", 400)
        worker.script(*event_stream(error_event("no", 503)))
        assert (await hub.post(CHAT, stream)).status == 503
        await ends("refused", 503)
        worker.script(send(sse_head() + chunk(role() + token("a"))), close())
        await (await hub.open(CHAT, stream)).read_to_end()
        await ends("error", 200, "worker_connection_lost")
        worker.script(reset())
        assert (await hub.post(CHAT, {})).status == 502
        await ends("error", 502, "worker_connection_lost")
        worker.script(*stream_of(2, "never"))
        wire = await hub.open(CHAT, stream)
        assert await wire.read_event()
        wire.close()
        await ends("client_gone", 200)
        worker.script(stall())
        next_one = len(worker.requests) + 1
        wire = await hub.open(CHAT, {})
        await worker.received(next_one)
        wire.abort()
        await ends("client_gone", 499)


async def test_requests_on_one_connection_make_a_line_each(
    log: Collector,
) -> None:
    async with running_hub() as hub, await hub.wire() as wire:
        await wire.send(request_head("GET", "/livez") * 3)
        for _ in range(3):
            assert (await wire.read_response()).status == 200
        assert len({line["id"] for line in await log.lines(3)}) == 3


async def test_a_subject_cannot_forge_a_line(log: Collector) -> None:
    forged = "alice\n2027-01-15T08:00:00.000Z info request subject=bob"
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        await hub.get("/v1/models", hub.token(sub=forged))
        [line] = await log.lines(1)
    assert line["subject"] == forged
    [entry] = log.access
    for formatter in (TEXT, JSON):
        assert "\n" not in formatter.format(entry)


# --- Canaries ---------------------------------------------------------------------

PROMPT, ANSWER, HEADER, QUERY, PATH, NAME, GARBAGE = (
    f"canary-{what}"
    for what in ("prompt", "answer", "header", "query", "path", "model", "garbage")
)
MESSAGES = {"messages": [{"role": "user", "content": PROMPT}]}
HEADERS = [("User-Agent", HEADER), ("Api-Key", HEADER), ("Cookie", HEADER)]


async def post(hub: RunningHub, payload: Any, path: str = CHAT) -> Wire:
    path = f"{path}?{QUERY}"
    return await hub.open(path, payload, headers=[*HEADERS, ("Referer", HEADER)])


async def everything(hub: RunningHub, worker: ScriptedWorker) -> AsyncIterator[Wire]:
    """Make requests with all outcomes, and with canaries wherever one fits."""
    stream = {**MESSAGES, "stream": True}
    body = json.dumps(MESSAGES).encode()
    worker.script(*answer(chat_completion(ANSWER)))
    yield await post(hub, MESSAGES)
    worker.script(*chat_stream([ANSWER, ANSWER]))
    yield await post(hub, stream)
    for wrong in (
        body[:-1],
        body + b"x",
        b"[" + body + b"]",
        body.replace(b"{", b"[", 1),
        body + b"\xff",
        body[:-1] + b', "' + PROMPT.encode() + b'": nul}',
        body[:-1] + b', "' + PROMPT.encode() * 500 + b'": 1}',
        body[:-1] + b', "model": "\\ud800' + PROMPT.encode() + b'"}',
        body[:-1] + b', "messages": []}',
        b'{"' + PROMPT.encode() + b'": ' + b"[" * 200,
        b'{"stream": "' + PROMPT.encode() + b'"}',
        b'{"max_tokens": "' + PROMPT.encode() + b'"}',
        b"",
        body + b" " * 40_000,
    ):
        yield await post(hub, wrong)
    yield await post(hub, {"model": NAME, **MESSAGES})
    yield await post(hub, MESSAGES, "/no/such/path")
    yield await post(hub, MESSAGES, f"/v1/models/{PATH}")
    yield await hub.open(CHAT, MESSAGES, f"{PROMPT}.{PROMPT}.{PROMPT}", headers=HEADERS)
    yield await hub.open(CHAT, MESSAGES, hub.token(exp=1), headers=HEADERS)
    yield await hub.open(CHAT, MESSAGES, hub.token(models=[NAME]), headers=HEADERS)
    yield await hub.open(CHAT, MESSAGES, headers=[*HEADERS, ("Expect", HEADER)])
    yield await hub.open(CHAT, MESSAGES, headers=[*HEADERS, ("Upgrade", HEADER)])
    yield await hub.open(
        CHAT, MESSAGES, headers=[*HEADERS, ("Content-Encoding", HEADER)]
    )
    yield await hub.open(CHAT, MESSAGES, headers=[("X-Request-Id", f"{HEADER} x")])
    for status in (400, 401, 404, 429, 500, 503):
        worker.script(send(error_reply(status, f"{PROMPT} {ANSWER}")))
        yield await post(hub, MESSAGES)
    for broken in (
        sse_head() + chunk(token(ANSWER)),
        sse_head() + chunk(token(ANSWER)) + chunk(error_event(ANSWER)),
        sse_head() + chunk(token(ANSWER)) + b"zz\r\n" + ANSWER.encode(),
        sse_head() + chunk(error_event(ANSWER)),
        sse_head() + ANSWER.encode(),
        ANSWER.encode(),
        head(200, [("Content-Length", ANSWER)]),
        head(302, [("Location", ANSWER)]),
        b"HTTP/1.1 999 " + ANSWER.encode() + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + ANSWER.encode() + b"\r\n\r\n",
        b"",
    ):
        worker.script(send(broken), close())
        yield await post(hub, stream)
    worker.script(*stream_of(2, "never"))
    wire = await post(hub, stream)
    assert await wire.read_event()
    wire.half_close()
    yield wire
    wire = await hub.wire()
    await wire.send(f"{GARBAGE}\r\n\r\n".encode())
    yield wire
    wire = await hub.wire()
    await wire.send(f"GET /livez HTTP/1.1\r\nHost: hub\r\n{GARBAGE}\r\n\r\n".encode())
    yield wire
    chunked = [("Transfer-Encoding", "chunked"), ("Expect", "100-continue")]
    wire = await hub.wire()
    await wire.send(request_head("POST", CHAT, hub.token(), chunked))
    await wire.read_until(b"100 Continue\r\n\r\n")
    await wire.send(chunk(body[:30]) + b"zz\r\n" + PROMPT.encode())
    yield wire
    chunked = [("Transfer-Encoding", "chunked")]
    wire = await hub.wire()
    await wire.send(
        request_head("POST", CHAT, hub.token(), chunked) + b"zz\r\n" + PROMPT.encode()
    )
    yield wire


async def test_no_text_of_a_conversation_is_logged(
    log: Collector,
) -> None:
    requests, tokens = 0, set()
    async with (
        ScriptedWorker("tiny", "other") as worker,
        running_hub(
            worker,
            limits__body=32_768,
            timeouts__body=0.5,
            retry__patience=0.1,
            models__default_model="tiny",
            # The worker stays in use in spite of its faults.
            breaker__busy_max=0,
            breaker__consecutive=1000,
            breaker__minimum_calls=1000,
        ) as hub,
    ):
        mint = hub.token

        def remember(*args: Any, **claims: Any) -> str:
            tokens.add(minted := mint(*args, **claims))
            return minted

        hub.token = remember  # type: ignore[method-assign]
        async for wire in everything(hub, worker):
            requests += 1
            await wire.read_to_end()
            wire.close()
        metrics = (await hub.get("/metrics")).body.decode()
    # Each has a line, also `/metrics` and the bytes that are not HTTP.
    logged = await log.lines(requests + 1)
    assert {line["status"] for line in logged} >= {200, 400, 401, 403, 404, 413}
    formatters = (TEXT, JSON, logging.Formatter())
    written = "\n".join(
        "\n".join([formatter.format(record) for formatter in formatters])
        + repr(vars(record))
        for record in log.records
    )
    # An unknown path is in the log, to help find a wrong base URL, but in no metric.
    assert "/no/such/path" in written
    assert "/no/such/path" not in metrics
    for text in (written, metrics):
        assert "canary" not in text
        for minted in tokens:
            for part in minted.split(".")[1:]:  # all have the same header
                assert part not in text
        assert "Bearer" not in text


@pytest.mark.parametrize("form", [TEXT, JSON])
@pytest.mark.parametrize("place", ["header", "subject"])
async def test_no_token_can_suppress_its_line(
    log: Collector, form: LineFormatter, place: str
) -> None:
    """Half a surrogate pair cannot be encoded as UTF-8; the line is still written.

    Without a valid signature, it can still get into the reason of a refusal.
    """
    async with running_hub() as hub:
        token = hub.token(sub="bob\ud800")
        if place == "header":
            header = b'{"alg":"HS256","crit":["\\ud800"]}'
            token = base64.urlsafe_b64encode(header).rstrip(b"=").decode() + ".e30.AA"
        await hub.get("/v1/models", token)
        await log.lines(1)
    assert form.format(log.access[0]).encode()


async def test_bytes_that_are_not_http_make_a_line(log: Collector) -> None:
    async with running_hub() as hub, await hub.wire() as wire:
        await wire.send(b"hello\r\n\r\n")
        assert (await wire.read_response()).status == 400
        [line] = await log.lines(1)
    assert (line["route"], line["status"], line["error"]) == (
        "other",
        400,
        "bad_request",
    )
