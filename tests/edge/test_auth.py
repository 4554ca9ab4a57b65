"""Only a token that the hub's key has signed, and that is valid now, opens the door."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Auth, Config, Revoked
from gollama_proxy.config.values import ConfigError
from gollama_proxy.edge import auth
from gollama_proxy.edge.auth import (
    ANONYMOUS,
    MAX_TOKEN,
    SUSPENDED,
    Authenticator,
    AuthError,
    Principal,
    mint,
)
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code, HubError, RequestError
from gollama_proxy.wire.headers import Head, read_head
from tests.fakes import requests, tokens
from tests.fakes.cases import case
from tests.fakes.clock import Clock
from tests.fakes.hub import SECRET as HUB_SECRET
from tests.fakes.hub import mint as mint_for_hub
from tests.fakes.hub import running_hub
from tests.fakes.tokens import PUBLIC_KEY_ALGORITHMS, b64, key_pair
from tests.fakes.worker import ScriptedWorker

NOW = 1_800_000_000
LEEWAY = 30
YEAR = 366 * 86_400  # auth.max_lifetime
SECRET = b"the secret of the tests, 32 bytes"
OTHER_SECRET = b"another secret of the tests, 32+ bytes"
CLAIMS = {"sub": "alice", "iat": NOW, "exp": NOW + 3600}


# --- Keys and tokens --------------------------------------------------------------


def authenticator(
    *secrets: bytes, clock: Callable[[], float] | None = None, **settings: Any
) -> Authenticator:
    """Make one for HS256, with the secrets given, at the time of `NOW`."""
    loaded = Config(auth=Auth(**settings), secrets=secrets or (SECRET,))
    return Authenticator(loaded, clock or Clock(NOW))


def authenticator_of(algorithm: str, *public_keys: str) -> Authenticator:
    # A secret that is set beside is of no use to anybody.
    loaded = Config(
        auth=Auth(algorithm=algorithm), secrets=(SECRET,), public_keys=public_keys
    )
    return Authenticator(loaded, Clock(NOW))


def forge(header: Any, claims: Any = None, key: bytes = SECRET, **more: Any) -> str:
    return tokens.forge(header, CLAIMS if claims is None else claims, key, **more)


def signed(claims: Any = None, key: bytes = SECRET, **more: Any) -> str:
    """Build a token that is signed well, whatever it claims."""
    if isinstance(claims, bytes):
        return forge({"alg": "HS256"}, claims, key)
    return forge({"alg": "HS256"}, {**CLAIMS, **(claims or {}), **more}, key)


def without(name: str) -> str:
    return forge({"alg": "HS256"}, {k: v for k, v in CLAIMS.items() if k != name})


def raw_claim(name: str, value: str) -> str:
    """Build a token with a claim in a spelling that Python would not write."""
    claims = {k: v for k, v in CLAIMS.items() if k != name}
    return signed(json.dumps(claims)[:-1].encode() + f', "{name}": {value}}}'.encode())


def bearer(token: str) -> list[str]:
    return [f"Bearer {token}"]


def refused(who: Authenticator, headers: list[str]) -> AuthError:
    with pytest.raises(AuthError) as caught:
        who.authenticate(headers)
    return caught.value


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the tokens whose signature gets checked, one entry for each check."""
    checked: list[str] = []
    decode = jwt.PyJWT.decode

    def spy(self: jwt.PyJWT, token: Any, *args: Any, **kwargs: Any) -> Any:
        checked.append(token)
        return decode(self, token, *args, **kwargs)

    monkeypatch.setattr(jwt.PyJWT, "decode", spy)
    return checked


# --- What is refused --------------------------------------------------------------

_PUBLIC = {name: key_pair(name).public.encode() for name in PUBLIC_KEY_ALGORITHMS}

