"""The record of ended requests, and what the page of metrics shows.

Requests that differ only in what they measure form a group: the rest of their lines in
the log is the same, and so are the counters that they raise.  A request only adds what
it has measured to its group, which is counted at a scrape, or once it has grown.

The values of labels are bounded: routes are those of the table, outcomes those of the
error codes.  Clients can make up models where a worker serves `qwen*`, agents come with
new names, and a hub for a large company has many subjects: the first ones each get a
label, and later ones share the label "other".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Metrics
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.telemetry import accesslog, exposition
from gollama_proxy.telemetry.accesslog import MOST_DETAIL, MOST_PATH, Record, Step
from gollama_proxy.telemetry.exposition import (
    MOST_VALUES,
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
    StoreMetrics,
    of_process,
)
from gollama_proxy.upstream.pool import ConnectionPool

if TYPE_CHECKING:
    from gollama_proxy.state.store import Store

MOST_MODELS = 200
MOST_WORKERS = 2000
MOST_PAIRS = 5000  # of a subject and a model
MOST_GROUPS = 5000  # of requests, by sender, model, worker, outcome, …
MOST_UNCOUNTED = 200  # of these groups
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

    def follow_store(self, store: Store, hubs: Callable[[], int]) -> None:
        """Show the connection to the store too; `hubs` returns how many there are."""
        self._sources.append(StoreMetrics(store, hubs).collect)

    def reconfigure(self, settings: Metrics) -> None:
        """Take other settings; names that have a label keep it."""
        self._requests.subjects.most = settings.subjects

    def ended(self, record: Record) -> None:
        """Record the end of a request; this must be called once for each."""
        assert record.duration is None, record
        clock = self._clock  # a local is cheaper to call
        record.duration = clock() - record.started
        accesslog.write(record, self._requests.observe(record))

    def note_reload(self, *, valid: bool) -> None:
        """Record that the settings were read again."""
        self._reloaded = valid
        if valid:
            self._reloaded_at = time.time()

    def note_lag(self, seconds: float) -> None:
        """Record by how much the event loop was late; to be called once a second."""
        self._lag.add((seconds,))

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


# --- Requests that have ended -----------------------------------------------------


class RequestMetrics:
    """Counts requests that have ended, in memory until the next scrape."""

    def __init__(self, subjects: int = Metrics().subjects) -> None:
        self.models = Names(MOST_MODELS)
        self.subjects = Names(subjects)
        self._workers = Names(MOST_WORKERS)
        # What requests share, and where they are counted; found again when forgotten.
        self._groups: dict[tuple[object, ...], _Group] = BoundedDict(MOST_GROUPS)
        self._counts: dict[tuple[object, ...], _Counts] = BoundedDict(MOST_GROUPS)
        # Those with requests that may not be counted yet, each once.
        self._uncounted: dict[_Counts, None] = {}
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
        return f"<RequestMetrics series={len(self._counts)}>"

    def observe(self, record: Record) -> accesslog.LineTemplate:
        """Count a request that has ended; return the template of its line."""
        first, lease, steps = record.first_byte, record.lease, record.steps
        prompt, tokens = record.prompt_tokens, record.tokens
        cached, duration = record.cached_tokens, record.duration or 0.0
        path, detail, trace = record.path, record.detail, record.trace
        streamed, each = 0, None  # tokens, and seconds of one but the first
        if lease is not None and first is not None:
            streamed = lease.tokens
            if streamed > 1:
                each = lease.seconds / (streamed - 1)
        key = (
            # Only its line shows these, the first `_ONLY_SHOWN`
            record.remote,
            record.method,
            path and path[:MOST_PATH],
            detail and detail[:MOST_DETAIL],
            # Where it is counted
            record.subject,
            record.route,
            record.status,
            record.outcome,
            record.error,
            record.model,
            record.worker,
            record.attempts,
            record.rescued,
            record.fell_back,
            # What there is to measure, and to show in its line
            first is None,
            prompt > 0,
            cached > 0,
            tokens > 0,
            record.bytes > 0,
            streamed > 0,
            not steps,
            trace is None,
        )
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = self._find(record, streamed, key[_ONLY_SHOWN:])
        counts = group.counts
        counts.measured.append(
            (
                duration,
                first,
                _waited(steps, duration) if steps else 0.0,
                prompt,
                cached,
                tokens,
                record.slot_seconds,
                each,
            )
        )
        if trace is not None and trace.sampled:
            counts.exemplify(trace.trace_id)
        number = len(counts.measured)
        if number == 1:
            self._uncounted[counts] = None
            if len(self._uncounted) > MOST_UNCOUNTED:
                self._count()
        elif number >= MOST_VALUES:
            counts.count()
        return group

    def _find(self, record: Record, streamed: int, key: tuple[object, ...]) -> _Group:
        """Return a new group of requests; many clients share its counts."""
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = self._find_counts(record, streamed)
        return _Group(record, counts)

    def _find_counts(self, record: Record, streamed: int) -> _Counts:
        """Return where to count requests like this one, by the labels of its names."""
        route, prompt, tokens = record.route, record.prompt_tokens, record.tokens
        outcome = str(record.error or record.outcome or "")
        model = self.models.label(record.model)
        worker = self._workers.label(record.worker)
        counts = _Counts(
            record,
            self._requests[route, str(record.status), model, worker],
            self._outcomes[outcome, model, worker],
            self._duration[route, model, worker],
        )
        if record.first_byte is not None:
            counts.first_byte = self._first_byte[route, model, worker]
        if record.status == 429:
            subject = self.subjects.label(record.subject)
            counts.limited = self._limited[subject, outcome]
        if not model:
            return counts
        counts.usage = self._find_usage(record.subject, model)
        if prompt or tokens:
            counts.tokens = self._tokens[model, worker]
            counts.prompts = self._sizes[model, "input"]
            counts.answers = self._sizes[model, "output"]
        if record.attempts or record.steps:
            counts.queued = self._queued[model, worker]
        if streamed:
            counts.first_token = self._first_token[model, worker]
            counts.per_token = self._per_token[model, worker]
        if record.attempts > 1:
            counts.retries = self._retries[model,]
        if record.rescued:
            counts.rescues = self._rescues[model, outcome]
        if record.fell_back:
            fell_back = self.models.label(record.fell_back)
            counts.fallbacks = self._fallbacks[fell_back, model]
        return counts

    def _find_usage(self, subject: str, model: str) -> _Usage:
        subject = self.subjects.label(subject)
        if (subject, model) not in self._usage and len(self._usage) >= MOST_PAIRS:
            subject, model = OTHER, OTHER
        return self._usage[subject, model]

    def _count(self) -> None:
        for counts in self._uncounted:
            counts.count()
        self._uncounted.clear()

    def collect(self) -> Iterator[Collected]:
        """Return the counts, for a scrape."""
        self._count()
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


_ONLY_SHOWN = 4


class _Group(accesslog.LineTemplate):
    """Requests that differ only in what they measure, and their counts."""

    __slots__ = ("counts",)

    def __init__(self, record: Record, counts: _Counts) -> None:
        super().__init__(record)
        self.counts = counts


class _Counts:
    """Where the requests of some groups are counted, and what the last ones measured.

    A part is shared: the tokens of a worker are those of all routes.
    """

    __slots__ = (
        *("answers", "attempts", "duration", "fallbacks", "first_byte", "first_token"),
        *("limited", "measured", "outcome", "per_token", "prompts", "queued"),
        *("requests", "rescued", "rescues", "retries", "tokens", "usage"),
    )

    # With the first value of `tokens` and of `first_token`
    prompts: Histogram
    answers: Histogram
    per_token: Histogram

    def __init__(
        self, record: Record, requests: _Count, outcome: _Count, duration: Histogram
    ) -> None:
        self.attempts, self.rescued = record.attempts, record.rescued  # of each
        # Of each one: its seconds, those to its first byte and in the queue; tokens of
        # its prompt, cached ones, generated ones; seconds of a slot and for each token.
        self.measured: list[_Measured] = []
        self.requests = requests
        self.outcome = outcome
        self.duration = duration
        # None: there is nothing to count.
        self.first_byte: Histogram | None = None
        self.queued: Histogram | None = None
        self.first_token: Histogram | None = None
        self.tokens: _Tokens | None = None
        self.usage: _Usage | None = None
        self.limited: _Count | None = None
        self.retries: _Count | None = None
        self.rescues: _Count | None = None
        self.fallbacks: _Count | None = None

    def __repr__(self) -> str:
        return f"<Counts {self.requests.value} + {len(self.measured)}>"

    def count(self) -> None:
        """Count what was measured, and forget it."""
        if not (number := len(self.measured)):
            return
        durations, firsts, waits, prompts, cached, generated, slots, each = zip(
            *self.measured, strict=True
        )
        self.measured.clear()
        self.requests.value += number
        self.outcome.value += number
        self.duration.add(durations)
        if self.first_byte is not None:
            self.first_byte.add(firsts)
        if self.queued is not None:
            self.queued.add(waits)
        if self.usage is not None:
            self.usage.requests += number
            self.usage.slots += sum(slots)
        if self.tokens is not None and self.usage is not None:
            for total in (self.usage, self.tokens):
                total.prompts += sum(prompts)
                total.cached += sum(cached)
                total.generated += sum(generated)
            self.prompts.add(prompts)
            self.answers.add(generated)
        if self.first_token is not None:
            self.first_token.add(firsts)
            self.per_token.add([one for one in each if one is not None])
        # What went wrong
        if self.limited is not None:
            self.limited.value += number
        if self.retries is not None:
            self.retries.value += number * (self.attempts - 1)
        if self.rescues is not None:
            self.rescues.value += number * self.rescued
        if self.fallbacks is not None:
            self.fallbacks.value += number

    def exemplify(self, trace: str) -> None:
        """Keep the last request as the example of its buckets, until the next one."""
        duration, first, waited, *_, each = self.measured[-1]
        self.duration.exemplify(trace, duration)
        if self.queued is not None:
            self.queued.exemplify(trace, waited)
        if self.first_token is not None and first is not None:
            self.first_token.exemplify(trace, first)
            if each is not None:
                self.per_token.exemplify(trace, each)


_Measured = tuple[float, float | None, float, int, int, int, float, float | None]


def _waited(steps: tuple[Step, ...], duration: float) -> float:
    """Return the seconds for which a request that ended was in the queue."""
    waited, since = 0.0, None
    for step in steps:
        if since is not None:
            waited += step.at - since
        since = step.at if step.step == "queued" else None
    return waited if since is None else waited + duration - since
