"""What a worker serves, read from its `/v1/models` and `/props`.

Only `/v1/models` has to be understood.  A server without `/props` is a good worker all
the same; what it does not report stays unknown.  So does what has an unexpected shape:
each field is read separately, and does not affect the others.

Sources: tools/server/README.md of llama.cpp, and the model lists of Ollama, vLLM,
SGLang, TabbyAPI and LM Studio.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, NamedTuple, TypeVar

import msgspec

from gollama_proxy.wire.schema import UNREADABLE

MOST_MODELS = 1000  # of one worker; each request looks through their names
MAX_NAME = 4000  # characters of a model's name: a path, and what a request can name
MOST_CONTEXT = 1 << 30  # tokens
# What a model may take besides text, by the names that llama-server's `/props` uses.
INPUTS = {"vision": "image", "audio": "audio", "video": "video"}

_T = TypeVar("_T")


class Check(enum.Enum):
    """The result of one health check."""

    OK = "ok"
    LOADING = "loading"
    FAILED = "failed"
    REFUSED = "refused"  # the port is closed


@dataclass(frozen=True, slots=True)
class Model:
    """A model as one worker serves it."""

    name: str
    context: int | None = None  # tokens of one slot
    loaded: bool | None = None  # None where the worker does not report it
    loading: bool = False  # it is being loaded
    # What it takes besides text, of `INPUTS`; None where the worker does not report it.
    inputs: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker reports about itself; None where it does not."""

    models: tuple[Model, ...] = ()
    slots: int | None = None
    context: int | None = None  # tokens of one slot
    build: str = ""

    @property
    def identity(self) -> tuple[str, ...]:
        """What changes when another server answers at the same address."""
        return (self.build, *(model.name for model in self.models))


class DescriptionError(Exception):
    """A model list that cannot be used; the text quotes nothing that was received."""


class Listing(NamedTuple):
    """The usable entries of a model list, each name once."""

    entries: tuple[_Entry, ...]
    note: str = ""  # what is odd about the others


def read_models(body: bytes) -> Listing:
    """Read the answer to `/v1/models`.

    Raises:
        DescriptionError: it has no model list, or one without a usable name.
    """
    answer = _read(body, _ModelList)
    if answer is None:
        raise DescriptionError("/v1/models sent an answer that cannot be read")
    listed = _read(answer.data, list[msgspec.Raw])
    if listed is None:  # as Ollama lists them
        listed = _read(answer.models, list[msgspec.Raw])
    if listed is None and bytes(answer.data) != b"null":  # Go's empty list
        raise DescriptionError("/v1/models has no list of models")
    return _usable(listed or ())


def _usable(listed: Iterable[msgspec.Raw]) -> Listing:
    found: dict[str, _Entry] = {}
    odd = 0
    for item in listed:
        entry = _read(item, _Entry) or _Entry()
        if not _is_name(entry.name):
            odd += 1
        elif len(found) < MOST_MODELS:
            found.setdefault(entry.name, entry)
    if odd and not found:
        raise DescriptionError("/v1/models has no name that can be used")
    note = f"/v1/models has entries without a usable name: {odd}, skipped"
    return Listing(tuple(found.values()), note if odd else "")


def _is_name(text: str) -> bool:
    """Return whether a name breaks neither a line of the log nor a terminal."""
    return 0 < len(text) <= MAX_NAME and text.isprintable()


def describe(listing: Listing, props: bytes) -> Description:
    """Build a description; `props` is the answer to `/props`, or empty."""
    read = _read(props, _Props) or _Props()
    # 0 in a router, which has no model itself.
    context = _tokens(_part(read.default_generation_settings, "n_ctx"))
    own = [entry.context for entry in listing.entries]
    build = _read(read.build_info, str) or ""
    inputs = _inputs_of(read)
    return Description(
        models=tuple(
            Model(
                entry.name,
                tokens or context,
                *entry.loaded,
                inputs if entry.inputs is None else entry.inputs,
            )
            for entry, tokens in zip(listing.entries, own, strict=True)
        ),
        slots=_read(read.total_slots, _Slots),
        context=context or next((tokens for tokens in own if tokens), None),
        build=build[:100] if build.isprintable() else "",
    )


