"""Requests as a handler gets them, without a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from aiohttp import EMPTY_PAYLOAD, HttpVersion, HttpVersion11, StreamReader, web
from aiohttp.test_utils import make_mocked_request


async def _nothing() -> None:
    pass


def _ignore(value: bool) -> None:
    pass


class Nowhere(asyncio.Transport):
    """A transport that is open, and drops what is written."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return False


def request(
    method: str = "POST",
    path: str = "/",
    headers: Mapping[str, str] | None = None,
    *,
    version: HttpVersion = HttpVersion11,
    transport: Any = None,
    payload: StreamReader = EMPTY_PAYLOAD,
) -> web.Request:
    """Make a request whose answer goes into `transport`.

    Its other parts are plain objects: each `Mock` that aiohttp would make takes as long
    as most of the tests that need a request.
    """
    transport = Nowhere() if transport is None else transport
    protocol = SimpleNamespace(
        ssl_context=None,
        peername=None,
        sockname=None,
        paused=False,
        keep_alive=_ignore,
    )
    return make_mocked_request(
        method,
        path,
        headers,
        version=version,
        app=SimpleNamespace(),
        writer=SimpleNamespace(transport=transport, drain=_nothing),
        protocol=protocol,
        transport=transport,
        payload=payload,
    )
