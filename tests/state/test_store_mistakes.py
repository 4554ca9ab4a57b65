"""Stores that cannot be used: one line about what there is to mend, and no password."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gollama_proxy.config.load import load
from gollama_proxy.config.values import ConfigError
from gollama_proxy.machine import find_free_ports
from gollama_proxy.state.link import StoreDownError, StoreError
from gollama_proxy.state.store import COMMANDS, Mode, Store
from tests.fakes.authority import Authority
from tests.fakes.valkey import ENGINES, connected, is_up, running_store
from tests.fakes.waiting import until


async def mistake(url: str, prefix: str = "gollama") -> str:
    """Return the error with which the start of a hub ends."""
    with pytest.raises(StoreError) as caught:
        async with connected(url, prefix):
            pass
    assert not isinstance(caught.value, StoreDownError)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_user(url: str, user: str) -> str:
    return url.replace("unix://", f"unix://{user}@")


# --- Passwords and permissions ------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
async def test_passwords(tmp_path: Path, engine: str) -> None:
    secret = ("--requirepass", "hunter2")
    async with running_store(tmp_path, engine, *secret) as server:
        expected = "it requires a password, and state.url has none"
        assert await mistake(server.plain_url) == expected
        wrong = "it rejects the user or the password of state.url"
        assert await mistake(with_user(server.plain_url, ":hunter22")) == wrong
        assert await mistake(with_user(server.plain_url, "me:hunter2")) == wrong
        async with connected(with_user(server.plain_url, ":hunter2")) as store:
            assert store.mode is Mode.UP
            assert "hunter2" not in repr(store)


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_password_for_a_store_without_one(tmp_path: Path, engine: str) -> None:
    async with running_store(tmp_path, engine) as server:
        expected = "state.url has a password, and the store has none for this user"
        assert await mistake(with_user(server.plain_url, ":hunter2")) == expected


@pytest.mark.parametrize("engine", ENGINES)
async def test_the_least_permissions(tmp_path: Path, engine: str) -> None:
    allowed = " ".join(f"+{name}" for name in (*COMMANDS, "eval", "hello", "ping"))
    rules = f"on >hunter2 ~gollama:* &gollama:* {allowed}"
    async with running_store(tmp_path, engine) as server:
        url = with_user(server.plain_url, "me:hunter2")
        await server.ask("ACL", "SETUSER", "me", *rules.split())
        async with connected(url) as store:
            await store.listen(store.key("news"), lambda data: None)
            await store.publish(store.key("news"), "x")
        denied = "the user of state.url has no permission"
        assert (await mistake(url, "other")).startswith(f"{denied} (")
        await server.ask("ACL", "SETUSER", "me", "-zadd", "-hset")
        needed = "it needs all keys and channels that begin with state.prefix"
        assert await mistake(url) == f"{denied} for hset, zadd; {needed}"
        await server.ask("ACL", "SETUSER", "me", "-eval")
        assert (await mistake(url)).startswith(f"{denied} (")
        await server.ask("ACL", "SETUSER", "me", "+eval", "+zadd", "+hset")
        await server.ask("ACL", "SETUSER", "me", "resetchannels")
        assert await mistake(url) == f"{denied} for publish, subscribe; {needed}"


async def test_a_password_that_changes_takes_the_store_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_store(tmp_path) as server:
        await server.ask("CONFIG", "SET", "requirepass", "hunter2")
        async with connected(with_user(server.plain_url, ":hunter2")) as store:
            client = {"password": "hunter2"}
            await server.ask("CONFIG", "SET", "requirepass", "other", **client)
            await server.ask("CLIENT", "KILL", "TYPE", "normal", password="other")
            await until(lambda: "the store cannot be used" in caplog.text)
            with pytest.raises(StoreDownError, match="rejects the user or the pass"):
                await store.call("PING")
            await server.ask(
                "CONFIG", "SET", "requirepass", "hunter2", password="other"
            )
            await is_up(store)
            assert "hunter2" not in caplog.text
            assert caplog.text.count("the store cannot be used") == 1


# --- Servers of the wrong kind ------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_replica(tmp_path: Path, engine: str) -> None:
    options = ("--replicaof", "127.0.0.1 1")
    async with running_store(tmp_path, engine, *options) as server:
        text = await mistake(server.url)
        assert text.endswith("is a replica: state.url must lead to the primary")


async def test_a_primary_that_becomes_a_replica(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        await server.ask("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreDownError, match="it is a replica"):
            await store.call("SET", store.key("a"), 1)
        assert store.mode is not Mode.UP
        await server.ask("REPLICAOF", "NO", "ONE")
        await is_up(store)


async def test_a_server_of_a_cluster(tmp_path: Path) -> None:
    ports = map(str, find_free_ports(2))
    flags = ("--cluster-enabled", "--port", "--cluster-port")
    values = zip(flags, ("yes", *ports), strict=True)
    options = [word for pair in values for word in pair]
    async with running_store(tmp_path, "redis", *options) as server:
        text = await mistake(server.url)
        assert text.startswith("redis 7.")
        assert text.endswith(" runs in the mode cluster: must be standalone")


@contextlib.asynccontextmanager
async def impostor(folder: Path, answer: bytes) -> AsyncIterator[str]:
    """Run a server that gives one answer to whatever it is sent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.set_name("fake store")
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1000):
                writer.write(answer * data.count(b"*"))  # each command begins with it
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, folder / "fake.sock")
    async with server:
        yield f"unix://{folder}/fake.sock"


