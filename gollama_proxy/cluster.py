"""What a hub shares with others through the store: the parts, their start and stop.

A hub without `state.url` has no cluster, and imports nothing of this.  Two parts are
here as well: the links that sign in, and the counters of a group of processes.

    key                    value
    PREFIX:link:DIGEST     a token, encrypted with the code of its link, for 5 minutes
    PREFIX:metrics:GROUP   hash: of each run of a process its counters, as compressed
                           JSON; and as `ended` the sum of those that ended long ago
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlsplit

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from gollama_proxy.config.values import ConfigError
from gollama_proxy.control import Parts
from gollama_proxy.control.agents import Renewals
from gollama_proxy.control.page import LINK_LIFETIME
from gollama_proxy.control.peers import MOST_READ, MOST_SENT, Peers
from gollama_proxy.edge.quotas import SharedLimits
from gollama_proxy.scheduling.hints import Hints
from gollama_proxy.scheduling.reports import Reports
from gollama_proxy.scheduling.sharing import Sharing
from gollama_proxy.state.link import StoreDownError, StoreError
from gollama_proxy.state.members import Members, describe_me
from gollama_proxy.state.shared import SharedState
from gollama_proxy.state.slots import shared_key
from gollama_proxy.state.store import Mode, Store
from gollama_proxy.telemetry.exposition import Family, Part, Plain, Sums, to_plain
from gollama_proxy.telemetry.families import METRICS

logger = logging.getLogger(__name__)


class Cluster:
    """The parts of one hub that share something with other hubs."""

    store: Store
    members: Members  # after `open`
    peers: Peers | None = None  # after `start`
    sharing: Sharing  # after `open`

    def __init__(self, hub: Parts) -> None:
        """Prepare; nothing happens before `open`."""
        self._hub = hub
        # How to end what has been started, the last part first.
        self._ends = contextlib.AsyncExitStack()
        state = hub.config.state
        self._me = describe_me(hub.config.process)
        run = self._me.run
        self.store = Store(state.url, state.prefix, hub.clock)
        self.shared = SharedState(hub.state, self.store, run, hub.clock)
        self.shared.on_change = hub.follower.follow
        renewals = Renewals(hub.agents, state.prefix, run)
        self.shared.add(lambda: [renewals])
        self.shared.on_round = self._note_round

    def __repr__(self) -> str:
        return f"<Cluster {self.store!r}>"

    @property
    def identity(self) -> str:
        """The same for all hubs that share registrations; empty without the store."""
        return self.store.epoch if self.store.mode is Mode.UP else ""

    async def open(self) -> None:
        """Connect to the store and join the other hubs, before there are clients.

        A store that cannot be reached delays nothing: the hub goes on without it.

        Raises:
            ConfigError: the store can never be used like this.
        """
        try:
            await self._open()
        except BaseException as exc:
            await self.close()
            if not isinstance(exc, StoreError):
                raise
            url = self._hub.config.state.url
            raise ConfigError(f"state.url = {url!r}: {exc}") from exc

    async def _open(self) -> None:
        ends = self._ends
        ends.push_async_callback(self.store.close)
        await self.store.open()
        self.members = Members(self.store, self._me, self._hub.clock)
        self._hub.telemetry.follow_store(self.store, lambda: self.members.count)
        ends.push_async_callback(self.members.stop)
        await self.members.start()
        self.shared.others = lambda: [member.name for member in self.members.all[1:]]
        self._share_limits()
        # The fleet is that of all hubs before the first client comes.
        ends.push_async_callback(self.shared.stop)
        await self.shared.start()
        await self.shared.round()
        self.sharing = self._share_slots()
        ends.push_async_callback(self.sharing.stop)
        await self.sharing.start()
        self._reports = self._make_reports()
        ends.push_async_callback(self._reports.stop)
        await self._reports.start()

    def _note_round(self) -> None:
        """Follow whether the state of this hub is that of all hubs."""
        hub, shared = self._hub, self.shared
        if shared.caught_up:
            if hub.authenticator.suspended:
                logger.warning("the store is reached again: tokens are accepted")
            hub.authenticator.resume()
            return
        hub.agents.prolong()
        self._limits.lose()
        trust = hub.config.state.trust
        if trust and hub.clock() - shared.read_at >= trust:
            before = hub.authenticator.suspended
            hub.authenticator.suspend()
            if hub.authenticator.suspended and not before:
                text = (
                    "the store was not reached for %g s (state.trust): tokens are "
                    "refused, as revocations may have been missed"
                )
                logger.error(text, trust)

    def _share_limits(self) -> None:
        hub, members = self._hub, self.members
        limits = SharedLimits(
            hub.quotas,
            hub.queue.admission,
            hub.queue.look_again,
            prefix=self.store.prefix,
            run=members.me.run,
            clock=hub.clock,
        )
        self.shared.add(lambda: [limits])
        members.on_leave(lambda member: limits.forget(member.run))
        self._limits = limits

    def _share_slots(self) -> Sharing:
        members = self.members
        return Sharing(
            self.store,
            self._hub.registry,
            self._hub.queue,
            self._hub.clock,
            hub=members.me.run,
            machine=members.me.host,
            hubs=lambda: [member.run for member in members.all],
        )

    def _make_reports(self) -> Reports:
        hub, me = self._hub, self.members.me
        hints = Hints(
            hub.registry,
            hub.balancer,
            me.run,
            lambda worker: shared_key(worker.config.origin, me.host),
            hub.clock,
        )
        return Reports(self.store, self.members, hub.balancer, hints, hub.clock)

    async def start(self, url: str) -> None:
        """Begin to serve the other hubs; `url` is where clients reach this one."""
        hub, me, port = self._hub, self.members.me, urlsplit(url).port
        name = f"{me.host}:{port}" if port else me.host
        if number := hub.config.process.number:
            name = f"{name}/{number}"
        await self.members.listens_at(url, name)

        async def collect(_: object) -> dict[str, object]:
            families = await hub.telemetry.collect()
            return {"run": self.members.me.run, "families": families}

        self.peers = Peers(
            self.store,
            self.members,
            {**hub.replies.table, "metrics": collect},
            hub.events.take_news,
            clock=hub.clock,
        )
        self._ends.push_async_callback(self.peers.stop)
        await self.peers.start()
        hub.peers = self.peers
        hub.events.join(self.peers)
        hub.links.shared = LinksInStore(self.store)
        me = self.members.me
        if me.group != me.run:
            group = GroupMetrics(self.store, self.peers, me.group, me.run, METRICS)
            hub.telemetry.others = group.collect

    async def close(self) -> None:
        """Give back what this hub holds, and leave the others; harmless when closed."""
        await self._ends.aclose()


# --- Links that sign in at any hub ------------------------------------------------

_NONCE = 12  # bytes


class LinksInStore:
    """The links of all hubs, made at one and used at another.

    The store has neither the code of a link nor its token: the name of the key and the
    key of the cipher (ChaCha20-Poly1305, RFC 8439) are two hashes of the code, which is
    random.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"<LinksInStore {self._store!r}>"

    async def keep(self, code: str, token: str) -> bool:
        """Keep the token of a code; return False if the store cannot be reached."""
        nonce = os.urandom(_NONCE)
        sealed = nonce + _cipher(code).encrypt(nonce, token.encode(), None)
        try:
            await self._store.call("SET", self._key(code), sealed, "EX", LINK_LIFETIME)
        except StoreDownError:
            return False
        return True

    async def take(self, code: str) -> str | None:
        """Return the token of a code, and forget it; None if there is none."""
        try:
            sealed = await self._store.call("GETDEL", self._key(code))
        except StoreDownError:
            return None
        if sealed is None:
            return None
        try:
            token = _cipher(code).decrypt(sealed[:_NONCE], sealed[_NONCE:], None)
        except (InvalidTag, ValueError):  # of another program
            return None
        return token.decode()

    def _key(self, code: str) -> str:
        return self._store.key(f"link:{_hash(code, b'name', 16).hex()}")


