"""The result of a health check: ready, loading or failed, and what is served."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from gollama_proxy.config import load as config
from gollama_proxy.config import settings
from gollama_proxy.config.settings import Health, WorkerConfig
from gollama_proxy.config.tls import for_workers
from gollama_proxy.upstream import probe
from gollama_proxy.upstream.pool import Target
from gollama_proxy.upstream.probe import (
    MAX_ANSWER,
    Finding,
)
from gollama_proxy.wire.description import MOST_MODELS, Check, Description, Model
from tests.fakes.asks import CHAT
from tests.fakes.replies import error_reply, head, json_reply, not_found
from tests.fakes.script import Script, answer, close, flood, reset, send, stall
from tests.fakes.worker import ScriptedWorker

HEALTH = Health(timeout=5.0)


def configured(url: str, key: str = "") -> WorkerConfig:
    worker = config.load(None, {}, {}, [url]).workers[0]
    return WorkerConfig(worker.url, worker.origin, worker.name, key)


def target_of(url: str, key: str = "") -> Target:
    worker = configured(url, key)
    return Target(worker, for_workers([worker]).get(worker.name))


async def ping(
    worker: ScriptedWorker, key: str = "", *, timeout: float = 5.0
) -> Finding:
    return await probe.ping(target_of(worker.url, key), Health(timeout=timeout))


async def test_a_good_worker_is_described_completely() -> None:
    async with ScriptedWorker("a", "b", slots=3, n_ctx=512, build="b1-ab") as worker:
        finding = await ping(worker)
        asked = [request.target for request in worker.control]
    models = tuple(Model(name, 512, inputs=()) for name in "ab")
    described = Description(models, 3, 512, "b1-ab")
    assert finding == Finding(Check.OK, "ok", described)
    assert asked == ["/health", "/v1/models", "/props"], "and nothing else"


async def test_nothing_is_kept_between_two_requests() -> None:
    """An idle connection costs llama-server a thread."""
    async with ScriptedWorker() as worker:
        cookie = [("Set-Cookie", "a=b"), ("Content-Length", "0")]
        worker.on("/health", send(head(200, cookie)))
        for _ in range(2):
            assert (await ping(worker)).check is Check.OK
        assert worker.connections == len(worker.control) == 6
        for request in worker.control:
            assert request.values("connection") == ["close"]
            assert not request.values("cookie")


async def test_a_name_that_resolves_to_a_refused_address_is_not_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", getaddrinfo)
    named = target_of("http://gpu.lan", "sk-1")
    finding = await probe.ping(named, HEALTH)
    assert await probe.prove(named, "a", 1.0) is False
    assert finding.check is Check.FAILED
    assert finding.reason == (
        "gpu.lan resolves to 169.254.169.254, which is a cloud's metadata service"
    )


@pytest.mark.parametrize(("key", "sent"), [("", []), ("sk-1", ["Bearer sk-1"])])
async def test_the_workers_key_is_sent_with_every_request(
    key: str, sent: list[str]
) -> None:
    async with ScriptedWorker() as worker:
        await ping(worker, key)
        assert [request.values("authorization") for request in worker.control] == [
            sent
        ] * 3


async def test_a_worker_behind_a_prefix() -> None:
    async with ScriptedWorker("a") as worker:
        worker.on("/llama/v1/models", *answer({"data": [{"id": "b"}]}))
        finding = await probe.ping(target_of(worker.url + "/llama"), HEALTH)
    assert finding.description == Description((Model("b"),))


# --- Compression ------------------------------------------------------------------


def compressed(body: bytes, coding: str = "gzip") -> bytes:
    """Build an answer as a compressing proxy in front of a worker would."""
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
    data = pack(body, 1)
    fields = [("Content-Encoding", coding), ("Content-Length", str(len(data)))]
    return head(200, fields) + data


# Compressed once for all, with as little effort as possible.
BOMB = compressed(bytes(64 << 20))


async def test_compression_is_never_requested() -> None:
    async with ScriptedWorker() as worker:
        await ping(worker)
        await probe.prove(target_of(worker.url), "a", 1.0)
        asked = [*worker.control, *worker.requests]
    assert len(asked) == 4
    assert [each.values("accept-encoding") for each in asked] == [["identity"]] * 4


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_compressed_answers_are_read_nevertheless(coding: str) -> None:
    models = {"data": [{"id": "a"}, {"id": "b"}]}
    props = {"total_slots": 3, "build_info": "b1"}
    async with ScriptedWorker() as worker:
        for path, reported in {
            "/health": {"status": "ok"},
            "/v1/models": models,
            "/props": props,
        }.items():
            worker.on(path, send(compressed(json.dumps(reported).encode(), coding)))
        finding = await ping(worker)
    reported = Description((Model("a"), Model("b")), 3, None, "b1")
    assert finding == Finding(Check.OK, "ok", reported)


async def test_a_compressed_answer_shows_that_a_worker_is_loading() -> None:
    loading = json.dumps({"error": {"message": "Loading model"}}).encode()
    answer_ = compressed(loading).replace(b"200 OK", b"503 Service Unavailable")
    async with ScriptedWorker() as worker:
        worker.on("/health", send(answer_))
        assert (await ping(worker)).check is Check.LOADING


# --- Workers that report less -----------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        (send(not_found()),),
        answer({"error": "no"}, 501),
        answer(["another", "idea"]),
        answer({"total_slots": "four"}),
        (
            send(
                head(200, [("Content-Length", "200006")])
                + b'{"x":%b%b}' % (b"[" * 100_000, b"]" * 100_000)
            ),
        ),
        (send(head(200, [("Content-Length", "3")]) + b"abc"),),
        (send(head(302, [("Location", "/"), ("Content-Length", "0")])),),
        (send(head(200) + b" " * (MAX_ANSWER + 1)), close()),
        (send(BOMB),),
        (
            send(
                head(200, [("Content-Encoding", "br"), ("Content-Length", "1")]) + b"?"
            ),
        ),
    ],
)
async def test_a_worker_without_usable_props_is_good(script: Script) -> None:
    """vLLM and others have none; slots and build stay unknown."""
    async with ScriptedWorker("a", n_ctx=512) as worker:
        worker.on("/props", *script)
        finding = await ping(worker)
    assert finding.check is Check.OK
    assert finding.description == Description((Model("a", 512),), None, 512, "")


@pytest.mark.parametrize(
    "script",
    [
        (send(not_found()),),
        answer({"error": "no"}, 501),
        (send(head(204)),),
        (send(head(302, [("Location", "/"), ("Content-Length", "0")])),),
        (send(head(200, [("Content-Length", "2")]) + b"OK"),),
        (
            send(
                head(200, [("Content-Encoding", "br"), ("Content-Length", "1")]) + b"?"
            ),
        ),
        (send(head(200) + b" " * (MAX_ANSWER + 1)), close()),
        answer({"status": None}),
        answer([7]),
    ],
)
async def test_a_worker_with_another_idea_of_health_is_good(script: Script) -> None:
    """Ollama has no /health; it is enough that models are listed."""
    async with ScriptedWorker("a") as worker:
        worker.on("/health", *script)
        assert (await ping(worker)).check is Check.OK


# --- Workers that are not ready ---------------------------------------------------


async def test_loading_is_a_separate_result() -> None:
    async with ScriptedWorker() as worker:
        worker.loading = True
        assert await ping(worker) == Finding(Check.LOADING, "loading model")
        assert len(worker.control) == 1


ODD_MODELS = {
    "404": ((send(not_found()),), "/v1/models answered 404"),
    "500": (answer({}, 500), "/v1/models answered 500"),
    "401": (answer({}, 401), "/v1/models answered 401: a wrong or missing API key"),
    "403": (answer({}, 403), "/v1/models answered 403: a wrong or missing API key"),
    "redirect": (
        (send(head(302, [("Location", "/props"), ("Content-Length", "0")])),),
        "/v1/models answered 302",
    ),
    "array": (answer([]), "/v1/models sent an answer that cannot be read"),
    "no data": (answer({"object": "list"}), "/v1/models has no list of models"),
    "no list": (answer({"data": "many"}), "/v1/models has no list of models"),
    "number": (answer({"data": [{"id": 7}]}), "/v1/models has no name"),
    "null": (answer({"data": [None]}), "/v1/models has no name"),
    "unknown coding": (
        (
            send(
                head(200, [("Content-Encoding", "br"), ("Content-Length", "2")]) + b"{}"
            ),
        ),
        "/v1/models answered with an unknown content coding",
    ),
    "wrong coding": (
        (
            send(
                head(200, [("Content-Encoding", "gzip"), ("Content-Length", "2")])
                + b"{}"
            ),
        ),
        "/v1/models answered with data that are not in their content coding",
    ),
    "bomb": (
        (send(BOMB),),
        f"/v1/models answered more than {MAX_ANSWER} bytes",
    ),
    "bomb that goes on": (
        (
            send(head(200, [("Content-Encoding", "gzip")])),
            flood(gzip.compress(bytes(1 << 20))),
        ),
        f"/v1/models answered more than {MAX_ANSWER} bytes",
    ),
    "text": (
        (send(head(200, [("Content-Length", "2")]) + b"hi"),),
        "/v1/models sent an answer that cannot be read",
    ),
    "nested": (
        (send(head(200, [("Content-Length", "100000")]) + b"[" * 100_000),),
        "/v1/models sent an answer that cannot be read",
    ),
    "nested where it is not looked for": (
        (
            send(
                head(200, [("Content-Length", "200023")])
                + b'{"data":[{"id":"","x":%b%b}]}' % (b"[" * 100_000, b"]" * 100_000)
            ),
        ),
        "/v1/models sent an answer that cannot be read",
    ),
    "endless": (
        (send(head(200) + b" " * (MAX_ANSWER + 1)), stall()),
        f"/v1/models answered more than {MAX_ANSWER} bytes",
    ),
    "cut": (
        (send(head(200, [("Content-Length", "99")]) + b"{}"), close()),
        "its answer broke off",
    ),
    "reset": ((send(head(200, [("Content-Length", "99")])), reset()), ""),
    "garbage": ((send(b"garbage\r\n\r\n"), close()), "sent something that is not HTTP"),
    "no names": (
        answer({"data": [{"id": ""}, {"id": "\x1b[2J"}]}),
        "/v1/models has no name",
    ),
}


@pytest.mark.parametrize(
    ("script", "reason"), ODD_MODELS.values(), ids=ODD_MODELS.keys()
)
async def test_a_worker_whose_models_cannot_be_listed_has_failed(
    script: Script, reason: str
) -> None:
    """No request could be routed to it; the reason names the problem."""
    async with ScriptedWorker() as worker:
        worker.on("/v1/models", *script)
        finding = await ping(worker)
    assert finding.check is Check.FAILED
    assert finding.description is None
    assert finding.reason.startswith(reason)
    assert finding.reason


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (answer({}, 500), "/health answered 500"),
        (answer({"error": "busy"}, 503), "/health answered 503"),
        (answer({}, 401), "/health answered 401: needs a key"),
        (answer({}, 403), "/health answered 403: needs a key"),
        ((reset(),), ""),
        ((close(),), ""),
        ((send(b"\0" * 100), close()), ""),
    ],
)
async def test_a_worker_whose_health_is_bad_has_failed(
    script: Script, reason: str
) -> None:
    async with ScriptedWorker() as worker:
        worker.on("/health", *script)
        finding = await ping(worker)
        assert [request.path for request in worker.control] == ["/health"]
    assert finding.check is Check.FAILED
    assert finding.reason.startswith(reason)
    assert finding.reason


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/props"])
@pytest.mark.parametrize("script", [(), (send(head(200, [("Content-Length", "9")])),)])
async def test_every_request_has_a_time_limit(path: str, script: Script) -> None:
    async with ScriptedWorker() as worker:
        worker.on(path, *script, stall())
        finding = await ping(worker, timeout=0.05)
        await worker.idle()
    assert finding == Finding(Check.FAILED, "no answer within 0.05 s")


async def test_a_worker_that_refuses_has_failed() -> None:
    async with ScriptedWorker(up=False) as worker:
        finding = await ping(worker)
    assert finding.check is Check.REFUSED
    assert "refused" in finding.reason.lower()


async def test_a_worker_without_tls_where_it_is_expected_has_failed() -> None:
    async with ScriptedWorker() as worker:
        url = worker.url.replace("http:", "https:")
        finding = await probe.ping(target_of(url), HEALTH)
        worker.violations.clear()  # a TLS handshake is not HTTP
    assert finding.check is Check.FAILED
    assert finding.reason


async def test_the_proxy_of_the_environment_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers are on the LAN, and prompts must not leave it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with ScriptedWorker() as worker:
        assert (await ping(worker)).check is Check.OK


# --- One check --------------------------------------------------------------------


async def test_examining_a_good_worker() -> None:
    async with ScriptedWorker("a", slots=2, n_ctx=64, build="b9") as worker:
        report = await probe.examine(configured(worker.url), HEALTH)
    reported = Description((Model("a", 64, inputs=()),), 2, 64, "b9")
    assert report == Finding(Check.OK, "ok", reported)


async def test_examining_a_worker_that_is_loading() -> None:
    async with ScriptedWorker() as worker:
        worker.loading = True
        report = await probe.examine(configured(worker.url), HEALTH)
    assert report == Finding(Check.LOADING, "loading model")


async def test_examining_a_worker_that_is_down() -> None:
    async with ScriptedWorker(up=False) as worker:
        report = await probe.examine(configured(worker.url), HEALTH)
    assert (report.check, report.description) == (Check.REFUSED, None)


async def test_a_list_in_many_pieces_is_read_whole() -> None:
    body = json.dumps({"data": [{"id": f"m{n}"} for n in range(MOST_MODELS)]}).encode()
    reply = json_reply(json.loads(body))
    async with ScriptedWorker() as worker:
        parts = [send(reply[i : i + 30_000]) for i in range(0, len(reply), 30_000)]
        worker.on("/v1/models", *parts)
        finding = await ping(worker)
    assert finding.description is not None
    assert len(finding.description.models) == MOST_MODELS


# --- A worker without a port in its URL ---------------------------------------


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the ports at which a worker without one is looked for."""

    def set_ports(*workers: ScriptedWorker) -> None:
        monkeypatch.setattr(settings, "PORTS", tuple(each.port for each in workers))

    return set_ports


