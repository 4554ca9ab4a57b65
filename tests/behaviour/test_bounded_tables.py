"""Nothing that a client or a worker can name makes the hub grow without end.

Models are made up (a worker serves `q*`), subjects come and go, tokens are new each
time, conversations begin.  Afterwards every table of every object of the hub is looked
at, including those that were added after this was written.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.bounded import MOST
from gollama_proxy.config import load as config
from gollama_proxy.edge.auth import AuthError
from gollama_proxy.edge.quotas import REMEMBERED, Quotas
from gollama_proxy.fleet.lease import Result
from gollama_proxy.hub import Hub
from gollama_proxy.scheduling import admission as admissions
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.state.ledger import Ledger
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.telemetry.metrics import MOST_MODELS
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import NoWorkerError
from tests.fakes.clock import Clock
from tests.fakes.hub import SECRET, mint
from tests.fakes.registry import plan

NAMES = MOST + 500  # of each kind, that clients or workers make up
WORKERS = 10
POLICIES = ["round_robin", "weighted", "least_busy", "fastest", "affinity"]


@pytest.fixture(autouse=True)
def _nothing_of_other_tests() -> None:
    gc.collect()


def tables_of(kinds: str = "gollama_proxy") -> Iterator[tuple[str, Sized]]:
    """Yield what every object of the hub holds that has a length."""
    for owner in gc.get_objects():
        kind = type(owner)
        if not str(kind.__module__).startswith(kinds):
            continue
        slots = [s for cls in kind.__mro__ for s in getattr(cls, "__slots__", ())]
        names = {*slots, *getattr(owner, "__dict__", {})}
        if isinstance(owner, dict | set | list):
            yield f"{kind.__qualname__} itself", owner
        for name in names:
            held = getattr(owner, name, None)
            if isinstance(held, dict | set | list):
                yield f"{kind.__qualname__}.{name}", held


def hub_with(tmp_path: Path, policy: str, clock: Clock) -> Hub:
    """Make a hub with healthy workers that serve every name beginning with a q."""
    file = tmp_path / "gollama.toml"
    table = '[[workers]]\nurl = "http://127.0.0.1:{}"\nmodels = ["q*"]\n'
    file.write_text("".join(table.format(port + 1) for port in range(WORKERS)))
    environ = {"GOLLAMA_JWT_SECRET": SECRET, "GOLLAMA_ROUTING_POLICY": policy}
    hub = Hub(config.load(file, environ), clock)
    for worker in hub.registry.workers:
        worker.observe(Check.OK, "ok", Description((Model("q"),), slots=4))
    return hub


def ask(hub: Hub, model: str, subject: str, outcome: Result) -> None:
    """Have one request served, as the path of a request does, but without sockets."""
    balancer, admission = hub.balancer, hub.queue.admission
    pool = hub.registry.resolve(model, None)
    attempts = plan(balancer, pool)
    holder = admission.admit(subject, model)
    assert holder is not None
    worker = balancer.pick(attempts, attempts.candidates())
    attempts.begin(worker)
    lease = worker.lease(model)
    lease.first_token, lease.tokens, lease.seconds = 0.1, 10, 1.0
    worker.pace_of(model)
    worker.breaker_of(model)
    lease.release(outcome)
    admission.release(holder)
    hub.telemetry.ended(
        Record("1", "POST", "/v1/chat/completions", model=model, worker=worker.name)
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_unknown_models_and_subjects_are_forgotten(tmp_path: Path, policy: str) -> None:
    clock = Clock()
    before = {id(table) for _, table in tables_of()}
    hub = hub_with(tmp_path, policy, clock)
    for number in range(NAMES):
        ask(hub, f"q{number}", f"subject {number}", Result.COMPLETE)
        clock.advance(0.01)
    large = {
        name: len(table)
        for name, table in tables_of()
        if len(table) > getattr(table, "most", MOST) and id(table) not in before
    }
    most = MOST_MODELS * WORKERS * 10  # series of the metrics
    metrics = [name for name in large if name.startswith("RequestMetrics.")]
    assert all(large.pop(name) <= most for name in metrics)
    assert not large
    assert sum(map(len, hub.telemetry.pieces())) < 30 << 20
    assert all(len(w.paces) <= MOST for w in hub.registry.workers)


def test_models_invented_by_a_worker_are_forgotten(tmp_path: Path) -> None:
    """It lists others with each ping, and the catalogue is asked for all of them."""
    hub = hub_with(tmp_path, "round_robin", Clock())
    [worker, *_] = hub.registry.workers
    for number in range(NAMES):
        listed = (Model(f"q{number}"),)
        worker.observe(Check.OK, "ok", Description(listed, slots=4))
        for name in hub.registry.models():
            hub.registry.pool(name)
    assert len(hub.registry._pools) <= MOST
    assert len(hub.registry.models()) <= 2


def test_no_more_requests_wait_than_the_queue_takes(tmp_path: Path) -> None:
    hub = hub_with(tmp_path, "round_robin", Clock())
    admission = hub.queue.admission
    admission.on_displaced = None  # no task waits for these tickets
    rng = random.Random(1)
    tickets = []
    for number in range(NAMES):
        try:
            ticket = admission.join(
                f"s{number}", f"q{number}", rng.choice(list(Priority)), limit=1
            )
        except NoWorkerError:
            continue
        tickets.append(ticket)
    for name, table in tables_of("gollama_proxy.scheduling"):
        assert len(table) <= getattr(table, "most", MOST), name
    for ticket in tickets:
        admission.leave(ticket)
    assert admission.waiting == 0
    assert len(admission._subjects) <= admissions.KEPT
    assert repr(admission) == "<Admission interactive=0 batch=0 subjects=0>"
    assert not any(admission._rounds.values())


def test_a_flood_of_subjects_with_limits_is_forgotten() -> None:
    """The one that was not seen for longest goes first."""
    clock = Clock()
    quotas = Quotas(clock, Ledger())
    for number in range(REMEMBERED + 500):
        quotas.take(f"subject {number}", rpm=10, tpm=None)
        quotas.take("regular", rpm=10_000_000, tpm=None)
    assert len(quotas._accounts) == REMEMBERED
    assert "regular" in quotas._accounts


def test_tokens_are_remembered_up_to_a_number_and_bad_ones_never(
    tmp_path: Path,
) -> None:
    environ = {"GOLLAMA_JWT_SECRET": SECRET, "GOLLAMA_AUTH_CACHE_SIZE": "50"}
    hub = Hub(config.load(None, environ, {}, ["http://127.0.0.1:1"]))
    for number in range(200):
        token = mint(sub=f"s{number}")
        hub.authenticator.authenticate([f"Bearer {token}"])
        with pytest.raises(AuthError):
            hub.authenticator.authenticate([f"Bearer {token}x"])
    assert len(hub.authenticator._known) == 50


def test_labels_beyond_a_limit_are_counted_as_other(tmp_path: Path) -> None:
    hub = hub_with(tmp_path, "round_robin", Clock())
    for number in range(MOST_MODELS + 5):
        model = f"m{number}"
        shown = {"model": model, "fell_back": model, "tokens": 1, "rescued": 1}
        for _ in range(2):
            hub.telemetry.ended(Record("1", "POST", **shown))
    page = "".join(hub.telemetry.pieces())
    assert f'model="m{MOST_MODELS - 1}"' in page
    assert f'model="m{MOST_MODELS}"' not in page
    other = 'gollama_tokens_relayed_total{model="other",worker=""} 10.0'
    assert other in page
    assert 'gollama_fallbacks_total{fallback="other",model="other"} 10.0' in page


def test_the_audit_sees_a_table_that_grows() -> None:
    """A table without a limit has to be found by it."""

    class Forgetful:
        def __init__(self) -> None:
            self.table: dict[int, Any] = {number: [] for number in range(MOST + 1)}

    Forgetful.__module__ = "gollama_proxy.somewhere"
    forgetful = Forgetful()
    found = {name for name, table in tables_of() if len(table) > MOST}
    assert any(name.endswith("Forgetful.table") for name in found)
    del forgetful
