"""What a request costs its subject: every token, on every route, however it ends."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.behaviour.test_retries import InOrder
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import RunningHub, relays, running_hub
from tests.fakes.replies import (
    chunk,
    error_event,
    event,
    head,
    last_chunk,
    named_event,
    ping,
    role,
    sse_head,
    timings_of,
)
from tests.fakes.replies import token as word
from tests.fakes.script import (
    Script,
    answer,
    chat_stream,
    event_stream,
    expect_eof,
    give_way,
    notify,
    read_body,
    reset,
    send,
    wait,
)
from tests.fakes.streams import chat_chunk, delta, dump
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import LlamaServer

TPM = 100_000


def begun(*events: bytes) -> Script:
    """Stream these, and nothing that ends it."""
    return send(sse_head()), *(send(chunk(each)) for each in events)


async def left(hub: RunningHub, token: str) -> int:
    """Ask how many tokens of its minute a subject has left; that costs none."""
    response = await hub.post("/tokenize", {"content": "x"}, token)
    return int(response.header("x-ratelimit-remaining-tokens") or "")


async def cost(hub: RunningHub, path: str, body: dict[str, Any]) -> int:
    """Make a request that succeeds, as a separate subject."""
    token = hub.token(f"{path} {len(json.dumps(body))}", tpm=TPM)
    before = await left(hub, token)
    assert (await hub.post(path, body, token)).status == 200
    return before - await left(hub, token)


# --- Every API has its own definition ---------------------------------------------

CACHED = {"cache_read_input_tokens": 289, "input_tokens": 1}
MESSAGE = {"type": "message", "role": "assistant", "content": [], "model": "tiny"}


async def test_cached_prompt_tokens_are_charged_like_any_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Anthropic's `input_tokens` are only those that were not in the cache."""
    whole = MESSAGE | {"usage": CACHED | {"output_tokens": 4}}
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.on("/v1/messages", *answer(whole))
        assert await cost(hub, "/v1/messages", STREAM | {"stream": False}) == 294
    # Such as that it has read -288 tokens.
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize("words", [1, 1000])
async def test_a_streamed_message_costs_the_prompt_tokens_of_its_first_event(
    words: int,
) -> None:
    """The end of a long one does not contain it, and no text can fake it."""
    usage = CACHED | {"output_tokens": 1}
    start = {"type": "message_start", "message": MESSAGE | {"usage": usage}}
    text = '"usage":{"input_tokens":5,"output_tokens":5}'
    delta = {"type": "content_block_delta", "delta": {"text": text}}
    end = {"type": "message_delta", "usage": {"output_tokens": 4}}
    events = [start, *[delta] * words, end, {"type": "message_stop"}]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.on("/v1/messages", *event_stream(*map(named_event, events)))
        assert await cost(hub, "/v1/messages", STREAM) == 294


async def test_routes_that_generate_nothing_are_free() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for path, body in (
            ("/v1/messages/count_tokens", {"messages": []}),
            ("/tokenize", {"content": "x" * 1000}),
            ("/apply-template", {"messages": []}),
        ):
            worker.on(path, *answer({"input_tokens": 26, "usage": CACHED}))
            assert await cost(hub, path, body) == 0


async def test_vectors_and_ranks_cost_their_prompt() -> None:
    """Large ones come in pieces, and their usage is in front of the numbers."""
    data = [{"embedding": [0.5] * 50_000, "index": 0, "object": "embedding"}]
    usage = {"prompt_tokens": 10, "total_tokens": 10}
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for path in ("/v1/embeddings", "/v1/rerank"):
            for rest in ({"results": []}, {"data": data}):
                body = {"model": "tiny", "usage": usage, **rest}
                worker.on(path, *answer(body))
                assert await cost(hub, path, {"input": "hello"}) == 10


PROMPT = "hello there " * 30
CHATTED = {"messages": [{"role": "user", "content": PROMPT}]}


