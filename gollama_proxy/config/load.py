"""Settings from a TOML file, the environment and flags, as one frozen `Config`.

A setting has three spellings, and the later one wins:

    [health]                          a TOML key
    interval = 30

    GOLLAMA_HEALTH_INTERVAL=30        an environment variable

    --port 8000                       a flag, for the few that are typed often

`load()` raises `ConfigError` for what cannot be used, with one line for each mistake
that names the key, the value and what is allowed.  Nothing is read later but the list
of revoked tokens and certificates: what is running is what was loaded.  Secrets never
show in a `repr`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gollama_proxy.config import addresses
from gollama_proxy.config.keys import (
    load_public_keys,
    load_secrets,
    read_revoked,
    read_secret,
)
from gollama_proxy.config.mistakes import ConfigError, Mistakes, cut, shown
from gollama_proxy.config.names import Aliases
from gollama_proxy.config.settings import (
    FLAGS,
    SECTIONS,
    VARIABLES,
    WORKER_KEYS,
    Config,
    Kind,
    Origin,
    Revoked,
    WorkerConfig,
    settings,
    variable,
)

# Where the settings file is looked for if none is named.
PLACES = ("gollama.toml", "/etc/gollama-proxy/gollama.toml")

_Section = TypeVar("_Section")


def locate(given: str | None, environ: Mapping[str, str]) -> str | None:
    """Find the settings file: the given one, GOLLAMA_CONFIG's, or one of `PLACES`.

    None if there is none.  One that is there and cannot be read is found all the same.
    """
    if given is not None:
        return given
    return environ.get("GOLLAMA_CONFIG") or next(filter(_is_there, PLACES), None)


def _is_there(file: str) -> bool:
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
    `for_tokens` leaves out the workers and all certificates: the user who makes tokens
    may have no access to what the hub needs for them.

    Raises:
        ConfigError: a line for each mistake, with the key, the value and what is
            allowed.
    """
    environ = environ or {}
    document = _read_document(file) if file is not None else {}
    mistakes = Mistakes()
    mistakes.collect(_refuse_unknown, "", document, [*SECTIONS, "workers"])
    sections: dict[str, Any] = {}
    sound = set()  # what can be asked if it goes together with something else
    for name, cls in SECTIONS.items():
        before = len(mistakes)
        table = mistakes.collect(_table_of, document, name) or {}
        sections[name] = _load_section(name, cls, table, environ, flags or {}, mistakes)
        if len(mistakes) == before:
            sound.add(name)
    rows = mistakes.collect(_worker_rows, document, environ, workers) or []
    mistakes.collect(_refuse_misspelt_variables, environ, rows)
    before = len(mistakes)
    config = Config(
        **sections,
        workers=() if for_tokens else _load_workers(rows, environ, mistakes),
        file=str(file or ""),
    )
    if len(mistakes) == before:
        sound.add("workers")
    if "auth" in sound:
        config = _with_keys(config, environ, mistakes)
    if {"auth", "server"} <= sound:
        mistakes.collect(_check_exposure, config)
    if {"server", "workers"} <= sound and not for_tokens:
        mistakes.collect(_check_tls, config)
    if "models" in sound:
        mistakes.collect(_check_aliases, config.models.aliases)
    mistakes.check()
    return config


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


def _read_document(file: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_bytes().decode())
    except OSError as exc:
        raise ConfigError(f"{file}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file}: not UTF-8 text, as TOML has to be") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{file}: not valid TOML: {exc}") from exc


def _table_of(document: Mapping[str, Any], section: str) -> dict[str, Any]:
    table = document.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{section} = {shown(table)}: must be a table, [{section}]")
    return table


def _load_section(
    section: str,
    cls: type[_Section],
    table: Mapping[str, Any],
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    mistakes: Mistakes,
) -> _Section:
    """Read a section; what is wrong in it has its default."""
    entries = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
    mistakes.collect(_refuse_unknown, f"{section}.", table, list(entries))
    values: dict[str, Any] = {}
    for name, entry in entries.items():
        key, env = f"{section}.{name}", variable(section, name)
        given = [
            (key, table.get(name)),
            (f"{key} ({env})", environ.get(env)),
            (f"{key} ({FLAGS.get(key)})", flags.get(key)),
        ]
        for source, value in given:
            if value is not None:
                kind = entry.metadata["kind"]
                parsed = mistakes.collect(_parse, source, value, kind)
                if parsed is not None:
                    values[name] = parsed
    return cls(**values)


def _parse(source: str, value: Any, kind: Kind) -> Any:
    try:
        return kind.parse(value)
    except (ValueError, OverflowError):
        text = f"{source} = {shown(value)}: must be {kind.allowed}"
        raise ConfigError(text) from None


def _refuse_unknown(prefix: str, table: Mapping[str, Any], known: list[str]) -> None:
    unknown = []
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)
            spelt = name if name.isprintable() else shown(name)
            unknown.append(f"{prefix}{spelt}: no such setting; {hint}")
    if unknown:
        raise ConfigError(*unknown)


