"""Agents bring workers and take them away; only what they prove is used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gollama_proxy.config.load import load_worker
from gollama_proxy.control import agents as api
from gollama_proxy.fleet.lease import Result
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import SETTLING, Worker
from gollama_proxy.wire.description import Check
from tests.fakes.agent import AgentProcess, HandAgent
from tests.fakes.asks import CHAT
from tests.fakes.authority import Authority
from tests.fakes.cases import case
from tests.fakes.client import Response
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chunk, sse_head, token
from tests.fakes.script import send, stream_of, wait
from tests.fakes.standins import Ollama
from tests.fakes.waiting import DEADLINE, gone, until
from tests.fakes.worker import ScriptedWorker

QUESTION: dict[str, Any] = {"messages": []}
STREAM = QUESTION | {"stream": True}
# Longer than any pause of a busy machine, for the tests in which none may end.
LONG = {"agents__lease": 600}


def names(hub: RunningHub) -> list[str]:
    return [worker.name for worker in hub.hub.registry.workers]


async def without_worker(hub: RunningHub) -> None:
    await until(lambda: not names(hub), "a fleet without workers")


async def lapse(hub: RunningHub) -> None:
    """Let leases run out; a last renewal may still be on its way."""

    def lapsed() -> bool:
        hub.pass_time(30)
        return not names(hub)

    await until(lapsed, "a fleet without workers")


@contextlib.asynccontextmanager
async def agent_of(
    hub: RunningHub, worker: ScriptedWorker, *arguments: str, **claims: Any
) -> AsyncIterator[AgentProcess]:
    granted = hub.token("desk", **{"scope": "worker"} | claims)
    arguments = ("--hub", hub.url, "--worker", worker.url, *arguments)
    async with AgentProcess.serving(*arguments, token=granted) as agent:
        yield agent


async def answered_by(hub: RunningHub, name: str) -> Response:
    """Wait until a worker answers a chat."""
    async with asyncio.timeout(DEADLINE):
        while True:
            answer = await hub.post(CHAT, QUESTION)
            if answer.header("X-Gollama-Worker") == name and answer.status == 200:
                return answer


# --- The command ------------------------------------------------------------------


async def test_an_agent_brings_its_worker_and_takes_it_away() -> None:
    async with ScriptedWorker() as worker, running_hub(**LONG) as hub:
        async with agent_of(hub, worker, "--name", "desk") as agent:
            await agent.until(f"hub {hub.url}: registered {worker.url} as desk")
            await answered_by(hub, "desk")
            agent.signal(signal.SIGTERM)
            assert await agent.ended() == 0
        assert names(hub) == []
        assert (await hub.post(CHAT, QUESTION)).status == 503


async def test_an_agent_states_what_its_server_does_not_report() -> None:
    flags = ["--slots", "2", "--context", "8192", "--model", "qwen3:8b"]
    async with Ollama("qwen3:8b", "other") as worker, running_hub(**LONG) as hub:
        async with agent_of(hub, worker, "--name", "desk", *flags) as agent:
            await agent.until("the server answers")
            await agent.until(f"registered {worker.url} as desk")
            (known,) = hub.hub.registry.workers
            await until(lambda: known.description is not None)
            assert (known.slots, known.context_of("qwen3:8b")) == (2, 8192)
            (listed,) = (await hub.get("/v1/models")).json()["data"]
            assert listed["id"] == "qwen3:8b"
            (shown,) = listed["gollama"]["workers"]
            assert (shown["slots"], shown["context"]) == (2, 8192)


async def test_a_killed_agent_loses_its_worker_and_gets_it_back() -> None:
    async with ScriptedWorker() as worker, running_hub(clock=Clock()) as hub:
        async with agent_of(hub, worker, "--name", "desk") as agent:
            await answered_by(hub, "desk")
            agent.signal(signal.SIGKILL)
            await agent.process.wait()
            hub.pass_time(29)
            assert names(hub) == ["desk"]
            await lapse(hub)
        async with agent_of(hub, worker, "--name", "desk"):
            await answered_by(hub, "desk")


async def test_running_answers_end_before_the_agent_does() -> None:
    async with ScriptedWorker() as worker, running_hub(**LONG) as hub:
        worker.script(
            send(sse_head()), send(chunk(token("a"))), wait("end"), *stream_of(1)[1:]
        )
        async with agent_of(hub, worker, "--name", "desk") as agent:
            await until(lambda: hub.hub.registry.ready)
            async with await hub.open(CHAT, STREAM) as client:
                await client.read_head()
                await client.read_event()
                agent.signal(signal.SIGTERM)
                await without_worker(hub)
                assert agent.process.returncode is None
                worker.release("end")
                events = await client.read_events()
                assert events[-1] == b"data: [DONE]\n\n"
            assert await agent.ended() == 0


async def test_a_second_signal_does_not_wait_for_answers() -> None:
    async with ScriptedWorker() as worker, running_hub(**LONG) as hub:
        worker.script(send(sse_head()), send(chunk(token("a"))), wait("never"))
        async with agent_of(hub, worker) as agent:
            await until(lambda: hub.hub.registry.ready)
            async with await hub.open(CHAT, STREAM) as client:
                await client.read_head()
                agent.signal(signal.SIGTERM)
                await without_worker(hub)
                agent.signal(signal.SIGINT)
                assert await agent.ended() == 1


async def test_a_registered_worker_outlives_the_hub(tmp_path: Path) -> None:
    settings = LONG | {"state__dir": tmp_path}
    async with ScriptedWorker() as worker:
        async with running_hub(**settings) as hub:
            async with HandAgent(hub, worker.url).answering() as agent:
                assert (await agent.put()).status == 201
            await answered_by(hub, "desk")
        async with running_hub(**settings) as hub:
            await answered_by(hub, "desk")
            again = HandAgent(hub, worker.url)
            again.port = agent.port
            assert (await again.put()).status == 200  # renewed without another proof
            assert again.proofs == 0
            await again.delete()
        async with running_hub(**settings) as hub:
            assert names(hub) == []


async def test_a_stored_lease_runs_out_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"state__dir": tmp_path}
    async with ScriptedWorker() as worker:
        async with running_hub(**settings) as hub:
            async with HandAgent(hub, worker.url).answering() as agent:
                assert (await agent.put()).status == 201
        async with running_hub(clock=Clock(), **settings) as hub:
            assert names(hub) == ["desk"]
            await lapse(hub)
            await until(lambda: hub.hub.state.find("desk") is None)


async def test_an_agent_finds_a_hub_that_was_away() -> None:
    async with ScriptedWorker() as worker, reserved() as port:
        arguments = ("--hub", f"http://127.0.0.1:{port}", "--worker", worker.url)
        async with AgentProcess.serving(*arguments) as agent:
            await agent.until("cannot be reached: .*; trying again")
            assert agent.process.returncode is None
            agent.signal(signal.SIGTERM)
            assert await agent.ended() == 0


async def test_two_hubs_have_one_worker() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(**LONG) as one,
        running_hub(**LONG) as two,
        agent_of(one, worker, "--hub", two.url, "--name", "desk") as agent,
    ):
        await answered_by(one, "desk")
        await answered_by(two, "desk")
        agent.signal(signal.SIGTERM)
        assert await agent.ended() == 0
        assert names(one) == names(two) == []


async def test_a_hub_over_tls(authority: Authority) -> None:
    pair = authority.issue()
    trusting = {"trust": authority.client(), **pair.settings, **LONG}
    async with ScriptedWorker() as worker, running_hub(**trusting) as hub:
        async with agent_of(hub, worker, "--name", "desk") as agent:
            await agent.until(r"its certificate is not trusted \(--ca-file\)")
        assert names(hub) == []
        flags = ("--name", "desk", "--ca-file", authority.file)
        async with agent_of(hub, worker, *flags):
            await answered_by(hub, "desk")


def other_address() -> str:
    """Return an address of this machine that is not loopback."""
    found = [
        each.address
        for interface in psutil.net_if_addrs().values()
        for each in interface
        if each.family is socket.AF_INET and not each.address.startswith("127.")
    ]
    if not found:
        pytest.skip("this machine has a loopback address alone")
    return found[0]


async def test_a_server_that_only_its_own_machine_reaches_is_reported() -> None:
    address = other_address()
    settings = LONG | {"server__host": "0.0.0.0", "agents__networks": [f"{address}/32"]}
    async with ScriptedWorker() as worker, running_hub(**settings) as hub:
        arguments = ["--hub", f"http://{address}:{hub.port}", "--worker", worker.url]
        granted = hub.token("desk", scope="worker")
        async with AgentProcess.serving(*arguments, token=granted) as agent:
            # The address is the machine's, which it proves; nothing serves there.
            await agent.until(f"registered http://{address}:{worker.port}")
            await agent.until("it listens on a loopback address only; start it with")


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"scope": "admin"}, "it needs the scope worker"),
        ({"scope": None}, "it needs the scope worker"),
        ({"exp": 1}, "Missing or invalid token"),
    ],
)
async def test_an_agent_with_a_wrong_token_ends(
    claims: dict[str, Any], reason: str
) -> None:
    async with ScriptedWorker() as worker, running_hub() as hub:
        async with agent_of(hub, worker, **claims) as agent:
            assert await agent.ended() == 1
        assert reason in agent.output
        assert agent.output.count("refuses the worker") == 1
        assert "Traceback" not in agent.output
        assert names(hub) == []


async def test_an_agent_waits_for_a_name_that_is_taken() -> None:
    async with (
        ScriptedWorker() as first,
        ScriptedWorker() as second,
        running_hub(first, **LONG) as hub,
        agent_of(hub, second, "--name", first.name) as agent,
    ):
        await agent.until(f"refuses the worker: .*{first.name}")
        assert names(hub) == [first.name]
        agent.signal(signal.SIGINT)
        assert await agent.ended() == 0


# --- A server of the agent --------------------------------------------------------


# Only what an agent reports leads to another health check.
CALM = LONG | {"health__interval": 600}


@contextlib.asynccontextmanager
async def reserved() -> AsyncIterator[int]:
    """Reserve a port: only a server that sets SO_REUSEADDR can listen on it."""
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        yield place.getsockname()[1]


@contextlib.asynccontextmanager
async def starting(
    hub: RunningHub, *flags: str, environ: dict[str, str] | None = None
) -> AsyncIterator[AgentProcess]:
    """Run an agent that starts a server."""
    arguments = ["--hub", hub.url, "--name", "desk", "--exec", "--", sys.executable]
    arguments += ["-m", "tests.fakes.little_server", *flags]
    granted = hub.token("desk", scope="worker")
    async with AgentProcess.serving(*arguments, token=granted, environ=environ) as it:
        yield it


async def test_a_server_lives_as_long_as_its_agent() -> None:
    async with reserved() as port, running_hub(**CALM) as hub:
        async with starting(hub, "--port", str(port)) as agent:
            pid = await agent.started()
            await agent.until(f"little: serving on port {port}")
            await answered_by(hub, "desk")
            agent.signal(signal.SIGUSR1)
            await agent.until("little: USR1")
            agent.signal(signal.SIGTERM)
            assert await agent.ended() == 0
            await gone(pid)
        assert names(hub) == []


async def test_a_server_that_ended_is_started_again_and_used() -> None:
    async with reserved() as port, running_hub(**CALM) as hub:
        async with starting(hub, "--port", str(port)) as agent:
            first = await agent.started()
            await answered_by(hub, "desk")
            os.kill(first, signal.SIGKILL)
            await agent.until("ended with SIGKILL; again in 1 s")
            assert await agent.started(2) != first
            await agent.until("(?s)ended with SIGKILL.*the server answers")
            await answered_by(hub, "desk")


async def test_a_server_ends_with_an_agent_that_is_refused() -> None:
    async with reserved() as port, running_hub(**LONG) as hub:
        arguments = ["--hub", hub.url, "--exec", "--", sys.executable]
        arguments += ["-m", "tests.fakes.little_server", "--port", str(port)]
        async with AgentProcess.serving(*arguments, token="a.b.c") as agent:
            assert await agent.ended() == 1
            await gone(await agent.started())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends it then")
async def test_a_server_does_not_outlive_an_agent_that_is_killed() -> None:
    async with reserved() as port, running_hub(**LONG) as hub:
        async with starting(hub, "--port", str(port)) as agent:
            pid = await agent.started()
            await agent.until("little: serving")
            agent.signal(signal.SIGKILL)
            await gone(pid)


async def test_a_server_that_cannot_start_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with running_hub(**LONG) as hub, starting(hub, "--port", port) as agent:
            await agent.until("Address already in use")
            await agent.until("ended with status 1; again in 1 s")
            agent.signal(signal.SIGTERM)
            assert await agent.ended() == 0


async def test_a_command_learns_its_port_and_not_the_token() -> None:
    program = (
        "import os, sys; print('it has', sys.argv[1:], "
        "[name for name in os.environ if name.startswith('GOLLAMA')])"
    )
    async with running_hub(**LONG) as hub:
        arguments = ["--hub", hub.url, "--exec", "--", sys.executable, "-c", program]
        granted = hub.token("desk", scope="worker")
        environ = {"LLAMA_ARG_PORT": "9"}
        async with AgentProcess.serving(
            *arguments, token=granted, environ=environ
        ) as agent:
            await agent.until(r"it has \[\] \[\]")
            await agent.until("registered http://127.0.0.1:9 as ")
        async with AgentProcess.serving(*arguments, token=granted) as agent:
            await agent.until(r"it has \['--port', '\d+'\] \[\]")


# --- Machines that sleep ----------------------------------------------------------

MAC = "00:11:22:aa:bb:cc"


async def test_an_idle_machine_is_suspended(tmp_path: Path) -> None:
    """By systemd; the hub keeps its worker, to wake it when it is needed."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/called\n'
        f"until [ -e {tmp_path}/woken ]; do sleep 0.02; done\n"
    )
    systemctl.chmod(0o755)
    granted, path = {"scope": "worker"}, f"{tmp_path}:{os.environ['PATH']}"
    async with ScriptedWorker() as worker, running_hub(**LONG) as hub:
        arguments = ("--hub", hub.url, "--worker", worker.url, "--mac", MAC)
        async with AgentProcess.serving(
            *(*arguments, "--sleep-after", "1s"),
            token=hub.token("desk", **granted),
            environ={"PATH": path},
            module="tests.fakes.hasty_agent",
        ) as agent:
            await agent.until("suspending this machine")
            await until((tmp_path / "called").exists, "a call of systemctl")
            [record] = hub.hub.registry.workers
            assert record.config.mac == MAC
            assert record.state is WorkerState.ASLEEP
            (tmp_path / "woken").touch()
            await agent.until("this machine is awake again")
            await until(lambda: record.state is WorkerState.READY, "it is used again")
    assert (tmp_path / "called").read_text() == "suspend\n"


