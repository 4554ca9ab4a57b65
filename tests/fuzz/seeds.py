"""What the fuzzers begin with: every shape that the readers know, and old mistakes."""

from __future__ import annotations

from tests.fakes import replies
from tests.fakes.replies import (
    chunk,
    done,
    event,
    finish,
    head,
    named_event,
    ping,
    role,
    sse_head,
    token,
)

_DEEP = 100_000
_CUT = b"\x00\x00"

_WHOLE = role() + token(" a") + token(" \xe9") + finish() + done()
_TEXT = event(replies.text_completion(" a", reason=None, last=False))
_ERROR = event({"error": {"code": 500, "message": "no", "type": "server_error"}})
_CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f"}}
_CALLS = event(
    {"choices": [{"index": 0, "delta": {"tool_calls": [_CALL]}, "finish_reason": None}]}
)

_REQUESTS = (
    b"{}",
    b'{"model":"tiny","messages":[{"role":"user","content":"hello"}],"stream":true}',
    b'{"model":"tiny","prompt":"Once","max_tokens":7,"stream":false}',
    b' {\r\n"model" :\t"a\\u0062c" , "n_predict" : -1, "tokens":[1,2] }\n',
    b'{"model":"a","stream":true,"stream_options":{ "include_usage" : false }}',
    b'{"model":"a","stream_options":{"include_usage":true,"x":[1]}}',
    b'{"model":null,"fallbacks":["a","b"],"messages":[]}',
    b'{"model":"a","model":"b"}',
    b'{"model":"a","mod\\u0065l":"b"}',
    b'{"model":"\\ud800"}',
    b'{"model":"\\ud83e\\udd8a","x":"\\ud800"}',
    b'{"\\udc00":1,"model":"a"}',
    b'{"model":"a","seed":' + b"9" * 5000 + b"}",
    b'{"model":"a","max_tokens":1' + b"0" * 30 + b"}",
    b'{"model":"a","temperature":NaN}',
    b'{"model":"a","temperature":-Infinity}',
    b'{"model":"a","temperature":1e999,"max_tokens":1E5}',
    b'\xef\xbb\xbf{"model":"a"}',
    b'{"model":"\xff"}',
    b'{"model":"a\x00b"}',
    b'{"model":"a"}\x00',
    b'{"model":"a","x":' + b"[" * 200 + b"]" * 200 + b"}",
    b'{"model":"a","x":' + b"[" * _DEEP,
    b'{"x":' * _DEEP,
    b'{"model":"a","x":"' + b"\\" * 5001 + b'"}',
    b'{"model":"a",}',
    b'{"model":"a" "stream":true}',
    b'{"stream":tru',
    b'{"stream":01,"model":"a"}',
    b"[]",
    b'"model"',
    b"",
    b"{",
)
_STREAMS = (
    _WHOLE,
    _WHOLE.replace(b"\n", b"\r\n"),
    _WHOLE.replace(b"\n", b"\r"),
    ping() + b": comment\n\nretry: 5\n\n" + _WHOLE,
    b"\xef\xbb\xbf" + _WHOLE,
    role() + _CALLS + finish("tool_calls") + done(),
    role() + finish("stop", usage=replies.usage_of(1)) + done(),
    _TEXT + event(replies.text_completion("")) + done(),
    role() + _ERROR,
    role() + token("a")[:-20],
    b'data: {"choices":[{"index":1,"delta":{"content":"b"}},{"index":0}]}\n\n',
    b'data: {"choices":\ndata: [{"text":"a"}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\ud83e"}}]}\n\n' + done(),
    b'data: {"choices":' + b"[" * _DEEP,
    b"data: null\n\ndata: 1\n\ndata:\n\n" + done(),
    named_event({"type": "message_stop"}),
    b'event: error\ndata: {"error":{"code":"x"}}\n\n',
)
_NAMES = (
    b'{"model":"old"}',
    b'{"a":{"model" : "old"},"model":"other","x":"\\"model\\":\\"old\\""}',
    b'{"model":"\\u006fld","y":["model","old"]}',
    b'data: {"model":"old"}\n\ndata: {"mod',
)
_ANSWERS = (
    replies.json_reply({"n": 1}),
    replies.json_reply({"n": 1}) + replies.json_reply({"n": 2}),
    sse_head() + chunk(role()) + chunk(token("a")) + chunk(done()) + b"0\r\n\r\n",
    sse_head() + b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
    sse_head() + b"5\r\nhello\r\n5\r\nhello0\r\n\r\n",
    sse_head() + b"FFFFFFFFFFFFFFFFF\r\nhello",
    sse_head() + b"-1\r\nhello\r\n0\r\n\r\n",
    sse_head() + b"5\nhello\n0\n\n",
    head(200, [("Content-Length", "5"), ("Content-Length", "5")]) + b"hello",
    head(200, [("Content-Length", "5"), ("Transfer-Encoding", "chunked")])
    + b"0\r\n\r\n",
    head(200, [("Content-Length", "+5")]) + b"hello",
    head(200, version="1.0") + b"hello",
    head(100) + head(100) + replies.json_reply({}),
    head(101, [("Upgrade", "websocket"), ("Connection", "Upgrade")]) + b"frames",
    head(204) + b"body",
    head(302, [("Location", "http://elsewhere/"), ("Content-Length", "0")]),
    b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 O\rK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/0.9 200 OK\r\n\r\nhello",
    b"HTTP/2 200\r\n\r\n",
    b"<html>hello</html>",
)

SEEDS: dict[str, tuple[bytes, ...]] = {
    "request": _REQUESTS,
    "stream": _STREAMS,
    "assembly": _STREAMS,
    "renaming": (*_NAMES, *_REQUESTS[:6], *_STREAMS[:3]),
    "hiding": _STREAMS,
    "transcript": (
        _CUT.join(part + b"\n\n" for part in _WHOLE.split(b"\n\n")),
        _CUT.join([token("a"), token("b\\u0000"), token(""), b"x\n", token("c")]),
    ),
    "rescue": tuple(
        stream[:at] + _CUT + rest
        for stream in _STREAMS[:3]
        for at in (len(role()), len(role()) + 80, len(stream) - len(done()))
        for rest in (_WHOLE, role() + token(" a \xe9 and more") + finish())
    ),
    "answer": _ANSWERS,
}
