"""The admin API answers operators only, and each call changes what it should."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config.load import load, load_worker
from gollama_proxy.control.replies import LONG_BODY
from gollama_proxy.fleet.breaker import BreakerState
from gollama_proxy.fleet.state import Hold, Source
from gollama_proxy.hub import Hub
from gollama_proxy.state import local
from gollama_proxy.state.local import LocalState
from tests.fakes.asks import CHAT, RARELY, STREAM
from tests.fakes.client import Response, Wire
from tests.fakes.hub import SECRET, RunningHub, running_hub
from tests.fakes.pool import InOrder
from tests.fakes.registry import trip
from tests.fakes.replies import (
    chunk,
    done,
    finish,
    last_chunk,
    role,
    sse_head,
    token,
)
from tests.fakes.script import expect_eof, notify, reset, send, wait
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker, full_backlog

ADMIN = {"scope": "admin"}
CALM = {"health__interval": RARELY}
JSON = ("Content-Type", "application/json")
LONG = b"x" * 2 * LONG_BODY
DESK = {"name": "desk", "url": "http://127.0.0.1:9"}


async def get(hub: RunningHub, path: str) -> Response:
    """Get a path with a token of the scope admin."""
    return await hub.get(path, hub.token(**ADMIN))


async def call(
    hub: RunningHub, method: str, path: str, payload: Any = None, kind: Any = JSON
) -> Response:
    """Call a path with a token of the scope admin; bytes are sent as they are."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    fields = [] if payload is None else [kind, ("Content-Length", str(len(body)))]
    async with await hub.wire() as wire:
        await wire.get(path, hub.token("root", **ADMIN), method=method, headers=fields)
        if payload is not None:
            await wire.send(body)
        return await wire.read_response()


def error_of(answer: Response, status: int) -> tuple[str, str | None, str]:
    """Return the code, the field and the text of an error with this status."""
    assert answer.status == status, answer
    error = answer.json()["error"]
    return error["code"], error["param"], error["message"]


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


# --- Workers that are added, changed and removed ----------------------------------


async def test_a_worker_is_added_and_gets_requests() -> None:
    async with (
        ScriptedWorker("qwen") as worker,
        running_hub(**CALM, ready=False) as hub,
    ):
        row = {"url": worker.url, "name": "desk", "weight": 2, "slots": 3}
        answer = await call(hub, "POST", "/admin/workers", row)
        assert answer.status == 201
        added = answer.json()
        assert (added["name"], added["source"], added["slots"]) == ("desk", "admin", 3)
        await until(lambda: hub.hub.registry.ready)
        worker.script(*complete())
        assert (await hub.post(CHAT, {**STREAM, "model": "qwen"})).status == 200


