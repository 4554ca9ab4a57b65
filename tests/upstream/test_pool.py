"""Connections are opened, kept for a moment, and reused if they may still work."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gollama_proxy.config import load as config
from gollama_proxy.config.tls import for_workers
from gollama_proxy.tasks import PUNCTUAL, spawn
from gollama_proxy.upstream import pool as pools
from gollama_proxy.upstream.connection import Connection, ConnectionState
from gollama_proxy.upstream.pool import PROBATION, RETRIAL, SPACING, ConnectionPool
from gollama_proxy.wire.errors import Code, WorkerError
from tests.fakes.clock import Clock
from tests.fakes.replies import head
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker, full_backlog

SHORT = head(200, [("Content-Length", "2")]) + b"{}"


def pool_of(
    url: str,
    clock: Clock | None = None,
    surplus: Callable[[], int] = int,
    **settings: Any,
) -> ConnectionPool:
    """Make the pool of one worker; settings as `upstream__idle=2`."""
    environ = {
        f"GOLLAMA_{k.replace('__', '_').upper()}": f"{settings[k]}" for k in settings
    }
    loaded = config.load(None, environ, {}, [url])
    [worker] = loaded.workers
    tls = for_workers([worker]).get(worker.name)
    return ConnectionPool(worker, loaded, clock or Clock(), tls, surplus)


class Ignore:
    """Receives an answer and ignores it."""

    def head_received(self, *_: object) -> None: ...
    def body_received(self, data: bytes) -> None: ...
    def chunk_received(self, chunk: bytes, head: bytes) -> bool:
        return False

    def answer_ended(self) -> None: ...
    def answer_lost(self, reason: str, *, malformed: bool) -> None: ...


async def dial_and_use(pool: ConnectionPool, answer: bytes = SHORT) -> Connection:
    """Return a connection that has carried one request, with this answer."""
    connection = await pool.dial()
    connection.start(Ignore())
    connection.data_received(answer)
    return connection


# --- Bursts -----------------------------------------------------------------------


async def test_connections_beyond_the_slots_are_spaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async with ScriptedWorker() as worker:
        surplus, clock = iter([0, -1, 1, 2, 1, 0, 1]), Clock()
        pool = pool_of(worker.url, clock, lambda: next(surplus))
        monkeypatch.setattr(pools.asyncio, "sleep", sleep)
        made = [await pool.dial() for _ in range(6)]
        clock.advance(10)
        made.append(await pool.dial())
        monkeypatch.undo()
        assert waits == pytest.approx([0, SPACING, 2 * SPACING, 0])
        for connection in made:
            connection.close()


# --- Reuse ------------------------------------------------------------------------


async def test_an_empty_pool_has_nothing() -> None:
    pool = pool_of("http://127.0.0.1:1")
    assert pool.reuse() is None
    pool.close()
    assert repr(pool) == "<ConnectionPool 127.0.0.1:1 idle=0>"


async def test_the_connection_used_last_is_reused_first() -> None:
    """It is the most likely to work; the others can be closed as they get old."""
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url, clock := Clock())
        given = [await dial_and_use(pool) for _ in range(3)]
        for connection in given:
            clock.advance(1)
            pool.give_back(connection)
        assert repr(pool) == f"<ConnectionPool {worker.name} idle=3>"
        assert [pool.reuse() for _ in range(4)] == [*reversed(given), None]
        for connection in given:
            connection.close()


async def test_a_connection_idle_for_too_long_is_not_reused() -> None:
    """llama-server closes a connection when it has been idle for 5.0 s."""
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url, clock := Clock(), upstream__keepalive=4)
        connection = await dial_and_use(pool)
        pool.give_back(connection)
        clock.advance(3.99)
        assert pool.reuse() is connection
        pool.give_back(connection)
        clock.advance(4)
        assert pool.reuse() is None
        pool.close_stale()
        assert connection.state is ConnectionState.CLOSED
        await worker.idle()


async def test_a_limit_of_zero_keeps_nothing() -> None:
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url, upstream__keepalive=0)
        pool.give_back(await dial_and_use(pool))
        assert pool.reuse() is None
        await worker.idle()


async def test_idle_connections_are_kept_as_long_as_other_settings_have_it() -> None:
    async with ScriptedWorker() as worker:
        clock = Clock()
        pool = pool_of(worker.url, clock)
        connection = await dial_and_use(pool)
        pool.give_back(connection)
        environ = {"GOLLAMA_UPSTREAM_KEEPALIVE": "0.5"}
        pool.reconfigure(pool.worker, config.load(None, environ, {}, [worker.url]))
        clock.advance(0.6)
        assert pool.reuse() is None
        pool.close()


async def test_a_connection_that_the_worker_has_closed_is_not_reused() -> None:
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url)
        for _ in range(3):
            pool.give_back(await dial_and_use(pool))
        await worker.down()
        await worker.up()
        pool.give_back(living := await dial_and_use(pool))
        assert [pool.reuse(), pool.reuse()] == [living, None]
        living.close()


async def test_a_connection_with_an_answer_without_a_request_is_not_reused() -> None:
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url)
        pool.give_back(connection := await dial_and_use(pool))
        connection.data_received(SHORT)
        assert pool.reuse() is None
        await worker.idle()


# --- Giving back ------------------------------------------------------------------


async def test_the_number_of_idle_connections_is_limited() -> None:
    """The others are closed: each costs llama-server a thread."""
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url, upstream__idle=2)
        given = [await dial_and_use(pool) for _ in range(3)]
        for connection in given:
            pool.give_back(connection)
        assert given[2].state is ConnectionState.CLOSED
        assert [pool.reuse(), pool.reuse(), pool.reuse()] == [given[1], given[0], None]
        for connection in given:
            connection.close()
        await worker.idle()


@pytest.mark.parametrize(
    "answer",
    [
        b"",  # none yet
        SHORT[:-1],
        SHORT + b"after the end",
        head(200, [("Connection", "close"), ("Content-Length", "0")]),
        b"garbage",
    ],
)
async def test_a_connection_that_cannot_be_reused_is_closed(answer: bytes) -> None:
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url)
        connection = await pool.dial()
        connection.start(Ignore())
        if answer:
            connection.data_received(answer)
        pool.give_back(connection)
        assert connection.state is ConnectionState.CLOSED
        assert pool.reuse() is None
        await worker.idle()


async def test_closing_the_pool_closes_idle_connections() -> None:
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url)
        for connection in [await dial_and_use(pool) for _ in range(3)]:
            pool.give_back(connection)
        pool.close()
        await worker.idle()
        assert pool.reuse() is None


async def test_a_connection_given_back_after_closing_is_closed() -> None:
    """After its worker was removed, nothing closes its stale connections."""
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url)
        connection = await dial_and_use(pool)
        pool.close()
        pool.give_back(connection)
        await worker.idle()


# --- Closing stale connections ----------------------------------------------------


async def test_stale_connections_are_closed_in_the_background() -> None:
    """Not by the request that finds 200 of them."""
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url, clock := Clock(), upstream__keepalive=4)
        given = [await dial_and_use(pool) for _ in range(4)]
        for connection in given[:3]:
            pool.give_back(connection)
        clock.advance(3)
        pool.give_back(given[3])
        pool.close_stale()
        assert [connection.state for connection in given] == [ConnectionState.IDLE] * 4
        clock.advance(1)
        pool.close_stale()
        assert [each.state for each in given[:3]] == [ConnectionState.CLOSED] * 3
        clock.advance(3)
        assert pool.reuse() is None
        assert given[3].state is ConnectionState.IDLE, (
            "the request has nothing to close"
        )
        pool.close_stale()
        await worker.idle()
    assert repr(pool) == f"<ConnectionPool {worker.name} idle=0>"


async def test_connections_that_the_worker_has_closed_are_forgotten() -> None:
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url)
        for _ in range(3):
            pool.give_back(await dial_and_use(pool))
        await worker.down()
        await worker.up()
        pool.give_back(living := await dial_and_use(pool))
        pool.close_stale()
        assert repr(pool) == f"<ConnectionPool {worker.name} idle=1>"
        assert pool.reuse() is living
        living.close()


# --- After event streams ----------------------------------------------------------


async def after_a_stream(pool: ConnectionPool) -> Connection:
    """Return a connection that was given back after an event stream."""
    connection = await dial_and_use(pool)
    pool.give_back(connection, streamed=True)
    return connection


async def taught(worker: ScriptedWorker, clock: Clock) -> ConnectionPool:
    """Return a pool that has learnt that its worker keeps connections."""
    pool = pool_of(worker.url, clock)
    await after_a_stream(pool)
    clock.advance(PROBATION)
    pool.close_stale()
    assert pool.keeps_after_streams
    return pool


async def test_a_worker_that_keeps_connections_after_streams_is_learnt() -> None:
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url, clock := Clock())
        first = await after_a_stream(pool)
        assert first.state is ConnectionState.IDLE
        assert pool.reuse() is None, "it is on probation"
        clock.advance(PROBATION - 0.01)
        pool.close_stale()
        assert not pool.keeps_after_streams
        clock.advance(0.01)
        pool.close_stale()
        assert pool.keeps_after_streams
        second = await after_a_stream(pool)
        assert pool.reuse() is second
        second.close()
        await worker.idle()


async def test_a_worker_that_closes_after_streams_is_learnt() -> None:
    """It is tested again later: another server may have replaced it."""
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url, clock := Clock())
        for _ in range(2):
            connection = await after_a_stream(pool)
            await worker.down()
            await worker.up()
            clock.advance(PROBATION)
            pool.close_stale()
            assert connection.state is ConnectionState.CLOSED
            assert not pool.keeps_after_streams
            assert pool.reuse() is None
            clock.advance(RETRIAL - PROBATION - 0.01)
            assert (await after_a_stream(pool)).state is ConnectionState.CLOSED
            clock.advance(0.01)


async def test_one_connection_at_a_time_is_on_probation() -> None:
    """It costs a llama-server a thread until it is closed."""
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url)
        given = [await after_a_stream(pool) for _ in range(3)]
        states = [connection.state for connection in given]
        assert states == [
            ConnectionState.IDLE,
            ConnectionState.CLOSED,
            ConnectionState.CLOSED,
        ]
        pool.close()
        await worker.idle()


async def test_what_was_learnt_ends_when_the_worker_closes_after_a_stream() -> None:
    """Such as when a llama-server has taken the place of another server."""
    async with ScriptedWorker() as worker:
        pool = await taught(worker, clock := Clock())
        await after_a_stream(pool)
        await worker.down()
        await worker.up()
        assert pool.reuse() is None
        assert not pool.keeps_after_streams
        assert (await after_a_stream(pool)).state is ConnectionState.CLOSED
        clock.advance(RETRIAL)
        assert (await after_a_stream(pool)).state is ConnectionState.IDLE
        pool.close()


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_idle_connection_that_ends_later_proves_nothing(
    streamed: bool,
) -> None:
    """The worker's own time limit may be shorter than the hub's."""
    async with ScriptedWorker() as worker:
        pool = await taught(worker, clock := Clock())
        pool.give_back(await dial_and_use(pool), streamed=streamed)
        await worker.down()
        clock.advance(PROBATION if streamed else 0)
        pool.close_stale()
        assert pool.keeps_after_streams


@pytest.mark.parametrize("answer", [b"", SHORT[:-1], SHORT + b"after the end"])
async def test_a_stream_that_ended_badly_leaves_no_connection(answer: bytes) -> None:
    async with ScriptedWorker() as worker:
        pool = await taught(worker, Clock())
        connection = await pool.dial()
        connection.start(Ignore())
        if answer:
            connection.data_received(answer)
        pool.give_back(connection, streamed=True)
        assert connection.state is ConnectionState.CLOSED
        assert pool.reuse() is None
        await worker.idle()


@pytest.mark.parametrize("setting", ["upstream__keepalive", "upstream__idle"])
async def test_where_nothing_is_kept_there_is_no_probation(setting: str) -> None:
    async with ScriptedWorker() as worker:
        await after_a_stream(pool_of(worker.url, **{setting: 0}))
        await worker.idle()


# --- Opening connections ----------------------------------------------------------


async def test_a_worker_that_refuses_is_unreachable() -> None:
    """The client gets the name of the worker; the reason is for the log."""
    async with ScriptedWorker(up=False) as worker:
        with pytest.raises(WorkerError) as info:
            await pool_of(worker.url).dial()
    error = info.value
    assert error.code is Code.WORKER_UNREACHABLE
    assert error.message == f"Worker {worker.name} cannot be reached."
    assert "refused" in error.detail


async def test_connecting_has_a_time_limit() -> None:
    with full_backlog() as url:
        pool = pool_of(url, timeouts__connect=0.05)
        with pytest.raises(WorkerError) as info:
            await pool.dial()
    error = info.value
    assert error.code is Code.WORKER_TIMEOUT
    assert error.message.endswith("did not accept a connection within 0.05 s.")


async def test_a_worker_is_not_blamed_for_an_event_loop_that_was_held_up() -> None:
    """The connection is made; the loop has not had the time to notice."""
    async with ScriptedWorker() as worker:
        pool = pool_of(worker.url, timeouts__connect=0.05)
        dialling = spawn(pool.dial(), "dial")
        await asyncio.sleep(0)
        time.sleep(0.1 + PUNCTUAL)  # noqa: ASYNC251
        connection = await dialling
        assert connection.state is ConnectionState.IDLE
        connection.close()


def names_resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Have every name resolve to these IPv4 addresses."""

    async def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
            for address in addresses
        ]

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", getaddrinfo)


