"""The hub as systemd runs it: messages, a watchdog, and sockets that it inherits."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from gollama_proxy.machine import find_free_ports
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.client import Wire
from tests.fakes.hub import SECRET, mint, running_hub
from tests.fakes.process import Program, bare
from tests.fakes.replies import chunk, done, finish, last_chunk, role, sse_head, token
from tests.fakes.script import close, send, wait
from tests.fakes.systemd import Systemd, listening
from tests.fakes.tools import require
from tests.fakes.worker import ScriptedWorker


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with Systemd(tmp_path / "notify") as it:
        yield it


@contextlib.asynccontextmanager
async def serving(
    systemd: Systemd,
    *urls: str,
    sockets: Sequence[socket.socket] = (),
    **environ: str,
) -> AsyncIterator[Program]:
    variables = bare() | systemd.environ | {"GOLLAMA_JWT_SECRET": SECRET} | environ
    workers = [argument for url in urls for argument in ("--worker", url)]
    command = ("serve", "--port", "0", *workers)
    numbers = [each.fileno() for each in sockets]
    async with Program.running(*command, environ=variables, descriptors=numbers) as it:
        yield it


async def port_of(program: Program) -> int:
    return int((await program.until(r"listening on http://127\.0\.0\.1:(\d+)"))[1])


async def connect(address: object, family: int = socket.AF_INET) -> Wire:
    sock = socket.socket(family)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, address)  # type: ignore[arg-type]
    return Wire(sock)


async def answer(wire: Wire) -> int:
    async with wire:
        await wire.get("/livez")
        return (await wire.read_response()).status


# --- Messages -----------------------------------------------------------------------


async def test_a_hub_reports_its_life(systemd: Systemd, tmp_path: Path) -> None:
    """Ready, reloaded, reloaded with a mistake, and stopping while a stream ends."""
    file = tmp_path / "gollama.toml"
    async with ScriptedWorker() as worker:
        worker.script(
            send(sse_head() + chunk(role() + token("a"))),
            wait("go"),
            send(chunk(finish() + done()) + last_chunk()),
            close(),
        )
        file.write_text(f'[[workers]]\nurl = "{worker.url}"\n')
        async with serving(systemd, GOLLAMA_CONFIG=str(file)) as program:
            port = await port_of(program)
            await systemd.until("READY=1")
            await systemd.shows("1 of 1 worker ready; 0 requests running, 0 wait")

            program.signal(signal.SIGHUP)
            await systemd.until("RELOADING=1\nMONOTONIC_USEC=")
            await systemd.until("READY=1")
            file.write_text("[queue]\nsize = -1\n")
            program.signal(signal.SIGHUP)
            await systemd.until("RELOADING=1\n")
            await systemd.until("READY=1")
            usual = "1 of 1 worker ready; 0 requests running, 0 waiting"
            await systemd.shows(f"{usual}; the last reload was refused")

            wire = await Wire.connect("127.0.0.1", port)
            await wire.post(CHAT, STREAM, mint(sub="alice"))
            assert await wire.read_event() == role()
            await systemd.shows("1 of 1 worker ready; 1 request running, 0 wait")
            program.signal(signal.SIGTERM)
            await systemd.until("STOPPING=1")
            await systemd.until("EXTEND_TIMEOUT_USEC=")
            await systemd.shows("stopping; 1 running request may end within 30 s")
            await systemd.until("EXTEND_TIMEOUT_USEC=")  # again, as it goes on
            worker.release("go")
            assert (await wire.read_events())[-1] == done()
            wire.close()
            assert await program.ended() == 0
            assert "Traceback" not in program.output


async def test_a_worker_that_hangs_does_not_delay_readiness(systemd: Systemd) -> None:
    with listening() as silent:  # takes connections and never answers
        url = "http://{}:{}".format(*silent.getsockname())
        settings = {"GOLLAMA_HEALTH_TIMEOUT": "60"}
        async with serving(systemd, url, **settings):
            await systemd.until("READY=1")
            await systemd.shows("0 of 1 worker ready")


async def test_the_watchdog_is_fed(systemd: Systemd) -> None:
    async with serving(systemd, WATCHDOG_USEC="400000") as program:
        for _ in range(3):
            await systemd.until("WATCHDOG=1")
        program.signal(signal.SIGTERM)
        await systemd.until("STOPPING=1")
        assert await program.ended() == 0


# Runs a command whose event loop is blocked from a signal until a line of its input.
_BLOCKABLE = """
import signal, sys
from gollama_proxy import cli
def block(number, frame):
    print("blocked", flush=True)
    sys.stdin.readline()
