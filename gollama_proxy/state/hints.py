"""What hubs report to each other, so that each need not find it out by itself.

Nothing here has to be right, or to arrive: a hub that misses a report finds out later
what it was about, from its own requests.  The numbers are checked all the same, as any
program that has the password of the store can write into it.

A report names each worker and model once, in `places`, and refers to it by its number
there.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from gollama_proxy.state.messages import Message

_Name = Annotated[str, Meta(max_length=1024)]
_Number = Annotated[int, Meta(ge=0, le=2**62)]
_Key = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Rate = Annotated[float, Meta(gt=0, le=1e12)]
_Level = Annotated[int, Meta(ge=0, lt=64)]


class Rates(Struct, array_like=True, frozen=True):
    """How fast a worker reads and writes a model, as one hub has learnt it."""

    place: _Number
    reads: Annotated[float, Meta(ge=0, le=1e12)]  # bytes/s; 0 is not known
    writes: dict[_Level, _Rate]  # tokens/s of each answer, by the number of answers
    tokens: _Rate  # of an answer, on average


class Visit(Struct, array_like=True, frozen=True):
    """A turn of a conversation that a worker got.  The keys are hashes, not text."""

    place: _Number
    keys: Annotated[tuple[_Key, ...], Meta(min_length=1, max_length=64)]
    before: _Key  # the longest one of the turn before; 0 if there was none
    size: _Number  # bytes of the request


class Report(Message):
    """What one hub has found out in the last moments."""

    hub: _Name  # the run id of the hub
    name: _Name = ""  # for people
    places: tuple[
        tuple[_Name, _Name], ...
    ] = ()  # worker, model; "" is the worker itself
    opened: tuple[_Number, ...] = ()  # places whose breakers have opened
    rates: tuple[Rates, ...] = ()
    visits: tuple[Visit, ...] = ()
