"""Settings change while the hub runs, and answers go on."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import pytest
from msgspec import structs

from gollama_proxy.config import watch
from gollama_proxy.config.settings import (
    FIXED,
    SECTIONS,
    TLS_KEYS,
    Config,
    Revoked,
    settings,
)
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import Change, Changes
from gollama_proxy.telemetry import logs
from tests.behaviour.test_fleet_changes import CALM, begin, end, share, worker
from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.client import Response
from tests.fakes.hub import SECRET, RunningHub, mint, running_hub
from tests.fakes.script import chat_stream
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker

STREAMS = 200


# --- Every setting ----------------------------------------------------------------

# A second value for each setting that is a text, a table or an empty list.
OTHERS: dict[str, Any] = {
    "metrics.listen": ("127.0.0.1:0",),
    "server.host": "::1",
    "server.cors_origins": ("https://chat.example",),
    "server.tls_certificate": "",
    "server.tls_key": "",
    "server.tls_client_ca": "",
    "auth.mode": "off",
    "auth.algorithm": "HS256",
    "auth.public_key_file": "",
    "auth.issuer": "another",
    "auth.audience": "another",
    "auth.secret_file": "",
    "auth.revoked": "",
    "retry.once": (CHAT,),
    "upstream.assemble": (CHAT,),
    "upstream.usage": "always",
    "routing.policy": "round_robin",
    "routing.policies": {"a*": "fastest"},
    "models.default_model": "tiny",
    "models.aliases": {"fast": "tiny"},
    "models.fallbacks": {"tiny": ("small",)},
    "log.level": "debug",
    "log.format": "json",
    "tracing.endpoint": "http://localhost:4318",
    "state.dir": "/elsewhere",
    "state.url": "redis://elsewhere",
    "state.prefix": "another",
}
# Their values name files, which other tests change: `test_clients_over_tls.py` and
# below.
FILES = TLS_KEYS | {
    "auth.algorithm",
    "auth.public_key_file",
    "auth.secret_file",
    "auth.revoked",
}


def other_value(key: str, value: Any) -> Any:
    """Return another value of a setting, an object that is nowhere else."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + type(value)(1.25)
    if isinstance(value, tuple) and value:
        return value * 2
    raise AssertionError(f"{key} needs another value in OTHERS")


def others(config: Config) -> Config:
    """Change every setting of a configuration."""
    return replace(
        config,
        **{
            name: structs.replace(
                section,
                **{
                    key: other_value(f"{name}.{key}", getattr(section, key))
                    for key in section.__struct_fields__
                },
            )
            for name in SECTIONS
            for section in [getattr(config, name)]
        },
    )


async def test_every_setting_changes_live_or_is_listed_as_needing_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new setting is found here: it is live, or a member of `FIXED`."""
    monkeypatch.setattr(logs, "reconfigure", lambda log: None)
    async with worker() as one, running_hub(one, **CALM) as hub:
        before = hub.hub.config
        changes = await hub.hub.apply(others(before))
        keys = {row.key for row in settings()}
        assert {change.key for change in changes.restart} == FIXED
        assert {change.key for change in changes.settings} == keys - FIXED - FILES
        for key in keys:
            section, name = key.split(".")
            new = getattr(getattr(hub.hub.config, section), name)
            old = getattr(getattr(before, section), name)
            assert (new == old) is (key in FIXED | FILES), key


async def test_no_part_goes_on_with_an_old_section(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever keeps a section, or a number of it, has to take the new one."""
    monkeypatch.setattr(logs, "reconfigure", lambda log: None)
    async with worker() as one, running_hub(one, **CALM) as hub:
        await hub.hub.apply(others(hub.hub.config))
        old = hub.hub.config
        await hub.hub.apply(others(old))
        kept = {id(getattr(old, name)): name for name in SECTIONS}
        for name in SECTIONS:
            section = getattr(old, name)
            for key in section.__struct_fields__:
                value = getattr(section, key)
                if f"{name}.{key}" not in FIXED and isinstance(value, float):
                    kept[id(value)] = f"{name}.{key}"

        def found() -> set[str]:
            return {kept[id(each)] for each in reachable(hub.hub) if id(each) in kept}

        try:
            await until(lambda: not found())  # a check of a worker may still run
        except AssertionError:
            assert found() == set()


def reachable(root: object) -> Iterator[object]:
    """Yield what an object refers to, within the package, containers and closures."""
    containers = dict, list, tuple, set, frozenset, MethodType, CellType, partial
    seen = {id(root)}
    left = [root]
    while left:
        here = left.pop()
        referents = gc.get_referents(here)
        if isinstance(here, FunctionType):  # its globals are the whole module
            referents = list(here.__closure__ or ())
        for each in referents:
            if id(each) in seen:
                continue
            seen.add(id(each))
            yield each
            ours = type(each).__module__.startswith("gollama_proxy")
            if ours or isinstance(each, (*containers, FunctionType)):
                left.append(each)


