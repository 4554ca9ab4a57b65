"""Fixtures of the behaviour tests."""

from __future__ import annotations

import pytest

from gollama_proxy.fleet import health


@pytest.fixture
def frequent_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the watchdog check the running streams 50 times a second."""
    monkeypatch.setattr(health, "PERIOD", 0.02)
