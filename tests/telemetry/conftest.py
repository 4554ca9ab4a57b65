"""Tests of traces need an extra, which a developer may not have installed."""

from __future__ import annotations

import importlib.util
import os

if not importlib.util.find_spec("opentelemetry") and not os.environ.get("GOLLAMA_CI"):
    collect_ignore = ["test_tracing.py"]