REFUSED: dict[str, str] = {
    # No token at all
    "empty": "",
    "a word": "token",
    "two segments": "a.b",
    "dots": "..",
    "four segments": signed() + ".a",
    "no signature": signed().rpartition(".")[0] + ".",
    "padding": signed() + "=",
    "padding within": signed().replace(".", "=.", 1),
    "standard base64": signed(padding="~~~???>>>" * 3).translate(
        str.maketrans("-_", "+/")
    ),
    "header is not base64": "!" + signed(),
    "header is not JSON": forge(b"alg=HS256"),
    "header is not UTF-8": forge(b'{"alg":"HS256","x":"\xff"}'),
    "header is an array": forge(["HS256"]),
    "header is a thousand arrays": forge(b"[" * 1000),
    "payload is not JSON": signed(b"sub=alice"),
    "payload is an array": forge({"alg": "HS256"}, [CLAIMS]),
    "payload is a thousand arrays": signed(b"[" * 5000),
    "payload is empty": signed(b""),
    # The algorithm
    "alg missing": forge({"typ": "JWT"}),
    "alg null": forge({"alg": None}),
    "alg a number": forge({"alg": 256}),
    "alg empty": forge({"alg": ""}),
    "alg in lower case": forge({"alg": "hs256"}),
    "alg with a space": forge({"alg": "HS256 "}),
    "alg none, unsigned": forge({"alg": "none"}, signature=b""),
    "alg None, unsigned": forge({"alg": "None"}, signature=b""),
    "alg nOnE, unsigned": forge({"alg": "nOnE"}, signature=b""),
    "alg NONE, unsigned": forge({"alg": "NONE"}, signature=b""),
    "alg none, signed": forge({"alg": "none"}),
    "alg HS384": forge({"alg": "HS384"}, hash_=hashlib.sha384),
    "alg HS512": forge({"alg": "HS512"}, hash_=hashlib.sha512),
    "alg RS256, signed with the secret": forge({"alg": "RS256"}),
    "alg RS256": jwt.encode(CLAIMS, key_pair("RS256").key, "RS256"),
    "alg PS256": jwt.encode(CLAIMS, key_pair("RS256").key, "PS256"),
    "alg ES256": jwt.encode(CLAIMS, key_pair("ES256").key, "ES256"),
    "alg EdDSA": jwt.encode(CLAIMS, key_pair("EdDSA").key, "EdDSA"),
    # The key
    "another key": signed(key=OTHER_SECRET),
    "empty key": signed(key=b""),
    "a part of the key": signed(key=SECRET[:-1]),
    "signed with a public key": signed(key=_PUBLIC["RS256"]),
    "half a signature": forge({"alg": "HS256"}, signature=b"\0" * 16),
    "empty signature": forge({"alg": "HS256"}, signature=b""),
    "signature of something else": signed().rpartition(".")[0]
    + "."
    + signed(sub="bob").rpartition(".")[2],
    "its own key in the header": forge(
        {"alg": "HS256", "jwk": {"kty": "oct", "k": b64(OTHER_SECRET)}},
        key=OTHER_SECRET,
    ),
    # exp
    "exp missing": without("exp"),
    "exp null": signed(exp=None),
    "exp a string": signed(exp=str(NOW + 3600)),
    "exp a word": signed(exp="soon"),
    "exp a list": signed(exp=[NOW + 3600]),
    "exp true": signed(exp=True),
    "exp negative": signed(exp=-NOW),
    "exp zero": signed(exp=0),
    "exp NaN": raw_claim("exp", "NaN"),
    "exp Infinity": raw_claim("exp", "Infinity"),
    "exp 1e400": raw_claim("exp", "1e400"),
    "exp 2**53": signed(exp=2**53),
    "exp in milliseconds": signed(exp=1000 * (NOW + 3600)),
    "exp a bit too far ahead": signed(exp=NOW + YEAR + LEEWAY + 1),
    "exp of 5000 digits": raw_claim("exp", "9" * 5000),
    "exp just passed": signed(exp=NOW - LEEWAY),
    "exp long passed": signed(exp=1),
    # nbf and iat
    "nbf in the future": signed(nbf=NOW + LEEWAY + 1),
    "nbf a string": signed(nbf=str(NOW)),
    "nbf null": signed(nbf=None),
    "nbf true": signed(nbf=True),
    "nbf negative": signed(nbf=-1),
    "nbf NaN": raw_claim("nbf", "NaN"),
    "iat in the future": signed(iat=NOW + LEEWAY + 1),
    "iat a string": signed(iat=str(NOW)),
    "iat null": signed(iat=None),
    "iat huge": signed(iat=10**30),
    # sub
    "sub missing": without("sub"),
    "sub null": signed(sub=None),
    "sub a number": signed(sub=7),
    "sub a list": signed(sub=["alice"]),
    "sub true": signed(sub=True),
    "sub empty": signed(sub=""),
    "sub blank": signed(sub=" \t\n"),
    # What it may do
    "models a string": signed(models="qwen"),
    "models a number": signed(models=7),
    "models a table": signed(models={"qwen": True}),
    "models with a number": signed(models=["qwen", 7]),
    "models with null": signed(models=[None]),
    "models false": signed(models=False),
    "scope a list": signed(scope=["admin"]),
    "scope a number": signed(scope=7),
    "scope null": signed(scope=None),
    "scope true": signed(scope=True),
    **{
        f"{name} {what}": signed(**{name: value})
        for name in ("rpm", "tpm", "max_concurrency", "tokens_per_month")
        for what, value in {
            "a string": "60",
            "a fraction": 60.5,
            "no integer": 60.0,
            "true": True,
            "null": None,
            "a list": [60],
            "zero": 0,
            "negative": -1,
        }.items()
    },
    "rpm NaN": raw_claim("rpm", "NaN"),
    "rpm 1e400": raw_claim("rpm", "1e400"),
    "priority unknown": signed(priority="urgent"),
    "priority in upper case": signed(priority="BATCH"),
    "priority empty": signed(priority=""),
    "priority null": signed(priority=None),
    "priority a number": signed(priority=1),
    "priority a list": signed(priority=["batch"]),
    "priority a table": signed(priority={"batch": True}),
    "jti a number": signed(jti=7),
    "jti null": signed(jti=None),
    "jti a list": signed(jti=["a1"]),
    # Headers of the token
    "kid a number": forge({"alg": "HS256", "kid": 7}),
    "kid null": forge({"alg": "HS256", "kid": None}),
    "crit unknown": forge({"alg": "HS256", "crit": ["exp"], "exp": 1}),
    "crit empty": forge({"alg": "HS256", "crit": []}),
    "crit a string": forge({"alg": "HS256", "crit": "b64", "b64": True}),
    "crit of numbers": forge({"alg": "HS256", "crit": [7]}),
    "b64 false": forge({"alg": "HS256", "b64": False}),
    "b64 false and critical": forge({"alg": "HS256", "b64": False, "crit": ["b64"]}),
    "b64 false, detached": forge(
        {"alg": "HS256", "b64": False, "crit": ["b64"]}, b"", signature=b"\0" * 32
    ),
    # Bytes
    "9 KiB": signed(padding="x" * (9 << 10)),
    "64 KiB": "x" * (64 << 10),
    "a NUL behind it": signed() + "\0",
    "a NUL in it": signed().replace(".", "\0.", 1),
    "a tab behind it": signed() + "\t",
    "a space in it": signed().replace(".", " .", 1),
    "a line end behind it": signed() + "\n",
    "letters beyond ASCII": signed() + "é",
    "digits beyond ASCII": signed().replace(".", "١.", 1),
    "bytes that are no UTF-8": signed() + "\udcff",
}


def test_a_token_that_is_not_good_is_refused() -> None:
    for name in REFUSED:
        with case(name):
            who = authenticator(leeway=LEEWAY)
            error = refused(who, bearer(REFUSED[name]))
            assert error.code is Code.INVALID_API_KEY
            assert error.detail, "the log should know why"
            assert REFUSED[name] not in error.detail or not REFUSED[name]


@pytest.mark.parametrize("name", ["rpm", "tpm", "tokens_per_day", "priority"])
def test_the_log_names_the_claim_that_is_wrong(name: str) -> None:
    error = refused(authenticator(), bearer(signed(**{name: [7]})))
    assert error.detail.startswith(f"{name} is not a ")


def test_every_refusal_reads_the_same() -> None:
    """The cause is for the log: it would show an attacker how far a guess got."""
    who = authenticator()
    errors = [refused(who, bearer(token)) for token in REFUSED.values()]
    errors += [refused(who, []), refused(who, ["Basic eA=="])]
    assert len({error.body() for error in errors}) == 1
    assert len({error.detail for error in errors}) > 20
    [body] = {error.body() for error in errors}
    assert json.loads(body)["error"]["type"] == "authentication_error"
    assert isinstance(errors[0], RequestError)


GOOD = signed()


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [f"Bearer {GOOD}", f"Bearer {GOOD}"],
        [f"Bearer {GOOD}", "Basic eA=="],
        ["Bearer x", f"Bearer {GOOD}"],
        [f"Bearer {GOOD}", ""],
        [GOOD],
        [""],
        ["Bearer"],
        ["Bearer "],
        [f"Bearer{GOOD}"],
        [f"Bearer\t{GOOD}"],
        [f" Bearer {GOOD}"],
        [f"Basic {GOOD}"],
        [f"Token {GOOD}"],
        [f"JWT {GOOD}"],
        [f"Bearer, Bearer {GOOD}"],
        [f"Bearer {GOOD}, Bearer {GOOD}"],
        [f"Bearer {GOOD},"],
        [f'Bearer "{GOOD}"'],
        [f"Bearer token={GOOD}"],
        [f"Bearer Bearer {GOOD}"],
    ],
)
def test_exactly_one_bearer_token_is_asked_for(headers: list[str]) -> None:
    assert refused(authenticator(), headers).detail


