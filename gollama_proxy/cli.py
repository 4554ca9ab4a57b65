"""The command line: `gollama-proxy serve`, `secret`, `token`, `check` and `demo`.

Exit status: 0 when done, 1 when a worker is not well or a second signal cut, 2 for
a setting or flag that cannot be used, 130 after Ctrl-C where there is nothing to drain.
Whatever ends in 2 says why, each mistake on one line: the key, its value, and what is
allowed.  All commands find the settings file in the same places.

A command imports what it needs when it runs, so that `token` and `--help` answer before
the server's libraries would have been read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gollama_proxy import __version__
from gollama_proxy.config import PLACES, load, locate, require_keys
from gollama_proxy.keys import MIN_SECRET_BYTES, read_secret
from gollama_proxy.mistakes import ConfigError
from gollama_proxy.names import is_plain
from gollama_proxy.settings import (
    FLAGS,
    VARIABLES,
    Config,
    Row,
    settings,
)

if TYPE_CHECKING:
    from gollama_proxy.edge.app import Hub
    from gollama_proxy.routing.ticket import Priority
    from gollama_proxy.routing.worker import Worker
    from gollama_proxy.upstream.probe import Finding

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        args = _parse(argv)
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except ConfigError as exc:
        for mistake in exc.args:
            _complain(" ".join(mistake.splitlines()))
        return 2
    except KeyboardInterrupt:
        return 130


def _complain(text: str) -> None:
    from gollama_proxy.ops.accesslog import journal_reads, prioritised

    text = f"gollama-proxy: {text}"
    if journal_reads(sys.stderr):
        text = prioritised(text, logging.ERROR)
    print(text, file=sys.stderr)


# --- Reading the command line -----------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Tell a wrong flag like a wrong setting: on one line, with what is allowed."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise ConfigError(f"{message}; allowed: {usage}")


_FILE = (
    "settings, in TOML; default: the file that GOLLAMA_CONFIG names, else "
    + ", else ".join(PLACES)
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # A flag's beginning is not taken for the flag: a typing error would pass for it.
    parser = _Parser(
        prog="gollama-proxy",
        description="One OpenAI-compatible address in front of llama.cpp machines.",
        allow_abbrev=False,
    )
    version = f"gollama-proxy {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], int], help: str) -> _Parser:
        sub: _Parser = commands.add_parser(
            name, help=help, description=help, allow_abbrev=False
        )
        sub.set_defaults(run=run, parser=sub)
        sub.add_argument("-c", "--config", metavar="FILE", help=_FILE)
        return sub

    serve = command("serve", _serve, "run the hub")
    serve.formatter_class = argparse.RawDescriptionHelpFormatter
    serve.epilog = "\n".join(_describe_settings())
    text = "print a new secret to sign tokens with; a file it goes to gets mode 0600"
    command("secret", _secret, text)
    token = command("token", _token, "print a token for a client")
    token.add_argument("--sub", required=True, help="who the token speaks for")
    token.add_argument("--expires", default="30d", help="45s, 90m, 12h, 30d (default)")
    token.add_argument(
        "--model", action="append", default=[], help="allow only these, such as 'qwen*'"
    )
    token.add_argument("--scope", action="append", default=[], help=_SCOPES)
    for flag, what in _LIMITS.items():
        token.add_argument(flag, metavar="N", help=f"allow so many {what}")
    token.add_argument("--priority", help="highest class: interactive (default), batch")
    token.add_argument(
        "--private-key", metavar="FILE", help="PEM file to sign with, for all but HS256"
    )
    command("check", _check, "validate the settings and probe every worker")
    demo = command("demo", _demo, "run the hub in front of two small llama-servers")
    demo.add_argument("--llama-server", metavar="PATH", help="the program to start")
    demo.add_argument("--model", metavar="FILE", help="GGUF file to start it with")
    for fronting in (serve, demo):
        _add_setting_flags(fronting)

    args, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the command's parser, as its flags are the allowed ones
        args.parser.error(f"{' '.join(unknown)}: not a flag of this command")
    return args


def _add_setting_flags(parser: argparse.ArgumentParser) -> None:
    for row in settings():
        if row.key in FLAGS:
            flag: dict[str, Any] = {"dest": row.key, "help": row.help}
            if row.default is False:
                flag |= {"action": "store_const", "const": True}
            else:
                flag["metavar"] = row.key.rpartition(".")[2].upper()
            parser.add_argument(FLAGS[row.key], **flag)
    parser.add_argument(
        "--worker",
        metavar="URL",
        action="append",
        default=[],
        help="llama-server to send requests to (repeatable)",
    )


def _describe_settings() -> Iterator[str]:
    yield "settings (TOML key, environment variable, default; flags win over both):"
    for row in settings():
        yield f"\n  {row.key}   {row.env}   {show_default(row)}"
        yield f"      {row.help}"
        yield f"      {row.allowed}"
    yield "\nenvironment variables without a TOML key:\n"
    yield from (f"  {name}\n      {text}" for name, text in VARIABLES.items())


def show_default(row: Row) -> str:
    """Spell a default as TOML does, sizes in the unit that a person would use."""
    if row.allowed.startswith("bytes"):
        shift, unit = (10, "KiB") if row.default % (1 << 20) else (20, "MiB")
        return f'"{row.default >> shift}{unit}"'
    if type(row.default) is float:
        return f"{row.default:.12g}"
    return json.dumps(row.default)


def _load(
    args: argparse.Namespace,
    environ: Mapping[str, str],
    workers: Sequence[str] = (),
    **options: bool,
) -> Config:
    flags = {key: getattr(args, key, None) for key in FLAGS}
    return load(locate(args.config, environ), environ, flags, workers, **options)


def _note(text: str) -> None:
    print("note:", text, file=sys.stderr)


# --- serve ------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    config = _load(args, os.environ, args.worker)
    require_keys(config)
    from gollama_proxy import lifecycle

    return lifecycle.run(lambda signals: lifecycle.front(signals, config, _log_address))


# Seconds after which names that nobody serves are told whoever has not been reached.
_KNOWN_WITHIN = 60.0


async def _log_address(hub: Hub) -> None:
    log.info("listening on %s", hub.url)
    await hub.ready()
    if not hub.config.workers:
        log.warning("no worker is configured: every request will be refused")
    elif not hub.registry.ready:
        log.warning("no worker can be used: requests are refused until one can")
    # Some may load a model for a while; who is not there by then is named as such.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KNOWN_WITHIN):
            await hub.known()
    for text in hub.registry.unserved() if hub.config.workers else ():
        log.warning("%s", text)


# --- secret -----------------------------------------------------------------------


def _secret(args: argparse.Namespace) -> int:
    _keep_from_others(sys.stdout)
    print(secrets.token_hex(MIN_SECRET_BYTES))
    return 0


def _keep_from_others(stream: TextIO) -> None:
    """Let nobody but its owner read a file that the shell has opened for all."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # one that is no file
        return
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode) and mode & 0o077:
        try:
            os.fchmod(number, 0o600)
        except OSError as exc:
            text = "standard output: must be a file for its owner only"
            raise ConfigError(f"{text} (chmod: {exc.strerror})") from exc


