"""Write `gollama-proxy.pyz`, one file that starts with any of several Pythons.

    python tools/pyz.py OUTPUT SITE_PACKAGES...

Each folder has what one version of Python needs.  Most files are the same in all; those
compiled for one version have its name (`loop.cpython-311-x86_64-linux-gnu.so`), and lie
beside each other in the file.  It is the same, byte by byte, for the same contents and
SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from launch import UNPACKED_IN
from shiv import __version__ as shiv_version
from shiv.bootstrap.environment import Environment
from shiv.builder import create_archive


def main(output: str, *folders: str) -> None:
    """Merge the folders, remove debugging symbols, and pack the result."""
    with tempfile.TemporaryDirectory() as temporary:
        merged = Path(temporary, "site-packages")
        for folder in map(Path, folders):
            shutil.copytree(folder, merged, dirs_exist_ok=True)
        _clean(merged)
        pack(merged, Path(output))


def _clean(merged: Path) -> None:
    """Remove what the program does not use."""
    for name in ("bin", "share"):  # commands and pages of the libraries
        shutil.rmtree(merged / name, ignore_errors=True)
    for path in merged.glob("*.dist-info"):
        for name in (
            "RECORD",
            "INSTALLER",
            "REQUESTED",
            "direct_url.json",
            "uv_cache.json",
        ):
            (path / name).unlink(missing_ok=True)
    libraries = sorted(merged.rglob("*.so"))
    # More than half of a library.
    strip = os.environ.get("STRIP", "strip")
    subprocess.run([strip, "-S", *map(str, libraries)], check=True)
    for path in merged.rglob("*"):
        runs = path.is_dir() or path.name == "valkey-server"
        path.chmod(0o755 if runs else 0o644)  # whatever the umask is


def pack(merged: Path, output: Path) -> None:
    """Write the file from one folder."""
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", 315_532_800))  # 1980, as in any zip
    env = Environment(
        built_at=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(epoch)),
        entry_point="gollama_proxy.cli:main",
        shiv_version=shiv_version,
        compile_pyc=False,  # Python compiles what is imported
        reproducible=True,
        root=f"${UNPACKED_IN}",
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".unfinished")
    create_archive([merged], unfinished, "/usr/bin/env python3", "launch:start", env)
    with zipfile.ZipFile(unfinished, "a", zipfile.ZIP_DEFLATED) as archive:
        launch = Path(__file__).with_name("launch.py").read_text()
        for name, text in (("launch.py", launch), ("built_for.py", _built_for(merged))):
            info = zipfile.ZipInfo(name, time.gmtime(epoch)[:6])
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, text)
    unfinished.replace(output)


def _built_for(merged: Path) -> str:
    """Return the module that lists the interpreters that have every library."""
    found: dict[str, set[str]] = {}
    for path in merged.rglob("*.cpython-*.so"):
        module, tag, _ = path.name.split(".")
        found.setdefault(f"{path.parent}/{module}", set()).add(tag)
    return f"TAGS = {sorted(set.intersection(*found.values()))!r}\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
