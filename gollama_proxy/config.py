"""Settings from a TOML file, the environment and flags, as one frozen `Config`.

A setting has three spellings, and the later one wins:

    [health]                          a TOML key
    interval = 30

    GOLLAMA_HEALTH_INTERVAL=30        an environment variable

    --port 8000                       a flag, for the few that are typed often

`load()` raises `ConfigError` for what cannot be used; its text is one line that names
the key, the value and what is allowed.  Nothing is read later, but the list of revoked
tokens: what is running is what was loaded.  Secrets never show in a `repr`, and their
files must not be open to everybody.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gollama_proxy import addresses
from gollama_proxy.names import Aliases
from gollama_proxy.settings import (
    FLAGS,
    SECTIONS,
    VARIABLES,
    WORKER_KEYS,
    Auth,
    Config,
    Kind,
    Origin,
    Revoked,
    WorkerConfig,
    settings,
    variable,
)

MIN_SECRET_BYTES = 32
# Larger than any of these files is.
MAX_SECRET_FILE = 64 << 10
MAX_REVOKED_FILE = 16 << 20

_Section = TypeVar("_Section")


class ConfigError(Exception):
    """A setting that cannot be used; the text is one line for whoever wrote it."""


def load(
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    workers: Sequence[str] = (),
) -> Config:
    """Read the file, the environment and the flags, in rising order of precedence.

    `flags` maps keys such as ``"server.port"`` to values; None means not given.
    Workers given as flags or in GOLLAMA_WORKERS replace those of the file.

    Raises:
        ConfigError: with one line that names the key, the value and what is allowed.
    """
    environ = environ or {}
    document = _read_document(file) if file is not None else {}
    _refuse_unknown("", document, [*SECTIONS, "workers"])
    sections = {
        name: _load_section(name, cls, document, environ, flags or {})
        for name, cls in SECTIONS.items()
    }
    rows = _worker_rows(document, environ, workers)
    auth = sections["auth"]
    config = Config(
        **sections,
        workers=_load_workers(rows, environ),
        secrets=_load_secrets(auth, environ),
        public_keys=_load_public_keys(auth),
        revoked=read_revoked(auth.revoked) if auth.revoked else Revoked(),
    )
    _refuse_misspelt_variables(environ, rows)
    _check_exposure(config)
    _check_tls(config)
    _check_aliases(config.models.aliases)
    return config


def _read_document(file: str | Path) -> dict[str, Any]:
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
    cls: type[_Section],
    document: Mapping[str, Any],
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
) -> _Section:
    table = document.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{section} = {_shown(table)}: must be a table, [{section}]")
    entries = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
    _refuse_unknown(f"{section}.", table, list(entries))
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
                values[name] = _parse(source, value, entry.metadata["kind"])
    return cls(**values)


def _parse(source: str, value: Any, kind: Kind) -> Any:
    try:
        return kind.parse(value)
    except (ValueError, OverflowError):
        text = f"{source} = {_shown(value)}: must be {kind.allowed}"
        raise ConfigError(text) from None


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_unknown(prefix: str, table: Mapping[str, Any], known: list[str]) -> None:
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)
            shown = name if name.isprintable() else _shown(name)
            raise ConfigError(f"{prefix}{shown}: no such setting; {hint}")


def _refuse_misspelt_variables(
    environ: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """A typing error in a variable would otherwise silently change nothing.

    Not every GOLLAMA_... is one: Kubernetes sets GOLLAMA_SERVICE_HOST and more for a
    service of that name.
    """
    known = {row.env for row in settings()} | VARIABLES.keys()
    own_keys = {row.get("api_key_env") for row in rows}
    sections = {name.split("_")[1].lower() for name in known}
    for name in environ:
        head, _, rest = name.partition("_")
        section = rest.partition("_")[0].lower()
        if head != "GOLLAMA" or name in known | own_keys:
            continue
        if difflib.get_close_matches(section, sections, n=1, cutoff=0.8):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name}: no such environment variable{hint}")


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
        raise ConfigError(f"workers = {_shown(rows)}: must be tables, [[workers]]")
    return rows


def _load_workers(
    rows: Sequence[Mapping[str, Any]], environ: Mapping[str, str]
) -> tuple[WorkerConfig, ...]:
    workers: list[WorkerConfig] = []
    for number_, row in enumerate(rows):
        where = f"workers[{number_}]"
        _refuse_unknown(f"{where}.", row, list(WORKER_KEYS))
        values = {
            key: _parse(f"{where}.{key}", value, WORKER_KEYS[key])
            for key, value in row.items()
        }
        origin = _parse_url(f"{where}.url", row.get("url", ""))
        name = row.get("name") or origin.authority + origin.prefix
        for other in workers:
            if other.origin == origin:
                text = f"{where}.url = {row['url']!r}: the same worker as {other.url!r}"
                raise ConfigError(f"{text}; each may be named once")
            if other.name == name:
                text = f"{where}.name = {name!r}: taken by {other.url!r}"
                raise ConfigError(f"{text}; each needs a name of its own")
        key = _load_api_key(where, row, environ)
        _check_worker_tls(where, origin, values)
        keys = ("slots", "models", "weight", "vram_gib", *_WORKER_TLS)
        told = {name: values[name] for name in keys if name in values}
        workers.append(WorkerConfig(row["url"], origin, name, key, **told))
    return tuple(workers)


def _parse_url(where: str, url: str) -> Origin:
    """Check a worker's URL part by part, so that the message can name the part."""

    def refuse(why: str) -> ConfigError:
        shown = _shown(re.sub("//.*@", "//...@", url))  # may hold a password
        return ConfigError(f"{where} = {shown}: {why}; expected http://host:port")

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
        way = _cut(" -> ".join(map(repr, names)))
        if names[-1] in names[:-1]:
            text = f"models.aliases = {way}: must not be a loop"
            raise ConfigError(f"{text}; an alias stands for the name of a model")
        if len(names) > 2:
            text = f"models.aliases = {way}: must be one step"
            raise ConfigError(f"{text}; let {alias!r} stand for {names[-1]!r}")


