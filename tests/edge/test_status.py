"""Machines ask the hub how it is; strangers learn nothing by it."""

from __future__ import annotations

import json

import pytest

from gollama_proxy.config.settings import Config, Queue
from gollama_proxy.edge.status import Status
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.telemetry.metrics import Telemetry
from tests.fakes.clock import Clock
from tests.fakes.hub import running_hub
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
    assert repr(Status(lambda: True, telemetry, None)) == "<Status ready=True>"
