"""Load a hub with chatting users, and measure what they notice.

    pip install locust
    export GOLLAMA_TOKEN=$(gollama-proxy token --sub load-test)
    locust -f examples/locustfile.py --headless -u 8 -r 4 -t 60s \\
        --host http://127.0.0.1:8000

In addition to `POST /v1/chat/completions` (the time until the end of the answer), the
table has these rows for each model. Locust labels all numbers as milliseconds:

    TTFT    milliseconds until the first token
    GAP     milliseconds of the longest silence between two pieces of one answer
    tok/s   tokens per second while an answer was generated (high is good, so the slow
            ones are in "Min", not in the high percentiles)

The last row, "Aggregated", mixes all of these and is meaningless.

GOLLAMA_MODEL chooses the model; the default is the first one that the hub lists.
GOLLAMA_MAX_TOKENS limits the length of an answer (default: 128).
"""

import json
import logging
import os
import random
import time
from typing import Any

from locust import HttpUser, between, events, task
from locust.exception import StopUser
from requests.exceptions import RequestException

TOKEN = os.environ.get("GOLLAMA_TOKEN", "")
MODEL = os.environ.get("GOLLAMA_MODEL", "")
MAX_TOKENS = int(os.environ.get("GOLLAMA_MAX_TOKENS", "128"))
# Seconds to connect, and between two reads: longer than the limits of the hub (300 s in
# its queue, 300 s for a first token), so that the hub's own errors are counted.
PATIENCE = (5, 700)
SUBJECTS = ("rain", "bridges", "bees", "old maps", "bread", "chess", "tides", "owls")
WISHES = (
    "Tell me one surprising fact about {}.",
    "Explain {} to a child in two sentences.",
    "Write a haiku about {}.",
    "Which three questions would you ask an expert on {}?",
)


class ChatUser(HttpUser):
    """A user that asks, reads the answer as it is generated, thinks, and asks again.

    `FastHttpUser` would be cheaper, but it returns a stream in blocks of a fixed size,
    so that the first token would wait until its block is full.
    """

    wait_time = between(0.5, 2)

    def on_start(self) -> None:
        if TOKEN:
            self.client.headers["Authorization"] = f"Bearer {TOKEN}"
        self.model = MODEL or self.first_model()

    def first_model(self) -> str:
        with self.client.get(
            "/v1/models", timeout=PATIENCE, catch_response=True
        ) as reply:
            try:
                return str(reply.json()["data"][0]["id"])
            except (RequestException, AttributeError, LookupError, TypeError):
                reply.failure(f"no model is listed: {reason(reply)}")
                logging.error("The hub lists no model: %s", reason(reply))
                raise StopUser from None

    @task
    def chat(self) -> None:
        wish = random.choice(WISHES).format(random.choice(SUBJECTS))
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": wish}],
            "max_tokens": MAX_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.perf_counter()
        answer = Answer()
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            stream=True,
            timeout=PATIENCE,
            catch_response=True,
        ) as reply:
            if reply.status_code != 200:
                reply.failure(reason(reply))
                return
            try:
                # `None`: everything, as soon as it has arrived.
                for piece in reply.iter_content(chunk_size=None):
                    answer.feed(piece, time.perf_counter())
            except RequestException as error:
                answer.fail(f"connection lost: {type(error).__name__}")
            # With `stream=True`, Locust stops its clock at the head of the response.
            meta = reply.request_meta
            meta["response_time"] = (time.perf_counter() - start) * 1000
            meta["response_length"] = answer.size
            if problem := answer.problem():
                reply.failure(problem)
                return
        for kind, value in answer.metrics(start):
            events.request.fire(
                request_type=kind,
                name=self.model,
                response_time=value,
                response_length=0,
                exception=None,
                context={},
            )


class Answer:
    """The measurements of a streamed answer, fed with bytes as they arrive."""

    def __init__(self) -> None:
        self.size = 0
        self.first = 0.0  # when the first text arrived; 0.0: never
        self.last = 0.0
        self.gap = 0.0
        self._rest = b""
        self._events = 0
        self._tokens = 0
        self._done = False
        self._problem = ""

    def feed(self, piece: bytes, now: float) -> None:
        """Take bytes, split anywhere: a piece may have half an event, or three."""
        self.size += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def fail(self, problem: str) -> None:
        """Record a problem; only the first one is reported."""
        self._problem = self._problem or problem

    def problem(self) -> str:
        """Return why the answer was not complete; empty if it was."""
        if self._problem or self._done:
            return self._problem
        return "stream ended without [DONE]"

    def metrics(self, start: float) -> list[tuple[str, float]]:
        """Return the rows of an answer to a request sent at `start`."""
        if not self.first:
            return []
        rows = [("TTFT", (self.first - start) * 1000)]
        # Without `usage` an event counts as a token, which is almost exact.
        tokens = self._tokens or self._events
        if self.last > self.first:
            rows.append(("GAP", self.gap * 1000))
            # n tokens have n - 1 gaps between them.
            rows.append(("tok/s", (tokens - 1) / (self.last - self.first)))
        return rows

    def _take(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            event = json.loads(data)
            error, usage = event.get("error"), event.get("usage")
            deltas = [choice["delta"] for choice in event.get("choices", ())]
            if error:
                self.fail(f"error event: {error.get('message')}")
            if usage:
                self._tokens = usage["completion_tokens"]
        except (ValueError, AttributeError, LookupError, TypeError):
            self.fail(f"not a chat event: {data[:80]!r}")
            return
        if any(d.get("content") or d.get("reasoning_content") for d in deltas):
            self._events += 1
            self.gap = max(self.gap, now - self.last) if self.first else 0.0
            self.first = self.first or now
            self.last = now


def reason(reply: Any) -> str:
    """Describe a refusal briefly, with the same text for the same cause."""
    try:
        text = reply.json()["error"]["message"]
    except (RequestException, AttributeError, LookupError, TypeError):
        # Locust sets status 0 for a request without a response.
        text = type(reply.error).__name__ if reply.status_code == 0 else ""
    return f"status {reply.status_code}: {text}".rstrip(": ")
