"""URLs and addresses of workers, hubs and the store, and those that no worker can have.

Workers live on loopback and private networks, so those are allowed.  Neither a URL nor
a DNS name that others control may lead the hub to the metadata services of clouds,
which hand out credentials, or to addresses that are not one machine (OWASP, Server Side
Request Forgery Prevention).
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from gollama_proxy.config.settings import Origin, Server
from gollama_proxy.config.values import ConfigError, SecretUrl, cut, shown, split_url

BACKLOG = 1024  # connections that wait to be accepted

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# In this order: AWS, Google, Azure, Oracle, DigitalOcean and others; AWS; Google;
# Alibaba; Azure; Oracle.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            "169.254.169.254",
            "fd00:ec2::254",
            "fd20:ce::254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
        ),
    )
)
_METADATA_NAMES = frozenset(
    {"metadata.google.internal", "metadata.goog", "instance-data.ec2.internal"}
)
# RFC 1122, 3.2.1.3: "this network"; Linux treats 0.0.0.0 as loopback.  RFC 1112, 4:
# class E, with the broadcast address.
_NOWHERE = (ipaddress.ip_network("0.0.0.0/8"), ipaddress.ip_network("240.0.0.0/4"))
# IPv6 prefixes with an IPv4 address in their last four bytes: compatible and mapped
# (RFC 4291, 2.5.5), and NAT64 (RFC 6052, 2.1).
_CARRIERS = tuple(
    map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0/96", "64:ff9b::/96"))
)


def parse_url(where: str, url: str) -> Origin:
    """Take the URL of a worker apart; `where` is the key, for the error.

    Raises:
        ConfigError: a part is wrong; the error names it, and hides a password.
    """

    def wrong(why: str) -> ConfigError:
        safe = shown(re.sub("//.*@", "//...@", url))  # may hold a password
        return ConfigError(f"{where} = {safe}: {why}; expected http://host:port")

    if not url:
        raise wrong("is missing")
    try:
        parts, port = split_url(url)
    except ValueError as exc:
        raise wrong(str(exc)) from None
    if parts.scheme not in ("http", "https", "dns+http", "dns+https"):
        raise wrong("the scheme must be http or https, or dns+http or dns+https")
    host = parts.hostname
    if not host or not re.fullmatch(r"[\w.:%-]+", host, re.ASCII):
        raise wrong("the host is missing or malformed")
    if "@" in parts.netloc:
        raise wrong("must not contain a user name or password")
    if "?" in url or "#" in url:
        raise wrong("must not contain a query or fragment")
    if port == 0:
        raise wrong("port 0 cannot be connected to")
    if why := why_refused(host):
        raise wrong(f"the host {why}")
    if (address := parse(host)) is not None and not is_plain_host(host):
        raise wrong(f"the host must be written {address}")
    if parts.scheme.startswith("dns+"):
        if address is not None:
            raise wrong("the host must be a name, after dns+")
        if host.startswith("_") and port is not None:
            raise wrong("the SRV records of the name have the port")
    if not re.fullmatch(r"[\w./~-]*", parts.path, re.ASCII) or ".." in parts.path:
        raise wrong("the path is malformed")
    # llama-server has another default port, but https means 443 everywhere.
    default = 443 if parts.scheme.endswith("https") else 0
    prefix = parts.path.rstrip("/")
    # Users paste the base URL of an OpenAI client.
    prefix = prefix.removesuffix("/v1")
    return Origin(parts.scheme, host, port or default, prefix)


def why_refused(host: str) -> str:
    """Return why no worker can be at a host; "" if one can, or if it is not known.

    `host` is an address in any spelling, or a name, which is not resolved here.
    """
    name = host.rstrip(".").lower()
    if name in _METADATA_NAMES:
        return "is a cloud's metadata service"
    address = parse(name)
    return why_address_refused(address) if address is not None else ""


def why_address_refused(address: IPAddress) -> str:
    """Return why no worker can be at an address; "" if one can."""
    if isinstance(address, ipaddress.IPv6Address):
        # Without its zone, which takes no part in the comparisons.
        address = ipaddress.IPv6Address(int(address))
        inner = None if address.is_loopback else _carried(address)
        if inner is not None and (why := why_address_refused(inner)):
            return why
    if address in _METADATA:
        return "is a cloud's metadata service"
    if address.is_link_local:
        return "is a link-local address"
    if address.is_multicast:
        return "is a multicast address"
    if address.is_unspecified or any(address in network for network in _NOWHERE):
        return "is not the address of a machine"
    return ""


def parse(host: str) -> IPAddress | None:
    """Parse an address in any spelling that a resolver accepts; None for a name.

    To `inet_aton`, and so to `getaddrinfo`, 2852039166, 0xa9fea9fe and 0251.254.43518
    all mean 169.254.169.254.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, or its name."""
    address = parse(host)
    return host == "localhost" if address is None else address.is_loopback


def is_plain_host(host: str) -> bool:
    """Return whether a host is an address in the spelling that all programs share."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _carried(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address inside an IPv6 address, if there is one."""
    if any(address in network for network in _CARRIERS):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.sixtofour  # RFC 3056


