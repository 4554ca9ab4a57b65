"""Every mistake is reported in one line that states what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config.keys import MAX_REVOKED_FILE, read_revoked
from gollama_proxy.config.load import load, require_keys
from gollama_proxy.config.settings import Config, Origin, Revoked, settings
from gollama_proxy.config.values import ConfigError

SECRET = "s" * 32
EXAMPLE = Path(__file__).parents[2] / "examples" / "gollama.toml"
PEM = "-----BEGIN PUBLIC KEY-----\nMCow{}\n-----END PUBLIC KEY-----\n"


def private(file: Path, content: str | bytes) -> Path:
    """Write a file that only its owner can read."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    file.chmod(0o600)
    return file


def refusal(
    toml: str | bytes | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    workers: Sequence[str] = (),
    *,
    folder: Path,
) -> str:
    """Load settings with a mistake, and return the line that reports it."""
    file = None
    if toml is not None:
        file = folder / "gollama.toml"
        file.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    with pytest.raises(ConfigError) as caught:
        load(file, environ, flags, workers)
    text = str(caught.value)
    assert all(line.isprintable() for line in text.split("\n"))
    return text


# --- Mistakes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "key", "allowed"),
    [
        ("server.port = 70000", "server.port = 70000", "from 0 to 65,535"),
        ("server.port = '80a'", "server.port = '80a'", "a whole number"),
        ("server.port = true", "server.port = True", "a whole number"),
        ("server.port = 80.5", "server.port = 80.5", "a whole number"),
        ("server.port = [80]", "server.port = [80]", "a whole number"),
        ("server.host = 7", "server.host = 7", "text on one line"),
        ('server.host = "a\\nb"', "server.host = 'a\\nb'", "text on one line"),
        ('server.host = "[::1]"', "server.host = '[::1]'", "without brackets"),
        ("server.insecure_bind = 1", "server.insecure_bind = 1", "true or false"),
        ("server.drain = -1", "server.drain = -1", "seconds from 0 to 86,400"),
        ("server.drain = nan", "server.drain = nan", "seconds from 0 to 86,400"),
        ("server.keepalive = 0", "server.keepalive = 0", "seconds from 1"),
        ("server.cors_origins = ['*']", "cors_origins = ['*']", "origins such as"),
        ("auth.mode = 'none'", "auth.mode = 'none'", "one of jwt, off"),
        ("auth.algorithm = 'none'", "auth.algorithm = 'none'", "HS256, RS256, ES256"),
        ("auth.leeway = 301", "auth.leeway = 301", "from 0 to 300"),
        ("limits.head = 10", "limits.head = 10", "at least 1024"),
        ("limits.body = '64MB'", "limits.body = '64MB'", "such as 64MiB"),
        ("limits.body = 1.5", "limits.body = 1.5", "such as 64MiB"),
        ("timeouts.connect = 0", "timeouts.connect = 0", "from 0.01"),
        ("health.interval = '1m'", "health.interval = '1m'", "a number of seconds"),
        ("health.fall = 0", "health.fall = 0", "a whole number from 1 to 100"),
        ("health.fall = 1979-05-27", "health.fall = ", "a whole number from 1 to 100"),
        ("models.aliases = ['a']", "models.aliases = ['a']", "a table such as"),
        ("models.aliases.gpt = 3", "models.aliases = {'gpt': 3}", "a table such as"),
        ("models.fallbacks = ['a']", "models.fallbacks = ['a']", "table of lists"),
        ("models.fallbacks.big = 7", "fallbacks = {'big': 7}", "table of lists"),
        ("models.fallbacks.big = []", "fallbacks = {'big': []}", "table of lists"),
        ("models.fallbacks.big = ['big']", "{'big': ['big']}", "of other names"),
        ("models.fallbacks.a = ['b', 'b']", "{'a': ['b', 'b']}", "of other names"),
        ("models.fallbacks.a = [7]", "fallbacks = {'a': [7]}", "table of lists"),
        ("upstream.assemble = true", "upstream.assemble = True", "a list, of /v1/chat"),
        (
            "upstream.assemble = ['/v1/embeddings']",
            "upstream.assemble = ['/v1/embeddings']",
            "a list, of /v1/chat/completions",
        ),
        ("retry.once = ['/v1/nothing']", "retry.once = ['/v1/nothing']", "POST paths"),
        ("retry.once = [['/v1/rerank']]", "retry.once = [['/v1", "POST paths"),
        ("rescue.attempts = 0", "rescue.attempts = 0", "from 1 to 100"),
        ("breaker.canary = 'maybe'", "breaker.canary = 'maybe'", "true or false"),
        (
            "models.aliases = { a = 'a' }",
            "models.aliases = 'a' -> 'a': must not be a loop",
            "stands for the name of a model",
        ),
        (
            "models.aliases = { x = 'a', a = 'b', b = 'a' }",
            "models.aliases = 'x' -> 'a' -> 'b' -> 'a': must not be a loop",
            "stands for the name of a model",
        ),
        (
            "models.aliases = { gpt = 'big', big = 'qwen', other = 'qwen' }",
            "models.aliases = 'gpt' -> 'big' -> 'qwen': must be one step",
            "let 'gpt' stand for 'qwen'",
        ),
        (
            'models.aliases = { a = "b\\nc", "b\\nc" = "d" }',
            r"models.aliases = 'a' -> 'b\nc' -> 'd': must be one step",
            "let 'a' stand for 'd'",
        ),
        (
            "[models.aliases]\n"
            + "\n".join(f"name{n:02} = 'name{n + 1:02}'" for n in range(50)),
            "models.aliases = 'name00' -> 'name01' ->",
            "...: must be one step; let 'name00' stand for 'name50'",
        ),
        (
            "models.aliases = { 'a*' = 'b1', 'b*' = 'a1' }",
            "models.aliases = 'a*' -> 'b1' -> 'a1' -> 'b1': must not be a loop",
            "stands for the name of a model",
        ),
        (
            "models.aliases = { 'gpt-*' = 'llama-3', 'llama-*' = 'qwen' }",
            "models.aliases = 'gpt-*' -> 'llama-3' -> 'qwen': must be one step",
            "let 'gpt-*' stand for 'qwen'",
        ),
        ("queue.size = -1", "queue.size = -1", "a whole number from 0 to 10,000"),
        ("queue.timeout = 0", "queue.timeout = 0", "seconds from 0.01"),
        ("queue.notice = true", "queue.notice = True", "seconds from 0 to 86,400"),
        ("queue.max_concurrency = 1.5", "queue.max_concurrency = 1.5", "whole number"),
        (
            "routing.policy = 'magic'",
            "routing.policy = 'magic'",
            "one of round_robin, ",
        ),
        ("log.level = 'loud'", "log.level = 'loud'", "debug, info, warning, error"),
        ("log.format = 'xml'", "log.format = 'xml'", "one of text, json"),
        (f"log.level = '{'x' * 99}'", "log.level = 'xxx", "...: must be one of"),
        ("server = 5", "server = 5", "must be a table, [server]"),
        ("server.prot = 1", "server.prot: no such setting", "did you mean port?"),
        ("server.zzz = 1", "server.zzz: no such setting", "known: host, port"),
        ("servr.port = 1", "servr: no such setting", "did you mean server?"),
        ("worker = []", "worker: no such setting", "did you mean workers?"),
        ('"a\\nb" = 1', "'a\\nb': no such setting", "known: server"),
        ("workers = 'http://a'", "workers = 'http://a'", "tables, [[workers]]"),
        ("workers = ['http://a']", "workers = ['http://a']", "tables, [[workers]]"),
        ("[[workers]]\nurl = 1", "workers[0].url = 1", "text on one line"),
        *(
            (
                f"[[workers]]\nurl = 'http://a'\nmodels = {models}",
                f"workers[0].models = {shown}",
                'a list of model names such as ["qwen*"]',
            )
            for models, shown in [
                ("'qwen*'", "'qwen*'"),
                ("[]", "[]"),
                ("['']", "['']"),
                ("['a', ' ']", "['a', ' ']"),
                ("['a', 7]", "['a', 7]"),
                ('["a\\nb"]', r"['a\nb']"),
                ("{ a = 'b' }", "{'a': 'b'}"),
            ]
        ),
        (
            "[[workers]]\nurl = 'http://a'\nweight = -1",
            "workers[0].weight = -1",
            "from 0.01 to 10,000",
        ),
        (
            "[[workers]]\nurl = 'http://a'\nweight = 0",
            "workers[0].weight = 0",
            "from 0.01 to 10,000",
        ),
        (
            "[[workers]]\nurl = 'http://a'\nweight = nan",
            "workers[0].weight = nan",
            "a number from 0.01",
        ),
        (
            "[[workers]]\nurl = 'http://a'\nweight = true",
            "workers[0].weight = True",
            "a number from",
        ),
        (
            "[[workers]]\nurl = 'http://a'\ncontext = 0",
            "workers[0].context = 0",
            "a whole number from 1 to 100,000,000",
        ),
        (
            "[[workers]]\nurl = 'http://a'\nvram_gib = 0",
            "workers[0].vram_gib = 0",
            "from 0.01",
        ),
        (
            "[[workers]]\nurl = 'http://a'\nvram_gib = '24G'",
            "workers[0].vram_gib = '24G'",
            "a number",
        ),
        (
            "[[workers]]\nurl = 'http://a'\nslots = 0",
            "workers[0].slots = 0",
            "whole number from 1",
        ),
        (
            "[[workers]]\nurl = 'http://a'\nslots = 1.5",
            "workers[0].slots = 1.5",
            "whole number from 1",
        ),
        ("[[workers]]\nslot = 1", "workers[0].slot: no such", "did you mean slots?"),
        ("[[workers]]\nname = 'a'", "workers[0].url = ''", "expected http://host:port"),
        ("[[workers]]\nuri = 'a'", "workers[0].uri: no such", "did you mean url?"),
        (
            "[[workers]]\nurl = 'http://a'\n[[workers]]\nurl = 'HTTP://A:80/v1/'",
            "workers[1].url = 'HTTP://A:80/v1/': the same worker as 'http://a'",
            "named once",
        ),
        (
            "[[workers]]\nurl='http://a'\nname='b:80'\n[[workers]]\nurl='http://b:80'",
            "workers[1].name = 'b:80': taken by 'http://a'",
            "a different name",
        ),
        (
            "[[workers]]\nurl = 'http://a'\napi_key_env = 'K'\napi_key_file = 'k'",
            "workers[0]: api_key_env or api_key_file",
            "not both",
        ),
        (
            "[[workers]]\nurl = 'http://a'\napi_key_env = 'NOT_SET'",
            "workers[0].api_key_env = 'NOT_SET'",
            "is not set; must be an environment variable",
        ),
        (
            "[[workers]]\nurl = 'http://a'\napi_key_file = '/nowhere/key'",
            "workers[0].api_key_file = '/nowhere/key'",
            "cannot be read: No such file",
        ),
        ("port = ?", "gollama.toml: not valid TOML", "line 1"),
        (b"\xff = 1", "gollama.toml: not UTF-8", "TOML"),
    ],
)
def test_a_wrong_file(
    toml: str | bytes, key: str, allowed: str, tmp_path: Path
) -> None:
    text = refusal(toml, folder=tmp_path)
    assert key in text
    assert allowed in text


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("environ", "key", "allowed"),
    [
        (
            {"GOLLAMA_SERVER_PORT": "x"},
            "server.port (GOLLAMA_SERVER_PORT) = 'x'",
            "from 0 to 65,535",
        ),
        ({"GOLLAMA_LOG_ACCESS": "perhaps"}, "GOLLAMA_LOG_ACCESS", "true or false"),
        ({"GOLLAMA_LOG_LEVEL": "\udcff"}, "GOLLAMA_LOG_LEVEL", "one of debug"),
        ({"GOLLAMA_AUTH_ISSUER": "\udcff"}, "'\\udcff'", "text on one line"),
        ({"GOLLAMA_MODELS_FALLBACKS": "big=big"}, "= 'big=big'", "of other names"),
        ({"GOLLAMA_MODELS_FALLBACKS": "big"}, "FALLBACKS) = 'big'", "table of lists"),
        ({"GOLLAMA_UPSTREAM_ASSEMBLE": "true"}, "_ASSEMBLE) = 'true'", "a list, of"),
        ({"GOLLAMA_RETRY_ONCE": "/v1/rerank, /x"}, "/v1/rerank, /x", "POST paths"),
        ({"GOLLAMA_SERVER_PROT": "1"}, "_PROT: no such", "GOLLAMA_SERVER_PORT?"),
        ({"GOLLAMA_SERVR_PORT": "1"}, "_SERVR_PORT: no such", "GOLLAMA_SERVER_PORT?"),
        ({"GOLLAMA_WORKER": "http://a"}, "GOLLAMA_WORKER: ", "GOLLAMA_WORKERS?"),
        ({"GOLLAMA_JWT_SECRT": SECRET}, "_SECRT: ", "GOLLAMA_JWT_SECRET?"),
        ({"GOLLAMA_LOG_X" + "Y" * 60: "1"}, "YYY: no such", "environment variable"),
        (
            {"GOLLAMA_WORKERS": "http://a,ftp://b"},
            "workers[1].url = 'ftp://b'",
            "http or https",
        ),
        ({"GOLLAMA_JWT_SECRET": "s" * 31}, "GOLLAMA_JWT_SECRET: ", "at least 32"),
        (
            {"GOLLAMA_JWT_SECRET": SECRET, "GOLLAMA_JWT_SECRET_PREVIOUS": "short"},
            "GOLLAMA_JWT_SECRET_PREVIOUS: has 5 bytes",
            "at least 32",
        ),
        (
            {"GOLLAMA_AUTH_ALGORITHM": "RS256"},
            "auth.public_key_file = ''",
            "RS256 needs a PEM file",
        ),
        (
            {"GOLLAMA_AUTH_PUBLIC_KEY_FILE": "key.pem"},
            "auth.public_key_file = 'key.pem'",
            "set auth.algorithm to RS256, ES256 or EdDSA",
        ),
        (
            {"GOLLAMA_AUTH_MODE": "off", "GOLLAMA_SERVER_HOST": "0.0.0.0"},
            "server.host = '0.0.0.0'",
            "--insecure-bind",
        ),
    ],
)
def test_a_wrong_environment(
    environ: Mapping[str, str], key: str, allowed: str, tmp_path: Path
) -> None:
    text = refusal(environ=environ, folder=tmp_path)
    assert key in text
    assert allowed in text


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("server.port", "99999", "--port"),
        ("auth.mode", "none", "--auth"),
        ("log.level", "loud", "--log-level"),
        ("server.insecure_bind", "?", "--insecure-bind"),
    ],
)
def test_a_wrong_flag(key: str, value: str, flag: str, tmp_path: Path) -> None:
    text = refusal(flags={key: value}, folder=tmp_path)
    assert text.startswith(f"{key} ({flag}) = {value!r}: must be ")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("10.0.0.11:8080", "scheme"),
        ("localhost:8080", "scheme"),
        ("unix:///run/llama.sock", "scheme"),
        ("http://", "host"),
        ("http:///v1", "host"),
        ("http://a b", "host"),
        ("http://a,b", "host"),
        ("http://münchen", "host"),
        ("http://user@a", "user name or password"),
        ("http://user:hunter2@a", "user name or password"),
        ("http://user:hunter2@a b", "host"),
        ("http://a?key=1", "query"),
        ("http://a/#top", "fragment"),
        ("http://a/?", "query"),
        ("http://a:0", "port 0"),
        ("http://a:99999", "range"),
        ("http://a:http", "number"),
        ("http://::1:8080", "brackets"),
        ("http://[::1", "IPv6"),
        ("http://[not-an-address]", "address"),
        ("http://a/../b", "path"),
        ("http://a/b c", "path"),
        ("http://a\nb", "one line"),
        ("http://169.254.1.2", "link-local"),
        ("http://[fe80::1%eth0]", "link-local"),
        ("http://169.254.169.254/latest", "metadata"),
        ("http://Metadata.Google.Internal./", "metadata"),
        ("http://[fd00:ec2::254]:80", "metadata"),
        ("http://[::ffff:169.254.169.254]", "metadata"),
        ("http://2852039166", "metadata"),
        ("http://0xa9fea9fe", "metadata"),
        ("http://0251.0376.0251.0376", "metadata"),
        ("http://0.0.0.0:8080", "not the address of a machine"),
        ("http://0:8080", "not the address of a machine"),
        ("http://[::]:8080", "not the address of a machine"),
        ("http://224.0.0.1", "multicast"),
        ("http://[ff02::1]", "multicast"),
        ("http://255.255.255.255", "not the address of a machine"),
        ("http://127.1:8080", "must be written 127.0.0.1"),
        ("http://010.0.0.1:8080", "must be written 8.0.0.1"),
        ("http://3232235777", "must be written 192.168.1.1"),
    ],
)
def test_a_wrong_url(url: str, why: str, tmp_path: Path) -> None:
    text = refusal(workers=[url], folder=tmp_path)
    assert text.startswith("workers[0].url = ")
    assert why in text
    assert "expected http://host:port" in text or "one line" in why
    assert "hunter2" not in text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two words"])
