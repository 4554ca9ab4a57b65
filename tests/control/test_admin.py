"""The admin API answers operators, and only them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.fakes.asks import RARELY
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.worker import ScriptedWorker

ADMIN = {"scope": "admin"}
CALM = {"health__interval": RARELY}


async def get(hub: RunningHub, path: str) -> Response:
    """Get a path with a token of the scope admin."""
    return await hub.get(path, hub.token(**ADMIN))


# --- Workers ----------------------------------------------------------------------


async def test_the_workers_are_listed_with_their_state() -> None:
    async with (
        ScriptedWorker("qwen", slots=2, n_ctx=4096) as one,
        ScriptedWorker(up=False) as two,
        running_hub(one, two, **CALM) as hub,
    ):
        answer = await get(hub, "/admin/workers")
        assert answer.header("content-type") == "application/json"
        up, down = answer.json()["workers"]
        assert up["name"] == f"127.0.0.1:{one.port}"
        assert (up["url"], up["source"]) == (one.url, "file")
        assert (up["state"], up["hold"], up["running"]) == ("ready", "none", 0)
        assert (up["slots"], up["context"], up["weight"]) == (2, 4096, 1.0)
        assert up["models"][0]["name"] == "qwen"
        assert up["breaker"]["state"] == "closed"
        assert up["breaker"]["since"] is None
        assert (down["state"], down["models"]) == ("down", [])
        assert down["slots"] is None


async def test_one_worker_is_shown_by_its_name() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        name = f"127.0.0.1:{worker.port}"
        for spelt in (name, name.replace(":", "%3A")):
            answer = await get(hub, f"/admin/workers/{spelt}")
            assert (answer.status, answer.json()["name"]) == (200, name)


async def test_an_unknown_worker_is_not_found() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        answer = await get(hub, "/admin/workers/no%20such")
        assert answer.status == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("not_found", "name")
        assert "'no such'" in error["message"]


async def test_a_head_request_gets_no_body() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        async with await hub.wire() as wire:
            await wire.get("/admin/workers", hub.token(**ADMIN), method="HEAD")
            answer = await wire.read_response()
            assert (answer.status, answer.body) == (200, b"")


# --- Without authentication -------------------------------------------------------

HERE = ("Host", "127.0.0.1:8000")
LOCAL = [
    [HERE],
    [("Host", "localhost:8000")],
    [("Host", "[::1]:8000")],
    [("Host", "127.8.8.8")],
    [("Host", "localhost:8000"), ("Origin", "http://localhost:8000")],
    [HERE, ("Sec-Fetch-Site", "same-origin")],
    [HERE, ("Sec-Fetch-Site", "none")],
]
FOREIGN = [
    [("Host", "rebound.example:8000")],
    [("Host", "localhost.example")],
    [("Host", "192.168.1.7:8000")],
    [("Host", "")],
    [("Host", "localhost:8000"), ("Origin", "http://evil.example")],
    [("Host", "localhost:8000"), ("Origin", "null")],
    [("Host", "localhost:8000"), ("Origin", "http://localhost:3000")],
    [HERE, ("Sec-Fetch-Site", "cross-site")],
    [HERE, ("Sec-Fetch-Site", "same-site")],
    [HERE, ("X-Forwarded-For", "203.0.113.7")],
    [HERE, ("Forwarded", "for=203.0.113.7")],
    [HERE, ("X-Real-IP", "203.0.113.7")],
    [HERE, ("Via", "1.1 gateway")],
]


@pytest.mark.parametrize("headers", LOCAL)
async def test_without_authentication_this_machine_is_admitted(
    headers: Sequence[tuple[str, str]],
) -> None:
    async with running_hub(auth__mode="off", ready=False) as hub:
        answer = await hub.get("/admin/workers", None, headers=headers)
        assert answer.status == 200


@pytest.mark.parametrize("headers", FOREIGN)
async def test_without_authentication_others_are_refused(
    headers: Sequence[tuple[str, str]],
) -> None:
    async with running_hub(auth__mode="off", ready=False) as hub:
        answer = await hub.get("/admin/workers", None, headers=headers)
        assert answer.status == 403
        assert answer.json()["error"]["code"] == "local_only"


@pytest.mark.parametrize("headers", FOREIGN[:1])
async def test_with_a_token_any_address_will_do(
    headers: Sequence[tuple[str, str]],
) -> None:
    async with running_hub(ready=False) as hub:
        token = hub.token(**ADMIN)
        answer = await hub.get("/admin/workers", token, headers=headers)
        assert answer.status == 200


# --- Who may call it --------------------------------------------------------------

PATHS = ["/admin/workers", "/admin/workers/x", "/admin/openapi.json"]


@pytest.mark.parametrize("path", PATHS)
async def test_only_the_scope_admin_is_admitted(path: str) -> None:
    async with running_hub(ready=False) as hub:
        for token in (None, "x", hub.token(exp=1, **ADMIN)):
            answer = await hub.get(path, token)
            assert answer.status == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for scope in (None, "", "metrics", "worker", "Admin", "admins"):
            answer = await hub.get(path, hub.token(scope=scope))
            assert answer.status == 403
            assert answer.json()["error"]["code"] == "insufficient_scope"


async def test_the_description_is_served() -> None:
    async with running_hub(ready=False) as hub:
        for _ in range(2):
            answer = await get(hub, "/admin/openapi.json")
            assert answer.json()["openapi"] == "3.1.0"
