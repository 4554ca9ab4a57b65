"""A request body is read within its limits, and changed only at its model's name."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections import deque
from typing import Any, cast
from unittest.mock import Mock

import pytest
from aiohttp import HttpVersion, web
from aiohttp.http_exceptions import TransferEncodingError
from aiohttp.streams import StreamReader
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.config.settings import Config, Limits, Timeouts
from gollama_proxy.proxy.body import LEAST_RATE, Body, answer_expectation
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.fields import WANTED
from gollama_proxy.wire.schema import ENDPOINTS
from tests.fakes import requests
from tests.fakes.asks import CHAT, EMBED
from tests.fakes.cases import case

BODY = b'{"messages": [{"role":"user"}], "stream":true ,"model" :"qwen", "n": 1}'


class Content:
    """Stands in for aiohttp's stream; the next piece is there when one was taken."""

    def __init__(self, *pieces: bytes, end: bool = True) -> None:
        self._pieces = deque(pieces)
        self._ended = end
        self._fault: Exception | None = None
        self._arrived = asyncio.Event()

    def feed(self, piece: bytes, *, end: bool = False) -> None:
        self._pieces.append(piece)
        self._ended = end
        self._arrived.set()

    def fail(self, fault: Exception) -> None:
        self._fault = fault
        self._arrived.set()

    async def readany(self) -> bytes:
        if self._fault is not None:
            raise self._fault
        while not (self._pieces or self._ended or self._fault):
            self._arrived.clear()
            await self._arrived.wait()
        if self._fault is not None and not self._pieces:  # a piece may have been first
            raise self._fault
        return self._pieces.popleft() if self._pieces else b""

    def read_nowait(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken

    def exception(self) -> Exception | None:
        return self._fault

    def is_eof(self) -> bool:
        """Whether the end has come; unlike at `at_eof`, bytes may be left.

        The end comes with the last piece and not before.
        """
        return self._ended and len(self._pieces) <= 1

    def at_eof(self) -> bool:
        return self._ended and not self._pieces

    @property
    def untouched(self) -> int:
        """Count the pieces that were not read."""
        return len(self._pieces)


def incoming(
    body: Content,
    path: str = CHAT,
    *,
    length: int | None = None,
    grace: float = 10.0,
    limit: int = 1 << 20,
) -> Body:
    headers = {} if length is None else {"Content-Length": str(length)}
    payload = cast(StreamReader, body)
    request = requests.request("POST", path, headers, payload=payload)
    limits, timeouts = Limits(body=limit), Timeouts(body=grace)
    return Body(request, ENDPOINTS[path], Config(limits=limits, timeouts=timeouts))


def pieces_of(body: bytes, size: int) -> list[bytes]:
    return [body[at : at + size] for at in range(0, len(body), size)]


async def read_whole(body: bytes, path: str = CHAT) -> Body:
    """Read a body that fits into the window; its end comes a moment later."""
    read = incoming(Content(body, b""), path, length=len(body))
    await read.read(1 << 20)
    assert read.complete
    return read


async def rest_of(read: Body) -> list[bytes]:
    return [piece async for piece in read.rest()]


def refusal(error: pytest.ExceptionInfo[RequestError]) -> tuple[Code, str | None]:
    return error.value.code, error.value.param


# --- The fields -------------------------------------------------------------------


async def test_the_fields_for_routing_are_found() -> None:
    read = await read_whole(BODY)
    assert (read.model, read.stream) == ("qwen", True)
    read = await read_whole(b'{"stream": false, "model": null}')
    assert (read.model, read.stream) == (None, False)
    read = await read_whole(b'{"messages": []}')
    assert (read.model, read.stream) == (None, False)
    read = await read_whole(rb'{"model":"Zo\u00eb"}')
    assert read.model == "Zoë"


_VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 7, -1, 1.5, 10**18, 10**30, "", "7", "m"]),
    st.sampled_from([[], [1], ["a", "b"], {}, {"a": 1}, "ë", "\ud800", 'a"\\']),
)
_FIELDS = st.sampled_from([*sorted(WANTED), "prompt", "input"])


