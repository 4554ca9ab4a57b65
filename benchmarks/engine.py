"""llama-server's main loop without a model: the order of its work, and the time it
takes.

Each turn of the loop is a batch: one token of each answer that is being written, and as
much as fits of the prompts that wait to be read.  It takes

    pace.batch  +  pace.written * answers  +  pace.read * prompt tokens

seconds; then each answer has one token more, and each prompt that was read to its end
has the first token of its answer.  So answers nearly stop while a long prompt is read,
as in the real server.  Requests beyond the slots wait, any number of them, first come,
first served.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil

from benchmarks.llama_wire import WORD
from benchmarks.prompt_cache import PromptCache, Slot

BATCH = 2048  # tokens, llama-server's `--batch-size`


@dataclass(frozen=True)
class Pace:
    """How long things take, in seconds."""

    batch: float  # each turn of the loop, whatever is in it
    written: float  # each token of an answer
    read: float  # each token of a prompt

    def slowed(self, factor: float) -> Pace:
        """Return the pace of a machine that takes `factor` times as long."""
        return Pace(self.batch * factor, self.written * factor, self.read * factor)

    def tokens_per_second(self, answers: int) -> float:
        """Return the speed of each of several answers written at once."""
        return 1 / (self.batch + self.written * answers)


@dataclass(eq=False)
class Work:
    """One request: its prompt, and the length of its answer."""

    prompt: str
    tokens: int  # to be written
    size: int = 0  # of the prompt, in tokens
    cached: int = 0  # of them
    read: int = 0
    written: int = 0
    began: float = 0.0  # of its time in a slot; monotonic seconds
    first: float = 0.0
    slot: Slot | None = field(default=None, repr=False)

    @property
    def done(self) -> bool:
        return self.written == self.tokens


class Engine:
    """The loop of one server; the caller keeps the time."""

    def __init__(self, pace: Pace, slots: int, kept: int, token: float) -> None:
        """Begin idle.  A token of a prompt is so many characters."""
        self.pace = pace
        self.cache = PromptCache(slots, kept)
        self._token = token
        self._waiting: deque[Work] = deque()
        self._running: list[Work] = []
        self._batch: list[tuple[Work, int]] = []  # with the prompt tokens of each

    def __repr__(self) -> str:
        return f"<Engine {len(self._running)} running, {len(self._waiting)} waiting>"

    def submit(self, work: Work) -> None:
        work.size = max(1, ceil(len(work.prompt) / self._token))
        self._waiting.append(work)

    def cancel(self, work: Work) -> None:
        """Drop a request whose client has left, at once if it runs.

        One that still waits stays, as in llama-server, and is written for no client.
        """
        if work in self._running:
            self._running.remove(work)
            self._end(work)

    def plan(self, now: float) -> float | None:
        """Begin a turn of the loop and return its seconds; None if there is no work."""
        while self._waiting and (found := self.cache.take(self._waiting[0].prompt)):
            work = self._waiting.popleft()
            work.slot, length = found
            # The last token is always read: the answer follows from it.
            work.cached = min(int(length / self._token), work.size - 1)
            work.read, work.began = work.cached, now
            self._running.append(work)
        if not self._running:
            return None
        writing = sum(work.read == work.size for work in self._running)
        room, reading = BATCH - writing, 0
        self._batch = []
        for work in self._running:
            part = min(work.size - work.read, room - reading)
            reading += part
            if part or work.read == work.size:
                self._batch.append((work, part))
        pace = self.pace
        return pace.batch + pace.written * writing + pace.read * reading

    def carry_out(self, now: float) -> list[Work]:
        """End the turn; return the requests that have one more token."""
        spoken = []
        for work, part in self._batch:
            work.read += part
            if work.read < work.size or work not in self._running:
                continue
            work.first = work.first or now
            work.written += 1
            spoken.append(work)
            if work.done:
                self._running.remove(work)
                self._end(work)
        return spoken

    def _end(self, work: Work) -> None:
        assert work.slot
        self.cache.give_back(work.slot, work.prompt + WORD * work.written)
