"""What hubs write into the store for each other: messages, facts, and the journal.

**A message** is a JSON object with a `v`, the version of its format, which each kind of
message counts by itself.  Hubs of two releases may share a store during an upgrade, and
other programs can write into it as well.  So `decode` returns None for everything that
this release does not understand, and such a message is ignored: what it was about is
found out without it.  Fields that are unknown are ignored, too.

**Facts** are what a hub keeps of its fleet and its callers, with or without a store.
Each has a kind, a name and a text; an empty text means that it was removed.

    worker  a registered worker: its source, its `[[workers]]` table, its agent
    hold    "paused" or "draining", by the name of the worker
    jti     a revoked token     (these two are never removed)
    sub     a revoked subject

Workers and holds are two facts, so that a drain at one hub and other settings at
another one both stay in force.

**Versions.**  The version of a change is the store's time, in microseconds.  The
greatest version of a fact is its truth.  A change that the store does not have yet has
the moment when it was made, and the version that it was made to.  When it is sent, its
version is the store's time less its age, so that it loses to a later change at another
hub, but always wins over what it has replaced.  No clock of a hub is compared with
another one's.

A fact that was removed stays as an empty one for `TOMBSTONES` seconds, so that a hub
that was away does not bring it back.

**A journal** has rows that all hubs write, and read as they change: facts, and other
rows of the same kind.  One script does everything in one round trip (`journal.lua`): it
writes rows, removes those that are old, and returns what is new since a cursor.  Here
its arguments are made and its answers read; there is no connection.

A journal belongs to one life of the store: when its data is lost, the next step begins
another one, and the answer reports that it is `renewed`.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, cast

import msgspec

from gollama_proxy.bounded import BoundedDict

logger = logging.getLogger(__name__)

MOST_BYTES = 4_000_000  # of a message; longer ones are not parsed


class Message(msgspec.Struct, kw_only=True):
    """The base of all messages; a subclass has another `version` if need be."""

    version: ClassVar[int] = 1
    v: int = 0

    def __post_init__(self) -> None:
        if not self.v:
            self.v = self.version


_M = TypeVar("_M", bound=Message)


class _Head(msgspec.Struct):
    v: int


_head = msgspec.json.Decoder(_Head)
_decoders: dict[type[Message], msgspec.json.Decoder[Any]] = {}
_complaints = BoundedDict[tuple[str, bool], None]()

encode = msgspec.json.Encoder().encode


def decode(
    kind: type[_M], data: bytes | str, where: str, most: int = MOST_BYTES
) -> _M | None:
    """Return a message of this kind; None if it cannot be understood.

    `where` is the kind of key or channel that it comes from, such as "gollama:hints";
    `most` is how many bytes it may have.  The first message from there that is
    malformed, and the first of another version, is a warning in the log, which shows
    nothing of its contents.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        if len(data) > most:
            raise msgspec.DecodeError("too long")
        version = _head.decode(data).v
        if version == kind.version:
            return cast(_M, decoder.decode(data))
        why = f"its format has version {version}, and this hub knows {kind.version}"
        known = True
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        why, known = "it is malformed", False
    if (where, known) not in _complaints:
        _complaints[where, known] = None
        logger.warning("a message in %s is ignored: %s", where, why)
    return None


def storable(name: str) -> str:
    """Return a name that is valid UTF-8: that of a token may have half of a pair."""
    return name if name.isascii() else name.encode("utf-8", "replace").decode()


# --- Facts ------------------------------------------------------------------------

MAX_WORKERS = 10_000
MAX_REVOCATIONS = 100_000
TOMBSTONES = 30 * 86_400.0  # seconds
MAX_TOMBSTONES = 10_000
MAX_TEXT = 64 << 10  # characters of a fact; a larger one is not shared

Kind = Literal["worker", "hold", "jti", "sub"]
KINDS: tuple[Kind, ...] = ("worker", "hold", "jti", "sub")
Key = tuple[str, str]  # kind and name
SOURCES = frozenset({"file", "admin", "agent"})
HOLDS = frozenset({"", "paused", "draining"})
REVOKED = "1"  # the text of a revocation


@dataclass(frozen=True, slots=True)
class StoredWorker:
    """One worker; `settings` is its `[[workers]]` table, and has no secrets.

    A worker of the settings file is stored only for its hold, without its settings.
    """

    name: str
    source: str  # "file", "admin" or "agent"
    settings: Mapping[str, Any] = field(default_factory=dict)
    hold: str = ""  # "paused", "draining", or "" for none
    agent: Mapping[str, Any] = field(default_factory=dict)  # of its agent, or empty


class Stamp(NamedTuple):
    """How new a fact is."""

    version: int  # the last one known; 0: the store never had it
    changed: float  # Unix time of this machine
    sent: bool  # else the store does not have this change yet


class Fact(NamedTuple):
    """A fact as the store has it."""

    kind: str
    name: str
    text: str  # "" if it was removed
    version: int

    @property
    def key(self) -> Key:
        return self.kind, self.name


class Gap(NamedTuple):
    """What this hub does not know of the others, as it cannot reach the store."""

    hubs: list[str]  # the names of those that were seen last
    since: float  # Unix time


