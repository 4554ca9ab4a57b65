"""A link that one hub made signs in at another one, once; the store knows no token."""

from __future__ import annotations

from pathlib import Path

import pytest

from gollama_proxy.control.links import LinksInStore
from gollama_proxy.control.page import LIFETIME, Links
from tests.behaviour.test_hubs_as_one import two_hubs
from tests.control.test_admin import call
from tests.fakes.valkey import ENGINES, connected, is_down, running_store


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_link_works_once_at_any_hub(tmp_path: Path, engine: str) -> None:
    async with running_store(tmp_path, engine) as server:
        async with connected(server.url) as one, connected(server.url) as two:
            here, there = Links(), Links()
            here.shared, there.shared = LinksInStore(one), LinksInStore(two)
            code = await here.issue("a.secret.token")
            [key] = await server.ask("KEYS", "gollama:link:*")
            kept = await server.ask("GET", key)
            assert b"secret" not in kept
            assert code.encode() not in key + kept
            assert 0 < await server.ask("TTL", key) <= LIFETIME
            assert await there.redeem(code) == "a.secret.token"
            assert await there.redeem(code) is None
            assert await here.redeem(code) is None
            assert repr(here.shared) == f"<LinksInStore {one!r}>"


async def test_what_was_changed_in_the_store_signs_in_nobody(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        links = Links()
        links.shared = LinksInStore(store)
        for forged in (b"", b"x", b"x" * 100):
            code = await links.issue("token")
            [key] = await server.ask("KEYS", "gollama:link:*")
            await server.ask("SET", key, forged)
            assert await links.redeem(code) is None


async def test_without_the_store_a_link_works_where_it_was_made(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        links = Links()
        links.shared = LinksInStore(store)
        await server.kill()
        await is_down(store)
        assert await links.redeem(await links.issue("token")) == "token"
        assert await links.redeem("unknown") is None


async def test_the_dashboard_of_another_hub_is_opened(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, two_hubs(server) as (one, two):
        link = (await call(one, "POST", "/admin/links")).json()
        answer = await two.post("/dashboard/sign-in", {"code": link["code"]}, None)
        assert answer.status == 200
        answer = await one.post("/dashboard/sign-in", {"code": link["code"]}, None)
        assert answer.status == 401
