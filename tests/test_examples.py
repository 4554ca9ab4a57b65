"""The examples work unchanged, and do what their texts describe."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import re
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from gollama_proxy.config.settings import settings
from tests.fakes import replies
from tests.fakes.hub import NO_RESCUE, running_hub
from tests.fakes.process import Program, bare
from tests.fakes.script import chat_stream, reset, send
from tests.fakes.waiting import gone
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import binary

EXAMPLES = Path(__file__).parent.parent / "examples"


# --- openai_client.py -------------------------------------------------------------


@dataclass
class Ended:
    status: int
    answer: str  # standard output
    details: str  # standard error


Client = Callable[..., Awaitable[Ended]]


@pytest.fixture
def run_client(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Client:
    """Run the client in a thread: a process for each would import `openai` again."""
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    client = load_example("openai_client")

    async def run(url: str, token: str, *more: str) -> Ended:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", token)
        argv = ["openai_client.py", "hello", "--retries", "0", *more]
        monkeypatch.setattr(sys, "argv", argv)
        problem = await asyncio.to_thread(client.main)
        answer, details = capsys.readouterr()
        # As `sys.exit()` does with what `main` returns.
        return Ended(1 if problem else 0, answer, f"{details}{problem or ''}\n")

    return run


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_client_is_a_program() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        environ = {**bare(), "OPENAI_BASE_URL": f"{hub.url}/v1"}
        environ["OPENAI_API_KEY"] = "nonsense"
        program = [str(EXAMPLES / "openai_client.py")]
        async with Program.running("hello", environ=environ, program=program) as it:
            assert await it.ended() == 1, it.output
    assert "does not accept this token (401)" in it.output
    assert "Traceback" not in it.output


async def test_client_streams_an_answer_and_shows_its_worker(
    run_client: Client,
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        ended = await run_client(hub.url, hub.token())
    assert ended.status == 0, ended
    assert ended.answer == " no towu\n"
    assert f"models: {replies.MODEL}" in ended.details
    assert re.search(r"worker: 127\.0\.0\.1:\d+", ended.details), "header was not read"
    assert "20 + 3 tokens" in ended.details
    assert "finish='stop'" in ended.details


async def test_client_reports_an_unknown_model(run_client: Client) -> None:
    async with ScriptedWorker("one", "two") as worker, running_hub(worker) as hub:
        ended = await run_client(hub.url, hub.token(), "--model", "three")
    assert ended.status == 1
    assert "does not know this model or address (404)" in ended.details


async def test_client_reports_when_to_retry_if_no_worker_is_ready(
    run_client: Client,
) -> None:
    async with ScriptedWorker() as worker:
        worker.loading = True
        async with running_hub(worker) as hub:
            ended = await run_client(hub.url, hub.token(), "--model", replies.MODEL)
    assert ended.status == 1
    assert re.search(r"refused \(503\): .* Try again in \d+ s\.", ended.details), ended


async def test_client_reports_an_error_in_mid_stream(run_client: Client) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **NO_RESCUE) as hub:
        head_and_two_tokens = chat_stream([" no", " to"])[:3]
        worker.default(*head_and_two_tokens, reset())
        ended = await run_client(hub.url, hub.token())
    assert ended.status == 1, ended
    assert "The answer broke off" in ended.details


async def test_client_reports_an_answer_without_a_finish_reason(
    run_client: Client,
) -> None:
    body = replies.chunk(replies.role()) + replies.chunk(replies.token(" no"))
    cut = replies.sse_head() + body + replies.last_chunk()
    async with ScriptedWorker() as worker:
        worker.default(send(cut))
        # Without the hub, which would add an error event.
        ended = await run_client(worker.url, "any")
    assert ended.status == 1
    assert ended.answer == " no\n"
    assert "without a finish reason" in ended.details


async def test_client_reports_a_hub_that_cannot_be_reached(run_client: Client) -> None:
    async with ScriptedWorker() as worker:
        url = worker.url
    ended = await run_client(url, "any")
    assert ended.status == 1
    assert f"The hub at {url}/v1 cannot be reached" in ended.details


# --- locustfile.py ----------------------------------------------------------------


@pytest.fixture
def locustfile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the locustfile beside a stand-in for locust.

    The real one is no dependency of ours, and importing it would patch the sockets of
    this whole process.
    """

    class HttpUser:
        pass

    class StopUser(Exception):
        pass

    class RequestException(Exception):
        pass

    fired: list[dict[str, Any]] = []
    request = SimpleNamespace(fire=lambda **meta: fired.append(meta))
    stand_ins = {
        "locust": {
            "HttpUser": HttpUser,
            "between": lambda low, high: (low, high),
            "events": SimpleNamespace(request=request, fired=fired),
            "task": lambda function: function,
        },
        "locust.exception": {"StopUser": StopUser},
        "requests": {},
        "requests.exceptions": {"RequestException": RequestException},
    }
    for name, members in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("GOLLAMA_TOKEN", "GOLLAMA_MODEL", "GOLLAMA_MAX_TOKENS"):
        monkeypatch.delenv(name, raising=False)
    return load_example("locustfile")


