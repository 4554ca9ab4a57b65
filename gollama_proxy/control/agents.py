"""The registration of workers by their agents: `/agent/workers/{name}`, scope `worker`.

    PUT     register, renew the lease and report; may be repeated at any time
    DELETE  give the worker back: it gets no new request, and running ones may end

**A token of the scope `worker` must not lead the hub to another machine**, which would
receive prompts, or be one that the token's owner cannot reach (server-side request
forgery).  So an address is used only if

* it lies in one of `agents.networks`, and is loopback only for an agent on the hub's
  own machine;
* the agent proves it: the hub connects to the worker's address, at a port that the
  agent names, and expects the digest of a nonce that only a holder of the
  registration's secret can make.  The secret is random, made by the agent, and sent
  with each call in `X-Gollama-Agent`; the hub keeps its digest alone.

A DNS name is resolved once, here, and the worker has the address from then on.  A
failed proof reports nothing of what is at an address, unless the agent connects from
there itself.

**With a store**, an agent may call any hub, and switch at any time.  A hub writes what
was renewed there, with the report of the agent, and reads the renewals at other hubs,
within a second.  The hub that an agent has called last is the first one that ends a
silent lease; the others would do so `GRACE` seconds later, if that hub is gone as well.
A hub that cannot reach the store does not know what is renewed elsewhere, and ends no
lease until it can.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta, Struct

from gollama_proxy.config import addresses
from gollama_proxy.config.load import load_worker
from gollama_proxy.config.settings import Origin, WorkerConfig
from gollama_proxy.config.values import ConfigError
from gollama_proxy.control import Parts
from gollama_proxy.control.replies import check_local, decode_body, receive
from gollama_proxy.edge.auth import Principal
from gollama_proxy.edge.response import Response
from gollama_proxy.edge.router import Routes, name_in
from gollama_proxy.fleet.agents import Agents, LeaseState, WorkerLease, answer_to
from gollama_proxy.fleet.registry import check_distinct
from gollama_proxy.fleet.state import Hold, Source
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.state import facts
from gollama_proxy.state.facts import (
    MAX_WORKERS,
    MOST_WRITTEN,
    NEWS,
    Entry,
    Journal,
    StepResult,
    StoredWorker,
)
from gollama_proxy.state.folder import StateError
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.upstream import names
from gollama_proxy.upstream.pool import Target
from gollama_proxy.upstream.probe import FetchError, fetch
from gollama_proxy.wire.errors import Code, RequestError

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)

SCOPE = "worker"
MAX_BODY = 64 << 10
BODY_TIMEOUT = 10.0
PROOF_TIMEOUT = 3.0
# What an agent may set of its worker.  The other keys name files and variables of the
# hub, whose content would be sent to the worker.
KEYS = ("url", "slots", "context", "models", "weight", "vram_gib", "mac")
_NAME = re.compile(r"(?!\.{1,2}$)[!-~]{1,100}")  # no step of a path
_SECRET = re.compile(r"[0-9a-f]{32,128}")

Share = Annotated[float, Meta(ge=0, le=1)]
Gib = Annotated[float, Meta(ge=0, le=1_000_000)]
Label = Annotated[str, Meta(max_length=100, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]


class Device(Struct, omit_defaults=True):
    """A graphics card, or the memory of a machine without one."""

    name: Label
    memory_gib: Gib | None = None
    used_gib: Gib | None = None
    busy: Share | None = None
    celsius: Annotated[float, Meta(ge=-100, le=1000)] | None = None


class MachineReport(Struct, omit_defaults=True):
    """What an agent reports of its machine each time; unknown keys are left out."""

    host: Label = ""
    version: Label = ""
    serving: bool | None = None  # whether the server answers the agent
    load: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None  # of one processor
    devices: Annotated[list[Device], Meta(max_length=64)] = []
    # Helpers that its server needs and that cannot be reached, as host:port.
    waiting_for: Annotated[list[Label], Meta(max_length=64)] = []


class Registration(Struct):
    """The body of a PUT; `proof_port` is where the agent answers the hub's nonce."""

    worker: dict[str, Any]
    proof_port: Annotated[int, Meta(ge=1024, le=65_535)]
    report: MachineReport = msgspec.field(default_factory=MachineReport)
    sleeping: bool = False  # the machine goes to sleep, if nothing runs on it