async def test_a_worker_without_a_port_is_found_at_the_first_one_that_answers(
    ports: Callable[..., None],
) -> None:
    async with (
        ScriptedWorker(up=False) as closed,
        ScriptedWorker("a") as good,
        ScriptedWorker("b") as late,
    ):
        ports(closed, good, late)
        target = target_of("http://127.0.0.1")
        finding = await probe.ping(target, HEALTH)
        assert (finding.check, finding.port) == (Check.OK, good.port)
        assert finding.description is not None
        assert finding.description.models[0].name == "a"
        seen = len(late.control)
        assert (await probe.ping(target, HEALTH)).port == target.port == good.port
        assert len(late.control) == seen, "the found port alone is checked"


async def test_a_server_of_another_kind_is_passed_over(
    ports: Callable[..., None],
) -> None:
    async with ScriptedWorker() as page, ScriptedWorker() as good:
        page.on("/v1/models", send(not_found()))
        ports(page, good)
        assert (await probe.ping(target_of("http://127.0.0.1"), HEALTH)).port == (
            good.port
        )


async def test_a_found_worker_that_stops_answering_is_looked_for_again(
    ports: Callable[..., None],
) -> None:
    async with ScriptedWorker() as one, ScriptedWorker(up=False) as two:
        ports(one, two)
        target = target_of("http://127.0.0.1")
        assert (await probe.ping(target, HEALTH)).port == one.port
        await one.down()
        two.loading = True
        await two.up()
        finding = await probe.ping(target, HEALTH)
        assert (finding.check, finding.port) == (Check.LOADING, two.port)
        assert target.port == two.port


