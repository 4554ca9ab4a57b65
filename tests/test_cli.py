"""The command line: what it prints, what it returns, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn
from urllib.parse import urlsplit

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from gollama_proxy import __version__, tasks
from gollama_proxy.children import ChildError
from gollama_proxy.cli import main
from gollama_proxy.commands import demo
from gollama_proxy.config import load as config
from gollama_proxy.config.settings import (
    VARIABLES,
    Config,
    Health,
    WorkerConfig,
    settings,
)
from gollama_proxy.config.values import ConfigError
from gollama_proxy.state.local import LocalState
from gollama_proxy.tasks import SAME, Signals
from gollama_proxy.upstream.probe import Finding
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.asks import RARELY
from tests.fakes.authority import Authority
from tests.fakes.client import Wire
from tests.fakes.clock import Clock
from tests.fakes.process import Program, bare, hub_process
from tests.fakes.replies import chunk, sse_head, token
from tests.fakes.script import send, stall
from tests.fakes.valkey import running_store
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

SECRET = "0123456789abcdef" * 2

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Keep the settings of the person who runs the tests out of them."""
    clean = bare()
    clean["GOLLAMA_JWT_SECRET"] = SECRET
    monkeypatch.setattr(os, "environ", clean)
    return clean


async def until_ready(port: int) -> None:
    """Wait until a hub has found a worker."""
    async with asyncio.timeout(DEADLINE):
        while True:
            async with await Wire.connect("127.0.0.1", port) as wire:
                await wire.get("/readyz", None)
                if (await wire.read_response()).status == 200:
                    return
            await asyncio.sleep(0.02)


