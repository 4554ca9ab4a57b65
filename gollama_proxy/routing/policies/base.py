"""The interface of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gollama_proxy.routing.worker import Worker


class Policy(Protocol):
    """Picks a worker; keeps what state it needs, and knows no sockets and no clock."""

    def pick(self, model: str, available: Sequence[Worker]) -> Worker:
        """Choose one of `available`, which is not empty and in the configured order."""
        ...
