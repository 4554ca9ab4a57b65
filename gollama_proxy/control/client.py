"""A client of the admin API, for the commands of operators.

It is used by programs that do one thing at a time, so it needs no event loop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from gollama_proxy.config.keys import read_secret
from gollama_proxy.config.mistakes import ConfigError, shown

if TYPE_CHECKING:
    import http.client
    import ssl

Json = dict[str, Any]

DEFAULT_HUB = "http://127.0.0.1:8000"
PATIENCE = 30.0  # seconds without a byte of an answer
MOST = 64 << 20  # bytes of an answer


class CallError(Exception):
    """Why a hub did not do what was asked; `status` is the exit status of a command."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class NotFoundError(CallError):
    """The hub has no such worker or request."""


class AdminClient:
    """A running hub, called with one request after the other."""

    def __init__(
        self,
        url: str,
        token: str = "",
        context: ssl.SSLContext | None = None,
    ) -> None:
        import http.client

        self.url = url
        self._token = token
        parts = urlsplit(url)
        self._base = parts.path.rstrip("/")
        host, port = parts.hostname or "", parts.port
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            self._connection = http.client.HTTPSConnection(
                host, port, timeout=PATIENCE, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)

    def __repr__(self) -> str:  # without the token
        return f"<AdminClient of {self.url}>"

    def close(self) -> None:
        self._connection.close()

    def call(
        self, method: str, path: str, body: Json | None = None, **query: str | None
    ) -> Json:
        """Call the admin API; return what it answers, a JSON object.

        Raises:
            CallError: no hub answers, or it refuses.
        """
        from http.client import HTTPException

        fields = {"Accept": "application/json", "User-Agent": "gollama-proxy"}
        if self._token:
            fields["Authorization"] = f"Bearer {self._token}"
        data = None
        if method != "GET":
            data = b"" if body is None else json.dumps(body).encode()
            fields["Content-Type"] = "application/json"
        given = {name: value for name, value in query.items() if value is not None}
        target = f"{self._base}/admin/{path}" + (
            f"?{urlencode(given)}" if given else ""
        )
        try:
            self._connection.request(method, target, data, fields)
            response = self._connection.getresponse()
            content = response.read(MOST + 1)
        except (OSError, HTTPException) as exc:
            self.close()
            text = f"no hub answers at {self.url}: {_reason_of(exc)}"
            raise CallError(text) from exc
        except BaseException:
            self.close()
            raise
        answer = _decode(content) if len(content) <= MOST else None
        if 200 <= response.status < 300 and isinstance(answer, dict):
            return answer
        raise self._refusal(response.status, answer)

    def _refusal(self, status: int, answer: Any) -> CallError:
        error = answer.get("error") if isinstance(answer, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        if not isinstance(message, str):
            text = f"{self.url} is not a hub with an admin API: it answered {status}"
            return CallError(text)
        if status == 401 and not self._token:
            hint = "give one with --token-file or in GOLLAMA_TOKEN"
            return CallError(f"the hub at {self.url} needs a token: {hint}")
        if status in (401, 403):
            return CallError(f"the hub at {self.url} refuses: {message}")
        if status == 404:
            return NotFoundError(message)
        return CallError(message, 2 if status in (400, 413, 415) else 1)


class Access(NamedTuple):
    """How to get at a hub, as flags give it; None: not given."""

    hub: str | None = None  # its URL
    token: str | None = None
    token_file: str | None = None
    ca_file: str | None = None

    def __repr__(self) -> str:  # without the token
        return f"<Access to {self.hub!r}>"


def connect(access: Access, environ: Mapping[str, str]) -> AdminClient:
    """Make a client for the hub that flags or variables name; nothing is sent yet.

    Raises:
        ConfigError: one of them is wrong.
    """
    source, url = "--hub", access.hub
    if url is None:
        source, url = "GOLLAMA_HUB", environ.get("GOLLAMA_HUB") or DEFAULT_HUB
    _check_url(source, url)
    token = _read_token(access, environ)
    context = None
    if url.startswith("https:"):
        context = _make_context(access.ca_file)
    elif access.ca_file is not None:
        text = f"is for an https hub only, and {source} = {shown(url)}"
        raise ConfigError(f"--ca-file = {access.ca_file!r}: {text}")
    return AdminClient(url, token, context)


def _check_url(source: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    else:
        sound = sound and not (parts.query or parts.fragment or "@" in parts.netloc)
    if not sound or not re.fullmatch(r"[!-~]+", url):
        safe = re.sub("//.*@", "//…@", url)
        raise ConfigError(
            f"{source} = {shown(safe)}: must be a URL such as {DEFAULT_HUB}"
        )


def _read_token(access: Access, environ: Mapping[str, str]) -> str:
    if access.token is not None:
        source, token = "--token", access.token
    elif access.token_file is not None:
        source = f"--token-file = {access.token_file!r}"
        token = read_secret(source, access.token_file).decode(errors="replace")
    else:
        source, token = "GOLLAMA_TOKEN", environ.get("GOLLAMA_TOKEN", "")
        if not token.strip():
            return ""
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{source}: must be a token, as `gollama-proxy token` prints")
    return str(token)


def _make_context(ca_file: str | None) -> ssl.SSLContext:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as exc:  # ssl.SSLError included
        why = "holds no PEM certificate"
        if not isinstance(exc, ssl.SSLError):
            why = f"cannot be read: {exc.strerror}"
        raise ConfigError(f"--ca-file = {ca_file!r}: {why}") from exc


def _reason_of(error: Exception) -> str:
    from http.client import RemoteDisconnected

    from gollama_proxy.config.tls import explain

    if isinstance(error, RemoteDisconnected):
        return "it closed the connection"
    if isinstance(error, TimeoutError):
        return f"nothing came within {PATIENCE:g} s"
    if isinstance(error, OSError):
        return explain(error) or (error.strerror or str(error)).lower()
    return "what came is not HTTP"


def _decode(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def segment(text: str) -> str:
    """Write a name or an id as one segment of a path.

    Raises:
        ConfigError: it is empty or a step of a path.
    """
    if text in ("", ".", ".."):
        raise ConfigError(f"{text!r}: must be a name or an id")
    return quote(text, safe="")
