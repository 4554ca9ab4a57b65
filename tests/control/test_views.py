"""What the API shows is what the hub has."""

from __future__ import annotations

import random

import pytest

from gollama_proxy.config.settings import POLICIES
from gollama_proxy.control.views import policy_name
from gollama_proxy.scheduling.balancer import make
from tests.control.test_admin import CALM, complete, get
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.clock import Clock
from tests.fakes.hub import running_hub
from tests.fakes.script import close
from tests.fakes.worker import ScriptedWorker


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_has_the_name_that_it_has_in_the_settings(name: str) -> None:
    assert policy_name(make(name, Clock(), random.Random())) == name


async def test_a_worker_shows_how_fast_it_was() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        [shown] = (await get(hub, "/admin/workers")).json()["workers"]
        assert set(shown["speed"].values()) == {None}
        await hub.post(CHAT, STREAM)
        [shown] = (await get(hub, "/admin/workers")).json()["workers"]
        assert shown["speed"]["first_token"] is not None  # it may round to 0
        assert shown["last_error"] is None


async def test_a_worker_shows_how_it_failed_last() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=1, **CALM) as hub,
    ):
        worker.script(close())
        assert (await hub.post(CHAT, STREAM)).status == 502
        [shown] = (await get(hub, "/admin/workers")).json()["workers"]
        error = shown["last_error"]
        assert error["code"] == "worker_connection_lost"
        assert error["ago"] >= 0
