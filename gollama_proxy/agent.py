"""The command `gollama-proxy agent`: brings a worker's machine into the fleet of hubs.

The agent registers the worker with each hub, renews that every third of the lease,
reports the load of the machine, and gives the worker back when a signal ends it: the
hub sends nothing new, running answers end, and then the agent does.  With `--exec` it
starts the server too, restarts it when it ends, and ends it last.

A hub checks an address by connecting to the agent there, at the proof port.

Hubs of one cluster share the registration: the agent renews it with one of them, and
continues with the next as soon as that one does not answer or refuses.

A hub that is away, or refuses the worker for a reason that can pass, is tried again,
less and less often.  If every hub refuses for a reason that stays, such as a wrong
token, an agent that has just been started ends with status 1.  One that has served
before goes on: its server and its other hubs are not the worse for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from gollama_proxy import __version__, children, machine
from gollama_proxy.children import Supervised
from gollama_proxy.config.addresses import check_url
from gollama_proxy.config.keys import read_token
from gollama_proxy.config.settings import Log
from gollama_proxy.config.tls import hub_context
from gollama_proxy.config.values import ConfigError
from gollama_proxy.fleet.agents import answer_to
from gollama_proxy.registration import TIMEOUT, HubLink, Refusal, find_hub
from gollama_proxy.service import Service, count
from gollama_proxy.tasks import Periodic, Signals, ended, spawn
from gollama_proxy.telemetry import logs

logger = logging.getLogger(__name__)

READY_WITHIN = 10.0  # seconds after which a hub is not waited for any longer
LOOK_EVERY = 1.0  # seconds between two checks of the server
HELPER_CHECK = 1.0  # seconds between two attempts to reach the helpers of `--rpc`
SUSPEND = ("systemctl", "suspend")
SETTLED_AFTER = 5.0  # seconds until a machine that is to sleep does
IDLE_CHECK = 5.0  # seconds between two checks of whether the machine is idle
# Seconds for which an agent reports that its machine falls asleep.  The clock stops
# while it sleeps.
FALLING_ASLEEP = 10.0


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    hubs: tuple[str, ...]
    discover: bool = False  # look for the hub on the local network
    worker: str = ""  # its URL; empty with a command
    command: tuple[str, ...] = ()
    name: str = ""
    token_file: str = ""
    ca_file: str = ""
    proof_port: int = 0
    slots: int | None = None  # None here: as the server reports
    context: int | None = None
    models: tuple[str, ...] = ()
    weight: float | None = None
    vram_gib: float | None = None
    sleep_after: float = 0.0  # seconds without a request; 0: never
    mac: str = ""  # by which the machine is woken; empty: that of its network card
    log: Log = field(default_factory=Log)


# --- The command ------------------------------------------------------------------


def check_options(options: Options, environ: Mapping[str, str]) -> None:
    """Check what was asked for.

    Raises:
        ConfigError: a flag is wrong.
    """
    if options.hubs and options.discover:
        raise ConfigError("--hub: cannot be given together with --discover")
    if not options.hubs and not options.discover:
        text = "must be a URL such as http://gateway:8000; or give --discover"
        raise ConfigError(f"--hub: is missing; {text}")
    if options.discover and importlib.util.find_spec("zeroconf") is None:
        text = "needs zeroconf; pip install 'gollama-proxy[mdns]'"
        raise ConfigError(f"--discover: {text}")
    for flag, urls in (("--hub", options.hubs), ("--worker", [options.worker])):
        for url in urls:
            if url:
                check_url(flag, url)
    if options.worker and options.command:
        raise ConfigError("--worker: cannot be given together with --exec")
    if not options.worker and not options.command:
        raise ConfigError(
            "--worker: is missing; give --worker URL or --exec -- COMMAND"
        )
    if options.command and shutil.which(options.command[0]) is None:
        program = options.command[0]
        raise ConfigError(f"--exec = {program!r}: must be an executable file")
    if options.name and not re.fullmatch(r"(?!\.{1,2}$)[!-.0-~]{1,100}", options.name):
        text = "must have 1 to 100 printable ASCII characters, and no / or space"
        raise ConfigError(f"--name = {options.name!r}: {text}")
    if options.ca_file and _credentials(options) is None:
        text = "is for a hub with an https URL"
        raise ConfigError(f"--ca-file = {options.ca_file!r}: {text}")
    read_token(options.token_file, environ)


def _credentials(options: Options) -> ssl.SSLContext | None:
    if not any(url.startswith("https:") for url in options.hubs):
        return None
    return hub_context(options.ca_file)


async def run(
    options: Options, signals: Signals, service: Service | None = None
) -> int:
    """Serve the hubs until a signal; return the exit status.

    Raises:
        ConfigError: a flag is wrong, or the proof port is taken.
    """
    logs.configure(options.log)
    service = service or Service()
    service.start()
    # A hub that is away must not hold up the start of this machine.
    loop = asyncio.get_running_loop()
    overdue = loop.call_later(READY_WITHIN, service.ready)
    try:
        return await _run(options, signals, service)
    finally:
        overdue.cancel()
        await service.stop()


async def _run(options: Options, signals: Signals, service: Service) -> int:
    if options.discover:
        service.describe(lambda: "looking for a hub on the local network")
        hub = await find_hub(signals)
        if not hub:
            return 0
        options = replace(options, hubs=(hub,))
    credentials = await asyncio.to_thread(_credentials, options)
    agent = Agent(options, credentials, service.ready)
    service.describe(agent.describe)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(agent.answering())
        await stack.enter_async_context(agent.serving())
        refused = spawn(agent.refused.wait(), "refusal by all hubs")
        stack.callback(refused.cancel)
        with _passing_on(agent.server):
            await ended(refused, signals.asked)
        if not signals.asked.is_set():
            logger.error("all hubs refuse this worker, so the agent ends")
            return 1
        service.stopping(agent.describe_stop)
        leaving = spawn(agent.leave(), "drain")
        if await ended(leaving, signals.insisted):
            return 0
        leaving.cancel()
        await asyncio.wait([leaving])
        logger.warning("second signal: not waiting for running answers")
        return 1


@contextlib.contextmanager
def _passing_on(server: Supervised | None) -> Iterator[None]:
    """Pass on to the server the signals that an agent has no use for."""
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

    def __init__(
        self,
        options: Options,
        credentials: ssl.SSLContext | None,
        registered: Callable[[], None] = lambda: None,
    ) -> None:
        """Make one; `registered` is called when a hub has accepted the worker."""
        self._registered = registered
        self.options = options
        self.refused = asyncio.Event()  # by every hub, for good, from the start
        self.machine = machine.Machine()
        self.answers: bool | None = None  # whether the server does
        self.proof_port = options.proof_port
        self.secret = secrets.token_hex(32)
        self.server: Supervised | None = None
        self._helpers: tuple[tuple[str, int], ...] = ()
        self.waiting_for: tuple[str, ...] = ()  # the helpers that are missing
        if options.command:
            command, self.url = machine.listening(options.command, os.environ)
            self._helpers = machine.rpc_helpers(command, os.environ)
            # A backtrace takes llama-server seconds, in which it seems to be well.
            environ = {"GGML_NO_BACKTRACE": "1"} if self._helpers else {}
            environ |= children.environment()
            self.server = Supervised(command, self._helped, environ)
        else:
            self.url = machine.with_port(options.worker)
        port = urlsplit(self.url).port
        self.name = options.name or f"{machine.host_name()}:{port}"
        self.hubs = [
            HubLink(self, url, credentials, place)
            for place, url in enumerate(options.hubs)
        ]
        self.known_mac = ""  # by which hubs wake this machine, "none" if unknown
        self.falling_asleep_until = -math.inf
        self._awake_since = asyncio.get_running_loop().time()
        often = min(IDLE_CHECK, options.sleep_after / 4)
        self._resting = Periodic("sleep when idle", self._rest, often)
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
            if self.options.sleep_after:
                tasks.append(self._resting)
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
        """Return the body of a registration under this URL, with a fresh report.

        With `--sleep-after` it has the hardware address of the card for that URL, by
        which the hub wakes the machine.
        """
        self.machine = await machine.examine()
        worker: dict[str, Any] = {"url": url}
        vram = self.options.vram_gib or self.machine.vram_gib
        if vram is not None:
            worker["vram_gib"] = vram
        for key in ("slots", "context", "models", "weight"):
            if (value := getattr(self.options, key)) not in (None, ()):
                worker[key] = value
        if self.options.sleep_after:
            host = urlsplit(url).hostname or ""
            mac = self.options.mac or await asyncio.to_thread(machine.mac_of, host)
            if mac:
                worker["mac"] = mac
            elif not self.known_mac:
                logger.warning("--sleep-after: no hardware address; give it with --mac")
            self.known_mac = mac or "none"
        report: dict[str, Any] = {
            "host": machine.host_name(),
            "version": __version__,
            "devices": self.machine.report(),
        }
        measured = {"load": machine.load(), "serving": self.answers}
        report |= {key: value for key, value in measured.items() if value is not None}
        if self.waiting_for:
            report["waiting_for"] = self.waiting_for
        now = asyncio.get_running_loop().time()
        return {
            "worker": worker,
            "proof_port": self.proof_port,
            "report": report,
            "sleeping": now < self.falling_asleep_until,
        }

    def in_place_of(self, link: HubLink) -> HubLink | None:
        """Return the hub of the same cluster that has the registration, if one has.

        Which hub has used the server last is what each of them has to be asked, so
        with `--sleep-after` none is left out.
        """
        if not link.cluster or self.options.sleep_after:
            return None
        others = (each for each in self.hubs if each is not link and each.registered)
        return next((each for each in others if each.cluster == link.cluster), None)

    def note(self) -> None:
        """Decide whether to go on after a hub has answered.

        The next hub is called if this was the first answer of one, and those that
        stand by if theirs has failed.  They are called one after the other, so that
        two hubs of a cluster do not check the same worker at once.
        """
        if new := next((each for each in self.hubs if not each.called), None):
            new.loop.wake()
        waiting = (each for each in self.hubs if each.standing_by)
        if left := next((w for w in waiting if not self.in_place_of(w)), None):
            left.loop.wake()
        if any(each.refusal is Refusal.NONE for each in self.hubs):
            self._registered()
        lasting = all(each.refusal is Refusal.LASTING for each in self.hubs)
        if lasting and not any(each.served for each in self.hubs):
            self.refused.set()

    def describe(self) -> str:
        """Return the line that `systemctl status` shows."""
        of = count(len(self.hubs), "hub")
        at = sum(each.registered for each in self.hubs)
        standby = sum(each.standing_by for each in self.hubs)
        refusals = [each.refusal for each in self.hubs if each.refusal is not None]
        if at:
            state = f"registered as {self.name} with {at} of {of}"
            if standby:
                state += f", {standby} standing by"
        elif refusals:
            state = f"not registered with {of}: {refusals[0].value}"
        else:
            state = "not registered yet"
        if self.answers is None:
            return state
        answers = "answers" if self.answers else "does not answer"
        return f"{state}; the server {answers}"

    def describe_stop(self) -> str:
        running = count(sum(each.running for each in self.hubs), "running answer")
        return f"stopping; {running} may end"

    async def leave(self) -> None:
        """Give the worker back, and wait until its running answers have ended."""
        logger.info("leaving; a second signal does not wait for running answers")
        await self._looking.stop()
        await self._resting.stop()
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
            self._report()
        return None

    def _report(self) -> None:
        """Call the hubs now, except those whose turn has not come yet."""
        for each in self.hubs:
            if each.called:
                each.loop.wake()

    async def _helped(self) -> None:
        """Wait until each helper of `--rpc` can be reached.

        Without one of them, llama-server logs a line and loads all of the model on this
        machine, which may be much too small for it.
        """
        while missing := await machine.unreachable(self._helpers):
            if missing != self.waiting_for:
                text = "not starting the server: no connection to %s (--rpc)"
                logger.warning(text, ", ".join(missing))
                self._wait_for(missing)
            await asyncio.sleep(HELPER_CHECK)
        if self.waiting_for:
            logger.info("all helpers of the server can be reached (--rpc)")
            self._wait_for(())

    def _wait_for(self, helpers: tuple[str, ...]) -> None:
        """Notify the hubs of what the server waits for."""
        self.waiting_for = helpers
        self._report()

    # --- Sleep --------------------------------------------------------------------

    async def _rest(self) -> None:
        """Suspend the machine if no hub has used the server for long enough."""
        loop = asyncio.get_running_loop()
        now, limit = loop.time(), self.options.sleep_after
        idle = min(now - self._awake_since, *(each.idle_for(now) for each in self.hubs))
        known = self.known_mac not in ("", "none")
        if idle < limit or not known or not self.answers or await self._generates():
            return
        logger.info("no request for %.0f s: suspending this machine", idle)
        self.falling_asleep_until = now + FALLING_ASLEEP
        asleep = await asyncio.gather(*(each.announce_sleep() for each in self.hubs))
        if all(asleep):
            await self._suspend()
        self._awake_since = loop.time()
        self.falling_asleep_until = -math.inf
        self._report()

    async def _suspend(self) -> None:
        """Suspend the machine; return when it is awake again, or cannot sleep."""
        try:
            child = await asyncio.create_subprocess_exec(
                *SUSPEND,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            _, stderr = await child.communicate()
        except OSError as exc:
            failed, why = True, exc.strerror or str(exc)
        else:
            failed, why = bool(child.returncode), " ".join(stderr.decode().split())
        if failed:
            logger.warning("this machine cannot be suspended: %s", why[:200])
            return
        await asyncio.sleep(SETTLED_AFTER)  # of the time in which it is awake
        logger.info("this machine is awake again")

    async def _generates(self) -> bool:
        """Return whether the server works for others than the hubs, as far as known."""
        try:
            async with self._ask_server("/slots") as reply:
                slots = json.loads(await reply.content.read(1 << 20))
        except (aiohttp.ClientError, OSError, ValueError):
            return False
        if not isinstance(slots, list):
            return False
        return any(isinstance(s, dict) and s.get("is_processing") for s in slots)

    # --- Whether the server answers -----------------------------------------------

    async def _probe(self) -> bool:
        try:
            async with self._ask_server("/health") as reply:
                return reply.status < 500 or reply.status == 501
        except (aiohttp.ClientError, OSError):
            return False

    def _ask_server(
        self, path: str
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Get a path of the agent's own server, on this machine."""
        url = machine.place(self.url, _local_spelling(self.url)) + path
        return self.session.get(
            url, ssl=False, timeout=aiohttp.ClientTimeout(5), allow_redirects=False
        )


def _local_spelling(url: str) -> str:
    """Return the loopback address for a URL whose host means all addresses."""
    return "::1" if ":" in (urlsplit(url).hostname or "") else "127.0.0.1"
