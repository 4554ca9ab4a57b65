"""Nothing reaches a worker without a token that is good (RFC 7519, RFC 8725).

Whatever is wrong with it, the client hears the same, and the worker nothing at all: not
even a connection.  Only the log knows the cause.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from gollama_proxy.config.settings import Revoked
from tests.fakes.asks import CHAT
from tests.fakes.client import Response, Wire, request_head
from tests.fakes.hub import SECRET, RunningHub, mint, running_hub
from tests.fakes.tokens import PUBLIC_KEY_ALGORITHMS, b64, forge, key_pair
from tests.fakes.worker import ScriptedWorker

BODY = b'{"messages":[]}'
KEY = SECRET.encode()
NOW = int(time.time())
CLAIMS = {
    "sub": "alice",
    "iat": NOW,
    "exp": NOW + 3_600,
    "iss": "https://issuer",
    "aud": "hub",
}
HS256 = {"alg": "HS256", "typ": "JWT"}
STRICT = {"auth__issuer": "https://issuer", "auth__audience": "hub"}
CHALLENGE = 'Bearer error="invalid_token"'


def signed(header: dict[str, Any] | None = None, **claims: Any) -> str:
    """Build a token that is signed well; a claim that is None is left out."""
    merged = {k: v for k, v in {**CLAIMS, **claims}.items() if v is not None}
    return forge({**HS256, **(header or {})}, merged, KEY)


def spelled(name: str, value: str) -> str:
    """Build a token with a claim in a spelling that Python would not write."""
    claims = {k: v for k, v in CLAIMS.items() if k != name}
    text = json.dumps(claims)[:-1] + f', "{name}": {value}}}'
    return forge(HS256, text.encode(), KEY)


GOOD = signed()
_HEAD, _CLAIMS, _SIGNATURE = GOOD.split(".")
_RSA = key_pair("RS256")
_OTHER = b"another secret, which the hub does not know"
_JWK = {"kty": "oct", "k": b64(_OTHER)}

# What follows the scheme.
TOKENS: dict[str, str] = {
    "nothing": "",
    "a word": "token",
    "two dots": "..",
    "no signature": f"{_HEAD}.{_CLAIMS}.",
    "two segments": f"{_HEAD}.{_CLAIMS}",
    "five segments, as if encrypted": f"{GOOD}.a.b",
    "padding": GOOD + "=",
    "standard base64": f"{_HEAD}.{_CLAIMS}.+/{_SIGNATURE[2:]}",
    # The algorithm is the hub's choice (RFC 8725, 3.1)
    "none, unsigned": forge({"alg": "none"}, CLAIMS, KEY, signature=b""),
    "None, unsigned": forge({"alg": "None"}, CLAIMS, KEY, signature=b""),
    "nOnE, unsigned": forge({"alg": "nOnE"}, CLAIMS, KEY, signature=b""),
    "none, signed": forge({"alg": "none"}, CLAIMS, KEY),
    "no alg": forge({"typ": "JWT"}, CLAIMS, KEY),
    "alg a list": forge({"alg": ["HS256"]}, CLAIMS, KEY),
    "alg hs256": forge({"alg": "hs256"}, CLAIMS, KEY),
    "HS384": forge({"alg": "HS384"}, CLAIMS, KEY, hash_=hashlib.sha384),
    "HS512": forge({"alg": "HS512"}, CLAIMS, KEY, hash_=hashlib.sha512),
    "RS256": jwt.encode(CLAIMS, _RSA.key, "RS256"),
    "ES256": jwt.encode(CLAIMS, key_pair("ES256").key, "ES256"),
    "EdDSA": jwt.encode(CLAIMS, key_pair("EdDSA").key, "EdDSA"),
    "named RS256": forge({"alg": "RS256"}, CLAIMS, KEY),
    # The key
    "another key": forge(HS256, CLAIMS, _OTHER),
    "an empty key": forge(HS256, CLAIMS, b""),
    "a short key": forge(HS256, CLAIMS, b"secret"),
    "a part of the key": forge(HS256, CLAIMS, KEY[:-1]),
    "a public key as secret": forge(HS256, CLAIMS, _RSA.public.encode()),
    "the signature of other claims": f"{_HEAD}.{_CLAIMS}."
    + signed(sub="bob").rpartition(".")[2],
    # Times
    "no exp": signed(exp=None),
    "exp passed": signed(exp=NOW - 60),
    "exp a string": signed(exp=str(NOW + 3_600)),
    "exp true": signed(exp=True),
    "exp NaN": spelled("exp", "NaN"),
    "exp Infinity": spelled("exp", "Infinity"),
    "exp 1e400": spelled("exp", "1e400"),
    "exp of 5,000 digits": spelled("exp", "9" * 5_000),
    "exp in milliseconds": signed(exp=(NOW + 3_600) * 1_000),
    "exp in two years": signed(exp=NOW + 2 * 366 * 86_400),
    "nbf in the future": signed(nbf=NOW + 86_400),
    "nbf a string": signed(nbf=str(NOW)),
    "iat in the future": signed(iat=NOW + 86_400),
    # Subject, issuer, audience
    "no sub": signed(sub=None),
    "sub a number": signed(sub=7),
    "sub blank": signed(sub=" "),
    "no iss": signed(iss=None),
    "another iss": signed(iss="https://issuer.example"),
    "iss a list": signed(iss=["https://issuer"]),
    "no aud": signed(aud=None),
    "another aud": signed(aud="hubs"),
    "aud a list of others": signed(aud=["x", "y"]),
    "aud an empty list": signed(aud=[]),
    "aud a table": signed(aud={"hub": True}),
    "jti a number": signed(jti=7),
    # Headers of the token
    "kid a list": signed({"kid": ["a"]}),
    "crit unknown": signed({"crit": ["x"], "x": 1}),
    "crit empty": signed({"crit": []}),
    "crit a string": signed({"crit": "exp"}),
    "b64 false": signed({"b64": False}),
    "b64 false and critical": signed({"b64": False, "crit": ["b64"]}),
    "a jwk of its own": forge({**HS256, "jwk": _JWK}, CLAIMS, _OTHER),
    "a jku": forge({**HS256, "jku": "https://127.0.0.1/"}, CLAIMS, _OTHER),
    "an x5u": forge({**HS256, "x5u": "https://127.0.0.1/"}, CLAIMS, _OTHER),
    "kid a path": forge({**HS256, "kid": "../../dev/null"}, CLAIMS, b""),
    "kid an SQL": forge({**HS256, "kid": "' UNION SELECT '' --"}, CLAIMS, b""),
    "header an array": forge(["HS256"], CLAIMS, KEY),
    "header deep": forge(b"[" * 2_000, CLAIMS, KEY),
    "claims deep": forge(HS256, b"[" * 4_000, KEY),
    "claims an array": forge(HS256, [CLAIMS], KEY),
    "claims no UTF-8": forge(HS256, b'{"sub":"\xff"}', KEY),
    # Size
    "9 KiB": signed(padding="x" * (9 << 10)),
}
# Whole header lines.
HEADERS: dict[str, list[tuple[str, str]]] = {
    "no header": [],
    "two of them, both good": [("Authorization", f"Bearer {GOOD}")] * 2,
    "a good one behind a bad one": [
        ("Authorization", "Bearer x"),
        ("authorization", f"Bearer {GOOD}"),
    ],
    "joined with a comma": [("Authorization", f"Bearer {GOOD}, Bearer {GOOD}")],
    "another scheme": [("Authorization", f"Basic {GOOD}")],
    "another scheme, too": [("Authorization", f"Token {GOOD}")],
    "no scheme": [("Authorization", GOOD)],
    "a tab behind the scheme": [("Authorization", f"Bearer\t{GOOD}")],
    "nothing behind the scheme": [("Authorization", f"Bearer{GOOD}")],
    "the scheme twice": [("Authorization", f"Bearer Bearer {GOOD}")],
    "a colon": [("Authorization", f"Bearer: {GOOD}")],
    "in quotes": [("Authorization", f'Bearer "{GOOD}"')],
    "a space in the token": [("Authorization", f"Bearer {_HEAD}. {_CLAIMS}")],
    "to a proxy": [("Proxy-Authorization", f"Bearer {GOOD}")],
    "as an API key of another kind": [("Api-Key", GOOD)],
    "two API keys": [("X-Api-Key", GOOD)] * 2,
    "a bad API key": [("X-Api-Key", f"{GOOD}x")],
    "an API key with a scheme": [("X-Api-Key", f"Bearer {GOOD}")],
    "a good token, and another API key": [
        ("Authorization", f"Bearer {GOOD}"),
        ("X-Api-Key", "sk-ant-1"),
    ],
    "a good API key, and another token": [
        ("Authorization", "Bearer x"),
        ("X-Api-Key", GOOD),
    ],
    "in a cookie": [("Cookie", f"token={GOOD}; Authorization=Bearer {GOOD}")],
    "with an underscore": [("X-Authorization", f"Bearer {GOOD}")],
}


def headers_of_all() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for name, token in TOKENS.items():
        yield name, [("Authorization", f"Bearer {token}")]
    yield from HEADERS.items()


async def ask(
    hub: RunningHub, headers: list[tuple[str, str]], path: str = CHAT
) -> Response:
    fixed = [("X-Request-Id", "the-same")]
    return await hub.post(path, BODY, None, headers=[*headers, *fixed])


def heard(response: Response) -> tuple[Any, ...]:
    """What a client could learn from an answer."""
    kept = [(k, v) for k, v in response.headers if k != "date"]
    return response.status, tuple(kept), response.body


def untouched(worker: ScriptedWorker) -> None:
    """The hub asked how it is, on a connection for each question, and no more."""
    assert worker.requests == []
    assert worker.connections == len(worker.control)


async def test_every_bad_token_gets_the_same_401_and_no_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.access")
    async with ScriptedWorker() as worker, running_hub(worker, **STRICT) as hub:
        answers = {}
        for name, headers in headers_of_all():
            answers[name] = await ask(hub, headers)
            assert answers[name].status == 401, name
        for parameter in ("token", "access_token", "api_key", "Authorization"):
            answers[parameter] = await ask(hub, [], f"{CHAT}?{parameter}={GOOD}")
        untouched(worker)
        # And the door is not just shut.
        answer = await ask(hub, [("Authorization", f"Bearer {GOOD}")])
        assert answer.status == 200
        assert len(worker.requests) == 1
    assert len(answers) > 80
    assert len({heard(answer) for answer in answers.values()}) == 1
    one = answers["nothing"]
    assert one.header("www-authenticate") == CHALLENGE
    assert one.json()["error"]["code"] == "invalid_api_key"
    # Only the log distinguishes them; and it holds no token.
    causes = {line.__dict__["fields"].get("detail") for line in caplog.records}
    assert len(causes) > 20
    text = "\n".join(str(line.__dict__) for line in caplog.records)
    for part in (_CLAIMS, _SIGNATURE, SECRET):
        assert part not in text


async def test_a_token_of_64_kib_is_refused() -> None:
    long = [("Authorization", "Bearer " + "x" * (64 << 10))]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        assert (await ask(hub, long)).status == 431
        untouched(worker)
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, limits__head="1MiB") as hub,
    ):
        for token in ("x" * (64 << 10), signed(padding="x" * (64 << 10))):
            answer = await ask(hub, [("Authorization", f"Bearer {token}")])
            assert answer.status == 401
            assert answer.header("www-authenticate") == CHALLENGE
        untouched(worker)


@pytest.mark.parametrize("byte", [0, 1, 9, 10, 13, 31, 32, 127, 128, 255])
@pytest.mark.parametrize("where", ["behind", "within", "before"])
async def test_no_inserted_byte_makes_a_bad_token_valid(where: str, byte: int) -> None:
    """A NUL, a line end, a letter that is none: refused as HTTP or as a token."""
    token, odd = GOOD.encode(), bytes([byte])
    line = {
        "behind": b"Bearer " + token + odd + b"x",
        "within": b"Bearer " + token[:50] + odd + token[50:],
        "before": odd + b"Bearer " + token,
    }[where]
    start = request_head("POST", CHAT, headers=[("Content-Length", str(len(BODY)))])
    message = start[:-2] + b"Authorization: " + line + b"\r\n\r\n" + BODY
    async with ScriptedWorker() as worker, running_hub(worker, **STRICT) as hub:
        async with await hub.wire() as wire:
            await wire.send(message)
            status = (await wire.read_response()).status
        if where == "before" and byte in (9, 32):
            assert status == 200  # spaces before a value are no part of it
        else:
            assert status in (400, 401)
            untouched(worker)


async def flips_are_refused(token: bytes, bits: int = 8, **settings: Any) -> None:
    """Send a token with so many bits of each of its bytes flipped, one at a time."""
    start = request_head("POST", CHAT, headers=[("Content-Length", str(len(BODY)))])
    start = start[:-2] + b"Authorization: Bearer "
    async with ScriptedWorker() as worker, running_hub(worker, **settings) as hub:
        wire: Wire | None = None
        for position in range(len(token)):
            for bit in range(bits):
                flipped = bytearray(token)
                flipped[position] ^= 1 << (position + bit) % 8
                wire = wire or await hub.wire()
                await wire.send(start + bytes(flipped) + b"\r\n\r\n" + BODY)
                response = await wire.read_response()
                odd = not 32 <= flipped[position] < 127
                assert response.status == 401 or (odd and response.status == 400)
                if response.status == 400:  # which ends the connection
                    wire.close()
                    wire = None
        untouched(worker)
        wire = await hub.wire()
        await wire.send(start + token + b"\r\n\r\n" + BODY)
        assert (await wire.read_response()).status == 200


async def test_a_flipped_bit_makes_a_token_invalid() -> None:
    """Each bit of each byte: 1,500 tokens, one after another on a connection."""
    await flips_are_refused(mint(sub="a", iat=None).encode())


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA"])
async def test_a_flipped_bit_makes_a_token_invalid_for_a_public_key(
    algorithm: str, tmp_path: Path
) -> None:
    pair = key_pair(algorithm)
    file = tmp_path / "public.pem"
    file.write_text(pair.public)
    token = jwt.encode({"sub": "a", "exp": NOW + 3_600}, pair.key, algorithm)
    # Two of each byte: the rest of the path is the same as for a secret.
    settings = {"auth__algorithm": algorithm, "auth__public_key_file": file}
    await flips_are_refused(token.encode(), bits=2, **settings)


@pytest.mark.parametrize("configured", PUBLIC_KEY_ALGORITHMS)
async def test_a_public_key_accepts_only_tokens_of_its_private_key(
    configured: str, tmp_path: Path
) -> None:
    """Not for itself as a secret (CVE-2022-29217), nor for another algorithm."""
    pair = key_pair(configured)
    file = tmp_path / "public.pem"
    file.write_text(pair.public)
    claims = {"sub": "alice", "exp": NOW + 3_600}
    bad = [
        mint(sub="alice"),
        forge({"alg": "HS256"}, claims, pair.public.encode()),
        forge({"alg": configured}, claims, pair.public.encode()),
        forge({"alg": "none"}, claims, b"", signature=b""),
        *(
            jwt.encode(claims, key_pair(other, 1).key, other)
            for other in PUBLIC_KEY_ALGORITHMS
        ),
    ]
    settings = {"auth__algorithm": configured, "auth__public_key_file": file}
    async with ScriptedWorker() as worker, running_hub(worker, **settings) as hub:
        for token in bad:
            answer = await ask(hub, [("Authorization", f"Bearer {token}")])
            assert answer.status == 401
            assert answer.header("www-authenticate") == CHALLENGE
        untouched(worker)
        good = jwt.encode(claims, pair.key, configured)
        answer = await ask(hub, [("Authorization", f"Bearer {good}")])
        assert answer.status == 200


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {GOOD}",
        f"bearer {GOOD}",  # RFC 9110, 11.1: schemes have no case
        f"BEARER {GOOD}",
        f"Bearer   {GOOD}",
        f"Bearer {GOOD}  ",
        f"Bearer {signed(iat=None)}",  # RFC 7519, 4.1.6: optional
        f"Bearer {signed(aud=['x', 'hub'])}",
        f"Bearer {signed({'typ': 'at+jwt'})}",
        f"Bearer {signed({'kid': '../../dev/null'})}",
        f"Bearer {signed({'jku': 'https://127.0.0.1/', 'jwk': _JWK})}",
        f"Bearer {signed(nbf=NOW - 60, jti='a')}",
    ],
)
async def test_good_tokens_are_accepted(value: str) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **STRICT) as hub:
        assert (await ask(hub, [("Authorization", value)])).status == 200
        # No worker sees the subject of a request.
        assert worker.requests[0].header("authorization") is None


async def test_each_request_of_a_connection_is_judged_by_its_own_token() -> None:
    """What is remembered of a head serves no other one, nor a token revoked since."""
    async with ScriptedWorker() as worker, running_hub(worker.url) as hub:
        good, bad = mint(sub="alice"), mint(sub="alice")[:-1] + "!"
        async with await Wire.connect("127.0.0.1", hub.port) as wire:

            async def status(token: str | None) -> int:
                await wire.post(CHAT, BODY, token)
                return (await wire.read_response()).status

            found = [await status(token) for token in (good, good, bad, good, None)]
            assert found == [200, 200, 401, 200, 401]
            assert await status(good) == 200
            hub.hub.authenticator.revoke(Revoked(subjects=frozenset({"alice"})))
            assert await status(good) == 401
            assert await status(mint(sub="bob")) == 200
