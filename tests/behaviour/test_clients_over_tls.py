"""What holds for clients in the clear holds over TLS, the fast path included."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from gollama_proxy.config import watch
from gollama_proxy.config.values import ConfigError
from gollama_proxy.fleet.state import WorkerState
from tests.fakes.asks import CHAT, MIB, STREAM, WHOLE
from tests.fakes.authority import Authority, Pair
from tests.fakes.client import TlsWire, TruncatedError, Wire
from tests.fakes.files import replace
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chunk, done, finish, last_chunk, role, sse_head, token
from tests.fakes.script import close, notify, reset, send, stall, stream_of, wait
from tests.fakes.waiting import DEADLINE, settled, until
from tests.fakes.worker import ScriptedWorker


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue()


@contextlib.asynccontextmanager
async def hub_of(
    authority: Authority, pair: Pair, *workers: ScriptedWorker, **settings: Any
) -> AsyncIterator[RunningHub]:
    trust = settings.pop("trust", authority.client())
    async with running_hub(
        *workers, trust=trust, **pair.settings, **settings
    ) as running:
        yield running


def tls_of(wire: Wire) -> ssl.SSLObject:
    assert isinstance(wire, TlsWire)
    return wire.tls


def notified(wire: Wire) -> bool:
    assert isinstance(wire, TlsWire)
    return wire.notified


async def released(hub: RunningHub) -> None:
    await until(lambda: not any(w.in_flight for w in hub.hub.registry.workers))


# --- The connection ---------------------------------------------------------------


async def test_an_answer_and_a_stream_on_one_connection(
    authority: Authority, pair: Pair
) -> None:
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        assert hub.url == f"https://127.0.0.1:{hub.port}"
        async with await hub.wire() as wire:
            for _ in range(3):
                await wire.post(CHAT, WHOLE, hub.token())
                assert (await wire.read_response()).status == 200
                worker.script(*stream_of(20))
                await wire.post(CHAT, STREAM, hub.token())
                assert len(await wire.read_events()) == 23
            assert tls_of(wire).version() == "TLSv1.3"


async def test_only_http_1_1_is_offered(authority: Authority, pair: Pair) -> None:
    """A client that would rather have HTTP/2 must not think that it has it."""
    async with hub_of(authority, pair) as hub, await hub.wire() as wire:
        assert tls_of(wire).selected_alpn_protocol() == "http/1.1"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
async def test_old_versions_of_tls_are_refused(
    authority: Authority, pair: Pair
) -> None:
    old = authority.client()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    async with hub_of(authority, pair, trust=old) as hub:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await hub.wire()
        await until(lambda: hub.hub.clients.refused["handshake"] == 1)
        old.maximum_version = old.minimum_version = ssl.TLSVersion.TLSv1_2
        async with await hub.wire() as wire:
            assert tls_of(wire).version() == "TLSv1.2"


async def test_plain_http_on_an_https_port_is_rejected(
    authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub_of(authority, pair) as hub:
        async with await Wire.connect(hub.host, hub.port) as wire:
            await wire.get("/livez")
            await wire.read_eof()
        await until(lambda: hub.hub.clients.open == 0)
        assert (await hub.get("/livez", None)).status == 200
    assert "refused connections: 1 (TLS: http request)" in caplog.text


async def test_a_client_that_leaves_in_its_handshake(
    authority: Authority, pair: Pair
) -> None:
    async with hub_of(authority, pair) as hub:
        wires = [await TlsWire.connect(hub.host, hub.port) for _ in range(3)]
        wires[0].half_close()
        wires[1].abort()
        await wires[2].hello(authority.client(), hub.host)
        await until(lambda: hub.hub.clients.open == 1)
        wires[2].close()
        await until(lambda: hub.hub.clients.open == 0)
        wires[0].close()


async def test_an_unfinished_handshake_is_aborted(
    authority: Authority, pair: Pair
) -> None:
    """Whether nothing comes, or half of it."""
    async with hub_of(authority, pair, timeouts__handshake=0.2) as hub:
        silent = await TlsWire.connect(hub.host, hub.port)
        half = await TlsWire.connect(hub.host, hub.port)
        await half.hello(authority.client(), hub.host)
        for wire in (silent, half):
            await wire.hung_up()
            wire.close()
        await until(lambda: hub.hub.clients.open == 0)
        assert hub.hub.clients.refused["handshake"] == 2


async def test_a_drain_does_not_wait_for_a_handshake(
    authority: Authority, pair: Pair
) -> None:
    async with hub_of(authority, pair) as hub:
        async with await TlsWire.connect(hub.host, hub.port) as wire:
            await until(lambda: hub.hub.clients.open == 1)
            async with asyncio.timeout(DEADLINE):
                await hub.hub.drain()
            await wire.hung_up()


# --- The stream -------------------------------------------------------------------


async def test_events_pass_unchanged_and_immediately(
    authority: Authority, pair: Pair
) -> None:
    """Each is with the client before the worker sends the next one."""
    tokens = [token(text) for text in ("a", "ü", "line\\n", "x" * 20_000, " ", "😀")]
    steps = [
        step
        for number, event in enumerate(tokens)
        for step in (send(chunk(event)), wait(f"seen {number}"))
    ]
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        worker.script(
            send(sse_head() + chunk(role())),
            *steps,
            send(chunk(finish() + done()) + last_chunk()),
            close(),
        )
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_event() == role()
            for number, event in enumerate(tokens):
                assert await wire.read_event() == event
                worker.release(f"seen {number}")
            assert await wire.read_events() == [finish(), done()]


@pytest.mark.parametrize("seed", range(5))
async def test_events_pass_unchanged_however_they_are_cut(
    seed: int, authority: Authority, pair: Pair
) -> None:
    rng = random.Random(seed)
    texts = ("a", "\\u00fc", "é€😀", ": not a comment", "x" * rng.randrange(70_000))
    events = [token(rng.choice(texts)) for _ in range(60)]
    body = role() + b"".join(events) + finish() + done()
    raw = b"".join(map(chunk, [role(), *events, finish(), done()])) + last_chunk()
    cuts = sorted(rng.sample(range(1, len(raw)), 40))
    pieces = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        worker.script(send(sse_head()), *map(send, pieces), close())
        async with await hub.open(CHAT, STREAM) as wire:
            assert (await wire.read_response()).body == body


async def test_a_stream_of_http_1_0_ends_with_a_notice(
    authority: Authority, pair: Pair
) -> None:
    """Its end is that of the connection, so that a FIN must not be one."""
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        worker.script(*stream_of(5))
        async with await hub.wire() as wire:
            await wire.post(CHAT, STREAM, hub.token(), version="1.0")
            assert (await wire.read_to_end()).raw.endswith(b"data: [DONE]\n\n")
            assert notified(wire)


# --- Ends -------------------------------------------------------------------------


async def test_a_truncated_answer_is_recognised_as_truncated(
    authority: Authority, pair: Pair
) -> None:
    async with (
        ScriptedWorker() as worker,
        # How it broke off is for the client to see: it is not continued.
        hub_of(authority, pair, worker, rescue__enabled=False) as hub,
    ):
        worker.script(send(sse_head() + chunk(role()) + chunk(token("a"))), reset())
        async with await hub.open(CHAT, STREAM) as wire:
            ending = await wire.read_to_end()
    assert not ending.clean
    assert b"worker_connection_lost" in ending.raw
    assert b"[DONE]" not in ending.raw
    assert not ending.raw.endswith(b"0\r\n\r\n")


async def test_a_broken_answer_without_a_frame_ends_without_a_notice(
    authority: Authority, pair: Pair
) -> None:
    """HTTP/1.0: `close_notify` would mark the answer as complete."""
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked"
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        worker.script(send(body + b"\r\n\r\n" + chunk(b"half")), wait("seen"), reset())
        async with await hub.wire() as wire:
            await wire.post("/tokenize", {"content": "x"}, hub.token(), version="1.0")
            await wire.read_until(b"half")
            worker.release("seen")
            await wire.read_to_end()
            assert not notified(wire)


@pytest.mark.parametrize("how", ["abort", "close", "notify", "half_close"])
@pytest.mark.parametrize("when", ["waiting", "streaming"])
async def test_a_client_that_leaves_frees_its_worker(
    how: str, when: str, authority: Authority, pair: Pair
) -> None:
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        begun = [send(sse_head() + chunk(role()) + chunk(token("a")))]
        worker.script(*(begun if when == "streaming" else []), notify("there"), stall())
        wire = await hub.open(CHAT, STREAM)
        await worker.reached("there")
        if when == "streaming":
            assert await wire.read_event() == role()
        left = getattr(wire, how)()
        if left is not None:
            await left
        request = await worker.received()
        async with asyncio.timeout(DEADLINE):
            await request.closed_by_peer.wait()
        await released(hub)
        [record] = hub.hub.registry.workers
        assert record.state is WorkerState.READY
        await until(lambda: hub.hub.clients.open == 0)


async def test_a_client_that_half_closes_with_everything_full(
    authority: Authority, pair: Pair
) -> None:
    """TLS would wait for it to read, and the hub would hear of nothing."""
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        event = token("x" * MIB)
        worker.script(send(sse_head()), *[send(chunk(event))] * 100, stall())
        wire = await hub.open(CHAT, STREAM, receive_buffer=4096)
        request = await worker.received()
        await settled(lambda: request.sent)
        wire.half_close()
        async with asyncio.timeout(DEADLINE):
            await request.closed_by_peer.wait()
        await released(hub)


# --- A client that does not read --------------------------------------------------


async def test_an_unread_answer_stays_with_the_worker(
    authority: Authority, pair: Pair
) -> None:
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        event = token("x" * MIB)
        worker.script(
            send(sse_head() + chunk(role())),
            *[send(chunk(event))] * 24,
            send(chunk(finish() + done()) + last_chunk()),
            close(),
        )
        async with await hub.open(CHAT, STREAM, receive_buffer=256 << 10) as wire:
            assert await wire.read_event() == role()
            request = await worker.received()
            assert await settled(lambda: request.sent) < 24 * MIB
            for _ in range(24):
                assert await wire.read_event() == event
            assert await wire.read_events() == [finish(), done()]


async def test_a_client_that_stops_reading_is_dropped(
    authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with (
        ScriptedWorker() as worker,
        hub_of(authority, pair, worker, timeouts__write=0.2) as hub,
    ):
        event = token("x" * MIB)
        worker.script(send(sse_head()), *[send(chunk(event))] * 100, stall())
        wire = await hub.open(CHAT, STREAM, receive_buffer=4096)
        request = await worker.received()
        async with asyncio.timeout(DEADLINE):
            await request.closed_by_peer.wait()
        await released(hub)
        await until(lambda: hub.hub.clients.open == 0)
        assert not hub.hub.registry.workers[0].in_doubt
        ending = await wire.read_to_end()
        assert not ending.clean
        assert not notified(wire)
    [line] = [r for r in caplog.records if r.name == "gollama_proxy.access"]
    assert line.fields["error"] == "client_stalled"  # type: ignore[attr-defined]


# --- Certificates -----------------------------------------------------------------


async def presented(hub: RunningHub) -> bytes | None:
    async with await hub.wire() as wire:
        return tls_of(wire).getpeercert(binary_form=True)


async def test_a_renewed_certificate_serves_new_connections(
    authority: Authority,
    pair: Pair,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Automatically; running streams continue, and a broken pair changes nothing."""
    caplog.set_level("INFO")
    monkeypatch.setattr(watch, "PERIOD", 0.02)
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        first = await presented(hub)
        worker.script(
            send(sse_head() + chunk(role() + token("a"))),
            wait("renewed"),
            send(chunk(finish() + done()) + last_chunk()),
            close(),
        )
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_event() == role()
            assert await wire.read_event() == token("a")
            await asyncio.to_thread(replace, pair.key, "half a key")
            await until(lambda: "what was loaded before stays in use" in caplog.text)
            assert await presented(hub) == first
            authority.issue(file="127.0.0.1")  # over the old ones
            await until(lambda: "new connections get it" in caplog.text)
            second = await presented(hub)
            assert second != first
            worker.release("renewed")
            assert await wire.read_events() == [finish(), done()]
    broken = [r for r in caplog.records if "going on" in r.getMessage()]
    assert all(f"server.tls_key = {pair.key!r}: " in r.getMessage() for r in broken)
    assert len(broken) <= 2  # one for each thing that was written


