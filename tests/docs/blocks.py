"""The blocks of code in the documentation, and how each of them is checked.

Every block is fenced and names its language:

    shell       commands, which are run
    console     commands behind `$ `, with the output that they print; `…` stands for
                any text, and alone in a line for any lines
    python      a program, which is run
    toml        settings, which are loaded
    json, yaml  which are parsed
    text, and others   which are only shown

A comment before a block changes that:

    <!-- not run: needs Docker -->      it cannot run here, for this reason
    <!-- until: listening on -->        a command that logs this, then gets a SIGTERM
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.docs.parts import PAGES, ROOT, name_of

SHOWN = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "examples" / "README.md",
    ROOT / "examples" / "ha" / "README.md",
    *PAGES,
]
_NOTE = re.compile(r"<!-- (not run|until): (.+) -->")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line, from 1
    language: str
    code: str
    not_run: str = ""  # why
    until: str = ""  # what it prints before it is stopped

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page, indented ones without a language."""
    lines = page.read_text().splitlines()
    note, above, number = None, "", 0
    while number < len(lines):
        line = lines[number]
        if fence := re.match(r"( *)```(\w*)$", line):
            end = lines.index(f"{fence[1]}```", number + 1)
            code = "\n".join(
                each.removeprefix(fence[1]) for each in lines[number + 1 : end]
            )
            notes = {note[1]: note[2]} if note else {}
            yield Block(
                *(page, number + 2, fence[2], code),
                *(notes.get("not run", ""), notes.get("until", "")),
            )
            number, note = end, None
        elif line.startswith("    ") and not above.strip():
            yield Block(page, number + 1, "", line.strip())
        elif line.strip():
            note = _NOTE.fullmatch(line)
        above = lines[number]
        number += 1
