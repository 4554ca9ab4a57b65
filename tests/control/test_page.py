"""The dashboard's page: its headers, and what it learns about the token."""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
from importlib import resources

import pytest

from gollama_proxy import __version__
from gollama_proxy.control.page import Links, quality
from tests.fakes.client import Response
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.worker import ScriptedWorker

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
HTML = ("Accept", BROWSER)
LOCAL = ("Host", "localhost:8000")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'"
)
FILES = resources.files("gollama_proxy.control").joinpath("dashboard")


def assert_protected(answer: Response) -> None:
    """Check the headers that every answer of the page has."""
    assert answer.header("content-security-policy") == POLICY
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("cross-origin-opener-policy") == "same-origin"
    assert answer.header("cross-origin-resource-policy") == "same-origin"


# --- The root ---------------------------------------------------------------------


async def test_a_browser_gets_the_page() -> None:
    async with running_hub() as hub:
        answer = await hub.get("/", None, headers=[HTML])
        assert answer.status == 200
        assert answer.header("content-type") == "text/html; charset=utf-8"
        assert answer.body == FILES.joinpath("index.html").read_bytes()
        assert answer.header("cache-control") == "no-cache"
        assert answer.header("vary") == "Accept, Accept-Encoding"
        assert_protected(answer)


async def test_dashboard_without_a_file_leads_to_the_page() -> None:
    """By a relative address, which is right behind a proxy with a prefix as well."""
    async with running_hub() as hub:
        answer = await hub.get("/dashboard", None, headers=[HTML])
        assert (answer.status, answer.header("location")) == (307, "./")
        assert answer.body == b""
        assert_protected(answer)


async def test_any_other_program_gets_json() -> None:
    async with running_hub() as hub:
        for accepted in ("*/*", "application/json", "text/html;q=0.5, */*"):
            answer = await hub.get("/", None, headers=[("Accept", accepted)])
            assert answer.status == 200
            assert answer.header("content-type") == "application/json"
            assert answer.header("vary") == "Accept"
            assert_protected(answer)
            shown = answer.json()
            assert (shown["name"], shown["version"]) == ("gollama-proxy", __version__)
            assert (shown["auth"], shown["links"]["dashboard"]) == ("jwt", "/")
        plain = await hub.get("/", None)
        assert plain.json() == shown


async def test_the_base_url_has_the_name_that_the_client_used() -> None:
    async with running_hub() as hub:
        answer = await hub.get("/", None, headers=[("Host", "hub.lan:8000")])
        assert answer.json()["base_url"] == "http://hub.lan:8000/v1"
        for given, scheme in (("https", "https"), ("http", "http"), ("x", "http")):
            named = [("Host", "hub.lan"), ("X-Forwarded-Proto", given)]
            answer = await hub.get("/", None, headers=named)
            assert answer.json()["base_url"] == f"{scheme}://hub.lan/v1"
        async with await hub.wire() as wire:
            await wire.send(b"GET / HTTP/1.0\r\n\r\n")
            answer = await wire.read_response()
        assert answer.json()["base_url"] == f"{hub.hub.url}/v1"


async def test_a_head_request_gets_the_head_alone() -> None:
    async with running_hub() as hub, await hub.wire() as wire:
        await wire.get("/", headers=[HTML], method="HEAD")
        answer = await wire.read_response()
        assert (answer.status, answer.body) == (200, b"")
        size = len(FILES.joinpath("index.html").read_bytes())
        assert answer.header("content-length") == str(size)


async def test_the_root_takes_no_other_method() -> None:
    async with running_hub() as hub:
        assert (await hub.post("/", {})).status == 405


@pytest.mark.parametrize(
    ("accepted", "wanted", "expected"),
    [
        (BROWSER, "text/html", 1.0),
        (BROWSER, "application/json", 0.8),
        ("", "text/html", 0.0),
        ("*/*", "text/html", 1.0),
        ("text/*;q=0.3, */*;q=0.7", "text/html", 0.3),
        ("text/html; level=1; q=0.4", "text/html", 0.4),
        ("TEXT/HTML", "text/html", 1.0),
        ("text/html;q=0", "text/html", 0.0),
        ("text/html;q=2", "text/html", 0.0),
        ("text/html;q=nan", "text/html", 0.0),
        ("gzip, br", "gzip", 1.0),
        ("gzip;q=0, *", "gzip", 0.0),
        ("*", "gzip", 1.0),
        ("identity", "gzip", 0.0),
    ],
)
def test_the_most_specific_range_decides(
    accepted: str, wanted: str, expected: float
) -> None:
    assert quality(accepted, wanted) == expected


# --- Files ------------------------------------------------------------------------


