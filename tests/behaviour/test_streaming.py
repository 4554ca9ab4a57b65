"""What a worker answers is what its client gets: the same bytes, at once."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.asks import CHAT, JSON_ROUTES, STREAM, WHOLE
from tests.fakes.client import Wire
from tests.fakes.hub import running_hub
from tests.fakes.replies import (
    chat_completion,
    chunk,
    done,
    finish,
    head,
    json_reply,
    last_chunk,
    ping,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    chat_stream,
    close,
    event_stream,
    send,
    stream_of,
    wait,
)
from tests.fakes.worker import ScriptedWorker


def cut(data: bytes, ends: set[int]) -> list[bytes]:
    places = sorted({0, len(data), *(end for end in ends if end < len(data))})
    return [data[i:j] for i, j in pairwise(places)]


# --- The bytes of a stream --------------------------------------------------------

_line = st.text(
    st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), max_size=30
)
_data = st.one_of(
    st.builds(lambda text: "data: " + json.dumps({"content": text}), _line),
    st.builds(lambda text: "data: " + text, _line),
    st.builds(lambda text: "data:" + text * 200, _line),
)


@st.composite
def events(draw: st.DrawFn) -> bytes:
    """One event: named or not, of one line or more, with any of the line ends."""
    eol = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    kind = draw(st.sampled_from(["data", "data", "data", "comment", "named", "lines"]))
    match kind:
        case "comment":
            lines = [": " + draw(_line)]
        case "named":
            lines = ["event: delta", "id: 7", draw(_data)]
        case "lines":
            lines = draw(st.lists(_data, min_size=2, max_size=4))
        case _:
            lines = [draw(_data)]
    return "".join(line + eol for line in [*lines, ""]).encode()


@settings(max_examples=40, deadline=None, database=None)
@given(
    first=st.sampled_from([b"", ping(), b"\xef\xbb\xbf: bom\n\n", b"retry: 5\n\n"]),
    middle=st.lists(events(), max_size=8),
    ends=st.sets(st.integers(1, 3000), max_size=12),
    reads=st.sets(st.integers(1, 6000), max_size=12),
)
async def test_a_stream_arrives_byte_by_byte_as_it_was_sent(
    first: bytes, middle: list[bytes], ends: set[int], reads: set[int]
) -> None:
    """Wherever its chunks and its packets are cut; none of it is a line of ours."""
    body = first + role() + b"".join(middle) + finish() + done()
    wire = sse_head() + b"".join(map(chunk, cut(body, ends))) + last_chunk()
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*map(send, cut(wire, reads)), close())
        response = await hub.post(CHAT, STREAM)
    assert response.status == 200
    assert response.body == body
    assert response.header("transfer-encoding") == "chunked"


@pytest.mark.parametrize(
    "framing", [[], [("Content-Length", str(len(role() + done())))]]
)
async def test_a_stream_without_chunks_is_sent_in_chunks(
    framing: list[tuple[str, str]],
) -> None:
    """Of other servers: the end is the connection's, or a length's."""
    headers = [("Content-Type", "text/event-stream"), *framing]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(head(200, headers) + role() + done()), close())
        response = await hub.post(CHAT, STREAM)
    assert response.body == role() + done()
    assert response.header("transfer-encoding") == "chunked"
    assert response.header("content-length") is None


async def test_each_event_is_seen_before_the_next_is_sent() -> None:
    """Nothing waits in the hub for more."""
    gate = asyncio.Semaphore(0)
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*stream_of(30, gate))
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_event() == role()
            assert await wire.read_event() == token(" t0")
            for number in range(1, 30):
                gate.release()
                assert await wire.read_event() == token(f" t{number}")
            assert len(await wire.read_events()) == 2  # the finish and [DONE]


async def test_a_head_is_only_seen_with_the_first_event() -> None:
    """Until then a bad worker can still be replaced; pings are no event."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(
            send(sse_head() + chunk(ping())),
            wait("first"),
            send(chunk(role()[:20])),
            wait("second"),
            send(chunk(role()[20:]) + chunk(done()) + last_chunk()),
            close(),
        )
        async with await hub.open(CHAT, STREAM) as wire:
            await worker.received()
            for name in ("first", "second"):
                with pytest.raises(AssertionError, match="no head"):
                    await wire.read_head(timeout=0.05)
                worker.release(name)
            assert (await wire.read_head()).status == 200
            assert await wire.read_events() == [ping(), role(), done()]


