"""The journal: one script against a model of it, in both engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gollama_proxy.state.facts import MOST_NEWS, Entry, Journal, StepResult
from gollama_proxy.state.store import Store
from tests.fakes.valkey import ENGINES, connected, running_store

pytestmark = pytest.mark.usefixtures("patient_hubs")

SECOND = 1_000_000


async def step(store: Store, journal: Journal, *entries: Entry) -> StepResult:
    [reply] = await store.pipe([journal.command(entries)], within=30)
    return journal.read(reply)


@pytest.mark.parametrize("engine", ENGINES)
async def test_rows_are_written_once_and_read_by_all(
    tmp_path: Path, engine: str
) -> None:
    async with running_store(tmp_path, engine) as server:
        async with connected(server.url) as store:
            one, other = (Journal("p", "j", 100) for _ in range(2))
            wrote = await step(
                store, one, Entry("a", "a0", "x"), Entry("b", "n", "y z")
            )
            assert wrote.renewed
            assert [each.written for each in wrote.results] == [True, True]
            read = await step(store, other)
            assert read.rows == wrote.rows
            assert [(row.key, row.value) for row in read.rows] == [
                ("a", "x"),
                ("b", "y z"),
            ]
            again = await step(store, other)
            assert (again.renewed, again.rows, again.more) == (False, [], False)
            again = await step(store, one, Entry("b", "n", "new"))
            assert not again.results[0].written
            assert again.results[0].value == "y z"


async def test_of_two_versions_the_greater_one_stays(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with connected(server.url) as store:
            journal = Journal("p", "j", 100)
            now = (await step(store, journal)).now
            steps = [
                ("v5", True),
                ("v5", False),
                ("v4", False),
                ("a3600000000", True),  # an hour old
                (f"v{now - 7200 * SECOND}", False),
                ("a1800000000", True),
                ("a2700000000", False),
                (f"a2700000000:{now + 5}", True),  # it knew a newer one
                ("a0", True),
                ("a0", True),
            ]
            for number, (when, written) in enumerate(steps):
                answer = await step(store, journal, Entry("a", when, str(number)))
                assert answer.results[0].written is written, (number, when)
                if not written:
                    assert answer.results[0].value == str(number - 1)[:1] or "0"


async def test_the_own_rows_are_not_returned(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with connected(server.url) as store:
            one, other = (Journal("p", "j", 100, skip=f"{each} ") for each in "ab")
            assert not (await step(store, one, Entry("a x", "a0", "1"))).rows
            answer = await step(store, other, Entry("b x", "a0", "2"))
            assert [row.key for row in answer.rows] == ["a x"]


async def test_there_are_bounds(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with connected(server.url) as store:
            journal, reader = Journal("p", "j", 600), Journal("p", "j", 600)
            many = [Entry(str(n), "a0", "") for n in range(601)]
            answer = await step(store, journal, *many)
            assert answer.results[-1].version == 0
            assert answer.results[-2].written
            first = await step(store, reader)
            assert (len(first.rows), first.more) == (MOST_NEWS, True)
            rest = await step(store, reader)
            assert (len(rest.rows), rest.more) == (100, False)


async def test_mortal_rows_end(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with connected(server.url) as store:
            empty = Journal("p", "empty", 100, life=0)
            everything = Journal("p", "all", 100, life=0, mortal="all", expiry=3600)
            for journal in empty, everything:
                rows = Entry("a", "a0", "x"), Entry("b", "a0", "")
                await step(store, journal, *rows)
                await asyncio.sleep(0)
                await step(store, journal)
            assert await server.ask("HKEYS", "p:empty") == [b"a"]
            assert await server.ask("ZRANGE", "p:empty:order", 0, -1) == [b"a"]
            assert await server.ask("HKEYS", "p:all") == []
            assert await server.ask("PTTL", "p:empty:life") == -1
            assert 0 < await server.ask("PTTL", "p:all:life") <= 3_600_000


async def test_a_store_that_is_empty_again_is_another_life(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with connected(server.url) as store:
            one, other = Journal("p", "j", 100), Journal("p", "j", 100)
            await step(store, one, Entry("a", "a0", "x"))
            await step(store, other)
            await server.ask("FLUSHALL")
            assert (await step(store, one, Entry("b", "a0", "y"))).renewed
            answer = await step(store, other)
            assert answer.renewed
            assert [row.key for row in answer.rows] == ["b"]


async def test_what_was_written_is_announced(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with connected(server.url) as store:
            news: asyncio.Queue[bytes] = asyncio.Queue()
            await store.listen("p:c", news.put_nowait)
            journal = Journal("p", "j", 100, channel="p:c")
            await step(store, journal)
            [reply] = await store.pipe(
                [journal.command([Entry("a", "a0", "x")], message="me")], within=30
            )
            journal.read(reply)
            assert await news.get() == b"me"
            assert news.empty()


@pytest.mark.parametrize("reply", [None, [], [b"id"], [b"id", b"x", b"0", 0, [], []]])
def test_a_reply_that_is_none_is_an_error(reply: object) -> None:
    journal = Journal("p", "j", 100)
    with pytest.raises(ValueError, match=r"."):
        journal.read(reply)  # type: ignore[arg-type]
    assert (journal.id, journal.cursor) == ("", 0)


# --- Against a model --------------------------------------------------------------

WHEN = st.one_of(
    st.integers(1, 20).map(lambda version: f"v{version}"),
    st.just("n"),
    st.just("a0"),
)
ENTRIES = st.lists(
    st.builds(Entry, st.sampled_from("abc"), WHEN, st.sampled_from(["", "x", "y"])),
    max_size=6,
)


class Model:
    """Rows as the script should keep them."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, str]] = {}

    def write(self, entry: Entry, version: int) -> bool:
        """Write a row, to which the script gave this version if it wrote it."""
        held, value = self.rows.get(entry.key, (0, ""))
        kind = entry.when[0]
        wins = not value if kind == "n" else kind == "a" or int(entry.when[1:]) > held
        if wins:
            self.rows[entry.key] = version, entry.value
        return wins


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(st.tuples(st.booleans(), ENTRIES), min_size=5, max_size=20))
def test_the_script_does_what_the_model_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, list[Entry]]]
) -> None:
    asyncio.run(_compare(tmp_path_factory.mktemp("s"), steps))


async def _compare(folder: Path, steps: list[tuple[bool, list[Entry]]]) -> None:
    async with running_store(folder) as server, connected(server.url) as store:
        model, copies = Model(), [dict[str, tuple[int, str]]() for _ in range(2)]
        journals = [Journal("p", "j", 100) for _ in range(2)]
        for which, entries in steps:
            answer = await step(store, journals[which], *entries)
            for entry, result in zip(entries, answer.results, strict=True):
                assert model.write(entry, result.version) is result.written
                assert result.written or (
                    (result.version, result.value) == model.rows[entry.key]
                )
            copies[which] |= {row.key: (row.version, row.value) for row in answer.rows}
        for copy, journal in zip(copies, journals, strict=True):
            answer = await step(store, journal)
            copy |= {row.key: (row.version, row.value) for row in answer.rows}
            assert copy == model.rows
