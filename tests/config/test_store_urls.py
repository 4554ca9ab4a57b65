"""The URL of a store."""

from __future__ import annotations

import pytest

from gollama_proxy.config.addresses import StoreAddress, parse_store_url
from gollama_proxy.config.load import load
from gollama_proxy.config.settings import Config
from gollama_proxy.config.values import ConfigError, SecretUrl
from gollama_proxy.config.watch import compare_configs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://a", StoreAddress("a", 6379, "", 0, "", "", False, "", "", "")),
        (
            "redis://me:p%40ss@[::1]:7/3",
            StoreAddress("::1", 7, "", 3, "me", "p@ss", False, "", "", ""),
        ),
        (
            "redis://:secret@a/",
            StoreAddress("a", 6379, "", 0, "", "secret", False, "", "", ""),
        ),
        (
            "rediss://a?ssl_ca_certs=/ca.pem&ssl_certfile=/me.pem",
            StoreAddress("a", 6379, "", 0, "", "", True, "/ca.pem", "/me.pem", ""),
        ),
        (
            "unix://me:secret@/run/a.sock?db=2",
            StoreAddress("", 0, "/run/a.sock", 2, "me", "secret", False, "", "", ""),
        ),
    ],
)
def test_what_a_url_means(url: str, expected: StoreAddress) -> None:
    found = parse_store_url("state.url", url)
    assert tuple(found) == tuple(expected)
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("localhost", "has no scheme"),
        ("http://a", "the scheme 'http' is unknown"),
        ("redis://", "the host is missing"),
        ("redis://:6379", "the host is missing"),
        ("redis://a:0", "the port must be a number in the range"),
        ("redis://a:70000", "the port must be a number in the range"),
        ("redis://a:b", "the port must be a number in the range"),
        ("redis://[::1", "malformed"),
        ("redis://a/x", "the database must be a number from 0 to 9,999, and not 'x'"),
        ("redis://a/10000", "the database must be a number from 0 to 9,999"),
        ("redis://a?db=1", "the option 'db' is unknown (none is allowed)"),
        ("redis://a?ssl_ca_certs=x", "the option 'ssl_ca_certs' is unknown"),
        ("rediss://a?ssl_cert_reqs=none", "the option 'ssl_cert_reqs' is unknown"),
        ("rediss://a?ssl_keyfile=/k", "ssl_keyfile needs ssl_certfile beside it"),
        ("redis://a#b", "has a fragment (#); in a password, write %23"),
        ("unix://", "the path of the socket is missing"),
        ("unix://run/a.sock", "a Unix socket has no host"),
        ("unix:///run/a.sock?db=-1", "the database must be a number"),
    ],
)
def test_a_wrong_url(url: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={"GOLLAMA_STATE_URL": url})
    [line] = caught.value.args
    assert line.startswith(f"state.url = {url!r}: {why}")
    assert "expected redis://" in line


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@a",
        "redis://:hunter2@a:hunter",
        "redis://:hunter2/@a",
        "redis://:hunter2#@a",
        "redis://me:hunter2@[a",
        "redis://a?password=hunter2",
        "unix://me:hunter2@run/a.sock",
        "redis://:hunter2\n@a",
    ],
)
def test_a_password_is_in_no_error(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={"GOLLAMA_STATE_URL": url})
    assert "hunter2" not in str(caught.value)


def test_a_password_is_hidden() -> None:
    config = load(environ={"GOLLAMA_STATE_URL": "redis://me:hunter2@a/1"})
    assert config.state.url == "redis://me:hunter2@a/1"
    assert "hunter2" not in repr(config) + str(config)
    changes, _ = compare_configs(Config(), config)
    assert "state.url '' -> 'redis://...@a/1'" in str(changes)
    assert "hunter2" not in repr(changes) + str(changes)
    url = SecretUrl("redis://me:hunter2@a")
    assert f"{url} {url!s} {url!r} %s" % url == (
        "redis://...@a redis://...@a 'redis://...@a' redis://...@a"
    )
    assert SecretUrl("redis://a:1").masked == "redis://a:1"


@pytest.mark.parametrize("prefix", ["", "a b", "a:b", "a*", "x" * 65])
def test_a_wrong_prefix(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"^state\.prefix .* must be 1 to 64 letters"):
        load(environ={"GOLLAMA_STATE_PREFIX": prefix})
