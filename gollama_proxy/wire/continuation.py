"""The request that has another worker go on with an answer that broke off.

    relayed bytes ──▶ Told ──▶ a request ──▶ another worker ──▶ Splice ──▶ client
                       └─ nothing left to generate ──▶ closing() ──▶ client

There are two.  The *continuation* has the text so far, and the thoughts before it, as
an assistant's message that is not over, and wants it repeated (`echo`), which proves
that the worker goes on from there.  llama-server and vLLM repeat it, and so do builds
of the former that do not know the word.  Nothing else would prove as much: a worker
that repeats nothing may have begun a new turn, in words that fit by chance, and the
prompt that `/apply-template` shows is of llama-server alone, and one request more.

The other one is the *original request*, for an answer that no message could begin: in
its thoughts, in a call of a tool, under a grammar, or too short for its repetition to
prove anything.  It costs the worker the whole answer once more, and it has to be the
same one, so it is of use with a `seed` or at temperature 0.  It also comes second,
where a continuation was refused or proved nothing.

A text completion needs no proof: its prompt goes on.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gollama_proxy.wire.told import Told

# Fields that rule a rescue out, and which values (beside null) switch them off.
_BARRED: dict[str, tuple[bytes, ...]] = {
    "n": (b"1",),  # several answers, interleaved
    "n_cmpl": (b"1",),  # llama-server's word for the same
    "best_of": (b"1",),  # the best of what, once one is half told?
    "logprobs": (b"false",),  # those of the repeated text would be missing or doubled
    "top_logprobs": (b"0",),
    "n_probs": (b"0",),  # llama-server's word for the same
    "audio": (),  # sound cannot be compared
    "modalities": (b'["text"]',),
}
# The same for fields that rule a continuation out, so that all is asked for again.
_WHOLE: dict[str, tuple[bytes, ...]] = {
    "tool_choice": (b'"auto"', b'"none"'),  # a call has to come first
    "function_call": (b'"auto"', b'"none"'),  # the same, as it was called before
    "response_format": (b'{"type":"text"}',),  # its grammar would begin in mid-text
    "json_schema": (),  # llama-server's word for the same
    "grammar": (b'""',),  # the same
    "structured_outputs": (),  # vLLM's word for the same, like the next five
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structural_tag": (),
    "echo": (b"false",),  # the text begins with the prompt
    "suffix": (b'""',),  # the text so far belongs in the middle, not at the end
    "continue_final_message": (b"false",),  # the client itself has begun the answer
    "add_generation_prompt": (b"true",),
}
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")


class _Message(msgspec.Struct):
    role: str


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def can_rescue(body: bytes, chat: bool) -> bool:
    """Say whether the answer to this request could go on elsewhere, in either way."""
    try:
        fields = _fields_decoder.decode(body)
        for name in _LIMITS:
            _limit(fields, name)
        if chat:
            return bool(_messages(fields)) and not _sets(fields, _BARRED)
        prompt = msgspec.json.decode(fields["prompt"])
    except (ValueError, KeyError, RecursionError):
        return False
    tokens = isinstance(prompt, list) and all(isinstance(n, int) for n in prompt)
    one = isinstance(prompt, str) or tokens
    return one and not _sets(fields, _BARRED)


def can_continue(body: bytes, told: Told, chat: bool) -> bool:
    """Say whether an answer can be gone on with, and that be proved.

    `body` must be one that `can_rescue`, here and below.
    """
    fields = _fields_decoder.decode(body)
    if not told.is_plain or _sets(fields, _WHOLE):
        return False
    if not chat:  # tokens have no place for the text
        return isinstance(msgspec.json.decode(fields["prompt"]), str)
    # One token, or a line of dashes, may come again without being a repetition.
    telling = told.pieces > 1 and len(set(told.text) - set(" \t\r\n")) > 1
    return telling and _messages(fields)[-1].role != "assistant"


def _sets(fields: dict[str, msgspec.Raw], barred: dict[str, tuple[bytes, ...]]) -> bool:
    """Whether any of these fields is there, and not switched off."""
    return any(
        msgspec.json.encode(msgspec.json.decode(fields[name])) not in (b"null", *off)
        for name, off in barred.items()
        if name in fields
    )


def _messages(fields: dict[str, msgspec.Raw]) -> list[_Message]:
    return msgspec.json.decode(fields["messages"], type=list[_Message])


def exhausted(body: bytes, told: Told) -> bool:
    """Say whether nothing is left to generate: the client has its `max_tokens`."""
    fields = _fields_decoder.decode(body)
    limits = [limit for name in _LIMITS if (limit := _limit(fields, name)) > 0]
    whole = told.tokens - told.halved
    return bool(told.spans) and any(limit <= whole for limit in limits)


def for_model(body: bytes, model: str) -> bytes:
    """Write the same request for another model."""
    fields = _fields_decoder.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def continuation(body: bytes, told: Told, chat: bool) -> bytes:
    """Write the request for the rest of an answer that `can_continue`.

    And that is not `exhausted`.
    """
    fields = _fields_decoder.decode(body)
    for name in _LIMITS:
        limit = _limit(fields, name)
        if limit > 0:  # others mean: no limit
            fields[name] = msgspec.Raw(b"%d" % max(limit - told.tokens, 1))
    if chat:
        messages = msgspec.json.decode(fields["messages"], type=list[msgspec.Raw])
        message: dict[str, Any] = {"role": "assistant", "content": told.text}
        if told.reasoning.strip():
            message["reasoning_content"] = told.reasoning
        messages.append(msgspec.Raw(msgspec.json.encode(message)))
        fields["messages"] = msgspec.Raw(msgspec.json.encode(messages))
        fields["continue_final_message"] = msgspec.Raw(b"true")
        fields["add_generation_prompt"] = msgspec.Raw(b"false")
        fields["echo"] = msgspec.Raw(b"true")
    else:
        prompt = msgspec.json.decode(fields["prompt"], type=str)
        fields["prompt"] = msgspec.Raw(msgspec.json.encode(prompt + told.text))
    return msgspec.json.encode(fields)


def _limit(fields: dict[str, msgspec.Raw], name: str) -> int:
    limit = msgspec.json.decode(fields.get(name, b"null"), type=int | None)
    return limit or 0