@pytest.mark.parametrize(
    ("row", "param", "text"),
    [
        ({}, "url", "workers.url"),
        ({"url": "ftp://x"}, "url", "workers.url = 'ftp://x'"),
        ({"url": 7}, "url", "workers.url = 7"),
        ({"url": "http://10.0.0.9", "slots": 0}, "slots", "from 1 to 10,000"),
        ({"url": "http://10.0.0.9", "slots": "many"}, "slots", "'many'"),
        ({"url": "http://10.0.0.9", "models": []}, "models", "a list of model names"),
        ({"url": "dns+http://llama.lan:80"}, "url", "settings file"),
        ({"url": "http://10.0.0.9", "wieght": 1}, "wieght", "did you mean weight?"),
        ({"url": "http://10.0.0.9", "ca_file": "/x"}, "ca_file", "settings file"),
        (
            {"url": "http://10.0.0.9", "api_key_file": "/etc/passwd"},
            "api_key_file",
            "settings file",
        ),
        (
            {"url": "http://10.0.0.9", "api_key_env": "GOLLAMA_JWT_SECRET"},
            "api_key_env",
            "GOLLAMA_KEY_",
        ),
        (
            {"url": "http://10.0.0.9", "api_key_env": "GOLLAMA_KEY_X"},
            "api_key_env",
            "is not set",
        ),
    ],
)
async def test_a_wrong_worker_changes_nothing(
    row: dict[str, Any], param: str, text: str
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        before = hub.hub.registry.workers[:]
        answer = await call(hub, "POST", "/admin/workers", row)
        code, field, message = error_of(answer, 400)
        assert (code, field) == ("invalid_value", param)
        assert text in message
        assert hub.hub.registry.workers == before


async def test_names_and_addresses_do_not_clash() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        [known] = hub.hub.registry.workers
        other = "http://127.0.0.1:9"
        for row, param in (
            ({"url": worker.url, "name": "new"}, "url"),
            ({"url": other, "name": known.name}, "name"),
        ):
            answer = await call(hub, "POST", "/admin/workers", row)
            code, field, _ = error_of(answer, 409)
            assert (code, field) == ("conflict", param)
        assert hub.hub.registry.workers == [known]
        row = {"url": other, "name": "new"}
        assert (await call(hub, "POST", "/admin/workers", row)).status == 201
        patch = {"name": known.name}
        answer = await call(hub, "PATCH", "/admin/workers/new", patch)
        assert error_of(answer, 409)[1] == "name"


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", JSON, 400, "invalid_json"),
        (b"[]", JSON, 400, "invalid_json"),
        (b'"x"', JSON, 400, "invalid_json"),
        (b"\xff", JSON, 400, "invalid_json"),
        (b"[" * 100_000, JSON, 400, "invalid_json"),
        (b"{}", ("Content-Type", "text/plain"), 415, "unsupported_media_type"),
        (b"{}", ("X-None", "x"), 415, "unsupported_media_type"),
        (b" " * ((1 << 20) + 1), JSON, 413, "body_too_large"),
    ],
)
async def test_a_body_has_to_be_a_json_object(
    body: bytes, kind: tuple[str, str], status: int, code: str
) -> None:
    async with running_hub(**CALM, ready=False) as hub:
        answer = await call(hub, "POST", "/admin/workers", body, kind)
        assert error_of(answer, status)[0] == code


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", "workers", b'{"url": "http://10.0.0.8", "url": "http://a"}', "url"),
        ("PATCH", "workers/desk", b'{"weight": 2, "slots": 2, "weight": 3}', "weight"),
        ("POST", "revoke", b'{"subject": "eve", "subject": "bob"}', "subject"),
        ("POST", "explain", b'{"request": {"n": 1, "n": 2}}', "n"),
        (
            "POST",
            "explain",
            b'{"prompt": "%b", "model": "", "model": ""}' % LONG,
            "model",
        ),
    ],
)
async def test_a_field_that_is_there_twice_is_refused(
    method: str, path: str, body: bytes, field: str
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        hub.hub.registry.add(load_worker("workers", DESK, {}))
        answer = await call(hub, method, f"/admin/{path}", body)
        code, param, message = error_of(answer, 400)
        assert (code, param) == ("invalid_value", field)
        assert message == f"{field}: this field is there twice."
        assert hub.hub.registry.find("desk").config.weight is None


async def test_a_compressed_body_is_refused() -> None:
    async with running_hub(**CALM, ready=False) as hub:
        gzip = [JSON, ("Content-Encoding", "gzip")]
        token_ = hub.token(**ADMIN)
        answer = await hub.post("/admin/workers", b"x", token_, headers=gzip)
        assert error_of(answer, 415)[0] == "unsupported_encoding"


async def test_a_worker_is_changed_while_it_runs() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        [known] = hub.hub.registry.workers
        path = f"/admin/workers/{known.name}"
        answer = await call(hub, "PATCH", path, {"weight": 3, "slots": 2})
        changed = answer.json()
        assert (known.weight, known.slots) == (3.0, 2)
        assert changed["worker"]["weight"] == 3.0
        assert "declared in the settings" in changed["note"]
        answer = await call(hub, "PATCH", path, {"weight": None})
        assert (known.weight, known.slots) == (1.0, 2)
        before = known.config
        for patch in ({"weight": 0}, {"slots": "x"}, {"x": 1}, {"url": ""}):
            answer = await call(hub, "PATCH", path, patch)
            assert error_of(answer, 400)[1] == next(iter(patch))
        assert known.config == before
        answer = await call(hub, "PATCH", path, {"name": "other"})
        assert answer.json()["worker"]["name"] == known.name == "other"


async def test_a_worker_keeps_its_api_key_when_it_is_changed() -> None:
    async with running_hub(**CALM, ready=False, environ={}) as hub:
        row = {"url": "http://127.0.0.1:9", "name": "w"}
        await call(hub, "POST", "/admin/workers", row)
        [worker] = hub.hub.registry.workers
        registry = hub.hub.registry
        registry.replace(replace(worker.config, api_key="secret-key"))
        answer = await call(hub, "PATCH", "/admin/workers/w", {"weight": 2})
        assert worker.config.api_key == "secret-key"
        assert b"secret-key" not in answer.body
        # Another address is another server, which must not get it.
        patch = {"url": "http://127.0.0.1:10"}
        assert (await call(hub, "PATCH", "/admin/workers/w", patch)).status == 200
        assert registry.find("w").config.api_key == ""


async def test_the_name_and_address_of_an_agents_worker_are_its_agents() -> None:
    async with running_hub(ready=False, **CALM) as hub:
        config = load_worker("w", {"url": "http://127.0.0.1:9", "name": "w"}, {})
        worker = hub.hub.registry.add(config, Source.AGENT)
        for patch in ({"name": "x"}, {"url": "http://127.0.0.1:10"}):
            answer = await call(hub, "PATCH", "/admin/workers/w", patch)
            assert error_of(answer, 400)[1] == next(iter(patch))
        assert worker.config == config
        answer = await call(hub, "PATCH", "/admin/workers/w", {"weight": 2})
        assert worker.weight == 2.0
        assert "agent" in answer.json()["note"]


async def test_a_worker_that_cannot_be_stored_is_not_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "MAX_WORKERS", 1)
    monkeypatch.setattr(local, "MAX_REVOCATIONS", 1)
    async with running_hub(ready=False, **CALM) as hub:
        for number, status in ((1, 201), (2, 409)):
            row = {"url": f"http://127.0.0.1:{number}", "name": f"w{number}"}
            answer = await call(hub, "POST", "/admin/workers", row)
            assert answer.status == status
            answer = await call(hub, "POST", "/admin/revoke", {"jti": f"t{number}"})
            assert answer.status == (200 if number == 1 else 409)
        assert [worker.name for worker in hub.hub.registry.workers] == ["w1"]