def _inputs_of(props: _Props) -> tuple[str, ...] | None:
    takes = {INPUTS[key]: _read(_part(props.modalities, key), bool) for key in INPUTS}
    if all(each is None for each in takes.values()):
        return None
    return tuple(name for name, each in takes.items() if each)


# --- The parts of the answers that are read ---------------------------------------


class _Entry(msgspec.Struct):
    id: msgspec.Raw = msgspec.Raw()
    model: msgspec.Raw = msgspec.Raw()  # the `id` of Ollama's own list
    meta: msgspec.Raw = msgspec.Raw()
    max_model_len: msgspec.Raw = msgspec.Raw()  # vLLM, SGLang
    loaded_context_length: msgspec.Raw = msgspec.Raw()  # LM Studio
    context_length: msgspec.Raw = msgspec.Raw()
    context_window: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()  # TabbyAPI
    architecture: msgspec.Raw = msgspec.Raw()  # llama-server, and what it proxies
    # Of a llama-server that is a router; in other servers it can be anything.
    status: msgspec.Raw = msgspec.Raw()

    @property
    def name(self) -> str:
        return _read(self.id, str) or _read(self.model, str) or ""

    @property
    def context(self) -> int | None:
        """The tokens of its context, from the first field that has them."""
        fields = (
            _part(self.meta, "n_ctx"),
            self.max_model_len,
            self.loaded_context_length,
            self.context_window,
            self.context_length,
            _part(self.parameters, "max_seq_len"),
        )
        return next(filter(None, map(_tokens, fields)), None)

    @property
    def loaded(self) -> tuple[bool | None, bool]:
        """Whether it is loaded (None: unknown), and whether it is being loaded.

        A router reports `{"value": "loaded", …}`.
        """
        value = _read(_part(self.status, "value"), str)
        return (None if value is None else value == "loaded"), value == "loading"

    @property
    def inputs(self) -> tuple[str, ...] | None:
        """What it takes besides text; None if it is not listed."""
        modalities = _part(self.architecture, "input_modalities")
        listed = _read(modalities, list[msgspec.Raw])
        if listed is None:
            return None
        names = {_read(each, str) for each in listed}
        return tuple(name for name in INPUTS.values() if name in names)


class _ModelList(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw()
    models: msgspec.Raw = msgspec.Raw()


class _Props(msgspec.Struct):
    total_slots: msgspec.Raw = msgspec.Raw()
    build_info: msgspec.Raw = msgspec.Raw()
    modalities: msgspec.Raw = msgspec.Raw()
    default_generation_settings: msgspec.Raw = msgspec.Raw()


# --- A model that is being loaded -------------------------------------------------


class _Progress(msgspec.Struct):
    """The parts of a model are loaded one after the other: text, draft, images."""

    stages: list[str]
    current: str
    value: float  # of the current one, from 0 to 1


class _LoadStatus(msgspec.Struct):
    status: str
    progress: _Progress | None = None


class _LoadEvent(msgspec.Struct):
    model: str
    data: _LoadStatus


def read_progress(event: bytes) -> tuple[str, float | None] | None:
    """Read an event of a router's `GET /models/sse`: a model, and how far it is loaded.

    From 0 to 1; None for a model that is not loading any more.  Events that mean
    nothing of this kind, such as downloads, are None.
    """
    found = _read(event, _LoadEvent)
    if found is None:
        return None
    if found.data.status != "loading":
        return found.model, None
    progress = found.data.progress
    if progress is None or progress.current not in progress.stages:
        return None
    done = progress.stages.index(progress.current) + min(max(progress.value, 0.0), 1.0)
    return found.model, done / len(progress.stages)


_Slots = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]


def _tokens(context: msgspec.Raw) -> int | None:
    tokens = _read(context, int)
    return tokens if tokens is not None and 0 < tokens <= MOST_CONTEXT else None


def _part(raw: msgspec.Raw, name: str) -> msgspec.Raw:
    """Return a field of a field; empty if there is none."""
    return (_read(raw, dict[str, msgspec.Raw]) or {}).get(name, msgspec.Raw())


def _read(raw: bytes | msgspec.Raw, kind: type[_T]) -> _T | None:
    """Read a field, or a whole answer; None if it is missing, or of another shape."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNREADABLE:
        return None