@pytest.mark.parametrize(
    "header",
    [
        f"Bearer {GOOD}",
        f"bearer {GOOD}",
        f"BEARER {GOOD}",
        f"bEaReR {GOOD}",
        f"Bearer    {GOOD}",
        f"Bearer {GOOD}  ",
    ],
)
def test_the_scheme_has_any_case_and_any_spaces_behind_it(header: str) -> None:
    assert authenticator().authenticate([header]).subject == "alice"


# --- What is accepted -------------------------------------------------------------

ACCEPTED: dict[str, tuple[str, Principal]] = {
    "as it is minted": (
        GOOD,
        Principal("alice", None, frozenset(), NOW + 3600 + LEEWAY),
    ),
    "no iat": (without("iat"), Principal("alice", expires=NOW + 3600 + LEEWAY)),
    "exp within the leeway": (
        signed(exp=NOW - LEEWAY + 1),
        Principal("alice", expires=NOW + 1),
    ),
    "exp a fraction": (
        signed(exp=NOW + 0.5),
        Principal("alice", expires=NOW + 0.5 + LEEWAY),
    ),
    "exp as far ahead as may be": (
        signed(exp=NOW + YEAR + LEEWAY),
        Principal("alice", expires=float(NOW + YEAR + 2 * LEEWAY)),
    ),
    "nbf within the leeway": (
        signed(nbf=NOW + LEEWAY),
        Principal("alice", expires=NOW + 3600 + LEEWAY),
    ),
    "iat within the leeway": (
        signed(iat=NOW + LEEWAY + 0.0),
        Principal("alice", expires=NOW + 3600 + LEEWAY),
    ),
    "nbf and iat passed": (
        signed(nbf=0, iat=0),
        Principal("alice", expires=NOW + 3600 + LEEWAY),
    ),
    "models": (
        signed(models=["qwen*", "phi"]),
        Principal("alice", ("qwen*", "phi"), expires=NOW + 3600 + LEEWAY),
    ),
    "no models": (
        signed(models=[]),
        Principal("alice", (), expires=NOW + 3600 + LEEWAY),
    ),
    "models null": (
        signed(models=None),
        Principal("alice", None, expires=NOW + 3600 + LEEWAY),
    ),
    "scopes": (
        signed(scope=" admin  metrics "),
        Principal("alice", None, frozenset({"admin", "metrics"}), NOW + 3600 + LEEWAY),
    ),
    "a name beyond ASCII": (
        signed(sub="Zoë 😀"),
        Principal("Zoë 😀", expires=NOW + 3600 + LEEWAY),
    ),
    "aud and iss that were not asked for": (
        signed(aud=["a", "b"], iss="https://x"),
        Principal("alice", expires=NOW + 3600 + LEEWAY),
    ),
    "limits": (
        signed(
            rpm=60,
            tpm=10**15,
            max_concurrency=1,
            tokens_per_day=7,
            tokens_per_month=8,
            priority="batch",
        ),
        Principal(
            "alice",
            expires=NOW + 3600 + LEEWAY,
            rpm=60,
            tpm=10**15,
            max_concurrency=1,
            tokens_per_day=7,
            tokens_per_month=8,
            priority=Priority.BATCH,
        ),
    ),
    "one limit": (
        signed(tpm=1, priority="interactive"),
        Principal("alice", expires=NOW + 3600 + LEEWAY, tpm=1),
    ),
    "unknown claims": (
        signed(admin=True, jti="1", scp=["admin"]),
        Principal("alice", expires=NOW + 3600 + LEEWAY),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_good_token_identifies_its_sender(name: str) -> None:
    token, principal = ACCEPTED[name]
    assert authenticator(leeway=LEEWAY).authenticate(bearer(token)) == principal


@pytest.mark.parametrize(
    "header",
    [
        {"kid": "../../../../dev/null"},
        {"kid": "' OR 1=1 --"},
        {"kid": ""},
        {"jku": "https://attacker.example/keys"},
        {"x5u": "https://attacker.example/cert"},
        {"jwk": {"kty": "oct", "k": "AA"}},
        {"x5c": ["AA"]},
        {"typ": "anything"},
        {"cty": "JWT"},
        {"b64": True},
        {"zip": "DEF"},
    ],
)
def test_no_header_of_a_token_chooses_its_key(header: dict[str, Any]) -> None:
    """RFC 8725, 3.10: nothing is looked up, fetched or believed but `alg`."""
    token = forge({"alg": "HS256", **header})
    assert authenticator().authenticate(bearer(token)).subject == "alice"
    other = forge({"alg": "HS256", **header}, key=OTHER_SECRET)
    assert refused(authenticator(), bearer(other)).detail


def test_a_token_may_have_8_kib_and_not_a_byte_more() -> None:
    def of_length(length: int) -> str:
        for kid in ("", "x", "xx"):  # base64 leaves gaps, which a second part fills
            header = {"alg": "HS256", "kid": kid}
            padding = "x" * (
                (length - len(forge(header, {**CLAIMS, "x": ""}))) * 3 // 4
            )
            for more in ("", "x", "xx"):
                token = forge(header, {**CLAIMS, "x": padding + more})
                if len(token) == length:
                    return token
        raise AssertionError(length)

    longest, too_long = of_length(MAX_TOKEN), of_length(MAX_TOKEN + 1)
    assert (len(longest), len(too_long)) == (8 << 10, (8 << 10) + 1)
    assert authenticator().authenticate(bearer(longest)).subject == "alice"
    assert refused(authenticator(), bearer(too_long)).detail == "token too long"


def test_a_token_that_is_too_long_is_not_looked_at(verifications: list[str]) -> None:
    refused(authenticator(), bearer("x" * (64 << 10)))
    assert verifications == []


@pytest.mark.parametrize(
    ("issuer", "audience", "claims", "good"),
    [
        ("https://a", "", {"iss": "https://a"}, True),
        ("https://a", "", {}, False),
        ("https://a", "", {"iss": "https://b"}, False),
        ("https://a", "", {"iss": "https://a/"}, False),
        ("https://a", "", {"iss": "https://"}, False),  # a part of it is not it
        ("https://a", "", {"iss": ["https://a"]}, False),
        ("https://a", "", {"iss": None}, False),
        ("https://a", "", {"iss": "https://a", "aud": "x"}, True),
        ("", "hub", {"aud": "hub"}, True),
        ("", "hub", {"aud": ["hub"]}, True),
        ("", "hub", {"aud": ["x", "hub"]}, True),
        ("", "hub", {"aud": ["x"]}, False),
        ("", "hub", {"aud": "x"}, False),
        ("", "hub", {"aud": "hubs"}, False),
        ("", "hub", {"aud": "hu"}, False),
        ("", "hub", {"aud": "HUB"}, False),
        ("", "hub", {"aud": []}, False),
        ("", "hub", {"aud": ""}, False),
        ("", "hub", {"aud": None}, False),
        ("", "hub", {"aud": {"hub": 1}}, False),
        ("", "hub", {"aud": ["hub", 7]}, False),
        ("", "hub", {}, False),
        ("https://a", "hub", {"iss": "https://a", "aud": "hub"}, True),
        ("https://a", "hub", {"iss": "https://a"}, False),
        ("https://a", "hub", {"aud": "hub"}, False),
    ],
)
def test_issuer_and_audience_are_checked_where_they_are_configured(
    issuer: str, audience: str, claims: dict[str, Any], good: bool
) -> None:
    who = authenticator(issuer=issuer, audience=audience)
    if good:
        assert who.authenticate(bearer(signed(claims))).subject == "alice"
    else:
        assert refused(who, bearer(signed(claims))).detail


def test_without_authentication_every_client_is_anonymous() -> None:
    who = authenticator(mode="off")
    for headers in ([], ["Bearer x"], ["Basic x", "Basic y"]):
        assert who.authenticate(headers) is ANONYMOUS


# --- Keys -------------------------------------------------------------------------


def test_without_a_key_no_token_is_accepted() -> None:
    who = Authenticator(Config(), Clock(NOW))
    assert refused(who, bearer(GOOD)).detail == "no key is configured"
    who = authenticator_of("RS256")  # although there is a secret
    assert refused(who, bearer(GOOD)).detail == "no key is configured"


def test_both_secrets_of_a_rotation_are_good() -> None:
    loaded = config.load(
        None,
        {
            "GOLLAMA_JWT_SECRET": SECRET.decode(),
            "GOLLAMA_JWT_SECRET_PREVIOUS": OTHER_SECRET.decode(),
        },
    )
    who = Authenticator(loaded, Clock(NOW))
    assert who.authenticate(bearer(signed())).subject == "alice"
    assert who.authenticate(bearer(signed(sub="bob", key=OTHER_SECRET)))
    third = b"a third secret that is not configured"
    assert "ignature" in refused(who, bearer(signed(key=third))).detail
    # The old secret opens nothing that its claims do not.
    assert refused(who, bearer(signed(exp=1, key=OTHER_SECRET))).detail == (
        "token has expired"
    )


def test_only_a_wrong_signature_makes_the_next_key_tried(
    verifications: list[str],
) -> None:
    who = authenticator(SECRET, OTHER_SECRET)
    refused(who, bearer(signed(sub=None)))
    assert len(verifications) == 1
    refused(who, bearer(signed(sub=None, key=OTHER_SECRET)))
    assert len(verifications) == 3


def test_a_secret_that_is_too_short_opens_nothing() -> None:
    """RFC 7518, 3.2.  The loader refuses it, too; here is the second line."""
    short = b"only 31 bytes: no match for us."
    assert len(short) == 31
    assert "32 bytes" in refused(authenticator(short), bearer(signed(key=short))).detail
    empty = authenticator(b"")
    assert refused(empty, bearer(signed(key=b""))).detail


@pytest.mark.parametrize("algorithm", PUBLIC_KEY_ALGORITHMS)
def test_one_pem_file_may_hold_several_keys(algorithm: str, tmp_path: Path) -> None:
    pairs = [key_pair(algorithm, number) for number in range(4)]
    file = tmp_path / "keys.pem"
    file.write_text("# 2026\n" + "\n".join(pair.public for pair in pairs[:3]))
    environ = {
        "GOLLAMA_AUTH_ALGORITHM": algorithm,
        "GOLLAMA_AUTH_PUBLIC_KEY_FILE": str(file),
    }
    who = Authenticator(config.load(None, environ), Clock(NOW))
    for number, pair in enumerate(pairs[:3]):
        token = jwt.encode({**CLAIMS, "sub": f"user {number}"}, pair.key, algorithm)
        assert who.authenticate(bearer(token)).subject == f"user {number}"
    stranger = jwt.encode(CLAIMS, pairs[3].key, algorithm)
    assert "ignature" in refused(who, bearer(stranger)).detail


@pytest.mark.parametrize("configured", PUBLIC_KEY_ALGORITHMS)
@pytest.mark.parametrize("used", ["HS256", *PUBLIC_KEY_ALGORITHMS])
def test_a_token_does_not_choose_its_algorithm(configured: str, used: str) -> None:
    """RFC 8725, 3.1: not even if the secret that it was signed with is known here."""
    who = authenticator_of(configured, key_pair(configured).public)
    key = SECRET if used == "HS256" else key_pair(used).key
    token = jwt.encode(CLAIMS, key, used)
    if used == configured:
        assert who.authenticate(bearer(token)).subject == "alice"
    else:
        assert refused(who, bearer(token)).detail


def test_a_secret_that_is_long_enough_for_more_signs_by_hs256_only() -> None:
    secret = b"x" * 64
    who = authenticator(secret)
    for name, hash_ in (("HS384", hashlib.sha384), ("HS512", hashlib.sha512)):
        token = forge({"alg": name}, key=secret, hash_=hash_)
        assert jwt.PyJWS().decode(token, secret, [name])
        assert refused(who, bearer(token)).detail
    assert who.authenticate(bearer(signed(key=secret))).subject == "alice"


@pytest.mark.parametrize("algorithm", PUBLIC_KEY_ALGORITHMS)
def test_a_public_key_is_no_secret(algorithm: str) -> None:
    """CVE-2022-29217: what everybody knows must not sign."""
    public = key_pair(algorithm).public
    who = authenticator_of(algorithm, public)
    for alg in ("HS256", algorithm):
        for key in (public.encode(), public.strip().encode(), b"", SECRET):
            assert refused(who, bearer(forge({"alg": alg}, key=key))).detail


@pytest.mark.parametrize("algorithm", PUBLIC_KEY_ALGORITHMS)
@pytest.mark.parametrize("signature", [b"", b"\0", b"\0" * 64, b"\xff" * 256])
def test_a_signature_of_any_length_can_be_wrong(
    algorithm: str, signature: bytes
) -> None:
    who = authenticator_of(algorithm, key_pair(algorithm).public)
    token = forge({"alg": algorithm}, signature=signature)
    assert refused(who, bearer(token)).detail


@pytest.mark.parametrize("algorithm", PUBLIC_KEY_ALGORITHMS)
def test_a_key_that_does_not_fit_the_algorithm_is_refused_at_the_start(
    algorithm: str,
) -> None:
    other = {"RS256": "ES256", "ES256": "EdDSA", "EdDSA": "RS256"}[algorithm]
    for key in (key_pair(other).public, "-----BEGIN PUBLIC KEY-----\nnone", ""):
        with pytest.raises(ConfigError, match=f"a key that is not {algorithm}"):
            authenticator_of(algorithm, key)


# --- A byte of difference ---------------------------------------------------------


@functools.cache
def good_for(algorithm: str) -> tuple[Authenticator, bytes]:
    """Make a token, and an authenticator that has seen it."""
    if algorithm == "HS256":
        who, token = authenticator(), GOOD
    else:
        pair = key_pair(algorithm)
        who = authenticator_of(algorithm, pair.public)
        token = jwt.encode(CLAIMS, pair.key, algorithm)
    who.authenticate(bearer(token))
    return who, token.encode()


def refused_with(who: Authenticator, token: bytes) -> None:
    refused(who, bearer(token.decode("utf-8", "surrogateescape")))


def test_a_token_with_one_bit_flipped_is_refused() -> None:
    who, token = good_for("HS256")
    for position in range(len(token)):
        for bit in range(8):
            flipped = bytearray(token)
            flipped[position] ^= 1 << bit
            refused_with(who, bytes(flipped))
    assert who.authenticate(bearer(token.decode())).subject == "alice"


@pytest.mark.parametrize("algorithm", ["HS256", *PUBLIC_KEY_ALGORITHMS])
@given(position=st.integers(-(10**4), -1), byte=st.integers(0, 255))
@example(position=-1, byte=ord("="))
@example(position=-1, byte=ord(" "))
@example(position=-1, byte=ord("."))
@example(position=0, byte=ord(" "))
@settings(deadline=None)  # the first one makes the key
def test_a_token_with_one_other_byte_is_refused(
    algorithm: str, position: int, byte: int
) -> None:
    who, token = good_for(algorithm)
    changed = bytearray(token)
    position %= len(token)
    if changed[position] != byte:
        changed[position] = byte
        refused_with(who, bytes(changed))


@given(st.text(st.characters(max_codepoint=255), max_size=300))
@example("Bearer " + ".".join(["eyJhbGciOiJIUzI1NiJ9"] * 3))
def test_whatever_a_header_holds_is_refused_and_nothing_else(header: str) -> None:
    refused(good_for("HS256")[0], [header])
    refused(good_for("ES256")[0], [f"Bearer {header}"])


# --- What was verified before -----------------------------------------------------


def test_a_good_token_is_verified_once(verifications: list[str]) -> None:
    who = authenticator()
    first = who.authenticate(bearer(GOOD))
    again = who.authenticate([f"bearer   {GOOD} "])
    assert verifications == [GOOD]
    assert again is first


def test_a_bad_token_is_never_remembered(verifications: list[str]) -> None:
    who = authenticator()
    bad = [signed(key=OTHER_SECRET), signed(exp=1), signed(sub="")]
    for token in bad * 2:
        refused(who, bearer(token))
    assert verifications == bad * 2
    assert "known=0" in repr(who)


def test_a_remembered_token_ends_when_it_expires(verifications: list[str]) -> None:
    clock = Clock(NOW)
    who = authenticator(clock=clock, leeway=LEEWAY)
    token = signed(exp=NOW + 100)
    who.authenticate(bearer(token))
    clock.advance(100 + LEEWAY - 0.001)
    assert who.authenticate(bearer(token)).subject == "alice"
    clock.advance(0.001)
    assert refused(who, bearer(token)).detail == "token has expired"
    assert "known=0" in repr(who)
    assert verifications == [token]
    assert refused(who, bearer(token)).detail == "token has expired"
    assert verifications == [token, token]


@pytest.mark.parametrize(("late", "good"), [(-0.5, True), (0.0, False), (0.5, False)])
def test_memory_and_verification_agree_on_the_moment_of_expiry(
    late: float, good: bool
) -> None:
    clock = Clock(NOW)
    knows = authenticator(clock=clock, leeway=LEEWAY)
    token = signed(exp=NOW + 100)
    knows.authenticate(bearer(token))
    clock.advance(100 + LEEWAY + late)
    for who in (knows, authenticator(clock=clock, leeway=LEEWAY)):
        if good:
            assert who.authenticate(bearer(token)).subject == "alice"
        else:
            assert refused(who, bearer(token)).detail == "token has expired"


def test_the_least_recently_used_token_is_forgotten(verifications: list[str]) -> None:
    who = authenticator(cache_size=2)
    a, b, c = (signed(sub=name) for name in "abc")
    for token in (a, b, a, c):  # b has waited longest
        who.authenticate(bearer(token))
    assert verifications == [a, b, c]
    assert "known=2" in repr(who)
    for token in (a, c):
        who.authenticate(bearer(token))
    assert verifications == [a, b, c]
    who.authenticate(bearer(b))
    assert verifications == [a, b, c, b]


def test_a_cache_of_no_size_remembers_nothing(verifications: list[str]) -> None:
    who = authenticator(cache_size=0)
    for _ in range(2):
        assert who.authenticate(bearer(GOOD)).subject == "alice"
    assert verifications == [GOOD, GOOD]
    assert "known=0" in repr(who)


def test_many_subjects_do_not_grow_the_memory() -> None:
    who = authenticator(cache_size=10)
    for number in range(50):
        who.authenticate(bearer(signed(sub=f"user {number}")))
    assert "known=10" in repr(who)


def test_no_secret_and_no_token_shows() -> None:
    who = authenticator(SECRET, OTHER_SECRET)
    who.authenticate(bearer(GOOD))
    assert repr(who) == "<Authenticator HS256 keys=2 known=1>"
    off = repr(authenticator(mode="off"))
    assert off == "<Authenticator off keys=1 known=0>"
    error = refused(who, bearer(signed(key=b"x" * 32)))
    loaded = Config(secrets=(SECRET,))
    shown = f"{who!r} {error!r} {error} {error.__cause__} {loaded!r} {vars(who)}"
    for hidden in (*GOOD.split("."), SECRET.decode(), OTHER_SECRET.decode()):
        # Only the keys themselves are kept, where debuggers can see them.
        assert hidden not in shown.replace(str(who._keys), "")


# --- Revoked tokens and subjects --------------------------------------------------


@pytest.mark.parametrize(
    ("revoked", "detail"),
    [
        (Revoked(tokens=frozenset({"a1"})), "jti is revoked"),
        (Revoked(subjects=frozenset({"alice"})), "sub is revoked"),
        (Revoked(frozenset({"a1"}), frozenset({"alice"})), "sub is revoked"),
    ],
)
def test_a_revoked_subject_is_refused_at_once(revoked: Revoked, detail: str) -> None:
    """Also a token that was good a moment ago, and until it is revoked no more."""
    who = authenticator()
    token = signed(jti="a1")
    for _ in range(2):
        assert who.authenticate(bearer(token)).subject == "alice"
        who.revoke(revoked)
        for _ in range(2):
            assert refused(who, bearer(token)).detail == detail
        who.revoke(Revoked())
    from_the_start = Authenticator(
        Config(secrets=(SECRET,), revoked=revoked), Clock(NOW)
    )
    assert refused(from_the_start, bearer(token)).detail == detail


def test_no_other_subject_is_revoked() -> None:
    who = authenticator()
    who.revoke(Revoked(frozenset({"a1", "alice"}), frozenset({"a2", "Alice", "alic"})))
    for claims in ({}, {"jti": "a2"}, {"jti": "A1"}, {"jti": ""}, {"jti": "a1x"}):
        assert who.authenticate(bearer(signed(claims))).subject == "alice"


def test_spaces_around_a_name_do_not_matter_to_a_revocation() -> None:
    """A line of the file cannot have them."""
    who = authenticator()
    who.revoke(Revoked(frozenset({"a1"}), frozenset({"bob"})))
    assert refused(who, bearer(signed(jti=" a1\n"))).detail == "jti is revoked"
    assert refused(who, bearer(signed(sub="\tbob "))).detail == "sub is revoked"


def test_a_revoked_token_was_signed_well() -> None:
    """The log must not take a forged one for it."""
    who = authenticator()
    who.revoke(Revoked(subjects=frozenset({"alice"})))
    assert "ignature" in refused(who, bearer(signed(key=OTHER_SECRET))).detail


# --- How long a token may live ----------------------------------------------------


@pytest.mark.parametrize(
    ("longest", "leeway", "exp", "good"),
    [
        (60, 0, NOW + 60, True),
        (60, 0, NOW + 61, False),
        (60, 10, NOW + 70, True),  # a clock that is ahead of ours
        (60, 10, NOW + 71, False),
        (0, 0, 2**53 - 1, True),
    ],
)
def test_a_token_lives_as_long_as_it_may(
    longest: float, leeway: float, exp: int, good: bool
) -> None:
    who = authenticator(max_lifetime=longest, leeway=leeway)
    if good:
        assert who.authenticate(bearer(signed(exp=exp))).subject == "alice"
    else:
        detail = refused(who, bearer(signed(exp=exp))).detail
        assert detail == "exp lies further ahead than auth.max_lifetime"


# --- Tokens of our own ------------------------------------------------------------


def test_what_is_minted_is_accepted() -> None:
    token = mint(
        SECRET,
        "HS256",
        "alice",
        3600.9,
        models=["qwen*"],
        scopes=["admin", "metrics"],
        issuer="https://a",
        audience="hub",
        now=NOW + 0.9,
    )
    who = authenticator(issuer="https://a", audience="hub", leeway=0)
    expected = Principal(
        "alice", ("qwen*",), frozenset({"admin", "metrics"}), NOW + 3600
    )
    assert who.authenticate(bearer(token)) == expected


def test_limits_are_minted_as_they_are_read() -> None:
    limits = {"rpm": 1, "tpm": 2, "max_concurrency": 3}
    token = mint(
        SECRET, "HS256", "alice", 60, limits=limits, priority=Priority.BATCH, now=NOW
    )
    who = authenticator().authenticate(bearer(token))
    assert (who.rpm, who.tpm, who.max_concurrency, who.priority) == (1, 2, 3, "batch")


def test_a_minted_token_has_only_the_requested_claims() -> None:
    token = mint(SECRET, "HS256", "alice", 60, now=NOW)
    claims = jwt.decode(token, options={"verify_signature": False})
    assert re.fullmatch("[0-9a-f]{16}", claims.pop("jti"))
    assert claims == {"sub": "alice", "iat": NOW, "exp": NOW + 60}


def test_each_minted_token_has_another_id() -> None:
    minted = [mint(SECRET, "HS256", "alice", 60, now=NOW) for _ in range(2)]
    minted.append(mint(SECRET, "HS256", "alice", 60, token_id="laptop", now=NOW))
    names = [jwt.decode(t, options={"verify_signature": False})["jti"] for t in minted]
    assert names[2] == "laptop"
    assert len(set(names)) == 3


@pytest.mark.parametrize("algorithm", PUBLIC_KEY_ALGORITHMS)
def test_a_private_key_mints_for_its_public_key(algorithm: str) -> None:
    pair = key_pair(algorithm)
    token = mint(pair.private, algorithm, "alice", 60, now=NOW)
    who = authenticator_of(algorithm, pair.public)
    assert who.authenticate(bearer(token)).subject == "alice"


def test_a_token_is_minted_for_now() -> None:
    before = int(time.time())
    token = mint(SECRET.decode(), "HS256", "alice", 60)
    who = Authenticator(Config(secrets=(SECRET,)))  # both by the real clock
    expires = who.authenticate(bearer(token)).expires - Auth().leeway
    assert before + 60 <= expires <= time.time() + 60


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (b"short", "HS256"),
        (b"", "HS256"),
        (None, "HS256"),
        (7, "HS256"),
        (SECRET, "RS256"),
        (SECRET, "ES256"),
        (SECRET, "EdDSA"),
        ("-----BEGIN PRIVATE KEY-----\nnone", "RS256"),
        (key_pair("ES256").private, "RS256"),
        (key_pair("RS256").private, "EdDSA"),
        (key_pair("RS256").public, "HS256"),
    ],
)
def test_a_key_that_cannot_sign_is_reported(key: Any, algorithm: str) -> None:
    with pytest.raises(
        ValueError, match=f"the key cannot sign {algorithm}: "
    ) as reported:
        mint(key, algorithm, "alice", 60)
    if isinstance(key, str | bytes) and key:
        assert str(key) not in str(reported.value)


