"""The work of a real store for many hubs, as the benchmark measures it."""

from __future__ import annotations

from benchmarks.share import HUBS, running, show_size
from tests.fakes.valkey import program


async def test_many_hubs_fit_into_one_store() -> None:
    async with running(program("valkey")) as store:
        table = await show_size(store, 10)
        [key] = [each async for each in store.client.scan_iter("*:leases:*0.9:8080")]
        held = await store.client.zcard(key)
    rows = [line.split("|")[1].strip() for line in table.splitlines() if "|" in line]
    assert rows == ["each second", "---", "renewals", "overload"]
    # Never more than the slots; on a busy machine, some leases end before the count.
    assert HUBS <= held <= 1000
