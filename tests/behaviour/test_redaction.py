"""No user text and no secret is in any log, metric, `repr` or error.

A canary is put wherever there is something to keep quiet, and everything that can go
wrong goes wrong, at log level debug.  Then all output of the hub is searched.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import gc
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest

from gollama_proxy.config.settings import Log
from gollama_proxy.edge.response import Response
from gollama_proxy.fleet.health import Watchdog
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.telemetry import accesslog, logs
from gollama_proxy.telemetry.lines import JsonFormatter, TextFormatter
from gollama_proxy.upstream import probe
from gollama_proxy.wire import sse
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.fields import classify
from gollama_proxy.wire.folding import Assembler
from gollama_proxy.wire.partial import Partial, Span, read_event
from gollama_proxy.wire.schema import raw_chunk
from tests.behaviour.test_retries import InOrder
from tests.fakes.asks import CHAT
from tests.fakes.client import Wire, request_head
from tests.fakes.exchange import Exchange
from tests.fakes.hub import SECRET, RunningHub, mint, running_hub, shown
from tests.fakes.replies import (
    chunk,
    done,
    error_event,
    error_reply,
    event,
    finish,
    last_chunk,
    role,
    sse_head,
    token,
)
from tests.fakes.script import Script, Step, close, reset, send, stall
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

pytestmark = pytest.mark.usefixtures("frequent_rounds")

PROMPT = "canary-prompt"
ANSWER = "canary-answer"
CLAIM = "canary-claim"
KEY = "canary-key"
HEADER = "canary-header"
ERROR = "canary-error"  # the text of a worker's error
QUERY = "canary-query"
USER = "canary-user"  # user:password@ of a URL
ALIAS = "canary-alias"
CANARIES = (PROMPT, ANSWER, CLAIM, KEY, HEADER, ERROR, QUERY, USER, ALIAS, SECRET)

BODY = {"model": ALIAS, "messages": [{"role": "user", "content": PROMPT}]}
STREAM = {**BODY, "stream": True}
HEADERS = [
    ("Cookie", HEADER),
    ("Api-Key", HEADER),
    ("Referer", f"http://{USER}:{USER}@a/?{QUERY}"),
    ("User-Agent", HEADER),
    ("Traceparent", HEADER),
]


# --- The witness ------------------------------------------------------------------


class Witness:
    """Records all output of a hub, and searches it."""

    def __init__(self) -> None:
        self.logs = {"text": io.StringIO(), "json": io.StringIO()}
        self.tokens: list[str] = []  # the JWTs themselves
        self.looks = 0
        self.found: list[str] = []

    def __repr__(self) -> str:
        return f"<Witness of {self.looks} looks>"

    def search(self, where: str, text: str, *, but: tuple[str, ...] = ()) -> None:
        for secret in self._secrets(*self.tokens):
            if secret in text and secret not in but:
                at = text.index(secret)
                self.found.append(
                    f"{secret} in {where}: {text[max(0, at - 80) :][:160]}"
                )

    @staticmethod
    @functools.cache
    def _secrets(*tokens: str) -> list[str]:
        parts = [part for token in tokens for part in token.split(".")]
        return [*CANARIES, *tokens, *(part for part in parts if len(part) > 20)]

    def look(self) -> None:
        """Search the `repr` of everything of the hub that is alive."""
        self.looks += 1
        for each in gc.get_objects():
            if _is_ours(type(each)):
                # An alias is a setting, and settings show themselves.
                setting = type(each).__module__ in (
                    "gollama_proxy.config.settings",
                    "gollama_proxy.config.values",
                )
                but = (ALIAS,) if setting else ()
                name = f"the repr of a {type(each).__qualname__}"
                self.search(name, repr(each), but=but)

    def conclude(self) -> None:
        for form, log in self.logs.items():
            self.search(f"the {form} log", log.getvalue())
            assert log.getvalue(), "nothing was logged"
        assert self.looks
        assert not self.found, "\n".join(dict.fromkeys(self.found))


@functools.cache
def _is_ours(cls: type) -> bool:
    return str(cls.__module__).startswith("gollama_proxy.")


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Witness]:
    """Configure the log as `serve` does, at debug; all loggers count."""
    gc.collect()
    gc.freeze()  # what other tests have left is not looked at
    watching = Witness()
    root = logging.getLogger()
    touched = [root, accesslog.access, logging.getLogger("aiohttp")]
    levels = [logger.level for logger in touched]
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(logging, "_srcfile", logging._srcfile)
    for flag in ("logThreads", "logProcesses", "logMultiprocessing"):
        monkeypatch.setattr(logging, flag, getattr(logging, flag))
    logs.configure(Log(level="debug"))
    root.handlers.clear()
    for form, formatter in (("text", TextFormatter()), ("json", JsonFormatter())):
        handler = logging.StreamHandler(watching.logs[form])
        handler.setFormatter(formatter)
        root.addHandler(handler)
    yield watching
    for logger, level in zip(touched, levels, strict=True):
        logger.setLevel(level)


# --- What goes wrong --------------------------------------------------------------


@dataclass
class Stage:
    """A hub, two workers of the same model, and a client."""

    hub: RunningHub
    first: ScriptedWorker
    second: ScriptedWorker
    witness: Witness
    token: str

    async def ask(
        self,
        payload: Any = STREAM,
        path: str = f"{CHAT}?key={QUERY}",
        token: str | None = None,
        headers: list[tuple[str, str]] | None = None,
        version: str = "1.1",
    ) -> Wire:
        wire = await self.hub.wire()
        token = self.token if token is None else token
        self.witness.tokens.append(token)
        sent = HEADERS + (headers or [])
        await wire.post(path, payload, token, headers=sent, version=version)
        return wire

    async def send(self, data: bytes) -> Wire:
        wire = await self.hub.wire()
        await wire.send(data)
        return wire


Act = Callable[[Stage], Awaitable[Wire]]


@dataclass
class Case:
    """One way to go wrong: what the workers do, what the client does."""

    code: Code | None  # in the client's error; None: another one, or none
    scripts: tuple[Script, ...] = ()  # of the first worker that is asked, and so on
    act: Act = Stage.ask
    settings: Mapping[str, Any] = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)


def asking(payload: Any = STREAM, **options: Any) -> Act:
    return lambda stage: stage.ask(payload, **options)


def sending(*lines: str, body: bytes = b"", version: str = "1.1") -> Act:
    """Send a head of one's own with a good token."""

    async def act(stage: Stage) -> Wire:
        pairs = [tuple(line.split(": ", 1)) for line in lines]
        given = [*HEADERS, *pairs]
        path = f"{CHAT}?key={QUERY}"
        head_ = request_head("POST", path, stage.token, given, version=version)  # type: ignore[arg-type]
        return await stage.send(head_ + body)

    return act


