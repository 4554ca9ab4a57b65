"""A store whose clock tests move, for the script of slots; and plain calls to it."""

from __future__ import annotations

import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from valkey import Valkey

from gollama_proxy.state import slots
from gollama_proxy.state.slots import Grant, SlotAsk, SlotReply
from tests.fakes.valkey import StoreProcess
from tests.fakes.waiting import DEADLINE

CLOCK = "redis.call('TIME')"
T = TypeVar("T")


@contextmanager
def slot_server(engine: str) -> Iterator[Path]:
    """Run a server; yield its socket."""
    process = StoreProcess(engine, ())
    try:
        began = time.monotonic()
        while not process.listens():
            assert time.monotonic() < began + DEADLINE, process
            time.sleep(0.005)
        yield process.socket
    finally:
        process.kill()


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as exc:
        return exc.value  # type: ignore[no-any-return]
    raise AssertionError(f"{coroutine} waits")


class SlotStore:
    """A connection without a time limit; the script reads `now` instead of a clock."""

    def __init__(self, socket: Path, prefix: str = "test") -> None:
        self.prefix = prefix
        self.now = 1_800_000_000.0  # seconds
        self.client = Valkey(unix_socket_path=str(socket))
        self._heard = self.client.pubsub(ignore_subscribe_messages=True)

    def __repr__(self) -> str:
        return f"<SlotStore {self.prefix} now={self.now}>"

    def close(self) -> None:
        self._heard.close()
        self.client.close()

    async def run(
        self, script: str, keys: Sequence[str], args: Sequence[str | bytes]
    ) -> Any:
        assert script.count(CLOCK) == 1
        script = script.replace(CLOCK, "{ARGV[#ARGV - 1], ARGV[#ARGV]}")
        seconds, rest = divmod(round(self.now * 1e6), 1_000_000)
        return self.client.eval(script, len(keys), *keys, *args, seconds, rest)

    def sync(self, hub: str, *asks: SlotAsk, **options: Any) -> list[SlotReply]:
        """Call; `options` are those of the function."""
        return drive(slots.sync(self, hub, asks, **options))

    def ask(self, hub: str, *, options: Any = None, **of: Any) -> SlotReply:
        """Ask of one worker with four slots, of which each of two hubs has two."""
        ask = {"worker": "w", "slots": 4, "fair": 2} | of
        [reply] = self.sync(hub, SlotAsk(**ask), **(options or {}))
        return reply

    # --- Messages -----------------------------------------------------------------

    def listen(self, *hubs: str) -> None:
        channels = [slots.grants_channel(self.prefix, hub) for hub in hubs]
        self._heard.subscribe(*channels, slots.wanted_channel(self.prefix))

    def heard(self) -> dict[str, list[Any]]:
        """Return what was published since, by hub, and workers as `wanted`."""
        self._heard.ping()
        found: dict[str, list[Any]] = {}
        while True:
            message = self._heard.get_message(timeout=DEADLINE)
            if message is None:  # the confirmation of a subscription
                continue
            if message["type"] == "pong":
                return found
            channel, data = message["channel"].decode(), message["data"]
            name = channel.rpartition(":")[2]
            decode = slots.decode_wanted if name == "wanted" else slots.decode_grants
            found.setdefault(name, []).extend(decode(data))


def leases_of(grants: Sequence[Grant]) -> list[str]:
    return [grant.lease for grant in grants]
