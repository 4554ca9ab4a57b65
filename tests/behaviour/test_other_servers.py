"""Other servers than llama-server, with the tables that docs/large-models.md shows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gollama_proxy.config import load
from gollama_proxy.fleet.state import Hold, WorkerState
from tests.fakes.asks import CHAT
from tests.fakes.cases import case
from tests.fakes.client import Ending, Response
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.page import parse, value
from tests.fakes.replies import (
    anthropic,
    chunk,
    done,
    event,
    last_chunk,
    named_event,
    responses,
    role,
    sse_head,
    token,
)
from tests.fakes.script import answer, close, reset, send, wait
from tests.fakes.standins import (
    TEXTS,
    LmStudio,
    Ollama,
    SGLang,
    StandIn,
    TabbyApi,
    Vllm,
)
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

PAGE = Path(__file__).parents[2] / "docs" / "large-models.md"
TEXT = PAGE.read_text()
KEY = "secret-of-the-worker"
HELLO = [{"role": "user", "content": "hello"}]
STREAM: dict[str, Any] = {
    "messages": HELLO,
    "stream": True,
    "stream_options": {"include_usage": True},
}


class Kind(NamedTuple):
    """A server of the page: its stand-in, and what the hub should know of it."""

    title: str
    stand_in: type[StandIn]
    models: tuple[str, ...]
    context: int  # that the server has
    bad: Any  # a temperature that it refuses
    refusal: str  # in its words, which reach the client


KINDS = (
    Kind("vLLM", Vllm, ("qwen2.5-72b",), 4096, 9, "temperature must be in [0, 2]"),
    Kind("SGLang", SGLang, ("qwen2.5-72b",), 4096, 9, "temperature must be in [0, 2]"),
    Kind("TabbyAPI", TabbyApi, ("qwen2.5-32b",), 4096, 9, "less than or equal to 2"),
    Kind("Ollama", Ollama, ("qwen3:8b", "llama3.2:latest"), 8192, "x", "unmarshal"),
    Kind(
        "LM Studio",
        LmStudio,
        ("qwen2.5-7b-instruct", "not-for-the-hub"),
        8192,
        "x",
        "'temperature' must be a number",
    ),
)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.title for kind in KINDS])


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
    assert found is not None, title
    return found[1]


def table_of(title: str) -> str:
    """Return the settings that a section of the page shows."""
    (block,) = re.findall(r"^```toml\n(.*?)^```$", section(title), re.M | re.S)
    return str(block)


@contextlib.asynccontextmanager
async def behind(
    kind: Kind,
    folder: Path,
    *others: ScriptedWorker,
    more: str = "",
    key: str = KEY,
    **settings: Any,
) -> AsyncIterator[tuple[StandIn, RunningHub]]:
    """Run a hub with the table of the page, in front of its server."""
    table = table_of(kind.title)
    variables = re.findall(r'^api_key_env = "(\w+)"', table, re.M)
    async with kind.stand_in(
        *kind.models, context=kind.context, key=KEY if variables else ""
    ) as server:
        table, changed = re.subn(
            r'^url = ".*"', f'url = "{server.url}"', table, flags=re.M
        )
        assert changed == 1
        for each in others:
            table += f'\n[[workers]]\nurl = "{each.url}"\n'
        file = folder / "gollama.toml"
        file.write_text(table + more)
        environ = dict.fromkeys(variables, key)
        async with running_hub(file=file, environ=environ, **settings) as hub:
            yield server, hub


def ask(kind: Kind, **fields: Any) -> dict[str, Any]:
    return STREAM | {"model": kind.models[0]} | fields


def events_of(response: Response) -> list[dict[str, Any]]:
    lines = response.body.replace(b"\r\n", b"\n").split(b"\n")
    found = [line[6:] for line in lines if line.startswith(b"data: {")]
    return [json.loads(data) for data in found]


def text_of(events: list[dict[str, Any]]) -> str:
    choices = [choice for each in events for choice in each.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def assert_continued(ending: Ending, times: int, by: str) -> None:
    """Check that an answer is complete, and which worker has continued it last."""
    assert ending.clean
    assert f"rescued {times} by {by}".encode() in ending.response.body
    assert text_of(events_of(ending.response)) == "".join(TEXTS)


# --- The page ---------------------------------------------------------------------


def test_every_server_of_the_page_is_tried() -> None:
    shown = re.findall(r"^### (.+)$", section("Other servers") + TEXT, re.M)
    assert set(shown) == {kind.title for kind in KINDS}
    names = re.findall(r"^\| (.+?) \| listed", section("Other servers"), re.M)
    assert names == [kind.title for kind in KINDS]


def test_all_settings_of_the_page_are_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```$", TEXT, re.M | re.S)
    assert len(blocks) == len(KINDS) + 2
    for number, block in enumerate(blocks):
        with case(block):
            tomllib.loads(block)
            file = tmp_path / f"{number}.toml"
            file.write_text(block)
            variables = re.findall(r'^api_key_env = "(\w+)"', block, re.M)
            environ = {"GOLLAMA_JWT_SECRET": "x" * 32} | dict.fromkeys(variables, KEY)
            load.load(file, environ)


# --- What the hub knows -----------------------------------------------------------


@each_kind
async def test_models_slots_context_and_health_are_known(
    kind: Kind, tmp_path: Path
) -> None:
    async with behind(kind, tmp_path) as (_, hub):
        (worker,) = hub.hub.registry.workers
        assert (worker.state, worker.reason) == (WorkerState.READY, "ok")
        assert worker.slots is not None
        stated = worker.config.models
        listed = (await hub.get("/v1/models")).json()["data"]
        usable = {model for model in kind.models if not stated or model in stated}
        assert {each["id"] for each in listed} == usable
        for each in listed:
            assert each["gollama"]["context"] == kind.context
            assert each["gollama"]["state"] == "ready"


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if "api_key_env" in table_of(kind.title)],
    ids=lambda kind: kind.title,
)
async def test_a_wrong_key_is_found_out_by_the_health_check(
    kind: Kind, tmp_path: Path
) -> None:
    async with behind(kind, tmp_path, key="wrong") as (_, hub):
        (worker,) = hub.hub.registry.workers
        assert worker.state is WorkerState.DOWN
        assert re.search("key$", worker.reason, re.IGNORECASE)
        assert (await hub.post(CHAT, ask(kind))).status in (404, 503)


# --- Answers ----------------------------------------------------------------------


@each_kind
async def test_answers_stream_and_come_in_one_piece(kind: Kind, tmp_path: Path) -> None:
    async with behind(kind, tmp_path) as (server, hub):
        response = await hub.post(CHAT, ask(kind))
        assert response.status == 200
        assert response.body.replace(b"\r\n", b"\n").endswith(b"data: [DONE]\n\n")
        events = events_of(response)
        assert text_of(events) == "".join(TEXTS)
        (usage,) = [each["usage"] for each in events if each.get("usage")]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1, len(TEXTS))

        whole = (await hub.post(CHAT, ask(kind, stream=False))).json()
        assert whole["choices"][0]["message"]["content"] == "".join(TEXTS)
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["completion_tokens"] == len(TEXTS)
        paths = {request.path for request in server.requests}
        assert paths == {CHAT}  # nothing was tried that it does not have


@each_kind
async def test_a_stream_of_a_limited_subject_is_counted_exactly(
    kind: Kind, tmp_path: Path
) -> None:
    """The hub asks for usage, and keeps it from a client that did not."""
    async with behind(kind, tmp_path) as (server, hub):
        token = hub.token("bob", tpm=1000)
        body = ask(kind, stream_options=None)
        first = await hub.post(CHAT, body, token)
        assert text_of(events_of(first)) == "".join(TEXTS)
        assert all(each["choices"] for each in events_of(first))
        assert server.requests[0].json()["stream_options"]["include_usage"] is True
        second = await hub.post(CHAT, body, token)
        left = second.header("X-RateLimit-Remaining-Tokens")
        assert left == str(1000 - 1 - len(TEXTS))


@each_kind
async def test_each_token_arrives_as_soon_as_it_is_there(
    kind: Kind, tmp_path: Path
) -> None:
    async with behind(kind, tmp_path) as (server, hub):
        server.pace = "go"
        async with await hub.open(CHAT, ask(kind)) as wire:
            await wire.read_until(b'"content":" no"')
            server.release("go")
            await wire.read_until(b'"content":"wu"')
            await wire.read_until(b"[DONE]")


@each_kind
async def test_a_refusal_reaches_the_client_in_the_words_of_the_server(
    kind: Kind, tmp_path: Path
) -> None:
    async with behind(kind, tmp_path) as (_, hub):
        for stream in (True, False):
            response = await hub.post(
                CHAT, ask(kind, temperature=kind.bad, stream=stream)
            )
            assert 400 <= response.status < 500
            assert kind.refusal in response.body.decode()
        (worker,) = hub.hub.registry.workers
        assert worker.breaker.closed
        reply = await hub.post(CHAT, ask(kind, model="nobody-has-it"))
        if len(kind.models) > 1 and not worker.config.models:
            assert reply.status == 404  # of the hub, with the names that there are
            assert "qwen3:8b" in reply.body.decode()
        else:  # the only model is meant
            assert reply.status == 200


@each_kind
async def test_a_path_that_a_server_does_not_have_is_a_404(
    kind: Kind, tmp_path: Path
) -> None:
    """Even that of LM Studio, which answers 200 to any path."""
    async with behind(kind, tmp_path) as (_, hub):
        body = {"model": kind.models[0], "content": "hello"}
        reply = await hub.post("/tokenize", body)
        assert reply.status == 404
        assert b"error" in reply.body or b"detail" in reply.body
        (worker,) = hub.hub.registry.workers
        assert worker.breaker.closed


@each_kind
async def test_a_prompt_that_is_too_long_is_refused_or_goes_elsewhere(
    kind: Kind, tmp_path: Path
) -> None:
    words = " ".join(["w"] * (kind.context + 100))
    body = ask(kind, messages=[{"role": "user", "content": words}])
    if kind.title != "Ollama":  # it cuts the prompt, and no other worker is larger
        async with behind(kind, tmp_path) as (_, hub):
            for stream in (True, False):
                response = await hub.post(CHAT, body | {"stream": stream})
                error = response.json()["error"]
                assert (response.status, error["code"]) == (
                    400,
                    "context_length_exceeded",
                )
                assert str(kind.context) in error["message"]
    async with (
        ScriptedWorker(kind.models[0], n_ctx=100_000) as large,
        behind(kind, tmp_path, large) as (_, hub),
    ):
        large.on("/tokenize", *answer({"tokens": [1] * (kind.context + 100)}))
        response = await hub.post(CHAT, body)
        assert response.status == 200
        assert response.header("X-Gollama-Worker") == large.name


async def test_a_prompt_that_cannot_be_counted_goes_to_a_larger_fallback(
    tmp_path: Path,
) -> None:
    """Ollama would cut it; a short prompt stays there."""
    (kind,) = (kind for kind in KINDS if kind.title == "Ollama")
    more = '\n[models]\nfallbacks = {"qwen3:8b" = ["large"]}\n'
    words = "word " * 20_000
    async with (
        ScriptedWorker("large", n_ctx=100_000) as large,
        behind(kind, tmp_path, large, more=more) as (server, hub),
    ):
        response = await hub.post(CHAT, ask(kind))
        assert response.header("X-Gollama-Worker") == "ollama"
        body = ask(kind, messages=[{"role": "user", "content": words}])
        response = await hub.post(CHAT, body)
        assert response.header("X-Gollama-Worker") == large.name
        chats = [each for each in server.requests if each.path == CHAT]
        assert len(chats) == 1


# --- Models that are loaded at their first request ---------------------------------

loading_kinds = pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if issubclass(kind.stand_in, Ollama | LmStudio)],
    ids=lambda kind: kind.title,
)


@loading_kinds
async def test_a_client_is_notified_while_a_model_is_loaded(
    kind: Kind, tmp_path: Path
) -> None:
    async with behind(kind, tmp_path, clock=Clock()) as (server, hub):
        server.holds = "loaded"
        async with await hub.open(CHAT, ask(kind)) as wire:
            await server.received()
            hub.pass_time(20)
            await wire.read_until(b": processing\n\n")
            server.release("loaded")
            await wire.read_until(b"[DONE]")
        (worker,) = hub.hub.registry.workers
        assert worker.breaker.closed


@loading_kinds
async def test_a_stream_does_not_wait_for_a_model_that_another_worker_has(
    kind: Kind, tmp_path: Path
) -> None:
    async with (
        ScriptedWorker(kind.models[0]) as spare,
        behind(kind, tmp_path, spare, clock=Clock()) as (server, hub),
    ):
        server.holds = "loaded"
        hub.hub.registry.hold(spare.name, Hold.PAUSED)
        async with await hub.open(CHAT, ask(kind)) as wire:
            await server.received()
            hub.hub.registry.release(spare.name, Hold.PAUSED)
            hub.pass_time(60)
            response = await wire.read_response()
        assert response.header("X-Gollama-Worker") in (spare.name, None)
        assert text_of(events_of(response)) == "".join(TEXTS)
        assert len(spare.requests) == 1


# --- Names of Ollama --------------------------------------------------------------


async def test_a_name_without_a_tag_means_the_latest_one() -> None:
    aliases = {"small": "llama3.2", "*": "qwen3:8b"}
    async with (
        Ollama("llama3.2:latest", "qwen3:8b", "phi:latest", "phi") as server,
        running_hub(server, models__aliases=aliases) as hub,
    ):
        for name, model in (
            ("llama3.2", "llama3.2:latest"),
            ("llama3.2:latest", "llama3.2:latest"),
            ("small", "llama3.2:latest"),
            ("phi", "phi"),  # which is another one
            ("qwen3", "qwen3:8b"),  # by the wildcard: it has no such tag
        ):
            with case(name):
                body = {"model": name, "messages": HELLO}
                reply = (await hub.post(CHAT, body)).json()
                assert reply["model"] == name
                assert server.requests[-1].json()["model"] == model
                assert (await hub.get(f"/v1/models/{name}")).status == 200
        assert hub.hub.registry.unserved() == []


async def test_a_name_without_a_tag_has_its_own_fallbacks_and_permission() -> None:
    async with (
        Ollama("llama3.2:latest") as server,
        ScriptedWorker("spare") as spare,
        running_hub(
            server, spare, environ={"GOLLAMA_MODELS_FALLBACKS": "llama3.2=spare"}
        ) as hub,
    ):
        body = {"model": "llama3.2", "messages": HELLO}
        for claim, status in (
            (["llama3.2"], 200),
            (["llama3.2:latest"], 200),
            (["llama*"], 200),
            (["llama3"], 403),
            (["spare"], 403),
        ):
            with case(claim):
                reply = await hub.post(CHAT, body, hub.token(models=claim))
                assert reply.status == status
        server.overloaded = True
        reply = await hub.post(CHAT, body)
        assert reply.header("X-Gollama-Worker") == spare.name


# --- Failures ---------------------------------------------------------------------


@each_kind
async def test_an_answer_that_breaks_off_does_not_look_complete(
    kind: Kind, tmp_path: Path
) -> None:
    async with behind(kind, tmp_path, rescue__enabled=False) as (server, hub):
        server.breaks_after, server.pace = 2, "go"
        async with await hub.open(CHAT, ask(kind)) as wire:
            await wire.read_until(b'"content":" no"')
            server.release("go")
            await wire.read_until(b'"error"')
            assert not (await wire.read_eof()).endswith(last_chunk())
        (failed,) = hub.hub.recent.find()
        assert failed["outcome"] == "error"


@each_kind
@pytest.mark.parametrize("ends", ["by reporting an error", "without a word"])
async def test_an_answer_that_a_server_cannot_complete_is_continued(
    ends: str, kind: Kind, tmp_path: Path
) -> None:
    """It reports that when a process has died, such as one of another machine."""
    async with (
        ScriptedWorker(kind.models[0]) as spare,
        behind(kind, tmp_path, spare) as (server, hub),
    ):
        hub.hub.registry.hold(spare.name, Hold.PAUSED)
        if ends == "without a word":
            server.dies_after, server.pace = 2, "go"
        else:
            server.breaks_after, server.pace = 2, "go"
        async with await hub.open(CHAT, ask(kind)) as wire:
            await wire.read_head()
            hub.hub.registry.release(spare.name, Hold.PAUSED)
            server.release("go")
            ending = await wire.read_to_end()
        assert b'"error"' not in ending.response.body
        assert_continued(ending, 1, by=spare.name)


FAILED = b'{"error":{"message":"boom","type":"server_error","code":500}}'


@pytest.mark.parametrize(
    ("before", "error"),
    [
        (b"", b'{"object":"error","message":"boom","type":"x","code":500}'),
        (b"", b'{ "error" : {"message":null,"code":"500"}}'),
        (b"", b'{"id":"x","error":{"message":"boom","code":"internal"}}'),
        (b": ping\n\n", FAILED),
        (b"token", FAILED),
        (b": ping\r\n\r\n", FAILED),
    ],
)
async def test_an_error_is_found_in_other_forms_and_behind_other_events(
    before: bytes, error: bytes, tmp_path: Path
) -> None:
    kind = KINDS[0]
    async with (
        ScriptedWorker(kind.models[0]) as spare,
        behind(kind, tmp_path, spare) as (server, hub),
    ):
        if before == b"token":
            before = [*server.events(TEXTS, kind.models[0], None)][-3]
        broken = before + b"data: " + error + b"\n\n"
        server.breaking = lambda: iter([broken, done()])  # type: ignore[method-assign]
        hub.hub.registry.hold(spare.name, Hold.PAUSED)
        server.breaks_after, server.pace = 2, "go"
        async with await hub.open(CHAT, ask(kind)) as wire:
            await wire.read_head()
            hub.hub.registry.release(spare.name, Hold.PAUSED)
            server.release("go")
            ending = await wire.read_to_end()
        assert b'"error"' not in ending.response.body
        assert_continued(ending, 1, by=spare.name)


async def test_a_stream_that_begins_with_too_many_requests_is_tried_elsewhere(
    tmp_path: Path,
) -> None:
    kind = KINDS[0]
    async with (
        ScriptedWorker(kind.models[0]) as spare,
        behind(kind, tmp_path, spare) as (server, hub),
    ):
        busy = event({"error": {"message": "slow down", "code": 429}})
        server.breaking = lambda: iter([busy])  # type: ignore[method-assign]
        server.breaks_after = 0
        hub.hub.registry.hold(spare.name, Hold.PAUSED)
        asking = asyncio.create_task(hub.post(CHAT, ask(kind)))
        await server.received()
        hub.hub.registry.release(spare.name, Hold.PAUSED)
        response = await asking
        assert response.status == 200
        assert text_of(events_of(response)) == "".join(TEXTS)


async def test_an_answer_that_is_only_an_error_costs_nothing(tmp_path: Path) -> None:
    kind = KINDS[0]
    async with behind(kind, tmp_path, metrics__open=True) as (server, hub):
        server.breaks_after = 0
        response = await hub.post(CHAT, ask(kind))
        assert response.status == 500
        page = parse((await hub.get("/metrics")).body)
    used = {"model": kind.models[0], "subject": "alice"}
    assert value(page, "gollama_usage_prompt_tokens_total", **used) == 0
    assert value(page, "gollama_usage_generated_tokens_total", **used) == 0


async def test_a_failure_is_noticed_however_its_event_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As servers do that write a line at a time, and proxies at any byte."""
    kind = KINDS[0]
    async with (
        ScriptedWorker(kind.models[0]) as spare,
        behind(kind, tmp_path, spare) as (server, hub),
    ):
        (whole, *rest) = server.breaking()
        half = len(whole) // 2
        for parts in (
            [whole[:8], whole[8:]],
            [whole[:half], whole[half:]],
            [whole[:-1], whole[-1:]],
            [b"event: error\n", whole[:-2], b"\n\n"],
        ):
            hub.hub.registry.hold(spare.name, Hold.PAUSED)
            server.breaks_after, server.pace = 2, "go"
            monkeypatch.setattr(server, "breaking", lambda p=parts: iter([*p, *rest]))
            async with await hub.open(CHAT, ask(kind)) as wire:
                await wire.read_head()
                hub.hub.registry.release(spare.name, Hold.PAUSED)
                for _ in range(1 + len(parts)):
                    server.release("go")
                ending = await wire.read_to_end()
            assert ending.clean
            assert b"error" not in ending.response.body
            assert text_of(events_of(ending.response)) == "".join(TEXTS)


