"""Which workers get requests: those that are well, as soon as they are."""

from __future__ import annotations

import asyncio
import gzip
import logging
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config import settings
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.upstream import probe
from gollama_proxy.upstream.probe import Finding
from gollama_proxy.wire.description import Check
from tests.fakes.asks import CHAT, RARELY, STREAM, WHOLE
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chunk, done, head, not_found, role, sse_head, token
from tests.fakes.script import answer, close, event_stream, reset, send, stall, wait
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

QUICK = {"health__interval": 0.02, "health__recheck": 0.02, "health__timeout": 5}


def the_worker(hub: RunningHub, place: int = 0) -> Worker:
    return hub.hub.registry.workers[place]


async def until_state(hub: RunningHub, state: WorkerState, place: int = 0) -> None:
    worker = the_worker(hub, place)
    await until(lambda: worker.state is state, f"{state} but {worker!r}")


async def status(hub: RunningHub, path: str = "/readyz") -> int:
    return (await hub.get(path, token=None)).status


# --- Falling and rising -----------------------------------------------------------


async def test_a_worker_that_dies_is_taken_out_and_returns() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **QUICK) as hub:
        assert await status(hub) == 200
        await worker.down()
        await until_state(hub, WorkerState.DOWN)
        assert await status(hub) == 503
        assert await status(hub, "/livez") == 200
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 503
        assert response.json()["error"]["code"] == "no_worker_available"
        assert "(1 down)" in response.json()["error"]["message"]
        assert int(response.header("retry-after") or "") > 0
        await worker.up()
        await until_state(hub, WorkerState.READY)
        assert await status(hub) == 200
        assert (await hub.post(CHAT, WHOLE)).status == 200


@pytest.mark.parametrize("fall", [1, 3])
async def test_it_takes_some_failures_in_a_row_to_fall(fall: int) -> None:
    """Each of them is a whole ping; one good ping resets the count."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **QUICK, health__fall=fall) as hub,
    ):
        seen: list[tuple[Check, WorkerState]] = []
        record = the_worker(hub)
        observe = record.observe

        def note(check: Check, *rest: Any) -> None:
            observe(check, *rest)
            seen.append((check, record.state))

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(type(record), "observe", lambda self, *args: note(*args))
            worker.on("/health", *answer({}, 500))
            await until_state(hub, WorkerState.DOWN)
        failed = [state for check, state in seen if check is Check.FAILED]
        assert failed == [WorkerState.READY] * (fall - 1) + [WorkerState.DOWN]


async def test_it_takes_some_successes_in_a_row_to_rise() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **QUICK, health__rise=3) as hub,
    ):
        await worker.down()
        await until_state(hub, WorkerState.DOWN)
        before = len(worker.control)
        await worker.up()
        await until_state(hub, WorkerState.READY)
        asked = [r for r in worker.control[before:] if r.path == "/health"]
        assert len(asked) == 3


async def test_the_other_workers_keep_serving() -> None:
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        # In turn, so that each of them is asked if it can be.
        async with running_hub(
            one, two, **QUICK, breaker__ramp=0, routing__policy="round_robin"
        ) as hub:
            await one.down()
            await until_state(hub, WorkerState.DOWN)
            for _ in range(6):
                response = await hub.post(CHAT, WHOLE)
                assert response.status == 200
                assert response.header("x-gollama-worker") == two.name
            await one.up()
            await until_state(hub, WorkerState.READY)
            names = {
                (await hub.post(CHAT, WHOLE)).header("x-gollama-worker")
                for _ in range(4)
            }
            assert names == {one.name, two.name}


# --- Loading ----------------------------------------------------------------------


async def test_loading_is_a_separate_state() -> None:
    """Not ready and not down: it comes without having to rise."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **QUICK, health__rise=100) as hub,
    ):
        worker.loading = True
        await until_state(hub, WorkerState.LOADING)
        assert await status(hub) == 503
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 503
        assert "(1 loading)" in response.json()["error"]["message"]
        assert response.header("retry-after")
        worker.loading = False
        await until_state(hub, WorkerState.READY)
        assert (await hub.post(CHAT, WHOLE)).status == 200