async def test_a_machine_that_cannot_sleep_stays_in_the_fleet(tmp_path: Path) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text("#!/bin/sh\necho 'Access denied' >&2\nexit 1\n")
    systemctl.chmod(0o755)
    granted, path = {"scope": "worker"}, f"{tmp_path}:{os.environ['PATH']}"
    async with ScriptedWorker() as worker, running_hub(**LONG) as hub:
        arguments = ("--hub", hub.url, "--worker", worker.url, "--mac", MAC)
        async with AgentProcess.serving(
            *(*arguments, "--sleep-after", "1s"),
            token=hub.token("desk", **granted),
            environ={"PATH": path},
            module="tests.fakes.hasty_agent",
        ) as agent:
            await agent.until("this machine cannot be suspended: Access denied")
            [record] = hub.hub.registry.workers
            await until(lambda: record.state is WorkerState.READY, "it is used again")


async def test_a_sleeping_machine_keeps_its_place_without_renewals() -> None:
    clock = Clock()
    async with registering(clock=clock) as agent:
        worker = {"url": agent.url, "mac": MAC}
        assert (await agent.put(worker=worker)).json()["state"] == "starting"
        [record] = agent.hub.hub.registry.workers
        await until(lambda: record.state is WorkerState.READY, "it is up")
        clock.advance(50)
        assert (await agent.put(worker=worker)).json()["idle"] == 50
        answer = (await agent.put(worker=worker, sleeping=True)).json()
        assert answer["state"] == "asleep"
        record.suspect()  # it still answers, which means nothing now
        agent.hub.pass_time(1000)
        await agent.hub.hub.health.look(record)
        assert names(agent.hub) == ["desk"]
        answer = (await agent.put(worker=worker)).json()
        await until(lambda: record.state is WorkerState.READY, "it is awake")
        agent.hub.pass_time(601)
        await without_worker(agent.hub)