@each_kind
async def test_a_failure_without_help_is_reported_in_the_words_of_the_server(
    kind: Kind, tmp_path: Path
) -> None:
    async with behind(kind, tmp_path, retry__patience=0) as (server, hub):
        server.breaks_after, server.pace = 2, "go"
        async with await hub.open(CHAT, ask(kind)) as wire:
            await wire.read_head()
            server.script(reset())  # and so when it is asked once more
            server.release("go")
            ending = await wire.read_to_end()
        assert not ending.clean
        assert b"[DONE]" not in ending.response.body
        (error,) = [each["error"] for each in events_of(ending.response)[-1:]]
        assert error["code"] == "worker_incomplete_answer"
        own = re.findall(rb'"message":"([^"]+)"', b"".join(server.breaking()))
        for message in own:  # Ollama sends none
            assert message.decode() in error["message"]


# The events that end a stream, and how it is then recorded.
BEGUN = {
    "/v1/responses": responses("output_text.delta", delta="no"),
    "/v1/messages": anthropic("content_block_delta", delta={"text": "no"}),
}
ANSWER = {"id": "resp_1", "object": "response", "error": None}
BOOM = {"message": "boom", "code": "server_error"}
AT = {"param": None, "sequence_number": 7}
OVERLOADED = {"type": "overloaded_error", "message": "boom"}
LAST_EVENTS = [
    ("/v1/responses", responses("failed", response=ANSWER | {"error": BOOM}), True),
    ("/v1/responses", named_event({"type": "error"} | AT | BOOM), True),
    ("/v1/responses", responses("incomplete", response=ANSWER), False),
    ("/v1/messages", anthropic("error", error=OVERLOADED), True),
    ("/v1/messages", anthropic("message_stop"), False),
]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("path", "last", "fails"), LAST_EVENTS)
async def test_an_answer_that_cannot_be_continued_ends_with_the_event_of_its_server(
    path: str, last: bytes, fails: bool, split: bool, tmp_path: Path
) -> None:
    """Byte for byte, and its worker is blamed where the event reports a failure."""
    parts = [last[:9], last[9:40], last[40:]] if split else [last]
    async with behind(KINDS[0], tmp_path, breaker__consecutive=1) as (server, hub):
        (worker,) = hub.hub.registry.workers
        begun = (send(sse_head()), send(chunk(BEGUN[path])), wait("go"))
        server.script(
            *begun, *(send(chunk(part)) for part in parts), send(last_chunk())
        )
        async with await hub.open(path, STREAM) as wire:
            await wire.read_head()
            server.release("go")
            ending = await wire.read_to_end()
        assert ending.response.body == BEGUN[path] + last
        # SDKs of Responses read on to the end of the body.
        assert ending.clean is (b"event: error" not in last)
        (record,) = hub.hub.recent.find()
        assert record["outcome"] == ("error" if fails else "complete")
        assert worker.breaker.closed is not fails


