"""Calls of operators, as they are read, and what a hub replies.

An operator asks any hub.  It replies for all of them: `Replies.gather` returns its own
reply and those of the others (`control/peers.py`), and `control/merging.py` makes one
of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import msgspec
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError
from aiohttp.web_request import BaseRequest

from gollama_proxy import __version__
from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Config
from gollama_proxy.config.values import ConfigError
from gollama_proxy.control import Parts, merging
from gollama_proxy.control.history import Shown
from gollama_proxy.control.merging import Answers
from gollama_proxy.control.views import Views, in_flight
from gollama_proxy.edge.auth import Principal
from gollama_proxy.edge.response import Response, Sent
from gollama_proxy.edge.router import name_in
from gollama_proxy.proxy.body import answer_expectation
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.wire.errors import Code, RequestError

# --- Calls ------------------------------------------------------------------------

MOST_BODY = 1 << 20  # bytes; a request to explain may be long
LONG_BODY = 32 << 10  # bytes that take the event loop a few milliseconds
# Each of them shows that the peer speaks for another one (RFC 9110, 7.6.3; RFC 7239).
_OF_PROXIES = (
    "Forwarded",
    "Via",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Real-IP",
)
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::[0-9]*)?")


class AdminCall(NamedTuple):
    """One call of the API by an operator who may make it."""

    request: BaseRequest
    x: Exchange
    caller: Principal
    config: Config

    @property
    def name(self) -> str:
        """The name or id in the path."""
        return name_in(self.request, self.x)

    async def read(self) -> dict[str, Any]:
        """Read the JSON object that a call sends.

        Raises:
            RequestError: 400, 408, 413 or 415.
        """
        value = decode_body(await self.receive(), object)
        if not isinstance(value, dict):
            text = "The request body must be a JSON object."
            raise RequestError(Code.INVALID_JSON, text)
        return value

    async def receive(self) -> bytes:
        """Read the body that a call sends.

        Raises:
            RequestError: 400, 408, 413 or 415.
        """
        return await receive(self.request, self.config.timeouts.body)


CallHandler = Callable[[AdminCall], Awaitable[Response | Sent]]


def answer(value: object, status: int = 200) -> Response:
    """Make an answer in JSON."""
    return Response(msgspec.json.encode(value), status)


# --- Where a call comes from ------------------------------------------------------


def check_local(request: BaseRequest) -> None:
    """Check that a request is from a program on this machine, or a page of the hub.

    Without authentication anything that reaches the address of the hub may use its
    models.  That is no reason to let it change the fleet, and a browser on the same
    machine reaches the address as well.  So with `auth.mode = "off"` the API is only
    for programs on the hub's own machine, and for no web page of another site:

    * the peer has a loopback address, and no header of a proxy hides another one;
    * `Host` is a loopback address or `localhost`, as a page whose name was made to lead
      here (DNS rebinding) would send its own;
    * `Origin` and `Sec-Fetch-Site` are absent or of this hub's own pages.

    With authentication a token is needed, which no browser adds by itself.

    Raises:
        RequestError: 403, it is not.
    """
    headers = request.headers
    host, why = headers.get("Host", ""), ""
    own = f"http://{host}", f"https://{host}"
    if not addresses.is_loopback(request.remote or ""):
        why = "its address is not a loopback address"
    elif proxies := [name for name in _OF_PROXIES if name in headers]:
        why = f"it came through a proxy ({proxies[0]})"
    elif not _is_local_name(host):
        why = "its Host is not localhost or a loopback address"
    elif any(origin not in own for origin in headers.getall("Origin", ())):
        why = "it is from a web page of another site (Origin)"
    elif headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        why = "it is from a web page of another site (Sec-Fetch-Site)"
    if why:
        text = (
            "Without authentication, /admin is only for programs on the hub's own "
            f"machine, and this request is refused: {why}."
        )
        raise RequestError(Code.LOCAL_ONLY, text)


def _is_local_name(host: str) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and addresses.is_loopback((match[1] or match[2]).lower())


# --- What it sends ----------------------------------------------------------------

_T = TypeVar("_T")


async def receive(request: BaseRequest, timeout: float, most: int = MOST_BODY) -> bytes:
    """Read a JSON body of at most `most` bytes, within `timeout` seconds.

    Raises:
        RequestError: 400, 408, 413 or 415.
    """
    # A page of another site can send a body of other types without asking first.
    if request.content_type != "application/json":
        text = "Content-Type must be application/json."
        raise RequestError(Code.UNSUPPORTED_MEDIA_TYPE, text)
    if request.headers.get("Content-Encoding", "identity") != "identity":
        text = "The request body must not be compressed here."
        raise RequestError(Code.UNSUPPORTED_ENCODING, text)
    answer_expectation(request)
    body = b""
    try:
        async with asyncio.timeout(timeout):
            while not request.content.at_eof():
                body += await request.content.readany()
                if len(body) > most:
                    text = f"The request body is larger than {most} bytes."
                    raise RequestError(Code.BODY_TOO_LARGE, text)
    except TimeoutError:
        text = "The request body arrived too slowly."
        raise RequestError(Code.BODY_TIMEOUT, text) from None
    except (RequestPayloadError, HttpProcessingError):
        text = "The framing of the request body is not valid HTTP."
        raise RequestError(Code.BAD_REQUEST, text) from None
    if len(body) > LONG_BODY:
        await asyncio.to_thread(_check_fields, body)
    else:
        _check_fields(body)
    return body


def _check_fields(body: bytes) -> None:
    """Check that no object in a body has two fields of one name: only one would count.

    Anything that is not JSON passes; `decode_body` refuses it.
    """
    with contextlib.suppress(ValueError, RecursionError):
        # A number of thousands of digits stays text.
        json.loads(body, object_pairs_hook=_refuse_repetition, parse_int=str)


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            text = f"{name[:40]}: this field is there twice."
            raise RequestError(Code.INVALID_VALUE, text, param=name[:40])
        seen.add(name)


def decode_body(body: bytes, kind: type[_T]) -> _T:
    """Read a JSON object of a declared kind.

    Raises:
        RequestError: 400; it names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        match = re.search(r"`\$\.(\w+)|unknown field `([^`]*)`", str(exc))
        param = (match[1] or match[2])[:40] if match else None
        raise RequestError(Code.INVALID_VALUE, f"{exc}.", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = "The request body is not valid JSON."
        raise RequestError(Code.INVALID_JSON, text) from None


# --- Replies ----------------------------------------------------------------------

# Rows of all hubs that are merged on the event loop: a few milliseconds.
MOST_ROWS = 500
RELOAD = 10.0  # seconds that the processes of a group have for a reload
_MERGE: dict[str, Callable[[merging.ByHub], list[Shown]]] = {
    "workers": merging.merge_workers,
    "models": merging.merge_models,
    "queue": merging.merge_queues,
    "exchanges": merging.merge_exchanges,
}


class Replies:
    """Answers for this hub, by the name of a question, and gathers those of all."""

    def __init__(self, hub: Parts, views: Views) -> None:
        self._hub = hub
        self._views = views
        self.table: dict[str, Callable[[Shown], Any]] = {
            "hub": self._show_hub,
            "workers": lambda _: [*map(views.worker, hub.registry.workers)],
            "worker": self._show_worker,
            "models": lambda _: views.models(),
            "queue": lambda _: views.queue(),
            "exchanges": lambda _: views.exchanges(),
            "requests": self._find_requests,
            "history": self._show_history,
            "cancel": self._cancel,
            "running": self._list_running,
            "reset": self._reset,
            "reload": self._reload,
        }

    def __repr__(self) -> str:
        return f"<Replies of {self._hub!r}>"

    # --- Of all hubs --------------------------------------------------------------

    async def gather(self, what: str, **arguments: Any) -> Answers:
        """Return what all hubs answer; of a hub without a store, its own answer."""
        own = self.table[what](arguments)
        if inspect.isawaitable(own):
            own = await own
        return await self.gather_others(what, own, arguments)

    async def gather_others(
        self, what: str, own: Any, arguments: Shown, *, group: bool = False
    ) -> Answers:
        """Return what the others answer, besides what this hub has done already."""
        peers = self._hub.peers
        if peers is None:
            return Answers({"": own}, [])
        patience = RELOAD if what == "reload" else None
        found, missing = await peers.ask(
            what, arguments, group=group, patience=patience
        )
        return Answers({peers.name: own, **found}, missing)

    def listing(self, what: str) -> CallHandler:
        """Make the handler of a list: workers, models, queue or exchanges."""

        async def show(_: AdminCall) -> Response:
            gathered = await self.gather(what)
            replies, merge = gathered.found, _MERGE[what]
            if self._hub.peers is None:
                return answer({what: replies[""]})
            counts = (len(each) for each in replies.values() if isinstance(each, list))
            if sum(counts) > MOST_ROWS:
                rows = await asyncio.to_thread(gathered.merge, merge)
            else:
                rows = gathered.merge(merge)
            return answer({what: rows} | gathered.note)

        return show

    async def show_worker(self, name: str, own: Shown | None) -> Shown | None:
        """Return how all hubs show a worker; None if none of them knows it."""
        if self._hub.peers is None:
            return own
        gathered = await self.gather_others("worker", own, {"name": name})
        shown = gathered.merge(merging.merge_known)
        return None if shown is None else shown | gathered.note

    async def list_hubs(self) -> Shown:
        """Return the hubs that are alive, by name, and the mode of the store."""
        peers, own = self._hub.peers, self._show_hub({})
        if peers is None:
            return {"store": None, "hubs": [own]}
        found, missing = await peers.ask("hub")
        gathered = Answers({peers.name: own, **found}, missing)
        hubs = gathered.merge(
            lambda found: [found[name] | {"hub": name} for name in sorted(found)]
        )
        return {"store": peers.store, "hubs": hubs} | gathered.note

    # --- Of this hub --------------------------------------------------------------

    def _show_hub(self, _: Shown) -> Shown:
        figures = merging.figures_of_hub("", self._hub.history.latest)
        return figures | {"version": __version__, "draining": self._hub.draining}

    def _show_worker(self, arguments: Shown) -> Shown | None:
        worker = self._hub.registry.get(str(arguments["name"]))
        return None if worker is None else self._views.worker(worker)

    def _find_requests(self, arguments: Shown) -> list[Shown]:
        until = arguments["until"]
        return self._hub.recent.find(
            arguments["limit"],
            arguments["since"],
            math.inf if until is None else until,
            **arguments["wanted"],
        )

    async def _show_history(self, arguments: Shown) -> Shown:
        history = self._hub.history
        seconds, step, names = (arguments[k] for k in ("seconds", "step", "workers"))
        shown: Shown = {"time": history.time, "step": step}
        shown["hub"] = history.of_hub(seconds, step)
        shown["workers"] = {}
        for name in history.names if "*" in names else names:
            columns = history.of_worker(name, seconds, step)
            if columns is not None:
                shown["workers"][name] = columns
            await asyncio.sleep(0)  # a millisecond each
        return shown

    def _cancel(self, arguments: Shown) -> list[list[str]]:
        """Cancel the requests with an id; clients may repeat one.

        Returns the state and the subject of each.
        """
        found = [
            x
            for x in in_flight(self._hub.proxy.running)
            if x.id == arguments["id"]
            and (x.state is State.QUEUED or not arguments["waiting"])
        ]
        cancelled = [[x.state.name.lower(), x.subject] for x in found]
        for x in found:
            self._hub.proxy.cancel(x)
        return cancelled

    def _list_running(self, arguments: Shown) -> list[str]:
        """Return the ids of a subject's requests; cancel them on demand."""
        subject = arguments["subject"]
        everything = in_flight(self._hub.proxy.running)
        running = [x for x in everything if x.subject == subject]
        for x in running if arguments["cancel"] else ():
            self._hub.proxy.cancel(x)
        return [x.id for x in running]

    def _reset(self, arguments: Shown) -> None:
        if (worker := self._hub.registry.get(str(arguments["name"]))) is not None:
            worker.reset_breakers()

    async def _reload(self, _: Shown) -> str:
        """Have the settings read again; return what is wrong with them, if anything."""
        try:
            await self._hub.reload()
        except ConfigError as exc:
            return "; ".join(exc.args)
        return ""