async def test_each_file_of_the_page_is_served() -> None:
    names = [each.name for each in FILES.iterdir() if each.name != "index.html"]
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
    async with running_hub() as hub:
        for name in names:
            answer = await hub.get(f"/dashboard/{name}", None)
            assert answer.status == 200
            assert answer.body == FILES.joinpath(name).read_bytes()
            kind = kinds.get(name.rpartition(".")[2])
            assert kind in (None, answer.header("content-type"))
            assert answer.header("cache-control") == "no-cache"
            assert_protected(answer)


async def test_what_the_page_names_is_there_and_relative() -> None:
    page = FILES.joinpath("index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert named
    async with running_hub() as hub:
        for each in named:
            assert not each.startswith(("/", "http:", "https:"))
            if not each.startswith(("data:", "#")):
                assert (await hub.get(f"/{each}", None)).status == 200


async def test_a_file_that_has_not_changed_is_not_sent_again() -> None:
    async with running_hub() as hub:
        for path, accepted in (("/", BROWSER), ("/dashboard/app.js", "*/*")):
            fields = [("Accept", accepted)]
            tag = (await hub.get(path, None, headers=fields)).header("etag")
            assert tag is not None
            for known in (tag, tag.removeprefix("W/"), f'"x", {tag}', "*"):
                condition = ("If-None-Match", known)
                answer = await hub.get(path, None, headers=[*fields, condition])
                assert (answer.status, answer.body) == (304, b"")
                assert answer.header("etag") == tag
                assert answer.header("content-length") is None
            condition = ("If-None-Match", 'W/"other"')
            answer = await hub.get(path, None, headers=[*fields, condition])
            assert answer.status == 200


async def test_a_file_is_compressed_for_those_that_accept_it() -> None:
    async with running_hub() as hub:
        whole = await hub.get("/", None, headers=[HTML])
        accepted = ("Accept-Encoding", "br;q=1.0, gzip;q=0.8")
        answer = await hub.get("/", None, headers=[HTML, accepted])
        assert answer.header("content-encoding") == "gzip"
        assert answer.header("etag") == whole.header("etag")
        assert gzip.decompress(answer.body) == whole.body
        assert len(answer.body) < len(whole.body)
        refused = ("Accept-Encoding", "gzip;q=0")
        answer = await hub.get("/", None, headers=[HTML, refused])
        assert answer.header("content-encoding") is None


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/none.js",
        "/dashboard/index.html",
        "/dashboard/",
        "/dashboard/..",
        "/dashboard/../openapi.json",
        "/dashboard/..%2fopenapi.json",
        "/dashboard/..%5copenapi.json",
        "/dashboard/%2e%2e/page.py",
        "/dashboard/%2fetc%2fpasswd",
        "/dashboard/app.js%00",
        "/dashboard/app.js/",
        "/dashboard/APP.JS",
        "/dashboard//app.js",
    ],
)
async def test_there_is_nothing_but_the_files(path: str) -> None:
    async with running_hub() as hub:
        answer = await hub.get(path, None)
        assert answer.status == 404
        assert "text/html" not in (answer.header("content-type") or "")


# --- The session ------------------------------------------------------------------


async def session_of(hub: RunningHub, token: str | None) -> Response:
    return await hub.get("/dashboard/session", token, headers=[LOCAL])


async def test_a_session_shows_what_the_token_allows() -> None:
    async with running_hub() as hub:
        end = int(time.time()) + 3600
        token = hub.token("ann", scope="monitor admin", models=["q*"], exp=end)
        answer = await session_of(hub, token)
        assert answer.header("cache-control") == "no-store"
        shown = answer.json()
        assert (shown["subject"], shown["scopes"]) == ("ann", ["admin", "monitor"])
        assert (shown["models"], shown["expires"]) == (["q*"], end)
        assert (shown["auth"], shown["version"]) == ("jwt", __version__)
        assert shown["largest_body"] == hub.hub.config.limits.body
        assert shown["started"] > 1.7e9
        assert token not in json.dumps(shown)


async def test_a_session_needs_a_valid_token() -> None:
    async with running_hub() as hub:
        for token in (None, "x", hub.token(exp=1)):
            answer = await session_of(hub, token)
            assert answer.status == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_without_authentication_the_machine_itself_may_do_everything() -> None:
    async with running_hub(auth__mode="off") as hub:
        shown = (await session_of(hub, None)).json()
        assert (shown["subject"], shown["auth"]) == ("anonymous", "off")
        assert (shown["models"], shown["expires"]) == (None, None)
        assert "admin" in shown["scopes"]
        through = ("X-Forwarded-For", "192.0.2.7")
        answer = await hub.get("/dashboard/session", None, headers=[LOCAL, through])
        assert answer.json()["scopes"] == []


