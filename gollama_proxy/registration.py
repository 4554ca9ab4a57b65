"""How an agent finds a hub, and keeps its worker registered; how hubs are announced.

Hubs that share a store share the registration, too: their answers have the same
`cluster`.  One of them is called, and the others stand by until it does not answer.
A hub that cannot reach its store leaves `cluster` out, because it is on its own then,
and has to be called like one that has nothing to do with the others.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
import ipaddress
import json
import logging
import math
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

import aiohttp

from gollama_proxy import __version__, machine
from gollama_proxy.config.keys import read_token
from gollama_proxy.config.values import ConfigError
from gollama_proxy.tasks import Periodic, Signals, ended, spawn

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # of one call of a hub, which may include a proof of 3 s
MARGIN = 5.0  # seconds beyond the drain time of a hub
FIRST_ANSWER = 2.0  # seconds for which a hub is waited for before the next is called


# --- Decisions --------------------------------------------------------------------


class Refusal(enum.Enum):
    """How a call of a hub ended."""

    NONE = "registered"
    PASSING = "the hub is away, or busy"
    PATIENT = "the hub refuses, and may change its mind"
    LASTING = "the hub refuses, and a person has to act"


class HubReply(NamedTuple):
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

    def after(self, answer: HubReply) -> float:
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


def read_reply(status: int, body: bytes) -> HubReply:
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return HubReply(status, f"answered {status}; is it a hub?")
    if 200 <= status < 300:
        return HubReply(status, "", content)
    error = content.get("error")
    error = error if isinstance(error, dict) else {}
    text = " ".join(str(error.get("message") or "").split())[:500]
    return HubReply(status, text or f"answered {status}", error)


# --- Calls ------------------------------------------------------------------------


class Registrant(Protocol):
    """An agent, as its registrations see it."""

    @property
    def name(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def secret(self) -> str: ...
    @property
    def answers(self) -> bool | None: ...
    @property
    def token_file(self) -> str: ...
    @property
    def session(self) -> aiohttp.ClientSession: ...
    async def registration(self, url: str) -> dict[str, Any]: ...
    def in_place_of(self, link: HubLink) -> HubLink | None: ...
    def note(self) -> None: ...


class HubLink:
    """The registration with one hub."""

    def __init__(
        self,
        agent: Registrant,
        url: str,
        credentials: ssl.SSLContext | None,
        place: int = 0,
    ) -> None:
        """Make one; `place` is that of the hub in the agent's list, 0 first."""
        self.url = url.rstrip("/")
        self.called = False
        self.refusal: Refusal | None = None  # None before the first answer
        self.running = 0  # answers that a hub that was left still waits for
        self.served = False  # it has registered the worker before
        self.cluster = ""  # what it shares with other hubs; empty: nothing
        self.standing_by = False  # another hub of the cluster has the registration
        self.loop = Periodic(
            f"registration at {url}", self._renew, 1.0, delay=place * FIRST_ANSWER
        )
        self._agent = agent
        self._credentials = credentials
        self._schedule = Schedule()
        self._trouble = ""
        self._placed = ""  # the URL that the hub has for the worker
        self._used_at = math.inf  # its last request by this hub, by the event loop
        self._checked = ""  # such a URL, when it has been looked at from here

    def __repr__(self) -> str:
        state = self.refusal.name.lower() if self.refusal else "new"
        state = "standing by" if self.standing_by else state
        return f"<HubLink {self.url} {state}>"

    @property
    def registered(self) -> bool:
        """Return whether this hub has the registration, and is called to renew it."""
        return self.refusal is Refusal.NONE and not self.standing_by

    async def _renew(self) -> float:
        agent = self._agent
        if (keeper := agent.in_place_of(self)) is not None:
            self._stand_by(keeper)
            return Schedule.LONGEST
        self.called, self.standing_by = True, False
        try:
            local = await machine.address_towards(self.url)
            placed = machine.place(agent.url, local)
            body = await agent.registration(placed)
        except OSError as exc:
            answer = HubReply(0, f"cannot be reached: {exc.strerror or exc}")
        else:
            answer = await self._call("PUT", body)
            self._placed = placed
        self.refusal = answer.refusal
        self._log(answer)
        if self.refusal is Refusal.NONE:
            self.served = True
            cluster = answer.body.get("cluster")
            self.cluster = cluster if isinstance(cluster, str) else ""
            self._note_idle(answer)
            if agent.answers and self._placed != self._checked:
                await self._check_reachable()
            if (keeper := agent.in_place_of(self)) is not None:
                self._stand_by(keeper)
        agent.note()
        return self._schedule.after(answer)

    def _stand_by(self, keeper: HubLink) -> None:
        if not self.standing_by:
            text = "hub %s stands by: it shares its workers with the hub %s"
            logger.info(text, self.url, keeper.url)
        self.standing_by = True
        self._trouble = "standing by"

    def _note_idle(self, answer: HubReply) -> None:
        idle = answer.body.get("idle")
        now = asyncio.get_running_loop().time()
        known = isinstance(idle, (int, float)) and 0 <= idle < math.inf
        self._used_at = now - idle if known and idle is not None else math.inf

    def idle_for(self, now: float) -> float:
        """Return the seconds for which this hub has not used the server; 0: unknown."""
        if self.refusal is not Refusal.NONE:
            return 0.0  # it could not wake the machine
        return max(now - self._used_at, 0.0)

    async def announce_sleep(self) -> bool:
        """Report that the machine goes to sleep; return whether the hub lets it."""
        body = await self._agent.registration(self._placed)
        answer = await self._call("PUT", body)
        asleep: bool = answer.body.get("state") == "asleep"
        return answer.refusal is Refusal.NONE and asleep

    def _log(self, answer: HubReply) -> None:
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
            running = answer.body.get("running")
            self.running = running if isinstance(running, int) else 0
            if not running:
                logger.info("hub %s: the worker is removed", self.url)
                return
            if loop.time() - began > drain + MARGIN:
                break
            await asyncio.sleep(0.25)
        logger.warning("hub %s: %s", self.url, answer.text or "answers still run")

    async def _check_reachable(self) -> None:
        """Warn of a server that answers here, but not at the address for hubs."""
        self._checked = self._placed
        placed = urlsplit(self._placed)
        try:
            async with asyncio.timeout(5):
                _, writer = await asyncio.open_connection(placed.hostname, placed.port)
        except OSError:
            logger.warning(
                "the server does not answer at %s, where the hub %s looks for it: it "
                "listens on a loopback address only; start it with --host 0.0.0.0",
                self._placed,
                self.url,
            )
        else:
            writer.close()

    async def _call(self, method: str, body: object = None) -> HubReply:
        agent = self._agent
        url = f"{self.url}/agent/workers/{quote(agent.name, safe=':')}"
        headers = {"X-Gollama-Agent": agent.secret}
        try:
            # Read each time: a token that expires is replaced in its file.
            token = await asyncio.to_thread(read_token, agent.token_file, os.environ)
        except ConfigError as exc:
            return HubReply(401, str(exc))
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
                return read_reply(reply.status, await reply.content.read(64 << 10))
        except TimeoutError:
            return HubReply(0, f"no answer within {TIMEOUT:g} s")
        except aiohttp.ClientConnectorCertificateError:
            return HubReply(0, "its certificate is not trusted (--ca-file)")
        except (aiohttp.ClientError, OSError) as exc:
            number = getattr(exc, "errno", None)
            why = os.strerror(number) if number and number > 0 else str(exc)
            return HubReply(0, f"cannot be reached: {why}")


