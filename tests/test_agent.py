"""What an agent decides, and the mistakes on its command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gollama_proxy import registration
from gollama_proxy.children import Restarts
from gollama_proxy.cli import main
from gollama_proxy.registration import Answer, Refusal, Schedule

LATEST = max  # of a range of waits

# --- Answers of hubs --------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (200, "", Refusal.NONE),
        (201, "", Refusal.NONE),
        (0, "", Refusal.PASSING),
        (429, "rate_limit_exceeded", Refusal.PASSING),
        (500, "", Refusal.PASSING),
        (503, "hub_draining", Refusal.PASSING),
        (409, "conflict", Refusal.PATIENT),
        (403, "address_refused", Refusal.PATIENT),
        (403, "insufficient_scope", Refusal.LASTING),
        (401, "invalid_api_key", Refusal.LASTING),
        (400, "invalid_value", Refusal.LASTING),
        (404, "unknown_url", Refusal.LASTING),
        (301, "", Refusal.LASTING),
    ],
)
def test_what_an_answer_means(status: int, code: str, expected: Refusal) -> None:
    assert Answer(status, "", {"code": code}).refusal is expected


def test_a_lease_is_renewed_three_times_in_its_life() -> None:
    schedule = Schedule(LATEST)
    assert schedule.after(Answer(200, "", {"lease": 30})) == 10
    for lease in (None, "x", 0, -1, 1e9, float("nan"), True):
        assert 0 < schedule.after(Answer(200, "", {"lease": lease})) <= 10


def test_a_hub_that_is_away_is_tried_less_and_less_often() -> None:
    schedule, away = Schedule(LATEST), Answer(0)
    waits = [schedule.after(away) for _ in range(7)]
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    schedule.after(Answer(200))
    assert schedule.after(away) == 1
    early = Schedule(min)
    assert [early.after(away) for _ in range(3)] == [0.5, 1, 2]


def test_a_refusal_is_tried_again_slowly() -> None:
    schedule = Schedule(LATEST)
    assert schedule.after(Answer(409)) == Schedule.SLOW
    assert schedule.after(Answer(401)) == Schedule.LASTING


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (401, b'{"error": {"message": "No\\n token."}}', "No token."),
        (404, b"<html>", "answered 404; is it a hub?"),
        (200, b"[]", "answered 200; is it a hub?"),
        (500, b'{"error": 3}', "answered 500"),
        (500, b'{"error": {"message": null}}', "answered 500"),
    ],
)
def test_an_error_is_one_line(status: int, body: bytes, text: str) -> None:
    assert registration.read_answer(status, body).text == text


def test_a_server_that_ends_at_once_is_started_less_and_less_often() -> None:
    restarts = Restarts()
    assert [restarts.after(0.1) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert restarts.after(60) == 1
    assert restarts.after(0.1) == 2


# --- The command line -------------------------------------------------------------

HUB = ["--hub", "http://127.0.0.1:1"]
WORKER = ["--worker", "http://127.0.0.1:2"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--hub: is missing"),
        (HUB, "--worker, --exec: must be given"),
        ([*HUB, *WORKER, "--exec", "--", "true"], "only one of them"),
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
        ([*HUB, *WORKER, "--discover"], "--hub: only one of them"),
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
