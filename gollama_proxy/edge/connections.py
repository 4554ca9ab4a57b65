"""Limits the number of client connections, in total and per address.

A connection counts as soon as it is accepted, before TLS and before a request, so that
the limits also stop a client that opens thousands of them and sends nothing.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import Callable

from gollama_proxy.config.settings import Limits
from gollama_proxy.telemetry.logs import Throttle

logger = logging.getLogger(__name__)

# Seconds between two log lines about the same kind of refusal.
LOG_EVERY = 10.0
# Why connections are refused: too many in total, too many from one address, or a failed
# TLS handshake.
KINDS = ("limit", "address", "handshake")


class ConnectionLimiter:
    """Counts client connections, and refuses those over a limit."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        """Make a count; `clock` gives monotonic seconds."""
        self.open = 0
        self.refused: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self._limit = limits.connections
        self._each = limits.connections_per_address
        self._by_address: Counter[str] = Counter()
        self._throttle = Throttle(clock, LOG_EVERY)

    def __repr__(self) -> str:
        return f"<ConnectionLimiter open={self.open} of {self._limit}>"

    @property
    def by_address(self) -> bool:
        """Whether `enter` and `leave` need the address."""
        return self._each > 0

    def enter(self, address: str = "") -> bool:
        """Count a connection; False: close it.  Each True requires a `leave` later."""
        if self.open >= self._limit:
            self.refuse("limit", f"limits.connections = {self._limit}")
            return False
        if self._each:
            host = household(address)
            if self._by_address[host] >= self._each:
                text = f"limits.connections_per_address = {self._each}, last {host}"
                self.refuse("address", text)
                return False
            self._by_address[host] += 1
        self.open += 1
        return True

    def leave(self, address: str = "") -> None:
        self.open -= 1
        if self._each:
            host = household(address)
            self._by_address[host] -= 1
            if self._by_address[host] <= 0:
                del self._by_address[host]

    def refuse(self, kind: str, why: str) -> None:
        """Count a refused connection, and log such now and then (`LOG_EVERY`)."""
        self.refused[kind] += 1
        if count := self._throttle.count(kind):
            logger.warning("refused connections: %d (%s)", count, why)


def household(address: str) -> str:
    """Return the host of an address; an IPv6 host has a whole /64 (RFC 6177)."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
