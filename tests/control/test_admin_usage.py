"""What was used is answered for operators, and to each subject for itself."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from gollama_proxy.control import admin as module
from gollama_proxy.control.admin import read_question
from gollama_proxy.state.ledger import DAY, UsageQuestion, UsageSums, day_of
from gollama_proxy.wire.errors import RequestError
from tests.fakes.asks import CHAT, RARELY, WHOLE
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chat_completion, json_reply
from tests.fakes.script import answer, send
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

TODAY = day_of("2026-11-29")
NOON = TODAY * DAY + DAY / 2
CALM = {"health__interval": RARELY}
TIMINGS = {"cache_n": 15, "prompt_n": 5, "prompt_ms": 1.0, "predicted_n": 3}


async def used(hub: RunningHub, worker: ScriptedWorker) -> None:
    """Let alice and bob use something, on the 29th of November."""
    hub.hub.ledger.clock = Clock(NOON)
    whole = chat_completion("a", tokens=3)
    counts = whole["usage"] | {"prompt_tokens": 20, "completion_tokens": 3}
    worker.default(*answer(whole | {"usage": counts, "timings": TIMINGS}))
    for name in ("alice", "alice", "bob"):
        assert (await hub.post(CHAT, WHOLE, hub.token(name))).status == 200
    worker.default(send(json_reply({"error": {"message": "x"}}, status=400)))
    assert (await hub.post(CHAT, WHOLE, hub.token("bob"))).status == 400


def admin(hub: RunningHub) -> str:
    return hub.token("root", scope="admin")


# --- Answers ----------------------------------------------------------------------


async def test_operators_see_the_usage_of_all_subjects() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        await used(hub, worker)
        found = (await hub.get("/admin/usage", admin(hub))).json()
        slots = [row.pop("slot_seconds") for row in (*found["rows"], found["total"])]
        assert found == {
            "by": ["subject"],
            "since": (TODAY - 7) * DAY,
            "until": (TODAY + 1) * DAY,
            "rows": [
                {
                    "subject": "alice",
                    "requests": 2,
                    "errors": 0,
                    "prompt_tokens": 40,
                    "completion_tokens": 6,
                    "cached_tokens": 30,
                },
                {
                    "subject": "bob",
                    "requests": 2,
                    "errors": 1,
                    "prompt_tokens": 20,
                    "completion_tokens": 3,
                    "cached_tokens": 15,
                },
            ],
            "total": {
                "requests": 4,
                "errors": 1,
                "prompt_tokens": 60,
                "completion_tokens": 9,
                "cached_tokens": 45,
            },
            "complete": True,
        }
        assert all(seconds >= 0 for seconds in slots)


async def test_the_question_chooses_groups_and_days() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        await used(hub, worker)
        query = "by=day,model&since=2026-11-01&until=2026-11-29"
        found = (await hub.get(f"/admin/usage?{query}", admin(hub))).json()
        assert found["by"] == ["day", "model"]
        [row] = found["rows"]
        assert (row["day"], row["model"], row["requests"]) == ("2026-11-29", "tiny", 4)
        query = "since=2026-11-01&until=2026-11-28"
        found = (await hub.get(f"/admin/usage?{query}", admin(hub))).json()
        assert (found["rows"], found["total"]["requests"]) == ([], 0)


async def test_what_was_in_a_cache_is_known_of_each_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.access")
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        await used(hub, worker)
        shown = (await hub.get("/admin/requests", admin(hub))).json()["requests"]
    counts = [(each["prompt_tokens"], each["cached_tokens"]) for each in shown]
    assert counts == [(0, 0), *[(20, 15)] * 3]  # the newest one first
    lines = [record.__dict__["fields"] for record in caplog.records]
    of_chats = [line.get("cached_tokens") for line in lines if line["route"] == CHAT]
    assert of_chats == [15, 15, 15, None]


async def test_a_subject_sees_its_own_usage_and_what_is_left() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        await used(hub, worker)
        token = hub.token("bob", rpm=9, tokens_per_day=100, tokens_per_month=20)
        found = (await hub.get("/v1/usage", token)).json()
        assert (found["subject"], found["by"]) == ("bob", ["model"])
        [row] = found["rows"]
        assert (row["model"], row["requests"]) == ("tiny", 2)
        assert found["total"]["prompt_tokens"] == 20
        assert found["limits"] == {
            "rpm": {"limit": 9, "remaining": 9, "resets_in": 0.0},
            "tokens_per_day": {"limit": 100, "remaining": 77, "resets_in": DAY / 2},
            "tokens_per_month": {"limit": 20, "remaining": 0, "resets_in": DAY * 1.5},
        }
        nothing = (await hub.get("/v1/usage?by=subject", hub.token("carol"))).json()
        assert (nothing["rows"], nothing["limits"]) == ([], {})
        assert (await hub.get("/v1/usage", None)).status == 401


async def test_without_authentication_all_usage_is_that_of_one_subject() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, auth__mode="off", **CALM) as hub,
    ):
        assert (await hub.post(CHAT, WHOLE, None)).status == 200
        found = (await hub.get("/v1/usage", None)).json()
        assert (found["subject"], found["total"]["requests"]) == ("anonymous", 1)


async def test_what_is_refused_before_it_has_a_model_is_not_usage() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        assert (await hub.post(CHAT, WHOLE, None)).status == 401
        strict = hub.token(models=["other"])
        assert (await hub.post(CHAT, WHOLE, strict)).status == 403
        limited = hub.token("bob", rpm=1)
        await hub.post(CHAT, WHOLE, limited)
        assert (await hub.post(CHAT, WHOLE, limited)).status == 429
        assert (await hub.get("/v1/models")).status == 200
        found = (await hub.get("/admin/usage", admin(hub))).json()
        assert [row["subject"] for row in found["rows"]] == ["bob"]
        assert found["total"]["requests"] == 1


async def test_usage_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    import sqlite3

    def destroy() -> None:
        database = sqlite3.connect(tmp_path / "usage.db")
        database.execute("DROP TABLE usage")
        database.close()

    async with (
        ScriptedWorker() as worker,
        running_hub(worker, state__dir=tmp_path) as hub,
    ):
        await asyncio.to_thread(destroy)
        answer = await hub.get("/admin/usage", admin(hub))
        assert answer.status == 500
        error = answer.json()["error"]
        assert "usage cannot be read" in error["message"]
        assert (await hub.post(CHAT, WHOLE)).status == 200


async def test_questions_that_wait_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users who ask much hold up neither operators nor the saving of usage."""
    monkeypatch.setattr(module, "MOST_QUESTIONS", 2)
    async with running_hub(ready=False) as hub:
        let, ledger = asyncio.Event(), hub.hub.ledger
        read = ledger.read

        async def slowly(question: UsageQuestion) -> UsageSums:
            await let.wait()
            return await read(question)

        monkeypatch.setattr(ledger, "read", slowly)
        async with asyncio.TaskGroup() as group:
            waiting = [
                group.create_task(hub.get("/v1/usage"), name="fake user")
                for _ in range(2)
            ]
            await until(lambda: len(hub.hub.proxy.running) == 2)
            refused = await hub.get("/v1/usage")
            assert (refused.status, refused.header("retry-after")) == (429, "1")
            let.set()
        assert [task.result().status for task in waiting] == [200, 200]
        assert (await hub.get("/v1/usage")).status == 200


