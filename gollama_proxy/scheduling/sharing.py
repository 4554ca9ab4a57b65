"""Shares the slots of all workers with other hubs, through the store.

`state/slots.py` decides what this hub holds, asks for and gives back, and has the one
call that carries it, for all workers at once.  Here is when that call is made: while no
other hub waits, at each heartbeat, and when a request finds no lease; at once when a
slot is owed to others.  Never two calls at a time: what happens during one is in the
next.  A request waits for a call only if this hub has no spare lease of the worker that
its routing policy prefers.

Grants arrive in replies and as messages.  Each names a subject, whose oldest request
gets the slot (`Queue.grant`).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final
from zlib import crc32

from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.fleet.registry import Listener, Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.scheduling.turns import Ticket
from gollama_proxy.state.link import StoreDownError, StoreError
from gollama_proxy.state.slots import (
    CAUTION,
    LIFETIME,
    MOST_WANTS,
    Grant,
    Share,
    SlotAsk,
    Want,
    decode_grants,
    decode_wanted,
    fair_part,
    fair_parts,
    grants_channel,
    shared_key,
    sync,
    wanted_channel,
)
from gollama_proxy.state.store import HEARTBEAT, Mode, Store
from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

# Seconds between two calls about workers for which requests wait; all leases are
# renewed at each heartbeat.
WAITING: Final = 1.0
# Leases that a hub renews less often, as late as one failed call allows.
MANY: Final = 10_000
AGAIN: Final = 0.1  # seconds until a call is repeated that was not answered
LATER: Final = 0.5  # the same, when the hub goes on by itself
# Calls without an answer, one after the other, after which the hub goes on by itself.
MOST_FAILURES: Final = 2
# Seconds since the last renewal after which leases of other hubs may have ended, too.
_ENDING: Final = LIFETIME - 2 * HEARTBEAT
# Workers that a request asks at once: in larger pools, others every second.
MOST_PLACES: Final = 32


class Sharing(Listener):
    """Gets and gives back the slots of this hub.  `clock` returns monotonic seconds."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        queue: Queue,
        clock: Callable[[], float],
        *,
        hub: str,
        machine: str,
        hubs: Callable[[], Sequence[str]],
    ) -> None:
        """Take over the slots of all workers: none can be used before `start`.

        `hub` is the run id of this hub, on `machine`; `hubs` returns those of all hubs
        that were last seen.
        """
        self.alone = True  # the store does not answer
        self.calls = 0  # that were answered
        self._store, self._registry, self._queue = store, registry, queue
        self._clock = clock
        self._hub, self._machine, self._hubs = hub, machine, hubs
        self._shares: dict[Worker, Share] = {}
        self._workers: dict[str, Worker] = {}  # by their keys
        self._former: dict[str, Share] = {}  # of workers that are gone, by their keys
        self._due: set[Worker] = set()  # about which the store has to know at once
        # Requests that wait: those of the last call, and of the last look at the queue.
        self._asked: set[Ticket] = set()
        self._asking: set[Ticket] = set()
        self._parts: dict[str, int] | None = None  # while the hub is alone
        self._renewed_at = clock()  # when the last call for all workers began
        self._full_at = -math.inf  # when the next one is due
        self._look_at = math.inf  # the same for workers for which requests wait
        self._place = 1, 0  # how many hubs there are, and which one of them this is
        self._failures = 0  # calls without an answer, since the last one
        self._expired = False  # no lease is valid any more
        self._lapsed = False  # the same, and the store has not answered since
        self._watch: asyncio.TimerHandle | None = None  # for that moment
        self._careful_until = -math.inf  # others may not be back at the store
        self._epoch = ""  # the data of the store that this hub knows
        self._registered = False  # there, what this hub holds
        self._awaits_until = -math.inf  # the other hubs, to register what they hold
        self._task = Periodic("slots", self._step, HEARTBEAT, delay=0.0)
        registry.subscribe(self)
        queue.on_wait = self._task.wake

    def __repr__(self) -> str:
        held = sum(len(share.leases) for share in self._shares.values())
        return f"<Sharing {'alone' if self.alone else 'shared'} leases={held}>"

    async def start(self) -> None:
        """Listen to other hubs and begin to call; the store need not be there."""
        prefix = self._store.prefix
        await self._store.listen(grants_channel(prefix, self._hub), self._on_grants)
        await self._store.listen(wanted_channel(prefix), self._on_wanted)
        self._store.subscribe_mode(self._on_mode)
        self._store.on_empty(self._note_empty)
        self._note_empty()
        self._task.start()

    async def stop(self) -> None:
        """Give back everything, if the store can be reached."""
        await self._task.stop()
        if self._watch is not None:
            self._watch.cancel()
        self._queue.on_wait = None
        for worker, share in self._shares.items():
            worker.on_yield = None
            share.trim(0)
        asks = [
            (share, ask)
            for share in (*self._shares.values(), *self._former.values())
            if (ask := share.ask(0, 0, 0))
        ]
        try:
            await sync(self._store, self._hub, [ask for _, ask in asks])
        except StoreError:
            logger.info("leases of slots could not be given back; they will expire")

    # --- The fleet ----------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        if worker not in self._shares:
            key = shared_key(worker.config.origin, self._machine)
            share = self._former.pop(key, None) or Share(key, self._hub, self._clock())
            self._shares[worker] = share
            self._workers[key] = worker
        worker.allot(0)  # until the next step
        self._note_change(worker)

    def replaced(self, worker: Worker, before: WorkerConfig) -> None:
        self._note_change(worker)

    def changed(self, worker: Worker) -> None:
        self._note_change(worker)

    def removed(self, worker: Worker) -> None:
        self._note_change(worker)

    def gone(self, worker: Worker) -> None:
        share = self._shares.pop(worker)
        if self._workers.get(share.key) is worker:
            del self._workers[share.key]
        share.trim(0)
        self._former[share.key] = share
        self._due.discard(worker)
        worker.on_yield = None
        self._full_at = -math.inf
        self._task.wake()

    def _note_change(self, worker: Worker) -> None:
        """Its slots may be others, or it may take requests again, or no longer."""
        if worker in self._shares:
            self._parts = None
            self._due.add(worker)
            self._task.wake()

    # --- Calls --------------------------------------------------------------------

    async def _step(self) -> float:
        now = self._clock()
        if self._store.mode is not Mode.UP:
            return self._go_alone(now)
        if now - self._renewed_at >= LIFETIME:
            self._lapsed = True
            for each, share in self._shares.items():
                share.expire(each.running)
        self._place = self._standing()
        if self.alone and self.calls and now - self._renewed_at >= _ENDING:
            self._careful_until = now + CAUTION
        full = now >= self._full_at
        asks = self._collect_all(now) if full else self._collect_urgent(now)
        epoch, whole = self._epoch, full and not self._registered
        if not (asks or full):
            if now >= self._look_at:
                self._look_at = now + WAITING
            return self._next_in(now)
        try:
            replies = await sync(
                self._store,
                self._hub,
                [ask for _, ask in asks],
                epoch=epoch,
                hubs=self._place[0] if now < self._awaits_until else 0,
                whole=whole,
            )
        except StoreError as exc:
            if not isinstance(exc, StoreDownError):
                logger.warning("the slots of workers cannot be shared: %s", exc)
            self._failures += 1
            self._full_at = -math.inf
            if not self.alone and self._failures < MOST_FAILURES:
                return AGAIN
            return min(self._go_alone(now), LATER)
        self.calls += 1
        self._failures = 0
        self._asked = self._asking
        self._look_at = now + WAITING
        if full:
            self._renewed_at, self._lapsed = now, False
            self._watch_over(now + LIFETIME)
            self._registered = self._registered or epoch == self._epoch
            leases = sum(len(ask.held) for _, ask in asks)
            self._full_at = now + HEARTBEAT * (1 if leases <= MANY else 2)
        if self.alone:
            self._join_others()
        for (share, ask), reply in zip(asks, replies, strict=True):
            granted = share.take(ask, reply)
            worker = self._workers.get(share.key)
            if worker is not None:
                self._settle(worker, share, granted)
            else:
                share.trim(0)
        self._former = {key: each for key, each in self._former.items() if each.owes}
        self._queue.look_for_slots()
        return 0.0 if self._due else self._next_in(self._clock())

    def _watch_over(self, until: float) -> None:
        """Have leases end in time, also while this process hardly gets to run."""
        if self._watch is not None:
            self._watch.cancel()
        wait = max(0.0, until - self._clock())
        self._watch = asyncio.get_running_loop().call_later(wait, self.lapse)

    def lapse(self) -> None:
        """If all leases have ended, use none of them before the store has answered.

        A process that was stopped gets all that has arrived meanwhile at once: answers,
        after which requests that wait would be next, and grants that others have now.
        A timer runs before the tasks that read them.
        """
        if self.alone or self._clock() - self._renewed_at < LIFETIME:
            return
        self._lapsed = True
        for worker in self._shares:
            self._allot(worker)
        self._full_at = -math.inf
        self._task.wake()

    def _next_in(self, now: float) -> float:
        """Return the seconds until a call is due, even if nothing happens."""
        waits = self._queue.waits
        due = min(self._full_at, self._look_at) if waits else self._full_at
        return max(0.0, due - now)

    def _collect_all(self, now: float) -> list[tuple[Share, SlotAsk]]:
        wants = self._wants(now)
        self._due.clear()
        used = [worker for worker, share in self._shares.items() if share.in_demand]
        for share in self._shares.values():
            share.least = 0
        self._spread({*wants, *used}, now)
        workers = {**dict.fromkeys(wants), **dict.fromkeys(self._shares)}
        asks = [self._ask(worker, wants.get(worker, ()), now) for worker in workers]
        asks += [(each, each.ask(0, 0, 0)) for each in self._former.values()]
        return [(share, ask) for share, ask in asks if ask is not None]

    def _collect_urgent(self, now: float) -> list[tuple[Share, SlotAsk]]:
        """Return what to ask now if anything of it is urgent: then all that changes."""
        wants = self._wants(now)
        for worker, share in self._shares.items():
            if share.waits:
                wants.setdefault(worker, ())
        urgent = [w for w, some in wants.items() if self._shares[w].is_urgent(some)]
        look = bool(wants) and now >= self._look_at
        if not (urgent or self._due or look):
            return []
        for worker in (*self._due, *self._spread(wants, now)):
            wants.setdefault(worker, ())
        self._due.clear()
        asks = [
            self._ask(worker, some, now, renew=False) for worker, some in wants.items()
        ]
        return [(share, ask) for share, ask in asks if ask is not None]

    def _ask(
        self,
        worker: Worker,
        wants: Sequence[Want],
        now: float,
        *,
        renew: bool = True,
    ) -> tuple[Share, SlotAsk | None]:
        share, slots = self._shares[worker], worker.room
        share.note(worker.peak, now)
        worker.peak = worker.running
        if slots is None:  # it is not known yet, so there is nothing to share
            share.trim(0)
            return share, share.ask(0, 0, 0)
        fair = fair_part(slots, *self._place, share.key)
        in_use = worker.admits
        running = worker.running
        ask = share.ask(
            slots,
            fair,
            running,
            wants,
            in_use=in_use,
            renew=renew,
            careful=now < self._careful_until,
        )
        self._allot(worker)
        return share, ask

    def _wants(self, now: float) -> dict[Worker, Sequence[Want]]:
        """Return what waits here for each worker, those first that are preferred."""
        if not self._queue.waits:
            return {}
        found: dict[Worker, Counter[_Kind]] = {}
        asked: set[Ticket] = set()
        last: list[Worker] = []
        places: Sequence[Worker] = ()
        for ticket, workers in self._queue.wants(MOST_WANTS, self._asked):
            asked.add(ticket)
            if workers is not last:
                last, places = workers, self._some(workers, now)
            kind = ticket.subject, _rank(ticket), ticket.model
            for worker in places:
                if worker.room is not None:
                    found.setdefault(worker, Counter())[kind] += 1
        self._asking = asked
        return {
            worker: [
                Want(subject, rank, count, model)
                for (subject, rank, model), count in kinds.items()
            ]
            for worker, kinds in found.items()
        }

    def _spread(self, used: Iterable[Worker], now: float) -> list[Worker]:
        """Hold a lease of each worker that could be used instead of those in use.

        Returns those of which there has been none.
        """
        pools = {pool for worker in used for pool in worker.pools}
        mates = {w for pool in pools for w in self._some(pool.workers, now)}
        found = [worker for worker in mates if not self._shares[worker].least]
        for worker in found:
            self._shares[worker].least = 1
        return found

    def _some(self, workers: Sequence[Worker], now: float) -> Sequence[Worker]:
        if len(workers) <= MOST_PLACES:
            return workers
        workers = [each for each in workers if not each.full] or workers
        if len(workers) <= MOST_PLACES:
            return workers
        first = (crc32(self._hub.encode()) + int(now) * MOST_PLACES) % len(workers)
        over = first + MOST_PLACES - len(workers)
        return [*workers[first : first + MOST_PLACES], *workers[: max(0, over)]]

    def _standing(self) -> tuple[int, int]:
        """Return how many hubs there are, and the place of this one among them."""
        hubs = sorted({*self._hubs(), self._hub})
        return len(hubs), hubs.index(self._hub)

    # --- What other hubs cause ----------------------------------------------------

    def _on_grants(self, message: bytes) -> None:
        if self._clock() - self._renewed_at >= LIFETIME:
            return  # a reply will repeat those that have not ended
        for key, grant in decode_grants(message):
            worker = self._workers.get(key)
            if worker is not None and not self.alone:
                share = self._shares[worker]
                self._settle(worker, share, [grant] if share.receive(grant) else [])
        self._queue.look_for_slots()

    def _on_wanted(self, message: bytes) -> None:
        for key in decode_wanted(message):
            worker = self._workers.get(key)
            if worker is not None and not self.alone:
                self._shares[worker].alert()
                self._yield(worker)

    def _note_empty(self) -> None:
        """Register all that this hub holds, as each hub does."""
        before, self._epoch = self._epoch, self._store.epoch
        self._registered = False
        if before:
            self._awaits_until = self._clock() + CAUTION
        self._full_at = -math.inf
        self._task.wake()

    def _on_mode(self, mode: Mode) -> None:
        self._full_at = -math.inf
        self._task.wake()

    def _settle(self, worker: Worker, share: Share, granted: Iterable[Grant]) -> None:
        """Give the requests of some subjects the slots that they were granted."""
        for lease, subject in granted:
            if subject:
                worker.allot(worker.running + 1)
                if not self._queue.grant(worker, subject) and share.contended:
                    share.refuse(lease)
        self._yield(worker)

    def _yield(self, worker: Worker) -> None:
        """Give back what the requests on a worker do not use, if others wait for it."""
        share = self._shares[worker]
        if share.contended and not self.alone:
            share.trim(worker.running)
        if share.owes:
            self._due.add(worker)
            self._task.wake()
        self._allot(worker)

    # --- Limits -------------------------------------------------------------------

    def _allot(self, worker: Worker) -> None:
        """Limit a worker to what this hub may use of it now."""
        share = self._shares[worker]
        most = 0 if self._lapsed and not self.alone else len(share.leases)
        if self.alone:
            part = self._part(share.key)
            most = part if self._expired else min(most, part)
        contended = share.contended and not self.alone
        worker.on_yield = self._yield if contended else None
        worker.allot(most, scarce=share.scarce or self.alone)

    def _part(self, key: str) -> int:
        """Return this hub's part of a worker's slots without the store."""
        if self._parts is None:
            shares = self._shares
            rooms = {
                share.key: worker.room
                for worker, share in shares.items()
                if worker.room is not None
            }
            pools = [
                [shares[w].key for w in self._registry.pool(model).workers]
                for model in self._registry.models()
            ]
            self._parts = fair_parts(rooms, pools, *self._standing())
        return self._parts.get(key, 0)

    def _go_alone(self, now: float) -> float:
        """Use what is held, then a fair part; return the seconds until that changes."""
        left = self._renewed_at + LIFETIME - now
        if self.calls and self._standing()[0] == 1:
            left = 0.0  # no other hub can hold anything
        expired = left <= 0
        self._full_at = -math.inf
        if not self.alone or self._parts is None or expired != self._expired:
            self.alone, self._expired = True, expired
            for worker in self._shares:
                self._allot(worker)
            self._queue.look_for_slots()
        return left if left > 0 else HEARTBEAT

    def _join_others(self) -> None:
        """Count again what this hub holds in the store."""
        self.alone, self._parts = False, None
        for worker, share in self._shares.items():
            if worker.room is not None and worker.running > len(share.leases):
                share.cover(worker.running)  # those that began during the call
                self._due.add(worker)
            self._allot(worker)


_Kind = tuple[str, int, str]  # of requests: subject, rank and model


def _rank(ticket: Ticket) -> int:
    """Return the place of a request among all hubs, before the turns of subjects."""
    return 2 * ticket.priority.rank + (not ticket.first)
