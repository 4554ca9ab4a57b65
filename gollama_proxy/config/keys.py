"""Files for authentication: secrets, public keys, tokens, and the list of revoked ones.

A file that holds a secret must be readable by its owner and group only.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gollama_proxy.config.settings import Auth, Revoked
from gollama_proxy.config.values import ConfigError

logger = logging.getLogger(__name__)

MIN_SECRET_BYTES = 32
# The names under which systemd passes credentials.
SECRET, TOKEN = "gollama.secret", "gollama.token"
# Far more than a real file of the kind has.
MAX_SECRET_FILE = 64 << 10
MAX_REVOKED_FILE = 16 << 20


def stamp(file: Path) -> tuple[int, ...]:
    """Return what differs once a file is written, or a link points elsewhere.

    () if it cannot be read.
    """
    try:
        stat = file.stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def read_secret(source: str, file: str) -> bytes:
    """Read a file that holds a secret; `source` begins the line of an error.

    Raises:
        ConfigError: the file cannot be read, is too large, or is open to all users.
    """
    try:
        with Path(file).open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if mode & 0o007:
                text = f"{source}: other users have access (mode {mode & 0o777:04o})"
                raise ConfigError(f"{text}; must be for its owner only: chmod 600")
            content = stream.read(MAX_SECRET_FILE + 1)
    except OSError as exc:
        raise ConfigError(f"{source}: cannot be read: {exc.strerror}") from exc
    if len(content) > MAX_SECRET_FILE:
        raise ConfigError(f"{source}: must not be larger than {MAX_SECRET_FILE} bytes")
    return content


def load_secrets(auth: Auth, environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """Return the HS256 secrets, from the environment or the file; the current first.

    Without either, they are those of the credential that systemd passes, if any.

    Raises:
        ConfigError: a secret is too short, or comes from two places.
    """
    names = ("GOLLAMA_JWT_SECRET", "GOLLAMA_JWT_SECRET_PREVIOUS")
    given = {name: environ[name] for name in names if environ.get(name)}
    credential = find_credential(SECRET, environ)
    if credential and auth.algorithm == "HS256" and not auth.secret_file:
        if given:
            text = f"must not be set beside the credential {credential!r}"
            raise ConfigError(f"{next(iter(given))}: {text}")
        return _read_secrets(f"credential {credential!r}", credential)
    if not auth.secret_file:
        return tuple(
            _check_secret(name, text.encode(errors="surrogateescape"))
            for name, text in given.items()
        )
    source = f"auth.secret_file = {auth.secret_file!r}"
    if given:
        raise ConfigError(f"{source}: must not be set beside {next(iter(given))}")
    if auth.algorithm != "HS256":
        raise ConfigError(f"{source}: {auth.algorithm} uses a key, not a secret")
    return _read_secrets(source, auth.secret_file)


def find_credential(name: str, environ: Mapping[str, str]) -> str:
    """Return the path of a file that systemd passes (LoadCredential=); "" for none."""
    folder = environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder, name) if folder else None
    return str(path) if path is not None and path.exists() else ""


def _read_secrets(source: str, file: str) -> tuple[bytes, ...]:
    secrets = read_secret(source, file).split()
    if not 1 <= len(secrets) <= 2:
        text = "must hold the secret, and the previous one if that is still accepted"
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
    """Return the PEM blocks of the public keys; none for HS256.

    Raises:
        ConfigError: the file cannot be read or has no key, or does not fit HS256.
    """
    if auth.algorithm == "HS256":
        if auth.public_key_file:
            raise ConfigError(
                f"auth.public_key_file = {auth.public_key_file!r}: HS256 uses a secret"
                "; set auth.algorithm to RS256, ES256 or EdDSA"
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


def read_token(file: str, environ: Mapping[str, str]) -> str:
    """Return the token of the file, or of GOLLAMA_TOKEN; "" if there is none.

    Without either, it is that of the credential that systemd passes, if any.

    Raises:
        ConfigError: the file cannot be used, or holds something other than a token.
    """
    credential = find_credential(TOKEN, environ)
    if file or (credential and not environ.get("GOLLAMA_TOKEN", "").strip()):
        source = f"--token-file = {file!r}" if file else f"credential {credential!r}"
        file = file or credential
        return check_token(source, read_secret(source, file).decode(errors="replace"))
    token = environ.get("GOLLAMA_TOKEN", "")
    return check_token("GOLLAMA_TOKEN", token) if token.strip() else ""


def check_token(source: str, token: str) -> str:
    """Return a token without spaces around it; `source` begins the line of an error.

    Raises:
        ConfigError: it is none.
    """
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{source}: holds no token (gollama-proxy token)")
    return token


# --- Revoked tokens ---------------------------------------------------------------


class RevocationList:
    """The revoked tokens and subjects, kept in step with their file.

    A file that cannot be read or understood changes nothing: the last good list stays
    in force, and the log has the reason once.  A file that is being written may be
    empty for a moment.  So new entries are in force at once, and entries that vanish
    stay so until the file looks the same at the next check.
    """

    # Nanoseconds.  Timestamps of file systems advance in steps of 10 ms, on some of
    # 2 s: a file changed this recently can change again and look the same.
    _SETTLED = 3_000_000_000

    def __init__(
        self,
        file: str,
        revoked: Revoked,
        apply: Callable[[Revoked], None],
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Start from a list; `apply` receives each list that differs from the last.

        `clock` returns Unix time in nanoseconds.
        """
        self._file = file
        self._revoked = revoked
        self._apply = apply
        self._clock = clock
        # What the file looked like when it was read; None: read it again.
        self._version: tuple[int, ...] | None = None
        self._last: Revoked | None = None  # what was read at the last check
        self._trouble = ""

    def __repr__(self) -> str:
        tokens, subjects = map(len, self._revoked)
        return f"<RevocationList tokens={tokens} subjects={subjects}>"

    def refresh(self, *, always: bool = False) -> Callable[[], None] | None:
        """Read the file if it may have changed, or `always`; blocks for a moment.

        Returns a function that puts a new list in force, None if there is none.
        """
        version = self._stat()
        same = version is not None and version == self._version
        if same and self._last == self._revoked and not always:
            return None
        before, self._last, self._version = self._last, None, None
        try:
            revoked = read_revoked(self._file)
        except ConfigError as exc:
            self._report(str(exc), always)
            return None
        if (
            self._stat() != version
        ):  # it has changed in the meantime, and may be half written
            return None
        self._trouble, self._last = "", revoked
        if revoked != before:  # else it has looked the same twice
            tokens = revoked.tokens | self._revoked.tokens
            revoked = Revoked(tokens, revoked.subjects | self._revoked.subjects)
        if version is not None and self._clock() - version[0] > self._SETTLED:
            self._version = version
        if revoked != self._revoked:
            return lambda: self._put_in_force(revoked)
        if always:
            self._log()
        return None

    def _put_in_force(self, revoked: Revoked) -> None:
        self._revoked = revoked
        self._log()
        self._apply(revoked)

    def _report(self, trouble: str, always: bool) -> None:
        if always or trouble != self._trouble:
            logger.error("%s; the last good list stays in force", trouble)
        self._trouble = trouble

    def _log(self) -> None:
        tokens, subjects = map(len, self._revoked)
        logger.info("%d tokens and %d subjects are revoked", tokens, subjects)

    def _stat(self) -> tuple[int, ...] | None:
        try:
            stat = Path(self._file).stat()
        except OSError:
            return None
        return max(stat.st_mtime_ns, stat.st_ctime_ns), stat.st_ino, stat.st_size


def read_revoked(file: str) -> Revoked:
    """Read a list of revoked tokens: on each line, `jti:…` or `sub:…`.

    Empty lines and lines that begin with # are skipped, and so are spaces around a
    line and after its colon.

    Raises:
        ConfigError: the file cannot be read, or a line is of another kind.  The error
            does not quote the line, which may be a token.
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
