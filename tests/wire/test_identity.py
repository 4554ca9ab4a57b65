"""Which model and which build an answer says it comes from."""

from __future__ import annotations

import pytest

from gollama_proxy.wire.identity import build_of, first_model, model_of

WHOLE = [
    (b'{"choices":[],"model":"tiny"}', "tiny"),
    (b'{ "model" : "a \\"b\\" \\u00e9" }', 'a "b" é'),
    (b'{"content":[{"input":{"model":"a car"}}],"model":"tiny"}', "tiny"),
    (b'{"content":[{"input":{"model":"a car"}}]}', None),
    (b'{"text":"\\"model\\":\\"x\\""}', None),
    (b'{"model":null}', None),
    (b'{"model":7}', None),
    (b'{"model":{"model":"x"}}', None),
    (b'{"message":{"model":"tiny"}}', "tiny"),
    (b'{"response":{"model":"tiny"}}', "tiny"),
    (b'{"message":"model","response":[]}', None),
    (b'{"model":"ti', None),
    (b'["model"]', None),
    (b"", None),
    (b"[" * 10_000, None),
    (b'{"model":"\xff"}', None),
]


@pytest.mark.parametrize(("body", "model"), WHOLE)
def test_the_model_of_an_answer(body: bytes, model: str | None) -> None:
    assert model_of(body, events=False) == model
    event = b": ping\n\nevent: x\ndata: " + body + b"\n\n"
    assert model_of(event + b'data: {"model":"later"}\n\n', events=True) == (
        model or "later"
    )


@pytest.mark.parametrize(
    ("held", "model"),
    [
        (b'data: {"model": "tiny"}\n\n', "tiny"),
        (b'{"data":[0.1,0.2', None),
        (b'{"x":"\\"model\\":\\"x\\"","model":"tiny"', "tiny"),
        (b'{"model":null,"inner":{"model":"first"}}', "first"),
        (b'{"model":"ti', None),
    ],
)
def test_the_first_model_that_is_named(held: bytes, model: str | None) -> None:
    assert first_model(held) == model


@pytest.mark.parametrize(
    ("held", "build"),
    [
        (b'{"system_fingerprint":"b1-571d0d5"}', "b1-571d0d5"),
        (b'{"system_fingerprint" : "b1"}', "b1"),
        (b'{"system_fingerprint":null}', ""),
        (b'{"system_fingerprint":"%b"}' % (b"x" * 200), ""),
        (b"{}", ""),
    ],
)
def test_the_build_that_is_named(held: bytes, build: str) -> None:
    assert build_of(held) == build
