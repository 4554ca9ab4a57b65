"""What systemd passes to a service and expects of it: sd_notify(3), sd_listen_fds(3).

A hub or an agent that was started in another way has a `Service` that sends nothing.

The notify protocol is one datagram for each message, with lines such as `READY=1`; any
program can send them, so no library is needed.  A message that systemd cannot take at
once waits here: the event loop never does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import resource
import socket
import stat
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import NamedTuple, Self, TypeVar

from gollama_proxy.config.values import ConfigError
from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# Enough for any hub; taken where the hard limit of open files is infinite.
_MANY_FILES = 1 << 20
STATUS_EVERY = 1.0  # seconds between two looks at the status
# Seconds for which each message during the stop extends systemd's time limit.  There is
# one a second, and a few may be late.
EXTENSION = 10.0
FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
METRICS = "metrics"  # the FileDescriptorName of sockets that serve only /metrics

_VARIABLES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)


OUTCOME = "X_GOLLAMA_RELOADED"  # in a message to the parent of several processes
REFUSED = "refused: "  # begins the outcome of a reload that has changed nothing


class Load(NamedTuple):
    """What a hub does, for its status."""

    usable: int = 0  # workers
    workers: int = 0
    running: int = 0  # requests
    waiting: int = 0

    @classmethod
    def parse(cls, words: str) -> Self:
        """Read what `words` wrote.

        Raises:
            ValueError, TypeError: it was not written by `words`.
        """
        return cls(*map(int, words.split()))

    @property
    def words(self) -> str:
        return " ".join(map(str, self))

    def __str__(self) -> str:
        of, running = count(self.workers, "worker"), count(self.running, "request")
        return f"{self.usable} of {of} ready; {running} running, {self.waiting} waiting"


class Listeners(NamedTuple):
    """The listening sockets that were inherited."""

    clients: Sequence[socket.socket] = ()
    metrics: Sequence[socket.socket] = ()


class Feed:
    """Decides when the watchdog is fed, from how late the event loop runs.

    A loop that is blocked makes no decision, so nothing is sent.  One that turns too
    slowly to be of use has late timers: it is not fed then, and looked at again soon,
    so that a single delay does not end the service.
    """

    def __init__(self, limit: float) -> None:
        """Feed a watchdog that waits at most `limit` seconds."""
        self._limit = limit

    def __repr__(self) -> str:
        return f"<Feed limit={self._limit:g}>"

    def after(self, late: float) -> tuple[bool, float]:
        """Return whether to feed now, and the seconds until the next look.

        `late` is by how many seconds this look began late.
        """
        if late > self._limit / 4:
            return False, self._limit / 16
        return True, self._limit / 2


class Service:
    """The connection to systemd, which learns what the program does."""

    def __init__(
        self,
        address: str = "",
        watchdog: float = 0.0,
        listeners: Listeners | None = None,
    ) -> None:
        """Make one; nothing is sent before `start`.

        `address` is that of systemd's socket, a path or an abstract name with @; empty:
        nothing is ever sent.  `watchdog` is in seconds, 0 for none.
        """
        self.listeners = listeners or Listeners()
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self._socket: socket.socket | None = None
        self._unsent: list[str] = []  # messages that must not be lost
        self._describe: Callable[[], str] | None = None
        self._status = ""  # the last one that was sent
        self._ready = self._stopping = False
        self._failed = False  # and that was logged
        self._reloads = 0  # under way
        self._feed = Feed(watchdog)
        self._reports = Periodic("status for systemd", self._report, STATUS_EVERY)
        self._feeding: Periodic | None = None
        if watchdog and address:
            self._feeding = Periodic(
                "feeding of systemd's watchdog", self._feed_once, watchdog / 2, delay=0
            )

    def __repr__(self) -> str:
        address = self._address.replace("\0", "@")
        return f"<Service {address!r} {self._status!r}>"

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Self:
        """Take what systemd has passed to this process.

        The variables are removed, so that no child process takes itself for a service.

        Raises:
            ConfigError: a variable or a descriptor is not what systemd passes.
        """
        found = {name: environ.pop(name, "") for name in _VARIABLES}
        address = found["NOTIFY_SOCKET"]
        if address and address[0] not in "/@":
            text = "must be a path, or a name that begins with @"
            raise ConfigError(f"NOTIFY_SOCKET = {address!r}: {text}")
        return cls(address, _watchdog(found), _listeners(found))

    @property
    def notifies(self) -> bool:
        """Whether systemd waits for messages."""
        return bool(self._address)

    @property
    def watched(self) -> bool:
        """Whether systemd waits for signs of life."""
        return self._feeding is not None

    # --- Life ---------------------------------------------------------------------

    def start(self) -> None:
        """Begin to feed the watchdog, and to send what waits."""
        if not self._address:
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._reports.start()
        if self._feeding is not None:
            self._feeding.start()

    async def stop(self) -> None:
        """Send nothing more; harmless if it was never started."""
        await self._reports.stop()
        if self._feeding is not None:
            await self._feeding.stop()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- What the program does ----------------------------------------------------

    def describe(self, status: Callable[[], str]) -> None:
        """Take another status, which is looked at every second and sent if it differs.

        It is a line, without any user's text.
        """
        self._describe = status
        self._send_status()

    def ready(self) -> None:
        """Report that the program serves; only the first call does."""
        if not self._ready and not self._stopping:
            self._ready = True
            self._send("READY=1")
            self._send_status()

    def reload(
        self,
        reload: Callable[[], asyncio.Task[_T]],
        outcome: Callable[[_T], str] | None = None,
    ) -> None:
        """Run a reload, between the two messages that systemd expects around one.

        With `outcome`, the second one has the line that it returns, for a parent.
        """
        if not self._address:
            _ = reload()
            return
        self._reloads += 1
        # systemd compares this with the moment at which it asked for the reload.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        reload().add_done_callback(lambda task: self._reloaded(task, outcome))

    def _reloaded(
        self, task: asyncio.Task[_T], outcome: Callable[[_T], str] | None
    ) -> None:
        self._reloads -= 1
        if not self._reloads and not self._stopping:
            message = "READY=1"
            if outcome is not None and not task.cancelled():
                message += f"\n{OUTCOME}={outcome(task.result())}"
            self._send(message)
            self._send_status()

    def stopping(self, status: Callable[[], str]) -> None:
        """Report that the program ends, and extend systemd's time limit until it has.

        The unit's TimeoutStopSec is for programs that report nothing meanwhile.
        """
        self._stopping = True
        self._send("STOPPING=1")
        self._send(_extension())
        self.describe(status)

    # --- Messages -----------------------------------------------------------------

    async def _report(self) -> None:
        self._flush()
        if self._stopping:
            self._send_or_drop(_extension())
        self._send_status()

    async def _feed_once(self) -> float:
        assert self._feeding is not None, self
        healthy, wait = self._feed.after(self._feeding.late)
        if healthy:
            self._send_or_drop("WATCHDOG=1")
        else:
            late = self._feeding.late
            logger.warning("the event loop was late by %.1f s: no sign of life", late)
        return wait

    def _send_status(self) -> None:
        if not self._address or self._describe is None:
            return
        status = self._describe()
        # It must not overtake a message that waits.
        changed = status != self._status and not self._unsent
        if changed and self._send_or_drop(f"STATUS={status}"):
            self._status = status

    def _send(self, message: str) -> None:
        """Send a message now, or as soon as possible."""
        if self._address:
            self._unsent.append(message)
            self._flush()

    def _flush(self) -> None:
        while self._unsent and self._send_or_drop(self._unsent[0]):
            del self._unsent[0]

    def _send_or_drop(self, message: str) -> bool:
        """Return whether there is no need to send this again."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto(message.encode(), self._address)
        except BlockingIOError:  # systemd is busy
            return False
        except OSError as exc:
            if not self._failed:
                logger.warning("systemd cannot be notified: %s", exc.strerror or exc)
            self._failed = True
        return True


