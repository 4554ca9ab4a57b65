"""What is not listed does not reach a worker; what belongs to one hop ends there."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.headers import (
    FORWARDED,
    HOP_BY_HOP,
    MOST_MEMBERS,
    OWNED,
    Headers,
    TraceContext,
    read_answer_head,
    read_head,
    to_client,
    trace_lines,
    without_trace,
)
from tests.fakes.cases import case

LIMIT = 16 << 10
JSON = (b"Content-Type", b"application/json")
HOST = (b"Host", b"hub:8000")


def check_head(
    method: str, version: tuple[int, int], headers: Headers, limit: int
) -> bool:
    """Check a head; return whether its connection ends with it."""
    return read_head(method, version, headers, limit).last


def request_id(headers: Iterable[tuple[bytes, bytes]], fallback: str) -> str:
    return read_head("GET", (1, 1), [*headers], 1 << 20).id or fallback


def to_worker(headers: Headers) -> list[tuple[bytes, bytes]]:
    """List the headers of a client that a worker gets: none of a refused request."""
    try:
        sent = read_head("POST", (1, 1), headers, 1 << 20).forwarded
    except RequestError:
        return []
    pairs = [line.split(b": ", 1) for line in sent.split(b"\r\n")[:-1]]
    return [(name, value) for name, value in pairs]


def lines(*text: str) -> list[tuple[bytes, bytes]]:
    """Read `Name: value` lines as a parser would."""
    pairs = [line.partition(":") for line in text]
    return [(n.encode("latin-1"), v.strip().encode("latin-1")) for n, _, v in pairs]


def refusal(
    *headers: tuple[bytes, bytes],
    method: str = "POST",
    version: tuple[int, int] = (1, 1),
    limit: int = LIMIT,
) -> RequestError:
    """Check a head that must be refused, and return why."""
    with pytest.raises(RequestError) as caught:
        check_head(method, version, headers, limit)
    return caught.value


# --- What is accepted -------------------------------------------------------------


@pytest.mark.parametrize("version", [(1, 0), (1, 1)])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "BREW"])
def test_an_ordinary_head_is_accepted(method: str, version: tuple[int, int]) -> None:
    """The routes decide which methods a path has."""
    headers = lines("Host: hub", "Content-Length: 5", "Content-Type: application/json")
    check_head(method, version, headers, LIMIT)


@pytest.mark.parametrize(
    "line",
    [
        "Transfer-Encoding: chunked",
        "TRANSFER-ENCODING: Chunked",
        "Content-Encoding: identity",
        "content-encoding: IDENTITY",
        "Accept-Encoding: gzip",
        "Connection: upgrade",
        "Upgrade: h2c",
        "Upgrade: websocket",
        "TE: trailers",
    ],
)
def test_headers_without_effect_on_framing_are_accepted(line: str) -> None:
    check_head("POST", (1, 1), lines(line), LIMIT)


@pytest.mark.parametrize("version", [(0, 9), (1, 2), (2, 0), (3, 0), (11, 1)])
def test_only_http_1_0_and_1_1_are_spoken(version: tuple[int, int]) -> None:
    error = refusal(HOST, version=version)
    assert error.code is Code.UNSUPPORTED_HTTP_VERSION
    assert f"HTTP/{version[0]}.{version[1]} " in error.message


def test_connect_is_refused() -> None:
    error = refusal(HOST, method="CONNECT")
    assert error.code is Code.METHOD_NOT_ALLOWED
    assert error.allow  # RFC 9110, 15.5.6: a 405 names the methods that there are


@pytest.mark.parametrize(
    "value",
    [
        "",
        "gzip",
        "gzip, chunked",
        "chunked, chunked",
        "chunked, identity",
        "identity",
        "xchunked",
        "chunked;q=1",
        '"chunked"',
        "chunked\x0b",
        "chun ked",
    ],
)
def test_a_transfer_coding_other_than_chunked_is_refused(value: str) -> None:
    """Two programs that read such a list differently see two different requests."""
    header = (b"transfer-Encoding", value.encode())
    error = refusal(HOST, header)
    assert (error.code, error.code.status) == (Code.UNSUPPORTED_TRANSFER_ENCODING, 501)


def test_a_second_transfer_coding_is_refused_after_a_good_one() -> None:
    headers = lines("Transfer-Encoding: chunked", "Transfer-Encoding: gzip")
    assert refusal(*headers).code is Code.UNSUPPORTED_TRANSFER_ENCODING


@pytest.mark.parametrize("line", ["Transfer-Encoding: chunked", "UPGRADE: h2c"])
def test_a_connection_ends_with_a_request_that_may_hide_another(line: str) -> None:
    assert check_head("POST", (1, 1), lines("Host: hub", line, "Accept: */*"), LIMIT)
    length = lines("Host: hub", "Content-Length: 5", "Content-Encoding: identity")
    assert not check_head("POST", (1, 1), length, LIMIT)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "hub",
        "hub:8000",
        "hub:",
        "HUB.local",
        "my_hub-1.example.",
        "10.0.0.1:80",
        "[::1]",
        "[fe80::1%25eth0]:8000",
        "[::ffff:10.0.0.1]",
        "xn--bcher-kva.example",
        "b%C3%BCcher",
        "~",
    ],
)
def test_a_name_or_an_address_is_a_host(value: str) -> None:
    check_head("POST", (1, 1), [(b"hOst", value.encode())], LIMIT)


def test_a_host_is_a_name_or_an_address() -> None:
    for value in [
        "hub evil",
        "hub\tevil",
        "hub@evil",
        "a:b@hub",
        "hub/",
        "hub?x",
        "hub#x",
        "http://hub",
        "hub,evil",
        "hub;evil",
        "hub:80:80",
        "hub:http",
        "hub:-1",
        "hub:80 ",
        ":80",
        "[::1",
        "::1]",
        "::1",
        "[]",
        "[::1]x",
        "h\xffb",
        "hub\\evil",
        "<hub>",
        '"hub"',
        "hub\n",
    ]:
        with case(value):
            error = refusal((b"HOST", value.encode("latin-1")))
            assert error.code is Code.BAD_REQUEST
            assert "Host" in error.message


@pytest.mark.parametrize(
    "name", ["Content_Length", "content_length", "TRANSFER_ENCODING"]
)
def test_a_name_that_some_servers_read_as_framing_is_refused(name: str) -> None:
    error = refusal(HOST, (name.encode(), b"5"))
    assert error.code is Code.BAD_REQUEST
    assert repr(name) in error.message  # the client is result which header


def test_a_head_may_be_exactly_as_large_as_the_limit() -> None:
    """What counts is what is sent: the name, `: `, the value and the line end."""
    exact = sum(len(b"%b: %b\r\n" % header) for header in (HOST, JSON))
    check_head("POST", (1, 1), (HOST, JSON), exact)
    error = refusal(HOST, JSON, limit=exact - 1)
    assert error.code is Code.HEAD_TOO_LARGE
    assert str(exact - 1) in error.message


def test_many_small_headers_are_as_large_as_one_big_one() -> None:
    assert refusal(*[(b"a", b"")] * 4000).code is Code.HEAD_TOO_LARGE


# --- The request id ---------------------------------------------------------------


@pytest.mark.parametrize("given_id", ["a", "A-9_z.0", "0" * 64])
def test_a_harmless_request_id_of_the_client_is_taken(given_id: str) -> None:
    headers = [HOST, (b"x-request-ID", given_id.encode())]
    assert request_id(headers, "ours") == given_id


@pytest.mark.parametrize(
    "given_id",
    ["", "0" * 65, "a b", "a\tb", "a\n", "a\r\nX: y", "é", "a/b", 'a"b', "<b>", "a,b"],
)
def test_any_other_request_id_is_replaced(given_id: str) -> None:
    """It goes into logs and replies: no quotes, no line ends, and not any length."""
    headers = [(b"X-Request-Id", given_id.encode("latin-1"))]
    assert request_id(headers, "ours") == "ours"


def test_two_request_ids_are_both_ignored() -> None:
    headers = lines("X-Request-Id: one", "X-REQUEST-ID: two")
    assert request_id(headers, "ours") == "ours"


def test_a_missing_request_id_is_generated() -> None:
    assert request_id(iter([HOST]), "ours") == "ours"


@settings(deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=3))
def test_the_request_id_is_always_harmless(values: list[bytes]) -> None:
    chosen = request_id([(b"X-Request-Id", value) for value in values], "ours")
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", chosen)


# --- Client → worker --------------------------------------------------------------


def test_listed_headers_alone_reach_a_worker_and_unchanged() -> None:
    headers = lines(
        "Accept: text/event-stream",
        "ACCEPT-Language: de, en;q=0.5",
        "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "Tracestate: vendor=1",
    )
    assert to_worker([HOST, *headers, JSON]) == headers


def test_credentials_framing_and_switches_never_reach_a_worker() -> None:
    for name in [
        "X-Conversation-Id",
        "x-conversation-id",
        "Authorization",
        "AUTHORIZATION",
        "Proxy-Authorization",
        "Cookie",
        "X-Api-Key",
        "X-Request-Id",
        "X-Forwarded-For",
        "Forwarded",
        "Host",
        "Content-Length",
        "Content-Type",
        "Content-Encoding",
        "Accept-Encoding",
        "Transfer-Encoding",
        "Connection",
        "Keep-Alive",
        "TE",
        "Trailer",
        "Upgrade",
        "Expect",
        "Origin",
        "User-Agent",
        "X-Gollama-Worker",
        "Accept_Language",
        "Accept ",
        "",
    ]:
        with case(name):
            assert to_worker([(name.encode(), b"x")]) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=30)), max_size=6))
def test_workers_get_only_listed_headers_on_one_line_each(
    headers: list[tuple[bytes, bytes]],
) -> None:
    headers = [*headers, *((b"Accept", value) for _, value in headers)]
    for name, value in to_worker(headers):
        assert name.lower() in FORWARDED
        assert not set(value) - set(range(0x20, 0x7F)) - {0x09}


@pytest.mark.parametrize("bad", [b"a\r\nX-Api-Key: k", b"a\nb", b"\x00", b"caf\xe9"])
def test_ambiguous_header_values_are_dropped(
    bad: bytes,
) -> None:
    assert to_worker([(b"Accept", bad)]) == []
    assert to_client([(b"X-Note", bad)]) == []


CONNECTIONS = [
    pytest.param(["Connection: {}"], id="plain"),
    pytest.param(["CONNECTION: {}"], id="name in capitals"),
    pytest.param(["Connection:", "Connection: {}"], id="the first is empty"),
    pytest.param(["Connection: close", "connection: {}"], id="the second"),
    pytest.param(["Connection: {}", "connection: close"], id="not the last"),
    pytest.param(["Connection: close, {}"], id="in a list"),
    pytest.param(["Connection: ,, {} ,"], id="among empty elements"),
    pytest.param(["Connection: close,{},x"], id="without spaces"),
]


@pytest.mark.parametrize("spelled", ["accept", "Accept", "ACCEPT"])
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_a_client_can_name_headers_that_stop_at_the_hub(
    connection: list[str], spelled: str
) -> None:
    named = lines(*(line.format(spelled) for line in connection))
    assert to_worker([(b"Accept", b"*/*"), *named]) == []
    assert to_worker([*named, (b"aCCept", b"*/*")]) == []


@pytest.mark.parametrize("spelled", ["x-note", "X-Note", "X-NOTE"])
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_a_worker_can_name_headers_that_stop_at_the_hub(
    connection: list[str], spelled: str
) -> None:
    named = lines(*(line.format(spelled) for line in connection))
    assert to_client([(b"X-Note", b"1"), *named]) == []
    assert to_client([*named, (b"x-nOTE", b"1")]) == []


def test_headers_that_connection_does_not_name_stay() -> None:
    """`Connection: accept` is not `accept-language`, and no empty name drops all."""
    headers = lines("Accept-Language: de", "Connection: accept, , keep-alive")
    assert to_worker(headers) == lines("Accept-Language: de")
    assert to_client(lines("X-Notes: 1", "Connection: x-note,")) == [("X-Notes", "1")]


# --- Worker → client --------------------------------------------------------------


def test_headers_about_the_answer_reach_the_client() -> None:
    headers = lines(
        "Content-Type: application/json; charset=utf-8",
        "X-Anything: with\tspaces  inside",
        "Retry-After: 3",
        "Vary: Accept",
        "vary: Origin",
    )
    assert to_client(headers) == [(n.decode(), v.decode()) for n, v in headers]


def test_headers_of_one_hop_or_of_the_hub_end_at_the_hub() -> None:
    for name in sorted(HOP_BY_HOP | OWNED):
        with case(name):
            assert (
                to_client([(name, b"x"), (name.title(), b"x"), (name.upper(), b"x")])
                == []
            )


def test_a_worker_cannot_set_headers_of_the_hub() -> None:
    """Spelled out here, so that no name leaves the lists by accident."""
    for name in [
        "Connection",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
        "Content-Length",
        "Date",
        "Server",
        "Set-Cookie",
        "Set-Cookie2",
        "Clear-Site-Data",
        "Refresh",
        "Strict-Transport-Security",
        "WWW-Authenticate",
        "X-Request-Id",
        "Access-Control-Allow-Origin",
        "access-control-allow-credentials",
        "X-Gollama-Worker",
        "x-gollama-anything",
        "X-Accel-Buffering",
        "Cache-Control",
    ]:
        with case(name):
            assert to_client([(name.encode(), b"x")]) == []


def test_a_header_whose_name_is_not_ascii_is_dropped() -> None:
    assert to_client([(b"X-Caf\xe9", b"1"), (b"X-Ok", b"1")]) == [("X-Ok", "1")]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(HOP_BY_HOP | OWNED)) | st.binary(max_size=12),
            st.binary(max_size=20) | st.just(b"connection, x"),
        ),
        max_size=8,
    )
)
def test_hop_by_hop_headers_of_a_worker_are_always_dropped(
    headers: list[tuple[bytes, bytes]],
) -> None:
    for name, value in to_client(headers):
        assert name.lower().encode() not in HOP_BY_HOP | OWNED
        assert (name.encode(), value.encode()) in headers


def test_transfer_encoding_needs_http_1_1() -> None:
    """RFC 9112, 6.1: such framing is faulty."""
    chunked = [(b"Transfer-Encoding", b"chunked")]
    check_head("POST", (1, 1), chunked, 1024)
    with pytest.raises(RequestError, match=r"needs HTTP/1\.1"):
        check_head("POST", (1, 0), chunked, 1024)


# --- Log and repr -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        (
            "Transfer-Encoding: gzip, chunked",
            Code.UNSUPPORTED_TRANSFER_ENCODING,
            "Transfer-Encoding must be exactly 'chunked'.",
        ),
        (
            "Content_Length: 5",
            Code.BAD_REQUEST,
            "Header 'Content_Length' is ambiguous.",
        ),
        (
            "Host: a b",
            Code.BAD_REQUEST,
            "Host is not a name or an address, with or without a port.",
        ),
    ],
)
def test_a_refusal_names_the_change_that_is_needed(
    line: str, code: Code, text: str
) -> None:
    error = refusal(*lines(line))
    assert (error.code, error.message) == (code, text)


def test_the_words_for_old_clients_and_for_tunnels() -> None:
    error = refusal(*lines("Transfer-Encoding: chunked"), version=(1, 0))
    result = (error.code, error.message)
    assert result == (Code.BAD_REQUEST, "Transfer-Encoding needs HTTP/1.1.")
    error = refusal(HOST, method="CONNECT")
    assert error.code is Code.METHOD_NOT_ALLOWED
    assert error.message == "CONNECT is not supported: this is not a tunnel."
    assert error.allow == "GET, POST"


# --- Traces -----------------------------------------------------------------------

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
PARENT = f"traceparent: 00-{TRACE}-{SPAN}-01"


def trace_of(*text: str) -> TraceContext | None:
    return read_head("POST", (1, 1), [HOST, *lines(*text)], 1 << 20).trace


@pytest.mark.parametrize(
    ("value", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # a flag of level 2
        (f"00-{TRACE}-{SPAN}-fe", False),
        (f"01-{TRACE}-{SPAN}-01", True),  # of a later version
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
        (f"cc-{TRACE}-{SPAN}-01-", True),
    ],
)
def test_a_trace_of_this_and_of_later_versions_is_read(
    value: str, sampled: bool
) -> None:
    assert trace_of(f"TraceParent: {value}") == (TRACE, SPAN, sampled, "")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-",  # version 00 has four parts
        f"00-{TRACE}-{SPAN}-01-more",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"ff-{TRACE}-{SPAN}-01",
        f"0x-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}0-01",
        f"00-{TRACE}-{SPAN}-0g",
        f"00_{TRACE}_{SPAN}_01",
    ],
)
def test_a_trace_that_is_not_valid_is_ignored(value: str) -> None:
    assert trace_of(f"traceparent: {value}", "tracestate: a=1") is None


def test_two_traces_of_one_request_are_ignored() -> None:
    assert trace_of(PARENT, PARENT.replace("t", "T")) is None
    assert trace_of("tracestate: a=1") is None


def test_a_trace_of_the_hop_before_is_not_read() -> None:
    assert trace_of(PARENT, "Connection: traceparent") is None
    assert trace_of(PARENT, "tracestate: a=1", "Connection: Tracestate") == (
        *(TRACE, SPAN, True),
        "",
    )


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        (["a=1"], "a=1"),
        (["a=1,b=2", "c=3"], "a=1,b=2,c=3"),  # several fields are one list
        (["a=1 , \tb=2,, ,c=3"], "a=1,b=2,c=3"),
        (["tenant@vendor=x", "0a_-*/=!~"], "tenant@vendor=x,0a_-*/=!~"),
        ([""], ""),
        ([f"{'a' * 256}={'b' * 255}"], f"{'a' * 256}={'b' * 255}"),
        # What is not valid makes the whole list worthless.
        (["a=1", "b"], ""),
        (["a=1,A=1"], ""),
        (["a=1,=1"], ""),
        (["a=1,b="], ""),
        (["a=1,b =1"], ""),
        (["a=1,b=1=1"], ""),
        (["a=1,a=2"], ""),
        ([f"{'a' * 257}=1"], ""),
        ([f"a={'b' * 257}"], ""),
        ([",".join(f"k{n}=1" for n in range(MOST_MEMBERS + 1))], ""),
    ],
)
def test_the_state_of_a_trace_is_passed_on_if_it_is_valid(
    fields: list[str], state: str
) -> None:
    context = trace_of(PARENT, *[f"tracestate: {each}" for each in fields])
    assert context == (TRACE, SPAN, True, state)


def test_a_long_state_loses_its_long_members_and_then_its_last_ones() -> None:
    long, short = f"long={'x' * 200}", [f"k{n:02}={'y' * 20}" for n in range(30)]
    context = trace_of(PARENT, f"tracestate: {','.join([long, *short])}")
    assert context is not None
    assert context.state == ",".join(short[:20])
    assert 480 < len(context.state) <= 512


def test_a_place_in_a_trace_is_written_as_it_is_read() -> None:
    for sampled in True, False:
        for state in "", "a=1,b=2":
            context = TraceContext(TRACE, SPAN, sampled, state)
            text = trace_lines(context).decode().splitlines()
            assert trace_of(*text) == context


def test_header_lines_can_lose_those_of_a_trace() -> None:
    kept = b"Accept: traceparent: 1\r\nAccept-Language: de\r\n"
    traced = b"TraceParent: 1\r\n" + kept + b"tracestate: \r\ntraceparent: 2\r\n"
    assert without_trace(traced) == kept
    assert without_trace(kept) == kept


# --- Heads that read alike --------------------------------------------------------

ACCEPT = (b"Accept", b"*/*")
FIRST = (HOST, (b"Authorization", b"Bearer t"), (b"Content-Length", b"12"), ACCEPT)
ALIKE = [FIRST, (*FIRST[:2], (b"Content-Length", b"99"), ACCEPT)]
OTHERS = {
    "another token": (HOST, (b"Authorization", b"Bearer u"), *FIRST[2:]),
    "a header before": ((b"Expect", b"100-continue"), *FIRST),
    "a header after": (*FIRST, (b"X-Request-Id", b"7")),
    "one less": FIRST[:3],
    "one instead of the length": (*FIRST[:2], (b"Expect", b"12"), ACCEPT),
    "one instead of the last": (*FIRST[:3], (b"Expect", b"100-continue")),
    "a longer length": (*FIRST[:2], (b"Content-Length", b"123"), ACCEPT),
}


def test_a_head_that_differs_in_its_length_alone_is_not_read_again() -> None:
    first = read_head("POST", (1, 1), FIRST, 1 << 20)
    for lines in ALIKE:
        assert read_head("POST", (1, 1), lines, 1 << 20, first) is first


@pytest.mark.parametrize("lines", OTHERS.values(), ids=OTHERS)
def test_a_head_that_differs_otherwise_is_read(lines: Headers) -> None:
    first = read_head("POST", (1, 1), FIRST, 1 << 20)
    assert read_head("POST", (1, 1), lines, 1 << 20, first) is not first


def test_a_head_of_another_version_is_read() -> None:
    first = read_head("POST", (1, 1), FIRST, 1 << 20)
    assert read_head("POST", (1, 0), FIRST, 1 << 20, first) is not first


def test_connect_is_rejected_whatever_came_before() -> None:
    first = read_head("POST", (1, 1), FIRST, 1 << 20)
    with pytest.raises(RequestError, match="CONNECT"):
        read_head("CONNECT", (1, 1), FIRST, 1 << 20, first)


def test_a_head_without_a_length_is_not_read_again_either() -> None:
    first = read_head("GET", (1, 1), (HOST, ACCEPT), 1 << 20)
    assert read_head("GET", (1, 1), (HOST, ACCEPT), 1 << 20, first) is first


def test_a_limit_that_was_lowered_applies_to_a_head_that_reads_alike() -> None:
    first = read_head("POST", (1, 1), FIRST, 1 << 20)
    assert read_head("POST", (1, 1), FIRST, first.size, first) is first
    with pytest.raises(RequestError) as info:
        read_head("POST", (1, 1), FIRST, first.size - 1, first)
    assert info.value.code is Code.HEAD_TOO_LARGE


ANSWER = [(b"Content-Type", b"Text/JSON"), (b"Date", b"1"), (b"X-Seed", b"7")]


def test_the_head_of_an_answer_is_read_again_if_more_than_its_date_differs() -> None:
    first = read_answer_head(ANSWER)
    assert (first.content_type, first.lines) == (
        b"text/json",
        "Content-Type: Text/JSON\r\nX-Seed: 7\r\n",
    )
    assert repr(first) == "<AnswerHead of 3 headers>"
    later = [ANSWER[0], (b"Date", b"2"), ANSWER[2]]
    assert read_answer_head(later, first) is first
    other = [*ANSWER[:2], (b"X-Seed", b"8")]
    found = read_answer_head(other, first)
    assert found.lines == "Content-Type: Text/JSON\r\nX-Seed: 8\r\n"


def test_what_is_shown_of_a_head_has_none_of_its_headers() -> None:
    head = read_head("POST", (1, 1), FIRST, 1 << 20)
    assert repr(head) == "<Head of 4 headers>"


def test_an_expectation_and_a_priority_are_noted() -> None:
    lines = ((b"expect", b"100-continue"), (b"X-Gollama-Priority", b"batch"))
    head = read_head("POST", (1, 1), lines, 1 << 20)
    assert (head.expects, head.prioritised) == (True, True)
    head = read_head("POST", (1, 1), (HOST,), 1 << 20)
    assert (head.expects, head.prioritised) == (False, False)
