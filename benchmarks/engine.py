"""llama-server's main loop, without a model: what it does in which order, and when.

Each turn of the loop is a batch: one token for each answer that is being written, and
as much as fits of the prompts that are to be read.  It takes

    pace.batch  +  pace.written * answers  +  pace.read * prompt tokens

seconds, and then each answer has a token more, and each prompt that was read to its end
the first token of its answer.  So answers stand nearly still while a long prompt is
read, as they do in the real one.  Requests beyond the slots wait, without a bound,
first come, first served.
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
        """Give the pace of a machine that takes so many times as long."""
        return Pace(self.batch * factor, self.written * factor, self.read * factor)

    def tokens_per_second(self, answers: int) -> float:
        """Tell how fast each of so many answers is written."""
        return 1 / (self.batch + self.written * answers)


@dataclass(eq=False)
class Work:
    """One request: its prompt, and the answer that it is to have."""

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
    """The loop of one server; who runs it keeps the time."""

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
        """Forget a request that nobody waits for any more; at once, if it runs.

        One that waits stays, as in llama-server, and finds nobody when it is written.
        """
        if work in self._running:
            self._running.remove(work)
            self._end(work)

    def plan(self, now: float) -> float | None:
        """Begin a turn of the loop, and tell its seconds; None if there is no work."""
        while self._waiting and (found := self.cache.take(self._waiting[0].prompt)):
            work = self._waiting.popleft()
            work.slot, length = found
            # The last token is always read: what comes after it is wanted.
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
        """End the turn; give those that have one more token."""
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
