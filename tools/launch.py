"""Start the program of a `gollama-proxy.pyz`.

shiv unpacks the file once and imports from there, as compiled modules cannot be loaded
from a zip.  This module, at the top of the zip, first checks that the file fits the
interpreter, and chooses the folder.  Old interpreters have to be able to read it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import stat
import sys
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# The variable with the folder, unless there is a SHIV_ROOT.  It has another name, so
# that a child process that shiv has packed as well does not unpack there.
UNPACKED_IN = "_GOLLAMA_PROXY_UNPACKED_IN"


def start() -> None:
    """Run the program; with status 2 if it was not built for this interpreter."""
    import built_for  # written by pyz.py, beside this module

    own = EXTENSION_SUFFIXES[0].split(".")[1]  # such as cpython-311-x86_64-linux-gnu
    if own not in built_for.TAGS:
        sys.stderr.write(
            f"gollama-proxy: this file is for {', '.join(built_for.TAGS)}; "
            f"this Python is {own}, {sys.version.split()[0]}\n"
        )
        sys.exit(2)
    chosen = os.environ.get("SHIV_ROOT")
    if chosen and not _is_usable(Path(chosen)):
        sys.stderr.write(
            f"gollama-proxy: SHIV_ROOT = {chosen!r}: must be a folder that this user "
            "can write to\n"
        )
        sys.exit(2)
    if not chosen:
        os.environ[UNPACKED_IN] = find_folder()

    from _bootstrap import bootstrap  # of shiv

    bootstrap()


def find_folder() -> str:
    """Return the first folder that only this user can write to."""
    caches = os.environ.get("XDG_CACHE_HOME") or ""
    if not caches:
        # A user of a container may have neither a HOME nor a name.
        with contextlib.suppress(RuntimeError):
            caches = str(Path("~/.cache").expanduser())
    places = [
        # Of systemd's CacheDirectory=.  What is not set is a relative path here.
        Path(os.environ.get("CACHE_DIRECTORY", "").split(":")[0]),
        Path(caches, "gollama-proxy"),
        # Its name is known to others, so that `_is_private` has to reject theirs.
        Path(tempfile.gettempdir(), f"gollama-proxy-{os.geteuid()}"),
    ]
    for place in places:
        if place.is_absolute() and _is_private(place):
            return str(place)
    made = tempfile.mkdtemp(prefix="gollama-proxy-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _is_usable(place: Path) -> bool:
    """Make a folder if there is none; return whether files can be unpacked there.

    One in which another user has unpacked this file will do as well.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        return os.access(place, os.W_OK | os.X_OK) or any(place.iterdir())
    except OSError:
        return False


def _is_private(place: Path) -> bool:
    """Make a folder if there is none; return whether no other user can write to it."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & 0o022
        and os.access(place, os.W_OK | os.X_OK)
    )
