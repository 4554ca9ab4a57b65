"""The part of systemd that a service speaks with: messages, and sockets for it."""

from __future__ import annotations

import asyncio
import select
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.client import DEADLINE


class Systemd:
    """A datagram socket, at a path or under an abstract name."""

    def __init__(self, address: Path | str) -> None:
        self.address = str(address)
        self.messages: list[str] = []  # all that were read, with STATUS= and the rest
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        name = self.address
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)

    def __repr__(self) -> str:
        return f"<Systemd {self.address} {self.messages[-3:]}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    @property
    def environ(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address}

    @property
    def status(self) -> str:
        """The last status that was read."""
        lines = [each for each in self.messages if each.startswith("STATUS=")]
        return lines[-1].removeprefix("STATUS=") if lines else ""

    async def next(self) -> str:
        """Read one message."""
        message = await asyncio.get_running_loop().sock_recv(self._socket, 4096)
        self.messages.append(message.decode())
        return self.messages[-1]

    async def until(self, begin: str) -> str:
        """Read on until a message that begins like this, and return it."""
        try:
            async with asyncio.timeout(DEADLINE):
                while not (message := await self.next()).startswith(begin):
                    pass
        except TimeoutError:
            raise AssertionError(f"{self!r}: no {begin!r}") from None
        return message

    async def shows(self, status: str) -> None:
        """Read on until the status begins like this, unless it does already."""
        while not self.status.startswith(status):
            await self.until("STATUS=")

    def arrived(self) -> list[str]:
        """Read what is there, without waiting."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                self.messages += found
                return found

    def arrives_within(self, seconds: float) -> bool:
        """Block until a message arrives; return whether one did within the time."""
        return bool(select.select([self._socket], [], [], seconds)[0])


def listening(family: int = socket.AF_INET, address: object = None) -> socket.socket:
    """Return a socket that listens, as a socket unit makes one."""
    found = socket.socket(family)
    default = ("::1", 0) if family == socket.AF_INET6 else ("127.0.0.1", 0)
    found.bind(default if address is None else address)
    found.listen()
    return found