async def test_a_machine_that_still_falls_asleep_is_not_used() -> None:
    clock = Clock()
    async with registering(clock=clock) as agent:
        worker = {"url": agent.url, "mac": MAC}
        await agent.put(worker=worker)
        [record] = agent.hub.hub.registry.workers
        await until(lambda: record.state is WorkerState.READY, "it is up")
        await agent.put(worker=worker, sleeping=True)
        assert await agent.hub.hub.health.look(record)
        assert record.state is WorkerState.ASLEEP
        clock.advance(SETTLING)
        await agent.hub.hub.health.look(record)
        assert record.state is WorkerState.READY, "it was woken"


async def test_a_machine_in_use_stays_awake() -> None:
    async with registering() as agent:
        worker = {"url": agent.url, "mac": MAC}
        await agent.put(worker=worker)
        [record] = agent.hub.hub.registry.workers
        await until(lambda: record.state is WorkerState.READY, "it is up")
        lease = record.lease("tiny")
        answer = (await agent.put(worker=worker, sleeping=True)).json()
        assert (answer["state"], answer["idle"]) == ("ready", 0)
        lease.release(Result.COMPLETE)
        without = {"url": agent.url}
        answer = (await agent.put(worker=without, sleeping=True)).json()
        assert answer["state"] == "ready", "nothing could wake it"