@given(st.dictionaries(_FIELDS, _VALUES, max_size=5), st.sampled_from([CHAT, EMBED]))
def test_a_body_means_the_same_in_one_piece_and_in_several(
    wanted: dict[str, Any], path: str
) -> None:
    async def outcome(*pieces: bytes) -> Any:
        read = incoming(Content(*pieces), path)
        try:
            await read.read(1 << 20)
        except RequestError as error:
            return error.code, error.param
        return (
            (read.model, read.stream, read.fallbacks, read.prompts, read.answers),
            (read.max_tokens, read.converses, read.size, read.replayable),
            read.named("m"),
            read.prefixes(b""),
        )

    body = json.dumps(wanted).encode()
    whole = asyncio.run(outcome(body))
    assert whole == asyncio.run(outcome(body[:5], body[5:]))
    assert whole == asyncio.run(outcome(body, b""))


async def test_a_field_of_the_wrong_type_is_named() -> None:
    for path, body, param in [
        (CHAT, '{"model": 7}', "model"),
        (CHAT, '{"model": ["qwen"]}', "model"),
        (CHAT, '{"model": {"a": 1}}', "model"),
        (CHAT, '{"model": true}', "model"),
        (CHAT, '{"stream": "true"}', "stream"),
        (CHAT, '{"stream": 1}', "stream"),
        (CHAT, '{"stream": []}', "stream"),
        (CHAT, '{"messages": "hello"}', "messages"),
        (CHAT, '{"messages": {"role": "user"}}', "messages"),
        (CHAT, '{"messages": null}', "messages"),
        (CHAT, '{"max_tokens": "7"}', "max_tokens"),
        (CHAT, '{"max_tokens": [7]}', "max_tokens"),
        (CHAT, '{"max_completion_tokens": true}', "max_completion_tokens"),
        (CHAT, '{"fallbacks": "small"}', "fallbacks"),
        (CHAT, '{"fallbacks": null}', "fallbacks"),
        (CHAT, '{"fallbacks": {"small": 1}}', "fallbacks"),
        (CHAT, '{"fallbacks": [7]}', "fallbacks"),
        (CHAT, '{"fallbacks": ["a", null]}', "fallbacks"),
        (CHAT, '{"fallbacks": [["a"]]}', "fallbacks"),
        (CHAT, json.dumps({"fallbacks": ["a"] * 9}), "fallbacks"),
        ("/v1/embeddings", '{"model": "m", "fallbacks": 7}', "fallbacks"),
        ("/completion", '{"n_predict": "7"}', "n_predict"),
        ("/v1/rerank", '{"documents": "a"}', "documents"),
        ("/detokenize", '{"tokens": "a"}', "tokens"),
    ]:
        with case((path, body, param)):
            with pytest.raises(RequestError, match=f"`{param}` must be") as error:
                await read_whole(body.encode(), path)
            assert refusal(error) == (Code.INVALID_VALUE, param)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, '{"stream": null, "model": null, "max_tokens": null}'),
        (CHAT, '{"max_tokens": 7, "max_completion_tokens": -1, "n_predict": 1e2}'),
        (CHAT, '{"documents": 7, "tokens": "x"}'),  # are none of this route's
        ("/v1/completions", '{"messages": "whatever"}'),
        ("/v1/rerank", '{"documents": []}'),
        ("/detokenize", '{"tokens": [1]}'),
    ],
)
async def test_what_a_route_does_not_need_is_left_to_the_worker(
    path: str, body: str
) -> None:
    read = await read_whole(body.encode(), path)
    assert json.loads(read.named("qwen")) == {**json.loads(body), "model": "qwen"}


NO_JSON = [
    b"",
    b" ",
    b"[]",
    b'"text"',
    b"null",
    b"{",
    b'{"a"',
    b'{"a":1',
    b'{"a":1}x',
    b'{"a":1}{}',
    b"{a:1}",
    b"{'a':1}",
    b'{"a":1,}',
    b'{"a" 1}',
    b'{"a":[1,}',
    b'{"a":[1}]',
    b'{"a":nul}',
    b'{"a":01}',
    b'{"a":"\xff"}',
    b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\n"}',
    b'{"a":"\\x"}',
    b'{"model":"\\ud800"}',
    b'{"fallbacks":["\\ud800"]}',
    b'{"fallbacks":["a",]}',
    b"\xef\xbb{}",
    b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
    b'{"model":"a","model":"b"}',
    b'{"model":"a","mod\\u0065l":"b"}',
    b"Content-Disposition: form-data",
]
# With a model in it, a body in one piece takes a shorter way.
NO_JSON += [body.replace(b"{", b'{"model":"m",', 1) for body in NO_JSON if b"{" in body]