async def test_many_small_events_in_one_read_are_all_passed_on() -> None:
    sent = [token(f" {number}") for number in range(500)]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(
            send(sse_head() + b"".join(map(chunk, [role(), *sent, done()]))),
            send(last_chunk()),
            close(),
        )
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_events() == [role(), *sent, done()]


async def test_an_event_of_a_megabyte_is_passed_on() -> None:
    """Larger than what is held, than what is read at once, than what is written."""
    large = token("x" * (1 << 20))
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*event_stream(large, large[:-1], large[-1:], finish(), done()))
        response = await hub.post(CHAT, STREAM)
    assert response.body == large * 2 + finish() + done()


async def test_streams_do_not_mix() -> None:
    """Many at once, released token by token, in turns."""
    gates = [asyncio.Semaphore(0) for _ in range(20)]
    async with ScriptedWorker(slots=64) as worker, running_hub(worker) as hub:
        for number, gate in enumerate(gates):
            texts = [f" {number}.{n}" for n in range(10)]
            worker.script(*chat_stream(texts, pace=gate))
        wires = []
        for number in range(20):  # in the order of the scripts
            wires.append(await hub.open(CHAT, STREAM))
            await worker.received(number + 1)
        for wire in wires:
            assert await wire.read_event() == role()
            await wire.read_event()
        for n in range(1, 10):
            for gate in gates:
                gate.release()
            for number, wire in enumerate(wires):
                assert await wire.read_event() == token(f" {number}.{n}")
        for wire in wires:
            assert (await wire.read_events())[-1] == done()


# --- Every route ------------------------------------------------------------------


async def directly(worker: ScriptedWorker, path: str, payload: Any) -> Any:
    async with await Wire.connect("127.0.0.1", worker.port) as wire:
        await wire.post(path, payload)
        return await wire.read_response()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", JSON_ROUTES)
async def test_every_route_passes_what_the_worker_answers(
    path: str, stream: bool
) -> None:
    """To the very path that the client used; nothing of the answer is changed."""
    payload = {"model": "tiny", "messages": [], "tokens": [], "documents": []}
    payload |= {"stream": stream} if stream else {}
    async with (
        ScriptedWorker() as worker,
        # Else an answer in one piece is asked for as a stream: see test_assembly.py.
        running_hub(worker, upstream__assemble="") as hub,
    ):
        response = await hub.post(path, payload)
        request = await worker.received()
        expected = await directly(worker, path, payload)
    assert expected.status == 200
    assert request.target == path
    assert request.json() == payload
    assert (response.status, response.body) == (200, expected.body)
    assert response.header("content-type") == expected.header("content-type")
    if response.header("content-type") == "text/event-stream":
        assert response.header("cache-control") == "no-cache"
        assert response.header("x-accel-buffering") == "no"
    else:
        assert response.header("content-length") == str(len(expected.body))


@pytest.mark.parametrize("stream", [False, None])
async def test_a_client_that_requests_no_stream_gets_none(stream: bool | None) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await hub.post(CHAT, WHOLE | {"stream": stream})
    assert response.json() == chat_completion(" no towu")
    assert response.header("content-type") == "application/json"
    assert response.header("transfer-encoding") is None


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_answer_that_is_not_a_stream_is_passed_on_as_it_arrives(
    chunked: bool,
) -> None:
    """Its length is sent if the worker sent it."""
    body = json.dumps({"text": "x" * 300_000}).encode()
    parts = [body[i : i + 50_000] for i in range(0, len(body), 50_000)]
    framing = (
        ("Transfer-Encoding", "chunked")
        if chunked
        else ("Content-Length", str(len(body)))
    )
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(
            send(head(200, [("Content-Type", "application/json"), framing])),
            *(send(chunk(part) if chunked else part) for part in parts),
            send(last_chunk() if chunked else b""),
        )
        response = await hub.post(CHAT, WHOLE)
    assert response.body == body
    assert response.header("content-length") == (None if chunked else str(len(body)))


async def test_an_answer_that_ends_with_its_connection() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(head(200, version="1.0") + b'{"a":1}'), close())
        response = await hub.post(CHAT, WHOLE)
    assert (response.status, response.body) == (200, b'{"a":1}')


