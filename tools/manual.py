"""Print the manual page of the program, from its parser and its settings.

    python -m tools.manual > gollama-proxy.1

Programs that do the same for any parser leave out what follows the flags in the help,
and repeat the flags that are common to many commands.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import textwrap
import time
from collections.abc import Iterator, Mapping

from gollama_proxy import __version__, cli
from gollama_proxy.config.settings import VARIABLES, settings

_DESCRIPTION = """\
gollama-proxy is a hub in front of several machines that run llama.cpp's llama-server,
or another server with OpenAI's API.  Clients use one address, and the hub sends each
request to a worker that is free.  Answers are streamed token by token.  If a worker
dies, its answers continue on another one.
"""
_FILES = {
    "gollama.toml": "settings, in the current folder; serve --help lists them",
    "/etc/gollama-proxy/gollama.toml": "settings, if the current folder has none",
    "/var/lib/gollama-proxy": "what systemd has the hub keep: workers, holds, usage",
}
_VARIABLES = {
    "GOLLAMA_HUB": "address of the hub, for agents and operators",
    "GOLLAMA_TOKEN": "token for it",
}
_SIGNALS = {
    "SIGTERM, SIGINT": "accept no new requests, and end when the running answers have "
    "ended, or after server.drain; a second one ends at once",
    "SIGHUP": "read the settings again",
}
_EXAMPLES = {
    "A hub in front of two machines, with tokens:": """\
export GOLLAMA_JWT_SECRET=$(gollama-proxy secret)
gollama-proxy serve --worker http://10.0.0.11:8080 --worker http://10.0.0.12:8080
gollama-proxy token --sub alice""",
    "A machine that registers its llama-server:": """\
gollama-proxy agent --hub http://gateway:8000 --token-file token \\
    --worker http://127.0.0.1:8080""",
}


def page() -> str:
    """Return the page, in the man macros of troff."""
    parser = cli.make_whole_parser()
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(epoch))
    lines = [
        f'.TH GOLLAMA\\-PROXY 1 {date} "gollama\\-proxy {__version__}"',
        ".SH NAME",
        f"gollama\\-proxy \\- {_escape(str(parser.description).rstrip('.'))}",
        ".SH SYNOPSIS",
        ".B gollama\\-proxy",
        ".I COMMAND",
        ".RI [ flags ]",
        ".SH DESCRIPTION",
        *_wrap(_DESCRIPTION),
        ".SH COMMANDS",
        *_commands(parser),
        ".SH SETTINGS",
        "Each has a key in the settings file and an environment variable.",
        "The variable wins over the file, and a flag wins over both.",
        *_settings(),
        ".SH ENVIRONMENT",
        *_terms(VARIABLES | _VARIABLES),
        ".SH FILES",
        *_terms(_FILES),
        ".SH SIGNALS",
        *_terms(_SIGNALS),
        ".SH EXIT STATUS",
        *_exit_status(),
        ".SH EXAMPLES",
        *_examples(),
    ]
    return "\n".join(lines) + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    commands = _subcommands(parser)
    common = _flags_of(commands["reload"])  # which needs no other
    for name, command in commands.items():
        yield from _command(name, command, common)
        for action, sub in _subcommands(command).items():
            yield from _command(f"{name} {action}", sub, common)
    yield ".SS Flags of all commands for a running hub"
    yield from _arguments(commands["reload"], set())
    yield from _verbatim(str(commands["reload"].epilog))


def _subcommands(
    parser: argparse.ArgumentParser,
) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def _command(
    name: str, parser: argparse.ArgumentParser, common: set[str]
) -> Iterator[str]:
    shared = common <= _flags_of(parser)
    yield f".SS gollama\\-proxy {_escape(name)}"
    text = str(parser.description)
    yield from _wrap(f"{text[0].upper()}{text[1:]}.")
    if not shared:
        yield from _arguments(parser, {"-h"})
        if name != "serve":  # whose settings have their own section
            yield from _verbatim(parser.epilog or "")
    elif name != "reload":
        yield from _arguments(parser, common)


def _arguments(parser: argparse.ArgumentParser, left_out: set[str]) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        if (
            left_out.intersection(action.option_strings)
            or "-h" in action.option_strings
        ):
            continue
        value = ""
        if action.nargs != 0:
            value = str(action.metavar or action.dest.upper())
        flags = ", ".join(rf"\fB{_escape(flag)}\fR" for flag in action.option_strings)
        yield ".TP"
        yield " ".join(
            filter(None, (flags, rf"\fI{_escape(value)}\fR" if value else ""))
        )
        yield from _wrap(str(action.help))


def _settings() -> Iterator[str]:
    for row in settings():
        yield ".TP"
        yield (
            rf"\fB{_escape(row.key)}\fR, \fB{_escape(row.env)}\fR, "
            f"default {_escape(cli.show_default(row))}"
        )
        yield from _wrap(f"{row.help}; {row.allowed}")


def _exit_status() -> Iterator[str]:
    """Take it from the docstring of the commands, which is where it is kept."""
    text = " ".join(inspect.getdoc(cli).split()).partition("Exit status: ")[2]
    text = text.partition("With status 2")[0]
    for each in re.split(r", (?=\d+ )", text):
        status, meaning = re.fullmatch(r"(\d+) (.*?)\.? ?", each).groups()
        yield from _terms({status: meaning})


def _examples() -> Iterator[str]:
    for number, (text, commands) in enumerate(_EXAMPLES.items()):
        yield from [".PP"] * (number > 0)
        yield from _wrap(text)
        yield from _verbatim(commands)


# --- Macros of troff --------------------------------------------------------------


def _terms(terms: Mapping[str, str]) -> Iterator[str]:
    for term, text in terms.items():
        yield ".TP"
        yield rf"\fB{_escape(term)}\fR"
        yield from _wrap(text)


def _wrap(text: str) -> Iterator[str]:
    """Break lines of a text, which troff fills again, as editors like them."""
    yield from map(_escape, textwrap.wrap(text, 70, break_on_hyphens=False))


def _verbatim(text: str) -> Iterator[str]:
    if text:
        yield from (".PP", ".nf", ".RS 4")
        yield from (_escape(line) or "\\&" for line in text.splitlines())
        yield from (".RE", ".fi")


def _escape(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    print(page(), end="")
