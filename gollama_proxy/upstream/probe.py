"""What a worker says about itself: alive or loading, models, slots, context, build.

Only what answers from llama-server's HTTP threads is asked: `/health`, `/v1/models` and
`/props`.  `/slots` and `/metrics` wait for the running batch, for 20 s and more, and
wake a sleeping server.  A server without `/props`, or with another idea of `/health`,
is a good worker all the same; what it does not tell stays unknown.  So does what it
tells in another shape: each field is read by itself, and costs no other.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from contextlib import AbstractAsyncContextManager
from typing import Annotated, NamedTuple, TypeVar

import aiohttp
import msgspec

from gollama_proxy.config.settings import Health, WorkerConfig
from gollama_proxy.config.tls import Credentials, explain, for_workers
from gollama_proxy.upstream.resolver import Resolver
from gollama_proxy.wire.coding import CodingError, Unpacker
from gollama_proxy.wire.description import Check, Description, Model

# A worker's lists are small; more is a mistake or an attack.
MAX_ANSWER = 1 << 20
MOST_MODELS = 1000  # of one worker; each request looks through their names
MAX_NAME = 4000  # characters of a model's name: a path, and what a request can name
MOST_CONTEXT = 1 << 30  # tokens
# What the kernel may hold of an answer, and so what one read can bring.  aiohttp skips
# any number of `100 Continue`, and with reads of 256 KiB of them nobody else had a turn
# of the event loop until the timeout.
RECEIVE_BUFFER = 8 << 10

_T = TypeVar("_T")


class Finding(NamedTuple):
    """The result of one ping."""

    check: Check
    reason: str
    description: Description | None = None
    note: str = ""  # what is odd about a good worker; quotes nothing that it sent


def new_session(*, pooled: bool = False) -> aiohttp.ClientSession:
    """Make the client for the control plane: no cookies, no environment, no coding.

    A server in front of a worker may compress all the same, so bodies are read by
    `read_body`, which bounds what they are unpacked to; aiohttp would not.
    Nor a pool, in what goes on for long: a worker closes idle connections at any time.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0,
            force_close=not pooled,
            resolver=Resolver(),
            socket_factory=_new_socket,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
        trust_env=False,
        auto_decompress=False,
    )


def _new_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return made


class Target(NamedTuple):
    """Whom to ask, and by what means."""

    session: aiohttp.ClientSession
    worker: WorkerConfig
    tls: ssl.SSLContext | bool


def target_of(
    session: aiohttp.ClientSession, worker: WorkerConfig, tls: Credentials | None
) -> Target:
    return Target(session, worker, True if tls is None else tls.context)


async def examine(worker: WorkerConfig, health: Health) -> Finding:
    """Look at a worker once, in a session of its own; never raises for a bad worker."""
    tls = for_workers([worker]).get(worker.name)
    # With a pool, closing it ends all connections.  Else TLS would still be about to
    # say good-bye when the loop of a short command is closed.
    async with new_session(pooled=True) as session:
        return await ping(session, worker, health, tls)


async def ping(
    session: aiohttp.ClientSession,
    worker: WorkerConfig,
    health: Health,
    tls: Credentials | None = None,
) -> Finding:
    """Check that a worker lives, and learn what it serves."""
    target = target_of(session, worker, tls)
    timeout = aiohttp.ClientTimeout(total=health.timeout)
    try:
        status, body = await _get_if_readable(target, "/health", timeout)
        if status == 503 and b"oading" in body:
            return Finding(Check.LOADING, "loading model")
        if status in (401, 403):
            return Finding(Check.FAILED, f"/health answered {status}: needs a key")
        if status >= 500 and status != 501:
            return Finding(Check.FAILED, f"/health answered {status}")
        description, note = await _learn(target, timeout)
    except TimeoutError:
        return Finding(Check.FAILED, f"no answer within {health.timeout:g} s")
    except aiohttp.ClientConnectorError as exc:
        refused = isinstance(exc.os_error, ConnectionRefusedError)
        check = Check.REFUSED if refused else Check.FAILED
        return Finding(check, _why_unreachable(exc))
    except aiohttp.ClientResponseError:  # its text quotes what the worker has sent
        return Finding(Check.FAILED, "sent what is no HTTP answer")
    except aiohttp.ClientPayloadError:
        return Finding(Check.FAILED, "its answer broke off")
    except (aiohttp.ClientError, OSError, _OddAnswer) as exc:
        reason = explain(exc.__cause__ or exc) or str(exc) or type(exc).__name__
        return Finding(Check.FAILED, reason)
    return Finding(Check.OK, "ok", description, note)


