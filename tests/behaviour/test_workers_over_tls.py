"""Workers that speak https: with a CA of one's own, with certificates on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvloop

from gollama_proxy.cli import main
from gollama_proxy.config import watch
from gollama_proxy.fleet.breaker import BreakerState, Verdict
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.wire.errors import Code, WorkerError
from tests.fakes.asks import CHAT, EMBED, STREAM, WHOLE
from tests.fakes.attempts import Bench
from tests.fakes.authority import Authority, Pair
from tests.fakes.files import replace
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chunk, done, finish, head, role, sse_head, token
from tests.fakes.script import close, kill, reset, send, stall, stream_of
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker


def described(worker: ScriptedWorker, **keys: str) -> str:
    lines = [f'url = "{worker.url}"', 'name = "attic"']
    lines += [f'{key} = "{value}"' for key, value in keys.items()]
    return "\n".join(["[[workers]]", *lines, ""])


@contextlib.asynccontextmanager
async def hub_before(
    worker: ScriptedWorker, folder: Path, keys: dict[str, str], **settings: object
) -> AsyncIterator[RunningHub]:
    file = folder / "gollama.toml"
    await asyncio.to_thread(file.write_text, described(worker, **keys))
    async with running_hub(file=file, **settings) as hub:
        yield hub


@contextlib.asynccontextmanager
async def served_by(
    authority: Authority, pair: Pair, clients: Authority | None = None
) -> AsyncIterator[ScriptedWorker]:
    context = authority.server(pair)
    if clients is not None:
        context.load_verify_locations(clients.file)
        context.verify_mode = ssl.CERT_REQUIRED
    async with ScriptedWorker(tls=context) as worker:
        yield worker


# --- Well -------------------------------------------------------------------------


def connections_of(hub: RunningHub) -> ConnectionPool:
    """Return the connections to the only worker."""
    [pool] = hub.hub.connections.values()
    return pool


async def test_a_worker_with_a_private_ca(authority: Authority, tmp_path: Path) -> None:
    """Pings, answers and streams; kept connections are used again."""
    async with served_by(authority, authority.issue()) as worker:
        async with hub_before(worker, tmp_path, {"ca_file": authority.file}) as hub:
            assert hub.hub.registry.workers[0].state is WorkerState.READY
            for _ in range(3):
                assert (await hub.post(EMBED, {"input": "hello"})).status == 200
            assert [request.reused for request in worker.requests] == [0, 1, 1]
            worker.script(*stream_of(50))
            async with await hub.open(CHAT, STREAM) as wire:
                assert len(await wire.read_events()) == 53


async def test_a_large_body_goes_up_as_it_is(
    authority: Authority, tmp_path: Path
) -> None:
    async with served_by(authority, authority.issue()) as worker:
        worker.keep_body = 16 << 20
        async with hub_before(worker, tmp_path, {"ca_file": authority.file}) as hub:
            body = {**WHOLE, "pad": "x" * (8 << 20)}
            assert (await hub.post(CHAT, body)).status == 200
            assert worker.requests[0].json()["pad"] == body["pad"]


async def test_a_worker_may_require_a_client_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    hubs = Authority(tmp_path / "hubs")
    shown = hubs.issue("hub")
    keys = {"ca_file": authority.file, "client_certificate": shown.certificate}
    keys["client_key"] = shown.key
    async with served_by(authority, authority.issue(), clients=hubs) as worker:
        async with hub_before(worker, tmp_path, keys) as hub:
            assert (await hub.post(CHAT, WHOLE)).status == 200


async def test_a_client_that_disconnects_frees_it(
    authority: Authority, tmp_path: Path
) -> None:
    async with served_by(authority, authority.issue()) as worker:
        async with hub_before(worker, tmp_path, {"ca_file": authority.file}) as hub:
            worker.script(send(sse_head() + chunk(role()) + chunk(token("a"))), stall())
            wire = await hub.open(CHAT, STREAM)
            await wire.read_event()
            wire.close()
            request = await worker.received()
            async with asyncio.timeout(DEADLINE):
                await request.closed_by_peer.wait()


async def test_a_canary_goes_over_tls(authority: Authority, tmp_path: Path) -> None:
    async with served_by(authority, authority.issue()) as worker:
        keys = {"ca_file": authority.file}
        async with hub_before(worker, tmp_path, keys, breaker__open=0.01) as hub:
            [record] = hub.hub.registry.workers
            for _ in range(5):
                record.breaker.record(Verdict.FAILURE)
            await until(lambda: record.breaker.state is BreakerState.HALF_OPEN)
            hub.hub.watchdog.round()
            await until(lambda: record.breaker.closed)
            assert worker.requests[-1].json()["max_tokens"] == 1


# --- Ends -------------------------------------------------------------------------


async def test_a_body_without_a_frame_ends_with_a_notice(
    authority: Authority, tmp_path: Path
) -> None:
    async with served_by(authority, authority.issue()) as worker:
        async with hub_before(worker, tmp_path, {"ca_file": authority.file}) as hub:
            worker.script(send(head(200) + b'{"tokens": []}'), close())
            response = await hub.post("/tokenize", {"content": ""})
            assert response.body == b'{"tokens": []}'


async def test_an_unframed_body_that_is_cut_is_incomplete(
    authority: Authority, tmp_path: Path
) -> None:
    """In the clear the same bytes would be all there is (RFC 9112, 9.8)."""
    async with served_by(authority, authority.issue()) as worker:
        async with hub_before(worker, tmp_path, {"ca_file": authority.file}) as hub:
            worker.script(send(head(200) + b'{"tokens": []}'), kill())
            async with await hub.open("/tokenize", {"content": ""}) as wire:
                assert not (await wire.read_to_end()).clean


async def test_a_reset_in_mid_answer_is_reported(
    authority: Authority, tmp_path: Path
) -> None:
    async with served_by(authority, authority.issue()) as worker:
        keys = {"ca_file": authority.file}
        # How it broke off is for the client to see: it is not continued.
        async with hub_before(worker, tmp_path, keys, rescue__enabled=False) as hub:
            worker.script(send(sse_head() + chunk(role() + token("a"))), reset())
            async with await hub.open(CHAT, STREAM) as wire:
                ending = await wire.read_to_end()
    assert not ending.clean
    assert b"worker_connection_lost" in ending.raw


async def test_a_stream_that_ends_well_but_not_its_tls(
    authority: Authority, tmp_path: Path
) -> None:
    """Its own marks show that it is complete."""
    async with served_by(authority, authority.issue()) as worker:
        async with hub_before(worker, tmp_path, {"ca_file": authority.file}) as hub:
            events = role() + token("a") + finish() + done()
            worker.script(send(sse_head() + chunk(events)), reset())
            async with await hub.open(CHAT, STREAM) as wire:
                assert len(await wire.read_events()) == 4


# --- Certificates that will not do ------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expired", "trusted", "reason"),
    [
        ((), False, False, "unable to get local issuer certificate"),
        ((), True, True, "certificate has expired"),
        (
            ("127.0.0.2", "other"),
            False,
            True,
            "IP address mismatch, certificate is not valid for '127.0.0.1'",
        ),
    ],
)
async def test_a_certificate_that_is_not_accepted_is_reported(
    names: tuple[str, ...],
    expired: bool,
    trusted: bool,
    reason: str,
    authority: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log, the client and `check` name the worker and the reason, on one line."""
    stranger = Authority(tmp_path / "stranger")
    keys = {"ca_file": (authority if trusted else stranger).file}
    why = f"TLS: certificate not accepted: {reason}"
    async with served_by(authority, authority.issue(*names, expired=expired)) as worker:
        async with hub_before(worker, tmp_path, keys, health__fall=1) as hub:
            assert f"worker attic: starting -> down ({why})" in caplog.text
            with pytest.raises(WorkerError) as info:
                await connections_of(hub).dial()
        assert info.value.code is Code.WORKER_UNREACHABLE
        assert str(info.value) == f"Worker attic cannot be reached: {why}."
        assert info.value.detail == why
        assert worker.control == worker.requests == []


