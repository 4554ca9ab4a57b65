"""Tokens built by hand, so that each part can be wrong, and keys to sign with."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

PUBLIC_KEY_ALGORITHMS = ("RS256", "ES256", "EdDSA")


class KeyPair(NamedTuple):
    private: str  # PEM
    public: str
    key: Any  # the private one, to sign with: PEM of RSA takes 50 ms to load


@functools.cache
def key_pair(algorithm: str, number: int = 0) -> KeyPair:
    """Make a key, once; `number` distinguishes keys of one algorithm."""
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
    match algorithm:
        case "RS256":
            key = rsa.generate_private_key(65537, 2048)
        case "ES256":
            key = ec.generate_private_key(ec.SECP256R1())
        case _:
            key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return KeyPair(private.decode(), public.decode(), key)


def b64(data: bytes) -> str:
    """Encode as RFC 7515, 2, does: base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forge(
    header: Any,
    claims: Any,
    key: bytes,
    *,
    hash_: Callable[..., Any] = hashlib.sha256,
    signature: bytes | None = None,
) -> str:
    """Build a token; a header or claims that are bytes stay as they are."""
    parts = [
        part if isinstance(part, bytes) else json.dumps(part).encode()
        for part in (header, claims)
    ]
    signed = ".".join(map(b64, parts))
    if signature is None:
        signature = hmac.new(key, signed.encode(), hash_).digest()
    return f"{signed}.{b64(signature)}"
