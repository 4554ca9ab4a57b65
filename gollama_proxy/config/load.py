"""Settings from a TOML file, the environment and flags, as one frozen `Config`.

A setting has up to three spellings, and a later one wins:

    [health]                          a TOML key
    interval = 30

    GOLLAMA_HEALTH_INTERVAL=30        an environment variable

    --port 8000                       a flag, for the few that are typed often

`load` collects all mistakes and raises them together, each in one line with the key,
the value and what is allowed.  A hub that runs reads all of it again on request
(`Hub.reload`).  No secret appears in a `repr`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gollama_proxy.config import addresses
from gollama_proxy.config.keys import (
    load_public_keys,
    load_secrets,
    read_revoked,
    read_secret,
)
from gollama_proxy.config.settings import (
    API_KEYS,
    FLAGS,
    SECTIONS,
    VARIABLES,
    WORKER_KEYS,
    Config,
    Origin,
    Revoked,
    WorkerConfig,
    settings,
)
from gollama_proxy.config.values import (
    Aliases,
    ConfigError,
    Mistakes,
    convert,
    cut,
    describe_hint,
    host_and_port,
    is_secret,
    shown,
)

# Settings files to look for if none is given.
PLACES = ("gollama.toml", "/etc/gollama-proxy/gollama.toml")
MAX_WORKER_NAME = 200


def locate(given: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the settings file: the given one, GOLLAMA_CONFIG's, or one of `PLACES`.

    None if there is none.  A file that exists and cannot be read is returned as well.
    """
    if given is not None:
        return given
    return environ.get("GOLLAMA_CONFIG") or next(filter(_exists, PLACES), None)


def _exists(file: str) -> bool:
    try:
        Path(file).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def load(
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    workers: Sequence[str] = (),
    *,
    for_tokens: bool = False,
) -> Config:
    """Read the file, the environment and the flags, in rising order of precedence.

    `flags` maps keys such as ``"server.port"`` to values; None means not given.
    Workers given as flags or in GOLLAMA_WORKERS replace those of the file.
    `for_tokens` skips the workers and all certificates: a user who signs tokens may
    have no access to the files that the hub needs for them.

    Raises:
        ConfigError: with a line for each mistake.
    """
    environ, flags = environ or {}, flags or {}
    document = _read_document(file) if file is not None else {}
    mistakes = Mistakes()
    mistakes.collect(_reject_unknown, "", document, [*SECTIONS, "workers"])
    parts: dict[str, Any] = {}
    given: dict[str, str] = {}
    sound = set()  # parts without a mistake, which can be checked against others
    for name in SECTIONS:
        before = len(mistakes)
        found = _load_section(name, document, environ, flags, mistakes)
        parts[name], variables = found
        given |= {key: source or str(file) for key, source in variables.items()}
        if len(mistakes) == before:
            sound.add(name)
    rows = mistakes.collect(_worker_rows, document, environ, workers) or []
    mistakes.collect(_reject_misspelt_variables, environ, rows)
    before = len(mistakes)
    if not for_tokens:
        parts["workers"] = _load_workers(rows, environ, mistakes)
        if len(mistakes) == before:
            sound.add("workers")
    config = Config(**parts, file=str(file or ""), given=given)
    if "auth" in sound:
        config = _with_keys(config, environ, mistakes)
    if "server" in sound:
        mistakes.collect(_check_advertising, config)
        mistakes.collect(_check_tracing, config)
    if config.server.processes != 1:
        mistakes.collect(_check_processes, config)
    if config.state.url:
        mistakes.collect(_check_store, config)
    if {"auth", "server"} <= sound:
        mistakes.collect(check_exposure, config)
    if {"server", "workers"} <= sound:
        mistakes.collect(_check_tls, config)
    if "models" in sound:
        mistakes.collect(_check_aliases, config.models.aliases)
    mistakes.check()
    return config


def _read_document(file: str | Path) -> dict[str, Any]:
    import tomllib  # only here: a hub without a file starts sooner

    try:
        return tomllib.loads(Path(file).read_bytes().decode())
    except OSError as exc:
        raise ConfigError(f"{file}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file}: not UTF-8 text, as TOML has to be") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{file}: not valid TOML: {exc}") from exc


