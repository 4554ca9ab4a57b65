"""Count the mutants that the tests detected: `make mutants`.

Reads the results of mutmut, and exits with 1 where a module is below `LEAST`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from mutmut.stats import status_by_exit_code

LEAST = 0.9  # of the mutants of a module that were tried
SURVIVED = {"survived", "no tests", "suspicious"}
KILLED = {"killed", "timeout", "segfault"}
RESULTS = Path("mutants/gollama_proxy")


def main() -> int:
    bad = 0
    for file in sorted(RESULTS.rglob("*.meta")):
        codes = json.loads(file.read_text())["exit_code_by_key"].values()
        states = [status_by_exit_code[code] for code in codes]
        tried = Counter(
            state in KILLED for state in states if state in KILLED | SURVIVED
        )
        if tried:
            share = tried[True] / tried.total()
            bad += share < LEAST
            name = file.relative_to(RESULTS).with_suffix("")
            print(f"{name!s:24} {tried[True]:4} of {tried.total():4}  {share:.1%}")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