async def test_the_addresses_of_a_name_are_tried_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names_resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
    async with ScriptedWorker() as worker:
        pool = pool_of(f"http://gpu.lan:{worker.port}")
        connection = await pool.dial()
        assert worker.connections == 1
        connection.close()
        await worker.down()
        with pytest.raises(WorkerError, match="cannot be reached") as info:
            await pool.dial()
    assert "refused" in info.value.detail


async def test_a_name_that_resolves_to_a_refused_address_is_not_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names_resolve_to(monkeypatch, "169.254.169.254")
    with pytest.raises(WorkerError) as info:
        await pool_of("http://gpu.lan").dial()
    assert info.value.code is Code.WORKER_UNREACHABLE
    assert info.value.message == "Worker gpu.lan cannot be reached."
    assert "which is a cloud's metadata service" in info.value.detail


async def test_connecting_can_be_cancelled() -> None:
    """A client may disconnect meanwhile; no connection remains."""
    with full_backlog() as url:
        dialling = asyncio.create_task(pool_of(url).dial())
        for _ in range(5):  # so that it has begun
            await asyncio.sleep(0)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling


# --- TLS --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key, as one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "worker")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    file = tmp_path_factory.mktemp("tls") / "worker.pem"
    file.write_bytes(
        signed.public_bytes(pem)
        + key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return file


@contextlib.asynccontextmanager
async def tls_worker(certificate: Path) -> AsyncIterator[int]:
    """Yield the port of a worker behind TLS that answers every request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(SHORT)
            await reader.read()
        writer.transport.abort()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


class Answered(Ignore):
    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def answer_ended(self) -> None:
        self.ended.set()


async def test_a_worker_behind_tls(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificate is checked against what the system trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with tls_worker(certificate) as port:
        connection = await pool_of(f"https://127.0.0.1:{port}").dial()
        connection.start(answered := Answered())
        connection.write(b"GET / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(DEADLINE):
            await answered.ended.wait()
        connection.close()


async def test_a_certificate_that_is_not_trusted_is_refused(certificate: Path) -> None:
    async with tls_worker(certificate) as port:
        with pytest.raises(WorkerError) as info:
            await pool_of(f"https://127.0.0.1:{port}").dial()
    assert info.value.code is Code.WORKER_UNREACHABLE
    assert info.value.detail == "TLS: certificate not accepted: self-signed certificate"


async def test_a_certificate_of_another_host_is_refused(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with tls_worker(certificate) as port:
        with pytest.raises(WorkerError) as info:
            await pool_of(f"https://localhost:{port}").dial()
    assert "mismatch" in info.value.detail


async def test_a_worker_without_tls_where_it_is_expected() -> None:
    async with ScriptedWorker() as worker:
        with pytest.raises(WorkerError) as info:
            await pool_of(worker.url.replace("http:", "https:")).dial()
        worker.violations.clear()  # a TLS handshake is not HTTP
    assert info.value.code is Code.WORKER_UNREACHABLE
