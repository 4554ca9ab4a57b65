"""A line has one form for all records, and shows no text of a user."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.telemetry import accesslog
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.telemetry.lines import (
    MOST_CAUSES,
    JournalFormatter,
    JsonFormatter,
    LineFormatter,
    TerminalFormatter,
    TextFormatter,
    prioritised,
)
from tests.fakes.asks import CHAT

_values = st.one_of(
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.sampled_from(["", "=", "a b", "a=b", "\n", "a\nb=c", "é", "\ud800", "x" * 128]),
    st.integers(120, 136).map("y".__mul__),
)


@pytest.mark.parametrize("form", [TextFormatter(), JsonFormatter()])
@given(fields=st.dictionaries(st.sampled_from("abcdef"), _values))
def test_a_line_from_one_template_is_the_line_field_by_field(
    form: LineFormatter, fields: dict[str, str | int | float]
) -> None:
    line = form.line("now", logging.INFO, "request", fields)
    empty = form.line("now", logging.INFO, "request")
    end = "}" if empty.endswith("}") else ""
    each = empty.removesuffix(end)
    for name, value in fields.items():
        single = form.line("now", logging.INFO, "request", {name: value})
        each += single.removeprefix(empty.removesuffix(end)).removesuffix(end)
    assert line == each + end


def test_an_empty_value_is_in_quotes() -> None:
    assert TextFormatter().line("now", logging.INFO, "m", {"a": ""}).endswith(' a=""')


@pytest.mark.parametrize("form", [TextFormatter(), JsonFormatter()])
def test_a_message_and_an_exception_are_written_in_the_form(
    form: LineFormatter,
) -> None:
    entry = logging.LogRecord("x", logging.WARNING, "", 0, "worker %s", ("a",), None)
    line = form.format(entry)
    assert "warning" in line
    assert "worker a" in line
    words = "written by a user"
    try:
        raise ZeroDivisionError(words)
    except ZeroDivisionError:
        entry.exc_info = sys.exc_info()
    line = form.format(entry)
    assert "ZeroDivisionError" in line
    assert words not in line
    if isinstance(form, JsonFormatter):
        assert "Traceback" in json.loads(line)["exception"]


@pytest.mark.parametrize("form", [TextFormatter(), JsonFormatter()])
def test_a_record_without_an_exception_has_no_traceback(form: LineFormatter) -> None:
    nothing = (None, None, None)  # `exc_info=True` outside an exception handler
    entry = logging.LogRecord("x", logging.WARNING, "", 0, "message", None, nothing)
    line = form.format(entry)
    assert "\n" not in line
    assert "exception" not in line


def text_of(message: str, error: BaseException | None = None, name: str = "x") -> str:
    """Return a line of the text log, without its time."""
    info = None if error is None else (type(error), error, error.__traceback__)
    entry = logging.LogRecord(name, logging.ERROR, "", 0, message, None, info)
    return TextFormatter().format(entry).partition(" ")[2]


@pytest.mark.parametrize(
    "name", ["two\nlines", "\x1b[31mred", "\u2028", "\x00", "a\r\nb", "\ud800"]
)
def test_a_message_is_one_line_that_a_terminal_can_show(name: str) -> None:
    line = text_of(f"worker {name}: é")
    assert line.isprintable()
    assert line.startswith("error worker ")


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as exc:
        return exc


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("secret"), "ValueError"),
        (OSError(13, "secret"), "PermissionError: Permission denied"),
        (OSError("secret"), "OSError"),
        (
            ExceptionGroup("secret", [ValueError("secret"), KeyError("secret")]),
            "ExceptionGroup of ValueError, KeyError",
        ),
    ],
)
def test_an_exception_is_shown_by_its_kind_and_place(
    error: BaseException, shown: str
) -> None:
    text = text_of("failed", raised(error))
    assert text.startswith("error failed\nTraceback (most recent call last):\n  File ")
    assert "in raised" in text
    assert text.endswith("\n" + shown)
    assert "secret" not in text


def test_the_cause_of_an_exception_comes_first() -> None:
    text = text_of("failed", raised(ValueError("b"), raised(KeyError("a"))))
    assert text.index("KeyError") < text.index("which led to") < text.index("ValueErr")
    hidden = ValueError("b")
    hidden.__context__, hidden.__suppress_context__ = raised(KeyError("a")), True
    assert "KeyError" not in text_of("failed", hidden)


def test_a_long_chain_of_causes_is_cut() -> None:
    error: BaseException = ValueError("first")
    for _ in range(100):
        error = raised(TypeError("next"), error)
    assert text_of("failed", error).count("Traceback") == MOST_CAUSES


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "Executing <Task name='a' exception=E('secret')> took 0.123 seconds",
            "Executing <Task name='a'> took 0.123 seconds",
        ),
        (
            "Executing <Future finished result='secret> took it'> took 1.5 seconds",
            "Executing <Future finished> took 1.5 seconds",
        ),
        ("Task was destroyed\ntask: <Task result='secret'>", "Task was destroyed"),
    ],
)
def test_results_of_tasks_are_cut_from_messages_of_asyncio(
    message: str, shown: str
) -> None:
    assert text_of(message, name="asyncio") == f"error {shown}"


def test_each_line_of_a_process_of_several_has_its_number() -> None:
    fields = {"a": 1}
    text = TextFormatter(2).line("now", logging.INFO, "m", fields)
    assert text == "now info m process=2 a=1"
    found = json.loads(JsonFormatter(2).line("now", logging.INFO, "m", fields))
    assert found == {"time": "now", "level": "info", "message": "m"} | {
        "process": 2,
        "a": 1,
    }
    people = TerminalFormatter(2, colours=False)
    assert people.line("now", logging.INFO, "m", fields).endswith("a=1  process=2")
    journal = JournalFormatter(TextFormatter(2))
    assert journal.line("now", logging.INFO, "m") == "<6>now info m process=2"
    assert journal.process == 2


# --- The journal, and terminals ---------------------------------------------------


def test_each_line_of_a_traceback_has_the_priority() -> None:
    assert prioritised("a\nb", logging.ERROR) == "<3>a\n<3>b"
    form = JournalFormatter(TextFormatter())
    lines = form.line("now", logging.ERROR, "failed", error=raised(KeyError("a")))
    assert all(line.startswith("<3>") for line in lines.split("\n"))
    assert lines.endswith("\n<3>KeyError")


ASKED = Record(
    *("0123456789abcdef", "POST", CHAT),
    subject="alice",
    model="tiny",
    worker="gpu1",
    status=200,
    outcome=accesslog.Outcome.COMPLETE,
    attempts=1,
    tokens=42,
)


def lines_of(*records: Record, colours: bool = False) -> list[str]:
    form = TerminalFormatter(colours=colours)
    return [form.line("12:00", logging.INFO, "request", r.fields()) for r in records]


def test_the_line_of_a_request_has_columns_on_a_terminal() -> None:
    slow = replace(ASKED, duration=12.3456, worker="a-worker-with-a-long-name")
    failed = replace(ASKED, duration=0.0021, status=502, error="worker_unreachable")
    unknown = Record("1", "GET", path="/x\x1b[2J", status=404, duration=0.001)
    columns = "{}  info     {}  {:>8}  {:25}  {:16}  {:16}  {:10}  {}".format
    assert lines_of(slow, failed, unknown) == [
        columns(
            *("12:00", 200, "12.35 s", f"POST {CHAT}", "tiny"),
            *("a-worker-with-a-long-name", "alice"),
            "tokens=42  id=0123456789abcdef",
        ),
        columns(
            *("12:00", 502, "2 ms", f"POST {CHAT}", "tiny", "gpu1", "alice"),
            "error=worker_unreachable  tokens=42  id=0123456789abcdef",
        ),
        columns(
            *("12:00", 404, "1 ms", 'GET "/x\\u001b[2J"', "-", "-", "-"),
            "id=1",
        ),
    ]


def test_colours_add_nothing_but_colours() -> None:
    failed = replace(ASKED, status=502, error="internal_error")
    for record in ASKED, failed, Record("1", "GET"):
        [plain], [coloured] = lines_of(record), lines_of(record, colours=True)
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert "\x1b[31m502\x1b[0m" in lines_of(failed, colours=True)[0]
    assert "\x1b[32m200\x1b[0m" in lines_of(ASKED, colours=True)[0]


def test_other_lines_on_a_terminal_begin_with_their_message() -> None:
    form = TerminalFormatter(colours=False)
    fields = {"subject": "a b", "action": "pause"}
    line = form.line("12:00", logging.INFO, "admin", fields)
    assert line == '12:00  info     admin  subject="a b"  action=pause'
    failed = form.line("12:00", logging.ERROR, "failed", error=raised(KeyError("a")))
    assert failed.startswith("12:00  error    failed\nTraceback")
    assert failed.endswith("\nKeyError")


def test_a_terminal_shows_the_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    form = TerminalFormatter(colours=False)
    monkeypatch.setenv("TZ", "IST-5:30")
    time.tzset()
    try:
        assert form.stamp(1_800_000_000.0425) == "13:30:00.042"
    finally:
        monkeypatch.undo()
        time.tzset()