# --- Secrets ----------------------------------------------------------------------


def read_secret(source: str, file: str) -> bytes:
    """Read a file that holds a secret; `source` begins the line that refuses it.

    Raises:
        ConfigError: it cannot be read, is too large, or everybody can get at it.
    """
    try:
        with Path(file).open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if mode & 0o007:
                text = f"{source}: everybody can get at it (mode {mode & 0o777:04o})"
                raise ConfigError(f"{text}; must be for its owner only: chmod 600")
            content = stream.read(MAX_SECRET_FILE + 1)
    except OSError as exc:
        raise ConfigError(f"{source}: cannot be read: {exc.strerror}") from exc
    if len(content) > MAX_SECRET_FILE:
        raise ConfigError(f"{source}: must not be larger than {MAX_SECRET_FILE} bytes")
    return content


def _load_secrets(auth: Auth, environ: Mapping[str, str]) -> tuple[bytes, ...]:
    names = ("GOLLAMA_JWT_SECRET", "GOLLAMA_JWT_SECRET_PREVIOUS")
    given = {name: environ[name] for name in names if environ.get(name)}
    if not auth.secret_file:
        return tuple(
            _check_secret(name, text.encode(errors="surrogateescape"))
            for name, text in given.items()
        )
    source = f"auth.secret_file = {auth.secret_file!r}"
    if given:
        raise ConfigError(f"{source}: must not be set beside {next(iter(given))}")
    if auth.algorithm != "HS256":
        raise ConfigError(f"{source}: {auth.algorithm} has a key, no secret")
    secrets = read_secret(source, auth.secret_file).split()
    if not 1 <= len(secrets) <= len(names):
        text = "must hold the secret, and the one before it while that is good, too"
        raise ConfigError(f"{source}: has {len(secrets)} words; {text}")
    return tuple(_check_secret(source, secret) for secret in secrets)


