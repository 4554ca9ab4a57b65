"""Only the paths and methods on the list reach a worker, spelled as they are there.

A llama-server also has paths that run commands, load files and change its settings; and
a path that one program decodes or shortens, and another does not, is two paths.
"""

from __future__ import annotations

import pytest

from gollama_proxy.wire.schema import ENDPOINTS
from tests.behaviour.test_bad_requests import (
    BODY,
    CHAT,
    GOOD,
    ask,
    check,
    hub_of_two_models,
)
from tests.fakes.asks import FORM, FORM_TYPE
from tests.fakes.cases import case
from tests.fakes.client import request_head
from tests.fakes.hub import running_hub
from tests.fakes.worker import ScriptedWorker

# --- What is not on the list ------------------------------------------------------

# Of llama-server, its router, and what else listens on such machines.
THEIRS = [
    "/props",
    "/slots",
    "/slots/0?action=save",
    "/slots/0?action=restore",
    "/slots/0?action=erase",
    "/lora-adapters",
    "/tools",
    "/mcp",
    "/cors-proxy?url=http://169.254.169.254/",
    "/api/chat",
    "/api/generate",
    "/api/tags",
    "/api/show",
    "/v1/chat/completions/control",
    "/v1/stream",
    "/v1/streams/lookup",
    "/predict",
    "/v1/files",
    "/index.html",
    "/bundle.js",
]
# Paths that nothing serves.
STRANGE = [
    "/v1",
    "/v1/",
    "/v1/chat",
    "/v2/chat/completions",
    "/v1/v1/chat/completions",
    "/admin",
    "/favicon.ico",
    "/robots.txt",
    "/.env",
    "/.git/config",
    "/etc/passwd",
]
# Of what is on the list, and of what is not, in other words.
SPELLED = [
    "/completions/",
    "/v1/chat/completions/",
    "/v1/chat/completions/x",
    "/v1/chat/completions//",
    "/v1/chat/completions/.",
    "/v1/chat/completions/..",
    "/v1/chat/completions/../../../props",
    "/v1/chat/../../props",
    "/v1/../props",
    "/v1/..;/props",
    "/v1/%2e%2e/props",
    "/v1/%2E%2E/props",
    "/v1/.%2e/props",
    "/v1/%252e%252e/props",
    "/v1/..%2fprops",
    "/v1/..%5cprops",
    "/v1/..\\props",
    "/v1/%c0%ae%c0%ae/props",
    "/../props",
    "/./props",
    "/.//props",
    "//props",
    "///props",
    "//hub/props",
    "/props/",
    "/props/.",
    "/props;x=y",
    "/props%00",
    "/props%20",
    "/props%0a",
    "/props%3f",
    "/props%23",
    "/props?x",
    "/props#x",
    "/PROPS",
    "/Props",
    "/%70rops",
    "/prop%73",
    "/pr\\ops",
    "/%EF%BD%90rops",
    "/v1/chat/completions;x",
    "/v1/chat/completions;x=y?z",
    "/v1/chat/completions%00",
    "/v1/chat/completions%20",
    "/v1/chat/completions%3Fx",
    "/v1/chat/completions%23",
    "/v1/chat/completions%0d%0aX:%20y",
    "/v1/chat/completions.json",
    "/v1/chat/completions~",
    "/v1/chat/completions&x",
    "/v1/chat%2Fcompletions",
    "/v1/chat%2fcompletions",
    "/v1/chat%252Fcompletions",
    "/v1/chat\\completions",
    "/v1/chat%5ccompletions",
    "/v1/chat//completions",
    "/v1//chat/completions",
    "//v1/chat/completions",
    "/./v1/chat/completions",
    "/v1/./chat/completions",
    "/v1/x/../chat/completions",
    "/%761/chat/completions",
    "/v1/chat/completion%73",
    "/V1/chat/completions",
    "/v1/Chat/Completions",
    "/v1/chat/completions#x",
    "/v1/chat/completions#?",
    "/none?/v1/chat/completions",
    "/#/v1/chat/completions",
    "http://hub/v1/chat/completions",
    "HTTP://hub/v1/chat/completions",
    "http://127.0.0.1:8080/props",
    "https://hub/v1/chat/completions",
    "http://hub:80@evil/v1/chat/completions",
    "http://hub",
]


async def test_unlisted_paths_are_not_found() -> None:
    async with hub_of_two_models() as hub:
        for path in [*THEIRS, *STRANGE, *SPELLED]:
            with case(path):
                for token in (None, hub.token()):
                    check(await hub.post(path, GOOD, token), 404, "unknown_url")
                    check(await hub.get(path, token), 404, "unknown_url")


