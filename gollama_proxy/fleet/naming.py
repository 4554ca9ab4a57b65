"""What a worker calls a model in its answers, and when that is another model.

Most servers answer with the name that they list, or with the one they were asked for.
Some have a way of their own: a path, a name without its tag, the first of several.  So
a name that is new is no proof.  The worker is looked at, and what it lists then counts:

    the model asked for is listed       its own way, and remembered; unless the name is
                                        that of another model in the list, and it was
                                        called otherwise before
    it is only stated in the settings   its own way, as the operator says so; unless the
                                        worker has listed it before and does not now
    neither                             another model

What is remembered is forgotten when the worker lists something else, is of another
build, or was away.
"""

from __future__ import annotations

from collections.abc import Collection

from gollama_proxy.bounded import Remembered

# Names for one model, beyond which a worker's names say nothing.
MOST_NAMES = 8


class AnswerNames:
    """The names by which one worker calls its models in its answers."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known = Remembered[str, tuple[str, ...]]()

    def __repr__(self) -> str:
        return f"<AnswerNames of {len(self._known)} models>"

    def knows(self, model: str, name: str) -> bool:
        """Return whether this is known to be how the worker calls a model."""
        known = self._known.get(model, ())
        if name in known or len(known) >= MOST_NAMES:
            return True
        if name == model:
            self._known[model] = (*known, name)
        return name == model

    def accept(
        self, model: str, name: str, listed: Collection[str], *, stated: bool = False
    ) -> bool:
        """Return whether a new name may stand for a model; it is then remembered.

        `listed` is what the worker has just listed; a model may be `stated` instead.
        """
        known = self._known.get(model, ())
        other = name in listed and name != model
        accepted = not (other and known) if model in listed else stated
        if accepted:
            self._known[model] = (*known, name)
        return accepted

    def forget(self) -> None:
        """Forget all: the worker may be another one by now."""
        self._known.clear()
