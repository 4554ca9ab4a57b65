"""Tables by names that clients and workers choose, with a limit to their size.

A worker can be configured to serve `qwen*`, and then clients can invent any number of
models; and a worker can list other models at each health check.  So what is kept by the
name of a model is kept for a limited number of names.  What was dropped is learnt again
when a request needs it.
"""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST = 1000  # names; llama-server's router mode with all of its presets has about 100


class BoundedDict(dict[K, V]):
    """A dict that drops its oldest entry when it gets one too many."""

    __slots__ = ("most",)

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most

    def __repr__(self) -> str:
        return f"<BoundedDict {len(self)} of {self.most}>"  # clients choose the keys

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.most and key not in self:
            del self[next(iter(self))]
        super().__setitem__(key, value)
