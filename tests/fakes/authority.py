"""A certificate authority of the tests' own, and what it signs."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import Any, NamedTuple

import trustme

from tests.fakes.files import replace

HOST = "127.0.0.1"


class Pair(NamedTuple):
    """A certificate and its key, in files."""

    certificate: str
    key: str

    @property
    def settings(self) -> dict[str, Any]:
        """What a hub is given to serve with it."""
        return {
            "server__tls_certificate": self.certificate,
            "server__tls_key": self.key,
        }


class Authority:
    """Signs certificates, and keeps everything in files in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = trustme.CA()
        self.file = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.file)

    def __repr__(self) -> str:
        return f"<Authority {self.folder}>"

    def issue(self, *names: str, file: str = "", expired: bool = False) -> Pair:
        """Sign a certificate for these names, and write it to `file`."""
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        leaf = self.ca.issue_cert(
            *(names or (HOST,)),
            not_before=now - 2 * day,
            not_after=now - day if expired else now + day,
        )
        stem = file or (names[0] if names else HOST)
        pair = Pair(str(self.folder / f"{stem}.pem"), str(self.folder / f"{stem}.key"))
        certificate = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        # The key last: a watcher that reads between the two finds that it does not fit.
        replace(pair.certificate, certificate)
        replace(pair.key, leaf.private_key_pem.bytes())
        return pair

    def server(self, pair: Pair) -> ssl.SSLContext:
        """Make a context for a fake worker."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*pair)
        return context

    def client(self, pair: Pair | None = None) -> ssl.SSLContext:
        """Make the context of a client that trusts this authority and no other."""
        context = ssl.create_default_context(cafile=self.file)
        context.set_alpn_protocols(["h2", "http/1.1"])
        if pair is not None:
            context.load_cert_chain(*pair)
        return context
