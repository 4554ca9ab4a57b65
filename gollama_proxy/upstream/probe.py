"""The hub's own requests to workers: health checks, canaries, and counts of tokens.

A health check requests only what llama-server answers from its HTTP threads: `/health`,
`/v1/models` and `/props`.  `/slots` and `/metrics` wait for the running batch, which
can take more than 20 s, and wake a sleeping server.  A server with another idea of
`/health`, or without `/props`, is a good worker all the same.

The routes that count tokens run beside its slots as well (tools/server/README.md of
llama.cpp).  The count is the one that it compares with its context; only pictures are
left out.

They are sent by a small HTTP client.  Each request has its own connection, which is
closed after the answer: an idle one would cost the worker a thread, and a pooled one
may be dead already.  No cookies, no redirects, no proxy of the environment.

An answer is bounded in time and size.  Compression is not requested; a server in front
of a worker may compress all the same, and what it sends is unpacked in bounded steps.
Nothing that a worker sends can hold up the event loop: framing that brings no body is
limited by `Connection`, and unpacking lets others run between two pieces.

**Machines that sleep** are woken with a Wake-on-LAN packet (`send_magic`).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from gollama_proxy import __version__
from gollama_proxy.config.settings import Health, WorkerConfig
from gollama_proxy.config.tls import explain_tls, for_workers
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.upstream.pool import Target, connect
from gollama_proxy.wire.bodies import CodingError, Unpacker, coding_of
from gollama_proxy.wire.description import (
    Check,
    Description,
    DescriptionError,
    describe,
    read_models,
    read_progress,
)
from gollama_proxy.wire.schema import UNREADABLE
from gollama_proxy.wire.sse import Gatherer, data_of

# Bytes: a worker's lists are small; more is a mistake or an attack.
MAX_ANSWER = 1 << 20
PIECE = 64 << 10  # bytes of a request's body that are written in one go


class Finding(NamedTuple):
    """The result of one health check."""

    check: Check
    reason: str
    description: Description | None = None
    note: str = ""  # what is odd about a good worker; quotes nothing that it sent
    port: int = 0  # at which it answered, if its URL has none

    @property
    def answered(self) -> bool:
        """Whether a llama-server is there, even if it still loads its model."""
        return self.check in (Check.OK, Check.LOADING)


async def examine(worker: WorkerConfig, health: Health) -> Finding:
    """Check a worker once, outside a hub; never raises for a bad worker."""
    tls = for_workers([worker]).get(worker.name)
    return await ping(Target(worker, tls), health)


async def ping(target: Target, health: Health) -> Finding:
    """Check that a worker lives, and learn what it serves.

    The time limit is for each of the three requests.  A worker without a port in its
    URL is looked for at each of `PORTS` until it answers, and again when it stops; the
    target keeps the port.
    """
    ports = target.worker.origin.ports
    if len(ports) == 1:
        return await _ping(target, health)
    if target.found:
        finding = await _ping(target, health)
        if finding.answered:
            return finding._replace(port=target.port)
        others = [port for port in ports if port != target.port]
        return await _look_at(others, target, health, {target.port: finding})
    return await _look_at(ports, target, health, {})


async def _look_at(
    ports: Sequence[int], target: Target, health: Health, known: dict[int, Finding]
) -> Finding:
    """Look for a worker at these ports at once; the first one that answers counts."""
    found = await asyncio.gather(*(_ping(target.at(port), health) for port in ports))
    findings = known | dict(zip(ports, found, strict=True))
    for port, finding in findings.items():
        if finding.answered:
            target.port, target.found = port, True
            return finding._replace(port=port)
    reasons = {each.reason for each in findings.values()}
    if len(reasons) > 1:  # then one port has a server that is not as it should be
        for port, finding in findings.items():
            if finding.check is Check.FAILED:
                return finding._replace(reason=f"port {port}: {finding.reason}")
    [finding, *_] = findings.values()
    if finding.check is Check.FAILED:
        return finding
    where = ", ".join(map(str, findings))
    return finding._replace(reason=f"{finding.reason} (ports {where})")


async def _ping(target: Target, health: Health) -> Finding:
    try:
        status, body, _ = await _get(target, "/health", health)
        if status == 503 and b"oading" in body:
            return Finding(Check.LOADING, "loading model")
        if status in (401, 403):
            return Finding(Check.FAILED, f"/health answered {status}: needs a key")
        if status >= 500 and status != 501:
            return Finding(Check.FAILED, f"/health answered {status}")
        listing = read_models(_body_of(await _get(target, "/v1/models", health)))
        props = await _get(target, "/props", health)
    except FetchError as exc:
        return Finding(Check.REFUSED if exc.refused else Check.FAILED, str(exc))
    except DescriptionError as exc:
        return Finding(Check.FAILED, str(exc))
    description = describe(listing, props.body if props.status == 200 else b"")
    return Finding(Check.OK, "ok", description, listing.note)


async def _get(target: Target, path: str, health: Health) -> Reply:
    return await fetch(target, path, limit=MAX_ANSWER, timeout=health.timeout)


def _body_of(models: Reply) -> bytes:
    """Return the body of a good answer to `/v1/models`; else raise DescriptionError."""
    answered = f"/v1/models answered {models.status}"
    if models.status in (401, 403):
        raise DescriptionError(f"{answered}: a wrong or missing API key")
    if models.status != 200:
        raise DescriptionError(answered)
    if models.flaw:
        raise DescriptionError(f"/v1/models answered {models.flaw}")
    return models.body


async def follow_loading(
    target: Target, note: Callable[[str, float | None], None], health: Health
) -> bool:
    """Follow what a router loads until it ends the stream (see `read_progress`).

    Returns False if it has no such stream, as versions before 2026 have not.

    Raises:
        FetchError: it cannot be reached, or the stream breaks off.
    """

    def notice(event: bytes) -> None:
        if (found := read_progress(event)) is not None:
            note(*found)

    return await follow(target, "/models/sse", notice, timeout=health.timeout)


async def prove(target: Target, model: str, limit: float) -> bool | None:
    """Have a worker generate one token: the canary of a half-open breaker.

    Any answer proves it that is not a failure of the server; an embedding server has no
    chat.  None if the worker is busy or loading its model, which proves nothing.  The
    `limit` is in seconds.
    """
    message = {"role": "user", "content": "hi"}
    body = {"model": model, "messages": [message], "max_tokens": 1}
    try:
        reply = await fetch(
            target,
            "/v1/chat/completions",
            msgspec.json.encode(body),
            limit=MAX_ANSWER,
            timeout=limit,
        )
    except FetchError:
        return False
    if reply.status in (429, 503):
        return None
    return reply.status < 500 or reply.status == 501


# --- Counting the tokens of a prompt ----------------------------------------------


# Seconds; llama-server takes 0.2 s for a prompt of a megabyte.
COUNT_LIMIT = 2.0
MAX_COUNT = 16 << 20  # bytes: the tokens of the largest prompt that can be sent twice

# Routes that have a route for counting.
_COUNTED_BY = {
    "/v1/messages": "/v1/messages/count_tokens",
    "/v1/responses": "/v1/responses/input_tokens",
    "/responses": "/v1/responses/input_tokens",
}


class _Completion(msgspec.Struct):
    prompt: Any = None


class _Answer(msgspec.Struct):
    prompt: str = ""  # of /apply-template
    tokens: list[int] = []  # of /tokenize
    input_tokens: int = 0  # of the routes above


async def count_tokens(
    target: Target, path: str, model: str, body: bytes
) -> int | None:
    """Have a worker count the tokens of a request for this path and model.

    Returns None if they cannot be counted, or not within `COUNT_LIMIT` per question.
    """
    try:
        if path in _COUNTED_BY:
            answer = await _ask(target, _COUNTED_BY[path], body)
            return answer.input_tokens or None
        prompt: object
        if path.endswith("chat/completions"):
            prompt = (await _ask(target, "/apply-template", body)).prompt
        else:
            prompt = msgspec.json.decode(body, type=_Completion).prompt
        if not isinstance(prompt, str) or not prompt:  # a list, of tokens or of prompts
            return None
        question = {
            "model": model,  # for a router
            "content": prompt,
            "add_special": True,
            "parse_special": True,
        }
        answer = await _ask(target, "/tokenize", msgspec.json.encode(question))
    except (FetchError, _NoAnswer, *UNREADABLE):
        return None
    return len(answer.tokens) or None


async def _ask(target: Target, path: str, body: bytes) -> _Answer:
    reply = await fetch(target, path, body, limit=MAX_COUNT, timeout=COUNT_LIMIT)
    if reply.status != 200 or reply.flaw:
        raise _NoAnswer
    return msgspec.json.decode(reply.body, type=_Answer)


class _NoAnswer(Exception):
    """The worker's answer has no count_tokens."""


