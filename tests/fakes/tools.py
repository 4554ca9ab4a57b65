"""External programs that a test may need, and not every machine has."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest

# Set by .ci/run, which has installed them all: there, no test
# may be skipped.
_CI = "GOLLAMA_CI"

NODE_MODULES = Path(sys.prefix) / "node" / "node_modules"  # where `make node` puts them


def require(*programs: str, package: str) -> str:
    """Return the path of the first of these programs that is there.

    `package` is the Debian package that has it.  Without one, the test is skipped, and
    fails in CI.
    """
    # Debian keeps servers out of the PATH of ordinary users.
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = next(filter(None, (shutil.which(each, path=path) for each in programs)), "")
    if not found:
        missing(f"{' or '.join(programs)} is not there (apt-get install {package})")
    return found


def require_node_module(name: str) -> Path:
    """Return the folder of a package from npm; without it as `require()`."""
    folder = NODE_MODULES / name
    if not folder.is_dir():
        missing(f"the Node package {name} is not there (make node)")
    return folder


def missing(what: str) -> NoReturn:
    """Skip the test for lack of something; in CI, fail."""
    if os.environ.get(_CI):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)