@each_kind
async def test_an_answer_of_llama_server_is_continued_by_any_of_them(
    kind: Kind, tmp_path: Path
) -> None:
    async with (
        ScriptedWorker(kind.models[0]) as first,
        behind(kind, tmp_path, first) as (_, hub),
    ):
        (worker,) = (w for w in hub.hub.registry.workers if w.name != first.name)
        hub.hub.registry.hold(worker.name, Hold.PAUSED)
        begun = chunk(role(model=kind.models[0]) + token(" no", model=kind.models[0]))
        first.script(send(sse_head()), send(begun), wait("go"), close())
        async with await hub.open(CHAT, ask(kind)) as wire:
            await wire.read_head()
            hub.hub.registry.release(worker.name, Hold.PAUSED)
            first.release("go")
            ending = await wire.read_to_end()
        assert_continued(ending, 1, by=worker.name)


@each_kind
async def test_an_answer_survives_the_failures_of_two_servers(
    kind: Kind, tmp_path: Path
) -> None:
    """Begun by a llama-server, continued by another kind, and ended by a third one."""
    model = kind.models[0]
    async with (
        ScriptedWorker(model) as first,
        ScriptedWorker(model) as last,
        behind(kind, tmp_path, first, last) as (server, hub),
    ):
        registry = hub.hub.registry
        (second,) = {each.name for each in registry.workers} - {first.name, last.name}
        registry.hold(second, Hold.PAUSED)
        registry.hold(last.name, Hold.PAUSED)
        begun = chunk(role(model=model) + token(" no", model=model))
        first.script(send(sse_head()), send(begun), wait("go"), close())
        server.breaks_after, server.pace = 2, "go"
        async with await hub.open(CHAT, ask(kind)) as wire:
            await wire.read_head()
            registry.release(second, Hold.PAUSED)
            first.release("go")
            await server.received()
            registry.hold(first.name, Hold.PAUSED)
            registry.release(last.name, Hold.PAUSED)
            server.release("go")
            ending = await wire.read_to_end()
        assert_continued(ending, 2, by=last.name)


@each_kind
async def test_a_server_that_fails_again_and_again_gets_no_requests(
    kind: Kind, tmp_path: Path
) -> None:
    """Its breaker opens, and closes when canaries of the hub are answered."""
    settings = {"breaker__open": 0.05, "retry__attempts": 1, "rescue__enabled": False}
    async with behind(kind, tmp_path, **settings) as (server, hub):
        (worker,) = hub.hub.registry.workers
        server.default(reset())
        while worker.breaker.closed:
            assert (await hub.post(CHAT, ask(kind))).status == 502
        assert worker.breaker.reason
        server.repair()

        def healed() -> bool:
            hub.hub.watchdog.round()
            return worker.breaker.closed

        await until(healed)
        assert (await hub.post(CHAT, ask(kind))).status == 200
