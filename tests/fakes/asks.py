"""What tests ask for, where it does not matter what."""

from __future__ import annotations

from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WHOLE: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = WHOLE | {"stream": True}
RARELY = 3600  # seconds between pings: no test sees two by themselves
