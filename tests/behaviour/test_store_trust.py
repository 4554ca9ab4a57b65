"""A hub that may have missed revocations accepts tokens for a time, and then none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock
from tests.fakes.hub import running_hub
from tests.fakes.valkey import is_down, running_store
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

QUESTION: dict[str, Any] = {"messages": []}


async def test_tokens_are_refused_when_revocations_may_have_been_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    settings = {"state__trust": 600, "clock": clock}
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with running_hub(worker, state__url=server.url, **settings) as hub:
            token = hub.token()
            assert (await hub.post(CHAT, QUESTION, token)).status == 200
            assert hub.hub.cluster is not None
            await server.kill()
            await is_down(hub.hub.cluster.store)
            clock.advance(590)
            await hub.hub.cluster.shared.round()
            assert (await hub.post(CHAT, QUESTION, token)).status == 200
            clock.advance(10)
            await hub.hub.cluster.shared.round()
            for each in token, hub.token("bob"):
                refused = await hub.post(CHAT, QUESTION, each)
                assert refused.status == 503
                assert refused.json()["error"]["code"] == "store_unavailable"
                assert refused.header("Retry-After") == "10"
            assert (await hub.get("/readyz")).status == 503
            assert (await hub.get("/livez")).status == 200
            assert caplog.text.count("(state.trust): tokens are refused") == 1
            await server.start()
            await until(lambda: not hub.hub.authenticator.suspended)
            assert (await hub.post(CHAT, QUESTION, token)).status == 200
            assert (await hub.get("/readyz")).status == 200
            assert "tokens are accepted" in caplog.text


@pytest.mark.parametrize(
    "settings", [{"state__trust": 0}, {"auth__mode": "off", "state__trust": 1}]
)
async def test_trust_has_no_end_if_none_is_set_or_there_are_no_tokens(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    clock = Clock()
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        settings |= {"clock": clock, "state__url": server.url}
        async with running_hub(worker, **settings) as hub:
            assert hub.hub.cluster is not None
            await server.kill()
            await is_down(hub.hub.cluster.store)
            clock.advance(1e6)
            await hub.hub.cluster.shared.round()
            assert (await hub.post(CHAT, QUESTION)).status == 200
