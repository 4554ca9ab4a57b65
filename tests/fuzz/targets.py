"""What must hold for any bytes at all: the targets of `make fuzz`.

Each takes bytes and raises if a promise is broken: `AssertionError` where an answer is
wrong, anything else where an undeclared exception came out.  What is read in
pieces is read whole, byte by byte and in random pieces, with one result.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from gollama_proxy.config.settings import STREAMED
from gollama_proxy.scheduling.affinity import prefixes
from gollama_proxy.upstream.connection import Connection, ConnectionState
from gollama_proxy.wire import fields, sse
from gollama_proxy.wire.answer import beginning, read_end, read_tail, read_usage
from gollama_proxy.wire.assemble import ask_for_stream, ask_for_usage
from gollama_proxy.wire.errors import RequestError, WorkerError
from gollama_proxy.wire.fields import (
    Field,
    FieldScanner,
    Wanted,
    check_json,
    find_model,
    read_whole,
)
from gollama_proxy.wire.folding import Assembler, AssemblyError
from gollama_proxy.wire.partial import (
    Partial,
    Span,
    ask_for_rest,
    can_continue,
    can_rescue,
    exhausted,
)
from gollama_proxy.wire.resume import Resumer, Transcript
from gollama_proxy.wire.schema import ENDPOINTS, Api, Ending
from gollama_proxy.wire.sse import Renamer, UsageHider, renamed

T = TypeVar("T")

LIMIT = 1 << 20  # of an assembled answer
BYTEWISE = 600  # bytes; longer inputs are not taken apart byte by byte


def ways_to_cut(data: bytes) -> list[list[bytes]]:
    """Cut data in several ways, which are the same for the same data."""
    ways = [[data]]
    if 1 < len(data) <= BYTEWISE:
        ways.append([data[at : at + 1] for at in range(len(data))])
    rng = random.Random(zlib.crc32(data))
    for _ in range(2):
        ends = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(6)))
        pieces = [data[i:j] for i, j in zip([0, *ends], [*ends, None], strict=True)]
        ways.append([piece for piece in pieces if piece])
    return ways


def same_for_all(data: bytes, read: Callable[[Sequence[bytes]], T]) -> T:
    """Read data in every way; all have to give the same."""
    first, *others = [read(pieces) for pieces in ways_to_cut(data)]
    for other in others:
        assert other == first, (first, other)
    return first


# --- Requests ---------------------------------------------------------------------


def request(data: bytes) -> None:
    """A body is refused, or read as any other JSON parser reads it."""
    found = same_for_all(data, _scan)
    whole = read_whole(data)
    if found is not None:
        _check_fields(data, found)
        _derive(data, found)
    if whole is not None:
        _check_wanted(data, whole)
    if found is not None and whole is not None:
        assert find_model(data) == found.get("model")


def _check_wanted(data: bytes, wanted: Wanted) -> None:
    parsed = _parse(data)
    assert isinstance(parsed, dict), parsed
    values = msgspec.structs.asdict(wanted)
    found = {name: each for name, each in values.items() if each is not msgspec.UNSET}
    assert found.keys() == parsed.keys() & fields.WANTED
    for name, value in found.items():
        if name == "model":
            assert value == parsed[name]
        else:
            _compare(name, fields.classify(bytes(value), 0), parsed[name])


def _check_fields(data: bytes, found: dict[str, Field]) -> None:
    parsed = _parse(data)
    assert isinstance(parsed, dict), parsed
    assert found.keys() == parsed.keys() & fields.WANTED
    for name, field in found.items():
        _compare(name, field, parsed[name])
        assert data[field.start : field.end] == field.raw


def _scan(pieces: Sequence[bytes]) -> dict[str, Field] | None:
    scanner = FieldScanner()
    try:
        for piece in pieces:
            scanner.feed(piece)
        scanner.finish()
        check_json(b"".join(pieces))
    except RequestError:
        return None
    return scanner.found


def _parse(data: bytes) -> Any:
    """Parse as strictly as the standard library can; numbers stay as they are spelt."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        top.append(names)
        return dict(items)

    top: list[list[str]] = []
    parsed = json.loads(
        data.decode(),
        parse_constant=refuse,
        parse_int=lambda text: (text,),
        parse_float=lambda text: (text,),
        object_pairs_hook=pairs,
    )
    wanted = [name for name in top[-1] if name in fields.WANTED]
    assert len(wanted) == len(set(wanted)), f"one of {wanted} counts twice"
    return parsed


