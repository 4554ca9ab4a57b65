"""The effect of a stopped worker on the clients of the others.

    python -m benchmarks.faults                   with a shorter allowance
    python -m benchmarks.faults --allowance 10    with the hub's defaults

Real llama-servers with a tiny model, a hub, and clients that stream, all on this
machine.  In turns:

(a) Two healthy workers behind a hub.

(b) Three workers, of which one is stopped by SIGSTOP under the same load: the worst
    kind of failure, as its port still accepts.  Once the hub has stopped sending to it,
    a new request should wait no longer than in (a).  Then the worker continues, and its
    share of the requests is recorded from the moment the hub sends to it again.

One setting differs from the default: `timeouts.allowance` (10 s), after which another
worker is asked, and which limits a canary; otherwise a round would last for minutes.

Each client pauses after an answer, so that the machine is mostly idle and a request
waits for its worker and its hub alone.  Under a load that fills the cores it would wait
for a core, and a ratio of two such waits would show nothing.  The pauses are random, so
that requests coincide now and then, and they are the same in (a) and (b).  Clients that
wait for the stopped worker send nothing meanwhile; measuring begins when all of them
have been answered, so that the load is that of (a) again.
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
    """Measure all rounds and print the results."""
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
    console.print(*_losses(faults), sep="\n", highlight=False, soft_wrap=True)
    console.print(*_times(faults), sep="\n", highlight=False, soft_wrap=True)


# --- Printing ---------------------------------------------------------------------


def _print_conditions(options: argparse.Namespace, console: Console) -> None:
    console.print(
        f"(a) {WORKERS - 1} workers; (b) {WORKERS}, of which one is stopped\n"
        f"{options.clients} clients with streams of {TOKENS} tokens, {PAUSE:g} s apart"
        f" on average\n"
        f"timeouts.allowance = {options.allowance:g}, all else by default\n"
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


def _losses(faults: list[Fault]) -> Iterator[str]:
    """Yield sentences about the requests of (b), from its beginning to its end."""
    asked = sum(fault.asked for fault in faults)
    failed = sum(fault.failed for fault in faults)
    cut = sum(fault.cut for fault in faults)
    held = "OVER the goal of none" if failed + cut else "meets the goal of none"
    yield f"all of (b): {asked:,} requests, {failed} failed, {cut} broke off: {held}"
    yield f"longest wait {spread([fault.longest for fault in faults], 1)} s"


def _times(faults: list[Fault]) -> Iterator[str]:
    """Yield sentences about the times at which the hub reacted."""
    by = ", ".join(dict.fromkeys(fault.out_by for fault in faults))
    yield f"taken out after {spread([each.out_after for each in faults], 1)} s, by {by}"
    yield f"taken back after {spread([each.back_after for each in faults], 1)} s"
    spans = zip(*(fault.shares for fault in faults), strict=True)
    shares = ", ".join(f"{median(span):.0%}" for span in spans)
    yield f"its share afterwards, in periods of {SHARE_SECONDS:g} s: {shares}"


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
