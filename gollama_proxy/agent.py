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
import enum
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import aiohttp
from aiohttp import web

from gollama_proxy import __version__, machine
from gollama_proxy.children import Supervised
from gollama_proxy.config import addresses
from gollama_proxy.config.mistakes import ConfigError
from gollama_proxy.config.settings import Log
from gollama_proxy.control.client import check_url, read_token, trust
from gollama_proxy.fleet.agents import answer_to
from gollama_proxy.tasks import Periodic, Signals, spawn
from gollama_proxy.telemetry import logs

logger = logging.getLogger(__name__)

USUAL_PORTS = (8080, 9931)  # of llama-server; the second one in newer builds
LOOK_EVERY = 1.0  # seconds between two looks at the server
TIMEOUT = 10.0  # of one call of a hub, which may include a proof of 3 s
MARGIN = 5.0  # seconds beyond the drain time of a hub


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    hubs: tuple[str, ...]
    worker: str = ""  # its URL; empty with a command
    command: tuple[str, ...] = ()
    name: str = ""
    token_file: str = ""
    ca_file: str = ""
    proof_port: int = 0
    weight: float | None = None
    vram_gib: float | None = None
    log: Log = field(default_factory=Log)


# --- Decisions --------------------------------------------------------------------


class Refusal(enum.Enum):
    """How a call of a hub ended."""

    NONE = "registered"
    PASSING = "the hub is away, or busy"
    PATIENT = "the hub refuses, and may change its mind"
    LASTING = "the hub refuses, and a person has to act"


class Answer(NamedTuple):
    """A hub's answer to a call; status 0 for none."""

    status: int
    text: str = ""  # of an error
    body: Mapping[str, Any] = {}

    @property
    def refusal(self) -> Refusal:
        if 200 <= self.status < 300:
            return Refusal.NONE
        if self.status == 0 or self.status == 429 or self.status >= 500:
            return Refusal.PASSING
        # A name or an address may be free when another lease has ended, and a proof
        # may succeed when a firewall has let the hub through.
        if self.status == 409 or self.body.get("code") == "address_refused":
            return Refusal.PATIENT
        return Refusal.LASTING