def _cipher(code: str) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(_hash(code, b"cipher", 32))


def _hash(code: str, use: bytes, size: int) -> bytes:
    return hashlib.blake2b(code.encode(), digest_size=size, person=use).digest()


# --- The metrics of a group of processes ------------------------------------------

KEPT = 24 * 3600  # seconds after the last scrape
MOST_ENDED = 32  # processes that are kept one by one
WITHIN = 0.5  # seconds for the store, which gets up to a megabyte of each process
_ENDED = "ended"
# Unless another process has changed the sum meanwhile.
_FOLD = """
if (redis.call('HGET', KEYS[1], 'ended') or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'ended', ARGV[2])
for i = 3, #ARGV do redis.call('HDEL', KEYS[1], ARGV[i]) end
return 1
"""


class GroupMetrics:
    """Collects what the other processes of a group have counted.

    A counter must not fall when a process ends, or has no time to answer: Prometheus
    would take that for a restart, and count everything again.  So what each process has
    counted is kept in the store at each scrape, and counts from then on as long as the
    group lives.  Without the store, the page has what the process that answers has
    counted itself.
    """

    def __init__(
        self, store: Store, peers: Peers, group: str, run: str, known: Iterable[Family]
    ) -> None:
        self._store = store
        self._peers = peers
        self._key = store.key(f"metrics:{group}")
        self._run = run
        self._known = tuple(known)
        self._kinds = {family.name: family.type for family in self._known}

    def __repr__(self) -> str:
        return f"<GroupMetrics {self._key}>"

    async def collect(self, own: Sequence[Plain]) -> list[Part]:
        """Return what the others have, besides what this process has itself."""
        answers = await self._peers.ask("metrics", group=True)
        found = {each["run"]: each["families"] for each in answers.found.values()}
        parts: list[Part] = [(families, False) for families in found.values()]
        try:
            kept = await self._read(found.keys() | {self._run})
            await self._write({self._run: own, **found})
        except StoreDownError:
            return parts
        texts = [text for text in kept.values() if text]
        parts += [(each, True) for each in await asyncio.to_thread(_unpack, texts)]
        ended = kept.keys() - {_ENDED} - self._peers.runs
        if len(ended) > MOST_ENDED:
            await self._fold(kept, ended)
        return parts

    async def _read(self, present: Iterable[str]) -> dict[str, bytes]:
        """Read what those processes have counted that did not answer."""
        [keys] = await self._store.pipe([("HKEYS", self._key)])
        runs = [run for key in keys if (run := key.decode()) not in set(present)]
        if not runs:
            return {}
        [texts] = await self._store.pipe([("HMGET", self._key, *runs)], within=WITHIN)
        return dict(zip(runs, texts, strict=True))

    async def _write(self, found: Mapping[str, Sequence[Plain]]) -> None:
        counted = {
            run: [each for each in families if self._kinds.get(each[0]) != "gauge"]
            for run, families in found.items()
        }
        packed = await asyncio.to_thread(_pack, counted)
        fields = [part for pair in packed.items() for part in pair]
        commands = [
            ("HSET", self._key, *fields),
            ("PEXPIRE", self._key, KEPT * 1000),
        ]
        if fields:
            await self._store.pipe(commands, within=WITHIN)

    async def _fold(self, kept: Mapping[str, bytes], ended: Iterable[str]) -> None:
        """Add up what processes have counted that ended, and forget them."""
        runs = sorted(ended)
        before = kept.get(_ENDED) or b""
        sums = Sums(self._known)
        for families in _unpack([before, *(kept[run] for run in runs)]):
            sums.add(families, ended=True)
        packed = _pack({_ENDED: [*to_plain(sums.collect())]})
        if packed:
            args: list[bytes | str] = [before, packed[_ENDED], *runs]
            await self._store.run(_FOLD, [self._key], args)


def _pack(counted: Mapping[str, Sequence[Plain]]) -> dict[str, bytes]:
    packed = {
        run: zlib.compress(msgspec.json.encode(families), 1)
        for run, families in counted.items()
    }
    return {run: text for run, text in packed.items() if len(text) <= MOST_SENT}


def _unpack(texts: Iterable[bytes]) -> list[list[Plain]]:
    """Read what processes have counted; what cannot be read is left out."""
    found = []
    for text in texts:
        inflate = zlib.decompressobj()
        try:
            plain = inflate.decompress(text, MOST_READ)
            found.append(msgspec.json.decode(plain, type=list[Plain]))
        except (zlib.error, msgspec.DecodeError):
            continue
    return found
