"""The dashboard and the alerts fit the metrics of a hub, by Prometheus' own checks."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gollama_proxy.telemetry.families import METRICS
from gollama_proxy.wire.errors import Code
from tests.behaviour.test_rescue import continued, partial
from tests.behaviour.test_retries import InOrder
from tests.docs.parts import PAGES, name_of
from tests.fakes.asks import CHAT, EMBED, RARELY, STREAM
from tests.fakes.authority import Authority
from tests.fakes.hub import running_hub
from tests.fakes.page import Samples, parse
from tests.fakes.script import Script, reset, stream_of
from tests.fakes.tools import require
from tests.fakes.valkey import running_store
from tests.fakes.worker import ScriptedWorker

MONITORING = Path(__file__).parent.parent / "examples" / "monitoring"
ADDED = {"job", "instance"}  # the labels that Prometheus adds


@pytest.fixture
def promtool() -> str:
    return require("promtool", package="prometheus")


async def run(*command: str | Path, text: bytes = b"") -> str:
    """Run a command that has to succeed; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=MONITORING,
    )
    printed, _ = await process.communicate(text)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


@pytest.fixture
async def page(tmp_path: Path) -> bytes:
    """Return the metrics of a hub that has met all that there are metrics for."""
    authority = Authority(tmp_path / "tls")
    certificate, key = authority.issue("127.0.0.1")
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker("qwen") as first,
        ScriptedWorker("qwen") as second,
        ScriptedWorker("big") as big,
        running_hub(
            *(first, second, big),
            server__tls_certificate=certificate,
            server__tls_key=key,
            trust=authority.client(),
            models__fallbacks="big=qwen",
            metrics__open=True,
            rescue__enabled=True,
            retry__attempts=2,
            health__interval=RARELY,
            state__url=server.url,
        ) as hub,
    ):
        hub.hub.balancer.policy = InOrder()

        async def stream(model: str, script: Script, rescue: Script = ()) -> None:
            first.script(*script)
            if rescue:
                second.script(*rescue)
            async with await hub.open(CHAT, {"model": model, **STREAM}) as wire:
                await wire.read_to_end()

        await stream("qwen", stream_of(20, usage=True))
        await stream("qwen", partial(reset()), continued())
        await stream("qwen", (reset(),), stream_of(3))
        await stream("qwen", (reset(),), (reset(),))
        big.default(reset())
        await stream("big", stream_of(3))
        await hub.post(EMBED, {"model": "qwen", "input": "hello"})
        await hub.post("/v1/messages/count_tokens", {"model": "qwen", "messages": []})
        await hub.post(CHAT, {"model": "none", "messages": []})
        limited = hub.token(sub="bob", rpm=1)
        for _ in range(2):
            await hub.post(EMBED, {"model": "qwen", "input": "hello"}, limited)
        return (await hub.get("/metrics")).body


async def test_promtool_accepts_the_metrics(promtool: str, page: bytes) -> None:
    assert await run(promtool, "check", "metrics", text=page) == ""


async def test_the_alerts_are_valid_and_are_raised_when_they_should(
    promtool: str,
) -> None:
    assert "FAILED" not in await run(promtool, "check", "rules", "alerts.yml")
    assert "SUCCESS" in await run(promtool, "test", "rules", "alerts_test.yml")


def test_each_alert_is_tested_both_ways() -> None:
    raised, quiet = set(), set()
    for test in load("alerts_test.yml")["tests"]:
        for case in test["alert_rule_test"]:
            (raised if case["exp_alerts"] else quiet).add(case["alertname"])
    assert raised == quiet == {rule["alert"] for rule in rules()}