async def test_another_certificate_serves_new_connections(
    authority: Authority, pair: Pair
) -> None:
    """Another file, in the settings; TLS itself is turned off by a restart only."""
    other = authority.issue(file="other")
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        worker.script(
            send(sse_head() + chunk(role() + token("a"))),
            wait("changed"),
            send(chunk(finish() + done()) + last_chunk()),
            close(),
        )
        first = await presented(hub)
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_event() == role()
            config = hub.hub.config
            server = structs.replace(
                config.server, tls_certificate=other.certificate, tls_key=other.key
            )
            changes = await hub.hub.apply(dataclasses.replace(config, server=server))
            assert [change.key for change in changes.settings] == [
                "server.tls_certificate",
                "server.tls_key",
            ]
            second = await presented(hub)
            assert second != first
            lost = structs.replace(server, tls_key="/nowhere")
            with pytest.raises(ConfigError, match=r"server\.tls_key = '/nowhere'"):
                await hub.hub.apply(dataclasses.replace(config, server=lost))
            off = structs.replace(server, tls_certificate="", tls_key="")
            changes = await hub.hub.apply(dataclasses.replace(config, server=off))
            assert len(changes.restart) == 2
            assert await presented(hub) == second
            worker.release("changed")
            assert await wire.read_events() == [token("a"), finish(), done()]


