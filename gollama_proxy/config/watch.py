"""What changes while the hub runs: files, and the settings that are read from them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from msgspec import structs

from gollama_proxy.config.keys import stamp
from gollama_proxy.config.settings import (
    FIXED,
    SECTIONS,
    TLS_KEYS,
    Config,
    WorkerConfig,
)
from gollama_proxy.config.values import shown
from gollama_proxy.tasks import Periodic

PERIOD = 1.0  # seconds between two checks of a file, whatever the traffic


class Watched(Protocol):
    """Something that is made from files."""

    def refresh(self, *, always: bool = False) -> Callable[[], object] | None:
        """Read the files again if they may have changed, or `always`; may block.

        Runs in a thread.  Returns the change that has to be made on the event loop.
        """


class Watcher:
    """Refreshes each item once a second, and at once on request.

    Every item has its own task: a disk that does not answer delays no other item.
    """

    def __init__(self, items: Iterable[Watched]) -> None:
        self._loops: dict[Watched, Periodic] = {}
        # Of each item, what waits until its files have been read.
        self._requested: dict[Watched, list[asyncio.Future[None]]] = {}
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
        _finish(self._requested.pop(item, ()))

    def start(self) -> None:
        self._running = True
        for loop in self._loops.values():
            loop.start()

    async def stop(self) -> None:
        self._running = False
        for loop in self._loops.values():
            await loop.stop()
        for waiting in self._requested.values():
            _finish(waiting)
        self._requested.clear()

    async def reload(self) -> None:
        """Have every item read its files, whether or not they seem changed."""
        if not self._running:
            return
        done = []
        for item, loop in self._loops.items():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._requested.setdefault(item, []).append(future)
            done.append(future)
            loop.wake()
        await asyncio.gather(*done)

    async def _refresh(self, item: Watched) -> None:
        waiting = self._requested.pop(item, [])
        try:
            # The file may be on a sleeping disk or on another machine.
            change = await asyncio.to_thread(item.refresh, always=bool(waiting))
            if change is not None:
                change()
        finally:
            _finish(waiting)


def _finish(waiting: Iterable[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)


# --- The settings -----------------------------------------------------------------


class SettingsFile:
    """The settings file; `changed` is called when it has changed.

    Not before it looks the same at two checks: half of a file can be valid as well.
    """

    def __init__(
        self, file: str, changed: Callable[[], object], now: int | None = None
    ) -> None:
        """Watch a file that has just been read, at `now` in nanoseconds (Unix time)."""
        self._file = Path(file)
        self._changed = changed
        self._read_at = time.time_ns() if now is None else now
        # What it looked like when it was read, and at the last check.
        self._read: tuple[int, ...] | None = None
        self._seen: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"<SettingsFile {self._file}>"

    def note(self) -> None:
        """Record that it is about to be read, as it looks now; blocks."""
        self._read = self._seen = stamp(self._file)

    def refresh(self, *, always: bool = False) -> Callable[[], object] | None:
        """Return `changed` if the file has changed since it was read."""
        before, self._seen = self._seen, stamp(self._file)
        if self._read is None and max(self._seen[:2], default=0) < self._read_at:
            self._read = self._seen
        if self._seen in (self._read, ()) or self._seen != before:
            return None
        self._read = self._seen
        return self._changed


class Change(NamedTuple):
    """A setting with another value."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        if self.key in _SECRET:
            return f"{self.key} has changed"
        return f"{self.key} {shown(self.old)} -> {shown(self.new)}"


class Changes(NamedTuple):
    """What another configuration changes, and what it would change after a restart."""

    settings: tuple[Change, ...] = ()
    restart: tuple[Change, ...] = ()
    # Workers of the file, by name
    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe them in one line."""
        parts = {
            "": map(str, self.settings),
            "workers added: ": self.added,
            "workers replaced: ": self.replaced,
            "workers removed: ": self.removed,
            "needs a restart: ": map(str, self.restart),
        }
        listed = {what: ", ".join(items) for what, items in parts.items()}
        text = "; ".join(what + items for what, items in listed.items() if items)
        return text or "nothing has changed"


HIDDEN = "hidden"
# What is read from files that settings name, and never shown.
_SECRET = {"auth.secrets": "secrets", "auth.public_keys": "public_keys"}


def compare(old: Config, new: Config) -> tuple[Changes, Config]:
    """Return what differs, and `new` as far as it takes effect without a restart."""
    tls = bool(old.server.tls_certificate), bool(new.server.tls_certificate)
    fixed = FIXED if tls[0] == tls[1] else FIXED | TLS_KEYS
    settings, restart, merged = [], [], {}
    for section, type_ in SECTIONS.items():
        one, other = getattr(old, section), getattr(new, section)
        kept = {}
        for name in type_.__struct_fields__:
            before, after = getattr(one, name), getattr(other, name)
            if before == after:
                continue
            change = Change(f"{section}.{name}", before, after)
            if change.key in fixed:
                restart.append(change)
                kept[name] = before
            else:
                settings.append(change)
        merged[section] = structs.replace(other, **kept)
    for key, attribute in _SECRET.items():
        if getattr(old, attribute) != getattr(new, attribute):
            settings.append(Change(key, HIDDEN, HIDDEN))
    added, replaced, removed = _compare_workers(old.workers, new.workers)
    changes = Changes(tuple(settings), tuple(restart), added, replaced, removed)
    return changes, replace(new, **merged)


def _compare_workers(
    old: Sequence[WorkerConfig], new: Sequence[WorkerConfig]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the names of added, replaced and removed workers.

    A worker is replaced if its address stays, or its name: it is shown by the new one.
    """
    origins = {each.origin: each for each in old}
    names = {each.name: each for each in old}
    added, replaced = [], []
    left = dict.fromkeys(old)
    for worker in new:
        before = origins.get(worker.origin) or names.get(worker.name)
        if before is None:
            added.append(worker.name)
            continue
        left.pop(before, None)
        if before != worker:
            replaced.append(worker.name)
    return tuple(added), tuple(replaced), tuple(each.name for each in left)
