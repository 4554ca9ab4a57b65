"""All settings: each with its default, its limits and its help, declared once.

The loader, `gollama-proxy serve --help`, the tables in docs/configuration.md and the
example file are made from these declarations, or tested against them.
"""

# No `from __future__ import annotations`: the annotations are used as they stand.
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, NamedTuple, Self, get_args

from msgspec import Struct, structs

from gollama_proxy.config.values import (
    ConfigError,
    Duration,
    Host,
    Listen,
    Lists,
    Mac,
    Names,
    Networks,
    Origins,
    Places,
    Prefix,
    Processes,
    Seconds,
    SecretUrl,
    StoreUrl,
    Table,
    Text,
    describe_hint,
    number,
    one_of,
    other,
    seconds,
    size,
    whole,
)
from gollama_proxy.wire.schema import ENDPOINTS

ALGORITHMS = ("HS256", "RS256", "ES256", "EdDSA")
POLICIES = ("round_robin", "weighted", "least_busy", "fastest", "affinity")
# RFC 1918, RFC 6598 (also of Tailscale), RFC 4193.
PRIVATE_NETWORKS = (
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),
    *("100.64.0.0/10", "fc00::/7"),
)
ROUTES = tuple(ENDPOINTS)
# Paths whose answers can be assembled from a stream.
STREAMED = tuple(path for path, e in ENDPOINTS.items() if e.generates and not e.form)

Route = Annotated[str, one_of(*ROUTES)]
StreamedRoute = Annotated[str, one_of(*STREAMED)]
Policy = Annotated[str, one_of(*POLICIES)]
Policies = Annotated[
    Mapping[str, Policy], other('a table of policies such as { "qwen*" = "affinity" }')
]
Routes = Annotated[
    tuple[Route, ...], other("a list of POST paths such as /v1/responses")
]
StreamedRoutes = Annotated[
    tuple[StreamedRoute, ...], other("a list, of " + ", ".join(STREAMED))
]

# --- Sections ---------------------------------------------------------------------


class Server(Struct, frozen=True):
    host: Annotated[Host, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, whole(0, 65_535), "port to listen on; 0: any free one"] = 8000
    processes: Annotated[
        Processes, "processes that share the address; auto: one for each CPU core"
    ] = 1
    insecure_bind: Annotated[bool, "allow any address without authentication"] = False
    keepalive: Annotated[
        float, seconds(1), "how long a connection may idle, and a request head may take"
    ] = 30.0
    cors_origins: Annotated[Origins, "web origins that may call the hub"] = ()
    drain: Annotated[
        Seconds,
        "time for running requests to end after SIGTERM, and on a removed worker",
    ] = 30.0
    watch_config: Annotated[
        bool, "read the file again when it changes; SIGHUP does so at once"
    ] = False
    advertise: Annotated[bool, "let agents find the hub on the local network"] = False
    tls_certificate: Annotated[Text, "PEM file with certificates; enables https"] = ""
    tls_key: Annotated[Text, "PEM file with its key; empty: the same file"] = ""
    tls_client_ca: Annotated[
        Text, "PEM file with CAs; clients must present a certificate from one of them"
    ] = ""


class Auth(Struct, frozen=True):
    mode: Annotated[str, one_of("jwt", "off"), "token authentication or none"] = "jwt"
    algorithm: Annotated[
        str, one_of(*ALGORITHMS), "the only accepted signature algorithm"
    ] = "HS256"
    public_key_file: Annotated[
        Text, "PEM file with the public key or keys, for all algorithms but HS256"
    ] = ""
    issuer: Annotated[Text, "required `iss` of a token; empty: not checked"] = ""
    audience: Annotated[Text, "required `aud` of a token; empty: not checked"] = ""
    secret_file: Annotated[
        Text, "file with the secret for HS256, instead of GOLLAMA_JWT_SECRET"
    ] = ""
    revoked: Annotated[
        Text, "file with revoked tokens and subjects; read again when it changes"
    ] = ""
    max_lifetime: Annotated[
        float, seconds(0, 3_660 * 86_400), "longest lifetime of a token; 0: no limit"
    ] = 366 * 86_400.0
    leeway: Annotated[float, seconds(0, 300), "tolerated clock difference"] = 30.0
    cache_size: Annotated[
        int, whole(0, 1_000_000), "how many verified tokens are cached"
    ] = 4096


