"""The dashboard: its page and files, and what a page learns about the token it has.

A browser gets the page at `/`, any other program a short JSON object.  The page loads
only files of this package, which are read once, at the first request for one of them;
everything it shows comes from the admin API.  All its addresses are relative, so it
also works behind a reverse proxy that adds a prefix to the path.
"""

from __future__ import annotations

import asyncio
import functools
import gzip
import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from gollama_proxy import __version__
from gollama_proxy.control import Parts
from gollama_proxy.control.replies import answer, check_local, decode_body, receive
from gollama_proxy.edge.auth import AuthError
from gollama_proxy.edge.response import JSON, Response
from gollama_proxy.edge.router import Routes, name_in
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code, RequestError

if TYPE_CHECKING:
    from aiohttp import web

INDEX = "index.html"
# Scripts, styles and pictures come from this hub alone, and no text of the page can
# become markup or a script (W3C Content Security Policy 3; Trusted Types).
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'"
)
_PROTECTION = (
    f"Content-Security-Policy: {POLICY}\r\n"
    "X-Content-Type-Options: nosniff\r\n"
    "Referrer-Policy: no-referrer\r\n"
    "Cross-Origin-Opener-Policy: same-origin\r\n"
    "Cross-Origin-Resource-Policy: same-origin\r\n"
)
# Kept by a browser, which asks each time whether there is a newer one.
_KEPT = "Cache-Control: no-cache\r\n"
_NOT_KEPT = "Cache-Control: no-store\r\n"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "txt": "text/plain; charset=utf-8",
}
_LINKS = {
    "dashboard": "/",
    "models": "/v1/models",
    "health": "/health",
    "metrics": "/metrics",
    "admin": "/admin/openapi.json",
}