def hello(server: str, version: str) -> bytes:
    words = ("server", server, "version", version, "mode", "standalone")
    return b"*6\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(w), w.encode()) for w in words)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            hello("redis", "6.2.14"),
            "redis 6.2.14 is too old: must be valkey 7.2 or redis 7.0, or newer",
        ),
        (
            hello("valkey", "7.1.9"),
            "valkey 7.1.9 is too old: must be valkey 7.2 or redis 7.0, or newer",
        ),
        (hello("dragonfly", "1.0"), "'dragonfly 1.0' is neither Valkey nor Redis"),
        (
            b"-ERR unknown command 'HELLO'\r\n",
            "it is too old: must be valkey 7.2 or redis 7.0, or newer",
        ),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "it does not speak the protocol of Valkey and Redis",
        ),
    ],
)
async def test_servers_that_are_too_old_or_unknown(
    tmp_path: Path, answer: bytes, expected: str
) -> None:
    async with impostor(tmp_path, answer) as url:
        assert await mistake(url) == expected


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"-LOADING Valkey is loading the dataset in memory\r\n", "it is loading"),
        (b"-ERR max number of clients reached\r\n", "too many clients"),
        (b"-MASTERDOWN Link with MASTER is down\r\n", "it has lost its primary"),
    ],
)
async def test_servers_that_cannot_be_used_now(
    tmp_path: Path, answer: bytes, reason: str
) -> None:
    async with impostor(tmp_path, answer) as url, connected(url) as store:
        assert reason in store.reason
        with pytest.raises(StoreDownError, match=reason):
            await store.call("PING")


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_store_without_memory(tmp_path: Path, engine: str) -> None:
    async with running_store(tmp_path, engine) as server:
        async with connected(server.url) as store:
            await server.ask("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(StoreDownError, match="out of memory"):
                await store.call("SET", store.key("a"), 1)
            assert store.mode is not Mode.UP
            async with connected(server.url) as late:
                assert late.reason == "it is out of memory (maxmemory)"
                await server.ask("CONFIG", "SET", "maxmemory", "0")
                await is_up(late)
            await is_up(store)


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_store_that_may_drop_keys(
    tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    async with running_store(tmp_path, engine, *options) as server:
        async with connected(server.url) as store:
            assert "(maxmemory-policy allkeys-lru)" in caplog.text
            assert "set it to noeviction" in await store.examine()
            await server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
            assert "noeviction" not in await store.examine()


async def test_a_store_that_is_busy_with_a_script(tmp_path: Path) -> None:
    limit = ("--busy-reply-threshold", "1")
    async with running_store(tmp_path, "redis", *limit) as server:
        async with connected(server.url) as store:
            script = "while redis.call('GET', 'end') == false do end"
            slow = asyncio.create_task(
                server.ask("EVAL", script, 0), name="fake slow script"
            )

            async def refused() -> str:
                while True:
                    try:
                        await store.call("PING")
                    except StoreDownError as exc:
                        return str(exc)

            assert await refused() == "it is busy with a script"
            await server.ask("SCRIPT", "KILL")
            await asyncio.wait([slow])
            assert slow.exception() is not None
            await is_up(store)


# --- Keys of others -----------------------------------------------------------------


@pytest.mark.parametrize("command", [("LPUSH", "x"), ("SET", "x"), ("SADD", "x")])
async def test_the_epoch_is_a_key_of_another_program(
    tmp_path: Path, command: tuple[str, str]
) -> None:
    async with running_store(tmp_path) as server:
        await server.ask(command[0], "gollama:epoch", command[1])
        text = await mistake(server.url)
        assert "another program" in text
        assert "state.prefix" in text
        # Nothing was touched, and another prefix is free.
        assert await server.ask("KEYS", "*") == [b"gollama:epoch"]
        async with connected(server.url, "mine") as store:
            assert store.mode is Mode.UP


async def test_a_key_of_another_type_under_way(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        await server.ask("SET", "gollama:x", 1)
        with pytest.raises(StoreError, match="another program uses the same prefix"):
            await store.call("ZADD", store.key("x"), 1, "a")
        assert store.mode is Mode.UP


async def test_two_clusters_in_one_store(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as server,
        connected(server.url, "one") as one,
        connected(server.url, "two") as two,
    ):
        assert one.epoch != two.epoch
        got: list[bytes] = []
        await one.listen(one.key("news"), got.append)
        await two.publish(two.key("news"), "wrong")
        await one.publish(one.key("news"), "right")
        await until(lambda: got == [b"right"])
        assert sorted(await server.ask("KEYS", "*")) == [b"one:epoch", b"two:epoch"]


# --- TLS ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def tls_store(
    folder: Path, authority: Authority, *, clients: bool = False, expired: bool = False
) -> AsyncIterator[str]:
    """Run a server that speaks TLS alone; yield the URL without its options."""
    pair = authority.issue("127.0.0.1", expired=expired)
    [port] = find_free_ports(1)
    options = {
        "--tls-port": str(port),
        "--tls-cert-file": pair.certificate,
        "--tls-key-file": pair.key,
        "--tls-ca-cert-file": authority.file,
        "--tls-auth-clients": "yes" if clients else "no",
    }
    words = [word for pair in options.items() for word in pair]
    async with running_store(folder, "redis", *words):
        yield f"rediss://127.0.0.1:{port}"


async def test_tls(tmp_path: Path, authority: Authority) -> None:
    async with tls_store(tmp_path, authority) as url:
        trusted = f"{url}?ssl_ca_certs={authority.file}"
        assert load(environ={"GOLLAMA_STATE_URL": trusted}).state.url == trusted
        async with connected(trusted) as store:
            assert await store.call("PING") == b"PONG"
        text = await mistake(url)
        assert text.startswith("TLS: certificate not accepted: ")
        wrong_name = trusted.replace("127.0.0.1", "localhost")
        assert "certificate not accepted: Hostname" in await mistake(wrong_name)
        async with connected(trusted.replace("rediss", "redis").partition("?")[0]) as s:
            assert s.mode is Mode.DOWN


async def test_a_certificate_that_has_expired(
    tmp_path: Path, authority: Authority
) -> None:
    async with tls_store(tmp_path, authority, expired=True) as url:
        text = await mistake(f"{url}?ssl_ca_certs={authority.file}")
        assert text == "TLS: certificate not accepted: certificate has expired"


async def test_a_store_that_requires_a_certificate(
    tmp_path: Path, authority: Authority
) -> None:
    mine = authority.issue("hub")
    async with tls_store(tmp_path, authority, clients=True) as url:
        trusted = f"{url}?ssl_ca_certs={authority.file}"
        pair = f"&ssl_certfile={mine.certificate}&ssl_keyfile={mine.key}"
        async with connected(trusted + pair) as store:
            assert store.mode is Mode.UP
        try:  # the end of the connection may arrive before the alert
            async with connected(trusted) as store:
                reason = store.reason
        except StoreError as exc:
            reason = str(exc)
        assert reason.endswith(
            ("certificate required", "require a certificate (ssl_certfile)?")
        )


async def test_tls_to_a_store_without_it(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gollama_proxy.state.link.CONNECT", 0.1)
    [port] = find_free_ports(1)
    async with running_store(tmp_path, "valkey", "--port", str(port)):
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={authority.file}"
        async with connected(url) as store:  # it waits for the end of a line
            expected = "no answer within 0.1 s; is it a port for TLS?"
            assert store.reason == expected


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    for options, expected in (
        ("ssl_ca_certs=/missing", "ssl_ca_certs = '/missing': cannot be read: No such"),
        ("ssl_certfile=/missing", "ssl_certfile = '/missing': cannot be read: No such"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(environ={"GOLLAMA_STATE_URL": f"rediss://a?{options}"})
        assert str(caught.value).startswith(f"state.url: the option {expected}")


# --- Stores that are not there ------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://127.0.0.1:1", "Connection refused"),
        ("redis://no-such-host.invalid", "its host name has no address"),
        ("unix:///missing/socket", "No such file or directory"),
    ],
)
async def test_a_store_that_cannot_be_reached(
    url: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(url) as store:
        assert (store.mode, store.reason) == (Mode.DOWN, reason)
        expected = f"the store cannot be reached: {reason}; going on without it"
        assert expected in caplog.text


async def test_a_network_that_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gollama_proxy.state.link.CONNECT", 0.05)
    async with impostor(tmp_path, b"") as url, connected(url) as store:
        assert store.reason == "no answer within 0.05 s"


def test_the_steps_of_the_mode_are_a_table() -> None:
    store = Store("redis://a")
    assert repr(store) == "<Store redis://a down>"
