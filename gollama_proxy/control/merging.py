"""What several hubs answer, as one answer.

Each function takes what the hubs have answered by their names, the asked hub first.  A
worker is the same one on all hubs, by its name.  What a hub alone knows, such as its
requests, is marked with it (`hub`).

While events are followed at one hub, the others send theirs without being asked: a
sample a second, and what happens to requests.  `Elsewhere` adds them to its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# What it raises to merge what has another shape.
_NONSENSE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Shown = dict[str, Any]
ByHub = Mapping[str, Sequence[Shown]]


class Answers(NamedTuple):
    """What hubs have answered, by their names, and which ones have not in time."""

    found: dict[str, Any]
    missing: list[str]

    @property
    def note(self) -> Shown:
        """What an answer to an operator has besides, if it is not complete."""
        return {"missing": self.missing} if self.missing else {}

    def merge(self, how: Callable[[dict[str, Any]], _T]) -> _T:
        """Merge the answers; a hub whose answer makes no sense here is missing.

        It may be of another release.  The first answer is this hub's own.
        """
        found = self.found
        try:
            return how(found)
        except _NONSENSE:
            own, *others = found
            for name in others:
                try:
                    how({own: found[own], name: found[name]})
                except _NONSENSE:
                    logger.warning("an answer of the hub %s makes no sense", name)
                    self.missing.append(name)
                    del found[name]
            return how(found)


# --- Workers and models -----------------------------------------------------------


def merge_workers(answers: ByHub) -> list[Shown]:
    """Merge lists of workers, in the order of the asked hub.

    A worker is shown as the first hub that knows it shows it, with the requests of all
    hubs, and in `hubs` each one that has requests on it or sees it in another state.
    """
    return [merge_worker(views) for views in _by_name(answers).values()]


def merge_worker(views: Mapping[str, Shown]) -> Shown:
    """Merge what hubs show of one worker."""
    shown = mark_hubs(next(iter(views.values())), views)
    for key in ("agent", "build", "context"):
        shown[key] = _first(view[key] for view in views.values())
    speeds = [view["speed"] for view in views.values()]
    shown["speed"] = {key: _first(each[key] for each in speeds) for key in speeds[0]}
    errors = [view["last_error"] for view in views.values() if view["last_error"]]
    shown["last_error"] = min(errors, key=lambda error: error["ago"], default=None)
    return shown


def merge_known(answers: Mapping[str, Shown | None]) -> Shown | None:
    """Merge what hubs show of one worker; None if none of them knows it."""
    views = {hub: view for hub, view in answers.items() if view}
    return merge_worker(views) if views else None


def mark_hubs(shown: Shown, views: Mapping[str, Shown]) -> Shown:
    """Return a view of a worker with what runs on it for each hub."""
    seen = _condition(shown)
    return shown | {
        "running": sum(view["running"] for view in views.values()),
        "slots": max(view["slots"] or 0 for view in views.values()) or None,
        "hubs": [
            {"hub": hub, **_condition(view), "running": view["running"]}
            for hub, view in sorted(views.items())
            if view["running"] or _condition(view) != seen
        ],
    }


def _condition(view: Shown) -> Shown:
    """Return what may differ between hubs for a while, in words."""
    breaker = view["breaker"]
    if not isinstance(breaker, str):  # a sample has only its state
        breaker = breaker["state"]
    return {"state": view["state"], "hold": view["hold"], "breaker": breaker}


def merge_models(answers: ByHub) -> list[Shown]:
    """Merge lists of models: as the first hub shows each, with what waits on all."""
    merged = []
    for views in _by_name(answers).values():
        waiting = sum(view["waiting"] for view in views.values())
        merged.append(next(iter(views.values())) | {"waiting": waiting})
    return merged


def _by_name(answers: ByHub) -> dict[str, dict[str, Shown]]:
    """Return what each hub shows, by the names of what is shown."""
    found: dict[str, dict[str, Shown]] = {}
    for hub, rows in answers.items():
        for row in rows:
            found.setdefault(row["name"], {})[hub] = row
    return found


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


# --- Requests ---------------------------------------------------------------------


def merge_exchanges(answers: ByHub) -> list[Shown]:
    """Merge requests in flight, the oldest first."""
    return sorted(_marked(answers), key=lambda x: -x["age"])


def merge_queues(answers: ByHub) -> list[Shown]:
    """Merge requests that wait, by model; each has its place in its hub's queue."""
    return sorted(
        _marked(answers), key=lambda x: (x["model"], x["position"] or 0, -x["waited"])
    )


def merge_requests(answers: ByHub, limit: int) -> list[Shown]:
    """Merge requests that have ended, the newest first, at most so many."""
    return sorted(_marked(answers), key=lambda x: -x["ended"])[:limit]


def _marked(answers: ByHub) -> Iterable[Shown]:
    return chain.from_iterable(
        ({**row, "hub": hub} for row in rows) for hub, rows in answers.items()
    )


# --- Samples ----------------------------------------------------------------------

_SUMMED = ("requests", "errors", "running", "waiting", "tokens_per_second")


def merge_figures(figures: Collection[Mapping[str, Any]]) -> Shown:
    """Merge the figures of one moment, of hubs or of one worker on several hubs.

    Rates and numbers of requests are summed.  A percentile of all cannot be computed
    from those of parts: it is between them, and shown is the mean of the medians, and
    the highest of the 95th percentiles.  The rest is as in the first one.
    """
    merged = dict(next(iter(figures)))
    for name in merged:
        if name in _SUMMED or name.startswith("first_token"):
            known = [each[name] for each in figures if each.get(name) is not None]
            merged[name] = _combine(name, known) if known else None
    return merged


