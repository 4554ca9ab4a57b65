"""Machines ask the hub how it is; strangers learn nothing by it."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote

import pytest

from gollama_proxy.config.settings import Config, Queue
from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.edge.router import ModelList, Status
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.telemetry.metrics import Telemetry
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.worker import ScriptedWorker

PROBES = ("/livez", "/readyz", "/health")
READY = {"status": "ok"}
NOT_READY = {"status": "no worker is ready"}


async def test_a_hub_with_a_worker_is_alive_and_ready() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for path in PROBES:
            response = await hub.get(path, None)
            assert (response.status, response.json()) == (200, READY)
            assert response.header("content-type") == "application/json"
            assert response.header("server") == "gollama-proxy"


async def test_a_hub_without_a_worker_is_alive_and_not_ready() -> None:
    async with ScriptedWorker(up=False) as worker, running_hub(worker) as hub:
        assert (await hub.get("/livez", None)).status == 200
        for path in ("/readyz", "/health"):
            response = await hub.get(path, None)
            assert (response.status, response.json()) == (503, NOT_READY)


async def test_a_hub_is_not_ready_before_it_knows_a_worker() -> None:
    async with ScriptedWorker() as worker:
        worker.hang_health = True
        async with running_hub(worker, ready=False) as hub:
            await worker.pinged()
            assert (await hub.get("/readyz", None)).status == 503
            assert (await hub.get("/livez", None)).status == 200


async def test_readiness_follows_the_workers() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, health__interval=0.02, health__recheck=0.02) as hub,
    ):
        assert (await hub.get("/readyz", None)).status == 200
        worker.loading = True
        while hub.hub.registry.ready:
            await worker.pinged()
        assert (await hub.get("/readyz", None)).status == 503
        worker.loading = False
        while not hub.hub.registry.ready:
            await worker.pinged()
        assert (await hub.get("/readyz", None)).status == 200


async def test_one_of_two_workers_is_enough() -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker(up=False) as two,
        running_hub(one, two) as hub,
    ):
        assert (await hub.get("/readyz", None)).status == 200


@pytest.mark.parametrize("path", PROBES)
async def test_a_probe_gives_no_detail_and_touches_no_worker(path: str) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        pings = len(worker.control)
        for token in (None, "x", hub.token()):
            response = await hub.get(path, token)
            assert response.json() == READY
            shown = str(response)
            assert "qwen" not in shown
            assert str(worker.port) not in shown
        assert (worker.requests, len(worker.control)) == ([], pings)


@pytest.mark.parametrize("path", PROBES)
async def test_a_probe_may_ask_for_the_head_alone(path: str) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.get(path, method="HEAD")
            response = await wire.read_response()
            assert (response.status, response.body) == (200, b"")
            assert response.header("content-length") == str(len(b'{"status":"ok"}'))


async def test_readiness_ends_when_the_drain_begins() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        hub.hub.draining = True
        assert (await hub.get("/readyz", None)).status == 503
        assert (await hub.get("/health", None)).status == 503
        assert (await hub.get("/livez", None)).status == 200


# --- Metrics ----------------------------------------------------------------------


async def test_metrics_want_a_token() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for token in (None, "x", hub.token(exp=1)):
            response = await hub.get("/metrics", token)
            assert response.status == 401
            assert response.header("www-authenticate") == (
                'Bearer error="invalid_token"'
            )
            assert json.loads(response.body)["error"]["code"] == "invalid_api_key"
        response = await hub.get("/metrics")
        assert response.status == 200
        assert response.header("content-type") == (
            "text/plain; version=0.0.4; charset=utf-8"
        )
        assert b"gollama_build_info" in response.body


@pytest.mark.parametrize("scope", ["metrics", "admin", "x metrics"])
async def test_metrics_are_for_tokens_with_the_scope(scope: str) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await hub.get("/metrics", hub.token(scope=scope))
        assert response.status == 200


@pytest.mark.parametrize("scope", [None, "", "Metrics", "metrics2", "admin,metrics"])
async def test_metrics_are_not_for_other_tokens(scope: str | None) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await hub.get("/metrics", hub.token(scope=scope))
        assert response.status == 403
        error = response.json()["error"]
        assert error["code"] == "insufficient_scope"
        assert error["type"] == "permission_error"
        challenge = response.header("www-authenticate")
        assert challenge == 'Bearer error="insufficient_scope"'
        assert b"gollama_" not in response.body


async def test_metrics_are_open_where_there_is_no_authentication() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, auth__mode="off") as hub,
    ):
        assert (await hub.get("/metrics", None)).status == 200


async def test_metrics_can_be_opened_for_a_scraper_without_a_token() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, metrics__open=True) as hub,
    ):
        for token in (None, "x"):
            response = await hub.get("/metrics", token)
            assert response.status == 200
            assert b"gollama_worker_up" in response.body
        # Nothing else is opened with them.
        assert (await hub.get("/v1/models", None)).status == 401


async def test_metrics_have_no_second_token_in_the_query() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await hub.get(f"/metrics?token={hub.token()}", None)
        assert response.status == 401


def test_it_shows_what_it_is() -> None:
    telemetry = Telemetry(Registry(Config()), Admission(Queue(), Clock()))
    status = Status(lambda: True, telemetry, Authenticator(Config()), lambda: True)
    assert repr(status) == "<Status ready=True>"


# --- Models -----------------------------------------------------------------------


async def listed(hub: RunningHub, **claims: Any) -> list[str]:
    response = await hub.get("/v1/models", hub.token(**claims))
    assert response.status == 200
    return [row["id"] for row in response.json()["data"]]


async def entry(hub: RunningHub, name: str) -> dict[str, Any]:
    response = await hub.get(f"/v1/models/{name}")
    assert response.status == 200
    row: dict[str, Any] = response.json()
    return row


# --- Shape ------------------------------------------------------------------------


async def test_an_entry_has_the_fields_of_openai_and_one_more() -> None:
    import openai.types

    before = int(time.time())
    async with (
        ScriptedWorker("qwen", slots=3, n_ctx=512) as worker,
        running_hub(worker) as hub,
    ):
        response = await hub.get("/v1/models")
        assert response.header("content-type") == "application/json"
        [row] = response.json()["data"]
        created = row["created"]
        assert response.json() == {
            "object": "list",
            "data": [
                {
                    "id": "qwen",
                    "object": "model",
                    "created": created,
                    "owned_by": "gollama",
                    "gollama": {
                        "state": "ready",
                        "context": 512,
                        "loaded": None,
                        "workers": [
                            {
                                "name": worker.name,
                                "state": "ready",
                                "context": 512,
                                "slots": 3,
                                "loaded": None,
                            }
                        ],
                    },
                }
            ],
        }
        assert before <= created <= time.time()
        assert openai.types.Model.model_validate(row, strict=True).id == "qwen"
        assert (await hub.get("/v1/models/qwen")).json() == row


async def test_the_shorter_paths_and_repeated_calls_agree() -> None:
    async with ScriptedWorker("qwen", "phi") as worker, running_hub(worker) as hub:
        bodies = {
            (await hub.get(path)).body
            for path in ("/v1/models", "/models", "/v1/models?x", "/models")
        }
        assert len(bodies) == 1
        one = {
            (await hub.get(path)).body
            for path in ("/v1/models/phi", "/models/phi", "/v1/models/phi?x=/y")
        }
        assert len(one) == 1


async def test_no_worker_is_asked() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        connections, pings = worker.connections, len(worker.control)
        for path in ("/v1/models", "/v1/models/qwen", "/v1/models/phi"):
            await hub.get(path)
        assert worker.requests == []
        assert (worker.connections, len(worker.control)) == (connections, pings)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/qwen", "/models/phi"])
async def test_a_stranger_learns_nothing(path: str) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        for token in (None, "x"):
            response = await hub.get(path, token)
            assert response.status == 401
            assert b"qwen" not in response.body


# --- Several workers --------------------------------------------------------------


async def test_workers_with_the_same_model_share_an_entry() -> None:
    async with (
        ScriptedWorker("qwen", n_ctx=1024, slots=1) as one,
        ScriptedWorker("phi", "qwen", n_ctx=4096, slots=2) as two,
        running_hub(one, two) as hub,
    ):
        assert await listed(hub) == ["qwen", "phi"]
        extra = (await entry(hub, "qwen"))["gollama"]
        assert extra["context"] == 4096
        assert [(w["name"], w["context"], w["slots"]) for w in extra["workers"]] == [
            (one.name, 1024, 1),
            (two.name, 4096, 2),
        ]
        extra = (await entry(hub, "phi"))["gollama"]
        assert [w["name"] for w in extra["workers"]] == [two.name]


async def test_a_model_takes_what_all_of_its_workers_take() -> None:
    async with (
        ScriptedWorker("qwen", "phi", takes=("vision", "audio")) as one,
        ScriptedWorker("qwen", takes=("vision",)) as two,
        running_hub(one, two, models__aliases={"gpt": "qwen"}) as hub,
    ):
        for name in ("qwen", "gpt"):
            assert (await entry(hub, name))["architecture"] == {
                "input_modalities": ["text", "image"],
                "output_modalities": ["text"],
            }
        kinds = (await entry(hub, "phi"))["architecture"]["input_modalities"]
        assert kinds == ["text", "image", "audio"]


async def test_a_model_of_one_worker_without_pictures_takes_none() -> None:
    async with (
        ScriptedWorker("qwen", takes=("vision",)) as one,
        ScriptedWorker("qwen") as two,
        running_hub(one, two) as hub,
    ):
        assert "architecture" not in await entry(hub, "qwen")


async def test_a_model_whose_workers_are_down_is_listed_as_down() -> None:
    """A client that lists models once must not lose them to a restart."""
    async with (
        ScriptedWorker("qwen") as one,
        ScriptedWorker("qwen") as two,
        running_hub(
            one, two, health__interval=0.02, health__recheck=0.02, health__fall=1
        ) as hub,
    ):
        await one.down()
        worker = hub.hub.registry.workers[0]
        while worker.available:
            await two.pinged()
        extra = (await entry(hub, "qwen"))["gollama"]
        assert extra["state"] == "ready"
        assert [w["state"] for w in extra["workers"]] == ["down", "ready"]

        two.loading = True
        while hub.hub.registry.ready:
            await two.pinged()
        extra = (await entry(hub, "qwen"))["gollama"]
        assert extra["state"] == "down"
        assert [w["state"] for w in extra["workers"]] == ["down", "loading"]
        assert await listed(hub) == ["qwen"]


async def test_a_worker_that_was_never_reached_has_no_entry() -> None:
    async with (
        ScriptedWorker("qwen") as one,
        ScriptedWorker("phi", up=False) as two,
        running_hub(one, two) as hub,
    ):
        assert await listed(hub) == ["qwen"]


async def test_without_any_worker_the_list_is_empty() -> None:
    async with running_hub() as hub:
        response = await hub.get("/v1/models")
        assert (response.status, response.json()["data"]) == (200, [])
        assert (await hub.get("/v1/models/qwen")).status == 404


# --- Aliases ----------------------------------------------------------------------


async def test_an_alias_is_a_separate_entry() -> None:
    async with (
        ScriptedWorker("qwen", n_ctx=512) as worker,
        running_hub(worker, models__aliases={"gpt-4o-mini": "qwen"}) as hub,
    ):
        assert await listed(hub) == ["qwen", "gpt-4o-mini"]
        row, alias = await entry(hub, "qwen"), await entry(hub, "gpt-4o-mini")
        assert alias["id"] == "gpt-4o-mini"
        assert alias["gollama"] == {**row["gollama"], "alias_of": "qwen"}
        assert "alias_of" not in row["gollama"]
        assert alias["gollama"]["context"] == 512


async def test_an_alias_in_the_place_of_a_model_is_listed_once() -> None:
    async with (
        ScriptedWorker("qwen", "phi") as worker,
        running_hub(worker, models__aliases={"phi": "qwen"}) as hub,
    ):
        assert await listed(hub) == ["qwen", "phi"]
        assert (await entry(hub, "phi"))["gollama"]["alias_of"] == "qwen"


async def test_an_alias_of_an_unserved_model_is_down() -> None:
    """And the route agrees: the only model does not answer in its place."""
    async with (
        ScriptedWorker("qwen") as worker,
        running_hub(worker, models__aliases={"gpt": "llama"}) as hub,
    ):
        chat = {"model": "gpt", "messages": []}
        response = await hub.post("/v1/chat/completions", chat)
        assert response.status == 503
        assert response.json()["error"]["code"] == "no_worker_available"
        assert not worker.requests
        expected: dict[str, Any] = {
            "state": "down",
            "context": None,
            "loaded": None,
            "workers": [],
            "alias_of": "llama",
        }
        assert (await entry(hub, "gpt"))["gollama"] == expected


# --- Whose list it is -------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (None, ["qwen-4b", "qwen-8b", "phi", "gpt"]),
        (["*"], ["qwen-4b", "qwen-8b", "phi", "gpt"]),
        (["qwen*"], ["qwen-4b", "qwen-8b"]),
        (["qwen-[48]b"], ["qwen-4b", "qwen-8b"]),
        (["qwen-?b", "x"], ["qwen-4b", "qwen-8b"]),
        (["phi"], ["phi", "gpt"]),  # any name of a model allows it
        (["gpt"], ["gpt"]),
        (["PHI"], []),
        ([""], []),
        ([], []),
    ],
)
async def test_a_token_sees_what_it_may_use(
    patterns: list[str] | None, names: list[str]
) -> None:
    async with (
        ScriptedWorker("qwen-4b", "qwen-8b", "phi") as worker,
        running_hub(worker, models__aliases={"gpt": "phi"}) as hub,
    ):
        assert await listed(hub, models=patterns) == names
        for name in ("qwen-4b", "qwen-8b", "phi", "gpt"):
            token = hub.token(models=patterns)
            status = (await hub.get(f"/v1/models/{name}", token)).status
            assert status == (200 if name in names else 404)


async def test_what_a_token_may_not_use_does_not_exist() -> None:
    async with ScriptedWorker("qwen", "phi") as worker, running_hub(worker) as hub:
        token = hub.token(models=["qwen"])
        hidden = await hub.get("/v1/models/phi", token)
        absent = await hub.get("/v1/models/phx", token)
        assert hidden.status == absent.status == 404
        assert hidden.body == absent.body.replace(b"phx", b"phi")


# --- Names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "org/model",
        "org/sub/model:q4_k_m",
        "a b",
        "100%",
        "what?",
        "a#b",
        "Zoë-7b",
        "models/",
        "..",
        'q"uote',
        "a+b",
        "%2F",
    ],
)
async def test_any_name_can_be_asked_for(name: str) -> None:
    async with ScriptedWorker(name) as worker, running_hub(worker) as hub:
        assert await listed(hub) == [name]
        assert (await entry(hub, quote(name, safe="")))["id"] == name
        assert (await entry(hub, quote(name, safe="/:+")))["id"] == name
        if name.isascii() and name.isprintable() and not set(name) & set("%?# "):
            assert (await entry(hub, name))["id"] == name


@pytest.mark.parametrize(
    "path", ["x", "qwen/", "/qwen", "QWEN", "qwen%00", "qwen%0A", "%ff", "qwen%20"]
)
async def test_a_model_that_does_not_exist_is_not_found(path: str) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        response = await hub.get(f"/v1/models/{path}")
        error = response.json()["error"]
        assert (response.status, error["code"]) == (404, "model_not_found")
        assert (error["type"], error["param"]) == ("invalid_request_error", "model")
        assert error["message"].isprintable()


@pytest.mark.parametrize("path", ["/v1/models/", "/models/", "/v1/models/?x", "/v1/"])
async def test_a_path_without_a_name_is_no_path(path: str) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        response = await hub.get(path)
        assert (response.status, response.json()["error"]["code"]) == (
            404,
            "unknown_url",
        )


def test_the_list_shows_what_it_is() -> None:
    model_list = ModelList(Authenticator(Config()), Registry(Config()))
    assert repr(model_list) == "<ModelList of <Registry []>>"