async def test_what_is_wrong_names_the_port(ports: Callable[..., None]) -> None:
    async with ScriptedWorker(up=False) as one, ScriptedWorker(up=False) as two:
        ports(one, two)
        target = target_of("http://127.0.0.1")
        finding = await probe.ping(target, HEALTH)
        where = f"(ports {one.port}, {two.port})"
        assert finding == Finding(Check.REFUSED, f"connection refused {where}")
        await two.up()
        two.on("/health", send(json_reply({}, status=500)))
        finding = await probe.ping(target, HEALTH)
        assert finding.check is Check.FAILED
        assert finding.reason == f"port {two.port}: /health answered 500"


# --- Counting the tokens of a prompt ----------------------------------------------


ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user"}],
    "stream": True,
}


async def counted(
    worker: ScriptedWorker, path: str = CHAT, body: Any = ASKED, key: str = ""
) -> int | None:
    environ = {"GOLLAMA_AUTH_MODE": "off"}
    [described] = config.load(None, environ, {}, [worker.url]).workers
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await probe.count_tokens(Target(described), path, "tiny", data)


async def test_a_chat_is_counted_as_its_template_writes_it() -> None:
    async with ScriptedWorker() as worker:
        worker.on("/apply-template", *answer({"prompt": "<user>hello"}))
        worker.on("/tokenize", *answer({"tokens": [1, 22, 333, 4]}))
        assert await counted(worker) == 4
        template, tokenize = worker.requests
        assert template.json() == ASKED
        assert template.header("content-length") == str(template.body_length)
        assert tokenize.json() == {
            "model": "tiny",
            "content": "<user>hello",
            "add_special": True,
            "parse_special": True,
        }


