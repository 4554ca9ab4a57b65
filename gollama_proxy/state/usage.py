"""What all hubs have used: each writes the totals of its ledger, and reads the others'.

There is a journal for each month.  A row is the total of one ledger on one day, for a
subject and a model: it is set and never incremented, so that it can be written twice,
and a store that has lost its data is filled again.  A hub writes what has changed, and
reads what others have changed, in each round (`valkey.py`).

A hub keeps what it has read in its own database.  So it needs the store only for what
is new, and a hub that was away for longer than the journals are kept lacks that time.
"""

from __future__ import annotations

import itertools
import logging
import sqlite3
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Annotated

import msgspec
from msgspec import Meta

from gollama_proxy.state.journal import MOST_WRITTEN, Answer, Entry, Journal
from gollama_proxy.state.ledger import Ledger, OtherRow, Sums
from gollama_proxy.state.messages import Message, decode, encode

logger = logging.getLogger(__name__)

# Rows of a month, about 300 bytes each: of 16 hubs with 400 pairs of a subject and a
# model on each day.
MOST_ROWS = 200_000
# Seconds for which a month is kept after the last hub has looked at it: a hub looks at
# the current month and the one before.
EXPIRY = 40 * 86_400.0
# Rounds after which the month before is looked at again, as a hub that was away may
# come back with what it has used there.
SELDOM = 120

_FIRST = date(1970, 1, 1)


class Total(Message):
    """The value of a row."""

    sums: Sums


class _Place(msgspec.Struct, array_like=True):
    """The key of a row, behind the id of its ledger and a space."""

    day: Annotated[int, Meta(ge=0, le=1_000_000)]
    subject: Annotated[str, Meta(max_length=10_000)]
    model: Annotated[str, Meta(max_length=10_000)]


class Usage:
    """The journals of two months, for the ledger of this hub."""

    def __init__(self, ledger: Ledger, prefix: str) -> None:
        self.full = False  # the store has no room for what this hub has used
        self._ledger, self._prefix = ledger, prefix
        self._months: dict[date, Month] = {}
        self._rounds = itertools.count()

    def __repr__(self) -> str:
        return f"<Usage {[*self._months.values()]!r}>"

    def parts(self) -> list[Month]:
        """Return what takes part in the next round."""
        today = _FIRST + timedelta(self._ledger.day)
        this = today.replace(day=1)
        before = (this - timedelta(1)).replace(day=1)
        if self._months.keys() != {before, this}:
            self._months = {
                month: self._months.get(month)
                or Month(self._ledger, self._prefix, month, self)
                for month in (before, this)
            }
        old, new = self._months[before], self._months[this]
        seldom = next(self._rounds) % SELDOM == 0 or today.day <= 2
        return [old, new] if seldom or old.due else [new]


class Month:
    """The journal of one month; a part of the rounds."""

    def __init__(self, ledger: Ledger, prefix: str, month: date, usage: Usage) -> None:
        self.journal = Journal(
            prefix,
            f"usage:{month:%Y-%m}",
            MOST_ROWS,
            expiry=EXPIRY,
            skip=f"{ledger.id} ",
        )
        self._ledger, self._usage = ledger, usage
        self._first = (month - _FIRST).days
        self._end = ((month + timedelta(31)).replace(day=1) - _FIRST).days
        self._sent: dict[tuple[int, str, str], int] = {}

    def __repr__(self) -> str:
        return f"<Month {self.journal!r}>"

    @property
    def due(self) -> bool:
        """Whether this month was not read, or this hub has something to write."""
        return not self.journal.id or bool(self._to_send(1))

    def _to_send(self, most: int) -> list[tuple[int, str, str]]:
        mine = (
            key
            for key in self._ledger.unshared or ()
            if self._first <= key[0] < self._end
        )
        return [*itertools.islice(mine, most)]

    async def entries(self) -> list[Entry]:
        """Return totals that have changed.  A disk that cannot be read delays them."""
        self._sent = {}
        unshared = self._ledger.unshared
        if not self.journal.id or unshared is None:
            return []  # all of them follow, once this life of the store is known
        try:
            await self._ledger.save()
            keys = self._to_send(MOST_WRITTEN)
            totals = await self._ledger.totals(keys)
        except sqlite3.Error as exc:
            logger.debug("usage cannot be read: %s", exc)
            return []
        self._sent = {key: unshared[key] for key in keys}
        return [
            Entry(
                f"{self._ledger.id} {encode(_Place(*key)).decode()}",
                "a0",
                encode(Total(sums=sums)).decode(),
            )
            for key, sums in zip(keys, totals, strict=True)
        ]

    async def take(self, entries: Sequence[Entry], answer: Answer) -> bool:
        try:
            if answer.renewed:
                await self._ledger.share(self._first)
            await self._ledger.take_others([*self._others(answer)])
        except sqlite3.Error as exc:
            # The rows are read again from the start, when the disk takes them.
            logger.debug("usage of other hubs cannot be kept: %s", exc)
            self.journal.id, self.journal.cursor = "", 0
            return False
        unshared = self._ledger.unshared or {}
        for (key, number), result in zip(
            self._sent.items(), answer.results, strict=True
        ):
            self._usage.full = not result.version
            if unshared.get(key) == number:
                del unshared[key]
        # A disk that cannot be read leaves rows to send, and sends none.
        progress = answer.renewed or bool(self._sent)
        return answer.more or (progress and bool(self._to_send(1)))

    def _others(self, answer: Answer) -> list[OtherRow]:
        """Read the rows of other ledgers; what is malformed is left out."""
        found = []
        for row in answer.rows:
            ledger, _, place = row.key.partition(" ")
            total = decode(Total, row.value, "usage")
            try:
                where = msgspec.json.decode(place, type=_Place)
            except (msgspec.DecodeError, UnicodeError):
                continue
            if total is not None and self._first <= where.day < self._end:
                key = where.day, where.subject, where.model
                found.append(OtherRow(ledger, *key, total.sums))
        return found