signal.signal(signal.SIGUSR1, block)
sys.exit(cli.main())
"""


async def test_a_hub_whose_loop_is_blocked_is_not_alive(systemd: Systemd) -> None:
    variables = bare() | systemd.environ | {"GOLLAMA_JWT_SECRET": SECRET}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _BLOCKABLE, "serve", "--port", "0"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=variables | {"WATCHDOG_USEC": "400000"},
    )
    hub = Program(process)
    try:
        await systemd.until("READY=1")
        await systemd.until("WATCHDOG=1")
        hub.signal(signal.SIGUSR1)
        await hub.until("blocked")
        systemd.arrived()
        assert not await asyncio.to_thread(systemd.arrives_within, 1.2)
        assert process.stdin is not None
        process.stdin.write(b"go on\n")
        await systemd.until("WATCHDOG=1")
        hub.signal(signal.SIGTERM)
        assert await hub.ended() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# --- Sockets ------------------------------------------------------------------------


async def test_a_hub_serves_on_the_sockets_that_it_inherits(
    systemd: Systemd, tmp_path: Path
) -> None:
    """All of them, of each family; they are open before it starts and after it ends."""
    path = str(tmp_path / "hub")
    sockets = [listening(), listening(socket.AF_UNIX, path)]
    if socket.has_ipv6:
        with contextlib.suppress(OSError):  # it may be switched off
            sockets.append(listening(socket.AF_INET6))
    with contextlib.ExitStack() as stack:
        for each in sockets:
            stack.enter_context(each)
        early = await connect(sockets[0].getsockname())
        async with serving(systemd, sockets=sockets) as program:
            assert await answer(early) == 200
            for each in sockets:
                wire = await connect(each.getsockname(), each.family)
                assert await answer(wire) == 200, each
            await program.until(f"unix:{path}; dashboard: http://127.0.0.1:")
            program.signal(signal.SIGTERM)
            assert await program.ended() == 0
        late = await connect(sockets[0].getsockname())  # waits for the next hub
        async with serving(systemd, sockets=sockets):
            assert await answer(late) == 200


async def test_a_unix_socket_alone(systemd: Systemd, tmp_path: Path) -> None:
    path = str(tmp_path / "hub")
    with listening(socket.AF_UNIX, path) as only:
        async with serving(
            systemd, sockets=[only], GOLLAMA_LIMITS_CONNECTIONS_PER_ADDRESS="1"
        ) as program:
            await program.until(f"listening on unix:{path}; ")
            wires = [await connect(path, socket.AF_UNIX) for _ in range(3)]
            assert [await answer(each) for each in wires] == [200, 200, 200]


async def test_systemd_starts_a_hub_for_its_first_client(tmp_path: Path) -> None:
    """With its own program for that: two sockets, of which one is for metrics."""
    starter = require("systemd-socket-activate", package="systemd")
    addresses = [str(tmp_path / "http"), str(tmp_path / "metrics")]
    settings = bare() | {"GOLLAMA_JWT_SECRET": SECRET, "GOLLAMA_METRICS_OPEN": "true"}
    process = await asyncio.create_subprocess_exec(
        starter,
        *(f"--listen={each}" for each in addresses),
        "--fdname=http:metrics",
        *(f"--setenv={name}={value}" for name, value in settings.items()),
        *(sys.executable, "-m", "gollama_proxy", "serve"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=settings,
    )
    hub = Program(process)
    try:
        await hub.until("Listening on .*metrics")
        first = await connect(addresses[0], socket.AF_UNIX)
        assert await answer(first) == 200
        async with await connect(addresses[1], socket.AF_UNIX) as wire:
            await wire.get("/metrics")
            assert b"gollama_build_info" in (await wire.read_response()).body
        async with await connect(addresses[1], socket.AF_UNIX) as wire:
            await wire.get("/v1/models")
            assert (await wire.read_response()).status == 404
        hub.signal(signal.SIGTERM)
        assert await hub.ended() == 0, hub.output
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_an_open_socket_without_authentication_is_refused(
    systemd: Systemd,
) -> None:
    """As `server.host` would be; otherwise a socket unit would open the hub to all."""
    with listening(address=("0.0.0.0", 0)) as everywhere:
        settings = {"GOLLAMA_AUTH_MODE": "off"}
        async with serving(systemd, sockets=[everywhere], **settings) as program:
            assert await program.ended() == 2
    assert "server.host = '0.0.0.0': without authentication only" in program.output


@pytest.mark.parametrize("kind", ["file", "not listening", "datagram"])
async def test_a_descriptor_that_cannot_be_served_on(
    kind: str, systemd: Systemd, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        number = _descriptor(kind, tmp_path, stack)
        async with Program.running(
            "serve",
            environ=bare() | {"GOLLAMA_JWT_SECRET": SECRET, "LISTEN_FDNAMES": "http"},
            descriptors=[number],
        ) as program:
            assert await program.ended() == 2
    assert program.output == (
        "gollama-proxy: descriptor 3 (http): must be a listening stream socket "
        "(ListenStream= with Accept=no)\n"
    )


def _descriptor(kind: str, folder: Path, stack: contextlib.ExitStack) -> int:
    if kind == "file":
        return stack.enter_context((folder / "x").open("w")).fileno()
    kinds: Mapping[str, int] = {"datagram": socket.SOCK_DGRAM}
    sock = socket.socket(type=kinds.get(kind, socket.SOCK_STREAM))
    return stack.enter_context(sock).fileno()


# --- The agent ----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def agent(
    systemd: Systemd,
    url: str,
    *arguments: str,
    granted: str = "",
    program: Sequence[str] = (),
    **environ: str,
) -> AsyncIterator[Program]:
    variables = bare() | systemd.environ | {"GOLLAMA_TOKEN": granted} | environ
    async with Program.running(
        "agent", "--hub", url, *arguments, environ=variables, program=program
    ) as it:
        yield it


async def test_an_agent_reports_its_life(systemd: Systemd) -> None:
    """Ready once it is registered, then what it does, and that it leaves."""
    async with (
        ScriptedWorker() as worker,
        running_hub(agents__lease=600) as hub,
        agent(
            systemd,
            hub.url,
            *("--worker", worker.url, "--name", "desk"),
            granted=hub.token("desk", scope="worker"),
            WATCHDOG_USEC="400000",
        ) as program,
    ):
        await systemd.until("READY=1")
        assert [each.name for each in hub.hub.registry.workers] == ["desk"]
        await systemd.shows("registered as desk with 1 of 1 hub; the server answers")
        await systemd.until("WATCHDOG=1")
        program.signal(signal.SIGTERM)
        await systemd.until("STOPPING=1")
        await systemd.until("EXTEND_TIMEOUT_USEC=")
        await systemd.shows("stopping; 0 running answers may end")
        assert await program.ended() == 0
        assert "Traceback" not in program.output


# Runs a command with less patience, so that a test need not wait for it.
_IMPATIENT = """
import sys
from gollama_proxy import agent, cli
agent.READY_WITHIN = 0.5
sys.exit(cli.main())
"""


async def test_a_hub_that_is_away_does_not_hold_up_an_agent(systemd: Systemd) -> None:
    """Nor the start of its machine; it goes on trying."""
    async with ScriptedWorker() as worker:
        async with agent(
            systemd, nowhere(), "--worker", worker.url, program=("-c", _IMPATIENT)
        ) as program:
            await systemd.until("READY=1")
            await systemd.shows("not registered with 1 hub: the hub is away, or busy")
            program.signal(signal.SIGTERM)
            assert await program.ended() == 0


async def test_an_agent_that_is_refused_for_good_does_not_start(
    systemd: Systemd,
) -> None:
    async with ScriptedWorker() as worker, running_hub() as hub:
        async with agent(
            systemd, hub.url, "--worker", worker.url, granted=hub.token("desk")
        ) as program:
            assert await program.ended() == 1
    assert "READY=1" not in systemd.arrived() + systemd.messages


async def test_the_server_of_an_agent_is_not_taken_for_a_service(
    systemd: Systemd, tmp_path: Path
) -> None:
    file = tmp_path / "environ"
    code = (
        f"import os, pathlib; pathlib.Path({str(file)!r}).write_text(str(os.environ))"
    )
    command = ("--exec", "--", sys.executable, "-c", code, "--port", "1")
    passed = {"WATCHDOG_USEC": "1000000", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    async with agent(systemd, nowhere(), *command, **passed) as program:
        await program.until("ended with status 0")
        program.signal(signal.SIGTERM)
        assert await program.ended() == 0
    found = file.read_text()
    assert "PATH" in found
    for name in ("NOTIFY_SOCKET", *passed):
        assert name not in found


def nowhere() -> str:
    """Return the URL of a port at which nothing listens."""
    [port] = find_free_ports(1)
    return f"http://127.0.0.1:{port}"