@pytest.mark.real
@pytest.mark.parametrize("ask_first", [False, True], ids=["cold", "warm"])
async def test_the_same_request_costs_the_same_on_every_route(
    ask_first: bool, llama_server: Callable[..., LlamaServer], tiny_model: Path
) -> None:
    """Of a real server: streamed or not, with what is in its cache or without."""
    chat = CHATTED | {"max_tokens": 4}
    text = {"prompt": PROMPT, "max_tokens": 4}
    same_prompts: list[dict[str, dict[str, Any]]] = [
        {
            CHAT: chat,
            "/chat/completions": chat,
            "/v1/messages": chat,
            "/v1/responses": {"input": PROMPT, "max_output_tokens": 4},
        },
        {
            "/v1/completions": text,
            "/completion": {"prompt": PROMPT, "n_predict": 4},
            "/completions": {"prompt": PROMPT, "n_predict": 4},
        },
    ]
    server = llama_server(tiny_model, slots=1, args=("--cache-ram", "0"))
    async with running_hub(server) as hub:
        for bodies in same_prompts:
            costs = {}
            for path, body in bodies.items():
                for stream in (False, True):
                    asked = {"model": "tiny", "temperature": 0, **body}
                    # Its cache is that of another request, or of the same one.
                    other = {"prompt": "Another text.", "n_predict": 1}
                    assert (await hub.post("/completion", other)).status == 200
                    if ask_first:
                        assert (await hub.post(path, asked)).status == 200
                    got = await cost(hub, path, asked | {"stream": stream})
                    costs[path, stream] = got
            assert len(set(costs.values())) == 1, costs
            [total] = set(costs.values())
            assert total > 250


@pytest.mark.real
async def test_several_answers_are_charged_in_full(
    llama_server: Callable[..., LlamaServer], tiny_model: Path
) -> None:
    """The prompt counts once, whether they come in one piece or as a stream."""
    body = CHATTED | {"model": "tiny", "max_tokens": 4, "n": 3}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    async with running_hub(llama_server(tiny_model)) as hub:
        one = await cost(hub, CHAT, body | {"n": 1})
        for more in ({}, {"logprobs": True}, {"stream": True}, usage):
            assert await cost(hub, CHAT, body | more) == one + 2 * 4, more
        native = {"prompt": PROMPT, "n_predict": 4}
        one = await cost(hub, "/completion", native)
        for more in ({}, {"stream": True}):
            several = native | {"n_cmpl": 2, **more}
            assert await cost(hub, "/completion", several) == one + 4, more


@pytest.mark.real
async def test_several_prompts_are_charged_in_full(
    llama_server: Callable[..., LlamaServer], tiny_model: Path
) -> None:
    """llama-server reports one of them; the others are estimated by their size."""
    async with running_hub(llama_server(tiny_model)) as hub:
        for path, limit in (
            ("/v1/completions", "max_tokens"),
            ("/completion", "n_predict"),
        ):
            for more in ({}, {"stream": True}, {"stop": ["no such"]}):
                body = {"model": "tiny", limit: 4, "prompt": ["x", PROMPT], **more}
                size = len(json.dumps(body))
                assert size // 8 + 8 <= await cost(hub, path, body) <= size + 8, more


@pytest.mark.real
async def test_counting_costs_nothing_at_a_real_server(
    llama_server: Callable[..., LlamaServer], tiny_model: Path
) -> None:
    async with running_hub(llama_server(tiny_model)) as hub:
        assert await cost(hub, "/v1/messages/count_tokens", CHATTED) == 0


# --- However it ends --------------------------------------------------------------


