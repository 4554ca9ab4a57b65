"""What happens at other hubs, as far as they have sent it, for those who follow events.

Each of them sends a sample a second, and the events of its requests.  A hub that is
silent for `SILENCE` counts for nothing: it has ended, or cannot reach the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gollama_proxy.control.merging import mark_hubs, merge_figures, merge_samples

Shown = dict[str, Any]

SILENCE = 5.0  # seconds
COUNTED = ("requests", "errors")  # in the second of a sample
_OF_EACH = ("running", "waiting", "tokens_per_second")


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

    `clock` returns monotonic seconds.
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
            "hubs": [
                {"hub": name, **{key: shown.get(key) or 0 for key in _OF_EACH}}
                for name, shown in each.items()
            ],
        }