def one_line(capsys: Output) -> str:
    """Return what a command that ended with status 2 printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gollama-proxy: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err


# --- Flags ------------------------------------------------------------------------


def test_the_version(capsys: Output) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"gollama-proxy {__version__}\n"


def test_help_names_the_commands(capsys: Output) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^    (\w+) ", text, re.MULTILINE) == [
        "serve",
        "secret",
        "token",
        "check",
        "demo",
        "agent",
        "workers",
        "drain",
        "undrain",
        "top",
        "explain",
        "requests",
        "usage",
        "cancel",
        "reload",
        "revoke",
    ]


def test_serve_help_lists_every_setting(capsys: Output) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for row in settings():
        assert re.search(
            rf"^  {row.key}   {row.env}   \S.*\n      {re.escape(row.help)}\n"
            rf"      {re.escape(row.allowed)}$",
            text,
            re.MULTILINE,
        ), row.key
    for default in ('"127.0.0.1"', " 8000\n", '"64MiB"', '"16KiB"', " 4096\n", " 30\n"):
        assert default in text
    for name in VARIABLES:
        assert f"  {name}\n" in text


@pytest.mark.parametrize(
    ("argv", "key", "allowed"),
    [
        ([], "required: COMMAND", "COMMAND ..."),
        (["run"], "'run'", "'serve', 'secret', 'token', 'check', 'demo'"),
        (["serve", "--prot", "9"], "--prot 9: not a flag", "[--port PORT]"),
        (["serve", "--work", "http://a"], "--work", "[--worker URL]"),
        (["serve", "--port"], "--port: expected one argument", "[--port PORT]"),
        (["serve", "--port", "x"], "(--port) = 'x'", "from 0 to 65,535"),
        (["serve", "--auth", "none"], "(--auth) = 'none'", "one of jwt, off"),
        (["serve", "--log-level", "x"], "(--log-level) = 'x'", "one of debug"),
        (["serve", "--worker", "a:1"], "workers[0].url = 'a:1'", "http://host:port"),
        (["serve", "-c", "no\n.toml"], "no .toml: cannot be read", "No such file"),
        (["serve", "--auth", "off", "--host", "::"], "'::'", "--insecure-bind"),
        (["check", "--port", "1"], "--port 1", "[-c FILE]"),
        (["check", "-c", "/nowhere"], "/nowhere: cannot be read", "No such file"),
        (["token"], "--sub", "--sub SUB"),
        (["token", "--sub", " "], "--sub = ' '", "printable, and not empty"),
        (["token", "--sub", "a\x1b"], r"--sub = 'a\x1b'", "printable, and not empty"),
        (["token", "--sub", "a", "--model", ""], "--model = ''", "not empty"),
        (["token", "--sub", "a", "--scope", ""], "--scope = ''", "or admin"),
        (["token", "--sub", "a", "--scope", "amdin"], "'amdin'", "must be metrics, "),
        (["token", "--sub", "a", "--scope", "admin worker"], "'admin w", "repeat it"),
        (["demo", "--model", "/nowhere"], "--model = '/nowhere'", "a GGUF file"),
        (["demo", "--llama-server", "/"], "--llama-server = '/'", "executable file"),
        (
            ["demo", "--worker", "x", "--model", "y"],
            "workers[0].url = 'x'",
            "host:port",
        ),
    ],
)
def test_a_wrong_flag_is_one_line(
    argv: list[str], key: str, allowed: str, capsys: Output
) -> None:
    assert main(argv) == 2
    text = one_line(capsys)
    assert key in text
    assert allowed in text


def test_serve_without_a_secret(environ: dict[str, str], capsys: Output) -> None:
    del environ["GOLLAMA_JWT_SECRET"]
    assert main(["serve"]) == 2
    assert "GOLLAMA_JWT_SECRET: is not set" in one_line(capsys)


# --- serve ------------------------------------------------------------------------


class StageHub:
    """A hub that does nothing but sends the signals which a test asks for."""

    url = "http://127.0.0.1:8000"
    urls = (url,)
    scrapes = None
    start_error: OSError | None = None
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)
    calls: ClassVar[list[str]] = []

    def __init__(self, config: Config, state: LocalState, load: object) -> None:
        self.config = config
        self.registry = SimpleNamespace(
            workers=config.workers, ready=False, unserved=list
        )
        self.cut = asyncio.Event()

    def __repr__(self) -> str:
        return f"<StageHub {self.calls}>"

    async def start(
        self,
        listeners: Sequence[socket.socket],
        for_metrics: Sequence[socket.socket],
        *,
        accept: bool = True,
    ) -> None:
        assert accept  # there is no other process
        self.calls.append("start")
        if self.start_error is not None:
            raise self.start_error

    async def accept(self) -> None:
        pass  # it does from its start

    async def ready(self) -> None:
        self.calls.append("ready")
        signal.raise_signal(self.signals[0])

    async def known(self) -> None:
        pass

    def reload_soon(self) -> None:
        self.calls.append("reload")

    async def drain(self) -> None:
        self.calls.append("drain")
        if len(self.signals) > 1:
            signal.raise_signal(self.signals[1])
            await self.cut.wait()

    async def abort(self) -> None:
        self.calls.append("abort")
        self.cut.set()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> type[StageHub]:
    class Stage(StageHub):
        calls: ClassVar[list[str]] = []

    monkeypatch.setattr("gollama_proxy.serve.Hub", Stage)
    monkeypatch.setattr(
        "gollama_proxy.telemetry.logs.configure", lambda log, process: None
    )
    return Stage


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains(
    number: signal.Signals, stage: type[StageHub], caplog: pytest.LogCaptureFixture
) -> None:
    stage.signals = (number,)
    before = signal.getsignal(number)
    with caplog.at_level("INFO", "gollama_proxy"):
        assert main(["serve"]) == 0
    assert stage.calls == ["start", "ready", "drain"]
    assert "listening on http://127.0.0.1:8000" in caplog.text
    assert "no worker is configured" in caplog.text
    assert signal.getsignal(number) == before


def test_a_hub_is_advertised_until_it_drains(
    stage: type[StageHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.asynccontextmanager
    async def advertise(url: str, addresses: list[str]) -> AsyncIterator[None]:
        stage.calls.append(f"{url} at {addresses}")
        yield
        stage.calls.append("withdrawn")

    monkeypatch.setattr("gollama_proxy.registration.advertise", advertise)
    flags = ["--advertise", "--host", "10.0.0.5"]
    assert main(["serve", *flags]) == 0
    assert "http://127.0.0.1:8000 at ['10.0.0.5']" in stage.calls
    assert stage.calls[-2:] == ["withdrawn", "drain"]


def test_a_network_without_multicast_is_only_a_warning(
    stage: type[StageHub],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def advertise(*_: object) -> NoReturn:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("gollama_proxy.registration.advertise", advertise)
    assert main(["serve", "--advertise", "--host", "10.0.0.5"]) == 0
    assert "server.advertise: Network is unreachable" in caplog.text


def test_a_second_signal_cuts(
    stage: type[StageHub], caplog: pytest.LogCaptureFixture
) -> None:
    stage.signals = (signal.SIGTERM, signal.SIGINT)
    assert main(["serve", "--worker", "http://127.0.0.1:1"]) == 1
    assert stage.calls == ["start", "ready", "drain", "abort"]
    assert "no worker can be used" in caplog.text


def test_a_signal_that_comes_twice_does_not_cut(
    stage: type[StageHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drain(hub: StageHub) -> None:
        handled = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, handled.set)
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.raise_signal(number)
        await handled.wait()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR2)

    monkeypatch.setattr(tasks, "SAME", RARELY)
    monkeypatch.setattr(stage, "drain", drain)
    assert main(["serve", "--worker", "http://127.0.0.1:1"]) == 0
    assert stage.calls == ["start", "ready"]


async def test_signals_show_which_were_received() -> None:
    signals = Signals()
    signals.receive()
    assert repr(signals) == "<Signals asked=True insisted=False>"
    signals.receive()
    assert signals.insisted.is_set()


async def test_a_sigterm_soon_after_another_one_is_the_same() -> None:
    clock = Clock()
    signals = Signals(clock)
    signals.terminate()
    assert signals.asked.is_set()
    clock.advance(SAME - 0.1)
    signals.terminate()
    assert not signals.insisted.is_set()
    clock.advance(0.1)
    signals.terminate()
    assert signals.insisted.is_set()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EADDRINUSE, "x"), "server.port = 8000: already in use; must be"),
        (OSError(errno.EACCES, "x"), "server.port = 8000: not permitted; must be 1024"),
        (
            OSError(errno.EADDRNOTAVAIL, "x"),
            "server.host = '127.0.0.1': must be an address of this machine",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            "server.host = '127.0.0.1': must be an address of this machine",
        ),
        (
            OSError(errno.EMFILE, "Too many open files"),
            "server.port = 8000: cannot be listened on: Too many open files",
        ),
        (OSError("odd"), "cannot be listened on: odd"),
    ],
)
def test_an_address_that_cannot_be_listened_on(
    error: OSError, text: str, stage: type[StageHub], capsys: Output
) -> None:
    stage.start_error = error
    assert main(["serve"]) == 2
    assert text in one_line(capsys)


async def test_the_port_in_use(environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with Program.running("serve", "--port", str(port), environ=environ) as it:
            assert await it.ended() == 2
    assert it.output == (
        f"gollama-proxy: server.port = {port}: already in use; "
        "must be a free port, or 0 for any\n"
    )


async def test_a_state_folder_belongs_to_one_hub(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """A folder that was set is required; the usual one is not."""
    arguments = ("serve", "--port", "0")
    named = environ | {"GOLLAMA_STATE_DIR": f"{tmp_path}/gollama-proxy"}
    usual = environ | {"GOLLAMA_STATE_DIR": "auto", "XDG_STATE_HOME": f"{tmp_path}"}
    async with Program.running(*arguments, environ=named) as first:
        await first.until("listening on")
        used = f"used by another hub (process {first.process.pid})"
        async with Program.running(*arguments, environ=named) as second:
            assert await second.ended() == 2
        assert second.output.startswith("gollama-proxy: state.dir = ")
        assert used in second.output
        assert second.output.count("\n") == 1
        async with Program.running(*arguments, environ=usual) as third:
            await third.until("listening on")
        assert used in third.output
        first.signal(signal.SIGTERM)
        assert await first.ended() == 0
        async with Program.running(*arguments, environ=named) as fourth:
            await fourth.until("listening on")


async def test_serve_starts_without_reachable_workers(
    environ: dict[str, str],
) -> None:
    environ["GOLLAMA_LOG_FORMAT"] = "json"
    arguments = ("serve", "--port", "0", "--worker", "http://127.0.0.1:1")
    async with Program.running(*arguments, environ=environ) as hub:
        match = await hub.until(r"listening on (http://127\.0\.0\.1:\d+)")
        address = urlsplit(match[1])
        assert address.hostname
        assert address.port
        async with await Wire.connect(address.hostname, address.port) as wire:
            await wire.get("/livez", None)
            assert (await wire.read_response()).status == 200
        await hub.until("no worker can be used")
        hub.signal(signal.SIGTERM)
        assert await hub.ended() == 0
    assert "Traceback" not in hub.output


async def test_serve_warns_once_about_names_that_no_worker_serves(
    environ: dict[str, str],
) -> None:
    environ["GOLLAMA_MODELS_ALIASES"] = "gpt=nobody,good=qwen"
    async with ScriptedWorker("qwen") as worker:
        arguments = ("serve", "--port", "0", "--worker", worker.url)
        async with Program.running(*arguments, environ=environ) as hub:
            match = await hub.until(r"warning models.aliases: 'gpt': no worker serves")
            assert match
            hub.signal(signal.SIGTERM)
            assert await hub.ended() == 0
    assert hub.output.count("no worker serves") == 1


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        ({"GOLLAMA_SERVER_HOST": "127.0.0.2"}, False),
        ({"GOLLAMA_SERVER_HOST": "localhost"}, False),
        ({"GOLLAMA_SERVER_HOST": "::1"}, False),
        ({"GOLLAMA_SERVER_HOST": "0.0.0.0"}, True),
        ({"GOLLAMA_SERVER_HOST": "::"}, True),
        ({"GOLLAMA_SERVER_HOST": "hub.lan"}, True),
        ({"GOLLAMA_SERVER_HOST": "0.0.0.0", "TLS": "1"}, False),
    ],
)
def test_listening_on_the_network_without_tls_gives_one_warning(
    settings: dict[str, str],
    warned: bool,
    stage: type[StageHub],
    environ: dict[str, str],
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if settings.pop("TLS", ""):
        pair = authority.issue()
        environ["GOLLAMA_SERVER_TLS_CERTIFICATE"] = pair.certificate
        environ["GOLLAMA_SERVER_TLS_KEY"] = pair.key
    environ |= settings
    assert main(["serve"]) == 0
    reported = [text for text in caplog.messages if "without TLS" in text]
    assert len(reported) == warned


async def test_sighup_logs_what_was_reloaded(
    environ: dict[str, str], authority: Authority, tmp_path: Path
) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("sub:alice\nsub:bob\n")
    pair = authority.issue()
    environ |= {
        "GOLLAMA_AUTH_REVOKED": str(revoked),
        "GOLLAMA_SERVER_TLS_CERTIFICATE": pair.certificate,
        "GOLLAMA_SERVER_TLS_KEY": pair.key,
    }
    async with Program.running("serve", "--port", "0", environ=environ) as hub:
        await hub.until("no worker is configured")
        hub.signal(signal.SIGHUP)
        await hub.until("(?s)loaded .*are revoked|are revoked.*loaded ")
        await hub.until("settings were read again: nothing has changed")
        assert "0 tokens and 2 subjects are revoked" in hub.output
        hub.signal(signal.SIGTERM)
        assert await hub.ended() == 0


async def test_sighup_has_the_settings_read_again(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """And a file with a mistake changes nothing."""
    file = tmp_path / "gollama.toml"
    file.write_text("[queue]\nsize = 7\n")
    arguments = ("serve", "--port", "0", "-c", str(file))
    async with Program.running(*arguments, environ=environ) as hub:
        await hub.until("no worker is configured")
        file.write_text("[queue]\nsize = 8\n[queues]\n")
        hub.signal(signal.SIGHUP)
        await hub.until("so the old ones stay in force: queues: no such setting")
        file.write_text("[queue]\nsize = 9\n[server]\nhost = '127.0.0.2'\n")
        hub.signal(signal.SIGHUP)
        await hub.until(
            "settings were read again: queue.size 7 -> 9; "
            "needs a restart: server.host '127.0.0.1' -> '127.0.0.2'"
        )
        hub.signal(signal.SIGTERM)
        assert await hub.ended() == 0


async def test_a_second_signal_cuts_a_running_answer(environ: dict[str, str]) -> None:
    environ["GOLLAMA_SERVER_DRAIN"] = "3600"
    async with ScriptedWorker() as worker:
        worker.script(send(sse_head() + chunk(token("a") + token("b"))), stall())
        arguments = ("serve", "--port", "0", "--auth", "off", "--worker", worker.url)
        async with Program.running(*arguments, environ=environ) as hub:
            match = await hub.until(r"listening on http://127\.0\.0\.1:(\d+)")
            await until_ready(int(match[1]))
            async with await Wire.connect("127.0.0.1", int(match[1])) as wire:
                question = {"model": "tiny", "stream": True, "messages": []}
                await wire.post("/v1/chat/completions", question, None)
                assert await wire.read_event() is not None
                hub.signal(signal.SIGINT)
                await hub.until("draining")
                hub.signal(signal.SIGTERM)
                assert await hub.ended() == 1
    assert "Traceback" not in hub.output


# --- What a start imports ---------------------------------------------------------


# What takes long to import, or much memory.
HEAVY = """
aiohttp aiohttp.client aiohttp.web_app asyncio cryptography dns gollama_proxy.agent
gollama_proxy.commands.operators gollama_proxy.hub http.client httptools jwt
opentelemetry prometheus_client rich sqlite3 statistics uvloop zeroconf
"""
# Runs a command, and prints which of them it has imported.
_SPY = """
import sys
from gollama_proxy.cli import main
main(sys.argv[2:])
print("imported:", *sorted(sys.modules.keys() & set(sys.argv[1].split())))
"""


IMPORTED = {
    "secret": "",
    "token --sub alice": "jwt http.client",
    "workers --hub http://127.0.0.1:1": "gollama_proxy.commands.operators http.client",
    "serve --port 0": """aiohttp asyncio gollama_proxy.hub http.client httptools jwt
        sqlite3 uvloop""",
    "agent --hub http://127.0.0.1:1 --worker http://127.0.0.1:2": """aiohttp
        aiohttp.client aiohttp.web_app asyncio gollama_proxy.agent http.client
        uvloop""",
}


@pytest.mark.parametrize(("command", "imported"), IMPORTED.items(), ids=IMPORTED)
async def test_a_command_imports_only_what_it_needs(
    command: str, imported: str
) -> None:
    environ = bare() | {"GOLLAMA_JWT_SECRET": SECRET, "GOLLAMA_TOKEN": "x"}
    program = ("-c", _SPY, " ".join(HEAVY.split()))
    async with Program.running(
        *command.split(), environ=environ, program=program
    ) as it:
        if command.startswith(("serve", "agent")):
            await it.until("no worker is configured|cannot be reached")
            it.signal(signal.SIGTERM)
        assert await it.ended() == 0
    assert it.output.splitlines()[-1].split()[1:] == sorted(imported.split())


async def test_an_idle_hub_takes_little_memory() -> None:
    """45 MB; the limit allows for other versions of Python and of libraries."""
    environ = {"COVERAGE_PROCESS_START": ""}  # measured without what measures
    async with ScriptedWorker() as worker:
        async with hub_process(worker.url, environ=environ, forked=False) as hub:
            assert hub.resident() < 52e6


def test_authentication_imports_no_server() -> None:
    code = "import sys, gollama_proxy.edge.auth; print('aiohttp' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=DEADLINE
    )
    assert done.stdout == b"False\n"


def test_all_of_aiohttp_is_there_for_code_that_needs_it() -> None:
    """What a hub imports is a part; plugins and tests may use the rest."""
    code = """
