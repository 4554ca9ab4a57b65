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

Answers are those of RESP2: bytes for strings, lists without maps, None for nil.  The
connection itself, its time limits and its errors are in `link.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import importlib
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gollama_proxy.config.addresses import parse_store_url
from gollama_proxy.config.values import SecretUrl
from gollama_proxy.state.link import (
    CONNECT,
    NEEDED,
    NOT_PERMITTED,
    Argument,
    Link,
    StoreDownError,
    StoreError,
    UnusableError,
    explain_store,
)
from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

# Seconds.
HEARTBEAT = 2.0
BACK_OFF = 0.1
BACK_OFF_MAX = 2.0

# What hubs do with keys and channels that begin with the prefix.  An ACL has to allow
# all of it, and EVAL, HELLO, INFO and PING; without INFO, only a warning is missing.
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

Take = Callable[[bytes], None]


class Mode(enum.Enum):
    UP = "up"
    DOWN = "down"
    PROBING = "probing"


class StoreEvent(enum.Enum):
    LOST = "the connection is closed or silent"
    DUE = "it is time to try again"
    ANSWERED = "the store answers"
    REFUSED = "the store cannot be used"


# All the steps there are; any other raises.
TRANSITIONS: dict[tuple[Mode, StoreEvent], Mode] = {
    (Mode.DOWN, StoreEvent.DUE): Mode.PROBING,
    (Mode.PROBING, StoreEvent.ANSWERED): Mode.UP,
    (Mode.PROBING, StoreEvent.REFUSED): Mode.DOWN,
    (Mode.UP, StoreEvent.LOST): Mode.DOWN,
}


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
        self._link: Link | None = None
        self._takers: dict[bytes, list[Take]] = {}
        self._mode_listeners: list[Callable[[Mode], None]] = []
        self._empty_listeners: list[Callable[[], None]] = []
        self._attempts = 0  # since the last heartbeat that was answered
        self._again = 0.0  # when to try next, by the event loop's time
        self._complaint = ""  # the last one that was logged
        self._keeper = Periodic("store", self._keep, HEARTBEAT)

    def __repr__(self) -> str:
        return f"<Store {self.url} {self.mode.value}>"

    # --- Life ---------------------------------------------------------------------

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
        link = Link(self._address, self._receive, self._lose, self._clock)
        try:
            server = await link.open()
            await self._check_permissions(link)
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

    # --- Commands -----------------------------------------------------------------

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
            return await self._ask(link, commands, within)
        except UnusableError as exc:
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

    # --- The mode -----------------------------------------------------------------

    def _step(self, event: StoreEvent, reason: str = "") -> None:
        following = TRANSITIONS.get((self.mode, event))
        if following is None:
            raise AssertionError(f"{self!r}: {event}")
        self.mode = following
        self.reason = reason
        if event is StoreEvent.LOST:
            self.outages += 1
            logger.warning("the store is down: %s; going on without it", reason)
        elif event is StoreEvent.ANSWERED:
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
        self._step(StoreEvent.DUE, "connecting")
        self._attempts += 1
        link = Link(self._address, self._receive, self._lose, self._clock)
        try:
            self.server = await link.open()
            await self._check_permissions(link)
            await link.subscribe(self._takers)
            epoch = await self._read_epoch(link, CONNECT)
        except BaseException as exc:
            await link.close()
            reason = str(exc) if isinstance(exc, StoreError) else "stopped"
            self._step(StoreEvent.REFUSED, reason)
            raise
        self._link = link
        self._step(StoreEvent.ANSWERED)
        if link.concern:
            logger.warning("%s", link.concern)
        self._note_epoch(epoch)

    def _lose(self, link: Link, reason: str) -> None:
        """Go on without a connection that is closed or silent."""
        if link is not self._link:
            return
        self._link = None
        self._step(StoreEvent.LOST, reason)
        self._back_off()
        self._keeper.wake()

    async def _beat(self) -> None:
        link = self._link
        assert link is not None, self
        link.ping()
        self._note_epoch(await self._read_epoch(link, None))

    async def _check_permissions(self, link: Link) -> None:
        """Check that the user of the URL may do what hubs do.

        Raises:
            StoreError: it may not.
        """
        probe = self.key("probe")
        command = ("EVAL", _PERMITTED, 1, probe, *COMMANDS)
        [denied] = await self._ask(link, [command], CONNECT)
        if denied:
            names = ", ".join(each.decode() for each in denied)
            raise StoreError(f"{NOT_PERMITTED} for {names}; {NEEDED}")

    async def _read_epoch(self, link: Link, within: float | None) -> str:
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
        self, link: Link, commands: Iterable[Sequence[Argument]], within: float | None
    ) -> list[Any]:
        answers = await link.ask(commands, within)
        self.operations += len(answers)
        self.observe(link.latency)
        for answer in answers:
            if isinstance(answer, Exception):
                error = explain_store(answer)
                if isinstance(error, StoreDownError | UnusableError):
                    link.end(error)
                raise error
        return answers

    def _receive(self, channel: bytes, data: bytes) -> None:
        for take in self._takers.get(channel, ()):
            try:
                take(data)
            except Exception:
                logger.exception("a message on %s", channel.decode(errors="replace"))