class AgentApi:
    """Answers agents, and keeps their workers in the registry and the state folder."""

    def __init__(self, hub: Parts) -> None:
        self._hub = hub

    def __repr__(self) -> str:
        return f"<AgentApi {self._hub.agents!r}>"

    def routes(self) -> Routes:
        return {"/agent/workers/{name}": {"PUT": self._put, "DELETE": self._delete}}

    # --- What agents call ---------------------------------------------------------

    async def _put(self, request: web.BaseRequest, record: Record) -> Response:
        name, agent, secret = self._admit(request, record)
        body = decode_body(await receive(request, BODY_TIMEOUT, MAX_BODY), Registration)
        report = msgspec.to_builtins(body.report)
        peer, status, found = _unmapped(request.remote or ""), 200, None
        lease = self._hub.agents.find(name)
        if lease is not None and lease.is_of(agent) and lease.table == body.worker:
            if addresses.is_plain_host(lease.worker.origin.host):
                self._hub.agents.check_address(lease.worker.origin.host, peer)
            found = self._hub.registry.get(name)
        else:
            worker = await self._pinned(_load(name, body.worker), peer)
            self._refuse_clash(worker)
            lease = self._hub.agents.begin(worker, agent)
            if lease.state is LeaseState.PROVING:
                await self._prove(lease, body.proof_port, secret, peer)
                status = 201
            lease.worker, lease.table = worker, body.worker
        served = lease.report.get("serving")
        waited = lease.report.get("waiting_for")
        self._hub.agents.renew(lease, report)
        if found is None:
            async with self._hub.changing:
                found = await self._put_in_force(lease, record.subject)
        waits = report.get("waiting_for")
        if waits and waits != waited:
            text = "worker %s: its server waits for helpers: %s"
            logger.warning(text, name, ", ".join(waits))
        if report.get("serving") is not served:
            found.suspect()  # its server came back, or ended: look at once
        record.routine = status == 200
        if body.sleeping is not lease.sleeping:
            await self._put_to_sleep(lease, found, sleeping=body.sleeping)
        idle = 0.0 if found.leases else found.clock() - found.used_at
        answer = {
            "name": name,
            "url": found.config.url,
            "lease": self._hub.config.agents.lease,
            "state": found.state.value,
            "reason": found.reason,
            "idle": idle,
        }
        cluster = self._hub.cluster
        if cluster is not None and cluster.identity:
            # Its agent need not register with the other hubs.
            answer["cluster"] = cluster.identity
        return Response(msgspec.json.encode(answer), status)

    async def _delete(self, request: web.BaseRequest, record: Record) -> Response:
        """End a registration; the answer has how many requests still run, and may.

        Repeated, it follows them to their end, which comes within `drain` seconds.
        """
        name, agent, _ = self._admit(request, record)
        lease = self._hub.agents.find(name)
        if lease is not None:
            if not lease.is_of(agent):
                text = f"The worker {name!r} was registered by another agent."
                raise RequestError(Code.CONFLICT, text, param="name")
            await self.remove(lease, "its agent gave it back")
        running = sum(
            worker.in_flight
            for worker in self._hub.registry.leaving
            if worker.name == name and worker.source is Source.AGENT
        )
        drain = self._hub.config.server.drain
        answer = {"name": name, "running": running, "drain": drain}
        return Response(msgspec.json.encode(answer))

    def _admit(
        self, request: web.BaseRequest, record: Record
    ) -> tuple[str, str, bytes]:
        """Return the name of a worker, and its agent's secret with the digest of that.

        Raises:
            RequestError: 401 or 403, or the name or the secret cannot be used.
        """
        caller: Principal = self._hub.authenticator.identify(request, record)
        if self._hub.config.auth.mode == "off":
            check_local(request)
        elif SCOPE not in caller.scopes:
            text = f"Your token does not allow this: it needs the scope {SCOPE}."
            raise RequestError(Code.INSUFFICIENT_SCOPE, text)
        name = name_in(request, record)
        if not _NAME.fullmatch(name):
            text = "The name of a worker has 1 to 100 printable ASCII characters."
            raise RequestError(Code.INVALID_VALUE, text, param="name")
        secret = request.headers.getall("X-Gollama-Agent", [""])
        if len(secret) != 1 or not _SECRET.fullmatch(secret[0]):
            text = "X-Gollama-Agent is missing: 32 to 128 hexadecimal digits, random."
            raise RequestError(Code.BAD_REQUEST, text)
        return name, _digest(secret[0]), secret[0].encode()

    # --- Addresses ----------------------------------------------------------------

    async def _pinned(self, worker: WorkerConfig, peer: str) -> WorkerConfig:
        """Return a worker at an address that was checked, instead of a name.

        A certificate is for a name, which therefore stays in an https URL; whatever it
        resolves to later has to have that certificate.

        Raises:
            RequestError: 403, the address may not be registered.
        """
        origin = worker.origin
        found = [origin.host]
        if not addresses.is_plain_host(origin.host):
            try:
                async with asyncio.timeout(PROOF_TIMEOUT):
                    found = await names.resolve(origin.host, origin.port)
            except OSError:
                text = f"The hub cannot resolve the name {origin.host!r}."
                raise RequestError(Code.ADDRESS_REFUSED, text, param="url") from None
        for address in found:
            self._hub.agents.check_address(address, peer)
        if origin.scheme == "https" or found == [origin.host]:
            return worker
        pinned = origin._replace(host=found[0])
        url = f"{pinned.scheme}://{pinned.authority}{pinned.prefix}"
        return replace(worker, origin=pinned, url=url)

    async def _prove(
        self, lease: WorkerLease, port: int, secret: bytes, peer: str
    ) -> None:
        """Have the agent answer at the address of its worker.

        Raises:
            RequestError: 403, it does not; the lease has ended then.
        """
        proved, host = False, lease.worker.origin.host
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            reason = await _challenge(lease.worker, port, secret)
            proved = not reason
            if not proved and host != peer:
                # Of another machine nothing is revealed, not even by the time it took.
                await asyncio.sleep(began + PROOF_TIMEOUT - loop.time())
        finally:
            self._hub.agents.conclude(lease, proved=proved)
        if not proved:
            detail = f" ({reason})" if host == peer else ""
            text = (
                f"The agent did not answer the hub at {host}, port {port}{detail}. It "
                "has to run on the worker's machine, and its port has to be reachable."
            )
            raise RequestError(Code.ADDRESS_REFUSED, text, param="url")

    def _refuse_clash(self, worker: WorkerConfig) -> None:
        """Refuse a name or an address that a worker without this lease has.

        Raises:
            RequestError: 409.
        """
        others = [
            each.config
            for each in self._hub.registry.workers
            if each.source is not Source.AGENT or each.name != worker.name
        ]
        try:
            check_distinct([*others, worker])
        except ConfigError as exc:
            raise RequestError(Code.CONFLICT, f"{exc}.", param="name") from None

    # --- Workers ------------------------------------------------------------------

    async def _put_in_force(self, lease: WorkerLease, subject: str) -> Worker:
        """Put the worker of a lease into the fleet, or its new settings in force.

        Raises:
            RequestError: 409, its name or address was taken in the meantime.
        """
        registry, worker = self._hub.registry, lease.worker
        try:
            await self._hub.files.prepare([worker])
            if self._hub.agents.find(worker.name) is not lease:
                raise ConfigError(
                    f"the lease of {worker.name!r} has ended in the meantime"
                )
            known = self._hub.registry.get(worker.name)
            if known is None:
                found = registry.add(worker, Source.AGENT)
                stored = self._hub.state.find(worker.name)
                if stored is not None and stored.hold:
                    found.hold(Hold(stored.hold))  # it was held when its lease ended
                logger.info(
                    "worker %s: registered at %s by %s",
                    worker.name,
                    worker.url,
                    subject,
                )
            elif known.source is not Source.AGENT:
                raise ConfigError(f"{worker.name!r} is the name of {known.config.url}")
            else:
                found = registry.replace(worker)
        except ConfigError as exc:
            await self.remove(lease, str(exc))
            raise RequestError(Code.CONFLICT, f"{exc}.", param="name") from None
        await self._keep(lease)
        return found

    async def _put_to_sleep(
        self, lease: WorkerLease, worker: Worker, *, sleeping: bool
    ) -> None:
        """Let a machine sleep if nothing runs on it, or end that."""
        if sleeping and worker.config.mac and not worker.leases:
            lease.sleeping = True
            worker.slept()
            await self._keep(lease)
        elif lease.sleeping:
            lease.sleeping = False
            worker.stays_awake()
            await self._keep(lease)

    async def _keep(self, lease: WorkerLease) -> None:
        worker = lease.worker
        settings = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(worker).items()
            if key in KEYS and value not in (None, (), "")
        }
        stored = self._hub.state.find(worker.name)
        row = StoredWorker(
            worker.name,
            Source.AGENT,
            settings,
            stored.hold if stored is not None else "",
            {"digest": lease.agent} | self._asleep(lease),
        )
        try:
            await self._hub.state.put(row)
        except StateError as exc:
            logger.warning("worker %s: %s", worker.name, exc)

    def _asleep(self, lease: WorkerLease) -> dict[str, Any]:
        """Return what the next hub has to know of a machine that sleeps now."""
        worker = self._hub.registry.get(lease.name)
        if not lease.sleeping or worker is None:
            return {}
        return {"sleeping": True, "models": [model.name for model in worker.models]}

    async def remove(self, lease: WorkerLease, why: str) -> None:
        """Remove the worker of a lease: it drains, and is not stored any more."""
        name = lease.name
        current = self._hub.agents.find(name)
        if current is not None and current is not lease:
            return  # its agent is back
        self._hub.agents.release(name)  # before the registry notifies of it
        worker = self._hub.registry.get(name)
        if worker is not None and worker.source is Source.AGENT:
            self._hub.registry.remove(name)
            logger.info("worker %s: removed, %s", name, why)
        stored = self._hub.state.find(name)
        if stored is not None and stored.hold:
            # An operator holds it, and still will when its agent is back.
            await self._hub.state.put(replace(stored, settings={}, agent={}))
        else:
            await self._hub.state.forget(name)


