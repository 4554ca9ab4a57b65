"""The commands for operators of a running hub; each is a client of its admin API.

They need the address of the hub and a token with the scope `admin`; `monitor` is enough
for those that change nothing.  Exit status: 0 for success, 1 if no hub answers, or it
refuses, 2 for wrong input, which changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gollama_proxy.commands.client import (
    DEFAULT_HUB,
    AdminClient,
    CallError,
    Json,
    make_client,
    segment,
)
from gollama_proxy.commands.display import (
    Overview,
    describe_model,
    hubs_of,
    machine_of,
    print_csv,
    print_fields,
    print_table,
    printable,
    reason_for,
    running_of,
    show,
    show_usage,
    span,
    state_of,
    watch,
    workers_table,
)
from gollama_proxy.config.values import ConfigError, cut, parse_span, shown

_EPILOG = f"""\
environment variables:
  GOLLAMA_HUB
      address of the hub, if --hub is not given; of several, separated by spaces,
      the first that accepts a connection is used
  GOLLAMA_TOKEN
      token, if neither --token nor --token-file is given
  SSL_CERT_FILE
      CAs of an https hub, if --ca-file is not given

The token needs the scope admin, or monitor for what changes nothing:
  gollama-proxy token --sub operator --scope admin
Without these, the hub is {DEFAULT_HUB}, and no token is sent."""

# --- Flags ------------------------------------------------------------------------


def add_flags(command: str, parser: argparse.ArgumentParser) -> None:
    """Add the flags of one command, and what carries it out as the argument `do`."""
    run, fill = _COMMANDS[command]
    parser.set_defaults(do=run)
    _add_hub_flags(parser)
    fill(parser)


def _add_hub_flags(parser: argparse.ArgumentParser, default: Any = None) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add = partial(parser.add_argument, default=default)
    add("--hub", metavar="URL", help=f"address of the hub; default: {DEFAULT_HUB}")
    token = parser.add_mutually_exclusive_group()
    add = partial(token.add_argument, default=default)
    add("--token-file", metavar="FILE", help="file with the token, of mode 0600")
    text = "the token; other users of this machine can see it, so prefer --token-file"
    add("--token", help=text)
    add = partial(parser.add_argument, default=default)
    text = "PEM file with the CAs of an https hub; default: those of the system"
    add("--ca-file", metavar="FILE", help=text)
    add("--json", action="store_true", help="print the hub's answer as JSON")


def _fill_workers(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION")
    for name, (run, fill, text) in _WORKER_ACTIONS.items():
        action = actions.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        action.set_defaults(do=run, parser=action)
        # A flag in front of the action stays in force.
        _add_hub_flags(action, default=argparse.SUPPRESS)
        fill(action)


def _fill_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the worker")


def _fill_explain(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="model to ask for, instead of the one in --file")
    add("--file", metavar="FILE", help="request body, in JSON; - for standard input")
    add("--sub", help="subject that sends it; default: that of the token")
    add("--path", help="path of the request; default: /v1/chat/completions")
    add("--priority", help="interactive (default) or batch")


def _fill_requests(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "keep running, and list each request as it ends"
    add("--follow", action="store_true", help=text)
    for name in _FILTERS:
        text = f"only requests with this {name}"
        text += " or error code" * (name == "outcome")
        add(f"--{name}", help=text)
    text = "only requests of the last 45s, 90m, 12h or 30d, for example"
    add("--since", metavar="TIME", help=text)
    text = "how many to list (at once, with --follow), from 1 to 1000; default: 100"
    add("--limit", metavar="N", default="100", help=text)


def _fill_usage(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "group by subject (default), model or day, or by several, as in model,day"
    add("--by", metavar="NAMES", help=text)
    text = "first day: 7d (default) or 12h ago, a date (UTC), or Unix seconds"
    add("--since", metavar="WHEN", help=text)
    add("--until", metavar="WHEN", help="last day, in the same forms; default: today")
    text = "show the token's own subject, and what its limits leave; needs no scope"
    add("--own", action="store_true", help=text)
    add("--csv", action="store_true", help="print CSV, for spreadsheets")


def _fill_cancel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="X-Request-Id of the request")


def _fill_revoke(parser: argparse.ArgumentParser) -> None:
    text = "the id of one token, or the subject of several"
    parser.add_argument("entry", metavar="jti:ID|sub:SUBJECT", help=text)
    text = "also cancel the running requests of the subject; by default they continue"
    parser.add_argument("--cancel", action="store_true", help=text)


def _fill_nothing(parser: argparse.ArgumentParser) -> None:
    pass


def _fill_new_worker(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", metavar="URL", help="base URL, such as http://10.0.0.11:8080")
    add("--name", help="name; default: host and port of the URL")
    _add_worker_flags(parser)


def _fill_changes(parser: argparse.ArgumentParser) -> None:
    _fill_name(parser)
    _add_worker_flags(parser)


def _add_worker_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--slots", metavar="N", help="answers at once; default: as it reports")
    add("--context", metavar="N", help="tokens of its context; default: as it reports")
    text = "model that it serves, or a pattern (repeatable); default: as it reports"
    add("--model", metavar="MODEL", action="append", help=text)
    add("--weight", help="share of requests, for policies that use it")
    add("--vram-gib", metavar="GIB", help="memory of its graphics cards, in GiB")
    add("--mac", metavar="ADDRESS", help="hardware address of its machine, to wake it")
    text = "environment variable of the hub that has the worker's API key"
    add("--api-key-env", metavar="VARIABLE", help=text)


def run(args: argparse.Namespace) -> int:
    """Carry out a command on the hub that its flags name; return the exit status.

    Raises:
        CallError: no hub answers, or it refuses.
        ConfigError: a flag is wrong.
    """
    hub = make_client(args.hub, args.token, args.token_file, args.ca_file, os.environ)
    try:
        with contextlib.closing(hub):
            args.do(args, hub)
            if hub.missing:
                names = printable(", ".join(hub.missing))
                text = f"note: this is without {names}, which did not answer"
                print(text, file=sys.stderr)
            return 0
    except KeyError as exc:
        text = f"the hub at {hub.url} is of another version: its answer has no {exc}"
        raise CallError(text) from exc


def _print_json(answer: object) -> None:
    print(json.dumps(answer, indent=2))


# --- dashboard --------------------------------------------------------------------


def _link(args: argparse.Namespace, hub: AdminClient) -> None:
    link = hub.call("POST", "links")
    if args.json:
        _print_json(link)
        return
    print(f"{hub.url.rstrip('/')}{link['path']}")
    if link["expires_in"] is not None:
        text = f"It signs in once, within {span(link['expires_in'])}."
        print(text, file=sys.stderr)


# --- workers ----------------------------------------------------------------------


def _list_workers(args: argparse.Namespace, hub: AdminClient) -> None:
    answer = hub.call("GET", "workers")
    if args.json:
        _print_json(answer)
    elif not answer["workers"]:
        print("The hub has no workers: gollama-proxy workers add URL")
    else:
        print_table(*workers_table(answer["workers"]))


def _show_worker(args: argparse.Namespace, hub: AdminClient) -> None:
    worker = hub.call("GET", f"workers/{segment(args.name)}")
    if args.json:
        _print_json(worker)
        return
    speed, breaker = worker["speed"], worker["breaker"]
    print_fields(
        {
            "name": worker["name"],
            "url": worker["url"],
            "source": worker["source"],
            "state": f"{state_of(worker)}, for {span(worker['since'])}",
            "reason": worker["reason"],
            "breaker": f"{breaker['state']} ({breaker['reason']})",
            "last error": worker["last_error"] and reason_for(worker),
            "running": running_of(worker),
            **({"hubs": hubs_of(worker)} if "hubs" in worker else {}),
            "weight": worker["weight"],
            "context": worker["context"],
            "vram_gib": worker["vram_gib"],
            "build": worker["build"],
            "tokens/s": speed["tokens_per_second"],
            "prompt tokens/s": speed["prompt_tokens_per_second"],
            "first token": span(speed["first_token"]),
            "models": ", ".join(map(describe_model, worker["models"])),
            **machine_of(worker["agent"] or {}),
        }
    )


def _add_worker(args: argparse.Namespace, hub: AdminClient) -> None:
    name = {} if args.name is None else {"name": args.name}
    worker = hub.call("POST", "workers", {"url": args.url} | name | _worker_keys(args))
    if args.json:
        _print_json(worker)
    else:
        print(printable(f"added {worker['name']}, {worker['url']}"))


def _set_worker(args: argparse.Namespace, hub: AdminClient) -> None:
    keys = _worker_keys(args)
    if not keys:
        raise ConfigError("nothing to set: give a flag, such as --weight 2")
    changed = hub.call("PATCH", f"workers/{segment(args.name)}", keys)
    worker = changed["worker"]
    _print_change(args, changed, worker["name"], ", ".join(keys) + " set")


def _worker_keys(args: argparse.Namespace) -> Json:
    """Return the keys of a `[[workers]]` table that flags give."""
    keys = {
        "slots": _number("--slots", args.slots, whole=True),
        "context": _number("--context", args.context, whole=True),
        "models": args.model,
        "weight": _number("--weight", args.weight),
        "vram_gib": _number("--vram-gib", args.vram_gib),
        "mac": args.mac,
        "api_key_env": args.api_key_env,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _number(flag: str, text: str | None, *, whole: bool = False) -> float | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?[0-9]{1,9}" + ("" if whole else r"(\.[0-9]{1,9})?"), text):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{flag} = {shown(text)}: must be {kind}")
    return int(text) if whole else float(text)


def _remove_worker(args: argparse.Namespace, hub: AdminClient) -> None:
    removed = hub.call("DELETE", f"workers/{segment(args.name)}")
    _print_change(args, removed, removed["name"], removed["state"])


def _change_worker(action: str, args: argparse.Namespace, hub: AdminClient) -> None:
    changed = hub.call("POST", f"workers/{segment(args.name)}/{action}")
    worker = changed["worker"]
    _print_change(args, changed, worker["name"], state_of(worker))


def _print_change(
    args: argparse.Namespace, answer: Json, name: str, state: str
) -> None:
    if args.json:
        _print_json(answer)
        return
    note = f" ({answer['note']})" if answer["note"] else ""
    print(printable(f"{name}: {state}{note}"))


# --- top --------------------------------------------------------------------------


def _top(args: argparse.Namespace, hub: AdminClient) -> None:
    overview = Overview(hub)
    overview.update()
    if args.json:
        _print_json(overview.answers)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(KeyboardInterrupt):
            watch(overview)
    else:
        show(overview)
    hub.missing = []  # it is in the heading


# --- explain ----------------------------------------------------------------------


def _explain(args: argparse.Namespace, hub: AdminClient) -> None:
    ask: Json = {"subject": args.sub, "path": args.path, "priority": args.priority}
    if args.file is None:
        if args.model is None:
            raise ConfigError("--model: must be given, or a request in --file")
        ask["model"] = args.model
    else:
        ask["request"] = _read_request(args.file)
        if args.model is not None:
            ask["request"]["model"] = args.model
    given = {name: value for name, value in ask.items() if value is not None}
    answer = hub.call("POST", "explain", given)
    if args.json:
        _print_json(answer)
        return
    context, queue, charge = answer["context"], answer["queue"], answer["charge"]
    fits = {True: "fits", False: "does not fit", None: "fits where it is not known"}
    counted = "counted" if context["counted"] else "estimated"
    most = charge["most_tokens"]
    fields: dict[str, object] = {
        "model": answer["model"],
        "worker": answer["worker"],
        "why": f"{answer['reason']} ({answer['code']})",
        "policy": answer["policy"],
        "context": f"{fits[context['fits']]}: {context['prompt_tokens']} tokens "
        f"({counted}), the largest context has {context['largest'] or '?'}",
        "charge": f"{charge['prompt_tokens']} tokens of the prompt, "
        + ("and the answer" if most is None else f"at most {most} with the answer"),
    }
    if "hub" in answer:
        fields["hub"] = answer["hub"]
    if queue is not None:
        fields["queue"] = f"place {queue['position']} of {queue['waiting']}" + (
            f", in about {span(queue['expected'])}" if queue["expected"] else ""
        )
    print_fields(fields)
    if answer["others"]:
        print()
        rows = [
            (each["worker"], each["reason"], each["code"]) for each in answer["others"]
        ]
        print_table(("not", "why", "code"), rows)


def _read_request(file: str) -> Json:
    source = f"--file = {file!r}"
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
        request = json.loads(text)
    except OSError as exc:
        raise ConfigError(f"{source}: cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{source}: must be JSON: {cut(str(exc))}") from exc
    if not isinstance(request, dict):
        raise ConfigError(f"{source}: must be a JSON object, the body of a request")
    return request


# --- usage ------------------------------------------------------------------------


def _usage(args: argparse.Namespace, hub: AdminClient) -> None:
    if args.csv and args.json:
        raise ConfigError("--csv: cannot be given together with --json")
    path = "/v1/usage" if args.own else "usage"
    try:
        answer = hub.call("GET", path, by=args.by, since=args.since, until=args.until)
    except CallError as exc:
        if exc.code != "insufficient_scope":
            raise
        raise CallError(f"{exc} With --own, it shows its own usage.") from exc
    if args.json:
        _print_json(answer)
    elif args.csv:
        print_csv([*answer["by"], *answer["total"]], answer["rows"])
    else:
        show_usage(answer)
    if "missing_since" in answer:
        when = time.strftime("%F %T", time.localtime(answer["missing_since"]))
        text = f"note: what other hubs used since {when} is missing: the store is down"
        print(text, file=sys.stderr)
    if not (args.json or answer["complete"]):
        text = "note: not all rows are shown; --since and --by can leave fewer"
        print(text, file=sys.stderr)


# --- requests, cancel, reload, revoke ---------------------------------------------

_FILTERS = ("id", "trace", "subject", "model", "worker", "outcome")
_EVERY = 1.0  # seconds between two requests for what is new


def _requests(args: argparse.Namespace, hub: AdminClient) -> None:
    limit: str = args.limit
    if not re.fullmatch("[1-9][0-9]{0,2}|1000", limit):
        text = "must be a whole number from 1 to 1000"
        raise ConfigError(f"--limit = {shown(limit)}: {text}")
    filters = {name: getattr(args, name) for name in _FILTERS}
    if args.since is not None:
        filters["since"] = f"{time.time() - _ago(args.since):.3f}"
    answer = hub.call("GET", "requests", limit=limit, **filters)
    if args.json and not args.follow:
        _print_json(answer)
        return
    if not args.json:
        print(_REQUEST_TITLES)
    page: dict[tuple[str, float], Json] = {}
    while True:
        before = page
        page = {(each["id"], each["ended"]): each for each in answer["requests"]}
        new = [request for key, request in page.items() if key not in before]
        for request in reversed(new):  # the newest was the first
            print(json.dumps(request) if args.json else _request_line(request))
            if args.id is not None and not args.json:
                print("\n".join(map(_step_line, request["steps"])))
        if not args.follow:
            return
        sys.stdout.flush()
        time.sleep(_EVERY)
        # As many as before, so that no older one appears.
        answer = hub.call("GET", "requests", limit=limit, **filters)


_REQUEST_TITLES = (
    f"{'ended':8}  {'status':6}  {'outcome':12}  {'took':>7}  {'tokens':>6}  "
    f"{'worker':20}  {'model':20}  {'subject':12}  id  error"
)


def _request_line(request: Json) -> str:
    ended = time.strftime("%H:%M:%S", time.localtime(request["ended"]))
    place = f" at {request['hub']}" if "hub" in request else ""
    return printable(
        f"{ended:8}  {request['status'] or '-':<6}  {request['outcome']:12}  "
        f"{span(request['duration']):>7}  {request['tokens']:>6}  "
        f"{request['worker'] or '-':20}  {request['model'] or '-':20}  "
        f"{request['subject'] or '-':12}  {request['id']}{place}  "
        f"{request['error']}".rstrip()
    )


def _step_line(step: Json) -> str:
    name, at = step["step"].replace("_", " "), f"+{step['at']:.3f} s"
    return printable(
        f"  {at:>10}  {name:9}  {step['worker'] or '-':20}  {step['reason']}".rstrip()
    )


def _ago(text: str) -> float:
    """Return the seconds that `--since` names."""
    if (seconds := parse_span(text)) is None:
        text = f"--since = {shown(text)}: must be a time such as 45s, 90m, 12h or 30d"
        raise ConfigError(text)
    return seconds


def _cancel(args: argparse.Namespace, hub: AdminClient) -> None:
    answer = hub.call("DELETE", f"exchanges/{segment(args.id)}")
    if args.json:
        _print_json(answer)
    else:
        print(printable(f"{answer['id']}: {answer['state']}"))


def _reload(args: argparse.Namespace, hub: AdminClient) -> None:
    answer = hub.call("POST", "reload")
    if args.json:
        _print_json(answer)
        return
    for change in answer["changed"]:
        print(f"changed: {printable(change)}")
    for setting in answer["restart"]:
        print(f"at the next start: {printable(setting)}")
    if not (answer["changed"] or answer["restart"]):
        print("nothing has changed")


def _revoke(args: argparse.Namespace, hub: AdminClient) -> None:
    kind, _, value = args.entry.partition(":")
    name = {"jti": "jti", "sub": "subject"}.get(kind)
    if name is None or not value.strip() or not value.isprintable():
        text = "must be jti: and the id of a token, or sub: and a subject"
        raise ConfigError(f"{shown(args.entry)}: {text}")
    if args.cancel and name == "jti":
        text = "is for a subject: the requests of one token are not known"
        raise ConfigError(f"--cancel: {text}")
    entry: Json = {name: value} | ({"cancel": True} if args.cancel else {})
    answer = hub.call("POST", "revoke", entry)
    if args.json:
        _print_json(answer)
        return
    print(f"revoked {printable(args.entry)}", end="")
    print("" if answer["persistent"] else ", until the hub restarts")
    what = "cancelled" if answer["cancelled"] else "still running"
    for identity in answer["running"]:
        print(f"{what}: {printable(identity)}")


# --- All of them ------------------------------------------------------------------

_Run = Callable[[argparse.Namespace, AdminClient], object]
_Fill = Callable[[argparse.ArgumentParser], None]

_WORKER_ACTIONS: dict[str, tuple[_Run, _Fill, str]] = {
    "show": (_show_worker, _fill_name, "show one worker"),
    "add": (_add_worker, _fill_new_worker, "add a worker, which survives restarts"),
    "set": (_set_worker, _fill_changes, "change settings of a worker"),
    "remove": (_remove_worker, _fill_name, "drain a worker, then forget it"),
    "drain": (
        partial(_change_worker, "drain"),
        _fill_name,
        "send a worker no new requests; running ones end, or continue elsewhere",
    ),
    "undrain": (partial(_change_worker, "undrain"), _fill_name, "end a drain"),
    "pause": (
        partial(_change_worker, "pause"),
        _fill_name,
        "send a worker no new requests; running ones continue",
    ),
    "unpause": (partial(_change_worker, "unpause"), _fill_name, "end a pause"),
    "wake": (
        partial(_change_worker, "wake"),
        _fill_name,
        "wake the sleeping machine of a worker",
    ),
    "reset-breaker": (
        partial(_change_worker, "reset-breaker"),
        _fill_name,
        "close the breakers of a worker",
    ),
}
_COMMANDS: dict[str, tuple[_Run, _Fill]] = {
    "workers": (_list_workers, _fill_workers),
    "drain": (partial(_change_worker, "drain"), _fill_name),
    "undrain": (partial(_change_worker, "undrain"), _fill_name),
    "dashboard": (_link, _fill_nothing),
    "top": (_top, _fill_nothing),
    "explain": (_explain, _fill_explain),
    "requests": (_requests, _fill_requests),
    "usage": (_usage, _fill_usage),
    "cancel": (_cancel, _fill_cancel),
    "reload": (_reload, _fill_nothing),
    "revoke": (_revoke, _fill_revoke),
}
