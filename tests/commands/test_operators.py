"""Operators see and change a running hub from a shell."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gollama_proxy.cli import main
from gollama_proxy.commands.client import AdminClient, CallError
from gollama_proxy.fleet.state import Hold, WorkerState
from gollama_proxy.state import ledger
from gollama_proxy.state.facts import Gap
from gollama_proxy.state.ledger import day_of
from gollama_proxy.telemetry.accesslog import Record
from tests.control.test_admin import complete
from tests.control.test_replies import join
from tests.fakes.agent import HandAgent
from tests.fakes.asks import CHAT, RARELY, STREAM
from tests.fakes.authority import Authority
from tests.fakes.client import Wire
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.process import bare
from tests.fakes.replies import chunk, json_reply, role, sse_head, token
from tests.fakes.script import close, send, stall, wait
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker

CALM = {"health__interval": RARELY}
ADMIN = {"scope": "admin"}
# All commands, with input that is right in itself.
COMMANDS = [
    ["workers"],
    ["workers", "show", "a"],
    ["workers", "add", "http://127.0.0.1:1"],
    ["workers", "set", "a", "--weight", "2"],
    ["workers", "remove", "a"],
    ["workers", "drain", "a"],
    ["workers", "undrain", "a"],
    ["workers", "pause", "a"],
    ["workers", "unpause", "a"],
    ["workers", "wake", "a"],
    ["workers", "reset-breaker", "a"],
    ["drain", "a"],
    ["undrain", "a"],
    ["dashboard"],
    ["top"],
    ["explain", "--model", "tiny"],
    ["requests"],
    ["requests", "--follow"],
    ["usage"],
    ["cancel", "a"],
    ["reload"],
    ["revoke", "jti:a"],
]


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.status == 0, self
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """Its one line of error."""
        assert self.out == "", self
        assert re.fullmatch(r"gollama-proxy: [^\n]+\n", self.err), self
        return self.err.removeprefix("gollama-proxy: ").rstrip()


Run = Callable[..., Awaitable[Done]]


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Keep the settings of the person who runs the tests out of them."""
    clean = bare()
    monkeypatch.setattr(os, "environ", clean)
    return clean


