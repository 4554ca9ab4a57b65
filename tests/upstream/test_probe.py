"""What a ping makes of a worker: good, loading, or failed, and what it serves."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import zlib
from typing import Any

import pytest
import uvloop

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Health, WorkerConfig
from gollama_proxy.upstream import probe
from gollama_proxy.upstream.probe import (
    MAX_ANSWER,
    MAX_NAME,
    MOST_CONTEXT,
    MOST_MODELS,
    Finding,
)
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.replies import head, json_reply, not_found
from tests.fakes.script import Script, answer, close, flood, reset, send, stall
from tests.fakes.worker import ScriptedWorker

HEALTH = Health(timeout=5.0)


def configured(url: str, key: str = "") -> WorkerConfig:
    worker = config.load(None, {}, {}, [url]).workers[0]
    return WorkerConfig(worker.url, worker.origin, worker.name, key)


async def ping(
    worker: ScriptedWorker, key: str = "", *, timeout: float = 5.0
) -> Finding:
    async with probe.new_session() as session:
        return await probe.ping(
            session, configured(worker.url, key), Health(timeout=timeout)
        )


async def test_a_good_worker_tells_everything() -> None:
    async with ScriptedWorker("a", "b", slots=3, n_ctx=512, build="b1-ab") as worker:
        finding = await ping(worker)
        asked = [request.target for request in worker.control]
    assert finding == Finding(
        Check.OK, "ok", Description((Model("a", 512), Model("b", 512)), 3, 512, "b1-ab")
    )
    assert asked == ["/health", "/v1/models", "/props"], "and nothing else"


async def test_nothing_is_kept_between_two_questions() -> None:
    """An idle connection costs llama-server a thread, a cookie costs everybody."""
    async with ScriptedWorker() as worker:
        cookie = [("Set-Cookie", "a=b"), ("Content-Length", "0")]
        worker.on("/health", send(head(200, cookie)))
        # aiohttp takes no cookies from addresses at all.
        named = configured(worker.url.replace("127.0.0.1", "localhost"))
        async with probe.new_session() as session:
            for _ in range(2):
                assert (await probe.ping(session, named, HEALTH)).check is Check.OK
        assert worker.connections == len(worker.control) == 6
        for request in worker.control:
            assert request.values("connection") == ["close"]
            assert not request.values("cookie")


async def test_a_name_is_not_followed_to_where_no_worker_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", getaddrinfo)
    async with probe.new_session() as session:
        named = configured("http://gpu.lan", "sk-1")
        finding = await probe.ping(session, named, HEALTH)
        assert await probe.prove(session, named, "a", 1.0) is False
    assert finding.check is Check.FAILED
    assert finding.reason == (
        "gpu.lan stands for 169.254.169.254, which is a cloud's metadata service"
    )


@pytest.mark.parametrize(("key", "sent"), [("", []), ("sk-1", ["Bearer sk-1"])])
async def test_the_workers_key_goes_with_every_question(
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
        async with probe.new_session() as session:
            finding = await probe.ping(
                session, configured(worker.url + "/llama"), HEALTH
            )
    assert finding.description == Description((Model("b"),))


# --- Compression ------------------------------------------------------------------


def compressed(body: bytes, coding: str = "gzip") -> bytes:
    """Build an answer as a compressing proxy in front of a worker would."""
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
    data = pack(body)
    fields = [("Content-Encoding", coding), ("Content-Length", str(len(data)))]
    return head(200, fields) + data


async def test_no_question_asks_for_compression() -> None:
    async with ScriptedWorker() as worker, probe.new_session() as session:
        described = configured(worker.url)
        await probe.ping(session, described, HEALTH)
        await probe.prove(session, described, "a", 1.0)
        asked = [*worker.control, *worker.requests]
    assert len(asked) == 4
    assert [each.values("accept-encoding") for each in asked] == [["identity"]] * 4


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_answers_that_are_compressed_all_the_same_are_read(coding: str) -> None:
    models = {"data": [{"id": "a"}, {"id": "b"}]}
    props = {"total_slots": 3, "build_info": "b1"}
    async with ScriptedWorker() as worker:
        for path, told in {
            "/health": {"status": "ok"},
            "/v1/models": models,
            "/props": props,
        }.items():
            worker.on(path, send(compressed(json.dumps(told).encode(), coding)))
        finding = await ping(worker)
    told = Description((Model("a"), Model("b")), 3, None, "b1")
    assert finding == Finding(Check.OK, "ok", told)


async def test_a_worker_is_seen_to_load_through_compression() -> None:
    loading = json.dumps({"error": {"message": "Loading model"}}).encode()
    answer_ = compressed(loading).replace(b"200 OK", b"503 Service Unavailable")
    async with ScriptedWorker() as worker:
        worker.on("/health", send(answer_))
        assert (await ping(worker)).check is Check.LOADING


# --- Workers that tell less -------------------------------------------------------


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
        (send(compressed(bytes(64 << 20))),),
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
async def test_a_worker_without_our_idea_of_health_is_good(script: Script) -> None:
    """Ollama has no /health; what counts is that models are listed."""
    async with ScriptedWorker("a") as worker:
        worker.on("/health", *script)
        assert (await ping(worker)).check is Check.OK


@pytest.mark.parametrize(
    ("listed", "props", "models"),
    [
        ([], {}, ()),
        ([{"id": "a"}], {}, (Model("a"),)),
        ([{"id": "a", "meta": None}], {}, (Model("a"),)),
        ([{"id": "a", "meta": {}}], {}, (Model("a"),)),
        ([{"id": "a", "meta": {"n_ctx": None}}], {}, (Model("a"),)),
        (
            [{"id": "a", "meta": {"n_ctx": 7}}, {"id": "b"}],
            {"default_generation_settings": {"n_ctx": 9}},
            (Model("a", 7), Model("b", 9)),
        ),
        ([{"id": "a", "object": "model", "owned_by": 1}], {}, (Model("a"),)),
        *(
            ([{"id": "a", "meta": meta}], {}, (Model("a"),))
            for meta in [7, "x", [], {"n_ctx": "512"}, {"n_ctx": {}}, {"n_ctx": 1.5}]
        ),
        ([{"id": "a"}, {"id": "a", "meta": {"n_ctx": 7}}], {}, (Model("a"),)),
        ([{"id": "a", "max_model_len": 7}], {}, (Model("a", 7),)),  # vLLM, SGLang
        ([{"id": "a", "max_model_len": None}], {}, (Model("a"),)),
        ([{"id": "a", "context_length": 9}], {}, (Model("a", 9),)),
        ([{"id": "a", "context_window": "9"}], {}, (Model("a"),)),
        (
            [{"id": "a", "loaded_context_length": 7, "context_length": 9}],
            {},
            (Model("a", 7),),
        ),
        *(
            ([{"id": "a"}], props, (Model("a", 9),))
            for odd in [None, 7, "x", [], {}]
            for props in [
                {
                    "total_slots": odd,
                    "build_info": odd,
                    "default_generation_settings": {"n_ctx": 9, "params": odd},
                }
            ]
        ),
        ([{"id": "é/ü:7b"}], {}, (Model("é/ü:7b"),)),
        (  # as a router says it
            [{"id": "a"}],
            {"default_generation_settings": {"params": None, "n_ctx": 0}},
            (Model("a"),),
        ),
        *(
            ([{"id": "a", "status": status}], {}, (Model("a", None, *loaded),))
            for status, *loaded in [
                ({"value": "loaded", "args": ["-m", "a.gguf"]}, True),
                ({"value": "unloaded"}, False),
                ({"value": "loading"}, False, True),
                ({"value": "sleeping"}, False),
                ({"value": "unloaded", "failed": True, "exit_code": 1}, False),
                ({"value": None}, None),
                ({"value": True}, None),
                ({}, None),
                ("loaded", None),
                (["loaded"], None),
                (None, None),
            ]
        ),
    ],
)
async def test_models_and_their_context(
    listed: list[Any], props: dict[str, Any], models: tuple[Model, ...]
) -> None:
    """A model's own context first, then the worker's, else unknown."""
    async with ScriptedWorker() as worker:
        worker.on("/v1/models", *answer({"data": listed}))
        worker.on("/props", *answer(props))
        finding = await ping(worker)
    assert finding.check is Check.OK
    assert finding.description is not None
    assert finding.description.models == models


ODD_ENTRIES = [
    None,
    7,
    "b",
    [],
    {},
    {"id": None},
    {"id": 7},
    {"id": ["b"]},
    {"id": ""},
    {"name": "b"},
]


@pytest.mark.parametrize("odd", ODD_ENTRIES, ids=repr)
async def test_an_odd_entry_costs_no_other(odd: Any) -> None:
    async with ScriptedWorker() as worker:
        worker.on("/v1/models", *answer({"data": [{"id": "a"}, odd, {"id": "c"}]}))
        finding = await ping(worker)
    assert finding.check is Check.OK
    assert finding.description is not None
    assert [model.name for model in finding.description.models] == ["a", "c"]
    assert finding.note == "/v1/models has entries without a usable name: 1, skipped"


async def test_an_entry_with_bytes_that_are_no_text_costs_no_other() -> None:
    body = b'{"data": [{"id": "\xff"}, {"id": "b", "owned_by": "\xff"}, {"id": "c"}]}'
    async with ScriptedWorker() as worker:
        fields = [("Content-Length", str(len(body)))]
        worker.on("/v1/models", send(head(200, fields) + body))
        finding = await ping(worker)
    assert finding.description is not None
    assert "c" in [model.name for model in finding.description.models]


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ({"data": None}, []),
        ({"data": []}, []),
        ({"data": None, "models": [{"model": "a"}]}, ["a"]),
        (
            {"models": [{"name": "a:7b", "model": "a:7b"}, {"model": "b"}]},
            ["a:7b", "b"],
        ),
        ({"models": []}, []),
        ({"data": {}, "models": [{"model": "a"}]}, ["a"]),
        ({"data": [{"id": "a"}], "models": [{"model": "b"}]}, ["a"]),
        ({"data": [{"id": "a"}], "models": 7}, ["a"]),
    ],
    ids=repr,
)
async def test_a_list_of_another_shape_is_a_list(listed: Any, names: list[str]) -> None:
    """Go writes an empty list as null; Ollama's own list is called `models`."""
    told = await described(models=listed)
    assert [model.name for model in told.models] == names


