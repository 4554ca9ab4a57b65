"""What happens in a hub, as a stream of events, and a sample each second.

Without listeners, only the samples cost something (`History`): the parts of the hub
have no observer then.

    event      data
    worker     a worker, after its state, breaker, hold or models have changed
    fleet      {"change": "added", "replaced", "removed" or "gone", "worker": name}
    exchange   {"change": "started", "attempt" or "ended", …the request}
    queue      {"change": "joined", …the request}; `attempt` or `ended` follows
    change     an operator has changed something, as in the log
    sample     figures of the last second, as in `History`: of the hub, and in `workers`
               of those workers whose figures differ from the last sample; the first
               sample that a listener gets has all workers
    dropped    this listener did not read fast enough; the stream ends
    closed     the hub shuts down, or the token is no longer valid; the stream ends

A listener that connects again gets what happens from then on: there are no ids.  Each
event of a request costs it some microseconds, so of more than `MOST_REQUESTS` that
begin in one second, the others have no events; they are in the sample.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import msgspec

from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.control.history import EVERY, History, Shown
from gollama_proxy.control.views import Views
from gollama_proxy.edge.response import CLOSE, KEEP, Sent, frame, head
from gollama_proxy.fleet.registry import Listener
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.exchange import Proxy
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.tasks import Periodic
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.wire import sse
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.schema import ENDPOINTS

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)
audit = logging.getLogger("gollama_proxy.audit")

MOST_LISTENERS = 32
MOST_EVENTS = 1000  # that wait for one listener
MOST_REQUESTS = 100  # that have events, of those that begin within a second

STREAM = "Content-Type: text/event-stream\r\n" + "".join(
    f"{name}: {value}\r\n" for name, value in sse.STREAM_HEADERS.items()
)

# --- Events -----------------------------------------------------------------------


class Events(Listener):
    """Notifies listeners of what happens."""

    def __init__(
        self, views: Views, history: History, proxy: Callable[[], Proxy]
    ) -> None:
        """`proxy` returns the part that serves requests; it is made later."""
        self._views = views
        self._history = history
        self._proxy = proxy
        self.listeners: set[_Queue] = set()  # empty: nothing needs to be published
        self._closed = False
        self._changed: set[Worker] = set()  # that are shown soon
        self._followed: set[Exchange] = set()  # whose next events are published, too
        self._left = MOST_REQUESTS  # that may still begin in this second
        self._sampler = Periodic("samples", self._sample, EVERY, delay=0.0)

    def __repr__(self) -> str:
        return f"<Events listeners={len(self.listeners)}>"

    def publish(self, event: str, data: Shown) -> None:
        """Send an event to all listeners."""
        if self.listeners:
            sent = _event(event, data)
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
        if x not in self._followed:
            if not self._left:
                return
            self._left -= 1
            self._followed.add(x)
        try:
            self._publish_request(change, x)
        except Exception:  # which must not become the client's
            logger.exception("an event of request %s was lost", x.id)
        if change == "ended":
            self._followed.discard(x)

    def _publish_request(self, change: str, x: Exchange) -> None:
        if change == "queued":
            self.publish("queue", {"change": "joined", **self._views.waiting(x)})
            return
        shown = {"change": change, **self._views.exchange(x)}
        if change == "ended":
            if x.route not in ENDPOINTS:
                return
            shown |= {"status": x.status, "outcome": x.outcome, "error": x.error}
        self.publish("exchange", shown)

    # --- Samples ------------------------------------------------------------------

    def start(self) -> None:
        """Take samples from now on."""
        self._sampler.start()

    async def stop(self) -> None:
        """Take no more samples."""
        await self._sampler.stop()

    async def _sample(self) -> None:
        self._left = MOST_REQUESTS
        changed = self._history.take(*self._views.sampled())
        if self.listeners:
            self.publish("sample", self._shown(changed))

    def _shown(self, workers: Collection[Shown]) -> Shown:
        kept = self._history
        return {"time": kept.time, **kept.latest, "workers": workers}

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
        self._proxy().observer = self.observe
        self.listeners.add(listener)
        workers = self._history.present(self._views.fleet)
        listener.put(_event("sample", self._shown(workers)))
        if self._closed:
            listener.end("the hub shuts down")

    def _leave(self, listener: _Queue) -> None:
        self.listeners.discard(listener)
        if not self.listeners:
            self._proxy().observer = None
            self._followed.clear()

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
        self._events.append(_event(event, {"reason": reason}))
        self.ended = True
        self._woken.set()

    async def take(self) -> bytes:
        """Wait for events, and return all of them."""
        await self._woken.wait()
        self._woken.clear()
        taken = b"".join(self._events)
        self._events.clear()
        return taken


def _event(name: str, data: Shown) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