# --- Discovery --------------------------------------------------------------------

# Multicast DNS (RFC 6762) and DNS-SD (RFC 6763) through the package zeroconf, which is
# optional.  Anyone on the network can announce a hub, and an agent sends its token to
# the hub that it finds: discovery is for networks whose machines are trusted.
#
# `interfaces` are addresses of this machine; None for all of them.
SERVICE = "_gollama-proxy._tcp.local."
LOOK_FOR = 3.0  # seconds in which hubs have to answer
ASK_AGAIN = 1.0  # seconds that one hub has to describe itself


async def find_hub(signals: Signals) -> str:
    """Look for the hub on the local network; return "" if a signal comes first.

    Raises:
        ConfigError: there are several.
    """
    looking = spawn(_look_for_hub(), "search for a hub")
    try:
        return looking.result() if await ended(looking, signals.asked) else ""
    finally:
        looking.cancel()


async def _look_for_hub() -> str:
    logger.info("looking for a hub on the local network")
    while not (found := await discover()):
        pass
    if len(found) > 1:
        # The token is for one of them, and the others must not see it.
        text = (
            f"found several hubs: {', '.join(found)}; must be one of them, with --hub"
        )
        raise ConfigError(f"--discover: {text}")
    logger.info("found the hub %s", found[0])
    return found[0]


