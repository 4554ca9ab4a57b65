"""A llama-server made of a script: real sockets, real bytes, every fault on demand.

Control routes (health, models, props) are answered as llama-server does.  Any other
request plays the next queued script, else the standing one, else gets a short complete
answer.  What arrives is parsed strictly and recorded; malformed or pipelined requests
and failed expectations make the `async with` block fail when it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from tests.fakes import replies
from tests.fakes.answers import CONTROL, default_answer
from tests.fakes.exchange import Exchange, Request
from tests.fakes.script import Script, Step, send, stall
from tests.fakes.waiting import DEADLINE


class ScriptedWorker:
    """One fake llama-server with its own port; use it with `async with`.

    Attributes can be changed while it runs: `models`, `slots`, `n_ctx`, `build`,
    `takes`, `status` (of a model, as a router has it: "loaded", "unloaded", "loading"),
    `loading` (503 on every path) and `hang_health` (GET /health is never answered).
    """

    def __init__(
        self,
        *models: str,
        slots: int = 4,
        n_ctx: int = 1024,
        build: str = replies.BUILD,
        takes: tuple[str, ...] = (),
        keep_body: int = 1 << 20,
        receive_buffer: int | None = None,
        up: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.models = list(models or [replies.MODEL])
        self.slots = slots
        self.n_ctx = n_ctx
        self.build = build
        self.takes = takes  # besides text: "vision", "audio", "video"
        self.status: dict[str, str] = {}
        self.loading = False
        self.hang_health = False
        self.keep_body = keep_body

        self.requests: list[Request] = []  # all but the control routes'
        self.control: list[Request] = []
        self.connections = 0  # ever accepted
        self.violations: list[str] = []  # a test may clear what it provoked
        self.failures: list[Exception] = []

        self._queue: deque[Script] = deque()
        self._default: Script | None = None
        self._routes: dict[str, Script] = {}
        self._events: dict[str, asyncio.Event] = {}
        self._open: set[Exchange] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Future[None]] = set()
        self._server: asyncio.Server | None = None
        self._receive_buffer = receive_buffer
        self._start_up = up
        self.tls = tls  # for connections from now on
        # Bound and never listening: the port stays ours while the worker is down, and
        # connections are refused meanwhile.
        self._reservation = _bind(0)
        self.port: int = self._reservation.getsockname()[1]

    def __repr__(self) -> str:
        state = "up" if self._server else "down"
        if self.loading:
            state = "loading"
        return (
            f"<ScriptedWorker {self.name} {state}, {len(self.requests)} requests, "
            f"{len(self._open)} of {self.connections} connections open, "
            f"{len(self._queue)} scripts queued>"
        )

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://{self.name}"

    @property
    def listening(self) -> bool:
        return self._server is not None

    @property
    def open(self) -> int:
        """Count the connections that exist now."""
        return len(self._open)

    # --- Life ---------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._start_up:
            await self.up()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.down()
        self._reservation.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if error is not None:
            error.add_note(f"{self!r}: {self.failures} {self.violations}")
        else:
            if self.failures:
                raise self.failures[0]
            assert not self.violations, f"{self!r} received: {self.violations}"

    async def up(self) -> None:
        """Listen, on the same port as before."""
        assert self._server is None, "is up already"
        sock = _bind(self.port)
        if self._receive_buffer is not None:  # accepted sockets inherit it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Exchange(self), sock=sock, ssl=self.tls
        )

    async def down(self, *, connections: bool = True) -> None:
        """Refuse connections from now on; by default the open ones end, too.

        They end as when a process is killed: FIN, or RST where data was unread.
        """
        server, self._server = self._server, None
        if server is not None:
            server.close()
        if connections:
            for exchange in list(self._open):
                exchange.kill()
            await self.idle()
            if server is not None:
                await server.wait_closed()

    # --- Scripts ------------------------------------------------------------------

    def script(self, *steps: Step) -> None:
        """Queue a script for the next request that has none."""
        self._queue.append(steps)

    def default(self, *steps: Step) -> None:
        """Set what is played when the queue is empty."""
        self._default = steps

    def repair(self) -> None:
        """Answer again as without a script."""
        self._queue.clear()
        self._default = None

    def on(self, path: str, *steps: Step) -> None:
        """Set what is played for each request of a path, control routes included."""
        self._routes[path] = steps

    def event(self, name: str) -> asyncio.Event:
        """Return the event of this name, which `wait()` and `notify()` steps use."""
        return self._events.setdefault(name, asyncio.Event())

    def release(self, name: str) -> None:
        """Let scripts pass that wait for this event, now and later."""
        self.event(name).set()

    async def reached(self, name: str, timeout: float = DEADLINE) -> None:
        """Wait until a script has reached its `notify(name)`."""
        try:
            async with asyncio.timeout(timeout):
                await self.event(name).wait()
        except TimeoutError:
            raise AssertionError(f"{self!r}: {name!r} was not reached") from None

    # --- Observation --------------------------------------------------------------

    async def received(self, n: int = 1, timeout: float = DEADLINE) -> Request:
        """Wait until the heads of `n` requests have arrived; return the n-th."""
        await self._until(lambda: len(self.requests) >= n, f"{n} requests", timeout)
        return self.requests[n - 1]

    async def pinged(self, n: int = 1, timeout: float = DEADLINE) -> None:
        """Wait until control routes have received `n` more requests."""
        n += len(self.control)
        await self._until(lambda: len(self.control) >= n, f"{n} pings", timeout)

    async def idle(self, timeout: float = DEADLINE) -> None:
        """Wait until every connection is closed."""
        await self._until(lambda: not self._open, "no connection", timeout)

    async def _until(
        self, reached: Callable[[], bool], what: str, timeout: float
    ) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not reached():
                    future = asyncio.get_running_loop().create_future()
                    self._watchers.add(future)
                    try:
                        await future
                    finally:
                        self._watchers.discard(future)
        except TimeoutError:
            text = f"{self!r}: still not {what} after {timeout} s"
            raise AssertionError(text) from None

    def _changed(self) -> None:
        for future in self._watchers:
            if not future.done():
                future.set_result(None)

    # --- What a request gets ------------------------------------------------------

    def answer(self, request: Request) -> Script:
        """Return the answer to a request without a script, once its body is there."""
        return default_answer(self, request)

    def _record(self, request: Request) -> Script | None:
        """Note the request and choose its script; None: the default answer."""
        control = request.path in CONTROL
        (self.control if control else self.requests).append(request)
        self._changed()
        if self.loading:
            return (send(replies.loading()),)
        if request.path in self._routes:
            return self._routes[request.path]
        if self.hang_health and request.path.endswith("/health"):
            return (stall(),)
        if control:
            return None
        return self._queue.popleft() if self._queue else self._default


@contextlib.contextmanager
def full_backlog(port: int = 0) -> Iterator[str]:
    """Yield the URL of a listener with a full queue, which ignores every SYN."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_bind(port))
        listener.listen(0)
        for _ in range(2):  # the kernel adds one place
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _bind(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return sock
