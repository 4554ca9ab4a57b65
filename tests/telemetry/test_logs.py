"""The log: all lines in the order of events, never in the hub's way."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config.settings import Log
from gollama_proxy.telemetry import accesslog, logs
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.telemetry.lines import (
    TextFormatter,
)
from gollama_proxy.telemetry.logs import BatchHandler
from tests.fakes.clock import Clock
from tests.fakes.waiting import DEADLINE, until
from tests.telemetry.test_lines import raised

# --- Configuration ----------------------------------------------------------------


@pytest.fixture
def logging_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test configure logging, and undo it afterwards."""
    root = logging.getLogger()
    names = "gollama_proxy.access", "gollama_proxy.audit"
    touched = [root, *map(logging.getLogger, names)]
    touched.append(logging.getLogger("aiohttp"))
    levels = [logger.level for logger in touched]
    monkeypatch.setattr(root, "handlers", [])  # `force` closes those that it finds
    monkeypatch.setattr(logging, "_srcfile", logging._srcfile)
    for flag in ("logThreads", "logProcesses", "logMultiprocessing"):
        monkeypatch.setattr(logging, flag, getattr(logging, flag))
    yield
    for logger, level in zip(touched, levels, strict=True):
        logger.setLevel(level)


configured = pytest.mark.usefixtures("logging_restored")
REQUEST = Record("0123456789abcdef", "GET", status=200)