import sys
from gollama_proxy.cli import _import_server
_import_server()
import aiohttp
from aiohttp import hdrs, web_protocol
assert "aiohttp.client" not in sys.modules
assert not hasattr(aiohttp, "__wrapped__")
assert aiohttp.ClientSession.__module__ == "aiohttp.client"
assert aiohttp.__version__
assert aiohttp.web_protocol is web_protocol
from aiohttp import web
assert web.RequestHandler is web_protocol.RequestHandler
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)


def test_the_systems_certificates_are_loaded_only_when_needed() -> None:
    """Where they are is changed while aiohttp is imported, and only then."""
    code = """
import os, ssl
before = dict(os.environ)
loaded = []
load = ssl.SSLContext.set_default_verify_paths
def spy(self):
    load(self)
    loaded.append(self.cert_store_stats()["x509_ca"])
ssl.SSLContext.set_default_verify_paths = spy
from gollama_proxy.cli import _import_aiohttp
_import_aiohttp()
assert os.environ == before
assert not any(loaded), loaded
"""
    for where in ({}, {"SSL_CERT_FILE": "a", "SSL_CERT_DIR": "b"}):
        command = [sys.executable, "-c", code]
        subprocess.run(command, env=bare() | where, check=True, timeout=DEADLINE)


# --- secret -----------------------------------------------------------------------