WHOLE = (
    replies.role() + replies.ping(),
    replies.token(" no"),
    replies.token(" to"),
    replies.token("wu"),
    replies.finish(usage=replies.usage_of(5)) + replies.done(),
)


def test_locust_measures_from_the_request_to_the_last_token(
    locustfile: ModuleType,
) -> None:
    answer = locustfile.Answer()
    for when, piece in zip((10.1, 10.25, 10.5, 11.25, 11.3), WHOLE, strict=True):
        answer.feed(piece, when)
    assert answer.problem() == ""
    assert answer.size == sum(map(len, WHOLE))
    # The first event has no text; the usage shows that the three others were 5 tokens.
    assert dict(answer.metrics(10.0)) == pytest.approx(
        {"TTFT": 250.0, "GAP": 750.0, "tok/s": 4 / 1.0}
    )


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_locust_reads_a_stream_however_it_is_cut(
    locustfile: ModuleType, size: int, line_end: bytes
) -> None:
    answer = locustfile.Answer()
    stream = b"".join(WHOLE).replace(b"\n", line_end)
    for at in range(0, len(stream), size):
        answer.feed(stream[at : at + size], 1.0 + at)
    assert answer.problem() == ""
    assert answer.first > 0


@pytest.mark.parametrize(
    ("stream", "problem"),
    [
        (b"".join(WHOLE[:-1]), "stream ended without [DONE]"),
        (WHOLE[0] + replies.error_event("worker lost"), "error event: worker lost"),
        (WHOLE[0] + replies.error_event("x") + replies.done(), "error event: x"),
        (b'data: {"x"\n\n' + replies.done(), "not a chat event: b'{\"x\"'"),
        (b"", "stream ended without [DONE]"),
    ],
)
def test_locust_counts_what_is_no_whole_answer_as_a_failure(
    locustfile: ModuleType, stream: bytes, problem: str
) -> None:
    answer = locustfile.Answer()
    answer.feed(stream, 1.0)
    assert answer.problem() == problem


def test_locust_makes_up_no_speed_from_a_single_moment(locustfile: ModuleType) -> None:
    answer = locustfile.Answer()
    assert answer.metrics(0.0) == []
    answer.feed(b"".join(WHOLE), 1.0)
    assert dict(answer.metrics(0.5)) == {"TTFT": 500.0}


class Reply:
    """What locust's client returns for `catch_response=True`."""

    def __init__(self, status: int, pieces: list[Any], body: Any = None) -> None:
        self.status_code = status
        self.request_meta: dict[str, Any] = {}
        self.failures: list[str] = []
        self.failure = self.failures.append
        self.error = OSError("refused")
        self._pieces = pieces
        self._body = body

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def json(self) -> Any:
        return self._body

    def iter_content(self, chunk_size: int | None) -> Any:
        assert chunk_size is None, "a block that has to fill up falsifies the TTFT"
        for piece in self._pieces:
            if isinstance(piece, type):
                raise piece
            yield piece


def chat(locustfile: ModuleType, reply: Reply) -> list[dict[str, Any]]:
    user = locustfile.ChatUser()
    user.model = "tiny"
    user.client = SimpleNamespace(post=lambda *args, **kwargs: reply)
    user.chat()
    fired: list[dict[str, Any]] = locustfile.events.fired
    return fired


def test_locust_reports_separate_rows_for_a_whole_answer(
    locustfile: ModuleType,
) -> None:
    reply = Reply(200, list(WHOLE))
    fired = chat(locustfile, reply)
    assert [row["request_type"] for row in fired] == ["TTFT", "GAP", "tok/s"]
    assert {row["name"] for row in fired} == {"tiny"}
    assert reply.failures == []
    assert reply.request_meta["response_length"] == sum(map(len, WHOLE))
    assert reply.request_meta["response_time"] >= fired[0]["response_time"]


