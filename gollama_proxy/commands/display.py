"""What operators see on a terminal: tables of workers and requests, once or live."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gollama_proxy.commands.client import AdminClient, CallError, Json

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def printable(text: object) -> str:
    """Return a text that cannot control a terminal: users and workers choose some."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


_COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "loading": "yellow",
    "waking": "yellow",
    "asleep": "blue",
    "down": "red",
}


def make_table(
    titles: Sequence[str], rows: Iterable[Iterable[object]], *, fold: bool = True
) -> Table:
    """Make a table; the column `state` is coloured.

    Cells are too long for a terminal at times: they are folded, or else cut.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(
            title, overflow="fold" if fold else "ellipsis", no_wrap=not fold
        )
    for row in rows:
        cells = [Text(printable("" if cell is None else cell) or "-") for cell in row]
        for title, cell in zip(titles, cells, strict=True):
            if title == "state":
                cell.stylize(_COLOURS.get(re.split(r"\W", cell.plain)[0], ""))
        table.add_row(*cells)
    return table


def print_table(titles: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; a pipe has no width, so that no line is folded there."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 10_000
    Console(width=width).print(make_table(titles, rows))


def print_fields(fields: Mapping[str, object]) -> None:
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name:<{width}}  {printable('' if value is None else value) or '-'}")


def span(seconds: float | None) -> str:
    """Show a time in the unit that fits; nothing if it is not known."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


_TITLES = (
    "name",
    "url",
    "state",
    "for",
    "running",
    "tokens/s",
    "models",
    "reason",
)


def workers_table(
    workers: Sequence[Json],
) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
    """Return the titles and the rows of a table of workers."""
    if not any("hubs" in worker for worker in workers):
        return _TITLES, map(_worker_row, workers)
    return (*_TITLES, "hubs"), ([*_worker_row(w), hubs_of(w)] for w in workers)


def hubs_of(worker: Json) -> str:
    """Show what each hub runs on a worker, and how it sees it if not as the others."""
    seen = state_of(worker)
    parts = []
    for each in worker.get("hubs", ()):
        view = {**each, "breaker": {"state": each["breaker"]}}
        other = state_of(view)
        note = "" if other == seen else f" ({other})"
        parts.append(f"{each['hub']}: {each['running']}{note}")
    return ", ".join(parts)


def _worker_row(worker: Json) -> Sequence[object]:
    speed = worker["speed"]["tokens_per_second"]
    return (
        worker["name"],
        worker["url"],
        state_of(worker),
        span(worker["since"]),
        running_of(worker),
        "" if speed is None else f"{speed:.1f}",
        ", ".join(map(describe_model, worker["models"])),
        reason_for(worker),
    )


def state_of(worker: Json) -> str:
    parts = [worker["state"]]
    if worker["hold"] != "none":
        parts.append(worker["hold"])
    if worker["breaker"]["state"] != "closed":
        parts.append(f"breaker {worker['breaker']['state']}")
    return ", ".join(parts)


def running_of(worker: Json) -> str:
    slots = worker["slots"]
    return f"{worker['running']}/{'?' if slots is None else slots}"


def describe_model(model: Json) -> str:
    progress = model["progress"]
    name = str(model["name"])
    return name if progress is None else f"{name} (loading {100 * progress:.0f}%)"


def machine_of(report: Json) -> dict[str, str]:
    """Show what an agent has reported of its machine: a row, and one for each device.

    All of a report is optional.
    """
    parts = [report.get("host")]
    if "load" in report:
        parts.append(f"load {report['load']:g}")
    if "version" in report:
        parts.append(f"agent {report['version']}")
    if report.get("serving") is False:
        parts.append("its server does not answer the agent")
    rows = {"machine": ", ".join(filter(None, parts))} if report else {}
    for number, device in enumerate(report.get("devices", ()), 1):
        rows[f"device {number}"] = _device(device)
    return rows


def _device(device: Json) -> str:
    parts = [device["name"]]
    total, used = device.get("memory_gib"), device.get("used_gib")
    if used is not None:
        of = "" if total is None else f"of {total:g} "
        parts.append(f"{used:g} {of}GiB used")
    elif total is not None:
        parts.append(f"{total:g} GiB")
    if device.get("busy") is not None:
        parts.append(f"{100 * device['busy']:.0f}% busy")
    if device.get("celsius") is not None:
        parts.append(f"{device['celsius']:g} °C")
    return ", ".join(parts)


def reason_for(worker: Json) -> str:
    """Show what is wrong with a worker, or was last."""
    if worker["breaker"]["state"] != "closed":
        return str(worker["breaker"]["reason"])
    if worker["state"] != "ready":
        return str(worker["reason"])
    error = worker["last_error"]
    return f"{error['detail']} ({span(error['ago'])} ago)" if error else ""


# --- Usage ------------------------------------------------------------------------


