"""One Chromium for all tests of the dashboard."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest_asyncio

if TYPE_CHECKING:
    from playwright.async_api import Browser

# There is no playwright for some platforms, such as Alpine.
if not importlib.util.find_spec("playwright") and not os.environ.get("GOLLAMA_CI"):
    collect_ignore_glob = ["test_*.py"]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """The process of a browser; each test opens contexts of it, which share nothing."""
    from tests.browser.dashboard import chromium

    async with chromium() as browser:
        yield browser