class Dashboard:
    """Answers a browser that opens the dashboard."""

    def __init__(self, hub: Parts) -> None:
        self._hub = hub
        self._started = round(time.time(), 3)

    def __repr__(self) -> str:
        return f"<Dashboard of {self._hub!r}>"

    def routes(self) -> Routes:
        """Return the handlers of all paths."""
        return {
            "/": {"GET": self._show_index},
            "/dashboard": {"GET": _lead_to_index},
            "/dashboard/session": {"GET": self._show_session},
            "/dashboard/sign-in": {"POST": self._sign_in},
            "/dashboard/{file}": {"GET": self._show_file},
        }

    async def _show_index(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /`: the page for a browser, a short JSON for other programs."""
        accepted = ",".join(request.headers.getall("Accept", ()))
        if quality(accepted, "text/html") > quality(accepted, "application/json"):
            return _serve(await _read_files(), INDEX, request, "Accept, ")
        value = {
            "name": "gollama-proxy",
            "version": __version__,
            "base_url": f"{self._url_of(request)}/v1",
            "links": _LINKS,
            "auth": self._hub.config.auth.mode,  # so the page knows whether to ask
        }
        fields = f"{JSON}Vary: Accept\r\n{_NOT_KEPT}{_PROTECTION}"
        return Response(answer(value).body, fields=fields)

    def _url_of(self, request: web.BaseRequest) -> str:
        """Return the address of the hub, with the name by which the client knows it."""
        url = self._hub.url
        host = request.headers.get("Host")  # which is valid, or the hub refuses it
        # A proxy that ends TLS states that; no more depends on it than this text.
        https = request.headers.get("X-Forwarded-Proto", "").lower() == "https"
        scheme = "https" if https else url.partition(":")[0]
        return f"{scheme}://{host}" if host else url

    async def _show_file(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /dashboard/{file}`.

        Raises:
            RequestError: 404, the page has no such file.
        """
        files, name = await _read_files(), name_in(request, record)
        if name not in files or name == INDEX:
            text = f"The dashboard has no file {name[:100]!r}."
            raise RequestError(Code.NOT_FOUND, text)
        return _serve(files, name, request)

    async def _show_session(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /dashboard/session`: what the token of a page allows.

        Raises:
            AuthError: there is no valid token.
        """
        caller = self._hub.authenticator.identify(request, record)
        auth = self._hub.config.auth
        scopes = caller.scopes
        if auth.mode == "off":
            try:
                check_local(request)
            except RequestError:  # /admin refuses this caller as well
                scopes = frozenset()
        expires = caller.expires - auth.leeway
        value = {
            "subject": caller.subject,
            "scopes": sorted(scopes),
            "models": caller.models,
            "expires": None if math.isinf(expires) else expires,
            "auth": auth.mode,
            "largest_body": self._hub.config.limits.body,
            "version": __version__,
            "started": self._started,
        }
        return Response(answer(value).body, fields=JSON + _NOT_KEPT + _PROTECTION)

    async def _sign_in(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `POST /dashboard/sign-in`: the token that a link stands for.

        Raises:
            RequestError: 400, 401, 408, 413 or 415.
        """
        timeout = self._hub.config.timeouts.body
        given = decode_body(await receive(request, timeout, MOST_BODY), _SignIn)
        token = await self._hub.links.redeem(given.code)
        try:
            if token is None:
                raise AuthError("no such link")
            authenticator = self._hub.authenticator
            caller = authenticator.authenticate([f"Bearer {token}"])
        except AuthError as exc:
            text = (
                "This link does not sign in: it was used before, it has expired, or "
                "the hub has restarted. Make another one: gollama-proxy dashboard"
            )
            raise RequestError(Code.INVALID_API_KEY, text, detail=exc.detail) from None
        record.subject = caller.subject
        self._hub.events.record_change(record, "use link", caller.subject)
        fields = JSON + _NOT_KEPT + _PROTECTION
        return Response(answer({"token": token}).body, fields=fields)


async def _lead_to_index(request: web.BaseRequest, record: Record) -> Response:
    """Answer `GET /dashboard`, which people try: the page is at the root."""
    # Relative, for a hub that a proxy shows below a path.
    return Response(status=307, fields=f"Location: ./\r\n{_NOT_KEPT}{_PROTECTION}")


# --- Links that sign in -----------------------------------------------------------

LINK_LIFETIME = 300  # seconds
MOST_LINKS = 100
MOST_BODY = 1 << 10  # bytes


class _SignIn(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a page that signs in."""

    code: str


class Links:
    """Codes that stand for tokens: each for one use, and for a short time.

    A code is in the fragment of a link, which no browser sends to any server.  It can
    stay in a terminal or in a history: a token would be of use there much longer.
    `clock` gives monotonic seconds.  Hubs that share a store keep them there, where
    any of them finds them (`shared`).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By the hash of their codes, the oldest first: a token, and when it ends.
        self._links: dict[bytes, tuple[str, float]] = {}
        self.shared: SharedLinks | None = None

    def __repr__(self) -> str:
        return f"<Links {len(self._links)}>"

    async def issue(self, token: str) -> str:
        """Return a new code for a token, for any hub that shares the store."""
        if self.shared is not None:
            code = secrets.token_urlsafe(24)
            if await self.shared.keep(code, token):
                return code
        return self.make(token)

    async def redeem(self, code: str) -> str | None:
        """Return the token of a code, which ends with that; None if there is none."""
        token = self.use(code)
        if token is None and self.shared is not None:
            token = await self.shared.take(code)
        return token

    def make(self, token: str) -> str:
        """Return a new code for a token; the oldest one gives way if there are many."""
        self._forget()
        while len(self._links) >= MOST_LINKS:
            del self._links[next(iter(self._links))]
        code = secrets.token_urlsafe(24)
        self._links[_digest_of(code)] = token, self._clock() + LINK_LIFETIME
        return code

    def use(self, code: str) -> str | None:
        """Return the token of a code, which ends with that; None if there is none."""
        self._forget()
        token, _ = self._links.pop(_digest_of(code), (None, 0.0))
        return token

    def _forget(self) -> None:
        """Drop the links that have expired."""
        now = self._clock()
        for key, (_, end) in tuple(self._links.items()):
            if end > now:
                break
            del self._links[key]


class SharedLinks(Protocol):
    """The codes that all hubs know (`LinksInStore` in `cluster.py`)."""

    async def keep(self, code: str, token: str) -> bool:
        """Keep the token of a code; return whether it is kept."""

    async def take(self, code: str) -> str | None:
        """Return the token of a code, and forget it."""


def _digest_of(code: str) -> bytes:
    return hashlib.blake2b(code.encode()).digest()


# --- Files ------------------------------------------------------------------------


class _File(NamedTuple):
    """A file of the page, as it is and compressed, and its type and version."""

    content: bytes
    compressed: bytes
    type: str
    tag: str


async def _read_files() -> Mapping[str, _File]:
    """Return the files of the page by their names."""
    if not _load_files.cache_info().currsize:
        await asyncio.to_thread(_load_files)
    return _load_files()


@functools.cache
def _load_files() -> Mapping[str, _File]:
    """Read the files of the page, once in a process."""
    files = {}
    for each in resources.files(__package__).joinpath("dashboard").iterdir():
        kind = _TYPES.get(each.name.rpartition(".")[2])
        if kind is not None:
            content = each.read_bytes()
            # Weak: it is also the tag of the compressed file (RFC 9110, 8.8.3).
            tag = hashlib.blake2b(content, digest_size=12).hexdigest()
            compressed = gzip.compress(content, mtime=0)
            files[each.name] = _File(content, compressed, kind, f'W/"{tag}"')
    return files


def _serve(
    files: Mapping[str, _File], name: str, request: web.BaseRequest, vary: str = ""
) -> Response:
    """Make the answer with a file; 304 if the client has it."""
    file = files[name]
    fields = f"ETag: {file.tag}\r\nVary: {vary}Accept-Encoding\r\n{_KEPT}{_PROTECTION}"
    known = ",".join(request.headers.getall("If-None-Match", ()))
    # Compared without the marks of weak tags (RFC 9110, 13.1.2).
    if file.tag[2:] in re.findall(r'"[^"]*"', known) or known.strip() == "*":
        return Response(status=304, fields=fields)
    fields += f"Content-Type: {file.type}\r\n"
    if _accepts_gzip(request) and len(file.compressed) < len(file.content):
        return Response(file.compressed, fields=fields + "Content-Encoding: gzip\r\n")
    return Response(file.content, fields=fields)


async def compress(content: bytes, request: web.BaseRequest) -> Response:
    """Make an answer of much JSON, compressed if the client accepts that."""
    fields = f"{JSON}Vary: Accept-Encoding\r\n"
    if _accepts_gzip(request):
        content = await asyncio.to_thread(gzip.compress, content, 1, mtime=0)
        fields += "Content-Encoding: gzip\r\n"
    return Response(content, fields=fields)


def _accepts_gzip(request: web.BaseRequest) -> bool:
    codings = ",".join(request.headers.getall("Accept-Encoding", ()))
    return quality(codings, "gzip") > 0


def quality(accepted: str, wanted: str) -> float:
    """Return how much a client wants a type or coding, from 0 to 1.

    `accepted` is its `Accept` or `Accept-Encoding` header (RFC 9110, 12.4.2).  The most
    specific range decides.
    """
    best = 0, 0.0
    group = f"{wanted.partition('/')[0]}/*"
    for part in accepted.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        kind = {wanted: 3, group: 2, "*/*": 1, "*": 1}.get(name)
        if kind is not None and kind > best[0]:
            best = kind, _weight_in(parameters)
    return best[1]


def _weight_in(parameters: list[str]) -> float:
    """Return the weight in the parameters of a range; one that is not valid is 0."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            value = value.strip()
            valid = re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", value)
            return float(value) if valid else 0.0
    return 1.0
