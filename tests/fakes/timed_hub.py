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
from types import ModuleType

from gollama_proxy import cli
from gollama_proxy.scheduling import sharing
from gollama_proxy.state import link, slots, store


def main() -> int:
    if os.environ["HUB_TIMES"] == "hasty":
        factor = 1 / 7
        multiply(slots, factor, "LIFETIME", "PATIENCE", "CAUTION")
        multiply(store, factor, "HEARTBEAT")
        multiply(sharing, factor, "WAITING")
    else:
        multiply(slots, 100, "LIFETIME")
        multiply(link, 100, "TIMEOUT", "SILENCE")
    vars(sharing)["_ENDING"] = slots.LIFETIME - 2 * store.HEARTBEAT
    return cli.main()


def multiply(module: ModuleType, factor: float, *names: str) -> None:
    """Change constants of a module, also in the modules that have imported them."""
    program = [v for k, v in sys.modules.items() if k.startswith("gollama_proxy.")]
    for name in names:
        constant = vars(module)[name]
        for each in program:
            if vars(each).get(name) is constant:
                vars(each)[name] = constant * factor


if __name__ == "__main__":
    sys.exit(main())
