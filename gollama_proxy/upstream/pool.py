"""The connections to one worker: how they are opened, and kept while they are idle.

llama-server announces `Keep-Alive: timeout=5, max=100`, which holds for plain answers
only: it closes a connection 5.0 s after the last request, and after every event stream
although it has announced that it would not.  So idle connections are kept for less
than 5 s, and a request on a used connection has to be repeated if the connection turns
out to be dead.

Other servers keep connections open after a stream.  The pool learns which kind it has:
after a stream, one connection is put on probation, which means that it is not used.  If
the worker closes it, nothing is lost.  If it is still open after `PROBATION` seconds,
connections are reused after streams as well, until the worker closes one.

A llama-server has four threads more than slots.  A burst of more connections than that
can leave it without a thread for any other request, `/health` included, until the
answers have ended (cpp-httplib, `ThreadPool::enqueue`).  The hub sends no more requests
than there are slots; connections beyond that are opened one by one, `SPACING` apart.

`loop.create_connection` with a numeric address is the cheapest correct way on uvloop:
28 µs of CPU where the system calls alone take 17.  A socket of our own, connected with
`sock_connect` or `connect_ex`, took 44 to 89 µs.  Resolving a name takes a thread and
another 100 µs, and llama-server needs a new connection after each stream, so addresses
are kept for a moment.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Sequence

from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Config, WorkerConfig
from gollama_proxy.config.tls import Credentials, explain_tls
from gollama_proxy.tasks import held_up
from gollama_proxy.upstream.connection import Connection, ConnectionState
from gollama_proxy.upstream.names import resolve
from gollama_proxy.wire.errors import Code, WorkerError

# Seconds for which the addresses of a name are used; not beyond a failed connection.
RESOLVED_FOR = 5.0
# Seconds between two connections beyond the slots; at 50 ms none was seen to hang.
SPACING = 0.05
# Seconds for which a worker has to leave a connection open after a stream.  A worker
# that closes does so within a millisecond, unless its machine is very busy.
PROBATION = 0.5
# How often a connection gets more time because the event loop was held up.
CHANCES = 5
# Seconds until a worker that closes after streams is put to the test again: another
# server may run at its address by then.
RETRIAL = 60.0

_IDLE = ConnectionState.IDLE  # looked up once (benchmarks/RESULTS.md)


class Target:
    """A worker, the TLS credentials for it (None for http), and its addresses."""

    def __init__(
        self,
        worker: WorkerConfig,
        tls: Credentials | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.tls = tls
        self._clock = clock
        self.port = worker.origin.ports[0]
        self.found = len(worker.origin.ports) == 1  # whether it has answered there
        self._addresses: list[str] = []
        self._valid_until = -math.inf
        fixed = worker.origin.address or worker.origin.host
        if addresses.is_plain_host(fixed):
            # It was checked when the configuration was loaded, or when it was found.
            self._addresses, self._valid_until = [fixed], math.inf

    def __repr__(self) -> str:
        return f"<Target {self.worker.name} {self._addresses}>"

    def at(self, port: int) -> Target:
        """Return the same worker at another port."""
        other = Target(self.worker, self.tls, self._clock)
        other.port = port
        return other

    def known_addresses(self) -> Sequence[str]:
        """Return the addresses if they are known; else none."""
        return self._addresses if self._clock() < self._valid_until else ()

    async def resolve(self) -> Sequence[str]:
        """Look up the addresses.

        Raises:
            OSError: the name does not resolve, or only to addresses that are refused.
        """
        origin = self.worker.origin
        self._addresses = await resolve(origin.host, self.port)
        self._valid_until = self._clock() + RESOLVED_FOR
        return self._addresses

    def forget_addresses(self) -> None:
        """Resolve the name again the next time."""
        if self._valid_until < math.inf:
            self._valid_until = -math.inf


async def connect(target: Target, *, any_answer: bool = False) -> Connection:
    """Open a connection: the worker's addresses are tried one after the other.

    `any_answer` is for answers that no client gets to see (see `Connection`).

    Raises:
        OSError: that of the last address; also for a name that does not resolve
            (`socket.gaierror`) and for TLS (`ssl.SSLError`).
    """
    origin = target.worker.origin
    context = None if target.tls is None else target.tls.context
    factory = (
        functools.partial(Connection, any_answer=True) if any_answer else Connection
    )
    loop = asyncio.get_running_loop()
    failure = OSError()
    try:
        for address in target.known_addresses() or await target.resolve():
            try:
                _, connection = await loop.create_connection(
                    factory,
                    address,
                    target.port,
                    ssl=context,
                    server_hostname=origin.host if context else None,
                )
            except OSError as exc:
                failure = exc
            else:
                return connection
        raise failure
    except BaseException:  # also the end of a time limit
        target.forget_addresses()
        raise


# --- Connections that are kept ----------------------------------------------------


class ConnectionPool:
    """The idle connections to one worker; the one used last is reused first."""

    def __init__(
        self,
        worker: WorkerConfig,
        config: Config,
        clock: Callable[[], float],
        tls: Credentials | None = None,
        surplus: Callable[[], int] = int,
    ) -> None:
        """Make a pool; `tls` is required for an https worker, and only for one.

        `surplus` returns how many more requests than slots the worker has.
        """
        assert (worker.origin.scheme == "https") == (tls is not None), worker
        self.worker = worker
        self.target = Target(worker, tls, clock)
        self.keeps_after_streams = False  # what has been learnt about this worker
        self._adopt(config)
        self._clock = clock
        self._idle: list[Connection] = []
        self._on_probation: Connection | None = None
        self._next_probation = 0.0
        self._surplus = surplus
        self._next_dial = 0.0  # for connections beyond the slots
        # For metrics; a user that closes its connection lowers `in_use` itself.
        self.in_use = self.opened = self.reused = 0

    def __repr__(self) -> str:
        return f"<ConnectionPool {self.worker.name} idle={len(self._idle)}>"

    @property
    def idle(self) -> int:
        """The number of connections that wait for a request."""
        return len(self._idle)

    def reconfigure(self, worker: WorkerConfig, config: Config) -> None:
        """Take other settings for the same address, such as its key."""
        self.worker = worker
        self.target.worker = worker
        self._adopt(config)

    def _adopt(self, config: Config) -> None:
        self._connect_timeout = config.timeouts.connect
        self._keepalive = config.upstream.keepalive
        self._capacity = config.upstream.idle if config.upstream.keepalive else 0

    def reuse(self) -> Connection | None:
        """Return an idle connection, or None if there is none that can be used."""
        idle, clock = self._idle, self._clock
        while idle:
            connection = idle[-1]
            if connection.state is _IDLE:
                if clock() - connection.idle_since >= self._keepalive:
                    return None  # the others are older; `close_stale` closes them all
                self.in_use += 1
                self.reused += 1
                return idle.pop()
            self.discard(idle.pop())
        return None

    def give_back(self, connection: Connection, *, streamed: bool = False) -> None:
        """Keep a connection if it can be reused; `streamed` after an event stream."""
        self.in_use -= 1
        if not connection.reusable or len(self._idle) >= self._capacity:
            connection.close()
        elif streamed and not self.keeps_after_streams:
            self._put_on_probation(connection)
        else:
            clock = self._clock
            connection.idle_since = clock()
            connection.streamed = streamed
            self._idle.append(connection)

    def discard(self, connection: Connection) -> None:
        """Close a connection that the worker has closed while it was idle."""
        connection.close()
        now = self._clock()
        # Closed later than that, it was not because of the stream.
        if connection.streamed and now - connection.idle_since < PROBATION:
            self.keeps_after_streams = False
            self._next_probation = now + RETRIAL

    def close_stale(self) -> None:
        """Close what has been idle for too long; to be called about once a second."""
        now = self._clock()
        self._end_probation(now)
        oldest = now - self._keepalive
        kept = []
        for connection in self._idle:
            if connection.state is not ConnectionState.IDLE:
                self.discard(connection)
            elif connection.idle_since <= oldest:
                connection.close()
            else:
                kept.append(connection)
        self._idle = kept

    def close(self) -> None:
        """Close every idle connection; those in use are closed when given back."""
        self._capacity = 0
        if self._on_probation is not None:
            self._on_probation.close()
            self._on_probation = None
        while self._idle:
            self._idle.pop().close()

    # --- Probation ----------------------------------------------------------------

    def _put_on_probation(self, connection: Connection) -> None:
        """Leave a connection open to see what the worker does; one at a time."""
        now = self._clock()
        if now < self._next_probation:
            connection.close()
            return
        self._next_probation = now + RETRIAL
        connection.idle_since = now
        self._on_probation = connection

    def _end_probation(self, now: float) -> None:
        """Learn from the connection on probation, if it has been open long enough."""
        connection = self._on_probation
        if connection is None:
            return
        if connection.state is ConnectionState.IDLE:
            if now - connection.idle_since < PROBATION:
                return
            self.keeps_after_streams = True
        self._on_probation = None
        connection.close()

    # --- Opening a connection -----------------------------------------------------

    async def dial(self) -> Connection:
        """Open a connection.

        Raises:
            WorkerError: 502, it cannot be reached; 504, not within the connect timeout.
        """
        if self._surplus() > 0:
            await asyncio.sleep(self._spacing())
        limit = _Limit(self._connect_timeout)
        try:
            connection = await connect(self.target)
            self.in_use += 1
            self.opened += 1
            return connection
        except asyncio.CancelledError:
            if not limit.exceeded():
                raise
            raise self._too_late() from None
        except OSError as exc:  # also name resolution and TLS
            raise self._unreachable(exc) from exc
        finally:
            limit.timer.cancel()

    def _too_late(self) -> WorkerError:
        text = (
            f"Worker {self.worker.name} did not accept a connection "
            f"within {self._connect_timeout:g} s."
        )
        return WorkerError(Code.WORKER_TIMEOUT, text)

    def _unreachable(self, error: OSError) -> WorkerError:
        why = explain_tls(error)
        text = f"Worker {self.worker.name} cannot be reached{why and ': '}{why}."
        return WorkerError(Code.WORKER_UNREACHABLE, text, detail=why or str(error))

    def _spacing(self) -> float:
        """Reserve the next moment to open a connection; return the seconds until it."""
        now = self._clock()
        at = max(now, self._next_dial)
        self._next_dial = at + SPACING
        return at - now


class _Limit:
    """Cancels the current task if it takes too long to open a connection.

    `asyncio.timeout` does the same, and takes five calls more.
    """

    __slots__ = ("_cancelled", "_chances", "_late", "_task", "timer")

    def __init__(self, seconds: float) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelled = task.cancelling()
        self._chances = CHANCES
        self._late = False
        self.timer = loop.call_later(seconds, self._expire)

    def __repr__(self) -> str:
        return f"<Limit{' exceeded' if self._late else ''}>"

    def _expire(self) -> None:
        if self._chances and (wait := held_up(self.timer)):
            self._chances -= 1
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(wait, self._expire)
            return
        self._late = True
        self._task.cancel()

    def exceeded(self) -> bool:
        """Return whether it has cancelled the task, and nothing else has."""
        return self._late and self._task.uncancel() <= self._cancelled