# --- At the door ------------------------------------------------------------------


async def test_every_refusal_is_the_same_bytes_to_a_client() -> None:
    """The same status, headers and body, whatever was wrong; no worker is touched."""
    good = mint_for_hub(sub="alice")
    causes: list[tuple[str, list[tuple[str, str]]]] = [
        ("nothing sent", []),
        ("not a bearer", [("Authorization", "Basic eA==")]),
        ("two headers", [("Authorization", f"Bearer {good}")] * 2),
        ("no token", [("Authorization", "Bearer ")]),
        ("garbage", [("Authorization", "Bearer x")]),
        ("9 KiB", [("Authorization", "Bearer " + "x" * (9 << 10))]),
        ("no UTF-8", [("Authorization", "Bearer \xff")]),
        ("expired", [("Authorization", f"Bearer {mint_for_hub(sub='a', exp=1)}")]),
        ("no sub", [("Authorization", f"Bearer {mint_for_hub()}")]),
        (
            "another key",
            [("Authorization", f"Bearer {mint_for_hub('x' * 32, sub='alice')}")],
        ),
        ("unsigned", [("Authorization", f"Bearer {forge({'alg': 'none'})}")]),
        ("an API key", [("X-Api-Key", good + "x")]),
        ("a cookie", [("Cookie", f"token={good}")]),
        ("through a proxy", [("Proxy-Authorization", f"Bearer {good}")]),
    ]
    payload: dict[str, Any] = {"messages": []}
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        answers = {}
        for name, headers in causes:
            headers = [*headers, ("X-Request-Id", "the-same")]
            answers[name] = await hub.post(
                "/v1/chat/completions", payload, None, headers=headers
            )
            assert answers[name].status == 401, name
        for parameter in ("token", "access_token", "api_key", "key", "Authorization"):
            path = f"/v1/chat/completions?{parameter}={good}"
            answers[parameter] = await hub.post(
                path, payload, None, headers=[("X-Request-Id", "the-same")]
            )
        assert worker.requests == []
        assert worker.connections == len(worker.control)

    def seen(response: Any) -> tuple[Any, ...]:
        kept = [(k, v) for k, v in response.headers if k != "date"]
        return response.status, tuple(kept), response.body

    assert len({seen(answer) for answer in answers.values()}) == 1
    one = answers["garbage"]
    assert one.header("www-authenticate") == 'Bearer error="invalid_token"'
    assert one.header("content-type") == "application/json"
    assert one.json()["error"]["code"] == "invalid_api_key"
    assert HUB_SECRET not in repr(one)


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/embeddings", "/v1/models", "/metrics"]
)
async def test_every_route_with_substance_has_the_same_door(path: str) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        if path in ("/v1/models", "/metrics"):
            strange = await hub.get(path, None)
            known = await hub.get(path)
        else:
            strange = await hub.post(path, {}, None)
            known = await hub.post(path, {"messages": [], "input": "x"})
    assert (strange.status, known.status) == (401, 200)
    assert strange.body == refused(authenticator(), []).body()


