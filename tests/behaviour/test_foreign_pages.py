"""A page in a browser may call the hub if its origin is listed, and no other page can.

CORS as the Fetch standard has it, through a whole hub: the browser's preflight request
is answered without a token or a worker, and the answers to its requests have the
headers with every status.  Tokens travel in a header, so cookies are never allowed.
"""

from __future__ import annotations

import re

import pytest

from tests.fakes.asks import CHAT
from tests.fakes.cases import case
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import head
from tests.fakes.script import send, stream_of
from tests.fakes.worker import ScriptedWorker

PAGE = "http://localhost:3000"
OTHER = "https://chat.example"
PATHS = (
    CHAT,
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/models",
    "/v1/models/tiny",
    "/metrics",
    "/health",
)


async def preflight(
    hub: RunningHub, path: str, origin: str, *more: tuple[str, str]
) -> Response:
    """Ask as a browser does before a POST with a token."""
    headers = [
        ("Origin", origin),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type"),
        *more,
    ]
    async with await hub.wire() as wire:
        await wire.get(path, method="OPTIONS", headers=headers)
        return await wire.read_response()


def cors(response: Response) -> dict[str, str]:
    """The part of an answer that is about pages."""
    return {k: v for k, v in response.headers if k.startswith("access-control-")}


def words(value: str) -> set[str]:
    return set(value.lower().split(", "))


# --- Origins that are admitted ----------------------------------------------------


