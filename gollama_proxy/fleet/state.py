"""The states of a worker, where it comes from, and why it may be held back.

Health is a state machine that the health checks drive:

    STARTING ──ok──▶ READY ◀──ok── LOADING        STARTING: it has not answered yet
        │              │  ╲──loading──▶             LOADING: it answers "Loading model"
        └──fell──▶   DOWN ◀──fell── (all)           DOWN: until `rise` good checks

Failed checks of a READY worker are counted, and the `fall`th in a row leads to DOWN.
In any other state the first failed check does.

A worker with a `mac` is ASLEEP, not DOWN, while its machine does not answer at all: it
can be woken (`wake.py`), and is WAKING until it answers, or is given up.  A machine
that refuses connections is awake.
"""

from __future__ import annotations

import enum


class WorkerState(enum.Enum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DOWN = "down"
    ASLEEP = "asleep"
    WAKING = "waking"


class Source(enum.StrEnum):
    """Where a worker comes from; a configuration changes only those of its file."""

    FILE = "file"  # or the environment, or a flag
    ADMIN = "admin"
    AGENT = "agent"


class Hold(enum.StrEnum):
    """Why a worker gets no new request although nothing is wrong with it."""

    NONE = "none"
    PAUSED = "paused"  # running requests go on
    DRAINING = "draining"  # running requests have a deadline


class WorkerEvent(enum.Enum):
    ROSE = "enough good checks"
    LOADING = "it is loading its model"
    FELL = "enough failed checks"
    SLEPT = "enough failed checks, and its machine can be woken"
    WOKEN = "its machine is being woken"
    GIVEN_UP = "its machine did not wake"


TRANSITIONS: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (WorkerState.STARTING, WorkerEvent.ROSE): WorkerState.READY,
    (WorkerState.STARTING, WorkerEvent.LOADING): WorkerState.LOADING,
    (WorkerState.STARTING, WorkerEvent.FELL): WorkerState.DOWN,
    (WorkerState.LOADING, WorkerEvent.ROSE): WorkerState.READY,
    (WorkerState.LOADING, WorkerEvent.LOADING): WorkerState.LOADING,
    (WorkerState.LOADING, WorkerEvent.FELL): WorkerState.DOWN,
    (WorkerState.READY, WorkerEvent.ROSE): WorkerState.READY,
    (WorkerState.READY, WorkerEvent.LOADING): WorkerState.LOADING,
    (WorkerState.READY, WorkerEvent.FELL): WorkerState.DOWN,
    (WorkerState.DOWN, WorkerEvent.ROSE): WorkerState.READY,
    (WorkerState.DOWN, WorkerEvent.LOADING): WorkerState.LOADING,
    (WorkerState.DOWN, WorkerEvent.FELL): WorkerState.DOWN,
    (WorkerState.STARTING, WorkerEvent.SLEPT): WorkerState.ASLEEP,
    (WorkerState.LOADING, WorkerEvent.SLEPT): WorkerState.ASLEEP,
    (WorkerState.READY, WorkerEvent.SLEPT): WorkerState.ASLEEP,
    (WorkerState.DOWN, WorkerEvent.SLEPT): WorkerState.ASLEEP,
    (WorkerState.ASLEEP, WorkerEvent.ROSE): WorkerState.READY,
    (WorkerState.ASLEEP, WorkerEvent.LOADING): WorkerState.LOADING,
    (WorkerState.ASLEEP, WorkerEvent.FELL): WorkerState.DOWN,
    (WorkerState.ASLEEP, WorkerEvent.SLEPT): WorkerState.ASLEEP,
    (WorkerState.ASLEEP, WorkerEvent.WOKEN): WorkerState.WAKING,
    (WorkerState.WAKING, WorkerEvent.ROSE): WorkerState.READY,
    (WorkerState.WAKING, WorkerEvent.LOADING): WorkerState.LOADING,
    # It boots: the machine answers before its llama-server does.
    (WorkerState.WAKING, WorkerEvent.FELL): WorkerState.WAKING,
    (WorkerState.WAKING, WorkerEvent.SLEPT): WorkerState.WAKING,
    (WorkerState.WAKING, WorkerEvent.GIVEN_UP): WorkerState.ASLEEP,
    # There is nothing to wake, or to give up.
    (WorkerState.STARTING, WorkerEvent.WOKEN): WorkerState.STARTING,
    (WorkerState.LOADING, WorkerEvent.WOKEN): WorkerState.LOADING,
    (WorkerState.READY, WorkerEvent.WOKEN): WorkerState.READY,
    (WorkerState.DOWN, WorkerEvent.WOKEN): WorkerState.DOWN,
    (WorkerState.WAKING, WorkerEvent.WOKEN): WorkerState.WAKING,
    (WorkerState.STARTING, WorkerEvent.GIVEN_UP): WorkerState.STARTING,
    (WorkerState.LOADING, WorkerEvent.GIVEN_UP): WorkerState.LOADING,
    (WorkerState.READY, WorkerEvent.GIVEN_UP): WorkerState.READY,
    (WorkerState.DOWN, WorkerEvent.GIVEN_UP): WorkerState.DOWN,
    (WorkerState.ASLEEP, WorkerEvent.GIVEN_UP): WorkerState.ASLEEP,
}
OUT = frozenset({WorkerState.DOWN, WorkerState.ASLEEP, WorkerState.WAKING})