async def test_a_sleeping_machine_outlives_the_hub(tmp_path: Path) -> None:
    state = {"state__dir": str(tmp_path)}
    async with registering(**state) as agent:
        worker = {"url": agent.url, "mac": MAC}
        await agent.put(worker=worker)
        [record] = agent.hub.hub.registry.workers
        await until(lambda: record.state is WorkerState.READY, "it is up")
        await agent.put(worker=worker, sleeping=True)
    async with running_hub(clock=Clock(), **LONG | state) as hub:
        hub.pass_time(601)
        await asyncio.sleep(0)
        assert names(hub) == ["desk"]
        assert hub.hub.registry.find("desk").config.mac == MAC
        assert hub.hub.registry.models() == ["tiny"]


# --- What a hub accepts -----------------------------------------------------------


@contextlib.asynccontextmanager
async def registering(
    *workers: ScriptedWorker, **settings: Any
) -> AsyncIterator[HandAgent]:
    """Run a hub with these workers, and an agent of another one."""
    async with (
        ScriptedWorker() as worker,
        running_hub(*workers, **LONG | settings) as hub,
        HandAgent(hub, worker.url).answering() as agent,
    ):
        yield agent


def error_of(answer: Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status, error["code"], error["message"]


async def test_a_token_that_expires_during_a_lease_does_not_renew_it() -> None:
    """The worker serves until the lease ends, and is registered by a new token."""
    async with registering(clock=Clock()) as agent:
        assert (await agent.put()).status == 201
        hub, body = agent.hub, {"worker": {"url": agent.url}, "proof_port": agent.port}
        now = int(time.time())
        old = hub.token("desk", scope="worker", iat=now - 7200, exp=now - 3600)
        answer = await agent.call("PUT", body, old)
        assert error_of(answer)[:2] == (401, "invalid_api_key")
        assert (await agent.call("DELETE", {}, old)).status == 401
        assert names(hub) == ["desk"]
        await until(lambda: hub.hub.registry.ready)
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        assert (await hub.post(CHAT, chat)).status == 200
        await lapse(hub)
        assert (await agent.put()).status == 201


async def test_only_a_new_address_is_proved() -> None:
    async with registering() as agent:
        answer = await agent.put()
        assert answer.status == 201
        body = answer.json()
        assert (body["name"], body["url"], body["lease"]) == ("desk", agent.url, 600)
        assert (await agent.put()).status == 200
        assert agent.proofs == 1
        agent.secret = "beef" * 10  # the agent was started anew
        assert (await agent.put()).status == 201
        lease, stored = agent.hub.hub.agents.find("desk"), agent.hub.hub.state.workers
        assert lease is not None
        assert [row.agent for row in stored] == [{"digest": lease.agent}]
        assert agent.proofs == 2
        async with ScriptedWorker() as other:
            agent.url = other.url  # the machine has another address
            assert (await agent.put()).status == 201
            assert agent.proofs == 3
            (worker,) = agent.hub.hub.registry.workers
            assert worker.config.url == other.url
            await agent.delete()


async def test_a_renewal_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gollama_proxy.access")
    async with registering() as agent:
        assert (await agent.put()).status == 201
        assert (await agent.put()).status == 200
        assert (await agent.put(worker={})).status == 400
        operator = agent.hub.token("op", scope="admin")
        listed = (await agent.hub.get("/admin/requests", operator)).json()["requests"]
    lines = [r.fields for r in caplog.records if r.name == "gollama_proxy.access"]
    assert [line["status"] for line in lines if line["method"] == "PUT"] == [201, 400]
    assert 200 not in [each["status"] for each in listed if each["method"] == "PUT"]


async def test_settings_and_reports_are_taken_up() -> None:
    async with registering() as agent:
        table = {"url": agent.url, "vram_gib": 24, "slots": 2}
        device = {"name": "RTX 3090", "memory_gib": 24, "celsius": 61.5}
        report = {"host": "desk", "devices": [device], "of tomorrow": 1}
        assert (await agent.put(worker=table)).status == 201
        assert (await agent.put(worker=table, report=report)).status == 200
        (worker,) = agent.hub.hub.registry.workers
        assert (worker.config.vram_gib, worker.config.slots) == (24, 2)
        assert (await agent.put(worker=table | {"slots": 3})).status == 200
        assert worker.config.slots == 3
        lease = agent.hub.hub.agents.find("desk")
        assert lease is not None
        await agent.put(worker=table, report=report)
        assert lease.report == {"host": "desk", "devices": [device]}


def refuse(worker: Worker) -> None:
    """Have its server refuse connections until it is down, if it was up already."""
    worker.observe(Check.REFUSED, "connection refused")
    while not worker.is_down:
        worker.observe(Check.REFUSED, "connection refused")


async def test_operators_see_what_the_server_of_an_agent_waits_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    helpers = ["10.0.0.12:50052", "10.0.0.13:50052"]
    async with registering() as agent:
        await agent.put(report={"waiting_for": helpers})
        await agent.put(report={"waiting_for": helpers})
        (worker,) = agent.hub.hub.registry.workers
        refuse(worker)
        shown = agent.hub.hub.views.worker(worker)
        assert shown["reason"] == f"its server waits for helpers: {', '.join(helpers)}"
        await agent.put(report={"serving": True})
        refuse(worker)
        assert agent.hub.hub.views.worker(worker)["reason"] == "connection refused"
    lines = [r.getMessage() for r in caplog.records if "waits for" in r.getMessage()]
    text = "worker desk: its server waits for helpers: 10.0.0.12:50052, 10.0.0.13:50052"
    assert lines == [text]


async def test_an_operator_may_change_a_registered_worker() -> None:
    async with registering() as agent:
        table = {"url": agent.url, "weight": 2}
        assert (await agent.put(worker=table)).status == 201
        hub, operator = agent.hub, agent.hub.token("op", scope="admin")
        async with await hub.wire() as wire:
            path = "/admin/workers/desk"
            await wire.post(path, {"weight": 5}, operator, method="PATCH")
            assert (await wire.read_response()).status == 200
        (worker,) = hub.hub.registry.workers
        assert (await agent.put(worker=table)).status == 200
        assert worker.config.weight == 5  # until its agent registers something else
        assert (await agent.put(worker=table | {"weight": 3})).status == 200
        assert worker.config.weight == 3


async def test_a_name_that_is_taken_during_a_proof_is_refused() -> None:
    async with registering() as agent, ScriptedWorker() as other:
        agent.on_proof = lambda: agent.hub.hub.registry.add(
            load_worker("worker", {"name": "desk", "url": other.url}, {})
        )
        assert error_of(await agent.put())[:2] == (409, "conflict")
        (worker,) = agent.hub.hub.registry.workers
        assert worker.config.url == other.url
        assert agent.hub.hub.agents.find("desk") is None


async def test_an_address_that_is_not_proved_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "PROOF_TIMEOUT", 0.5)
    async with registering() as agent:
        agent.answers = False
        status, code, text = error_of(await agent.put())
        assert (status, code) == (403, "address_refused")
        assert "another program answers there" in text  # it asks for its own address
        async with reserved() as agent.port:
            status, code, text = error_of(await agent.put())
        assert (status, code) == (403, "address_refused")
        assert "connection refused" in text
        # Of another address, it learns nothing.
        agent.url = "http://127.0.0.2:8080"
        status, code, text = error_of(await agent.put())
        assert (status, code) == (403, "address_refused")
        assert "refused" not in text
        assert names(agent.hub) == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://8.8.8.8:8080", "outside the networks of agents.networks"),
        ("http://[2001:db8::1]:8080", "outside the networks"),
        ("http://169.254.1.1:8080", "link-local"),
        ("http://169.254.169.254", "metadata"),
        ("http://[fe80::1]:8080", "link-local"),
        ("http://0.0.0.0:8080", "not the address of a machine"),
        ("http://224.0.0.1:8080", "multicast"),
    ],
)
async def test_a_foreign_address_is_refused(url: str, reason: str) -> None:
    async with registering() as agent:
        agent.url = url
        status, code, text = error_of(await agent.put())
        assert (status, code) in ((403, "address_refused"), (400, "invalid_value"))
        assert reason in text
        assert agent.proofs == 0
        assert names(agent.hub) == []


