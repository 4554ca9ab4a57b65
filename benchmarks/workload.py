"""The requests of a simulation: conversations of several turns, and single ones.

They are the same for each policy, however long the answers take: the next turn of a
conversation depends only on its number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from benchmarks.machines import BYTES_PER_TOKEN, MODEL, Request
from gollama_proxy.scheduling.policies import Ask

ONE_SHOTS = 0.5  # of the requests; the others are turns
TURNS = 4.0  # of a conversation, on average
PAUSE = 10.0  # seconds before the next turn
SYSTEM = 300  # tokens at the beginning of all prompts; those below are averages
NEW_TOKENS = 40  # of each turn
FIRST_TOKENS = 1000  # of the first turn, and of a one-shot request
ANSWER = 150
BOUNDARIES = 8  # of a conversation, as in scheduling/affinity
SUBJECTS = 50


def workload(streams: int, rate: float, rng: random.Random) -> Iterator[Request]:
    """Yield first turns and one-shot requests, in the order in which they arrive."""
    now, count, conversation = 0.0, 0, 0
    multi = (1 - ONE_SHOTS) / TURNS
    share = multi / (multi + ONE_SHOTS)  # of the conversations among the arrivals
    while count < streams:
        now += rng.expovariate(rate * (multi + ONE_SHOTS))
        conversation += 1
        goes_on = rng.random() < share
        turns = 1 + int(rng.expovariate(-math.log(1 - 1 / TURNS))) if goes_on else 1
        count += turns
        prompt = SYSTEM + length(FIRST_TOKENS, rng)
        yield Request(
            conversation,
            1,
            turns,
            f"subject {rng.randrange(SUBJECTS)}",
            SYSTEM,
            prompt,
            length(ANSWER, rng),
            now,
        )


def next_turn(last: Request, now: float) -> Request:
    """Return the next turn of a conversation, which is the same in each run."""
    rng = random.Random(last.conversation << 8 | last.turn)
    return Request(
        last.conversation,
        last.turn + 1,
        last.turns,
        last.subject,
        last.system,
        last.prompt + last.answer + length(NEW_TOKENS, rng),
        length(ANSWER, rng),
        now + rng.expovariate(1 / PAUSE),
    )


def ask_of(request: Request) -> Ask:
    first = max(1, request.turn - BOUNDARIES + 1)
    return Ask(
        MODEL,
        request.prompt * BYTES_PER_TOKEN,
        0,
        request.subject,
        tuple(
            hash((request.conversation, turn))
            for turn in range(first, request.turn + 1)
        ),
    )


def length(mean: float, rng: random.Random) -> int:
    """Draw a length like those of prompts and answers: most short, few long."""
    return 8 + int(rng.lognormvariate(math.log(mean) - 0.32, 0.8))
