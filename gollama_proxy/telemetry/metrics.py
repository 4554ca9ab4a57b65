"""The record of ended requests, and what the page of metrics shows.

Requests are counted in plain integers, which are read at a scrape.  The values of
labels are bounded: routes are those of the table, outcomes those of the error codes.
Clients can make up models where a worker serves `qwen*`, agents come with new names,
and a hub for a large company has many subjects: the first ones each get a label, and
later ones share the label "other".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import TypeVar

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Metrics
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.telemetry import accesslog, exposition
from gollama_proxy.telemetry.accesslog import Record, Step
from gollama_proxy.telemetry.exposition import (
    Collected,
    Family,
    Histogram,
    Part,
    Plain,
    Sums,
    to_plain,
)
from gollama_proxy.telemetry.families import (
    CACHED,
    DURATION,
    EXPIRY,
    FALLBACKS,
    FIRST_BYTE,
    FIRST_TOKEN,
    LAG,
    LIMITED,
    METRICS,
    MOST_VALUES,
    OUTCOMES,
    PER_TOKEN,
    PROMPTS,
    QUEUED,
    RELAYED,
    RELOADED,
    RELOADED_AT,
    REQUESTS,
    RESCUES,
    RETRIES,
    SIZES,
    USED_CACHED,
    USED_GENERATED,
    USED_PROMPTS,
    USED_REQUESTS,
    USED_SLOTS,
    ClientMetrics,
    Clients,
    FleetMetrics,
    SharedStore,
    StoreMetrics,
    of_process,
)
from gollama_proxy.upstream.pool import ConnectionPool

MOST_MODELS = 200
MOST_WORKERS = 2000
MOST_PAIRS = 5000  # of a subject and a model
LONGEST = 256  # characters of a label; 200 histograms of longer ones fill a page
OTHER = "other"


class Telemetry:
    """Records how requests end, in the metrics and in the access log."""

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        clients: Clients | None = None,
        clock: Callable[[], float] = time.monotonic,
        connections: Mapping[Worker, ConnectionPool] = MappingProxyType({}),
        tokens_of: Callable[[str, int], int] = lambda model, size: size // 4,
        expires: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Make one.

        `clock` returns monotonic seconds, as in `Record.started`; `tokens_of` estimates
        the tokens of so many bytes of a prompt for a model.  `expires` returns when the
        certificate of the hub expires, in Unix time; it may block.
        """
        self._expires = expires
        self._reloaded, self._reloaded_at = True, time.time()
        self._clock = clock
        self._requests = RequestMetrics()
        self._lag = Histogram(LAG)
        fleet = FleetMetrics(
            registry, admission, connections, tokens_of, self._requests.models
        )
        self._sources: list[exposition.Collect] = [fleet.collect]
        if clients is not None:
            self._sources.append(ClientMetrics(clients).collect)
        self._sources += [self._collect_own, self._requests.collect]
        # What other processes of a group have, and whether they have ended; it takes
        # what this one has.
        self.others: Callable[[list[Plain]], Awaitable[list[Part]]] | None = None

    def __repr__(self) -> str:
        return f"<Telemetry of {self._requests!r}>"

    def follow_store(self, store: SharedStore, hubs: Callable[[], int]) -> None:
        """Show the connection to the store too; `hubs` returns how many there are."""
        self._sources.append(StoreMetrics(store, hubs).collect)

    def reconfigure(self, settings: Metrics) -> None:
        """Take other settings; names that have a label keep it."""
        self._requests.subjects.most = settings.subjects

    def ended(self, record: Record) -> None:
        """Record the end of a request; this must be called once for each."""
        assert record.duration is None, record
        clock = self._clock  # on an object, it takes three times as long to call
        record.duration = clock() - record.started
        self._requests.observe(record)
        accesslog.write(record)

    def note_reload(self, *, valid: bool) -> None:
        """Record that the settings were read again."""
        self._reloaded = valid
        if valid:
            self._reloaded_at = time.time()

    def note_lag(self, seconds: float) -> None:
        """Record by how much the event loop was late; to be called once a second."""
        self._lag.values.append(seconds)
        if len(self._lag.values) >= MOST_VALUES:
            self._lag.count()

    async def page(self, *, open_metrics: bool = False) -> bytes:
        """Write the page of all metrics; other tasks run between its parts."""
        if self.others is None:
            # In a thread: the list of open files is long when there are many clients.
            process = await asyncio.to_thread(self._collect_outside)
            pieces = self.pieces(process, open_metrics=open_metrics)
        else:
            own = await self.collect()
            sums = Sums(METRICS)
            for families, ended in [(own, False), *await self.others(own)]:
                for family in families:
                    sums.add([family], ended=ended)
                    await asyncio.sleep(0)
            pieces = exposition.pieces([sums.collect], open_metrics=open_metrics)
        parts = []
        for part in pieces:
            parts.append(part.encode())
            await asyncio.sleep(0)
        return b"".join(parts)

    async def collect(self) -> list[Plain]:
        """Return all metrics of this process, as values for another one."""
        process = await asyncio.to_thread(self._collect_outside)
        collected = chain.from_iterable(collect() for collect in self._sources)
        found = []
        for family in to_plain(chain(collected, process)):
            found.append(family)
            await asyncio.sleep(0)
        return found

    def pieces(
        self, process: Iterable[Collected] = (), *, open_metrics: bool = False
    ) -> Iterator[str]:
        """Write the page in pieces that take less than a millisecond each."""
        sources = [*self._sources, lambda: iter(process)]
        return exposition.pieces(sources, open_metrics=open_metrics)

    def _collect_outside(self) -> list[Collected]:
        """Read what the system knows of this process and its files."""
        found = [*of_process()]
        if (expiry := self._expires()) is not None:
            found.append((EXPIRY, [("", expiry)]))
        return found

    def _collect_own(self) -> Iterator[Collected]:
        yield LAG, [self._lag]
        yield RELOADED, [("", int(self._reloaded))]
        yield RELOADED_AT, [("", self._reloaded_at)]


