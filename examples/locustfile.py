"""Put a hub under load with users who chat, and see what they would feel.

    pip install locust
    export GOLLAMA_TOKEN=$(gollama-proxy token --sub load-test)
    locust -f examples/locustfile.py --headless -u 8 -r 4 -t 60s \\
        --host http://127.0.0.1:8000

Beside `POST /v1/chat/completions` (time until the answer's end) the table has rows of
its own, one per model. Locust calls all their numbers milliseconds:

    TTFT    milliseconds until the first token
    GAP     milliseconds of the longest silence between two pieces of one answer
    tok/s   tokens per second while an answer was being written (high is good, so the
            slow ones are under "Min", not under the high percentiles)

The last row, "Aggregated", adds up all of these and means nothing.

GOLLAMA_MODEL picks a model; else it is the first that the hub lists.
GOLLAMA_MAX_TOKENS is the length limit of an answer (128).
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
# To connect, and between two reads: beyond what the hub itself allows (300 s in its
# queue, 300 s for a first token), so that the hub's own words are what is counted.
PATIENCE = (5, 700)
SUBJECTS = ("rain", "bridges", "bees", "old maps", "bread", "chess", "tides", "owls")
WISHES = (
    "Tell me one surprising fact about {}.",
    "Explain {} to a child in two sentences.",
    "Write a haiku about {}.",
    "Which three questions would you ask an expert on {}?",
)


class ChatUser(HttpUser):
    """Someone who asks, reads the answer as it is written, thinks, and asks again.

    `FastHttpUser` would be cheaper, but it hands on a stream in blocks of a fixed size,
    and a first token that waits for its block to fill up says nothing about the hub.
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
                # `None`: whatever has arrived, as soon as it has arrived.
                for piece in reply.iter_content(chunk_size=None):
                    answer.feed(piece, time.perf_counter())
            except RequestException as error:
                answer.fail(f"connection lost: {type(error).__name__}")
            # With `stream=True` locust stops its clock at the response's head.
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
    """What can be learnt from a streamed answer, fed with bytes as they arrive."""

    def __init__(self) -> None:
        self.size = 0
        self.first = 0.0  # when the first text came; 0.0 is never
        self.last = 0.0
        self.gap = 0.0
        self._rest = b""
        self._events = 0
        self._tokens = 0
        self._done = False
        self._problem = ""

    def feed(self, piece: bytes, now: float) -> None:
        """Take bytes, cut anywhere: a piece may hold half an event, or three."""
        self.size += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def fail(self, problem: str) -> None:
        """Note what went wrong; the first problem is the one that is told."""
        self._problem = self._problem or problem

    def problem(self) -> str:
        """Say why this was no whole answer, or nothing."""
        if self._problem or self._done:
            return self._problem
        return "stream ended without [DONE]"

    def metrics(self, start: float) -> list[tuple[str, float]]:
        """Return what an answer to a request sent at `start` adds to each row."""
        if not self.first:
            return []
        rows = [("TTFT", (self.first - start) * 1000)]
        # Without `usage` an event counts as a token, which is nearly so.
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
    """Put a refusal into a few words that are the same for every such refusal."""
    try:
        said = reply.json()["error"]["message"]
    except (RequestException, AttributeError, LookupError, TypeError):
        # Locust gives status 0 to what never got an answer.
        said = type(reply.error).__name__ if reply.status_code == 0 else ""
    return f"status {reply.status_code}: {said}".rstrip(": ")