async def test_a_worker_is_removed() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        [known] = hub.hub.registry.workers
        path = f"/admin/workers/{known.name}"
        answer = await call(hub, "DELETE", path)
        assert answer.json()["state"] == "removed"
        assert hub.hub.registry.workers == []
        assert error_of(await call(hub, "DELETE", path), 404)[0] == "not_found"


async def test_a_worker_is_held_back_and_released() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        [known] = hub.hub.registry.workers
        path = f"/admin/workers/{known.name}"
        for verb, hold in (
            ("pause", Hold.PAUSED),
            ("undrain", Hold.PAUSED),
            ("unpause", Hold.NONE),
            ("drain", Hold.DRAINING),
            ("drain", Hold.DRAINING),
            ("undrain", Hold.NONE),
            ("undrain", Hold.NONE),
        ):
            answer = await call(hub, "POST", f"{path}/{verb}")
            assert answer.json()["worker"]["hold"] == known.held == hold
        for verb in ("pause", "drain", "undrain", "unpause", "reset-breaker"):
            answer = await call(hub, "POST", f"/admin/workers/x/{verb}")
            assert error_of(answer, 404)[1] == "name"


async def test_a_breaker_is_reset() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        [known] = hub.hub.registry.workers
        trip(known)
        path = f"/admin/workers/{known.name}/reset-breaker"
        answer = await call(hub, "POST", path)
        assert answer.json()["worker"]["breaker"]["state"] == "closed"
        assert known.breaker.state is BreakerState.CLOSED


async def test_what_was_added_and_held_outlives_the_hub(tmp_path: Path) -> None:
    """With the state folder, and only with that."""
    config = load(None, {"GOLLAMA_JWT_SECRET": SECRET}, {"server.port": 0})
    state = await asyncio.to_thread(LocalState, tmp_path)
    hub = Hub(config, state=state)
    await hub.start()
    running = RunningHub(hub, {})
    row = {"url": "http://127.0.0.1:9", "name": "a", "weight": 2}
    assert (await call(running, "POST", "/admin/workers", row)).status == 201
    row = {"url": "http://127.0.0.1:10", "name": "b"}
    assert (await call(running, "POST", "/admin/workers", row)).status == 201
    for path in ("a/pause", "b/drain"):
        answer = await call(running, "POST", f"/admin/workers/{path}")
        assert answer.status == 200
    await call(running, "PATCH", "/admin/workers/a", {"name": "c", "weight": 4})
    await call(running, "DELETE", "/admin/workers/b")
    await call(running, "POST", "/admin/revoke", {"subject": "mallory"})
    running.close_clients()
    await hub.abort()
    await state.close()
    state = await asyncio.to_thread(LocalState, tmp_path)
    hub = Hub(config, state=state)
    [worker] = hub.registry.workers
    assert (worker.name, worker.weight, worker.source) == ("c", 4.0, Source.ADMIN)
    assert worker.held is Hold.PAUSED
    assert state.revoked.subjects == {"mallory"}
    await state.close()


