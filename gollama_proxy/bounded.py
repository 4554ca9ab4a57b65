"""What is known of names, of which there may be any number.

A worker can be said to serve `qwen*`, and then every client can make up models; and a
worker can list others at each ping.  So what is kept by a model's name is kept of so
many only.  Who is forgotten is learnt anew when somebody asks for it again.
"""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST = 1000  # names; a router of llama-server with all of its presets has some 100


class Remembered(dict[K, V]):
    """A dict that forgets its oldest entry when it gets one too many."""

    __slots__ = ("most",)

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.most and key not in self:
            del self[next(iter(self))]
        super().__setitem__(key, value)
