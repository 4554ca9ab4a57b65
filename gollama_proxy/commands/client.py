"""How a command reaches a hub: the client of the admin API.

The client is for programs that do one thing at a time, so it needs no event loop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from gollama_proxy.config.addresses import check_url, split_hubs
from gollama_proxy.config.keys import check_token, read_token
from gollama_proxy.config.values import ConfigError, shown

if TYPE_CHECKING:
    import http.client
    import ssl

Json = dict[str, Any]

DEFAULT_HUB = "http://127.0.0.1:8000"
PATIENCE = 30.0  # seconds without a byte of an answer
MOST = 64 << 20  # bytes of an answer


class CallError(Exception):
    """Why a hub did not do what was asked.

    `status` is the exit status of a command, `code` that of the error of the hub.
    """

    def __init__(self, text: str, status: int = 1, code: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.code = code


class AdminClient:
    """A running hub, called with one request after the other.

    With several URLs, it is the first one that accepts a connection, and another one
    as soon as that does not accept any.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        context: ssl.SSLContext | None = None,
        others: Sequence[str] = (),
    ) -> None:
        self.missing: list[str] = []  # hubs that the last answer is without
        self._token = token
        self._context = context
        self._urls = [url, *others]
        self._turn_to(url)

    def _turn_to(self, url: str) -> None:
        import http.client

        self.url = url
        parts, context = urlsplit(url), self._context
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

        A path that begins with a slash leads elsewhere on the hub.

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
        target = path if path.startswith("/") else f"/admin/{path}"
        if given:
            target += f"?{urlencode(given)}"
        self._connect()
        try:
            self._connection.request(method, self._base + target, data, fields)
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
            self.missing = [*map(str, answer.get("missing", ()))]
            return answer
        raise self._refusal(response.status, answer)

    def _connect(self) -> None:
        """Choose a hub that accepts a connection, if there are several to choose from.

        Raises:
            CallError: none of them does.
        """
        if len(self._urls) == 1 or self._connection.sock is not None:
            return
        refused = []
        first = self._urls.index(self.url)
        for url in self._urls[first:] + self._urls[:first]:
            self._turn_to(url)
            try:
                self._connection.connect()
            except OSError as exc:
                self.close()
                refused.append(f"{url}: {_reason_of(exc)}")
            else:
                return
        raise CallError(f"no hub answers at {'; '.join(refused)}")

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
            text = f"the hub at {self.url} refuses: {message}"
            return CallError(text, code=str(answer["error"].get("code")))
        return CallError(message, 2 if status in (400, 413, 415) else 1)


# --- Address and token ------------------------------------------------------------


def make_client(
    hub: str | None,
    token: str | None,
    token_file: str | None,
    ca_file: str | None,
    environ: Mapping[str, str],
) -> AdminClient:
    """Make a client for the hub that flags or variables name; nothing is sent yet.

    A flag that is not given is None; `hub` is a URL, or several.

    Raises:
        ConfigError: one of them is wrong.
    """
    source, given = "--hub", hub
    if given is None:
        source, given = "GOLLAMA_HUB", environ.get("GOLLAMA_HUB") or DEFAULT_HUB
    urls = split_hubs(given) or [given]
    for url in urls:
        check_url(source, url)
    if token is not None:
        token = check_token("--token", token)
    else:
        token = read_token(token_file or "", environ)
    context = None
    if any(url.startswith("https:") for url in urls):
        from gollama_proxy.config.tls import hub_context

        context = hub_context(ca_file or "")
    elif ca_file:
        text = f"is for an https hub only, and {source} = {shown(given)}"
        raise ConfigError(f"--ca-file = {ca_file!r}: {text}")
    return AdminClient(urls[0], token, context, urls[1:])


# --- Answers ----------------------------------------------------------------------


def _reason_of(error: Exception) -> str:
    from http.client import RemoteDisconnected

    from gollama_proxy.config.tls import explain_tls

    if isinstance(error, RemoteDisconnected):
        return "it closed the connection"
    if isinstance(error, TimeoutError):
        return f"no answer within {PATIENCE:g} s"
    if isinstance(error, OSError):
        return explain_tls(error) or (error.strerror or str(error)).lower()
    return "the answer is not HTTP"


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