# --- Requests that have ended -------------------------------------------------------


class RequestMetrics:
    """Counts requests that have ended, in memory until the next scrape."""

    def __init__(self, subjects: int = Metrics().subjects) -> None:
        self.models = Names(MOST_MODELS)
        self.subjects = Names(subjects)
        self._workers = Names(MOST_WORKERS)
        # Where to count what; found again when it was forgotten.
        self._series: dict[tuple[object, ...], _Series] = BoundedDict(MOST_PAIRS)
        # By label values, in the order of their first use.
        self._requests = _Table(REQUESTS, _Count)
        self._outcomes = _Table(OUTCOMES, _Count)
        self._duration = _Table(DURATION, Histogram)
        self._first_byte = _Table(FIRST_BYTE, Histogram)
        self._first_token = _Table(FIRST_TOKEN, Histogram)
        self._per_token = _Table(PER_TOKEN, Histogram)
        self._queued = _Table(QUEUED, Histogram)
        self._retries = _Table(RETRIES, _Count)
        self._rescues = _Table(RESCUES, _Count)
        self._fallbacks = _Table(FALLBACKS, _Count)
        self._tokens = _Table(RELAYED, _Tokens)
        self._sizes = _Table(SIZES, Histogram)
        self._usage = _Table(USED_REQUESTS, _Usage)
        self._limited = _Table(LIMITED, _Count)

    def __repr__(self) -> str:
        return f"<RequestMetrics series={len(self._series)}>"

    def observe(self, record: Record) -> None:
        """Count a request that has ended.

        Every request pays for this, so it calls nothing that is written in Python
        unless something unusual has happened.
        """
        route, model, subject = record.route, record.model, record.subject
        outcome, status = record.error or record.outcome, record.status
        key = (subject, route, status, outcome, model, record.worker)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._find(record)
        number = series.requests.value = series.requests.value + 1
        if not number % MOST_VALUES:
            series.count()
        series.outcome.value += 1
        trace = record.trace
        if trace is not None and not trace.sampled:
            trace = None
        duration = record.duration or 0.0
        series.duration.values.append(duration)
        if trace is not None:
            series.duration.exemplify(trace.trace_id, duration)
        histogram: Histogram | None
        first = record.first_byte
        if first is not None:
            histogram = series.first_byte
            if histogram is None:
                histogram = self._first_byte[route, series.model, series.worker]
                series.first_byte = histogram
            histogram.values.append(first)
        if status == 429:
            subject = self.subjects.label(subject)
            self._limited[subject, str(outcome or "")].value += 1
        if not model:
            return
        # What it has used
        tokens, prompt = record.tokens, record.prompt_tokens
        usage = series.usage
        if usage is None:
            usage = series.usage = self._find_usage(subject, series.model)
        usage.requests += 1
        usage.slots += record.slot_seconds
        if tokens or prompt:
            cached = record.cached_tokens
            usage.prompts += prompt
            usage.cached += cached
            usage.generated += tokens
            of_worker = series.tokens
            if of_worker is None:
                of_worker = series.begin_tokens(self._tokens, self._sizes)
            of_worker.prompts += prompt
            of_worker.cached += cached
            of_worker.generated += tokens
            series.prompts.values.append(prompt)
            sizes = series.answers.values
            sizes.append(tokens)
            if len(sizes) >= MOST_VALUES:  # all workers of a model share these
                series.prompts.count()
                series.answers.count()
        # How long it took
        attempts = record.attempts
        if attempts or record.steps:
            histogram = series.queued
            if histogram is None:
                histogram = self._queued[series.model, series.worker]
                series.queued = histogram
            waited = _waited(record.steps, duration) if record.steps else 0.0
            histogram.values.append(waited)
            if trace is not None:
                histogram.exemplify(trace.trace_id, waited)
        lease = record.lease
        if lease is not None and (number := lease.tokens) and first is not None:
            histogram = series.first_token
            if histogram is None:
                histogram = self._first_token[series.model, series.worker]
                series.first_token = histogram
                series.per_token = self._per_token[series.model, series.worker]
            histogram.values.append(first)
            if trace is not None:
                histogram.exemplify(trace.trace_id, first)
            if number > 1:
                each = lease.seconds / (number - 1)
                histogram = series.per_token
                histogram.values.append(each)
                if trace is not None:
                    histogram.exemplify(trace.trace_id, each)
        # What went wrong
        if attempts > 1:
            self._retries[series.model,].value += attempts - 1
        if record.rescued:
            self._rescues[series.model, str(outcome or "")].value += record.rescued
        if record.fell_back:
            fell_back = self.models.label(record.fell_back)
            self._fallbacks[fell_back, series.model].value += 1

    def _find(self, record: Record) -> _Series:
        """Return where to count requests of this kind, by the labels of its names."""
        route = record.route
        outcome = str(record.error or record.outcome or "")
        model = self.models.label(record.model)
        worker = self._workers.label(record.worker)
        return _Series(
            model,
            worker,
            self._requests[route, str(record.status), model, worker],
            self._outcomes[outcome, model, worker],
            self._duration[route, model, worker],
        )

    def _find_usage(self, subject: str, model: str) -> _Usage:
        subject = self.subjects.label(subject)
        if (subject, model) not in self._usage and len(self._usage) >= MOST_PAIRS:
            subject, model = OTHER, OTHER
        return self._usage[subject, model]

    def collect(self) -> Iterator[Collected]:
        """Return the counts, for a scrape."""
        for counts in (
            *(self._requests, self._outcomes, self._retries, self._rescues),
            *(self._fallbacks, self._limited),
        ):
            yield counts.family, [(each.labels, each.value) for each in counts.values()]
        for histograms in (
            *(self._duration, self._first_byte, self._first_token, self._per_token),
            *(self._queued, self._sizes),
        ):
            yield histograms.family, [*histograms.values()]
        tokens = [*self._tokens.values()]
        yield RELAYED, [(each.labels, each.generated) for each in tokens]
        yield PROMPTS, [(each.labels, each.prompts) for each in tokens]
        yield CACHED, [(each.labels, each.cached) for each in tokens]
        usage = [*self._usage.values()]
        yield USED_REQUESTS, [(each.labels, each.requests) for each in usage]
        yield USED_PROMPTS, [(each.labels, each.prompts) for each in usage]
        yield USED_CACHED, [(each.labels, each.cached) for each in usage]
        yield USED_GENERATED, [(each.labels, each.generated) for each in usage]
        yield USED_SLOTS, [(each.labels, each.slots) for each in usage]