async def test_a_hub_may_start_with_a_worker_that_is_loading() -> None:
    async with ScriptedWorker() as worker:
        worker.loading = True
        async with running_hub(
            worker, health__interval=RARELY, health__recheck=0.02
        ) as hub:
            assert the_worker(hub).state is WorkerState.LOADING
            assert await status(hub) == 503
            worker.loading = False
            await until_state(hub, WorkerState.READY)  # long before the interval
            assert (await hub.post(CHAT, WHOLE)).status == 200


# --- At once ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        (reset(),),
        (close(),),
        (send(b"garbage"),),
        (send(sse_head() + chunk(role())), reset()),
        event_stream(role()),
    ],
    ids=["reset", "close", "garbage", "mid-stream", "incomplete"],
)
async def test_a_failed_request_triggers_a_health_check(script: Any) -> None:
    """The interval is an hour: nothing else can have caused the ping."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, health__interval=RARELY, health__recheck=RARELY) as hub,
    ):
        worker.script(*script)
        pinged = asyncio.create_task(worker.pinged(3))
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_to_end()
        await pinged
        assert the_worker(hub).state is WorkerState.READY


async def test_a_request_that_finds_its_worker_dead_takes_it_out() -> None:
    """After one failed ping, where one is enough."""
    async with (
        ScriptedWorker() as worker,
        running_hub(
            worker, health__interval=RARELY, health__recheck=RARELY, health__fall=1
        ) as hub,
    ):
        await worker.down()
        assert (await hub.post(CHAT, WHOLE)).status == 502
        await until_state(hub, WorkerState.DOWN)
        assert (await hub.post(CHAT, WHOLE)).status == 503


async def test_a_worker_in_doubt_is_checked_more_often() -> None:
    """By the recheck, until it is known to be down; not by the interval."""
    async with (
        ScriptedWorker() as worker,
        running_hub(
            worker, health__interval=RARELY, health__recheck=0.02, health__fall=3
        ) as hub,
    ):
        await worker.down()
        assert (await hub.post(CHAT, WHOLE)).status == 502
        await until_state(hub, WorkerState.DOWN)


# --- Answers prove that a worker is alive -----------------------------------------


async def test_a_worker_that_emits_tokens_is_not_taken_out() -> None:
    """A burst starves llama-server's HTTP threads, /health among them."""
    gate = asyncio.Semaphore(0)
    async with (
        ScriptedWorker() as worker,
        running_hub(
            worker,
            health__interval=0.02,
            health__recheck=0.02,
            health__timeout=1,
            health__fall=1,
        ) as hub,
    ):
        steps = [
            step for _ in range(1000) for step in (wait(gate), send(chunk(token("a"))))
        ]
        worker.script(send(sse_head() + chunk(role() + token("a"))), *steps)
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_event() == role()
            worker.hang_health = True
            hung = asyncio.create_task(worker.pinged(3))  # each after a timeout
            while not hung.done():
                gate.release()
                assert await wire.read_event() == token("a")
                await asyncio.sleep(0.01)
            assert the_worker(hub).state is WorkerState.READY
            # Now it is silent on both.
            await until_state(hub, WorkerState.DOWN)


async def test_a_worker_that_emits_nothing_is_taken_out() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(
            worker, **(QUICK | {"health__timeout": 0.5}), health__fall=2
        ) as hub,
    ):
        worker.script(stall())
        async with await hub.open(CHAT, STREAM):
            await worker.received()
            worker.hang_health = True
            await until_state(hub, WorkerState.DOWN)
            assert "no answer within" in the_worker(hub).reason


# --- Starting without anybody -----------------------------------------------------