def announcement(url: str, addresses: Sequence[str]) -> ServiceInfo:
    """Return the records of the hub at a URL, which has these addresses."""
    from zeroconf import ServiceInfo

    parts = urlsplit(url)
    assert parts.port is not None, url
    host = socket.gethostname().partition(".")[0] or "hub"
    return ServiceInfo(
        SERVICE,
        f"{host}-{parts.port}.{SERVICE}",
        port=parts.port,
        properties={"scheme": parts.scheme, "version": __version__},
        server=f"{host}.local.",
        parsed_addresses=list(addresses),
    )


def url_of(info: ServiceInfo) -> str:
    """Return the URL of a hub that announced itself; "" if it cannot be a hub.

    With https it has the name of the machine, for which its certificate is more likely.
    """
    scheme = (info.properties.get(b"scheme") or b"").decode(errors="replace")
    addresses = info.parsed_scoped_addresses()
    if scheme not in ("http", "https") or not info.port or not addresses:
        return ""
    if scheme == "https":
        host = (info.server or "").rstrip(".")
    else:
        best = min(addresses, key=lambda a: ":" in a)  # IPv4, if there is one
        host = f"[{best}]" if ":" in best else best
    return f"{scheme}://{host}:{info.port}"


def addresses_of(host: str) -> list[str]:
    """Return the addresses at which a hub that listens on `host` can be reached."""
    import ifaddr

    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
    if not address.is_unspecified:
        return [host]
    every = [
        ip.ip if isinstance(ip.ip, str) else ip.ip[0]
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if ip.is_IPv4 or address.version == 6
    ]
    return [ip for ip in every if not _is_local(ip)]


def _is_local(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return address.is_loopback or address.is_link_local


@asynccontextmanager
async def advertise(
    url: str, addresses: Sequence[str], interfaces: Sequence[str] | None = None
) -> AsyncIterator[None]:
    """Announce the hub at a URL until the block is left.

    Raises:
        OSError: no interface can send to other machines.
    """
    await asyncio.to_thread(_import)
    from zeroconf.asyncio import AsyncZeroconf

    info = announcement(url, addresses)
    zeroconf = AsyncZeroconf(**_choice(interfaces))
    try:
        # Two hubs of a machine have different ports, and so different names.
        await (await zeroconf.async_register_service(info, allow_name_change=True))
        yield
        await (await zeroconf.async_unregister_service(info))
    finally:
        await zeroconf.async_close()


async def discover(
    seconds: float = LOOK_FOR, interfaces: Sequence[str] | None = None
) -> list[str]:
    """Return the URLs of the hubs that answer within some seconds.

    Raises:
        OSError: no interface can ask other machines.
    """
    await asyncio.to_thread(_import)
    from zeroconf import ServiceStateChange
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

    names: set[str] = set()

    def note(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: Any
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            names.discard(name)
        else:
            names.add(name)

    zeroconf = AsyncZeroconf(**_choice(interfaces))
    try:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, [SERVICE], handlers=[note])
        await asyncio.sleep(seconds)
        await browser.async_cancel()
        infos = await asyncio.gather(
            *(
                zeroconf.async_get_service_info(SERVICE, name, int(ASK_AGAIN * 1000))
                for name in sorted(names)
            )
        )
        urls = {url_of(info) for info in infos if info is not None}
        return sorted(urls - {""})
    finally:
        await zeroconf.async_close()


def _import() -> None:
    """Import what is needed; it starts ldconfig, so it would block the event loop."""
    importlib.import_module("zeroconf.asyncio")


def _choice(interfaces: Sequence[str] | None) -> dict[str, Any]:
    return {} if interfaces is None else {"interfaces": list(interfaces)}
