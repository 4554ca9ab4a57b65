"""The mistakes on the command line of an agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from gollama_proxy.cli import main

# --- The command line -------------------------------------------------------------

HUB = ["--hub", "http://127.0.0.1:1"]
WORKER = ["--worker", "http://127.0.0.1:2"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--hub: is missing"),
        (HUB, "--worker: is missing; give --worker URL or --exec"),
        ([*HUB, *WORKER, "--exec", "--", "true"], "together with --exec"),
        ([*HUB, "--exec"], "--exec: needs a command after --"),
        ([*HUB, *WORKER, "--", "true"], "--exec: needs --exec before --"),
        (
            [*HUB, "--exec", "--", "no-such-program"],
            "'no-such-program': must be an exec",
        ),
        (["--hub", "gateway:8000", *WORKER], "--hub = 'gateway:8000': must be a URL"),
        (
            ["--hub", "http://a:b@c", *WORKER],
            "--hub = 'http://...@c': must be a URL with",
        ),
        (["--hub", "http://c:x", *WORKER], "--hub = 'http://c:x': "),
        (["--hub", "http://c:0", *WORKER], "port 0"),
        ([*HUB, "--worker", "ftp://x"], "--worker = 'ftp://x': must be a URL"),
        ([*HUB, *WORKER, "--name", "a b"], "--name = 'a b': must have"),
        ([*HUB, *WORKER, "--name", "a/b"], "--name = 'a/b': must have"),
        ([*HUB, *WORKER, "--name", ".."], "--name = '..': must have"),
        ([*HUB, *WORKER, "--proof-port", "x"], "--proof-port = 'x': must be a whole"),
        ([*HUB, *WORKER, "--slots", "0"], "--slots = '0': must be a whole number"),
        ([*HUB, *WORKER, "--context", "8k"], "--context = '8k': must be a whole"),
        ([*HUB, *WORKER, "--weight", "0"], "--weight = '0': must be a number"),
        ([*HUB, *WORKER, "--vram-gib", "-1"], "--vram-gib = '-1': must be a number"),
        ([*HUB, *WORKER, "--sleep-after", "30"], "--sleep-after = '30': must be a"),
        ([*HUB, *WORKER, "--sleep-after", "31d"], "from 1s to 30d"),
        ([*HUB, *WORKER, "--mac", "x"], "--mac = 'x': must be a hardware address"),
        (
            [*HUB, *WORKER, "--discover"],
            "--hub: cannot be given together with --discover",
        ),
        (
            [*HUB, *WORKER, "--log-level", "loud"],
            "--log-level = 'loud': must be one of",
        ),
        (
            [*HUB, *WORKER, "--token-file", "/nowhere"],
            "--token-file = '/nowhere': cannot",
        ),
        (
            ["--hub", "https://x", *WORKER, "--ca-file", "/nowhere"],
            "--ca-file = '/nowhere': cannot be read: No such file",
        ),
        ([*HUB, *WORKER, "--ca-file", "/x"], "--ca-file = '/x': is for a hub with an"),
        ([*HUB, *WORKER, "--drain", "3"], "--drain 3: not a flag"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["agent", *arguments]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("gollama-proxy: ")
    assert written.err.count("\n") == 1
    assert reason in written.err


@pytest.mark.parametrize("content", ["", "two words", "täken"])
def test_a_file_without_a_token(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(0o600)
    assert main(["agent", *HUB, *WORKER, "--token-file", str(file)]) == 2
    written = capsys.readouterr().err
    assert "holds no token" in written
    assert not content or content not in written
