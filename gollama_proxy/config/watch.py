"""Files that change while the hub runs: certificates and the list of revoked tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar, Protocol

from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

PERIOD = 1.0  # seconds between two looks at a file, whatever the traffic


class Watched(Protocol):
    """Something that is made from files."""

    kind: ClassVar[str]  # in the plural, for the log

    def refresh(self, *, always: bool = False) -> Callable[[], None] | None:
        """Read the files again if they may have changed, or `always`; may block.

        Runs in a thread.  Returns the change that has to be made on the event loop.
        """


class Watcher:
    """Refreshes each item once a second, and at once on request.

    Every item has its own task: a disk that does not answer delays no other item.
    """

    def __init__(self, items: Iterable[Watched]) -> None:
        self._loops: dict[Watched, Periodic] = {}
        self._requested: set[Watched] = set()
        self._running = False
        for item in items:
            self.add(item)

    def __repr__(self) -> str:
        return f"<Watcher items={len(self._loops)}>"

    def add(self, item: Watched) -> None:
        """Watch an item, if it is not watched already."""
        if item in self._loops:
            return
        step = partial(self._refresh, item)
        self._loops[item] = Periodic(f"watch {item!r}", step, PERIOD)
        if self._running:
            self._loops[item].start()

    async def remove(self, item: Watched) -> None:
        """Watch an item no longer; harmless if it is not watched."""
        loop = self._loops.pop(item, None)
        if loop is not None:
            await loop.stop()

    def start(self) -> None:
        self._running = True
        for loop in self._loops.values():
            loop.start()

    async def stop(self) -> None:
        self._running = False
        for loop in self._loops.values():
            await loop.stop()

    def reload(self) -> None:
        """Have every item read its files soon, whether or not they seem changed."""
        logger.info(
            "reading %s again; all other settings need a restart",
            " and ".join(dict.fromkeys(item.kind for item in self._loops))
            or "nothing (there are no certificates or revocations)",
        )
        self._requested.update(self._loops)
        for loop in self._loops.values():
            loop.wake()

    async def _refresh(self, item: Watched) -> None:
        always = item in self._requested
        self._requested.discard(item)
        # The file may be on a sleeping disk or on another machine.
        change = await asyncio.to_thread(item.refresh, always=always)
        if change is not None:
            change()