# --- What a setting does ----------------------------------------------------------


def with_section(hub: RunningHub, name: str, **values: Any) -> Config:
    config = hub.hub.config
    section = structs.replace(getattr(config, name), **values)
    return replace(config, **{name: section})


async def change(hub: RunningHub, name: str, **values: Any) -> None:
    await hub.hub.apply(with_section(hub, name, **values))


async def models(hub: RunningHub) -> list[str]:
    listed = await hub.get("/v1/models")
    return [each["id"] for each in listed.json()["data"]]


async def test_models_have_other_names_at_once() -> None:
    async with ScriptedWorker() as one, running_hub(one, **CALM) as hub:
        one.default(*chat_stream(["a"]))
        body = STREAM | {"model": "fast"}
        await change(hub, "models", strict_models=True)
        assert (await hub.post(CHAT, body)).status == 404
        await change(hub, "models", aliases={"fast": "tiny"})
        assert (await hub.post(CHAT, body)).status == 200
        assert "fast" in await models(hub)
        await change(hub, "models", aliases={})
        assert (await hub.post(CHAT, body)).status == 404


async def test_a_policy_that_stays_keeps_what_it_has_learnt() -> None:
    async with ScriptedWorker() as one, running_hub(one, **CALM) as hub:
        affinity = hub.hub.balancer.policy
        await change(hub, "routing", policies={"tiny": "round_robin"})
        assert hub.hub.balancer.policy is affinity
        assert "RoundRobin" in repr(hub.hub.balancer.policy_of("tiny"))
        await change(hub, "routing", policy="fastest", policies={})
        assert hub.hub.balancer.policy_of("tiny") is hub.hub.balancer.policy
        assert "Fastest" in repr(hub.hub.balancer.policy)


async def test_tokens_are_checked_by_the_new_keys_at_once() -> None:
    async with ScriptedWorker() as one, running_hub(one, **CALM) as hub:
        one.default(*chat_stream(["a"]))
        old, new = hub.token(), mint("n" * 32, sub="alice")
        for token, status in ((old, 200), (new, 401)):
            assert (await hub.post(CHAT, STREAM, token)).status == status
        config = replace(hub.hub.config, secrets=(b"n" * 32, SECRET.encode()))
        changes = await hub.hub.apply(config)
        assert changes.settings == (Change("auth.secrets", "hidden", "hidden"),)
        for token in (old, new):
            assert (await hub.post(CHAT, STREAM, token)).status == 200
        await hub.hub.apply(replace(config, secrets=(b"n" * 32,)))
        assert (await hub.post(CHAT, STREAM, old)).status == 401
        await change(hub, "auth", issuer="someone")
        assert (await hub.post(CHAT, STREAM, new)).status == 401
        token = mint("n" * 32, sub="alice", iss="someone")
        assert (await hub.post(CHAT, STREAM, token)).status == 200
        await change(hub, "auth", mode="off")
        assert (await hub.post(CHAT, STREAM, None)).status == 200


async def test_limits_are_for_new_requests_and_connections() -> None:
    async with ScriptedWorker() as one, running_hub(one, **CALM) as hub:
        one.default(*chat_stream(["a"]))
        async with await hub.wire() as open_before:
            await change(hub, "limits", body=10, connections=1)
            await open_before.post(CHAT, STREAM, hub.token())
            assert (await open_before.read_response()).status == 413
            async with await hub.wire() as too_many:
                assert await too_many.read_to_end()
        await until(lambda: hub.hub.clients.open == 0)
        await change(hub, "limits", body=1000)
        assert (await hub.post(CHAT, STREAM)).status == 200


async def test_the_queue_takes_another_size_and_more_requests_at_once() -> None:
    async with worker(slots=1) as one, running_hub(one, **CALM) as hub:
        wires = await begin(hub, 1)
        await change(hub, "queue", size=0)
        assert (await hub.post(CHAT, STREAM)).status == 429
        await change(hub, "queue", size=5)
        waiting = asyncio.create_task(begin(hub, 2))
        await until(lambda: hub.hub.queue.admission.waiting == 2)
        await change(hub, "queue", overcommit=2)
        wires += await waiting
        assert share(hub) == {one.name: 3}
        await end(wires, one)


