"""Sends what this hub has found out to the others, and receives what they have.

Keys and channels, all after the prefix:

    hints         channel: a `Report` of one hub, every `PERIOD` if it has news
    hints:key     the key of the hashes of conversations, made by the first hub
    hints:recent  stream: a `Report` of one hub, every `COPY` if it has news
    hints:rates   hash: a `Report` with one speed, by worker and model

The stream and the hash are for hubs that start later, and for those that could not
reach the store for a while.  They hold a few megabytes at most, and expire.  They are
read when the store is UP, and once more when all hubs have written what they reported
before this one listened.  Nothing is read while a request waits for it.

While the store is away, news stay here as far as there is room.  When it comes back
empty, the key is written again, and the speeds are reported once more; turns of
conversations are missing there until they go on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import secrets
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.hints import VISITS, Hints, Report
from gollama_proxy.state.facts import decode, encode
from gollama_proxy.state.link import Argument, StoreDownError, StoreError
from gollama_proxy.state.members import Members
from gollama_proxy.state.store import Mode, Store
from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

# Seconds.
PERIOD = 0.1  # between two reports
COPY = 5.0  # between two entries of the stream
REST = 60.0  # after the store has rejected a command
PATIENCE = 1.0  # for an answer with much data

KEY_BYTES = 32
_KEY = rb"[0-9a-f]{64}"
PAGE = 8  # entries of the stream that are read at once

MOST_RECENT = 256  # entries of the stream
MOST_RATES = 20_000  # entries of the hash, after which it is made anew
RECENT_FOR = 3_600_000  # ms
RATES_FOR = 7 * 86_400_000  # ms


class Reports:
    """The hints of this hub on their way to the others, and back."""

    def __init__(
        self,
        store: Store,
        members: Members,
        balancer: Balancer,
        hints: Hints,
        clock: Callable[[], float],
    ) -> None:
        """Prepare; nothing is sent before `start`.  `clock` is monotonic."""
        self._store, self._members = store, members
        self._balancer, self._hints, self._clock = balancer, hints, clock
        self._channel = store.key("hints")
        self._recent = store.key("hints:recent")
        self._rates = store.key("hints:rates")
        self._behind = True  # what others have reported has yet to be read
        self._look_again_at = math.inf  # when what they reported meanwhile is there
        self._last = b"0"  # the last entry of the stream that was read or written
        self._copy_at = 0.0
        self._complaint = ""  # the last one that was logged
        self._sending = Periodic("hints", self._step, PERIOD, delay=0)
        store.subscribe_mode(self._note_mode)
        store.on_empty(self._note_empty)

    def __repr__(self) -> str:
        return f"<Reports {self._hints!r}>"

    async def start(self) -> None:
        await self._store.listen(self._channel, self._receive)
        self._sending.start()

    async def stop(self) -> None:
        """Report what is left, also for the hub that takes this one's place."""
        await self._sending.stop()
        self._copy_at = 0.0
        with contextlib.suppress(StoreError):
            await self._send(last=True)

    def _note_mode(self, mode: Mode) -> None:
        self._behind = True

    def _note_empty(self) -> None:
        self._behind, self._last = True, b"0"
        self._hints.repeat()

    def _receive(self, data: bytes) -> None:
        report = decode(Report, data, self._channel)
        if report is not None:
            self._hints.take(report)

    async def _step(self) -> float | None:
        if self._store.mode is not Mode.UP:
            return None
        try:
            if self._behind:
                self._behind = False
                self._look_again_at = self._clock() + 2 * COPY
                await self._agree_on_key()
                await self._catch_up()
            elif self._clock() >= self._look_again_at:
                self._look_again_at = math.inf
                await self._catch_up()
            return await self._send()
        except StoreDownError:
            self._behind = True
            return None
        except StoreError as exc:
            self._complain(str(exc))
            return REST

    def _complain(self, why: str) -> None:
        if why != self._complaint:
            self._complaint = why
            logger.warning("hints are not shared with other hubs: %s", why)

    # --- Sending ------------------------------------------------------------------

    async def _send(self, *, last: bool = False) -> float | None:
        report, copy = self._hints.gather(last=last), None
        commands: list[tuple[Argument, ...]] = []
        if report is not None:
            commands.append(("PUBLISH", self._channel, self._encode(report)))
            commands += self._store_rates(report)
        if (now := self._clock()) >= self._copy_at:
            self._copy_at, copy = now + COPY, self._hints.copy()
        if copy is not None:
            entry = "MAXLEN", MOST_RECENT, "*", "report", self._encode(copy)
            commands.append(("XADD", self._recent, *entry))
            commands.append(("PEXPIRE", self._recent, RECENT_FOR))
        if commands:
            answers = await self._store.pipe(commands)
            if copy is not None and self._look_again_at == math.inf:
                self._last = answers[-2]
            if report is not None and report.rates and answers[3] > MOST_RATES:
                await self._store.call("DEL", self._rates)
                self._hints.repeat()
        full = report is not None and len(report.visits) == VISITS
        return 0.0 if full else None

    def _store_rates(self, report: Report) -> Iterator[tuple[Argument, ...]]:
        if not report.rates:
            return
        row: list[Argument] = []
        for rates in report.rates:
            place = report.places[rates.place]
            alone = Report(
                hub=report.hub, places=(place,), rates=(replace(rates, place=0),)
            )
            row += ["\0".join(place).encode(errors="replace"), self._encode(alone)]
        yield ("HSET", self._rates, *row)
        yield ("PEXPIRE", self._rates, RATES_FOR)
        yield ("HLEN", self._rates)

    def _encode(self, report: Report) -> bytes:
        report.name = self._members.me.name
        return encode(report)

    # --- What was there before ----------------------------------------------------

    async def _agree_on_key(self) -> None:
        """Use the key that the other hubs use; the first hub makes it."""
        name, mine = self._store.key("hints:key"), self._balancer.key
        made = (mine or secrets.token_bytes(KEY_BYTES)).hex()
        _, found = await self._store.pipe((("SET", name, made, "NX"), ("GET", name)))
        if isinstance(found, bytes) and re.fullmatch(_KEY, found):
            self._balancer.share(bytes.fromhex(found.decode()))
        else:
            self._complain(f"the key {name} is of another program")

    async def _catch_up(self) -> None:
        """Take what others have reported while this hub did not listen."""
        [seconds, _] = await self._store.call("TIME")
        now = int(seconds) * 1000
        oldest = b"%d" % (now - RECENT_FOR)
        if self._last == b"0":
            await self._read_rates()
            self._last = oldest
        while True:
            command = "XRANGE", self._recent, b"(" + self._last, "+", "COUNT", PAGE
            [entries] = await self._store.pipe([command], within=PATIENCE)
            for number, fields in entries:
                self._last = number
                report = decode(Report, fields[-1], self._recent)
                if report is not None:
                    age = (now - int(number.partition(b"-")[0])) / 1000
                    self._hints.take(report, max(0.0, age))
            if len(entries) < PAGE:
                return

    async def _read_rates(self) -> None:
        cursor = b"0"
        while True:
            command = "HSCAN", self._rates, cursor, "COUNT", 500
            [(cursor, rows)] = await self._store.pipe([command], within=PATIENCE)
            for value in rows[1::2]:
                report = decode(Report, value, self._rates)
                if report is not None:
                    self._hints.take(report)
            if cursor == b"0":
                return