# --- Renewals at other hubs -------------------------------------------------------

# Seconds for which a renewal is kept in the store: more than the longest lease.
RENEWED = 2 * 3600.0


class Renewal(facts.Message):
    """A renewal as the store has it, by the name of the worker."""

    hub: str  # the run id of the one where it was renewed
    agent: str  # the digest of its secret
    report: dict[str, Any] = msgspec.field(default_factory=dict)


class Renewals:
    """Takes part in the rounds with other hubs (`state/shared.py`)."""

    def __init__(self, agents: Agents, prefix: str, run: str) -> None:
        """Begin; `run` is the run id of this hub."""
        self.journal = Journal(
            prefix,
            "agents",
            MAX_WORKERS,
            life=RENEWED,
            mortal="all",
            channel=f"{prefix}:{NEWS}",
        )
        self._agents, self._run = agents, run
        self._numbers = itertools.count()
        self._pending: dict[str, int] = {}  # renewed here, and not sent yet
        self._sent: dict[str, int] = {}  # by the current round
        agents.on_renewed = self._note

    def __repr__(self) -> str:
        return f"<Renewals pending={len(self._pending)}>"

    def _note(self, lease: WorkerLease) -> None:
        self._pending[lease.name] = next(self._numbers)

    @property
    def due(self) -> bool:
        return bool(self._pending)

    async def entries(self) -> list[Entry]:
        names = itertools.islice(self._pending, MOST_WRITTEN)
        self._sent = {name: self._pending[name] for name in names}
        found = []
        for name in self._sent:
            lease = self._agents.find(name)
            if lease is not None:
                row = Renewal(hub=self._run, agent=lease.agent, report=lease.report)
                found.append(Entry(name, "a0", facts.encode(row).decode()))
        return found

    async def take(self, entries: Sequence[Entry], answer: StepResult) -> bool:
        for name, number in self._sent.items():
            if self._pending.get(name) == number:
                del self._pending[name]
        for row in answer.rows:
            found = facts.decode(Renewal, row.value, "agents")
            if found is not None and found.hub != self._run:
                age = max(0.0, (answer.now - row.number) / 1e6)
                self._agents.hear(row.key, found.agent, found.report, age)
        return answer.more or bool(self._pending)


