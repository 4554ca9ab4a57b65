"""Links that sign in, for all hubs that share a store: made at one, used at another.

    key                 value
    PREFIX:link:DIGEST  a token, encrypted with the code of its link, for five minutes

The store has neither the code nor the token: the name of the key and the key of the
cipher (ChaCha20-Poly1305, RFC 8439) are two hashes of the code, which is random.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from gollama_proxy.control.page import LIFETIME
from gollama_proxy.state.store import Store, StoreDownError

_NONCE = 12  # bytes


class LinksInStore:
    """The links of all hubs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"<LinksInStore {self._store!r}>"

    async def keep(self, code: str, token: str) -> bool:
        """Keep the token of a code; return False if the store cannot be reached."""
        nonce = os.urandom(_NONCE)
        sealed = nonce + _cipher(code).encrypt(nonce, token.encode(), None)
        try:
            await self._store.call("SET", self._key(code), sealed, "EX", LIFETIME)
        except StoreDownError:
            return False
        return True

    async def take(self, code: str) -> str | None:
        """Return the token of a code, and forget it; None if there is none."""
        try:
            sealed = await self._store.call("GETDEL", self._key(code))
        except StoreDownError:
            return None
        if sealed is None:
            return None
        try:
            token = _cipher(code).decrypt(sealed[:_NONCE], sealed[_NONCE:], None)
        except (InvalidTag, ValueError):  # of another program
            return None
        return token.decode()

    def _key(self, code: str) -> str:
        return self._store.key(f"link:{_hash(code, b'name', 16).hex()}")


def _cipher(code: str) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(_hash(code, b"cipher", 32))


def _hash(code: str, use: bytes, size: int) -> bytes:
    return hashlib.blake2b(code.encode(), digest_size=size, person=use).digest()
