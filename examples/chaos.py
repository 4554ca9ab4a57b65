"""Kill workers under load, and see what the clients of a hub notice.

    python examples/chaos.py
    python examples/chaos.py --every 10 --signal kill --signal stop --down 40

This starts real llama-servers and a hub, and sends requests from many clients at once.
Every few seconds a worker is hit by a signal, and later restarted on the same port.
Answers are streamed at temperature 0, so that each has one expected text: what a worker
generated before the first signal.  The hub reads its settings from GOLLAMA_… variables,
as always.

Exit status: 0 if every request was answered completely and with the expected text (for
a rescued one, at least up to where it broke off), 1 if not, 2 for a wrong flag.  Ctrl-C
ends the run and shows the results so far.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
from chaos_pool import SIGNALS, Pool, first_of
from chaos_report import Answer, Outcome, Tally, difference
from rich.console import Console
from rich.live import Live

from gollama_proxy.children import ChildError
from gollama_proxy.cli import run_loop
from gollama_proxy.commands import demo
from gollama_proxy.config.values import ConfigError
from gollama_proxy.tasks import Signals

PROMPTS = (
    "Tell me three things about the sea.",
    "Why is the sky blue?",
    "Write a haiku about rivers.",
    "Explain rain to a child.",
    "What is a good breakfast?",
    "Name five animals of the forest.",
    "How does a bicycle work?",
    "Tell me a short story about a fox.",
    "What do bees do in winter?",
    "Give me a recipe for pancakes.",
    "Why do we sleep?",
    "Describe an old map.",
    "What is chess?",
    "How are bridges built?",
    "Tell me about the moon.",
    "Why are leaves green?",
)
PROMPT_TOKENS = 256  # for the longest of them, in the template of any model
# Longer than any time limit of the hub by default, so that its own errors are counted.
PATIENCE = aiohttp.ClientTimeout(total=None, sock_read=400)
# Seconds after a refusal before the client's next request, as a person would wait.
BREATH = 1.0
DAY = 86_400

Show = Callable[[str], None]


def main() -> int:
    """Read the flags, run, and return the exit status."""
    args = _parse()
    try:
        return run_loop(lambda signals: run(args, signals))
    except ConfigError as exc:
        print("chaos:", exc, file=sys.stderr)
        return 2
    except ChildError as exc:
        print("chaos:", exc, file=sys.stderr)
        return exc.status


async def run(args: argparse.Namespace, signals: Signals) -> int:
    """Run to the end, or until a signal; then show the results."""
    binary, weights = demo.find_files(args.llama_server, args.model)
    folder = Path(tempfile.mkdtemp(prefix="gollama-chaos-"))
    slots, context = args.slots, PROMPT_TOKENS + args.tokens
    start = partial(
        demo.start_server, binary, weights, folder=folder, slots=slots, context=context
    )
    tally = Tally(args.requests)
    console = Console(highlight=False, markup=False, emoji=False)
    unscathed = False
    try:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=PATIENCE
        ) as session:
            pool = Pool(session, args.workers, start, folder)
            clients = Clients(session, demo.model_name(weights), args.tokens)
            happening = _happen(args, pool, clients, tally, console)
            await first_of(happening, signals.asked.wait())
        unscathed = tally.ended == tally.count(Outcome.COMPLETE)
    finally:
        if tally.ended or tally.hits:
            console.print(tally.tables())
        if unscathed:
            shutil.rmtree(folder)
        else:
            console.print(f"What the hub and the workers wrote: {folder}")
    return 0 if tally.perfect else 1


async def _happen(
    args: argparse.Namespace,
    pool: Pool,
    clients: Clients,
    tally: Tally,
    console: Console,
) -> None:
    began = time.monotonic()

    def stamp(text: str) -> str:
        return f"{time.monotonic() - began:6.1f} s  {text}"

    def show(text: str) -> None:
        console.print(stamp(text), soft_wrap=True)

    async with pool.running():
        show("workers: " + ", ".join(worker.url for worker in pool.workers))
        show(f"hub: {pool.url}")
        await first_of(clients.learn(pool), pool.watch())
        show(f"{len(clients.texts)} of {len(PROMPTS)} prompts have one expected text")
        with Live(
            console=console,
            get_renderable=lambda: stamp(tally.line()),
            auto_refresh=False,
            transient=True,
        ) as live:
            await first_of(
                clients.load(args, pool.url, tally, show),
                _haunt(args, pool, tally, show),
                pool.watch(live.refresh),
            )


async def _haunt(
    args: argparse.Namespace, pool: Pool, tally: Tally, show: Show
) -> None:
    """Hit a worker every few seconds."""
    rng = random.Random(f"hits {args.seed}")
    async with asyncio.TaskGroup() as group:
        while True:
            await (asyncio.sleep(args.every) if args.every else asyncio.Event().wait())
            victim = pool.choose_victim(rng)
            how = rng.choice(args.signal)
            if victim is None:
                show("no worker to hit: the others are not back yet")
                continue
            show(f"SIG{how.upper()} to {victim.url}")
            tally.hits[how] += 1
            group.create_task(pool.hit(victim, how, args.down), name=victim.url)


# --- The clients ------------------------------------------------------------------


class Clients:
    """Request streamed answers, and compare them with the expected texts."""

    def __init__(self, session: aiohttp.ClientSession, model: str, tokens: int) -> None:
        self.texts: dict[str, str] = {}  # the expected one for each prompt
        self._session = session
        self._fields = {
            "model": model,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            # With a cached prompt the batches differ, and with them the rounding, which
            # can decide between two words.
            "cache_prompt": False,
        }

    def __repr__(self) -> str:
        return f"<Clients with {len(self.texts)} prompts>"

    async def learn(self, pool: Pool) -> None:
        """Learn the expected texts from the workers themselves.

        One worker gets each prompt alone, another one gets all at once.  A prompt with
        different texts, due to rounding, is not used.
        """
        first, last = pool.workers[0].url, pool.workers[-1].url

        async def ask_alone() -> list[Answer]:
            return [await self._ask(first, prompt, close=True) for prompt in PROMPTS]

        asking = (self._ask(last, prompt, close=True) for prompt in PROMPTS)
        alone, among = await asyncio.gather(ask_alone(), asyncio.gather(*asking))
        for prompt, one, other in zip(PROMPTS, alone, among, strict=True):
            outcome, detail = one.judge(one.text)
            if outcome is not Outcome.COMPLETE:
                problem = f"{outcome.value} {detail}"
                raise ChildError(f"{first} is not usable: {problem}", 1)
            if one.text == other.text:
                self.texts[prompt] = one.text
        if not self.texts:
            raise ChildError("no prompt has the same text twice at temperature 0", 1)

    async def load(
        self, args: argparse.Namespace, url: str, tally: Tally, show: Show
    ) -> None:
        """Send all requests to the hub, from many clients at once."""
        rng = random.Random(f"prompts {args.seed}")
        prompts = (rng.choice(list(self.texts)) for _ in range(args.requests))
        async with asyncio.TaskGroup() as group:
            for number in range(args.clients):
                client = self._work(prompts, url, tally, show)
                group.create_task(client, name=f"client {number}")

    async def _work(
        self, prompts: Iterable[str], url: str, tally: Tally, show: Show
    ) -> None:
        for prompt in prompts:
            answer, expected = await self._ask(url, prompt), self.texts[prompt]
            verdict = answer.judge(expected)
            tally.add(answer, verdict)
            if verdict.outcome is Outcome.DIFFERENT:
                show(difference(expected, answer.text))
            if verdict.outcome is Outcome.REFUSED:
                await asyncio.sleep(BREATH)

    async def _ask(self, url: str, prompt: str, *, close: bool = False) -> Answer:
        message = {"role": "user", "content": prompt}
        asking = self._session.post(
            f"{url}/v1/chat/completions",
            json={**self._fields, "messages": [message]},
            # llama-server closes after every stream, but announces it only on request.
            headers={"Connection": "close"} if close else None,
        )
        answer = Answer(time.monotonic())
        try:
            async with asking as response:
                answer.attempts = int(response.headers.get("X-Gollama-Attempts", 1))
                if response.status != 200:
                    answer.refuse(response.status, await response.read())
                    return answer
                answer.begin()
                async for piece in response.content.iter_any():
                    answer.feed(piece, time.monotonic())
        except (aiohttp.ClientError, OSError) as exc:  # including timeouts
            answer.lose(type(exc).__name__)
        return answer


# --- Flags ------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Report a wrong flag on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"chaos: {message}\n")


def _parse() -> argparse.Namespace:
    parser = _Parser(
        prog="chaos",
        description="Kill workers under load, and see what the hub's clients notice.",
        epilog="The hub reads its settings from GOLLAMA_… variables, as always.",
        allow_abbrev=False,
    )

    def add(flag: str, kind: Callable[[str], object], default: Any, help: str) -> None:
        text = help if default is None else f"{help} (%(default)s)"
        metavar = {int: "N", float: "S"}.get(type(default), "PATH")
        parser.add_argument(
            flag, type=kind, default=default, metavar=metavar, help=text
        )

    add("--workers", _whole(1, 64), 3, "llama-servers to start")
    add("--slots", _whole(1, 64), 4, "answers that each of them generates at once")
    # One llama-server may have to serve all; more would wait for its HTTP threads.
    add("--clients", _whole(1, 48), 8, "requests at once")
    add("--requests", _whole(1, 10_000_000), 500, "requests in all")
    add("--tokens", _whole(1, 100_000), 64, "longest answer")
    add("--every", _seconds, 5.0, "seconds between two hits; 0 is never")
    add("--down", _seconds, 1.0, "seconds until a worker is restarted or resumed")
    add("--seed", int, 1, "seed for the choice of workers and prompts")
    add("--llama-server", str, None, "program to start; default: the installed one")
    add("--model", str, None, "GGUF file; default: the small installed one")
    parser.add_argument(
        "--signal",
        action="append",
        choices=SIGNALS,
        help="signal for a worker (repeatable; kill); stop: SIGSTOP, later SIGCONT",
    )
    args = parser.parse_args()
    args.signal = args.signal or ["kill"]
    return args


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if text.isdecimal() and len(text) < 10 and low <= int(text) <= high:
            return int(text)
        allowed = f"must be a whole number from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r}: {allowed}")

    return read


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if 0 <= seconds <= DAY:
        return seconds
    raise argparse.ArgumentTypeError(f"{text!r}: must be seconds from 0 to {DAY}")


if __name__ == "__main__":
    sys.exit(main())