def test_locust_reports_a_refusal_a_cut_and_a_lost_connection_as_failures(
    locustfile: ModuleType,
) -> None:
    busy = Reply(503, [], {"error": {"message": "queue is full"}})
    cut = Reply(200, list(WHOLE[:-1]))
    lost = Reply(200, [WHOLE[0], locustfile.RequestException])
    unreached = Reply(0, [])
    for reply in (busy, cut, lost, unreached):
        assert chat(locustfile, reply) == []
    assert busy.failures == ["status 503: queue is full"]
    assert cut.failures == ["stream ended without [DONE]"]
    assert lost.failures == ["connection lost: RequestException"]
    assert unreached.failures == ["status 0: OSError"]


def test_locust_takes_the_first_model_and_its_token(
    locustfile: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Reply(200, [], {"data": [{"id": "qwen"}, {"id": "tiny"}]})
    user = locustfile.ChatUser()
    user.client = SimpleNamespace(headers={}, get=lambda *args, **kwargs: listed)
    monkeypatch.setattr(locustfile, "TOKEN", "secret")
    user.on_start()
    assert user.model == "qwen"
    assert user.client.headers == {"Authorization": "Bearer secret"}
    listed = Reply(401, [], {"error": {"message": "no"}})
    with pytest.raises(locustfile.StopUser):
        user.on_start()
    assert listed.failures == ["no model is listed: status 401: no"]


# --- chaos.py ---------------------------------------------------------------------


@pytest.fixture
def chaos_environ(tmp_path: Path) -> dict[str, str]:
    """Have it run what is tested, with the hub's defaults, and write into a folder."""
    (tmp_path / "logs").mkdir()
    clean = bare()
    return {
        **clean,
        "PYTHONPATH": str(EXAMPLES.parent),
        "TMPDIR": str(tmp_path / "logs"),
    }


def started_chaos(
    *arguments: str, environ: Mapping[str, str]
) -> AbstractAsyncContextManager[Program]:
    """Run it as a user does."""
    program = [str(EXAMPLES / "chaos.py")]
    return Program.running(*arguments, environ=environ, program=program)


def forked_chaos(
    *arguments: str, environ: Mapping[str, str]
) -> AbstractAsyncContextManager[Program]:
    """Run it without the second that it takes to start."""
    return Program.running(*arguments, environ=environ, module="chaos", cwd=EXAMPLES)


def row(output: str, text: str) -> int:
    """Read a number of the table."""
    numbers = re.findall(rf"^ *(\d+) +{re.escape(text)}", output, re.MULTILINE)
    assert len(numbers) == 1, output
    return int(numbers[0])


@pytest.mark.real
async def test_chaos_without_a_hit_leaves_every_answer_whole(
    tiny_model: Path, chaos_environ: dict[str, str], tmp_path: Path
) -> None:
    arguments = ["--llama-server", str(binary()), "--model", str(tiny_model)]
    arguments += ["--workers", "2", "--every", "0", "--requests", "30"]
    arguments += ["--tokens", "16"]
    async with forked_chaos(*arguments, environ=chaos_environ) as it:
        assert await it.ended() == 0, it.output
    assert "16 of 16 prompts have one expected text" in it.output
    assert row(it.output, "of 30 requests ended") == 30
    assert row(it.output, "complete") == 30
    for text in ("another text", "error event", "truncated", "refused", "rescued"):
        assert row(it.output, text) == 0
    assert row(it.output, "hits on workers") == 0
    assert re.search(r"to the first token( +\d+\.\d\d){3} ", it.output)
    assert not list((tmp_path / "logs").iterdir()), "logs of servers without a fault"


@pytest.mark.real
@pytest.mark.parametrize(
    ("number", "chaos"),
    [(signal.SIGINT, started_chaos), (signal.SIGKILL, forked_chaos)],
)
async def test_chaos_leaves_no_process_behind(
    number: signal.Signals,
    chaos: Callable[..., AbstractAsyncContextManager[Program]],
    tiny_model: Path,
    chaos_environ: dict[str, str],
    tmp_path: Path,
) -> None:
    own_model = tmp_path / "own.gguf"
    own_model.symlink_to(tiny_model)
    arguments = ["--llama-server", str(binary()), "--model", str(own_model)]
    arguments += ["--workers", "2", "--requests", "1000000", "--clients", "1"]
    arguments += ["--tokens", "16"]
    arguments += ["--every", "0.2", "--down", "0.1", "--signal", "kill"]
    async with chaos(*arguments, environ=chaos_environ) as it:
        await it.until(r"(?s)SIGKILL to .*SIGKILL to ")
        children = psutil.Process(it.process.pid).children(recursive=True)
        assert any("gollama_proxy" in child.cmdline() for child in children)
        it.signal(number)
        status = await it.ended()
    assert "Traceback" not in it.output
    if number is signal.SIGINT:
        assert status == 1, it.output
        assert row(it.output, "hits on workers: ") >= 2
        assert row(it.output, "complete") >= 0
    # Beside those that were seen, some may have been just about to come back.
    servers = [p.pid for p in psutil.process_iter() if is_using(own_model, p)]
    await gone(*servers, *(child.pid for child in children))


def is_using(model: Path, process: psutil.Process) -> bool:
    try:
        return str(model) in process.cmdline()
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--clients", "0", "a whole number from 1 to 48"),
        ("--every", "nan", "seconds from 0 to 86400"),
        ("--signal", "hup", "'kill', 'stop', 'term'"),
        ("--request", "1", "unrecognized"),
    ],
)
def test_chaos_reports_a_wrong_flag_on_one_line(
    flag: str,
    value: str,
    allowed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_chaos(flag, value, monkeypatch=monkeypatch)
    assert ended.value.code == 2
    output, error = capsys.readouterr()
    assert not output
    assert_one_line(error, flag, allowed)


def test_chaos_reports_a_missing_model_on_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_chaos("--model", "/nowhere", monkeypatch=monkeypatch) == 2
    output, error = capsys.readouterr()
    assert not output
    assert_one_line(error, "--model", "a GGUF file")
    assert not list(tmp_path.iterdir())


def run_chaos(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run it in this process, for what fails before it starts others."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["chaos.py", *arguments])
    return load_example("chaos").main()


def assert_one_line(output: str, flag: str, allowed: str) -> None:
    assert output.startswith("chaos: ")
    assert output.count("\n") == 1
    assert flag in output
    assert allowed in output


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return load_example("chaos_report")


RIGHT = " no towu"
HEAD, *_, END = WHOLE
STRANGER = replies.token("wu").replace(replies.ID.encode(), b"chatcmpl-other")


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("stream", "outcome", "detail"),
    [
        (b"".join(WHOLE), "COMPLETE", ""),
        (b"".join(WHOLE).replace(b"wu", b"we"), "DIFFERENT", ""),
        (b"".join([*WHOLE[:2], *WHOLE[1:]]), "DIFFERENT", ""),
        (b"".join([*WHOLE[:3], STRANGER, END]), "DIFFERENT", "two answers in one"),
        (b"".join([*WHOLE, replies.done()]), "DIFFERENT", "two answers in one"),
        (b"".join([*WHOLE, replies.finish()]), "DIFFERENT", "two answers in one"),
        (HEAD + replies.error_event("lost"), "ERROR", "500"),
        (b'data: {"error":{"code":"worker_slow"}}\n\n' + END, "ERROR", "worker_slow"),
        (b"".join(WHOLE[:4]), "TRUNCATED", "without [DONE]"),
        (b"".join([*WHOLE[:4], replies.finish()]), "TRUNCATED", "without [DONE]"),
        (
            b"".join([*WHOLE[:4], replies.done()]),
            "TRUNCATED",
            "without a finish_reason",
        ),
        (HEAD + replies.token(" no")[:-9] + b"\n\n", "TRUNCATED", "within an event"),
        (b"", "TRUNCATED", "without [DONE]"),
    ],
)
def test_chaos_distinguishes_answers(
    report: ModuleType, stream: bytes, outcome: str, detail: str, size: int
) -> None:
    answer = report.Answer(0.0)
    answer.begin()
    for at in range(0, len(stream), size):
        answer.feed(stream[at : at + size], 1.0 + at)
    assert answer.judge(RIGHT) == (report.Outcome[outcome], detail)
    answer.lose("what follows a broken answer")
    lost = outcome in ("COMPLETE", "DIFFERENT") or "without" in detail
    assert (answer.judge(RIGHT).detail == "what follows a broken answer") is lost


def test_chaos_counts_refusals_by_code(report: ModuleType) -> None:
    for body, detail in (
        (b'{"error":{"code":"no_worker_available"}}', "503 no_worker_available"),
        (b"<html>", "503"),
    ):
        answer = report.Answer(0.0)
        answer.refuse(503, body)
        assert answer.judge(RIGHT) == (report.Outcome.REFUSED, detail)
    answer = report.Answer(0.0)
    answer.lose("ClientConnectorError")
    assert answer.judge(RIGHT) == (report.Outcome.REFUSED, "ClientConnectorError")


def test_chaos_measures_an_answer_that_was_rescued(report: ModuleType) -> None:
    answer = report.Answer(10.0)
    answer.begin()
    pieces = [*WHOLE[:3], b": gollama rescued 1\n\n: gollama rescued 2\n\n", *WHOLE[3:]]
    for when, piece in zip((10.1, 10.25, 10.5, 11, 11.25, 11.3), pieces, strict=True):
        answer.feed(piece, when)
    assert answer.judge(RIGHT).outcome is report.Outcome.COMPLETE
    assert answer.rescues == 2
    assert answer.first == pytest.approx(0.25)
    assert answer.pause == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [
        ([*WHOLE[:1], b": gollama rescued 1\n\n", *WHOLE[1:]], "REWORDED"),
        ([*WHOLE, b": gollama rescued 1\n\n"], "DIFFERENT"),
        (WHOLE, "DIFFERENT"),
    ],
    ids=["behind a rescue", "before it", "without one"],
)
def test_chaos_lets_a_rescued_answer_go_on_in_other_words(
    report: ModuleType, pieces: list[bytes], outcome: str
) -> None:
    answer = report.Answer(0.0)
    answer.begin()
    for piece in pieces:
        answer.feed(piece, 1.0)
    right = answer.text[:2] + "other words"
    assert answer.judge(right).outcome is report.Outcome[outcome]


