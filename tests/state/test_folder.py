"""The folder of a hub's state."""

from __future__ import annotations

from pathlib import Path

import pytest

from gollama_proxy.state.folder import folder_of


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        ("", {"STATE_DIRECTORY": "/a"}, None),
        ("here", {"STATE_DIRECTORY": "/a"}, Path("here")),
        ("auto", {"STATE_DIRECTORY": "/a:/b", "XDG_STATE_HOME": "/x"}, Path("/a")),
        ("auto", {"XDG_STATE_HOME": "/x"}, Path("/x/gollama-proxy")),
        ("auto", {}, Path("~/.local/state/gollama-proxy").expanduser()),
    ],
)
def test_the_folder_is_the_one_set_or_the_usual_one(
    setting: str, environ: dict[str, str], expected: Path | None
) -> None:
    assert folder_of(setting, environ) == expected