def test_a_secret_is_new_and_strong_enough(
    environ: dict[str, str], capsys: Output
) -> None:
    made = set()
    for _ in range(3):
        assert main(["secret"]) == 0
        secret = capsys.readouterr().out
        assert re.fullmatch(r"[0-9a-f]{64}\n", secret)
        made.add(secret)
        environ["GOLLAMA_JWT_SECRET"] = secret.strip()
        assert main(["token", "--sub", "a"]) == 0
        jwt.decode(minted(capsys), secret.strip(), ["HS256"])
    assert len(made) == 3


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o640, 0o600])
def test_a_secret_file_is_readable_by_its_owner_only(
    mode: int,
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Output,
) -> None:
    """As in `gollama-proxy secret > gollama.secret`; what comes of it can be used."""
    file = tmp_path / "gollama.secret"
    file.touch()
    file.chmod(mode)
    with file.open("w") as opened, monkeypatch.context() as during:
        during.setattr(sys, "stdout", opened)
        assert main(["secret"]) == 0
    assert file.stat().st_mode & 0o777 == 0o600
    del environ["GOLLAMA_JWT_SECRET"]
    environ["GOLLAMA_AUTH_SECRET_FILE"] = str(file)
    assert main(["token", "--sub", "a"]) == 0
    minted(capsys)


