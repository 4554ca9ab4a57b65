"""Processes that are forked, as the imports of a hub cost half a second of every start.

A server, one for each process of pytest, has imported all that a hub may need.  Each
command is a fork of it, with descriptors, variables, arguments and a folder as given.
What is tested of a start itself needs a real one: what a command imports, the memory
that it takes, and the options of Python.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

_ABOVE = 500  # more descriptors than the server ever has, and fewer than it may
ROOT = Path(__file__).parent.parent.parent


class _Pipe(asyncio.StreamReaderProtocol):
    """What reads the output of a process; `lost` once the pipe is closed."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self.reader = reader
        self.lost = asyncio.Event()

    def eof_received(self) -> bool:
        super().eof_received()
        return False  # close it

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lost.set()


class Process:
    """A forked process: what is used of `asyncio.subprocess.Process`."""

    def __init__(self, report: int, output: _Pipe, *, both: bool) -> None:
        """Follow a process: the server writes its number and status to `report`."""
        self.pid = 0
        self.returncode: int | None = None
        self.stdout = output.reader if both else None
        self.stderr = None if both else output.reader
        self._output = output
        self._report = report
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(report, self._read)

    def __repr__(self) -> str:
        return f"<Process {self.pid} status={self.returncode}>"

    def _read(self) -> None:
        for line in os.read(self._report, 100).split():
            if not self.pid:
                self.pid = int(line)
                self._started.set()
                continue
            asyncio.get_running_loop().remove_reader(self._report)
            os.close(self._report)
            self.returncode = int(line)
            self._ended.set()

    async def started(self) -> None:
        """Wait until it has a number."""
        await self._started.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal.

        Raises:
            ProcessLookupError: it has ended.
        """
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for its end; return its status, or the negative number of a signal."""
        await self._ended.wait()
        if self._output.reader.at_eof():
            await self._output.lost.wait()
        assert self.returncode is not None
        return self.returncode

    async def communicate(self) -> None:
        """Wait for its end, and drop what is left of its output."""
        await self._output.reader.read()
        await self.wait()


async def start(
    module: str,
    *arguments: str,
    environ: Mapping[str, str],
    cwd: Path = ROOT,
    descriptors: Sequence[int] = (),
    both: bool = False,
) -> Process:
    """Run a module as `python -m` does, with its error output in a pipe.

    Standard output goes into the same pipe with `both`, else to that of the tests.
    Input is empty.  The `descriptors` become 3, 4, and so on, with the variables that
    systemd sets for them.
    """
    with contextlib.ExitStack() as ours:
        report, reporting = os.pipe()
        output, writing = os.pipe()
        for number in (reporting, writing):
            ours.callback(os.close, number)
        nothing = os.open(os.devnull, os.O_RDONLY)
        ours.callback(os.close, nothing)
        order = _Order(module, list(arguments), dict(environ), str(cwd))
        streams = [nothing, writing if both else 1, writing]
        _server().send(order, [reporting, *streams, *descriptors])
    _, pipe = await asyncio.get_running_loop().connect_read_pipe(
        lambda: _Pipe(asyncio.StreamReader()), os.fdopen(output, "rb", 0)
    )
    process = Process(report, pipe, both=both)
    await process.started()
    return process


def orders() -> int:
    """Return the descriptor over which `forked.py` has the program run.

    Each order is one message, so that several processes may write to it.
    """
    return _server().orders.fileno()


# --- The server -------------------------------------------------------------------


class _Order(NamedTuple):
    """What is to run."""

    module: str
    arguments: list[str]
    environ: dict[str, str]
    cwd: str


class _Server:
    """Our side of the server, which ends with this process."""

    def __init__(self) -> None:
        self.orders, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self._end)

    def __repr__(self) -> str:
        return f"<_Server {self._process.pid}>"

    def send(self, order: _Order, descriptors: Sequence[int]) -> None:
        data = json.dumps(order).encode()
        message = len(data).to_bytes(4, "big") + data
        socket.send_fds(self.orders, [message], descriptors)

    def _end(self) -> None:
        self.orders.close()
        self._process.wait()


@functools.cache
def _server() -> _Server:
    return _Server()


# --- In the server ----------------------------------------------------------------


def _load() -> None:
    """Import all of the program, also what it imports only when that is needed."""
    import gollama_proxy

    found = pkgutil.walk_packages(gollama_proxy.__path__, "gollama_proxy.")
    names = [each.name for each in found if "__main__" not in each.name]
    for name in (*names, "tomllib", "uvloop"):
        importlib.import_module(name)


def _serve(orders: socket.socket) -> _Order | None:
    """Fork for each order, and return it in the child; None when there are no more."""
    reports: dict[int, int] = {}  # the descriptor to report an end to, by process
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and they this
    while True:
        ready, _, _ = select.select([orders, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report_ends(reports)
        if orders not in ready:
            continue
        head, descriptors, _, _ = socket.recv_fds(orders, 4, _ABOVE)
        if not head:
            return None
        with orders.makefile("rb", buffering=0) as file:
            order = _Order(*json.loads(_read(file, int.from_bytes(head, "big"))))
        report, *given = descriptors
        pid = os.fork()
        if not pid:
            orders.detach()
            _become(order, given)
            return order
        reports[pid] = report
        _write(report, pid)
        for each in given:
            os.close(each)


def _read(file: RawIOBase, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += file.read(size - len(data)) or b""
    return data


def _report_ends(reports: dict[int, int]) -> None:
    for pid, report in list(reports.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _write(report, os.waitstatus_to_exitcode(status))
            os.close(reports.pop(pid))


def _write(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # its parent has stopped waiting
        os.write(report, b"%d\n" % number)


def _become(order: _Order, descriptors: list[int]) -> None:
    """Give this process the descriptors and surroundings of a new one."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # First out of the way of each other, and of what is closed.
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD, _ABOVE) for each in descriptors]
    os.closerange(3, _ABOVE)
    for number, each in enumerate(moved):
        os.dup2(each, number)
    os.closerange(_ABOVE, _ABOVE + len(moved))
    os.environ.clear()
    os.environ.update(order.environ)
    if more := len(moved) - 3:
        os.environ |= {"LISTEN_FDS": str(more), "LISTEN_PID": str(os.getpid())}
    os.chdir(order.cwd)
    sys.path[0] = order.cwd
    sys.argv[1:] = order.arguments
    gc.unfreeze()
    gc.enable()


def main() -> None:
    gc.disable()  # as while a command imports what it needs
    _load()
    gc.freeze()  # so that no fork goes through all of it at its first collection
    order = _serve(socket.socket(fileno=int(sys.argv[1])))
    status: object = None
    if order is not None:
        try:
            runpy.run_module(order.module, run_name="__main__", alter_sys=True)
        except SystemExit as exc:
            status = exc.code
    _end(status)


def _end(status: object) -> None:
    """End as `sys.exit(status)` does, but without taking all apart.

    Every object of all modules would be touched, and its memory copied, which takes
    longer than most commands.
    """
    if isinstance(status, int | None):
        threading._shutdown()
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):  # which Python then reports
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit((status or 0) & 0xFF)
    sys.exit(status)


if __name__ == "__main__":
    main()