class Limits(Struct, frozen=True):
    head: Annotated[int, size(1 << 10, 1 << 20), "largest request head"] = 16 << 10
    body: Annotated[int, size(1 << 10), "largest request body"] = 64 << 20
    replay_window: Annotated[
        int, size(4 << 10, 1 << 30), "largest body kept for retries"
    ] = 1 << 20
    answer: Annotated[int, size(4 << 10), "largest answer assembled from a stream"] = (
        16 << 20
    )
    model_window: Annotated[
        int, size(4 << 10, 1 << 30), "how much of a body is searched for `model`"
    ] = 16 << 20
    connections: Annotated[int, whole(1, 1_000_000), "open connections of clients"] = (
        8000
    )
    connections_per_address: Annotated[
        int,
        whole(0, 1_000_000),
        "open connections of each client address (IPv6: /64); 0: no limit",
    ] = 0


class Timeouts(Struct, frozen=True):
    connect: Annotated[Duration, "time to connect to a worker"] = 3.0
    first_token: Annotated[
        Duration, "time from a request to the first event of its answer"
    ] = 300.0
    allowance: Annotated[
        Duration,
        "the same for a stream that another worker could take over; the time "
        "for its prompt is added",
    ] = 10.0
    gap: Annotated[Duration, "time between two events of a stream"] = 30.0
    silence: Annotated[Duration, "time between two bytes of an answer"] = 45.0
    body: Annotated[
        Duration, "time to receive a request body, plus 1 s for each 16 KiB"
    ] = 30.0
    handshake: Annotated[Duration, "time for a TLS handshake with a client"] = 10.0
    write: Annotated[Duration, "how long a client may stop reading"] = 60.0
    request: Annotated[Seconds, "time for a whole request; 0: no limit"] = 0.0


class Queue(Struct, frozen=True):
    size: Annotated[int, whole(0, 10_000), "requests that may wait for a slot"] = 256
    timeout: Annotated[Duration, "how long a request may wait"] = 300.0
    notice: Annotated[
        Seconds, "wait after which a streaming client sees its position; 0: never"
    ] = 1.0
    max_concurrency: Annotated[
        int, whole(0, 10_000), "concurrent requests of a subject; 0: no limit"
    ] = 0
    overcommit: Annotated[
        int, whole(0, 10_000), "requests sent to a worker beyond its slots"
    ] = 0


class Health(Struct, frozen=True):
    interval: Annotated[Duration, "time between two health checks of a worker"] = 30.0
    timeout: Annotated[Duration, "time to answer a health check"] = 5.0
    fall: Annotated[
        int, whole(1, 100), "failed checks in a row that take a worker down"
    ] = 3
    rise: Annotated[
        int, whole(1, 100), "good checks in a row that bring a worker back"
    ] = 1
    recheck: Annotated[
        Duration, "time between two checks of a worker that is loading or in doubt"
    ] = 1.0


class Wake(Struct, frozen=True):
    timeout: Annotated[Duration, "time for a machine to wake up and serve requests"] = (
        120.0
    )
    pause: Annotated[
        Duration, "pause before a machine that did not wake is tried again; doubles"
    ] = 300.0
    broadcast: Annotated[
        Places,
        "addresses for packets that wake machines; a port may follow, 9 by default",
    ] = ("255.255.255.255",)


class Breaker(Struct, frozen=True):
    consecutive: Annotated[
        int, whole(1, 1000), "failures in a row that open the breaker of a worker"
    ] = 5
    failure_rate: Annotated[
        float, number(0.01, 1), "share of failed requests in the window that opens it"
    ] = 0.5
    slow_rate: Annotated[
        float, number(0.01, 1), "share of slow requests in the window that opens it"
    ] = 0.8
    minimum_calls: Annotated[
        int, whole(1, 10_000), "requests in the window before a share counts"
    ] = 10
    window: Annotated[float, seconds(0.1), "how far back requests are counted"] = 30.0
    open: Annotated[Duration, "how long it stays open at first; doubles each time"] = (
        5.0
    )
    open_max: Annotated[Duration, "longest time that it stays open"] = 15.0
    jitter: Annotated[float, number(0, 1), "random variation of these times"] = 0.2
    proofs: Annotated[int, whole(1, 100), "good canaries in a row that close it"] = 2
    ramp: Annotated[Seconds, "time to reach the full share after closing"] = 10.0
    busy_max: Annotated[Seconds, "longest Retry-After that is respected"] = 60.0
    canary: Annotated[
        bool, "test a worker with a one-token request of the hub, not of a client"
    ] = True