async def test_web_pages_and_metrics_are_admitted_at_once() -> None:
    page = [("Origin", "https://chat.example")]
    async with ScriptedWorker() as one, running_hub(one, **CALM) as hub:
        assert (await hub.get("/metrics", None)).status == 401
        await change(hub, "metrics", open=True)
        assert (await hub.get("/metrics", None)).status == 200
        allowed = "access-control-allow-origin"
        assert (await hub.get("/livez", None, headers=page)).header(allowed) is None
        await change(hub, "server", cors_origins=("https://chat.example",))
        answer = await hub.get("/livez", None, headers=page)
        assert answer.header(allowed) == "https://chat.example"


async def test_workers_are_checked_as_often_as_the_new_settings_require() -> None:
    async with ScriptedWorker() as one, running_hub(one, **CALM) as hub:
        before = len(one.control)
        await change(hub, "health", interval=0.01)
        await until(lambda: len(one.control) > before + 10)


async def test_a_running_answer_keeps_its_limits() -> None:
    async with worker() as one, running_hub(one, **CALM) as hub:
        wires = await begin(hub, 1)
        [x] = hub.hub.proxy.running
        await change(hub, "timeouts", gap=1e-6, silence=1e-6)
        for _ in range(3):
            hub.hub.watchdog.round()
        assert x.config.timeouts.gap > 1
        assert hub.hub.config.timeouts.gap < 1
        await end(wires, one)


async def test_the_log_has_another_level_and_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    log = Config().log
    try:
        logs.configure(log)
        logging.getLogger("gollama_proxy.canary").debug("first")
        logs.reconfigure(structs.replace(log, level="debug", format="json"))
        logging.getLogger("gollama_proxy.canary").debug("second")
        logs.flush()
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        for handler in before[1]:
            root.addHandler(handler)
        root.setLevel(before[0])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("{")
    assert "second" in line


# --- Reading them again -----------------------------------------------------------


async def test_a_mistake_changes_nothing_and_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[queue]\nsize = 7\n")
    async with ScriptedWorker() as one, running_hub(one, file=file, **CALM) as hub:
        before = hub.hub.config
        for text, mistake in {
            "[queue]\nsize = 8\nsize = = 9\n": "line 3",
            "[queue]\nsize = 8\n[health]\nfall = 0": "health.fall = 0: must be",
            "[queue]\nsize = 8\n[auth]\nrevoked = '/nowhere/x'": "auth.revoked",
        }.items():
            file.write_text(text)
            caplog.clear()
            with pytest.raises(ConfigError, match=mistake):
                await hub.hub.reload()
            assert hub.hub.config is before
            [line] = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
            assert mistake in line
        file.write_text("[queue]\nsize = 8\n")
        changes = await hub.hub.reload()
        assert changes.settings == (Change("queue.size", 7, 8),)


