"""Wake-on-LAN packets, on a real UDP socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gollama_proxy.upstream import magic

MAC = "00:11:22:aa:bb:cc"


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(10)
        yield sock


def test_the_packet_holds_the_address_sixteen_times() -> None:
    packet = magic.magic_packet(MAC)
    assert packet == b"\xff" * 6 + b"\x00\x11\x22\xaa\xbb\xcc" * 16
    assert len(packet) == 102


def test_the_packet_goes_to_each_place(receiver: socket.socket) -> None:
    place = f"127.0.0.1:{receiver.getsockname()[1]}"
    magic.send(MAC, [place, place])
    for _ in range(2):
        assert receiver.recv(2000) == magic.magic_packet(MAC)


def test_one_place_that_can_be_reached_is_enough(receiver: socket.socket) -> None:
    place = f"127.0.0.1:{receiver.getsockname()[1]}"
    magic.send(MAC, ["0.0.0.0:0", place])
    assert receiver.recv(2000) == magic.magic_packet(MAC)


def test_no_place_that_can_be_reached_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sendto(*_: object) -> int:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(magic.socket.socket, "sendto", sendto)
    with pytest.raises(OSError, match="unreachable"):
        magic.send(MAC, ["255.255.255.255"])