def test_a_key_file_without_a_key(content: bytes, tmp_path: Path) -> None:
    file = private(tmp_path / "key", content)
    row = f"[[workers]]\nurl = 'http://a'\napi_key_file = '{file}'"
    text = refusal(row, folder=tmp_path)
    assert text.startswith(f"workers[0].api_key_file = '{file}': holds no usable key")
    assert "two words" not in text


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff", "cannot be read: not text"),
        (b"-----BEGIN PRIVATE KEY-----", "no PEM block BEGIN PUBLIC KEY"),
    ],
)
def test_a_wrong_public_key_file(
    content: bytes | None, why: str, tmp_path: Path
) -> None:
    file = tmp_path / "key.pem"
    if content is not None:
        file.write_bytes(content)
    environ = {
        "GOLLAMA_AUTH_ALGORITHM": "ES256",
        "GOLLAMA_AUTH_PUBLIC_KEY_FILE": str(file),
    }
    text = refusal(environ=environ, folder=tmp_path)
    assert text.startswith(f"auth.public_key_file = '{file}': ")
    assert why in text


# --- Good settings ----------------------------------------------------------------


def test_without_settings_there_are_the_defaults() -> None:
    assert load() == Config()


def test_a_flag_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[server]\nport = 1\ndrain = 1\nkeepalive = 1\n")
    environ = {"GOLLAMA_SERVER_PORT": "2", "GOLLAMA_SERVER_DRAIN": "2"}
    flags = {"server.port": "3", "server.host": None}
    server = load(file, environ, flags).server
    assert (server.port, server.drain, server.keepalive) == (3, 2, 1)
    assert server.host == "127.0.0.1"