def test_chaos_counts_to_a_table(report: ModuleType) -> None:
    tally = report.Tally(3)
    for verdict, rescues in (
        (report.Verdict(report.Outcome.COMPLETE), 2),
        (report.Verdict(report.Outcome.ERROR, "worker_slow"), 1),
        (report.Verdict(report.Outcome.COMPLETE), 0),
    ):
        answer = report.Answer(0.0)
        answer.attempts, answer.rescues, answer.first = 2, rescues, 0.5
        tally.add(answer, verdict)
    tally.hits.update(["kill", "stop", "kill"])
    assert tally.line() == "3/3 2 complete, 1 error event, 2 rescued, 3 hits"
    assert not tally.perfect
    console = Console(file=io.StringIO(), width=80)
    console.print(tally.tables())
    text = console.file.getvalue()
    assert row(text, "  worker_slow") == 1
    assert row(text, "rescued in their middle, 1 completely") == 2
    assert row(text, "took more than one attempt") == 3
    assert row(text, "hits on workers: 2 kill, 1 stop") == 3
    assert re.search(r"to the first token( +0\.50){3} ", text)


def test_chaos_shows_where_a_text_is_another_one(report: ModuleType) -> None:
    reported = report.difference("a red fox", "a red hen")
    assert reported == "another text from character 6: 'hen' instead of 'fox'"


