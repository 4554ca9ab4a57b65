"""The command `gollama-proxy agent`: brings a worker's machine into the fleet of hubs.

The agent registers the worker with each hub, renews that every third of the lease,
reports the load of the machine, and gives the worker back when a signal ends it: the
hub sends nothing new, running answers end, and then the agent does.  With `--exec` it
starts the server too, restarts it when it ends, and ends it last.

A hub checks an address by connecting to the agent there, at the proof port.

A hub that is away, or refuses the worker for a reason that can pass, is tried again,
less and less often.  If every hub refuses for a reason that stays, such as a wrong
token, an agent that has just been started ends with status 1.  One that has served
before goes on: its server and its other hubs are not the worse for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import signal
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from gollama_proxy import __version__, llama, machine
from gollama_proxy.children import Supervised
from gollama_proxy.config.mistakes import ConfigError
from gollama_proxy.config.settings import Log
from gollama_proxy.control.client import (
    check_url,
    read_token,
    trust,
)
from gollama_proxy.fleet.agents import answer_to
from gollama_proxy.registration import TIMEOUT, HubLink, Refusal
from gollama_proxy.tasks import Periodic, Signals, spawn
from gollama_proxy.telemetry import logs

logger = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds between two looks at the server


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    hubs: tuple[str, ...]
    discover: bool = False  # look for the hub in the local network
    worker: str = ""  # its URL; empty with a command
    command: tuple[str, ...] = ()
    name: str = ""
    token_file: str = ""
    ca_file: str = ""
    proof_port: int = 0
    weight: float | None = None
    vram_gib: float | None = None
    log: Log = field(default_factory=Log)


# --- The command ------------------------------------------------------------------


def check_options(options: Options, environ: Mapping[str, str]) -> None:
    """Check what was asked for.

    Raises:
        ConfigError: a flag is wrong.
    """
    if bool(options.hubs) == options.discover:
        what = "only one of them" if options.hubs else "is missing"
        text = "must be a URL such as http://gateway:8000, or --discover be given"
        raise ConfigError(f"--hub: {what}; {text}")
    if options.discover and importlib.util.find_spec("zeroconf") is None:
        text = "needs zeroconf; pip install 'gollama-proxy[mdns]'"
        raise ConfigError(f"--discover: {text}")
    for flag, urls in (("--hub", options.hubs), ("--worker", [options.worker])):
        for url in urls:
            if url:
                check_url(flag, url)
    if bool(options.worker) == bool(options.command):
        text = "must be given, and only one of them: --worker URL, or --exec -- COMMAND"
        raise ConfigError(f"--worker, --exec: {text}")
    if options.command and shutil.which(options.command[0]) is None:
        program = options.command[0]
        raise ConfigError(f"--exec = {program!r}: must be an executable file")
    if options.name and not re.fullmatch(r"[!-.0-~]{1,100}", options.name):
        text = "must have 1 to 100 printable ASCII characters, and no / or space"
        raise ConfigError(f"--name = {options.name!r}: {text}")
    if options.ca_file and _credentials(options) is None:
        text = "is for a hub with an https URL"
        raise ConfigError(f"--ca-file = {options.ca_file!r}: {text}")
    read_token(options.token_file, environ)


def _credentials(options: Options) -> ssl.SSLContext | None:
    if not any(url.startswith("https:") for url in options.hubs):
        return None
    return trust(options.ca_file)


async def run(options: Options, signals: Signals) -> int:
    """Serve the hubs until a signal; return the exit status.

    Raises:
        ConfigError: a flag is wrong, or the proof port is taken.
    """
    logs.configure(options.log)
    if options.discover:
        hub = await find_hub(signals)
        if not hub:
            return 0
        options = replace(options, hubs=(hub,))
    credentials = await asyncio.to_thread(_credentials, options)
    agent = Agent(options, credentials)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(agent.answering())
        await stack.enter_async_context(agent.serving())
        asked = spawn(signals.asked.wait(), "first signal")
        stack.callback(asked.cancel)
        refused = spawn(agent.refused.wait(), "refusal by all hubs")
        stack.callback(refused.cancel)
        with _passing_on(agent.server):
            await asyncio.wait((asked, refused), return_when=asyncio.FIRST_COMPLETED)
        if not signals.asked.is_set():
            logger.error("every hub refuses this worker: the agent ends")
            return 1
        leaving = spawn(agent.leave(), "drain")
        insisted = spawn(signals.insisted.wait(), "second signal")
        stack.callback(insisted.cancel)
        await asyncio.wait((leaving, insisted), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            return 0
        leaving.cancel()
        await asyncio.wait([leaving])
        logger.warning("second signal: not waiting for running answers")
        return 1


async def find_hub(signals: Signals) -> str:
    """Look for the hub of the local network; return "" if a signal comes first.

    Raises:
        ConfigError: there are several.
    """
    looking = spawn(_look_for_hub(), "search for a hub")
    asked = spawn(signals.asked.wait(), "signal while a hub is searched")
    try:
        await asyncio.wait((looking, asked), return_when=asyncio.FIRST_COMPLETED)
        return looking.result() if looking.done() else ""
    finally:
        looking.cancel()
        asked.cancel()


async def _look_for_hub() -> str:
    from gollama_proxy import discovery  # zeroconf is optional

    logger.info("looking for a hub in the local network")
    while not (found := await discovery.discover()):
        pass
    if len(found) > 1:
        # The token is for one of them, and is none of the others' business.
        text = (
            f"found several hubs: {', '.join(found)}; must be one of them, with --hub"
        )
        raise ConfigError(f"--discover: {text}")
    logger.info("found the hub %s", found[0])
    return found[0]


@contextlib.contextmanager
def _passing_on(server: Supervised | None) -> Iterator[None]:
    """Pass signals on to the server that mean nothing to an agent."""
    if server is None:
        yield
        return
    loop, numbers = asyncio.get_running_loop(), (signal.SIGUSR1, signal.SIGUSR2)
    for number in numbers:
        loop.add_signal_handler(number, server.signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class Agent:
    """One worker, its machine, and the hubs that it is registered with."""

    def __init__(self, options: Options, credentials: ssl.SSLContext | None) -> None:
        self.options = options
        self.refused = asyncio.Event()  # by every hub, for good, from the start
        self.machine = machine.Machine()
        self.answers: bool | None = None  # whether the server does
        self.proof_port = options.proof_port
        self.secret = secrets.token_hex(32)
        self.server: Supervised | None = None
        if options.command:
            command, self.url = llama.listening(options.command, os.environ)
            self.server = Supervised(command)
        else:
            self.url = llama.with_port(options.worker)
        port = urlsplit(self.url).port
        self.name = options.name or f"{machine.host_name()}:{port}"
        self.hubs = [HubLink(self, url, credentials) for url in options.hubs]
        self._looking = Periodic("look at the server", self._look, LOOK_EVERY, delay=0)
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<Agent {self.name} hubs={len(self.hubs)}>"

    # --- The proof ----------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Answer the nonces of hubs at the proof port.

        Raises:
            ConfigError: the port is taken.
        """
        try:
            listener = machine.listen(self.proof_port)
        except OSError as exc:
            text = exc.strerror or "cannot be listened on"
            raise ConfigError(f"--proof-port = {self.proof_port}: {text}") from exc
        self.proof_port = listener.getsockname()[1]
        application = web.Application()
        application.router.add_get("/proof/{nonce:[0-9a-f]{32}}", self._prove)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            yield
        finally:
            await runner.cleanup()

    async def _prove(self, request: web.Request) -> web.Response:
        nonce, secret = request.match_info["nonce"], self.secret.encode()
        return web.Response(body=answer_to(nonce, secret, self.name))

    # --- The hubs -----------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run the server, if it is this agent's, and keep the worker registered."""
        self.machine = await machine.examine()
        logger.info("worker %s at %s: %s", self.name, self.url, self._describe())
        timeout = aiohttp.ClientTimeout(TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            self._session = session
            tasks = [each.loop for each in self.hubs] + [self._looking]
            try:
                if self.server is not None:
                    self.server.start()
                for each in tasks:
                    each.start()
                yield
            finally:
                for each in tasks:
                    await each.stop()
                if self.server is not None:
                    await self.server.stop()

    def _describe(self) -> str:
        devices = [
            each.name
            + (f" with {each.memory_gib:g} GiB" if each.memory_gib is not None else "")
            for each in self.machine.devices
        ]
        return ", ".join(devices) or "nothing is known of its machine"

    @property
    def token_file(self) -> str:
        return self.options.token_file

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, self
        return self._session

    async def registration(self, url: str) -> dict[str, Any]:
        """Return the body of a registration under this URL, with a fresh report."""
        self.machine = await machine.examine()
        worker: dict[str, Any] = {"url": url}
        vram = self.options.vram_gib or self.machine.vram_gib
        if vram is not None:
            worker["vram_gib"] = vram
        if self.options.weight is not None:
            worker["weight"] = self.options.weight
        report: dict[str, Any] = {
            "host": machine.host_name(),
            "version": __version__,
            "devices": self.machine.report(),
        }
        measured = {"load": machine.load(), "serving": self.answers}
        report |= {key: value for key, value in measured.items() if value is not None}
        return {"worker": worker, "proof_port": self.proof_port, "report": report}

    def note(self) -> None:
        """Decide whether to go on after a hub has answered."""
        lasting = all(each.refusal is Refusal.LASTING for each in self.hubs)
        if lasting and not any(each.served for each in self.hubs):
            self.refused.set()

    async def leave(self) -> None:
        """Give the worker back, and wait until its running answers have ended."""
        logger.info("leaving; a second signal does not wait for running answers")
        await self._looking.stop()
        for each in self.hubs:
            await each.loop.stop()
        await asyncio.gather(*(each.leave() for each in self.hubs))

    # --- The server ---------------------------------------------------------------

    async def _look(self) -> float | None:
        """See whether the server answers; its hubs learn of a change at once."""
        answers = await self._probe()
        if self.answers is None and self.server is not None and not answers:
            return None  # it has just been started
        if answers != self.answers:
            self.answers = answers
            logger.info("the server %s", "answers" if answers else "does not answer")
            for each in self.hubs:
                each.loop.wake()
        return None

    async def _probe(self) -> bool:
        url = f"{machine.place(self.url, _local_spelling(self.url))}/health"
        try:
            async with self.session.get(
                url, ssl=False, timeout=aiohttp.ClientTimeout(5), allow_redirects=False
            ) as reply:
                return reply.status < 500 or reply.status == 501
        except (aiohttp.ClientError, OSError):
            return False


def _local_spelling(url: str) -> str:
    """Return the loopback address for a URL whose host means all addresses."""
    return "::1" if ":" in (urlsplit(url).hostname or "") else "127.0.0.1"
