"""`gollama-proxy`, whose leases end a second after its last heartbeat.

    python -m tests.fakes.hasty_hub serve …

For stories that wait for the end of leases.  On a busy machine such a hub may lose
leases that it holds, so they must not count what runs at once.
"""

from __future__ import annotations

import sys

from gollama_proxy.state import slots, store

FACTOR = 1 / 7

slots.LIFETIME *= FACTOR
slots.PATIENCE *= FACTOR
slots.CAUTION *= FACTOR
store.HEARTBEAT *= FACTOR

# What these import must have been changed before.
from gollama_proxy.cli import main  # noqa: E402
from gollama_proxy.scheduling import sharing  # noqa: E402

vars(sharing).update(WAITING=sharing.WAITING * FACTOR)

if __name__ == "__main__":
    sys.exit(main())
