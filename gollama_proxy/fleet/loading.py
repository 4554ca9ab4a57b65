"""Follows how far workers have loaded their models, while there is something to follow.

llama-server's router mode loads a model when a request names it, which can take
minutes.  Current versions report the progress as events.  Such a stream occupies one of
the worker's threads, so it is open only while a model is loading there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from gollama_proxy.fleet.registry import Listener
from gollama_proxy.fleet.worker import Worker, WorkerState
from gollama_proxy.tasks import spawn
from gollama_proxy.upstream.client import FetchError

Note = Callable[[str, float | None], None]
Follow = Callable[[Worker, Note], Awaitable[bool]]


class LoadingFeeds(Listener):
    """Opens and closes the streams of all workers; `check` is called every second."""

    def __init__(self, follow: Follow) -> None:
        self._follow = follow
        self._workers: list[Worker] = []
        self._feeds: dict[Worker, asyncio.Task[None]] = {}
        # The builds without such a stream.
        self._without: dict[Worker, str] = {}

    def __repr__(self) -> str:
        return f"<LoadingFeeds open={len(self._feeds)}>"

    def added(self, worker: Worker) -> None:
        if worker not in self._workers:
            self._workers.append(worker)

    def gone(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._without.pop(worker, None)
        if worker in self._feeds:
            self._feeds[worker].cancel()

    def check(self) -> None:
        """Follow each worker that is loading a model, and no other one."""
        for worker in self._workers:
            wanted = worker.state is WorkerState.READY and bool(worker.loading)
            feed = self._feeds.get(worker)
            if feed is not None and not wanted:
                feed.cancel()
            elif feed is None and wanted and self._has_feed(worker):
                task = spawn(self._run(worker), f"loading progress of {worker.name}")
                self._feeds[worker] = task

    async def stop(self) -> None:
        feeds = [*self._feeds.values()]
        for task in feeds:
            task.cancel()
        await asyncio.gather(*feeds, return_exceptions=True)

    def _has_feed(self, worker: Worker) -> bool:
        if not worker.is_llama_server:
            return False
        return self._without.get(worker) != _build(worker)

    async def _run(self, worker: Worker) -> None:
        try:
            if not await self._follow(worker, worker.note_progress):
                self._without[worker] = _build(worker)
        except FetchError:
            pass  # a health check finds out; the progress is merely not known
        finally:
            del self._feeds[worker]
            worker.progress.clear()


def _build(worker: Worker) -> str:
    return worker.description.build if worker.description else ""
