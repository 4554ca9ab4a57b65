"""Every policy with a thousand unequal workers, in simulated time.

    python -m benchmarks.simulate            1,000 workers, 100,000 streams
    python -m benchmarks.simulate --small    3 workers with 8 slots, 12 busy clients

Policies, worker records, leases and learnt speeds are the hub's own; the machines are
simulated (`benchmarks/machines.py`).  All policies get the same requests
(`benchmarks/workload.py`).  When no slot is free, requests wait in one queue in front
of all workers; with `least_conn`, which stands for a proxy that knows no slots, they
wait in the workers.

The same seed gives the same figures, except for the cost of a pick.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.machines import Kind
from benchmarks.simulation import (
    PICKS,
    ROUNDS,
    LeastConnections,
    Maker,
    Patient,
    Result,
    simulate,
)
from gollama_proxy.scheduling.affinity import Affinity
from gollama_proxy.scheduling.policies import (
    Fastest,
    LeastBusy,
    RoundRobin,
    Weighted,
)

CARD = Kind("card", 8, reads=4000, writes=90, sharing=0.1, kept=64, weight=24)
OLD_CARD = Kind("old-card", 4, reads=1200, writes=40, sharing=0.2, kept=48, weight=12)
MAC = Kind("mac", 4, reads=500, writes=30, sharing=0.3, kept=48, weight=16)
LAPTOP = Kind("laptop", 2, reads=100, writes=10, sharing=0.7, kept=16, weight=4)
# A small model on two threads, on one, and on a slow one.
SMALL = [
    Kind("fast", 4, reads=600, writes=80, sharing=0.7, kept=64, weight=4),
    Kind("middle", 2, reads=300, writes=40, sharing=0.7, kept=64, weight=2),
    Kind("slow", 2, reads=120, writes=16, sharing=0.7, kept=64, weight=1),
]
POOL = [CARD, OLD_CARD, OLD_CARD, OLD_CARD, MAC, MAC, MAC, LAPTOP, LAPTOP, LAPTOP]


POLICIES: dict[str, Maker] = {
    "least_conn": lambda clock, rng: LeastConnections(),
    "round_robin": lambda clock, rng: RoundRobin(),
    "weighted": lambda clock, rng: Weighted(),
    "least_busy": lambda clock, rng: LeastBusy(rng),
    "fastest": lambda clock, rng: Fastest(rng),
    "affinity_least_busy": lambda clock, rng: Affinity(LeastBusy(rng), clock),
    "affinity_fastest": lambda clock, rng: Affinity(Fastest(rng), clock),
    "affinity_patient": lambda clock, rng: Patient(Fastest(rng), clock),
}


def show(results: dict[str, Result], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    headings = "TTFT p50", "p95", "tokens/s", "cached", "slots taken", "pick"
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        ranked = sorted(result.busy)
        low, high = ranked[0], ranked[-1]
        table.add_row(
            name,
            f"{result.first_token[49]:.2f} s",
            f"{result.first_token[94]:.2f} s",
            f"{result.throughput:,.0f}",
            f"{result.cached:.0%}",
            f"{low:.0%} - {high:.0%}",
            f"{result.pick * 1e6:.1f} µs",
        )
    console.print(table)
    console.print(
        "TTFT: from the arrival of a request to its first token\n"
        "cached: of the prompt tokens of second turns\n"
        "slots taken: on average, of the worker with the least and with the most\n"
        f"pick: CPU time, best of {ROUNDS} rounds of {PICKS:,}",
        highlight=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--small", action="store_true", help="3 workers with 8 slots")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="only this")
    parser.add_argument("--streams", type=int, help="requests (100000; small: 6000)")
    parser.add_argument(
        "--load",
        type=float,
        default=0.8,
        help="of what the pool can bear, with nothing cached",
    )
    parser.add_argument(
        "--clients",
        type=int,
        help="that ask again when answered (small: 12); 0: requests arrive at random",
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if (
        (options.streams or 100) < 100
        or options.load <= 0
        or (options.clients or 0) < 0
    ):
        parser.error("--streams from 100, --load above 0, --clients from 0")
    kinds = SMALL if options.small else POOL * 100
    streams = options.streams or (6_000 if options.small else 100_000)
    clients = 12 if options.small and options.clients is None else options.clients
    console, results = Console(), {}
    for name in options.policy or POLICIES:
        with console.status(name):
            results[name] = simulate(
                POLICIES[name],
                kinds,
                streams,
                options.load,
                options.seed,
                clients or 0,
            )
    show(results, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
