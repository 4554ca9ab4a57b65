"""What a real llama-server reports becomes usage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.asks import CHAT
from tests.fakes.hub import running_hub
from tests.real.llama import LlamaServer
from tests.real.test_context import ask

pytestmark = pytest.mark.real


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("assemble", [CHAT, ""], ids=["assembled", "as it is"])
async def test_tokens_from_the_prompt_cache_are_counted(
    stream: bool,
    assemble: str,
    tiny_model: Path,
    llama_server: Callable[..., LlamaServer],
) -> None:
    server = llama_server(tiny_model)
    async with running_hub(server, upstream__assemble=assemble) as hub:

        async def used() -> dict[str, Any]:
            found: dict[str, Any] = (await hub.get("/v1/usage")).json()
            return found["total"]  # type: ignore[no-any-return]

        body = ask(50, stream=stream, cache_prompt=True)
        assert (await hub.post(CHAT, body)).status == 200
        first = await used()
        assert (await hub.post(CHAT, body)).status == 200
        second = await used()
    prompt = first["prompt_tokens"]
    assert prompt > 50
    assert second["prompt_tokens"] == 2 * prompt
    assert 0 < second["completion_tokens"] <= 4
    # All but the last token, or more of them, depending on the build.
    cached = second["cached_tokens"] - first["cached_tokens"]
    assert prompt / 2 < cached <= prompt
    assert second["slot_seconds"] > first["slot_seconds"] > 0
