"""What a hub answers operators of itself, whether they have asked it or another hub.

An operator asks any hub.  It answers for all of them: `gather` returns its own reply
and those of the others (`control/peers.py`), which `control/merging.py` makes one.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

from gollama_proxy import __version__
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import Changes
from gollama_proxy.control import merging, views
from gollama_proxy.control.calls import answer
from gollama_proxy.control.history import History, Recent, Shown
from gollama_proxy.control.merging import Answers
from gollama_proxy.control.views import Views, in_flight
from gollama_proxy.edge.response import Response
from gollama_proxy.proxy.state import State

# Rows of all hubs that are merged on the event loop: a few milliseconds.
MOST_ROWS = 500
RELOAD = 10.0  # seconds that the processes of a group have for a reload
_MERGE: dict[str, Callable[[merging.ByHub], list[Shown]]] = {
    "workers": merging.merge_workers,
    "models": merging.merge_models,
    "queue": merging.merge_queues,
    "exchanges": merging.merge_exchanges,
}


class Peers(Protocol):
    """The other hubs (`control/peers.py`)."""

    @property
    def name(self) -> str:
        """The name of this hub."""

    @property
    def store(self) -> dict[str, str]:
        """The mode of the store, and the reason of it."""

    @property
    def watched(self) -> bool:
        """Whether events are followed at another hub."""

    async def ask(
        self,
        what: str,
        arguments: Shown | None = None,
        *,
        group: bool = False,
        patience: float | None = None,
    ) -> Answers:
        """Ask the others, or only the processes of this group."""

    async def watch(self, seconds: float) -> None:
        """Have the others send their events for so long."""

    async def send_news(self, events: list[tuple[str, Shown]]) -> None:
        """Send what has happened to those that follow it."""


class Parts(views.Parts, Protocol):
    """The parts of a hub that replies are made of."""

    @property
    def recent(self) -> Recent: ...
    @property
    def history(self) -> History: ...
    @property
    def draining(self) -> bool: ...
    @property
    def peers(self) -> Peers | None:
        """The other hubs; None without a store."""

    async def reload(self) -> Changes:
        """Read the settings again, and apply what has changed."""


class Replies:
    """Answers for this hub, by the name of a question, and gathers those of all."""

    def __init__(self, hub: Parts, views: Views) -> None:
        self._hub = hub
        self._views = views
        self.table: dict[str, Callable[[Shown], Any]] = {
            "hub": self._show_hub,
            "workers": lambda _: [*map(views.worker, hub.registry.workers)],
            "worker": self._show_worker,
            "models": lambda _: views.models(),
            "queue": lambda _: views.queue(),
            "exchanges": lambda _: views.exchanges(),
            "requests": self._find_requests,
            "history": self._show_history,
            "cancel": self._cancel,
            "running": self._list_running,
            "reset": self._reset,
            "reload": self._reload,
        }

    def __repr__(self) -> str:
        return f"<Replies of {self._hub!r}>"

    # --- Of all hubs --------------------------------------------------------------

    async def gather(self, what: str, **arguments: Any) -> Answers:
        """Return what all hubs answer; of a hub without a store, its own answer."""
        own = self.table[what](arguments)
        if inspect.isawaitable(own):
            own = await own
        return await self.gather_others(what, own, arguments)

    async def gather_others(
        self, what: str, own: Any, arguments: Shown, *, group: bool = False
    ) -> Answers:
        """Return what the others answer, besides what this hub has done already."""
        peers = self._hub.peers
        if peers is None:
            return Answers({"": own}, [])
        patience = RELOAD if what == "reload" else None
        found, missing = await peers.ask(
            what, arguments, group=group, patience=patience
        )
        return Answers({peers.name: own, **found}, missing)

    async def list_all(self, what: str) -> Response:
        """Answer with the workers, models, queue or exchanges of all hubs."""
        gathered = await self.gather(what)
        replies = gathered.found
        if self._hub.peers is None:
            return answer({what: replies[""]})
        merge = _MERGE[what]
        count = sum(len(each) for each in replies.values() if isinstance(each, list))
        if count > MOST_ROWS:
            rows = await asyncio.to_thread(gathered.merge, merge)
        else:
            rows = gathered.merge(merge)
        return answer({what: rows} | gathered.note)

    async def show_worker(self, name: str, own: Shown | None) -> Shown | None:
        """Return how all hubs show a worker; None if none of them knows it."""
        if self._hub.peers is None:
            return own
        gathered = await self.gather_others("worker", own, {"name": name})
        shown = gathered.merge(merging.merge_known)
        return None if shown is None else shown | gathered.note

    async def list_hubs(self) -> Shown:
        """Return the hubs that are alive, by name, and the mode of the store."""
        peers, own = self._hub.peers, self._show_hub({})
        if peers is None:
            return {"store": None, "hubs": [own]}
        found, missing = await peers.ask("hub")
        gathered = Answers({peers.name: own, **found}, missing)
        hubs = gathered.merge(
            lambda found: [found[name] | {"hub": name} for name in sorted(found)]
        )
        return {"store": peers.store, "hubs": hubs} | gathered.note

    # --- Of this hub --------------------------------------------------------------

    def _show_hub(self, _: Shown) -> Shown:
        figures = merging.figures_of_hub("", self._hub.history.latest)
        return figures | {"version": __version__, "draining": self._hub.draining}

    def _show_worker(self, arguments: Shown) -> Shown | None:
        try:
            worker = self._hub.registry.find(str(arguments["name"]))
        except LookupError:
            return None
        return self._views.worker(worker)

    def _find_requests(self, arguments: Shown) -> list[Shown]:
        until = arguments["until"]
        return self._hub.recent.find(
            arguments["limit"],
            arguments["since"],
            math.inf if until is None else until,
            **arguments["wanted"],
        )

    async def _show_history(self, arguments: Shown) -> Shown:
        history = self._hub.history
        seconds, step, names = (arguments[k] for k in ("seconds", "step", "workers"))
        shown: Shown = {"time": history.time, "step": step}
        shown["hub"] = history.of_hub(seconds, step)
        shown["workers"] = {}
        for name in history.names if "*" in names else names:
            columns = history.of_worker(name, seconds, step)
            if columns is not None:
                shown["workers"][name] = columns
            await asyncio.sleep(0)  # a millisecond each
        return shown

    def _cancel(self, arguments: Shown) -> list[list[str]]:
        """Cancel the requests with an id; clients may repeat one.

        Returns the state and the subject of each.
        """
        found = [
            x
            for x in in_flight(self._hub.proxy.running)
            if x.id == arguments["id"]
            and (x.state is State.QUEUED or not arguments["waiting"])
        ]
        cancelled = [[x.state.name.lower(), x.subject] for x in found]
        for x in found:
            self._hub.proxy.cancel(x)
        return cancelled

    def _list_running(self, arguments: Shown) -> list[str]:
        """Return the ids of a subject's requests; cancel them on demand."""
        subject = arguments["subject"]
        everything = in_flight(self._hub.proxy.running)
        running = [x for x in everything if x.subject == subject]
        for x in running if arguments["cancel"] else ():
            self._hub.proxy.cancel(x)
        return [x.id for x in running]

    def _reset(self, arguments: Shown) -> None:
        try:
            self._hub.registry.find(str(arguments["name"])).reset_breakers()
        except LookupError:
            return

    async def _reload(self, _: Shown) -> str:
        """Have the settings read again; return what is wrong with them, if anything."""
        try:
            await self._hub.reload()
        except ConfigError as exc:
            return "; ".join(exc.args)
        return ""
