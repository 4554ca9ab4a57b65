"""Token in, `Principal` out: JWT bearer tokens (RFC 7519), checked by RFC 8725.

A token is sent in `Authorization`, or in `x-api-key`, as Anthropic's SDKs do; if a
request has both, they must be equal.

The algorithm is chosen by the settings, never by the token (RFC 8725, 3.1).  Clients
get the same answer for every rejected token; the log has the reason.

Checking a signature takes 20 µs for HS256 and at least 100 µs for other algorithms, and
a chat front end sends the same token with every request.  Valid tokens are therefore
cached, by their hash, until they expire or the list of revoked tokens changes.

A token is checked only at the start of its request: a running answer continues after
its token has expired or has been revoked.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from gollama_proxy.config.settings import Config, Revoked
from gollama_proxy.config.values import ConfigError
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code, HubError, RequestError

# Functions import PyJWT, so that a hub listens before that (`preload`).
if TYPE_CHECKING:
    import jwt
    from aiohttp import web

SUSPENDED = 10  # seconds after which to try again, while no token is accepted
# Claims that are numbers, or absent.
LIMITS = ("rpm", "tpm", "max_concurrency", "tokens_per_day", "tokens_per_month")
MAX_TOKEN = 8 << 10  # bytes; checked before anything is decoded
# Built into Python, and quicker to begin than those of OpenSSL, or with a size.
_digest_of = hashlib.blake2b
# RFC 7515, 7.1 and 2: without padding, so that no token has a second spelling.
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class Principal(msgspec.Struct, frozen=True, gc=False):
    """The subject of a token and its permissions."""

    subject: str
    models: tuple[str, ...] | None = None  # shell-like patterns; None allows all
    scopes: frozenset[str] = frozenset()
    expires: float = float("inf")  # Unix time, leeway included
    # Limits of the subject; None: no limit.
    rpm: int | None = None  # requests a minute
    tpm: int | None = None  # tokens a minute
    max_concurrency: int | None = None  # requests that run at once
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    priority: Priority = Priority.INTERACTIVE  # the highest class it may use
    metered: bool = False  # set here: whether it has a quota (`quotas.py`)

    def __post_init__(self) -> None:
        limits = self.rpm, self.tpm, self.tokens_per_day, self.tokens_per_month
        metered = any(limit is not None for limit in limits)
        msgspec.structs.force_setattr(self, "metered", metered)

    def __repr__(self) -> str:  # without the other claims of the token
        return f"<Principal {self.subject!r}>"


ANONYMOUS = Principal("anonymous", scopes=frozenset({"admin", "worker"}))


class AuthError(RequestError):
    """401, with the same text for every cause; `detail` has the cause for the log."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            Code.INVALID_API_KEY,
            "Missing or invalid token. Send 'Authorization: Bearer <token>' "
            "or 'x-api-key: <token>' with a token of this hub.",
            detail=cause,
        )