async def test_invalid_paths_are_not_found() -> None:
    async with hub_of_two_models() as hub:
        for target in [
            b"",
            b"*",
            b"v1/chat/completions",
            b"props",
            b"../props",
            b"?/v1/chat/completions",
            b"hub:80",
            b"hub/v1/chat/completions",
            b"//",
            b"/v1/chat/completions\x00",
            b"/\x00/../props",
            b"/v1/chat/completions\x7f",
            b"/v1/chat/completions\xff",
            "/\uff50rops".encode(),
            "/v1/\u2025/props".encode(),
            b"/v1/chat completions",
            b"/props /v1/chat/completions",
            b"/v1/chat/completions\tx",
            b"/v1/chat/completions\r",
            b"/v1/chat/completions\x0bx",
            b"ftp://hub/v1/chat/completions",
            b"file:///etc/passwd",
            b"javascript:1",
            b"http:/v1/chat/completions",
            b"http://",
            b"http:///v1/chat/completions",
        ]:
            with case(target):
                for method in (b"POST", b"GET", b"DELETE"):
                    head = request_head("POST", "@", hub.token())
                    head = head.replace(b"POST @", b"%b %b" % (method, target), 1)
                    response = await ask(hub, head)
                    assert response.status in (400, 404)
                    assert response.json()["error"]["code"] in (
                        "bad_request",
                        "unknown_url",
                    )


async def test_a_path_that_looks_like_a_model_is_an_unknown_model() -> None:
    async with hub_of_two_models() as hub:
        for path in ["/models/load", "/models/../props", "/v1/models/%2e%2e/props"]:
            with case(path):
                check(await hub.get(path), 404, "model_not_found", "model")


# --- Methods ----------------------------------------------------------------------


async def test_a_wrong_method_gets_the_allowed_ones() -> None:
    async with hub_of_two_models() as hub:
        for method, path, allow in [
            ("GET", CHAT, "POST"),
            ("HEAD", CHAT, "POST"),
            ("PUT", CHAT, "POST"),
            ("DELETE", CHAT, "POST"),
            ("PATCH", CHAT, "POST"),
            ("OPTIONS", CHAT, "POST"),
            ("TRACE", CHAT, "POST"),
            ("PROPFIND", CHAT, "POST"),
            ("GET", f"{CHAT}?method=POST", "POST"),
            ("POST", "/v1/models", "GET, HEAD"),
            ("DELETE", "/v1/models/qwen", "GET, HEAD"),
            ("POST", "/v1/models/load", "GET, HEAD"),
            ("POST", "/models/load", "GET, HEAD"),
            ("POST", "/models/unload", "GET, HEAD"),
            ("POST", "/models/../props", "GET, HEAD"),
            ("POST", "/health", "GET, HEAD"),
            ("POST", "/metrics", "GET, HEAD"),
        ]:
            with case((method, path, allow)):
                async with await hub.wire() as wire:
                    await wire.get(path, hub.token(), method=method)
                    response = await wire.read_response()
                    assert response.header("allow") == allow
                    if method == "HEAD":
                        assert response.status == 405
                    else:
                        assert method in check(response, 405, "method_not_allowed")


async def test_no_method_but_post_reaches_a_worker() -> None:
    methods = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "MKCOL", "PURGE"]
    async with hub_of_two_models() as hub:
        for path in [*ENDPOINTS, *THEIRS]:
            with case(path):
                for method in methods:
                    head = request_head(
                        method, path, hub.token(), [("X-Method", "POST")]
                    )
                    assert (await ask(hub, head)).status in (404, 405)


async def test_connect_is_refused() -> None:
    async with hub_of_two_models() as hub:
        for line, status in [
            ("CONNECT 169.254.169.254:80", 405),
            ("CONNECT hub:80", 405),
            ("CONNECT /props", 405),
            ("CONNECT http://hub/", 400),
            ("OPTIONS *", 404),
            ("TRACE *", 400),
            ("POST *", 400),
        ]:
            with case((line, status)):
                async with await hub.wire() as wire:
                    method, target = line.split()
                    await wire.send(request_head(method, target, hub.token()))
                    response = await wire.read_response()
                    assert response.status == status
                    if status == 405:
                        assert response.header("allow") == "GET, POST"


# --- What is on the list ----------------------------------------------------------


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_worker_gets_the_path_and_no_query(path: str) -> None:
    """llama-server takes settings from it, and keys."""
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        form = ENDPOINTS[path].form
        headers = [("Content-Type", FORM_TYPE if form else "application/json")]
        for query in ["", "?", "?x=y", "?/../props", "?a=%2e&b#c", "??"]:
            with case(query):
                worker.requests.clear()
                await hub.post(path + query, FORM if form else BODY, headers=headers)
                [request] = worker.requests
                assert (request.method, request.target) == ("POST", path)