# --- Proofs and addresses ---------------------------------------------------------


async def _challenge(worker: WorkerConfig, port: int, secret: bytes) -> str:
    """Check that an agent answers at the address of its worker; return why not."""
    nonce = secrets.token_hex(16)
    origin = Origin("http", worker.origin.host, port, "")
    target = Target(replace(worker, origin=origin, api_key=""))
    try:
        reply = await fetch(
            target, f"/proof/{nonce}", limit=1024, timeout=PROOF_TIMEOUT
        )
    except FetchError as exc:
        return str(exc)
    expected = answer_to(nonce, secret, worker.name)
    if reply.status == 200 and hmac.compare_digest(reply.body.strip(), expected):
        return ""
    return "another program answers there"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _unmapped(peer: str) -> str:
    """Return the address of a peer, an IPv4 one as such on a socket for both."""
    address = addresses.parse(peer)
    return str(getattr(address, "ipv4_mapped", None) or peer)


def _load(name: str, table: Mapping[str, Any]) -> WorkerConfig:
    """Make a worker of what an agent registers.

    Raises:
        RequestError: 400; it names each key that is wrong.
    """
    unknown = [key for key in table if key not in KEYS]
    if unknown:
        text = f"`worker.{unknown[0][:50]}`: an agent may set {', '.join(KEYS)}."
        raise RequestError(Code.INVALID_VALUE, text, param="worker")
    try:
        worker = load_worker("worker", {**table, "name": name}, {})
        if worker.is_group or not worker.origin.port:
            why = "must be one address with a port, such as http://10.0.0.11:8080"
            raise ConfigError(f"worker.url = {worker.url!r}: {why}")
    except ConfigError as exc:
        text = f"{'; '.join(exc.args)}."
        raise RequestError(Code.INVALID_VALUE, text, param="worker") from None
    return worker
