"""A hub of some later release: `python -m tests.fakes.newer serve …`.

All of its messages to other hubs have another format.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from gollama_proxy.cli import main
from gollama_proxy.state.facts import Message


def formats(base: type[Message] = Message) -> Iterator[type[Message]]:
    for kind in base.__subclasses__():
        yield kind
        yield from formats(kind)


if __name__ == "__main__":
    import gollama_proxy.cluster  # noqa: F401

    for each in formats():
        each.version += 1
    sys.exit(main(sys.argv[1:]))
