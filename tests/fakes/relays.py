"""A relay, as the path of a request uses it."""

from __future__ import annotations

from gollama_proxy.edge.response import Client
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.wire.answer import Tally


async def pass_on(
    relay: Relay,
    client: Client,
    write_timeout: float = 5.0,
    keep: int = 0,
    tally: Tally | None = None,
    *,
    reports: bool = True,
) -> None:
    """Pass an answer on until it has ended; raises as `next_step` and `finish` do."""
    relay.begin(client, keep, tally, reports=reports)
    try:
        while (step := relay.next_step(client, write_timeout)) is not None:
            await step
    finally:
        relay.stop()
    relay.finish(client)