# --- Questions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "first", "end"),
    [
        ({}, TODAY - 7, TODAY + 1),
        ({"since": "7d"}, TODAY - 7, TODAY + 1),
        ({"since": "11h"}, TODAY, TODAY + 1),
        ({"since": "13h"}, TODAY - 1, TODAY + 1),
        ({"since": "60m"}, TODAY, TODAY + 1),
        ({"since": "43201s", "until": "1d"}, TODAY - 1, TODAY),
        ({"since": "2026-11-28"}, TODAY - 1, TODAY + 1),
        ({"since": "2026-11-28", "until": "2026-11-28"}, TODAY - 1, TODAY),
        ({"since": str(NOON), "until": str(NOON)}, TODAY, TODAY + 1),
        ({"since": "0", "until": str((TODAY - 1) * DAY)}, 0, TODAY - 1),
        ({"since": "0001-01-01"}, 0, TODAY + 1),
        ({"since": "999999999d"}, 0, TODAY + 1),
    ],
)
def test_a_range_is_of_whole_days(query: dict[str, str], first: int, end: int) -> None:
    assert read_question(query, "model", NOON) == UsageQuestion(("model",), first, end)


@pytest.mark.parametrize(
    ("query", "param", "text"),
    [
        ({"by": "worker"}, "by", "'worker': must be some of subject, model, day"),
        ({"by": ""}, "by", "must be some of"),
        ({"by": "day,day"}, "by", "each once"),
        ({"since": "yesterday"}, "since", "'yesterday': must be 7d or 12h ago"),
        ({"since": "7 d"}, "since", "must be"),
        ({"since": "-7d"}, "since", "must be"),
        ({"since": "2026-02-30"}, "since", "'2026-02-30': must be"),
        ({"since": "1e9"}, "since", "must be"),
        ({"until": "2026-13-01"}, "until", "such as 2026-11-30"),
        ({"until": "٧d"}, "until", "must be"),
        ({"since": "0d", "until": "1d"}, "since", "'0d': must be before until"),
        ({"until": "30d"}, "since", "'7d': must be before until"),
        ({"limit": "3"}, "limit", "known: by, since, until"),
    ],
)
def test_a_wrong_question_names_its_parameter(
    query: dict[str, str], param: str, text: str
) -> None:
    with pytest.raises(RequestError) as refusal:
        read_question(query, "subject", NOON)
    assert refusal.value.code.status == 400
    assert refusal.value.param == param
    assert text in refusal.value.message
    assert len(refusal.value.message) < 200


async def test_a_wrong_question_is_answered_with_its_parameter() -> None:
    async with running_hub(ready=False) as hub:
        for path, token in (("/admin/usage", admin(hub)), ("/v1/usage", hub.token())):
            answer = await hub.get(f"{path}?since=soon", token)
            assert answer.status == 400
            assert answer.json()["error"]["param"] == "since"