# --- token ------------------------------------------------------------------------


def test_a_file_with_a_token_is_readable_by_its_owner_only(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """As an agent demands of `--token-file`."""
    file = tmp_path / "worker.token"
    with file.open("w") as opened:
        file.chmod(0o644)
        command = [sys.executable, "-m", "gollama_proxy", "token", "--sub", "a"]
        subprocess.run(
            command, stdout=opened, env=environ, timeout=DEADLINE, check=True
        )
    assert file.stat().st_mode & 0o777 == 0o600


def minted(capsys: Output) -> str:
    captured = capsys.readouterr()
    reported = re.fullmatch(
        r"note: settings are from \S+\nnote: to revoke it: jti:([0-9a-f]{16})\n",
        captured.err,
    )
    assert reported
    assert re.fullmatch(r"[\w.-]+\n", captured.out)
    token = captured.out.strip()
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["jti"] == reported[1]
    return token


def test_a_token_has_a_subject_and_an_expiry(capsys: Output) -> None:
    assert main(["token", "--sub", "alice"]) == 0
    claims = jwt.decode(minted(capsys), SECRET, ["HS256"])
    assert claims["sub"] == "alice"
    assert claims["exp"] - claims["iat"] == 30 * 86_400
    assert abs(claims["iat"] - time.time()) < 60
    assert claims.keys() == {"sub", "iat", "exp", "jti"}


def test_a_token_with_everything(environ: dict[str, str], capsys: Output) -> None:
    environ |= {"GOLLAMA_AUTH_ISSUER": "home", "GOLLAMA_AUTH_AUDIENCE": "hub"}
    argv = [
        "token",
        "--sub",
        "a",
        "--model",
        "qwen*",
        "--model",
        "x",
        "--scope",
        "metrics",
    ]
    assert main(argv) == 0
    claims = jwt.decode(
        minted(capsys), SECRET, ["HS256"], audience="hub", issuer="home"
    )
    assert claims["models"] == ["qwen*", "x"]
    assert claims["scope"] == "metrics"


def test_the_help_names_every_scope(capsys: Output) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["token", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for scope in ("metrics (GET", "worker (for an agent,", "admin (for operators:"):
        assert scope in shown


def test_a_token_with_limits(capsys: Output) -> None:
    argv = ["token", "--sub", "a", "--rpm", "60", "--tpm=100000"]
    argv += ["--tokens-per-day", "1000000", "--tokens-per-month", "9"]
    argv += ["--max-concurrency", "4", "--priority", "batch"]
    assert main(argv) == 0
    claims = jwt.decode(minted(capsys), SECRET, ["HS256"])
    assert (claims["rpm"], claims["tpm"]) == (60, 100_000)
    limits = claims["tokens_per_day"], claims["tokens_per_month"]
    assert limits == (1_000_000, 9)
    assert (claims["max_concurrency"], claims["priority"]) == (4, "batch")


@pytest.mark.parametrize(
    "flag", ["--rpm", "--tpm", "--tokens-per-day", "--max-concurrency"]
)
@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "1e3", "x", "", " 1", "٣", "9" * 16]
)
def test_a_wrong_limit(flag: str, text: str, capsys: Output) -> None:
    assert main(["token", "--sub", "a", f"{flag}={text}"]) == 2
    assert f"{flag} = {text!r}: must be a whole number from 1" in one_line(capsys)


@pytest.mark.parametrize("text", ["urgent", "BATCH", ""])
def test_a_wrong_priority(text: str, capsys: Output) -> None:
    assert main(["token", "--sub", "a", f"--priority={text}"]) == 2
    printed = one_line(capsys)
    assert f"--priority = {text!r}: must be one of interactive, batch" in printed


@pytest.mark.parametrize(
    ("text", "lifetime"),
    [
        ("45s", 45),
        ("90m", 5400),
        ("12h", 43_200),
        ("1d", 86_400),
        ("366d", 31_622_400),
        ("3650d", 315_360_000),
    ],
)
def test_a_lifetime(
    text: str, lifetime: int, environ: dict[str, str], capsys: Output
) -> None:
    if text == "3650d":
        assert main(["token", "--sub", "a", "--expires", text]) == 2
        printed = one_line(capsys)
        assert "--expires = '3650d': must be 31622400s (auth.max_lifetime)" in printed
        environ["GOLLAMA_AUTH_MAX_LIFETIME"] = "0"
    assert main(["token", "--sub", "a", "--expires", text]) == 0
    claims = jwt.decode(minted(capsys), SECRET, ["HS256"])
    assert claims["exp"] - claims["iat"] == lifetime


@pytest.mark.parametrize(
    "text", ["0d", "-1d", "3651d", "999999999999d", "30", "30D", "1.5h", "d", "", "1d "]
)
def test_a_wrong_lifetime(text: str, capsys: Output) -> None:
    assert main(["token", "--sub", "a", f"--expires={text}"]) == 2
    printed = one_line(capsys)
    assert (
        f"--expires = {text!r}: must be a time such as 45s, 90m, 12h or 30d" in printed
    )


@pytest.mark.parametrize("previous", [False, True])
def test_a_token_needs_the_current_secret(
    previous: bool, environ: dict[str, str], capsys: Output
) -> None:
    del environ["GOLLAMA_JWT_SECRET"]
    if previous:
        environ["GOLLAMA_JWT_SECRET_PREVIOUS"] = SECRET
    assert main(["token", "--sub", "a"]) == 2
    assert "GOLLAMA_JWT_SECRET: is not set; must be the hub's" in one_line(capsys)