# --- Log and repr -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "cause"),
    [
        ([], "0 Authorization headers"),
        (["Basic YTpi"], "not a Bearer token"),
        (bearer("a.b"), "not three parts of base64url"),
        (bearer(signed(sub=" ")), "sub is not a name"),
        (bearer(signed(models="qwen")), "models is not a list of strings"),
        (bearer(signed(scope=["admin"])), "scope is not a string"),
        (bearer(signed(exp=1 << 53)), "exp is out of range"),
        (
            bearer(forge({"alg": "HS256", "crit": ["secret"], "secret": 1})),
            "Unsupported critical extension",  # not which: it may be anything
        ),
    ],
)
def test_the_log_has_the_cause_and_the_client_has_not(
    headers: list[str], cause: str
) -> None:
    error = refused(authenticator(), headers)
    assert error.detail == cause
    assert error.message == (
        "Missing or invalid token. Send 'Authorization: Bearer <token>' "
        "or 'x-api-key: <token>' with a token of this hub."
    )


def test_a_principal_shows_its_subject_and_no_other_claim() -> None:
    principal = authenticator().authenticate(bearer(signed(models=["secret"])))
    assert repr(principal) == "<Principal 'alice'>"
    assert principal.models == ("secret",)


def test_other_settings_count_for_tokens_that_were_accepted_before() -> None:
    checker = authenticator()
    token = bearer(signed())
    assert checker.authenticate(token).subject == "alice"
    checker.revoke(Revoked(subjects=frozenset({"bob"})))
    checker.reconfigure(Config(auth=Auth(issuer="x"), secrets=(SECRET,)))
    assert refused(checker, token).detail
    accepted = bearer(signed(iss="x"))
    assert checker.authenticate(accepted).subject == "alice"
    assert refused(checker, bearer(signed(iss="x", sub="bob"))).detail
    checker.reconfigure(Config(auth=Auth(), secrets=(OTHER_SECRET,)))
    assert refused(checker, accepted).detail
    checker.reconfigure(Config(auth=Auth(mode="off")))
    assert checker.authenticate([]).subject == "anonymous"


