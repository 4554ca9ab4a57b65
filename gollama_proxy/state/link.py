"""One connection to the store: commands that are pipelined, and messages.

What the client library raises is mapped here; the rest of the hub knows only the errors
below.  Answers are those of RESP2.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gollama_proxy.config import tls
from gollama_proxy.config.addresses import StoreAddress
from gollama_proxy.config.values import ConfigError, cut
from gollama_proxy.tasks import PUNCTUAL, spawn

if TYPE_CHECKING:
    from valkey.asyncio.connection import AbstractConnection

# Seconds.
TIMEOUT = 0.05  # for a command
SILENCE = 0.25  # of a connection on which commands wait
CONNECT = 2.0  # to connect, and for each step until the store is UP

# The oldest versions that are tested.
OLDEST = {"valkey": (7, 2), "redis": (7, 0)}

Argument = str | bytes | int | float


class StoreError(Exception):
    """Why a store cannot be used or rejects a command, on one line without secrets."""


class StoreDownError(StoreError):
    """The store cannot be reached or used now, or has not answered in time."""


class UnusableError(StoreError):
    """It would reject every command, until an operator mends that."""


class Link:
    """Two connections, for commands and for messages, that live and die together."""

    def __init__(
        self,
        address: StoreAddress,
        receive: Callable[[bytes, bytes], None],
        lost: Callable[[Link, str], None],
        clock: Callable[[], float],
    ) -> None:
        self.latency = 0.0
        self.concern = ""  # about what the store may do, for people
        self._clock = clock
        self._receive = receive
        self._lost = lost
        self._address = address
        self._commands = _make_connection(address)
        self._messages = _make_connection(address)
        self._waiting: deque[asyncio.Future[Any]] = deque()  # for answers, in order
        self._subscribing: dict[bytes, asyncio.Future[Any]] = {}
        self._pinged = False  # and not answered yet, on the connection for messages
        self._heard = 0.0  # when the last answer came, by the event loop's time
        self._check: asyncio.TimerHandle | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._error: StoreError | None = None  # why it has ended

    def __repr__(self) -> str:
        state = "open" if self._error is None else "closed"
        return f"<Link {state} waiting={len(self._waiting)}>"

    # --- Life ---------------------------------------------------------------------

    async def open(self) -> str:
        """Connect, and check what is there; return its name and version.

        Raises:
            StoreDownError: it cannot be reached, or not be used yet.
            StoreError: it cannot be used like this.
        """
        try:
            async with asyncio.timeout(CONNECT):
                return await self._open()
        except TimeoutError:
            hint = "; is it a port for TLS?" if self._address.tls else ""
            text = f"no answer within {CONNECT:g} s{hint}"
            raise StoreDownError(text) from None
        except StoreDownError as exc:
            anonymous = self._address.tls and not self._address.certificate
            if anonymous and str(exc) in _BROKEN:
                text = f"{exc}; does it require a certificate (ssl_certfile)?"
                raise StoreDownError(text) from None
            raise

    async def _open(self) -> str:
        try:
            if self._address.tls:  # its files may have been renewed
                context = await asyncio.to_thread(tls.store_context, self._address)
                connection: Any
                for connection in (self._commands, self._messages):
                    connection.ssl_context.context = context
            for connection in (self._commands, self._messages):
                await connection.connect()
        except Exception as exc:
            raise explain_store(exc) from None
        self._readers = [
            spawn(self._read_answers(), "answers of the store"),
            spawn(self._read_messages(), "messages of the store"),
        ]
        commands = ("HELLO",), ("INFO", "memory")
        about, memory = await self.ask(commands, CONNECT)
        if isinstance(about, Exception):
            error = explain_store(about)
            if "unknown command" in str(error):
                error = StoreError(f"it is too old: must be {_KNOWN}, or newer")
            raise error
        server = _check_server(about)
        if isinstance(memory, bytes):  # else it is not permitted
            self.concern = _find_concern(memory.decode(errors="replace"))
        return server

    def end(self, error: StoreError) -> None:
        """Fail all calls, and report the loss; harmless when closed."""
        if self._error is not None:
            return
        self._error = error
        if self._check is not None:
            self._check.cancel()
        for future in (*self._waiting, *self._subscribing.values()):
            future.cancel()
        self._waiting.clear()
        self._subscribing.clear()
        _ = spawn(self.close(), "end of a connection to the store")
        self._lost(self, str(error))

    async def close(self) -> None:
        """Close both connections, without a report; harmless when closed."""
        self._error = self._error or StoreDownError("closed")
        for task in self._readers:
            task.cancel()
        if self._readers:
            await asyncio.wait(self._readers)
        for connection in (self._commands, self._messages):
            with contextlib.suppress(Exception):
                await connection.disconnect(nowait=True)

    def _why_closed(self) -> StoreError:
        return self._error or StoreDownError("no answer")

    # --- Commands -----------------------------------------------------------------

    async def ask(
        self, commands: Iterable[Sequence[Argument]], within: float | None = None
    ) -> list[Any]:
        """Send commands; return the answers, of which some may be exceptions.

        Waits for `within` seconds, by default `TIMEOUT`.

        Raises:
            StoreError: the connection is lost, or the answers are late.
        """
        if self._error is not None:
            raise self._error
        within = TIMEOUT if within is None else within
        pieces: list[bytes] = []
        futures: list[asyncio.Future[Any]] = []
        loop = asyncio.get_running_loop()
        for command in commands:
            pieces += self._commands.pack_command(*command)
            futures.append(loop.create_future())
        if not futures:
            return []
        self._waiting += futures
        sent = self._clock()
        try:
            # It writes at once, and waits only if too much is unsent.
            await self._commands.send_packed_command(pieces, check_health=False)
        except Exception as exc:
            self.end(explain_store(exc))
        last = futures[-1]
        due = loop.time() + within
        await asyncio.wait([last], timeout=within)
        if not last.done() and loop.time() > due + PUNCTUAL:
            # The event loop was held up, and has not read its sockets either.
            await asyncio.wait([last], timeout=within)
        if last.cancelled():
            raise self._why_closed()
        if not last.done():
            self._suspect()
            raise StoreDownError(f"no answer within {within * 1000:.0f} ms")
        self.latency = self._clock() - sent
        return [each.result() for each in futures]

    async def _read_answers(self) -> None:
        from valkey.exceptions import ResponseError, ValkeyError

        while True:
            answer: Any
            try:
                answer = await self._commands.read_response(disable_decoding=True)
            except ResponseError as exc:
                answer = exc  # of one command
            except (ValkeyError, OSError) as exc:
                self.end(explain_store(exc))
                return
            if self._error is not None:  # it came as the connection was given up
                return
            self._heard = asyncio.get_running_loop().time()
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(answer)

    def _suspect(self) -> None:
        """End the connection if it stays silent."""
        if self._check is None and self._error is None:
            self._look_in(max(0.0, SILENCE - TIMEOUT))

    def _look_in(self, wait: float) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self._check = loop.call_later(wait, self._look, begun, begun + wait)

    def _look(self, since: float, due: float) -> None:
        self._check = None
        if not self._waiting or self._heard > since:
            return
        if asyncio.get_running_loop().time() > due + PUNCTUAL:
            self._look_in(SILENCE)  # sockets are read after timers, so not yet
        else:
            text = f"no answer within {SILENCE * 1000:.0f} ms"
            self.end(StoreDownError(text))

    # --- Messages -----------------------------------------------------------------

    async def subscribe(self, channels: Iterable[bytes]) -> None:
        """Subscribe, and wait until that is in force.

        Raises:
            StoreError: the connection is lost, or that is not permitted.
        """
        loop = asyncio.get_running_loop()
        fresh = {name: loop.create_future() for name in channels}
        if not fresh:
            return
        self._subscribing |= fresh
        try:
            await self._messages.send_command("SUBSCRIBE", *fresh, check_health=False)
        except Exception as exc:
            self.end(explain_store(exc))
        await asyncio.wait(fresh.values(), timeout=CONNECT)
        for future in fresh.values():
            if not future.done() or future.cancelled():
                raise self._why_closed()
            if isinstance(refusal := future.result(), Exception):
                raise explain_store(refusal)

    def ping(self) -> None:
        """Check the connection for messages, by whether it has answered the last time.

        Its answers are not waited for.
        """
        if self._pinged:
            self.end(StoreDownError("no answer on the connection for messages"))
            return
        self._pinged = True
        _ = spawn(self._send_ping(), "ping of the store")

    async def _send_ping(self) -> None:
        with contextlib.suppress(Exception):  # its reader notices as well
            await self._messages.send_command("PING", check_health=False)

    async def _read_messages(self) -> None:
        from valkey.exceptions import ResponseError, ValkeyError

        while True:
            try:
                message = await self._messages.read_response(disable_decoding=True)
            except ResponseError as exc:
                for future in self._subscribing.values():
                    if not future.done():
                        future.set_result(exc)
                self._subscribing.clear()
                continue
            except (ValkeyError, OSError) as exc:
                self.end(explain_store(exc))
                return
            match message:
                case [b"message", channel, data]:
                    self._receive(channel, data)
                case [b"subscribe", channel, _]:
                    future = self._subscribing.pop(channel)
                    if not future.done():
                        future.set_result(None)
                case _:
                    self._pinged = False


# --- What the server is, and what its errors mean ---------------------------------


def _make_connection(address: StoreAddress) -> AbstractConnection:
    from valkey.asyncio import connection

    common: dict[str, Any] = {
        "db": address.database,
        "username": address.user or None,
        "password": address.password or None,
        "socket_timeout": None,  # each call has its limit
        "socket_connect_timeout": CONNECT,
        "lib_name": None,  # to set them takes permissions
        "lib_version": None,
    }
    if address.path:
        return connection.UnixDomainSocketConnection(path=address.path, **common)
    common |= {"host": address.host, "port": address.port}
    if not address.tls:
        return connection.Connection(**common)
    return connection.SSLConnection(ssl_check_hostname=True, **common)


_KNOWN = " or ".join(f"{name} {a}.{b}" for name, (a, b) in OLDEST.items())


def _check_server(about: list[Any]) -> str:
    """Return the name and version of a server, from its answer to HELLO.

    Raises:
        StoreError: it is too old, a replica, or part of a cluster.
    """
    names = [each.decode() for each in about[::2]]
    facts = dict(zip(names, about[1::2], strict=True))
    server, version, mode, role = (
        facts.get(name, b"").decode() for name in ("server", "version", "mode", "role")
    )
    text = f"{server} {version}"
    oldest = OLDEST.get(server)
    if oldest is None:
        raise StoreError(f"{cut(text)!r} is neither Valkey nor Redis")
    if _numbers(version) < oldest:
        raise StoreError(f"{text} is too old: must be {_KNOWN}, or newer")
    if mode != "standalone":
        raise StoreError(f"{text} runs in the mode {mode}: must be standalone")
    if role not in ("master", "primary"):
        raise StoreError(f"{text} is a {role}: state.url must lead to the primary")
    return text


def _find_concern(memory: str) -> str:
    """Return a warning about a store by its own report on memory, or ""."""
    facts = dict(line.split(":", 1) for line in memory.split() if ":" in line)
    policy = facts.get("maxmemory_policy", "noeviction")
    if facts.get("maxmemory", "0") == "0" or policy in ("noeviction", ""):
        return ""
    return (
        f"the store drops keys when its memory is full (maxmemory-policy {policy}), "
        "and hubs could then use a slot twice: set it to noeviction"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(each) for each in re.findall(r"\d+", version)[:2])


NOT_PERMITTED = "the user of state.url has no permission"
NEEDED = "it needs all keys and channels that begin with state.prefix"
# The first words of errors that end by themselves, and what they mean.
_FOR_NOW = {
    "OOM": "it is out of memory (maxmemory)",
    "BUSY": "it is busy with a script",
    "MISCONF": "it cannot save its data, so it takes no changes",
    "NOREPLICAS": "it has too few replicas, so it takes no changes",
    "MASTERDOWN": "it has lost its primary",
    "TRYAGAIN": "it is busy",
}


def explain_store(exc: BaseException) -> StoreError:
    """Return what an exception of the client library means, on one line."""
    from valkey import exceptions

    if isinstance(exc.__cause__, exceptions.ValkeyError):
        exc = exc.__cause__  # it was raised while a connection was made
    text = " ".join(str(exc).split())
    code = text.partition(" ")[0]
    match exc:
        case StoreError():
            return exc
        case ConfigError():
            return UnusableError(str(exc))
        case exceptions.AuthenticationError():
            return UnusableError(_explain_authentication(text))
        case exceptions.BusyLoadingError():
            return StoreDownError("it is loading its data")
        case exceptions.OutOfMemoryError():
            return StoreDownError(_FOR_NOW["OOM"])
        case exceptions.ReadOnlyError():
            text = "it is a replica: state.url must lead to the primary"
            return UnusableError(text)
        case exceptions.NoPermissionError():
            return UnusableError(f"{NOT_PERMITTED} ({text[:200]}); {NEEDED}")
        case exceptions.ResponseError():
            if code in _FOR_NOW:
                return StoreDownError(_FOR_NOW[code])
            if code == "WRONGTYPE":
                return StoreError(
                    "a key has another type: another program uses the same prefix "
                    "(state.prefix), or the same database"
                )
            return StoreError(f"it rejects a command: {text[:300]}")
        case exceptions.InvalidResponse():
            return UnusableError("it does not speak the protocol of Valkey and Redis")
        case exceptions.ConnectionError() if "max number of clients" in text:
            return StoreDownError("it has too many clients (maxclients)")
        case _:
            pass
    return _explain_failure(exc.__cause__ or exc.__context__ or exc)


def _explain_authentication(text: str) -> str:
    if "without any password configured" in text or "no password is set" in text:
        return "state.url has a password, and the store has none for this user"
    if "Authentication required" in text or "already authenticated" in text:
        return "it requires a password, and state.url has none"
    return "it rejects the user or the password of state.url"


_CLOSED = "the connection was closed"
# How a server may end a connection without a certificate, instead of an alert.
_BROKEN = {_CLOSED, *map(os.strerror, (errno.ECONNRESET, errno.EPIPE))}


def _explain_failure(exc: BaseException) -> StoreError:
    """Return what a failure of the network means."""
    if text := tls.explain_tls(exc):
        return UnusableError(text)
    if isinstance(exc, PermissionError):
        return UnusableError("this user may not open its socket")
    if isinstance(exc, socket.gaierror):
        return StoreDownError("its host name has no address")
    if isinstance(exc, TimeoutError):
        return StoreDownError(f"no answer within {CONNECT:g} s")
    if isinstance(exc, OSError) and exc.errno:
        return StoreDownError(os.strerror(exc.errno))
    return StoreDownError(_CLOSED)
