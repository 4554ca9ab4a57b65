"""Each setting is declared once, and documented as it is declared."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from gollama_proxy.config.settings import (
    FLAGS,
    SECTIONS,
    WORKER_KEYS,
    Config,
    Origin,
    WorkerConfig,
    settings,
)
from gollama_proxy.config.values import convert

ROWS = list(settings())


def test_every_default_is_allowed() -> None:
    for row in ROWS:
        given = list(row.default) if isinstance(row.default, tuple) else row.default
        assert convert(row.hint, given) == row.default, row.key


def test_rows_are_complete_and_in_the_order_of_the_sections() -> None:
    assert len({row.key for row in ROWS}) == len({row.env for row in ROWS}) == len(ROWS)
    assert list(dict.fromkeys(row.key.partition(".")[0] for row in ROWS)) == list(
        SECTIONS
    )
    for row in ROWS:
        assert row.help, row.key
        assert row.allowed, row.key
        assert row.help.isprintable(), row.key
        section, name = row.key.split(".")
        assert row.env == f"GOLLAMA_{section.upper()}_{name.upper()}", row.key


def test_every_number_and_text_has_limits() -> None:
    for row in ROWS:
        if not isinstance(row.default, bool):
            assert row.allowed != "true or false", row.key


def test_sections_have_the_order_of_the_config() -> None:
    assert [type(getattr(Config(), name)) for name in SECTIONS] == [*SECTIONS.values()]
    assert "workers" not in SECTIONS


def test_keys_of_a_worker_are_its_attributes() -> None:
    names = set(WorkerConfig.__dataclass_fields__)
    assert WORKER_KEYS.keys() - names == {"api_key_env", "api_key_file"}
    assert names - WORKER_KEYS.keys() == {"origin", "api_key", "parent"}
    assert convert(WORKER_KEYS["slots"], 4) == 4


def test_every_flag_is_for_a_setting() -> None:
    assert FLAGS.keys() <= {row.key for row in ROWS}


def test_a_config_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(AttributeError):
        config.server.port = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.workers = ()  # type: ignore[misc]


def test_two_configs_do_not_share_their_aliases() -> None:
    assert Config().models.aliases is not Config().models.aliases
    assert Config().models.fallbacks is not Config().models.fallbacks


@pytest.mark.parametrize(
    ("host", "authority"),
    [("10.0.0.11", "10.0.0.11:8080"), ("::1", "[::1]:8080"), ("gpu", "gpu:8080")],
)
def test_authority_brackets_ipv6(host: str, authority: str) -> None:
    assert Origin("http", host, 8080, "").authority == authority
