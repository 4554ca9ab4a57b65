"""The access log of a hub in this process, as data."""

from __future__ import annotations

import logging
from collections import defaultdict
from types import TracebackType
from typing import Any, Self

from gollama_proxy.telemetry.accesslog import access


class Books(logging.Handler):
    """Keeps each record by the id of its request; use it with `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.records: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self.count = 0
        self._level_before = access.level

    def __repr__(self) -> str:
        return f"<Books of {self.count} requests>"

    def emit(self, record: logging.LogRecord) -> None:
        fields = record.__dict__["fields"]
        self.records[fields["id"]].append(fields)
        self.count += 1

    def __enter__(self) -> Self:
        access.addHandler(self)
        access.setLevel(logging.INFO)
        access.propagate = False  # or each line would be shown with a failure, too
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        access.removeHandler(self)
        access.setLevel(self._level_before)
        access.propagate = True
