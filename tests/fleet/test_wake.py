"""When sleeping machines are woken, and when they are given up."""

from __future__ import annotations

import pytest

from gollama_proxy.config.settings import Config, Health, Origin, Wake, WorkerConfig
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import Hold, WorkerState
from gollama_proxy.fleet.wake import LONGEST_PAUSE, REPEAT, UNKNOWN, Waker
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.clock import Clock

SETTINGS = Wake(timeout=100.0, pause=300.0)
FOUND = Description((Model("tiny"),), slots=1)


class Fleet:
    """Workers of one model that can be woken, and a record of the packets."""

    def __init__(self, count: int = 1) -> None:
        self.clock = Clock()
        self.packets: list[str] = []
        self.error: OSError | None = None  # that sending raises
        configs = tuple(
            WorkerConfig(
                f"http://10.0.0.{n}:8080",
                Origin("http", f"10.0.0.{n}", 8080, ""),
                f"w{n}",
                mac=f"00:11:22:33:44:0{n}",
            )
            for n in range(count)
        )
        config = Config(workers=configs, health=Health(fall=1))
        self.registry = Registry(config, self.clock)
        self.waker = Waker(SETTINGS, self.send, self.clock)
        self.registry.subscribe(self.waker)
        for worker in self.workers:
            worker.observe(Check.OK, "ok", FOUND)
            worker.observe(Check.FAILED, "no answer within 5 s")
            assert worker.state is WorkerState.ASLEEP

    def send(self, worker: Worker) -> None:
        if self.error is not None:
            raise self.error
        self.packets.append(worker.name)

    @property
    def workers(self) -> list[Worker]:
        return self.registry.workers

    @property
    def pool(self) -> Pool:
        return self.registry.pool("tiny")

    def check(self, wait: float | None = None) -> None:
        waits = [] if wait is None else [(self.pool, wait)]
        self.waker.check(waits, self.workers)

    def rise(self, worker: Worker) -> None:
        worker.observe(Check.OK, "ok", FOUND)
        assert worker.state is WorkerState.READY

    def wake_and_rise(self, worker: Worker, seconds: float) -> None:
        self.waker.wake(worker)
        self.clock.advance(seconds)
        self.rise(worker)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_the_models_of_a_sleeping_worker_are_remembered(fleet: Fleet) -> None:
    assert fleet.registry.models() == ["tiny"]
    assert fleet.registry.ready, "it can be woken"
    assert not fleet.pool.available


def test_a_request_wakes_one_machine_once() -> None:
    fleet = Fleet(2)
    for _ in range(5):
        woken = fleet.waker.wake_for(fleet.pool)
    assert woken is fleet.workers[0]
    assert fleet.packets == ["w0"]
    assert woken.state is WorkerState.WAKING
    assert repr(fleet.waker) == "<Waker waking=1>"


def test_a_worker_that_does_not_suit_is_not_woken() -> None:
    fleet = Fleet(2)
    one, two = fleet.workers
    assert fleet.waker.wake_for(fleet.pool, lambda worker: worker is two) is two
    assert fleet.waker.wake_for(fleet.pool, lambda worker: worker is one) is one
    assert fleet.waker.expected(fleet.pool, lambda worker: False) is None
    assert fleet.packets == ["w1", "w0"]


def test_a_paused_worker_is_not_woken(fleet: Fleet) -> None:
    fleet.registry.hold("w0", Hold.PAUSED)
    assert fleet.waker.wake_for(fleet.pool) is None
    assert not fleet.registry.ready


def test_the_packet_is_repeated_until_the_machine_answers(fleet: Fleet) -> None:
    [worker] = fleet.workers
    fleet.waker.wake_for(fleet.pool)
    fleet.clock.advance(REPEAT - 1)
    fleet.check()
    assert len(fleet.packets) == 1
    fleet.clock.advance(1)
    fleet.check()
    assert len(fleet.packets) == 2
    worker.observe(Check.LOADING, "loading model")
    fleet.clock.advance(REPEAT)
    fleet.check()
    assert len(fleet.packets) == 2, "it is up, and loads its model"
    assert fleet.waker.expected(fleet.pool) is worker
    fleet.rise(worker)
    assert fleet.waker.expected(fleet.pool) is None
    fleet.clock.advance(1000)
    fleet.check()
    assert worker.state is WorkerState.READY