# --- A small HTTP client ----------------------------------------------------------


class Reply(NamedTuple):
    """An answer; if its body cannot be read, it is empty, and `flaw` has the reason."""

    status: int
    body: bytes
    flaw: str = ""

    def __repr__(self) -> str:
        flaw = self.flaw and f", {self.flaw}"
        return f"<Reply {self.status}, {len(self.body)} bytes{flaw}>"


class FetchError(Exception):
    """No whole answer came; its text is the reason, without anything a worker sent."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused  # the port is closed


async def fetch(
    target: Target,
    path: str,
    body: bytes | None = None,
    *,
    limit: int,
    timeout: float,
) -> Reply:
    """Send a request and return its answer; a POST if it has a JSON `body`.

    `limit` bounds the body, packed and unpacked, in bytes; `timeout` is for all of it,
    in seconds.

    Raises:
        FetchError: the worker cannot be reached, or did not answer in time and in HTTP.
    """
    deadline = asyncio.timeout(timeout)
    try:
        async with deadline:
            connection = await connect(target, any_answer=True)
            try:
                answer = _Gathered(limit)
                connection.start(answer)
                await _send(connection, answer, _head(target, path, body), body or b"")
                await answer.over
                return await answer.read()
            finally:
                connection.close()
    except OSError as exc:  # a TimeoutError is one
        if deadline.expired():
            raise FetchError(f"no answer within {timeout:g} s") from None
        refused = isinstance(exc, ConnectionRefusedError)
        raise FetchError(_why_unreachable(exc), refused=refused) from exc


def _why_unreachable(error: OSError) -> str:
    if why := explain_tls(error):  # whose number is one of OpenSSL's
        return why
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return error.strerror or "cannot be reached"  # name resolution


def _head(target: Target, path: str, body: bytes | None) -> bytes:
    worker = target.worker
    lines = [
        f"{'GET' if body is None else 'POST'} {worker.origin.prefix}{path} HTTP/1.1",
        f"Host: {worker.origin.authority}",
        f"User-Agent: gollama-proxy/{__version__}",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
    ]
    if worker.api_key:
        lines.append(f"Authorization: Bearer {worker.api_key}")
    if body is not None:
        lines.append("Content-Type: application/json")
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode()


async def _send(
    connection: Connection, answer: _Gathered, head: bytes, body: bytes
) -> None:
    """Send a large body in pieces, so that others get their turn of the loop."""
    connection.write(head + body[:PIECE])
    for start in range(PIECE, len(body), PIECE):
        await connection.drain()
        await asyncio.sleep(0)
        if answer.over.done():  # such as an error, for which no whole body is needed
            return
        connection.write(body[start : start + PIECE])


async def follow(
    target: Target, path: str, notice: Callable[[bytes], None], *, timeout: float
) -> bool:
    """Read a stream of events until it ends; `notice` is called with the data of each.

    Returns False at once if the worker has no event stream there.  `timeout` is for
    its first byte, in seconds; the wait between two events has no limit.

    Raises:
        FetchError: the worker cannot be reached, or the stream breaks off.
    """
    try:
        async with asyncio.timeout(timeout):
            connection = await connect(target, any_answer=True)
            events = _Events(notice)
            connection.start(events, _head(target, path, None))
            try:
                await events.begun
            except BaseException:
                connection.close()
                raise
    except OSError as exc:  # a TimeoutError is one
        raise FetchError(_why_unreachable(exc)) from exc
    try:
        return events.begun.result() and await events.over
    finally:
        connection.close()


class _Events:
    """Receives one stream of events (see `connection.Receiver`)."""

    def __init__(self, notice: Callable[[bytes], None]) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[bool] = loop.create_future()
        self.over: asyncio.Future[bool] = loop.create_future()
        self._notice = notice
        self._gatherer = Gatherer()

    def __repr__(self) -> str:
        return f"<_Events {self._gatherer!r}>"

    def head_received(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        kinds = [value for name, value in headers if name.lower() == b"content-type"]
        events = any(kind.startswith(b"text/event-stream") for kind in kinds)
        self.begun.set_result(status == 200 and events)

    def body_received(self, data: bytes) -> None:
        if self.over.done() or not self.begun.result():
            return
        for event in self._gatherer.feed(data):
            found = data_of(event)
            if found is not None:
                self._notice(found)
        if self._gatherer.size > PIECE:
            self.over.set_exception(FetchError("an event without an end"))

    def chunk_received(self, chunk: bytes, head: bytes) -> bool:
        return False

    def answer_ended(self) -> None:
        if not self.over.done():
            self.over.set_result(True)

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        error = FetchError(reason)
        if not self.begun.done():
            self.begun.set_exception(error)
        elif not self.over.done():
            self.over.set_exception(error)


class _Gathered:
    """Receives one answer (see `connection.Receiver`)."""

    def __init__(self, limit: int) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._limit = limit
        self._failure = ""
        self._status = 0
        self._coding = ""
        self._body = bytearray()

    def __repr__(self) -> str:
        return f"<_Gathered {self._status}, {len(self._body)} bytes>"

    async def read(self) -> Reply:
        """Return what has come, unpacked if necessary.

        Raises:
            FetchError: the answer is not complete.
        """
        if self._failure:
            raise FetchError(self._failure)
        if len(self._body) > self._limit:
            return self._too_large()
        body = bytearray()
        try:
            unpacker = Unpacker(self._coding)
            for piece in unpacker.feed(bytes(self._body)):
                body += piece
                if len(body) > self._limit:
                    return self._too_large()
                await asyncio.sleep(0)  # a kilobyte can stand for a megabyte
            unpacker.end()
        except CodingError as exc:
            return Reply(self._status, b"", f"with {exc}")
        return Reply(self._status, bytes(body))

    def _too_large(self) -> Reply:
        return Reply(self._status, b"", f"more than {self._limit} bytes")

    # --- What the connection calls ------------------------------------------------

    def head_received(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status
        self._coding = coding_of(
            value.decode("latin-1")
            for name, value in headers
            if name.lower() == b"content-encoding"
        )

    def body_received(self, data: bytes) -> None:
        if len(self._body) <= self._limit:
            self._body += data
            if len(self._body) > self._limit:
                self._finish()

    def chunk_received(self, chunk: bytes, head: bytes) -> bool:
        return False

    def answer_ended(self) -> None:
        self._finish()

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        if malformed:
            reason = "sent something that is not HTTP"
        elif self._status:
            reason = "its answer broke off"
        self._failure = reason
        self._finish()

    def _finish(self) -> None:
        if not self.over.done():
            self.over.set_result(None)


# --- Machines that sleep ----------------------------------------------------------

WAKE_PORT = 9  # discard


def magic_packet(mac: str) -> bytes:
    """Return the packet that wakes the machine with a hardware address.

    Six bytes of ones, then the address sixteen times (AMD, Magic Packet Technology,
    1995).
    """
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) * 16


def send_magic(mac: str, places: Iterable[str]) -> None:
    """Send the packet to each of these broadcast addresses, which may have a port.

    A machine that sleeps has no address.

    Raises:
        OSError: none of them can be reached.
    """
    packet, failure, sent = magic_packet(mac), OSError("no address"), False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setblocking(False)
        for place in places:
            host, _, port = place.partition(":")
            try:
                sock.sendto(packet, (host, int(port or WAKE_PORT)))
            except OSError as exc:
                failure = exc
            else:
                sent = True
    if not sent:
        raise failure