def _load_section(
    section: str,
    document: Mapping[str, Any],
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    mistakes: Mistakes,
) -> tuple[Any, dict[str, str]]:
    """Make a section; a setting with a mistake has its default.

    Also returns the variable or flag of each setting that was given, by key; it is
    empty for one of the file.
    """
    table = document.get(section, {})
    if not isinstance(table, dict):
        text = f"{section} = {shown(table)}: must be a table, [{section}]"
        mistakes.add(text)
        table = {}
    rows = {row.key.partition(".")[2]: row for row in settings(section)}
    mistakes.collect(_reject_unknown, f"{section}.", table, list(rows))
    values, sources = {}, {}
    for name, (key, env, _, hint) in rows.items():
        given = {
            "": table.get(name),
            env: environ.get(env),
            FLAGS.get(key, "flag"): flags.get(key),
        }
        for source, value in given.items():
            if value is not None:
                where = f"{key} ({source})" if source else key
                found = mistakes.collect(_convert, where, value, hint)
                if found is not None:
                    values[name], sources[key] = found, source
    return SECTIONS[section](**values), sources


def _convert(source: str, value: Any, hint: Any) -> Any:
    try:
        return convert(hint, value)
    except ValueError:
        given = "" if is_secret(hint) else f" = {shown(value)}"
        raise ConfigError(f"{source}{given}: must be {describe_hint(hint)}") from None


def _reject_unknown(prefix: str, table: Mapping[str, Any], known: list[str]) -> None:
    unknown = []
    for name in table:
        if name not in known:
            near = _nearest(name, known, 0.5)
            hint = f"did you mean {near}?" if near else "known: " + ", ".join(known)
            spelt = name if name.isprintable() else shown(name)
            unknown.append(f"{prefix}{spelt}: no such setting; {hint}")
    if unknown:
        raise ConfigError(*unknown)