async def test_each_change_is_logged_with_its_author(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.audit")
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        [known] = hub.hub.registry.workers
        path = f"/admin/workers/{known.name}"
        await call(hub, "PATCH", path, {"weight": 3})
        await call(hub, "POST", f"{path}/pause")
        await call(hub, "POST", f"{path}/pause")  # which changes nothing
        await call(hub, "PATCH", path, {"weight": 0})  # neither does this
        await get(hub, "/admin/workers")
    audit = [each for each in caplog.records if each.name == "gollama_proxy.audit"]
    found = [record.__dict__["fields"] for record in audit]
    assert [(each["subject"], each["action"]) for each in found] == [
        ("root", "change worker"),
        ("root", "hold worker"),
    ]
    assert (found[0]["old"], found[0]["new"]) == ('{"weight":null}', '{"weight":3.0}')
    assert (found[1]["old"], found[1]["new"]) == ("none", "paused")


# --- Requests ---------------------------------------------------------------------


def complete() -> list[Any]:
    body = b"".join([role(), token("a"), finish(), done()])
    return [send(sse_head() + chunk(body) + last_chunk())]


def endless(worker: ScriptedWorker) -> None:
    """Have a worker answer with two tokens and then wait."""
    body = b"".join([role(), token("a"), token("b")])
    worker.default(send(sse_head() + chunk(body)), wait("never"))


async def begun(wire: Wire) -> None:
    """Wait until a client has the events of `endless`."""
    await wire.read_head()
    for _ in range(3):
        await wire.read_event()


async def test_a_running_answer_is_shown_and_cancelled() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        token_ = hub.token("bob")
        fields = [("X-Request-Id", "mine")]
        async with await hub.open(CHAT, STREAM, token_, headers=fields) as wire:
            await begun(wire)
            [shown] = (await get(hub, "/admin/exchanges")).json()["exchanges"]
            assert (shown["id"], shown["subject"]) == ("mine", "bob")
            assert (shown["state"], shown["stream"]) == ("streaming", True)
            assert (shown["tokens"], shown["attempts"]) == (3, 1)
            assert shown["worker"] == hub.hub.registry.workers[0].name
            answer = await call(hub, "DELETE", "/admin/exchanges/mine")
            assert answer.json() == {"id": "mine", "state": "cancelled"}
            ending = await wire.read_to_end()
            assert not ending.clean
            assert b"request_cancelled" in ending.raw
        [worker_] = hub.hub.registry.workers
        await until(lambda: worker_.in_flight == 0)
        assert worker_.breaker.closed
        answer = await call(hub, "DELETE", "/admin/exchanges/mine")
        assert error_of(answer, 404)[:2] == ("not_found", "id")
        [ended] = (await get(hub, "/admin/requests")).json()["requests"]
        assert (ended["id"], ended["outcome"]) == ("mine", "error")
        assert (ended["error"], ended["tokens"]) == ("request_cancelled", 3)


async def test_an_answer_that_has_not_begun_becomes_an_error() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(wait("never"))
        fields = [("X-Request-Id", "mine")]
        async with await hub.open(CHAT, {"messages": []}, headers=fields) as wire:
            await until(lambda: len(worker.requests) == 1)
            await call(hub, "DELETE", "/admin/exchanges/mine")
            answer = await wire.read_response()
            code, _, text = error_of(answer, 403)
            assert code == "request_cancelled"
            assert "operator" in text


async def test_a_request_that_is_still_sent_is_cancelled() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        async with await hub.wire() as wire:
            fields = [JSON, ("Content-Length", "100"), ("X-Request-Id", "half")]
            await wire.get(CHAT, hub.token(), method="POST", headers=fields)
            await wire.send(b'{"mess')
            shown: list[Any] = []
            while not shown:
                shown = (await get(hub, "/admin/exchanges")).json()["exchanges"]
            assert (shown[0]["state"], shown[0]["attempts"]) == ("reading", 0)
            assert (await call(hub, "DELETE", "/admin/queue/half")).status == 404
            assert (await call(hub, "DELETE", "/admin/exchanges/half")).status == 200
            answer = await wire.read_response()
            assert error_of(answer, 403)[0] == "request_cancelled"
        assert not worker.requests


async def test_a_request_whose_worker_is_dialled_is_cancelled() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        await worker.down()
        fields = [("X-Request-Id", "mine")]
        with full_backlog(worker.port):
            async with await hub.open(CHAT, STREAM, headers=fields) as wire:
                shown: list[Any] = []
                while not shown:
                    shown = (await get(hub, "/admin/exchanges")).json()["exchanges"]
                assert shown[0]["state"] == "connecting"
                await call(hub, "DELETE", "/admin/exchanges/mine")
                answer = await wire.read_response()
        assert error_of(answer, 403)[0] == "request_cancelled"
        [worker_] = hub.hub.registry.workers
        await until(lambda: worker_.in_flight == 0)
        assert worker_.breaker.closed
        assert not worker_.in_doubt


async def test_an_answer_that_is_rescued_is_cancelled() -> None:
    """Neither worker keeps a slot, and the one that continued is not blamed."""
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        running_hub(one, two, **CALM, rescue__enabled=True) as hub,
    ):
        hub.hub.balancer.policy = InOrder()
        begun_, fields = chunk(role() + token("a")), [("X-Request-Id", "mine")]
        one.script(send(sse_head() + begun_), wait("seen"), reset())
        two.script(notify("asked"), expect_eof())
        async with await hub.open(CHAT, STREAM, headers=fields) as wire:
            await wire.read_event()
            one.release("seen")
            await two.reached("asked")
            [shown] = (await get(hub, "/admin/exchanges")).json()["exchanges"]
            assert shown["attempts"] == 2
            await call(hub, "DELETE", "/admin/exchanges/mine")
            ending = await wire.read_to_end()
        assert not ending.clean
        assert ending.raw.count(b"request_cancelled") == 1
        assert b"[DONE]" not in ending.raw
        await two.idle()
        _, second = hub.hub.registry.workers
        await until(lambda: not any(w.in_flight for w in hub.hub.registry.workers))
        assert second.breaker.closed
        assert not second.in_doubt


