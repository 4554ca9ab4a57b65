"""TLS contexts: which files are loaded, and how wrong ones are reported."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from gollama_proxy.config import load as config
from gollama_proxy.config import tls
from gollama_proxy.config.settings import Origin, Server, WorkerConfig
from gollama_proxy.config.values import ConfigError
from tests.fakes.authority import Authority, Pair


def server_of(pair: Pair, **changes: str) -> Server:
    given = {"tls_certificate": pair.certificate, "tls_key": pair.key, **changes}
    return Server(**given)  # type: ignore[arg-type]


def worker_of(**keys: str) -> WorkerConfig:
    origin = Origin("https", "10.0.0.1", 443, "")
    return WorkerConfig("https://10.0.0.1", origin, "attic", **keys)  # type: ignore[arg-type]


# --- Contexts ---------------------------------------------------------------------


def test_the_context_for_clients(authority: Authority) -> None:
    context = tls.server_context(server_of(authority.issue()))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_NONE


def test_a_certificate_and_its_key_in_one_file(authority: Authority) -> None:
    pair = authority.issue()
    both = Path(pair.certificate).read_text() + Path(pair.key).read_text()
    Path(pair.certificate).write_text(both)
    Path(pair.certificate).chmod(0o600)
    tls.server_context(server_of(pair, tls_key=""))


def test_client_certificates_can_be_required(authority: Authority) -> None:
    server = server_of(authority.issue(), tls_client_ca=authority.file)
    context = tls.server_context(server)
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1


def test_the_context_for_workers(authority: Authority) -> None:
    """The name is checked, and `ca_file` replaces the CAs of the system."""
    context = tls.worker_context(worker_of(ca_file=authority.file))
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1
    public = tls.worker_context(worker_of())
    assert public.check_hostname
    assert public.verify_mode == ssl.CERT_REQUIRED


def test_workers_with_the_same_files_share_them(authority: Authority) -> None:
    workers = [
        WorkerConfig(f"{scheme}://w{n}", Origin(scheme, f"w{n}", 1, ""), f"w{n}")
        for n, scheme in enumerate(["http", "https", "https"])
    ]
    known = tls.for_workers(workers)
    assert known.keys() == {"w1", "w2"}
    assert known["w1"] is known["w2"]
    assert not known["w1"].renewable


# --- Wrong files ------------------------------------------------------------------


def no_file(pair: Pair) -> dict[str, str]:
    return {"tls_certificate": "/nowhere"}


def no_key(pair: Pair) -> dict[str, str]:
    return {"tls_key": "/nowhere"}


def empty(pair: Pair) -> dict[str, str]:
    Path(pair.certificate).write_text("")
    return {}


def empty_key(pair: Pair) -> dict[str, str]:
    Path(pair.key).write_text("nothing")
    return {}


def no_key_in_it(pair: Pair) -> dict[str, str]:
    return {"tls_key": ""}


def another_key(pair: Pair) -> dict[str, str]:
    other = Authority(Path(pair.key).parent / "other").issue()
    return {"tls_key": other.key}


def encrypted(pair: Pair) -> dict[str, str]:
    key = serialization.load_pem_private_key(Path(pair.key).read_bytes(), None)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    Path(pair.key).write_bytes(secret)
    return {}


def garbled(pair: Pair) -> dict[str, str]:
    block = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    Path(pair.certificate).write_text(block)
    return {}


def no_ca(pair: Pair) -> dict[str, str]:
    return {"tls_client_ca": pair.key}


def open_key(pair: Pair) -> dict[str, str]:
    Path(pair.key).chmod(0o644)
    return {}


def open_key_in_the_same_file(pair: Pair) -> dict[str, str]:
    both = Path(pair.certificate).read_text() + Path(pair.key).read_text()
    Path(pair.certificate).write_text(both)
    Path(pair.certificate).chmod(0o644)
    return {"tls_key": ""}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (open_key, "127.0.0.1.key': other users have access (mode 0644)"),
        (
            open_key_in_the_same_file,
            "127.0.0.1.pem': other users have access",
        ),
        (no_file, "server.tls_certificate = '/nowhere': cannot be read: No such file"),
        (no_key, "server.tls_key = '/nowhere': cannot be read: No such file or"),
        (empty, "127.0.0.1.pem': holds no PEM certificate"),
        (empty_key, "127.0.0.1.key': holds no PEM private key"),
        (no_key_in_it, "127.0.0.1.pem': holds no PEM private key"),
        (another_key, "127.0.0.1.key': is not the key of server.tls_certificate"),
        (encrypted, "127.0.0.1.key': is encrypted; the hub needs one that is not"),
        (garbled, "127.0.0.1.pem': cannot be used: "),
        (no_ca, "127.0.0.1.key': holds no PEM certificate"),
    ],
)
def test_a_wrong_file_is_reported_in_one_line(
    spoil: Callable[[Pair], dict[str, str]], expected: str, authority: Authority
) -> None:
    pair = authority.issue()
    server = server_of(pair, **spoil(pair))
    with pytest.raises(ConfigError) as info:
        tls.server_context(server)
    text = str(info.value)
    assert text.startswith("server.tls_")
    assert expected in text
    assert "\n" not in text
    environ = {
        f"GOLLAMA_SERVER_{name.upper()}": getattr(server, name)
        for name in ("tls_certificate", "tls_key", "tls_client_ca")
    }
    with pytest.raises(ConfigError) as refused:
        config.load(None, environ)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"ca_file": "/nowhere"}, "worker attic: ca_file = '/nowhere': cannot be read"),
        (
            {"client_certificate": "/nowhere"},
            "worker attic: client_certificate = '/nowhere': cannot be read",
        ),
    ],
)
def test_a_wrong_file_of_a_worker(keys: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        tls.worker_context(worker_of(**keys))


def test_a_worker_gets_the_certificate_of_the_hub(authority: Authority) -> None:
    pair = authority.issue("hub")
    tls.worker_context(worker_of(client_certificate=pair[0], client_key=pair[1]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server.tls_key = 'k'", "server.tls_key = 'k': needs server.tls_certificate"),
        ("server.tls_client_ca = 'c'", "server.tls_client_ca = 'c': needs server.tls_"),
        (
            "[[workers]]\nurl = 'http://w'\nca_file = 'c'",
            "workers[0].ca_file = 'c': is for a worker with an https URL",
        ),
        (
            "[[workers]]\nurl = 'https://w'\nclient_key = 'k'",
            "workers[0].client_key = 'k': needs client_certificate beside it",
        ),
        (
            "[[workers]]\nurl = 'https://w'\nca_file = '/nowhere'",
            "worker w:443: ca_file = '/nowhere': cannot be read: No such file",
        ),
    ],
)
def test_contradictory_settings(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as info:
        config.load(file)
    assert expected in str(info.value)


def test_an_open_address_without_tokens_needs_client_certificates(
    authority: Authority,
) -> None:
    """TLS alone does not authenticate clients."""
    pair = authority.issue()
    environ = {
        "GOLLAMA_SERVER_HOST": "0.0.0.0",
        "GOLLAMA_AUTH_MODE": "off",
        "GOLLAMA_SERVER_TLS_CERTIFICATE": pair.certificate,
        "GOLLAMA_SERVER_TLS_KEY": pair.key,
    }
    with pytest.raises(ConfigError, match=r"or server\.tls_client_ca set"):
        config.load(None, environ)
    config.load(None, environ | {"GOLLAMA_SERVER_TLS_CLIENT_CA": authority.file})


# --- Renewal ----------------------------------------------------------------------


def test_only_changed_files_are_loaded(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pair = authority.issue()
    credentials = tls.for_server(server_of(pair))
    assert credentials is not None
    assert credentials.renewable
    assert repr(credentials) == f"<Credentials {pair.certificate}, {pair.key}>"
    first = credentials.context
    credentials.refresh()
    assert credentials.context is first
    credentials.refresh(always=True)
    assert credentials.context is not first
    second = credentials.context
    renewed = authority.issue(file="renewed")
    os.replace(renewed.certificate, pair.certificate)  # noqa: PTH105
    credentials.refresh()  # between the two writes of a renewal
    assert credentials.context is second
    credentials.refresh()
    os.replace(renewed.key, pair.key)  # noqa: PTH105
    credentials.refresh()
    assert credentials.context is not second
    expected = [record.levelname for record in caplog.records]
    assert expected == ["INFO", "ERROR", "INFO"]


def test_a_missing_file_is_reported_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair = authority.issue()
    credentials = tls.for_server(server_of(pair))
    assert credentials is not None
    Path(pair.key).unlink()
    for _ in range(3):
        credentials.refresh()
    [record] = caplog.records
    assert "cannot be read: No such file" in record.getMessage()
    assert "what was loaded before stays in use" in record.getMessage()


def test_without_a_certificate_there_is_no_tls() -> None:
    assert tls.for_server(Server()) is None


# --- Reasons ----------------------------------------------------------------------


def test_only_tls_errors_are_explained() -> None:
    assert tls.explain_tls(ConnectionResetError("reset")) == ""


def test_an_error_raised_in_python() -> None:
    assert tls.explain_tls(ssl.SSLError(1, "Odd")) == "TLS: odd"
    error = ssl.SSLCertVerificationError(1, "wrong name.")
    assert tls.explain_tls(error) == "TLS: certificate not accepted: wrong name"


def test_when_the_first_certificate_expires_is_known(authority: Authority) -> None:
    pair = authority.issue()  # for a day; that of the authority is for longer
    server = server_of(pair, tls_client_ca=authority.file)
    credentials = tls.for_server(server)
    assert credentials is not None
    [certificate] = x509.load_pem_x509_certificates(Path(pair.certificate).read_bytes())
    expected = certificate.not_valid_after_utc.timestamp()
    assert credentials.expires() == expected
    authority.issue(expired=True)
    assert credentials.expires() == expected  # of what is in use
    credentials.refresh(always=True)
    expired = credentials.expires()
    assert expired is not None
    assert expired < expected


def test_without_certificates_in_files_nothing_expires(authority: Authority) -> None:
    pair = authority.issue()
    credentials = tls.for_server(server_of(pair))
    assert credentials is not None
    Path(pair.certificate).unlink()  # before anything has asked
    assert credentials.expires() is None
