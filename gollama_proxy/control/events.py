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

With other hubs (`control/peers.py`), a listener gets what happens at all of them.
Requests and changes have their `hub` then, workers are shown with the requests of all,
and a sample has the sum, the figures of each of the `hubs`, and the mode of the
`store`.  A hub sends what happens there to the others at most once a second, and only
while it has listeners elsewhere.

A listener that connects again gets what happens from then on: there are no ids.  Each
event of a request costs it some microseconds, so of more than `MOST_REQUESTS` that
begin in one second, the others have no events; they are in the sample.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import msgspec

from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.control.history import EVERY, History, Shown
from gollama_proxy.control.merging import Elsewhere
from gollama_proxy.control.views import Views
from gollama_proxy.edge.response import CLOSE, KEEP, Sent, frame, head
from gollama_proxy.fleet.registry import Listener
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.exchange import Proxy
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.tasks import Periodic, spawn
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.wire import sse
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.schema import ENDPOINTS

if TYPE_CHECKING:
    from aiohttp import web

    from gollama_proxy.control.peers import Peers  # only with a store

logger = logging.getLogger(__name__)
audit = logging.getLogger("gollama_proxy.audit")

MOST_LISTENERS = 32
MOST_EVENTS = 1000  # that wait for one listener
MOST_REQUESTS = 100  # that have events, of those that begin within a second
MOST_NEWS = 1000  # events that other hubs get at once
WATCHED = 5.0  # seconds for which others send their events, unless they are asked again
ALL = 15  # samples, of which one has all workers, for hubs that missed one
# Events of one hub; the others are about workers, which all hubs have.
_MARKED = ("exchange", "queue", "change")

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
        self.listeners: set[_Queue] = set()
        self.active = False  # else nothing needs to be published
        self._peers: Peers | None = None
        self._elsewhere = Elsewhere(time.monotonic)
        self._news: list[tuple[str, Shown]] | None = None  # for other hubs
        self._samples = 0
        self._closed = False
        self._changed: set[Worker] = set()  # that are shown soon
        self._followed: set[Exchange] = set()  # whose next events are published, too
        self._left = MOST_REQUESTS  # that may still begin in this second
        self._sampler = Periodic("samples", self._sample, EVERY, delay=0.0)

    def __repr__(self) -> str:
        return f"<Events listeners={len(self.listeners)}>"

    def join(self, peers: Peers) -> None:
        """Share events with other hubs from now on."""
        self._peers = peers

    def publish(self, event: str, data: Shown) -> None:
        """Send an event to all listeners, and to hubs where it is followed."""
        if self._news is not None and event != "fleet" and len(self._news) < MOST_NEWS:
            self._news.append((event, data))
        if self.listeners:
            if self._peers is not None:
                if event in _MARKED:
                    data = {**data, "hub": self._peers.name}
                elif event == "worker":
                    data = self._elsewhere.worker(self._peers.name, data)
            self._send(event, data)

    def _send(self, event: str, data: Shown) -> None:
        sent = _event(event, data)
        for listener in tuple(self.listeners):
            if not listener.put(sent):
                self._leave(listener)

    def record_change(
        self, x: Record, action: str, target: str, old: object = "", new: object = ""
    ) -> None:
        """Log a change with its author, the old value and the new one.

        Where keys of a worker were changed, both are objects in JSON.
        """
        changed = ("old", old), ("new", new)
        fields = {
            "subject": x.subject,
            "remote": x.remote,
            "action": action,
            "target": target,
            **{name: _text(value) for name, value in changed if value},
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
        if self.active:
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
        self._samples += 1
        if self.listeners:
            self._send("sample", self._shown(changed))
        if self._peers is not None:
            await self._exchange_news(self._peers, changed)

    def _shown(self, workers: Collection[Shown], *, full: bool = False) -> Shown:
        """Return a sample with these workers; `full`: they are all that there are."""
        kept, peers = self._history, self._peers
        sample = {"time": kept.time, **kept.latest, "workers": workers}
        if peers is None:
            return sample
        rows = [*workers]
        known = {each["name"] for each in workers}
        if not full and (others := self._elsewhere.changed() - known):
            fleet = (each for each in self._views.fleet if each.name in others)
            rows += self._history.present(fleet)
        shown = self._elsewhere.sample(peers.name, sample, rows)
        return shown | {"store": peers.store}

    # --- Other hubs ---------------------------------------------------------------

    async def _exchange_news(self, peers: Peers, changed: Collection[Shown]) -> None:
        """Ask the others for their events, and send what they follow; once a second."""
        if self.listeners and self._samples % 2:
            await peers.watch(WATCHED)
        if not peers.watched:
            self._news = None
            self._look()
            return
        if self._news is None or self._samples % ALL == 0:
            changed = self._history.present(self._views.fleet)
        kept = self._history
        sample = {"time": kept.time, **kept.latest, "workers": changed}
        events, self._news = [*(self._news or ()), ("sample", sample)], []
        self._look()
        await peers.send_news(events)

    def take_news(self, hub: str, events: Iterable[tuple[str, Shown]]) -> None:
        """Take what another hub has sent."""
        if not self.listeners or self._peers is None:
            return
        for event, data in events:
            if event == "sample":
                self._elsewhere.take(hub, data)
            elif event in _MARKED:
                self._send(event, {**data, "hub": hub})
            elif event == "worker":
                self._elsewhere.take_worker(hub, data)
                for worker in self._views.fleet:
                    if worker.name == data["name"]:
                        view = self._views.worker(worker)
                        view = self._elsewhere.worker(self._peers.name, view)
                        self._send("worker", view)

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
        self.listeners.add(listener)
        self._look()
        if self._peers is not None:
            _ = spawn(self._peers.watch(WATCHED), "request for events")
        workers = self._history.present(self._views.fleet)
        listener.put(_event("sample", self._shown(workers, full=True)))
        if self._closed:
            listener.end("the hub shuts down")

    def _leave(self, listener: _Queue) -> None:
        self.listeners.discard(listener)
        self._look()

    def _look(self) -> None:
        """Observe requests if they are followed anywhere."""
        self.active = bool(self.listeners) or self._news is not None
        self._proxy().observer = self.observe if self.active else None
        if not self.active:
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


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode() if type(value) is dict else str(value)