@configured
@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_goes_to_standard_error_in_the_configured_form(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(Log(format=form))
    logs.configure(Log(format=form))  # it replaces the first one
    accesslog.write(REQUEST, accesslog.LineTemplate(REQUEST))
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    if form == "json":
        assert json.loads(line)["id"] == REQUEST.id
    else:
        assert line.endswith(f" id={REQUEST.id}")


@configured
@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_is_the_lowest_that_is_shown(
    level: str, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(Log(level=level))
    logger = logging.getLogger("gollama_proxy.test")
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("message")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == shown


@configured
def test_changes_by_operators_are_shown_at_every_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(Log(level="error"))
    fields = {"subject": "root", "action": "pause"}
    logging.getLogger("gollama_proxy.audit").info("admin", extra={"fields": fields})
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("info admin subject=root action=pause")


@configured
def test_the_access_log_can_be_switched_off_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(Log(access=False))
    accesslog.write(REQUEST, accesslog.LineTemplate(REQUEST))
    logging.getLogger("gollama_proxy.test").info("message")
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("info message")
    logs.configure(Log())
    accesslog.write(REQUEST, accesslog.LineTemplate(REQUEST))
    assert REQUEST.id in capsys.readouterr().err


@configured
def test_aiohttp_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """It logs malformed requests with their bytes."""
    logs.configure(Log(level="debug"))
    logging.getLogger("aiohttp.server").error("canary")
    logging.getLogger("aiohttp.access").info("canary")
    assert capsys.readouterr().err == ""


@configured
@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_carry_their_priority_where_the_journal_reads_them(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "journal").open("w+") as journal:
        stat = os.fstat(journal.fileno())
        monkeypatch.setattr(sys, "stderr", journal)
        monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
        logs.configure(Log(format=form, level="debug"))
        logger = logging.getLogger("gollama_proxy.test")
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(logger, level)("message")
        accesslog.write(REQUEST, accesslog.LineTemplate(REQUEST))
        journal.seek(0)
        assert [line[:3] for line in journal] == [
            *("<7>", "<6>", "<4>", "<3>", "<2>"),
            "<6>",
        ]


@configured
@pytest.mark.parametrize("stream", ["", "0:0", "8:1"])
def test_lines_carry_no_priority_elsewhere(
    stream: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    logs.configure(Log())
    logging.getLogger("gollama_proxy.test").warning("message")
    assert not capsys.readouterr().err.startswith("<")


@configured
def test_a_process_without_standard_error_logs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    logs.configure(Log())
    logging.getLogger("gollama_proxy.test").warning("message")
    accesslog.write(REQUEST, accesslog.LineTemplate(REQUEST))


@configured
@pytest.mark.parametrize(
    ("terminal", "environ", "columns", "colours"),
    [
        (False, {}, False, False),
        (False, {"TERM": "xterm"}, False, False),
        (False, {"FORCE_COLOR": "1"}, True, True),
        (False, {"FORCE_COLOR": "0"}, False, False),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        (True, {}, True, True),
        (True, {"NO_COLOR": ""}, True, True),  # an empty one counts as none
        (True, {"NO_COLOR": "1"}, True, False),
        (True, {"FORCE_COLOR": "0"}, True, False),
        (True, {"TERM": "dumb"}, True, False),
        (True, {"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
    ],
)
def test_columns_and_colours_are_for_terminals(
    terminal: bool,
    environ: dict[str, str],
    columns: bool,
    colours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    for form in ("auto", "text", "json"):
        monkeypatch.setattr(sys, "stderr", stream := Screen())
        logs.configure(Log(format=form))
        logging.getLogger("gollama_proxy.test").warning("message")
        line = stream.getvalue().rstrip("\n")
        at_rest = form != "auto"  # no other form ever has columns or colours
        assert ("\x1b" in line) is (colours and not at_rest)
        assert ("  " in line) is (columns and not at_rest)
        assert line.startswith("{") is (form == "json")


# --- Repeated warnings ------------------------------------------------------------


class Quiet:
    """A log in memory, whose repeated warnings are counted by a clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.bursts = logs.Bursts(self.clock)
        self._stream = io.StringIO()
        self.handler = BatchHandler(self._stream, TextFormatter(), self.bursts)
        self._logger = logging.Logger("quiet")
        self._logger.addHandler(self.handler)

    def __repr__(self) -> str:
        return f"<Quiet {self.bursts!r}>"

    def warn(self, text: str, *args: object, **more: Any) -> None:
        self._logger.warning(text, *args, **more)

    def info(self, text: str) -> None:
        self._logger.info(text)

    def lines(self) -> list[str]:
        """Return what was written since the last call, without times."""
        text = self._stream.getvalue()
        self._stream.seek(0)
        self._stream.truncate()
        return [line.partition(" ")[2] for line in text.splitlines()]


def test_a_burst_of_warnings_is_one_line_and_a_count() -> None:
    log = Quiet()
    for _ in range(413):
        log.warn("worker %s: lost (%s)", "gpu1", "reset")
        log.clock.advance(0.1)
    assert log.lines() == ["warning worker gpu1: lost (reset)"]
    log.clock.advance(logs.QUIET)
    log.info("any line")
    assert log.lines() == [
        "warning worker gpu1: lost (reset) (and 412 more in 51 s)",
        "info any line",
    ]
    log.warn("worker %s: lost (%s)", "gpu1", "reset")
    assert log.lines() == ["warning worker gpu1: lost (reset)"]


def test_a_long_burst_is_counted_every_minute() -> None:
    log = Quiet()
    for _ in range(180):
        log.warn("worker %s: lost", "gpu1")
        log.clock.advance(1.0)
        log.info("any")
    shown = [line for line in log.lines() if "any" not in line]
    assert shown == [
        "warning worker gpu1: lost",
        "warning worker gpu1: lost (and 59 more in 60 s)",
        "warning worker gpu1: lost (and 60 more in 60 s)",
        "warning worker gpu1: lost (and 60 more in 60 s)",
    ]


def test_what_differs_in_kind_is_no_repetition() -> None:
    log = Quiet()
    log.warn("worker %s: lost (%s)", "gpu1", "a")
    log.warn("worker %s: lost (%s)", "gpu2", "a")
    log.warn("worker %s: slow (%s)", "gpu1", "a")
    log.info("worker gpu1: up")
    log.info("worker gpu1: up")  # only warnings and errors come in bursts
    log.warn("worker %s: lost (%s)", "gpu1", "b")  # of the same kind
    assert [line.partition(" ")[2] for line in log.lines()] == [
        *("worker gpu1: lost (a)", "worker gpu2: lost (a)", "worker gpu1: slow (a)"),
        *("worker gpu1: up", "worker gpu1: up"),
    ]


def test_warnings_that_are_rare_are_all_written() -> None:
    log = Quiet()
    for _ in range(3):
        log.warn("worker %s: lost", "gpu1")
        log.clock.advance(logs.QUIET)
    assert log.lines() == ["warning worker gpu1: lost"] * 3


def test_exceptions_of_one_line_of_code_are_a_burst() -> None:
    log = Quiet()
    for number in range(3):
        error = raised(KeyError(number))
        log.warn("request %s failed", number, exc_info=error)
    log.warn("request %s failed", 3, exc_info=raised(ValueError()))
    log.warn("request %s failed", 4, exc_info=(None, None, None))
    assert [line for line in log.lines() if "request" in line] == [
        *("warning request 0 failed", "warning request 3 failed"),
        "warning request 4 failed",
    ]
    log.handler.close()
    assert log.lines() == ["warning request 0 failed (and 2 more in 1 s)"]


def test_the_kinds_of_warnings_that_are_remembered_are_bounded() -> None:
    log = Quiet()
    log.warn("worker %s: lost", -1)
    log.warn("worker %s: lost", -1)
    for number in range(2 * logs.MOST_KINDS):
        log.warn("worker %s: lost", number)
    assert repr(log.bursts) == f"<Bursts kinds={logs.MOST_KINDS} counting=False>"
    lines = log.lines()
    assert "warning worker -1: lost (and 1 more in 1 s)" in lines  # nothing is lost
    assert len(lines) == 2 * logs.MOST_KINDS + 2


async def test_a_burst_that_ends_is_counted_without_another_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Quiet()
    monkeypatch.setattr(logs, "QUIET", 0.01)
    for _ in range(3):
        log.warn("worker %s: lost", "gpu1")
    assert log.lines() == ["warning worker gpu1: lost"]
    log.clock.advance(1.0)
    seen: list[str] = []

    def summarised() -> bool:
        seen.extend(log.lines())
        return bool(seen)

    await until(summarised)
    assert seen == ["warning worker gpu1: lost (and 2 more in 1 s)"]


# --- Writing ----------------------------------------------------------------------


class Pipe:
    """A handler that writes into a pipe, and the other end of it."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self._stream = os.fdopen(write, "w")
        self.handler = BatchHandler(self._stream, TextFormatter())

    def add(self, text: str = "request") -> None:
        self.handler.add(TextFormatter().line("now", logging.INFO, text))

    def warn(self, text: str) -> None:
        entry = logging.LogRecord("x", logging.WARNING, "", 0, text, None, None)
        self.handler.handle(entry)

    def read(self) -> str:
        try:
            return os.read(self._read, 1 << 20).decode()
        except BlockingIOError:
            return ""

    def lines(self) -> list[str]:
        """Return what has been written since the last call, without the times."""
        return [line.partition(" ")[2] for line in self.read().splitlines()]

    def fill(self) -> None:
        """Write as much as the pipe holds, as if its reader had stopped."""
        os.set_blocking(self._stream.fileno(), False)
        try:
            while True:
                os.write(self._stream.fileno(), b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(self._stream.fileno(), True)

    def close_reader(self) -> None:
        os.close(self._read)
        self._read = -1

    def close(self) -> None:
        if self._read >= 0:
            self.close_reader()
        self.handler.close()
        self._stream.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the size of each write."""
    sizes: list[int] = []
    write = os.write

    def recording(descriptor: int, data: bytes) -> int:
        sizes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(logs.os, "write", recording)
    return sizes


class Later:
    """Stands for the event loop; its timers run when a test calls `run`."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], object]]] = []
        self.closed = False

    def call_later(self, delay: float, call: Callable[[], object]) -> object:
        self.calls.append((delay, call))
        return object()

    def is_closed(self) -> bool:
        return self.closed

    def run(self) -> None:
        """Run the timers that are set now, once."""
        calls, self.calls = self.calls, []
        for _, call in calls:
            call()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Later:
    later = Later()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: later)
    return later


def test_lines_about_requests_are_written_together(
    pipe: Pipe, loop: Later, writes: list[int]
) -> None:
    for number in range(10):
        pipe.add(f"request {number}")
    assert pipe.lines() == []
    assert [delay for delay, _ in loop.calls] == [logs.DELAY]
    loop.run()
    assert pipe.lines() == [f"info request {number}" for number in range(10)]
    assert len(writes) == 1
    assert loop.calls == []
    pipe.add("next")
    assert len(loop.calls) == 1


async def test_a_line_is_written_without_another_one_to_follow(pipe: Pipe) -> None:
    pipe.add()
    async with asyncio.timeout(DEADLINE):
        while not (lines := pipe.lines()):
            await asyncio.sleep(0.001)
    assert lines == ["info request"]


def test_a_warning_is_written_at_once_after_the_lines_before_it(
    pipe: Pipe, loop: Later
) -> None:
    pipe.add("before")
    pipe.warn("in between")
    assert pipe.lines() == ["info before", "warning in between"]
    pipe.add("after")
    loop.run()
    assert pipe.lines() == ["info after"]


def test_a_line_outside_an_event_loop_is_written_at_once(pipe: Pipe) -> None:
    pipe.add()
    assert pipe.lines() == ["info request"]


def test_a_loop_that_has_ended_is_not_waited_for(pipe: Pipe, loop: Later) -> None:
    pipe.add("one")
    loop.calls.clear()
    loop.closed = True
    pipe.handler.flush()
    pipe.add("two")
    loop.run()
    assert pipe.lines() == ["info one", "info two"]


@pytest.mark.usefixtures("loop")
def test_many_lines_are_written_before_their_time(pipe: Pipe) -> None:
    line = "x" * 1000
    for _ in range(logs.BATCH // len(line) + 1):
        pipe.add(line)
    assert len(pipe.read()) >= logs.BATCH // 2


@pytest.mark.usefixtures("loop")
def test_what_is_collected_is_written_on_demand_and_at_the_end(pipe: Pipe) -> None:
    pipe.add("one")
    pipe.handler.flush()
    assert pipe.lines() == ["info one"]
    pipe.add("two")
    pipe.handler.close()
    assert pipe.lines() == ["info two"]


def test_lines_that_a_stopped_reader_does_not_take_are_kept(
    pipe: Pipe, loop: Later
) -> None:
    pipe.fill()
    pipe.add("one")
    loop.run()
    pipe.warn("two")
    assert repr(pipe.handler).startswith("<BatchHandler unwritten=")
    assert "unwritten=0" not in repr(pipe.handler)
    assert len(loop.calls) == 1  # one timer, however many lines there are
    assert pipe.read().strip("x") == ""
    loop.run()
    assert pipe.lines() == ["info one", "warning two"]
    assert repr(pipe.handler) == "<BatchHandler unwritten=0 lost=0>"


def test_lines_beyond_a_bound_are_lost_and_counted(pipe: Pipe, loop: Later) -> None:
    pipe.fill()
    line = "x" * 1000
    for number in range(2 * logs.MOST_UNWRITTEN // len(line)):
        (pipe.add if number % 2 else pipe.warn)(line)
    lost = int(repr(pipe.handler).partition("lost=")[2].rstrip(">"))
    assert lost > 0
    assert pipe.read()
    written: list[str] = []
    while loop.calls:
        loop.run()
        written += pipe.lines()
    pipe.add("after")
    loop.run()
    [report, after] = pipe.lines()
    assert report.startswith(f"warning {lost} lines were lost")
    assert after == "info after"
    assert len(written) + lost == 2 * logs.MOST_UNWRITTEN // len(line)
    assert all(text.endswith(line) for text in written)


def test_lines_that_a_full_disk_does_not_take_are_written_later(
    tmp_path: Path, loop: Later
) -> None:
    file = tmp_path / "log"
    with Path("/dev/full").open("w") as stream, file.open("w") as roomy:
        handler = BatchHandler(stream, TextFormatter())
        line = "x" * 1000
        for _ in range(2 * logs.MOST_UNWRITTEN // len(line)):
            handler.add(line)
        os.dup2(roomy.fileno(), stream.fileno())
        loop.run()
        handler.add("after")
        handler.close()
    written = file.read_text().splitlines()
    assert written[0] == line
    assert " lines were lost" in written[-2]
    assert written[-1] == "after"


def test_a_stopped_reader_does_not_keep_the_process_from_ending(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PATIENCE", 0.01)
    pipe.fill()
    pipe.add()
    pipe.handler.close()


def test_the_end_waits_a_little_for_a_slow_reader(pipe: Pipe) -> None:
    pipe.fill()
    pipe.add()
    reader = threading.Thread(target=pipe.read)
    reader.start()
    pipe.handler.close()
    reader.join()
    assert pipe.lines() == ["info request"]


def test_a_reader_that_has_left_is_no_error(pipe: Pipe) -> None:
    pipe.close_reader()
    pipe.add()
    pipe.warn("message")
    pipe.handler.flush()
    assert repr(pipe.handler) == "<BatchHandler unwritten=0 lost=0>"


def test_a_stream_that_was_closed_is_no_error() -> None:
    stream = io.StringIO()
    handler = BatchHandler(stream, TextFormatter())
    stream.close()
    handler.add("request")
    handler.close()


def test_a_full_descriptor_that_does_not_block_is_tried_again(
    pipe: Pipe, loop: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process can make the shared descriptor non-blocking."""

    def full(descriptor: int, data: bytes) -> int:
        raise BlockingIOError

    with monkeypatch.context() as patch:
        patch.setattr(logs.os, "write", full)
        pipe.add()
        loop.run()
    loop.run()
    assert pipe.lines() == ["info request"]


def test_writes_to_a_pipe_end_with_a_line(
    pipe: Pipe, loop: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes may write to it, and their lines are not to be mixed up."""
    written: list[bytes] = []

    def write(descriptor: int, data: bytes) -> int:
        written.append(data)
        return len(data)

    with monkeypatch.context() as patch:
        patch.setattr(logs.os, "write", write)
        for number in range(100):
            pipe.add(f"{number} " + "x" * 150)
        pipe.add("y" * 10_000)  # too long for one write
        pipe.add("last")
        loop.run()
    assert max(map(len, written)) <= 4096
    cut = [data for data in written if not data.endswith(b"\n")]
    assert len(cut) == 2
    assert all(b"y" * 1000 in data for data in cut)
    assert b"".join(written).count(b"\n") == 102


def test_a_message_that_cannot_be_formatted_does_not_stop_the_log(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    entry = logging.LogRecord("x", logging.WARNING, "", 0, "%d", ("x",), None)
    pipe.handler.handle(entry)
    pipe.warn("next")
    assert pipe.lines() == ["warning next"]


def test_lines_are_written_before_the_end_or_a_crash() -> None:
    """In forks of one process, as the imports are most of what it does."""
    program = """
        import os
        from gollama_proxy.cli import run_loop
        from gollama_proxy.config.settings import Log
        from gollama_proxy.telemetry import accesslog, logs

        async def command(signals):
            logs.configure(Log())
            record = accesslog.Record(name, "GET")
            accesslog.write(record, accesslog.LineTemplate(record))
            exec(end)
            return 0

        ends = {
            "ended": "pass",
            "crashed": "raise ZeroDivisionError",
            "left": "raise SystemExit(3)",
        }
        for name, end in ends.items():
            if not (child := os.fork()):
                raise SystemExit(run_loop(command))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0", "1", "3"]
    ended, crashed, *traceback, left = done.stderr.splitlines()
    assert ended.endswith("id=ended")
    assert crashed.endswith("id=crashed")
    assert traceback[-1] == "ZeroDivisionError"
    assert left.endswith("id=left")


# --- Throttle ---------------------------------------------------------------------


def test_a_throttle_reports_repeated_events_once_in_a_while() -> None:
    throttle = logs.Throttle(clock := Clock(), 10.0)
    assert [throttle.count("a") for _ in range(3)] == [1, 0, 0]
    assert throttle.count("b") == 1
    clock.advance(9.9)
    assert throttle.count("a") == 0
    clock.advance(0.1)
    assert throttle.count("a") == 4
    assert throttle.count("a") == 0
    assert repr(throttle) == "<Throttle unlogged=1>"