def _compare(name: str, field: Field, value: Any) -> None:
    kinds = {str: '"', list: "[", dict: "{", bool: "tf", type(None): "n", tuple: "0?"}
    assert field.kind in kinds[type(value)], (name, field, value)
    if isinstance(value, str):
        try:
            assert fields.text_of(field) == value, (field, value)
        except RequestError:
            assert any("\ud800" <= sign <= "\udfff" for sign in value), value
    elif isinstance(value, tuple):
        assert field.raw.decode() == value[0]
    elif isinstance(value, bool):
        assert field.kind == ("t" if value else "f")


def _derive(data: bytes, found: dict[str, Field]) -> None:
    """Do what is done with a body that was accepted."""
    if "fallbacks" in found:
        try:
            names, rest = fields.take_names(data, "fallbacks")
            assert len(names) <= fields.MAX_NAMES
            assert "fallbacks" not in json.loads(rest, parse_int=str)
        except RequestError:
            pass
    for path in STREAMED:
        streamed = ask_for_stream(data, ENDPOINTS[path])
        if streamed is not None:
            assert json.loads(streamed.body, parse_int=str)["stream"] is True
    for chat in (True, False):
        if can_rescue(data, chat):
            begun = Partial("i", 1, "m", (Span("text", "so far"),), 2, pieces=2)
            if not exhausted(data, begun) and can_continue(data, begun, chat):
                assert b"so far" in ask_for_rest(data, begun, chat)
    if data.strip(b" \t\r\n{}"):
        asked = ask_for_usage(data)
        if asked is not None:
            options = json.loads(asked, parse_int=str)["stream_options"]
            assert options == {"include_usage": True}
    prefixes(data)


# --- Event streams ----------------------------------------------------------------


