"""What a worker that is stopped costs the clients of the others.

    python -m benchmarks.faults                   with less patience than by default
    python -m benchmarks.faults --allowance 10    with the hub's defaults alone

Real llama-servers with a tiny model, a hub, and clients that stream, all on this
machine.  In turns:

(a) Two workers that are well, alone behind a hub.

(b) Three workers, of which one is stopped by SIGSTOP under the same load: the worst
    kind of dead, as its port goes on to accept.  Once the hub has taken it out, a new
    request should find what those of (a) find.  Then it is woken, and its share of the
    requests is watched from the moment when the hub takes it back.

One setting is not the default: `timeouts.allowance` (10 s), the time in which another
worker is asked instead, and for which a canary may take; else a round would last for
minutes.

Each client comes back some time after it was answered, so that the machine is mostly
idle: what a request waits for then is its worker and its hub.  Under a load that fills
the cores it would be a core, and a ratio of two such waits would tell nothing.  The
pauses are random, so that requests meet now and then, and the same in (a) and (b).  Who
waits for the stopped worker does not ask meanwhile, as people do; what is measured
begins when all of them have been answered, and the load is that of (a) again.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

from rich.console import Console

from benchmarks import command
from benchmarks.llama import Build, llama_servers
from benchmarks.report import spread, table
from benchmarks.scene import PAUSE, SHARE_SECONDS, TOKENS, Calm, Fault, Scene

WORKERS = 3
RATIO_GOAL = 1.2


async def measure(options: argparse.Namespace, console: Console) -> None:
    """Take the rounds and print what they showed."""
    calms: list[Calm] = []
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        async with llama_servers([Build()] * WORKERS, folder) as servers:
            scene = Scene(
                servers,
                folder,
                clients=options.clients,
                seconds=options.seconds,
                allowance=options.allowance,
            )
            for turn in range(options.rounds):
                with console.status(f"round {turn + 1} of {options.rounds}"):
                    calms.append(await scene.calm(turn))
                    faults.append(await scene.fault(turn))
    _print_conditions(options, console)
    _print_waits(calms, faults, console)
    console.print(*_tell_losses(faults), sep="\n", highlight=False, soft_wrap=True)
    console.print(*_tell_times(faults), sep="\n", highlight=False, soft_wrap=True)


# --- Printing ---------------------------------------------------------------------


def _print_conditions(options: argparse.Namespace, console: Console) -> None:
    console.print(
        f"(a) {WORKERS - 1} workers; (b) {WORKERS}, of which one is stopped and out\n"
        f"{options.clients} clients with streams of {TOKENS} tokens, {PAUSE:g} s apart"
        f" on average\n"
        f"timeouts.allowance = {options.allowance:g}, all else as it comes\n"
        f"Python {platform.python_version()}, {os.cpu_count()} cores; median of"
        f" {options.rounds} rounds (lowest - highest)\n",
        highlight=False,
    )


def _print_waits(calms: list[Calm], faults: list[Fault], console: Console) -> None:
    title = "Milliseconds to the first token"
    waits = table(title, "(a)", "(b)", "(b) / (a)", "goal")
    for name, of in (("p50", median), ("p95", _p95)):
        a = [of(calm.waits) * 1e3 for calm in calms]
        b = [of(fault.waits) * 1e3 for fault in faults]
        ratios = [one / other for one, other in zip(b, a, strict=True)]
        held = "under" if median(ratios) <= RATIO_GOAL else "OVER"
        goal = f"{held} {RATIO_GOAL:g}"
        waits.add_row(name, spread(a, 1), spread(b, 1), spread(ratios, 2), goal)
    console.print(waits, highlight=False)
    measured = (sum(len(each.waits) for each in runs) for runs in (calms, faults))
    console.print("of {:,} and {:,} requests\n".format(*measured), highlight=False)


def _p95(values: list[float]) -> float:
    return quantiles(values, n=20)[-1]


def _tell_losses(faults: list[Fault]) -> Iterator[str]:
    """Tell what (b) cost its clients, from its beginning to its end."""
    asked = sum(fault.asked for fault in faults)
    failed = sum(fault.failed for fault in faults)
    cut = sum(fault.cut for fault in faults)
    held = "OVER the goal of none" if failed + cut else "the goal of none is met"
    yield f"all of (b): {asked:,} requests, {failed} failed, {cut} broke off; {held}"
    yield f"longest wait {spread([fault.longest for fault in faults], 1)} s"


def _tell_times(faults: list[Fault]) -> Iterator[str]:
    """Tell when the worker went and came, and how."""
    by = ", ".join(dict.fromkeys(fault.out_by for fault in faults))
    yield f"taken out after {spread([each.out_after for each in faults], 1)} s, by {by}"
    yield f"taken back after {spread([each.back_after for each in faults], 1)} s"
    spans = zip(*(fault.shares for fault in faults), strict=True)
    shares = ", ".join(f"{median(span):.0%}" for span in spans)
    yield f"its share then, for {SHARE_SECONDS:g} s each: {shares}"


# --- Command line -----------------------------------------------------------------


def _parse() -> argparse.Namespace:
    parser = command.parser("faults", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="measured in each half of a round"
    )
    parser.add_argument(
        "--allowance", type=float, default=1.0, help="timeouts.allowance of the hub"
    )
    options = parser.parse_args()
    command.require_positive(parser, **vars(options))
    return options


def main() -> int:
    options, console = _parse(), Console()
    return command.run(lambda: measure(options, console))


if __name__ == "__main__":
    sys.exit(main())
