"""The command line: `gollama-proxy serve`, `agent`, `secret`, `token` and more.

Exit status: 0 for success, 1 if a worker is unusable, a second signal cut answers, a
hub does not answer or refuses, or the output cannot be written, 2 for a wrong setting
or flag, 130 after Ctrl-C with nothing to drain.  With status 2, each mistake is one
line with the key, its value and what is allowed.  All commands with settings look for
their file in the same places.

Each command imports what it needs when it runs, so that `token` and `--help` do not
wait for the libraries of the server.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import importlib
import importlib.util
import io
import json
import logging
import os
import sys
from collections.abc import (
    Callable,
    Container,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self

from gollama_proxy import __version__
from gollama_proxy.commands import offline
from gollama_proxy.config.load import PLACES, load, locate, require_keys
from gollama_proxy.config.settings import (
    FLAGS,
    VARIABLES,
    WORKER_KEYS,
    Config,
    Log,
    Process,
    Row,
    settings,
)
from gollama_proxy.config.values import ConfigError, convert, describe_hint, parse_span

if TYPE_CHECKING:
    from gollama_proxy.tasks import Signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # While modules are imported, a search for garbage finds none and takes a tenth of
    # the start.  A running hub enables it again.
    gc.disable()
    _replace_closed_streams()
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


# --- Output -----------------------------------------------------------------------


def _printing(command: Callable[[], int]) -> int:
    """Run a command that prints, and return its exit status, or 1 if it could not.

    All OSErrors are of the output: others are mapped where they occur.
    """
    try:
        status = command()
        sys.stdout.flush()
        return status
    except OSError as exc:
        with contextlib.suppress(OSError, ValueError):  # what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):  # `| head` has seen enough
            return 0
        _complain(f"the output cannot be written: {exc.strerror or exc}")
        return 1


class _Closed(io.TextIOWrapper):
    """A standard output that is closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _replace_closed_streams() -> None:
    """Open standard streams that were closed (`>&-`), to read or keep nothing.

    Otherwise the next file or socket that is opened would get the number of one.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        sys.stdout = _Closed(os.fdopen(os.open(os.devnull, os.O_WRONLY), "wb"))
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _complain(text: str) -> None:
    from gollama_proxy.telemetry.lines import journal_reads, prioritised

    text = f"gollama-proxy: {text}"
    if journal_reads(sys.stderr):
        text = prioritised(text, logging.ERROR)
    print(text, file=sys.stderr)


# --- Reading the command line -----------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a wrong setting: in one line, with what is allowed.

    `fill` adds the flags, when the command is used.
    """

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def filled(self) -> Self:
        """Add the flags, unless they are there, and return this parser."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return self

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self.filled()
        # Otherwise the value of a wrong flag is reported, as a wrong command.
        words = list(sys.argv[1:] if args is None else args)
        flag = words[0].partition("=")[0] if self._subparsers and words else ""
        if flag[:2] == "--" != flag and flag not in self._option_string_actions:
            self.error(f"{flag}: not a flag of this command")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise ConfigError(f"{message}; allowed: {usage}")


_FILE = (
    "settings file, in TOML; default: the one in GOLLAMA_CONFIG, else "
    + ", else ".join(PLACES)
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, which get their flags when they are used."""
    # No abbreviations: a typing mistake could be taken for one.
    parser = _Parser(
        prog="gollama-proxy",
        description="One OpenAI-compatible address in front of llama.cpp machines.",
        allow_abbrev=False,
    )
    version = f"gollama-proxy {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str,
        run: Callable[[Any], int],
        help: str,
        *,
        configured: bool = True,
        fill: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> _Parser:
        sub: _Parser = commands.add_parser(
            name, help=help, description=help, allow_abbrev=False
        )
        sub.set_defaults(run=run, parser=sub)
        sub.fill = fill
        if configured:
            sub.add_argument("-c", "--config", metavar="FILE", help=_FILE)
        return sub

    serve = command("serve", _serve, "run the hub")
    serve.formatter_class = argparse.RawDescriptionHelpFormatter
    serve.epilog = "\n".join(_describe_settings())
    text = "print a new secret for signing tokens; redirected to a file, with mode 0600"
    command("secret", _secret, text)
    text = "print a token for a client; redirected to a file, with mode 0600"
    token = command("token", _token, text)
    offline.add_flags(token)
    command("check", _check, "validate the settings and probe every worker")
    demo = command("demo", _demo, "run the hub in front of two small llama-servers")
    demo.add_argument("--llama-server", metavar="PATH", help="the program to start")
    demo.add_argument("--model", metavar="FILE", help="GGUF file to start it with")
    for fronting in (serve, demo):
        _add_setting_flags(fronting, () if fronting is serve else {"--processes"})
    text = "register this machine's llama-server with a hub, and keep it registered"
    command("agent", _agent, text, configured=False, fill=_add_agent_flags)
    for name, text in _OPERATIONS.items():
        fill = partial(_fill_operation, name)
        command(name, _operate, text, configured=False, fill=fill)
    text = "print the completion script of bash, zsh or fish"
    completion = command("completion", _completion, text, configured=False)
    offline.add_shells(completion)
    return parser


