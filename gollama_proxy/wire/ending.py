r"""How an event stream ended, and how many tokens it took: one reading of its tail.

A relay keeps the last bytes of a stream and has them read once, when it is over.
Nothing here parses the events.  Marks are found by searching the bytes, first for a
plain string, and with a regular expression only where that string occurs.

Generated text cannot be mistaken for a mark: a JSON string holds neither a bare quote
nor a line end (RFC 8259, 7).
"""

from __future__ import annotations

import re

import msgspec

from gollama_proxy.wire.answer import Usage, read_tail
from gollama_proxy.wire.openai import Api, Ending
from gollama_proxy.wire.schema import UNREADABLE, chunk_head, native_head
from gollama_proxy.wire.sse import DONE, Gatherer, data_of, events_in, split_events

# Bytes of a stream's tail that are kept; the last events of llama-server take 1.2 KiB.
TAIL = 1400

_LAST_DONE = b"\n" + DONE
_DONE_LINE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\][\r\n]")
_STOP = re.compile(rb'"stop"\s*:\s*true|"stop_type"\s*:\s*"(?!none)')
_LAST_EVENT = re.compile(
    rb"(?:^|[\r\n])event: ?"
    rb"(?:message_stop|response\.(?:completed|incomplete|failed))[\r\n]"
)
_TRANSCRIPT_DONE = re.compile(rb'"type"\s*:\s*"transcript\.text\.done"')
_REASONS = re.compile(rb'"finish_reason"\s*:\s*(null|""|"[^"]+")')
_ERROR_EVENT = re.compile(
    rb'(?:^|[\r\n])(?:data: ?\{\s*"error"\s*:|event: ?error[\r\n])'
)
# An error anywhere in an event, for the APIs that have no such field otherwise.
_ERROR = re.compile(
    rb"(?:^|[\r\n])data: ?\{[^\r\n]*?"
    rb'(?:"error"\s*:\s*(?:\{|"[^"])|"object"\s*:\s*"error")'
)
_LATER_CHOICE = re.compile(rb'"index"\s*:\s*[1-9]')


class End(msgspec.Struct, gc=False):
    """The end of an answer, read from its tail."""

    complete: bool = False  # it has the mark of a complete answer
    done: bool = False  # it has a `[DONE]`
    failed: bool = False  # the worker sent an error as an event
    rest: bytes = b""  # an unfinished event after the last blank line
    usage: Usage = Usage()

    def __repr__(self) -> str:  # without the text of the unfinished event
        words = [name for name in ("complete", "done", "failed") if getattr(self, name)]
        return f"<End {' '.join(words) or 'incomplete'} rest={len(self.rest)}>"


NOTHING = End()


def read_end(
    tail: bytes,
    ending: Ending,
    api: Api = Api.OPENAI,
    began: bytes = b"",
    answers: int = 1,
) -> End:
    """Read the last bytes of an answer, at least `TAIL` of a longer one.

    `began` is what `answer.beginning` found in its first bytes, and `answers` is how
    many there are to the prompt.
    """
    closed = tail.endswith(_LAST_DONE)
    done = closed or _has_done(tail)
    return End(
        _is_complete(tail, ending, done=done),
        done,
        b"error" in tail and has_error(tail, ending),
        b"" if closed else split_events(tail)[1],
        read_tail(api, tail, began, answers),
    )


def is_complete(tail: bytes, ending: Ending) -> bool:
    """Return whether these bytes have the mark of a complete answer."""
    return _is_complete(tail, ending, done=_has_done(tail))


def _has_done(tail: bytes) -> bool:
    return b"[DONE]" in tail and _DONE_LINE.search(tail) is not None


def _is_complete(tail: bytes, ending: Ending, *, done: bool) -> bool:
    match ending:
        case Ending.DONE:
            complete = done or _has_reason(tail)
        case Ending.STOP:
            complete = b'"stop' in tail and _STOP.search(tail) is not None
        case Ending.NAMED:
            complete = b"event:" in tail and _LAST_EVENT.search(tail) is not None
        case Ending.TRANSCRIPT:
            complete = done or _TRANSCRIPT_DONE.search(tail) is not None
        case _:  # the end of the body is the mark
            complete = True
    if not complete or tail.count(b'"index"') == tail.count(b'"index":0'):
        return complete
    # Events may belong to several choices.
    return _LATER_CHOICE.search(tail) is None or _all_ended(tail, ending)


def _has_reason(tail: bytes) -> bool:
    """Return whether the last finish reason is neither null nor empty."""
    reasons = _REASONS.findall(tail)
    return bool(reasons) and len(reasons[-1]) > 2 and reasons[-1] != b"null"


def has_error(tail: bytes, ending: Ending) -> bool:
    """Return whether one of these events is an error."""
    if b"error" not in tail:
        return False
    if _ERROR_EVENT.search(tail) is not None:
        return True
    named = ending not in (Ending.DONE, Ending.STOP)
    return not named and _ERROR.search(tail) is not None


# --- Several choices --------------------------------------------------------------


def _all_ended(tail: bytes, ending: Ending) -> bool:
    """Return whether each choice in the tail has ended, or none has an end."""
    ended: dict[int, bool] = {}
    for data in events_in(tail):
        for index, ends in ends_in(data, ending).items():
            ended[index] = ended.get(index, False) or ends
    return all(ended.values()) or not any(ended.values())


def ends_in(data: bytes, ending: Ending) -> dict[int, bool]:
    """Map the index of each choice in an event to whether the choice ends there."""
    try:
        if ending is Ending.STOP:
            event = native_head.decode(data)
            return {} if event.index is None else {event.index: event.stop}
        if ending is Ending.DONE:
            choices = chunk_head.decode(data).choices or ()
            return {choice.index: bool(choice.finish_reason) for choice in choices}
    except UNREADABLE:
        pass  # `[DONE]`, or a part of an event
    return {}


# Far above what is ever requested, and longer than the event of any choice.
MOST_CHOICES = 10_000
MOST_HELD = 1 << 20


class Tally:
    """Counts the ends of the choices in a stream that is relayed.

    It reads each event, so it is for requests that ask for several choices.
    """

    __slots__ = ("_asked", "_ended", "_ending", "_gatherer", "_open")

    def __init__(self, ending: Ending, asked: int) -> None:
        self._ending = ending
        self._asked = asked
        self._gatherer: Gatherer | None = Gatherer()  # None once over the limits
        self._open = set[int]()
        self._ended = set[int]()

    def __repr__(self) -> str:
        return f"<Tally {len(self._ended)} of {self._asked} ended>"

    def feed(self, data: bytes) -> None:
        """Take the next piece of the stream."""
        if self._gatherer is None:
            return
        for event in self._gatherer.feed(data):
            for index, ends in ends_in(data_of(event) or b"", self._ending).items():
                if ends:
                    self._ended.add(index)
                self._open.add(index)
        if self._gatherer.size > MOST_HELD or len(self._open) > MOST_CHOICES:
            self._gatherer = None

    def is_complete(self, *, done: bool) -> bool:
        """Return whether all choices have ended; `done` means that `[DONE]` has come.

        A server that sends `[DONE]` may give fewer choices than were asked for, and may
        be one that does not mark the end of each.
        """
        if self._gatherer is None:
            return True
        if done and not self._ended:
            return True
        return self._ended == self._open and (done or len(self._ended) >= self._asked)
