"""Streams that break off: how they are built, and what a strict client sees."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gollama_proxy.wire.partial import Partial
from gollama_proxy.wire.resume import Resumer
from tests.fakes import replies

# --- Requests ---------------------------------------------------------------------


def chat_body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "hello"}]
    return json.dumps({"model": "tiny", "messages": messages, **fields}).encode()


def text_body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "Once", **fields}).encode()


# --- Answers ----------------------------------------------------------------------


def dump(obj: Any, escape: bool = False) -> bytes:
    """Build one event, as `replies.event` does, or with its text escaped."""
    text = json.dumps(obj, ensure_ascii=escape, separators=(",", ":"))
    return b"data: %b\n\n" % text.encode()


def delta(_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"finish_reason": _reason, "index": 0, "delta": fields}


def chat_chunk(*choices: Any, id: str = "chatcmpl-1", **more: Any) -> dict[str, Any]:
    known = {"created": 1, "id": id, "model": "tiny", "system_fingerprint": "b1"}
    return {"choices": list(choices), **known, **more}


def chat_event(_reason: str | None = None, **fields: Any) -> bytes:
    """Build the event of one delta."""
    return dump(chat_chunk(delta(_reason, **fields)))


def call(name: str, text: str = "", id: str = "call-1", index: int = 0) -> bytes:
    """Build the event with which llama-server begins a call."""
    function = {"name": name, "arguments": text}
    begun = {"index": index, "id": id, "type": "function", "function": function}
    return chat_event(tool_calls=[begun])


def arguments(text: str, index: int = 0) -> bytes:
    """Build the event of some more of a call's arguments."""
    return chat_event(tool_calls=[{"index": index, "function": {"arguments": text}}])


def chat_stream(
    pieces: Iterable[str],
    *,
    reason: str | None = "stop",
    usage: dict[str, Any] | None = None,
    id: str = "chatcmpl-1",
    escape: bool = False,
) -> bytes:
    """Build a stream as llama-server does; without a `reason`, one that was cut."""
    chunks = [chat_chunk(delta(role="assistant", content=None), id=id)]
    chunks += [chat_chunk(delta(content=piece), id=id) for piece in pieces]
    if reason is not None:
        chunks.append(chat_chunk(delta(reason), id=id))
        if usage is not None:
            chunks.append(chat_chunk(id=id, usage=usage, timings=replies.timings_of()))
    done = replies.done() if reason is not None else b""
    return b"".join(dump(chunk, escape) for chunk in chunks) + done


def text_stream(pieces: Sequence[str], *, reason: str | None = "stop") -> bytes:
    chunks = [
        replies.text_completion(piece, reason=None, last=False) for piece in pieces
    ]
    if reason is not None:
        chunks.append(replies.text_completion("", reason=reason))
    done = replies.done() if reason is not None else b""
    return b"".join(map(dump, chunks)) + done


# --- Clients ----------------------------------------------------------------------


class Seen(NamedTuple):
    """What a client makes of a stream."""

    text: str
    roles: int
    reasons: list[str]
    ids: set[tuple[str, int, str]]
    usages: list[dict[str, Any]]
    done: int


def read(stream: bytes) -> Seen:
    """Read a stream strictly: whole events, each of them JSON, `[DONE]` at the end."""
    stream = stream.replace(b"\r\n", b"\n")
    assert stream.endswith(b"\n\n")
    events = [event.strip(b"\n") for event in stream.split(b"\n\n")]
    data = [e.removeprefix(b"data: ") for e in events if e and not e.startswith(b":")]
    chunks = [json.loads(item) for item in data if item != b"[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice.get("delta", {}) for choice in choices]
    if b"[DONE]" in data:
        assert data[-1] == b"[DONE]"
    return Seen(
        "".join(c.get("delta", c).get("content") or c.get("text", "") for c in choices),
        sum("role" in delta for delta in deltas),
        [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks},
        [chunk["usage"] for chunk in chunks if "usage" in chunk],
        data.count(b"[DONE]"),
    )


def read_calls(stream: bytes) -> dict[int, tuple[str, str, str]]:
    """Fold the calls of a stream as SDKs do: id, name and arguments, by their index."""
    calls: dict[int, list[str]] = {}
    for event in stream.replace(b"\r\n", b"\n").split(b"\n\n"):
        data = event.strip(b"\n").removeprefix(b"data: ")
        if not data.startswith(b"{"):
            continue
        for choice in json.loads(data).get("choices", ()):
            for each in choice.get("delta", {}).get("tool_calls", ()):
                known = calls.setdefault(each["index"], ["", "", ""])
                function = each.get("function", {})
                known[0] = each.get("id", known[0])
                known[1] += function.get("name", "")
                known[2] += function.get("arguments", "")
    return {index: (parts[0], parts[1], parts[2]) for index, parts in calls.items()}


# --- Broken answers ---------------------------------------------------------------


def parsed(relayed: bytes) -> Partial:
    """Parse the part of an answer that a client has and that can be continued."""
    reported = Partial.parse(relayed)
    assert reported is not None
    return reported


def spliced(
    relayed: bytes, stream: bytes, *, chat: bool = True, **options: Any
) -> bytes:
    """Return all that a client gets if its answer is continued with `stream`."""
    reported = parsed(relayed)
    resumer = Resumer(reported, chat, **options)
    rest = b"".join(resumer.feed(stream)) + resumer.finish()
    return relayed + reported.mend + rest