async def test_an_operator_has_the_settings_read_again(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[queue]\nsize = 7\n")
    async with ScriptedWorker() as one, running_hub(file=file, **CALM) as hub:
        token = hub.token("root", scope="admin")

        async def reload() -> Response:
            return await hub.post("/admin/reload", {}, token)

        file.write_text(
            "[queue]\nsize = 8\n[server]\nhost = '::1'\n"
            f"[[workers]]\nurl = '{one.url}'\nname = 'w'\n"
        )
        assert (await reload()).json() == {
            "changed": ["queue.size 7 -> 8", "worker w added"],
            "restart": ["server.host '127.0.0.1' -> '::1'"],
            "settings": [{"key": "queue.size", "old": 7, "new": 8}],
            "workers": {"added": ["w"], "replaced": [], "removed": []},
        }
        file.write_text("[queue]\nsize = -1\n")
        refused = await reload()
        assert refused.status == 400
        assert "queue.size = -1: must be" in refused.json()["error"]["message"]
        assert (await hub.post("/admin/reload", {})).status == 403
        assert hub.hub.config.queue.size == 8


async def test_a_reload_lists_the_changes_of_operators_that_it_undoes(
    tmp_path: Path,
) -> None:
    file = tmp_path / "gollama.toml"
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        rows = [f"[[workers]]\nurl = '{each.url}'\n" for each in (one, two)]
        file.write_text(f"{rows[0]}name = 'one'\n{rows[1]}name = 'two'\n")
        async with running_hub(file=file, **CALM) as hub:
            token = hub.token("root", scope="admin")
            async with await hub.wire() as wire:
                await wire.post(
                    "/admin/workers/one", {"weight": 2}, token, method="PATCH"
                )
                assert (await wire.read_response()).status == 200
                await wire.post("/admin/workers/two", {}, token, method="DELETE")
                assert (await wire.read_response()).status == 200
            changes = await hub.hub.reload()
            assert (changes.added, changes.replaced) == (("two",), ("one",))
            assert str(await hub.hub.reload()) == "nothing has changed"


async def test_reloads_take_turns_and_do_not_end_with_their_callers(
    tmp_path: Path,
) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("[queue]\nsize = 1\n")
    async with ScriptedWorker() as one, running_hub(one, file=file, **CALM) as hub:
        for size in range(2, 10):
            file.write_text(f"[queue]\nsize = {size}\n")
            callers = [asyncio.create_task(hub.hub.reload()) for _ in range(5)]
            await asyncio.sleep(0)
            for caller in callers[1:4]:
                caller.cancel()
            first, *_, last = await asyncio.gather(*callers, return_exceptions=True)
            assert isinstance(first, Changes)
            assert isinstance(last, Changes)
            assert first.settings == (Change("queue.size", size - 1, size),)
            assert last == Changes()
            assert hub.hub.config.queue.size == size


async def test_a_worker_that_moves_stays_paused(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    table = "[[workers]]\nname = 'w'\nurl = '{}'\n"
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        file.write_text(table.format(one.url))
        async with running_hub(file=file, **CALM) as hub:
            token = hub.token("root", scope="admin")
            paused = await hub.post("/admin/workers/w/pause", {}, token)
            assert paused.status == 200
            file.write_text(table.format(two.url))
            assert (await hub.hub.reload()).replaced == ("w",)
            [worker] = hub.hub.registry.workers
            assert worker.config.url == two.url
            assert worker.held.value == "paused"


async def test_a_hub_does_not_open_itself_to_all() -> None:
    """Its address stays until it restarts, so the new one does not count."""
    settings = CALM | {"server__host": "0.0.0.0"}
    async with ScriptedWorker() as one, running_hub(one, **settings) as hub:
        config = with_section(hub, "auth", mode="off")
        server = structs.replace(config.server, host="127.0.0.1")
        with pytest.raises(ConfigError, match="without authentication only"):
            await hub.hub.apply(replace(config, server=server))
        assert (await hub.post(CHAT, WHOLE, None)).status == 401


async def test_a_file_that_is_watched_is_applied_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    file = tmp_path / "gollama.toml"
    file.write_text("[server]\nwatch_config = true\n")
    async with ScriptedWorker() as one, running_hub(one, file=file, **CALM) as hub:
        new = tmp_path / "new"
        new.write_text("[server]\nwatch_config = true\n[queue]\nsize = 9\n")
        new.replace(file)
        await until(lambda: hub.hub.config.queue.size == 9)
        new.write_text("[server]\nwatch_config = false\n")
        new.replace(file)
        await until(lambda: hub.hub.config.queue.size == 256)
        await until(lambda: repr(hub.hub.files) == "<Files items=0>")


async def test_another_list_of_revoked_tokens_takes_the_place_of_the_first(
    tmp_path: Path,
) -> None:
    lists = tmp_path / "one", tmp_path / "two"
    for file, subject in zip(lists, ("alice", "bob"), strict=True):
        file.write_text(f"sub:{subject}\n")
    async with (
        ScriptedWorker() as one,
        running_hub(one, **CALM, auth__revoked=lists[0]) as hub,
    ):
        one.default(*chat_stream(["a"]))

        async def statuses() -> list[int]:
            tokens = map(hub.token, ("alice", "bob"))
            return [(await hub.post(CHAT, STREAM, each)).status for each in tokens]

        assert await statuses() == [401, 200]
        config = with_section(hub, "auth", revoked=str(lists[1]))
        listed = Revoked(subjects=frozenset({"bob"}))
        await hub.hub.apply(replace(config, revoked=listed))
        assert await statuses() == [200, 401]
        config = with_section(hub, "auth", revoked="")
        await hub.hub.apply(replace(config, revoked=Revoked()))
        assert await statuses() == [200, 200]


async def test_a_reload_loses_no_running_answer(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    async with worker(STREAMS + 1) as one, worker() as two:
        text = f"[[workers]]\nurl = '{one.url}'\n"
        file.write_text(text)
        async with running_hub(file=file, **CALM) as hub:
            wires = await begin(hub, STREAMS)
            file.write_text(f"[queue]\nsize = 9\n[limits]\nanswer = 5000\n{text}")
            await hub.hub.reload()
            wires += await begin(hub, 1)
            file.write_text(f"[[workers]]\nurl = '{two.url}'\n")
            changes = await hub.hub.reload()
            assert (changes.added, changes.removed) == ((two.name,), (one.name,))
            async with asyncio.timeout(DEADLINE):
                await hub.hub.ready()
            wires += await begin(hub, 20)
            assert share(hub) == {one.name: STREAMS + 1, two.name: 20}
            await end(wires, one, two)