async def test_a_hub_starts_without_workers_and_picks_them_up() -> None:
    """Workers need not be started again, nor in a certain order."""
    async with (
        ScriptedWorker("a", up=False) as one,
        ScriptedWorker("b", up=False) as two,
    ):
        async with running_hub(one, two, **QUICK) as hub:
            assert await status(hub) == 503
            assert await status(hub, "/health") == 503
            assert await status(hub, "/livez") == 200
            response = await hub.post(CHAT, WHOLE)
            assert response.status == 503
            assert (await hub.get("/v1/models")).json()["data"] == []
            await two.up()
            await until_state(hub, WorkerState.READY, 1)
            assert await status(hub) == 200
            assert (await hub.post(CHAT, WHOLE | {"model": "b"})).status == 200
            await one.up()
            await until_state(hub, WorkerState.READY, 0)
            assert (await hub.post(CHAT, WHOLE | {"model": "a"})).status == 200
            listed = (await hub.get("/v1/models")).json()["data"]
            assert {row["id"] for row in listed} == {"a", "b"}


# --- What a worker serves ---------------------------------------------------------


async def test_models_are_learnt_again_at_recovery() -> None:
    """It may have been started with another one."""
    async with ScriptedWorker("old", slots=1, n_ctx=64) as worker:
        async with running_hub(worker, **QUICK) as hub:
            assert (await hub.post(CHAT, WHOLE | {"model": "old"})).status == 200
            await worker.down()
            await until_state(hub, WorkerState.DOWN)
            worker.models, worker.slots, worker.n_ctx = ["new", "newer"], 7, 128
            await worker.up()
            await until_state(hub, WorkerState.READY)
            response = await hub.post(CHAT, WHOLE | {"model": "old"})
            assert response.status == 404
            assert response.json()["error"]["code"] == "model_not_found"
            assert (await hub.post(CHAT, WHOLE | {"model": "newer"})).status == 200
            rows = (await hub.get("/v1/models")).json()["data"]
            assert [row["id"] for row in rows] == ["new", "newer"]
            [reported] = rows[0]["gollama"]["workers"]
            assert (reported["slots"], reported["context"]) == (7, 128)


async def test_models_are_learnt_again_while_all_is_well() -> None:
    async with ScriptedWorker("old") as worker, running_hub(worker, **QUICK) as hub:
        worker.models = ["new"]
        record = the_worker(hub)
        await until(lambda: record.serves("new"), "relearnt")
        assert not record.serves("old")
        assert record.state is WorkerState.READY


async def test_the_models_of_a_worker_that_is_down_stay_known() -> None:
    """Its model is not unknown, but not available: waiting helps."""
    async with ScriptedWorker("a") as one, ScriptedWorker("b") as two:
        async with running_hub(one, two, **QUICK) as hub:
            await one.down()
            await until_state(hub, WorkerState.DOWN, 0)
            response = await hub.post(CHAT, WHOLE | {"model": "a"})
            assert response.status == 503
            assert response.header("retry-after")
            response = await hub.post(CHAT, WHOLE | {"model": "c"})
            assert response.status == 404


@pytest.mark.parametrize("path", ["/props", "/health"])
async def test_a_worker_without_llama_servers_own_routes_is_usable(path: str) -> None:
    async with ScriptedWorker() as worker:
        worker.on(path, send(not_found()))
        async with running_hub(worker) as hub:
            assert await status(hub) == 200
            assert (await hub.post(CHAT, STREAM)).body.endswith(done())


# --- Keys -------------------------------------------------------------------------