def test_a_wrong_key_changes_nothing() -> None:
    checker = authenticator()
    auth = Auth(algorithm="ES256", public_key_file="keys.pem")
    with pytest.raises(ConfigError, match="holds a key that is not ES256"):
        checker.reconfigure(Config(auth=auth, public_keys=("no key",)))
    assert checker.authenticate(bearer(signed())).subject == "alice"


def test_a_key_of_another_kind_is_named_by_its_file() -> None:
    loaded = Config(
        auth=Auth(algorithm="ES256", public_key_file="keys.pem"),
        public_keys=("no key",),
    )
    with pytest.raises(ConfigError) as caught:
        Authenticator(loaded)
    text = "auth.public_key_file = 'keys.pem': holds a key that is not ES256"
    assert str(caught.value) == text


async def test_the_record_of_a_request_names_its_subject() -> None:
    record = Record("1", "POST")
    headers = {"Authorization": f"Bearer {signed()}"}
    request = requests.request("POST", "/", headers=headers)
    assert authenticator().identify(request, record).subject == "alice"
    assert record.subject == "alice"


# --- x-api-key --------------------------------------------------------------------


def test_a_token_may_come_as_an_api_key_alone_or_beside_itself() -> None:
    who, token = authenticator(), signed()
    for headers in ([], bearer(token)):
        assert who.authenticate(headers, [token]).subject == "alice"


