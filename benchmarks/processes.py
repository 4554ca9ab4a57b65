"""How much more several processes serve at one address than one does.

The clients and the worker need the cores of this machine as well, so requests per
second would measure them, too.  Counted is the CPU time of the hubs: N processes at one
address, and N hubs that know nothing of each other, with the same load divided among
them.  If each hub has a core, the N processes serve N times (CPU time of a request
apart / CPU time of a request together) as much as one hub does.  The parent and the
store are counted separately.

Both take turns within each round; a figure is the median.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import psutil

from benchmarks import command
from benchmarks.load import Kind
from benchmarks.measure import (
    CLIENTS,
    measure_answers,
    measure_tokens,
    paced_worker,
)
from benchmarks.proxies import Hub, cpu_seconds
from benchmarks.report import markdown

RATE = 50.0  # tokens per second of a stream
STREAMS = 200


class Group(Hub):
    """Several processes at one address, or one."""

    def __init__(self, workers: Sequence[int], folder: Path, number: int) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(workers, folder)
        self.number = number
        self.settings["STATE_DIR"] = str(folder / "state")

    def command(self) -> list[str]:
        return [*super().command(), "--processes", str(self.number)]

    def cpu_seconds(self) -> float:
        """Return the CPU time of the hubs."""
        return sum(self.of_hubs())

    def of_hubs(self) -> list[float]:
        """Return the CPU time of each hub."""
        hubs = self._processes if self.number == 1 else self._hubs()
        return [cpu_seconds(each) for each in hubs]

    def of_the_rest(self) -> float:
        """Return the CPU time of the parent and the store."""
        return super().cpu_seconds() - self.cpu_seconds()

    def memory_of_all(self) -> list[tuple[str, int]]:
        """Return the resident bytes of each process."""
        found = []
        for process in self._processes:
            name = "hub" if self.number == 1 or process in self._hubs() else "parent"
            name = "store" if "-server" in process.name() else name
            found.append((name, process.memory_info().rss))
        return found

    def _hubs(self) -> list[psutil.Process]:
        return [each for each in self._processes[1:] if "-server" not in each.name()]


class Cost(NamedTuple):
    """CPU time of one load."""

    hubs: float  # microseconds for each answer or token
    rest: float  # of the parent and the store
    busiest: float  # the share of the hub that did most


LOADS = {
    "short request, keep-alive": Kind.EMBEDDING,
    "stream of 1 token": Kind.STREAM,
    "chat of 20 tokens in one piece": Kind.CHAT,
    "relayed token, 200 streams": None,
}


async def measure_together(group: Group, kind: Kind | None, seconds: float) -> Cost:
    rest, hubs = group.of_the_rest(), group.of_hubs()
    microseconds = await _measure(group, kind, seconds, 1)
    used = [now - then for now, then in zip(group.of_hubs(), hubs, strict=True)]
    # The rest is also used while the clients start and end, as the hubs are.
    rest = microseconds * (group.of_the_rest() - rest) / sum(used)
    return Cost(microseconds, rest, max(used) / sum(used))


async def measure_apart(
    hubs: Sequence[Group], kind: Kind | None, seconds: float
) -> float:
    """Return the CPU microseconds for each answer or token of hubs that run at once."""
    part = len(hubs)
    return fmean(
        await asyncio.gather(*(_measure(each, kind, seconds, part) for each in hubs))
    )


async def _measure(group: Group, kind: Kind | None, seconds: float, part: int) -> float:
    if kind is None:
        sample = await measure_tokens(group, STREAMS // part, RATE, seconds)
    else:
        tokens = 20 if kind is Kind.CHAT else 1
        clients = CLIENTS // part
        sample = await measure_answers(group, kind, tokens, seconds, clients)
    return sample.microseconds


async def run(number: int, rounds: int, seconds: float) -> None:
    apart: dict[str, list[float]] = {load: [] for load in LOADS}
    together: dict[str, list[Cost]] = {load: [] for load in LOADS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with contextlib.AsyncExitStack() as stack:
            port = await stack.enter_async_context(paced_worker(RATE, folder))
            group = Group([port], folder / "together", number)
            hubs = [Group([port], folder / str(each), 1) for each in range(number)]
            for each in (group, *hubs):
                await stack.enter_async_context(each.running())
            for turn in range(rounds):
                for load, kind in LOADS.items():
                    if turn % 2:
                        apart[load].append(await measure_apart(hubs, kind, seconds))
                    cost = await measure_together(group, kind, seconds)
                    together[load].append(cost)
                    if not turn % 2:
                        apart[load].append(await measure_apart(hubs, kind, seconds))
            memory = group.memory_of_all()
    print(_table(apart, together, number))
    shown = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in memory)
    print(f"\nResident memory after that, MiB: {shown}.")


def _table(
    apart: dict[str, list[float]], together: dict[str, list[Cost]], number: int
) -> str:
    rows = []
    for load in LOADS:
        one, several = apart[load], together[load]
        factors = [number * a / b.hubs for a, b in zip(one, several, strict=True)]
        rows.append(
            [
                load,
                f"{median(one):.1f}",
                f"{median(each.hubs for each in several):.1f}",
                f"{median(each.rest for each in several):.1f}",
                f"{median(each.busiest for each in several):.0%}",
                f"{median(factors):.2f} ({min(factors):.2f} - {max(factors):.2f})",
            ]
        )
    titles = ["", "apart, µs", "together, µs", "parent and store, µs"]
    return markdown([*titles, "busiest hub", "throughput"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser("processes", __doc__)
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S")
    args = parser.parse_args(argv)
    command.require_positive(
        parser, processes=args.processes, rounds=args.rounds, seconds=args.seconds
    )
    return command.run(lambda: run(args.processes, args.rounds, args.seconds))


if __name__ == "__main__":
    sys.exit(main())