def test_a_machine_that_boots_refuses_connections_for_a_while(fleet: Fleet) -> None:
    [worker] = fleet.workers
    fleet.waker.wake_for(fleet.pool)
    for check in Check.FAILED, Check.REFUSED, Check.FAILED:
        worker.observe(check, "not yet")
        assert worker.state is WorkerState.WAKING


def test_a_machine_that_does_not_wake_is_left_alone_for_longer_and_longer(
    fleet: Fleet,
) -> None:
    [worker] = fleet.workers
    for pause in 300, 600, 1200, 2400, LONGEST_PAUSE, LONGEST_PAUSE:
        assert fleet.waker.wake_for(fleet.pool) is worker
        fleet.clock.advance(SETTINGS.timeout - 1)
        fleet.check()
        assert worker.state is WorkerState.WAKING
        fleet.clock.advance(1)
        fleet.check()
        assert worker.state is WorkerState.ASLEEP
        assert worker.reason == "did not wake within 100 s"
        assert fleet.waker.refusal([worker]) == " w0 did not wake within 100 s."
        fleet.clock.advance(pause - 1)
        assert fleet.waker.wake_for(fleet.pool) is None
        fleet.clock.advance(1)
        assert fleet.waker.refusal([worker]) == ""
    fleet.wake_and_rise(worker, 20)
    worker.observe(Check.FAILED, "no answer")
    fleet.waker.wake_for(fleet.pool)
    fleet.clock.advance(SETTINGS.timeout)
    fleet.check()
    fleet.clock.advance(300)
    assert fleet.waker.wake_for(fleet.pool), "the pause is short again"


def test_another_machine_is_woken_instead() -> None:
    fleet = Fleet(2)
    fleet.waker.wake_for(fleet.pool)
    fleet.clock.advance(SETTINGS.timeout)
    fleet.check()
    assert fleet.waker.wake_for(fleet.pool) is fleet.workers[1]


def test_a_packet_that_cannot_be_sent_wakes_nothing(fleet: Fleet) -> None:
    fleet.error = OSError(101, "Network is unreachable")
    assert fleet.waker.wake_for(fleet.pool) is None
    assert fleet.workers[0].state is WorkerState.ASLEEP
    fleet.error = None
    assert fleet.waker.wake_for(fleet.pool) is None, "not again at once"
    fleet.clock.advance(SETTINGS.pause)
    assert fleet.waker.wake_for(fleet.pool) is fleet.workers[0]


