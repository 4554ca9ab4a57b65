"""Checks that an answer is what it claims to be.

An answer that looks complete has to be exactly the text of its task; one that broke off
has to end with an error, and its beginning has to be right.  All else is dishonest.
"""

from __future__ import annotations

import enum
import json
from typing import Any

from tests.fakes.client import Ending
from tests.fakes.generation import PROMPT_TOKENS, Task

_COUNTED = ("prompt", "completion", "total")


class Verdict(enum.Enum):
    """How a task ended for its client."""

    COMPLETE = "complete"
    REFUSED = "refused"  # with an error status
    BROKEN = "broken"  # off in the middle, and visibly so
    LEFT = "left"  # the client did


class DishonestError(AssertionError):
    """An answer is not what it claims to be."""


def judge(task: Task, ending: Ending) -> Verdict:
    """Return how a task ended.

    Raises:
        DishonestError: the answer is not what it claims to be.
    """
    try:
        return _Case(task, ending).judge()
    except (ValueError, LookupError, TypeError) as exc:
        shown = ending.raw[-6_000:]
        text = f"{task}: {exc!r}\n{ending.clean=} {ending.reset=}\n{shown!r}"
        raise DishonestError(text) from exc


class _Case:
    """One answer, checked in all respects; a ValueError describes what is wrong."""

    def __init__(self, task: Task, ending: Ending) -> None:
        self._task = task
        self._ending = ending

    def __repr__(self) -> str:
        return f"<_Case of {self._task} {self._ending.response.status}>"

    def judge(self) -> Verdict:
        response, clean = self._ending.response, self._ending.clean
        if response.status >= 400:
            _check("error" in response.json(), "an error that is none")
            _check(clean, "half an error")
            return Verdict.REFUSED
        _check(response.status == 200, "neither an answer nor an error")
        if not self._task.stream:
            if not clean:  # shorter than it was announced
                return Verdict.BROKEN
            self._judge_whole(response.json())
            return Verdict.COMPLETE
        events, rest = _events(response.body)
        _check(not rest, "half an event at the end")
        if not clean:
            self._judge_broken_stream(events)
            return Verdict.BROKEN
        self._judge_stream(events)
        return Verdict.COMPLETE

    def _judge_whole(self, answer: dict[str, Any]) -> None:
        [choice] = answer["choices"]
        usages = [answer["usage"]] if "usage" in answer else []
        if self._task.chat:
            message = choice["message"]
            self._compare(
                message["content"], [message["role"]], [choice["finish_reason"]], usages
            )
        else:
            self._compare(choice["text"], [], [choice["finish_reason"]], usages)

    def _judge_stream(self, events: list[str]) -> None:
        _check(events[-1] == "[DONE]", "no end mark at a clean end")
        chunks = [json.loads(data) for data in events[:-1]]
        _check(not any("error" in chunk for chunk in chunks), "an error at a clean end")
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        deltas = [choice.get("delta", choice) for choice in choices]
        self._compare(
            "".join(map(_text, chunks)),
            [delta["role"] for delta in deltas if "role" in delta],
            [c["finish_reason"] for c in choices if c["finish_reason"]],
            [chunk["usage"] for chunk in chunks if chunk.get("usage")],
        )
        ids = {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}
        _check(len(ids) == 1, f"several answers in one: {ids}")
        if self._task.chat and not self._task.usage:
            unasked = any("usage" in chunk for chunk in chunks)
            _check(not unasked, "a usage that was not requested")

    def _judge_broken_stream(self, events: list[str]) -> None:
        _check("error" in json.loads(events[-1]), "broken off without an error")
        _check("[DONE]" not in events, "an end mark on what is broken")
        judge_beginning(self._task, self._ending.response.body)

    def _compare(
        self,
        text: str,
        roles: list[str],
        reasons: list[str],
        usages: list[dict[str, int]],
    ) -> None:
        """Compare a complete answer with what it should be."""
        right = self._task.answer
        _check(text == right.text, f"not the text {right.text!r}")
        _check(roles == ["assistant"] * self._task.chat, f"roles {roles}")
        _check(reasons == [right.reason], f"reasons {reasons}")
        _check(len(usages) <= 1, f"usages {usages}")
        for usage in usages:
            prompt, tokens, total = (usage[f"{name}_tokens"] for name in _COUNTED)
            _check(prompt + tokens == total, f"added up wrongly: {usage}")
            # Texts have a usage without a request for it; see `_place_of_a_cut`.
            asked = self._task.usage or not self._task.stream
            expected = (PROMPT_TOKENS, right.tokens)
            _check((prompt, tokens) == expected or not asked, f"counted {usage}")


def judge_beginning(task: Task, body: bytes) -> None:
    """Compare what has come of an answer that is not whole.

    Raises:
        DishonestError: that is not how its text begins.
    """
    text = ""
    datas, _ = _events(body)
    for place, data in enumerate(datas):
        try:
            text += _text(json.loads(data)) if data != "[DONE]" else ""
        except ValueError:  # cut off; only an error about that may follow
            if len(datas) - place > 2:
                raise DishonestError(f"{task}: half an event: {data!r}") from None
    if not task.answer.text.startswith(text):
        raise DishonestError(f"{task}: not the beginning of its text: {text!r}")


def _events(body: bytes) -> tuple[list[str], str]:
    """Split a stream into the data of its events, and what has no end."""
    *events, rest = body.decode(errors="replace").split("\n\n")
    datas = []
    for event in events:
        lines = [line for line in event.split("\n") if line and line[0] != ":"]
        datas += ["\n".join(line.removeprefix("data: ") for line in lines)]
    return list(filter(None, datas)), rest


def _text(chunk: dict[str, Any]) -> str:
    [choice] = chunk.get("choices") or [{}]
    return choice.get("delta", {}).get("content") or choice.get("text") or ""


def _check(good: bool, flaw: str) -> None:
    if not good:
        raise ValueError(flaw)
