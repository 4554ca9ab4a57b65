"""Several hub processes, a worker that counts what runs on it, and many clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from tests.fakes import replies
from tests.fakes.asks import CHAT
from tests.fakes.client import Response, TruncatedError, Wire
from tests.fakes.exchange import Exchange, Request
from tests.fakes.hub import mint
from tests.fakes.process import HubProcess, hub_process
from tests.fakes.script import Barrier, Script, Step, chat_stream
from tests.fakes.valkey import StoreServer
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

DAY = 86_400
# What no test of a cluster is about: a crowd waits for as long as it takes.
PATIENT = {
    "queue__size": 10_000,
    "queue__timeout": 3600,
    "health__interval": 3600,
    "timeouts__first_token": 3600,
    "timeouts__gap": 3600,
    "timeouts__silence": 3600,
}


class HasPort(Protocol):
    """A hub, or a proxy in front of several."""

    @property
    def port(self) -> int: ...


class CountingWorker(ScriptedWorker):
    """Repeats each question, and counts how many it answers at once.

    `pace` is how long an answer takes, in seconds, or a barrier that each answer has
    to pass.
    """

    def __init__(self, slots: int, pace: float | Barrier = 0.0) -> None:
        super().__init__(slots=slots)
        self.pace = pace
        self.running = 0
        self.most = 0  # at once, ever
        self.began: list[str] = []  # the questions, in the order of their starts

    def answer(self, request: Request) -> Script:
        if request.method == "GET":
            return super().answer(request)

        async def work(exchange: Exchange) -> None:
            body = request.json()
            question = body["messages"][-1]["content"]
            self.began.append(question)
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                if isinstance(self.pace, asyncio.Semaphore):
                    await exchange.unless_hung_up(self.pace.acquire())
                elif isinstance(self.pace, asyncio.Event):
                    await exchange.unless_hung_up(self.pace.wait())
                elif isinstance(self.pace, float):
                    await exchange.unless_hung_up(asyncio.sleep(self.pace))
            finally:
                self.running -= 1  # a hub may use the slot when it has the last byte
            if body.get("stream"):
                for step in chat_stream([question]):
                    await step.play(exchange)
            else:
                answer = replies.chat_completion(question)
                await exchange.write(replies.json_reply(answer))

        return (Step("work", (), work),)


@contextlib.asynccontextmanager
async def running_hubs(
    count: int,
    *urls: str,
    environs: Sequence[Mapping[str, str]] = (),
    times: str = "",
    ready: bool = True,
    **settings: Any,
) -> AsyncIterator[list[HubProcess]]:
    """Run hub processes with the same settings; `environs` add to those of each.

    Their `times` are "hasty" or "patient" (`timed_hub.py`), or those of production.
    """
    each = [*environs, *({},) * (count - len(environs))]
    module = "tests.fakes.timed_hub" if times else "gollama_proxy"
    async with contextlib.AsyncExitStack() as stack:
        yield await asyncio.gather(
            *(
                stack.enter_async_context(
                    hub_process(
                        *urls,
                        environ={"HUB_TIMES": times, **environ},
                        module=module,
                        ready=ready,
                        **PATIENT,
                        **settings,
                    )
                )
                for environ in each
            )
        )


async def waiting_at(hub: HasPort) -> int:
    """Return how many requests wait for a slot at a hub."""
    page = (await call(hub, "GET", "/metrics")).body.decode()
    found = re.findall(r"(?m)^gollama_queue_waiting\{[^}]*\} (\d+)", page)
    return sum(map(int, found))


async def acts_with(hub: HasPort, count: int) -> None:
    """Wait until a hub uses the store, and knows so many hubs, itself included."""
    async with asyncio.timeout(DEADLINE):
        while True:
            shown = (await call(hub, "GET", "/admin/hubs")).json()
            store = shown["store"]
            mode = store and store["mode"]
            if mode == "up" and len(shown["hubs"]) == count:
                return
            await asyncio.sleep(0.02)


async def end_caution(store: StoreServer) -> None:
    """Have hubs rely on what is registered, as some seconds after their start."""
    text = (
        "local time = redis.call('TIME') "
        "local now = time[1] * 1000 + math.floor(time[2] / 1000) "
        "return redis.call('SET', KEYS[1], cmsgpack.pack({now - 60000, now}))"
    )
    await store.ask("EVAL", text, 1, "gollama:slots")


async def call(hub: HasPort, method: str, path: str, body: object = None) -> Response:
    """Call a hub as an operator."""
    now = int(time.time())
    claims = {"iat": now - DAY, "exp": now + DAY}  # for clocks that are hours off
    async with await Wire.connect("127.0.0.1", hub.port) as wire:
        token = mint(sub="operator", scope="admin", **claims)
        if method == "GET":
            await wire.get(path, token)
        else:
            # Spelled as the SDKs spell it: prompts are compared byte by byte.
            text = json.dumps(body or {}, separators=(",", ":"), ensure_ascii=False)
            await wire.post(path, text.encode(), token, method=method)
        return await wire.read_response()


class Crowd:
    """Clients that each ask one question, and know what the answer has to be."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.answers = 0
        self._tokens: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Crowd answers={self.answers} {dict(self.outcomes)}>"

    async def ask(
        self, hub: HasPort, question: str, *, stream: bool | None = None
    ) -> str:
        """Ask as the subject that the question begins with; return the outcome.

        It is "complete", or names what is wrong.  By default, every second question
        is streamed.
        """
        subject, _, number = question.partition(" ")
        stream = int(number) % 2 == 0 if stream is None else stream
        outcome = await self._ask(hub.port, subject, question, stream=stream)
        self.outcomes[outcome] += 1
        self.answers += outcome == "complete"
        return outcome

    async def ask_all(self, hubs: Sequence[HasPort], questions: Iterable[str]) -> None:
        """Ask all questions at once, one at each hub in turn."""
        async with asyncio.TaskGroup() as group:
            for place, question in enumerate(questions):
                hub = hubs[place % len(hubs)]
                group.create_task(self.ask(hub, question), name=f"fake {question}")

    async def _ask(
        self, port: int, subject: str, question: str, *, stream: bool
    ) -> str:
        body = {"messages": [{"role": "user", "content": question}], "stream": stream}
        try:
            async with await Wire.connect("127.0.0.1", port) as wire:
                await wire.post(CHAT, body, self._token(subject))
                ending = await wire.read_to_end()
        except (OSError, TruncatedError) as exc:
            return f"no answer: {exc}"
        answer = ending.response
        if not ending.clean:
            return "broken off"
        if answer.status != 200:
            return f"{answer.status} {answer.body.decode(errors='replace')[:200]}"
        if stream and b"data: [DONE]" not in answer.body:
            return "broken off with an error"
        return "complete" if question.encode() in answer.body else "another's answer"

    def _token(self, subject: str) -> str:
        """Return a token that is valid even for clocks that are hours off."""
        if subject not in self._tokens:
            now = int(time.time())
            claims = {"iat": now - DAY, "exp": now + DAY}
            self._tokens[subject] = mint(sub=subject, **claims)
        return self._tokens[subject]
