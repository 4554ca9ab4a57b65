"""What hubs learn from each other: open breakers, speeds, and where conversations are.

Each hub finds all of this out from its own requests.  Hints only make that faster, so
they are never waited for, and what a hub has found out itself comes first:

* **Breakers.**  A breaker that opens on one hub is doubted on the others
  (`Breaker.doubt`): one request at a time proves there that the worker works.  A hub to
  which most workers seem to fail is itself what is broken, probably its network.  It
  keeps its verdicts for itself, and the others are not misled for long if it does not:
  a worker that has just answered them is not doubted.
* **Speeds.**  They are assumed where nothing was learnt (`Speed.assume`).
* **Conversations.**  Turns are recorded as if this hub had sent them to their workers
  (`Memory.note`).  They are hashes with a key that the hubs have in common.

`Hints.gather()` puts into a report what is new, and `Hints.take()` takes what another
hub reports.  Requests only leave notes for it.  A report names each worker and model
once, in `places`, and refers to it by its number there.  `Reports` sends and receives
them.  Keys and channels, all after the prefix:

    hints         channel: a `Report` of one hub, every `PERIOD` if it has news
    hints:key     the key of the hashes of conversations, made by the first hub
    hints:recent  stream: a `Report` of one hub, every `COPY` if it has news
    hints:rates   hash: a `Report` with one speed, by worker and model

The stream and the hash are for hubs that start later, and for those that could not
reach the store for a while.  They hold a few megabytes at most, and expire.  They are
read when the store is UP, and once more when all hubs have written what they reported
before this one listened.

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.breaker import TRUSTED, Breaker, BreakerState
from gollama_proxy.fleet.registry import Listener, Registry
from gollama_proxy.fleet.speed import Learnt
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Turn
from gollama_proxy.state.facts import Message, decode, encode
from gollama_proxy.state.link import Argument, StoreDownError, StoreError
from gollama_proxy.state.members import Members
from gollama_proxy.state.store import Mode, Store
from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

VISITS = 500  # in one report, which keeps the event loop of the others for 2 ms
KEPT = 1000  # turns, and as many speeds, that are kept for hubs that start later
MOST = 20_000  # models on workers that are remembered
EVERY = 10  # calls of `gather` of which one looks at speeds
CYCLE = 10  # such calls in which all speeds are looked at once
NEWS = 0.1  # the part by which a speed has to change to be news
OLD = 15.0  # seconds after which an open breaker elsewhere means nothing any more

Place = tuple[str, str]


# --- What is sent -----------------------------------------------------------------
#
# Any program that has the password of the store can write into it, so numbers and
# lengths are checked.

_Name = Annotated[str, Meta(max_length=1024)]
_Number = Annotated[int, Meta(ge=0, le=2**62)]
_Key = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Rate = Annotated[float, Meta(gt=0, le=1e12)]
_Level = Annotated[int, Meta(ge=0, lt=64)]


class Rates(Struct, array_like=True, frozen=True):
    """How fast a worker reads and writes a model, as one hub has learnt it."""

    place: _Number
    reads: Annotated[float, Meta(ge=0, le=1e12)]  # bytes/s; 0 is not known
    writes: dict[_Level, _Rate]  # tokens/s of each answer, by the number of answers
    tokens: _Rate  # of an answer, on average


class Visit(Struct, array_like=True, frozen=True):
    """A turn of a conversation that a worker got.  The keys are hashes, not text."""

    place: _Number
    keys: Annotated[tuple[_Key, ...], Meta(min_length=1, max_length=64)]
    before: _Key  # the longest one of the turn before; 0 if there was none
    size: _Number  # bytes of the request


class Report(Message):
    """What one hub has found out in the last moments."""

    hub: _Name  # the run id of the hub
    name: _Name = ""  # for people
    places: tuple[
        tuple[_Name, _Name], ...
    ] = ()  # worker, model; "" is the worker itself
    opened: tuple[_Number, ...] = ()  # places whose breakers have opened
    rates: tuple[Rates, ...] = ()
    visits: tuple[Visit, ...] = ()


# --- What is done with it ---------------------------------------------------------


class Hints(Listener):
    """Gathers what this hub has found out, and takes what others have.

    `run` is the run id of this hub, `key_of` returns the name that all hubs have for a
    worker, and `clock` monotonic seconds.
    """

    def __init__(
        self,
        registry: Registry,
        balancer: Balancer,
        run: str,
        key_of: Callable[[Worker], str],
        clock: Callable[[], float],
    ) -> None:
        self._registry, self._balancer = registry, balancer
        self._run, self._key_of, self._clock = run, key_of, clock
        self._workers: dict[str, Worker] = {}
        self._stirred: dict[Worker, None] = {}  # whose state or models have changed
        self._openings = BoundedDict[tuple[Worker, str], int](MOST)  # that are known
        self._reported = BoundedDict[Place, Learnt](MOST)
        self._assumed = BoundedDict[str, BoundedDict[str, Learnt]](MOST)  # by worker
        self._calls = 0  # of `gather`
        self._next = 0  # the worker whose speeds are looked at next
        self._kept: deque[Turn] = deque(maxlen=KEPT)  # since the last `copy`
        registry.subscribe(self)

    def __repr__(self) -> str:
        return f"<Hints of {self._run} workers={len(self._workers)}>"

    # --- The fleet ----------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        self._workers[self._key_of(worker)] = worker
        self._stirred[worker] = None

    def changed(self, worker: Worker) -> None:
        self._stirred[worker] = None

    def removed(self, worker: Worker) -> None:
        if self._workers.get(key := self._key_of(worker)) is worker:
            del self._workers[key]

    # --- What this hub has found out ----------------------------------------------

    def gather(self, *, last: bool = False) -> Report | None:
        """Return what is new since the last call; None if nothing is.

        Of many turns and of the speeds, a part is left for the next calls; of the
        speeds not if this is the `last` one.
        """
        stirred, self._stirred = [*self._stirred], {}
        opened = [each for worker in stirred for each in self._newly_open(worker)]
        for worker in stirred:
            self._assume(worker)
        self._calls += 1
        looks = last or self._calls % EVERY == 0
        rates = self._changed_rates(1 if last else CYCLE) if looks else ()
        turns = self._balancer.turns
        some = [turns.pop(key) for key in [*islice(turns, VISITS)]]
        self._kept.extend(some)
        if opened and not self._is_sound():
            opened = []
        return self._report(opened, rates, some)

    def copy(self) -> Report | None:
        """Return what hubs that start later should know; None if that is nothing.

        That is which breakers are open, and the turns since the last call.
        """
        opened = [
            (worker, model)
            for worker, model in self._openings
            if (found := _breaker(worker, model)) is not None
            and found.state is BreakerState.OPEN
        ]
        turns, self._kept = [*self._kept], deque(maxlen=KEPT)
        return self._report(opened if self._is_sound() else [], [], turns)

    def repeat(self) -> None:
        """Report every speed once more: the store has lost what it had."""
        self._reported.clear()

    def _newly_open(self, worker: Worker) -> Iterator[tuple[Worker, str]]:
        for model in ("", *worker.model_breakers):
            breaker = _breaker(worker, model)
            if breaker is not None:
                openings = breaker.transitions[BreakerState.OPEN]
                if openings > self._openings.get((worker, model), 0):
                    self._openings[worker, model] = openings
                    yield worker, model

    def _is_sound(self) -> bool:
        """Return whether no fewer workers work, seen from here, than fail."""
        breakers = [worker.breaker for worker in self._registry.workers]
        good = sum(breaker.works for breaker in breakers)
        return good >= max(1, sum(not breaker.closed for breaker in breakers))

    def _changed_rates(self, cycle: int) -> Iterator[tuple[Worker, str, Learnt]]:
        """Look at the speeds of the next workers, of all in so many calls."""
        workers = self._registry.workers
        if self._next >= len(workers) or cycle == 1:
            self._next = 0
        first, self._next = self._next, self._next + 1 + len(workers) // cycle
        for worker in workers[first : self._next]:
            key = self._key_of(worker)
            for model, pace in worker.paces.items():
                learnt = pace.speed.learnt()
                if learnt is None:
                    continue
                before = self._reported.get((key, model))
                if before is None or _is_news(before, learnt):
                    self._reported[key, model] = learnt
                    yield worker, model, learnt

    def _report(
        self,
        opened: Iterable[tuple[Worker, str]],
        rates: Iterable[tuple[Worker, str, Learnt]],
        turns: Iterable[Turn],
    ) -> Report | None:
        places: dict[tuple[Worker, str], int] = {}

        def place(worker: Worker, model: str) -> int:
            return places.setdefault((worker, model), len(places))

        report = Report(
            hub=self._run,
            opened=tuple([place(*each) for each in opened]),
            rates=tuple([Rates(place(w, m), *each) for w, m, each in rates]),
            visits=tuple([Visit(place(t.worker, t.model), *t[2:]) for t in turns]),
        )
        report.places = tuple([(self._key_of(w), model) for w, model in places])
        return report if places else None

    # --- What others have found out -----------------------------------------------

    def take(self, report: Report, age: float = 0.0) -> None:
        """Take what another hub has reported, so many seconds ago."""
        if report.hub == self._run:
            return
        places = report.places
        if age < OLD:
            for place in report.opened:
                if place < len(places):
                    self._doubt(*places[place], report.name or report.hub)
        for rates in report.rates:
            if rates.place < len(places):
                self._learn(*places[rates.place], rates)
        for visit in report.visits:
            if visit.place < len(places):
                key, model = places[visit.place]
                worker = self._workers.get(key)
                if worker is not None:
                    turn = Turn(model, worker, visit.keys, visit.before, visit.size)
                    self._balancer.note(turn)

    def _doubt(self, key: str, model: str, hub: str) -> None:
        worker = self._workers.get(key)
        if worker is None or worker.heard_since(self._clock() - TRUSTED):
            return
        breaker = worker.breaker
        if model:
            if model not in worker.model_breakers and not worker.serves(model):
                return
            breaker = worker.breaker_of(model)
        if breaker.doubt(f"that of the hub {hub!r} is open"):
            worker.suspect()

    def _learn(self, key: str, model: str, rates: Rates) -> None:
        of_worker = self._assumed.get(key)
        if of_worker is None:
            of_worker = self._assumed[key] = BoundedDict()
        of_worker[model] = Learnt(rates.reads, rates.writes, rates.tokens)
        worker = self._workers.get(key)
        if worker is not None and worker.serves(model):
            worker.pace_of(model).speed.assume(of_worker[model])

    def _assume(self, worker: Worker) -> None:
        """Assume what was reported before the worker listed its models."""
        for model, learnt in self._assumed.get(self._key_of(worker), {}).items():
            if worker.serves(model):
                worker.pace_of(model).speed.assume(learnt)


def _breaker(worker: Worker, model: str) -> Breaker | None:
    return worker.model_breakers.get(model) if model else worker.breaker


def _is_news(before: Learnt, now: Learnt) -> bool:
    """Return whether a speed has changed by more than `NEWS`."""
    if before.writes.keys() != now.writes.keys():
        return True
    pairs = [(before.reads, now.reads), (before.tokens, now.tokens)]
    pairs += [(rate, now.writes[level]) for level, rate in before.writes.items()]
    return any(abs(new - old) > NEWS * old for old, new in pairs)


# --- How it is sent ---------------------------------------------------------------

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

    # --- Sending --------------------------------------------------------------------

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

    # --- What was there before ------------------------------------------------------

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
