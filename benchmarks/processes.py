"""How much more several processes serve at one address than one does.

The clients and the worker need the cores of this machine as well, so requests per
second would measure them, too.  Counted is the CPU time of the hubs.  If each of N hubs
has a core, they serve N times (CPU time of a request of one process / CPU time of a
request of the N) as much as one does.  The parent and the store are counted apart.

One process and several take turns within each round; a figure is the median.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from benchmarks import command
from benchmarks.load import Kind
from benchmarks.measure import measure_answers, measure_tokens, paced_worker
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


async def measure(group: Group, kind: Kind | None, seconds: float) -> Cost:
    rest, hubs = group.of_the_rest(), group.of_hubs()
    if kind is None:
        sample = await measure_tokens(group, STREAMS, RATE, seconds)
    else:
        tokens = 20 if kind is Kind.CHAT else 1
        sample = await measure_answers(group, kind, tokens, seconds)
    used = [now - then for now, then in zip(group.of_hubs(), hubs, strict=True)]
    # The rest is also used while the clients start and end, as the hubs are.
    rest = sample.microseconds * (group.of_the_rest() - rest) / sum(used)
    return Cost(sample.microseconds, rest, max(used) / sum(used))


async def run(number: int, rounds: int, seconds: float) -> None:
    costs: dict[tuple[str, int], list[Cost]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with contextlib.AsyncExitStack() as stack:
            port = await stack.enter_async_context(paced_worker(RATE, folder))
            groups = [Group([port], folder / str(each), each) for each in (1, number)]
            for group in groups:
                await stack.enter_async_context(group.running())
            for turn in range(rounds):
                for load, kind in LOADS.items():
                    for group in groups if turn % 2 else groups[::-1]:
                        cost = await measure(group, kind, seconds)
                        costs.setdefault((load, group.number), []).append(cost)
            memory = groups[1].memory_of_all()
    print(_table(costs, number))
    shown = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in memory)
    print(f"\nResident memory after that, MiB: {shown}.")


def _table(costs: dict[tuple[str, int], list[Cost]], number: int) -> str:
    rows = []
    for load in LOADS:
        one, several = costs[load, 1], costs[load, number]
        factors = [number * a.hubs / b.hubs for a, b in zip(one, several, strict=True)]
        rows.append(
            [
                load,
                f"{median(each.hubs for each in one):.1f}",
                f"{median(each.hubs for each in several):.1f}",
                f"{median(each.rest for each in several):.1f}",
                f"{median(each.busiest for each in several):.0%}",
                f"{median(factors):.2f} ({min(factors):.2f} - {max(factors):.2f})",
            ]
        )
    titles = ["", "1 process, µs", f"{number} processes, µs", "parent and store, µs"]
    return markdown([*titles, "busiest process", "throughput"], rows)


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
