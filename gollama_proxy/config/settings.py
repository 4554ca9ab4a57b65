"""What can be set: each setting with its default, its limits and its help, once.

The README's table, `gollama-proxy serve --help` and the loader all read these
declarations; there is no second list to keep in step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from gollama_proxy.wire.openai import ENDPOINTS

ALGORITHMS = ("HS256", "RS256", "ES256", "EdDSA")
# Those of `routing/policies/`.
POLICIES = ("round_robin", "weighted", "least_busy", "fastest", "affinity")
ROUTES = tuple(ENDPOINTS)
# Those whose answers can be assembled from a stream.
STREAMED = tuple(path for path, e in ENDPOINTS.items() if e.generates and not e.form)


# --- Kinds of values --------------------------------------------------------------


class Kind(NamedTuple):
    """How a value is read, and how that is told to people."""

    parse: Callable[[Any], Any]  # a TOML value or a string; raises ValueError
    allowed: str


def number(low: float, high: float, *, whole: bool = False, unit: str = "") -> Kind:
    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        result = int(value) if whole and not isinstance(value, float) else float(value)
        if not low <= result <= high or (whole and result != int(result)):
            raise ValueError
        return int(result) if whole else result

    what = "a whole number" if whole else "a number"
    return Kind(parse, f"{what}{unit} from {low:g} to {high:,.0f}")


def seconds(low: float = 0, high: float = 86_400) -> Kind:
    return number(low, high, unit=" of seconds")


def size(low: int = 0, high: int = 1 << 40) -> Kind:
    units = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError
        match = re.fullmatch(r"(\d{1,15})\s*([A-Za-z]*)", str(value).strip())
        if not match or match[2].upper() not in units:
            raise ValueError
        result = int(match[1]) * units[match[2].upper()]
        if not low <= result <= high:
            raise ValueError
        return result

    return Kind(parse, f"bytes or a size such as 64MiB, at least {low}")


def choice(*names: str) -> Kind:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return Kind(parse, "one of " + ", ".join(names))


def some_of(names: tuple[str, ...], allowed: str) -> Kind:
    def parse(value: Any) -> tuple[str, ...]:
        chosen = _parse_list(value)
        if not set(chosen) <= set(names):
            raise ValueError
        return chosen

    return Kind(parse, allowed)


def table_of(names: tuple[str, ...], allowed: str) -> Kind:
    def parse(value: Any) -> dict[str, str]:
        table = _parse_table(value)
        if not set(table.values()) <= set(names):
            raise ValueError
        return table

    return Kind(parse, allowed)


def _parse_list(value: Any) -> tuple[str, ...]:
    """Read a list of words; the environment has commas or spaces between them."""
    if isinstance(value, str):
        value = [part for part in re.split(r"[,\s]+", value) if part]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if not all(isinstance(word, str) and word for word in value):
        raise ValueError
    return tuple(value)


def _parse_flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    spelled = {"true": True, "1": True, "yes": True, "on": True}
    spelled |= {"false": False, "0": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in spelled:
        raise ValueError
    return spelled[value.lower()]


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError
    return value


def _parse_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError
    if not all(isinstance(name, str) and name.strip() for name in value):
        raise ValueError
    return tuple(_parse_text(name) for name in value)


def _parse_table(value: Any) -> dict[str, str]:
    if isinstance(value, str):  # the environment's spelling: "a=b,c=d"
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {left.strip(): right.strip() for left, _, right in pairs}
    if not isinstance(value, dict):
        raise ValueError
    if not all(isinstance(name, str) and name and k for k, name in value.items()):
        raise ValueError
    return dict(value)


def _parse_lists(value: Any) -> dict[str, tuple[str, ...]]:
    """Read models and those behind each of them, none of them twice."""
    if isinstance(value, str):  # the environment's spelling: "a=b|c,d=b"
        table = _parse_table(value)
        value = {name: re.split(r"\s*\|\s*", rest) for name, rest in table.items()}
    if not isinstance(value, dict):
        raise ValueError
    lists = {name: _parse_list(names) for name, names in value.items()}
    for name, names in lists.items():
        if not name or len({name, *names}) != 1 + len(names) or not names:
            raise ValueError
    return lists


def _parse_origins(value: Any) -> tuple[str, ...]:
    """Read exact origins (RFC 6454, 6.1: scheme, host and port, nothing behind).

    Desktop apps and browser extensions have schemes of their own.
    """
    return tuple(map(_parse_origin, _parse_list(value)))


def _parse_origin(text: str) -> str:
    """Read one origin; it is compared with what a browser sends, byte by byte."""
    match = _ORIGIN.fullmatch(text)
    if match is None or int(match["port"] or 1) not in range(1, 65_536):
        raise ValueError
    scheme, host, port = match.groups()
    if scheme in _DEFAULT_PORTS and _HOST.fullmatch(host) is None:
        raise ValueError
    if port is None or int(port) == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"  # a browser leaves it out (RFC 6454, 6.2)
    return f"{scheme}://{host}:{int(port)}"


_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[A-Za-z0-9._~-]+|\[[0-9a-f:]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
# A browser lowers the names of hosts, but not what stands there for other schemes.
_HOST = re.compile(r"[a-z0-9.-]+|\[[0-9a-f:]+\]")
_DEFAULT_PORTS = {"http": 80, "https": 443}
FLAG = Kind(_parse_flag, "true or false")
TEXT = Kind(_parse_text, "text on one line")
NAMES = Kind(_parse_names, 'a list of model names such as ["qwen*"], each on one line')
TABLE = Kind(_parse_table, 'a table such as { "gpt-4o-mini" = "qwen" }')
LISTS = Kind(
    _parse_lists, 'a table of lists of other names such as { "big" = ["small"] }'
)
ORIGINS = Kind(
    _parse_origins, "a list of origins such as http://localhost:3000 or app://name"
)
PORT = number(0, 65_535, whole=True)


def setting(default: Any, kind: Kind, help: str) -> Any:
    """Declare one setting; its name is the attribute's, its section the class's."""
    metadata = {"kind": kind, "help": help}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# --- The settings -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    host: str = setting("127.0.0.1", TEXT, "address to listen on")
    port: int = setting(8000, PORT, "port to listen on; 0 takes a free one")
    insecure_bind: bool = setting(
        False, FLAG, "allow an address beyond loopback without authentication"
    )
    keepalive: float = setting(
        30.0, seconds(1), "idle time of a client connection, and deadline of a head"
    )
    cors_origins: tuple[str, ...] = setting(
        (), ORIGINS, "web pages that may call the hub from a browser"
    )
    drain: float = setting(
        30.0, seconds(0), "how long running answers may go on after SIGTERM"
    )
    tls_certificate: str = setting(
        "", TEXT, "PEM file with the certificate chain; makes it https"
    )
    tls_key: str = setting(
        "", TEXT, "PEM file with its private key; empty: in the same file"
    )
    tls_client_ca: str = setting(
        "", TEXT, "PEM file with CAs; clients must have a certificate of one of them"
    )


@dataclass(frozen=True, slots=True)
class Auth:
    mode: str = setting("jwt", choice("jwt", "off"), "bearer tokens, or none at all")
    algorithm: str = setting(
        "HS256", choice(*ALGORITHMS), "the one algorithm that tokens are signed with"
    )
    public_key_file: str = setting(
        "", TEXT, "PEM file with the public key or keys, for all but HS256"
    )
    issuer: str = setting("", TEXT, "required `iss` of a token; empty checks none")
    audience: str = setting("", TEXT, "required `aud` of a token; empty checks none")
    secret_file: str = setting(
        "", TEXT, "file with the secret for HS256, instead of GOLLAMA_JWT_SECRET"
    )
    revoked: str = setting(
        "", TEXT, "file of tokens and subjects that are refused; read as it changes"
    )
    max_lifetime: float = setting(
        366 * 86_400.0,
        seconds(0, 3_660 * 86_400),
        "longest time that a token may still be valid; 0 is no limit",
    )
    leeway: float = setting(30.0, seconds(0, 300), "clock difference to forgive")
    cache_size: int = setting(
        4096, number(0, 1_000_000, whole=True), "verified tokens to remember"
    )


@dataclass(frozen=True, slots=True)
class Limits:
    head: int = setting(16 << 10, size(1 << 10, 1 << 20), "largest request head")
    body: int = setting(64 << 20, size(1 << 10), "largest request body")
    replay_window: int = setting(
        1 << 20,
        size(4 << 10, 1 << 30),
        "body kept for another attempt; a larger one streams through",
    )
    answer: int = setting(
        16 << 20, size(4 << 10), "largest answer that is assembled from a stream"
    )
    model_window: int = setting(
        16 << 20,
        size(4 << 10, 1 << 30),
        "how far into a body `model` is looked for where routing depends on it",
    )
    connections: int = setting(
        8000, number(1, 1_000_000, whole=True), "client connections, in all"
    )
    connections_per_address: int = setting(
        0,
        number(0, 1_000_000, whole=True),
        "of one address, of IPv6 one /64; 0 is no limit",
    )


@dataclass(frozen=True, slots=True)
class Timeouts:
    connect: float = setting(3.0, seconds(0.01), "reaching a worker")
    first_token: float = setting(
        300.0, seconds(0.01), "from the request to the first event of the answer"
    )
    allowance: float = setting(
        10.0,
        seconds(0.01),
        "first event of a stream while others could take over, and time for its prompt",
    )
    gap: float = setting(30.0, seconds(0.01), "between two events of a stream")
    silence: float = setting(45.0, seconds(0.01), "between two bytes of an answer")
    body: float = setting(
        30.0, seconds(0.01), "waiting for a request body, beside 1 s for each 16 KiB"
    )
    handshake: float = setting(10.0, seconds(0.01), "TLS with a client to be set up")
    write: float = setting(60.0, seconds(0.01), "a client that does not read")
    request: float = setting(0.0, seconds(), "a whole request; 0 is no limit")


@dataclass(frozen=True, slots=True)
class Queue:
    size: int = setting(
        256, number(0, 10_000, whole=True), "requests that may wait for a free slot"
    )
    timeout: float = setting(300.0, seconds(0.01), "how long each of them may wait")
    notice: float = setting(
        1.0,
        seconds(0),
        "waiting before a client of a stream is told of it; 0 is never",
    )
    max_concurrency: int = setting(
        0,
        number(0, 10_000, whole=True),
        "requests of one subject that may run at once; 0 is no limit",
    )
    overcommit: int = setting(
        0, number(0, 10_000, whole=True), "requests sent to a worker beyond its slots"
    )


@dataclass(frozen=True, slots=True)
class Health:
    interval: float = setting(30.0, seconds(0.01), "between two pings of a worker")
    timeout: float = setting(5.0, seconds(0.01), "for the answer to a ping")
    fall: int = setting(
        3, number(1, 100, whole=True), "failed pings that take a worker out"
    )
    rise: int = setting(1, number(1, 100, whole=True), "good pings that bring it back")
    recheck: float = setting(
        1.0, seconds(0.01), "between pings while a worker is loading or in doubt"
    )


@dataclass(frozen=True, slots=True)
class Breaker:
    consecutive: int = setting(
        5, number(1, 1000, whole=True), "failures in a row that open a breaker"
    )
    failure_rate: float = setting(
        0.5, number(0.01, 1), "part of the calls in the window that may fail"
    )
    slow_rate: float = setting(
        0.8, number(0.01, 1), "part of the calls in the window that may be slow"
    )
    minimum_calls: int = setting(
        10, number(1, 10_000, whole=True), "calls before a rate says anything"
    )
    window: float = setting(30.0, seconds(0.1), "how far back calls are counted")
    open: float = setting(5.0, seconds(0.01), "first time without traffic; doubles")
    open_max: float = setting(15.0, seconds(0.01), "longest time without traffic")
    jitter: float = setting(
        0.2, number(0, 1), "part by which these times vary, more or less"
    )
    proofs: int = setting(
        2, number(1, 100, whole=True), "good canaries in a row that close it again"
    )
    ramp: float = setting(10.0, seconds(0), "how long the share then rises")
    busy_max: float = setting(
        60.0, seconds(0), "how much of a worker's own Retry-After is believed"
    )
    canary: bool = setting(
        True, FLAG, "prove a worker by a token of the hub's own, not by a request"
    )


@dataclass(frozen=True, slots=True)
class Retry:
    attempts: int = setting(
        3, number(1, 10, whole=True), "workers to try before a byte of the answer"
    )
    ratio: float = setting(
        0.1, number(0, 1), "part of the recent requests that may be tried again"
    )
    floor: int = setting(
        10, number(0, 1000, whole=True), "retries in 10 s that are always allowed"
    )
    patience: float = setting(
        5.0, seconds(0), "how long to wait for the only worker when it is busy"
    )
    once: tuple[str, ...] = setting(
        (),
        some_of(ROUTES, "a list of POST paths such as /v1/responses"),
        "paths on which what a worker may have begun is not tried again",
    )


@dataclass(frozen=True, slots=True)
class Rescue:
    enabled: bool = setting(
        True, FLAG, "continue an answer that broke off on another worker"
    )
    kept: int = setting(
        256 << 10,
        size(1 << 10, 1 << 30),
        "events of an answer that are remembered; a longer one is not continued",
    )
    attempts: int = setting(
        5, number(1, 100, whole=True), "continuations of one answer, in all"
    )


@dataclass(frozen=True, slots=True)
class Upstream:
    keepalive: float = setting(
        4.0, seconds(0), "idle time of a worker connection (llama-server: 5 s)"
    )
    idle: int = setting(
        32, number(0, 10_000, whole=True), "idle connections kept for each worker"
    )
    assemble: tuple[str, ...] = setting(
        STREAMED,
        some_of(STREAMED, "a list, of " + ", ".join(STREAMED)),
        "paths on which an answer in one piece is assembled from a stream",
    )
    usage: str = setting(
        "limited",
        choice("never", "limited", "always"),
        "of which streams a worker is asked for the usage if it is no llama-server",
    )


@dataclass(frozen=True, slots=True)
class Routing:
    policy: str = setting(
        "affinity", choice(*POLICIES), "how one of the workers that can is picked"
    )
    policies: Mapping[str, str] = setting(
        {},
        table_of(POLICIES, 'a table of policies such as { "qwen*" = "affinity" }'),
        "other policies for some models; of several patterns the first one counts",
    )


@dataclass(frozen=True, slots=True)
class Models:
    default_model: str = setting(
        "", TEXT, "model for a request that names none, or an unknown one"
    )
    strict_models: bool = setting(
        False, FLAG, "refuse unknown names even where only one model is served"
    )
    aliases: Mapping[str, str] = setting(
        {}, TABLE, 'other names for a model, "gpt-*" too'
    )
    fallbacks: Mapping[str, tuple[str, ...]] = setting(
        {}, LISTS, "models that answer when nobody of the first one can"
    )


@dataclass(frozen=True, slots=True)
class Log:
    level: str = setting(
        "info", choice("debug", "info", "warning", "error"), "least severity to log"
    )
    format: str = setting("text", choice("text", "json"), "form of a log line")
    access: bool = setting(True, FLAG, "one line for each request")


@dataclass(frozen=True, slots=True)
class Metrics:
    open: bool = setting(
        False, FLAG, "let /metrics be read without a token of scope metrics"
    )


class Revoked(NamedTuple):
    """Whose tokens are refused although they are signed and valid."""

    tokens: frozenset[str] = frozenset()  # by their `jti`
    subjects: frozenset[str] = frozenset()  # by their `sub`


class Origin(NamedTuple):
    """Where a worker lives: what a connection and its `Host` header need."""

    scheme: str
    host: str  # without the brackets of an IPv6 address
    port: int
    prefix: str  # path in front of every route, without a trailing slash

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One `[[workers]]` table, or one `--worker` flag."""

    url: str
    origin: Origin
    name: str
    api_key: str = field(default="", repr=False)
    slots: int | None = None  # None: as it says itself
    models: tuple[str, ...] = ()  # shell-like patterns; empty: what it lists
    weight: float | None = None  # None: as its memory says
    vram_gib: float | None = None
    ca_file: str = ""  # empty: the CAs of the system
    client_certificate: str = ""
    client_key: str = ""  # empty: in the same file