async def test_a_name_is_resolved_once() -> None:
    async with registering() as agent:
        plain, agent.url = agent.url, agent.url.replace("127.0.0.1", "localhost")
        assert (await agent.put()).status == 201
        (worker,) = agent.hub.hub.registry.workers
        assert worker.config.url == plain


async def test_names_and_addresses_of_others_are_taken() -> None:
    async with ScriptedWorker() as of_file, registering(of_file) as agent:
        mine, agent.url = agent.url, of_file.url
        assert error_of(await agent.put())[:2] == (409, "conflict")
        agent.url, agent.name = mine, of_file.name
        status, code, text = error_of(await agent.put())
        assert (status, code) == (409, "conflict")
        assert of_file.name in text
        agent.name = "desk"
        assert (await agent.put()).status == 201
        async with ScriptedWorker() as other:
            agent.url, agent.secret = other.url, "beef" * 10
            status, code, text = error_of(await agent.put())
            assert (status, code) == (409, "conflict")
            assert mine in text
            assert error_of(await agent.delete())[:2] == (409, "conflict")
        assert names(agent.hub) == [of_file.name, "desk"]


async def test_the_number_of_registered_workers_is_limited() -> None:
    async with registering(agents__limit=1) as agent:
        assert (await agent.put()).status == 201
        async with ScriptedWorker() as other:
            agent.url, agent.name = other.url, "other"
            status, code, text = error_of(await agent.put())
            assert (status, code) == (409, "conflict")
            assert "agents.limit" in text


