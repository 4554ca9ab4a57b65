"""A table of names forgets the oldest, and never has more than it may."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.bounded import MOST, Remembered


def test_the_oldest_is_forgotten() -> None:
    table = Remembered[str, int](3)
    for number, name in enumerate("abcd"):
        table[name] = number
    assert dict(table) == {"b": 1, "c": 2, "d": 3}


def test_what_is_known_can_change_without_anybody_being_forgotten() -> None:
    table = Remembered[str, int](2)
    table["a"] = table["b"] = 1
    table["a"] = 2
    assert dict(table) == {"a": 2, "b": 1}


def test_there_is_room_for_all_that_an_honest_hub_serves() -> None:
    assert Remembered[str, int]().most == MOST


@given(keys=st.lists(st.integers(0, 20)), most=st.integers(1, 8))
def test_it_is_a_dict_of_the_last_ones(keys: list[int], most: int) -> None:
    table, came = Remembered[int, int](most), dict[int, int]()
    for place, key in enumerate(keys):
        table[key] = place
        if key not in came:
            came[key] = place
            while len(came) > most:
                del came[next(iter(came))]
        assert table.keys() == came.keys()
        assert table[key] == place