@dataclass(frozen=True, slots=True)
class Config:
    server: Server = field(default_factory=Server)
    auth: Auth = field(default_factory=Auth)
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    queue: Queue = field(default_factory=Queue)
    health: Health = field(default_factory=Health)
    breaker: Breaker = field(default_factory=Breaker)
    retry: Retry = field(default_factory=Retry)
    rescue: Rescue = field(default_factory=Rescue)
    upstream: Upstream = field(default_factory=Upstream)
    routing: Routing = field(default_factory=Routing)
    models: Models = field(default_factory=Models)
    log: Log = field(default_factory=Log)
    metrics: Metrics = field(default_factory=Metrics)
    workers: tuple[WorkerConfig, ...] = ()
    file: str = field(default="", compare=False)  # where they were read, if from one

    @property
    def source(self) -> str:
        """Say where the settings are from."""
        return f"settings are from {self.file or 'no file'}"

    # The current HS256 secret first, then the one that is being rotated out.
    secrets: tuple[bytes, ...] = field(default=(), repr=False)
    public_keys: tuple[str, ...] = field(default=(), repr=False)
    revoked: Revoked = field(default=Revoked(), repr=False)


SECTIONS: dict[str, type[Any]] = {
    "server": Server,
    "auth": Auth,
    "limits": Limits,
    "timeouts": Timeouts,
    "queue": Queue,
    "health": Health,
    "breaker": Breaker,
    "retry": Retry,
    "rescue": Rescue,
    "upstream": Upstream,
    "routing": Routing,
    "models": Models,
    "log": Log,
    "metrics": Metrics,
}
# The few settings that are typed often enough to have a flag.
FLAGS = {
    "server.host": "--host",
    "server.port": "--port",
    "server.insecure_bind": "--insecure-bind",
    "auth.mode": "--auth",
    "log.level": "--log-level",
}
# Read from the environment alone, or replacing a part of the file that has no key.
VARIABLES = {
    "GOLLAMA_CONFIG": "settings file, where -c names none",
    "GOLLAMA_JWT_SECRET": "secret that tokens are signed with, for HS256",
    "GOLLAMA_JWT_SECRET_PREVIOUS": "the one before it, accepted during a rotation",
    "GOLLAMA_WORKERS": "base URLs of workers, instead of the file's [[workers]]",
}
# The keys of a [[workers]] table.
WORKER_KEYS = {
    "url": TEXT,  # base URL, http or https; the only one that has to be there
    "name": TEXT,  # how replies, logs and metrics call it; default host:port
    "api_key_env": TEXT,  # environment variable that holds the worker's API key
    "api_key_file": TEXT,  # file that holds it
    "slots": number(1, 10_000, whole=True),  # answers at once; default as it says
    "models": NAMES,  # what it answers to, where that is not what it lists
    "weight": number(0.01, 10_000),  # its share; default what vram_gib says, else 1
    "vram_gib": number(0.01, 10_000),  # memory of its graphics cards, in GiB
    "ca_file": TEXT,  # PEM: the only CAs that its certificate may come from
    "client_certificate": TEXT,  # PEM: what the hub shows to it
    "client_key": TEXT,  # PEM: the key of that, if it is not in the same file
}


class Row(NamedTuple):
    """One line of the settings table in the README and of `serve --help`."""

    key: str
    env: str
    default: Any
    allowed: str
    help: str


def settings() -> Iterator[Row]:
    """Yield every setting, in the order in which they are declared above."""
    for section, cls in SECTIONS.items():
        defaults = cls()
        for entry in fields(cls):
            yield Row(
                key=f"{section}.{entry.name}",
                env=variable(section, entry.name),
                default=getattr(defaults, entry.name),
                allowed=entry.metadata["kind"].allowed,
                help=entry.metadata["help"],
            )


def variable(section: str, name: str) -> str:
    """Name the environment variable of a setting."""
    return f"GOLLAMA_{section}_{name}".upper()
