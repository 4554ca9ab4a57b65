"""Each in turn."""

from __future__ import annotations

from collections.abc import Sequence

from gollama_proxy.routing.worker import Worker


class RoundRobin:
    """Go round the workers of each model.

    What is remembered is the last worker and not a counter: when one drops out or
    comes back, the others keep their turn.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<RoundRobin last={self._last}>"

    def pick(self, model: str, available: Sequence[Worker]) -> Worker:
        """Choose the next worker behind the one that had the last turn."""
        last = self._last.get(model, -1)
        chosen = next((w for w in available if w.index > last), available[0])
        self._last[model] = chosen.index
        return chosen
