"""What the operators' side of hubs keeps in their store: links, and counters.

key                    value
PREFIX:link:DIGEST     a token, encrypted with the code of its link, for five minutes
PREFIX:metrics:GROUP   hash: of each run of a process its counters, as compressed
                       JSON; and as `ended` the sum of those that ended long ago
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from gollama_proxy.control.page import LINK_LIFETIME
from gollama_proxy.control.peers import MOST_READ, MOST_SENT, Peers
from gollama_proxy.state.link import StoreDownError
from gollama_proxy.state.store import Store
from gollama_proxy.telemetry.exposition import Family, Part, Plain, Sums, to_plain

# --- Links that sign in at any hub --------------------------------------------------

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


# --- The metrics of a group of processes --------------------------------------------

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