async def test_each_worker_is_pinged_with_its_own_key(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        file.write_text(
            f'[[workers]]\nurl = "{one.url}"\napi_key_env = "KEY_ONE"\n'
            f'[[workers]]\nurl = "{two.url}"\n'
        )
        async with running_hub(file=file, environ={"KEY_ONE": "sk-one"}) as hub:
            assert await status(hub) == 200
        keys = [request.values("authorization") for request in one.control]
        assert keys == [["Bearer sk-one"]] * 3
        assert [r.values("authorization") for r in two.control] == [[]] * 3


async def test_a_worker_with_another_key_is_not_used() -> None:
    """And the reason is in the log."""
    async with ScriptedWorker() as worker:
        worker.on("/v1/models", *answer({"error": {}}, 401))
        async with running_hub(worker) as hub:
            assert the_worker(hub).state is WorkerState.DOWN
            assert "API key" in the_worker(hub).reason


# --- The checker itself -----------------------------------------------------------


async def test_an_error_in_a_ping_does_not_stop_health_checks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests are served meanwhile, and the worker's death is still noticed."""
    broken = asyncio.Event()
    ping = probe.ping

    async def sometimes(*args: Any) -> Finding:
        if broken.is_set():
            raise ZeroDivisionError("a bug")
        return await ping(*args)

    monkeypatch.setattr(probe, "ping", sometimes)
    async with ScriptedWorker() as worker, running_hub(worker, **QUICK) as hub:
        broken.set()

        def reported() -> int:
            return sum("it runs again" in r.getMessage() for r in caplog.records)

        await until(lambda: reported() >= 3, "reported three times")
        assert (await hub.post(CHAT, WHOLE)).status == 200
        assert await status(hub) == 200
        broken.clear()
        await worker.down()
        await until_state(hub, WorkerState.DOWN)
        await worker.up()
        await until_state(hub, WorkerState.READY)
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert all("it runs again" in r.getMessage() for r in errors)


async def test_changes_of_a_workers_state_are_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each change of state is one line; a ping that changes nothing is none."""
    caplog.set_level(logging.INFO, "gollama_proxy.fleet")
    async with ScriptedWorker() as worker, running_hub(worker, **QUICK) as hub:
        await worker.pinged(9)
        await worker.down()
        await until_state(hub, WorkerState.DOWN)
        await worker.up()
        await until_state(hub, WorkerState.READY)
        await worker.pinged(9)
    lines = [r for r in caplog.records if r.name.startswith("gollama_proxy.fleet")]
    texts = [line.getMessage().partition(" (")[0] for line in lines]
    assert texts == [
        f"worker {worker.name}: starting -> ready",
        f"worker {worker.name}: ready -> down",
        f"worker {worker.name}: down -> ready",
    ]
    assert [line.levelname for line in lines] == ["INFO", "WARNING", "INFO"]


# --- What stands in front of a worker ---------------------------------------------


async def test_a_worker_behind_a_compressing_proxy_serves() -> None:
    """nginx (`gzip_types`) and Caddy (`encode`) do so, some whether asked or not."""
    packed = gzip.compress(b'{"object":"list","data":[{"id":"tiny"}]}')
    fields = [("Content-Encoding", "gzip"), ("Content-Length", str(len(packed)))]
    async with ScriptedWorker() as worker:
        worker.on("/v1/models", send(head(200, fields) + packed))
        async with running_hub(worker) as hub:
            assert the_worker(hub).state is WorkerState.READY
            assert (await hub.post(CHAT, WHOLE)).status == 200


async def test_a_worker_with_an_odd_entry_serves_the_others() -> None:
    listed = {"data": [{"id": "tiny"}, {"id": None}, "small"]}
    async with ScriptedWorker() as worker:
        worker.on("/v1/models", *answer(listed))
        async with running_hub(worker, models__strict_models=True) as hub:
            assert (await hub.post(CHAT, WHOLE | {"model": "tiny"})).status == 200
            assert (await hub.post(CHAT, WHOLE | {"model": "small"})).status == 404


# --- A worker without a port in its URL ---------------------------------------


async def test_requests_follow_a_worker_from_one_default_port_to_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ScriptedWorker() as old, ScriptedWorker(up=False) as new:
        monkeypatch.setattr(settings, "PORTS", (new.port, old.port))
        async with running_hub(Unported(), **QUICK) as hub:
            worker = the_worker(hub)
            assert (worker.name, worker.url) == ("127.0.0.1", old.url)
            assert (await hub.post(CHAT, WHOLE)).status == 200
            assert len(old.requests) == 1
            await new.up()
            await old.down()
            await until(lambda: worker.url == new.url, f"{new!r} but {worker!r}")
            assert (await hub.post(CHAT, WHOLE)).status == 200
            assert len(new.requests) == 1


class Unported:
    url = "http://127.0.0.1"
