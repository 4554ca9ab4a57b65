"""A real HAProxy in front of two hubs, with the configuration of examples/ha."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from benchmarks.children import last_words, spawn
from gollama_proxy.machine import find_free_ports
from tests.fakes.tools import require
from tests.fakes.waiting import until

CONFIGURATION = Path(__file__).parents[2] / "examples" / "ha" / "haproxy.cfg"


class Gateway:
    """The address that clients use."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def __repr__(self) -> str:
        return f"<Gateway {self.url}>"


@contextlib.asynccontextmanager
async def running_haproxy(hubs: Sequence[int], folder: Path) -> AsyncIterator[Gateway]:
    """Run HAProxy in front of the ports of two hubs; its files are in `folder`."""
    program = require("haproxy", package="haproxy")
    [port] = find_free_ports(1)
    text, _, _ = CONFIGURATION.read_text().partition("# The store with a replica")
    # Few connections, for which it need not be root.
    places = {"bind :8000": f"bind 127.0.0.1:{port}", "maxconn 20000": "maxconn 100"}
    places |= {f"10.0.0.{2 + n}:8000": f"127.0.0.1:{hub}" for n, hub in enumerate(hubs)}
    for shown, here in places.items():
        assert shown in text, shown
        text = text.replace(shown, here)
    file, log = folder / "haproxy.cfg", folder / "haproxy.log"
    file.write_text(text)
    async with spawn([program, "-db", "-f", str(file)], log) as child:
        process = child.process
        await until(lambda: process.returncode is not None or _accepts(port))
        assert process.returncode is None, last_words(log)
        yield Gateway(port)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