async def test_what_is_no_json_object_is_refused() -> None:
    for body in NO_JSON:
        for size in [1, 1000]:
            with case((body, size)):
                read = incoming(Content(*pieces_of(body, size)))
                with pytest.raises(RequestError) as error:
                    await read.read(1 << 20)
                assert refusal(error) == (Code.INVALID_JSON, None)


# --- The body as a worker gets it -------------------------------------------------


async def test_a_body_that_names_its_model_is_not_touched() -> None:
    read = await read_whole(BODY)
    assert read.named("qwen") == BODY
    assert read.length == len(BODY)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b' { "model" : "alias" } ', b' { "model" : "the-name" } '),
        (b'{"a":1e0,"model":"alias","b":[]}', b'{"a":1e0,"model":"the-name","b":[]}'),
        (b'{"model":null}', b'{"model":"the-name"}'),
        (b'{"a":1,"model": null ,"b":2}', b'{"a":1,"model": "the-name" ,"b":2}'),
        (b"{}", b'{"model":"the-name"}'),
        (b" { } ", b' {"model":"the-name" } '),
        (b'{"a":"model"}', b'{"model":"the-name","a":"model"}'),
        (b' {\n"a":{"model":"x"}}', b' {"model":"the-name",\n"a":{"model":"x"}}'),
        (rb'{"model":"ali\u0061s"}', b'{"model":"the-name"}'),
        (rb'{"model":"the\u002dname"}', rb'{"model":"the\u002dname"}'),
    ],
)
async def test_only_the_name_of_the_model_changes(body: bytes, expected: bytes) -> None:
    read = await read_whole(body)
    assert read.named("the-name") == expected
    assert read.length_behind(expected) == len(expected)


async def test_a_name_is_written_as_json() -> None:
    read = await read_whole(b'{"model":"x"}')
    assert json.loads(read.named('a "b" \\ \n ë')) == {"model": 'a "b" \\ \n ë'}


async def test_the_length_of_a_chunked_body_stays_unknown() -> None:
    read = incoming(Content(b'{"model":"alias"}'))
    await read.read(1 << 20)
    body = read.named("the-name")
    assert body == b'{"model":"the-name"}'
    assert read.length_behind(body) is None


@given(st.data())
async def test_it_does_not_matter_where_a_body_is_cut(data: st.DataObject) -> None:
    model = data.draw(st.text(max_size=20))
    fields: dict[str, Any] = data.draw(
        st.dictionaries(st.sampled_from("abcd"), st.text() | st.lists(st.integers()))
    )
    keys = data.draw(st.permutations([*fields, "model"]))
    whole = {key: model if key == "model" else fields[key] for key in keys}
    body = json.dumps(whole, ensure_ascii=data.draw(st.booleans())).encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(body) - 1)))))
    edges = [0, *cuts, len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(edges)]
    read = incoming(Content(*pieces), length=len(body))
    await read.read(1 << 20)
    assert read.model == model
    assert read.named(model) == body
    assert json.loads(read.named("another")) == {**whole, "model": "another"}


# --- Fallbacks --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "fallbacks", "expected"),
    [
        ('{"model":"m","fallbacks":["a","b"]}', ("a", "b"), '{"model":"m"}'),
        ('{"fallbacks":["a"],"x":1e0,"model":"m"}', ("a",), '{"x":1e0,"model":"m"}'),
        ('{"fallbacks":["a"]}', ("a",), '{"model":"m"}'),
        ('{"fallbacks":[],"x":[ 1.0 ]}', (), '{"model":"m","x":[ 1.0 ]}'),
        ('{"model":null,"fallbacks":["a"]}', ("a",), '{"model":"m"}'),
        (' { "fallbacks" : ["a"] , "model" : "n" } ', ("a",), '{"model":"m"}'),
        (r'{"f\u0061llbacks":["\u00e4"],"model":"m"}', ("ä",), '{"model":"m"}'),
        ('{"model":"m","x":{"fallbacks":["a"]}}', (), None),
        ('{"model":"m","x":"fallbacks"}', (), None),
    ],
)
async def test_the_fallbacks_are_for_the_hub_and_not_for_the_worker(
    body: str, fallbacks: tuple[str, ...], expected: str | None
) -> None:
    """Not a byte of another value changes, and the length is that of what is left."""
    for read in (
        await read_whole(body.encode()),
        await read_in_pieces(body.encode(), length=None),
    ):
        assert read.fallbacks == fallbacks
        sent = read.named("m")
        assert sent == (expected or body).encode()
        behind = read.length_behind(sent)
        assert behind == (len(sent) if read.length is not None else None)
        assert json.loads(read.named("other"))["model"] == "other"
        await read.read(1 << 20)  # nothing is left to read, or to take
        assert read.fallbacks == fallbacks


