"""What the hub has to say goes to a client in the frames of its answer."""

from __future__ import annotations

import pytest

from gollama_proxy.proxy.client import Client, ReportedError, frame
from gollama_proxy.wire.errors import Code, WorkerError
from tests.fakes.replies import chunk


class Connection:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        if self.closed:
            raise RuntimeError("unable to perform operation on <TCPTransport closed>")
        self.written.append(data)

    async def drain(self) -> None: ...


@pytest.mark.parametrize("chunked", [True, False])
def test_bytes_of_the_hubs_own_are_framed_as_the_rest_is(chunked: bool) -> None:
    connection = Connection()
    client = Client(connection.write, connection.drain, int, chunked)
    client.send(b"one")
    client.send(b"a longer one")
    own = [b"one", b"a longer one"]
    assert connection.written == (list(map(chunk, own)) if chunked else own)


def test_nothing_is_not_sent() -> None:
    """An empty chunk would be the last one."""
    connection = Connection()
    Client(connection.write, connection.drain, int, chunked=True).send(b"")
    assert connection.written == []


def test_a_client_that_left_a_moment_ago_is_not_written_to() -> None:
    connection = Connection()
    client = Client(connection.write, connection.drain, int, chunked=True)
    client.send(b"one")
    connection.closed = True
    client.send(b"two")
    assert connection.written == [chunk(b"one")]


@pytest.mark.parametrize("size", [1, 15, 16, 255, 256, 70_000])
def test_a_frame_is_one_chunk(size: int) -> None:
    assert frame(b"x" * size) == chunk(b"x" * size)


def test_an_error_that_was_told_already_is_still_the_workers() -> None:
    error = ReportedError(Code.WORKER_INCOMPLETE, "because")
    assert isinstance(error, WorkerError)