class Retry(Struct, frozen=True):
    attempts: Annotated[
        int, whole(1, 10), "workers to try before the first byte of an answer"
    ] = 3
    ratio: Annotated[
        float, number(0, 1), "retries allowed, as a share of recent requests"
    ] = 0.1
    floor: Annotated[
        int, whole(0, 1000), "retries allowed in any 10 s beyond that share"
    ] = 10
    patience: Annotated[
        Seconds, "how long to wait for a busy worker if there is no other"
    ] = 5.0
    once: Annotated[
        Routes, "paths on which a request that a worker may have begun is not retried"
    ] = ()


class Rescue(Struct, frozen=True):
    enabled: Annotated[bool, "continue a broken answer on another worker"] = True
    kept: Annotated[
        int,
        size(1 << 10, 1 << 30),
        "memory for each answer; longer answers are not continued",
    ] = 256 << 10
    attempts: Annotated[int, whole(1, 100), "how often one answer may be continued"] = 5


class Upstream(Struct, frozen=True):
    keepalive: Annotated[
        Seconds,
        "how long a connection to a worker may idle (llama-server closes it after 5 s)",
    ] = 4.0
    idle: Annotated[
        int, whole(0, 10_000), "idle connections that are kept for each worker"
    ] = 32
    assemble: Annotated[
        StreamedRoutes, "paths whose answers in one piece are assembled from a stream"
    ] = STREAMED
    usage: Annotated[
        str,
        one_of("never", "limited", "always"),
        "streams for which a worker other than llama-server is asked for token usage",
    ] = "limited"


class Routing(Struct, frozen=True):
    policy: Annotated[Policy, "how to choose a worker"] = "affinity"
    policies: Annotated[
        Policies, "other policies for some models; the first matching pattern counts"
    ] = {}


class Models(Struct, frozen=True):
    default_model: Annotated[
        Text, "model for requests that name none, or an unknown one"
    ] = ""
    strict_models: Annotated[bool, "reject unknown model names"] = False
    aliases: Annotated[Table, 'other names for a model; "gpt-*" is a pattern'] = {}
    fallbacks: Annotated[Lists, "fallback models when no worker is available"] = {}


class Log(Struct, frozen=True):
    level: Annotated[
        str, one_of("debug", "info", "warning", "error"), "lowest severity to log"
    ] = "info"
    format: Annotated[
        str,
        one_of("text", "json", "auto"),
        "format of a log line; auto: text, in columns and colours on a terminal",
    ] = "auto"
    access: Annotated[bool, "log one line for each request"] = True


class Metrics(Struct, frozen=True):
    open: Annotated[bool, "serve /metrics without a token of scope metrics"] = False
    listen: Annotated[
        Listen, "addresses that serve /metrics, and nothing else; empty: the main one"
    ] = ()
    subjects: Annotated[
        int,
        whole(0, 100_000),
        "subjects that metrics name; the others share the label other",
    ] = 1000


class Tracing(Struct, frozen=True):
    enabled: Annotated[
        bool, "send OpenTelemetry spans of requests, also as OTEL_* variables define"
    ] = False
    endpoint: Annotated[
        Text,
        "collector, by OTLP over HTTP; empty: $OTEL_EXPORTER_OTLP_ENDPOINT, else "
        "http://localhost:4318",
    ] = ""


class Agents(Struct, frozen=True):
    networks: Annotated[Networks, "networks in which agents may register workers"] = (
        PRIVATE_NETWORKS
    )
    lease: Annotated[
        float,
        seconds(1, 3600),
        "time after which the worker of a silent agent is removed",
    ] = 30.0
    limit: Annotated[int, whole(0, 10_000), "how many workers agents may register"] = (
        256
    )


class State(Struct, frozen=True):
    dir: Annotated[
        Text,
        "folder for what survives a restart, such as workers added at run time; "
        "auto: $STATE_DIRECTORY, else ~/.local/state/gollama-proxy; empty: none",
    ] = "auto"
    url: Annotated[
        StoreUrl,
        "Valkey or Redis through which several hubs act as one; empty: this hub is "
        "alone",
    ] = SecretUrl()
    prefix: Annotated[
        Prefix, "begins all keys and channels there; hubs with the same one act as one"
    ] = "gollama"
    trust: Annotated[
        Seconds,
        "how long revocations are relied on while the store cannot be reached; then "
        "tokens are refused; 0: no limit",
    ] = 3600.0


