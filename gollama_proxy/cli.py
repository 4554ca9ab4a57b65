"""The command line: `gollama-proxy serve`, `secret`, `token`, `check` and `demo`.

Exit status: 0 for success, 1 if a worker is unusable or a second signal cut answers, 2
for a wrong setting or flag, 130 after Ctrl-C with nothing to drain.  With status 2,
each mistake is one line with the key, its value and what is allowed.  All commands look
for the settings file in the same places.

Each command imports what it needs when it runs, so that `token` and `--help` do not
wait for the libraries of the server.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from gollama_proxy import __version__
from gollama_proxy import tokens as minting
from gollama_proxy.config.load import PLACES, load, locate, require_keys
from gollama_proxy.config.mistakes import ConfigError
from gollama_proxy.config.names import is_plain
from gollama_proxy.config.settings import (
    FLAGS,
    VARIABLES,
    Config,
    Row,
    settings,
)

if TYPE_CHECKING:
    from gollama_proxy.fleet.worker import Worker
    from gollama_proxy.hub import Hub
    from gollama_proxy.upstream.probe import Finding

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # While modules are imported, a search for garbage finds none and takes a tenth of
    # the start.  A running hub enables it again.
    gc.disable()
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
    finally:
        gc.enable()


def _complain(text: str) -> None:
    from gollama_proxy.telemetry.logs import journal_reads, prioritised

    text = f"gollama-proxy: {text}"
    if journal_reads(sys.stderr):
        text = prioritised(text, logging.ERROR)
    print(text, file=sys.stderr)


# --- Reading the command line -----------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a wrong setting: in one line, with what is allowed."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise ConfigError(f"{message}; allowed: {usage}")


_FILE = (
    "settings file, in TOML; default: the one in GOLLAMA_CONFIG, else "
    + ", else ".join(PLACES)
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # No abbreviations: a typing error would pass for one.
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
    text = "print a new secret for signing tokens; an output file gets mode 0600"
    command("secret", _secret, text)
    token = command("token", _token, "print a token for a client")
    minting.add_flags(token)
    command("check", _check, "validate the settings and probe every worker")
    demo = command("demo", _demo, "run the hub in front of two small llama-servers")
    demo.add_argument("--llama-server", metavar="PATH", help="the program to start")
    demo.add_argument("--model", metavar="FILE", help="GGUF file to start it with")
    for fronting in (serve, demo):
        _add_setting_flags(fronting)

    args, unknown = parser.parse_known_args(argv)
    if unknown:  # reported with the flags of the command
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
    """Return a default in TOML, a size in the largest unit that fits."""
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


# --- serve ------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    config = _load(args, os.environ, args.worker)
    require_keys(config)
    _import_aiohttp()
    from gollama_proxy import serve as lifecycle

    return lifecycle.run(lambda signals: lifecycle.front(signals, config, _log_address))


def _import_aiohttp() -> None:
    """Import aiohttp without the certificate authorities of the system.

    Its client, which the hub does not use, loads them twice on import: a fifth of the
    start, and 2 MiB.  Without them it would trust no server at all.
    """
    paths = ("SSL_CERT_FILE", "SSL_CERT_DIR")
    before = {name: os.environ.get(name) for name in paths}
    os.environ |= dict.fromkeys(paths, os.devnull)
    try:
        import aiohttp  # noqa: F401
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# Seconds after which models without a worker are reported, even if some workers have
# not been reached yet.
_KNOWN_WITHIN = 60.0


async def _log_address(hub: Hub) -> None:
    import asyncio

    log.info("listening on %s", hub.url)
    await hub.ready()
    if not hub.config.workers:
        log.warning("no worker is configured: every request will be refused")
    elif not hub.registry.ready:
        log.warning("no worker can be used: requests are refused until one can")
    # A worker may take longer to load its model, which is then reported as well.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KNOWN_WITHIN):
            await hub.known()
    for text in hub.registry.unserved() if hub.config.workers else ():
        log.warning("%s", text)


# --- secret and token -------------------------------------------------------------


def _secret(args: argparse.Namespace) -> int:
    return minting.print_secret()


def _token(args: argparse.Namespace) -> int:
    return minting.print_token(args, partial(_load, args, os.environ, for_tokens=True))


# --- check ------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    from gollama_proxy.edge.auth import Authenticator

    config = _load(args, os.environ)
    minting.note(config.source)
    try:
        require_keys(config)
    except ConfigError as exc:  # the secret is often known to the service alone
        minting.note(str(exc))
    else:
        Authenticator(config)  # rejects keys of another algorithm, as in the hub
    if not config.workers:
        print("No worker is configured: add [[workers]] to the file, each with a url,")
        print("or set GOLLAMA_WORKERS=http://10.0.0.11:8080")
        return 1
    from gollama_proxy.fleet.registry import Registry

    # The table has these messages; do not log them as well.
    logging.getLogger("gollama_proxy").addHandler(logging.NullHandler())
    registry = Registry(config)
    findings = _examine_all(config)
    for worker, finding in zip(registry.workers, findings, strict=True):
        worker.found_at(finding.port)
        worker.observe(finding.check, finding.reason, finding.description)
    _print_table(registry.workers, [finding.note for finding in findings])
    unserved = registry.unserved()
    for text in unserved:
        print(text)
    ready = all(worker.state.value == "ready" for worker in registry.workers)
    return 0 if ready and not unserved else 1


def _examine_all(config: Config) -> list[Finding]:
    import asyncio

    from gollama_proxy.upstream.probe import examine

    async def examine_all() -> list[Finding]:
        every = (examine(each, config.health) for each in config.workers)
        return await asyncio.gather(*every)

    return asyncio.run(examine_all())


def _print_table(workers: Sequence[Worker], notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width: do not wrap lines there.
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    table = Table(box=None, pad_edge=False)
    for title in "name", "url", "state", "models", "slots", "context", "build / reason":
        table.add_column(title, overflow="fold")
    colours = {"ready": "green", "loading": "yellow", "down": "red"}
    for worker, note in zip(workers, notes, strict=True):
        # Workers control some of the text: no markup, no control characters.
        name, url, state, *rest = [
            Text("".join(c if c.isprintable() else "?" for c in cell) or "-")
            for cell in _describe_worker(worker, note)
        ]
        state.stylize(colours[worker.state.value])
        table.add_row(name, url, state, *rest)
    console.print(table)


def _describe_worker(worker: Worker, note: str) -> Iterator[str]:
    """Yield the cells of a worker; settings take precedence over its own report."""
    yield from (worker.name, worker.url, worker.state.value)
    patterns = (name for name in worker.config.models if not is_plain(name))
    yield ", ".join([*patterns, *(model.name for model in worker.models)])
    about = worker.description
    for number in (worker.slots, about and about.context):
        yield "" if number is None else str(number)
    if about is None:
        yield worker.reason
    else:
        yield ", ".join(text for text in (about.build, note) if text)


# --- demo -------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    _import_aiohttp()
    from gollama_proxy import demo
    from gollama_proxy import serve as lifecycle
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
