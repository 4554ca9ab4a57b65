"""The results of a comparison, round by round, and their report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.chat import Exchange
from benchmarks.children import BenchmarkError
from benchmarks.report import markdown, spread

BASE = "nginx least_conn"
HUB = "hub "
FEWEST = 10  # requests of a contestant in a round, for a percentile
HEADINGS = (
    "",
    "TTFT p50",
    "p95",
    "max",
    "p95 / least_conn",
    "tokens/s",
    "/ least_conn",
    "cached",
    "failed",
)
P95_GOAL, RATE_GOAL, CACHED_GOAL = 0.5, 1.0, 0.9


@dataclass(frozen=True)
class Bout:
    """One contestant in one round."""

    waits: list[float]  # seconds to the first token, of those that began in it
    rate: float  # tokens/s that arrived
    cached: float  # part of the prompt tokens of second and later turns
    repeated: float  # the part that could have been cached
    asked: int  # requests in all, with those before and after the measurement
    flaws: list[str]  # of those that failed
    busy: float  # part of the machine's CPU time

    @property
    def p95(self) -> float:
        return quantiles(self.waits, n=20)[-1]


def judge(exchanges: Sequence[Exchange], start: float, end: float, busy: float) -> Bout:
    """Return the results of a round between two moments, in monotonic seconds.

    Raises:
        BenchmarkError: there were too few answers.
    """
    measured = [each for each in exchanges if start <= each.began < end]
    waits = [each.first_token for each in measured if each.first_token is not None]
    flaws = [each.flaw for each in exchanges if each.flaw]
    if len(waits) < FEWEST:
        raise BenchmarkError(f"{len(waits)} answers are too few to measure; {flaws}")
    tokens = sum(start <= at < end for each in exchanges for at in each.arrivals)
    later = [each for each in measured if each.turn > 1 and each.timings]
    prompts = sum(each.prompt_tokens for each in later) or 1
    return Bout(
        waits,
        tokens / (end - start),
        sum(each.timings.cache_n for each in later if each.timings) / prompts,
        sum(each.repeats for each in later) / prompts,
        len(exchanges),
        flaws,
        busy,
    )


# --- Reporting --------------------------------------------------------------------


def table(bouts: Mapping[str, Sequence[Bout]]) -> str:
    """Return a Markdown table: medians, and ratios of the same round."""
    return markdown(HEADINGS, [_row(name, bouts) for name in bouts])


def _row(name: str, bouts: Mapping[str, Sequence[Bout]]) -> list[str]:
    own = bouts[name]
    failed = sum(len(bout.flaws) for bout in own)
    return [
        name,
        *(
            f"{median(figures) * 1e3:,.0f} ms"
            for figures in (
                [median(bout.waits) for bout in own],
                [bout.p95 for bout in own],
                [max(bout.waits) for bout in own],
            )
        ),
        spread(p95_ratios(name, bouts), 2),
        f"{median(bout.rate for bout in own):,.0f}",
        spread(rate_ratios(name, bouts), 2),
        f"{median(bout.cached for bout in own):.0%}",
        f"{failed} of {sum(bout.asked for bout in own):,}",
    ]


def p95_ratios(name: str, bouts: Mapping[str, Sequence[Bout]]) -> list[float]:
    pairs = zip(bouts[name], bouts[BASE], strict=True)
    return [bout.p95 / base.p95 for bout, base in pairs]


def rate_ratios(name: str, bouts: Mapping[str, Sequence[Bout]]) -> list[float]:
    pairs = zip(bouts[name], bouts[BASE], strict=True)
    return [bout.rate / base.rate for bout, base in pairs]


def remarks(bouts: Mapping[str, Sequence[Bout]]) -> Iterator[str]:
    """Yield sentences about the goals and the conditions."""
    every = [bout for each in bouts.values() for bout in each]
    hubs = [name for name in bouts if name.startswith(HUB)]
    if hubs:
        best = min(hubs, key=lambda name: median(p95_ratios(name, bouts)))
        p95, rate = (
            median(ratios(best, bouts)) for ratios in (p95_ratios, rate_ratios)
        )
        yield (
            f"best p95: {best}, {p95:.2f} of {BASE}'s"
            f" ({_held(p95 <= P95_GOAL)} the goal of {P95_GOAL:g}),"
            f" with {rate:.2f} of its tokens/s"
            f" ({_held(rate >= RATE_GOAL)} the goal of {RATE_GOAL:g})"
        )
        warm = max(hubs, key=lambda name: median(b.cached for b in bouts[name]))
        cached = median(bout.cached for bout in bouts[warm])
        yield (
            f"best cached: {warm}, {cached:.1%}"
            f" ({_held(cached >= CACHED_GOAL)} the goal of {CACHED_GOAL:.0%});"
            f" {BASE}, by chance, {median(b.cached for b in bouts[BASE]):.1%}"
        )
    yield (
        "of the prompts of later turns,"
        f" {median(bout.repeated for bout in every):.1%} was there before"
    )
    yield (
        f"CPU time used of all cores: {median(bout.busy for bout in every):.0%}"
        f" (at most {max(bout.busy for bout in every):.0%})"
    )
    fewest = min(len(bout.waits) for bout in every)
    yield f"requests measured, of each contestant and round: at least {fewest}"
    flaws = sorted({flaw for bout in every for flaw in bout.flaws})
    if flaws:
        yield f"why requests failed: {'; '.join(flaws)}"


def _held(met: bool) -> str:
    return "meets" if met else "MISSES"