class Authenticator:
    """Checks the tokens of requests.  `clock` gives Unix time in seconds."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self._revoked = config.revoked
        self._clock = clock
        self._known: OrderedDict[bytes, Principal] = OrderedDict()
        # Whether no token is accepted, as revocations may have been missed.
        self.suspended = False
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Check tokens by other settings and keys from now on.

        The list of revoked tokens stays: `revoke` replaces it.

        Raises:
            ConfigError: a key does not fit the algorithm; nothing has changed then.
        """
        keys: Sequence[bytes | str] = config.secrets
        if config.auth.algorithm != "HS256":
            keys = config.public_keys
            for key in keys:
                _check_key(config, key)
        self._off = config.auth.mode == "off"
        self._auth = config.auth
        self.__dict__.pop("_decoder", None)
        self._keys = keys
        self._known.clear()

    def __repr__(self) -> str:
        mode = "off" if self._off else self._auth.algorithm
        return f"<Authenticator {mode} keys={len(self._keys)} known={len(self._known)}>"

    @property
    def preloaded(self) -> bool:
        """Whether what checks a token is imported, or not needed."""
        return self._off or _has_pyjwt(self._auth.algorithm)

    def preload(self) -> None:
        """Import what checks a token; it takes a moment and reads files."""
        if not self._off:
            self._decoder  # noqa: B018

    def identify(self, request: web.BaseRequest, record: Record) -> Principal:
        """Return the sender of a request, and set the subject of its record.

        Raises:
            AuthError: see `authenticate`.
        """
        principal = ANONYMOUS
        if not self._off:
            head = record.head
            known = None if head is None else self._recall(head.token)
            if known is None:
                digest, known = self._check(self.token_in(request))
                if head is not None:
                    head.token = digest  # for the next request on its connection
            principal = known
        record.subject = principal.subject
        return principal

    def token_in(self, request: web.BaseRequest) -> str:
        """Return the token of a request, unchecked; "" where none is needed.

        Raises:
            AuthError: it has none, or several.
        """
        if self._off:
            return ""
        headers = request.headers
        return _token_in(
            headers.getall("Authorization", ()), headers.getall("X-Api-Key", ())
        )

    def authenticate(
        self, headers: Sequence[str], api_keys: Sequence[str] = ()
    ) -> Principal:
        """Return the sender of a request.

        `headers` are the values of its `Authorization` headers, `api_keys` those of
        its `x-api-key` headers.

        Raises:
            AuthError: they do not contain exactly one token, or it is not valid.
            HubError: no token is accepted now.
        """
        if self._off:
            return ANONYMOUS
        return self._check(_token_in(headers, api_keys))[1]

    def _check(self, token: str) -> tuple[bytes, Principal]:
        """Return the hash of a token, and its subject.

        Raises:
            AuthError: it is not valid.
            HubError: no token is accepted now.
        """
        if len(token) > MAX_TOKEN:
            raise AuthError("token too long")
        digest = _digest_of(token.encode("utf-8", "surrogateescape")).digest()
        principal = self._recall(digest)
        if principal is None:
            principal = self._verify(token)
            self._remember(digest, principal)
        return digest, principal

    def _recall(self, digest: bytes) -> Principal | None:
        """Return the subject of a token that was accepted before, by its hash.

        Raises:
            AuthError: the token has expired.
        """
        known, clock = self._known, self._clock  # a local is cheaper to call
        principal = known.get(digest)
        if principal is not None:
            if principal.expires <= clock():
                del known[digest]
                raise AuthError("token has expired")
            known.move_to_end(digest)
        return principal

    def revoke(self, revoked: Revoked) -> None:
        """Replace the list of revoked tokens; it applies to cached tokens as well."""
        self._revoked = revoked
        self._known.clear()

    def suspend(self) -> None:
        """Accept no token until `resume`; without authentication, nothing changes."""
        self.suspended = not self._off
        self._known.clear()  # so that each token is verified, and rejected

    def resume(self) -> None:
        """Accept tokens again; harmless if they are."""
        self.suspended = False

    def _remember(self, digest: bytes, principal: Principal) -> None:
        self._known[digest] = principal
        if len(self._known) > self._auth.cache_size:
            self._known.popitem(last=False)

    # --- Verification -------------------------------------------------------------

    def _verify(self, token: str) -> Principal:
        if self.suspended:
            text = (
                "This hub has not reached the store that it shares with other hubs for "
                "too long to know which tokens are revoked. Please try again later."
            )
            raise HubError(Code.STORE_DOWN, text, retry_after=SUSPENDED)
        if not _COMPACT.fullmatch(token):
            raise AuthError("not three parts of base64url")
        decoder = self._decoder  # first, as it may import PyJWT anew
        import jwt

        error = AuthError("no key is configured")
        for key in self._keys:
            try:
                claims = self._decode(decoder, token, key)
            except jwt.InvalidSignatureError as exc:
                error = AuthError(str(exc))  # it may be signed with the other key
            except (jwt.PyJWTError, ValueError, TypeError) as exc:
                # After a colon, the text quotes the token, which may be anything.
                raise AuthError(str(exc).partition(":")[0]) from None
            else:
                return self._principal(claims)
        raise error from None

    @functools.cached_property
    def _decoder(self) -> jwt.PyJWT:
        return _new_decoder(self._auth.algorithm)

    def _decode(
        self, decoder: jwt.PyJWT, token: str, key: bytes | str
    ) -> Mapping[str, Any]:
        """Check the signature and the claims, except times (see `_principal`)."""
        auth = self._auth
        claims: dict[str, Any] = decoder.decode(
            token,
            key,
            algorithms=[auth.algorithm],
            audience=auth.audience or None,
            issuer=auth.issuer or None,
            options={
                "require": ["exp", "sub"],
                "verify_aud": bool(auth.audience),
                "verify_iss": bool(auth.issuer),
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
            },
        )
        return claims

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        now, leeway = self._clock(), self._auth.leeway
        expires = _seconds(claims, "exp") + leeway
        if expires <= now:
            raise AuthError("token has expired")
        longest = self._auth.max_lifetime
        if longest and expires - 2 * leeway > now + longest:
            raise AuthError("exp lies further ahead than auth.max_lifetime")
        for name in ("nbf", "iat"):
            if name in claims and _seconds(claims, name) - leeway > now:
                raise AuthError(f"{name} lies in the future")
        subject = claims["sub"]
        if not isinstance(subject, str) or not subject.strip():
            raise AuthError("sub is not a name")
        if subject.strip() in self._revoked.subjects:
            raise AuthError("sub is revoked")
        if claims.get("jti", "").strip() in self._revoked.tokens:
            raise AuthError("jti is revoked")
        models = claims.get("models")
        if models is not None:
            models = _strings(models, "models")
        scope = claims.get("scope", "")
        if not isinstance(scope, str):  # RFC 8693, 4.2: one string, spaces between
            raise AuthError("scope is not a string")
        limits: dict[str, Any] = {name: _limit(claims, name) for name in LIMITS}
        return Principal(
            subject,
            models,
            frozenset(scope.split()),
            expires,
            **limits,
            priority=_priority(claims),
        )