async def test_an_answer_without_content() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(head(204)))
        async with await hub.open(CHAT, WHOLE) as wire:
            ending = await wire.read_to_end()
            assert (ending.response.status, ending.response.body) == (204, b"")
            assert ending.response.header("transfer-encoding") is None
            await wire.post(CHAT, WHOLE, hub.token())
            assert (await wire.read_response()).status == 200


async def test_an_answer_with_an_empty_body() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(head(200, [("Content-Length", "0")])))
        response = await hub.post(CHAT, WHOLE)
    assert (response.status, response.body) == (200, b"")


async def test_a_client_connection_carries_one_request_after_the_other() -> None:
    """Streams too: their end is that of their chunks, not of the connection."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            for payload in (STREAM, WHOLE, STREAM, STREAM, WHOLE):
                await wire.post(CHAT, payload, hub.token())
                response = await wire.read_response()
                assert response.status == 200
                assert response.body


# --- Headers towards the client ---------------------------------------------------


@pytest.mark.parametrize("payload", [STREAM, WHOLE])
async def test_every_reply_names_its_worker(payload: dict[str, Any]) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await hub.post(CHAT, payload, headers=[("X-Request-Id", "mine-7")])
        assert response.header("x-request-id") == "mine-7"
        assert response.header("x-gollama-worker") == worker.name
        assert response.header("x-gollama-attempts") == "1"
        assert int(response.header("x-gollama-queue-ms") or "") < 5000
        assert response.header("server") == "gollama-proxy"
        assert response.header("date")
        ids = {(await hub.post(CHAT, payload)).header("x-request-id") for _ in range(3)}
        assert len(ids) == 3
        assert None not in ids


async def test_an_error_of_a_worker_names_it() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(json_reply({"error": {}}, 400)))
        response = await hub.post(CHAT, WHOLE)
    assert response.header("x-gollama-worker") == worker.name
    assert response.header("x-request-id")


@pytest.mark.parametrize("status", [200, 400])
async def test_a_workers_headers_about_itself_are_not_passed_on(status: int) -> None:
    """And what is about the hop; everything else passes."""
    headers = [
        ("Connection", "X-Hop, close"),
        ("X-Hop", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Server", "llama.cpp"),
        ("Set-Cookie", "a=b"),
        ("Access-Control-Allow-Origin", "*"),
        ("X-Gollama-Worker", "evil"),
        ("X-Request-Id", "evil"),
        ("WWW-Authenticate", "Basic"),
        ("Content-Type", "application/problem+json"),
        ("X-Model-Hash", "abc"),
        ("Content-Length", "2"),
    ]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(send(head(status, headers) + b"{}"), close())
        response = await hub.post(CHAT, WHOLE)
    assert (response.status, response.body) == (status, b"{}")
    names = {name for name, _ in response.headers}
    assert not names & {"x-hop", "keep-alive", "set-cookie", "www-authenticate"}
    assert not [name for name in names if name.startswith("access-control-")]
    assert response.header("server") == "gollama-proxy"
    assert response.header("x-gollama-worker") == worker.name
    assert response.header("x-request-id") != "evil"
    assert response.header("content-type") == "application/problem+json"
    assert response.header("x-model-hash") == "abc"


# --- Headers towards the worker ---------------------------------------------------

PRIVATE = [
    ("Cookie", "session=canary"),
    ("X-Conversation-Id", "canary"),  # keeps a generation alive without its client
    ("Proxy-Authorization", "Basic canary"),
    ("X-Forwarded-For", "10.9.8.7"),
    ("Origin", "http://canary"),
    ("Referer", "http://canary"),
    ("X-Anything", "canary"),
    ("Connection", "keep-alive, X-Anything"),
    ("Accept-Encoding", "gzip"),
    ("User-Agent", "canary/1.0"),
]


async def test_the_credentials_of_a_client_never_reach_a_worker() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        secret = hub.token(sub="canary")
        headers = [*PRIVATE, ("Accept", "text/event-stream"), ("X-Request-Id", "r1")]
        headers.append(("X-Api-Key", secret))  # with another one it would be refused
        response = await hub.post(f"{CHAT}?key=canary", STREAM, secret, headers=headers)
        request = await worker.received()
    assert response.status == 200
    assert sorted(name for name, _ in request.headers) == [
        "accept",
        "content-length",
        "content-type",
        "host",
        "user-agent",
    ]
    assert b"canary" not in request.head
    assert secret.encode() not in request.head
    assert request.target == CHAT
    assert request.header("host") == worker.name
    assert request.header("accept") == "text/event-stream"


async def test_each_worker_gets_its_own_key(tmp_path: Path) -> None:
    """From the environment or a file; never that of the client, nor of another."""
    file = tmp_path / "gollama.toml"
    (tmp_path / "key").write_text("sk-two\n")
    (tmp_path / "key").chmod(0o600)
    async with ScriptedWorker() as one, ScriptedWorker() as two, ScriptedWorker() as no:
        file.write_text(
            f'[[workers]]\nurl = "{one.url}"\napi_key_env = "KEY_ONE"\n'
            f'[[workers]]\nurl = "{two.url}"\napi_key_file = "{tmp_path / "key"}"\n'
            f'[[workers]]\nurl = "{no.url}"\n'
        )
        settings = {"routing__policy": "round_robin"}  # each is asked once
        async with running_hub(
            file=file, environ={"KEY_ONE": "sk-one"}, **settings
        ) as hub:
            for _ in range(3):
                assert (await hub.post(CHAT, WHOLE)).status == 200
        for worker, keys in (
            (one, ["Bearer sk-one"]),
            (two, ["Bearer sk-two"]),
            (no, []),
        ):
            [request] = worker.requests
            assert request.values("authorization") == keys


# --- The body towards the worker --------------------------------------------------

# Everything in it could be spelt otherwise, and must not be.
BODY = (
    b' {\n"messages" : [ {"role":"user","content":"\\u00e9 \xc3\xa9 \\/ \\/"} ] ,'
    b'"temperature":1.0e0,"seed":12345678901234567890,"model" : %b ,"stop":[ ],'
    b'"nested":{"model":"gpt-4","model":null},"stream" : false }\r\n'
)


@pytest.mark.parametrize(
    "name", [b'"gpt-4"', b'"gpt\\u002d4"', b'"tiny"', b'"unknown"', b"null", b'""']
)
async def test_nothing_but_the_models_name_changes(name: bytes) -> None:
    """An alias, an unknown name where one model is served, or none at all."""
    async with (
        ScriptedWorker() as worker,
        running_hub(
            worker,
            models__aliases={"gpt-4": "tiny"},
            upstream__assemble="",  # bytes are compared
        ) as hub,
    ):
        response = await hub.post(CHAT, BODY % name)
        request = await worker.received()
    assert response.status == 200
    assert request.body == BODY % b'"tiny"'


async def test_a_name_that_needs_no_change_is_left_as_it_was_spelt() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, upstream__assemble="") as hub,  # bytes are compared
    ):
        await hub.post(CHAT, BODY % b'"t\\u0069ny"')
        assert (await worker.received()).body == BODY % b'"t\\u0069ny"'


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"messages":[]}', b'{"model":"tiny","messages":[]}'),
        (b' { "messages" : [] } ', b' {"model":"tiny", "messages" : [] } '),
        (b"{}", b'{"model":"tiny"}'),
        (b" { } ", b' {"model":"tiny" } '),
    ],
)
async def test_a_missing_model_is_inserted(body: bytes, sent: bytes) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, upstream__assemble="") as hub,  # bytes are compared
    ):
        assert (await hub.post(CHAT, body)).status == 200
        assert (await worker.received()).body == sent


async def test_a_name_of_any_characters_is_written_as_json() -> None:
    name = 'é "quoted" \\ \N{GRINNING FACE}'
    async with (
        ScriptedWorker(name) as worker,
        running_hub(worker, models__aliases={"plain": name}) as hub,
    ):
        await hub.post(CHAT, {"model": "plain", "messages": []})
        assert (await worker.received()).json()["model"] == name


async def test_the_worker_that_serves_the_model_gets_the_request() -> None:
    async with ScriptedWorker("a") as one, ScriptedWorker("b", "c") as two:
        async with running_hub(one, two) as hub:
            for model in ("a", "b", "c", "b"):
                response = await hub.post(CHAT, WHOLE | {"model": model})
                assert response.status == 200
        assert [r.json()["model"] for r in one.requests] == ["a"]
        assert [r.json()["model"] for r in two.requests] == ["b", "c", "b"]