@pytest.fixture
def run(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command, on a hub if one is given, with a token of the scope admin."""

    async def run(*argv: str, hub: RunningHub | None = None, **claims: Any) -> Done:
        if hub is not None:
            environ["GOLLAMA_HUB"] = hub.url
            environ["GOLLAMA_TOKEN"] = hub.token("root", **ADMIN | claims)
        status = await asyncio.to_thread(main, argv)
        return Done(status, *capsys.readouterr())

    return run


def names(hub: RunningHub) -> list[str]:
    return [worker.name for worker in hub.hub.registry.workers]


# --- The dashboard ----------------------------------------------------------------


async def test_a_link_to_the_dashboard_is_printed(run: Run) -> None:
    async with running_hub() as hub:
        for scope in ("admin", "monitor"):
            done = await run("dashboard", hub=hub, scope=scope)
            match = re.fullmatch(r"(\S+)/#sign-in=([\w-]+)\n", done.out)
            assert match, done
            assert match[1] == hub.url
            assert done.err == "It signs in once, within 5 min.\n"
            answer = await hub.post("/dashboard/sign-in", {"code": match[2]}, None)
            assert answer.status == 200
        link = (await run("dashboard", "--json", hub=hub)).json()
        assert link["path"] == f"/#sign-in={link['code']}"


async def test_without_authentication_the_address_is_enough(run: Run) -> None:
    async with running_hub(auth__mode="off") as hub:
        done = await run("dashboard", hub=hub)
        assert done == Done(0, f"{hub.url}/\n", "")


# --- Workers ----------------------------------------------------------------------


async def test_the_workers_are_listed(run: Run) -> None:
    async with (
        ScriptedWorker("qwen", slots=2) as one,
        ScriptedWorker(up=False) as two,
        running_hub(one, two, **CALM) as hub,
    ):
        done = await run("workers", hub=hub)
        assert (done.status, done.err) == (0, "")
        titles, first, second = (line.split() for line in done.out.splitlines())
        assert titles[:3] == ["name", "url", "state"]
        assert first[1:3] == [one.url, "ready"]
        assert {"0/2", "qwen"} <= {*first}
        assert second[1:3] == [two.url, "down"]
        assert "connection refused" in done.out
        assert (await run("workers", "--json", hub=hub)).json().keys() == {"workers"}


async def test_a_hub_without_workers_names_the_next_command(run: Run) -> None:
    async with running_hub() as hub:
        done = await run("workers", hub=hub)
        assert done.out == "The hub has no workers: gollama-proxy workers add URL\n"


async def test_one_worker_is_shown(run: Run) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker, **CALM) as hub:
        [name] = names(hub)
        done = await run("workers", "show", name, hub=hub)
        assert re.search(rf"^name +{name}$", done.out, re.MULTILINE)
        assert re.search(r"^models +qwen$", done.out, re.MULTILINE)
        assert re.search(r"^breaker +closed \(never tripped\)$", done.out, re.MULTILINE)
        assert "machine" not in done.out
        shown = (await run("workers", "show", name, "--json", hub=hub)).json()
        assert shown["name"] == name


async def test_what_an_agent_reports_of_its_machine_is_shown(run: Run) -> None:
    gpu = {"name": "RTX 3060", "memory_gib": 12, "used_gib": 9.5}
    devices = [gpu | {"busy": 0.87, "celsius": 71.5}, {"name": "GT 710"}]
    report = {"host": "attic", "version": "2.0", "serving": True, "load": 0.25}
    async with ScriptedWorker() as worker, running_hub(**CALM) as hub:
        async with HandAgent(hub, worker.url).answering() as agent:
            await agent.put(report=report | {"devices": devices})
            done = await run("workers", "show", "desk", hub=hub)
            lines = [
                re.split("  +", line, maxsplit=1) for line in done.out.splitlines()
            ]
            assert [line for line in lines if line[0].startswith(("mach", "dev"))] == [
                ["machine", "attic, load 0.25, agent 2.0"],
                ["device 1", "RTX 3060, 9.5 of 12 GiB used, 87% busy, 71.5 °C"],
                ["device 2", "GT 710"],
            ]
            await agent.put(report={"serving": False})
            done = await run("workers", "show", "desk", hub=hub)
            assert re.search(
                r"^machine +its server does not answer the agent$",
                done.out,
                re.MULTILINE,
            )
            await agent.delete()


async def test_a_worker_is_added_and_removed(run: Run) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(**CALM) as hub:
        flags = ["--name", "new one", "--slots", "3", "--weight", "2.5"]
        flags += ["--vram-gib", "24", "--model", "qwen", "--model", "q*"]
        done = await run("workers", "add", worker.url, *flags, hub=hub)
        assert done == Done(0, f"added new one, {worker.url}\n", "")
        [added] = hub.hub.registry.workers
        assert (added.name, added.source) == ("new one", "admin")
        config = added.config
        assert (config.slots, config.weight, config.vram_gib) == (3, 2.5, 24)
        assert config.models == ("qwen", "q*")
        done = await run("workers", "remove", "new one", hub=hub)
        assert done == Done(0, "new one: removed\n", "")
        assert names(hub) == []


async def test_settings_of_a_worker_are_changed(run: Run) -> None:
    async with ScriptedWorker() as one, running_hub(one, **CALM) as hub:
        [worker] = hub.hub.registry.workers
        flags = ["--weight", "2.5", "--slots", "3"]
        done = await run("workers", "set", worker.name, *flags, hub=hub)
        assert done.out.startswith(f"{worker.name}: slots, weight set")
        [changed] = hub.hub.registry.workers
        assert (changed.config.weight, changed.config.slots) == (2.5, 3)
        done = await run("workers", "set", worker.name, "--weight", "0", hub=hub)
        assert done.status == 2
        assert "weight" in done.error
        assert changed.config.weight == 2.5


async def test_a_worker_is_held_back_and_released(run: Run) -> None:
    async with ScriptedWorker() as one, running_hub(one, **CALM) as hub:
        [worker] = hub.hub.registry.workers
        for argv, hold, state in [
            (["drain"], Hold.DRAINING, "ready, draining"),
            (["undrain"], Hold.NONE, "ready"),
            (["workers", "drain"], Hold.DRAINING, "ready, draining"),
            (["workers", "undrain"], Hold.NONE, "ready"),
            (["workers", "pause"], Hold.PAUSED, "ready, paused"),
            (["workers", "unpause"], Hold.NONE, "ready"),
            (["workers", "reset-breaker"], Hold.NONE, "ready"),
        ]:
            done = await run(*argv, worker.name, hub=hub)
            assert done.out.startswith(f"{worker.name}: {state}"), argv
            assert (done.status, worker.held) == (0, hold), argv
        changed = (await run("drain", worker.name, "--json", hub=hub)).json()
        assert changed["worker"]["hold"] == "draining"


async def test_a_machine_is_woken(run: Run) -> None:
    # The discard port: nothing has to listen there.
    settings = {"health__timeout": 0.2, "wake__broadcast": "127.0.0.1:9"}
    async with (
        ScriptedWorker() as machine,
        ScriptedWorker() as other,
        running_hub(other, **CALM, **settings) as hub,
    ):
        machine.hang_health = True
        flags = ["--name", "desktop", "--mac", "02:00:00:00:00:01", "--model", "qwen"]
        await run("workers", "add", machine.url, *flags, hub=hub)
        worker = hub.hub.registry.find("desktop")
        await until(lambda: worker.state is WorkerState.ASLEEP)
        done = await run("workers", "wake", "desktop", hub=hub)
        assert done == Done(0, "desktop: waking\n", "")
        done = await run("workers", "wake", names(hub)[0], hub=hub)
        assert done.status == 2
        assert "cannot be woken" in done.error


# --- Requests ---------------------------------------------------------------------


@contextlib.asynccontextmanager
async def busy(**settings: Any) -> AsyncIterator[tuple[RunningHub, Wire]]:
    """Run a hub whose one slot generates for the request `mine` until the end."""
    async with (
        ScriptedWorker("qwen", slots=1) as worker,
        running_hub(worker, **CALM, **settings) as hub,
    ):
        body = b"".join([role(), token("a"), token("b")])
        worker.default(send(sse_head() + chunk(body)), wait("never"))
        fields = [("X-Request-Id", "mine")]
        async with await hub.open(CHAT, STREAM, headers=fields) as wire:
            await wire.read_head()
            for _ in range(3):
                await wire.read_event()
            yield hub, wire


@contextlib.asynccontextmanager
async def waiting(hub: RunningHub, identity: str) -> AsyncIterator[Wire]:
    """Send a request that waits for the slot."""
    fields = [("X-Request-Id", identity)]
    before = hub.hub.queue.admission.waiting
    async with await hub.open(CHAT, {"messages": []}, headers=fields) as wire:
        await until(lambda: hub.hub.queue.admission.waiting == before + 1)
        yield wire


async def test_a_running_request_is_cancelled_by_its_id(run: Run) -> None:
    async with busy() as (hub, wire):
        assert (await run("cancel", "mine", hub=hub)).out == "mine: cancelled\n"
        assert b"request_cancelled" in (await wire.read_to_end()).raw
        done = await run("cancel", "mine", hub=hub)
        assert done.status == 1
        assert done.error == "No request with the id 'mine' runs or waits."


async def test_a_waiting_request_is_cancelled_by_its_id(run: Run) -> None:
    async with busy() as (hub, _), waiting(hub, "next") as wire:
        assert (await run("cancel", "next", hub=hub)).out == "next: cancelled\n"
        answer = await wire.read_response()
        assert answer.json()["error"]["code"] == "request_cancelled"


async def test_the_requests_that_have_ended_are_listed(run: Run) -> None:
    async with busy() as (hub, wire):
        await run("cancel", "mine", hub=hub)
        await wire.read_to_end()
        await run("cancel", "mine", hub=hub)
        done = await run("requests", hub=hub)
        titles, line = done.out.splitlines()
        assert titles.split()[:4] == ["ended", "status", "outcome", "took"]
        assert re.match(r"\d\d:\d\d:\d\d  200 +error ", line)
        assert re.search(r"  qwen +alice +mine  request_cancelled$", line)
        for flag, value in [("--subject", "alice"), ("--limit", "1000")]:
            found = (await run("requests", "--json", flag, value, hub=hub)).json()
            assert [each["id"] for each in found["requests"]] == ["mine"]
        found = (await run("requests", "--json", "--subject", "bob", hub=hub)).json()
        assert found["requests"] == []
        done = await run("requests", "--id", "mine", "--since", "1h", hub=hub)
        _, _, attempt, end = done.out.splitlines()
        assert re.fullmatch(r" +\+\d+\.\d{3} s  attempt +127\.0\.0\.1:\d+", attempt)
        assert re.search(r"  ended  .*  request_cancelled$", end)


# --- Usage ------------------------------------------------------------------------

NOON = day_of("2026-11-29") * 86_400 + 43_200.0


def use(hub: RunningHub, *subjects: str, model: str = "tiny") -> None:
    """Let subjects use something, on the 29th of November."""
    hub.hub.ledger.clock = Clock(NOON)
    for number, subject in enumerate(subjects, 1):
        hub.hub.ledger.add(
            Record(
                "1",
                "POST",
                subject=subject,
                model=model,
                prompt_tokens=1200 // number,
                tokens=30,
                cached_tokens=7,
                slot_seconds=90.0,
            ),
            failed=number == 2,
        )


async def test_usage_is_shown_as_a_table_with_a_total(run: Run) -> None:
    async with running_hub() as hub:
        use(hub, "alice", "bob", "Zoë\x1b[2J")
        done = await run("usage", hub=hub)
        assert re.sub(" *\n", "\n", re.sub("  +", "  ", done.out)) == (
            "subject  requests  errors  prompt tokens  completion tokens  "
            "cached tokens  slot time\n"
            "alice  1  0  1,200  30  7  90 s\n"
            "bob  1  1  600  30  7  90 s\n"
            "Zoë?[2J  1  0  400  30  7  90 s\n"
            "total  3  1  2,200  90  21  4 min\n"
        )
        assert len({len(line) for line in done.out.splitlines()}) == 1  # it is aligned
        done = await run("usage", "--by", "day,model", "--since", "2026-11-29", hub=hub)
        assert re.search(r"^2026-11-29 +tiny +3 +1 ", done.out, re.MULTILINE)
        done = await run("usage", "--until", "1d", hub=hub)
        assert done.out == (
            "Nothing was used from 2026-11-22 to 2026-11-28 (UTC); "
            "--since 90d looks further back.\n"
        )
        done = await run("usage", "--since", "300d", "--until", "2026-11-28", hub=hub)
        assert done.out.endswith(" to 2026-11-28 (UTC).\n")
        found = (await run("usage", "--json", hub=hub)).json()
        assert len(found["rows"]) == 3


async def test_usage_as_csv_has_no_formula(run: Run) -> None:
    async with running_hub() as hub:
        use(hub, '=cmd|"/c calc"!A1', "-1+1", "@x, y")
        done = await run("usage", "--csv", "--by", "subject,model", hub=hub)
        assert done.out == (
            "subject,model,requests,errors,prompt_tokens,completion_tokens,"
            "cached_tokens,slot_seconds\r\n"
            '"\'=cmd|""/c calc""!A1",tiny,1,0,1200,30,7,90.0\r\n'
            "'-1+1,tiny,1,1,600,30,7,90.0\r\n"
            '"\'@x, y",tiny,1,0,400,30,7,90.0\r\n'
        )
        assert done.err == ""


async def test_a_subject_sees_its_own_usage_and_limits(run: Run) -> None:
    async with running_hub() as hub:
        use(hub, "root", "bob")
        claims = {"scope": None, "tokens_per_day": 2000, "rpm": 5}
        done = await run("usage", "--own", hub=hub, **claims)
        assert [line.split()[0] for line in done.out.splitlines()] == [
            *("model", "tiny", "total", "rpm:", "tokens_per_day:")
        ]
        assert done.out.endswith(
            "rpm: 5 of 5 left\ntokens_per_day: 770 of 2,000 left, all of it in 12 h\n"
        )
        refused = await run("usage", hub=hub, scope=None)
        assert refused.status == 1
        assert "it needs the scope admin" in refused.error
        assert refused.error.endswith("With --own, it shows its own usage.")


async def test_usage_that_is_too_much_to_show_is_noted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MOST_ROWS", 1)
    async with running_hub() as hub:
        use(hub, "alice", "bob")
        done = await run("usage", "--csv", hub=hub)
        assert len(done.out.splitlines()) == 2
        assert done.err.startswith("note: not all rows are shown;")


async def test_usage_of_other_hubs_that_is_missing_is_noted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_hub() as hub:
        use(hub, "alice")
        gap = Gap(["gateway-b:8080"], NOON)
        monkeypatch.setattr(hub.hub.state, "gap", lambda: gap)
        done = await run("usage", hub=hub)
        assert "alice" in done.out
        note = r"note: what other hubs used since 2026-11-\S+ \S+ is missing: the store"
        assert re.search(note, done.err)
        assert "without gateway-b:8080" in done.err


async def test_later_requests_are_followed(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """Each is printed once, and the end of the hub ends it."""
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(send(json_reply({}, status=404)))
        loop, looks = asyncio.get_running_loop(), 0

        async def request(identity: str) -> None:
            fields = [("X-Request-Id", identity)]
            await hub.post(CHAT, {"messages": []}, headers=fields)

        def sleep(seconds: float) -> None:
            nonlocal looks
            looks += 1
            if looks > 3:
                raise KeyboardInterrupt
            asyncio.run_coroutine_threadsafe(request(f"r{looks}"), loop).result()

        await request("r0")
        monkeypatch.setattr("gollama_proxy.commands.operators.time.sleep", sleep)
        done = await run("requests", "--follow", "--json", "--limit", "2", hub=hub)
        assert done.status == 130
        found = [json.loads(line)["id"] for line in done.out.splitlines()]
        assert found == ["r0", "r1", "r2", "r3"]


# --- top --------------------------------------------------------------------------


async def test_top_without_a_terminal_prints_once(run: Run) -> None:
    async with busy() as (hub, _), waiting(hub, "next"):
        done = await run("top", hub=hub)
        assert done.status == 0
        assert done.out.startswith(f"{hub.url}   workers 1   running 1   waiting 1 ")
        for words in [
            ("name", "state", "running"),
            (names(hub)[0], "ready", "1/1"),
            ("waiting", "model", "subject"),
            ("next", "qwen", "alice"),
            ("request", "model", "worker"),
            ("mine", "qwen", names(hub)[0]),
        ]:
            assert re.search(r" +".join(words), done.out), words
        found = (await run("top", "--json", hub=hub)).json()
        assert {*found} == {"workers", "queue", "exchanges"}


class Screen:
    """A terminal in which a command runs."""

    def __init__(self, number: int) -> None:
        self.text = ""
        self._number = number
        asyncio.get_running_loop().add_reader(number, self._read)
        self._new = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Screen with {len(self.text)} characters>"

    @property
    def echoes(self) -> bool:
        """Whether it shows what is typed, as it does for a shell."""
        return bool(termios.tcgetattr(self._number)[3] & termios.ECHO)

    def resize(self, lines: int, columns: int) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._number, termios.TIOCSWINSZ, size)

    def type(self, keys: str) -> None:
        os.write(self._number, keys.encode())

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._number)
        os.close(self._number)

    async def until(self, pattern: str) -> None:
        """Wait for a text, and forget what came until then."""
        async with asyncio.timeout(DEADLINE):
            while (match := re.search(pattern, self.text)) is None:
                self._new.clear()
                await self._new.wait()
        self.text = self.text[match.end() :]

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: no process has it open any more
            self.text += os.read(self._number, 1 << 16).decode(errors="replace")
        self._new.set()


@contextlib.asynccontextmanager
async def top(
    environ: dict[str, str], url: str, token: str
) -> AsyncIterator[tuple[Screen, asyncio.subprocess.Process]]:
    ours, theirs = pty.openpty()
    screen = Screen(ours)
    screen.resize(24, 100)
    variables = {"TERM": "xterm", "GOLLAMA_HUB": url, "GOLLAMA_TOKEN": token}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gollama_proxy", "top"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environ | variables,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    try:
        yield screen, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(theirs)
        screen.close()


async def test_top_goes_on_until_q(environ: dict[str, str]) -> None:
    async with (
        busy() as (hub, _),
        top(environ, hub.url, hub.token(**ADMIN)) as (screen, process),
    ):
        await screen.until("mine")
        screen.resize(30, 120)
        process.send_signal(signal.SIGWINCH)
        await screen.until("mine")
        hub.hub.registry.hold(names(hub)[0], Hold.PAUSED)
        await screen.until("ready, paused")
        screen.type("xq")
        assert await asyncio.wait_for(process.wait(), DEADLINE) == 0
        await screen.until(re.escape("\x1b[?1049l"))  # back from the whole screen


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)]
)
async def test_top_leaves_the_terminal_as_it_was(
    number: signal.Signals, status: int, environ: dict[str, str]
) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **CALM) as hub,
        top(environ, hub.url, hub.token(**ADMIN)) as (screen, process),
    ):
        await screen.until("ready")
        assert not screen.echoes
        process.send_signal(number)
        assert await asyncio.wait_for(process.wait(), DEADLINE) == status
        assert screen.echoes


async def test_top_goes_on_while_the_hub_is_away(environ: dict[str, str]) -> None:
    async with ScriptedWorker() as hub:
        for name in ("workers", "queue", "exchanges"):
            hub.on(f"/admin/{name}", send(json_reply({name: []})))
        async with top(environ, hub.url, "x") as (screen, process):
            await screen.until("workers 0")
            await hub.down()
            await screen.until("no hub answers at .*: connection refused")
            await hub.up()
            screen.text = ""
            await screen.until("tokens/s 0 *\r\n +\r\n")  # and no error below
            screen.type("q")
            assert await asyncio.wait_for(process.wait(), DEADLINE) == 0


# --- Tokens -----------------------------------------------------------------------


async def test_a_token_may_be_in_a_file(
    environ: dict[str, str], run: Run, tmp_path: Path
) -> None:
    async with running_hub() as hub:
        environ["GOLLAMA_HUB"] = hub.url
        file = tmp_path / "token"
        file.write_text(hub.token(**ADMIN) + "\n")
        file.chmod(0o600)
        argv = ["workers", "--json", "--token-file", str(file)]
        assert (await run(*argv)).json() == {"workers": []}
        file.chmod(0o644)
        done = await run(*argv)
        assert done.status == 2
        assert "must be for its owner only" in done.error


async def test_a_flag_wins_over_a_variable(environ: dict[str, str], run: Run) -> None:
    async with running_hub() as hub:
        environ |= {"GOLLAMA_HUB": "http://127.0.0.1:1", "GOLLAMA_TOKEN": "x"}
        flags = ["--hub", hub.url, "--token", hub.token(**ADMIN)]
        assert (await run("workers", "--json", *flags)).json() == {"workers": []}
        # In front of the action as well.
        done = await run("workers", *flags, "show", "a")
        assert "No worker is named 'a'" in done.error


@pytest.mark.parametrize("argv", COMMANDS)
async def test_a_token_of_a_client_is_not_enough(argv: list[str], run: Run) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        before = names(hub)
        done = await run(*argv, hub=hub, scope="metrics")
        assert done.status == 1
        assert "needs the scope admin" in done.error
        assert names(hub) == before
        assert hub.hub.registry.workers[0].held is Hold.NONE


async def test_without_a_valid_token_it_is_refused(
    environ: dict[str, str], run: Run
) -> None:
    async with running_hub() as hub:
        environ["GOLLAMA_HUB"] = hub.url
        done = await run("workers")
        assert done.status == 1
        assert done.error.endswith("with --token-file or in GOLLAMA_TOKEN")
        environ["GOLLAMA_TOKEN"] = "not.one.secret"
        done = await run("workers")
        assert done.status == 1
        assert done.error.startswith(f"the hub at {hub.url} refuses: ")
        assert "secret" not in done.error


async def test_no_token_is_needed_where_there_is_no_authentication(run: Run) -> None:
    async with running_hub(auth__mode="off") as hub:
        argv = ["workers", "--json", "--hub", hub.url]
        assert (await run(*argv)).json() == {"workers": []}


# --- No hub -----------------------------------------------------------------------


@pytest.mark.parametrize("argv", COMMANDS)
async def test_no_hub_is_one_line(argv: list[str], run: Run) -> None:
    async with ScriptedWorker(up=False) as gone:
        done = await run(*argv, "--hub", gone.url)
        assert done.status == 1
        assert done.error == f"no hub answers at {gone.url}: connection refused"


async def test_of_several_hubs_the_first_that_answers_is_used(
    environ: dict[str, str], run: Run
) -> None:
    async with ScriptedWorker(up=False) as gone, running_hub() as hub:
        environ["GOLLAMA_HUB"] = f"{gone.url}, {hub.url}"
        environ["GOLLAMA_TOKEN"] = hub.token(**ADMIN)
        assert (await run("workers", "--json")).json() == {"workers": []}
        done = await run("workers", "--hub", f"{gone.url} {gone.url}")
        assert done.status == 1
        where = f"{gone.url}: connection refused"
        assert done.error == f"no hub answers at {where}; {where}"


async def test_a_display_goes_on_with_another_hub() -> None:
    async with ScriptedWorker(slots=1) as one, ScriptedWorker() as two:
        for hub in (one, two):
            hub.on("/admin/workers", send(json_reply({"workers": [hub.name]})))
        client = AdminClient(one.url, others=[two.url])

        async def seen() -> object:
            return (await asyncio.to_thread(client.call, "GET", "workers"))["workers"]

        assert await seen() == [one.name]
        await one.down()
        with pytest.raises(CallError, match=f"no hub answers at {one.url}"):
            await seen()  # it may have been carried out, so it is not repeated
        assert await seen() == [two.name]
        client.close()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ((send(json_reply({}, status=404)),), "is not a hub with an admin API"),
        ((send(json_reply([])),), "is not a hub with an admin API: it answered 200"),
        ((send(b"220 mail.lan ESMTP\r\n"), close()), "the answer is not HTTP"),
        ((close(),), "it closed the connection"),
        ((send(json_reply({"workers": [{}]})),), "is of another version"),
    ],
)
async def test_a_server_of_another_kind(
    script: tuple[Any, ...], reason: str, run: Run
) -> None:
    async with ScriptedWorker() as other:
        other.on("/admin/workers", *script)
        done = await run("workers", "--hub", other.url)
        assert done.status == 1
        assert other.url in done.error
        assert reason in done.error


async def test_a_hub_that_hangs(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr("gollama_proxy.commands.client.PATIENCE", 0.1)
    async with ScriptedWorker() as other:
        other.on("/admin/workers", stall())
        done = await run("workers", "--hub", other.url)
        assert done.status == 1
        assert "no answer within 0.1 s" in done.error


async def test_text_from_a_hub_cannot_control_the_terminal(run: Run) -> None:
    async with ScriptedWorker() as other:
        error = {"error": {"message": "a\x1b[2J\nb", "code": "x"}}
        other.on("/admin/workers/a", send(json_reply(error, status=409)))
        done = await run("workers", "show", "a", "--hub", other.url)
        assert done.error == "a?[2J b"


async def test_a_hub_with_tls(
    authority: Authority, environ: dict[str, str], tmp_path: Path, run: Run
) -> None:
    settings = authority.issue().settings
    async with running_hub(trust=authority.client(), **settings) as hub:
        done = await run("workers", hub=hub)
        assert done.status == 1
        assert "TLS: certificate not accepted" in done.error
        flag = ["--ca-file", authority.file]
        assert (await run("workers", "--json", *flag, hub=hub)).json() is not None
        done = await run("workers", "--hub", hub.url.replace("https", "http"))
        assert done.status == 1
        # OpenSSL reads the variable itself.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gollama_proxy", "workers", "--json"),
            stdout=asyncio.subprocess.PIPE,
            env=environ | {"SSL_CERT_FILE": authority.file},
            cwd=Path(__file__).parents[2],
        )
        output, _ = await process.communicate()
        assert json.loads(output) == {"workers": []}


# --- Wrong input ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["workers", "--hub", "gateway:8000"], "--hub = 'gateway:8000': must be a URL"),
        (["workers", "--hub", "http://u:pw@h"], "--hub = 'http://...@h': must be"),
        (["workers", "--hub", "http://h/?a"], "must be a URL without a password"),
        (["workers", "--hub", "http://h:99999"], "the port must be a number in the"),
        (["workers", "--tokn", "x"], "--tokn: not a flag of this command"),
        (["workers", "--hub", "http://::1:80"], "an IPv6 address in brackets"),
        (["workers", "--hub", "http://[::1"], "malformed: Invalid IPv6 URL"),
        (["workers", "--token", ""], "--token: holds no token"),
        (["workers", "--token", "a b"], "--token: holds no token"),
        (["workers", "--token", "a", "--token-file", "b"], "not allowed with"),
        (["workers", "--token-file", "/nowhere"], "cannot be read: No such file"),
        (["workers", "--ca-file", "x"], "is for an https hub only"),
        (["workers", "--ca-file", "/nowhere", "--hub", "https://h"], "cannot be read"),
        (["workers", "--ca-file", __file__, "--hub", "https://h"], "no PEM cert"),
        (["workers", "stop"], "'stop' (choose from 'show', 'add'"),
        (["workers", "show"], "required: NAME"),
        (["workers", "show", ""], "'': must be a name or an id"),
        (["workers", "remove", ".."], "'..': must be a name or an id"),
        (["workers", "add"], "required: URL"),
        (["workers", "add", "gpu"], "url = 'gpu'"),
        (["workers", "add", "http://h", "--slots", "x"], "--slots = 'x': must be a"),
        (["workers", "add", "http://h", "--slots", "0"], "slots = 0"),
        (["workers", "add", "http://h", "--weight", "x"], "--weight = 'x': must be"),
        (["workers", "add", "http://h", "--weight", "-1"], "weight = -1"),
        (["workers", "add", "http://h", "--weight", "nan"], "--weight = 'nan'"),
        (["workers", "add", "http://h", "--vram-gib", "x"], "--vram-gib = 'x'"),
        (["workers", "add", "http://h", "--mac", "x"], "mac = 'x'"),
        (["workers", "add", "http://h", "--api-key-env", "HOME"], "api_key_env"),
        (["workers", "set", "a"], "nothing to set: give a flag"),
        (["workers", "set", "a", "--slots", "1.5"], "--slots = '1.5': must be"),
        (["drain"], "required: NAME"),
        (["undrain", "."], "'.': must be a name or an id"),
        (["top", "x"], "x: not an argument of this command"),
        (["explain"], "--model: must be given, or a request in --file"),
        (["explain", "--file", "/nowhere"], "cannot be read: No such file"),
        (["explain", "--file", __file__], "must be JSON"),
        (["requests", "--limit", "0"], "--limit = '0': must be a whole number"),
        (["requests", "--since", "1y"], "--since = '1y': must be a time such as 45s"),
        (["requests", "--limit", "1001"], "--limit = '1001': must be"),
        (["usage", "--since", "soon"], "since = 'soon': must be 7d or 12h ago"),
        (["usage", "--by", "worker"], "by = 'worker': must be some of subject"),
        (["usage", "--csv", "--json"], "--csv: cannot be given together with --json"),
        (["cancel"], "required: ID"),
        (["cancel", ""], "'': must be a name or an id"),
        (["reload", "now"], "now: not an argument of this command"),
        (["revoke", "alice"], "'alice': must be jti: and the id"),
        (["revoke", "sub:"], "'sub:': must be jti: and the id"),
        (["revoke", "jti:a", "--cancel"], "--cancel: is for a subject"),
        (["revoke", "jti:\n"], "must be jti: and the id"),
    ],
)
async def test_wrong_input_changes_nothing(
    argv: list[str], text: str, run: Run
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        before = names(hub)
        done = await run(*argv, hub=hub)
        assert done.status == 2
        assert text in done.error
        assert names(hub) == before
        assert hub.hub.registry.workers[0].held is Hold.NONE


@pytest.mark.parametrize(
    "argv",
    [argv for argv in COMMANDS if "a" in argv],
)
async def test_what_does_not_exist_is_one_line(argv: list[str], run: Run) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        done = await run(*argv, hub=hub)
        assert done.status == 1
        assert "'a'" in done.error


async def test_a_name_that_is_taken_is_refused(run: Run) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        done = await run("workers", "add", worker.url, hub=hub)
        assert done.status == 1
        assert names(hub)[0] in done.error
        assert len(names(hub)) == 1


# --- What only a hub can decide ---------------------------------------------------


async def test_a_token_is_revoked(run: Run) -> None:
    async with running_hub() as hub:
        alice = hub.token(jti="x1")
        assert (await hub.get("/v1/models", alice)).status == 200
        done = await run("revoke", "jti:x1", hub=hub)
        assert done.out == "revoked jti:x1, until the hub restarts\n"
        assert (await hub.get("/v1/models", alice)).status == 401
        assert (await run("revoke", "jti:x2", "--json", hub=hub)).json()[
            "value"
        ] == "x2"


async def test_a_subject_is_revoked(run: Run) -> None:
    async with busy() as (hub, wire):
        done = await run("revoke", "sub:alice", hub=hub)
        assert done.out.splitlines()[1:] == ["still running: mine"]
        assert (await hub.get("/v1/models")).status == 401
        done = await run("revoke", "sub:alice", "--cancel", hub=hub)
        assert done.out.splitlines()[1:] == ["cancelled: mine"]
        assert not (await wire.read_to_end()).clean


async def test_a_request_is_explained(run: Run, tmp_path: Path) -> None:
    async with (
        ScriptedWorker("qwen") as one,
        ScriptedWorker("llama") as two,
        running_hub(one, two, **CALM) as hub,
    ):
        first, second = names(hub)
        done = await run("explain", "--model", "qwen", hub=hub)
        assert re.search(rf"^worker +{first}$", done.out, re.MULTILINE)
        assert re.search(rf"^{second} +\S", done.out, re.MULTILINE)
        file = tmp_path / "request.json"
        file.write_text('{"model": "llama", "messages": []}')
        argv = ["explain", "--file", str(file), "--json"]
        answer = (await run(*argv, hub=hub)).json()
        assert (answer["model"], answer["worker"]) == ("llama", second)
        answer = (await run(*argv, "--model", "qwen", hub=hub)).json()
        assert answer["worker"] == first
        assert one.requests == two.requests == []


async def test_settings_are_read_again(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[routing]\n[[workers]]\nurl = 'http://127.0.0.1:1'\n")
    async with running_hub(file=file, ready=False, **CALM) as hub:
        assert (await run("reload", hub=hub)).out == "nothing has changed\n"
        text = "[[workers]]\nname = 'late'\nurl = 'http://127.0.0.1:2'\n"
        file.write_text(file.read_text() + text)
        done = await run("reload", hub=hub)
        assert done.out == "changed: worker late added\n"
        assert "late" in names(hub)
        file.write_text("[server]\nhost = '127.0.0.2'\n" + file.read_text())
        done = await run("reload", hub=hub)
        assert done.out.startswith("at the next start: server.host")
        file.write_text("nonsense")
        done = await run("reload", hub=hub)
        assert done.status == 2
        assert "nothing has changed" in done.error
        assert str(file) in done.error
        assert "late" in names(hub)


# --- Output -----------------------------------------------------------------------


async def list_workers(
    hub: RunningHub, environ: dict[str, str], output: int | None
) -> tuple[int | None, bytes]:
    """Run `workers` with a descriptor for its output; return its status and errors.

    Without one, the output is closed.
    """
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'exec "$@" {">&-" if output is None else ""}', "sh"),
        *(sys.executable, "-m", "gollama_proxy", "workers"),
        stdout=output,
        stderr=asyncio.subprocess.PIPE,
        env=environ | {"GOLLAMA_HUB": hub.url, "GOLLAMA_TOKEN": hub.token(**ADMIN)},
        cwd=Path(__file__).parents[2],
    )
    if output is not None:
        os.close(output)
    _, errors = await process.communicate()
    return process.returncode, errors


async def test_output_that_cannot_be_written_is_an_error(
    environ: dict[str, str],
) -> None:
    async with running_hub() as hub:
        full = os.open("/dev/full", os.O_WRONLY)
        status, errors = await list_workers(hub, environ, full)
        text = "gollama-proxy: the output cannot be written: No space left on device\n"
        assert (status, errors.decode()) == (1, text)


async def test_closed_output_is_an_error(environ: dict[str, str]) -> None:
    async with running_hub() as hub:
        status, errors = await list_workers(hub, environ, None)
        text = "gollama-proxy: the output cannot be written: Bad file descriptor\n"
        assert (status, errors.decode()) == (1, text)


async def test_a_reader_that_has_seen_enough_is_no_error(
    environ: dict[str, str],
) -> None:
    async with running_hub() as hub:
        reader, writer = os.pipe()
        os.close(reader)
        status, errors = await list_workers(hub, environ, writer)
        assert (status, errors) == (0, b"")


# --- Several hubs -----------------------------------------------------------------


async def test_the_hub_of_a_request_is_shown(run: Run) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **CALM) as one,
        running_hub(worker, **CALM) as two,
    ):
        join(one, b=two)
        worker.default(*complete())
        headers = [("X-Request-Id", "abc")]
        assert (await two.post(CHAT, STREAM, headers=headers)).status == 200
        await until(lambda: two.hub.recent.count)
        done = await run("requests", "--id", "abc", hub=one)
        assert "  abc at b" in done.out
        assert "hubs" in (await run("workers", hub=one)).out
        shown = await run("workers", "show", names(one)[0], hub=one)
        assert "\nhubs " in shown.out
        explained = await run("explain", "--model", "tiny", hub=one)
        assert re.search(r"^hub +a$", explained.out, re.MULTILINE)
        done = await run("top", hub=one)
        assert "hubs   a: 0 running   b: 0 running" in done.out


async def test_hubs_that_did_not_answer_are_noted(run: Run) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        join(hub, "gateway-b")
        note = "note: this is without gateway-b, which did not answer\n"
        for argv in (["workers"], ["requests"], ["reload"], ["workers", "--json"]):
            done = await run(*argv, hub=hub)
            assert (done.status, done.err) == (0, note), argv
        done = await run("top", hub=hub)
        assert "without gateway-b" in done.out
        assert done.err == ""
        done = await run("cancel", "x", hub=hub)
        assert "gateway-b did not answer" in done.error