def _token_in(headers: Sequence[str], api_keys: Sequence[str]) -> str:
    """Return the one token of a request.

    Raises:
        AuthError: a header is repeated, both differ, or there is none.
    """
    if len(api_keys) > 1:
        raise AuthError(f"{len(api_keys)} x-api-key headers")
    if not headers and api_keys:
        return api_keys[0].strip(" ")
    if len(headers) != 1:
        raise AuthError(f"{len(headers)} Authorization headers")
    scheme, _, token = headers[0].partition(" ")
    if scheme.lower() != "bearer":  # RFC 9110, 11.1: case-insensitive
        raise AuthError("not a Bearer token")
    token = token.strip(" ")
    if api_keys and api_keys[0].strip(" ") != token:
        raise AuthError("Authorization and x-api-key differ")
    return token


def _new_decoder(algorithm: str) -> jwt.PyJWT:
    _import_pyjwt(algorithm)
    import jwt

    return jwt.PyJWT({"enforce_minimum_key_length": True})


def _has_pyjwt(algorithm: str) -> bool:
    loaded = sys.modules.get("jwt")
    if loaded is None:
        return False
    return algorithm == "HS256" or bool(loaded.algorithms.has_crypto)


def _import_pyjwt(algorithm: str) -> None:
    """Import PyJWT, without `cryptography` where the algorithm does not need it.

    For HS256, PyJWT needs only Python's `hmac`; it would import `cryptography` anyway,
    which takes 8 MiB of memory, and half as long as all modules of the hub.
    """
    loaded = sys.modules.get("jwt")
    if algorithm == "HS256":
        if loaded is None and "cryptography" not in sys.modules:
            # Its import fails then, as if it was not installed.
            sys.modules["cryptography"] = None  # type: ignore[assignment]
            try:
                importlib.import_module("jwt")
            finally:
                del sys.modules["cryptography"]
    elif loaded is not None and not loaded.algorithms.has_crypto:
        # It was imported for HS256, and the settings have changed.
        for name in [each for each in sys.modules if each.partition(".")[0] == "jwt"]:
            del sys.modules[name]


def _check_key(config: Config, key: bytes | str) -> None:
    algorithm, file = config.auth.algorithm, config.auth.public_key_file
    if not _is_key(algorithm, key):
        text = f"auth.public_key_file = {file!r}: holds a key that is not {algorithm}"
        raise ConfigError(text)


@functools.lru_cache(maxsize=16)
def _is_key(algorithm: str, key: bytes | str) -> bool:
    """Return whether a key is of an algorithm; a reload asks in a thread first."""
    _import_pyjwt(algorithm)
    import jwt

    try:
        jwt.get_algorithm_by_name(algorithm).prepare_key(key)
    except (jwt.PyJWTError, ValueError, TypeError):
        return False
    return True


def _seconds(claims: Mapping[str, Any], name: str) -> float:
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AuthError(f"{name} is not a number")
    if not 0 <= value < 1 << 53:  # also NaN
        raise AuthError(f"{name} is out of range")
    return float(value)


def _strings(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise AuthError(f"{name} is not a list of strings")
    return tuple(value)


def _limit(claims: Mapping[str, Any], name: str) -> int | None:
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AuthError(f"{name} is not a whole number from 1")
    return value


def _priority(claims: Mapping[str, Any]) -> Priority:
    try:
        return Priority(claims.get("priority", Priority.INTERACTIVE))
    except ValueError:
        raise AuthError("priority is not a known class") from None


# --- Making tokens ----------------------------------------------------------------


def mint(
    key: bytes | str,
    algorithm: str,
    subject: str,
    lifetime: float,
    *,
    models: Sequence[str] = (),
    scopes: Sequence[str] = (),
    issuer: str = "",
    audience: str = "",
    limits: Mapping[str, int] | None = None,
    priority: Priority | None = None,
    token_id: str = "",
    now: float | None = None,
) -> str:
    """Sign a token; `key` is the secret, or a private key in PEM; seconds throughout.

    `limits` are of those in `LIMITS`.  `token_id` is its `jti`, by which it can be
    revoked; a random one by default.

    Raises:
        ValueError: the key does not fit the algorithm.
    """
    decoder = _new_decoder(algorithm)
    import jwt

    issued = int(time.time() if now is None else now)
    claims: dict[str, Any] = {
        "sub": subject,
        "iat": issued,
        "exp": issued + int(lifetime),
        "jti": token_id or secrets.token_hex(8),
    }
    if models:
        claims["models"] = list(models)
    if scopes:
        claims["scope"] = " ".join(scopes)
    claims |= limits or {}
    if priority is not None:
        claims["priority"] = priority
    if issuer:
        claims["iss"] = issuer
    if audience:
        claims["aud"] = audience
    try:
        return decoder.encode(claims, key, algorithm)
    except (jwt.PyJWTError, AttributeError, TypeError, ValueError) as exc:
        raise ValueError(f"the key cannot sign {algorithm}: {exc}") from exc