async def read_in_pieces(body: bytes, length: int | None) -> Body:
    read = incoming(Content(*pieces_of(body, 5)), length=length)
    await read.read(1 << 20)
    return read


@given(st.data())
async def test_what_is_left_without_the_fallbacks_means_the_same(
    data: st.DataObject,
) -> None:
    fields: dict[str, Any] = data.draw(
        st.dictionaries(st.sampled_from("abcd"), st.text() | st.lists(st.integers()))
    )
    names = data.draw(st.lists(st.text(max_size=9), max_size=8))
    whole = {**fields, "model": data.draw(st.text(max_size=20)), "stream": True}
    keys = data.draw(st.permutations([*whole, "fallbacks"]))
    sent = {key: names if key == "fallbacks" else whole[key] for key in keys}
    body = json.dumps(sent, ensure_ascii=data.draw(st.booleans())).encode()
    size = data.draw(st.integers(1, len(body)))
    read = incoming(Content(*pieces_of(body, size)), length=len(body))
    await read.read(1 << 20)
    assert (read.fallbacks, read.model) == (tuple(names), whole["model"])
    assert (read.stream, read.replayable) == (True, True)
    left = read.named(whole["model"])
    assert json.loads(left) == whole
    assert read.size == read.length == len(left)
    assert json.loads(read.named("another")) == {**whole, "model": "another"}


async def test_fallbacks_in_a_body_that_streams_through_stay_in_it() -> None:
    """It cannot be sent again, so they are of no use; their type is still checked."""
    body = b'{"fallbacks":["a"],"x":"' + b"x" * 100 + b'"}'
    read = incoming(Content(*pieces_of(body, 30)), length=len(body))
    await read.read(30)
    assert read.fallbacks == ()
    assert b"".join([read.named("m"), *await rest_of(read)]) == body
    body = b'{"x":"' + b"x" * 100 + b'","fallbacks":"a"}'
    read = incoming(Content(*pieces_of(body, 30)), length=len(body))
    await read.read(30)
    with pytest.raises(RequestError) as error:
        await rest_of(read)
    assert refusal(error) == (Code.INVALID_VALUE, "fallbacks")


async def test_fallbacks_that_occur_twice_are_refused() -> None:
    for body in (
        b'{"model":"m","fallbacks":["a"],"fallbacks":["b"]}',
        rb'{"model":"m","fallbacks":["a"],"f\u0061llbacks":["b"]}',
    ):
        with pytest.raises(RequestError) as error:
            await read_whole(body)
        assert refusal(error) == (Code.INVALID_JSON, None)


# --- The window -------------------------------------------------------------------


async def test_a_body_within_the_window_is_read_whole() -> None:
    source = Content(*pieces_of(BODY, 10))
    read = incoming(source)
    await read.read(len(BODY) + 1)
    assert read.complete
    assert await rest_of(read) == []
    await read.read(1 << 20)  # nothing is left to read


async def test_beyond_the_window_nothing_is_read_ahead() -> None:
    pieces = pieces_of(BODY, 10)
    source = Content(*pieces, b"")
    read = incoming(source, length=len(BODY))
    await read.read(25)
    assert read.named("qwen") == BODY[:30]
    assert not read.complete
    assert source.untouched == len(pieces) + 1 - 3
    assert await rest_of(read) == pieces[3:]
    assert read.complete


async def test_the_window_can_be_widened_until_the_model_is_found() -> None:
    source = Content(*pieces_of(BODY, 10))
    read = incoming(source)
    await read.read(10)
    assert read.model is None
    await read.read(len(BODY) - 5)
    assert read.model == "qwen"
    assert b"".join([read.named("qwen"), *await rest_of(read)]) == BODY


async def test_a_model_beyond_the_window_stays_as_it_is() -> None:
    """The worker serves only one: it would not have been sent there otherwise."""
    read = incoming(Content(*pieces_of(BODY, 10)), length=len(BODY))
    await read.read(20)
    assert read.named("another") == BODY[:20]
    assert read.length == len(BODY)


