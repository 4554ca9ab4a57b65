"""The names of models in a worker's answers, and which of them mean another model.

Most servers answer with the name that they list, or with the requested one.  Some use
another form: a path, a name without its tag, the first name of several.  So a new name
does not prove that another model has answered.  The worker is checked, and the models
that it then lists decide:

    the requested model is listed       the name is accepted and remembered, unless it
                                        is that of another listed model, and the
                                        requested one had another name before
    it is only in the settings          the name is accepted, unless the worker has
                                        listed the model before and does not now
    neither                             another model has answered

Accepted names are forgotten when the worker lists other models, has another build, or
was away.
"""

from __future__ import annotations

from collections.abc import Collection

from gollama_proxy.bounded import BoundedDict

# Names for one model; a worker that uses more is no longer checked.
MOST_NAMES = 8


class AnswerNames:
    """The names that one worker uses for its models in its answers."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known = BoundedDict[str, tuple[str, ...]]()

    def __repr__(self) -> str:
        return f"<AnswerNames of {len(self._known)} models>"

    def knows(self, model: str, name: str) -> bool:
        """Return whether the worker is known to use this name for a model."""
        known = self._known.get(model, ())
        if name in known or len(known) >= MOST_NAMES:
            return True
        if name == model:
            self._known[model] = (*known, name)
        return name == model

    def accept(
        self, model: str, name: str, listed: Collection[str], *, stated: bool = False
    ) -> bool:
        """Return whether a new name may mean a model; it is then remembered.

        `listed` are the models that the worker has just listed; a model may be `stated`
        in the settings instead.
        """
        known = self._known.get(model, ())
        other = name in listed and name != model
        accepted = not (other and known) if model in listed else stated
        if accepted:
            self._known[model] = (*known, name)
        return accepted

    def forget(self) -> None:
        """Forget all names: another server may answer by now."""
        self._known.clear()