@pytest.mark.parametrize("odd", [None, "x", [], {}, 7.5, True], ids=repr)
@pytest.mark.parametrize(
    "field", ["total_slots", "build_info", "default_generation_settings"]
)
async def test_an_odd_property_costs_no_other(field: str, odd: Any) -> None:
    props = {
        "total_slots": 3,
        "build_info": "b1",
        "default_generation_settings": {"n_ctx": 512},
    }
    told = await described(models={"data": [{"id": "a"}]}, props=props | {field: odd})
    expected = {"total_slots": 3, "build_info": "b1", "context": 512}
    seen = {
        "total_slots": told.slots,
        "build_info": told.build,
        "context": told.context,
    }
    field = field.replace("default_generation_settings", "context")
    del expected[field], seen[field]
    assert seen == expected


# --- Workers that are not well ----------------------------------------------------


async def test_loading_is_a_finding_of_its_own() -> None:
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
    "array": (answer([]), "/v1/models answered what cannot be read"),
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
        (send(compressed(bytes(64 << 20))),),
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
        "/v1/models answered what cannot be read",
    ),
    "nested": (
        (send(head(200, [("Content-Length", "100000")]) + b"[" * 100_000),),
        "/v1/models answered what cannot be read",
    ),
    "nested where nobody looks": (
        (
            send(
                head(200, [("Content-Length", "200023")])
                + b'{"data":[{"id":"","x":%b%b}]}' % (b"[" * 100_000, b"]" * 100_000)
            ),
        ),
        "/v1/models answered what cannot be read",
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
    "garbage": ((send(b"garbage\r\n\r\n"), close()), "sent what is no HTTP answer"),
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
    """It could not be routed to; the reason says what is the matter."""
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
        # aiohttp asks once more where a connection died unanswered.
        assert {request.path for request in worker.control} == {"/health"}
    assert finding.check is Check.FAILED
    assert finding.reason.startswith(reason)
    assert finding.reason


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/props"])
@pytest.mark.parametrize("script", [(), (send(head(200, [("Content-Length", "9")])),)])
async def test_every_question_has_a_deadline(path: str, script: Script) -> None:
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
    async with ScriptedWorker() as worker, probe.new_session() as session:
        url = worker.url.replace("http:", "https:")
        finding = await probe.ping(session, configured(url), HEALTH)
        worker.violations.clear()  # a TLS handshake is no HTTP
    assert finding.check is Check.FAILED
    assert finding.reason


async def test_the_proxy_of_the_environment_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers are on the LAN, and prompts have no business anywhere else."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with ScriptedWorker() as worker:
        assert (await ping(worker)).check is Check.OK


# --- One look ---------------------------------------------------------------------


async def test_examine_tells_a_good_worker() -> None:
    async with ScriptedWorker("a", slots=2, n_ctx=64, build="b9") as worker:
        report = await probe.examine(configured(worker.url), HEALTH)
    told = Description((Model("a", 64),), 2, 64, "b9")
    assert report == Finding(Check.OK, "ok", told)


async def test_examine_tells_a_worker_that_is_loading() -> None:
    async with ScriptedWorker() as worker:
        worker.loading = True
        report = await probe.examine(configured(worker.url), HEALTH)
    assert report == Finding(Check.LOADING, "loading model")


async def test_examine_tells_a_worker_that_is_down() -> None:
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


# --- What is too much, or cannot be true ------------------------------------------


async def described(**answers: Any) -> Description:
    """Ping a worker that says so on `/v1/models` (`models`) or `/props` (`props`)."""
    paths = {"models": "/v1/models", "props": "/props"}
    async with ScriptedWorker() as worker:
        for name, told in answers.items():
            worker.on(paths[name], *answer(told))
        finding = await ping(worker)
    assert finding.check is Check.OK, finding
    assert finding.description is not None
    return finding.description


async def test_of_too_many_models_the_first_ones_are_known() -> None:
    """Each request looks through all of them."""
    listed = [{"id": f"m{n}"} for n in range(MOST_MODELS + 5)]
    names = [model.name for model in (await described(models={"data": listed})).models]
    assert names == [f"m{n}" for n in range(MOST_MODELS)]


@pytest.mark.parametrize(
    "name", ["", "two\nlines", "\x1b[31m", "a\x00b", "\u2028", "x" * (MAX_NAME + 1)]
)
async def test_a_name_that_could_not_be_told_is_passed_over(name: str) -> None:
    """Names get into logs, terminals and replies."""
    models = {"data": [{"id": name}, {"id": "x" * MAX_NAME}, {"id": "modèle 7b"}]}
    names = [model.name for model in (await described(models=models)).models]
    assert names == ["x" * MAX_NAME, "modèle 7b"]


@pytest.mark.parametrize("context", [-1, 0, MOST_CONTEXT + 1, 10**400])
async def test_a_context_that_cannot_be_true_is_not_known(context: int) -> None:
    settings = {"default_generation_settings": {"n_ctx": context}}
    models = {"data": [{"id": "a", "meta": {"n_ctx": context}}, {"id": "b"}]}
    told = await described(models=models, props=settings)
    assert told.context is None
    assert [model.context for model in told.models] == [None, None]


@pytest.mark.parametrize("slots", [10**400, -(10**400), 1 << 31, 2.5, "4"])
async def test_slots_that_are_no_number_are_not_known(slots: object) -> None:
    """Such as could not even be shown in the metrics."""
    assert (await described(props={"total_slots": slots})).slots is None


async def test_the_name_of_a_build_is_short_and_printable() -> None:
    assert (await described(props={"build_info": "b" * 5000})).build == "b" * 100
    assert (await described(props={"build_info": "\x1b[2J"})).build == ""


def flood_with_interim_answers(listener: socket.socket) -> None:
    """Be a worker faster than any event loop, until the hub hangs up."""
    peer, _ = listener.accept()
    with peer, contextlib.suppress(OSError):
        peer.recv(1000)
        while True:
            peer.sendall(head(100) * 10_000)


async def test_a_flood_of_interim_answers_leaves_others_their_turns() -> None:
    """aiohttp skips them one by one; in large reads nothing else would ever happen."""
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    health = Health(timeout=0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        other = asyncio.create_task(take_turns())
        flooding = asyncio.to_thread(flood_with_interim_answers, listener)
        async with asyncio.TaskGroup() as group, probe.new_session() as session:
            group.create_task(flooding)
            finding = await probe.ping(session, configured(url), health)
        other.cancel()
    assert finding.reason == "no answer within 0.5 s"
    assert turns > 50