async def test_an_unknown_worker_is_given_back_without_error() -> None:
    async with registering() as agent:
        answer = await agent.delete()
        assert (answer.status, answer.json()["running"]) == (200, 0)


async def test_a_worker_that_an_operator_removed_has_no_lease() -> None:
    async with registering() as agent:
        assert (await agent.put()).status == 201
        agent.hub.hub.registry.remove("desk")
        assert agent.hub.hub.agents.find("desk") is None
        assert (await agent.put()).status == 201  # its agent brings it back
        assert agent.proofs == 2


async def test_a_hold_outlives_the_lease() -> None:
    async with registering() as agent:
        hub = agent.hub
        assert (await agent.put()).status == 201
        operator = hub.token("op", scope="admin")
        path = "/admin/workers/desk"
        assert (await hub.post(f"{path}/pause", {}, operator)).status == 200
        assert (await agent.put()).status == 200
        await agent.delete()
        assert names(hub) == []
        assert (await agent.put()).status == 201
        shown = (await hub.get(path, operator)).json()
        assert (shown["hold"], shown["source"]) == ("paused", "agent")
        assert (await hub.post(f"{path}/unpause", {}, operator)).status == 200
        await agent.delete()
        assert hub.hub.state.find("desk") is None


async def test_a_bad_registration_changes_nothing() -> None:
    async with registering() as agent:
        for body, field in [
            (b"{", None),
            (b"[]", None),
            (b"\xff", None),
            ({}, None),
            ({"worker": {"url": "x"}}, None),
            ({"worker": {}, "proof_port": 2000}, "worker"),
            ({"worker": {"url": "http://10.0.0.1"}, "proof_port": 2000}, "worker"),
            ({"worker": {"url": "dns+http://x:1"}, "proof_port": 2000}, "worker"),
            ({"worker": {"url": "ftp://x"}, "proof_port": 2000}, "worker"),
            (
                {
                    "worker": {"url": "http://10.0.0.1:1", "slots": 0},
                    "proof_port": 2000,
                },
                "w",
            ),
            ({"worker": {"url": 3}, "proof_port": 2000}, "worker"),
            ({"worker": [], "proof_port": 2000}, "worker"),
            ({"worker": {"url": "http://10.0.0.1:1"}, "proof_port": 22}, "proof_port"),
            ({"worker": {"url": "http://10.0.0.1:1"}, "proof_port": "x"}, "proof_port"),
            # Each would have the hub send one of its files or variables to a worker.
            (
                {
                    "worker": {"url": "u", "api_key_file": "/etc/shadow"},
                    "proof_port": 2000,
                },
                "w",
            ),
            ({"worker": {"url": "u", "api_key_env": "X"}, "proof_port": 2000}, "w"),
            ({"worker": {"url": "u", "ca_file": "/x"}, "proof_port": 2000}, "w"),
            ({"worker": {"url": "u", "name": "other"}, "proof_port": 2000}, "w"),
            (
                {
                    "worker": {"url": "http://10.0.0.1:1"},
                    "proof_port": 2000,
                    "report": {"devices": [{"name": "x" * 101}]},
                },
                "report",
            ),
            (b" " * (1 << 17), None),
        ]:
            with case((body, field)):
                answer = await agent.call("PUT", body)
                assert answer.status in (400, 413)
                error = answer.json()["error"]
                assert (error["param"] or "").startswith(field or "")
                assert names(agent.hub) == []


