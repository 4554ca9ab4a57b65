"""Wake-on-LAN: the packet that wakes a sleeping machine.

Six bytes of ones, then the hardware address sixteen times (AMD, Magic Packet
Technology, 1995), in a UDP datagram to a broadcast address: a machine that sleeps has
no address of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

PORT = 9  # discard


def magic_packet(mac: str) -> bytes:
    """Return the packet for a hardware address such as 00:11:22:aa:bb:cc."""
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) * 16


def send(mac: str, places: Iterable[str]) -> None:
    """Send the packet to each of these addresses, which may have a port.

    Raises:
        OSError: none of them can be reached.
    """
    packet, failure, sent = magic_packet(mac), OSError("no address"), False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setblocking(False)
        for place in places:
            host, _, port = place.partition(":")
            try:
                sock.sendto(packet, (host, int(port or PORT)))
            except OSError as exc:
                failure = exc
            else:
                sent = True
    if not sent:
        raise failure