def test_a_token_signed_with_the_secret_of_a_file(
    environ: dict[str, str], tmp_path: Path, capsys: Output
) -> None:
    del environ["GOLLAMA_JWT_SECRET"]
    file = tmp_path / "secrets"
    file.write_text(f"{SECRET}\n{'p' * 32}\n")
    file.chmod(0o600)
    environ["GOLLAMA_AUTH_SECRET_FILE"] = str(file)
    assert main(["token", "--sub", "a"]) == 0
    assert jwt.decode(minted(capsys), SECRET, ["HS256"])["sub"] == "a"


@pytest.fixture
def key_files(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    makers: dict[str, Callable[[], Any]] = {
        "RS256": lambda: rsa.generate_private_key(65_537, 2048),
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
    }

    def make(algorithm: str) -> tuple[Path, Path]:
        key = makers[algorithm]()
        private, public = tmp_path / "private.pem", tmp_path / "public.pem"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        private.chmod(0o600)
        public.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM,
                serialization.PublicFormat.SubjectPublicKeyInfo,
            )
        )
        return private, public

    return make


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_token_signed_with_a_private_key(
    algorithm: str,
    key_files: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    capsys: Output,
) -> None:
    private, public = key_files(algorithm)
    file = tmp_path / "gollama.toml"
    file.write_text(f"[auth]\nalgorithm='{algorithm}'\npublic_key_file='{public}'")
    argv = ["token", "-c", str(file), "--sub", "bob", "--private-key", str(private)]
    assert main(argv) == 0
    claims = jwt.decode(minted(capsys), public.read_bytes(), [algorithm])
    assert claims["sub"] == "bob"


def test_a_wrong_private_key(
    key_files: Callable[[str], tuple[Path, Path]],
    environ: dict[str, str],
    tmp_path: Path,
    capsys: Output,
) -> None:
    argv = ["token", "--sub", "a"]
    assert main([*argv, "--private-key", "k"]) == 2
    assert "--private-key = 'k': HS256 signs with GOLLAMA_JWT" in one_line(capsys)

    _, public = key_files("ES256")
    environ["GOLLAMA_AUTH_ALGORITHM"] = "ES256"
    environ["GOLLAMA_AUTH_PUBLIC_KEY_FILE"] = str(public)
    assert main(argv) == 2
    assert "--private-key: ES256 needs a PEM file" in one_line(capsys)
    assert main([*argv, "--private-key", str(tmp_path / "none")]) == 2
    assert "none': cannot be read: No such file" in one_line(capsys)
    (tmp_path / "bad").write_text("secret words")
    (tmp_path / "bad").chmod(0o644)
    assert main([*argv, "--private-key", str(tmp_path / "bad")]) == 2
    assert "bad': other users have access (mode 0644)" in one_line(capsys)
    (tmp_path / "bad").chmod(0o600)
    assert main([*argv, "--private-key", str(tmp_path / "bad")]) == 2
    printed = one_line(capsys)
    assert "bad': " in printed
    assert "ES256" in printed
    assert "secret words" not in printed


def test_a_private_key_that_is_not_the_hubs(
    key_files: Callable[[str], tuple[Path, Path]],
    environ: dict[str, str],
    tmp_path: Path,
    capsys: Output,
) -> None:
    _, public = key_files("EdDSA")
    public = public.rename(tmp_path / "hub.pem")
    private, _ = key_files("EdDSA")
    environ["GOLLAMA_AUTH_ALGORITHM"] = "EdDSA"
    environ["GOLLAMA_AUTH_PUBLIC_KEY_FILE"] = str(public)
    assert main(["token", "--sub", "a", "--private-key", str(private)]) == 2
    printed = one_line(capsys)
    assert "private.pem': the hub would refuse such a token: " in printed
    assert "ignature" in printed


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        (["--sub", "mallory"], "sub is revoked"),
        (["--sub", "a" * 8000], "token too long"),
    ],
)
def test_a_token_that_the_hub_would_refuse_is_not_made(
    argv: list[str],
    cause: str,
    environ: dict[str, str],
    tmp_path: Path,
    capsys: Output,
) -> None:
    file = tmp_path / "revoked"
    file.write_text("sub:mallory\n")
    environ["GOLLAMA_AUTH_REVOKED"] = str(file)
    assert main(["token", *argv]) == 2
    assert f"the hub would refuse such a token: {cause}" in one_line(capsys)


def test_a_token_needs_nothing_of_the_workers(
    environ: dict[str, str], tmp_path: Path, capsys: Output
) -> None:
    """A user who makes tokens may have no access to the keys of TLS."""
    file = tmp_path / "gollama.toml"
    file.write_text(
        "[server]\ntls_certificate = '/nowhere'\n"
        "[[workers]]\nurl = 'https://10.0.0.1'\napi_key_env = 'MAC_KEY'\n"
    )
    environ["GOLLAMA_CONFIG"] = str(file)
    assert main(["token", "--sub", "a"]) == 0
    minted(capsys)
    assert main(["serve"]) == 2
    assert "MAC_KEY" in capsys.readouterr().err


def test_a_token_for_a_hub_without_authentication_gives_a_warning(
    environ: dict[str, str], capsys: Output
) -> None:
    environ["GOLLAMA_AUTH_MODE"] = "off"
    assert main(["token", "--sub", "a"]) == 0
    assert (
        "note: auth.mode is off: the hub asks for no token\n" in capsys.readouterr().err
    )


# --- The settings file ------------------------------------------------------------