def compressed_json(obj: Any) -> bytes:
    """Build an answer as a compressing proxy in front of a worker would."""
    data = gzip.compress(json.dumps(obj).encode())
    fields = [("Content-Encoding", "gzip"), ("Content-Length", str(len(data)))]
    return head(200, fields) + data


async def test_compression_is_not_requested_but_understood() -> None:
    async with ScriptedWorker() as worker:
        worker.on("/apply-template", send(compressed_json({"prompt": "<user>hello"})))
        worker.on("/tokenize", send(compressed_json({"tokens": [1, 22, 333, 4]})))
        assert await counted(worker) == 4
        asked = [request.values("accept-encoding") for request in worker.requests]
    assert asked == [["identity"]] * 2


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
async def test_a_plain_prompt_is_counted_without_a_template(path: str) -> None:
    async with ScriptedWorker() as worker:
        assert await counted(worker, path, {"prompt": "hello", "n": [1]}) == 3
        [tokenize] = worker.requests
        assert tokenize.json()["content"] == "hello"


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/messages", "/v1/messages/count_tokens"),
        ("/v1/responses", "/v1/responses/input_tokens"),
        ("/responses", "/v1/responses/input_tokens"),
    ],
)
async def test_other_paths_have_a_route_that_counts(path: str, route: str) -> None:
    async with ScriptedWorker() as worker:
        worker.on(route, *answer({"input_tokens": 77, "object": "x"}))
        assert await counted(worker, path) == 77
        assert worker.requests[0].json() == ASKED


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], None, 7, "", {"a": 1}], ids=str)
async def test_a_prompt_that_is_not_text_is_not_counted(prompt: Any) -> None:
    async with ScriptedWorker() as worker:
        assert await counted(worker, "/v1/completions", {"prompt": prompt}) is None
        assert await counted(worker, "/v1/completions", {}) is None
        assert await counted(worker, "/infill", {"input_prefix": "a"}) is None
        assert not worker.requests


