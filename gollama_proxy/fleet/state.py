"""The states of a worker, why it may be held back, and the models that it serves.

Health is a state machine that the health checks drive:

    STARTING ──ok──▶ READY ◀──ok── LOADING        STARTING: it has not answered yet
        │              │  ╲──loading──▶             LOADING: it answers "Loading model"
        └──fell──▶   DOWN ◀──fell── (all)           DOWN: until `rise` good checks

Failed checks of a READY worker are counted, and the `fall`th in a row leads to DOWN.
In any other state the first failed check does.

A worker with a `mac` is ASLEEP, not DOWN, while its machine does not answer at all: it
can be woken (`wake.py`), and is WAKING until it answers, or is given up.  A machine
that refuses connections is awake.

**Names in answers.**  Most servers answer with the name that they list, or with the
requested one.  Some use another form: a path, a name without its tag, the first name of
several.  So a new name does not prove that another model has answered.  The worker is
checked, and the models that it then lists decide:

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

import enum
from collections.abc import Collection
from dataclasses import dataclass, field

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.config.values import is_name, is_plain, matches
from gollama_proxy.wire.description import INPUTS, Description, Model

_INPUTS = frozenset(INPUTS.values())
_NOTHING = frozenset[str]()


class WorkerState(enum.Enum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DOWN = "down"
    ASLEEP = "asleep"
    WAKING = "waking"


class Source(enum.StrEnum):
    """Where a worker comes from; a configuration changes only those of its file."""

    FILE = "file"  # or the environment, or a flag
    ADMIN = "admin"
    AGENT = "agent"


class Hold(enum.StrEnum):
    """Why a worker gets no new request although nothing is wrong with it."""

    NONE = "none"
    PAUSED = "paused"  # running requests go on
    DRAINING = "draining"  # running requests have a deadline


class WorkerEvent(enum.Enum):
    ROSE = "enough good checks"
    LOADING = "it is loading its model"
    FELL = "enough failed checks"
    SLEPT = "enough failed checks, and its machine can be woken"
    WOKEN = "its machine is being woken"
    GIVEN_UP = "its machine did not wake"


# By event: the state that follows (None: no other), and from which states another one.
_STEPS: dict[WorkerEvent, tuple[WorkerState | None, dict[WorkerState, WorkerState]]] = {
    WorkerEvent.ROSE: (WorkerState.READY, {}),
    WorkerEvent.LOADING: (WorkerState.LOADING, {}),
    # A machine that boots answers before its llama-server does.
    WorkerEvent.FELL: (WorkerState.DOWN, {WorkerState.WAKING: WorkerState.WAKING}),
    WorkerEvent.SLEPT: (WorkerState.ASLEEP, {WorkerState.WAKING: WorkerState.WAKING}),
    WorkerEvent.WOKEN: (None, {WorkerState.ASLEEP: WorkerState.WAKING}),
    WorkerEvent.GIVEN_UP: (None, {WorkerState.WAKING: WorkerState.ASLEEP}),
}
TRANSITIONS: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (state, event): elsewhere.get(state, usual or state)
    for state in WorkerState
    for event, (usual, elsewhere) in _STEPS.items()
}
OUT = frozenset({WorkerState.DOWN, WorkerState.ASLEEP, WorkerState.WAKING})


# --- What it serves ---------------------------------------------------------------

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


@dataclass(slots=True, eq=False, repr=False)
class Offer:
    """The models of one worker, their contexts, and which of them are loaded."""

    config: WorkerConfig
    # None until it has been reached.
    description: Description | None = field(default=None, init=False)
    answer_names: AnswerNames = field(default_factory=AnswerNames, init=False)
    # The contexts of models for which it lists none, as its refusals report them.
    _contexts: BoundedDict[str, int] = field(default_factory=BoundedDict, init=False)
    # Models that it has listed and no longer lists.
    _gone: BoundedDict[str, None] = field(default_factory=BoundedDict, init=False)
    # Models that are not loaded, or still loading; and how far, from 0 to 1.
    _unloaded: set[str] = field(default_factory=set, init=False)
    progress: dict[str, float] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        return f"<Offer of {len(self.models)} models>"

    def describe(self, description: Description) -> bool:
        """Take another description; return whether it differs from the last one."""
        before, self.description = self.description, description
        self._note_gone(before, description)
        if before is None or before.identity != description.identity:
            self.forget_answers()
        self._unloaded = {m.name for m in description.models if m.loaded is False}
        self.progress = {m: p for m, p in self.progress.items() if self.loads(m)}
        return before != description

    def _note_gone(self, before: Description | None, now: Description) -> None:
        for model in before.models if before else ():
            self._gone[model.name] = None
        for model in now.models:
            self._gone.pop(model.name, None)

    @property
    def is_llama_server(self) -> bool:
        """Whether it has reported its build, as only llama-server does."""
        return self.description is not None and bool(self.description.build)

    @property
    def models(self) -> tuple[Model, ...]:
        """The models that it serves, as far as names are known: listed or stated."""
        seen = self.description.models if self.description else ()
        if not self.config.models:
            return seen
        seen = tuple(model for model in seen if self.serves(model.name))
        names = dict.fromkeys(name for name in self.config.models if is_plain(name))
        if self.description is not None:
            for name in filter(is_name, self.config.models):
                if not any(matches(model.name, (name,)) for model in seen):
                    names[name] = None  # `x[1m]` is a name: it matches none of them
        for name in (*(model.name for model in seen), *self._gone):
            names.pop(name, None)
        if self.description is None:
            return (*seen, *map(Model, names))
        context, listed = self.description.context, self.description.models
        inputs = listed[0].inputs if len(listed) == 1 else None
        return (*seen, *(Model(name, context, inputs=inputs) for name in names))

    def serves(self, model: str) -> bool:
        if self.config.models:
            return model not in self._gone and matches(model, self.config.models)
        return any(model == served.name for served in self.models)

    def context_of(self, model: str) -> int | None:
        """Return the context of a model, in tokens for one slot; None if unknown."""
        listed = next((m.context for m in self.models if m.name == model), None)
        return self.config.context or listed or self._contexts.get(model)

    def loads(self, model: str) -> bool:
        """Return whether a request for this model has to wait until it is loaded.

        llama-server's router mode loads a model when a request names it, and may unload
        another one for that.
        """
        return model in self._unloaded

    def inputs_of(self, model: str) -> tuple[str, ...]:
        """Return what a model takes besides text, as far as the worker reports it."""
        return next((m.inputs for m in self.models if m.name == model), None) or ()

    def refuses(self, model: str) -> frozenset[str]:
        """Return what a model is known not to take, of `INPUTS`.

        What a router reports while a model is not loaded may not be the model's own.
        """
        for each in self.models:
            if each.name == model and each.loaded is not False:
                known = each.inputs is not None
                return _INPUTS.difference(each.inputs or ()) if known else _NOTHING
        return _NOTHING

    def has_loaded(self, model: str) -> bool | None:
        """Return whether a model is loaded; None if the worker does not report it."""
        loaded = next((m.loaded for m in self.models if m.name == model), None)
        return None if loaded is None else model not in self._unloaded

    # --- Its answers --------------------------------------------------------------

    def accepts_name(self, model: str, name: str) -> bool:
        """Return whether an answer that names a model is from the requested one.

        Call it for a new name, right after a health check.
        """
        described = self.description.models if self.description else ()
        listed = {each.name for each in described}
        stated = self.serves(model)
        return self.answer_names.accept(model, name, listed, stated=stated)

    def forget_answers(self) -> None:
        """Forget what was learnt from answers: another server may send them now."""
        self.answer_names.forget()
        self._contexts.clear()
