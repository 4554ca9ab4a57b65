"""TLS contexts for clients and workers, made from files that can be renewed.

`Credentials` makes a new context when its files have changed.  New handshakes use it;
open connections keep their keys.  Files that do not fit together, such as those between
the two writes of a renewal, change nothing.
"""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from gollama_proxy.config.addresses import StoreAddress
from gollama_proxy.config.keys import read_secret, stamp
from gollama_proxy.config.settings import Server, WorkerConfig
from gollama_proxy.config.values import ConfigError

logger = logging.getLogger(__name__)

# The only protocol that the hub speaks (RFC 7301).
_ALPN = ["http/1.1"]
_OLDEST = ssl.TLSVersion.TLSv1_2  # RFC 9325, 3.1.1


# --- Making a context -------------------------------------------------------------


def server_context(server: Server) -> ssl.SSLContext:
    """Make the context for connections from clients.

    Raises:
        ConfigError: a file cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = _OLDEST
    context.set_alpn_protocols(_ALPN)
    _load_pair(
        context,
        ("server.tls_certificate", server.tls_certificate),
        ("server.tls_key", server.tls_key),
    )
    if server.tls_client_ca:
        _load_ca(context, "server.tls_client_ca", server.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def worker_context(worker: WorkerConfig) -> ssl.SSLContext:
    """Make the context for connections to a worker; its name is always checked.

    A worker without `ca_file` is checked against the CAs of the system.

    Raises:
        ConfigError: a file cannot be used.
    """
    names = "ca_file", "client_certificate", "client_key"
    files = worker.ca_file, worker.client_certificate, worker.client_key
    context = _client_context(f"worker {worker.name}: ", names, files)
    context.set_alpn_protocols(_ALPN)
    return context


def store_context(address: StoreAddress) -> ssl.SSLContext:
    """Make the context for connections to the store; its name is always checked.

    Without a file of CAs, it is checked against those of the system.

    Raises:
        ConfigError: a file cannot be used.
    """
    names = "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"
    files = address.ca_file, address.certificate, address.key
    return _client_context("state.url: the option ", names, files)


def hub_context(ca_file: str) -> ssl.SSLContext:
    """Make the context for an https hub; without a file, for the CAs of the system.

    Raises:
        ConfigError: the file cannot be used.
    """
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as exc:  # ssl.SSLError included
        why = "holds no PEM certificate"
        if not isinstance(exc, ssl.SSLError):
            why = f"cannot be read: {exc.strerror}"
        raise ConfigError(f"--ca-file = {ca_file!r}: {why}") from exc


def _client_context(
    where: str, names: Sequence[str], files: Sequence[str]
) -> ssl.SSLContext:
    """Make the context for CAs, and the hub's certificate and key if there are any."""
    keys = (where + name for name in names)
    ca, certificate, key = zip(keys, files, strict=True)
    if ca[1]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts no CA yet
        _load_ca(context, *ca)
    else:
        context = ssl.create_default_context()
    context.minimum_version = _OLDEST
    if certificate[1]:
        _load_pair(context, certificate, key)
    return context


def _load_pair(
    context: ssl.SSLContext, certificate: tuple[str, str], key: tuple[str, str]
) -> None:
    """Load a certificate and its key, which may be in the same file.

    The file with the key must not be open to all users.
    """
    _check_readable(*certificate)
    blamed = key if key[1] else certificate
    if key[1] or _has_pem(certificate[1], "PRIVATE KEY"):
        read_secret(f"{blamed[0]} = {blamed[1]!r}", blamed[1])
    try:
        context.load_cert_chain(certificate[1], key[1] or None, _no_password)
    except _EncryptedError:
        raise _unusable(
            *blamed, "is encrypted; the hub needs one that is not"
        ) from None
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise _unusable(*blamed, f"is not the key of {certificate[0]}") from None
        if not _has_pem(certificate[1], "CERTIFICATE"):
            raise _unusable(*certificate, "holds no PEM certificate") from None
        if not _has_pem(blamed[1], "PRIVATE KEY"):
            raise _unusable(*blamed, "holds no PEM private key") from None
        raise _unusable(*certificate, f"cannot be used: {_reason(exc)}") from None


def _load_ca(context: ssl.SSLContext, name: str, file: str) -> None:
    _check_readable(name, file)
    try:
        context.load_verify_locations(file)
    except ssl.SSLError:
        raise _unusable(name, file, "holds no PEM certificate") from None