@pytest.fixture
def places(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """Settings files that differ in the issuer of a token."""
    del environ["GOLLAMA_CONFIG"]
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    files = {
        "flag": tmp_path / "flag.toml",
        "variable": tmp_path / "variable.toml",
        "here": here / "gollama.toml",
        "etc": tmp_path / "etc.toml",
    }
    for name, file in files.items():
        file.write_text(f"[auth]\nissuer = '{name}'\n")
    monkeypatch.setattr(config, "PLACES", ("gollama.toml", str(files["etc"])))
    return files


def issuer(capsys: Output, *argv: str) -> str | None:
    assert main(["token", "--sub", "a", *argv]) == 0
    claims = jwt.decode(minted(capsys), options={"verify_signature": False})
    found: str | None = claims.get("iss")
    return found


def test_where_the_settings_file_is_looked_for(
    places: dict[str, Path], environ: dict[str, str], capsys: Output
) -> None:
    environ["GOLLAMA_CONFIG"] = str(places["variable"])
    assert issuer(capsys, "-c", str(places["flag"])) == "flag"
    assert issuer(capsys) == "variable"
    environ["GOLLAMA_CONFIG"] = ""
    assert issuer(capsys) == "here"
    places["here"].unlink()
    assert issuer(capsys) == "etc"
    places["etc"].unlink()
    assert main(["token", "--sub", "a"]) == 0
    assert "note: settings are from no file\n" in capsys.readouterr().err


def test_the_places_of_the_settings_file() -> None:
    assert config.PLACES == ("gollama.toml", "/etc/gollama-proxy/gollama.toml")


def test_a_named_settings_file_must_exist(
    places: dict[str, Path], environ: dict[str, str], capsys: Output
) -> None:
    for argv in (["-c", "nowhere"], ["-c", ""]):
        assert main(["check", *argv]) == 2
        assert "cannot be read" in one_line(capsys)
    environ["GOLLAMA_CONFIG"] = "nowhere"
    assert main(["check"]) == 2
    assert "nowhere: cannot be read: No such file" in one_line(capsys)


def test_an_unreadable_settings_file_is_an_error(
    places: dict[str, Path], capsys: Output
) -> None:
    """Its settings would count for the hub, and not for the token."""
    places["here"].unlink()
    places["here"].symlink_to(places["here"])
    assert main(["token", "--sub", "a"]) == 2
    assert "gollama.toml: cannot be read: Too many levels" in one_line(capsys)


@pytest.mark.parametrize("command", ["serve", "check"])
def test_every_command_names_the_source_of_its_settings(
    command: str,
    places: dict[str, Path],
    stage: type[StageHub],
    caplog: pytest.LogCaptureFixture,
    capsys: Output,
) -> None:
    caplog.set_level("INFO")
    main([command])
    assert "settings are from gollama.toml" in capsys.readouterr().err + caplog.text


# --- check ------------------------------------------------------------------------


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Finding]:
    """Set what each worker answers, by name."""
    answers: dict[str, Finding] = {}

    async def examine(worker: WorkerConfig, health: Health) -> Finding:
        return answers[worker.name]

    monkeypatch.setattr("gollama_proxy.upstream.probe.examine", examine)
    return answers


def found(*models: str, note: str = "") -> Finding:
    reported = Description(tuple(Model(name) for name in models), 4, 2048, "b10068")
    return Finding(Check.OK, "ok", reported, note)


