"""A text that is known before it is generated.

A `Task` asks for so many words about a number, and each word is a pure function of the
number and place.  So there is one right answer to every task, whichever worker begins
it and whichever continues, and each character that a client gets can be compared
with it.  An `Order` is what reaches a worker of a task: the task itself, or the rest of
one whose beginning another worker has written.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.fakes import replies
from tests.fakes.asks import CHAT, TEXT
from tests.fakes.replies import event

PROMPT_TOKENS = 20  # of every task, as the workers count them

# What a relay could take for something else, or cut where it must not be cut.
_WORDS = (
    " fox",
    " Füchse",
    " 🦊",
    ' "quoted"',
    " back\\slash",
    "\n\nnew paragraph",
    "\ttab",
    "\ndata: [DONE]\n\n",
    ' {"finish_reason":"stop"}',
    ' data: {"error":{}}',
    "\r\n",
)
_ASKED = re.compile(r"tell (\d+) words about (\d+):(.*)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Task:
    """A request of a client, and the answer that it should get."""

    key: int
    words: int  # after which the model stops by itself
    limit: int | None = None  # `max_tokens`
    chat: bool = True
    stream: bool = True
    usage: bool = False  # `stream_options.include_usage`
    padding: int = 0  # bytes that make the prompt longer

    @property
    def path(self) -> str:
        return CHAT if self.chat else TEXT

    @property
    def payload(self) -> dict[str, Any]:
        asked = f"tell {self.words} words about {self.key}:"
        body: dict[str, Any] = {"model": replies.MODEL}
        if self.chat:
            system = {"role": "system", "content": "x" * self.padding}
            body["messages"] = [system, {"role": "user", "content": asked}]
        else:
            body["prompt"] = "x" * self.padding + asked
        if self.stream:
            body["stream"] = True
        if self.usage:
            body["stream_options"] = {"include_usage": True}
        if self.limit is not None:
            body["max_tokens"] = self.limit
        return body

    @property
    def answer(self) -> Generated:
        return generate(self.key, self.words, "", self.limit)


class Generated(NamedTuple):
    """A text, or the rest of one, token by token."""

    texts: list[str]
    reason: str
    tokens: int  # what the texts count for
    before: int  # tokens that another worker has sent

    @property
    def text(self) -> str:
        return "".join(self.texts)


def word(key: int, place: int) -> str:
    """Return the word about a number at this place, from 0.

    Only the first one begins with a letter: no rest of a text can be taken for the
    whole text being repeated.
    """
    if place == 0:
        return f"T{key}"
    return f"{_WORDS[zlib.crc32(b'%d %d' % (key, place)) % len(_WORDS)]}{place}"


def generate(key: int, words: int, begun: str, limit: int | None) -> Generated:
    """Continue a text after what was sent; each word is one token.

    A word that was sent in part has been counted, so its rest is free.

    Raises:
        ValueError: what was written is not how the text begins.
    """
    all_words = [word(key, place) for place in range(words)]
    if not "".join(all_words).startswith(begun):
        raise ValueError(f"not the beginning of the text about {key}: {begun!r}")
    before, length = 0, 0
    while length < len(begun):
        length += len(all_words[before])
        before += 1
    rest = all_words[before - 1][len(begun) - length :] if length > len(begun) else ""
    end = words if limit is None else min(words, before + limit)
    texts = all_words[before:end]
    if rest:
        texts[:1] = [rest + "".join(texts[:1])]
    reason = "length" if limit is not None and before + limit <= words else "stop"
    return Generated(texts, reason, end - before, before)


# --- What a worker is asked -------------------------------------------------------


class Order(NamedTuple):
    """What one worker is to do."""

    key: int
    chat: bool
    stream: bool
    usage: bool
    limited: bool
    generated: Generated
    begun: str

    @classmethod
    def read(cls, path: str, body: Mapping[str, Any]) -> Order | None:
        """Read what a worker has received; None if it is none of a task.

        Raises:
            ValueError: what it should go on behind is not how the text begins.
        """
        chat = path == CHAT
        if not chat and path != TEXT:
            return None
        asked = _ASKED.search(_last_of_user(body) if chat else body["prompt"])
        if asked is None:
            return None
        words, key, begun = int(asked[1]), int(asked[2]), asked[3]
        limit = body.get("max_tokens")
        if chat and body["messages"][-1]["role"] == "assistant":
            begun = body["messages"][-1]["content"]
        generated = generate(key, words, begun, limit)
        stream = body.get("stream") is True
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        limited = limit is not None
        return cls(key, chat, stream, usage, limited, generated, begun)


def _last_of_user(body: Mapping[str, Any]) -> str:
    texts = [m["content"] for m in body["messages"] if m["role"] == "user"]
    return str(texts[-1])


# --- What a worker answers --------------------------------------------------------


def stream_events(order: Order, name: str, *, echo: bool = False) -> list[list[bytes]]:
    """Give the events of a streamed answer: a list for each chunk of llama-server's.

    `name` is the answer's id.  With `echo` a chat repeats what was sent, as builds do
    that were asked to, and older ones in any case.
    """
    generated = order.generated
    usage, timings = _counts(generated)
    if order.chat:
        role = [replies.role()]
        if echo and order.begun:
            role.append(replies.token(order.begun))
        tokens = [[replies.token(text)] for text in generated.texts]
        tokens[:1] = [role + (tokens[0] if tokens else [])]
        counted = usage if order.usage else None
        end = replies.finish(generated.reason, timings, usage=counted)
    else:
        tokens = [[_text_event(text)] for text in generated.texts]
        last = replies.text_completion("", reason=generated.reason)
        end = event(last | {"usage": usage, "timings": timings})
    ends = [part + b"\n\n" for part in end.split(b"\n\n") if part]
    named = [[_named(part, name) for part in group] for group in (*tokens, ends)]
    return [*named, [replies.done()]]


def whole_answer(order: Order, name: str) -> bytes:
    """Give an answer in one piece, with its head."""
    generated = order.generated
    usage, timings = _counts(generated)
    make = replies.chat_completion if order.chat else replies.text_completion
    answer = make(generated.text, reason=generated.reason)
    answer |= {"usage": usage, "timings": timings, "id": name}
    return replies.json_reply(answer)


def _counts(generated: Generated) -> tuple[dict[str, Any], dict[str, Any]]:
    prompt = PROMPT_TOKENS + generated.before
    usage = replies.usage_of(generated.tokens, prompt)
    return usage, replies.timings_of(generated.tokens, prompt)


def _text_event(text: str) -> bytes:
    return event(replies.text_completion(text, reason=None, last=False))


def _named(part: bytes, name: str) -> bytes:
    return part.replace(json.dumps(replies.ID).encode(), json.dumps(name).encode())
