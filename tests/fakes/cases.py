"""Many cases in one test, where each would need the same hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def case(name: object) -> Iterator[None]:
    """Name the case with whatever fails in the block."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"The case: {name!r}")
        raise
