"""What two turns of one conversation have in common.

The next turn of a conversation repeats all that was said before, and a worker that
still has it in its prompt cache reads only what is new.  The turns look like this (S
system, U user, A assistant):

    1st turn    S U |
    2nd turn    S U | A U |
    3rd turn    S U | A U | A U |

A bar is a *boundary*, a place where an answer was asked for: before each answer, and at
the end.  `prefixes()` gives the hash of all that is before each of them.  The answer
itself need not be known: what is before the last boundary of this turn will be before
the last but one of the next.  Who remembers all the prefixes of a request, and looks
for those of the next one, the longest first, will find it.  A client that rewrites its
last message in every turn is found one boundary earlier.

A system prompt alone is what thousands of conversations begin with.  No answer is asked
for behind it, so it is no boundary; not even where a greeting follows it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

BOUNDARIES = 8  # of one request, counted from its end

_INSTRUCTIONS = frozenset({"system", "developer"})


class _Message(msgspec.Struct):
    role: str = ""


_array = msgspec.json.Decoder(list[msgspec.Raw])
_message = msgspec.json.Decoder(_Message)


def prefixes(
    messages: bytes | Sequence[bytes | msgspec.Raw], limit: int = BOUNDARIES
) -> tuple[int, ...]:
    """Hash what is before each boundary of a conversation, the shortest first.

    `messages` is the JSON array or its items, byte for byte as the client sent them.
    What is no array of messages has no prefixes.  The hashes mean something in this
    process only: Python keys them anew in each, so that no client can aim at one.
    """
    try:
        items = _array.decode(messages) if isinstance(messages, bytes) else messages
        roles = [_message.decode(item).role for item in items]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    found: deque[int] = deque(maxlen=limit)
    rolled = 0
    following = [*roles[1:], "assistant"]
    for number, item in enumerate(items):
        rolled = hash((rolled, bytes(item)))
        alone = number == 0 and roles[0] in _INSTRUCTIONS
        if following[number] == "assistant" and not alone:
            found.append(rolled)
    return tuple(found)