@pytest.mark.parametrize(
    ("headers", "api_keys"),
    [
        ([], ["", ""]),
        ([], [signed(), signed()]),
        ([], [""]),
        ([], ["sk-ant-1"]),
        ([], bearer(signed())),
        (bearer(signed()), [signed(sub="bob")]),
        (bearer(signed(sub="bob")), [signed()]),
        (bearer(signed()), [""]),
        (bearer(""), [signed()]),
        (["Basic YTpi"], [signed()]),
        (bearer(signed()), [signed(), signed()]),
        (bearer(signed()) * 2, [signed()]),
        ([], [signed(exp=NOW - 60)]),
        ([], ["x" * (MAX_TOKEN + 1)]),
    ],
)
def test_two_tokens_or_a_bad_one_are_refused(
    headers: list[str], api_keys: list[str]
) -> None:
    who = authenticator()
    with pytest.raises(AuthError) as caught:
        who.authenticate(headers, api_keys)
    assert caught.value.message == refused(authenticator(), []).message
    assert not any(key in caught.value.detail for key in api_keys if key)


def test_an_api_key_is_remembered_and_revoked_as_the_same_token(
    verifications: list[str],
) -> None:
    who, token = authenticator(), signed()
    who.authenticate(bearer(token))
    who.authenticate([], [token])
    assert len(verifications) == 1
    who.revoke(Revoked(subjects=frozenset({"alice"})))
    with pytest.raises(AuthError):
        who.authenticate([], [token])


def test_the_token_of_a_request_is_found_without_being_checked() -> None:
    who = authenticator()
    both = {"Authorization": "Bearer  X.b.X ", "X-Api-Key": " X.b.X "}
    for headers in (both, *({name: value} for name, value in both.items())):
        assert who.token_in(requests.request(headers=headers)) == "X.b.X"
    differing = {"Authorization": "Bearer a.b.c", "X-Api-Key": "other"}
    for headers, why in (
        (differing, "Authorization and x-api-key differ"),
        ({}, "0 Authorization headers"),
    ):
        with pytest.raises(AuthError) as caught:
            who.token_in(requests.request(headers=headers))
        assert caught.value.detail == why
    assert authenticator(mode="off").token_in(requests.request()) == ""


