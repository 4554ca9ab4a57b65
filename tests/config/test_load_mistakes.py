"""A mistake in the settings ends the command, with one line that names the key.

The exit status is 2, standard output is empty, and standard error has one line, which
never contains a secret.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from gollama_proxy.cli import main
from tests.fakes.process import bare
from tests.fakes.waiting import DEADLINE

SECRET = "canary-secret-of-the-hub-0123456789"
KEY = "canary-key-of-a-worker"
PUBLIC = "-----BEGIN PUBLIC KEY-----\ncanary\n-----END PUBLIC KEY-----\n"
WORKER = "[[workers]]\nurl = 'http://10.0.0.11:8080'\n"

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment with valid secrets and no other settings."""
    clean = bare()
    clean |= {"GOLLAMA_JWT_SECRET": SECRET, "DESK_KEY": KEY}
    monkeypatch.setattr(os, "environ", clean)
    # Some mistakes are found only by the hub; it must not change the log of the tests.
    monkeypatch.setattr(
        "gollama_proxy.telemetry.logs.configure", lambda log, process: None
    )

    async def start(hub: object) -> None:
        raise AssertionError("started with wrong settings")

    monkeypatch.setattr("gollama_proxy.hub.Hub.start", start)
    return clean


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files for settings, valid and invalid."""
    files: dict[str, tuple[str | bytes, int]] = {
        "secret": (SECRET, 0o600),
        "open": (SECRET, 0o604),
        "writable": (SECRET, 0o602),
        "short": ("canary-short", 0o600),
        "three": (f"{SECRET} {SECRET} {SECRET}", 0o600),
        "empty": ("", 0o600),
        "huge": ("x" * 70_000, 0o600),
        "key": (KEY, 0o640),
        "words": (f"{KEY} {KEY}", 0o600),
        "openkey": (KEY, 0o644),
        "public.pem": (PUBLIC, 0o644),
        "nothing.pem": ("canary", 0o644),
        "revoked": ("sub:alice\n", 0o644),
        "nonsense": ("sub:alice\neyJcanary\n", 0o644),
        "binary": (b"\xff\xfe", 0o600),
    }
    for name, (content, mode) in files.items():
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        file.chmod(mode)
    return tmp_path


def refusal(toml: str, folder: Path, capsys: Output) -> str:
    """Start with these settings, and return the line that reports the mistake."""
    file = folder / "gollama.toml"
    file.write_text(toml.replace("%", str(folder)))
    assert main(["serve", "-c", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.removesuffix("\n")
    assert line.startswith("gollama-proxy: ")
    assert line.isprintable(), "one line"
    assert "canary" not in line
    return line.removeprefix("gollama-proxy: ").replace(str(folder), "%")


MISTAKES: dict[str, tuple[str, str]] = {
    # TOML                                      the start of the line
    "not TOML": ("[server", "%/gollama.toml: not valid TOML"),
    "an unknown section": ("[sever]\n", "sever: no such setting"),
    "an unknown key": ("[server]\nprot = 1\n", "server.prot: no such setting"),
    "a section that is a value": ("server = 1\n", "server = 1: must be a table"),
    "a port too high": ("server.port = 65536", "server.port = 65536"),
    "a port that is a word": ("server.port = 'http'", "server.port = 'http'"),
    "a host that is a number": ("server.host = 1", "server.host = 1"),
    "a flag that is a word": ("server.insecure_bind = 'x'", "server.insecure_bind"),
    "an open address without authentication": (
        "server.host = '0.0.0.0'\nauth.mode = 'off'",
        "server.host = '0.0.0.0'",
    ),
    "any origin": ("server.cors_origins = ['*']", "server.cors_origins = ['*']"),
    "the null origin": ("server.cors_origins = ['null']", "server.cors_origins"),
    "an origin with a path": (
        "server.cors_origins = ['http://a/']",
        "server.cors_origins = ['http://a/']",
    ),
    "an origin without a scheme": (
        "server.cors_origins = ['localhost:3000']",
        "server.cors_origins",
    ),
    "an origin at port 0": (
        "server.cors_origins = ['http://a:0']",
        "server.cors_origins",
    ),
    "a negative time": ("server.drain = -1", "server.drain = -1"),
    "a time that is not a number": ("timeouts.connect = nan", "timeouts.connect = nan"),
    "a time with a unit": ("timeouts.gap = '30s'", "timeouts.gap = '30s'"),
    "a size with a wrong unit": ("limits.body = '1MB'", "limits.body = '1MB'"),
    "a size too small": ("limits.head = 1", "limits.head = 1"),
    "a count with a fraction": ("queue.size = 1.5", "queue.size = 1.5"),
    "a rate beyond 1": ("breaker.failure_rate = 2", "breaker.failure_rate = 2"),
    "an unknown policy": ("routing.policy = 'x'", "routing.policy = 'x'"),
    "an unknown level": ("log.level = 'x'", "log.level = 'x'"),
    "an unknown path": ("retry.once = ['/x']", "retry.once = ['/x']"),
    "a loop of aliases": ("models.aliases = {a='a'}", "models.aliases"),
    "a fallback to itself": ("models.fallbacks = {a=['a']}", "models.fallbacks"),
    # Authentication
    "an unknown algorithm": ("auth.algorithm = 'none'", "auth.algorithm = 'none'"),
    "an unknown mode": ("auth.mode = 'basic'", "auth.mode = 'basic'"),
    "a leeway too long": ("auth.leeway = 3600", "auth.leeway = 3600"),
    "a negative lifetime": ("auth.max_lifetime = -1", "auth.max_lifetime = -1"),
    "a lifetime too long": ("auth.max_lifetime = 1e12", "auth.max_lifetime"),
    "no public key": ("auth.algorithm = 'ES256'", "auth.public_key_file = ''"),
    "a missing public key": (
        "auth.algorithm = 'ES256'\nauth.public_key_file = '%/none'",
        "auth.public_key_file = '%/none': cannot be read",
    ),
    "a file without a public key": (
        "auth.algorithm = 'ES256'\nauth.public_key_file = '%/nothing.pem'",
        "auth.public_key_file = '%/nothing.pem': holds no PEM block",
    ),
    "a public key of another algorithm": (
        "auth.algorithm = 'ES256'\nauth.public_key_file = '%/public.pem'",
        "auth.public_key_file = '%/public.pem': holds a key that is not ES256",
    ),
    "a public key for HS256": (
        "auth.public_key_file = '%/public.pem'",
        "auth.public_key_file = '%/public.pem': HS256 uses a secret",
    ),
    "a missing revocation list": (
        "auth.revoked = '%/none'",
        "auth.revoked = '%/none': cannot be read",
    ),
    "a revocation list that is a folder": (
        "auth.revoked = '%'",
        "auth.revoked = '%': cannot be read: Is a directory",
    ),
    "a malformed revocation list": (
        "auth.revoked = '%/nonsense'",
        "auth.revoked = '%/nonsense': line 2 must be jti: or sub:",
    ),
    "a binary revocation list": (
        "auth.revoked = '%/binary'",
        "auth.revoked = '%/binary': cannot be read: not UTF-8 text",
    ),
    "the secret twice": (
        "auth.secret_file = '%/secret'",
        "auth.secret_file = '%/secret': must not be set beside GOLLAMA_JWT_SECRET",
    ),
    # Workers
    "a worker without a URL": ("[[workers]]\nname = 'a'", "workers[0].url = ''"),
    "workers that are strings": ("workers = ['http://a']", "workers = ['http://a']"),
    "an unknown key of a worker": (
        WORKER + "slot = 1",
        "workers[0].slot: no such setting",
    ),
    "a worker twice": (WORKER * 2, "workers[1].url = 'http://10.0.0.11:8080'"),
    "a worker with a password": (
        "[[workers]]\nurl = 'http://me:canary@a'",
        "workers[0].url = 'http://...@a'",
    ),
    "a worker at a metadata service": (
        "[[workers]]\nurl = 'http://2852039166/'",
        "workers[0].url = 'http://2852039166/': the host is a cloud's metadata",
    ),
    "a worker at an impossible address": (
        "[[workers]]\nurl = 'http://0.0.0.0:8080'",
        "workers[0].url = 'http://0.0.0.0:8080': the host is not the address",
    ),
    "a worker with a file URL": ("[[workers]]\nurl = 'file:///etc'", "workers[0].url"),
    "a worker with a query": (
        "[[workers]]\nurl = 'http://a/?x=1'",
        "workers[0].url = 'http://a/?x=1'",
    ),
    "an API key that is not set": (
        WORKER + "api_key_env = 'NOT_SET'",
        "workers[0].api_key_env = 'NOT_SET'",
    ),
    "two API keys of a worker": (
        WORKER + "api_key_env = 'DESK_KEY'\napi_key_file = '%/key'",
        "workers[0]: api_key_env or api_key_file, not both",
    ),
    "a missing API key file": (
        WORKER + "api_key_file = '%/none'",
        "workers[0].api_key_file = '%/none': cannot be read",
    ),
    "a name that no path has": (
        WORKER + "name = '..'",
        "workers[0].name = '..': must have at most 200 characters, and not be . or ..",
    ),
    "a name that is too long": (
        WORKER + f"name = '{'n' * 201}'",
        "workers[0].name = 'nnn",
    ),
    "an API key file open to all users": (
        WORKER + "api_key_file = '%/openkey'",
        "workers[0].api_key_file = '%/openkey': other users have access (mode 0644)",
    ),
    "an API key of two words": (
        WORKER + "api_key_file = '%/words'",
        "workers[0].api_key_file = '%/words': holds no usable key",
    ),
    "a binary API key": (
        WORKER + "api_key_file = '%/binary'",
        "workers[0].api_key_file = '%/binary': holds no usable key",
    ),
    "an API key file too large": (
        WORKER + "api_key_file = '%/huge'",
        "workers[0].api_key_file = '%/huge': must not be larger than 65536 bytes",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_file(name: str, folder: Path, capsys: Output) -> None:
    toml, begins = MISTAKES[name]
    assert refusal(toml, folder, capsys).startswith(begins)


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("none", "cannot be read: No such file"),
        (
            "open",
            "other users have access (mode 0604); must be for its owner only",
        ),
        ("writable", "other users have access (mode 0602)"),
        ("short", "has 12 bytes; HS256 needs at least 32"),
        ("three", "has 3 words; must hold the secret"),
        ("empty", "has 0 words; must hold the secret"),
        ("huge", "must not be larger than 65536 bytes"),
    ],
)
def test_a_wrong_secret_file(
    name: str, begins: str, folder: Path, environ: dict[str, str], capsys: Output
) -> None:
    del environ["GOLLAMA_JWT_SECRET"]
    line = refusal(f"auth.secret_file = '%/{name}'", folder, capsys)
    assert line.startswith(f"auth.secret_file = '%/{name}': {begins}")


def test_a_secret_file_for_an_algorithm_with_keys(
    folder: Path, environ: dict[str, str], capsys: Output
) -> None:
    del environ["GOLLAMA_JWT_SECRET"]
    toml = "auth = {algorithm='ES256', public_key_file='%/public.pem', "
    line = refusal(toml + "secret_file='%/secret'}", folder, capsys)
    assert line.startswith(
        "auth.secret_file = '%/secret': ES256 uses a key, not a secret"
    )


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({"GOLLAMA_JWT_SECRET": ""}, "GOLLAMA_JWT_SECRET: is not set"),
        ({"GOLLAMA_JWT_SECRET": "canary"}, "GOLLAMA_JWT_SECRET: has 6 bytes"),
        ({"GOLLAMA_JWT_SECRET": "ä" * 15}, "GOLLAMA_JWT_SECRET: has 30 bytes"),
        ({"GOLLAMA_JWT_SECRET_PREVIOUS": "canary"}, "GOLLAMA_JWT_SECRET_PREVIOUS: has"),
        ({"GOLLAMA_JWT_SECRT": "canary"}, "GOLLAMA_JWT_SECRT: no such environment"),
        ({"GOLLAMA_SERVER_PORT": "x"}, "server.port (GOLLAMA_SERVER_PORT) = 'x'"),
        ({"GOLLAMA_SERVER_PROT": "1"}, "GOLLAMA_SERVER_PROT: no such environment"),
        ({"GOLLAMA_WORKERS": "http://[fe80::1]"}, "workers[0].url = 'http://[fe80::1]"),
        ({"GOLLAMA_WORKERS": "http://a, b"}, "workers[1].url = 'b'"),
        ({"GOLLAMA_WORKERS": "http://me:canary@a"}, "workers[0].url = 'http://...@a'"),
        ({"GOLLAMA_AUTH_REVOKED": "/none"}, "auth.revoked = '/none': cannot be read"),
        ({"GOLLAMA_AUTH_MAX_LIFETIME": "1y"}, "auth.max_lifetime (GOLLAMA_AUTH_MAX_"),
    ],
)
def test_a_mistake_in_the_environment(
    variables: Mapping[str, str],
    begins: str,
    folder: Path,
    environ: dict[str, str],
    capsys: Output,
) -> None:
    environ |= variables
    assert refusal("", folder, capsys).startswith(begins)


def test_a_process_with_wrong_settings_ends_with_status_2(
    folder: Path, environ: dict[str, str]
) -> None:
    """Before it listens: otherwise it would report the address that is in use."""
    file = folder / "gollama.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file.write_text(f"server.port = {port}\n{WORKER}api_key_file = '{folder}/open'")
        done = subprocess.run(
            [sys.executable, "-m", "gollama_proxy", "serve", "-c", str(file)],
            env=environ,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE,
        )
    assert done.returncode == 2
    assert done.stdout == ""
    expected = rf"gollama-proxy: workers\[0\]\.api_key_file = '{folder}/open': .*600\n"
    assert re.fullmatch(expected, done.stderr)
    assert stat.S_IMODE((folder / "open").stat().st_mode) == 0o604, "and unchanged"


def test_check_finds_a_key_of_another_algorithm(folder: Path, capsys: Output) -> None:
    """As `serve` does, where the hub finds it."""
    file = folder / "gollama.toml"
    file.write_text(
        f"[auth]\nalgorithm = 'ES256'\npublic_key_file = '{folder}/public.pem'\n"
    )
    assert main(["check", "-c", str(file)]) == 2
    assert "holds a key that is not ES256" in capsys.readouterr().err


# --- Several mistakes -------------------------------------------------------------


def test_all_mistakes_are_reported_together(folder: Path, capsys: Output) -> None:
    """Each in one line, without those that only follow from another."""
    file = folder / "gollama.toml"
    file.write_text(
        f"""