def _why_unreachable(exc: aiohttp.ClientConnectorError) -> str:
    number = exc.os_error.errno  # of TLS, one of OpenSSL's
    if why := explain(exc.os_error):
        return why
    if number is not None and number > 0:
        return os.strerror(number).lower()
    return exc.os_error.strerror or "cannot be reached"  # name resolution


async def prove(
    session: aiohttp.ClientSession,
    worker: WorkerConfig,
    model: str,
    limit: float,
    tls: Credentials | None = None,
) -> bool | None:
    """Have a worker generate one token: the canary of a half-open breaker.

    Whatever is no failure of the server proves it; an embedding server has no chat.
    None when it is busy or loading its model, which proves nothing.
    """
    message = {"role": "user", "content": "hi"}
    body = {"model": model, "messages": [message], "max_tokens": 1}
    timeout = aiohttp.ClientTimeout(total=limit)
    try:
        async with session.post(
            url_of(worker, "/v1/chat/completions"),
            data=msgspec.json.encode(body),
            headers={"Content-Type": "application/json", **key_of(worker)},
            timeout=timeout,
            allow_redirects=False,
            ssl=True if tls is None else tls.context,
        ) as response:
            async for _ in response.content.iter_chunked(64 << 10):
                pass  # to its end, which a broken one does not have
            if response.status in (429, 503):
                return None
            return response.status < 500 or response.status == 501
    except (TimeoutError, aiohttp.ClientError, OSError):
        return False


async def _learn(
    target: Target, timeout: aiohttp.ClientTimeout
) -> tuple[Description, str]:
    """Ask what a worker serves; the text says what is odd about its list."""
    status, body = await _get(target, "/v1/models", timeout)
    if status in (401, 403):
        raise _OddAnswer(f"/v1/models answered {status}: a wrong or missing API key")
    if status != 200:
        raise _OddAnswer(f"/v1/models answered {status}")
    listed, note = _models_in(body)
    status, body = await _get_if_readable(target, "/props", timeout)
    props = (_told(body, _Props) if status == 200 else None) or _Props()
    settings = _told(props.default_generation_settings, _Settings) or _Settings()
    context = _sane(settings.n_ctx)  # a router says 0, as it has no model itself
    own = [entry.context for entry in listed]
    build = _told(props.build_info, str) or ""
    description = Description(
        models=tuple(
            Model(entry.name, tokens or context, *_loaded(entry.status))
            for entry, tokens in zip(listed, own, strict=True)
        ),
        slots=_told(props.total_slots, _Slots),
        context=context or next((tokens for tokens in own if tokens), None),
        build=build[:100] if build.isprintable() else "",
    )
    return description, note


def _models_in(body: bytes) -> tuple[list[_Entry], str]:
    """Read the entries of a list that can be offered to clients, each name once.

    The text says how many cannot.
    """
    answer = _told(body, _ModelList)
    if answer is None:
        raise _OddAnswer("/v1/models answered what cannot be read")
    listed = _told(answer.data, list[msgspec.Raw])
    if listed is None:  # as Ollama lists them
        listed = _told(answer.models, list[msgspec.Raw])
    if listed is None and bytes(answer.data) != b"null":  # Go's empty list
        raise _OddAnswer("/v1/models has no list of models")
    found: dict[str, _Entry] = {}
    odd = 0
    for item in listed or ():
        entry = _told(item, _Entry) or _Entry()
        if not _is_name(entry.name):
            odd += 1
        elif len(found) < MOST_MODELS:
            found.setdefault(entry.name, entry)
    if odd and not found:
        raise _OddAnswer("/v1/models has no name that can be used")
    note = f"/v1/models has entries without a usable name: {odd}, skipped"
    return list(found.values()), note if odd else ""


def _is_name(text: str) -> bool:
    """Tell a name from what would break a line of the log, or a terminal."""
    return 0 < len(text) <= MAX_NAME and text.isprintable()


def _sane(context: msgspec.Raw) -> int | None:
    tokens = _told(context, int)
    return tokens if tokens is not None and 0 < tokens <= MOST_CONTEXT else None


async def _get_if_readable(
    target: Target, path: str, timeout: aiohttp.ClientTimeout
) -> tuple[int, bytes]:
    """Request what a worker may answer in any way; an unreadable body is empty."""
    async with _asked(target, path, timeout) as response:
        try:
            return response.status, await read_body(response, MAX_ANSWER)
        except (CodingError, TooLargeError):
            return response.status, b""


