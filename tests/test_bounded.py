"""A table of names drops the oldest, and never has more than its limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.bounded import MOST, BoundedDict


def test_the_oldest_entry_is_dropped() -> None:
    table = BoundedDict[str, int](3)
    for number, name in enumerate("abcd"):
        table[name] = number
    assert dict(table) == {"b": 1, "c": 2, "d": 3}


def test_an_entry_can_change_without_another_being_dropped() -> None:
    table = BoundedDict[str, int](2)
    table["a"] = table["b"] = 1
    table["a"] = 2
    assert dict(table) == {"a": 2, "b": 1}


def test_the_default_limit() -> None:
    assert BoundedDict[str, int]().most == MOST


@given(keys=st.lists(st.integers(0, 20)), most=st.integers(1, 8))
def test_it_is_a_dict_of_the_last_entries(keys: list[int], most: int) -> None:
    table, came = BoundedDict[int, int](most), dict[int, int]()
    for place, key in enumerate(keys):
        table[key] = place
        if key not in came:
            came[key] = place
            while len(came) > most:
                del came[next(iter(came))]
        assert table.keys() == came.keys()
        assert table[key] == place


def test_its_repr_shows_no_names() -> None:
    table = BoundedDict[str, int](3)
    table["secret"] = 1
    assert repr(table) == "<BoundedDict 1 of 3>"