# --- chat.html --------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    return (EXAMPLES / "chat.html").read_text("utf-8")


def test_page_loads_nothing_from_elsewhere(page: str) -> None:
    addresses = set(re.findall(r"https?://[^\s\"'`<>)]+", page))
    assert all(a.startswith("http://127.0.0.1:") for a in addresses), addresses
    assert not re.search(r"<(script|img|iframe|object|embed)\b[^>]*\bsrc\b", page)
    assert not re.search(r"@import|url\(|\bimport\s*\(|importScripts", page)
    assert re.findall(r"<link\b[^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert "default-src 'none'" in page, "the browser should hold it to that"
    others = {path.name for path in EXAMPLES.iterdir()} - {"chat.html"}
    assert not [n for n in others if n.endswith((".js", ".css", ".html"))]


def test_page_never_makes_markup_of_text(page: str) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser"
    forbidden += r"|createContextualFragment|setHTML|\beval\b|new Function|srcdoc"
    assert not re.search(forbidden, page)


def test_page_labels_every_field(page: str) -> None:
    fields = re.findall(r"<(?:input|select|textarea)\b[^>]*\bid=\"([^\"]+)\"", page)
    assert sorted(fields) == ["address", "model", "system", "token", "words"]
    for field in fields:
        assert re.search(rf'<label [^>]*for="{field}"', page), field


def test_page_names_a_setting_that_exists(page: str) -> None:
    named = set(re.findall(r"GOLLAMA_[A-Z_]+", page))
    assert named == {"GOLLAMA_SERVER_CORS_ORIGINS"}
    assert named <= {row.env for row in settings()}


# --- README.md --------------------------------------------------------------------


def test_readme_describes_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text("utf-8")
    reported = set(re.findall(r"\]\(([^)]+)\)", text))
    here = {each.rstrip("/") for each in reported if not each.startswith("../")}
    files = {p.name for p in EXAMPLES.iterdir() if p.is_file()} - {"README.md"}
    assert here >= files
    assert here <= {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*")}


def test_readme_names_only_settings_that_exist() -> None:
    text = (EXAMPLES / "README.md").read_text("utf-8")
    own = {"GOLLAMA_TOKEN"}  # the locustfile's
    named = set(re.findall(r"\bGOLLAMA_[A-Z_]+", text)) - own
    assert named <= {row.env for row in settings()}
