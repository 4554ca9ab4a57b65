"""Who has most waiting is known at any moment."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.scheduling.crowd import Crowd

STEPS = st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=60)


def test_nobody_has_most_of_nothing() -> None:
    crowd = Crowd()
    assert (crowd.largest, crowd.total, crowd.count("a")) == (None, 0, 0)


def test_of_several_with_as_many_it_is_the_one_that_has_them_for_longest() -> None:
    crowd = Crowd()
    for subject in "abab":
        crowd.add(subject)
    assert crowd.largest == "a"
    crowd.remove("a")
    crowd.add("a")
    assert crowd.largest == "b"
    assert repr(crowd) == "<Crowd {'b': 2, 'a': 2}>"


@given(STEPS)
def test_it_is_as_if_all_were_counted_each_time(steps: list[tuple[str, bool]]) -> None:
    crowd, counts = Crowd(), Counter[str]()
    for subject, comes in steps:
        if comes or not counts[subject]:
            crowd.add(subject)
            counts[subject] += 1
        else:
            crowd.remove(subject)
            counts[subject] -= 1
        assert crowd.total == counts.total()
        assert all(crowd.count(each) == counts[each] for each in "abcd")
        most = max(counts.values())
        if most:
            assert crowd.largest is not None
            assert counts[crowd.largest] == most
        else:
            assert crowd.largest is None
