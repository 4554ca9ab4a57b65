"""`100 Continue` is sent for accepted requests only.

A client that receives it has been authenticated, is within its limits, and has
announced no more than it may send (RFC 9110, 10.1.1).
"""

from __future__ import annotations

import pytest

from tests.behaviour.test_bad_requests import BODY, CHAT, GOOD, check, hub_of_two_models
from tests.fakes.cases import case
from tests.fakes.client import Wire, request_head
from tests.fakes.hub import RunningHub, mint, running_hub
from tests.fakes.worker import ScriptedWorker

LENGTH = ("Content-Length", str(len(BODY)))
CHUNKED = ("Transfer-Encoding", "chunked")
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


async def expect(
    wire: Wire,
    token: str | None,
    path: str = CHAT,
    framing: tuple[str, str] = LENGTH,
    value: str = "100-continue",
) -> None:
    """Announce a body, and send none of it."""
    headers = [("Expect", value), framing]
    await wire.send(request_head("POST", path, token, headers))


async def assert_refused(wire: Wire, status: int) -> None:
    """The next bytes are the refusal, and the last: the body is not waited for."""
    line = await wire.read_until(b"\r\n")
    assert line.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close" in await wire.read_until(b"\r\n\r\n")
    wire.half_close()  # instead of sending what it announced
    assert b"100 Continue" not in await wire.read_eof()


# --- Requests that are refused ----------------------------------------------------

BAD_TOKENS = {
    "none": None,
    "empty": "",
    "no token": "x",
    "of another": mint("f" * 64, sub="alice"),
    "expired": mint(sub="alice", exp=1),
    "without an end": mint(sub="alice", exp=None),
    "of nobody": mint(sub=None),
    "unsigned": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbGljZSJ9.",
}


async def test_without_a_valid_token_there_is_no_100_continue() -> None:
    async with hub_of_two_models() as hub:
        for framing in [LENGTH, CHUNKED]:
            for token in BAD_TOKENS.values():
                with case((framing, token)):
                    async with await hub.wire() as wire:
                        await expect(wire, token, framing=framing)
                        await assert_refused(wire, 401)


@pytest.mark.parametrize("token", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
async def test_without_a_valid_token_the_answer_precedes_the_body(
    token: str | None,
) -> None:
    """A client that waits for it may wait for long."""
    async with hub_of_two_models() as hub, await hub.wire() as wire:
        await wire.send(request_head("POST", CHAT, token, [LENGTH]))
        await assert_refused(wire, 401)


@pytest.mark.parametrize(
    ("token", "path", "status"),
    [
        ("good", "/nowhere", 404),
        ("good", "/v1/models", 405),
        ("good", "/v1/models/qwen", 405),
        (None, "/nowhere", 404),
        (None, "/livez", 405),
        (None, "/metrics", 405),
    ],
)
async def test_an_unknown_route_gets_no_100_continue(
    token: str | None, path: str, status: int
) -> None:
    async with hub_of_two_models() as hub, await hub.wire() as wire:
        await expect(wire, hub.token() if token == "good" else token, path)
        await assert_refused(wire, status)


async def test_a_body_announced_as_too_large_gets_no_100_continue() -> None:
    async with hub_of_two_models() as hub, await hub.wire() as wire:
        await expect(wire, hub.token(), framing=("Content-Length", "65537"))
        await assert_refused(wire, 413)


async def test_an_exhausted_quota_gets_no_100_continue() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        token = hub.token(rpm=1)
        assert (await hub.post(CHAT, GOOD, token)).status == 200
        async with await hub.wire() as wire:
            await expect(wire, token)
            await assert_refused(wire, 429)
        assert len(worker.requests) == 1


async def test_a_priority_that_is_not_allowed_gets_no_100_continue() -> None:
    async with hub_of_two_models() as hub, await hub.wire() as wire:
        token = hub.token(priority="batch")
        headers = [("Expect", "100-continue"), LENGTH]
        headers.append(("X-Gollama-Priority", "interactive"))
        await wire.send(request_head("POST", CHAT, token, headers))
        await assert_refused(wire, 403)


@pytest.mark.parametrize("value", ["200-maybe", "100-continue, x", "100", "", "x"])
async def test_nothing_else_can_be_expected(value: str) -> None:
    async with hub_of_two_models() as hub, await hub.wire() as wire:
        await expect(wire, hub.token(), value=value)
        await assert_refused(wire, 417)


async def test_a_refusal_does_not_depend_on_the_expectation() -> None:
    async with hub_of_two_models() as hub, await hub.wire() as wire:
        await expect(wire, "x", value="200-maybe")
        await assert_refused(wire, 401)


# --- Requests that are admitted ---------------------------------------------------


async def goes_on(hub: RunningHub, worker: ScriptedWorker, value: str) -> None:
    async with await hub.wire() as wire:
        await expect(wire, hub.token(), value=value)
        assert await wire.read_until(b"\r\n\r\n") == GO_ON
        assert worker.requests == []
        await wire.send(BODY)
        response = await wire.read_response()
        assert response.status == 200
        assert b"100 Continue" not in response.body


@pytest.mark.parametrize("value", ["100-continue", "100-Continue", "100-CONTINUE"])
async def test_an_accepted_request_gets_100_continue_before_its_body(
    value: str,
) -> None:
    # The body is compared byte by byte: no answer is assembled.
    async with (
        ScriptedWorker("qwen") as worker,
        running_hub(worker, upstream__assemble="") as hub,
    ):
        await goes_on(hub, worker, value)
        assert worker.requests[0].body == BODY
        assert worker.requests[0].header("expect") is None


async def test_each_request_of_a_connection_is_authorised_separately() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            for _ in range(2):
                await expect(wire, hub.token())
                assert await wire.read_until(b"\r\n\r\n") == GO_ON
                await wire.send(BODY)
                assert (await wire.read_response()).status == 200
            await expect(wire, "x")
            await assert_refused(wire, 401)
        assert len(worker.requests) == 2


async def test_an_invalid_body_is_rejected_after_100_continue() -> None:
    async with hub_of_two_models() as hub, await hub.wire() as wire:
        await expect(wire, hub.token(), framing=("Content-Length", "2"))
        assert await wire.read_until(b"\r\n\r\n") == GO_ON
        await wire.send(b"[]")
        check(await wire.read_response(), 400, "invalid_json")