# --- Links that sign in -----------------------------------------------------------


async def make_link(hub: RunningHub, token: str) -> str:
    """Make a link with a token; return its code."""
    answer = await hub.post("/admin/links", {}, token)
    assert answer.status == 201, answer
    link = answer.json()
    assert link == {
        "code": link["code"],
        "path": f"/#sign-in={link['code']}",
        "expires_in": 300,
    }
    code: str = link["code"]
    return code


async def sign_in(hub: RunningHub, code: object) -> Response:
    return await hub.post("/dashboard/sign-in", {"code": code}, None)


def assert_refused(answer: Response) -> None:
    assert answer.status == 401
    error = answer.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert "gollama-proxy dashboard" in error["message"]


async def test_a_link_signs_in_once() -> None:
    async with running_hub() as hub:
        token = hub.token("root", scope="monitor")
        code = await make_link(hub, token)
        assert re.fullmatch(r"[\w-]{32}", code)
        answer = await sign_in(hub, code)
        assert (answer.status, answer.json()) == (200, {"token": token})
        assert answer.header("cache-control") == "no-store"
        assert_refused(await sign_in(hub, code))


async def test_a_wrong_code_does_not_sign_in() -> None:
    async with running_hub() as hub:
        await make_link(hub, hub.token("root", scope="admin"))
        for code in ("", "x", "\u00e4", hub.token()):
            assert_refused(await sign_in(hub, code))


async def test_a_link_expires() -> None:
    clock = Clock()
    async with running_hub(clock=clock) as hub:
        token = hub.token("root", scope="admin")
        old = await make_link(hub, token)
        clock.advance(299.0)
        new = await make_link(hub, token)
        clock.advance(1.0)
        assert_refused(await sign_in(hub, old))
        assert (await sign_in(hub, new)).status == 200


async def test_a_link_ends_with_its_token() -> None:
    async with running_hub() as hub:
        code = await make_link(hub, hub.token("root", scope="admin"))
        await hub.hub.revoke("sub", "root")
        assert_refused(await sign_in(hub, code))


def test_of_many_links_the_oldest_give_way() -> None:
    links = Links(Clock())
    codes = [links.make(f"token {number}") for number in range(101)]
    assert links.use(codes[0]) is None
    assert links.use(codes[1]) == "token 1"
    assert links.use(codes[100]) == "token 100"
    assert repr(links) == "<Links 98>"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"code": 7}, 400),
        ({"code": "x", "more": 1}, 400),
        ([], 400),
        (b"{", 400),
        ({"code": "x" * 2000}, 413),
    ],
)
async def test_a_wrong_body_does_not_sign_in(body: object, status: int) -> None:
    async with running_hub() as hub:
        answer = await hub.post("/dashboard/sign-in", body, None)
        assert answer.status == status


async def test_a_page_of_another_site_cannot_sign_in() -> None:
    async with running_hub() as hub, await hub.wire() as wire:
        kind = ("Content-Type", "text/plain")  # which needs no preflight
        await wire.post("/dashboard/sign-in", {"code": "x"}, headers=[kind])
        assert (await wire.read_response()).status == 415


async def test_without_authentication_no_link_is_needed() -> None:
    async with running_hub(auth__mode="off") as hub, await hub.wire() as wire:
        await wire.post("/admin/links", {}, headers=[LOCAL])
        answer = await wire.read_response()
        expected = {"code": None, "path": "/", "expires_in": None}
        assert (answer.status, answer.json()) == (200, expected)


async def test_links_are_audited_without_their_codes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with running_hub() as hub:
        token = hub.token("root", scope="admin")
        code = await make_link(hub, token)
        await sign_in(hub, code)
    lines = [each.__dict__ for each in caplog.records if "audit" in each.name]
    found = [line["fields"] for line in lines]
    assert [(each["subject"], each["action"]) for each in found] == [
        ("root", "make link"),
        ("root", "use link"),
    ]
    logged = repr([each.__dict__ for each in caplog.records])
    assert code not in logged
    assert token not in logged


async def test_what_a_monitor_may_do_elsewhere() -> None:
    """Its scope is for operators' paths alone, and leaves its other rights alone."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        token = hub.token("eve", scope="monitor")
        for path, status in (
            ("/", 200),
            ("/dashboard/app.js", 200),
            ("/dashboard/session", 200),
            ("/v1/models", 200),
            ("/v1/usage", 200),
            ("/metrics", 403),
        ):
            assert (await hub.get(path, token)).status == status, path
        async with await hub.wire() as wire:
            await wire.post("/agent/workers/x", {}, token, method="PUT")
            assert (await wire.read_response()).status == 403