async def test_the_part_that_was_read_can_name_another_model() -> None:
    body = b'{"model":"alias","a":"' + b"x" * 100 + b'"}'
    read = incoming(Content(*pieces_of(body, 30)), length=len(body))
    await read.read(30)
    kept = read.named("the-name")
    assert kept == body[:30].replace(b"alias", b"the-name")
    assert read.named("the-name") == kept, "as often as it is asked for"
    length = read.length_behind(kept)
    assert length == len(body) + 3
    assert read.untouched
    assert len(kept) + len(b"".join(await rest_of(read))) == length
    assert not read.untouched


async def test_the_rest_is_checked_on_its_way() -> None:
    body = b'{"a":"' + b"x" * 30 + b'","max_tokens":"7"}'
    read = incoming(Content(*pieces_of(body, 10)))
    await read.read(10)
    with pytest.raises(RequestError) as error:
        await rest_of(read)
    assert refusal(error) == (Code.INVALID_VALUE, "max_tokens")

    body = b'{"model":"a","a":"' + b"x" * 30 + b'","model":"b"}'
    read = incoming(Content(*pieces_of(body, 10)))
    await read.read(10)
    with pytest.raises(RequestError) as error:
        await rest_of(read)
    assert refusal(error) == (Code.INVALID_JSON, None)

    read = incoming(Content(b'{"a":"', b"xxx"))
    await read.read(5)
    with pytest.raises(RequestError) as error:
        await rest_of(read)
    assert refusal(error) == (Code.INVALID_JSON, None)


async def test_what_is_not_sent_again_is_not_kept() -> None:
    """The answer has begun, and may take minutes."""
    read = await read_whole(BODY)
    read.forget()
    assert (read.model, read.complete) == (None, True)
    assert repr(read) == f"<Body {CHAT} {len(BODY)} bytes complete>"


async def test_what_is_still_being_sent_is_not() -> None:
    read = incoming(Content(*pieces_of(BODY, 70)), length=len(BODY))
    await read.read(70)
    assert (read.model, read.complete) == ("qwen", False)
    read.forget()
    assert read.model == "qwen"
    assert await rest_of(read) == [BODY[70:]]


# --- Limits -----------------------------------------------------------------------


async def test_a_body_that_announces_too_much_is_not_read() -> None:
    source = Content(BODY)
    with pytest.raises(RequestError, match="larger than 1024 bytes") as error:
        incoming(source, length=1025, limit=1024)
    assert refusal(error) == (Code.BODY_TOO_LARGE, None)
    assert source.untouched == 1
    assert incoming(source, length=1024, limit=1024).length == 1024


async def read_both_parts(read: Body, window: int) -> int:
    await read.read(window)
    return len(read.named("")) + sum(map(len, await rest_of(read)))


@pytest.mark.parametrize("window", [100, 1 << 20])
async def test_a_body_that_announces_nothing_is_cut_at_the_limit(window: int) -> None:
    body = b'{"model":"","a":"' + b"x" * 981 + b'"}'
    pieces = pieces_of(body, 100)
    assert await read_both_parts(incoming(Content(*pieces), limit=1000), window) == 1000
    # The client need not have sent all of it.
    read = incoming(Content(*pieces, b" ", end=False), limit=1000)
    with pytest.raises(RequestError, match="larger than 1000 bytes") as error:
        await read_both_parts(read, window)
    assert refusal(error) == (Code.BODY_TOO_LARGE, None)


# --- Time -------------------------------------------------------------------------


async def test_a_body_that_does_not_arrive_is_not_awaited() -> None:
    read = incoming(Content(b"{", end=False), grace=0.02)
    with pytest.raises(RequestError, match="too slowly") as error:
        await read.read(1 << 20)
    assert refusal(error) == (Code.BODY_TIMEOUT, None)


async def test_a_body_that_drips_is_not_waited_for() -> None:
    """Each byte comes in time, and all of them do not."""
    source = Content(b"{", end=False)

    async def drip() -> None:
        for _ in range(100):
            await asyncio.sleep(0.01)
            source.feed(b" ")

    read = incoming(source, grace=0.1)
    task = asyncio.create_task(drip())
    with pytest.raises(RequestError) as error:
        await read.read(1 << 20)
    task.cancel()
    assert refusal(error) == (Code.BODY_TIMEOUT, None)
    assert not task.done()


