"""Calls of operators: where they may come from, and what they may contain.

**Without authentication** anything that reaches the address of the hub may use its
models.  That is no reason to let it change the fleet, and a browser on the same machine
reaches the address as well.  So with `auth.mode = "off"` the API is only for programs
on the hub's own machine, and for no web page of another site (`check_local`):

* the peer has a loopback address, and no header of a proxy hides another one;
* `Host` is a loopback address or `localhost`, as a page whose name was made to lead
  here (DNS rebinding) would send its own;
* `Origin` and `Sec-Fetch-Site` are absent or of this hub's own pages.

With authentication a token is needed, which no browser adds by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import msgspec
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError
from aiohttp.web_request import BaseRequest

from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Config
from gollama_proxy.edge.auth import Principal
from gollama_proxy.edge.response import Response, Sent
from gollama_proxy.edge.router import name_in
from gollama_proxy.proxy.body import answer_expectation
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.wire.errors import Code, RequestError

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


class Call(NamedTuple):
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
        value = decode(await self.receive(), object)
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


CallHandler = Callable[[Call], Awaitable[Response | Sent]]


def answer(value: object, status: int = 200) -> Response:
    """Make an answer in JSON."""
    return Response(msgspec.json.encode(value), status)


# --- Where a call comes from ------------------------------------------------------


def check_local(request: BaseRequest) -> None:
    """Check that a request is from a program on this machine, or a page of the hub.

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

    Anything that is not JSON passes; `decode` refuses it.
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


def decode(body: bytes, kind: type[_T]) -> _T:
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