def test_fallbacks_of_the_environment_over_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[models.fallbacks]\nbig = ['medium', 'small']\n")
    assert load(file).models.fallbacks == {"big": ("medium", "small")}
    environ = {"GOLLAMA_MODELS_FALLBACKS": "big=medium|small,other=x"}
    expected = {"big": ("medium", "small"), "other": ("x",)}
    assert load(file, environ).models.fallbacks == expected
    assert load(file, {"GOLLAMA_MODELS_FALLBACKS": ""}).models.fallbacks == {}


def test_lists_of_paths(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text(
        "[upstream]\nassemble = ['/v1/completions']\n[retry]\nonce = ['/v1/rerank']\n"
    )
    config = load(file)
    assert config.upstream.assemble == ("/v1/completions",)
    assert config.retry.once == ("/v1/rerank",)
    environ = {
        "GOLLAMA_UPSTREAM_ASSEMBLE": "",
        "GOLLAMA_RETRY_ONCE": "/v1/embeddings, /v1/rerank",
    }
    config = load(file, environ)
    assert config.upstream.assemble == ()
    assert config.retry.once == ("/v1/embeddings", "/v1/rerank")


def test_workers_of_flags_over_the_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[[workers]]\nurl = 'http://file:80'\n")

    def names(environ: Mapping[str, str], flags: Sequence[str] = ()) -> list[str]:
        return [worker.name for worker in load(file, environ, {}, flags).workers]

    assert names({}) == ["file:80"]
    assert names({"GOLLAMA_WORKERS": " "}) == ["file:80"]
    several = {"GOLLAMA_WORKERS": " http://a:80, http://b:80\thttp://c:80,"}
    assert names(several) == ["a:80", "b:80", "c:80"]
    assert names(several, ["https://flag/llm/v1"]) == ["flag:443/llm"]


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://10.0.0.11:8080", Origin("http", "10.0.0.11", 8080, "")),
        ("http://10.0.0.11:8080/v1", Origin("http", "10.0.0.11", 8080, "")),
        ("https://GPU.lan/", Origin("https", "gpu.lan", 443, "")),
        ("http://[::1]:8080/a/b/", Origin("http", "::1", 8080, "/a/b")),
        ("http://[fd00::1%eth0]", Origin("http", "fd00::1%eth0", 0, "")),
        ("http://gpu.lan.:8080", Origin("http", "gpu.lan.", 8080, "")),
        ("http://[::ffff:10.0.0.1]", Origin("http", "::ffff:10.0.0.1", 0, "")),
    ],
)
def test_the_parts_of_a_url(url: str, origin: Origin) -> None:
    (worker,) = load(workers=[url]).workers
    assert worker.origin == origin
    assert worker.url == url
    assert worker.name == origin.authority + origin.prefix


