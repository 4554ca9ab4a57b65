"""Files that are renewed while the hub runs, looked at again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from gollama_proxy.tasks import spawn

logger = logging.getLogger(__name__)

PERIOD = 3.0  # seconds between two looks


class Renewable(Protocol):
    """What is made of files."""

    def refresh(self, *, always: bool = False) -> None:
        """Read them again if they have changed, or `always`; may block for a moment."""


class Reloader:
    """Looks at files every few seconds, and at once when it is asked to."""

    def __init__(self, items: Sequence[Renewable]) -> None:
        self.items = items
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Reloader of {len(self.items)}>"

    def start(self) -> None:
        """Start to look; `stop` ends it.  Where there is nothing, nothing runs."""
        if self.items:
            self._task = spawn(self._run(), "reload")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def ask(self) -> None:
        """Have everything read again soon, whether it looks changed or not."""
        self._asked.set()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(PERIOD):
                    await self._asked.wait()
            except TimeoutError:
                pass
            always = self._asked.is_set()
            self._asked.clear()
            for item in self.items:
                try:
                    # Files may be on a disk that sleeps, or on another machine.
                    await asyncio.to_thread(item.refresh, always=always)
                except Exception:
                    logger.exception("%r could not be refreshed", item)