class Usage(Struct, frozen=True):
    days: Annotated[
        int,
        whole(0, 3660),
        "how long usage by subject, model and day is kept; the current month is kept "
        "in any case",
    ] = 400


# --- Workers, and everything together ---------------------------------------------


# Where a worker without a port in its URL is looked for: llama-server's default, its
# default before September 2026, and the one that HTTP has.
PORTS = (9931, 8080, 80)


class Origin(NamedTuple):
    """The address of a worker: what a connection and its `Host` header need."""

    scheme: str
    host: str  # without the brackets of an IPv6 address
    port: int  # 0: the URL has none, and health checks find it among `PORTS`
    prefix: str  # path in front of every route, without a trailing slash
    address: str = ""  # the one to connect to, of several that the host has

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else host

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.prefix}"

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports at which the worker may be, the first one first."""
        return (self.port,) if self.port else PORTS

    @property
    def places(self) -> Iterator[tuple[str, str, int, str]]:
        """What it may lead to: two workers with a place in common may be the same."""
        for port in self.ports:
            yield self.scheme, self.address or self.host, port, self.prefix

    def meets(self, other: "Origin") -> bool:
        """Return whether both may lead to the same server."""
        if (self.address or self.host) != (other.address or other.host):
            return False  # the common case, of many pairs
        return not set(self.places).isdisjoint(other.places)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One `[[workers]]` table, or one `--worker` flag."""

    url: Annotated[Text, "base URL; without a port, 9931, 8080 and 80 are tried"]
    origin: Origin  # made from the URL
    name: Annotated[Text, "name in replies, logs and metrics; default: host:port"]
    api_key: str = field(default="", repr=False)  # from one of `API_KEYS`
    slots: (
        Annotated[int, whole(1, 10_000), "answers at once; default: as it reports"]
        | None
    ) = None
    context: (
        Annotated[
            int,
            whole(1, 100_000_000),
            "tokens that fit its context; default: as it reports",
        ]
        | None
    ) = None
    models: Annotated[
        Names, "names and patterns that it serves; default: what it lists"
    ] = ()
    weight: (
        Annotated[float, number(0.01, 10_000), "its share; default: by its memory"]
        | None
    ) = None
    vram_gib: (
        Annotated[float, number(0.01, 10_000), "memory of its graphics cards, in GiB"]
        | None
    ) = None
    mac: Annotated[Mac, "hardware address of its machine; wakes it from sleep"] = ""
    ca_file: Annotated[Text, "PEM file with CAs; default: those of the system"] = ""
    client_certificate: Annotated[
        Text, "PEM file with the certificate of the hub, if it requires one"
    ] = ""
    client_key: Annotated[Text, "PEM file with its key; empty: in the same file"] = ""
    parent: str = ""  # the group that it is a member of, by name

    @property
    def is_group(self) -> bool:
        """Whether it stands for all workers to which a DNS name leads, now and then."""
        return self.origin.scheme.startswith("dns+")


class Revoked(NamedTuple):
    """Tokens that are rejected although they are signed and valid."""

    tokens: frozenset[str] = frozenset()  # by their `jti`
    subjects: frozenset[str] = frozenset()  # by their `sub`


# Of the connections by address that processes share: numbers in a row, of which there
# are two, and bytes for each process, with the number of all its connections.
COUNTS_ROW = 4096
COUNTS = 4 * (1 + 2 * COUNTS_ROW)