# --- Facts of a worker ------------------------------------------------------------


class _Registered(Message):
    """The text of a worker."""

    source: Literal["admin", "agent"]
    settings: dict[str, Any]
    agent: dict[str, Any] = msgspec.field(default_factory=dict)


def texts_of(worker: StoredWorker | None) -> dict[str, str]:
    """Return the texts of the two facts that are kept of a worker."""
    if worker is None:
        return {"worker": "", "hold": ""}
    text = ""
    if worker.settings:
        agent = dict(worker.agent)
        registered = _Registered(
            source=_source(worker), settings=dict(worker.settings), agent=agent
        )
        text = msgspec.json.encode(registered, order="sorted").decode()
    return {"worker": text, "hold": worker.hold}


def with_fact(worker: StoredWorker | None, fact: Fact) -> StoredWorker | None:
    """Return a worker with one of its facts changed; None if nothing is left of it.

    The fact has to be sound.
    """
    worker = worker or StoredWorker(fact.name, "file")
    if fact.kind == "hold":
        worker = replace(worker, hold=fact.text)
    elif not fact.text:
        worker = StoredWorker(fact.name, "file", hold=worker.hold)
    elif found := decode(_Registered, fact.text, "facts"):
        worker = replace(
            worker, source=found.source, settings=found.settings, agent=found.agent
        )
    return worker if worker.settings or worker.hold else None


def is_sound(fact: Fact) -> bool:
    """Whether a fact of the store can be kept; other programs may write there, too."""
    if not fact.name or len(fact.name) > MAX_TEXT or len(fact.text) > MAX_TEXT:
        return False
    if fact.kind == "worker":
        found = not fact.text or decode(_Registered, fact.text, "facts")
        return found is True or (found is not None and bool(found.settings))
    if fact.kind == "hold":
        return fact.text in HOLDS
    return fact.kind in ("jti", "sub") and bool(fact.text)


def _source(worker: StoredWorker) -> Literal["admin", "agent"]:
    return "agent" if worker.source == "agent" else "admin"


# --- What to take, and what to send -----------------------------------------------


class Comparison(NamedTuple):
    """What becomes of a fact that was read from the store."""

    take: bool = False  # this hub follows it
    send: bool = False  # this hub has a newer one


def compare(mine: Stamp | None, theirs: int) -> Comparison:
    """Compare a fact of this hub with the version in the store."""
    if mine is None or (mine.sent and mine.version < theirs):
        return Comparison(take=True)
    # One that was not sent yet: the store decides when it comes.
    return Comparison(send=not mine.sent or mine.version > theirs)


def left_over(mine: Stamp, *, same_life: bool) -> Comparison:
    """Decide on a fact that the store does not have, after all of it was read.

    In the same life of the store, it was removed so long ago that not even the empty
    fact is left; a store that has lost its data is filled again.
    """
    if same_life and mine.sent and mine.version:
        return Comparison(take=True)
    return Comparison(send=True)


# --- The journal ------------------------------------------------------------------

SCRIPT = resources.files(__package__).joinpath("journal.lua").read_text("utf-8")
_NUMBER = re.compile(r"[0-9]{1,16}")
NEWS = "news"  # the channel of rows that may be read half a second later
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


class Written(NamedTuple):
    """What became of a row to write."""

    written: bool
    version: int  # of the row in force; 0: there was no room
    value: str = ""  # of the row in force, if that is another one


class NewRow(NamedTuple):
    """A row that is new for this hub."""

    key: str
    number: int  # when it was written, in microseconds of the store's clock
    version: int
    value: str


class StepResult(NamedTuple):
    """What one step has returned."""

    renewed: bool  # this is another life of the store, which is read from its start
    now: int  # microseconds of the store's clock
    more: bool  # rows are left to read
    results: list[Written]  # of each entry, in their order
    rows: list[NewRow]


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

    def read(self, reply: Sequence[Any]) -> StepResult:
        """Read the reply to a step, and move the cursor behind what it returned.

        Raises:
            ValueError: it is not a reply of the script.
        """
        try:
            life, now, cursor, more, results, news = reply
            answer = StepResult(
                _text(life) != self.id,
                int(now),
                bool(more),
                [_result(_text(each)) for each in results],
                [
                    NewRow(_text(key), int(number), *_split(_text(row)))
                    for key, number, row in zip(*[iter(news)] * 3, strict=True)
                ],
            )
            self.id, self.cursor = _text(life), int(cursor)
        except TypeError as exc:
            raise ValueError("not a reply of the script") from exc
        return answer


def _result(text: str) -> Written:
    if text.startswith("+"):
        return Written(written=True, version=int(text[1:]))
    if text == "!":
        return Written(written=False, version=0)
    version, value = _split(text[1:])
    return Written(written=False, version=version, value=value)


def _split(row: str) -> tuple[int, str]:
    version, _, value = row.partition(" ")
    if not _NUMBER.fullmatch(version):
        return 0, ""  # of another program
    return int(version), value


def _text(data: bytes | str) -> str:
    """Return text of the store; what is not UTF-8 is from another program."""
    return data if isinstance(data, str) else data.decode("utf-8", "replace")