async def test_reload_does_not_wait_for_its_turn(
    authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with hub_of(authority, pair) as hub:
        await hub.hub.reload()
        await until(lambda: f"loaded {pair.certificate}" in caplog.text)


async def test_clients_without_a_certificate_are_refused(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    """A client with a certificate of another authority, too."""
    stranger = Authority(tmp_path / "stranger")
    authority_of_clients = Authority(tmp_path / "clients")
    alice = authority_of_clients.issue("alice")
    settings = {"server__tls_client_ca": authority_of_clients.file}
    async with ScriptedWorker() as worker:
        async with hub_of(authority, pair, worker, **settings) as hub:
            for wrong in (None, stranger.issue("alice"), pair):
                hub.trust = authority.client(wrong)
                with pytest.raises((ssl.SSLError, TruncatedError)):
                    await hub.get("/livez", None)
            hub.trust = authority.client(alice)
            assert (await hub.get("/livez", None)).status == 200
            assert (await hub.post(CHAT, WHOLE, None)).status == 401
            assert (await hub.post(CHAT, WHOLE)).status == 200
            assert hub.hub.clients.refused["handshake"] == 3
            await until(lambda: hub.hub.clients.open == 0)


# --- The end ----------------------------------------------------------------------


async def test_a_drain_lets_streams_end(authority: Authority, pair: Pair) -> None:
    async with ScriptedWorker() as worker, hub_of(authority, pair, worker) as hub:
        worker.script(
            send(sse_head() + chunk(role() + token("a"))),
            wait("go"),
            send(chunk(finish() + done()) + last_chunk()),
            close(),
        )
        idle = await hub.wire()
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_event() == role()
            assert await wire.read_event() == token("a")
            draining = asyncio.create_task(hub.hub.drain())
            await until(lambda: hub.hub.draining)
            await idle.get("/readyz")
            assert (await idle.read_response()).status == 503
            await idle.read_eof()
            with pytest.raises(ConnectionError):
                await hub.wire()
            worker.release("go")
            assert await wire.read_events() == [finish(), done()]
            await wire.read_eof()
            assert notified(wire)
            wire.close()
            idle.close()
            async with asyncio.timeout(DEADLINE):
                await draining


async def test_a_drain_cuts_visibly_at_its_limit(
    authority: Authority, pair: Pair
) -> None:
    async with ScriptedWorker() as worker:
        async with hub_of(authority, pair, worker, server__drain=0.1) as hub:
            worker.script(send(sse_head() + chunk(role() + token("a"))), stall())
            async with await hub.open(CHAT, STREAM) as wire:
                assert await wire.read_event() == role()
                assert await wire.read_event() == token("a")
                draining = asyncio.create_task(hub.hub.drain())
                ending = await wire.read_to_end()
                assert not ending.clean
                assert b"hub_draining" in ending.raw
                wire.close()
                async with asyncio.timeout(DEADLINE):
                    await draining
