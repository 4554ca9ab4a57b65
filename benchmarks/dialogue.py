"""What is said to real models: conversations of several turns, and single questions.

The words are nonsense of two syllables, of which the tiny models have a token each.
The same seed gives the same words, and asks for answers of the same lengths.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.workload import length

SYSTEM_WORDS = 40  # that all of them begin with
FIRST_WORDS = 200  # of a first question, on average
LATER_WORDS = range(3, 10)  # of those that follow
ANSWER = 24  # tokens, on average
MOST_WORDS, MOST_TOKENS = 400, 72  # so that any conversation fits its context
TURNS = (2, 3, 4)  # of a conversation
ALONE = 0.75  # of the dialogues are single questions: half of the requests

_SYLLABLES = [c + v for c in "bdfgklmnprst" for v in "aeiou"]

Message = dict[str, Any]


class Question(NamedTuple):
    text: str
    max_tokens: int


class Dialogue(NamedTuple):
    """A conversation, as far as its client says it."""

    system: str
    questions: list[Question]

    def messages(self, answers: list[str]) -> list[Message]:
        """Give what is sent for the next answer, after these."""
        said = [{"role": "system", "content": self.system}]
        for (text, _), answer in zip(self.questions, answers, strict=False):
            said.append({"role": "user", "content": text})
            said.append({"role": "assistant", "content": answer})
        said.append({"role": "user", "content": self.questions[len(answers)].text})
        return said


def dialogues(seed: str) -> Iterator[Dialogue]:
    """Yield what one client has to say, without an end."""
    system = words(SYSTEM_WORDS, random.Random("system"))
    rng = random.Random(seed)
    while True:
        turns = 1 if rng.random() < ALONE else rng.choice(TURNS)
        sizes = [min(length(FIRST_WORDS, rng), MOST_WORDS)]
        sizes += rng.choices(LATER_WORDS, k=turns - 1)
        yield Dialogue(
            system,
            [
                Question(words(size, rng), min(length(ANSWER, rng), MOST_TOKENS))
                for size in sizes
            ],
        )


def words(count: int, rng: random.Random) -> str:
    return " ".join("".join(rng.choices(_SYLLABLES, k=2)) for _ in range(count))