@pytest.mark.parametrize(
    "script",
    [
        (send(error_reply(404, "File Not Found")),),
        (send(error_reply(500, "no template")),),
        answer({"prompt": 7}),
        answer({"prompt": ""}),
        answer(["a"]),
        (send(json_reply({"prompt": "a"}).replace(b"{", b"[")),),
        (send(b"no HTTP at all\r\n\r\n"),),
        (send(compressed_json({"prompt": "a"}).replace(b"gzip", b"zstd")),),
        (send(compressed_json({"prompt": "a"}).replace(b"gzip", b"deflate")),),
        (stall(),),
    ],
)
async def test_a_failed_count_is_none(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "COUNT_LIMIT", 0.2)
    async with ScriptedWorker() as worker:
        worker.on("/apply-template", *script)
        assert await counted(worker) is None
        assert len(worker.requests) == 1


@pytest.mark.parametrize("tokens", [[], None, "", "many", {}, 7], ids=str)
async def test_an_answer_without_tokens_is_none(tokens: Any) -> None:
    async with ScriptedWorker() as worker:
        worker.on("/tokenize", *answer({"tokens": tokens}))
        assert await counted(worker) is None
        worker.on("/tokenize", *answer({}))
        assert await counted(worker) is None


async def test_an_endless_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_COUNT", 1000)
    async with ScriptedWorker() as worker:
        worker.on("/tokenize", *answer({"tokens": [1] * 600}))
        assert await counted(worker) is None
        worker.on("/tokenize", send(compressed_json({"tokens": [1] * 600})))
        assert await counted(worker) is None


async def test_a_worker_that_is_down_gives_no_count() -> None:
    async with ScriptedWorker(up=False) as worker:
        assert await counted(worker) is None


async def test_a_large_prompt_is_sent_in_pieces() -> None:
    """It reaches the worker complete."""
    async with ScriptedWorker(keep_body=4 << 20) as worker:
        body = {"prompt": "a" * (2 << 20)}
        assert await counted(worker, "/v1/completions", body) == 3
        assert worker.requests[0].json()["content"] == body["prompt"]
