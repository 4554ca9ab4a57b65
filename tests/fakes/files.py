"""Files that change while a hub watches them."""

from __future__ import annotations

from pathlib import Path


def replace(file: Path | str, content: str | bytes, mode: int = 0o600) -> None:
    """Replace a file atomically: a watcher never reads it empty or in part."""
    file = Path(file)
    beside = file.with_name(f".{file.name}.new")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    beside.chmod(mode)
    beside.replace(file)
