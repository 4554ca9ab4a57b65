"""The hubs that share a store: this one, and the others as the store knows them.

Keys and channels, all after the prefix:

    hubs        sorted set: the run of each hub, by when it counts as gone
                (milliseconds since 1970, by the clock of the store)
    hub:RUN     the `Member`, which expires soon after its hub is gone
    members     channel: +RUN of a hub that has come, -RUN of one that has ended

A *run* is one life of a hub process.  Every hub renews its entry at each heartbeat, and
removes it when it ends; one that dies counts as gone `LIFETIME` after its last
heartbeat.  No clock of a hub takes part in that.  A hub whose entry cannot be read is
of another release: it counts, and its name is its run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable

from msgspec import structs

from gollama_proxy.config.settings import Process
from gollama_proxy.state.facts import Message, decode, encode
from gollama_proxy.state.link import StoreDownError, StoreError
from gollama_proxy.state.slots import LIFETIME
from gollama_proxy.state.store import HEARTBEAT, Mode, Store
from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

_BEAT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
-- What another program has written, or this one before the clock was set back.
redis.call('ZREMRANGEBYSCORE', KEYS[1], now + ARGV[2] * 2, '+inf')
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2] * 2)
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
_RUN = re.compile(rb"[0-9a-f]{16}")
_UNKNOWN = "unknown"


class Member(Message):
    """One hub process."""

    run: str  # different at each start
    name: str  # for people: its machine and port
    host: str
    pid: int
    group: str  # the same for all processes of one `serve --processes`
    url: str = ""  # where clients reach it; empty until it listens


class Members:
    """This hub, and the others.

    While the store is not UP, the others are those that were seen last.
    """

    def __init__(
        self, store: Store, me: Member, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare; nothing is sent before `start`."""
        self.me = me
        self.others: dict[str, Member] = {}  # by run
        self._store = store
        self._clock = clock
        self._key = store.key("hubs")
        # Until then, a hub that is missing may not have come back to the store yet.
        self._settled = 0.0
        self._complaint = ""  # the last one that was logged
        self._left: list[Callable[[Member], None]] = []
        self._beats = Periodic("heartbeat of the hub", self._beat, HEARTBEAT, delay=0)
        store.subscribe_mode(self._note_mode)
        store.on_empty(self._note_empty)

    def __repr__(self) -> str:
        return f"<Members {self.me.run} others={len(self.others)}>"

    @property
    def all(self) -> list[Member]:
        """This hub first, then the others in the order of their runs."""
        return [self.me, *(self.others[run] for run in sorted(self.others))]

    @property
    def count(self) -> int:
        """How many hubs there are, this one included, as far as it is known."""
        return 1 + len(self.others)

    def on_leave(self, callback: Callable[[Member], None]) -> None:
        """Have a function called when another hub has ended, or is silent."""
        self._left.append(callback)

    # --- Life ---------------------------------------------------------------------

    async def start(self) -> None:
        """Register this hub; returns when it knows the others, or the store is DOWN."""
        await self._store.listen(self._store.key("members"), self._note_news)
        with contextlib.suppress(StoreDownError):
            await self._renew()
            await self._announce()
        self._beats.start()

    async def listens_at(self, url: str, name: str) -> None:
        """Register where this hub listens, and the name that it has for people."""
        self.me = structs.replace(self.me, url=url, name=name)
        with contextlib.suppress(StoreDownError):
            await self._renew()
            await self._announce()

    async def stop(self) -> None:
        """Remove this hub, so that the others notice at once."""
        await self._beats.stop()
        with contextlib.suppress(StoreDownError):
            await self._store.pipe(
                [
                    ("ZREM", self._key, self.me.run),
                    ("DEL", self._key_of(self.me.run)),
                    ("PUBLISH", self._store.key("members"), f"-{self.me.run}"),
                ]
            )

    # --- Heartbeats ---------------------------------------------------------------

    def _key_of(self, run: str) -> str:
        return self._store.key(f"hub:{run}")

    async def _announce(self) -> None:
        await self._store.publish(self._store.key("members"), f"+{self.me.run}")

    async def _beat(self) -> None:
        try:
            await self._renew()
        except StoreDownError:
            pass
        except StoreError as exc:
            if str(exc) != self._complaint:
                self._complaint = str(exc)
                logger.error("this hub cannot be registered: %s", exc)

    async def _renew(self) -> None:
        keys = [self._key, self._key_of(self.me.run)]
        args = (self.me.run, round(LIFETIME * 1000), encode(self.me))
        runs = await self._store.run(_BEAT, keys, args)
        present = {run.decode() for run in runs if _RUN.fullmatch(run)} - {self.me.run}
        # What is known of a hub changes only once, when it listens.
        fresh = [
            run
            for run in sorted(present)
            if run not in self.others or not self.others[run].url
        ]
        found = {}
        if fresh:
            texts = await self._store.call("MGET", *map(self._key_of, fresh))
            found = {run: text for run, text in zip(fresh, texts, strict=True) if text}
        self._note(present, found)

    def _note(self, present: set[str], found: dict[str, bytes]) -> None:
        for run, text in found.items():
            before = self.others.get(run)
            member = decode(Member, text, self._store.key("hub"))
            if member is None or member.run != run:
                member = Member(
                    run=run, name=run, host="", pid=0, group=run, url=_UNKNOWN
                )
            self.others[run] = member
            if member.url and (before is None or not before.url):
                logger.info("another hub has joined: %s", member.name)
        if self._clock() >= self._settled:
            for run in self.others.keys() - present:
                self._forget(run)

    def _forget(self, run: str) -> None:
        member = self.others.pop(run, None)
        if member is not None:
            logger.info("a hub has left: %s", member.name)
            for callback in self._left:
                callback(member)

    def _note_mode(self, mode: Mode) -> None:
        if mode is Mode.UP:
            self._settled = self._clock() + LIFETIME
            self._beats.wake()

    def _note_empty(self) -> None:
        self._settled = self._clock() + LIFETIME
        self._beats.wake()

    def _note_news(self, data: bytes) -> None:
        sign, run = data[:1], data[1:].decode(errors="replace")
        if sign == b"-":
            self._forget(run)
        elif run != self.me.run:
            self._beats.wake()


_ALONE = Process()


def describe_me(process: Process = _ALONE) -> Member:
    """Describe this process, which does not listen yet."""
    run, host = secrets.token_hex(8), socket.gethostname()
    return Member(
        run=run,
        name=f"{host}/{process.number}" if process.number else host,
        host=host,
        pid=os.getpid(),
        group=process.group or run,
    )