def _refuse_misspelt_variables(
    environ: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """A typing error in a variable would otherwise silently change nothing.

    Not every GOLLAMA_... is one: Kubernetes sets GOLLAMA_SERVICE_HOST and more for a
    service of that name.
    """
    known = {row.env for row in settings()} | VARIABLES.keys()
    own_keys = [row.get("api_key_env") for row in rows]
    sections = {name.split("_")[1].lower() for name in known}
    misspelt = []
    for name in environ:
        head, _, rest = name.partition("_")
        section = rest.partition("_")[0].lower()
        if head != "GOLLAMA" or name in known or name in own_keys:
            continue
        if difflib.get_close_matches(section, sections, n=1, cutoff=0.8):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            misspelt.append(f"{name}: no such environment variable{hint}")
    if misspelt:
        raise ConfigError(*misspelt)


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
        worker = mistakes.collect(_load_worker, where, row, environ)
        if worker is not None:
            mistakes.collect(_refuse_second, where, worker, workers)
            workers.append(worker)
    return tuple(workers)


def _load_worker(
    where: str, row: Mapping[str, Any], environ: Mapping[str, str]
) -> WorkerConfig:
    mistakes = Mistakes()
    mistakes.collect(_refuse_unknown, f"{where}.", row, list(WORKER_KEYS))
    values: dict[str, Any] = {
        key: mistakes.collect(_parse, f"{where}.{key}", value, WORKER_KEYS[key])
        for key, value in row.items()
        if key in WORKER_KEYS
    }
    url, origin = values.get("url", ""), None
    if url or not mistakes:  # else it may be there, and misspelt
        origin = mistakes.collect(_parse_url, f"{where}.url", url)
    mistakes.check()
    assert origin is not None, row
    key = mistakes.collect(_load_api_key, where, values, environ) or ""
    mistakes.collect(_check_worker_tls, where, origin, values)
    mistakes.check()
    name = values.get("name") or origin.authority + origin.prefix
    keys = ("slots", "models", "weight", "vram_gib", *_WORKER_TLS)
    told = {name: values[name] for name in keys if name in values}
    return WorkerConfig(url, origin, name, key, **told)


def _refuse_second(
    where: str, worker: WorkerConfig, others: Sequence[WorkerConfig]
) -> None:
    for other in others:
        if other.origin == worker.origin:
            text = f"{where}.url = {worker.url!r}: the same worker as {other.url!r}"
            raise ConfigError(f"{text}; each may be named once")
        if other.name == worker.name:
            text = f"{where}.name = {worker.name!r}: taken by {other.url!r}"
            raise ConfigError(f"{text}; each needs a name of its own")


def _parse_url(where: str, url: str) -> Origin:
    """Check a worker's URL part by part, so that the message can name the part."""

    def refuse(why: str) -> ConfigError:
        safe = shown(re.sub("//.*@", "//...@", url))  # it may hold a password
        return ConfigError(f"{where} = {safe}: {why}; expected http://host:port")

    if not url:
        raise refuse("is missing")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise refuse(str(exc)) from None
    if parts.scheme not in ("http", "https"):
        raise refuse("the scheme must be http or https")
    host = parts.hostname
    if not host or not re.fullmatch(r"[\w.:%-]+", host, re.ASCII):
        raise refuse("the host is missing or malformed")
    if "@" in parts.netloc:
        raise refuse("a user name or password does not belong into it")
    if "?" in url or "#" in url:
        raise refuse("a query or fragment does not belong into it")
    if port == 0:
        raise refuse("port 0 cannot be connected to")
    if why := addresses.why_refused(host):
        raise refuse(f"the host {why}")
    if (address := addresses.parse(host)) is not None and not addresses.is_plain(host):
        raise refuse(f"the host must be written {address}")
    if not re.fullmatch(r"[\w./~-]*", parts.path, re.ASCII) or ".." in parts.path:
        raise refuse("the path is malformed")
    default = 443 if parts.scheme == "https" else 80
    prefix = parts.path.rstrip("/")
    # People paste the address that an OpenAI client wants.
    prefix = prefix.removesuffix("/v1")
    return Origin(parts.scheme, host, port or default, prefix)


_WORKER_TLS = ("ca_file", "client_certificate", "client_key")


def _check_worker_tls(where: str, origin: Origin, values: Mapping[str, Any]) -> None:
    for name in _WORKER_TLS:
        if values.get(name) and origin.scheme != "https":
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
    """Refuse an alias of an alias: it is followed once, and not where it says."""
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


# --- What does not go together ----------------------------------------------------


def _check_exposure(config: Config) -> None:
    """Refuse what would let strangers in.

    TLS alone keeps nobody out; certificates that clients must have do.
    """
    server = config.server
    guarded = (
        addresses.is_loopback(server.host)
        or server.insecure_bind
        or server.tls_client_ca
    )
    if config.auth.mode == "off" and not guarded:
        raise ConfigError(
            f"server.host = {server.host!r}: without authentication only "
            "a loopback address is allowed, unless --insecure-bind is given "
            "or server.tls_client_ca set"
        )


def _check_tls(config: Config) -> None:
    """Load every certificate once, so that a wrong one is found before anything runs.

    Raises:
        ConfigError: a line for each that cannot be used.
    """
    server = config.server
    for name in ("tls_key", "tls_client_ca"):
        if getattr(server, name) and not server.tls_certificate:
            text = f"server.{name} = {getattr(server, name)!r}: needs"
            raise ConfigError(f"{text} server.tls_certificate beside it")
    https = [each for each in config.workers if each.origin.scheme == "https"]
    if not (https or server.tls_certificate):
        return  # `ssl` takes longer to import than a token to be made
    from gollama_proxy.config import tls

    mistakes = Mistakes()
    mistakes.collect(tls.for_server, server)
    for worker in https:
        mistakes.collect(tls.for_workers, [worker])
    mistakes.check()


def require_keys(config: Config) -> None:
    """Refuse to serve with authentication on and nothing to check a token against."""
    if config.auth.mode == "jwt" and not (config.secrets or config.public_keys):
        raise ConfigError(
            "GOLLAMA_JWT_SECRET: is not set; set it to 32 bytes or more "
            "(gollama-proxy secret), or auth.secret_file, or give --auth off"
        )