# --- token ------------------------------------------------------------------------

_SCOPES = (
    "allow more: metrics (GET /metrics), or admin, which allows no more than that "
    "as there is no admin API yet"
)

_LIMITS = {
    "--rpm": "requests a minute",
    "--tpm": "tokens a minute",
    "--max-concurrency": "requests at once",
}


def _token(args: argparse.Namespace) -> int:
    from gollama_proxy.edge.auth import Authenticator, AuthError, mint

    _refuse_unprintable("--sub", [args.sub])
    _refuse_unprintable("--model", args.model)
    _refuse_unprintable("--scope", args.scope)
    lifetime = _parse_lifetime(args.expires)
    limits, priority = _parse_limits(args), _parse_priority(args.priority)
    config = _load(args, os.environ, for_tokens=True)
    auth = config.auth
    if auth.max_lifetime and lifetime > auth.max_lifetime:
        longest = f"must be {auth.max_lifetime:.0f}s (auth.max_lifetime) or less"
        raise ConfigError(f"--expires = {args.expires!r}: {longest}")
    token_id = secrets.token_hex(8)
    source, key = _find_signing_key(config, args.private_key)
    try:
        token = mint(
            key,
            auth.algorithm,
            args.sub,
            lifetime,
            models=args.model,
            scopes=args.scope,
            issuer=auth.issuer,
            audience=auth.audience,
            limits=limits,
            priority=priority,
            token_id=token_id,
        )
    except ValueError as exc:
        raise ConfigError(f"{source}: {exc}") from exc
    asking = replace(config, auth=replace(auth, mode="jwt"))
    try:
        Authenticator(asking).authenticate([f"Bearer {token}"])
    except AuthError as exc:
        text = f"the hub would refuse such a token: {exc.detail}"
        raise ConfigError(f"{source}: {text}") from exc
    _note(config.source)
    _note(f"to revoke it: jti:{token_id}")
    if "admin" in args.scope:
        _note("scope admin allows /metrics and no more: there is no admin API yet")
    if auth.mode == "off":
        _note("auth.mode is off: the hub asks for no token")
    print(token)
    return 0


def _refuse_unprintable(flag: str, values: Sequence[str]) -> None:
    for value in values:
        if not value.strip() or not value.isprintable():
            raise ConfigError(f"{flag} = {value!r}: must be printable, and not empty")


