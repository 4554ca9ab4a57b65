"""`gollama-proxy agent` that looks at its machine ten times as often.

python -m tests.fakes.hasty_agent agent …
"""

from __future__ import annotations

import sys

from gollama_proxy import agent, cli

if __name__ == "__main__":
    for name in ("LOOK_EVERY", "SETTLED_AFTER", "IDLE_CHECK"):
        vars(agent)[name] /= 10
    sys.exit(cli.main())
