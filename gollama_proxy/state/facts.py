"""What a hub keeps of its fleet and its callers, as facts that several hubs can share.

A fact has a kind, a name and a text; an empty text means that it was removed.

    worker  a registered worker: its source, its `[[workers]]` table, its agent
    hold    "paused" or "draining", by the name of the worker
    jti     a revoked token     (these two are never removed)
    sub     a revoked subject

Workers and holds are two facts, so that a drain at one hub and other settings at
another one both stay in force.

**Versions.**  The store gives each change a version: the microsecond of its own clock.
The greatest version of a fact is its truth.  A change that the store does not have yet
has the moment when it was made, and the version that it was made to.  When it is sent,
its version is the store's time less its age, so that it loses to a later change at
another hub, but always wins over what it has replaced.  No clock of a hub is compared
with another one's.

A fact that was removed stays as an empty one for `TOMBSTONES` seconds, so that a hub
that was away does not bring it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import msgspec

from gollama_proxy.state.messages import Message, decode

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


class Verdict(NamedTuple):
    """What becomes of a fact that was read from the store."""

    take: bool = False  # this hub follows it
    send: bool = False  # this hub has a newer one


def compare(mine: Stamp | None, theirs: int) -> Verdict:
    """Compare a fact of this hub with the version in the store."""
    if mine is None or (mine.sent and mine.version < theirs):
        return Verdict(take=True)
    # One that was not sent yet: the store decides when it comes.
    return Verdict(send=not mine.sent or mine.version > theirs)


def left_over(mine: Stamp, *, same_life: bool) -> Verdict:
    """Decide on a fact that the store does not have, after all of it was read.

    In the same life of the store, it was removed so long ago that not even the empty
    fact is left; a store that has lost its data is filled again.
    """
    if same_life and mine.sent and mine.version:
        return Verdict(take=True)
    return Verdict(send=True)
