"""Fixtures of the behaviour tests."""

from __future__ import annotations

import pytest

from gollama_proxy.fleet import watchdog


@pytest.fixture
def frequent_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the watchdog check the running streams 50 times a second."""
    monkeypatch.setattr(watchdog, "PERIOD", 0.02)