def test_a_worker_key_from_the_environment_or_a_file(tmp_path: Path) -> None:
    private(tmp_path / "key", "from-file\n")
    file = tmp_path / "gollama.toml"
    file.write_text(
        f"""
        [[workers]]
        url = "http://a"
        api_key_env = "GOLLAMA_LOG_KEY"  # resembles a setting, but is not misspelt
        [[workers]]
        url = "http://b"
        name = "attic"
        api_key_file = "{tmp_path / "key"}"
        """
    )
    first, second = load(file, {"GOLLAMA_LOG_KEY": "from-env"}).workers
    assert (first.api_key, second.api_key) == ("from-env", "from-file")
    assert second.name == "attic"


def test_models_that_the_settings_of_a_worker_name(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text(
        """
        [[workers]]
        url = "http://a"
        models = ["qwen*", "C:\\\\models\\\\a, b.gguf"]
        [[workers]]
        url = "http://b"
        """
    )
    first, second = load(file).workers
    assert first.models == ("qwen*", r"C:\models\a, b.gguf")
    assert second.models == ()


def test_several_aliases_of_one_model(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[models.aliases]\na = 'qwen'\nb = 'qwen'\n")
    assert load(file).models.aliases == {"a": "qwen", "b": "qwen"}


def test_a_wildcard_beside_other_aliases(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    table = {"gpt-*": "gpt-oss", "gpt-4o": "gpt-big", "*": "qwen", "fast": "llama"}
    rows = "\n".join(f"'{alias}' = '{model}'" for alias, model in table.items())
    file.write_text(f"[models.aliases]\n{rows}\n")
    assert load(file).models.aliases == table


def test_the_weight_the_memory_and_the_slots_of_a_worker(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text(
        """
        [[workers]]
        url = "http://a"
        [[workers]]
        url = "http://b"
        weight = 2
        vram_gib = 24
        slots = 4
        context = 8192
        """
    )
    plain, other = load(file).workers
    assert (plain.context, other.context) == (None, 8192)
    assert (plain.weight, plain.vram_gib, plain.slots) == (None, None, None)
    assert (other.weight, other.vram_gib, other.slots) == (2.0, 24.0, 4)


def test_every_public_key_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.pem"
    file.write_text("old\n" + PEM.format("A") + "new\n" + PEM.format("B"))
    flags = {"auth.algorithm": "EdDSA", "auth.public_key_file": str(file)}
    config = load(flags=flags)
    assert [key + "\n" for key in config.public_keys] == [
        PEM.format("A"),
        PEM.format("B"),
    ]
    require_keys(config)


def test_the_current_secret_comes_before_the_previous_one() -> None:
    environ = {
        "GOLLAMA_JWT_SECRET_PREVIOUS": "p" * 32,
        "GOLLAMA_JWT_SECRET": "\udcff" * 32,  # bytes that are not text
    }
    config = load(environ=environ)
    assert config.secrets == (b"\xff" * 32, b"p" * 32)
    require_keys(config)


def test_a_file_with_the_current_and_the_previous_secret(tmp_path: Path) -> None:
    file = private(tmp_path / "secrets", b"\xff" * 32 + b"\n")
    environ = {"GOLLAMA_AUTH_SECRET_FILE": str(file)}
    assert load(environ=environ).secrets == (b"\xff" * 32,)
    private(file, f"{SECRET}\r\n{'p' * 32}")
    file.chmod(0o640)  # for the group of a container, for example
    config = load(environ=environ)
    assert config.secrets == (SECRET.encode(), b"p" * 32)
    require_keys(config)


@pytest.mark.parametrize(
    ("content", "tokens", "subjects"),
    [
        ("", (), ()),
        ("\n\n", (), ()),
        ("# jti:a\n  # sub:b\n#\n", (), ()),
        ("jti:a", ("a",), ()),
        ("jti:a\njti:b\nsub:alice\njti:a\n", ("a", "b"), ("alice",)),
        ("  jti: a \r\nsub:\tbob  \r\n", ("a",), ("bob",)),
        ("\ufeffjti:a\n", ("a",), ()),  # as Notepad saves it
        ("sub:https://issuer/alice:1\n", (), ("https://issuer/alice:1",)),
        ("sub:alice # on leave\n", (), ("alice # on leave",)),
        (
            "sub:Zo\u00eb \U0001f600\nsub:a\u2028b\n",
            (),
            ("Zo\u00eb \U0001f600", "a\u2028b"),
        ),
    ],
)
def test_a_revocation_list(
    content: str, tokens: Sequence[str], subjects: Sequence[str], tmp_path: Path
) -> None:
    file = tmp_path / "revoked"
    file.write_bytes(content.encode())
    config = load(environ={"GOLLAMA_AUTH_REVOKED": str(file)})
    assert config.revoked == Revoked(frozenset(tokens), frozenset(subjects))
    assert config.revoked == read_revoked(str(file))
    assert not any(name in repr(config) for name in subjects)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("jti", 1),
        ("jti:", 1),
        ("sub: \n", 1),
        (":a", 1),
        ("\n# x\nJTI:a", 3),
        ("jti :a", 1),
        ("alice", 1),
        ("jti:a sub:b\niss:x", 2),
        ("eyJhbGciOiJIUzI1NiJ9.hunter2.x", 1),
    ],
)
def test_a_malformed_revocation_list(content: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "revoked").write_text(content)
    environ = {"GOLLAMA_AUTH_REVOKED": str(tmp_path / "revoked")}
    text = refusal(environ=environ, folder=tmp_path)
    assert f"revoked': line {line} must be jti: or sub: and what" in text
    assert "hunter2" not in text


def test_the_size_of_a_revocation_list_is_limited(tmp_path: Path) -> None:
    longest = "jti:a\n" + "#" * (MAX_REVOKED_FILE - 6)
    file = tmp_path / "revoked"
    file.write_text(longest)
    assert read_revoked(str(file)) == Revoked(frozenset({"a"}))
    file.write_text(longest + "#")
    with pytest.raises(ConfigError, match="must not be larger than 16777216 bytes"):
        read_revoked(str(file))


def test_secrets_are_hidden(tmp_path: Path) -> None:
    private(tmp_path / "key", "hunter2-key")
    file = tmp_path / "gollama.toml"
    file.write_text(f'[[workers]]\nurl = "http://a"\napi_key_file = "{tmp_path}/key"')
    config = load(file, {"GOLLAMA_JWT_SECRET": "hunter2" * 5})
    config = replace(config, public_keys=("hunter2",))
    assert "hunter2" not in repr(config) + str(config)


def test_other_variables_of_a_service_called_gollama() -> None:
    environ = {
        "GOLLAMA_SERVICE_HOST": "10.96.0.1",
        "GOLLAMA_PORT_8000_TCP": "tcp://10.96.0.1:8000",
        "GOLLAMA": "1",
        "LOG_LEVEL": "loud",
    }
    assert load(environ=environ) == Config()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_authentication(host: str) -> None:
    config = load(flags={"auth.mode": "off", "server.host": host})
    require_keys(config)


def test_insecure_bind_allows_any_address_without_authentication() -> None:
    flags = {"auth.mode": "off", "server.host": "::", "server.insecure_bind": True}
    assert load(flags=flags).server.insecure_bind


def test_authentication_needs_a_key() -> None:
    with pytest.raises(ConfigError, match=r"^GOLLAMA_JWT_SECRET: is not set; .* off$"):
        require_keys(load())


# --- The example ------------------------------------------------------------------


def test_the_example_is_the_defaults_and_one_worker() -> None:
    config = load(EXAMPLE)
    assert [worker.url for worker in config.workers] == ["http://127.0.0.1:8080"]
    assert replace(config, workers=()) == Config()


def test_the_example_with_each_default_written_out(tmp_path: Path) -> None:
    lines = [re.sub(r"^#(?=\w)", "", each) for each in EXAMPLE.read_text().split("\n")]
    file = tmp_path / "gollama.toml"
    file.write_text("\n".join(lines))
    assert replace(load(file), workers=()) == Config()
    given = re.findall(r"^\[(\w+)\]$|^(\w+) = ", "\n".join(lines), re.MULTILINE)
    sections = [section for section, _ in given if section]
    assert sections == list(dict.fromkeys(r.key.split(".")[0] for r in settings()))
    names = [name for _, name in given[given.index(("server", "")) :] if name]
    assert names == [row.key.split(".")[1] for row in settings()]


def test_the_example_explains_each_setting() -> None:
    text = EXAMPLE.read_text()
    for row in settings():
        assert f"# {row.help}\n# ({row.env}, {row.allowed})\n#" in text, row.key


def test_the_suggestions_in_the_example_are_valid(tmp_path: Path) -> None:
    """Remove the "# " from the other worker and from the aliases."""
    text = EXAMPLE.read_text()
    start = text.index("# [[workers]]")
    end = text.index("[server]")
    workers = re.sub("^# ", "", text[start:end], flags=re.MULTILINE)
    start = text.index("# [models.aliases]")
    end = text.index("[log]")
    aliases = re.sub("^# ", "", text[start:end], flags=re.MULTILINE)
    file = tmp_path / "gollama.toml"
    file.write_text(workers + aliases)
    config = load(file, {"ATTIC_API_KEY": "k"})
    assert [worker.name for worker in config.workers] == ["attic"]
    assert config.workers[0].api_key == "k"
    assert config.workers[0].weight == 2.5
    assert "gpt-4o-mini" in config.models.aliases
    assert all(config.models.fallbacks.values())
    assert config.models.fallbacks
