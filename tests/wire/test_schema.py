"""A struct of what users and models write shows none of it."""

from __future__ import annotations

import msgspec

from gollama_proxy.wire.schema import Private


class Said(Private):
    text: str
    inner: Said | None = None


def test_no_field_of_a_struct_is_shown() -> None:
    said = Said("secret", Said("other"))
    assert repr(said) == "<Said>"
    assert repr([said]) == "[<Said>]"


def test_a_quiet_struct_is_still_a_struct() -> None:
    assert msgspec.json.decode(b'{"text":"a"}', type=Said) == Said("a")
    assert msgspec.json.encode(Said("a")) == b'{"text":"a","inner":null}'
