"""Questions between hubs: any hub answers operators for all of them.

A hub asks all others at once through a channel of the store, and waits for half a
second at most: what arrives by then is merged, and hubs without an answer are named
(`missing`).  Such a hub may have been killed, and counts as one for some seconds more,
so the next questions wait for it only briefly, until an answer of it arrives.  Only
what `/admin` shows is asked for, so no secret is in a message.

    channel            message
    PREFIX:peers       a question for all hubs, or for one group of processes
    PREFIX:peers:RUN   answers for the hub with this run id; and the events of
                       other hubs, while they are followed there (`watch`)

Nothing is kept in the store.  A message that is lost leaves a hub missing once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from msgspec import field

from gollama_proxy.control.merging import Answers
from gollama_proxy.state import facts
from gollama_proxy.state.facts import Message
from gollama_proxy.state.link import StoreDownError
from gollama_proxy.state.members import Members
from gollama_proxy.state.store import Store
from gollama_proxy.tasks import spawn

logger = logging.getLogger(__name__)

PATIENCE = 0.5  # seconds
BRIEF = 0.05  # seconds for a hub that has not answered the last time
LONG = 16 << 10  # bytes of a message that is worth compressing
# A server drops a subscriber for whom more than 8 MiB wait for a minute, or 32 MiB wait
# (`client-output-buffer-limit pubsub`, Valkey and Redis), so no message comes near.
MOST_SENT = 2 << 20  # bytes of a message, compressed
MOST_READ = 64 << 20  # bytes of one that is decompressed
MOST_HANDLED = 64  # messages at once; further ones are ignored

Events = list[tuple[str, dict[str, Any]]]  # by name


# --- Messages ---------------------------------------------------------------------


class Question(Message):
    """What a hub asks: all hubs (group ""), perhaps without an answer (number 0)."""

    hub: str
    what: str
    number: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    group: str = ""


class Answer(Message):
    """The answer to a question, or why there is none; events have the number 0."""

    hub: str
    number: int = 0
    value: Any = None
    error: str = ""


async def encode(message: Message) -> bytes:
    """Write a message; a long one is compressed, in a thread."""
    data = facts.encode(message)
    if len(data) < LONG:
        return data
    return await asyncio.to_thread(zlib.compress, data, 1)


def inflate(data: bytes) -> bytes:
    """Return a message as it was before it was compressed, if it was; else as it is."""
    if data.startswith(b"{"):
        return data
    decompress = zlib.decompressobj()
    try:
        plain = decompress.decompress(data, MOST_READ)
    except zlib.error:
        return data
    return plain if decompress.eof else b""


# --- Asking and answering ---------------------------------------------------------

Reply = Callable[[dict[str, Any]], Any]
M = TypeVar("M", Question, Answer)

MOST_WATCHED = 60.0  # seconds, after which the other hub asks again


class Peers:
    """Asks the other hubs, and answers them.

    `replies` are what this hub answers, by the name of the question: functions of the
    arguments, whose result may be awaitable.  `take_news` gets what happens at other
    hubs while events are followed here.  `patience` is in seconds, by default
    `PATIENCE`; `clock` returns monotonic ones.
    """

    def __init__(
        self,
        store: Store,
        members: Members,
        replies: Mapping[str, Reply],
        take_news: Callable[[str, Events], object],
        patience: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._channel = store.key("peers")
        self._members = members
        self._replies = replies
        self._take_news = take_news
        self._patience = PATIENCE if patience is None else patience
        self._clock = clock
        self._number = 0
        self._pending: dict[int, _Pending] = {}
        self._silent: set[str] = set()  # runs that have not answered the last time
        self._tasks: set[asyncio.Task[None]] = set()  # that read or answer
        self._watchers: dict[str, float] = {}  # run ids, and until when

    def __repr__(self) -> str:
        return (
            f"<Peers of {self.name} others={len(self._members.others)} "
            f"asked={len(self._pending)}>"
        )

    @property
    def name(self) -> str:
        """The name of this hub."""
        return self._names()[self._members.me.run]

    @property
    def runs(self) -> set[str]:
        """The runs of all hubs that are alive."""
        return {self._members.me.run, *self._members.others}

    def _names(self) -> dict[str, str]:
        """Return the names of all hubs, by their runs.

        Two may have the same one: a process that was killed, and the one that follows
        it; containers with one name of a machine.
        """
        members = [self._members.me, *self._members.others.values()]
        names = {each.run: each.name for each in members}
        for more in ("pid", "run"):
            counts = Counter(names.values())
            for each in members:
                if counts[names[each.run]] > 1:
                    names[each.run] = f"{each.name}/{getattr(each, more)}"
        return names

    @property
    def store(self) -> dict[str, str]:
        """The mode of the store, and the reason of it."""
        return {"mode": self._store.mode.value, "reason": self._store.reason}

    async def start(self) -> None:
        """Listen to the other hubs."""
        await self._store.listen(self._channel, self._take_question)
        own = f"{self._channel}:{self._members.me.run}"
        await self._store.listen(own, self._take_answer)

    async def stop(self) -> None:
        """End what is being answered."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def ask(
        self,
        what: str,
        arguments: dict[str, Any] | None = None,
        *,
        group: bool = False,
        patience: float | None = None,
    ) -> Answers:
        """Ask the other hubs (of this group only, if `group`) and wait for answers.

        A hub that refuses is among the missing ones.
        """
        me = self._members.me
        names = self._names()
        wanted = {
            run: names[run]
            for run, each in self._members.others.items()
            if each.url and (not group or each.group == me.group)
        }
        if not wanted:
            return Answers({}, [])
        self._number += 1
        number = self._number
        # What takes long elsewhere is waited for in any case.
        silent = self._silent if patience is None else ()
        asked = self._pending[number] = _Pending(wanted, silent)
        question = Question(
            hub=me.run,
            what=what,
            number=number,
            arguments=arguments or {},
            group=me.group if group else "",
        )
        try:
            if await self._send(self._channel, question):
                async with asyncio.timeout(patience or self._patience):
                    await asked.expected.wait()
                    async with asyncio.timeout(BRIEF):
                        await asked.complete.wait()
        except TimeoutError:
            self._silent = self._members.others.keys() & (self._silent | asked.left)
        finally:
            del self._pending[number]
        missing = [name for run, name in wanted.items() if run not in asked.answers]
        found = {wanted[run]: value for run, value in asked.answers.items()}
        return Answers(found, missing)

    async def _send(self, channel: str, message: Question | Answer) -> bool:
        """Publish a message; return whether the store has taken it."""
        data = await encode(message)
        if len(data) > MOST_SENT:
            logger.warning("a message to other hubs is too long: %d bytes", len(data))
            return False
        try:
            await self._store.publish(channel, data)
        except StoreDownError as exc:
            logger.debug("a message to other hubs is lost: %s", exc)
            return False
        return True

    # --- What arrives -------------------------------------------------------------

    def _take_question(self, data: bytes) -> None:
        self._handle(self._reply_to(data))

    def _take_answer(self, data: bytes) -> None:
        self._handle(self._read_answer(data))

    def _handle(self, step: Coroutine[Any, Any, None]) -> None:
        if len(self._tasks) >= MOST_HANDLED:
            step.close()
            return
        task = spawn(step, "message of another hub")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, kind: type[M], data: bytes) -> M | None:
        """Read a message of another hub; a long one in a thread."""

        def read() -> M | None:
            return facts.decode(kind, inflate(data), self._channel, MOST_READ)

        message = read() if len(data) < LONG else await asyncio.to_thread(read)
        own = message is None or message.hub == self._members.me.run
        return None if own else message

    async def _read_answer(self, data: bytes) -> None:
        answer = await self._read(Answer, data)
        if answer is None:
            return
        self._silent.discard(answer.hub)
        if asked := self._pending.get(answer.number):
            asked.take(answer)
        elif not answer.number and answer.hub in self._members.others:
            try:
                self._take_news(self._names()[answer.hub], answer.value)
            except Exception:  # it may be of another version
                logger.exception("events of another hub are lost")

    async def _reply_to(self, data: bytes) -> None:
        question = await self._read(Question, data)
        me = self._members.me
        if question is None or question.group not in ("", me.group):
            return
        if question.what == "watch":
            seconds = question.arguments.get("seconds")
            if isinstance(seconds, int | float) and seconds > 0:
                until = self._clock() + min(seconds, MOST_WATCHED)
                self._watchers[question.hub] = until
            return
        answer = Answer(hub=me.run, number=question.number)
        reply = self._replies.get(question.what)
        try:
            if reply is None:
                answer.error = "it is of another version"
            else:
                value = reply(question.arguments)
                answer.value = await value if inspect.isawaitable(value) else value
        except Exception:
            logger.exception("the question %r of another hub failed", question.what)
            answer.error = "it failed"
        channel = f"{self._channel}:{question.hub}"
        if not await self._send(channel, answer) and answer.value is not None:
            answer = Answer(hub=me.run, number=question.number, error="too long")
            await self._send(channel, answer)

    # --- Events -------------------------------------------------------------------

    async def watch(self, seconds: float) -> None:
        """Have the other hubs send their events for so long."""
        if self._members.others:
            arguments = {"seconds": seconds}
            question = Question(
                hub=self._members.me.run, what="watch", arguments=arguments
            )
            await self._send(self._channel, question)

    @property
    def watched(self) -> bool:
        """Whether events are followed at another hub."""
        now = self._clock()
        for run, until in tuple(self._watchers.items()):
            if until <= now:
                del self._watchers[run]
        return bool(self._watchers)

    async def send_news(self, events: Events) -> None:
        """Send what has happened to the hubs at which events are followed."""
        for run in tuple(self._watchers):
            news = Answer(hub=self._members.me.run, value=events)
            await self._send(f"{self._channel}:{run}", news)


class _Pending:
    """A question that waits for its answers."""

    def __init__(self, wanted: Mapping[str, str], silent: Iterable[str]) -> None:
        """Prepare for answers of these runs; the `silent` ones get less time."""
        self.left = set(wanted)
        self.answers: dict[str, Any] = {}
        self.expected = asyncio.Event()  # all but those have answered
        self.complete = asyncio.Event()
        self._silent = self.left.intersection(silent)
        self._note()

    def __repr__(self) -> str:
        return f"<Pending answers={len(self.answers)} left={len(self.left)}>"

    def take(self, answer: Answer) -> None:
        if answer.hub not in self.left:
            return
        self.left.discard(answer.hub)
        if answer.error:
            logger.info("a hub has no answer: %s", answer.error)
        else:
            self.answers[answer.hub] = answer.value
        self._note()

    def _note(self) -> None:
        if self.left <= self._silent:
            self.expected.set()
        if not self.left:
            self.complete.set()