def test_no_token_is_accepted_while_revocations_may_be_missed(
    verifications: list[str],
) -> None:
    who, token = authenticator(), signed()
    who.authenticate(bearer(token))
    who.suspend()
    with pytest.raises(HubError) as caught:
        who.authenticate(bearer(token))
    error = caught.value
    assert (error.code, error.retry_after) == (Code.STORE_DOWN, SUSPENDED)
    assert error.message.startswith("This hub has not reached the store")
    with pytest.raises(AuthError):  # as ever
        who.authenticate([])
    who.resume()
    assert who.authenticate(bearer(token)).subject == "alice"
    assert len(verifications) == 2


def test_a_hub_without_authentication_is_not_suspended() -> None:
    who = authenticator(mode="off")
    who.suspend()
    assert not who.suspended
    assert who.authenticate([]) is ANONYMOUS


async def test_an_api_key_opens_every_route_and_reaches_no_worker() -> None:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        token = hub.token()
        keys = [("X-API-Key", token), ("anthropic-version", "2023-06-01")]
        for path in ("/v1/messages", "/v1/chat/completions"):
            assert (await hub.post(path, body, None, headers=keys)).status == 200
        assert (await hub.get("/v1/models", None, headers=keys)).status == 200
        other = [("x-api-key", hub.token("bob"))]
        assert (await hub.post("/v1/messages", body, headers=other)).status == 401
        assert not any(token.encode() in request.head for request in worker.requests)


class Modules:
    """Modules that are loaded, in the place of `sys` and `importlib`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.modules: dict[str, Any] = {name: object() for name in names}
        self.imported: list[tuple[str, bool]] = []  # with cryptography kept out?
        self.error: Exception | None = None
        monkeypatch.setattr(auth, "sys", self)
        monkeypatch.setattr(auth, "importlib", self)

    def load_jwt(self, *, crypto: bool) -> None:
        algorithms = SimpleNamespace(has_crypto=crypto)
        self.modules["jwt"] = SimpleNamespace(algorithms=algorithms)
        self.modules["jwt.algorithms"] = algorithms

    def import_module(self, name: str) -> None:
        kept_out = self.modules.get("cryptography", self) is None
        self.imported.append((name, kept_out))
        if self.error is not None:
            raise self.error


def test_cryptography_is_kept_out_while_pyjwt_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = Modules(monkeypatch)
    auth._import_pyjwt("HS256")
    assert loaded.imported == [("jwt", True)]
    loaded.error = ImportError("jwt")
    with pytest.raises(ImportError):
        auth._import_pyjwt("HS256")
    assert not loaded.modules, "it can be imported by others"


def test_what_is_loaded_is_kept_for_hs256(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Modules(monkeypatch, "cryptography")
    auth._import_pyjwt("HS256")
    assert not loaded.imported
    loaded = Modules(monkeypatch)
    loaded.load_jwt(crypto=False)
    auth._import_pyjwt("HS256")
    assert not loaded.imported
    assert "jwt" in loaded.modules


def test_pyjwt_is_imported_anew_once_cryptography_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = Modules(monkeypatch, "jwtx", "json")
    auth._import_pyjwt("ES256")
    for crypto, left in (
        (True, {"jwt", "jwt.algorithms", "jwtx", "json"}),
        (False, {"jwtx", "json"}),
    ):
        loaded.load_jwt(crypto=crypto)
        auth._import_pyjwt("ES256")
        assert set(loaded.modules) == left
    assert not loaded.imported


def test_pyjwt_is_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Modules(monkeypatch)
    key = key_pair("ES256").public
    loads = [authenticator(), authenticator_of("ES256", key)]
    found = [each.preloaded for each in loads]
    for crypto in (False, True):
        loaded.load_jwt(crypto=crypto)
        found += [each.preloaded for each in loads]
    assert found == [False, False, True, False, True, True]


def test_cryptography_is_imported_only_for_an_algorithm_that_needs_it() -> None:
    """It takes more memory than all modules of the hub."""
    script = f"""
import sys, time
from gollama_proxy.config.settings import Auth, Config
from gollama_proxy.edge.auth import Authenticator, mint

secret = "s" * 32
hub = Authenticator(Config(secrets=(secret.encode(),)))
assert not hub.preloaded
assert Authenticator(Config(auth=Auth(mode="off"))).preloaded
hub.preload()
assert hub.preloaded
token = mint(secret, "HS256", "alice", 60)
assert hub.authenticate(["Bearer " + token]).subject == "alice"
assert "cryptography" not in sys.modules

public, private = {key_pair("ES256").public!r}, {key_pair("ES256").private!r}
auth = Auth(algorithm="ES256", public_key_file="key.pem")
hub.reconfigure(Config(auth=auth, public_keys=(public,)))
assert hub.preloaded  # by the check of the key
token = mint(private, "ES256", "bob", 60)
assert hub.authenticate(["Bearer " + token]).subject == "bob"
hub.reconfigure(Config(secrets=(secret.encode(),)))
assert hub.authenticate(["Bearer " + mint(secret, "HS256", "eve", 60)]).subject == "eve"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- The next request on a connection -------------------------------------------


def head_of(token: str) -> Head:
    lines = [(b"Authorization", b"Bearer " + token.encode()), (b"Content-Length", b"2")]
    return read_head("POST", (1, 1), tuple(lines), 1 << 16)


def identify(checker: Authenticator, token: str, head: Head) -> str:
    request = requests.request(headers={"Authorization": f"Bearer {token}"})
    return checker.identify(request, Record("1", "POST", head=head)).subject


def test_a_token_that_was_accepted_is_not_hashed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker, token = authenticator(), signed()
    head = head_of(token)
    assert identify(checker, token, head) == "alice"
    monkeypatch.setattr(auth, "_digest_of", None)
    assert identify(checker, token, head) == "alice"


def test_an_accepted_token_is_rejected_once_it_has_expired_or_is_revoked() -> None:
    clock = Clock(NOW)
    checker, token = authenticator(clock=clock), signed()
    head = head_of(token)
    assert identify(checker, token, head) == "alice"
    checker.revoke(Revoked(subjects=frozenset({"alice"})))
    with pytest.raises(AuthError):
        identify(checker, token, head)
    checker.revoke(Revoked())
    assert identify(checker, token, head) == "alice"
    clock.advance(3600 + LEEWAY)
    for _ in range(2):
        with pytest.raises(AuthError):
            identify(checker, token, head)


def test_a_rejected_token_leaves_nothing_for_the_next_request() -> None:
    head = head_of("not a token")
    with pytest.raises(AuthError):
        identify(authenticator(), "not a token", head)
    assert not head.token