def make_whole_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, with all flags."""
    parser = make_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                command.filled()
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    following: list[str] = []
    if words[:1] == ["agent"] and "--" in words:  # the flags of another program
        place = words.index("--")
        words, following = words[:place], words[place + 1 :]
    args, unknown = parser.parse_known_args(words)
    args.following, args.words = following, words
    if unknown:  # reported with the flags of the command
        kind = "a flag" if any(word[:1] == "-" for word in unknown) else "an argument"
        args.parser.error(f"{' '.join(unknown)}: not {kind} of this command")
    return args


_OPERATIONS = {
    "workers": "list the workers of a running hub, or change them",
    "drain": "send a worker no new requests; running ones end, or continue elsewhere",
    "undrain": "end a drain",
    "dashboard": "print a link that opens the dashboard, signed in",
    "top": "watch workers, queue and requests live; q quits",
    "explain": "show which worker a request would get now, and why",
    "requests": "list the requests that have ended",
    "usage": "show what was used, by subject, model and day",
    "cancel": "cancel a running or waiting request",
    "reload": "make the hub read its settings again",
    "revoke": "revoke a token, or all tokens of a subject",
}


def _fill_operation(name: str, parser: argparse.ArgumentParser) -> None:
    from gollama_proxy.commands import operators

    operators.add_flags(name, parser)


def _add_setting_flags(
    parser: argparse.ArgumentParser, without: Container[str]
) -> None:
    for row in settings():
        if row.key in FLAGS and FLAGS[row.key] not in without:
            choices = f"; {row.allowed}" * row.allowed.startswith("one of")
            flag: dict[str, Any] = {"dest": row.key, "help": row.help + choices}
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


def _add_agent_flags(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  gollama-proxy agent --hub http://gateway:8000 --token-file token \\\n"
        "      --worker http://127.0.0.1:8080\n"
        "  gollama-proxy agent --hub http://gateway:8000 --token-file token \\\n"
        "      --exec -- llama-server -m model.gguf --host 0.0.0.0 --port 8080\n"
        "\nThe token needs the scope worker:\n"
        "  gollama-proxy token --sub desktop --scope worker\n"
        "The hub connects to the worker and to the proof port: open both to it.\n"
        "\nHubs of one cluster share their workers: the agent registers with one of\n"
        "them, and with the next when that one does not answer.\n"
        "\nenvironment variables:\n"
        "  GOLLAMA_HUB\n      hubs, separated by spaces, if --hub is not given\n"
        "  GOLLAMA_TOKEN\n      token, if --token-file is not given"
    )
    add = parser.add_argument
    add(
        "--hub",
        metavar="URL",
        action="append",
        default=[],
        help="hub to register with (repeatable)",
    )
    text = "find the hub by mDNS, on a local network that you trust"
    add("--discover", action="store_true", help=text)
    add("--worker", metavar="URL", default="", help="llama-server on this machine")
    add(
        "--exec",
        action="store_true",
        help="start the command after --, and restart it when it ends",
    )
    text = (
        "name in replies, logs and metrics; default: this machine's name, and the port"
    )
    add("--name", default="", help=text)
    add(
        "--token-file",
        metavar="FILE",
        default="",
        help="file with a token of the scope worker; read again when it is needed",
    )
    add(
        "--ca-file",
        metavar="FILE",
        default="",
        help="PEM file with the CAs of an https hub; default: those of the system",
    )
    text = "port at which the hub checks this agent; default: any free one"
    add("--proof-port", metavar="PORT", help=text)
    add("--slots", metavar="N", help="answers at once; default: as it reports")
    add("--context", metavar="N", help="tokens of its context; default: as it reports")
    text = "model that it serves, or a pattern (repeatable); default: as it reports"
    add("--model", metavar="MODEL", action="append", default=[], help=text)
    text = "share of requests, for policies that use it; default: by its memory"
    add("--weight", help=text)
    text = "memory of its graphics cards, in GiB; default: as they report"
    add("--vram-gib", metavar="GIB", help=text)
    text = "suspend this machine after such a time without a request, for example 30m"
    add("--sleep-after", metavar="TIME", help=text)
    text = "hardware address that wakes it; default: its network card's"
    add("--mac", help=text)
    text = "lowest severity to log: debug, info (default), warning, error"
    add("--log-level", metavar="LEVEL", default="info", help=text)


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
    process = Process.parse(os.environ.pop("GOLLAMA_PROCESS", ""))

    def load() -> Config:
        found = replace(_load(args, os.environ, args.worker), process=process)
        require_keys(found)
        # Later the same file, even if it is gone, or another one takes precedence.
        args.config = found.file or args.config
        return found

    config = load()
    if process.number or config.server.processes == 1:
        return _serve_here(config, load)
    return _serve_by_processes(args, config, load)


def _serve_here(config: Config, load: Callable[[], Config]) -> int:
    _import_server()
    from gollama_proxy import serve as lifecycle
    from gollama_proxy.service import Service

    service, announce = Service.take(os.environ), lifecycle.log_address
    return run_loop(
        lambda signals: lifecycle.front(signals, config, announce, load, service)
    )


def _serve_by_processes(
    args: argparse.Namespace, config: Config, load: Callable[[], Config]
) -> int:
    from gollama_proxy import processes
    from gollama_proxy.service import Service

    if processes.number_of(config.server.processes) == 1:
        return _serve_here(config, load)
    service = Service.take(os.environ)
    return run_loop(
        lambda signals: processes.front(signals, config, args.words, load, service)
    )


def run_loop(command: Callable[[Signals], Coroutine[Any, Any, int]]) -> int:
    """Run a command on uvloop, with signals; return its exit status."""
    from gollama_proxy import tasks
    from gollama_proxy.telemetry import logs

    try:
        return tasks.run(command)
    finally:
        logs.flush()  # before the traceback of a crash


def _import_server() -> None:
    """Import the package aiohttp without its client, which a hub does not use.

    The package imports everything: 5 MiB of memory, a fifth of the start, and the
    certificate authorities of the system, twice.  Here it stays empty, and its modules
    are imported one by one; if anything asks for another name, all of it follows.
    """
    spec = None if "aiohttp" in sys.modules else importlib.util.find_spec("aiohttp")
    if spec is None or spec.loader is None:
        return
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if importlib.util.find_spec(f"{package.__name__}.{name}") is not None:
            return importlib.import_module(f"{package.__name__}.{name}")
        del package.__getattr__
        loader.exec_module(package)
        return getattr(package, name)

    # aiohttp puts its version into a header that the hub replaces.
    vars(package).update(__getattr__=find, __version__="")
    sys.modules[package.__name__] = package


# --- agent ------------------------------------------------------------------------


def _agent(args: argparse.Namespace) -> int:
    _import_aiohttp()
    from gollama_proxy import agent
    from gollama_proxy.config.addresses import split_hubs
    from gollama_proxy.service import Service

    if args.exec != bool(args.following):
        missing = "a command after --" if args.exec else "--exec before --"
        raise ConfigError(f"--exec: needs {missing}, such as --exec -- llama-server")
    hubs = split_hubs(os.environ.get("GOLLAMA_HUB", ""))
    options = agent.Options(
        hubs=tuple(dict.fromkeys(args.hub or (() if args.discover else hubs))),
        discover=args.discover,
        worker=args.worker,
        command=tuple(args.following),
        name=args.name,
        token_file=args.token_file,
        ca_file=args.ca_file,
        proof_port=_converted("--proof-port", args.proof_port, "server.port") or 0,
        slots=_converted("--slots", args.slots, "slots"),
        context=_converted("--context", args.context, "context"),
        models=tuple(args.model),
        weight=_converted("--weight", args.weight, "weight"),
        vram_gib=_converted("--vram-gib", args.vram_gib, "vram_gib"),
        mac=_converted("--mac", args.mac, "mac") or "",
        sleep_after=_duration("--sleep-after", args.sleep_after),
        log=Log(level=_converted("--log-level", args.log_level, "log.level")),
    )
    agent.check_options(options, os.environ)
    service = Service.take(os.environ)
    return run_loop(lambda signals: agent.run(options, signals, service))


def _import_aiohttp() -> None:
    """Import aiohttp without the certificate authorities of the system.

    Its client loads them twice on import: a fifth of the start, and 2 MiB.  An agent
    passes the authorities that it trusts.
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


