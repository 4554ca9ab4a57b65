"""Steps: what a `ScriptedWorker` does with one request, in the order of time.

    worker.script(send(sse_head()), send(chunk(token("a"))), wait("go"), reset())

A script starts when the whole request is there, unless one of its steps is
`read_body()` or `not_read_body()`: then it starts behind the head and the body is read
by these steps only.  The peer's hang-up ends a script; one that runs out leaves the
connection open for the next request.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from tests.fakes import replies
from tests.fakes.replies import MODEL, chunk, last_chunk, sse_head
from tests.fakes.waiting import DEADLINE

if TYPE_CHECKING:
    from tests.fakes.exchange import Exchange

P = ParamSpec("P")
Barrier = str | asyncio.Event | asyncio.Semaphore


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do; equal to another step that would do the same."""

    name: str
    arguments: tuple[Any, ...]
    play: Callable[[Exchange], Awaitable[None]] = field(repr=False, compare=False)

    def __repr__(self) -> str:
        shown = ", ".join(repr(argument)[:60] for argument in self.arguments)
        return f"{self.name}({shown})"


Script = tuple[Step, ...]


def _step(
    action: Callable[Concatenate[Exchange, P], Awaitable[None]],
) -> Callable[P, Step]:
    """Turn a coroutine function on an exchange into a maker of steps."""

    @functools.wraps(action)
    def make(*args: P.args, **kwargs: P.kwargs) -> Step:
        async def play(exchange: Exchange) -> None:
            await action(exchange, *args, **kwargs)

        return Step(action.__name__, (*args, *kwargs.values()), play)

    return make


# --- Steps ------------------------------------------------------------------------


@_step
async def send(exchange: Exchange, data: bytes) -> None:
    """Write the bytes, and continue when the kernel has taken all of them."""
    await exchange.write(data)


@_step
async def flood(exchange: Exchange, data: bytes) -> None:
    """Write the same bytes again and again, until the peer closes."""
    while True:
        await exchange.write(data)
        await asyncio.sleep(0)  # the kernel may always have taken all of it


@_step
async def wait(exchange: Exchange, barrier: Barrier) -> None:
    """Wait for an event (a name is one of `worker.event()`), or take a permit."""
    if isinstance(barrier, str):
        barrier = exchange.worker.event(barrier)
    if isinstance(barrier, asyncio.Semaphore):
        await exchange.unless_hung_up(barrier.acquire())
    else:
        await exchange.unless_hung_up(barrier.wait())


@_step
async def notify(exchange: Exchange, name: str) -> None:
    """Set the named event, so that the test can wait for this place in the script."""
    exchange.worker.event(name).set()


@_step
async def pause(exchange: Exchange, seconds: float) -> None:
    """Let time pass: for a pace that a test is about, never to order things."""
    await exchange.unless_hung_up(asyncio.sleep(seconds))


@_step
async def give_way(exchange: Exchange) -> None:
    """Let all other callbacks of the event loop run once."""
    await asyncio.sleep(0)


@_step
async def stall(exchange: Exchange) -> None:
    """Do nothing until the peer closes."""
    await exchange.unless_hung_up(asyncio.get_running_loop().create_future())


@_step
async def kill(exchange: Exchange) -> None:
    """End as a process that dies with all sent: FIN, and over TLS no more than that."""
    exchange.kill()


@_step
async def reset(exchange: Exchange) -> None:
    """End the connection with RST, as a machine does that came back without it."""
    exchange.reset()


@_step
async def close(exchange: Exchange) -> None:
    """End the connection with FIN, after what was sent."""
    exchange.close()


@_step
async def expect_eof(exchange: Exchange, timeout: float = DEADLINE) -> None:
    """Wait for the peer to close; the worker's exit fails when it does not."""
    try:
        async with asyncio.timeout(timeout):
            await exchange.hung_up.wait()
    except TimeoutError:
        text = f"{exchange.request!r}: no hang-up of the peer within {timeout} s"
        raise AssertionError(text) from None


@_step
async def read_body(exchange: Exchange, limit: int | None = None) -> None:
    """Read the body to its end, or until `limit` bytes of it are here."""
    await exchange.read_body(limit)


@_step
async def not_read_body(exchange: Exchange) -> None:
    """Read nothing more from the socket, so that the peer's writes block.

    A hang-up of the peer is not seen either from here on.
    """
    exchange.stop_reading()


# --- Whole scripts ----------------------------------------------------------------


def answer(obj: Any, status: int = 200) -> Script:
    """Answer with JSON and keep the connection, whatever the status."""
    return (send(replies.json_reply(obj, status)),)


def chat_stream(
    texts: Iterable[str],
    *,
    reason: str = "stop",
    model: str = MODEL,
    usage: bool = False,
    timings: Mapping[str, Any] | None = None,
    pace: float | Barrier | None = None,
) -> Script:
    """Stream a complete chat answer and close the connection, as llama-server does.

    `pace` is passed before each token but the first: seconds, or a barrier (a
    semaphore lets the test release token by token).
    """
    texts = list(texts)
    counted = replies.usage_of(len(texts)) if usage else None
    timings = timings or replies.timings_of(len(texts))
    # The role and the first token come in one chunk.
    steps = [send(sse_head())]
    first = b"".join(replies.token(text, model=model) for text in texts[:1])
    steps.append(send(chunk(replies.role(model=model) + first)))
    for text in texts[1:]:
        if isinstance(pace, int | float):
            steps.append(pause(pace))
        elif pace is not None:
            steps.append(wait(pace))
        steps.append(send(chunk(replies.token(text, model=model))))
    ending = replies.finish(reason, timings, model=model, usage=counted)
    return (*steps, send(chunk(ending)), *_end(replies.done()))


def stream_of(
    n: int,
    pace: float | Barrier | None = None,
    *,
    model: str = MODEL,
    usage: bool = False,
) -> Script:
    """Stream `n` tokens, " t0", " t1" and so on, to a complete end."""
    texts = (f" t{number}" for number in range(n))
    return chat_stream(texts, reason="length", model=model, usage=usage, pace=pace)


def event_stream(*chunks: bytes) -> Script:
    """Stream these pieces, each as an HTTP chunk, and end cleanly."""
    return (send(sse_head()), *(send(chunk(data)) for data in chunks), *_end())


def _end(*events: bytes) -> Script:
    return (*(send(chunk(data)) for data in events), send(last_chunk()), close())
