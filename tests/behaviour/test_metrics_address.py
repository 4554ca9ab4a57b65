"""Metrics on their own addresses, apart from clients."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from gollama_proxy.config import load as config
from gollama_proxy.config.values import ConfigError
from tests.behaviour.test_live_settings import change
from tests.fakes.authority import Authority
from tests.fakes.client import Response, TlsWire, Wire
from tests.fakes.hub import mint, running_hub
from tests.fakes.page import parse, value
from tests.fakes.worker import ScriptedWorker

# A free port, and another one: addresses are compared as they are spelled.
ANYWHERE, ELSEWHERE = "127.0.0.1:0", "127.0.0.1:00"


def scraper() -> str:
    return mint(sub="prometheus", scope="metrics")


def place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


async def fetch(
    url: str, token: str | None = None, method: str = "GET", path: str = "/metrics"
) -> Response:
    async with await Wire.connect(*place(url)) as wire:
        await wire.get(path, token, method=method)
        return await wire.read_response()


def listening() -> set[tuple[str, int]]:
    """Return the addresses that this process listens on."""
    connections = psutil.Process().net_connections("tcp")
    return {tuple(each.laddr) for each in connections if each.status == "LISTEN"}


async def test_metrics_are_served_there_and_nowhere_else() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, metrics__listen=[ANYWHERE]) as hub,
    ):
        [url] = hub.hub.scrapes.urls
        response = await fetch(url, scraper())
        assert response.status == 200
        assert value(parse(response.body), "gollama_worker_up", worker=worker.name) == 1
        elsewhere = await hub.get("/metrics")
        assert elsewhere.status == 404
        assert "metrics.listen" in elsewhere.json()["error"]["message"]
        for path in ("/", "/v1/models", "/livez", "/metrics/"):
            response = await fetch(url, scraper(), path=path)
            assert response.status == 404
            assert response.json()["error"]["code"] == "unknown_url"
        head = await fetch(url, scraper(), "HEAD")
        assert (head.status, head.body) == (200, b"")
        response = await fetch(url, scraper(), "POST")
        assert response.status == 405
        assert response.header("Allow") == "GET"


async def test_the_rule_for_tokens_is_the_same() -> None:
    async with running_hub(metrics__listen=[ANYWHERE]) as hub:
        [url] = hub.hub.scrapes.urls
        assert (await fetch(url)).status == 401
        assert (await fetch(url, mint(sub="alice"))).status == 403
        assert (await fetch(url, scraper())).status == 200
        await change(hub, "metrics", open=True)
        assert (await fetch(url)).status == 200


async def test_scrapes_are_counted_and_logged_as_on_the_main_address() -> None:
    async with running_hub(metrics__listen=[ANYWHERE]) as hub:
        [url] = hub.hub.scrapes.urls
        await fetch(url)
        await fetch(url, scraper())
        samples = parse((await fetch(url, scraper())).body)
        where = {"route": "/metrics", "model": "", "worker": ""}
        for status in ("200", "401"):
            found = value(samples, "gollama_requests_total", status=status, **where)
            assert found == 1


async def test_there_may_be_several_addresses_also_of_ipv6() -> None:
    listen = [ANYWHERE, "[::1]:0"]
    async with running_hub(metrics__listen=listen, metrics__open=True) as hub:
        hosts = [place(url)[0] for url in hub.hub.scrapes.urls]
        assert hosts == ["127.0.0.1", "::1"]
        for url in hub.hub.scrapes.urls:
            reader, writer = await asyncio.open_connection(*place(url))
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: hub\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            writer.close()


async def test_a_connection_carries_several_scrapes() -> None:
    async with running_hub(metrics__listen=[ANYWHERE], metrics__open=True) as hub:
        [url] = hub.hub.scrapes.urls
        async with await Wire.connect(*place(url)) as wire:
            for _ in range(3):
                await wire.get("/metrics")
                assert (await wire.read_response()).status == 200


async def test_metrics_can_be_scraped_when_clients_have_all_connections() -> None:
    async with running_hub(
        metrics__listen=[ANYWHERE], metrics__open=True, limits__connections=1
    ) as hub:
        await hub.wire()
        [url] = hub.hub.scrapes.urls
        samples = parse((await fetch(url)).body)
        assert value(samples, "gollama_connections") == 1


async def test_an_address_that_is_taken_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught:
            async with running_hub(metrics__listen=[ANYWHERE, address]):
                pass
    assert str(caught.value) == (
        f"metrics.listen = {address!r}: already in use; must be a free address of this "
        "machine"
    )


async def test_an_address_of_another_machine_is_an_error_that_names_it() -> None:
    address = "192.0.2.1:9464"  # RFC 5737: of no machine
    with pytest.raises(ConfigError) as caught:
        async with running_hub(metrics__listen=[address]):
            pass
    assert str(caught.value) == (
        f"metrics.listen = {address!r}: not there; must be a free address of this "
        "machine"
    )


async def test_a_reload_moves_metrics_without_a_restart() -> None:
    async with running_hub(metrics__open=True) as hub:
        assert (await hub.get("/metrics")).status == 200
        await change(hub, "metrics", listen=(ANYWHERE,))
        [url] = hub.hub.scrapes.urls
        assert (await fetch(url)).status == 200
        assert (await hub.get("/metrics")).status == 404
        await change(hub, "metrics", listen=(ANYWHERE, ELSEWHERE))
        first, second = hub.hub.scrapes.urls
        assert first == url
        assert (await fetch(second)).status == 200
        assert {place(first), place(second)} <= listening()
        await change(hub, "metrics", listen=())
        assert listening().isdisjoint({place(first), place(second)})
        assert (await hub.get("/metrics")).status == 200


async def test_a_reload_to_an_address_that_is_taken_changes_nothing() -> None:
    async with running_hub(metrics__listen=[ANYWHERE], metrics__open=True) as hub:
        before, urls = hub.hub.config, hub.hub.scrapes.urls
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            listened = listening()
            with pytest.raises(ConfigError, match="already in use"):
                await change(hub, "metrics", open=False, listen=(ELSEWHERE, address))
            assert listening() == listened
        assert hub.hub.config is before
        assert hub.hub.scrapes.urls == urls
        assert (await fetch(urls[0])).status == 200


async def test_a_reload_can_narrow_an_address_and_widen_it_again() -> None:
    # The first one is the wide one: its port is free on all addresses.
    async with running_hub(metrics__listen=["0.0.0.0:0"], metrics__open=True) as hub:
        _, port = place(hub.hub.scrapes.urls[0])
        for host, other in (("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")):
            await change(hub, "metrics", listen=(f"{host}:{port}",))
            assert (host, port) in listening()
            assert (other, port) not in listening()
            assert (await fetch(f"http://127.0.0.1:{port}")).status == 200


async def test_an_address_is_listened_on_again_if_the_next_one_is_taken() -> None:
    async with running_hub(metrics__listen=[ANYWHERE], metrics__open=True) as hub:
        [url] = hub.hub.scrapes.urls
        wider = f"0.0.0.0:{place(url)[1]}"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            listened = listening()
            with pytest.raises(ConfigError, match="already in use"):
                await change(hub, "metrics", listen=(wider, address))
            assert listening() == listened
        assert hub.hub.scrapes.urls == [url]
        assert (await fetch(url)).status == 200


async def test_the_certificate_is_that_of_the_hub(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("127.0.0.1")
    async with running_hub(
        server__tls_certificate=certificate,
        server__tls_key=key,
        metrics__listen=[ANYWHERE],
        metrics__open=True,
        trust=authority.client(),
    ) as hub:
        [url] = hub.hub.scrapes.urls
        assert url.startswith("https://")
        plain = await TlsWire.connect(*place(url))
        async with await plain.shake_hands(authority.client(), "127.0.0.1") as wire:
            await wire.get("/metrics")
            assert (await wire.read_response()).status == 200


async def test_a_socket_that_was_inherited_serves_metrics() -> None:
    async with running_hub(metrics__open=True) as first:
        inherited = socket.create_server(("127.0.0.1", 0))
        inherited.setblocking(False)
        url = f"http://127.0.0.1:{inherited.getsockname()[1]}"
        scrapes = first.hub.scrapes
        await scrapes.open(first.hub.config, None, [inherited])
        assert scrapes.urls == [f"{url}/metrics"]
        await change(first, "timeouts", write=30.0)  # a reload keeps it
        assert (await fetch(url)).status == 200


@pytest.mark.parametrize(
    "address",
    [
        "9464",
        "::1:9464",
        "127.0.0.1",
        "127.0.0.1:",
        ":9464",
        "127.0.0.1:65536",
        "[x]:1",
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(listen=address)
    text = str(caught.value)
    assert text.startswith("metrics.listen")
    assert "must be a list of addresses such as 127.0.0.1:9464 or [::1]:9464" in text


def test_an_open_address_without_authentication_is_refused() -> None:
    secret: dict[str, Any] = {"GOLLAMA_AUTH_MODE": "off"}
    with pytest.raises(ConfigError, match=r"metrics\.listen = '0\.0\.0\.0:9464'"):
        load(listen="0.0.0.0:9464", **secret)
    assert load(listen="127.0.0.1:9464 [::1]:0", **secret).metrics.listen
    free = {**secret, "GOLLAMA_METRICS_OPEN": "true"}
    assert load(listen="0.0.0.0:9464", **free).metrics.listen


async def test_subjects_beyond_the_setting_share_a_label() -> None:
    async with (
        ScriptedWorker("qwen") as worker,
        running_hub(worker, metrics__subjects=1, metrics__open=True) as hub,
    ):
        for name in ("alice", "bob", "carol"):
            await hub.post("/v1/embeddings", {"input": "a"}, hub.token(sub=name))
        samples = parse((await hub.get("/metrics")).body)
        used = "gollama_usage_requests_total"
        assert value(samples, used, subject="alice", model="qwen") == 1
        assert value(samples, used, subject="other", model="qwen") == 2


def load(*, listen: str, **variables: str) -> config.Config:
    environ = {"GOLLAMA_JWT_SECRET": "s" * 32, "GOLLAMA_METRICS_LISTEN": listen}
    return config.load(None, {**environ, **variables}, {}, [])