def show_usage(answer: Json) -> None:
    """Print a table of usage with a total, and what is left of limits."""
    titles = [*answer["by"], *answer["total"]]
    begins, ends = (
        time.strftime("%Y-%m-%d", time.gmtime(moment))
        for moment in (answer["since"], answer["until"] - 1)
    )
    if answer["rows"]:
        total = dict.fromkeys(answer["by"], "") | answer["total"]
        total[answer["by"][0]] = "total"
        rows = [[row[title] for title in titles] for row in (*answer["rows"], total)]
        names = [title.replace("_", " ") for title in titles]
        print_table(*_aligned([*names[:-1], "slot time"], rows))
    else:
        further = "; --since 90d looks further back"
        if answer["until"] - answer["since"] >= 90 * 86_400:
            further = ""
        print(f"Nothing was used from {begins} to {ends} (UTC){further}.")
    for claim, limit in answer.get("limits", {}).items():
        left = f"{limit['remaining']:,} of {limit['limit']:,} left"
        resets = limit["resets_in"]
        print(f"{claim}: {left}" + (f", all of it in {span(resets)}" * bool(resets)))


def _aligned(
    titles: Sequence[str], rows: Iterable[Sequence[object]]
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Align columns of numbers to the right; the last one is a time in seconds."""
    columns = []
    for title, *values in zip(titles, *rows, strict=True):
        if any(isinstance(value, str) for value in values):
            columns.append([title, *map(str, values)])
            continue
        last = title == titles[-1]
        cells = [span(value) if last else f"{value:,}" for value in values]
        width = max(map(len, (title, *cells)))
        columns.append([f"{cell:>{width}}" for cell in (title, *cells)])
    first, *others = zip(*columns, strict=True)
    return [*first], others


def print_csv(titles: Sequence[str], rows: Iterable[Json]) -> None:
    """Print rows as RFC 4180 has it, with names that no spreadsheet calculates."""
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\r\n")
    writer.writerow(titles)
    for row in rows:
        writer.writerow([_plain(row[title]) for title in titles])


def _plain(value: object) -> object:
    """Return a value that a spreadsheet does not take for a formula (OWASP)."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
    return f"'{printable(value)}" if formula else printable(value)


# --- All at once, live ------------------------------------------------------------


_OF_WORKERS = ("name", "state", "running", "tokens/s", "models", "reason")
_OF_WAITING = ("waiting", "model", "subject", "class", "place", "for", "expected")
_OF_RUNNING = ("request", "model", "worker", "subject", "state", "for", "tokens")


class Overview:
    """The workers, the queue and the running requests of a hub, as of one moment.

    `clock` returns monotonic seconds.
    """

    def __init__(
        self, hub: AdminClient, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.answers: Json = {}
        self.error = ""  # why the answers are not those of this moment
        self._hub = hub
        self._clock = clock
        self._read_at = 0.0
        self._tokens: dict[str, int] = {}  # of each request, when it was read
        self._rates: dict[str, float] = {}  # tokens/s of each worker since then

    def __repr__(self) -> str:
        return f"<Overview of {self._hub!r}>"

    def update(self) -> None:
        """Ask the hub.

        Raises:
            CallError: it does not answer, or refuses.
        """
        answers: Json = {}
        missing: set[str] = set()
        for name in ("workers", "queue", "exchanges"):
            answer = self._hub.call("GET", name)
            missing.update(answer.pop("missing", ()))
            answers |= answer
        if any("hubs" in worker for worker in answers["workers"]):
            answer = self._hub.call("GET", "hubs")
            missing.update(answer.pop("missing", ()))
            answers |= answer
        if missing:
            answers["missing"] = sorted(missing)
        self.answers, self.error = answers, ""
        self._measure(self._clock())

    def _measure(self, now: float) -> None:
        """Measure how many tokens each worker generates, from request to request."""
        elapsed, self._read_at = now - self._read_at, now
        tokens: dict[str, int] = {}
        rates: dict[str, float] = {}
        for each in self.answers["exchanges"]:
            tokens[each["id"]] = each["tokens"]
            new = each["tokens"] - self._tokens.get(each["id"], each["tokens"])
            if new > 0 and elapsed > 0:
                worker = each["worker"]
                rates[worker] = rates.get(worker, 0.0) + new / elapsed
        self._tokens, self._rates = tokens, rates

    def rows(self, height: int | None = None) -> Iterator[RenderableType]:
        """Yield a heading and tables that fit into so many lines; None: any number."""
        from rich.text import Text

        workers, queue = self.answers["workers"], self.answers["queue"]
        waiting = {each["id"] for each in queue}
        exchanges = self.answers["exchanges"]
        running = [each for each in exchanges if each["id"] not in waiting]
        rate = sum(self._rates.values())
        line: Any = {} if height is None else {"no_wrap": True, "overflow": "ellipsis"}
        yield Text(
            f"{self._hub.url}   workers {len(workers)}   running {len(running)}   "
            f"waiting {len(queue)}   tokens/s {rate:.0f}",
            **line,
        )
        # The workers come first; the requests have what they leave.
        left = math.inf if height is None else height - 2
        if self.error:
            yield Text(printable(self.error), "red", **line)
        for text, colour in _hub_lines(self.answers):
            left -= 1
            yield Text(printable(text), colour, **line)
        for titles, rows, share in (
            (_OF_WORKERS, [*map(self._worker_row, workers)], 0.7),
            (_OF_WAITING, [*map(_waiting_row, queue)], 0.5),
            (_OF_RUNNING, [*map(_running_row, running)], 1.0),
        ):
            room = share * left - 2  # beside a blank line and the titles
            if rows and room >= 1:
                if len(rows[0]) > len(titles):
                    titles = (*titles, "hub")
                rows = rows if len(rows) <= room else rows[: int(room)]
                left -= len(rows) + 2
                yield Text()
                yield make_table(titles, rows, fold=height is None)

    def _worker_row(self, worker: Json) -> Sequence[object]:
        rate = self._rates.get(worker["name"])
        return (
            worker["name"],
            state_of(worker),
            running_of(worker),
            "" if rate is None else f"{rate:.0f}",
            ", ".join(map(describe_model, worker["models"])),
            reason_for(worker),
        )


def _hub_lines(answers: Json) -> Iterator[tuple[str, str]]:
    """Yield lines about the hubs and their store, with colours; none for one alone."""
    if (store := answers.get("store")) is None:
        return
    hubs = (
        f"{each['hub']}: {each['running']} running"
        + (f", {each['waiting']} waiting" if each["waiting"] else "")
        for each in answers["hubs"]
    )
    yield "hubs   " + "   ".join(hubs), ""
    if store["mode"] != "up":
        text = "the hub is connecting to the store"
        if store["mode"] == "down":
            text = f"the store cannot be reached ({store['reason']})"
        yield f"{text}: {ALONE}", "red"
    elif missing := answers.get("missing"):
        yield f"without {', '.join(missing)}, which did not answer", "red"


ALONE = "each hub goes on with its part of the slots, and shows only its own requests"


def _waiting_row(waiting: Json) -> Sequence[object]:
    hub = (waiting["hub"],) if "hub" in waiting else ()
    return (
        waiting["id"],
        waiting["model"],
        waiting["subject"],
        waiting["class"],
        waiting["position"],
        span(waiting["waited"]),
        span(waiting["expected"]),
        *hub,
    )


def _running_row(exchange: Json) -> Sequence[object]:
    names = ("id", "model", "worker", "subject", "state")
    values = [exchange[name] for name in names]
    hub = (exchange["hub"],) if "hub" in exchange else ()
    return (*values, span(exchange["age"]), exchange["tokens"], *hub)


def show(overview: Overview) -> None:
    """Print an overview once."""
    from rich.console import Console, Group

    width = None if sys.stdout.isatty() else 10_000
    Console(width=width).print(Group(*overview.rows()))


def watch(overview: Overview) -> None:
    """Show an overview on the whole terminal, every second, until `q` is pressed.

    A hub that does not answer for a while leaves the last overview, and the reason.
    """
    from rich.console import Console, Group
    from rich.live import Live

    console = Console()

    def view() -> Group:
        return Group(*overview.rows(console.height))

    with (
        _keys() as read_keys,
        Live(view(), console=console, screen=True, auto_refresh=False) as live,
    ):
        due = time.monotonic() + _EVERY
        while "q" not in read_keys(max(0.0, due - time.monotonic())).lower():
            if time.monotonic() >= due:
                try:
                    overview.update()
                except CallError as exc:
                    overview.error = str(exc)
                due = time.monotonic() + _EVERY
            live.update(view(), refresh=True)


_EVERY = 1.0  # seconds


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Read keys as they are pressed, without an echo; restore the terminal at the end.

    The function waits for so many seconds.  It returns sooner with the keys, or with
    none when the size of the terminal has changed; "q" when the terminal is gone.
    """
    import select
    import signal
    import socket
    import termios
    import tty

    terminal = sys.stdin.fileno()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def read(seconds: float) -> str:
        ready = select.select([terminal, ours], [], [], seconds)[0]
        if ours in ready:
            ours.recv(4096)
        if terminal not in ready:
            return ""
        try:
            return os.read(terminal, 4096).decode(errors="replace") or "q"
        except OSError:
            return "q"

    settings = termios.tcgetattr(terminal)
    before = {
        # The signal ends a wait through the socket.
        signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda *_: None),
        # Otherwise the terminal would stay as it is now.
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)),
    }
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        tty.setcbreak(terminal)
        yield read
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, settings)
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()