def _reject_misspelt_variables(
    environ: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Reject variables that seem meant for the hub, and would change nothing.

    Others may begin with GOLLAMA_ as well: for a service of that name, Kubernetes sets
    GOLLAMA_SERVICE_HOST and more.
    """
    known = {row.env for row in settings()} | VARIABLES.keys()
    api_keys = [row.get("api_key_env") for row in rows]
    sections = {name.split("_")[1].lower() for name in known}
    misspelt = []
    for name in environ:
        head, _, rest = name.partition("_")
        section = rest.partition("_")[0].lower()
        if head != "GOLLAMA" or name in known or name in api_keys:
            continue
        if _nearest(section, sections, 0.8):
            near = _nearest(name, known, 0.6)
            hint = f"; did you mean {near}?" if near else ""
            misspelt.append(f"{name}: no such environment variable{hint}")
    if misspelt:
        raise ConfigError(*misspelt)


def _nearest(name: str, known: Iterable[str], cutoff: float) -> str:
    import difflib  # only here: few settings are misspelt

    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), "")


def _with_keys(
    config: Config, environ: Mapping[str, str], mistakes: Mistakes
) -> Config:
    auth, revoked = config.auth, None
    if auth.revoked:
        revoked = mistakes.collect(read_revoked, auth.revoked)
    return replace(
        config,
        secrets=mistakes.collect(load_secrets, auth, environ) or (),
        public_keys=mistakes.collect(load_public_keys, auth) or (),
        revoked=revoked or Revoked(),
    )


# --- Workers ----------------------------------------------------------------------


def _worker_rows(
    document: Mapping[str, Any], environ: Mapping[str, str], flags: Sequence[str]
) -> list[dict[str, Any]]:
    urls = list(flags) or re.split(
        r"[,\s]+", environ.get("GOLLAMA_WORKERS", "").strip()
    )
    if any(urls):
        return [{"url": url} for url in urls if url]
    rows = document.get("workers", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"workers = {shown(rows)}: must be tables, [[workers]]")
    return rows


def _load_workers(
    rows: Sequence[Mapping[str, Any]], environ: Mapping[str, str], mistakes: Mistakes
) -> tuple[WorkerConfig, ...]:
    workers: list[WorkerConfig] = []
    for number_, row in enumerate(rows):
        where = f"workers[{number_}]"
        worker = mistakes.collect(load_worker, where, row, environ)
        if worker is not None:
            mistakes.collect(_reject_second, where, worker, workers)
            workers.append(worker)
    return tuple(workers)


def load_worker(
    where: str, row: Mapping[str, Any], environ: Mapping[str, str]
) -> WorkerConfig:
    """Make a worker of one `[[workers]]` table; `where` begins the names of its keys.

    Reads the file with its API key.

    Raises:
        ConfigError: with a line for each mistake.
    """
    mistakes = Mistakes()
    mistakes.collect(_reject_unknown, f"{where}.", row, list(WORKER_KEYS))
    values: dict[str, Any] = {
        key: mistakes.collect(_convert, f"{where}.{key}", value, WORKER_KEYS[key])
        for key, value in row.items()
        if key in WORKER_KEYS
    }
    url, origin = values.get("url", ""), None
    if url or not mistakes:  # else the key may be misspelt
        origin = mistakes.collect(addresses.parse_url, f"{where}.url", url)
    mistakes.check()
    assert origin is not None, row
    key = mistakes.collect(_load_api_key, where, values, environ) or ""
    mistakes.collect(_check_worker_tls, where, origin, values)
    mistakes.check()
    mistakes.collect(_check_resolver, where, url, origin)
    if values.get("mac") and origin.scheme.startswith("dns+"):
        text = "is for one machine, and a group has several"
        mistakes.add(f"{where}.mac = {values['mac']!r}: {text}")
    mistakes.check()
    group = origin.scheme.startswith("dns+")
    name = values.get("name") or (
        origin.host if group else origin.authority + origin.prefix
    )
    _check_worker_name(where, name)
    own = {name: values[name] for name in values if name not in API_KEYS}
    return WorkerConfig(**own | {"url": url, "name": name}, origin=origin, api_key=key)


def _check_worker_name(where: str, name: str) -> None:
    """Check that a worker can be named in a path of the admin API.

    Clients take `.` and `..` out of paths, even when they are escaped.
    """
    if name in (".", "..") or len(name) > MAX_WORKER_NAME:
        text = f"must have at most {MAX_WORKER_NAME} characters, and not be . or .."
        raise ConfigError(f"{where}.name = {shown(name)}: {text}")


def _check_resolver(where: str, url: str, origin: Origin) -> None:
    if origin.scheme.startswith("dns+") and origin.host.startswith("_"):
        _require("dns", f"{where}.url = {url!r}", "dnspython for SRV records", "dns")


def _reject_second(
    where: str, worker: WorkerConfig, others: Sequence[WorkerConfig]
) -> None:
    for other in others:
        if worker.origin.meets(other.origin):
            text = f"{where}.url = {worker.url!r}: the same worker as {other.url!r}"
            hint = " (without a port, several are tried)"
            hint = "" if worker.origin == other.origin else hint
            raise ConfigError(f"{text}{hint}; each may be named once")
        if other.name == worker.name:
            text = f"{where}.name = {worker.name!r}: taken by {other.url!r}"
            raise ConfigError(f"{text}; each needs a different name")


_WORKER_TLS = ("ca_file", "client_certificate", "client_key")


def _check_worker_tls(where: str, origin: Origin, values: Mapping[str, Any]) -> None:
    for name in _WORKER_TLS:
        if values.get(name) and not origin.scheme.endswith("https"):
            text = (
                f"{where}.{name} = {values[name]!r}: is for a worker with an https URL"
            )
            raise ConfigError(text)
    if values.get("client_key") and not values.get("client_certificate"):
        text = f"{where}.client_key = {values['client_key']!r}: needs"
        raise ConfigError(f"{text} client_certificate beside it")


def _load_api_key(
    where: str, row: Mapping[str, Any], environ: Mapping[str, str]
) -> str:
    env, file = row.get("api_key_env"), row.get("api_key_file")
    if env and file:
        raise ConfigError(f"{where}: api_key_env or api_key_file, not both")
    if env:
        key = environ.get(env, "")
        source = f"{where}.api_key_env = {env!r}"
        if not key:
            text = "is not set; must be an environment variable with the worker's key"
            raise ConfigError(f"{source}: {text}")
    elif file:
        source = f"{where}.api_key_file = {file!r}"
        key = read_secret(source, file).decode(errors="replace").strip()
    else:
        return ""
    if not re.fullmatch(r"[!-~]+", key):  # RFC 9110, 5.5: what a field may hold
        raise ConfigError(f"{source}: holds no usable key (printable ASCII, no spaces)")
    return key


# --- Models -----------------------------------------------------------------------


def _check_aliases(table: Mapping[str, str]) -> None:
    """Reject an alias of an alias: aliases are followed only once."""
    aliases = Aliases(table)
    for alias in table:
        names = aliases.way(alias)
        way = cut(" -> ".join(map(repr, names)))
        if names[-1] in names[:-1]:
            text = f"models.aliases = {way}: must not be a loop"
            raise ConfigError(f"{text}; an alias stands for the name of a model")
        if len(names) > 2:
            text = f"models.aliases = {way}: must be one step"
            raise ConfigError(f"{text}; let {alias!r} stand for {names[-1]!r}")


# --- Settings that depend on each other -------------------------------------------


def check_exposure(config: Config, host: str | None = None) -> None:
    """Reject an open address without authentication; `host`: not `server.host`.

    TLS alone does not authenticate clients, but mandatory client certificates do.

    Raises:
        ConfigError: clients would need no credentials.
    """
    server = config.server
    host = server.host if host is None else host
    guarded = (
        addresses.is_loopback(host) or server.insecure_bind or server.tls_client_ca
    )
    if config.auth.mode == "off" and not guarded:
        raise ConfigError(
            f"server.host = {host!r}: without authentication only "
            "a loopback address is allowed, unless --insecure-bind is given "
            "or server.tls_client_ca set"
        )
    free = server.insecure_bind or server.tls_client_ca or config.metrics.open
    for address in () if config.auth.mode != "off" or free else config.metrics.listen:
        if not addresses.is_loopback(host_and_port(address)[0]):
            raise ConfigError(
                f"metrics.listen = {address!r}: without authentication only a loopback "
                "address is allowed, unless metrics.open is set"
            )


def _check_advertising(config: Config) -> None:
    server = config.server
    if not server.advertise:
        return
    if addresses.is_loopback(server.host):
        raise ConfigError(
            f"server.advertise = true: other machines cannot reach server.host = "
            f"{server.host!r}; must be an address of the local network, or 0.0.0.0"
        )
    _require("zeroconf", "server.advertise = true", "zeroconf", "mdns")


def _check_tracing(config: Config) -> None:
    endpoint = config.tracing.endpoint
    if endpoint and not re.match(r"https?://[^/\s]", endpoint):
        raise ConfigError(
            f"tracing.endpoint = {endpoint!r}: must be a URL such as "
            "http://localhost:4318"
        )
    if config.tracing.enabled:
        module = "opentelemetry.exporter.otlp.proto.http"
        _require(module, "tracing.enabled = true", "OpenTelemetry", "otel")


def _check_processes(config: Config) -> None:
    if not config.state.url:
        number = config.server.processes or "auto"
        _require("valkey", f"server.processes = {number}", "valkey", "cluster")


def _check_store(config: Config) -> None:
    url = config.state.url
    address = addresses.parse_store_url("state.url", url)
    _require("valkey", f"state.url = {url!r}", "valkey", "cluster")
    if address.tls:
        from gollama_proxy.config import tls

        tls.store_context(address)


def _require(module: str, setting: str, needed: str, extra: str) -> None:
    """Check that what a setting needs is installed; `extra` is that of this package."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even the packages around it
        found = None
    if found is None:
        hint = f"pip install 'gollama-proxy[{extra}]'"
        raise ConfigError(f"{setting}: needs {needed}; {hint}")


def _check_tls(config: Config) -> None:
    """Load every certificate once, so that a wrong one is found before the start."""
    server = config.server
    for name in ("tls_key", "tls_client_ca"):
        if getattr(server, name) and not server.tls_certificate:
            text = f"server.{name} = {getattr(server, name)!r}: needs"
            raise ConfigError(f"{text} server.tls_certificate beside it")
    https = [each for each in config.workers if each.origin.scheme.endswith("https")]
    if not (https or server.tls_certificate):
        return  # and do not import `ssl`, which takes longer than signing a token
    from gollama_proxy.config import tls

    mistakes = Mistakes()
    mistakes.collect(tls.for_server, server)
    for worker in https:
        mistakes.collect(tls.for_workers, [worker])
    mistakes.check()


def require_keys(config: Config) -> None:
    """Check that there is a key to check tokens with, if authentication is on.

    Raises:
        ConfigError: there is none.
    """
    if config.auth.mode == "jwt" and not (config.secrets or config.public_keys):
        raise ConfigError(
            "GOLLAMA_JWT_SECRET: is not set; set it to 32 bytes or more "
            "(gollama-proxy secret), or auth.secret_file, or give --auth off"
        )
