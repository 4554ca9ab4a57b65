"""Files that say who may come in: secrets, keys, and the list of revoked tokens.

A file that holds a secret must not be open to everybody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from gollama_proxy.config.mistakes import ConfigError
from gollama_proxy.config.settings import Auth, Revoked

MIN_SECRET_BYTES = 32
# Larger than any of these files is.
MAX_SECRET_FILE = 64 << 10
MAX_REVOKED_FILE = 16 << 20


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


def load_secrets(auth: Auth, environ: Mapping[str, str]) -> tuple[bytes, ...]:
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
            f"{MIN_SECRET_BYTES} (try: gollama-proxy secret)"
        )
    return secret


def load_public_keys(auth: Auth) -> tuple[str, ...]:
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
