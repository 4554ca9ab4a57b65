"""The commands that need no hub: `secret`, `token`, `check` and `completion`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from msgspec import structs

from gollama_proxy.config.keys import (
    MIN_SECRET_BYTES,
    SECRET,
    find_credential,
    read_secret,
)
from gollama_proxy.config.load import require_keys
from gollama_proxy.config.settings import Config
from gollama_proxy.config.values import ConfigError, is_plain, parse_span

if TYPE_CHECKING:
    from gollama_proxy.fleet.worker import Worker
    from gollama_proxy.scheduling.turns import Priority
    from gollama_proxy.upstream.probe import Finding

# --- secret -----------------------------------------------------------------------


def print_secret() -> int:
    """Print a new secret; return the exit status."""
    _make_private(sys.stdout)
    print(secrets.token_hex(MIN_SECRET_BYTES))
    return 0


def _make_private(stream: TextIO) -> None:
    """Make a file that the shell has opened readable by its owner only."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a file
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
    "permission beyond the models (repeatable): metrics (GET /metrics), worker (for an "
    "agent, which registers a worker), monitor (see everything in the dashboard and "
    "/admin, change nothing), or admin (for operators: see and change everything)"
)

_LIMITS = {
    "--rpm": "requests per minute",
    "--tpm": "tokens per minute",
    "--tokens-per-day": "tokens per day (UTC)",
    "--tokens-per-month": "tokens per calendar month (UTC)",
    "--max-concurrency": "requests at once",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `print_token` reads."""
    parser.add_argument(
        "--sub",
        required=True,
        help="subject: the user or program that the token is for",
    )
    parser.add_argument(
        "--expires",
        default="30d",
        help="lifetime, such as 45s, 90m, 12h or 30d (default)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="allow only such models, for example 'qwen*' (repeatable)",
    )
    parser.add_argument("--scope", action="append", default=[], help=_SCOPES)
    for flag, what in _LIMITS.items():
        parser.add_argument(flag, metavar="N", help=f"limit: {what}")
    parser.add_argument(
        "--priority", help="highest priority: interactive (default) or batch"
    )
    parser.add_argument(
        "--private-key",
        metavar="FILE",
        help="PEM file to sign with, for all algorithms but HS256",
    )


def print_token(args: argparse.Namespace, load: Callable[[], Config]) -> int:
    """Print a token; return the exit status.  `load` returns the settings of the hub.

    Raises:
        ConfigError: a flag is wrong, or the hub would reject the token.
    """
    from gollama_proxy.edge.auth import Authenticator, AuthError, mint

    _reject_unprintable("--sub", [args.sub])
    _reject_unprintable("--model", args.model)
    _reject_unknown_scopes(args.scope)
    lifetime = _parse_lifetime(args.expires)
    limits, priority = _parse_limits(args), _parse_priority(args.priority)
    config = load()
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
    checked = replace(config, auth=structs.replace(auth, mode="jwt"))
    try:
        Authenticator(checked).authenticate([f"Bearer {token}"])
    except AuthError as exc:
        text = f"the hub would refuse such a token: {exc.detail}"
        raise ConfigError(f"{source}: {text}") from exc
    note(config.source)
    note(f"to revoke it: jti:{token_id}")
    if auth.mode == "off":
        note("auth.mode is off: the hub asks for no token")
    _make_private(sys.stdout)
    print(token)
    return 0


def _reject_unprintable(flag: str, values: Sequence[str]) -> None:
    for value in values:
        if not value.strip() or not value.isprintable():
            raise ConfigError(f"{flag} = {value!r}: must be printable, and not empty")


def _reject_unknown_scopes(scopes: Sequence[str]) -> None:
    known = _VALUES["--scope"]
    for scope in scopes:
        if scope not in known:
            allowed = f"{', '.join(known[:-1])} or {known[-1]}; repeat it for several"
            raise ConfigError(f"--scope = {scope!r}: must be {allowed}")


def _parse_lifetime(text: str) -> float:
    lifetime = parse_span(text) or 0
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
    from gollama_proxy.scheduling.turns import Priority

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
        if credential := find_credential(SECRET, os.environ):
            return f"credential {credential!r}", config.secrets[0]
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


def check(config: Config) -> int:
    """Examine the store and every worker, and print a table; return the exit status."""
    from gollama_proxy.edge.auth import Authenticator

    note(config.source)
    try:
        require_keys(config)
    except ConfigError as exc:  # the secret is often known to the service alone
        note(str(exc))
    else:
        Authenticator(config)  # rejects keys of another algorithm, as in the hub
    shared = _check_store(config)
    if not config.workers:
        print("No worker is configured: add [[workers]] to the file, each with a url,")
        print("or set GOLLAMA_WORKERS=http://10.0.0.11:8080; or machines register")
        print("themselves: gollama-proxy agent")
        return 1
    from gollama_proxy.commands.display import print_table
    from gollama_proxy.fleet.registry import Registry

    # The table has these messages; do not log them as well.
    logging.getLogger("gollama_proxy").addHandler(logging.NullHandler())
    config, unknown = _look_up_groups(config)
    registry = Registry(config)
    findings = _examine_all(config)
    for worker, finding in zip(registry.workers, findings, strict=True):
        worker.found_at(finding.port)
        worker.observe(finding.check, finding.reason, finding.description)
    notes = [finding.note for finding in findings]
    titles = ("name", "url", "state", "models", "slots", "context", "build / reason")
    print_table(titles, map(_describe_worker, registry.workers, notes))
    for worker in registry.workers:
        for text in _find_gaps(worker):
            note(f"{worker.name}: {text}")
    unserved = registry.unserved()
    for text in [*unknown, *unserved]:
        print(text)
    usable = ("ready", "asleep")
    ready = all(worker.state.value in usable for worker in registry.workers)
    return 0 if ready and shared and not unserved and not unknown else 1


def _check_store(config: Config) -> bool:
    """Examine the store, if there is one; return whether it can be used."""
    if not config.state.url:
        return True
    import asyncio

    from gollama_proxy.state.link import StoreError
    from gollama_proxy.state.store import Store

    store = Store(config.state.url, config.state.prefix)
    try:
        note(f"the store: {asyncio.run(store.examine())}")
    except StoreError as exc:
        print(f"state.url = {config.state.url!r}: {exc}")
        return False
    return True


def _look_up_groups(config: Config) -> tuple[Config, list[str]]:
    """Put the members of each group in its place; return what cannot be looked up."""
    if not any(each.is_group for each in config.workers):
        return config, []
    import asyncio
    import time

    from gollama_proxy.upstream.names import Groups, look_up

    groups = Groups(config.health, look_up, lambda: None, time.monotonic)
    groups.follow(config.workers)
    asyncio.run(groups.refresh())
    workers = tuple(groups.expand(config.workers))
    return replace(config, workers=workers), groups.failures()


def _examine_all(config: Config) -> list[Finding]:
    import asyncio

    from gollama_proxy.upstream.probe import examine

    async def examine_all() -> list[Finding]:
        every = (examine(each, config.health) for each in config.workers)
        return await asyncio.gather(*every)

    return asyncio.run(examine_all())


def _describe_worker(worker: Worker, note: str) -> Iterator[str]:
    """Yield the cells of a worker; settings take precedence over its own report."""
    yield from (worker.name, worker.url, worker.state.value)
    patterns = (name for name in worker.config.models if not is_plain(name))
    yield ", ".join([*patterns, *(model.name for model in worker.models)])
    about = worker.description
    for number in (worker.slots, worker.config.context or (about and about.context)):
        yield "" if number is None else str(number)
    if about is None:
        yield worker.reason
    else:
        yield ", ".join(text for text in (about.build, note) if text)


def _find_gaps(worker: Worker) -> Iterator[str]:
    """Yield what a worker does not report, and the settings do not state."""
    if worker.description is None or not worker.models:
        return
    if worker.slots is None:
        yield "reports no slots, so it gets every request at once; set slots"
    if any(worker.context_of(model.name) is None for model in worker.models):
        yield "does not report its context, so any prompt is sent to it; set context"


# --- All of them ------------------------------------------------------------------


def note(text: str) -> None:
    """Print a remark that is not part of a command's output."""
    print("note:", text, file=sys.stderr)


# --- completion -------------------------------------------------------------------

_SHELLS = """\
to have it in every new shell:
  bash:  gollama-proxy completion bash > \\
             ~/.local/share/bash-completion/completions/gollama-proxy
  zsh:   gollama-proxy completion zsh > ~/.zfunc/_gollama-proxy
             (a folder of fpath, which ~/.zshrc names before it calls compinit)
  fish:  gollama-proxy completion fish > \\
             ~/.config/fish/completions/gollama-proxy.fish
"""
_VALUES = {
    "--auth": ("jwt", "off"),
    "--log-level": ("debug", "info", "warning", "error"),
    "--priority": ("interactive", "batch"),
    "--scope": ("metrics", "worker", "monitor", "admin"),
}


def add_shells(parser: argparse.ArgumentParser) -> None:
    """Add the argument that `print_completion` reads."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _SHELLS
    shells = ("bash", "zsh", "fish")
    parser.add_argument("shell", choices=shells, help="the shell: bash, zsh or fish")


def print_completion(shell: str, parser: argparse.ArgumentParser) -> int:
    """Print the completion of these commands for a shell; return the exit status."""
    import shtab

    _annotate(parser)
    print(shtab.complete(parser, shell))
    return 0


def _annotate(parser: argparse.ArgumentParser) -> None:
    """Add what an argument may be, as far as only the command itself checks it."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _annotate(command)
        elif action.metavar in ("FILE", "PATH"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        for flag in action.option_strings:
            action.choices = _VALUES.get(flag, action.choices)
