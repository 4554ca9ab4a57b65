"""The request that has another worker go on with an answer that broke off.

    relayed bytes ──▶ Told ──▶ continuation() ──▶ another worker ──▶ Splice ──▶ client
                       └─ nothing left to generate ──▶ closing() ──▶ client

The other worker is asked to go on behind the text so far, as an assistant's message
that is not over, and to repeat that text (`echo`).  The repetition proves that it goes
on instead of starting anew.  llama-server and vLLM repeat it, older builds of the
former without being asked; some servers never do.  So what comes is compared with what
the client has (splice.py).
"""

from __future__ import annotations

import msgspec

from gollama_proxy.wire.told import Told

# Fields that rule a rescue out, and which values (beside null) switch them off.
_BARRED: dict[str, tuple[bytes, ...]] = {
    "tools": (b"[]",),  # half a call is no message that could go on
    "functions": (b"[]",),  # the same, as it was called before
    "response_format": (b'{"type":"text"}',),  # its grammar would begin in mid-text
    "json_schema": (),  # llama-server's word for the same
    "grammar": (b'""',),  # the same
    "structured_outputs": (),  # vLLM's word for the same, like the next four
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "n": (b"1",),  # several answers, interleaved
    "n_cmpl": (b"1",),  # llama-server's word for the same
    "best_of": (b"1",),  # the best of what, once one is half told?
    "logprobs": (b"false",),  # those of the repeated text would be missing or doubled
    "top_logprobs": (b"0",),
    "n_probs": (b"0",),  # llama-server's word for the same
    "echo": (b"false",),  # the text would begin with the prompt
    "suffix": (b'""',),  # the text so far belongs in the middle, not at the end
    "audio": (),  # sound cannot be continued
    "modalities": (b'["text"]',),
    "continue_final_message": (b"false",),  # the client itself has begun the answer
    "add_generation_prompt": (b"true",),
}
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")


class _Message(msgspec.Struct):
    role: str


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def can_rescue(body: bytes, chat: bool) -> bool:
    """Say whether the answer to this request could be continued elsewhere."""
    try:
        fields = _fields_decoder.decode(body)
        for name in _BARRED.keys() & fields.keys():
            value = msgspec.json.encode(msgspec.json.decode(fields[name]))
            if value != b"null" and value not in _BARRED[name]:
                return False
        for name in _LIMITS:
            _limit(fields, name)
        if not chat:  # tokens or several prompts: there is no place for the text
            return isinstance(msgspec.json.decode(fields["prompt"]), str)
        messages = msgspec.json.decode(fields["messages"], type=list[_Message])
    except (ValueError, KeyError, RecursionError):
        return False
    return bool(messages) and messages[-1].role != "assistant"  # begun by the client


def exhausted(body: bytes, told: Told) -> bool:
    """Say whether nothing is left to generate: the client has its `max_tokens`.

    `body` must be one that `can_rescue`, here and below.
    """
    fields = _fields_decoder.decode(body)
    limits = [limit for name in _LIMITS if (limit := _limit(fields, name)) > 0]
    whole = told.tokens - told.halved
    return bool(told.text) and any(limit <= whole for limit in limits)


def for_model(body: bytes, model: str) -> bytes:
    """Write the same request for another model."""
    fields = _fields_decoder.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def continuation(body: bytes, told: Told, chat: bool) -> bytes:
    """Write the request for the rest of an answer that is not `exhausted`."""
    if not told.text:
        return body
    fields = _fields_decoder.decode(body)
    for name in _LIMITS:
        limit = _limit(fields, name)
        if limit > 0:  # others mean: no limit
            fields[name] = msgspec.Raw(b"%d" % max(limit - told.tokens, 1))
    if chat:
        messages = msgspec.json.decode(fields["messages"], type=list[msgspec.Raw])
        message = {"role": "assistant", "content": told.text}
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