async def _get(
    target: Target, path: str, timeout: aiohttp.ClientTimeout
) -> tuple[int, bytes]:
    async with _asked(target, path, timeout) as response:
        try:
            return response.status, await read_body(response, MAX_ANSWER)
        except TooLargeError as exc:
            raise _OddAnswer(f"{path} answered {exc}") from None
        except CodingError as exc:
            raise _OddAnswer(f"{path} answered with {exc}") from None


def _asked(
    target: Target, path: str, timeout: aiohttp.ClientTimeout
) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
    return target.session.get(
        url_of(target.worker, path),
        headers=key_of(target.worker),
        timeout=timeout,
        allow_redirects=False,
        ssl=target.tls,
    )


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read the body of an answer, unpacked if it had to be.

    Raises:
        TooLargeError: it has, or unpacks to, more bytes than `limit`.
        CodingError: it is compressed in a way that cannot be read.
    """
    unpacker = Unpacker(", ".join(response.headers.getall("Content-Encoding", ())))
    body = bytearray()
    async for data in response.content.iter_chunked(64 << 10):
        for piece in unpacker.feed(data):
            body += piece
            if len(body) > limit:
                raise TooLargeError(f"more than {limit} bytes")
            await asyncio.sleep(0)  # a bomb must not hold up everybody else
    unpacker.end()
    return bytes(body)


class TooLargeError(Exception):
    """An answer beyond its limit."""


def url_of(worker: WorkerConfig, path: str) -> str:
    """Give the address of a route of a worker."""
    origin = worker.origin
    return f"{origin.scheme}://{origin.authority}{origin.prefix}{path}"


def key_of(worker: WorkerConfig) -> dict[str, str]:
    """Give the header with a worker's key, if it has one."""
    return {"Authorization": f"Bearer {worker.api_key}"} if worker.api_key else {}


# --- The parts of the answers that are read ---------------------------------------
# tools/server/README.md of llama.cpp; other servers leave most of it out.


class _Settings(msgspec.Struct):
    n_ctx: msgspec.Raw = msgspec.Raw()


class _Meta(msgspec.Struct):
    n_ctx: msgspec.Raw = msgspec.Raw()


class _Entry(msgspec.Struct):
    id: msgspec.Raw = msgspec.Raw()
    model: msgspec.Raw = msgspec.Raw()  # the `id` of Ollama's own list
    meta: msgspec.Raw = msgspec.Raw()
    max_model_len: msgspec.Raw = msgspec.Raw()  # vLLM, SGLang
    loaded_context_length: msgspec.Raw = msgspec.Raw()  # LM Studio
    context_length: msgspec.Raw = msgspec.Raw()
    context_window: msgspec.Raw = msgspec.Raw()
    # Of a router; other servers may call anything by that name.
    status: msgspec.Raw = msgspec.Raw()

    @property
    def name(self) -> str:
        return _told(self.id, str) or _told(self.model, str) or ""

    @property
    def context(self) -> int | None:
        """The tokens of its context, by whichever field tells them."""
        told = (
            (_told(self.meta, _Meta) or _Meta()).n_ctx,
            self.max_model_len,
            self.loaded_context_length,
            self.context_window,
            self.context_length,
        )
        return next(filter(None, map(_sane, told)), None)


class _ModelList(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw()
    models: msgspec.Raw = msgspec.Raw()


class _Status(msgspec.Struct):
    value: msgspec.Raw = msgspec.Raw()


class _Props(msgspec.Struct):
    total_slots: msgspec.Raw = msgspec.Raw()
    build_info: msgspec.Raw = msgspec.Raw()
    default_generation_settings: msgspec.Raw = msgspec.Raw()


_Slots = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]


def _told(raw: bytes | msgspec.Raw, kind: type[_T]) -> _T | None:
    """Read a field, or a whole answer; None if it is missing, or of another shape."""
    try:
        return msgspec.json.decode(raw, type=kind)
    # The last one for arrays in arrays in arrays.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _loaded(status: msgspec.Raw) -> tuple[bool | None, bool]:
    """Read whether a model is loaded, and whether it is loading, as a router tells.

    That is `{"value": "loaded", …}`; anything of another shape tells nothing.
    """
    value = _told((_told(status, _Status) or _Status()).value, str)
    return (None if value is None else value == "loaded"), value == "loading"


class _OddAnswer(Exception):
    """A worker that answers, but not as one that could be used."""
