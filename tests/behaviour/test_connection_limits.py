"""There are only so many connections, in all and of one address."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
from pathlib import Path
from typing import Any

import psutil
import pytest

from gollama_proxy import serve as lifecycle
from gollama_proxy.config.settings import Config, Limits
from gollama_proxy.service import raise_file_limit
from tests.fakes.asks import CHAT, WHOLE
from tests.fakes.authority import Authority
from tests.fakes.client import TlsWire, TruncatedError, Wire
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.process import HubProcess, hub_process
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker


@pytest.fixture(params=["http", "https"])
def transport(request: pytest.FixtureRequest, authority: Authority) -> dict[str, Any]:
    if request.param == "http":
        return {}
    return {"trust": authority.client(), **authority.issue().settings}


async def silent(hub: RunningHub, number: int) -> list[Wire]:
    """Connect clients that send nothing, so that TLS handshakes never complete."""
    return [await TlsWire.connect(hub.host, hub.port) for _ in range(number)]


async def metric(hub: RunningHub, name: str) -> float:
    text = (await hub.get("/metrics")).body.decode()
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert match, name
    return float(match[1])


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("connections", "limit"), ("connections_per_address", "address")],
)
async def test_connections_over_the_limit_are_closed(
    setting: str, reason: str, transport: dict[str, Any]
) -> None:
    """At once, before a byte; a client that leaves makes room."""
    limits = {f"limits__{setting}": 3}
    async with running_hub(**limits, **transport) as hub:
        inside = await silent(hub, 3)
        await until(lambda: hub.hub.clients.open == 3)
        [outside] = await silent(hub, 1)
        await outside.hung_up()  # type: ignore[attr-defined]
        outside.close()
        inside.pop().close()
        await until(lambda: hub.hub.clients.open == 2)
        name = f'gollama_connections_refused_total{{reason="{reason}"}}'
        assert await metric(hub, name) == 1
        assert await metric(hub, "gollama_connections") == 3  # the asking one is there
        for wire in inside:
            wire.close()
        await until(lambda: hub.hub.clients.open == 0)


async def test_the_limit_of_one_address_does_not_affect_another() -> None:
    async with running_hub(limits__connections_per_address=1) as hub:
        inside = await silent(hub, 1)
        await until(lambda: hub.hub.clients.open == 1)
        reader, writer = await asyncio.open_connection(
            hub.host, hub.port, local_addr=("127.0.0.2", 0)
        )
        writer.write(b"GET /livez HTTP/1.1\r\nHost: hub\r\n\r\n")
        async with asyncio.timeout(DEADLINE):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await writer.wait_closed()
        inside[0].close()


# --- Files ------------------------------------------------------------------------


def test_the_limit_of_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, wanted = [(1024, 4096)], []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: wanted.append(pair))
    assert raise_file_limit() == 4096
    limits[0] = (4096, 4096)
    assert raise_file_limit() == 4096
    limits[0] = (1024, resource.RLIM_INFINITY)
    assert raise_file_limit() == 1 << 20
    limits[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert raise_file_limit() == 1 << 20
    assert wanted == [(4096, 4096), (1 << 20, resource.RLIM_INFINITY)]


def test_a_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, pair: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_file_limit() == 256


def test_no_more_clients_than_there_are_files(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each may need a second one, for its worker."""
    config = Config(limits=Limits(connections=4000))
    assert lifecycle._fit(config, 20_000) is config
    assert not caplog.records
    assert lifecycle._fit(config, 4_256).limits.connections == 2000
    assert "4256 open files (LimitNOFILE) are enough for 2000" in caplog.text
    assert lifecycle._fit(config, 10).limits.connections == 1


async def test_a_hub_without_free_file_descriptors_keeps_serving() -> None:
    """It neither spins nor stops; new connections are closed until there is room."""
    async with ScriptedWorker() as worker, hub_process(worker.url) as hub:
        process = psutil.Process(hub.pid)
        # What is left is less than what `limits.connections` was fitted to.
        process.rlimit(psutil.RLIMIT_NOFILE, (hub.descriptors() + 8, 20_000))
        wires = [await Wire.connect("127.0.0.1", hub.port) for _ in range(50)]
        await asyncio.sleep(0.3)
        before = cpu(process)
        await asyncio.sleep(1.0)
        assert cpu(process) - before < 0.3
        for wire in wires:
            wire.close()
        await until(lambda: serves(hub))
        async with asyncio.timeout(DEADLINE):
            while not await answers(hub):  # some in the backlog are closed before
                pass


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def answers(hub: HubProcess) -> bool:
    try:
        async with await hub.open(CHAT, WHOLE) as wire:
            return (await wire.read_response()).status == 200
    except (TruncatedError, ConnectionError):
        return False


def serves(hub: HubProcess) -> bool:
    return hub.descriptors() < 30


async def test_a_low_limit_of_open_files_is_raised_at_the_start(tmp_path: Path) -> None:
    """The first line of the log warns if the limit of open files is too low."""
    async with ScriptedWorker() as worker:
        with contextlib.ExitStack() as stack:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            async with hub_process(worker.url) as hub:
                process = psutil.Process(hub.pid)
                assert process.rlimit(psutil.RLIMIT_NOFILE)[0] == hard