def test_check_without_workers(environ: dict[str, str], capsys: Output) -> None:
    del environ["GOLLAMA_JWT_SECRET"]
    assert main(["check"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("No worker is configured: ")
    assert "\nnote: GOLLAMA_JWT_SECRET: is not set" in captured.err


def test_check_shows_what_each_worker_is(
    findings: dict[str, Finding], environ: dict[str, str], capsys: Output
) -> None:
    long = "http://" + "a" * 60 + ".example.net:8080/with/a/prefix"
    environ["GOLLAMA_WORKERS"] = f"http://a:80 http://b:80 {long}"
    findings["a:80"] = found("qwen", "llama")
    findings["b:80"] = Finding(Check.LOADING, "loading model")
    findings[long[7:]] = Finding(Check.FAILED, "\x1b[31mrefused [bold]:smile:")
    assert main(["check"]) == 1
    rows = [
        re.split(r"\s{2,}", line.strip())
        for line in capsys.readouterr().out.splitlines()
    ]
    titles = ["name", "url", "state", "models", "slots", "context", "build / reason"]
    assert rows == [
        titles,
        ["a:80", "http://a:80", "ready", "qwen, llama", "4", "2048", "b10068"],
        ["b:80", "http://b:80", "loading", "-", "-", "-", "loading model"],
        [long[7:], long, "down", "-", "-", "-", "?[31mrefused [bold]:smile:"],
    ]


def table(capsys: Output) -> list[list[str]]:
    lines = capsys.readouterr().out.splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines[1:]]


def test_check_shows_the_effective_settings(
    findings: dict[str, Finding], tmp_path: Path, capsys: Output
) -> None:
    """Slots and models as the settings state them, and not as the worker does."""
    file = tmp_path / "gollama.toml"
    file.write_text(
        "[[workers]]\nurl = 'http://a:80'\nslots = 2\nmodels = ['qwen*', 'phi']\n"
        "[[workers]]\nurl = 'http://b:80'\nslots = 3\nmodels = ['phi']\n"
    )
    findings["a:80"] = found("qwen-7b", "llama", note="odd")
    findings["b:80"] = Finding(Check.REFUSED, "refused")
    assert main(["check", "-c", str(file)]) == 1
    assert table(capsys) == [
        [
            "a:80",
            "http://a:80",
            "ready",
            "qwen*, qwen-7b, phi",
            "2",
            "2048",
            "b10068, odd",
        ],
        ["b:80", "http://b:80", "down", "phi", "3", "-", "refused"],
    ]


def test_check_reports_what_is_not_known_of_a_worker(
    findings: dict[str, Finding], tmp_path: Path, capsys: Output
) -> None:
    """As of Ollama: what the settings state is not missing."""
    file = tmp_path / "gollama.toml"
    silent = Description((Model("qwen3:8b"),))
    findings["a:80"] = Finding(Check.OK, "ok", silent)
    file.write_text("[[workers]]\nurl = 'http://a:80'\n")
    assert main(["check", "-c", str(file)]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "a:80" in line]
    assert [line.rpartition("; ")[2] for line in notes] == ["set slots", "set context"]
    with file.open("a") as more:
        more.write("slots = 2\ncontext = 8192\n")
    assert main(["check", "-c", str(file)]) == 0
    captured = capsys.readouterr()
    assert "a:80" not in captured.err
    assert re.search(r"qwen3:8b +2 +8192", captured.out)


@pytest.mark.parametrize(
    ("models", "reported"),
    [
        ("aliases = { gpt = 'nobody' }", "models.aliases: 'gpt': no worker serves"),
        ("fallbacks = { qwen = ['nobody'] }", "models.fallbacks: 'qwen': no worker"),
        ("fallbacks = { nobody = ['qwen'] }", "models.fallbacks: 'nobody': no worker"),
        ("default_model = 'nobody'", "models.default_model: no worker serves"),
    ],
)
def test_check_reports_names_that_no_worker_serves(
    models: str,
    reported: str,
    findings: dict[str, Finding],
    tmp_path: Path,
    capsys: Output,
) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text(f"[models]\n{models}\n[[workers]]\nurl = 'http://a:80'\n")
    findings["a:80"] = found("qwen")
    assert main(["check", "-c", str(file)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(reported)
    assert "'nobody'" in last
    findings["a:80"] = found("qwen", "nobody")
    assert main(["check", "-c", str(file)]) == 0
    assert "no worker serves" not in capsys.readouterr().out


def test_check_wraps_lines_on_a_terminal(
    findings: dict[str, Finding],
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    environ |= {"GOLLAMA_WORKERS": "http://a:80", "COLUMNS": "60", "TERM": "xterm"}
    findings["a:80"] = found(*(f"model-number-{number}" for number in range(9)))
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[32mready" in text
    assert "…" not in text
    for number in range(9):
        assert f"-{number}" in text


def test_ctrl_c_leaves_no_traceback(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    async def examine(worker: WorkerConfig, health: Health) -> Finding:
        signal.raise_signal(signal.SIGINT)
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    monkeypatch.setattr("gollama_proxy.upstream.probe.examine", examine)
    environ["GOLLAMA_WORKERS"] = "http://a:80"
    # A shell without job control has its background jobs ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["check"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", f"note: settings are from {os.devnull}\n")


async def test_check_of_a_worker_that_answers(
    environ: dict[str, str], capsys: Output
) -> None:
    async with ScriptedWorker("qwen", "llama", slots=3, n_ctx=512) as worker:
        environ["GOLLAMA_WORKERS"] = worker.url
        assert await asyncio.to_thread(main, ["check"]) == 0
        row = capsys.readouterr().out.splitlines()[1].split()
        shown = [worker.name, worker.url, "ready", "qwen,", "llama", "3", "512"]
        assert row == [*shown, worker.build]
        await worker.down()
        assert await asyncio.to_thread(main, ["check"]) == 1
        assert f"{worker.url}  down" in capsys.readouterr().out


async def test_check_of_a_store(
    tmp_path: Path, environ: dict[str, str], capsys: Output
) -> None:
    async with ScriptedWorker() as worker:
        environ["GOLLAMA_WORKERS"] = worker.url
        async with running_store(
            tmp_path, "valkey", "--requirepass", "hunter2"
        ) as store:
            url = store.plain_url.replace("unix://", "unix://:hunter2@")
            environ["GOLLAMA_STATE_URL"] = url
            assert await asyncio.to_thread(main, ["check"]) == 0
            error = capsys.readouterr().err
            assert "note: the store: valkey 9." in error
            assert f" at unix://...@{store.socket}, hubs of 'gollama': 0\n" in error
            assert await store.ask("KEYS", "*", password="hunter2") == []
            environ["GOLLAMA_STATE_URL"] = store.plain_url
            assert await asyncio.to_thread(main, ["check"]) == 1
            reason = "it requires a password, and state.url has none"
            expected = f"state.url = '{store.plain_url}': {reason}\n"
            assert capsys.readouterr().out.startswith(expected)
        environ["GOLLAMA_STATE_URL"] = url
        assert await asyncio.to_thread(main, ["check"]) == 1
        output, error = capsys.readouterr()
        expected = f"state.url = 'unix://...@{store.socket}': Connection refused"
        assert output.startswith(expected)
        assert "hunter2" not in output + error


# --- demo -------------------------------------------------------------------------


def test_demo_passes_on_its_arguments(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    given: dict[str, Any] = {}

    async def run(load: demo.Load, signals: Signals, **options: Any) -> int:
        given.update(options, port=load(environ, ["http://b"]).server.port)
        return 7

    monkeypatch.setattr(demo, "run", run)
    argv = ["demo", "--port", "9", "--worker", "http://a", "--worker", "http://b"]
    assert main([*argv, "--llama-server", "x", "--model", "y"]) == 7
    assert given == {
        "workers": ["http://a", "http://b"],
        "llama_server": "x",
        "model": "y",
        "port": 9,
    }


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ChildError("two\nlines", 1), 1, "gollama-proxy: two\nlines\n"),
        (ConfigError("wrong"), 2, "gollama-proxy: wrong\n"),
    ],
)
def test_demo_that_fails(
    error: Exception,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    async def run(*_: Any, **__: Any) -> int:
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo"]) == status
    assert capsys.readouterr().err == text
