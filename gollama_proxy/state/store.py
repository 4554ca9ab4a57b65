"""The store: the Valkey or Redis server through which hubs act as one.

Theory of operation
===================

    ┌──────────┐    LOST     ┌────────────┐    DUE     ┌───────────────┐
    │    UP    │────────────▶│    DOWN    │───────────▶│    PROBING    │
    └──────────┘             └────────────┘            └───────────────┘
         ▲                         ▲        REFUSED            │  │
         │                         ╰───────────────────────────╯  │
         ╰────────────────────────────────────────────────────────╯
                                 ANSWERED

UP         A command is answered within `TIMEOUT`, or the call fails.  Commands are
           pipelined on one connection, so a late answer costs only the call that waited
           for it.  A connection that is closed, or silent for `SILENCE` while commands
           wait, is LOST: a slow store is worse than none.

DOWN       Every call fails at once.  After a connection that was good for a heartbeat,
           the hub tries again at once, else after `BACK_OFF`, doubled each time up to
           `BACK_OFF_MAX`.

PROBING    The hub connects, which may take up to `CONNECT`, checks what the server is,
           renews its subscriptions, and reads the epoch.

A call that failed may still have been carried out: every command must be harmless when
it is sent again.  Nothing is repeated here.

The *epoch* names this life of the store's data.  It is a key like any other, so a store
that has lost its data has lost the epoch as well; the next heartbeat writes another
one, every hub notices, and registers again what it holds (`on_empty`).

Answers are those of RESP2: bytes for strings, lists without maps, None for nil.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import importlib
import logging
import os
import random
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gollama_proxy.config import tls
from gollama_proxy.config.stores import StoreAddress, parse_store_url
from gollama_proxy.config.values import ConfigError, SecretUrl, cut
from gollama_proxy.tasks import PUNCTUAL, Periodic, spawn

if TYPE_CHECKING:
    from valkey.asyncio.connection import AbstractConnection

logger = logging.getLogger(__name__)

# Seconds.
TIMEOUT = 0.05  # for a command
SILENCE = 0.25  # of a connection on which commands wait
CONNECT = 2.0  # to connect, and for everything that follows until the store is UP
HEARTBEAT = 2.0
BACK_OFF = 0.1
BACK_OFF_MAX = 2.0

# The oldest versions that are tested.
OLDEST = {"valkey": (7, 2), "redis": (7, 0)}

# What hubs do with keys and channels that begin with the prefix.  An ACL has to allow
# all of it; without INFO, only a warning is missing.
BASICS = ("eval", "hello", "info", "ping")
COMMANDS = (
    *("del", "get", "getdel", "hdel", "hget", "hkeys", "hlen", "hmget", "hscan"),
    *("hset", "mget", "pexpire", "publish", "set", "subscribe", "time", "xadd"),
    *("xrange", "zadd", "zcard", "zcount", "zrange", "zrangebyscore", "zrem"),
    "zremrangebyscore",
)
_PERMITTED = """
local denied = {}
for _, name in ipairs(ARGV) do
  local words = {name}
  for count = 1, 5 do  -- until there are as many as it takes
    words[count + 1] = KEYS[1]
    local ok, allowed = pcall(redis.acl_check_cmd, unpack(words))
    if ok then
      if not allowed then denied[#denied + 1] = name end
      break
    end
  end
end
return denied
"""

Argument = str | bytes | int | float
Take = Callable[[bytes], None]


class Mode(enum.Enum):
    UP = "up"
    DOWN = "down"
    PROBING = "probing"


class Event(enum.Enum):
    LOST = "the connection is closed or silent"
    DUE = "it is time to try again"
    ANSWERED = "the store answers"
    REFUSED = "the store cannot be used"


# All the steps there are; any other raises.
TRANSITIONS: dict[tuple[Mode, Event], Mode] = {
    (Mode.DOWN, Event.DUE): Mode.PROBING,
    (Mode.PROBING, Event.ANSWERED): Mode.UP,
    (Mode.PROBING, Event.REFUSED): Mode.DOWN,
    (Mode.UP, Event.LOST): Mode.DOWN,
}


class StoreError(Exception):
    """Why a store cannot be used or rejects a command, on one line without secrets."""


class StoreDownError(StoreError):
    """The store cannot be reached or used now, or has not answered in time."""


class _UnusableError(StoreError):
    """It would reject every command, and will until somebody mends that."""


class Store:
    """The connection of this hub to the store."""

    def __init__(
        self,
        url: str,
        prefix: str = "gollama",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the connection: nothing happens before `open`.

        `prefix` begins all keys and channels.  `clock` measures answers.

        Raises:
            ConfigError: the URL is wrong.
        """
        self.url = SecretUrl(url)
        self.prefix = prefix
        self.mode = Mode.DOWN
        self.reason = "not connected yet"  # why it is not UP, for people
        self.server = ""  # such as "valkey 9.1.2", once it has been reached
        self.epoch = ""  # empty before the store has been reached
        self.operations = 0  # commands that were answered
        self.failures = 0  # calls that failed, not those of a store that is DOWN
        self.outages = 0  # how often it was LOST
        # Called with the seconds that each call took, from this hub's view.
        self.observe: Callable[[float], None] = lambda seconds: None
        self._address = parse_store_url("state.url", url)
        self._clock = clock
        self._link: _Link | None = None
        self._takers: dict[bytes, list[Take]] = {}
        self._mode_listeners: list[Callable[[Mode], None]] = []
        self._empty_listeners: list[Callable[[], None]] = []
        self._attempts = 0  # since the last heartbeat that was answered
        self._again = 0.0  # when to try next, by the event loop's time
        self._complaint = ""  # the last one that was logged
        self._keeper = Periodic("store", self._keep, HEARTBEAT)

    def __repr__(self) -> str:
        return f"<Store {self.url} {self.mode.value}>"

    # --- Life -----------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and stay connected until `close`.

        A store that cannot be reached is no error: it is DOWN, and used as soon as it
        can be.

        Raises:
            StoreError: there is something to mend: the password, permissions, the
                version, TLS, a server that is a replica or part of a cluster, or
                keys of another program.
        """
        await self._import()
        try:
            await self._connect()
        except StoreDownError as exc:
            logger.warning("the store cannot be reached: %s; going on without it", exc)
            self._back_off()
            self._keeper.wake()
        self._keeper.start()

    async def examine(self) -> str:
        """Connect once and change nothing; return what was found, for people.

        Raises:
            StoreDownError: it cannot be reached.
            StoreError: as `open`.
        """
        await self._import()
        link = _Link(self._address, self._receive, self._lose, self._clock)
        try:
            server = await self._meet(link)
            commands = ("GET", self.key("epoch")), ("ZCARD", self.key("hubs"))
            epoch, hubs = await self._ask(link, commands, CONNECT)
            if epoch is not None:
                self._check_epoch(epoch)
        finally:
            await link.close()
        found = f"{server} at {self.url}, hubs of {self.prefix!r}: {hubs}"
        return f"{found}; {link.concern}" if link.concern else found

    async def close(self) -> None:
        """Close the connection; harmless when closed."""
        await self._keeper.stop()
        link, self._link = self._link, None
        self.mode, self.reason = Mode.DOWN, "closed"
        if link is not None:
            await link.close()

    async def _import(self) -> None:
        """Import the client library, which reads files."""
        await asyncio.to_thread(importlib.import_module, "valkey.asyncio.connection")

    def subscribe_mode(self, callback: Callable[[Mode], None]) -> None:
        """Have a function called after each change of the mode.

        When it is UP, subscriptions are in force and the epoch is known.
        """
        self._mode_listeners.append(callback)

    def on_empty(self, callback: Callable[[], None]) -> None:
        """Have a function called when the data of the store is new, or new to this hub.

        It is then for each part to register again what it holds.  The mode is UP.
        """
        self._empty_listeners.append(callback)

    # --- Commands -------------------------------------------------------------------

    def key(self, name: str) -> str:
        """Return the full name of a key or a channel."""
        return f"{self.prefix}:{name}"

    async def call(self, *command: Argument) -> Any:
        """Send one command; return its answer.

        Raises:
            StoreDownError: the store is not UP, or has not answered within `TIMEOUT`.
            StoreError: the store rejects the command.
        """
        [answer] = await self.pipe([command])
        return answer

    async def run(
        self, script: str, keys: Sequence[str], args: Sequence[Argument] = ()
    ) -> Any:
        """Run a script in the store by EVAL, with its text; return its answer.

        Raises:
            StoreDownError, StoreError: as `call`.
        """
        return await self.call("EVAL", script, len(keys), *keys, *args)

    async def publish(self, channel: str, data: str | bytes) -> None:
        """Send data to the hubs that listen to a channel, this one included.

        Raises:
            StoreDownError, StoreError: as `call`.
        """
        await self.call("PUBLISH", channel, data)

    async def pipe(
        self, commands: Iterable[Sequence[Argument]], *, within: float | None = None
    ) -> list[Any]:
        """Send commands in one round trip; return their answers, in the same order.

        They are carried out in this order, but those of others may come in between.
        A call with much data may need more time than usual: `within` seconds, by
        default `TIMEOUT`.

        Raises:
            StoreDownError: as `call`.
            StoreError: the store rejects one of them; the others were carried out.
        """
        link = self._link
        if self.mode is not Mode.UP or link is None:
            raise StoreDownError(self.reason)
        try:
            return await self._ask(link, commands, within or TIMEOUT)
        except _UnusableError as exc:
            self.failures += 1
            raise StoreDownError(str(exc)) from None
        except StoreError:
            self.failures += 1
            raise

    async def listen(self, channel: str, take: Take) -> None:
        """Pass what arrives on a channel to a function, until the store is closed.

        Returns when the subscription is in force; if the store is not UP, it will be
        by the time that it is.  `take` must not block; its errors are logged.
        """
        name = channel.encode()
        takers = self._takers.setdefault(name, [])
        takers.append(take)
        if len(takers) == 1 and self.mode is Mode.UP and self._link is not None:
            with contextlib.suppress(StoreDownError):
                await self._link.subscribe([name])

    # --- The mode -------------------------------------------------------------------

    def _step(self, event: Event, reason: str = "") -> None:
        following = TRANSITIONS.get((self.mode, event))
        if following is None:
            raise AssertionError(f"{self!r}: {event}")
        self.mode = following
        self.reason = reason
        if event is Event.LOST:
            self.outages += 1
            logger.warning("the store is down: %s; going on without it", reason)
        elif event is Event.ANSWERED:
            logger.info("the store is up: %s at %s", self.server, self.url)
            self._complaint = ""
        for callback in self._mode_listeners:
            callback(following)

    async def _keep(self) -> float | None:
        """Send a heartbeat, or try to connect; return when to do so again."""
        if self.mode is Mode.UP:
            try:
                await self._beat()
                self._attempts = 0
            except StoreDownError:
                pass
            except StoreError as exc:  # something of another program has come
                if self._link is not None:
                    self._link.end(exc)
            return HEARTBEAT
        wait = self._again - asyncio.get_running_loop().time()
        if wait > 0:
            return wait
        try:
            await self._connect()
        except StoreDownError:
            pass
        except StoreError as exc:
            if str(exc) != self._complaint:
                logger.error("the store cannot be used: %s", exc)
            self._complaint = str(exc)
        else:
            return HEARTBEAT
        return self._back_off()

    def _back_off(self) -> float:
        """Decide when to try again; return the seconds until then."""
        pause = 0.0  # a connection that was good for a while
        if self._attempts:
            pause = min(BACK_OFF * 2 ** min(self._attempts - 1, 10), BACK_OFF_MAX)
            pause *= random.uniform(0.8, 1.2)
        self._again = asyncio.get_running_loop().time() + pause
        return pause

    async def _connect(self) -> None:
        self._step(Event.DUE, "connecting")
        self._attempts += 1
        link = _Link(self._address, self._receive, self._lose, self._clock)
        try:
            self.server = await self._meet(link)
            await link.subscribe(self._takers)
            epoch = await self._read_epoch(link, CONNECT)
        except BaseException as exc:
            await link.close()
            reason = str(exc) if isinstance(exc, StoreError) else "stopped"
            self._step(Event.REFUSED, reason)
            raise
        self._link = link
        self._step(Event.ANSWERED)
        if link.concern:
            logger.warning("%s", link.concern)
        self._note_epoch(epoch)

    async def _meet(self, link: _Link) -> str:
        """Connect, and check what is there; return its name and version."""
        address = self._address
        try:
            async with asyncio.timeout(CONNECT):
                server = await link.open()
                await self._check_permissions(link)
                return server
        except TimeoutError:
            hint = "; is it a port for TLS?" if address.tls else ""
            text = f"no answer within {CONNECT:g} s{hint}"
            raise StoreDownError(text) from None
        except StoreDownError as exc:
            if address.tls and not address.certificate and str(exc) in _BROKEN:
                text = f"{exc}; does it require a certificate (ssl_certfile)?"
                raise StoreDownError(text) from None
            raise

    def _lose(self, link: _Link, reason: str) -> None:
        """Go on without a connection that is closed or silent."""
        if link is not self._link:
            return
        self._link = None
        self._step(Event.LOST, reason)
        self._back_off()
        self._keeper.wake()

    async def _beat(self) -> None:
        link = self._link
        assert link is not None, self
        link.ping()
        self._note_epoch(await self._read_epoch(link, TIMEOUT))

    async def _check_permissions(self, link: _Link) -> None:
        """Check that the user of the URL may do what hubs do.

        Raises:
            StoreError: it may not.
        """
        probe = self.key("probe")
        command = ("EVAL", _PERMITTED, 1, probe, *COMMANDS)
        [denied] = await self._ask(link, [command], CONNECT)
        if denied:
            names = ", ".join(each.decode() for each in denied)
            raise StoreError(f"{_NOT_PERMITTED} for {names}; {_NEEDED}")

    async def _read_epoch(self, link: _Link, within: float) -> str:
        command = ("SET", self.key("epoch"), secrets.token_hex(8), "NX", "GET")
        # A hub that is the first one here gets nothing, and reads what it wrote.
        again = ("GET", self.key("epoch"))
        first, second = await self._ask(link, (command, again), within)
        return self._check_epoch(second if first is None else first)

    def _check_epoch(self, found: bytes) -> str:
        text = found.decode(errors="replace")
        if not re.fullmatch("[0-9a-f]{16}", text):
            raise StoreError(
                f"the key {self.key('epoch')} is of another program: choose another "
                "state.prefix, or another database"
            )
        return text

    def _note_epoch(self, epoch: str) -> None:
        if epoch == self.epoch:
            return
        if self.epoch:
            logger.warning("the store has lost its data; registering again")
        self.epoch = epoch
        for callback in self._empty_listeners:
            callback()

    async def _ask(
        self, link: _Link, commands: Iterable[Sequence[Argument]], within: float
    ) -> list[Any]:
        answers = await link.ask(commands, within)
        self.operations += len(answers)
        self.observe(link.latency)
        for answer in answers:
            if isinstance(answer, Exception):
                error = _explain(answer)
                if isinstance(error, StoreDownError | _UnusableError):
                    link.end(error)
                raise error
        return answers

    def _receive(self, channel: bytes, data: bytes) -> None:
        for take in self._takers.get(channel, ()):
            try:
                take(data)
            except Exception:
                logger.exception("a message on %s", channel.decode(errors="replace"))


class _Link:
    """Two connections, for commands and for messages, that live and die together."""

    def __init__(
        self,
        address: StoreAddress,
        receive: Callable[[bytes, bytes], None],
        lost: Callable[[_Link, str], None],
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
        return f"<_Link {state} waiting={len(self._waiting)}>"

    # --- Life -----------------------------------------------------------------------

    async def open(self) -> str:
        """Connect, and check what is there; return its name and version.

        Raises:
            StoreDownError: it cannot be reached, or not be used yet.
            StoreError: it cannot be used like this.
        """
        try:
            if self._address.tls:  # its files may have been renewed
                context = await asyncio.to_thread(tls.store_context, self._address)
                connection: Any
                for connection in (self._commands, self._messages):
                    connection.ssl_context.context = context
            for connection in (self._commands, self._messages):
                await connection.connect()
        except Exception as exc:
            raise _explain(exc) from None
        self._readers = [
            spawn(self._read_answers(), "answers of the store"),
            spawn(self._read_messages(), "messages of the store"),
        ]
        commands = ("HELLO",), ("INFO", "memory")
        about, memory = await self.ask(commands, CONNECT)
        if isinstance(about, Exception):
            error = _explain(about)
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

    # --- Commands -------------------------------------------------------------------

    async def ask(
        self, commands: Iterable[Sequence[Argument]], within: float
    ) -> list[Any]:
        """Send commands; return the answers, of which some may be exceptions.

        Raises:
            StoreError: the connection is lost, or the answers are late.
        """
        if self._error is not None:
            raise self._error
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
            self.end(_explain(exc))
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
                self.end(_explain(exc))
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

    # --- Messages -------------------------------------------------------------------

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
            self.end(_explain(exc))
        await asyncio.wait(fresh.values(), timeout=CONNECT)
        for future in fresh.values():
            if not future.done() or future.cancelled():
                raise self._why_closed()
            if isinstance(refusal := future.result(), Exception):
                raise _explain(refusal)

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
                self.end(_explain(exc))
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


# --- What the server is, and what its errors mean -----------------------------------


def _make_connection(address: StoreAddress) -> AbstractConnection:
    from valkey.asyncio import connection

    common: dict[str, Any] = {
        "db": address.database,
        "username": address.user or None,
        "password": address.password or None,
        "socket_timeout": None,  # every call has a limit of its own
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


_NOT_PERMITTED = "the user of state.url has no permission"
_NEEDED = "it needs all keys and channels that begin with state.prefix"
# The first words of errors that end by themselves, and what they mean.
_FOR_NOW = {
    "OOM": "it is out of memory (maxmemory)",
    "BUSY": "it is busy with a script",
    "MISCONF": "it cannot save its data, so it takes no changes",
    "NOREPLICAS": "it has too few replicas, so it takes no changes",
    "MASTERDOWN": "it has lost its primary",
    "TRYAGAIN": "it is busy",
}


def _explain(exc: BaseException) -> StoreError:
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
            return _UnusableError(str(exc))
        case exceptions.AuthenticationError():
            return _UnusableError(_explain_authentication(text))
        case exceptions.BusyLoadingError():
            return StoreDownError("it is loading its data")
        case exceptions.OutOfMemoryError():
            return StoreDownError(_FOR_NOW["OOM"])
        case exceptions.ReadOnlyError():
            text = "it is a replica: state.url must lead to the primary"
            return _UnusableError(text)
        case exceptions.NoPermissionError():
            return _UnusableError(f"{_NOT_PERMITTED} ({text[:200]}); {_NEEDED}")
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
            return _UnusableError("it does not speak the protocol of Valkey and Redis")
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
    if text := tls.explain(exc):
        return _UnusableError(text)
    if isinstance(exc, PermissionError):
        return _UnusableError("this user may not open its socket")
    if isinstance(exc, socket.gaierror):
        return StoreDownError("its host name has no address")
    if isinstance(exc, TimeoutError):
        return StoreDownError(f"no answer within {CONNECT:g} s")
    if isinstance(exc, OSError) and exc.errno:
        return StoreDownError(os.strerror(exc.errno))
    return StoreDownError(_CLOSED)
