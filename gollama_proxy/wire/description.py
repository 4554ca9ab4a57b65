"""What a health check finds out about a worker."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Check(enum.Enum):
    """What one ping has shown."""

    OK = "ok"
    LOADING = "loading"
    FAILED = "failed"
    REFUSED = "refused"  # nobody listens there


@dataclass(frozen=True, slots=True)
class Model:
    """A model as one worker serves it."""

    name: str
    context: int | None = None  # tokens of one slot
    loaded: bool | None = None  # None where the worker does not tell
    loading: bool = False  # it is about to be loaded


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker told about itself; None where it did not."""

    models: tuple[Model, ...] = ()
    slots: int | None = None
    context: int | None = None  # tokens of one slot
    build: str = ""

    @property
    def identity(self) -> tuple[str, ...]:
        """What changes when another server answers at the same address."""
        return (self.build, *(model.name for model in self.models))