def with_token(header: Mapping[str, Any], claims: Mapping[str, Any]) -> Act:
    """Send a token with these parts and a meaningless signature."""

    def encoded(part: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()

    made = ".".join((encoded(header), encoded(claims), "c2lnbmF0dXJl"))
    return asking(token=made)


def signed(**claims: Any) -> Act:
    return asking(token=mint(**{"sub": "alice", "note": CLAIM, **claims}))


async def _look(exchange: Exchange) -> None:
    """Replaced for each test by the look of its witness."""


LOOK = Step("look", (), lambda exchange: _look(exchange))
HALF = (send(sse_head() + chunk(role() + token(ANSWER))), LOOK)
SAID = json.dumps({"error": {"message": ERROR, "type": ERROR, "code": ERROR}}).encode()
GARBAGE = f"{ERROR}\x00\x1b[31m\nnonsense\r\n\r\n".encode()
RESCUE = {"rescue__enabled": True, "retry__attempts": 3}
ASSEMBLE = {"upstream__assemble": CHAT, "retry__attempts": 1}


async def _twice(stage: Stage) -> Wire:
    await (await stage.ask()).read_to_end()
    return await stage.ask()


async def _slowly(stage: Stage) -> Wire:
    given = [*HEADERS, ("Content-Length", "1000")]
    head_ = request_head("POST", CHAT, stage.token, given)
    return await stage.send(head_ + json.dumps(BODY).encode()[:50])


async def _of_three(stage: Stage) -> Wire:
    """Two are running, and a third one comes."""
    dispatcher = stage.hub.hub.proxy
    for number in range(2):
        await stage.ask()
        await until(lambda n=number: shown(dispatcher, "running") > n)  # type: ignore[misc]
    return await stage.ask()


async def _after_a_death(stage: Stage) -> Wire:
    for worker in (stage.first, stage.second):
        await worker.down()
    return await stage.ask()


async def _when_all_are_down(stage: Stage) -> Wire:
    for worker in (stage.first, stage.second):
        await worker.down()
    known = stage.hub.hub.registry.workers
    for record in known:
        record.suspect()
    await until(lambda: not any(worker.available for worker in known))
    return await stage.ask()


async def _scraping(stage: Stage) -> Wire:
    wire = await stage.hub.wire()
    await wire.get(f"/metrics?key={QUERY}", stage.token)
    return wire


async def _without_the_store(stage: Stage) -> Wire:
    """Send a request when the store has been gone for too long to trust tokens."""
    stage.hub.hub.authenticator.suspend()
    return await stage.ask()


async def _in_a_drain(stage: Stage) -> Wire:
    wire = await stage.ask()
    await wire.read_head()
    stage.hub.hub.proxy.cut()
    return wire


async def _and_leave(stage: Stage) -> Wire:
    wire = await stage.ask()
    await wire.read_head()
    wire.abort()
    await until(lambda: not any(w.in_flight for w in stage.hub.hub.registry.workers))
    return await stage.hub.wire()


async def _cancelled(stage: Stage) -> Wire:
    wire = await stage.ask()
    await wire.read_head()
    for running in stage.hub.hub.proxy.running:
        stage.hub.hub.proxy.cancel(running)
    return wire


def calling(method: str, path: str, body: Any = None, *headers: tuple[str, str]) -> Act:
    """Call the admin API, or the routes of agents."""

    async def call(stage: Stage) -> Wire:
        wire = await stage.hub.wire()
        sent = [*HEADERS, *headers]
        filled = json.dumps(body).replace("URL", stage.first.url).encode()
        url = f"{path}?key={QUERY}"
        await wire.post(url, filled, stage.token, headers=sent, method=method)
        return wire

    return call


ADMIN = {"scope": "admin"}
WORKERS = "/admin/workers"


CASES: dict[str, Case] = {
    # The request
    "bad head": Case(
        Code.BAD_REQUEST, act=sending(f"X: {HEADER}\x00", f"{HEADER}\x01: a")
    ),
    "bad chunk": Case(
        Code.BAD_REQUEST,
        act=sending("Transfer-Encoding: chunked", body=f"{PROMPT}\r\n".encode()),
    ),
    "half a body": Case(Code.INVALID_JSON, act=asking(json.dumps(BODY).encode()[:-3])),
    "a key twice": Case(
        Code.INVALID_JSON, act=asking(f'{{"model":"{PROMPT}","model":"b"}}'.encode())
    ),
    "no array": Case(
        Code.INVALID_VALUE, act=asking({"model": ALIAS, "messages": PROMPT})
    ),
    "no number": Case(Code.INVALID_VALUE, act=asking({**BODY, "max_tokens": PROMPT})),
    "no model": Case(
        Code.MODEL_MISSING,
        act=asking({"messages": [PROMPT]}),
        settings={"models__strict_models": True},
    ),
    "model": Case(
        Code.MODEL_NOT_FOUND,
        act=asking({**BODY, "model": PROMPT}),
        settings={"models__strict_models": True},
    ),
    "model of others": Case(Code.MODEL_NOT_ALLOWED, claims={"models": [CLAIM]}),
    "priority": Case(
        Code.PRIORITY_NOT_ALLOWED,
        act=asking(headers=[("X-Gollama-Priority", "interactive")]),
        claims={"priority": "batch"},
    ),
    "scope": Case(
        Code.INSUFFICIENT_SCOPE, act=_scraping, claims={"scope": f"{CLAIM} b"}
    ),
    "path": Case(Code.UNKNOWN_URL, act=asking(path=f"/v1/nothing?{QUERY}")),
    "absolute path": Case(
        Code.UNKNOWN_URL, act=asking(path=f"http://{USER}:{USER}@hub{CHAT}?{QUERY}")
    ),
    "method": Case(Code.METHOD_NOT_ALLOWED, act=asking(path=f"/v1/models?{QUERY}")),
    "slow body": Case(Code.BODY_TIMEOUT, act=_slowly, settings={"timeouts__body": 0.1}),
    "large body": Case(
        Code.BODY_TOO_LARGE,
        settings={"limits__body": 1024},
        act=asking({**BODY, "x": PROMPT * 999}),
    ),
    "coding": Case(
        Code.UNSUPPORTED_ENCODING, act=sending(f"Content-Encoding: {HEADER}")
    ),
    "expectation": Case(
        Code.EXPECTATION_FAILED, act=asking(headers=[("Expect", HEADER)])
    ),
    "quota": Case(Code.RATE_LIMITED, act=_twice, claims={"rpm": 1}),
    "large head": Case(Code.HEAD_TOO_LARGE, act=asking(headers=[("X", HEADER * 2000)])),
    "transfer coding": Case(
        Code.UNSUPPORTED_TRANSFER_ENCODING,
        act=sending("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    ),
    "version": Case(Code.UNSUPPORTED_HTTP_VERSION, act=sending("X: a", version="2.0")),
    # The token
    "no token": Case(Code.INVALID_API_KEY, act=asking(token=KEY)),
    "expired": Case(Code.INVALID_API_KEY, act=signed(exp=1)),
    "no time": Case(Code.INVALID_API_KEY, act=signed(exp=CLAIM)),
    "no subject": Case(Code.INVALID_API_KEY, act=signed(sub=[CLAIM])),
    "no priority": Case(Code.INVALID_API_KEY, act=signed(priority=CLAIM)),
    "no limit": Case(Code.INVALID_API_KEY, act=signed(rpm=CLAIM)),
    "other secret": Case(
        Code.INVALID_API_KEY,
        act=asking(token=mint(CLAIM * 4, sub="alice", note=CLAIM)),
    ),
    "algorithm": Case(
        Code.INVALID_API_KEY, act=with_token({"alg": CLAIM}, {"sub": CLAIM})
    ),
    "critical": Case(
        Code.INVALID_API_KEY,
        act=with_token({"alg": "HS256", "crit": [CLAIM], CLAIM: 1}, {"sub": CLAIM}),
    ),
    "key id": Case(
        Code.INVALID_API_KEY, act=with_token({"alg": "HS256", "kid": [CLAIM]}, {})
    ),
    # The line
    "queue full": Case(
        Code.QUEUE_FULL, ((*HALF, stall()),) * 2, _of_three, {"queue__size": 0}
    ),
    "queue timeout": Case(
        Code.QUEUE_TIMEOUT, ((*HALF, stall()),) * 2, _of_three, {"queue__timeout": 0.2}
    ),
    # The workers
    "nobody": Case(Code.NO_WORKER, act=_when_all_are_down),
    "unreachable": Case(Code.WORKER_UNREACHABLE, act=_after_a_death),
    "lost": Case(Code.WORKER_LOST, ((*HALF, reset()),)),
    "lost early": Case(Code.WORKER_LOST, ((LOOK, reset()),)),
    "no http": Case(Code.WORKER_PROTOCOL, ((LOOK, send(GARBAGE)),)),
    "incomplete": Case(Code.WORKER_INCOMPLETE, ((*HALF, send(last_chunk()), close()),)),
    "key refused": Case(
        Code.WORKER_REFUSED_KEY, ((LOOK, send(error_reply(401, ERROR))),)
    ),
    "silent": Case(
        Code.WORKER_TIMEOUT, ((LOOK, stall()),), settings={"timeouts__first_token": 0.2}
    ),
    "stalled": Case(
        Code.WORKER_SLOW, ((*HALF, stall()),), settings={"timeouts__gap": 0.2}
    ),
    "slow": Case(
        Code.REQUEST_TIMEOUT, ((*HALF, stall()),), settings={"timeouts__request": 0.3}
    ),
    "busy": Case(Code.NO_WORKER, ((LOOK, send(error_reply(503, ERROR))),)),
    "refused": Case(None, ((LOOK, send(error_reply(400, ERROR))),)),
    "failed": Case(None, ((LOOK, send(error_reply(500, ERROR))),)),
    "an error event": Case(
        None, ((LOOK, send(sse_head() + chunk(error_event(ERROR)))),)
    ),
    "an error event, later": Case(
        None, ((*HALF, send(chunk(error_event(ERROR)) + last_chunk()), close()),)
    ),
    # Answers that break off
    "retried": Case(
        None,
        ((LOOK, reset()), (LOOK, send(error_reply(500, ERROR))), (LOOK, reset())),
        settings={"retry__attempts": 3},
    ),
    "rescued": Case(None, ((*HALF, reset()),), settings=RESCUE),
    "diverged": Case(
        Code.WORKER_LOST,
        (
            (*HALF, reset()),
            (send(sse_head() + chunk(role() + token(PROMPT * 9))), LOOK, reset()),
        ),
        settings={**RESCUE, "rescue__attempts": 1},
    ),
    "unreadable": Case(
        Code.WORKER_LOST,
        ((*HALF, reset()), (send(sse_head() + chunk(f"data: {ERROR}\n\n".encode())),)),
        settings={**RESCUE, "rescue__attempts": 1},
    ),
    "failed again": Case(
        Code.WORKER_LOST,
        (
            (*HALF, reset()),
            (send(sse_head() + chunk(role()) + chunk(b"data: %b\n\n" % SAID)), LOOK),
        ),
        settings={**RESCUE, "rescue__attempts": 1},
    ),
    "assembled": Case(None, ((*HALF, reset()),), asking(BODY), ASSEMBLE),
    "assembled, unreadable": Case(
        None,  # it is asked for again, as the client has written it
        (
            (
                *HALF,
                send(
                    chunk(f'data: {{"choices":[{{"{ERROR}"\n\n'.encode()) + last_chunk()
                ),
                close(),
            ),
        ),
        asking(BODY),
        ASSEMBLE,
    ),
    "assembled, odd": Case(
        None,  # it is asked for again, as the client has written it
        (
            (
                *HALF,
                send(
                    chunk(event({"choices": [{"delta": {ERROR: [{"index": 1}]}}]}))
                    + chunk(finish() + done())
                    + last_chunk()
                ),
                close(),
            ),
        ),
        asking(BODY),
        ASSEMBLE,
    ),
    # The admin API
    "not found": Case(
        Code.NOT_FOUND, act=calling("PATCH", f"{WORKERS}/no", {}), claims=ADMIN
    ),
    "conflict": Case(
        Code.CONFLICT,
        act=calling("POST", WORKERS, {"url": "URL", "name": "other"}),
        claims=ADMIN,
    ),
    "media type": Case(
        Code.UNSUPPORTED_MEDIA_TYPE,
        act=calling("POST", WORKERS, {"url": PROMPT}, ("Content-Type", HEADER)),
        claims=ADMIN,
    ),
    "not local": Case(
        Code.LOCAL_ONLY,
        act=calling("POST", WORKERS, {"url": PROMPT}, ("Origin", f"http://{HEADER}")),
        settings={"auth__mode": "off"},
    ),
    "address": Case(
        Code.ADDRESS_REFUSED,
        act=calling(
            "PUT",
            "/agent/workers/desk",
            {"worker": {"url": "http://198.51.100.1:80"}, "proof_port": 8080},
            ("X-Gollama-Agent", "beef" * 10),
        ),
        claims={"scope": "worker"},
    ),
    # The hub
    "cancelled": Case(Code.CANCELLED, ((*HALF, stall()),), _cancelled),
    "store gone": Case(Code.STORE_DOWN, act=_without_the_store),
    "draining": Case(Code.DRAINING, ((*HALF, stall()),), _in_a_drain),
    "gone": Case(None, ((*HALF, stall()),), _and_leave),
    "fine": Case(
        None, ((*HALF, send(chunk(finish() + done()) + last_chunk()), close()),)
    ),
}


@asynccontextmanager
async def stage_of(case: Case, witness: Witness, tmp: Path) -> AsyncIterator[Stage]:
    async with ScriptedWorker(slots=1) as one, ScriptedWorker(slots=1) as two:
        file = tmp / "gollama.toml"
        tables = [
            f'[[workers]]\nurl = "{worker.url}"\napi_key_env = "KEY"\n'
            for worker in (one, two)
        ]
        file.write_text("".join(tables))
        settings = {
            "models__aliases": {ALIAS: "tiny"},
            "health__recheck": 0.05,
            # The client gets the error, unless it is about how it is made up for.
            "retry__attempts": 1,
            "rescue__enabled": False,
            **case.settings,
        }
        async with running_hub(file=file, environ={"KEY": KEY}, **settings) as hub:
            hub.hub.balancer.policy = InOrder()
            for worker, script in zip(cycle((one, two)), case.scripts, strict=False):
                worker.script(*script)
            token = mint(**{"sub": "alice", "note": CLAIM, "jti": CLAIM, **case.claims})
            witness.tokens.append(token)
            yield Stage(hub, one, two, witness, token)
            metrics = (await hub.get("/metrics")).body.decode()
            witness.search("the metrics", metrics)
            witness.look()


QUOTED = [
    CASES[name] for name in ("a key twice", "model", "no model", "model of others")
]


# --- What the documentation states ------------------------------------------------


def codes_in(answer: bytes) -> set[str]:
    """List the codes of the hub's errors in an answer."""
    return {code for code in Code if f'"code":"{code}"}}'.encode() in answer}


SOMEWHERE = StackSummary.from_list([("file.py", 1, "function", "")])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_no_failure_reveals_user_text(
    case: Case, witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(exchange: Exchange) -> None:
        witness.look()

    monkeypatch.setattr("tests.behaviour.test_redaction._look", look)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "slow_callback_duration", 0.0)
    # Debug mode keeps the stack of each call, which takes long and has no user text.
    monkeypatch.setattr(StackSummary, "extract", lambda *args, **kwargs: SOMEWHERE)
    loop.set_debug(True)
    try:
        async with stage_of(case, witness, tmp_path) as stage:
            async with await case.act(stage) as wire:
                answer = b""
                if case is not CASES["gone"]:
                    answer = (await wire.read_to_end()).raw
            stage.first.violations.clear()
            stage.second.violations.clear()
    finally:
        loop.set_debug(False)
    if case.code is not None:
        assert codes_in(answer) == {case.code}, answer
        own = answer[answer.rindex(b'{"error":{') :].decode()
        # An error may name what is wrong in a request: a field, a model.
        but = (PROMPT, ALIAS) if case in QUOTED else ()
        witness.search("an error", own, but=but)
    witness.search("an answer", answer.decode(), but=(PROMPT, ANSWER, ERROR, ALIAS))
    witness.conclude()


def test_every_error_code_is_provoked_here() -> None:
    reported = {case.code for case in CASES.values()}
    elsewhere = {Code.INTERNAL, Code.CONTEXT_LENGTH}
    assert reported - {None} == set(Code) - elsewhere


# --- Bugs -------------------------------------------------------------------------


def failing(*args: Any, **kwargs: Any) -> Any:
    """Fail as code does that is given what it did not expect."""
    raise ValueError(f"invalid literal for int() with base 10: '{PROMPT} {KEY}'")


BUGS = {
    "on the path": (Registry, "resolve"),
    "in the relay": (Relay, "_forward"),
    "at the end": (Relay, "finish"),
    "in the watchdog": (Watchdog, "round"),
    "in the health check": (probe, "ping"),
    "in a canary": (Assembler, "feed"),
}


@pytest.mark.parametrize(("owner", "name"), BUGS.values(), ids=BUGS)
async def test_a_bug_reveals_its_place_and_no_user_text(
    owner: Any,
    name: str,
    witness: Witness,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its traceback has files and lines; its words may be those of a user."""
    case = Case(None, settings={"upstream__assemble": CHAT, "timeouts__silence": 1})
    async with stage_of(case, witness, tmp_path) as stage:
        monkeypatch.setattr(owner, name, failing)
        for worker in stage.hub.hub.registry.workers:
            worker.suspect()
        payload = BODY if owner is Assembler else STREAM
        async with await stage.ask(payload) as wire:
            answer = (await wire.read_to_end()).raw
        witness.search("an answer", answer.decode(), but=(ANSWER, ALIAS))
        await until(lambda: "ValueError" in witness.logs["text"].getvalue())
        monkeypatch.undo()
    log = witness.logs["text"].getvalue()
    assert "Traceback" in log
    assert __file__ in log
    witness.conclude()


async def test_what_asyncio_logs_about_a_bug_is_shortened(
    witness: Witness, unretrieved: list[str]
) -> None:
    """It lists the `repr` of everything that was involved."""
    loop = asyncio.get_running_loop()
    failed = loop.create_future()
    failed.set_exception(ValueError(PROMPT))
    del failed
    gc.collect()
    loop.call_exception_handler(
        {"message": "it failed", "exception": OSError(5, PROMPT), "future": [PROMPT]}
    )
    witness.look()
    log = witness.logs["text"].getvalue()
    [reported] = unretrieved
    assert reported.startswith("Future exception was never retrieved")
    unretrieved.clear()
    assert "Future exception was never retrieved" in log
    assert "it failed\nTraceback (most recent call last):\nOSError: Input/output" in log
    witness.conclude()


# --- Objects that live for a moment -----------------------------------------------


def test_the_reprs_of_parsed_answers_show_no_text() -> None:
    read = read_event(token(ANSWER).strip())
    assert read is not None
    folded = raw_chunk.decode(token(ANSWER)[6:].strip())
    reported = Partial("i", 1, "m", (Span("text", ANSWER),), 1)
    answer = Response(ANSWER.encode())
    error = sse.error_in(error_event(ANSWER)[6:])
    field_ = classify(f'"{ANSWER}"'.encode(), 0)
    raised = RequestError(Code.MODEL_NOT_FOUND, ANSWER)
    for each in (read, read.chunk, read.chunk.choices, folded, reported, answer):
        assert ANSWER not in repr(each)
    for other in (error, field_, raised):
        assert ANSWER not in repr(other)