def _check_secret(source: str, secret: bytes) -> bytes:
    if len(secret) < MIN_SECRET_BYTES:  # RFC 7518, 3.2: as long as the hash output
        raise ConfigError(
            f"{source}: has {len(secret)} bytes; HS256 needs at least "
            f"{MIN_SECRET_BYTES} (try: openssl rand -hex 32)"
        )
    return secret


def _load_public_keys(auth: Auth) -> tuple[str, ...]:
    if auth.algorithm == "HS256":
        if auth.public_key_file:
            raise ConfigError(
                f"auth.public_key_file = {auth.public_key_file!r}: HS256 has a secret; "
                "set auth.algorithm to RS256, ES256 or EdDSA"
            )
        return ()
    source = f"auth.public_key_file = {auth.public_key_file!r}"
    if not auth.public_key_file:
        raise ConfigError(f"{source}: {auth.algorithm} needs a PEM file")
    try:
        text = Path(auth.public_key_file).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        why = getattr(exc, "strerror", None) or "not text"
        raise ConfigError(f"{source}: cannot be read: {why}") from exc
    pattern = r"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----"
    keys = tuple(re.findall(pattern, text, re.DOTALL))
    if not keys:
        raise ConfigError(f"{source}: holds no PEM block BEGIN PUBLIC KEY")
    return keys


def read_revoked(file: str) -> Revoked:
    """Read whose tokens are refused: a line for each, `jti:…` or `sub:…`.

    Empty lines and those that begin with # say nothing.  Spaces around a line, and
    behind its colon, are no part of it.

    Raises:
        ConfigError: it cannot be read, or a line is neither; the line is not shown, as
            it may be a token.
    """
    source = f"auth.revoked = {file!r}"
    try:
        with Path(file).open("rb") as stream:
            content = stream.read(MAX_REVOKED_FILE + 1)
        if len(content) > MAX_REVOKED_FILE:
            limit = f"must not be larger than {MAX_REVOKED_FILE} bytes"
            raise ConfigError(f"{source}: {limit}")
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        why = getattr(exc, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{source}: cannot be read: {why}") from exc
    found: dict[str, set[str]] = {"jti": set(), "sub": set()}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        kind, _, value = line.partition(":")
        if kind not in found or not value.strip():
            text = "must be jti: or sub: and what it stands for, or a comment with #"
            raise ConfigError(f"{source}: line {number} {text}")
        found[kind].add(value.strip())
    return Revoked(frozenset(found["jti"]), frozenset(found["sub"]))


def _check_exposure(config: Config) -> None:
    """Refuse what would let strangers in.

    TLS alone keeps nobody out; certificates that clients must have do.
    """
    loopback = config.server.host in ("localhost", "::1") or re.fullmatch(
        r"127(\.\d{1,3}){3}", config.server.host
    )
    server = config.server
    guarded = loopback or server.insecure_bind or server.tls_client_ca
    if config.auth.mode == "off" and not guarded:
        raise ConfigError(
            f"server.host = {server.host!r}: without authentication only "
            "a loopback address is allowed, unless --insecure-bind is given "
            "or server.tls_client_ca set"
        )


def _check_tls(config: Config) -> None:
    """Load every certificate once, so that a wrong one is told before anything runs."""
    server = config.server
    for name in ("tls_key", "tls_client_ca"):
        if getattr(server, name) and not server.tls_certificate:
            text = f"server.{name} = {getattr(server, name)!r}: needs"
            raise ConfigError(f"{text} server.tls_certificate beside it")
    https = [each for each in config.workers if each.origin.scheme == "https"]
    if not (https or server.tls_certificate):
        return  # `ssl` takes longer to import than a token to be made
    from gollama_proxy import tls

    try:
        tls.for_server(server)
        tls.for_workers(https)
    except tls.TlsError as exc:
        raise ConfigError(str(exc)) from exc


def require_keys(config: Config) -> None:
    """Refuse to serve with authentication on and nothing to check a token against."""
    if config.auth.mode == "jwt" and not (config.secrets or config.public_keys):
        raise ConfigError(
            "GOLLAMA_JWT_SECRET: is not set; set it to 32 bytes or more "
            "(openssl rand -hex 32), or auth.secret_file, or give --auth off"
        )
