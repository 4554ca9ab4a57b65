"""The hub keeps its promises with a real proxy on either side of it.

No request is read in two ways, an answer that broke off is seen to have, and events
pass unchanged and at once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.behaviour.test_honest_endings import (
    CHAT,
    STREAM,
    assert_broken_off,
    error_of,
)
from tests.behaviour.test_request_smuggling import answers_to, by_lines, whole
from tests.corpora.smuggling import BODY, MODEL, PAYLOADS
from tests.fakes.client import Ending, Wire
from tests.fakes.hub import mint, running_hub
from tests.fakes.nginx import PLAIN, STREAMING, running_nginx
from tests.fakes.replies import (
    chunk,
    done,
    finish,
    last_chunk,
    ping,
    role,
    sse_head,
    token,
)
from tests.fakes.script import Step, close, reset, send, stall, wait
from tests.fakes.worker import ScriptedWorker

# Bodies are compared byte by byte, and broken answers are examined: the hub changes and
# repairs nothing, so that a test shows what nginx makes of them.
AS_IT_IS = {
    "retry__attempts": 1,
    "rescue__enabled": False,
    "upstream__assemble": "",
}

# One nginx and one hub for all that is smuggled.
pytestmark = pytest.mark.asyncio(loop_scope="module")

Chain = Callable[
    [ScriptedWorker, Path, str], contextlib.AbstractAsyncContextManager[int]
]


@contextlib.asynccontextmanager
async def nginx_before(
    worker: ScriptedWorker, folder: Path, directives: str
) -> AsyncIterator[int]:
    """Run nginx → hub → worker; yields the port of the first."""
    async with running_hub(worker, **AS_IT_IS) as hub:
        async with running_nginx(hub.port, folder, directives) as port:
            yield port


@contextlib.asynccontextmanager
async def nginx_behind(
    worker: ScriptedWorker, folder: Path, directives: str
) -> AsyncIterator[int]:
    """Run hub → nginx → worker; yields the port of the first."""
    async with running_nginx(worker.port, folder, directives) as port:
        async with running_hub(f"http://127.0.0.1:{port}", **AS_IT_IS) as hub:
            yield hub.port


# --- No request is read in two ways -----------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker(MODEL) as worker:
        yield worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def before(
    worker: ScriptedWorker, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[int]:
    folder = tmp_path_factory.mktemp("before")
    async with nginx_before(worker, folder, STREAMING) as port:
        yield port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def behind(
    worker: ScriptedWorker, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[int]:
    folder = tmp_path_factory.mktemp("behind")
    async with nginx_behind(worker, folder, STREAMING) as port:
        yield port


Cut = Callable[[bytes], list[bytes]]
cuts = pytest.mark.parametrize("cut", [whole, by_lines])


@cuts
async def test_requests_that_nginx_accepts_are_not_split_by_the_hub(
    cut: Cut, before: int, worker: ScriptedWorker
) -> None:
    """It is lenient about much, and shares its connections to the hub."""
    for payload in PAYLOADS:
        worker.requests.clear()
        answers = await answers_to(cut(payload.raw), before)
        # A carriage return that nginx has counted in is blank to JSON.
        bodies = [request.body.strip() for request in worker.requests]
        assert bodies in ([], [BODY]), payload
        assert answers.count(200) <= 1, payload  # the poison's is none of them
        assert not worker.violations, payload
        if payload.name in ("a length", "chunks"):
            assert answers == (200, 401), payload


@cuts
async def test_requests_that_the_hub_accepts_are_one_request_to_nginx(
    cut: Cut, behind: int, worker: ScriptedWorker
) -> None:
    for payload in PAYLOADS:
        worker.requests.clear()
        answers = await answers_to(cut(payload.raw), behind)
        assert answers in payload.answers, payload
        served = payload.served and 200 in answers
        bodies = [request.body for request in worker.requests]
        assert bodies == [BODY] * served, payload
        assert not worker.violations, payload


# --- Streams ----------------------------------------------------------------------

CHAINS = pytest.mark.parametrize(
    ("chain", "directives"),
    [
        pytest.param(chain, directives, id=f"{chain.__name__} {name}")
        for chain, (name, directives) in itertools.product(
            [nginx_before, nginx_behind],
            [("plain", PLAIN), ("streaming", STREAMING)],
        )
    ],
)
EVENTS = [
    role() + token("a"),
    token("\N{GRINNING FACE} \r\n"),
    ping(),
    b"event: odd\r\ndata: 1\r\ndata: \xc3\xa9\r\n: why\n\n",
    token("x" * 100_000),
    finish(),
    done(),
]


async def asked(port: int) -> Wire:
    """Ask for a stream."""
    wire = await Wire.connect("127.0.0.1", port)
    await wire.post(CHAT, STREAM, mint(sub="alice"))
    return wire


@CHAINS
async def test_every_event_arrives_before_the_next_is_sent(
    chain: Chain, directives: str, tmp_path: Path
) -> None:
    """Nothing on the way buffers them, and every byte is the same."""
    async with ScriptedWorker() as worker, chain(worker, tmp_path, directives) as port:
        sent = [(wait(f"{n}"), send(chunk(e))) for n, e in enumerate(EVENTS)]
        worker.script(
            send(sse_head()),
            *itertools.chain.from_iterable(sent),
            send(last_chunk()),
            close(),
        )
        async with await asked(port) as wire:
            for number, event in enumerate(EVENTS):
                worker.release(f"{number}")
                seen = b""
                while seen != event:  # two, where there are two in it
                    seen += await wire.read_event() or b""
                    assert event.startswith(seen)
            assert await wire.read_event() is None


@CHAINS
@pytest.mark.parametrize("end", [reset(), close()], ids=["reset", "close"])
@pytest.mark.parametrize("number", [1, 3])
async def test_a_truncated_answer_is_recognised_as_truncated(
    chain: Chain, directives: str, number: int, end: Step, tmp_path: Path
) -> None:
    async with ScriptedWorker() as worker, chain(worker, tmp_path, directives) as port:
        sent = EVENTS[:number]
        worker.script(
            send(sse_head()), *(send(chunk(e)) for e in sent), wait("seen"), end
        )
        async with await asked(port) as wire:
            await wire.read_head()
            worker.release("seen")
            ending: Ending = await wire.read_to_end()
    if chain is nginx_before and directives == PLAIN:
        # HTTP/1.0 to the hub: an event can be sent, or a reset, and not both.
        assert ending.response.body.startswith(b"".join(sent) + b'data: {"error":{')
        assert b"[DONE]" not in ending.response.body
    else:
        assert_broken_off(ending, b"".join(sent), "worker_connection_lost")


@CHAINS
@pytest.mark.parametrize("end", [reset(), close()], ids=["reset", "close"])
async def test_an_answer_that_never_began_is_an_error(
    chain: Chain, directives: str, end: Step, tmp_path: Path
) -> None:
    async with ScriptedWorker() as worker, chain(worker, tmp_path, directives) as port:
        worker.script(end)
        async with await asked(port) as wire:
            response = await wire.read_response()
        assert response.status == 502
        assert error_of(response)["type"] == "server_error"


@CHAINS
async def test_a_client_that_leaves_frees_the_worker(
    chain: Chain, directives: str, tmp_path: Path
) -> None:
    async with ScriptedWorker() as worker, chain(worker, tmp_path, directives) as port:
        worker.script(send(sse_head() + chunk(EVENTS[0])), stall())
        async with await asked(port) as wire:
            await wire.read_event()
        await (await worker.received()).closed_by_peer.wait()
