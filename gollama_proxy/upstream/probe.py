"""What a worker says about itself: alive or loading, models, slots, context, build.

Only what answers from llama-server's HTTP threads is asked: `/health`, `/v1/models` and
`/props`.  `/slots` and `/metrics` wait for the running batch, for 20 s and more, and
wake a sleeping server.  A server without `/props`, or with another idea of `/health`,
is a good worker all the same; what it does not tell stays unknown.
"""

from __future__ import annotations

import os
import socket
import ssl
from typing import Annotated, Any, NamedTuple

import aiohttp
import msgspec

from gollama_proxy.routing.worker import Check, Description, Model
from gollama_proxy.settings import Health, WorkerConfig
from gollama_proxy.tls import Credentials, explain, for_workers
from gollama_proxy.upstream.resolver import Resolver

# A worker's lists are small; more is a mistake or an attack.
MAX_ANSWER = 1 << 20
MOST_MODELS = 1000  # of one worker; each request looks through their names
MAX_NAME = 4000  # characters of a model's name: a path, and what a request can name
MOST_CONTEXT = 1 << 30  # tokens
# What the kernel may hold of an answer, and so what one read can bring.  aiohttp skips
# any number of `100 Continue`, and with reads of 256 KiB of them nobody else had a turn
# of the event loop until the timeout.
RECEIVE_BUFFER = 8 << 10


class Finding(NamedTuple):
    """The result of one ping."""

    check: Check
    reason: str
    description: Description | None = None


class Report(NamedTuple):
    """One row of `gollama-proxy check`."""

    state: str  # "ready", "loading" or "down"
    reason: str
    models: tuple[str, ...] = ()
    slots: int | None = None
    context: int | None = None
    build: str = ""


def new_session(*, pooled: bool = False) -> aiohttp.ClientSession:
    """Make the client for the control plane: no cookies, no environment.

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


async def examine(worker: WorkerConfig, health: Health) -> Report:
    """Look at a worker once, in a session of its own; never raises for a bad worker."""
    tls = for_workers([worker]).get(worker.name)
    # With a pool, closing it ends all connections.  Else TLS would still be about to
    # say good-bye when the loop of a short command is closed.
    async with new_session(pooled=True) as session:
        finding = await ping(session, worker, health, tls)
    state = {Check.OK: "ready", Check.LOADING: "loading"}
    described = finding.description or Description()
    return Report(
        state.get(finding.check, "down"),
        finding.reason,
        tuple(model.name for model in described.models),
        described.slots,
        described.context,
        described.build,
    )


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
        status, body = await _get(target, "/health", timeout)
        if status == 503 and b"oading" in body:
            return Finding(Check.LOADING, "loading model")
        if status in (401, 403):
            return Finding(Check.FAILED, f"/health answered {status}: needs a key")
        if status >= 500 and status != 501:
            return Finding(Check.FAILED, f"/health answered {status}")
        description = await _learn(target, timeout)
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
    return Finding(Check.OK, "ok", description)


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


async def _learn(target: Target, timeout: aiohttp.ClientTimeout) -> Description:
    status, body = await _get(target, "/v1/models", timeout)
    if status in (401, 403):
        raise _OddAnswer(f"/v1/models answered {status}: a wrong or missing API key")
    if status != 200:
        raise _OddAnswer(f"/v1/models answered {status}")
    models = _models_in(body)
    status, body = await _get(target, "/props", timeout)
    props = _Props()
    if status == 200:
        try:
            props = msgspec.json.decode(body, type=_Props)
        except _UNREADABLE:
            pass  # another server's idea of /props
    settings = props.default_generation_settings or _Settings()
    context = _sane(settings.n_ctx)  # a router says 0, as it has no model itself
    return Description(
        models=tuple(
            Model(
                model.id,
                (model.meta and _sane(model.meta.n_ctx)) or context,
                *_loaded(model.status),
            )
            for model in models
        ),
        slots=props.total_slots,
        context=context or next((_sane(m.meta.n_ctx) for m in models if m.meta), None),
        build=props.build_info[:100] if props.build_info.isprintable() else "",
    )


def _models_in(body: bytes) -> list[_Model]:
    """Read the models of a list that can be offered to somebody."""
    path = "/v1/models"
    listed = _read(body, _ModelList, path).data[:MOST_MODELS]
    models = [_read(bytes(item), _Model, path) for item in listed]
    usable = [model for model in models if _is_name(model.id)]
    if models and not usable:
        raise _OddAnswer(f"{path} has no name that can be used")
    return usable


def _is_name(text: str) -> bool:
    """Tell a name from what would break a line of the log, or a terminal."""
    return 0 < len(text) <= MAX_NAME and text.isprintable()


def _sane(context: int | None) -> int | None:
    return context if context is not None and 0 < context <= MOST_CONTEXT else None


async def _get(
    target: Target, path: str, timeout: aiohttp.ClientTimeout
) -> tuple[int, bytes]:
    async with target.session.get(
        url_of(target.worker, path),
        headers=key_of(target.worker),
        timeout=timeout,
        allow_redirects=False,
        ssl=target.tls,
    ) as response:
        body = await response.content.read(MAX_ANSWER + 1)
        while len(body) <= MAX_ANSWER and not response.content.at_eof():
            body += await response.content.read(MAX_ANSWER + 1 - len(body))
        if len(body) > MAX_ANSWER:
            raise _OddAnswer(f"{path} answered more than {MAX_ANSWER} bytes")
        return response.status, body


def url_of(worker: WorkerConfig, path: str) -> str:
    """Give the address of a route of a worker."""
    origin = worker.origin
    return f"{origin.scheme}://{origin.authority}{origin.prefix}{path}"


def key_of(worker: WorkerConfig) -> dict[str, str]:
    """Give the header with a worker's key, if it has one."""
    return {"Authorization": f"Bearer {worker.api_key}"} if worker.api_key else {}


# --- The parts of the answers that are read ---------------------------------------
# tools/server/README.md of llama.cpp; other servers leave most of it out.


class _Meta(msgspec.Struct):
    n_ctx: int | None = None


class _Model(msgspec.Struct):
    id: str
    meta: _Meta | None = None
    status: Any = None  # of a router; other servers may call anything by that name


class _ModelList(msgspec.Struct):
    data: list[msgspec.Raw]


class _Settings(msgspec.Struct):
    n_ctx: int | None = None


class _Props(msgspec.Struct):
    total_slots: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    build_info: str = ""
    default_generation_settings: _Settings | None = None


# The last one for arrays in arrays in arrays.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _read(body: bytes, kind: type[Any], path: str) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except _UNREADABLE as exc:
        raise _OddAnswer(f"{path} answered what cannot be read: {exc}") from None


def _loaded(status: object) -> tuple[bool | None, bool]:
    """Read whether a model is loaded, and whether it is loading, as a router tells.

    That is `{"value": "loaded", …}`; anything of another shape tells nothing.
    """
    value = status.get("value") if isinstance(status, dict) else None
    if not isinstance(value, str):
        return None, False
    return value == "loaded", value == "loading"


class _OddAnswer(Exception):
    """A worker that answers, but not as one that could be used."""