def _parse_lifetime(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    scale = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    lifetime = int(match[1]) * scale[match[2]] if match else 0
    if not 0 < lifetime <= 3650 * 86_400:
        allowed = "45s, 90m, 12h or 30d, from 1s to 3650d"
        raise ConfigError(f"--expires = {text!r}: must be a time such as {allowed}")
    return lifetime


def _parse_limits(args: argparse.Namespace) -> dict[str, int]:
    limits = {}
    for flag in _LIMITS:
        name = flag.removeprefix("--").replace("-", "_")
        text = getattr(args, name)
        if text is not None:
            if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) < 1:
                raise ConfigError(f"{flag} = {text!r}: must be a whole number from 1")
            limits[name] = int(text)
    return limits


def _parse_priority(text: str | None) -> Priority | None:
    from gollama_proxy.routing.ticket import Priority

    if text is None:
        return None
    try:
        return Priority(text)
    except ValueError:
        known = ", ".join(Priority)
        raise ConfigError(f"--priority = {text!r}: must be one of {known}") from None


def _find_signing_key(config: Config, file: str | None) -> tuple[str, bytes]:
    algorithm = config.auth.algorithm
    if algorithm == "HS256":
        if file is not None:
            raise ConfigError(
                f"--private-key = {file!r}: HS256 signs with GOLLAMA_JWT_SECRET; "
                "set auth.algorithm to RS256, ES256 or EdDSA"
            )
        if config.auth.secret_file:
            return "auth.secret_file", config.secrets[0]
        if not os.environ.get("GOLLAMA_JWT_SECRET"):
            raise ConfigError(
                "GOLLAMA_JWT_SECRET: is not set; must be the hub's secret"
            )
        return "GOLLAMA_JWT_SECRET", config.secrets[0]
    if file is None:
        raise ConfigError(f"--private-key: {algorithm} needs a PEM file to sign with")
    source = f"--private-key = {file!r}"
    return source, read_secret(source, file)


# --- check ------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    from gollama_proxy.edge.auth import Authenticator

    config = _load(args, os.environ)
    _note(config.source)
    try:
        require_keys(config)
    except ConfigError as exc:  # fine here; the secret is often only in the service
        _note(str(exc))
    else:
        Authenticator(config)  # refuses keys of another algorithm, as the hub does
    if not config.workers:
        print("No worker is configured: add [[workers]] to the file, each with a url,")
        print("or set GOLLAMA_WORKERS=http://10.0.0.11:8080")
        return 1
    from gollama_proxy.routing.registry import Registry

    # What is told here goes into the table, and not into a log as well.
    logging.getLogger("gollama_proxy").addHandler(logging.NullHandler())
    registry = Registry(config)
    findings = asyncio.run(_examine_all(config))
    for worker, finding in zip(registry.workers, findings, strict=True):
        worker.observe(finding.check, finding.reason, finding.description)
    _print_table(registry.workers, [finding.note for finding in findings])
    unserved = registry.unserved()
    for text in unserved:
        print(text)
    ready = all(worker.state.value == "ready" for worker in registry.workers)
    return 0 if ready and not unserved else 1


async def _examine_all(config: Config) -> list[Finding]:
    from gollama_proxy.upstream.probe import examine

    health = config.health
    return await asyncio.gather(*(examine(each, health) for each in config.workers))


def _print_table(workers: Sequence[Worker], notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width: whatever reads it gets whole URLs on whole lines.
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    table = Table(box=None, pad_edge=False)
    for title in "name", "url", "state", "models", "slots", "context", "build / reason":
        table.add_column(title, overflow="fold")
    colours = {"ready": "green", "loading": "yellow", "down": "red"}
    for worker, note in zip(workers, notes, strict=True):
        # Workers choose some words: no markup, and nothing that a terminal obeys.
        name, url, state, *rest = [
            Text("".join(c if c.isprintable() else "?" for c in cell) or "-")
            for cell in _describe_worker(worker, note)
        ]
        state.stylize(colours[worker.state.value])
        table.add_row(name, url, state, *rest)
    console.print(table)


def _describe_worker(worker: Worker, note: str) -> Iterator[str]:
    """Show what is in force: what the settings state goes before what it says."""
    yield from (worker.name, worker.config.url, worker.state.value)
    patterns = (name for name in worker.config.models if not is_plain(name))
    yield ", ".join([*patterns, *(model.name for model in worker.models)])
    told = worker.description
    for number in (worker.slots, told and told.context):
        yield "" if number is None else str(number)
    if told is None:
        yield worker.reason
    else:
        yield ", ".join(text for text in (told.build, note) if text)


# --- demo -------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from gollama_proxy import demo, lifecycle
    from gollama_proxy.children import ChildError

    try:
        return lifecycle.run(
            lambda signals: demo.run(
                partial(_load, args),
                signals,
                workers=args.worker,
                llama_server=args.llama_server,
                model=args.model,
            )
        )
    except ChildError as exc:
        _complain(str(exc))
        return exc.status
