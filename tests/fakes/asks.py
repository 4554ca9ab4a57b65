"""Requests for tests in which the details of the request do not matter."""

from __future__ import annotations

from typing import Any

from gollama_proxy.wire.schema import ENDPOINTS

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
WHOLE: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = WHOLE | {"stream": True}
# Routes that take JSON; the others take a form such as this one.
JSON_ROUTES = [path for path, endpoint in ENDPOINTS.items() if not endpoint.form]
FORM_TYPE = "multipart/form-data; boundary=x"
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\r\n--x--'
)
RARELY = 3600  # seconds between pings, so that none comes during a test
MIB = 1 << 20
