"""What is said between a user and a model stays between them: it is in no `repr`."""

from __future__ import annotations

import msgspec


class Private(msgspec.Struct):
    """A struct that shows its kind, and not what it holds."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"
