"""A place in the waiting line, from its beginning to its one end."""

from __future__ import annotations

import enum

from gollama_proxy.wire.errors import Code, RequestError


class Priority(enum.StrEnum):
    """The classes of requests, the one that is served first at the top."""

    INTERACTIVE = "interactive"
    BATCH = "batch"

    @property
    def rank(self) -> int:
        """Its place among the classes: a lower one is served first."""
        return _RANKS[self]


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}


def choose_priority(asked: str | None, allowed: Priority) -> Priority:
    """Tell the class of a request from what it asks for, if anything.

    `allowed` is the highest class that its token may use, and what it gets unasked.

    Raises:
        RequestError: 400 no such class, 403 one above the allowed.
    """
    if asked is None:
        return allowed
    known = {str(priority): priority for priority in Priority}
    priority = known.get(asked.strip().lower())
    if priority is None:
        text = f"The priority {asked[:40]!r} does not exist; known: {', '.join(known)}."
        raise RequestError(Code.INVALID_VALUE, text)
    if priority.rank < allowed.rank:
        text = (
            f"Your token does not allow the priority {str(priority)!r}, "
            f"only {str(allowed)!r}."
        )
        raise RequestError(Code.PRIORITY_NOT_ALLOWED, text)
    return priority


class State(enum.Enum):
    """Where a ticket is; every one begins by waiting or running, and ends once."""

    WAITING = "waiting"
    RUNNING = "running"
    LEFT = "left"  # while it was waiting
    DISPLACED = "displaced"  # it had to make room for another subject's
    DONE = "done"  # after it was running


class Ticket:
    """One request in the line.  Only the line changes it."""

    __slots__ = ("joined_at", "model", "number", "priority", "state", "subject")

    def __init__(
        self, number: int, subject: str, model: str, priority: Priority, now: float
    ) -> None:
        self.number = number  # of a later ticket it is higher; negative goes first
        self.subject = subject
        self.model = model
        self.priority = priority
        self.joined_at = now  # monotonic seconds
        self.state = State.WAITING

    @property
    def first(self) -> bool:
        """Whether it goes before all others of its class."""
        return self.number < 0

    def __repr__(self) -> str:
        return (
            f"<Ticket {self.number} of {self.subject!r} for {self.model!r} "
            f"{self.priority} {self.state.name}>"
        )
