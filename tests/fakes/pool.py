"""Workers without servers: well, serving one model, and as busy as a test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gollama_proxy.config.settings import Health, Origin, WorkerConfig
from gollama_proxy.fleet.lease import Lease
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies import Ask, Fits, Policy
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.clock import Clock

MODEL = "qwen"


def worker(
    index: int = 0,
    *,
    slots: int | None = 4,
    weight: float | None = None,
    clock: Callable[[], float] | None = None,
    model: str = MODEL,
    name: str = "",
) -> Worker:
    """Make one that is ready."""
    origin = Origin("http", "10.0.0.1", 8000 + index, "")
    config = WorkerConfig("http://10.0.0.1", origin, name or f"w{index}", weight=weight)
    made = Worker(config, Health(), clock or Clock(), index)
    made.observe(Check.OK, "ok", Description((Model(model),), slots=slots))
    return made


def pool(*slots: int | None) -> tuple[Worker, ...]:
    """Make a pool of workers with so many slots each."""
    return tuple(worker(index, slots=each) for index, each in enumerate(slots))


def weighted(*weights: float) -> tuple[Worker, ...]:
    return tuple(worker(index, weight=each) for index, each in enumerate(weights))


def occupy(busy: Worker, count: int = 1, *, unread: int = 0) -> list[Lease]:
    """Have a worker give so many answers; with `unread` bytes each, none has begun."""
    leases = [busy.lease(MODEL) for _ in range(count)]
    for lease in leases:
        lease.first_token = 0.0 if unread else 1.0
        lease.prompt_bytes = unread
    return leases


def teach(
    pupil: Worker, reads: float | None, writes: float | None, *, beside: int = 1
) -> None:
    """Let it be known that a worker reads so many bytes/s, and writes so many tokens/s.

    Its answers have 100 tokens.
    """
    speed = pupil.pace_of(MODEL).speed
    if reads is not None:
        speed.read(1000, 1000 / reads)
    if writes is not None:
        speed.wrote(100, 100 / writes, beside)


def has_room(each: Worker) -> bool:
    return each.free > 0


def among(*some: Worker) -> Callable[[Worker], bool]:
    """Return a function that accepts these workers only."""
    return lambda each: each in some


def indexes(workers: Sequence[Worker]) -> list[int]:
    return [each.index for each in workers]


class InOrder(Policy):
    """A policy for tests: the first worker that fits."""

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        return next(filter(fits, workers), None)

    def twin(self, ask: Ask) -> Policy:
        return self
