"""The list of revoked tokens, read again when its file changes.

The file is looked at once a second, in a thread, whatever the traffic: no request waits
for a disk.  A list that cannot be read, or not be understood, changes nothing: the last
good one stays, and the log says once what is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gollama_proxy.config.keys import read_revoked
from gollama_proxy.config.mistakes import ConfigError
from gollama_proxy.config.settings import Revoked
from gollama_proxy.tasks import spawn

logger = logging.getLogger(__name__)

PERIOD = 1.0
# Nanoseconds.  File systems tell times in steps of 10 ms, some of 2 s: a file that was
# changed as lately as this can change again and look the same.
_SETTLED = 3_000_000_000


class _Look(NamedTuple):
    """What a thread saw of the file."""

    version: tuple[int, ...] | None  # None: look again, whatever it is then
    revoked: Revoked | None  # None: nothing new
    trouble: str


class Revocation:
    """Tells `changed` of each list that differs from the last one."""

    def __init__(
        self,
        file: str,
        revoked: Revoked,
        changed: Callable[[Revoked], None],
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Make one that begins with a list; `clock` gives Unix time in nanoseconds."""
        self._file = file
        self._revoked = revoked
        self._changed = changed
        self._clock = clock
        self._version: tuple[int, ...] | None = None
        self._trouble = ""
        self._task: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()

    def __repr__(self) -> str:
        tokens, subjects = map(len, self._revoked)
        return f"<Revocation tokens={tokens} subjects={subjects}>"

    def start(self) -> None:
        """Begin to look after the file, if there is one; `stop` ends it."""
        if self._file:
            self._task = spawn(self._run(), "revocation")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(PERIOD):
                    await self._asked.wait()
            except TimeoutError:
                pass
            always = self._asked.is_set()
            self._asked.clear()
            try:
                await self.check(always=always)
            except Exception:
                logger.exception("a look at the revoked tokens failed; the next comes")

    def ask(self) -> None:
        """Have the file read again soon, and the log say what is in it."""
        self._asked.set()

    async def check(self, *, always: bool = False) -> None:
        """Look at the file once; read it if it may have changed, or `always`."""
        if always:
            self._version = None
        look = await asyncio.to_thread(self._look)
        self._version = look.version
        if look.trouble and (always or look.trouble != self._trouble):
            logger.error("%s; the last good list stays", look.trouble)
        self._trouble = look.trouble
        if look.revoked is not None:
            self._revoked = look.revoked
            self._changed(look.revoked)
        if look.revoked is not None or (always and not look.trouble):
            tokens, subjects = map(len, self._revoked)
            logger.info("revoked are %d tokens and %d subjects", tokens, subjects)

    # --- In the thread ------------------------------------------------------------

    def _look(self) -> _Look:
        version = self._stat()
        if version is not None and version == self._version:
            return _Look(version, None, self._trouble)
        try:
            revoked = read_revoked(self._file)
        except ConfigError as exc:
            return _Look(None, None, str(exc))
        if self._stat() != version:  # changed as it was read, perhaps half written
            return _Look(None, None, "")
        settled = version is not None and self._clock() - version[0] > _SETTLED
        # Compared here, as it may take its time for a long list.
        new = revoked if revoked != self._revoked else None
        return _Look(version if settled else None, new, "")

    def _stat(self) -> tuple[int, ...] | None:
        try:
            stat = Path(self._file).stat()
        except OSError:
            return None
        return max(stat.st_mtime_ns, stat.st_ctime_ns), stat.st_ino, stat.st_size
