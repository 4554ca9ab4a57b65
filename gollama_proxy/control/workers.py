"""Workers that change at run time: by operators, and as the state has them.

Operators call `/admin/workers`, and one path below it for each.  Workers that are added
or changed there are kept in the state folder; those of the settings file return to its
settings at the next reload or start.  With a store, all hubs that run follow a change:
of added workers through the state that they share, of others because they are asked to.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.load import load_worker
from gollama_proxy.config.settings import API_KEYS, WORKER_KEYS, Revoked, WorkerConfig
from gollama_proxy.config.values import ConfigError
from gollama_proxy.control import Parts
from gollama_proxy.control.replies import AdminCall, CallHandler, answer
from gollama_proxy.control.views import Views
from gollama_proxy.edge.response import Response
from gollama_proxy.fleet.registry import check_single
from gollama_proxy.fleet.state import Hold, Source
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.state.facts import Key, StoredWorker
from gollama_proxy.state.folder import StateError
from gollama_proxy.tasks import spawn
from gollama_proxy.wire.errors import Code, RequestError

logger = logging.getLogger(__name__)

# These lead to files or variables of the hub's machine, whose content would be sent to
# an address that the caller chooses.  The scope `admin` does not include the machine.
_FILES = ("api_key_file", "ca_file", "client_certificate", "client_key")
_KEY_PREFIX = "GOLLAMA_KEY_"


class Workers:
    """Shows, adds, changes and removes workers, and holds them back."""

    def __init__(self, hub: Parts, views: Views) -> None:
        self._hub = hub
        self._views = views
        self._record = hub.events.record_change
        hub.replies.table["change worker"] = self._change_here
        hub.replies.table["remove worker"] = self._remove_here

    def __repr__(self) -> str:
        return f"<Workers of {self._hub!r}>"

    def routes(self) -> dict[str, dict[str, CallHandler]]:
        """Return the handlers of all paths."""
        registry, listing = self._hub.registry, self._hub.replies.listing
        pause, unpause, drain, undrain = (
            self._holding(partial(change, hold=hold))
            for hold in (Hold.PAUSED, Hold.DRAINING)
            for change in (registry.hold, registry.release)
        )
        return {
            "/admin/workers": {"GET": listing("workers"), "POST": self._add_worker},
            "/admin/workers/{name}": {
                "GET": self._show_worker,
                "PATCH": self._change_worker,
                "DELETE": self._remove_worker,
            },
            "/admin/workers/{name}/drain": {"POST": drain},
            "/admin/workers/{name}/undrain": {"POST": undrain},
            "/admin/workers/{name}/pause": {"POST": pause},
            "/admin/workers/{name}/unpause": {"POST": unpause},
            "/admin/workers/{name}/reset-breaker": {"POST": self._reset_breaker},
            "/admin/workers/{name}/wake": {"POST": self._wake},
        }

    async def _show_worker(self, call: AdminCall) -> Response:
        name, local = call.name, self._hub.replies
        shown = await local.show_worker(name, local.table["worker"]({"name": name}))
        if shown is None:
            raise _unknown(name)
        return answer(shown)

    def _worker(self, name: str) -> Worker:
        """Return the worker that a path names.

        Raises:
            RequestError: 404, there is none.
        """
        if (worker := self._hub.registry.get(name)) is None:
            raise _unknown(name)
        return worker

    async def _add_worker(self, call: AdminCall) -> Response:
        row = await call.read()
        config = _load(row)
        async with self._hub.changing:
            await self._prepare(config)
            try:
                worker = self._hub.registry.add(config, Source.ADMIN)
            except ConfigError as exc:
                raise _refusal(exc, Code.CONFLICT) from None
            try:
                await self._store(worker, row)
            except RequestError:
                self._hub.registry.remove(worker.name)
                raise
        self._record(call.x, "add worker", worker.name, new=config.url)
        own = self._views.worker(worker)
        shown = await self._hub.replies.show_worker(worker.name, own)
        return answer(shown, status=201)

    async def _change_worker(self, call: AdminCall) -> Response:
        patch = await call.read()
        async with self._hub.changing:
            worker = self._worker(call.name)
            before = worker.config
            row, config = self._patched(worker, patch)
            await self._prepare(config)
            try:
                worker = self._hub.registry.replace(config, before.name)
            except ConfigError as exc:
                raise _refusal(exc, Code.CONFLICT) from None
            if worker.source is Source.ADMIN:
                if worker.name != before.name:
                    await self._hub.state.forget(before.name)
                await self._store(worker, row)
        if worker.source is not Source.ADMIN:
            await self._ask_others("change", before.name, patch)
        if config == before:
            return await self._show_changed(worker, note=False)
        changes = {key: _changed(before, config, key) for key in patch}
        old = {key: pair[0] for key, pair in changes.items()}
        new = {key: pair[1] for key, pair in changes.items()}
        self._record(call.x, "change worker", before.name, old, new)
        return await self._show_changed(worker)

    def _patched(
        self, worker: Worker, patch: Mapping[str, Any]
    ) -> tuple[dict[str, Any], WorkerConfig]:
        """Return the table and the settings of a worker with a change.

        Raises:
            RequestError: 400.
        """
        _refuse_member(worker)
        before, row = worker.config, self._row_of(worker)
        if worker.source is Source.AGENT and not {"name", "url"}.isdisjoint(patch):
            key = "name" if "name" in patch else "url"
            text = f"workers.{key}: is set by the agent of this worker."
            raise RequestError(Code.INVALID_VALUE, text, param=key)
        row = {k: v for k, v in {**row, **patch}.items() if v is not None}
        config = _load(row, ours=patch.keys())
        keyless = "api_key_env" not in row and "api_key_env" not in patch
        if keyless and config.origin == before.origin:
            # From the settings.  It is not sent to any other address.
            config = replace(config, api_key=before.api_key)
        return row, config

    async def _ask_others(
        self, what: str, name: str, patch: Mapping[str, Any] | None = None
    ) -> None:
        """Have other hubs do the same with a worker that is not kept in the state."""
        arguments = {"name": name, "patch": patch}
        await self._hub.replies.gather_others(f"{what} worker", None, arguments)

    async def _change_here(self, arguments: Mapping[str, Any]) -> None:
        """Follow a change at another hub, of a worker of the file or of an agent."""
        name = str(arguments["name"])
        try:
            async with self._hub.changing:
                worker = self._worker(name)
                if worker.source is not Source.ADMIN:
                    _, config = self._patched(worker, arguments["patch"])
                    await self._prepare(config)
                    self._hub.registry.replace(config, name)
        except (RequestError, ConfigError) as exc:
            text = "worker %s: a change at another hub does not fit here: %s"
            logger.warning(text, name, exc)

    async def _remove_here(self, arguments: Mapping[str, Any]) -> None:
        """Follow the removal of a worker of the file at another hub."""
        name = str(arguments["name"])
        async with self._hub.changing:
            worker = self._hub.registry.get(name)
            if worker is not None and worker.source is Source.FILE:
                self._hub.registry.remove(name)

    async def _remove_worker(self, call: AdminCall) -> Response:
        async with self._hub.changing:
            worker = self._worker(call.name)
            self._hub.registry.remove(worker.name)
            await self._hub.state.forget(worker.name)
        if worker.source is Source.FILE:
            await self._ask_others("remove", worker.name)
        self._record(call.x, "remove worker", worker.name, old=worker.config.url)
        state = "draining" if worker.in_flight else "removed"
        note = _NOTES.get(worker.source)
        return answer({"name": worker.name, "state": state, "note": note})

    def _holding(self, change: Callable[[str], Worker]) -> CallHandler:
        """Make a handler that holds a worker back, or releases it; may be repeated."""

        async def hold(call: AdminCall) -> Response:
            async with self._hub.changing:
                worker = self._worker(call.name)
                before = worker.held
                change(worker.name)
                if worker.held is not before:
                    await self._store(worker)
            if worker.held is not before:
                self._record(call.x, "hold worker", worker.name, before, worker.held)
            return await self._show_changed(worker, note=False)

        return hold

    async def _reset_breaker(self, call: AdminCall) -> Response:
        worker = self._worker(call.name)
        before = worker.breaker.state.value
        worker.reset_breakers()
        arguments = {"name": worker.name}
        await self._hub.replies.gather_others("reset", None, arguments)
        self._record(call.x, "reset breaker", worker.name, before, "closed")
        return await self._show_changed(worker, note=False)

    async def _wake(self, call: AdminCall) -> Response:
        worker = self._worker(call.name)
        before = worker.state
        try:
            self._hub.wake(worker.name)
        except ConfigError as exc:
            text = f"{exc}, so its machine cannot be woken."
            raise RequestError(Code.INVALID_VALUE, text, param="mac") from None
        if worker.state is not before:
            self._record(
                call.x, "wake worker", worker.name, before.value, worker.state.value
            )
        return await self._show_changed(worker, note=False)

    async def _show_changed(self, worker: Worker, *, note: bool = True) -> Response:
        text = _NOTES.get(worker.source) if note else None
        own = self._views.worker(worker)
        shown = await self._hub.replies.show_worker(worker.name, own)
        return answer({"worker": shown, "note": text})

    async def _prepare(self, config: WorkerConfig) -> None:
        try:
            await self._hub.files.prepare([config])
        except ConfigError as exc:
            raise _refusal(exc) from None

    def _row_of(self, worker: Worker) -> dict[str, Any]:
        """Return the `[[workers]]` table of a worker, without its API key."""
        stored = self._hub.state.find(worker.name)
        if stored is not None and stored.settings:
            return {**stored.settings, "name": worker.name}
        values = {
            key: getattr(worker.config, key)
            for key in WORKER_KEYS
            if key not in API_KEYS
        }
        return {key: value for key, value in values.items() if value}

    async def _store(
        self, worker: Worker, row: Mapping[str, Any] | None = None
    ) -> None:
        """Keep a worker and its hold over a restart; for one of the file, its hold.

        Raises:
            RequestError: 409, there is no more room.
        """
        name, state = worker.name, self._hub.state
        stored = state.find(name) or StoredWorker(name, worker.source)
        if row is not None:
            settings = {key: value for key, value in row.items() if key != "name"}
            stored = replace(stored, source=worker.source, settings=settings)
        hold = "" if worker.held is Hold.NONE else worker.held.value
        stored = replace(stored, hold=hold)
        try:
            if stored.settings or stored.hold:
                await state.put(stored)
            else:
                await state.forget(name)
        except StateError as exc:
            raise RequestError(Code.CONFLICT, f"{exc}.") from None


def _unknown(name: str) -> RequestError:
    text = f"No worker is named {name[:200]!r}."
    return RequestError(Code.NOT_FOUND, text, param="name")


_NOTES = {
    Source.FILE: "This worker is declared in the settings, which take precedence "
    "at the next reload or start.",
    Source.AGENT: "The agent of this worker registers it again, with the settings that "
    "the agent has.",
}


def _load(row: Mapping[str, Any], ours: Collection[str] | None = None) -> WorkerConfig:
    """Make a worker of a `[[workers]]` table; `ours` are the keys of the call.

    Raises:
        RequestError: 400.
    """
    _refuse_files(row if ours is None else {key: row.get(key) for key in ours})
    try:
        config = load_worker("workers", row, os.environ)
        check_single(config)
    except ConfigError as exc:
        raise _refusal(exc) from None
    return config


def _refuse_member(worker: Worker) -> None:
    """Refuse to change one worker of a group: all of them have the same settings."""
    if worker.config.parent:
        text = (
            f"The worker {worker.name!r} belongs to the group "
            f"{worker.config.parent!r}; change that in the settings file."
        )
        raise RequestError(Code.INVALID_VALUE, text, param="name")


def _refuse_files(row: Mapping[str, Any]) -> None:
    for key in _FILES:
        if row.get(key) is not None:
            text = f"workers.{key}: names a file of the hub's machine; set it in the "
            raise RequestError(
                Code.INVALID_VALUE, f"{text}settings file instead.", param=key
            )
    variable = row.get("api_key_env")
    if variable is not None and not str(variable).startswith(_KEY_PREFIX):
        text = (
            f"workers.api_key_env: must be a variable whose name begins with "
            f"{_KEY_PREFIX}; others may hold secrets that are not for workers."
        )
        raise RequestError(Code.INVALID_VALUE, text, param="api_key_env")


def _refusal(exc: ConfigError, code: Code = Code.INVALID_VALUE) -> RequestError:
    """Make the error of a worker that cannot be used; it names the first key."""
    text = str(exc)
    match = re.match(r"workers\.(\w+)", text)
    return RequestError(code, text, param=match[1] if match else None)


def _changed(before: WorkerConfig, after: WorkerConfig, key: str) -> tuple[Any, Any]:
    """Return the old and the new value of a key, without secrets."""
    if key in API_KEYS:
        return "hidden", "hidden"
    return getattr(before, key), getattr(after, key)


# --- What is kept in the state ----------------------------------------------------

BATCH = 100  # workers that are followed between two turns of the event loop


class Follower:
    """Keeps the fleet and the revocations of a hub as its state has them.

    Each worker is compared with what is kept by its name, and made to be like that:
    added, changed, removed, held back or released.  So it does not matter how many
    changes there were, in which order they came, or which of them were made here.

    Settings files may differ from hub to hub.  A worker of the file takes precedence at
    its hub over a registered one of the same name or address, which is then left out
    there, and is put in force as soon as it fits.
    """

    def __init__(self, hub: Parts) -> None:
        self._hub = hub
        self._listed = hub.config.revoked  # in the file of revoked tokens
        self._pending: set[Key] = set()
        # Workers that do not fit, and why.
        self._left_out: dict[str, str] = BoundedDict(1000)
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def __repr__(self) -> str:
        left_out = len(self._left_out)
        return f"<Follower pending={len(self._pending)} left_out={left_out}>"

    def restore(self) -> None:
        """Take up what an earlier hub left in the state folder."""
        self.put_revocations_in_force()
        for stored in self._hub.state.workers:
            if stored.settings:
                self._settle(stored.name, stored)
        self.restore_holds()

    def restore_holds(self) -> None:
        """Hold back the workers that operators have held back, by their names."""
        for worker in self._hub.registry.workers:
            kept = self._hub.state.find(worker.name)
            if kept is not None and kept.hold and worker.held is Hold.NONE:
                worker.hold(Hold(kept.hold))

    # --- Revocations --------------------------------------------------------------

    def follow_list(self, listed: Revoked) -> None:
        """Take up a new list from the file of revoked tokens."""
        self._listed = listed
        self.put_revocations_in_force()

    def put_revocations_in_force(self) -> None:
        stored, listed = self._hub.state.revoked, self._listed
        if stored or listed:
            both = Revoked(
                listed.tokens | stored.tokens, listed.subjects | stored.subjects
            )
            self._hub.authenticator.revoke(both)

    # --- What other hubs have changed ---------------------------------------------

    def follow(self, changed: Iterable[Key]) -> None:
        """Put changes of other hubs in force: revocations now, workers soon."""
        revoked = False
        for key in changed:
            if key[0] in ("worker", "hold"):
                self._pending.add(key)
            else:
                revoked = True
        if revoked:
            self.put_revocations_in_force()
        ready = self._task is None or self._task.done()
        if self._pending and ready and not self._stopped:
            self._task = spawn(self._follow(), "changes of other hubs")

    async def stop(self) -> None:
        """Follow nothing more, and wait until what has come is in force."""
        self._stopped = True
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _follow(self) -> None:
        while self._pending:
            async with self._hub.changing:
                count = min(len(self._pending), BATCH)
                self.settle([self._pending.pop() for _ in range(count)])
                self.retry()
            await asyncio.sleep(0)

    def settle(self, keys: Iterable[Key]) -> None:
        """Make workers be as the state has them; the caller holds `Hub.changing`."""
        for kind, name in sorted(keys, reverse=True):  # first the worker, then its hold
            stored = self._hub.state.find(name)
            if kind == "worker":
                self._settle(name, stored)
            self._settle_hold(name, stored)

    def retry(self) -> None:
        """Try again what did not fit; the caller holds `Hub.changing`."""
        self.settle([("worker", name) for name in self._left_out])

    def _settle(self, name: str, stored: StoredWorker | None) -> None:
        """Add, change or remove a worker; one that does not fit is left out."""
        if stored is None or not stored.settings:
            self._left_out.pop(name, None)
            self._remove(name)
            return
        source = Source(stored.source)
        try:
            config = self._load(stored)
            worker = self._hub.registry.get(name)
            if worker is not None and worker.source is Source.FILE:
                raise ConfigError("the settings file has a worker of this name")
            if worker is not None and worker.source is not source:
                self._hub.registry.remove(name)
                worker = None
            if worker is None:
                self._hub.registry.add(config, source)
                logger.debug("worker %s: added as it is stored", name)
            elif worker.config != config:
                self._hub.registry.replace(config)
        except ConfigError as exc:
            # The settings file has its name or address now, or a key is missing.
            if self._left_out.get(name) != str(exc):
                text = "the stored worker %r is left out: %s"
                logger.warning(text, name, exc)
            self._left_out[name] = str(exc)
            return
        self._left_out.pop(name, None)
        if source is Source.AGENT:
            self._settle_lease(config, stored)

    def _remove(self, name: str) -> None:
        worker = self._hub.registry.get(name)
        if worker is not None and worker.source is not Source.FILE:
            self._hub.registry.remove(name)
            logger.info("worker %s: removed at another hub", name)

    def _load(self, stored: StoredWorker) -> WorkerConfig:
        row = {**stored.settings, "name": stored.name}
        if models := stored.agent.get("models"):
            row.setdefault("models", models)  # while its machine sleeps
        return load_worker(stored.name, row, os.environ)

    def _settle_lease(self, config: WorkerConfig, stored: StoredWorker) -> None:
        digest = str(stored.agent.get("digest", ""))
        sleeping = bool(stored.agent.get("sleeping"))
        lease = self._hub.agents.find(stored.name)
        known = lease is not None and lease.is_of(digest) and lease.worker == config
        if lease is None or not known or lease.sleeping is not sleeping:
            self._hub.agents.restore(config, digest, sleeping=sleeping)

    def _settle_hold(self, name: str, stored: StoredWorker | None) -> None:
        worker, registry = self._hub.registry.get(name), self._hub.registry
        hold = Hold(stored.hold) if stored is not None and stored.hold else Hold.NONE
        if worker is None or worker.held is hold:
            return
        if hold is Hold.NONE:
            registry.release(name, worker.held)
        else:
            registry.hold(name, hold)
        text = {Hold.NONE: "released", Hold.DRAINING: "drained", Hold.PAUSED: "paused"}
        logger.info("worker %s: %s at another hub", name, text[hold])