@pytest.mark.parametrize("name", [".", "..", "a%20b", "%C3%A4", "%00", "x" * 101])
async def test_a_name_is_one_that_paths_and_logs_can_have(name: str) -> None:
    async with registering() as agent:
        agent.name = name
        assert error_of(await agent.put())[:2] == (400, "invalid_value")
        assert names(agent.hub) == []


@pytest.mark.parametrize("secret", ["", "xyz", "a" * 31, "a" * 129, "A" * 40])
async def test_a_registration_needs_a_secret(secret: str) -> None:
    async with registering() as agent:
        for method in ("PUT", "DELETE"):
            answer = await agent.call(method, {}, secret=secret)
            assert error_of(answer)[:2] == (400, "bad_request")


async def test_only_tokens_of_the_scope_worker_register() -> None:
    async with registering() as agent:
        body = {"worker": {"url": agent.url}, "proof_port": agent.port}
        for scope in (None, "admin", "metrics", "workers"):
            granted = agent.hub.token("desk", scope=scope)
            for method in ("PUT", "DELETE"):
                status, code, _ = error_of(await agent.call(method, body, granted))
                assert (status, code) == (403, "insufficient_scope")
        assert (await agent.call("PUT", body, None)).status == 401
        assert agent.proofs == 0


async def test_without_authentication_only_this_machine_registers() -> None:
    async with registering(auth__mode="off") as agent:
        body = {"worker": {"url": agent.url}, "proof_port": agent.port}
        status, code, _ = error_of(await agent.call("PUT", body, None))
        assert (status, code) == (403, "local_only")  # the Host is not
        async with await agent.hub.wire() as wire:
            headers = [("X-Gollama-Agent", agent.secret), ("Host", "localhost")]
            path = "/agent/workers/desk"
            await wire.post(path, body, None, headers=headers, method="PUT")
            assert (await wire.read_response()).status == 201