async def test_the_queue_is_shown_and_a_request_taken_out() -> None:
    async with ScriptedWorker(slots=1) as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with await hub.open(CHAT, STREAM) as first:
            await begun(first)
            wires = []
            for number in range(2):
                fields = [("X-Request-Id", f"w{number}")]
                wires.append(await hub.open(CHAT, {"messages": []}, headers=fields))
                await until(lambda n=number: hub.hub.queue.admission.waiting == n + 1)
            shown = (await get(hub, "/admin/queue")).json()["queue"]
            assert [(each["id"], each["position"]) for each in shown] == [
                ("w0", 1),
                ("w1", 2),
            ]
            assert {(each["subject"], each["class"]) for each in shown} == {
                ("alice", "interactive")
            }
            [model] = (await get(hub, "/admin/models")).json()["models"]
            assert model["waiting"] == 2
            answer = await call(hub, "DELETE", "/admin/queue/w0")
            assert answer.status == 200
            assert error_of(await wires[0].read_response(), 403)[0] == (
                "request_cancelled"
            )
            assert hub.hub.queue.admission.waiting == 1
            answer = await call(hub, "DELETE", "/admin/queue/w0")
            assert error_of(answer, 404)[1] == "id"
            wires[1].close()


async def test_a_full_disk_refuses_no_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The change holds until the hub stops, and the log warns that it will be lost."""
    settings: dict[str, Any] = {**CALM, "state__dir": tmp_path}
    async with ScriptedWorker() as worker:
        async with running_hub(ready=False, **settings) as hub:
            with contextlib.closing(
                sqlite3.connect(tmp_path / "state.db", timeout=0)
            ) as other:
                for table in ("workers", "revocations"):
                    full = "raise(ABORT, 'database or disk is full')"
                    other.execute(
                        f"CREATE TRIGGER full_{table} BEFORE INSERT ON {table} "
                        f"BEGIN SELECT {full}; END"
                    )
            row = {"url": worker.url, "name": "desk"}
            assert (await call(hub, "POST", "/admin/workers", row)).status == 201
            await until(lambda: hub.hub.registry.ready)
            assert (await hub.post(CHAT, {"messages": []})).status == 200
            answer = await call(hub, "POST", "/admin/revoke", {"subject": "bob"})
            assert answer.status == 200
            assert (await hub.post(CHAT, {}, hub.token("bob"))).status == 401
        assert caplog.text.count("disk is full; changes are lost") == 1
        async with running_hub(ready=False, **settings) as hub:
            assert not hub.hub.registry.workers


async def test_recent_requests_are_found_by_what_they_were() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        for sub in ("alice", "bob"):
            await hub.post(CHAT, STREAM, hub.token(sub))
        await hub.post(CHAT, {**STREAM, "model": 7})
        await hub.get("/v1/models")

        async def find(query: str) -> list[Any]:
            answer = await get(hub, f"/admin/requests{query}")
            found: list[Any] = answer.json()["requests"]
            return found

        assert [each["status"] for each in await find("")] == [400, 200, 200]
        [bob] = await find("?subject=bob")
        assert bob["subject"] == "bob"
        assert (bob["outcome"], bob["route"]) == ("complete", CHAT)
        assert bob["first_byte"] <= bob["duration"]
        assert await find(f"?id={bob['id']}") == [bob]
        assert len(await find("?outcome=invalid_value")) == 1
        assert len(await find("?outcome=complete&model=tiny")) == 2
        assert len(await find("?limit=1")) == 1
        for query, param in (
            ("?limit=0", "limit"),
            ("?limit=x", "limit"),
            ("?limit=1001", "limit"),
            ("?prompt=x", "prompt"),
        ):
            answer = await get(hub, f"/admin/requests{query}")
            assert error_of(answer, 400)[1] == param
        assert b"outcome, since, until, limit." in answer.body


# --- What a request would get -----------------------------------------------------


async def explained(hub: RunningHub, **asked: Any) -> dict[str, Any]:
    answer = await call(hub, "POST", "/admin/explain", asked)
    assert answer.status == 200, answer
    shown: dict[str, Any] = answer.json()
    return shown


async def test_a_request_is_explained_and_not_sent() -> None:
    async with (
        ScriptedWorker("a", n_ctx=4096) as one,
        ScriptedWorker("b") as two,
        running_hub(one, two, **CALM) as hub,
    ):
        shown = await explained(hub, model="a", prompt="hello")
        first, second = hub.hub.registry.workers
        assert (shown["code"], shown["worker"]) == ("chosen", first.name)
        assert (shown["model"], shown["policy"]) == ("a", "affinity")
        [other] = shown["others"]
        assert (other["worker"], other["code"]) == (second.name, "not_serving")
        assert shown["context"]["fits"] is True
        assert shown["context"]["largest"] == 4096
        assert shown["charge"]["requests"] == 1
        assert shown["charge"]["most_tokens"] is None
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 50}
        shown = await explained(hub, model="b", request=body)
        assert shown["worker"] == second.name
        charge = shown["charge"]
        assert charge["most_tokens"] == charge["prompt_tokens"] + 50
        assert not one.requests
        assert not two.requests


async def test_what_a_request_would_wait_for_is_explained() -> None:
    async with ScriptedWorker(slots=1) as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with await hub.open(CHAT, STREAM) as wire:
            await begun(wire)
            shown = await explained(hub, prompt="hello")
            assert (shown["code"], shown["worker"]) == ("queued", None)
            assert shown["queue"]["position"] == 1
            assert shown["others"][0]["code"] == "full"
            [known] = hub.hub.registry.workers
            await call(hub, "POST", f"/admin/workers/{known.name}/pause")
            shown = await explained(hub, prompt="hello")
            assert (shown["code"], shown["queue"]) == ("no_worker", None)
            assert shown["others"][0]["code"] == "paused"


async def test_what_would_be_refused_is_explained() -> None:
    async with ScriptedWorker("a", n_ctx=64) as one, running_hub(one, **CALM) as hub:
        assert (await explained(hub, model="x", models=["a"]))["code"] == "chosen"
        other = await explained(hub, model="a", models=["y"])
        assert other["code"] == "model_not_allowed"
        assert "does not allow" in other["reason"]
        broken = await explained(hub, request={"model": 7})
        assert broken["code"] == "invalid_value"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"modle": "a"}, "modle"),
        ({"model": 7}, "model"),
        ({"path": "/metrics"}, "path"),
        ({"path": "/v1/audio/transcriptions"}, "path"),
        ({"priority": "urgent"}, "priority"),
        ({"max_concurrency": -1}, "max_concurrency"),
        ({"request": "x"}, "request"),
        ({"models": "a"}, "models"),
    ],
)
async def test_a_wrong_question_names_the_field(
    asked: dict[str, Any], param: str
) -> None:
    async with running_hub(ready=False) as hub:
        answer = await call(hub, "POST", "/admin/explain", asked)
        assert error_of(answer, 400)[:2] == ("invalid_value", param)


# --- The hub ----------------------------------------------------------------------


async def test_the_models_are_shown_with_what_leads_to_them() -> None:
    async with (
        ScriptedWorker("a", "b") as worker,
        running_hub(
            worker,
            **CALM,
            models__aliases={"x": "a"},
            models__fallbacks={"a": "b"},
            routing__policies={"b": "round_robin"},
        ) as hub,
    ):
        a, b = (await get(hub, "/admin/models")).json()["models"]
        assert (a["name"], a["aliases"], a["fallbacks"]) == ("a", ["x"], ["b"])
        assert (a["policy"], b["policy"]) == ("affinity", "round_robin")
        assert a["workers"][0]["usable"]


async def test_the_settings_are_shown_with_their_origin_and_without_secrets(
    tmp_path: Path,
) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[queue]\nsize = 7\n")
    async with running_hub(file=file, ready=False, retry__attempts=2) as hub:
        answer = await get(hub, "/admin/config")
        assert SECRET.encode() not in answer.body
        shown = answer.json()
        rows = {row["key"]: row for row in shown["settings"]}
        assert shown["file"] == str(file)
        for key, value, source, given in (
            ("queue.size", 7, "file", str(file)),
            ("queue.timeout", 300.0, "default", ""),
            ("retry.attempts", 2, "environment", "GOLLAMA_RETRY_ATTEMPTS"),
            ("server.port", 0, "flag", "--port"),
        ):
            assert rows[key]["value"] == value
            assert (rows[key]["source"], rows[key]["from"]) == (source, given)


async def test_a_subject_is_revoked_at_once() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        token_ = hub.token("bob", jti="t1")
        async with await hub.open(CHAT, STREAM, token_) as wire:
            await begun(wire)
            answer = await call(hub, "POST", "/admin/revoke", {"subject": "bob"})
            shown = answer.json()
            assert (shown["revoked"], shown["value"]) == ("subject", "bob")
            assert not shown["cancelled"]
            assert not shown["persistent"]
            [running] = (await get(hub, "/admin/exchanges")).json()["exchanges"]
            assert shown["running"] == [running["id"]]
            assert (await hub.get("/v1/models", token_)).status == 401
            both = {"subject": "bob", "cancel": True}
            answer = await call(hub, "POST", "/admin/revoke", both)
            assert answer.json()["cancelled"]
            assert b"request_cancelled" in (await wire.read_to_end()).raw


async def test_a_token_is_revoked_by_its_id() -> None:
    async with running_hub(ready=False) as hub:
        one, other = hub.token(jti="t1"), hub.token(jti="t2")
        assert (await call(hub, "POST", "/admin/revoke", {"jti": "t1"})).status == 200
        assert (await hub.get("/v1/models", one)).status == 401
        assert (await hub.get("/v1/models", other)).status == 200


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "subject"),
        ({"jti": "a", "subject": "b"}, "subject"),
        ({"jti": ""}, "jti"),
        ({"jti": 7}, "jti"),
        ({"subject": "a\nb"}, "subject"),
        ({"subject": "a" * 201}, "subject"),
        ({"jti": "a", "cancel": True}, "cancel"),
        ({"subject": "a", "cancel": "yes"}, "cancel"),
        ({"sub": "a"}, "sub"),
    ],
)
async def test_a_wrong_revocation_changes_nothing(
    given: dict[str, Any], param: str
) -> None:
    async with running_hub(ready=False) as hub:
        answer = await call(hub, "POST", "/admin/revoke", given)
        assert error_of(answer, 400)[:2] == ("invalid_value", param)
        assert not any(hub.hub.state.revoked)


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


async def test_the_description_is_served() -> None:
    async with running_hub(ready=False) as hub:
        for _ in range(2):
            answer = await get(hub, "/admin/openapi.json")
            assert answer.json()["openapi"] == "3.1.0"