def stream(data: bytes) -> None:
    """What is reported of a stream: never an exception, and nothing is taken back."""
    for ending in Ending:
        end = read_end(data, ending)
        assert data.endswith(end.rest)
        first_half = sse.split_events(data[: len(data) // 2])[0]
        if sse.opens(first_half, ending):
            assert sse.opens(sse.split_events(data)[0], ending)
    for event in sse.events_in(data):
        sse.error_in(event)
    for api in Api:
        for reported in (
            read_usage(data, api),
            read_tail(api, data, beginning(data)),
        ):
            assert (reported.prompt or 0) >= 0
            assert (reported.generated or 0) >= 0


def assembly(data: bytes) -> None:
    """A stream makes up one answer or none, wherever it was cut."""
    for path in STREAMED:
        asked = ask_for_stream(b"{}", ENDPOINTS[path])
        assert asked is not None
        make = asked.assembler
        same_for_all(data, lambda pieces, make=make: _assemble(pieces, make(LIMIT)))  # type: ignore[misc]


def _assemble(pieces: Sequence[bytes], assembler: Assembler) -> Any:
    try:
        for piece in pieces:
            assembler.feed(piece)
        answer = assembler.finish()
    except AssemblyError as exc:
        return type(exc)
    json.loads(answer)
    return answer


def renaming(data: bytes) -> None:
    """A name is replaced, wherever it was cut, and nothing else is.

    What is no JSON may come out in more than one way, but not without its name.
    """
    if b"old" not in data and b"\\" not in data:
        assert same_for_all(data, _rename) == data
    lines = [line.removeprefix(b"data: ") for line in data.splitlines()]
    parts = [data] if _is_json(data) else lines
    if not all(map(_is_json, parts)):
        return
    new = same_for_all(data, _rename)
    assert new == renamed(data, "old", "new")
    if parts == [data] and b"\\" not in data:  # an escaped key is left alone
        after = json.loads(new, object_pairs_hook=list)
        assert repr(after) == repr(
            _with_new_name(json.loads(data, object_pairs_hook=list))
        )


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _rename(pieces: Sequence[bytes]) -> bytes:
    renamer = Renamer("old", "new")
    return b"".join(map(renamer.feed, pieces)) + renamer.finish()


def _with_new_name(value: Any) -> Any:
    if isinstance(value, tuple):  # a pair of an object
        name, inner = value
        named = name == "model" and inner == "old"
        return (name, "new" if named else _with_new_name(inner))
    return [*map(_with_new_name, value)] if isinstance(value, list) else value


def hiding(data: bytes) -> None:
    """Usage that was not requested is left out, wherever it is cut; the rest passes."""
    kept = same_for_all(data, _hide)
    if b'"usage"' not in data:
        assert kept == data


def _hide(pieces: Sequence[bytes]) -> bytes:
    hider = UsageHider()
    return b"".join(map(hider.feed, pieces)) + hider.finish()


def transcript(data: bytes) -> None:
    """What was relayed comes back as it was; a zero byte is where chunks are cut."""
    bodies = [body for body in data.split(b"\x00\x00") if body]
    chunks = [b"%x\r\n%b\r\n" % (len(body), body) for body in bodies]
    # Not so small that something is dropped: the framing of chunks counts, too.
    kept = Transcript(limit=8 * len(data))
    for each in chunks:
        kept.add(each)
    assert kept.body() == b"".join(bodies)


def rescue(data: bytes) -> None:
    """What broke off is continued or not; `\\x00\\x00` is where it broke."""
    relayed, _, rest = data.partition(b"\x00\x00")
    for chat in (True, False):
        begun = Partial.parse(relayed)
        if begun is None:
            continue
        again = Partial.parse(relayed + begun.mend)
        assert again is not None, begun.mend
        assert (again.spans, again.mend) == (begun.spans, b""), (begun, again)
        for regenerate in (True, False):
            same_for_all(
                rest,
                lambda pieces, begun=begun, chat=chat, again=regenerate: _splice(  # type: ignore[misc]
                    pieces, begun, chat, again
                ),
            )


def _splice(
    pieces: Sequence[bytes], begun: Partial, chat: bool, regenerate: bool
) -> Any:
    resumer = Resumer(begun, chat, regenerate=regenerate)
    events: list[bytes] = []
    try:
        for piece in pieces:
            events += resumer.feed(piece)
        events.append(resumer.finish())
    except WorkerError as exc:
        events.append(type(exc).__name__.encode())
    return b"".join(events), resumer.partial.spans


# --- Answers of a worker ----------------------------------------------------------


class Recorder:
    """Takes what a connection makes of a worker's bytes."""

    def __init__(self) -> None:
        self.head: Any = None
        self.body = b""
        self.end: str | None = None

    def __repr__(self) -> str:
        return f"<Recorder {self.head!r} {self.body!r} {self.end}>"

    def head_received(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert self.head is None, "a second head"
        assert self.end is None
        self.head = (status, headers)

    def body_received(self, data: bytes) -> None:
        assert self.head is not None, "a body without a head"
        assert self.end is None, "a body behind the end"
        assert data
        self.body += data

    def chunk_received(self, chunk: bytes, head: bytes) -> bool:
        if not (chunk.startswith(head) and chunk.endswith(b"\r\n")):
            return False
        size = int(head[:-2], 16)
        assert len(chunk) == len(head) + size + 2
        self.body_received(chunk[len(head) : -2])
        return True

    def answer_ended(self) -> None:
        assert self.end is None, "a second end"
        self.end = "ended"

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        assert self.end is None, "a second end"
        assert len(reason) < 200
        self.end = "malformed" if malformed else "lost"


def answer(data: bytes) -> None:
    """A worker's bytes mean one thing, whatever packets they come in."""
    same_for_all(data, _receive)


def _receive(pieces: Sequence[bytes]) -> Any:
    connection, recorder = Connection(), Recorder()
    connection.start(recorder)
    for piece in pieces:
        connection.data_received(piece)
        if connection.state is not ConnectionState.ACTIVE:
            break
    if connection.state is ConnectionState.ACTIVE:
        connection.connection_lost(None)
    assert recorder.end is not None
    # How much of a malformed answer came through depends on its packets.
    body = recorder.body if recorder.end == "ended" else b""
    return recorder.head if recorder.end == "ended" else None, body, recorder.end


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        request,
        stream,
        assembly,
        renaming,
        hiding,
        transcript,
        rescue,
        answer,
    )
}
