"""A bracket in a name of a model stands for itself, wherever names are patterns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gollama_proxy.config.settings import Health
from gollama_proxy.config.values import Aliases, matches
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.upstream.probe import Description
from gollama_proxy.wire.description import Check
from tests.fakes.asks import CHAT, WHOLE
from tests.fakes.clock import Clock
from tests.fakes.hub import running_hub
from tests.fakes.worker import ScriptedWorker
from tests.fleet.test_worker import CONFIG


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("x[1m]", "x[1m]"),
        ("x[1m]", "x[1m]*"),
        ("x[1m]-fast", "x[1m]*"),
        ("a-x[1m]", "*x[1m]"),
        ("x[1m]", "x*"),
        ("x[1m]", "x?1m?"),
        ("x[", "x["),
        ("x[]", "x[]"),
        ("x[!a]", "x[!a]"),
        ("x[a][b]", "x[a][b]"),
        # A class, as in a shell
        ("x1", "x[12]"),
        ("x2-fast", "x[12]*"),
        ("x3", "x[!12]"),
    ],
)
def test_a_name_with_brackets_is_covered(name: str, pattern: str) -> None:
    assert matches(name, ["nothing", pattern])


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("x[1m]", "x[1n]"),
        ("x[1m]", "x[1m]?"),
        ("x[1m", "x[1m]"),
        ("x", "x[1m]"),
        ("x[1M]", "x[1m]"),
        ("x3", "x[12]"),
    ],
)
def test_a_name_with_brackets_is_not_covered(name: str, pattern: str) -> None:
    assert not matches(name, [pattern])


@pytest.mark.parametrize("pattern", ["x[1m]", "x[1m]*", "x*"])
async def test_a_token_may_be_for_such_a_name(pattern: str) -> None:
    async with ScriptedWorker("x[1m]", "y") as worker, running_hub(worker) as hub:
        token = hub.token(models=[pattern])
        response = await hub.post(CHAT, WHOLE | {"model": "x[1m]"}, token)
        assert response.status == 200
        listed = (await hub.get("/v1/models", token)).json()["data"]
        assert [model["id"] for model in listed] == ["x[1m]"]
        assert (await hub.post(CHAT, WHOLE | {"model": "y"}, token)).status == 403


@pytest.mark.parametrize("allowed", ["claude[1m]", "claude*", "claude[1m]*"])
async def test_a_token_may_be_for_such_an_alias(allowed: str) -> None:
    aliases = {"claude[1m]": "qwen"}
    async with (
        ScriptedWorker("qwen", "y") as worker,
        running_hub(worker, models__aliases=aliases) as hub,
    ):
        token = hub.token(models=[allowed])
        response = await hub.post(CHAT, WHOLE | {"model": "claude[1m]"}, token)
        assert response.status == 200
        assert response.json()["model"] == "claude[1m]"
        listed = (await hub.get("/v1/models", token)).json()["data"]
        assert [model["id"] for model in listed] == ["claude[1m]"]
        assert (await hub.post(CHAT, WHOLE | {"model": "qwen"}, token)).status == 403


def test_a_class_in_a_token_must_match_literally() -> None:
    assert Aliases({"gpt[34]": "a"}).key("gpt3") == "gpt[34]"
    assert Aliases({"gpt[34]": "a"}).names == {"gpt[34]": "a"}


def test_a_worker_may_be_stated_to_serve_such_a_name() -> None:
    worker = Worker(replace(CONFIG, models=("x[1m]", "y[12]")), Health(), Clock())
    assert worker.serves("x[1m]")
    assert not worker.serves("x[2m]")
    worker.observe(Check.OK, "ok", Description(()))
    assert [model.name for model in worker.models] == ["x[1m]", "y[12]"]
