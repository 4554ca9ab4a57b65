"""A hub answers for all hubs of its store, and names those that do not answer."""

from __future__ import annotations

from typing import Any

from gollama_proxy.control.merging import Answers
from tests.control.test_admin import CALM, begun, call, endless, error_of, get
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker


class OtherHubs:
    """Other hubs that run in this process, and some that never answer."""

    def __init__(self, name: str, missing: list[str], **hubs: RunningHub) -> None:
        self.name = name
        self.store = {"mode": "up", "reason": ""}
        self._missing, self._hubs = missing, hubs
        self.asked: list[str] = []

    async def ask(
        self,
        what: str,
        arguments: dict[str, Any] | None = None,
        *,
        group: bool = False,
        patience: float | None = None,
    ) -> Answers:
        self.asked.append(what)
        found = {}
        for name, running in self._hubs.items():
            value = running.hub.replies.table[what](arguments or {})
            found[name] = await value if hasattr(value, "__await__") else value
        return Answers(found, self._missing)


def join(one: RunningHub, *missing: str, **others: RunningHub) -> OtherHubs:
    one.hub.peers = peers = OtherHubs("a", [*missing], **others)
    return peers


async def test_lists_are_of_all_hubs() -> None:
    async with (
        ScriptedWorker(slots=2) as worker,
        running_hub(worker, **CALM) as one,
        running_hub(worker, **CALM) as two,
    ):
        join(one, b=two)
        endless(worker)
        async with await two.open(CHAT, STREAM, two.token("bob")) as wire:
            await begun(wire)
            [shown] = (await get(one, "/admin/workers")).json()["workers"]
            assert shown["running"] == 1
            [row] = shown["hubs"]
            assert (row["hub"], row["running"]) == ("b", 1)
            name = shown["name"]
            shown = (await get(one, f"/admin/workers/{name}")).json()
            assert shown["running"] == 1
            [running] = (await get(one, "/admin/exchanges")).json()["exchanges"]
            assert (running["hub"], running["subject"]) == ("b", "bob")
            assert (await get(one, "/admin/queue")).json() == {"queue": []}
            [model] = (await get(one, "/admin/models")).json()["models"]
            assert model["waiting"] == 0


async def test_missing_hubs_are_named() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        join(hub, "gateway-b")
        for path in ("workers", "models", "queue", "exchanges", "requests", "hubs"):
            answer = (await get(hub, f"/admin/{path}")).json()
            assert answer["missing"] == ["gateway-b"], path
        answer = (await get(hub, "/admin/history?worker=*")).json()
        assert answer["missing"] == ["gateway-b"]
        answer = await call(hub, "DELETE", "/admin/exchanges/x")
        code, param, text = error_of(answer, 404)
        assert (code, param) == ("not_found", "id")
        assert text == (
            "No request with the id 'x' runs or waits; gateway-b did not answer."
        )


async def test_a_request_of_another_hub_is_cancelled() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **CALM) as one,
        running_hub(worker, **CALM) as two,
    ):
        join(one, b=two)
        endless(worker)
        headers = [("X-Request-Id", "abc")]
        async with await two.open(CHAT, STREAM, headers=headers) as wire:
            await begun(wire)
            answer = await call(one, "DELETE", "/admin/exchanges/abc")
            assert answer.json() == {"id": "abc", "state": "cancelled"}
            assert b"request_cancelled" in (await wire.read_to_end()).raw
        await until(lambda: two.hub.recent.count)
        [ended] = (await get(one, "/admin/requests?id=abc")).json()["requests"]
        assert (ended["hub"], ended["error"]) == ("b", "request_cancelled")


async def test_the_running_requests_of_a_revoked_subject_are_those_of_all() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **CALM) as one,
        running_hub(worker, **CALM) as two,
    ):
        join(one, b=two)
        endless(worker)
        headers = [("X-Request-Id", "abc")]
        async with await two.open(
            CHAT, STREAM, two.token("bob"), headers=headers
        ) as wire:
            await begun(wire)
            entry = {"subject": "bob", "cancel": True}
            answer = await call(one, "POST", "/admin/revoke", entry)
            assert answer.json()["running"] == ["abc"]
            assert b"request_cancelled" in (await wire.read_to_end()).raw


async def test_breakers_are_reset_on_all_hubs_and_settings_in_the_group() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        peers = join(hub, b=hub)
        [shown] = (await get(hub, "/admin/workers")).json()["workers"]
        path = f"/admin/workers/{shown['name']}/reset-breaker"
        assert (await call(hub, "POST", path)).status == 200
        assert (await call(hub, "POST", "/admin/reload")).status == 200
        assert {"reset", "reload"} < {*peers.asked}


async def test_the_history_is_the_sum() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **CALM) as one,
        running_hub(worker, **CALM) as two,
    ):
        join(one, b=two)
        answer = (await get(one, "/admin/history?worker=*&seconds=5")).json()
        assert set(answer) == {"time", "step", "hub", "workers"}
        answer = await get(one, "/admin/history?worker=nobody")
        assert error_of(answer, 404)[1] == "worker"


async def test_the_hubs_are_listed() -> None:
    async with (
        running_hub(ready=False, **CALM) as one,
        running_hub(ready=False, **CALM) as two,
    ):
        alone = (await get(one, "/admin/hubs")).json()
        assert alone["store"] is None
        assert [each["hub"] for each in alone["hubs"]] == [""]
        join(one, b=two)
        answer = (await get(one, "/admin/hubs")).json()
        assert answer["store"] == {"mode": "up", "reason": ""}
        assert [each["hub"] for each in answer["hubs"]] == ["a", "b"]
        assert answer["hubs"][1]["running"] == 0
        join(one, A=two)  # by name, so that each hub lists them in the same order
        answer = (await get(one, "/admin/hubs")).json()
        assert [each["hub"] for each in answer["hubs"]] == ["A", "a"]


async def test_an_explanation_names_its_hub() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        join(hub)
        question = {"model": "tiny", "prompt": "hello"}
        answer = (await call(hub, "POST", "/admin/explain", question)).json()
        assert answer["hub"] == "a"


async def test_unknown_workers_are_not_found_on_any_hub() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(ready=False, **CALM) as one,
        running_hub(worker, **CALM) as two,
    ):
        join(one, b=two)
        [shown] = (await get(two, "/admin/workers")).json()["workers"]
        name = shown["name"]
        shown = (await get(one, f"/admin/workers/{name}")).json()
        assert shown["name"] == name
        answer = await get(one, "/admin/workers/nobody")
        assert error_of(answer, 404)[1] == "name"
