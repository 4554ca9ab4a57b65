"""What changes while the hub runs: files, and the settings that are read from them.

`Watcher` looks at any files, `Files` has all that the settings of a hub name, and
`compare` finds what another configuration changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from msgspec import structs

from gollama_proxy.config import tls
from gollama_proxy.config.keys import RevocationList, stamp
from gollama_proxy.config.settings import (
    FIXED,
    SECTIONS,
    TLS_KEYS,
    Config,
    Revoked,
    Server,
    WorkerConfig,
)
from gollama_proxy.config.values import masked, shown
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
        return f"<{type(self).__name__} items={len(self._loops)}>"

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


# --- All files --------------------------------------------------------------------


class Files(Watcher):
    """The files that settings name: certificates, revoked tokens, and the settings.

    `reload` is called when the settings file has changed, and `revoke` with another
    list of revoked tokens.  Certificates are read, so making one blocks.
    """

    def __init__(
        self,
        config: Config,
        reload: Callable[[], object] | None,
        revoke: Callable[[Revoked], None],
    ) -> None:
        self._reload = reload
        self._revoke = revoke
        self.for_clients = tls.for_server(config.server)
        # By the files that they are made from, and by the worker that uses them.
        self._credentials: dict[tuple[str, ...], tls.Credentials] = {}
        self._used: dict[Hashable, tls.Credentials] = {}
        tls.for_workers(config.workers, self._credentials)
        self._revoked = self._make_list(config)
        self._settings = self._make_settings(config)
        super().__init__(
            filter(None, (self.for_clients, self._revoked, self._settings))
        )

    def note(self) -> None:
        """Record that the settings file is about to be read; blocks."""
        if self._settings is not None:
            self._settings.note()

    # --- Workers ------------------------------------------------------------------

    async def prepare(self, configs: Sequence[WorkerConfig]) -> None:
        """Read the certificates of workers that will be added.

        Raises:
            ConfigError: a file cannot be used.
        """
        # They may be on a sleeping disk or on another machine.
        await asyncio.to_thread(tls.for_workers, configs, self._credentials)

    def take(self, worker: Hashable, config: WorkerConfig) -> tls.Credentials | None:
        """Return the credentials for a worker, and watch them; None if it has none."""
        known = tls.for_workers([config], self._credentials).get(config.name)
        if known is not None:
            self._used[worker] = known
            if known.renewable:
                self.add(known)
        return known

    def give_back(self, worker: Hashable) -> None:
        self._used.pop(worker, None)

    async def drop_unused(self) -> None:
        """Forget the certificates of workers that were removed."""
        used = self._used.values()
        for files, credentials in list(self._credentials.items()):
            if credentials not in used:
                del self._credentials[files]
                await self.remove(credentials)

    # --- Other settings -----------------------------------------------------------

    async def read(self, before: Config, config: Config) -> tls.Credentials | None:
        """Read the certificates that are new, and return those for clients.

        Raises:
            ConfigError: a file cannot be used.
        """
        await self.prepare(config.workers)
        if _certificate_of(config.server) == _certificate_of(before.server):
            return self.for_clients
        return await asyncio.to_thread(tls.for_server, config.server)

    async def follow(
        self, before: Config, config: Config, credentials: tls.Credentials | None
    ) -> None:
        """Watch other files in place of those that are no longer named."""
        if credentials is not self.for_clients:
            await self._swap(self.for_clients, credentials)
            self.for_clients = credentials
        if config.auth.revoked != before.auth.revoked:
            old, self._revoked = self._revoked, self._make_list(config)
            await self._swap(old, self._revoked)
            self._revoke(config.revoked)
        if config.server.watch_config != before.server.watch_config:
            old_file, self._settings = self._settings, self._make_settings(config)
            await self._swap(old_file, self._settings)

    async def _swap(self, old: Watched | None, new: Watched | None) -> None:
        if old is not None:
            await self.remove(old)
        if new is not None:
            self.add(new)

    def _make_list(self, config: Config) -> RevocationList | None:
        file = config.auth.revoked
        return RevocationList(file, config.revoked, self._revoke) if file else None

    def _make_settings(self, config: Config) -> SettingsFile | None:
        if self._reload is None or not (config.file and config.server.watch_config):
            return None
        return SettingsFile(config.file, self._reload)


def _certificate_of(server: Server) -> tuple[str, str, str]:
    return server.tls_certificate, server.tls_key, server.tls_client_ca


# --- What changes -----------------------------------------------------------------


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


def compare_configs(old: Config, new: Config) -> tuple[Changes, Config]:
    """Return what differs, and `new` as far as it takes effect without a restart."""
    had, has = bool(old.server.tls_certificate), bool(new.server.tls_certificate)
    fixed = FIXED if had == has else FIXED | TLS_KEYS
    settings, restart, merged = [], [], {}
    for section, type_ in SECTIONS.items():
        one, other = getattr(old, section), getattr(new, section)
        kept = {}
        for name in type_.__struct_fields__:
            before, after = getattr(one, name), getattr(other, name)
            if before == after:
                continue
            change = Change(f"{section}.{name}", masked(before), masked(after))
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
