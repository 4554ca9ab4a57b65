"""Clients that hold conversations: each turn contains the answers so far."""

from __future__ import annotations

import asyncio
import time

import msgspec

from benchmarks.clients import Come, Habit, connect
from benchmarks.dialogue import Message, dialogues
from benchmarks.load import Client, Tally, spell

DATA = b"data: "
DONE = b"data: [DONE]"


class Timings(msgspec.Struct):
    """llama-server's account of an answer; times in milliseconds."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    timings: Timings | None = None


_event = msgspec.json.Decoder(_Event)


class Exchange(Client):
    """A question, and its answer as it arrives; times are monotonic seconds."""

    def __init__(
        self,
        port: int,
        bearer: str,
        messages: list[Message],
        max_tokens: int,
        previous: Exchange | None = None,
    ) -> None:
        """Prepare the request; `previous` is the turn before this one."""
        document = {"model": "any", "messages": messages, "stream": True}
        document |= {"max_tokens": max_tokens, "temperature": 0}
        super().__init__(spell(port, bearer, document), Tally())
        self.turn: int = previous.turn + 1 if previous else 1
        self.repeats = previous.tokens if previous else 0  # tokens, of that turn
        self.began = time.monotonic()
        self.arrivals: list[float] = []  # of each token
        self.words: list[str] = []
        self.timings: Timings | None = None
        self._held = b""
        self._done = False

    def __repr__(self) -> str:
        return f"<Exchange turn={self.turn} {len(self.words)} tokens {self.flaw!r}>"

    @property
    def first_token(self) -> float | None:
        """Return the seconds to the first token; None if none came."""
        return self.arrivals[0] - self.began if self.arrivals else None

    @property
    def answer(self) -> str:
        return "".join(self.words)

    @property
    def prompt_tokens(self) -> int:
        timings = self.timings
        return timings.cache_n + timings.prompt_n if timings else 0

    @property
    def tokens(self) -> int:
        """The tokens of the prompt and the answer."""
        return self.prompt_tokens + len(self.words)

    def on_body(self, body: bytes) -> None:
        self._start()
        *events, self._held = (self._held + body).split(b"\n\n")
        for event in events:
            if event == DONE:
                self._done = True
            elif event.startswith(DATA) and self._parser.get_status_code() == 200:
                self._take_in(event[len(DATA) :])

    def _take_in(self, data: bytes) -> None:
        try:
            event = _event.decode(data)
        except msgspec.DecodeError as exc:
            self._end(f"not an event: {exc}")
            return
        if event.choices and (content := event.choices[0].delta.content):
            self.arrivals.append(time.monotonic())
            self.words.append(content)
        self.timings = event.timings or self.timings

    def on_message_complete(self) -> None:
        if (status := self._parser.get_status_code()) != 200:
            self._end(f"status {status}")
        elif not self._done:
            self._end("no [DONE]")
        elif not self.words:
            self._end("no token")
        else:
            self._end()


def talking(port: int, bearers: list[str], habit: Habit) -> Come[Exchange]:
    """Return a loop in which a client goes through its dialogues."""

    async def come(
        number: int, exchanges: list[Exchange], leaving: asyncio.Event
    ) -> None:
        rng, bearer = habit.rng(number), bearers[number % len(bearers)]
        for dialogue in dialogues(f"{habit.seed} {number}"):
            answers: list[str] = []
            last: Exchange | None = None
            for question in dialogue.questions:
                await habit.rest(rng)
                if leaving.is_set():
                    return
                messages = dialogue.messages(answers)
                last = Exchange(port, bearer, messages, question.max_tokens, last)
                exchanges.append(last)
                await connect(last, port)
                if last.flaw:
                    break
                answers.append(last.answer)

    return come
