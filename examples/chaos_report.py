"""What clients noticed while `chaos.py` killed workers.

An answer is judged from its bytes alone, and has exactly one outcome.
"""

from __future__ import annotations

import enum
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table

SHOWN = 40  # characters of a wrong text
# The hub's comment in a stream: how often another worker continued the answer.
_RESCUED = re.compile(rb": ?gollama rescued (\d{1,9})")


class Outcome(enum.Enum):
    """How an answer ended; the values are shown in the table."""

    COMPLETE = "complete"
    # Reading a text uses other batches than writing it, and rounding can decide between
    # two words.
    REWORDED = "in other words once rescued"
    DIFFERENT = "another text"
    ERROR = "error event"
    TRUNCATED = "truncated"
    REFUSED = "refused"


class Verdict(NamedTuple):
    outcome: Outcome
    detail: str = ""  # the same for all that failed in the same way


# --- One answer -------------------------------------------------------------------


class Answer:
    """A streamed chat answer, fed with bytes as they arrive."""

    def __init__(self, began: float) -> None:
        self.text = ""
        self.attempts = 1
        self.rescues = 0
        self._before = ""  # the text before the first rescue
        self.first: float | None = None  # seconds to the first text
        self.pause = 0.0  # the longest between two events
        self._began = began
        self._heard: float | None = None
        self._rest = b""
        self._ids: set[str] = set()
        self._reasons = 0
        self._done = 0
        self._begun = False
        self._failed: Verdict | None = None

    def __repr__(self) -> str:
        return f"<Answer of {len(self.text)} characters, failed={self._failed}>"

    def begin(self) -> None:
        """Record that a stream follows."""
        self._begun = True

    def feed(self, piece: bytes, now: float) -> None:
        """Take bytes, split anywhere: a piece may have half an event, or three."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)
            elif rescued := _RESCUED.match(line):
                if not self.rescues:
                    self._before = self.text
                self.rescues = max(self.rescues, int(rescued[1]))

    def refuse(self, status: int, body: bytes) -> None:
        """Record an error in place of a stream."""
        try:
            code = json.loads(body)["error"]["code"]
        except (ValueError, LookupError, TypeError):
            code = ""
        self._fail(Outcome.REFUSED, f"{status} {code}".strip())

    def lose(self, problem: str) -> None:
        """Record that the connection was lost, before the stream or within."""
        outcome = Outcome.TRUNCATED if self._begun else Outcome.REFUSED
        self._fail(outcome, problem)

    def judge(self, expected: str) -> Verdict:
        """Return the verdict, once the body has ended."""
        if self._failed:
            return self._failed
        if not self._done:
            return Verdict(Outcome.TRUNCATED, "without [DONE]")
        if not self._reasons:
            return Verdict(Outcome.TRUNCATED, "without a finish_reason")
        if len(self._ids) > 1 or self._reasons > 1 or self._done > 1:
            return Verdict(Outcome.DIFFERENT, "two answers in one")
        if self.text != expected:
            reworded = self.rescues and expected.startswith(self._before)
            return Verdict(Outcome.REWORDED if reworded else Outcome.DIFFERENT)
        return Verdict(Outcome.COMPLETE)

    def _fail(self, outcome: Outcome, detail: str) -> None:
        # The first problem is the cause; a lost connection follows every error event.
        self._failed = self._failed or Verdict(outcome, detail)

    def _take(self, data: bytes, now: float) -> None:
        if self._heard is not None:
            self.pause = max(self.pause, now - self._heard)
        self._heard = now
        if data == b"[DONE]":
            self._done += 1
            return
        try:
            event = json.loads(data)
            if error := event.get("error"):
                self._fail(Outcome.ERROR, str(error.get("code") or error["message"]))
                return
            self._ids.add(event["id"])
            for choice in event["choices"]:
                self._take_choice(choice, now)
        except (ValueError, LookupError, TypeError, AttributeError):
            self._fail(Outcome.TRUNCATED, "within an event")

    def _take_choice(self, choice: dict[str, Any], now: float) -> None:
        delta = choice["delta"]
        text = delta.get("content") or delta.get("reasoning_content") or ""
        if text and self.first is None:
            self.first = now - self._began
        self.text += text
        self._reasons += bool(choice.get("finish_reason"))


def difference(expected: str, text: str) -> str:
    """Describe where a text differs from the expected one."""
    pairs = enumerate(zip(expected, text, strict=False))
    shorter = min(len(expected), len(text))
    at = next((number for number, (one, other) in pairs if one != other), shorter)
    wrong, right = text[at : at + SHOWN], expected[at : at + SHOWN]
    return f"another text from character {at}: {wrong!r} instead of {right!r}"


# --- All of them ------------------------------------------------------------------


class Tally:
    """Counts answers, of which `asked` are expected, and hits on workers."""

    def __init__(self, asked: int) -> None:
        self.asked = asked
        self.hits: Counter[str] = Counter()
        self._verdicts: Counter[Verdict] = Counter()
        self._rescued: Counter[Outcome] = Counter()
        self._retried = 0
        self._firsts: list[float] = []
        self._pauses: list[float] = []

    def __repr__(self) -> str:
        return f"<Tally {self.ended} of {self.asked} requests>"

    @property
    def ended(self) -> int:
        return self._verdicts.total()

    @property
    def perfect(self) -> bool:
        """Whether every request was answered completely, with the expected text."""
        good = self.count(Outcome.COMPLETE) + self.count(Outcome.REWORDED)
        return good == self.asked

    def count(self, outcome: Outcome) -> int:
        return sum(n for each, n in self._verdicts.items() if each.outcome is outcome)

    def add(self, answer: Answer, verdict: Verdict) -> None:
        self._verdicts[verdict] += 1
        self._rescued[verdict.outcome] += bool(answer.rescues)
        self._retried += answer.attempts > 1
        if answer.first is not None:
            self._firsts.append(answer.first)
            self._pauses.append(answer.pause)

    def line(self) -> str:
        """Return the counts on one line, to show during the run."""
        counts = [(self.count(each), each.value) for each in Outcome]
        counts += [(self._rescued.total(), "rescued"), (self.hits.total(), "hits")]
        shown = ", ".join(f"{number} {name}" for number, name in counts if number)
        return f"{self.ended}/{self.asked} {shown}"

    def tables(self) -> Group:
        """Return the tables for the end of the run."""
        counts = Table(box=None, show_header=False, padding=(0, 2))
        counts.add_column(justify="right")
        counts.add_column()
        for number, text in self._rows():
            counts.add_row(str(number), text)
        times = Table(box=box.SIMPLE_HEAD, padding=(0, 2))
        times.add_column("seconds")
        for title in ("p50", "p95", "max"):
            times.add_column(title, justify="right")
        times.add_row("to the first token", *_spread(self._firsts))
        times.add_row("longest pause in an answer", *_spread(self._pauses))
        return Group("", counts, times)

    def _rows(self) -> Iterator[tuple[int, str]]:
        yield self.ended, f"of {self.asked} requests ended:"
        for outcome in Outcome:
            yield self.count(outcome), outcome.value
            for verdict, number in self._verdicts.most_common():
                if verdict.outcome is outcome and verdict.detail:
                    yield number, f"  {verdict.detail}"
        whole = self._rescued[Outcome.COMPLETE]
        yield self._rescued.total(), f"rescued in their middle, {whole} completely"
        yield self._retried, "took more than one attempt"
        how = ", ".join(f"{number} {name}" for name, number in self.hits.items())
        yield self.hits.total(), f"hits on workers: {how}" if how else "hits on workers"


def _spread(values: list[float]) -> Iterator[str]:
    """Format the median, the 95th percentile and the maximum."""
    ranked = sorted(values)
    for part in (0.5, 0.95, 1.0):
        at = min(int(len(ranked) * part), len(ranked) - 1)
        yield f"{ranked[at]:.2f}" if ranked else "-"
