"""What the size of a prompt shows of its tokens."""

from __future__ import annotations

import pytest

from gollama_proxy.proxy.tokens import DENSEST, MARGIN, THINNEST, Prompts


def test_a_token_is_a_byte_at_least_until_more_is_known() -> None:
    assert Prompts().most_tokens("qwen", 5000) == 5000


def test_what_was_learnt_of_a_model_is_believed_with_a_margin() -> None:
    prompts = Prompts()
    prompts.learn("qwen", 4000, 1000)
    assert prompts.most_tokens("qwen", 8000) == 2000 * MARGIN
    assert prompts.likely_tokens("qwen", 8000) == 2000
    assert prompts.most_tokens("phi", 8000) == 8000
    assert prompts.likely_tokens("phi", 8000) == 2000
    assert repr(prompts) == "<Prompts with bytes/token {qwen 4.0}>"


def test_a_dense_prompt_counts_at_once_and_thin_ones_slowly() -> None:
    prompts = Prompts()
    prompts.learn("qwen", 4000, 1000)
    prompts.learn("qwen", 4000, 2000)
    assert prompts.likely_tokens("qwen", 8000) == 4000
    for _ in range(5):
        prompts.learn("qwen", 4000, 1000)
    assert 3000 < prompts.likely_tokens("qwen", 8000) < 4000


@pytest.mark.parametrize(
    ("size", "tokens"), [(1023, 100), (0, 0), (4000, 0), (4000, -1)]
)
def test_what_proves_nothing_is_not_learnt(size: int, tokens: int) -> None:
    prompts = Prompts()
    prompts.learn("qwen", size, tokens)
    assert prompts.most_tokens("qwen", 4000) == 4000


@pytest.mark.parametrize(
    ("tokens", "density"), [(10**12, DENSEST), (1, THINNEST)], ids=["lie", "picture"]
)
def test_what_is_no_text_is_believed_within_bounds(tokens: int, density: float) -> None:
    prompts = Prompts()
    prompts.learn("qwen", 100_000, tokens)
    assert prompts.most_tokens("qwen", 8000) == 8000 * MARGIN / density