class Schedule:
    """When a hub is called next; `choose` varies a wait, so that agents drift apart."""

    FIRST, LONGEST, SLOW = 1.0, 30.0, 15.0
    LASTING = 60.0

    def __init__(
        self, choose: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._choose = choose
        self._wait = 0.0

    def __repr__(self) -> str:
        return f"<Schedule wait={self._wait:g}>"

    def after(self, answer: Answer) -> float:
        """Return the seconds to wait after this answer."""
        match answer.refusal:
            case Refusal.NONE:
                self._wait = 0.0
                lease = answer.body.get("lease")
                usable = isinstance(lease, (int, float)) and 0.1 <= lease <= 86_400
                return (lease if usable and lease else 30.0) / 3
            case Refusal.PASSING:
                self._wait = min(max(self.FIRST, 2 * self._wait), self.LONGEST)
                return self._choose(self._wait / 2, self._wait)
            case Refusal.PATIENT:
                return self.SLOW
            case Refusal.LASTING:
                return self.LASTING


def flag_in(
    command: Sequence[str], flag: str, variable: str, environ: Mapping[str, str]
) -> str | None:
    """Return the value of a server's flag: the last one given, else of a variable."""
    value = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return environ.get(variable) if value is None else value


def _usable_port(found: str | None) -> int:
    """Return the port of a command, or a free one for it: the usual one, if it is.

    Raises:
        ConfigError: it is no port.
    """
    if found is not None:
        if not re.fullmatch(r"[0-9]{1,5}", found) or not 1 <= int(found) <= 65_535:
            text = "must be a whole number from 1 to 65535"
            raise ConfigError(f"--exec: --port {found}: {text}")
        return int(found)
    for port in (USUAL_PORTS[0], 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise ConfigError("--exec: no port of this machine is free")


def listening(
    command: Sequence[str], environ: Mapping[str, str]
) -> tuple[list[str], str]:
    """Return a server's command, with a port if it had none, and the URL it serves.

    Raises:
        ConfigError: its port or host is none that a hub can use.
    """
    found = flag_in(command, "--port", "LLAMA_ARG_PORT", environ)
    port = _usable_port(found)
    added = ["--port", str(port)] if found is None else []
    host = flag_in(command, "--host", "LLAMA_ARG_HOST", environ) or "127.0.0.1"
    if host.startswith("/") or host.endswith(".sock"):
        raise ConfigError(f"--exec: --host {host}: a hub cannot reach a socket file")
    host = f"[{host}]" if ":" in host else host
    return [*command, *added], f"http://{host}:{port}"


def place(url: str, local: str) -> str:
    """Return the URL under which a hub reaches a worker.

    `local` is this machine's address on the way to that hub; it takes the place of
    loopback, and of an address that means all of them.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    address = addresses.parse(host)
    if not addresses.is_loopback(host) and not (address and address.is_unspecified):
        return url
    host = f"[{local}]" if ":" in local else local
    return parts._replace(netloc=f"{host}:{parts.port}").geturl()


# --- The command ------------------------------------------------------------------


def check_options(options: Options, environ: Mapping[str, str]) -> str:
    """Check what was asked for; return the token, or "".

    Raises:
        ConfigError: a flag is wrong.
    """
    if not options.hubs:
        raise ConfigError("--hub: is missing; must be the URL of a hub")
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
    if options.ca_file:
        _credentials(options)
    return read_token(options.token_file, environ)


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
            command, self.url = listening(options.command, os.environ)
            self.server = Supervised(command)
        else:
            self.url = _with_port(options.worker)
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
            listener = _listen(self.proof_port)
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
            if answers:
                for each in self.hubs:
                    await each.check_reachable()
        return None

    async def _probe(self) -> bool:
        url = f"{place(self.url, _local_spelling(self.url))}/health"
        try:
            async with self.session.get(
                url, ssl=False, timeout=aiohttp.ClientTimeout(5), allow_redirects=False
            ) as reply:
                return reply.status < 500 or reply.status == 501
        except (aiohttp.ClientError, OSError):
            return False


class HubLink:
    """The registration with one hub."""

    def __init__(
        self, agent: Agent, url: str, credentials: ssl.SSLContext | None
    ) -> None:
        self.url = url.rstrip("/")
        self.refusal: Refusal | None = None  # None before the first answer
        self.served = False  # it has registered the worker before
        self.loop = Periodic(f"registration at {url}", self._renew, 1.0, delay=0.0)
        self._agent = agent
        self._credentials = credentials
        self._schedule = Schedule()
        self._trouble = ""
        self._placed = ""  # the URL that the hub has for the worker
        self._warned = False

    def __repr__(self) -> str:
        state = self.refusal.name.lower() if self.refusal else "new"
        return f"<HubLink {self.url} {state}>"

    async def _renew(self) -> float:
        agent = self._agent
        try:
            local = await _local_address(self.url)
            placed = place(agent.url, local)
            body = await agent.registration(placed)
        except OSError as exc:
            answer = Answer(0, f"cannot be reached: {exc.strerror or exc}")
        else:
            answer = await self._call("PUT", body)
            self._placed = placed
        self.refusal = answer.refusal
        self._log(answer)
        if self.refusal is Refusal.NONE:
            self.served = True
        agent.note()
        return self._schedule.after(answer)

    def _log(self, answer: Answer) -> None:
        """Log a change once: registered, or another reason why not."""
        trouble = answer.text if self.refusal is not Refusal.NONE else "registered"
        if trouble == self._trouble:
            return
        self._trouble = trouble
        name = self._agent.name
        if self.refusal is Refusal.NONE:
            logger.info("hub %s: registered %s as %s", self.url, self._placed, name)
        elif self.refusal is Refusal.PASSING:
            logger.warning("hub %s: %s; trying again", self.url, trouble)
        else:
            logger.error("hub %s refuses the worker: %s", self.url, trouble)

    async def leave(self) -> None:
        """Give the worker back, and wait for its running answers.

        After its drain time, a hub has them continued elsewhere.
        """
        if not self.served:
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        while (answer := await self._call("DELETE")).refusal is Refusal.NONE:
            drain = answer.body.get("drain")
            if not isinstance(drain, (int, float)):
                drain = 0.0
            if not answer.body.get("running"):
                logger.info("hub %s: the worker is out", self.url)
                return
            if loop.time() - began > drain + MARGIN:
                break
            await asyncio.sleep(0.25)
        logger.warning("hub %s: %s", self.url, answer.text or "answers still run")

    async def check_reachable(self) -> None:
        """Warn, once, of a server that answers here but not at the address for hubs."""
        placed = urlsplit(self._placed)
        if self._warned or not placed.hostname:
            return
        try:
            async with asyncio.timeout(5):
                _, writer = await asyncio.open_connection(placed.hostname, placed.port)
        except OSError:
            self._warned = True
            logger.warning(
                "the server does not answer at %s, where the hub %s looks for it: it "
                "listens on a loopback address only; start it with --host 0.0.0.0",
                self._placed,
                self.url,
            )
        else:
            writer.close()

    async def _call(self, method: str, body: object = None) -> Answer:
        agent = self._agent
        url = f"{self.url}/agent/workers/{quote(agent.name, safe=':')}"
        headers = {"X-Gollama-Agent": agent.secret}
        try:
            # Read each time: a token that expires is replaced in its file.
            token = await asyncio.to_thread(
                read_token, agent.options.token_file, os.environ
            )
        except ConfigError as exc:
            return Answer(401, str(exc))
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            async with agent.session.request(
                method,
                url,
                json=body,
                headers=headers,
                ssl=self._credentials or True,
                allow_redirects=False,
            ) as reply:
                return read_answer(reply.status, await reply.content.read(64 << 10))
        except TimeoutError:
            return Answer(0, f"no answer within {TIMEOUT:g} s")
        except aiohttp.ClientConnectorCertificateError:
            return Answer(0, "its certificate is not trusted (--ca-file)")
        except (aiohttp.ClientError, OSError) as exc:
            number = getattr(exc, "errno", None)
            why = os.strerror(number) if number and number > 0 else str(exc)
            return Answer(0, f"cannot be reached: {why}")


def read_answer(status: int, body: bytes) -> Answer:
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return Answer(status, f"answered {status}; is it a hub?")
    if 200 <= status < 300:
        return Answer(status, "", content)
    error = content.get("error")
    error = error if isinstance(error, dict) else {}
    text = " ".join(str(error.get("message") or "").split())[:500]
    return Answer(status, text or f"answered {status}", error)


# --- Addresses --------------------------------------------------------------------


def _with_port(url: str) -> str:
    """Add the port of llama-server to a URL without one."""
    parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
    if parts.port is None:
        port = 443 if parts.scheme == "https" else USUAL_PORTS[0]
        parts = parts._replace(netloc=f"{parts.netloc}:{port}")
    return parts.geturl()


def _local_spelling(url: str) -> str:
    """Return the loopback address for a URL whose host means all addresses."""
    return "::1" if ":" in (urlsplit(url).hostname or "") else "127.0.0.1"


async def _local_address(hub: str) -> str:
    """Return the address of this machine on the way to a hub; nothing is sent.

    Raises:
        OSError: the name does not resolve, or there is no way to it.
    """
    parts = urlsplit(hub)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)
    failure = OSError("there is no way to it")
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError as exc:
                failure = exc
            else:
                return str(probe.getsockname()[0])
    raise failure


def _listen(port: int) -> socket.socket:
    """Listen on all addresses, IPv6 too where there is any."""
    with contextlib.suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
    return socket.create_server(("", port))
