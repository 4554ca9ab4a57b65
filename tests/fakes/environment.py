"""The environment of a program that a test runs: nobody's settings are in it."""

from __future__ import annotations

import os


def bare() -> dict[str, str]:
    """Copy the environment without any setting; no stray settings file is found."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GOLLAMA_")}
    return clean | {"GOLLAMA_CONFIG": os.devnull}
