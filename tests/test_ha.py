"""The files in examples/ha: each is accepted by the program that reads it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from gollama_proxy.config.load import load
from gollama_proxy.config.settings import Config
from tests.fakes.tools import require
from tests.fakes.valkey import ENGINES, connected, is_up, running_store

HA = Path(__file__).parent.parent / "examples" / "ha"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    secret, file = tmp_path / "jwt", tmp_path / "gollama.toml"
    secret.write_text("x" * 64)
    secret.chmod(0o600)
    text = (HA / "gollama.toml").read_text()
    file.write_text(text.replace("/etc/gollama-proxy/gollama.secret", str(secret)))
    return load(file, {})


def test_haproxy_accepts_its_configuration() -> None:
    program = require("haproxy", package="haproxy")
    command = [program, "-c", "-q", "-f", str(HA / "haproxy.cfg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_keepalived_accepts_its_configuration(tmp_path: Path) -> None:
    program = require("keepalived", package="keepalived")

    def complaints(text: str) -> str:
        file = tmp_path / "keepalived.conf"
        file.write_text(text)
        # Its check ends all of its process group.
        done = subprocess.run(
            [program, "-t", "-f", str(file)],
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        return done.stdout + done.stderr

    text = (HA / "keepalived.conf").read_text()
    assert complaints(text) == ""
    assert "priorty" in complaints(text.replace("priority", "priorty"))


def test_the_hubs_are_where_the_proxy_looks_for_them(config: Config) -> None:
    text = (HA / "haproxy.cfg").read_text()
    [port] = set(re.findall(r"server (?:one|two) 10\.0\.0\.[23]:(\d+)", text))
    assert int(port) == config.server.port
    assert config.server.host == "0.0.0.0"
    assert config.state.url == "redis://10.0.0.4:6379"
    assert f"127.0.0.1:{port}/readyz" in (HA / "keepalived.conf").read_text()


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_store_starts_with_its_configuration(
    engine: str, tmp_path: Path
) -> None:
    options = []
    for line in (HA / "valkey.conf").read_text().splitlines():
        name, _, value = line.partition(" ")
        # The address and the password are those of a machine, which this one is not.
        if name and name not in ("#", "bind", "port", "requirepass"):
            options += [f"--{name}", value.strip('"')]
    async with running_store(tmp_path, engine, *options) as server:
        async with connected(server.url) as store:
            await is_up(store)
