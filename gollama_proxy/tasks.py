"""The one way to start a task: it has a name, is kept, and does not die unheard."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# The event loop keeps only weak references: without another, a task may vanish.
_running: set[asyncio.Task[Any]] = set()


def spawn(coroutine: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
    """Start a task; whoever starts it also ends it, or waits for it.

    An error that ends it is logged, whether or not somebody waits.
    """
    task = asyncio.create_task(coroutine, name=name)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("task %s failed", task.get_name(), exc_info=error)
