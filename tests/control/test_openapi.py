"""The description of the admin API is true: routes, permissions and answers."""

from __future__ import annotations

import asyncio
import json
from importlib import resources
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from gollama_proxy import control
from gollama_proxy.config.settings import Config
from gollama_proxy.control.admin import Admin, UsageApi
from gollama_proxy.control.views import Views
from gollama_proxy.hub import Hub
from tests.control.test_admin import ADMIN, CALM
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.worker import ScriptedWorker

DESCRIPTION: dict[str, Any] = json.loads(
    resources.files(control).joinpath("openapi.json").read_bytes()
)
ALL_CALLS = [
    (method.upper(), path)
    for path, item in DESCRIPTION["paths"].items()
    for method in item
    if method != "parameters"
]
# `/v1/usage` is for every caller.
CALLS = [(method, path) for method, path in ALL_CALLS if path.startswith("/admin/")]
EXAMPLES = 3  # for each call


def test_each_route_is_described_and_the_other_way_round() -> None:
    hub = Hub(Config())
    routes = {**Admin(hub, Views(hub)).routes(), **UsageApi(hub).routes()}
    assert sorted(ALL_CALLS) == sorted(
        (method, path) for path, methods in routes.items() for method in methods
    )


# --- Permission -------------------------------------------------------------------


async def call(hub: RunningHub, method: str, path: str, token: str | None) -> Response:
    """Call a path with a body that no call accepts."""
    path = path.format(name="missing", id="none")
    fields = [("Content-Type", "application/json"), ("Content-Length", "2")]
    async with await hub.wire() as wire:
        await wire.get(path, token, method=method, headers=fields)
        await wire.send(b"[]")
        if path == "/admin/events" and method == "GET":
            head = await wire.read_head()
            if head.status == 200:
                return head  # its body has no end
        return await wire.read_response()


async def test_only_operators_are_admitted() -> None:
    async with running_hub(**CALM, ready=False) as hub:
        await hub.hub.revoke("jti", "lost")
        await hub.hub.revoke("sub", "mallory")
        tokens: dict[tuple[int, str], list[str | None]] = {
            (401, "invalid_api_key"): [
                None,
                "nonsense",
                hub.token(exp=1, **ADMIN),
                hub.token(jti="lost", **ADMIN),
                hub.token("mallory", **ADMIN),
            ],
            (403, "insufficient_scope"): [
                hub.token(),
                hub.token(scope="worker"),
                hub.token(scope="metrics"),
                hub.token(scope="metrics worker"),
                hub.token(scope="Admin"),
                hub.token(scope="Monitor"),
            ],
        }
        for method, path in CALLS:
            for expected, some in tokens.items():
                for token in some:
                    answer = await call(hub, method, path, token)
                    found = answer.status, answer.json()["error"]["code"]
                    assert found == expected, (method, path, token)
            for scope in ("admin", "metrics admin"):
                token = hub.token("root", scope=scope)
                answer = await call(hub, method, path, token)
                assert answer.status not in (401, 403), (method, path, scope)


async def test_a_monitor_sees_everything_and_changes_nothing() -> None:
    async with running_hub(**CALM, ready=False) as hub:
        token = hub.token("eve", scope="monitor")
        for method, path in CALLS:
            answer = await call(hub, method, path, token)
            if method == "GET" or path in ("/admin/explain", "/admin/links"):
                assert answer.status not in (401, 403), (method, path)
            else:
                assert answer.status == 403, (method, path)
                error = answer.json()["error"]
                assert error["code"] == "insufficient_scope"
                assert "needs the scope admin." in error["message"]


async def test_without_authentication_no_page_may_call_it() -> None:
    foreign = [
        [("Host", "localhost"), ("Origin", "http://evil.example")],
        [("Host", "localhost"), ("Sec-Fetch-Site", "cross-site")],
        [("Host", "rebound.example")],
    ]
    async with running_hub(auth__mode="off", ready=False) as hub:
        for method, path in CALLS:
            for fields in foreign:
                async with await hub.wire() as wire:
                    target = path.format(name="missing", id="none")
                    await wire.get(target, method=method, headers=fields)
                    answer = await wire.read_response()
                found = answer.status, answer.json()["error"]["code"]
                assert found == (403, "local_only"), (method, path, fields)


async def test_other_methods_are_not_allowed() -> None:
    async with running_hub(ready=False) as hub:
        for path in DESCRIPTION["paths"]:
            allowed = {method for method, each in ALL_CALLS if each == path}
            others = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - allowed
            for method in others:
                answer = await call(hub, method, path, hub.token(**ADMIN))
                assert answer.status == 405, (method, path)
                shown = {"HEAD", *allowed} if "GET" in allowed else allowed
                assert set((answer.header("allow") or "").split(", ")) == shown


# --- Any input --------------------------------------------------------------------


def description() -> dict[str, Any]:
    """Return the description for generated calls, which reach no other machine."""
    made: dict[str, Any] = json.loads(json.dumps(DESCRIPTION))
    urls = ["http://127.0.0.1:9", "http://127.0.0.1:9/a", "https://[::1]:9", "x://y"]
    for name in ("WorkerTable", "WorkerPatch"):
        made["components"]["schemas"][name]["properties"]["url"] = {"enum": urls}
    del made["paths"]["/admin/events"]  # its answer has no end
    return made


async def test_any_input_gets_an_answer_that_is_described() -> None:
    """With inputs that fit the description, and inputs that do not."""
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        headers = {"Authorization": f"Bearer {hub.token('root', **ADMIN)}"}
        await asyncio.to_thread(try_everything, hub.url, headers)
        assert hub.hub.registry.workers is not None
        assert (await hub.get("/livez")).status == 200


def try_everything(url: str, headers: dict[str, str]) -> None:
    """Call everything with generated inputs; the server runs in another thread."""
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi import checks

    # What a name or an address may be is more than a schema can describe.
    beyond = [checks.positive_data_acceptance]
    schema = schemathesis.openapi.from_dict(description())
    for result in schema.get_all_operations():
        operation = result.ok()
        takes_input = operation.body or operation.query
        for mode in GenerationMode if takes_input else [GenerationMode.POSITIVE]:

            @settings(
                max_examples=EXAMPLES,
                derandomize=True,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def attempt(case: Any) -> None:
                response = case.call(base_url=url, headers=headers)
                case.validate_response(response, excluded_checks=beyond)

            attempt()