async def test_only_listed_pages_are_allowed() -> None:
    """By default there is no CORS at all: the browser keeps every answer."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for path in PATHS:
            answer = await preflight(hub, path, PAGE)
            assert (answer.status, cors(answer)) == (405, {}), path
        answer = await hub.post(CHAT, {"messages": []}, headers=[("Origin", PAGE)])
        assert (answer.status, cors(answer)) == (200, {})
        assert answer.header("vary") is None


async def test_origins_that_resemble_a_listed_one_are_refused() -> None:
    listed = [PAGE, OTHER]
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__cors_origins=listed) as hub,
    ):
        for origin in [
            "null",  # a sandboxed frame, a file: anybody's
            "*",
            "",
            "http://localhost",
            "http://localhost:3001",
            "http://localhost:30000",
            "https://localhost:3000",
            "http://localhost:3000/",
            "http://localhost:3000/page",
            "http://LOCALHOST:3000",
            "HTTP://localhost:3000",
            "http://localhost.:3000",
            "http://x.localhost:3000",
            "http://localhost.evil.example:3000",
            "http://evil-localhost:3000",
            "http://localhost:3000.evil.example",
            "http://localhost:3000@evil.example",
            "http://evil.example/http://localhost:3000",
            "http://localhost:3000, http://evil.example",
            "http://localhost:3000 http://evil.example",
            "http://127.0.0.1:3000",
            "https://evil.example?https://chat.example",
            "https://chat.example.evil.example",
            "https://evilchat.example",
            "https://chat.example:8443",
            "https://chat_example",
            "https://chatxexample",
            "http://chat.example",
        ]:
            with case(origin):
                answer = await preflight(hub, CHAT, origin)
                assert (answer.status, cors(answer)) == (405, {})
                before = len(worker.requests)
                answer = await hub.get("/v1/models", headers=[("Origin", origin)])
                assert (answer.status, cors(answer)) == (200, {})
                assert answer.header("vary") == "Origin"
                assert len(worker.requests) == before


async def test_two_origins_are_refused() -> None:
    async with running_hub(server__cors_origins=[PAGE, OTHER]) as hub:
        for second in (PAGE, OTHER, "http://evil.example"):
            answer = await preflight(hub, CHAT, PAGE, ("origin", second))
            assert (answer.status, cors(answer)) == (405, {})


async def test_a_default_port_is_left_out_as_browsers_do() -> None:
    listed = ["https://chat.example:443", "http://desk.lan:80"]
    async with running_hub(server__cors_origins=listed) as hub:
        for origin in ("https://chat.example", "http://desk.lan"):
            answer = await preflight(hub, CHAT, origin)
            assert answer.header("access-control-allow-origin") == origin


# --- Preflight answers ------------------------------------------------------------


@pytest.mark.parametrize("origin", [PAGE, OTHER])
async def test_a_listed_page_may_ask_before_it_has_a_token(origin: str) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__cors_origins=[PAGE, OTHER]) as hub,
    ):
        for path in PATHS:
            answer = await preflight(hub, path, origin)
            assert (answer.status, answer.body) == (204, b"")
            reported = cors(answer)
            assert reported["access-control-allow-origin"] == origin
            assert words(reported["access-control-allow-methods"]) >= {"get", "post"}
            allowed = words(reported["access-control-allow-headers"])
            # By name, as an asterisk does not stand for it (Fetch standard, 4.9).
            assert allowed >= {"authorization", "content-type", "*"}
            assert 0 < int(reported["access-control-max-age"]) <= 7_200  # Chrome's most
            assert answer.header("vary") == "Origin"
            assert "access-control-allow-credentials" not in reported
            assert "access-control-allow-private-network" not in reported
            assert answer.header("www-authenticate") is None
        assert worker.requests == []
        assert worker.connections == len(worker.control)


async def test_a_preflight_opens_no_path_that_is_not_there() -> None:
    async with running_hub(server__cors_origins=[PAGE]) as hub:
        for path in ("/props", "/slots", "/v1", "/v1/chat/completions/", "/v1/models/"):
            answer = await preflight(hub, path, PAGE)
            assert answer.status == 404
            # The page may read that, like every error.
            assert answer.header("access-control-allow-origin") == PAGE


async def test_options_without_a_preflight_is_not_allowed() -> None:
    async with running_hub(server__cors_origins=[PAGE]) as hub:
        async with await hub.wire() as wire:
            await wire.get(CHAT, method="OPTIONS", headers=[("Origin", PAGE)])
            answer = await wire.read_response()
    assert (answer.status, answer.header("allow")) == (405, "POST")


async def test_a_public_page_may_call_a_hub_in_a_private_network() -> None:
    """If it is listed and its browser asks for it."""
    asks = ("Access-Control-Request-Private-Network", "true")
    async with running_hub(server__cors_origins=[OTHER]) as hub:
        answer = await preflight(hub, CHAT, OTHER, asks)
        assert answer.header("access-control-allow-private-network") == "true"
        answer = await preflight(hub, CHAT, OTHER, (asks[0], "false"))
        assert answer.header("access-control-allow-private-network") is None
        answer = await preflight(hub, CHAT, "https://evil.example", asks)
        assert (answer.status, cors(answer)) == (405, {})


async def test_a_listed_page_reads_every_answer_and_its_headers() -> None:
    origin = [("Origin", PAGE)]
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__cors_origins=[PAGE], auth__leeway=0) as hub,
    ):
        limited = hub.token("bob", rpm=1, tpm=100_000)
        answers = [
            await hub.post(CHAT, {"messages": []}, None, headers=origin),
            await hub.post(CHAT, b"[]", headers=origin),
            await hub.get("/nowhere", headers=origin),
            await hub.get("/v1/models", headers=origin),
            await hub.post(CHAT, {"messages": []}, limited, headers=origin),
            await hub.post(CHAT, {"messages": []}, limited, headers=origin),
        ]
        worker.script(*stream_of(2))
        body = {"messages": [], "stream": True}
        async with await hub.open(CHAT, body, headers=origin) as wire:
            answers.append((await wire.read_to_end()).response)
    assert [a.status for a in answers] == [401, 400, 404, 200, 200, 429, 200]
    for answer in answers:
        reported = cors(answer)
        assert reported.pop("access-control-allow-origin") == PAGE
        exposed = words(reported.pop("access-control-expose-headers"))
        assert reported == {}, "and nothing of credentials"
        assert answer.header("vary") == "Origin"
        assert "*" not in exposed
        ours = {
            name
            for name, _ in answer.headers
            if re.match(r"x-(request-id|gollama-|ratelimit-)|retry-after", name)
        }
        assert ours
        assert ours <= exposed, "each header of the hub's can be read"
    assert answers[5].header("retry-after")


async def test_a_workers_cors_headers_are_ignored() -> None:
    """The page calls the hub; llama-server would accept every origin."""
    headers = [
        ("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Allow-Credentials", "true"),
        ("Content-Length", "2"),
        ("Content-Type", "application/json"),
    ]
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__cors_origins=[PAGE]) as hub,
    ):
        for origin, allowed in ((PAGE, PAGE), ("https://evil.example", None)):
            worker.script(send(head(200, headers) + b"{}"))
            answer = await hub.post(
                CHAT, {"messages": []}, headers=[("Origin", origin)]
            )
            assert answer.status == 200
            assert answer.header("access-control-allow-origin") == allowed
            assert answer.header("access-control-allow-credentials") is None
        assert worker.requests[0].header("origin") is None
