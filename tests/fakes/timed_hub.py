"""`gollama-proxy` with other times between a hub and its store, which have no settings.

    HUB_TIMES=hasty python -m tests.fakes.timed_hub serve …

*hasty*: leases end a second after the last heartbeat, for stories that wait for that.
On a busy machine such a hub may lose leases that it holds, so a test must not count
what runs at once.

*patient*: neither an answer of the store nor a heartbeat is ever too late, for tests
that count, however slow the machine is.
"""

from __future__ import annotations

import os
import sys

from gollama_proxy.state import link, slots, store


def main() -> int:
    hasty = os.environ["HUB_TIMES"] == "hasty"
    factor = 1 / 7 if hasty else 100
    slots.LIFETIME *= factor
    if hasty:
        slots.PATIENCE *= factor
        slots.CAUTION *= factor
        store.HEARTBEAT *= factor
    else:
        link.TIMEOUT *= factor
        link.SILENCE *= factor

    # What these import must have been changed before.
    from gollama_proxy import cli
    from gollama_proxy.scheduling import sharing

    if hasty:
        vars(sharing)["WAITING"] *= factor
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