async def test_a_worker_that_refuses_the_hub(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = authority.server(authority.issue())
    context.load_verify_locations(authority.file)
    context.verify_mode = ssl.CERT_REQUIRED
    with refusing(context) as url:
        row = (
            f'[[workers]]\nurl = "{url}"\nname = "attic"\nca_file = "{authority.file}"'
        )
        file = tmp_path / "gollama.toml"
        await asyncio.to_thread(file.write_text, row)
        async with running_hub(file=file, health__fall=1) as hub:
            why = "TLS: tlsv13 alert certificate required"
            assert f"worker attic: starting -> down ({why})" in caplog.text
            pool = connections_of(hub)
            made = Bench(hub.hub.config, pool, time.monotonic)
            async with made.attempt() as attempt:
                with pytest.raises(WorkerError) as info:
                    await made.send(attempt)
            assert info.value.detail == why


@contextlib.contextmanager
def refusing(context: ssl.SSLContext) -> Iterator[str]:
    """A server that reports why it refuses a client: that of asyncio only closes."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                context.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


async def test_a_renewed_ca_is_taken_up(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.02)
    old = Authority(tmp_path / "old")
    keys = {"ca_file": old.file}
    async with served_by(authority, authority.issue()) as worker:
        async with hub_before(
            worker, tmp_path, keys, health__recheck=0.02, health__fall=1
        ) as hub:
            [record] = hub.hub.registry.workers
            assert record.is_down
            text = await asyncio.to_thread(Path(authority.file).read_text)
            await asyncio.to_thread(replace, old.file, text)
            await until(lambda: record.state is WorkerState.READY)
            assert (await hub.post(CHAT, WHOLE)).status == 200


def test_check_reports_the_reason(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gollama-proxy check`, of one that is expired and one that is well."""
    ready, done_ = threading.Event(), threading.Event()
    urls: list[str] = []

    async def serve() -> None:
        async with (
            served_by(authority, authority.issue(file="good")) as good,
            served_by(authority, authority.issue(file="bad", expired=True)) as bad,
        ):
            urls.extend([good.url, bad.url])
            ready.set()
            await asyncio.to_thread(done_.wait)

    thread = threading.Thread(target=uvloop.run, args=(serve(),))
    thread.start()
    try:
        ready.wait()
        file = tmp_path / "gollama.toml"
        ca = f'ca_file = "{authority.file}"'
        rows = [
            f'[[workers]]\nurl = "{url}"\nname = "{name}"\n{ca}'
            for url, name in zip(urls, ("good", "bad"), strict=True)
        ]
        file.write_text("\n".join(rows))
        assert main(["check", "-c", str(file)]) == 1
    finally:
        done_.set()
        thread.join()
    good, bad = capsys.readouterr().out.splitlines()[-2:]
    assert "ready" in good
    assert "TLS: certificate not accepted: certificate has expired" in bad
