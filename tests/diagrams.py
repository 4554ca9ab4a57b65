"""The diagrams in ARCHITECTURE.md, drawn from the tables that the program uses.

`python -m tests.diagrams` writes them into the file (`make diagrams`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gollama_proxy.fleet import breaker
from gollama_proxy.fleet import state as worker
from gollama_proxy.proxy import state

PAGE = Path(__file__).parent.parent / "ARCHITECTURE.md"

# State, event (empty where the table has none), next state.
Step = tuple[enum.Enum, str, enum.Enum]


def diagrams() -> dict[str, str]:
    """Draw every diagram, by the name in its marker."""
    exchange = [
        (before, "", after)
        for before, states in state.TRANSITIONS.items()
        for after in sorted(states, key=list(state.State).index)
    ]
    return {
        "exchange": draw(exchange),
        "breaker": draw(_steps(breaker.TRANSITIONS)),
        "worker": draw(_steps(worker.TRANSITIONS)),
    }


def _steps(table: Mapping[tuple[Any, Any], Any]) -> list[Step]:
    return [(before, event.name, after) for (before, event), after in table.items()]


def draw(steps: Iterable[Step]) -> str:
    """Draw a state machine in the language of Mermaid; the first state begins."""
    steps = list(steps)
    lines = ["stateDiagram-v2", f"    [*] --> {steps[0][0].name}"]
    for before, event, after in steps:
        if before is not after:
            lines.append(
                f"    {before.name} --> {after.name}" + (f": {event}" if event else "")
            )
    return "\n".join(["```mermaid", *lines, "```"])


def fill(page: str) -> str:
    """Put the diagrams of today between their markers."""
    for name, diagram in diagrams().items():
        marked = rf"(<!-- diagram: {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(marked, rf"\1{diagram}\n\2", page, flags=re.DOTALL)
        assert count == 1, name
    return page


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
