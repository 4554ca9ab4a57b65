"""A journal in the store: rows that all hubs write, and read as they change.

One script does everything in one round trip (`journal.lua`): it writes rows, removes
those that are old, and returns what is new since a cursor.  This module makes its
arguments and reads its answers; it has no connection.

A journal belongs to one life of the store: when its data is lost, the next step begins
another one, and the answer reports that it is `renewed`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from gollama_proxy.state.facts import TOMBSTONES

SCRIPT = resources.files(__package__).joinpath("journal.lua").read_text("utf-8")
_NUMBER = re.compile(r"[0-9]{1,16}")
MOST_NEWS = 500  # rows in one answer
MOST_WRITTEN = 200  # rows in one step: the script holds up the store for about 1 ms


class Entry(NamedTuple):
    """A row to write.

    `when` is "aAGE:KNOWN", with its age in microseconds (0: it replaces any other one)
    and the version that it replaces; "vVERSION"; or "n": only if there is none, or an
    empty one.
    """

    key: str
    when: str
    value: str


class Result(NamedTuple):
    """What became of a row to write."""

    written: bool
    version: int  # of the row in force; 0: there was no room
    value: str = ""  # of the row in force, if that is another one


class Row(NamedTuple):
    """A row that is new for this hub."""

    key: str
    number: int  # when it was written, in microseconds of the store's clock
    version: int
    value: str


class Answer(NamedTuple):
    """What one step has returned."""

    renewed: bool  # this is another life of the store, which is read from its start
    now: int  # microseconds of the store's clock
    more: bool  # rows are left to read
    results: list[Result]  # of each entry, in their order
    rows: list[Row]


class Journal:
    """The arguments and the position of this hub in one journal."""

    def __init__(
        self,
        prefix: str,
        name: str,
        most: int,
        *,
        life: float = TOMBSTONES,
        mortal: str = "empty",
        expiry: float = 0,
        channel: str = "",
        skip: str = "",
    ) -> None:
        """Begin at the start; nothing is sent.

        At most `most` rows are kept.  Mortal rows ("empty" or "all") are removed after
        `life` seconds, and the journal `expiry` seconds after its last step (0: never).
        `channel` gets a message when a row was written.  Rows whose keys begin with
        `skip` are this hub's, and are not returned.
        """
        self.name, self.id, self.cursor = name, "", 0
        self._skip, self._channel = skip, channel
        base = f"{prefix}:{name}"
        self.keys = [base, f"{base}:order", f"{base}:mortal", f"{base}:life"]
        self._bounds = [
            str(MOST_NEWS),
            str(most),
            str(int(life * 1e6)),
            mortal,
            str(int(expiry * 1000)),
        ]

    def __repr__(self) -> str:
        return f"<Journal {self.name} cursor={self.cursor}>"

    def command(self, entries: Sequence[Entry] = (), message: str = "") -> list[str]:
        """Return one step as a command of the store."""
        written = [part for entry in entries for part in entry]
        return [
            *("EVAL", SCRIPT, str(len(self.keys)), *self.keys),
            *(secrets.token_hex(8), self.id, str(self.cursor), self._skip),
            *(*self._bounds, self._channel, message, *written),
        ]

    def read(self, reply: Sequence[Any]) -> Answer:
        """Read the reply to a step, and move the cursor behind what it returned.

        Raises:
            ValueError: it is not a reply of the script.
        """
        try:
            life, now, cursor, more, results, news = reply
            answer = Answer(
                _text(life) != self.id,
                int(now),
                bool(more),
                [_result(_text(each)) for each in results],
                [
                    Row(_text(key), int(number), *_split(_text(row)))
                    for key, number, row in zip(*[iter(news)] * 3, strict=True)
                ],
            )
            self.id, self.cursor = _text(life), int(cursor)
        except TypeError as exc:
            raise ValueError("not a reply of the script") from exc
        return answer


def _result(text: str) -> Result:
    if text.startswith("+"):
        return Result(written=True, version=int(text[1:]))
    if text == "!":
        return Result(written=False, version=0)
    version, value = _split(text[1:])
    return Result(written=False, version=version, value=value)


def _split(row: str) -> tuple[int, str]:
    version, _, value = row.partition(" ")
    if not _NUMBER.fullmatch(version):
        return 0, ""  # of another program
    return int(version), value


def _text(data: bytes | str) -> str:
    """Return text of the store; what is not UTF-8 is from another program."""
    return data if isinstance(data, str) else data.decode("utf-8", "replace")