class Names:
    """The values of a label: the first `most` as they are, and one for all others.

    Long ones are among the others.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._known = {""}

    def __repr__(self) -> str:
        return f"<Names {len(self._known) - 1} of {self.most}>"

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def label(self, name: str) -> str:
        """Return the label of a name, which gets one if there is room."""
        if name not in self._known:
            if len(self._known) > self.most or len(name) > LONGEST:
                return OTHER
            self._known.add(name)
        return name


class _Count:
    __slots__ = ("labels", "value")

    def __init__(self, family: Family, *values: str) -> None:
        self.labels = family.at(*values)
        self.value = 0

    def __repr__(self) -> str:
        return f"<Count {self.value}>"


class _Tokens:
    """The tokens that went through one worker for one model."""

    __slots__ = ("cached", "generated", "labels", "prompts")

    def __init__(self, family: Family, *values: str) -> None:
        self.labels = family.at(*values)
        self.prompts = self.cached = self.generated = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.prompts} + {self.generated}>"


class _Usage(_Tokens):
    """What one subject has used of one model."""

    __slots__ = ("requests", "slots")

    def __init__(self, family: Family, *values: str) -> None:
        super().__init__(family, *values)
        self.requests = 0
        self.slots = 0.0  # seconds


S = TypeVar("S")


class _Table(dict[tuple[str, ...], S]):
    """The series of a family by their values of labels, made when first used."""

    def __init__(self, family: Family, make: Callable[..., S]) -> None:
        self.family = family
        self._make = make

    def __repr__(self) -> str:
        return f"<Table {self.family.name} of {len(self)}>"

    def __missing__(self, values: tuple[str, ...]) -> S:
        made = self[values] = self._make(self.family, *values)
        return made


class _Series:
    """Where requests of one kind are counted.

    Kinds share a part of their counts: the tokens of a worker are those of all routes.
    """

    __slots__ = (
        "answers",
        "duration",
        "first_byte",
        "first_token",
        "model",
        "outcome",
        "per_token",
        "prompts",
        "queued",
        "requests",
        "tokens",
        "usage",
        "worker",
    )

    # The last ones have no value before the first token.
    per_token: Histogram
    prompts: Histogram
    answers: Histogram

    def __init__(
        self,
        model: str,
        worker: str,
        requests: _Count,
        outcome: _Count,
        duration: Histogram,
    ) -> None:
        self.model, self.worker = model, worker  # their labels
        self.requests = requests
        self.outcome = outcome
        self.duration = duration
        # These have no series before there is something to count.
        self.first_byte: Histogram | None = None
        self.queued: Histogram | None = None
        self.first_token: Histogram | None = None
        self.tokens: _Tokens | None = None
        self.usage: _Usage | None = None

    def __repr__(self) -> str:
        return f"<Series {self.requests.value}>"

    def count(self) -> None:
        """Count what its requests have measured."""
        for histogram in (self.duration, self.first_byte, self.queued):
            if histogram is not None:
                histogram.count()
        if self.first_token is not None:
            self.first_token.count()
            self.per_token.count()

    def begin_tokens(
        self, tokens: _Table[_Tokens], sizes: _Table[Histogram]
    ) -> _Tokens:
        """Find the counts of tokens."""
        self.prompts = sizes[self.model, "input"]
        self.answers = sizes[self.model, "output"]
        self.tokens = found = tokens[self.model, self.worker]
        return found


def _waited(steps: tuple[Step, ...], duration: float) -> float:
    """Return the seconds for which a request that ended was in the queue."""
    waited, since = 0.0, None
    for step in steps:
        if since is not None:
            waited += step.at - since
        since = step.at if step.step == "queued" else None
    return waited if since is None else waited + duration - since