def raise_file_limit() -> int:
    """Raise the limit of open files as far as is allowed; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS has a lower one that it does not report
        return soft
    logger.info("raised the limit of open files from %d to %d", soft, wanted)
    return wanted


def _extension() -> str:
    return f"EXTEND_TIMEOUT_USEC={int(EXTENSION * 1e6)}"


def count(number: int, noun: str) -> str:
    """Return a number of things, for a status."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- What systemd passes ----------------------------------------------------------


def _watchdog(environ: Mapping[str, str]) -> float:
    """Return the seconds that systemd waits for a sign of life; 0: it does not."""
    value, owner = environ["WATCHDOG_USEC"], environ["WATCHDOG_PID"]
    if not value or (owner and owner != str(os.getpid())):
        return 0.0
    if not value.isascii() or not value.isdigit() or not int(value):
        text = "must be a number of microseconds above 0"
        raise ConfigError(f"WATCHDOG_USEC = {value!r}: {text}")
    return int(value) / 1e6


def _listeners(environ: Mapping[str, str]) -> Listeners:
    """Take the descriptors that are for this process."""
    number, names = environ["LISTEN_FDS"], environ["LISTEN_FDNAMES"]
    if not number or environ["LISTEN_PID"] != str(os.getpid()):
        return Listeners()
    if not number.isascii() or not number.isdigit():
        raise ConfigError(f"LISTEN_FDS = {number!r}: must be a number of descriptors")
    clients: list[socket.socket] = []
    metrics: list[socket.socket] = []
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(number))
    for descriptor, name in itertools.zip_longest(descriptors, names.split(":")):
        if descriptor is not None:
            found = _listener(descriptor, name or "unnamed")
            (metrics if name == METRICS else clients).append(found)
    return Listeners(clients, metrics)


def _listener(descriptor: int, name: str) -> socket.socket:
    shown = f"descriptor {descriptor} ({name})"
    text = "must be a listening stream socket (ListenStream= with Accept=no)"
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{shown}: {text}")
        found = socket.socket(fileno=descriptor)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as exc:
        raise ConfigError(f"{shown}: {exc.strerror}; {text}") from exc
    if found.type != socket.SOCK_STREAM or not listens:
        with contextlib.suppress(OSError):
            found.detach()
        raise ConfigError(f"{shown}: {text}")
    found.setblocking(False)
    os.set_inheritable(descriptor, False)
    return found