[sever]
[server]
port = 70000
prot = 1
hots = 2
[auth]
algorithm = "RS512"
public_key_file = "{folder}/public.pem"
[queue]
size = -1
[models]
aliases = {{ a = "b", b = "a" }}
[[workers]]
url = "ftp://10.0.0.1"
slots = 0
[[workers]]
url = "http://10.0.0.2"
api_key_env = "MAC_KEY"
client_key = "x"
[[workers]]
uri = "http://10.0.0.3"
"""
    )
    for command in ("check", "serve"):
        assert main([command, "-c", str(file)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert [line.split(" = ")[0].split(": ")[1] for line in lines] == [
            "sever",
            "server.prot",
            "server.hots",
            "server.port",
            "auth.algorithm",
            "queue.size",
            "workers[0].slots",
            "workers[0].url",
            "workers[1].api_key_env",
            "workers[1].client_key",
            "workers[2].uri",
            "models.aliases",
        ]
        assert all(line.startswith("gollama-proxy: ") for line in lines)
        assert "'MAC_KEY': is not set" in captured.err


def test_mistakes_in_the_environment_and_in_the_file_are_reported_together(
    folder: Path, environ: dict[str, str], capsys: Output
) -> None:
    file = folder / "gollama.toml"
    file.write_text("queue.size = -1")
    environ |= {"GOLLAMA_HEALTH_FALL": "x", "GOLLAMA_HEALTH_RAISE": "1"}
    assert main(["check", "-c", str(file)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 3
    for key in ("queue.size", "health.fall", "GOLLAMA_HEALTH_RAISE"):
        assert f"gollama-proxy: {key}" in errors


@pytest.mark.parametrize("value", ["", None])
def test_an_api_key_variable_that_is_unset_or_empty(
    value: str | None, folder: Path, environ: dict[str, str], capsys: Output
) -> None:
    if value is not None:
        environ["MAC_KEY"] = value
    line = refusal(WORKER + "api_key_env = 'MAC_KEY'", folder, capsys)
    assert line.startswith("workers[0].api_key_env = 'MAC_KEY': is not set")
