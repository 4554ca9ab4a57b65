"""Whatever the documentation shows has been tried: commands, programs, settings, links.

Each page gets a hub with scripted workers, and a folder in which its blocks are run one
after another.  `make` only prints what it would do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import tomllib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from gollama_proxy.config.load import load
from tests.browser.fleet import settings_file
from tests.docs.blocks import SHOWN, Block, blocks
from tests.docs.parts import ROOT, name_of
from tests.fakes import forked, forks
from tests.fakes.authority import Authority
from tests.fakes.hub import SECRET, RunningHub, running_hub
from tests.fakes.script import chat_stream
from tests.fakes.tools import require
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

MODELS = ("qwen2.5-7b", "smollm2-135m-instruct")
ALIASES = {"gpt-4o-mini": MODELS[0]}
ANSWER = ("The", " sea", " is", " deep", ".")
CHECKED = ("shell", "console", "python", "toml", "json", "yaml")
ONLY_SHOWN = ("text", "mermaid", "html", "ini", "nginx")
FORKED = forked.__file__
# For a script of many commands, each of which starts a program.
PATIENCE = 4 * DEADLINE
# What a block may change of the environment of those behind it.
KEEP_VARIABLES = "\nexport -p > variables"


@dataclass
class Desk:
    """Where the blocks of a page are tried: a folder, and a hub to talk to."""

    folder: Path
    places: Mapping[str, str]  # what is shown, and what stands for it here

    def localise(self, code: str) -> str:
        """Return a block for this machine: with its addresses and folders."""
        for shown, here in self.places.items():
            code = code.replace(shown, here)
        return code

    def export(self, name: str, value: str | None) -> None:
        """Set a variable for all scripts that follow, or remove it."""
        given = f"export {name}={shlex.quote(value or '')}"
        line = f"{given}\n" if value is not None else f"unset {name}\n"
        with (self.folder / "variables").open("a") as file:
            file.write(line)

    async def run(self, script: str, until: str = "") -> tuple[int, str, str]:
        """Run a script of bash; return its status, output, and errors."""
        script = f"set -eu; source ./variables\n{script}"
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", script),
            cwd=self.folder,
            env={},
            pass_fds=[forks.orders()],
            start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(PATIENCE):
                seen = b""
                if until:
                    assert process.stderr is not None
                    while until.encode() not in seen:
                        line = await process.stderr.readline()
                        assert line, f"{until!r} was not printed: {seen.decode()}"
                        seen += line
                    process.terminate()
                output, errors = await process.communicate()
        finally:
            # A program that was left in the background would keep the output open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        assert process.returncode is not None
        return process.returncode, output.decode(), (seen + errors).decode()


@contextlib.asynccontextmanager
async def running_desk(
    folder: Path, authority: Authority, *, forked: bool
) -> AsyncIterator[Desk]:
    """Prepare all that is shown; the program is `forked`, or what is installed."""
    async with (
        ScriptedWorker(*MODELS) as desktop,
        ScriptedWorker(*MODELS) as mac,
        ScriptedWorker(*MODELS) as attic,
        ScriptedWorker(*MODELS) as own,
    ):
        for worker in (desktop, mac, attic, own):
            worker.default(*chat_stream(list(ANSWER), model=MODELS[1]))
        file = settings_file(folder, {"desktop": desktop, "mac": mac})
        async with running_hub(file=file, models__aliases=ALIASES) as hub:
            places = {
                "http://gateway:8000": hub.url,
                "http://127.0.0.1:8000": hub.url,
                "http://10.0.0.11:8080": desktop.url,
                "http://10.0.0.12:8080": mac.url,
                "http://10.0.0.13:8080": attic.url,
                "http://127.0.0.1:8080": own.url,
                "/etc/gollama/": f"{authority.folder}/",
            }
            desk = Desk(folder, places)
            for name, value in environ(hub, folder).items():
                desk.export(name, value)
            if forked:
                program = f"{sys.executable} -IS {FORKED}"
                write_program(folder / "programs" / "gollama-proxy", program)
            yield desk


def environ(hub: RunningHub, folder: Path) -> dict[str, str]:
    programs = folder / "programs"
    programs.mkdir()
    make = require("make", package="make")
    write_program(programs / "make", f"{make} -nC {ROOT}")
    (folder / "examples").symlink_to(ROOT / "examples")
    paths = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {
        "PATH": os.pathsep.join(paths),
        "HOME": str(folder),
        "FORKS": str(forks.orders()),
        "GOLLAMA_HUB": hub.url,
        "GOLLAMA_JWT_SECRET": SECRET,
        "GOLLAMA_SERVER_PORT": "0",
        "GOLLAMA_STATE_DIR": "",
        "GOLLAMA_TOKEN": hub.token("operator", scope="admin"),
        "OPENAI_BASE_URL": f"{hub.url}/v1",
    }


def write_program(file: Path, command: str) -> None:
    """Write a program that runs another command, with the same arguments."""
    file.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    file.chmod(0o755)


# --- Blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("page", SHOWN, ids=name_of)
async def test_the_blocks_of_a_page_work(
    page: Path, tmp_path: Path, authority: Authority
) -> None:
    tried = [block for block in blocks(page) if block.language not in ONLY_SHOWN]
    for block in tried:
        assert block.language in CHECKED, f"{block.place}: name its language"
    tried = [block for block in tried if not block.not_run]
    if not tried:
        return
    if any("curl" in block.code for block in tried):
        require("curl", package="curl")
    for name in ("hub", "clients"):
        authority.issue(file=name)
    first = page == SHOWN[0]  # whose commands are run as they are
    async with running_desk(tmp_path, authority, forked=not first) as place:
        for block in tried:
            try:
                await try_out(block, place)
            except Exception as exc:
                exc.add_note(f"in {block.place}")
                raise


async def try_out(block: Block, place: Desk) -> None:
    code = place.localise(block.code)
    match block.language:
        case "json":
            json.loads(code)
        case "yaml":
            list(yaml.safe_load_all(code))
        case "toml":
            try_settings(code, place)
        case "python":
            (place.folder / "program.py").write_text(code)
            await succeed(place, "python program.py")
        case "shell" if block.until:
            # Without a shell, which would get the signal in its place.
            status, output, errors = await place.run(f"exec env {code}", block.until)
            assert status == 0, output + errors
        case "shell":
            await succeed(place, code + KEEP_VARIABLES)
        case "console":
            for command, shown in conversation(code):
                output = await succeed(place, command + KEEP_VARIABLES)
                assert re.fullmatch(pattern(shown), output.rstrip()), output


async def succeed(place: Desk, script: str) -> str:
    status, output, errors = await place.run(script)
    assert status == 0, f"{script}\n{output}{errors}"
    return output


def try_settings(code: str, place: Desk) -> None:
    """Load settings, and leave them as those of the commands that follow."""
    (place.folder / "gollama.toml").write_text(code)
    given = tomllib.loads(code)
    variables = {"GOLLAMA_JWT_SECRET": SECRET}
    if file := given.get("auth", {}).get("secret_file"):
        (place.folder / file).write_text(SECRET)
        (place.folder / file).chmod(0o600)
        variables = {}
        place.export("GOLLAMA_JWT_SECRET", None)
    for worker in given.get("workers", ()):
        if name := worker.get("api_key_env"):
            variables[name] = "key"
            place.export(name, "key")
    with contextlib.chdir(place.folder):
        load(str(place.folder / "gollama.toml"), variables)


def conversation(code: str) -> list[tuple[str, str]]:
    """Return the commands of a console, each with the output that follows it."""
    parts = re.split(r"^\$ ((?:[^\n]*\\\n)*[^\n]*)\n?", code, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def pattern(shown: str) -> str:
    """Return a pattern for output that is shown with `…`."""
    lines = [
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + "\n"
        for line in shown.rstrip().splitlines()
    ]
    return "".join(lines).removesuffix("\n")


def test_output_is_compared_line_by_line() -> None:
    shown = "one\n…\nf…e\n"
    assert re.fullmatch(pattern(shown), "one\ntwo\nthree\nfive")
    assert re.fullmatch(pattern(shown), "one\nfive")
    assert not re.fullmatch(pattern(shown), "one\nfive\nsix")
    assert conversation("$ a \\\n  b\nc\n$ d") == [("a \\\n  b", "c\n"), ("d", "")]


# --- Links ------------------------------------------------------------------------


@pytest.mark.parametrize("page", SHOWN, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page, as code hosts make them of its headings."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {each.replace(" ", "-") for each in words}
