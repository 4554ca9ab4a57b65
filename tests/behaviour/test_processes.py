"""Several hub processes at one address: they start, serve, restart and end as one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from gollama_proxy.state.folder import lock
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.client import Wire
from tests.fakes.hub import SECRET, mint
from tests.fakes.process import Program, bare
from tests.fakes.replies import chunk, done, finish, last_chunk, role, sse_head, token
from tests.fakes.script import close, send, wait
from tests.fakes.systemd import Systemd, listening
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker


class Group:
    """A parent with its processes, as a test sees them."""

    def __init__(self, program: Program, systemd: Systemd, port: int) -> None:
        self.program = program
        self.systemd = systemd
        self.port = port
        self.parent = psutil.Process(program.process.pid)

    def hubs(self) -> dict[int, psutil.Process]:
        """Return the processes that run, by number."""
        found = re.findall(r"started process (\d+), process (\d+)", self.program.output)
        return {int(number): psutil.Process(int(pid)) for number, pid in found}

    def everything(self) -> list[psutil.Process]:
        return self.parent.children(recursive=True)

    async def connect(self) -> Wire:
        return await Wire.connect("127.0.0.1", self.port)


@contextlib.asynccontextmanager
async def running(
    folder: Path, *urls: str, number: int = 2, settings: str = "", **environ: str
) -> AsyncIterator[Group]:
    """Run them until all are ready."""
    file = folder / "gollama.toml"
    file.write_text(settings)
    (folder / "notify").unlink(missing_ok=True)
    with Systemd(folder / "notify") as systemd:
        variables = bare() | systemd.environ | environ
        variables |= {
            "GOLLAMA_JWT_SECRET": SECRET,
            "GOLLAMA_CONFIG": str(file),
            "GOLLAMA_STATE_DIR": str(folder / "state"),
        }
        workers = [argument for url in urls for argument in ("--worker", url)]
        command = ("serve", "--port", "0", "--processes", str(number), *workers)
        async with Program.running(*command, environ=variables) as program:
            at = await program.until(r"listening on http://127\.0\.0\.1:(\d+)")
            await systemd.until("READY=1")
            await program.until(rf"started process {number}, ")
            yield Group(program, systemd, int(at[1]))


def gone(processes: list[psutil.Process]) -> bool:
    return not any(
        each.is_running() and each.status() != psutil.STATUS_ZOMBIE
        for each in processes
    )


async def test_processes_live_as_one(tmp_path: Path) -> None:
    """Ready, a stream on each, reloads, and a drain that waits for the streams."""
    steps = (
        send(sse_head() + chunk(role() + token("a"))),
        wait("go"),
        send(chunk(finish() + done()) + last_chunk()),
        close(),
    )
    async with ScriptedWorker() as worker:
        worker.script(*steps)
        settings = f'[[workers]]\nurl = "{worker.url}"\n'
        async with running(tmp_path, settings=settings) as group:
            systemd, program = group.systemd, group.program
            await systemd.shows("2 of 2 processes; 1 of 1 worker ready; 0 requests")

            wire = await group.connect()
            await wire.post(CHAT, STREAM, mint(sub="alice"))
            assert await wire.read_event() == role()
            await systemd.shows("2 of 2 processes; 1 of 1 worker ready; 1 request r")

            file = tmp_path / "gollama.toml"
            file.write_text(settings + "[queue]\nsize = 7\n")
            program.signal(signal.SIGHUP)
            await systemd.until("RELOADING=1\nMONOTONIC_USEC=")
            await systemd.until("READY=1")
            again = "settings were read again: queue.size 256 -> 7\n"
            await program.until(again)
            file.write_text("[queue]\nsize = -1\n")
            program.signal(signal.SIGHUP)
            await systemd.shows("2 of 2 processes; 1 of 1 worker ready; 1 request r")
            await program.until("so the old ones stay in force: queue.size = -1")

            everything = group.everything()
            program.signal(signal.SIGTERM)
            await systemd.until("STOPPING=1")
            await systemd.shows("stopping; 1 running request may end within 30 s")
            with contextlib.suppress(ConnectionError):
                while True:  # until all have closed the socket
                    async with await group.connect():
                        pass
            worker.release("go")
            events = await wire.read_events()
            assert events[-1] == done()
            wire.close()
            assert await program.ended() == 0
            assert program.output.count("stay in force") == 1
            assert program.output.count("read again") == 1
            assert gone(everything)
    left = {each.name for each in (tmp_path / "state/processes").iterdir()}
    assert left == {"lock", "store.log"}


async def test_what_ends_is_started_again(tmp_path: Path) -> None:
    """A hub that is killed, and the store, while the other hub serves on."""
    async with ScriptedWorker() as worker, running(tmp_path, worker.url) as group:
        program = group.program
        group.hubs()[2].kill()
        await program.until(r"process 2 ended with SIGKILL; again in 1 s")
        for _ in range(3):
            async with await group.connect() as wire:
                await wire.get("/livez")
                assert (await wire.read_response()).status == 200
        await program.until(r"started process 2,(.|\n)*started process 2,")
        store = [each for each in group.everything() if "-server" in each.name()]
        store[0].kill()
        await program.until(r"the store ended with SIGKILL; again in 1 s")
        await program.until(r"started the store(.|\n)*started the store")
        program.signal(signal.SIGTERM)
        assert await program.ended() == 0


async def test_sockets_of_systemd_and_for_metrics_are_shared(tmp_path: Path) -> None:
    """Each process answers at each of them, also while another one hangs."""
    path = str(tmp_path / "hub.sock")
    environ = bare() | {
        "GOLLAMA_JWT_SECRET": SECRET,
        "GOLLAMA_METRICS_LISTEN": "127.0.0.1:0",
        "GOLLAMA_STATE_DIR": "",
    }
    with listening(socket.AF_UNIX, path) as unix, listening() as inet:
        async with Program.running(
            *("serve", "--processes", "2"),
            environ=environ,
            descriptors=[unix.fileno(), inet.fileno()],
        ) as program:
            address = f"http://127.0.0.1:{inet.getsockname()[1]}"
            await program.until(f"listening on {address}, unix:{path}; ")
            at = await program.until(r"metrics: http://127\.0\.0\.1:(\d+)/metrics")
            await program.until(r"the store is up: .* process=2")
            found = re.findall(r"started process \d, process (\d+)", program.output)
            for stopped in map(int, found):
                os.kill(stopped, signal.SIGSTOP)  # the other one answers
                process = psutil.Process(stopped)
                await until(lambda it=process: it.status() == psutil.STATUS_STOPPED)
                sock = socket.socket(socket.AF_UNIX)
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_connect(sock, path)
                async with Wire(sock) as wire:
                    await wire.get("/livez")
                    assert (await wire.read_response()).status == 200
                os.kill(stopped, signal.SIGCONT)
            async with await Wire.connect("127.0.0.1", int(at[1])) as wire:
                await wire.get("/metrics", mint(sub="alice", scope="metrics"))
                assert (await wire.read_response()).status == 200
            program.signal(signal.SIGTERM)
            assert await program.ended() == 0


async def test_what_the_first_process_finds_is_reported_once(tmp_path: Path) -> None:
    """Its state folder is used by a hub that is no process of several."""
    folder = tmp_path / "state"
    await asyncio.to_thread(folder.mkdir)
    held = await asyncio.to_thread(lock, folder / "lock")
    variables = {"GOLLAMA_JWT_SECRET": SECRET, "GOLLAMA_STATE_DIR": str(folder)}
    command = ("serve", "--port", "0", "--processes", "2")
    with held:
        async with Program.running(*command, environ=bare() | variables) as program:
            assert await program.ended() == 2
    error = f"gollama-proxy: state.dir = '{folder}': {folder}: used by another hub"
    assert program.output.count(error) == 1
    assert "started process 2" not in program.output


async def test_a_process_that_is_killed_while_all_start_is_reported(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if 'GOLLAMA_PROCESS' in os.environ:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environ = bare() | {"GOLLAMA_JWT_SECRET": SECRET, "PYTHONPATH": str(tmp_path)}
    command = ("serve", "--port", "0", "--processes", "2")
    async with Program.running(*command, environ=environ) as program:
        assert await program.ended() == 1
    assert "error process 1 ended with SIGKILL\n" in program.output
    assert "started process 2" not in program.output


async def test_a_second_signal_cuts_answers(tmp_path: Path) -> None:
    """Also if all processes get both, as from systemd or in a terminal."""
    async with ScriptedWorker() as worker, running(tmp_path, worker.url) as group:
        worker.script(send(sse_head() + chunk(role() + token("a"))), wait("never"))
        wire = await group.connect()
        await wire.post(CHAT, STREAM, mint(sub="alice"))
        assert await wire.read_event() == role()
        for each in group.hubs().values():
            each.terminate()
        group.program.signal(signal.SIGTERM)
        await group.systemd.shows("stopping; 1 running request")
        group.program.signal(signal.SIGINT)
        assert await group.program.ended() == 1
        assert "second signal: cutting running answers" in group.program.output
        wire.close()


async def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    async with running(tmp_path) as group:
        everything = group.everything()
        assert len(everything) == 3
        group.program.signal(signal.SIGKILL)
        await group.program.ended()
        await until(lambda: gone(everything))
    async with running(tmp_path):  # the folder and its sockets can be used again
        pass
