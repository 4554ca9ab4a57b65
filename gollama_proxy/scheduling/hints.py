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

`gather()` puts into a report what is new, and `take()` takes what another hub reports.
Requests only leave notes for it.  A report names each worker and model once, in
`places`, and refers to it by its number there.  `reports.py` sends and receives them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Annotated

from msgspec import Meta, Struct

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.breaker import TRUSTED, Breaker, BreakerState
from gollama_proxy.fleet.registry import Listener, Registry
from gollama_proxy.fleet.speed import Learnt
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Turn
from gollama_proxy.state.facts import Message

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