async def test_the_scrape_configuration_is_valid(promtool: str, tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        (tmp_path / name).write_text((MONITORING / name).read_text())
    (tmp_path / "gollama.token").write_text("secret")
    await run(promtool, "check", "config", tmp_path / "prometheus.yml")


async def test_all_that_the_dashboard_and_the_alerts_name_exists(page: bytes) -> None:
    samples = parse(page)
    labels: dict[str, set[str]] = {}
    for name, of_sample in samples:
        labels.setdefault(name, set()).update(label for label, _ in of_sample)
    for expression in [*expressions(), *(rule["expr"] for rule in rules())]:
        named = check_selectors(expression, labels, samples)
        known = ADDED.union(*(labels[name] for name in named))
        grouped = re.findall(r"\b(?:by|on) ?\(([^()]*)\)", expression)
        for group in grouped:
            assert {label.strip() for label in group.split(",")} <= known, expression
    shown = {name for text in expressions() for name in re.findall(r"\w+", text)}
    for family in METRICS:
        name = family.name + ("_bucket" if family.type == "histogram" else "")
        assert name in shown, f"the dashboard does not show {family.name}"


async def test_prometheus_accepts_what_the_dashboard_asks(
    promtool: str, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []
    for text in expressions():
        text = text.replace("$__rate_interval", "5m")
        if not text.startswith("label_values("):  # Grafana's, for its variables
            asked.append({"record": "asked", "expr": text})
    assert len(asked) > 50
    for number, rule in enumerate(asked):
        rule["labels"] = {"number": str(number)}  # or they would be duplicates
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": asked}]})
    )
    await run(promtool, "check", "rules", tmp_path / "rules.yml")


def check_selectors(
    expression: str, labels: dict[str, set[str]], samples: Samples
) -> list[str]:
    """Return the metrics of an expression; what it names has to be in the page."""
    named = []
    for name, selector in re.findall(
        r"\b((?:gollama|process)_\w+)(?:\{([^}]*)\})?", expression
    ):
        assert name in labels, f"{name} does not exist: {expression}"
        named.append(name)
        for label, sign, text in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selector):
            assert label in labels[name] | ADDED, f"{label} of {name}: {expression}"
            if "$" in text or label in ADDED:
                continue
            values = {
                value
                for of, pairs in samples
                for key, value in pairs
                if of == name and key == label
            }
            if label == "outcome":
                values.update(Code)
            for each in text.split("|") if "~" in sign else [text]:
                assert any(re.fullmatch(each, value) for value in values), each
    return named


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_documentation_names_metrics_that_exist(page: Path) -> None:
    known = {family.name for family in METRICS}
    named = re.findall(r"\bgollama_(?!proxy)\w+", page.read_text())
    for name in named:
        assert re.sub("_(bucket|sum|count)$", "", name) in known, name


# --- The dashboard ----------------------------------------------------------------


def test_the_dashboard_can_be_imported() -> None:
    """As Grafana requires it: the data source is chosen, and the id is Grafana's."""
    board = load("dashboard.json")
    assert board["id"] is None
    assert board["uid"] is None  # a fixed one would replace another dashboard
    assert board["schemaVersion"] >= 36
    assert board["title"]
    assert board["time"] == {"from": "now-1h", "to": "now"}
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert next(iter(variables)) == "datasource"  # the others are looked up in it
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    source = {"type": "prometheus", "uid": "${datasource}"}
    for variable in variables.values():
        if variable["type"] == "query":
            assert variable["datasource"] == source
    for panel in board["panels"]:
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == source
        assert panel["description"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(set(refs)) == len(refs)
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert target["expr"]


def test_no_panel_of_the_dashboard_covers_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in load("dashboard.json")["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]


def test_the_variables_of_the_dashboard_are_declared() -> None:
    text = (MONITORING / "dashboard.json").read_text()
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval"}
    declared = {each["name"] for each in load("dashboard.json")["templating"]["list"]}
    assert used == declared


def load(name: str) -> Any:
    text = (MONITORING / name).read_text()
    return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)


def rules() -> list[dict[str, Any]]:
    return [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    """Yield all that the dashboard asks Prometheus for."""
    board = load("dashboard.json")
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]
    for annotation in board["annotations"]["list"]:
        yield annotation["expr"]