class Log(logging.Handler):
    """Keeps the lines of the access log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        fields = vars(record)["fields"]
        if fields["route"] != "/tokenize":
            self.lines.append(fields)
            self.arrived.set()

    def forget(self) -> None:
        self.lines.clear()
        self.arrived.clear()

    async def line(self) -> dict[str, Any]:
        """Wait for the one request of this test to end."""
        async with asyncio.timeout(DEADLINE):
            await self.arrived.wait()
        [line] = self.lines
        return line


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Log]:
    access, handler = logging.getLogger("gollama_proxy.access"), Log()
    access.addHandler(handler)
    with caplog.at_level(logging.INFO, access.name):
        yield handler
    access.removeHandler(handler)


WHOLE = {"model": "tiny", **CHATTED}
# No worker has counted them: four bytes each.
PROMPT_TOKENS = len(json.dumps(WHOLE)) // 4
STREAMED = WHOLE | {"stream": True}


@asynccontextmanager
async def charged(hub: RunningHub, log: Log) -> AsyncIterator[tuple[str, list[int]]]:
    """Give a token, and then what its one request has cost: prompt, and answer."""
    token, costs = hub.token(tpm=TPM), list[int]()
    before = await left(hub, token)
    yield token, costs
    line = await log.line()
    costs += [line.get("prompt_tokens", 0), line.get("tokens", 0)]
    assert before - await left(hub, token) == sum(costs), line


async def relayed(hub: RunningHub, events: int) -> None:
    """Wait until so many events of all running answers have come."""
    await until(lambda: sum(relay.events for relay in relays(hub)) >= events)


async def test_a_client_that_leaves_in_a_stream_is_charged(log: Log) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.on(CHAT, *begun(role() + word("a"), word("b")), expect_eof())
        async with charged(hub, log) as (token, costs):
            async with await hub.open(CHAT, STREAMED, token) as wire:
                for _ in range(3):
                    await wire.read_event()
    assert costs == [len(json.dumps(STREAMED)) // 4, 3]
    assert log.lines[0]["outcome"] == "client_gone"


async def test_a_client_that_leaves_before_its_whole_answer_arrives_is_charged(
    log: Log,
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.on(CHAT, *begun(role() + word("a"), word("b")), expect_eof())
        async with charged(hub, log) as (token, costs):
            async with await hub.open(CHAT, WHOLE, token):
                await relayed(hub, 3)
    assert costs == [PROMPT_TOKENS, 3]
    assert log.lines[0]["outcome"] == "client_gone"


@pytest.mark.real
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_a_real_server_is_charged(
    stream: bool,
    log: Log,
    llama_server: Callable[..., LlamaServer],
    brisk_model: Path,
) -> None:
    body = WHOLE | {"stream": stream, "max_tokens": 2000}
    async with running_hub(llama_server(brisk_model)) as hub:
        async with charged(hub, log) as (token, costs):
            async with await hub.open(CHAT, body, token):
                await relayed(hub, 10)
    assert costs[0] == len(json.dumps(body)) // 4
    assert costs[1] >= 10


async def test_usage_reported_before_the_client_leaves_counts(log: Log) -> None:
    """A stream with `timings_per_token` has it in each event, a message first."""
    timed = chat_chunk(delta(content="a"), timings=timings_of(2, 1, 289))
    start = {"type": "message_start", "message": MESSAGE | {"usage": CACHED}}
    text = {"type": "content_block_delta", "delta": {"text": "a"}}
    for path, events, tokens in (
        (CHAT, [role() + word("a"), dump(timed)], 2),
        ("/v1/messages", [named_event(start) + named_event(text)], 2),
        ("/completion", [native(1) + native(2), native(3)], 3),
    ):
        log.forget()
        async with ScriptedWorker() as worker, running_hub(worker) as hub:
            worker.on(path, *begun(*events), expect_eof())
            async with charged(hub, log) as (token, costs):
                async with await hub.open(path, STREAMED, token) as wire:
                    for _ in range(b"".join(events).count(b"data: ")):
                        await wire.read_event()
        assert costs == [290, tokens], path


def native(number: int) -> bytes:
    return event({"content": "a", "tokens_predicted": number, "tokens_evaluated": 290})


async def test_a_client_that_leaves_before_anything_is_generated_is_not_charged(
    log: Log,
) -> None:
    """Some servers send even the role before they have read the prompt."""
    for stream in (True, False):
        log.forget()
        async with ScriptedWorker() as worker, running_hub(worker) as hub:
            worker.on(CHAT, *begun(ping(), role()), notify("sent"), expect_eof())
            async with charged(hub, log) as (token, costs):
                async with await hub.open(CHAT, WHOLE | {"stream": stream}, token):
                    await worker.reached("sent")
        assert costs == [0, 0]


async def test_an_answer_that_breaks_off_is_charged(log: Log) -> None:
    async with (
        ScriptedWorker() as worker,
        # No other worker may resume it.
        running_hub(worker, rescue__enabled=False, retry__attempts=1) as hub,
    ):
        worker.on(CHAT, *begun(role() + word("a")), reset())
        async with charged(hub, log) as (token, costs):
            async with await hub.open(CHAT, STREAMED, token) as wire:
                await wire.read_to_end()
    assert costs == [len(json.dumps(STREAMED)) // 4, 2]
    assert log.lines[0]["error"] == "worker_connection_lost"


async def test_an_answer_that_ends_with_an_error_is_charged(log: Log) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        error = send(chunk(error_event("no")) + last_chunk())
        worker.on(CHAT, *begun(role() + word("a"), word("b")), wait("go"), error)
        async with charged(hub, log) as (token, costs):
            async with await hub.open(CHAT, STREAMED, token) as wire:
                for _ in range(3):
                    await wire.read_event()
                worker.release("go")
                await wire.read_to_end()
    assert costs == [len(json.dumps(STREAMED)) // 4, 4]


async def test_the_tokens_before_an_error_are_charged(log: Log) -> None:
    """The client gets a status instead.  An error alone costs nothing."""
    for events, tokens in ((word("a") + word("b"), 2), (role(), 0)):
        async with (
            ScriptedWorker() as worker,
            running_hub(worker, retry__attempts=1) as hub,
        ):
            worker.on(CHAT, *event_stream(events + error_event("no")))
            async with charged(hub, log) as (token, costs):
                assert (await hub.post(CHAT, STREAMED, token)).status == 500
        prompt = len(json.dumps(STREAMED)) // 4
        assert costs == [prompt if tokens else 0, tokens]
        log.forget()


async def test_the_tokens_of_a_failed_attempt_are_charged(
    log: Log,
) -> None:
    """The prompt counts once; the answer that was lost had three events."""
    async with (
        ScriptedWorker() as bad,
        ScriptedWorker() as good,
        running_hub(bad, good, rescue__enabled=False) as hub,
    ):
        hub.hub.balancer.policy = InOrder()
        bad.on(CHAT, *begun(role() + word("a"), word("b")), reset())
        good.on(CHAT, *chat_stream(["a"] * 5, usage=True))
        async with charged(hub, log) as (token, costs):
            assert (await hub.post(CHAT, WHOLE, token)).status == 200
    assert costs == [20, 3 + 5]


@pytest.mark.parametrize("breaks", [1, 2])
@pytest.mark.parametrize("body", [STREAMED, WHOLE])
async def test_what_another_worker_continues_is_not_charged_as_prompt(
    log: Log, body: dict[str, Any], breaks: int
) -> None:
    """For a worker that continues, the answer so far is a part of the prompt."""
    texts = ["Once", " upon", " a", " time", "."]

    def ends(already: int, new: int) -> tuple[bytes, ...]:
        written = ["".join(texts[:already])] * bool(already)
        first, *more = map(word, [*written, *texts[already : already + new]])
        return role() + first, *more

    async with (
        ScriptedWorker() as first,
        ScriptedWorker() as second,
        ScriptedWorker() as third,
        running_hub(first, second, third) as hub,
    ):
        hub.hub.balancer.policy = InOrder()
        first.on(CHAT, *begun(*ends(0, 2)), reset())
        last, already = second, 2
        if breaks == 2:
            second.on(CHAT, *begun(*ends(2, 1)), reset())
            last, already = third, 3
        rest = ["".join(texts[:already]), *texts[already:]]
        read = timings_of(len(rest) - 1, 20 + already - 7, 7)
        last.on(CHAT, *chat_stream(rest, timings=read))
        async with charged(hub, log) as (token, costs):
            assert b" time" in (await hub.post(CHAT, body, token)).body
    assert last.requests
    # A stream that broke off counts by its events: one with the role, a repetition.
    assert costs == [20, len(texts) + (1 if breaks == 1 else 1 + 2)]


async def test_a_hub_that_stops_logs_what_was_generated(log: Log) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.on(CHAT, *begun(role() + word("a")), expect_eof())
        async with await hub.open(CHAT, STREAMED) as wire:
            for _ in range(2):
                await wire.read_event()
            hub.hub.proxy.cut()
            line = await log.line()
    assert (line["prompt_tokens"], line["tokens"]) == (PROMPT_TOKENS + 4, 2)


async def test_an_answer_without_usage_costs_by_its_size(log: Log) -> None:
    """`response_fields` of a llama-server leaves out whatever a client wants."""
    body = {"prompt": "x" * 400, "response_fields": ["content"]}
    content = {"content": "y" * 8000}
    for headers in ([], [("Transfer-Encoding", "chunked")]):
        log.forget()
        async with ScriptedWorker() as worker, running_hub(worker) as hub:
            if headers:
                data = json.dumps(content).encode()
                worker.on(
                    "/completion",
                    send(head(200, headers)),
                    send(chunk(data[:9])),
                    give_way(),
                    send(chunk(data[9:])),
                    send(last_chunk()),
                )
            else:
                worker.on("/completion", *answer(content))
            async with charged(hub, log) as (token, costs):
                assert (await hub.post("/completion", body, token)).status == 200
        [prompt, tokens] = costs
        assert 400 // 4 <= prompt <= 500 // 4
        assert 2000 <= tokens <= 2010


async def test_leaving_an_answer_without_visible_tokens_is_charged_by_time(
    log: Log,
) -> None:
    """In one piece, it is generated unseen; here by a worker that is very fast."""
    body = WHOLE | {"logprobs": True, "max_tokens": 77}
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        pace = hub.hub.registry.workers[0].pace_of("tiny")
        pace.speed.read(10**12, 1.0)
        pace.speed.wrote(10**12, 1.0)
        worker.on(CHAT, expect_eof())
        async with charged(hub, log) as (token, costs):
            async with await hub.open(CHAT, body, token):
                await worker.received()
    assert costs == [len(json.dumps(body)) // 4, 77]


async def test_a_stream_that_has_not_begun_costs_no_time(log: Log) -> None:
    """Nor does a body that the worker has only got a part of."""
    stream = json.dumps(STREAMED | {"pad": "x" * 8000}).encode()
    whole = json.dumps(WHOLE | {"pad": "x" * 5000}).encode()[:-1]
    half = [("Content-Length", "9999")]
    for body, headers in ((stream, []), (whole, half)):
        async with (
            ScriptedWorker() as worker,
            running_hub(worker, limits__replay_window=4096) as hub,
        ):
            pace = hub.hub.registry.workers[0].pace_of("tiny")
            pace.speed.read(10**12, 1.0)
            pace.speed.wrote(10**12, 1.0)
            worker.on(CHAT, notify("asked"), expect_eof())
            if headers:
                worker.on(CHAT, read_body(100), notify("asked"), expect_eof())
            async with charged(hub, log) as (token, costs):
                async with await hub.open(CHAT, body, token, headers=headers):
                    await worker.reached("asked")
        assert costs == [0, 0]
        log.forget()
