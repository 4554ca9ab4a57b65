"""The renewals of agents, which every hub learns, whichever hub an agent calls.

An agent renews its lease at one hub, and may switch to another one at any time.  A hub
writes what was renewed there, with the report of the agent, and reads the renewals at
other hubs, within a second.  The hub that an agent has called last is the first one
that ends a silent lease; the others would do so `GRACE` seconds later, if that hub is
gone as well.

A hub that cannot reach the store does not know what is renewed elsewhere, and ends no
lease until it can.  Its health checks find workers that are gone.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from gollama_proxy.fleet.agents import Agents, WorkerLease
from gollama_proxy.state.facts import MAX_WORKERS
from gollama_proxy.state.journal import MOST_WRITTEN, Answer, Entry, Journal
from gollama_proxy.state.messages import Message, decode, encode

logger = logging.getLogger(__name__)

# Seconds for which a renewal is kept in the store: more than the longest lease.
LIFE = 2 * 3600.0


class Renewal(Message):
    """A renewal as the store has it, by the name of the worker."""

    hub: str  # where it was renewed: different at each start of a hub
    agent: str  # the digest of its secret
    report: dict[str, Any] = msgspec.field(default_factory=dict)


class Renewals:
    """Takes part in the rounds with other hubs (`state/valkey.py`)."""

    def __init__(self, agents: Agents, prefix: str) -> None:
        self.journal = Journal(prefix, "agents", MAX_WORKERS, life=LIFE, mortal="all")
        self._agents, self._me = agents, secrets.token_hex(8)
        self._numbers = itertools.count()
        self._pending: dict[str, int] = {}  # renewed here, and not sent yet
        self._sent: dict[str, int] = {}  # by the current round
        agents.on_renewed = self._note

    def __repr__(self) -> str:
        return f"<Renewals pending={len(self._pending)}>"

    def _note(self, lease: WorkerLease) -> None:
        self._pending[lease.name] = next(self._numbers)

    async def entries(self) -> list[Entry]:
        names = itertools.islice(self._pending, MOST_WRITTEN)
        self._sent = {name: self._pending[name] for name in names}
        found = []
        for name in self._sent:
            lease = self._agents.find(name)
            if lease is not None:
                row = Renewal(hub=self._me, agent=lease.agent, report=lease.report)
                found.append(Entry(name, "a0", encode(row).decode()))
        return found

    async def take(self, entries: Sequence[Entry], answer: Answer) -> bool:
        for name, number in self._sent.items():
            if self._pending.get(name) == number:
                del self._pending[name]
        for row in answer.rows:
            found = decode(Renewal, row.value, "agents") if row.value else None
            if found is not None and found.hub != self._me:
                age = max(0.0, (answer.now - row.number) / 1e6)
                self._agents.hear(row.key, found.agent, found.report, age)
        return answer.more or bool(self._pending)