async def test_a_client_that_sends_much_gets_more_time() -> None:
    """A large body on a slow line is no attack: bytes buy patience."""
    first = b'{"a":"' + b"x" * LEAST_RATE
    source = Content(first, end=False)
    read = incoming(source, grace=0.02)
    await read.read(len(first))
    loop = asyncio.get_running_loop()
    loop.call_later(0.1, functools.partial(source.feed, b'"}', end=True))
    await read.read(1 << 20)
    assert read.complete


async def test_only_waiting_for_the_client_counts() -> None:
    """A worker that is slow to take the rest does not use up its client's time."""
    source = Content(b'{"a":"', b"x", b'"}')
    read = incoming(source, grace=0.05)
    await read.read(1)
    pieces = []
    async for piece in read.rest():
        pieces.append(piece)
        await asyncio.sleep(0.06)  # as the worker's back-pressure would make it
    assert pieces == [b"x", b'"}']


# --- Framing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [web.RequestPayloadError("0, 400"), TransferEncodingError("chunk: zz")]
)
async def test_a_body_with_invalid_framing_is_rejected(fault: Exception) -> None:
    source = Content(b"{", end=False)
    read = incoming(source)
    await read.read(1)
    source.fail(fault)
    with pytest.raises(RequestError, match="framing") as error:
        await read.read(1 << 20)
    assert refusal(error) == (Code.BAD_REQUEST, None)
    assert error.value.__suppress_context__


async def test_invalid_framing_that_arrives_with_the_last_piece_is_rejected() -> None:
    """The piece was there first, and the stream ends with the error."""
    source = Content(end=False)
    body = incoming(source)
    reading = asyncio.create_task(body.read(1 << 20))
    await asyncio.sleep(0)
    source.feed(b"{}", end=True)
    source.fail(web.RequestPayloadError("malformed chunk"))
    with pytest.raises(RequestError, match="framing") as error:
        await reading
    assert refusal(error) == (Code.BAD_REQUEST, None)
    assert not body.complete


async def test_a_client_that_left_is_no_bad_request() -> None:
    source = Content(b"{", end=False)
    read = incoming(source)
    await read.read(1)
    source.fail(ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError):
        await read.read(1 << 20)


async def test_nothing_of_a_body_shows() -> None:
    read = incoming(Content(b'{"model":"canary","messages":["canary"]', b"}"))
    await read.read(1)
    assert repr(read) == f"<Body {CHAT} 39 bytes unfinished>"
    await read.read(1 << 20)
    assert repr(read) == f"<Body {CHAT} 40 bytes complete>"


# --- Expect: 100-continue ---------------------------------------------------------


def expecting(
    value: str | None, version: tuple[int, int] = (1, 1)
) -> tuple[web.Request, Mock]:
    transport = Mock(spec=asyncio.Transport)
    headers = {} if value is None else {"Expect": value}
    request = requests.request(
        "POST", CHAT, headers, version=HttpVersion(*version), transport=transport
    )
    return request, transport


@pytest.mark.parametrize("value", ["100-continue", "100-Continue", "100-CONTINUE"])
def test_a_client_that_waits_gets_100_continue(value: str) -> None:
    request, transport = expecting(value)
    answer_expectation(request)
    transport.write.assert_called_once_with(b"HTTP/1.1 100 Continue\r\n\r\n")


def test_a_client_that_does_not_wait_gets_no_100_continue() -> None:
    request, transport = expecting(None)
    answer_expectation(request)
    transport.write.assert_not_called()


def test_http_1_0_has_no_expectations() -> None:
    """RFC 9110, 10.1.1: ignored there, whatever it is."""
    for value in ("100-continue", "200-maybe"):
        request, transport = expecting(value, version=(1, 0))
        answer_expectation(request)
        transport.write.assert_not_called()


@pytest.mark.parametrize("value", ["200-maybe", "", "100-continue, x", "100"])
def test_no_other_expectation_is_met(value: str) -> None:
    request, transport = expecting(value)
    with pytest.raises(RequestError) as error:
        answer_expectation(request)
    assert refusal(error) == (Code.EXPECTATION_FAILED, None)
    transport.write.assert_not_called()


def test_a_client_that_left_gets_no_100_continue() -> None:
    request, transport = expecting("100-continue")
    request._protocol.transport = None
    answer_expectation(request)
    transport.write.assert_not_called()
