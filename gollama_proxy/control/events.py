"""What happens in a hub: the requests that have ended, and a stream of events.

The last `KEPT` requests are kept, without content, as plain tuples: a request costs
half a microsecond for that.  Everything else here costs nothing without listeners:
the parts of the hub have no observer then, and no sample is taken.

    event      data
    worker     a worker, after its state, breaker, hold or models have changed
    fleet      {"change": "added", "replaced", "removed" or "gone", "worker": name}
    exchange   {"change": "started", "attempt" or "ended", …the request}
    queue      {"change": "joined", …the request}; `attempt` or `ended` follows
    change     an operator has changed something, as in the log
    sample     numbers of the whole hub, once a second
    dropped    this listener did not read fast enough; the stream ends
    closed     the hub shuts down, or the token is no longer valid; the stream ends

A listener that connects again gets what happens from then on: there are no ids.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.control.views import Shown, Views, tokens_of
from gollama_proxy.edge.response import CLOSE, KEEP, Sent, frame, head
from gollama_proxy.fleet.registry import Listener
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.exchange import Proxy
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.tasks import Periodic
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.wire import sse
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.openai import ENDPOINTS

logger = logging.getLogger(__name__)
audit = logging.getLogger("gollama_proxy.audit")

KEPT = 1000  # requests
MOST_LISTENERS = 32
MOST_EVENTS = 1000  # that wait for one listener
EVERY = 1.0  # seconds between two samples

STREAM = "Content-Type: text/event-stream\r\n" + "".join(
    f"{name}: {value}\r\n" for name, value in sse.STREAM_HEADERS.items()
)

# --- Requests that have ended -----------------------------------------------------

_FIELDS = (
    *("id", "ended", "subject", "remote", "method", "route", "model", "worker"),
    *("status", "outcome", "error", "attempts", "rescued", "fell_back", "queued"),
    *("first_byte", "duration", "tokens", "prompt_tokens", "bytes"),
)


class Recent:
    """The last requests.  `clock` gives monotonic seconds, as in `Record.started`."""

    def __init__(self, clock: Callable[[], float], kept: int = KEPT) -> None:
        self._clock = clock
        self._ended: deque[tuple[Any, ...]] = deque(maxlen=kept)
        self.count = 0  # of all, since the start

    def __repr__(self) -> str:
        return f"<Recent requests={len(self._ended)}>"

    def add(self, x: Record) -> None:
        """Keep what is known of a request for workers that has ended."""
        if x.route not in ENDPOINTS:
            return
        self.count += 1
        # In the order of `_FIELDS`; a tuple costs less than any object with names.
        self._ended.append(
            (
                x.id,
                x.started + (x.duration or 0.0),
                x.subject,
                x.remote,
                x.method,
                x.route,
                x.model,
                x.worker,
                x.status,
                x.outcome,
                x.error,
                x.attempts,
                x.rescued,
                x.fell_back,
                x.queued,
                x.first_byte,
                x.duration,
                x.tokens,
                x.prompt_tokens,
                x.bytes,
            )
        )

    def find(self, limit: int = KEPT, **wanted: str) -> list[Shown]:
        """Return the last requests with these values, the newest first.

        An `outcome` may also be the code of an error.
        """
        found: list[Shown] = []
        for entry in reversed(self._ended):
            request = dict(zip(_FIELDS, entry, strict=True))
            if all(_has(request, name, value) for name, value in wanted.items()):
                found.append(self._shown(request))
                if len(found) >= limit:
                    break
        return found

    def _shown(self, request: Shown) -> Shown:
        ago = self._clock() - request["ended"]
        request["ended"] = round(time.time() - ago, 3)
        request["outcome"] = request["outcome"] or ""
        for name in ("queued", "first_byte", "duration"):
            if request[name] is not None:
                request[name] = round(request[name], 6)
        return request


def _has(request: Shown, name: str, value: str) -> bool:
    if name == "outcome":
        return value in (request["outcome"], request["error"])
    return bool(request[name] == value)


# --- Events -----------------------------------------------------------------------


class Events(Listener):
    """Notifies listeners of what happens."""

    def __init__(
        self, views: Views, recent: Recent, proxy: Callable[[], Proxy]
    ) -> None:
        """`proxy` returns the part that serves requests; it is made later."""
        self._views = views
        self._recent = recent
        self._proxy = proxy
        self.listeners: set[_Queue] = set()  # empty: nothing needs to be published
        self._closed = False
        self._changed: set[Worker] = set()  # that are shown soon
        # Tokens since the last sample, by worker, and those seen of each request.
        self._generated: dict[str, int] = {}
        self._seen: dict[Exchange, int] = {}
        self._sampled_at = 0.0
        self._sampler: Periodic | None = None

    def __repr__(self) -> str:
        return f"<Events listeners={len(self.listeners)}>"

    def publish(self, event: str, data: Shown) -> None:
        """Send an event to all listeners."""
        if self.listeners:
            text = b"event: %b\ndata: %b\n\n"
            sent = text % (event.encode(), msgspec.json.encode(data))
            for listener in tuple(self.listeners):
                if not listener.put(sent):
                    self._leave(listener)

    def record_change(
        self, x: Record, action: str, target: str, old: object = "", new: object = ""
    ) -> None:
        """Log a change with its author, the old value and the new one."""
        fields = {
            "subject": x.subject,
            "remote": x.remote,
            "action": action,
            "target": target,
            **{
                name: str(value)
                for name, value in (("old", old), ("new", new))
                if value
            },
            "id": x.id,
        }
        audit.info("admin", extra={"fields": fields})
        self.publish("change", fields)

    # --- What happens -------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        self._publish_fleet("added", worker)

    def replaced(self, worker: Worker, before: WorkerConfig) -> None:
        self._publish_fleet("replaced", worker)

    def removed(self, worker: Worker) -> None:
        self._publish_fleet("removed", worker)

    def gone(self, worker: Worker) -> None:
        self._publish_fleet("gone", worker)

    def _publish_fleet(self, change: str, worker: Worker) -> None:
        self.publish("fleet", {"change": change, "worker": worker.name})

    def changed(self, worker: Worker) -> None:
        if self.listeners:
            # The worker may be in the middle of a step, and several may follow.
            if not self._changed:
                asyncio.get_running_loop().call_soon(self._show_changed)
            self._changed.add(worker)

    def _show_changed(self) -> None:
        workers, self._changed = self._changed, set()
        for worker in workers:
            self.publish("worker", self._views.worker(worker))

    def observe(self, change: str, x: Exchange) -> None:
        """Notice a request that has its plan, waits, gets to a worker, or has ended."""
        try:
            self._publish_request(change, x)
        except Exception:  # which must not become the client's
            logger.exception("an event of request %s was lost", x.id)

    def _publish_request(self, change: str, x: Exchange) -> None:
        if change == "queued":
            self.publish("queue", {"change": "joined", **self._views.waiting(x)})
            return
        shown = {"change": change, **self._views.exchange(x)}
        if change == "ended":
            if x.route not in ENDPOINTS:
                return
            self._count(x, x.tokens)
            self._seen.pop(x, None)
            shown |= {"status": x.status, "outcome": x.outcome, "error": x.error}
        self.publish("exchange", shown)

    def _sample(self) -> None:
        now = time.monotonic()
        for x in self._proxy().running:
            if x.attempts:
                self._count(x, tokens_of(x))
        seconds = max(now - self._sampled_at, 0.001)
        rates = {
            name: round(tokens / seconds, 1) for name, tokens in self._generated.items()
        }
        self._generated, self._sampled_at = {}, now
        data = {"time": round(time.time(), 3), **self._views.totals()}
        data["requests"] = self._recent.count
        data["tokens_per_second"] = round(sum(rates.values()), 1)
        for worker in data["workers"]:
            worker["tokens_per_second"] = rates.get(worker["name"], 0.0)
        self.publish("sample", data)

    def _count(self, x: Exchange, tokens: int) -> None:
        """Count the tokens that a request has generated since it was last seen."""
        new = tokens - self._seen.get(x, 0)
        self._seen[x] = tokens
        if new > 0:
            self._generated[x.worker] = self._generated.get(x.worker, 0) + new

    # --- Listeners ----------------------------------------------------------------

    async def follow(
        self, request: web.BaseRequest, x: Exchange, check: Callable[[], object]
    ) -> Sent:
        """Send events until the client leaves, or reads too slowly.

        `check` raises a `RequestError` when the caller may not listen any longer.

        Raises:
            RequestError: 429, there are too many listeners.
        """
        if len(self.listeners) >= MOST_LISTENERS:
            text = f"There are {MOST_LISTENERS} listeners, which is the limit."
            raise RequestError(Code.RATE_LIMITED, text, retry_after=5)
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client left")
        chunked = request.version >= (1, 1)
        keep_alive = x.keep_alive and chunked
        fields = STREAM + ("Transfer-Encoding: chunked\r\n" if chunked else "")
        listener = _Queue()
        # It has no natural end: however it ends from here, it was answered.
        x.status, x.outcome = 200, Outcome.COMPLETE
        x.enter(State.ENDED)
        transport.write(head(request, 200, fields + x.lines, keep_alive=keep_alive))
        self._join(listener)
        try:
            while True:
                data = await listener.take()
                last = listener.ended
                if data and not transport.is_closing():
                    x.bytes += len(data)
                    transport.write(frame(data) if chunked else data)
                await request.writer.drain()
                if last:
                    break
                try:
                    check()
                except RequestError:
                    listener.end("the token is no longer valid")
        finally:
            self._leave(listener)
        if chunked and not transport.is_closing():
            transport.write(b"0\r\n\r\n")
        return KEEP if keep_alive else CLOSE

    def _join(self, listener: _Queue) -> None:
        if not self.listeners:
            self._proxy().observer = self.observe
            self._sampled_at = time.monotonic()
            self._seen = {x: tokens_of(x) for x in self._proxy().running if x.attempts}
            self._sampler = Periodic("samples", self._take_sample, EVERY, delay=0.0)
            self._sampler.start()
        self.listeners.add(listener)
        if self._closed:
            listener.end("the hub shuts down")

    def _leave(self, listener: _Queue) -> None:
        self.listeners.discard(listener)
        if not self.listeners and self._sampler is not None:
            self._sampler.cancel()
            self._sampler = None
            self._proxy().observer = None
            self._seen, self._generated = {}, {}

    async def _take_sample(self) -> None:
        self._sample()

    def close(self) -> None:
        """End all streams of events: the hub shuts down."""
        self._closed = True
        for listener in tuple(self.listeners):
            listener.end("the hub shuts down")


class _Queue:
    """The events that wait for one listener."""

    def __init__(self) -> None:
        self.ended = False
        self._events: deque[bytes] = deque()
        self._woken = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Queue of {len(self._events)} events>"

    def put(self, event: bytes) -> bool:
        """Add an event; return False if the listener does not keep up, and is dropped.

        What waits for it is dropped as well, except the notice of that.
        """
        if self.ended:
            return True
        if len(self._events) >= MOST_EVENTS:
            self._events.clear()
            self._finish("dropped", f"{MOST_EVENTS} events were not read in time")
            return False
        self._events.append(event)
        self._woken.set()
        return True

    def end(self, reason: str) -> None:
        """End the stream, behind the events that wait."""
        if not self.ended:
            self._finish("closed", reason)

    def _finish(self, event: str, reason: str) -> None:
        data = msgspec.json.encode({"reason": reason})
        self._events.append(b"event: %b\ndata: %b\n\n" % (event.encode(), data))
        self.ended = True
        self._woken.set()

    async def take(self) -> bytes:
        """Wait for events, and return all of them."""
        await self._woken.wait()
        self._woken.clear()
        taken = b"".join(self._events)
        self._events.clear()
        return taken