def test_the_log_has_why_a_packet_could_not_be_sent(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    [worker] = fleet.workers
    fleet.error = OSError(101, "Network is unreachable")
    fleet.waker.wake(worker)
    fleet.error = OSError("no such interface")  # without a number
    fleet.waker.wake(worker)
    assert caplog.messages == [
        "worker w0: cannot be woken: Network is unreachable",
        "worker w0: cannot be woken: no such interface",
    ]


def test_a_wait_longer_than_waking_takes_wakes_another_machine() -> None:
    fleet = Fleet(3)
    one, two, _ = fleet.workers
    fleet.rise(one)
    fleet.check(UNKNOWN)
    assert fleet.packets == []
    fleet.check(UNKNOWN + 1)
    fleet.check(UNKNOWN + 1)
    assert fleet.packets == ["w1"], "and not all of them"
    fleet.clock.advance(20)
    fleet.rise(two)
    two.observe(Check.FAILED, "no answer")
    fleet.check(20)
    assert fleet.packets == ["w1"]
    fleet.check(21)
    assert fleet.packets == ["w1", "w1"], "it is known to be quick"


def test_a_fallback_serves_while_the_machine_wakes(fleet: Fleet) -> None:
    fleet.pool.missed = True
    fleet.check()
    assert fleet.packets == ["w0"]
    assert not fleet.pool.missed


def test_the_time_to_wake_is_learnt() -> None:
    fleet = Fleet(2)
    for worker, seconds in zip(fleet.workers, (30, 10), strict=True):
        fleet.wake_and_rise(worker, seconds)
        worker.observe(Check.FAILED, "no answer")
    fleet.packets.clear()
    fleet.waker.wake_for(fleet.pool)
    assert fleet.packets == ["w1"], "the quicker one"


def test_each_time_to_wake_counts_half(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    [worker] = fleet.workers
    caplog.set_level("INFO", "gollama_proxy.fleet.wake")
    for seconds in 40, 10, 15:  # taken to be 40, then 25, then 20
        fleet.wake_and_rise(worker, seconds)
        worker.observe(Check.FAILED, "no answer")
    assert caplog.messages == [
        "worker w0: woke within 40 s",
        "worker w0: woke within 10 s",
        "worker w0: woke within 15 s",
    ]
    fleet.packets.clear()
    fleet.check(20)
    assert not fleet.packets
    fleet.check(20.1)
    assert fleet.packets == ["w0"]


def test_a_machine_sleeps_on_when_no_request_has_missed_it(fleet: Fleet) -> None:
    fleet.check()
    assert not fleet.packets


def test_machines_in_front_of_one_that_wakes_change_nothing() -> None:
    fleet = Fleet(3)
    one, two, three = fleet.workers
    fleet.wake_and_rise(one, 10)  # awake, and known
    fleet.waker.wake(two)
    fleet.clock.advance(SETTINGS.timeout)  # no longer expected
    fleet.waker.wake(three)
    assert fleet.waker.expected(fleet.pool) is three
    fleet.packets.clear()
    fleet.clock.advance(REPEAT)
    fleet.check()
    assert two.state is WorkerState.ASLEEP
    assert fleet.packets == ["w2"]


def test_a_machine_that_goes_away_is_forgotten(fleet: Fleet) -> None:
    fleet.waker.wake_for(fleet.pool)
    fleet.registry.remove("w0")
    assert repr(fleet.waker) == "<Waker waking=0>"


def test_a_machine_that_was_never_woken_goes_away(fleet: Fleet) -> None:
    fleet.registry.remove("w0")
    assert repr(fleet.waker) == "<Waker waking=0>"


def test_breakers_know_nothing_of_sleep(fleet: Fleet) -> None:
    [worker] = fleet.workers
    for _ in range(3):
        fleet.wake_and_rise(worker, 10)
        worker.observe(Check.FAILED, "no answer")
    assert worker.breaker.closed
    assert worker.breaker.generation == 0


def test_a_machine_that_refuses_connections_is_awake(fleet: Fleet) -> None:
    [worker] = fleet.workers
    worker.observe(Check.REFUSED, "connection refused")
    assert worker.state is WorkerState.DOWN
    assert fleet.waker.wake_for(fleet.pool) is None
    worker.observe(Check.FAILED, "no answer")
    assert worker.state is WorkerState.ASLEEP


def test_a_machine_that_wakes_and_fails_is_no_longer_expected(fleet: Fleet) -> None:
    [worker] = fleet.workers
    fleet.waker.wake_for(fleet.pool)
    worker.observe(Check.LOADING, "loading model")
    worker.observe(Check.REFUSED, "connection refused")
    assert worker.state is WorkerState.DOWN
    assert fleet.waker.expected(fleet.pool) is None


def test_a_machine_that_loads_for_too_long_is_not_waited_for(fleet: Fleet) -> None:
    """It is awake, so it does not rest."""
    [worker] = fleet.workers
    fleet.waker.wake_for(fleet.pool)
    worker.observe(Check.LOADING, "loading model")
    fleet.clock.advance(SETTINGS.timeout)
    assert fleet.waker.expected(fleet.pool) is None
    fleet.check()
    assert worker.state is WorkerState.LOADING
    assert fleet.waker.refusal([worker]) == ""


def test_an_outlook_wakes_nothing(fleet: Fleet) -> None:
    [worker] = fleet.workers
    assert fleet.waker.would_wake(fleet.pool) is worker
    assert not fleet.packets
    fleet.waker.wake_for(fleet.pool)
    assert fleet.waker.would_wake(fleet.pool) is worker
    assert fleet.waker.would_wake(fleet.pool, lambda worker: False) is None


def test_other_settings_count_at_once(fleet: Fleet) -> None:
    [worker] = fleet.workers
    fleet.waker.wake_for(fleet.pool)
    fleet.waker.reconfigure(Wake(timeout=10.0))
    fleet.clock.advance(10)
    fleet.check()
    assert worker.reason == "did not wake within 10 s"