# --- Hubs -------------------------------------------------------------------------


def split_hubs(text: str) -> list[str]:
    """Return the URLs of hubs in a list separated by spaces or commas."""
    return [url for url in re.split(r"[,\s]+", text) if url]


def check_url(source: str, url: str) -> None:
    """Check the URL of a server; `source` begins the line of an error.

    Raises:
        ConfigError: it is not a URL, or has parts that are not used.
    """
    why = ""
    try:
        parts, port = split_url(url)
    except ValueError as exc:
        why, parts, port = str(exc), urlsplit(""), None
    if not why and (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not re.fullmatch(r"[!-~]+", url)
    ):
        why = "must be a URL such as http://gateway:8000"
    elif not why and ("@" in parts.netloc or parts.query or parts.fragment):
        why = "must be a URL without a password, a query or a fragment"
    elif port == 0:
        why = "port 0 cannot be connected to"
    if why:
        safe = re.sub("//.*@", "//...@", url)
        raise ConfigError(f"{source} = {shown(safe)}: {why}")


# --- Addresses to listen on -------------------------------------------------------


def refuse(server: Server, exc: OSError) -> ConfigError:
    """Describe why the address of clients cannot be listened on."""
    host = f"server.host = {server.host!r}"
    port = f"server.port = {server.port}"
    if isinstance(exc, socket.gaierror) or exc.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"{host}: must be an address of this machine")
    if exc.errno == errno.EADDRINUSE:
        return ConfigError(f"{port}: already in use; must be a free port, or 0 for any")
    if exc.errno == errno.EACCES:
        return ConfigError(f"{port}: not permitted; must be 1024 or above")
    return ConfigError(f"{host}, {port}: cannot be listened on: {exc.strerror or exc}")


def refuse_metrics(address: str, exc: OSError) -> ConfigError:
    """Describe why an address of `metrics.listen` cannot be listened on."""
    why = _REFUSALS.get(exc.errno or 0, exc.strerror)
    text = (
        f"metrics.listen = {address!r}: {why}; must be a free address of this machine"
    )
    return ConfigError(text)


_REFUSALS = {
    errno.EADDRINUSE: "already in use",
    errno.EADDRNOTAVAIL: "not there",
    errno.EACCES: "not permitted",
}


# --- The store --------------------------------------------------------------------

# The spelling is that of all clients of Valkey and Redis, so that a URL that works for
# `valkey-cli -u` works here.
_EXPECTED_STORE = (
    "expected redis://[user:password@]host[:port][/database], the same with rediss:// "
    "for TLS, or unix://[user:password@]/path/of/socket[?db=database]"
)
_STORE_SCHEMES = ("redis", "rediss", "unix")
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
        text = f"{where} = {shown(SecretUrl(url))}: {why}"
        return ConfigError(f"{text}; {_EXPECTED_STORE}")

    try:
        parts, port = split_url(url)
    except ValueError as exc:
        # The text of Python quotes what it could not read, such as the password.
        why = str(exc) if "port" in str(exc) else "malformed"
        raise wrong(why) from None
    if parts.scheme not in _STORE_SCHEMES:
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
    number = int(database or 0) if re.fullmatch("[0-9]{0,9}", database) else None
    if number is None or number > _MOST_DATABASES:
        text = f"the database must be a number from 0 to {_MOST_DATABASES:,}"
        raise wrong(f"{text}, and not {cut(database)!r}")
    if options.get("ssl_keyfile") and not options.get("ssl_certfile"):
        raise wrong("ssl_keyfile needs ssl_certfile beside it")
    return StoreAddress(
        host="" if unix else unquote(parts.hostname or ""),
        port=0 if unix else port or 6379,
        path=unquote(parts.path) if unix else "",
        database=number,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        tls=parts.scheme == "rediss",
        ca_file=options.get("ssl_ca_certs", ""),
        certificate=options.get("ssl_certfile", ""),
        key=options.get("ssl_keyfile", ""),
    )
