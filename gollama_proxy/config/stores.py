"""The URL of a store: its parts, its mistakes, and how it is shown without a password.

The spelling is that of all clients of Valkey and Redis, so that a URL which works with
`valkey-cli -u` works here.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from gollama_proxy.config.values import ConfigError, SecretUrl, cut, split_url

_EXPECTED = (
    "expected redis://[user:password@]host[:port][/database], the same with rediss:// "
    "for TLS, or unix://[user:password@]/path/of/socket[?db=database]"
)
_SCHEMES = ("redis", "rediss", "unix")
# Options of a URL with TLS: files in PEM format, named as in other clients.
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_MOST_DATABASES = 9_999  # a server has 16 unless it is configured otherwise


class StoreAddress(NamedTuple):
    """What a connection to a store needs; of `host` and `path`, one is empty."""

    host: str  # without the brackets of an IPv6 address
    port: int
    path: str  # of a Unix socket
    database: int
    user: str  # empty: the default user
    password: str
    tls: bool
    ca_file: str  # empty: the certificate authorities of the system
    certificate: str  # of this hub, if the store requires one
    key: str  # empty: in the file of the certificate

    def __repr__(self) -> str:
        where = self.path or f"{self.host}:{self.port}"
        return f"<StoreAddress {where}/{self.database}>"


def parse_store_url(where: str, url: str) -> StoreAddress:
    """Take the URL of a store apart; `where` is the key, for the error.

    Raises:
        ConfigError: a part is wrong; the error names it, and hides the password.
    """

    def wrong(why: str) -> ConfigError:
        shown = cut(repr(SecretUrl(url)))
        return ConfigError(f"{where} = {shown}: {why}; {_EXPECTED}")

    try:
        parts, port = split_url(url)
    except ValueError as exc:
        # The text of Python quotes what it could not read, such as the password.
        why = str(exc) if "port" in str(exc) else "malformed"
        raise wrong(why) from None
    if parts.scheme not in _SCHEMES:
        scheme = f"the scheme {parts.scheme!r} is unknown" if parts.scheme else ""
        raise wrong(scheme or "has no scheme")
    unix = parts.scheme == "unix"
    if parts.fragment:
        raise wrong("has a fragment (#); in a password, write %23")
    if unix and (parts.hostname or port is not None):
        raise wrong("a Unix socket has no host; its path begins with a third slash")
    if unix and parts.path in ("", "/"):
        raise wrong("the path of the socket is missing")
    if not unix and not parts.hostname:
        raise wrong("the host is missing")
    if port == 0:
        raise wrong("the port must be a number in the range from 1 to 65535")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = ("db",) if unix else _FILES if parts.scheme == "rediss" else ()
    for name in options:
        if name not in known:
            allowed = f"allowed: {', '.join(known)}" if known else "none is allowed"
            raise wrong(f"the option {cut(name)!r} is unknown ({allowed})")
    database = options.get("db", "") if unix else parts.path.strip("/")
    if not re.fullmatch("[0-9]{0,9}", database) or int(database or 0) > _MOST_DATABASES:
        text = f"the database must be a number from 0 to {_MOST_DATABASES:,}"
        raise wrong(f"{text}, and not {cut(database)!r}")
    if options.get("ssl_keyfile") and not options.get("ssl_certfile"):
        raise wrong("ssl_keyfile needs ssl_certfile beside it")
    return StoreAddress(
        host="" if unix else unquote(parts.hostname or ""),
        port=0 if unix else port or 6379,
        path=unquote(parts.path) if unix else "",
        database=int(database or 0),
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        tls=parts.scheme == "rediss",
        ca_file=options.get("ssl_ca_certs", ""),
        certificate=options.get("ssl_certfile", ""),
        key=options.get("ssl_keyfile", ""),
    )
