"""What tests ask for, where it does not matter what."""

from __future__ import annotations

from typing import Any

from gollama_proxy.wire.openai import ENDPOINTS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WHOLE: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = WHOLE | {"stream": True}
# Routes that take JSON; the others take a form such as this one.
JSON_ROUTES = [path for path, endpoint in ENDPOINTS.items() if not endpoint.form]
FORM_TYPE = "multipart/form-data; boundary=x"
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\r\n--x--'
)
RARELY = 3600  # seconds between pings: no test sees two by themselves
