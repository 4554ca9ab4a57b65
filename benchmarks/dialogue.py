"""The prompts for real models: conversations of several turns, and single questions.

The words are nonsense of two syllables, each of which is a token of the tiny models.
The same seed gives the same words, and answers of the same lengths.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.workload import length

SYSTEM_WORDS = 40  # at the beginning of all prompts
FIRST_WORDS = 200  # of a first question, on average
LATER_WORDS = range(3, 10)  # of later questions
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
    """The client's side of a conversation."""

    system: str
    questions: list[Question]

    def messages(self, answers: list[str]) -> list[Message]:
        """Return the messages that ask for the next answer, after these."""
        messages = [{"role": "system", "content": self.system}]
        for (text, _), answer in zip(self.questions, answers, strict=False):
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": self.questions[len(answers)].text})
        return messages


def dialogues(seed: str) -> Iterator[Dialogue]:
    """Yield the dialogues of one client, without an end."""
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