def _check_readable(name: str, file: str) -> None:
    """Name the file that is missing, which OpenSSL does not."""
    try:
        Path(file).read_bytes()
    except OSError as exc:
        raise _unusable(name, file, f"cannot be read: {exc.strerror}") from None


def _has_pem(file: str, label: str) -> bool:
    return bool(re.search(rb"-----BEGIN [A-Z ]*" + label.encode(), _read(file)))


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError:  # it was removed in the meantime
        return b""


def _unusable(name: str, file: str, why: str) -> ConfigError:
    return ConfigError(f"{name} = {file!r}: {why}")


class _EncryptedError(Exception):
    pass


def _no_password() -> str:
    """Without this, OpenSSL would ask for one on the terminal."""
    raise _EncryptedError


# --- Renewal ----------------------------------------------------------------------


class Credentials:
    """A TLS context that follows its files."""

    def __init__(
        self, files: Sequence[str], make: Callable[[], ssl.SSLContext]
    ) -> None:
        """Load it.

        Raises:
            ConfigError: a file cannot be used.
        """
        self._files = [Path(file) for file in files if file]
        self._make = make
        self._seen = self._look()
        self._expires: float | None = None  # not known yet
        self.context = make()

    def __repr__(self) -> str:
        return f"<Credentials {', '.join(map(str, self._files))}>"

    @property
    def renewable(self) -> bool:
        return bool(self._files)

    def refresh(self, *, always: bool = False) -> None:
        """Load the files again if they have changed, or `always`; blocks for a moment.

        If they cannot be used, one line is logged and the old context stays.
        """
        seen = self._look()
        if seen == self._seen and not always:
            return
        self._seen = seen
        try:
            self.context = self._make()
            self._expires = None
        except ConfigError as exc:
            logger.error("%s; what was loaded before stays in use", exc)
        else:
            names = ", ".join(map(str, self._files))
            logger.info("loaded %s; new connections get it", names)

    def expires(self) -> float | None:
        """Return when the first certificate in the files expires, in Unix time.

        None if that is not known.  This blocks for a moment.
        """
        try:
            from cryptography import x509  # large, and only TLS needs it
        except ImportError:  # also while `Authenticator.preload` does without it
            return None
        if self._expires is None:
            times = []
            for file in self._files:
                # A key has none, and neither has a file that is being renewed.
                with contextlib.suppress(OSError, ValueError):
                    found = x509.load_pem_x509_certificates(file.read_bytes())
                    times += [each.not_valid_after_utc.timestamp() for each in found]
            self._expires = min(times, default=None)
        return self._expires

    def _look(self) -> list[tuple[int, ...]]:
        return [stamp(file) for file in self._files]


def for_server(server: Server) -> Credentials | None:
    """Load the certificate for clients; None if the hub serves plain HTTP."""
    if not server.tls_certificate:
        return None
    files = (server.tls_certificate, server.tls_key, server.tls_client_ca)
    return Credentials(files, lambda: server_context(server))


def for_workers(
    workers: Sequence[WorkerConfig],
    shared: dict[tuple[str, ...], Credentials] | None = None,
) -> dict[str, Credentials]:
    """Load the credentials for each https worker, by its name.

    Workers with the same files share them: the CAs of a system take a megabyte.  Those
    that are in `shared`, by their files, are not loaded again.
    """
    shared = {} if shared is None else shared
    by_name = {}
    for worker in workers:
        if worker.origin.scheme.endswith("https"):  # or the scheme of a group
            files = worker.ca_file, worker.client_certificate, worker.client_key
            if files not in shared:
                make = _maker(worker)
                shared[files] = Credentials(files, make)
            by_name[worker.name] = shared[files]
    return by_name


def _maker(worker: WorkerConfig) -> Callable[[], ssl.SSLContext]:
    return lambda: worker_context(worker)


# --- What went wrong --------------------------------------------------------------


def explain_tls(error: BaseException) -> str:
    """Return in a few words why a handshake failed; "" if TLS was not the reason.

    OpenSSL's own text has error numbers and lines of C source.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        why = getattr(error, "verify_message", "") or str(error)
        return f"TLS: certificate not accepted: {why.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {_reason(error)}"
    return ""


def _reason(error: ssl.SSLError) -> str:
    # An error raised in Python, not by OpenSSL, has no such attribute.
    return (getattr(error, "reason", "") or str(error)).replace("_", " ").lower()
