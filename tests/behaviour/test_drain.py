"""SIGTERM: the hub drains, and running answers are completed or cut."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gollama_proxy.tasks import Signals
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.authority import Authority
from tests.fakes.client import TlsWire, Wire
from tests.fakes.hub import SECRET, mint
from tests.fakes.process import Program
from tests.fakes.replies import chunk, done, finish, last_chunk, role, sse_head, token
from tests.fakes.script import Step, close, send, stall, wait
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

BEGUN = (send(sse_head() + chunk(role() + token("a"))),)
ENDED = (send(chunk(finish() + done()) + last_chunk()), close())


class Hub:
    """A hub in a process, reached in the clear or over TLS."""

    def __init__(self, authority: Authority, *, https: bool) -> None:
        self.trust = authority.client() if https else None
        self.environ = {k: v for k, v in os.environ.items() if "GOLLAMA" not in k}
        self.environ["GOLLAMA_JWT_SECRET"] = SECRET
        if https:
            self.pair = authority.issue()
            self.environ["GOLLAMA_SERVER_TLS_CERTIFICATE"] = self.pair.certificate
            self.environ["GOLLAMA_SERVER_TLS_KEY"] = self.pair.key
        self.scheme = "https" if https else "http"
        self.port = 0

    def running(self, worker: ScriptedWorker, **environ: str) -> object:
        arguments = ("serve", "--port", "0", "--worker", worker.url)
        return Program.running(*arguments, environ=self.environ | environ)

    async def listening(self, program: Program) -> None:
        pattern = rf"listening on {self.scheme}://127\.0\.0\.1:(\d+)"
        self.port = int((await program.until(pattern))[1])
        await program.until("starting -> ready")

    async def wire(self) -> Wire:
        if self.trust is None:
            return await Wire.connect("127.0.0.1", self.port)
        wire = await TlsWire.connect("127.0.0.1", self.port)
        return await wire.shake_hands(self.trust, "127.0.0.1")

    async def stream(self) -> Wire:
        """Open a stream, and read its beginning."""
        wire = await self.wire()
        await wire.post(CHAT, STREAM, mint(sub="alice"))
        assert await wire.read_event() == role()
        assert await wire.read_event() == token("a")
        return wire


@pytest.fixture(params=["http", "https"])
def hub(request: pytest.FixtureRequest, authority: Authority) -> Hub:
    return Hub(authority, https=request.param == "https")


async def play(worker: ScriptedWorker, number: int, *steps: Step) -> None:
    for _ in range(number):
        worker.script(*BEGUN, *steps)


async def test_five_streams_end_normally_during_a_drain(hub: Hub) -> None:
    """Meanwhile it is not ready, takes no connections, and refuses requests."""
    async with ScriptedWorker(slots=8) as worker:
        await play(worker, 5, wait("go"), *ENDED)
        async with hub.running(worker) as program:  # type: ignore[attr-defined]
            await hub.listening(program)
            wires = [await hub.stream() for _ in range(5)]
            watch, late = await hub.wire(), await hub.wire()
            program.signal(signal.SIGTERM)
            await program.until("draining for 30 s at most")
            await watch.get("/readyz")
            assert (await watch.read_response()).status == 503
            await watch.read_eof()
            await late.post(CHAT, STREAM, mint(sub="alice"))
            refused = await late.read_response()
            assert refused.status == 503
            assert refused.json()["error"]["code"] == "hub_draining"
            with pytest.raises(ConnectionError):
                await hub.wire()
            worker.release("go")
            for wire in wires:
                assert await wire.read_events() == [finish(), done()]
                wire.close()
            watch.close()
            late.close()
            assert await program.ended() == 0
            assert "Traceback" not in program.output


async def test_two_hundred_streams_end_normally_during_a_drain(
    authority: Authority,
) -> None:
    """Each gets its every token, most of them after the signal."""
    hub, streams = Hub(authority, https=False), 200
    rest = [token(str(number)) for number in range(20)]
    async with ScriptedWorker(slots=streams) as worker:
        sent = [send(b"".join(chunk(each) for each in rest))]
        await play(worker, streams, wait("go"), *sent, *ENDED)
        async with hub.running(worker) as program:  # type: ignore[attr-defined]
            await hub.listening(program)
            wires = [await hub.stream() for _ in range(streams)]
            program.signal(signal.SIGTERM)
            await program.until("draining for 30 s at most")
            worker.release("go")
            for wire in wires:
                assert await wire.read_events() == [*rest, finish(), done()]
                wire.close()
            assert await program.ended() == 0
    assert "cutting" not in program.output


async def test_a_stuck_stream_is_cut_at_the_limit(hub: Hub) -> None:
    async with ScriptedWorker() as worker:
        await play(worker, 1, stall())
        limit = {"GOLLAMA_SERVER_DRAIN": "0.3"}
        async with hub.running(worker, **limit) as program:  # type: ignore[attr-defined]
            await hub.listening(program)
            wire = await hub.stream()
            program.signal(signal.SIGTERM)
            ending = await wire.read_to_end()
            assert not ending.clean
            assert b"hub_draining" in ending.raw
            assert b"[DONE]" not in ending.raw
            wire.close()
            assert await program.ended() == 0
            assert "cutting 1 running requests" in program.output


async def test_a_second_signal_cuts_at_once(hub: Hub) -> None:
    """Whatever the clients do: one reads, one has stopped, one has sent nothing."""
    big = [send(chunk(token("x" * (1 << 20))))] * 50
    async with ScriptedWorker() as worker:
        await play(worker, 1, stall())
        await play(worker, 1, *big, stall())
        drain = {"GOLLAMA_SERVER_DRAIN": "3600"}
        async with hub.running(worker, **drain) as program:  # type: ignore[attr-defined]
            await hub.listening(program)
            wire, unread = await hub.stream(), await hub.stream()
            silent = await Wire.connect("127.0.0.1", hub.port)
            program.signal(signal.SIGTERM)
            await program.until("draining for 3600 s at most")
            program.signal(signal.SIGINT)
            ending = await wire.read_to_end()
            assert not ending.clean
            assert b"hub_draining" in ending.raw
            assert await program.ended() == 1
            assert "second signal: cutting running answers" in program.output
            assert "Traceback" not in program.output
            for each in (wire, unread, silent):
                each.close()


# --- SIGHUP -----------------------------------------------------------------------


async def test_sighup_has_certificates_read_again(authority: Authority) -> None:
    hub = Hub(authority, https=True)
    async with ScriptedWorker() as worker:
        async with hub.running(worker) as program:  # type: ignore[attr-defined]
            await hub.listening(program)
            await play(worker, 1, wait("go"), *ENDED)
            wire = await hub.stream()
            program.signal(signal.SIGHUP)
            await program.until(f"loaded {hub.pair.certificate}")
            await asyncio.to_thread(Path(hub.pair.key).unlink)
            program.signal(signal.SIGHUP)
            await program.until("what was loaded before stays in use")
            worker.release("go")
            assert await wire.read_events() == [finish(), done()]
            program.signal(signal.SIGTERM)
            wire.close()
            assert await program.ended() == 0


@pytest.mark.parametrize(("tty", "ends"), [(False, False), (True, True)])
def test_a_closed_terminal_ends_the_hub(
    tty: bool, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloads: list[int] = []
    reload: Callable[[], None] = lambda: reloads.append(1)  # noqa: E731
    monkeypatch.setattr(sys.stdin, "isatty", lambda: tty)
    signals = Signals()
    signals.reload = reload
    signals.hang_up()
    assert signals.asked.is_set() == ends
    assert len(reloads) == (not ends)


def test_sighup_ends_a_program_that_has_nothing_to_reload() -> None:
    signals = Signals()
    signals.hang_up()
    assert signals.asked.is_set()


async def test_sighup_does_not_shorten_a_drain(hub: Hub) -> None:
    async with ScriptedWorker() as worker:
        await play(worker, 1, wait("go"), *ENDED)
        async with hub.running(worker) as program:  # type: ignore[attr-defined]
            await hub.listening(program)
            wire = await hub.stream()
            program.signal(signal.SIGTERM)
            await program.until("draining")
            program.signal(signal.SIGHUP)
            await until(lambda: program.process.returncode is None)
            worker.release("go")
            assert await wire.read_events() == [finish(), done()]
            wire.close()
            assert await program.ended() == 0
