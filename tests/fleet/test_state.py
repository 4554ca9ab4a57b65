"""What a worker calls a model in its answers, and when that is another model."""

from __future__ import annotations

import pytest

from gollama_proxy.fleet.state import MOST_NAMES, AnswerNames


def test_the_name_that_was_asked_for_is_known() -> None:
    assert AnswerNames().knows("tiny", "tiny")
    assert not AnswerNames().knows("tiny", "other")


def test_what_was_accepted_is_known_for_that_model() -> None:
    names = AnswerNames()
    assert names.accept("tiny", "/tiny.gguf", {"tiny"})
    assert names.knows("tiny", "/tiny.gguf")
    assert not names.knows("other", "/tiny.gguf")
    names.forget()
    assert not names.knows("tiny", "/tiny.gguf")


@pytest.mark.parametrize(
    ("model", "name", "listed", "stated", "accepted"),
    [
        ("a", "x", {"a"}, False, True),  # its own way
        ("a", "b", {"a", "b"}, False, True),  # the first of several names of one model
        ("a", "b", {"b"}, False, False),
        ("a", "b", set(), False, False),
        ("mine", "/b.gguf", {"/b.gguf"}, True, True),
        ("mine", "b", set(), True, True),
    ],
)
def test_a_new_name_is_judged_by_what_is_listed_and_stated(
    model: str, name: str, listed: set[str], stated: bool, accepted: bool
) -> None:
    assert AnswerNames().accept(model, name, listed, stated=stated) is accepted


def test_the_name_of_another_model_is_not_a_second_name() -> None:
    """Where the worker has called the model by its own before."""
    names = AnswerNames()
    assert names.knows("a", "a")
    assert not names.accept("a", "b", {"a", "b"})
    assert names.accept("a", "x", {"a", "b"})


def test_names_that_differ_each_time_mean_nothing() -> None:
    names = AnswerNames()
    for number in range(MOST_NAMES):
        assert names.accept("tiny", f"tiny at {number}", {"tiny"})
    assert names.knows("tiny", "tiny at noon")
    assert repr(names) == "<AnswerNames of 1 models>"
