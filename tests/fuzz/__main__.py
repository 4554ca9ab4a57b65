"""Have atheris look for bytes that break a promise: `make fuzz`.

    python -m tests.fuzz request 60        one target, for so many seconds

What it finds is written to `crash-…` and shown; put it among the seeds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gollama_proxy"]):
    from tests.fuzz.seeds import SEEDS
    from tests.fuzz.targets import TARGETS

MAX_INPUT = 4096  # bytes: what is longer is slower, and seldom new


def main(name: str, seconds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as corpus:
        for number, seed in enumerate(SEEDS[name]):
            (Path(corpus) / str(number)).write_bytes(seed)
        limits = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT}", "-timeout=10"]
        atheris.Setup([sys.argv[0], corpus, *limits], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