def _combine(name: str, known: Sequence[float]) -> float:
    if name in _SUMMED:
        return _tidy(sum(known))
    if name.endswith("p95"):
        return max(known)
    return _tidy(sum(known) / len(known))


def _tidy(value: float) -> float:
    return int(value) if value == int(value) else round(value, 1)


def merge_samples(workers: ByHub) -> list[Shown]:
    """Merge the figures that hubs have of workers, as a sample shows them."""
    return [
        mark_hubs(merge_figures([*views.values()]), views)
        for views in _by_name(workers).values()
    ]


def merge_columns(columns: Sequence[Mapping[str, Sequence[Any]]]) -> Shown:
    """Merge columns of samples; the last values of all are of the same moment.

    Of states, the first one that is known counts.
    """
    longest = max(len(next(iter(each.values()), ())) for each in columns)
    merged: Shown = {}
    for name in columns[0]:
        parts = [each[name] for each in columns if name in each]
        padded = [[None] * (longest - len(each)) + [*each] for each in parts]
        if name in ("state", "breaker"):
            merged[name] = [_first(values) for values in zip(*padded, strict=True)]
        else:
            merged[name] = [
                _combine(name, known) if known else None
                for values in zip(*padded, strict=True)
                for known in [[each for each in values if each is not None]]
            ]
    return merged


def merge_histories(histories: Mapping[str, Shown]) -> Shown:
    """Merge histories of the same length and step."""
    own = next(iter(histories.values()))
    of_workers: dict[str, list[Shown]] = {}
    for history in histories.values():
        for name, columns in history["workers"].items():
            of_workers.setdefault(name, []).append(columns)
    return own | {
        "hub": merge_columns([each["hub"] for each in histories.values()]),
        "workers": {name: merge_columns(each) for name, each in of_workers.items()},
    }


# --- Events of other hubs ---------------------------------------------------------

SILENCE = 5.0  # seconds
COUNTED = ("requests", "errors")  # in the second of a sample


def figures_of_hub(name: str, sample: Shown) -> Shown:
    """Return what a hub does now: a sample counts as running those that wait, too."""
    running, waiting, rate = (
        sample.get(key) or 0 for key in ("running", "waiting", "tokens_per_second")
    )
    return {
        "hub": name,
        "running": max(running - waiting, 0),
        "waiting": waiting,
        "tokens_per_second": rate,
    }


class _Other:
    """What one hub has sent."""

    def __init__(self) -> None:
        self.heard = 0.0
        self.figures: Shown = {}  # of its last sample
        self.counted = dict.fromkeys(COUNTED, 0)  # that were not shown yet
        self.workers: dict[str, Shown] = {}  # their last figures, by name

    def __repr__(self) -> str:
        return f"<Other workers={len(self.workers)}>"


class Elsewhere:
    """Adds what other hubs have sent to what this one shows.

    A hub that is silent for `SILENCE` counts for nothing: it has ended, or cannot reach
    the store.  `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._others: dict[str, _Other] = {}  # by name
        self._changed: set[str] = set()  # workers

    def __repr__(self) -> str:
        return f"<Elsewhere hubs={len(self._others)}>"

    def take(self, hub: str, sample: Shown) -> None:
        """Take a sample of another hub."""
        other = self._others.setdefault(hub, _Other())
        other.heard = self._clock()
        other.figures = {
            name: value for name, value in sample.items() if name != "workers"
        }
        for name in COUNTED:
            other.counted[name] += sample.get(name) or 0
        for figures in sample["workers"]:
            name = figures["name"]
            if other.workers.get(name) != figures:
                other.workers[name] = figures
                self._changed.add(name)

    def take_worker(self, hub: str, view: Shown) -> None:
        """Take the state of a worker, which has changed at another hub."""
        if (other := self._others.get(hub)) is not None:
            known = other.workers.get(view["name"], {})
            names = ("name", "state", "hold", "slots", "running")
            state = {name: view[name] for name in names}
            state["breaker"] = view["breaker"]["state"]
            other.workers[view["name"]] = known | state

    def changed(self) -> set[str]:
        """Return the names of the workers that have changed since the last call."""
        now = self._clock()
        for hub, other in tuple(self._others.items()):
            if now - other.heard > SILENCE:
                self._changed.update(other.workers)
                del self._others[hub]
        changed, self._changed = self._changed, set()
        return changed

    def worker(self, hub: str, view: Shown) -> Shown:
        """Add what other hubs know to what this `hub` shows of a worker."""
        name = view["name"]
        others = {
            other: known.workers[name]
            for other, known in self._others.items()
            if name in known.workers
        }
        return mark_hubs(view, {hub: view, **others})

    def sample(self, hub: str, sample: Shown, workers: Sequence[Shown]) -> Shown:
        """Add what other hubs have sent to a sample of this `hub`.

        `workers` are all figures that this hub has of those that are in the sample.
        """
        names = {each["name"] for each in workers}
        by_hub = {
            other: [each for name, each in known.workers.items() if name in names]
            for other, known in self._others.items()
        }
        figures = [sample]
        for other in self._others.values():
            figures.append(other.figures | other.counted)
            other.counted = dict.fromkeys(COUNTED, 0)
        each = {hub: sample, **{name: o.figures for name, o in self._others.items()}}
        return merge_figures(figures) | {
            "workers": merge_samples({hub: workers, **by_hub}),
            "hubs": [figures_of_hub(name, each[name]) for name in sorted(each)],
        }
