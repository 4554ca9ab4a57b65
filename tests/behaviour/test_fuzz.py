"""The targets of `make fuzz`, without a fuzzer: their seeds, and damaged seeds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.cases import case
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS

ALL = [(name, seed) for name, seeds in SEEDS.items() for seed in seeds]


def test_every_seed_keeps_the_invariants() -> None:
    for name, seed in ALL:
        with case((name, seed)):
            TARGETS[name](seed)


def test_every_target_has_seeds() -> None:
    assert SEEDS.keys() == TARGETS.keys()


@st.composite
def broken(draw: st.DrawFn, name: str) -> bytes:
    """A seed with bytes cut out, put in, or another seed in its middle."""
    pool = st.sampled_from([seed[:3000] for seed in SEEDS[name]])
    data = draw(pool)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        to = draw(st.integers(at, min(len(data), at + 20)))
        data = data[:at] + draw(st.binary(max_size=4) | pool) + data[to:]
    return data


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None, database=None)
@given(draw=st.data())
def test_no_mutation_of_a_seed_breaks_an_invariant(
    name: str, draw: st.DataObject
) -> None:
    TARGETS[name](draw.draw(broken(name)))