class Process(NamedTuple):
    """Which of the processes of `serve --processes` this is; 0: one without others."""

    number: int = 0
    of: int = 1
    group: str = ""  # what the processes of one parent have in common
    memory: int = -1  # the descriptor of what they share, see `SharedCounts`

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote; empty: one without others.

        Raises:
            ConfigError: it was not written by `str`.
        """
        if not text:
            return cls()
        match = re.fullmatch(r"(\d{1,4})/(\d{1,4}):(\w*):(\d{1,4})", text)
        if match is None:
            why = "is set by `serve --processes`, and by nothing else"
            raise ConfigError(f"GOLLAMA_PROCESS = {text!r}: {why}")
        return cls(int(match[1]), int(match[2]), match[3], int(match[4]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}:{self.group}:{self.memory}"

    @property
    def first(self) -> bool:
        """Whether this one reports what is the same for all."""
        return self.number < 2


@dataclass(frozen=True, slots=True)
class Config:
    server: Server = field(default_factory=Server)
    auth: Auth = field(default_factory=Auth)
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    queue: Queue = field(default_factory=Queue)
    health: Health = field(default_factory=Health)
    wake: Wake = field(default_factory=Wake)
    breaker: Breaker = field(default_factory=Breaker)
    retry: Retry = field(default_factory=Retry)
    rescue: Rescue = field(default_factory=Rescue)
    upstream: Upstream = field(default_factory=Upstream)
    routing: Routing = field(default_factory=Routing)
    models: Models = field(default_factory=Models)
    log: Log = field(default_factory=Log)
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing = field(default_factory=Tracing)
    agents: Agents = field(default_factory=Agents)
    state: State = field(default_factory=State)
    usage: Usage = field(default_factory=Usage)
    workers: tuple[WorkerConfig, ...] = ()
    file: str = field(default="", compare=False)  # the file that was read, if any
    # The file, variable or flag of each setting that is not the default, by key.
    given: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    # The current HS256 secret first, then the previous one during a rotation.
    secrets: tuple[bytes, ...] = field(default=(), repr=False)
    public_keys: tuple[str, ...] = field(default=(), repr=False)
    process: Process = field(default=Process(), compare=False)
    revoked: Revoked = field(default=Revoked(), repr=False)

    @property
    def source(self) -> str:
        """Describe where the settings come from."""
        return f"settings are from {self.file or 'no file'}"


# What a hub keeps until its end; all else changes while it runs (`Hub.apply`).
FIXED = frozenset(
    {
        *("server.host", "server.port", "server.processes", "server.advertise"),
        *("state.dir", "state.url", "state.prefix"),
        *("tracing.enabled", "tracing.endpoint"),
    }
)
# The same, but only if one of them turns TLS on or off.
TLS_KEYS = frozenset(
    {f"server.tls_{name}" for name in ("certificate", "key", "client_ca")}
)
SECTIONS: dict[str, type[Struct]] = {
    each.name: each.type
    for each in fields(Config)
    if isinstance(each.type, type) and issubclass(each.type, Struct)
}
# Two keys of a [[workers]] table for one attribute.
API_KEYS = {
    "api_key_env": Annotated[Text, "environment variable with the worker's API key"],
    "api_key_file": Annotated[Text, "file with the worker's API key"],
}
WORKER_KEYS: dict[str, Any] = API_KEYS | {
    # Of `Annotated[...] | None`, the declared type.
    each.name: get_args(each.type)[0] if each.default is None else each.type
    for each in fields(WorkerConfig)
    if each.name not in ("origin", "api_key", "parent")
}
# The few settings that are typed often enough to have a flag.
FLAGS = {
    "server.host": "--host",
    "server.port": "--port",
    "server.processes": "--processes",
    "server.insecure_bind": "--insecure-bind",
    "server.advertise": "--advertise",
    "auth.mode": "--auth",
    "log.level": "--log-level",
}
# Variables without a TOML key.
VARIABLES = {
    "GOLLAMA_CONFIG": "settings file, if -c is not given",
    "GOLLAMA_JWT_SECRET": "secret for signing tokens with HS256",
    "GOLLAMA_JWT_SECRET_PREVIOUS": "previous secret, accepted during a rotation",
    "GOLLAMA_WORKERS": "base URLs of workers, instead of [[workers]] in the file",
}


# --- The list of settings ---------------------------------------------------------


class Row(NamedTuple):
    """One setting: a line in docs/configuration.md and in `serve --help`."""

    key: str
    env: str
    default: Any
    hint: Any  # the declared type, for `convert`

    @property
    def allowed(self) -> str:
        return describe_hint(self.hint)

    @property
    def help(self) -> str:
        return str(self.hint.__metadata__[-1])


def settings(*sections: str) -> Iterator[Row]:
    """Yield the settings of some sections, by default of all, as declared above."""
    for section in sections or SECTIONS:
        yield from _rows_of(section)


@functools.cache  # a millisecond in all
def _rows_of(section: str) -> tuple[Row, ...]:
    cls = SECTIONS[section]
    defaults = cls()
    return tuple(
        Row(
            key=f"{section}.{each.name}",
            env=f"GOLLAMA_{section}_{each.name}".upper(),
            default=getattr(defaults, each.name),
            hint=each.type,
        )
        for each in structs.fields(cls)
    )