def _duration(flag: str, value: str | None) -> float:
    """Return the seconds of a time such as 30m; 0 for none."""
    if value is None:
        return 0.0
    found = parse_span(value) or 0
    if not 1 <= found <= 30 * 86_400:
        allowed = "a time such as 90s, 30m or 2h, from 1s to 30d"
        raise ConfigError(f"{flag} = {value!r}: must be {allowed}")
    return float(found)


def _converted(flag: str, value: str | None, key: str) -> Any:
    """Return the value of a flag, checked as the setting or the worker's key is."""
    if value is None:
        return None
    hints = WORKER_KEYS | {row.key: row.hint for row in settings()}
    try:
        return convert(hints[key], value)
    except ValueError:
        allowed = describe_hint(hints[key])
        raise ConfigError(f"{flag} = {value!r}: must be {allowed}") from None


# --- Commands that need no running hub --------------------------------------------


def _secret(args: argparse.Namespace) -> int:
    return _printing(offline.print_secret)


def _token(args: argparse.Namespace) -> int:
    load = partial(_load, args, os.environ, for_tokens=True)
    return _printing(lambda: offline.print_token(args, load))


def _completion(args: argparse.Namespace) -> int:
    return _printing(lambda: offline.print_completion(args.shell, make_whole_parser()))


def _check(args: argparse.Namespace) -> int:
    return _printing(lambda: offline.check(_load(args, os.environ)))


# --- Commands for a running hub ---------------------------------------------------


def _operate(args: argparse.Namespace) -> int:
    from gollama_proxy.commands import operators
    from gollama_proxy.commands.client import CallError
    from gollama_proxy.commands.display import printable

    try:
        return _printing(lambda: operators.run(args))
    except CallError as exc:
        _complain(printable(" ".join(str(exc).split())))
        return exc.status


# --- demo -------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    _import_server()
    from gollama_proxy.children import ChildError
    from gollama_proxy.commands import demo
    from gollama_proxy.service import Service

    Service.take(os.environ)  # so that no llama-server takes itself for a service
    try:
        return run_loop(
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
