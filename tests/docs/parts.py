"""The parts of the documentation that are generated from the program.

`make docs` (`python -m tests.docs.parts`) writes them between their markers:

    <!-- generated: settings -->
    <!-- end -->
"""

from __future__ import annotations

import enum
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from gollama_proxy.cli import show_default
from gollama_proxy.config.settings import (
    FIXED,
    FLAGS,
    SECTIONS,
    VARIABLES,
    WORKER_KEYS,
    settings,
)
from gollama_proxy.config.values import describe_hint
from gollama_proxy.fleet import breaker
from gollama_proxy.fleet import state as worker
from gollama_proxy.fleet.lease import Result
from gollama_proxy.proxy import state
from gollama_proxy.proxy.failures import Again, Cause, Rule, rule_of
from gollama_proxy.state import store
from gollama_proxy.telemetry.families import GROUPS
from gollama_proxy.wire.schema import ENDPOINTS, REFUSED, Api, Endpoint
from tests.fakes.valkey import BASICS

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    """Return the path of a page within the project."""
    return str(page.relative_to(ROOT))


def parts() -> dict[str, str]:
    """Return every generated part, by the name in its marker."""
    api = json.loads(
        (resources.files("gollama_proxy") / "control" / "openapi.json").read_text()
    )
    return {
        "settings": "\n\n".join(_describe_sections()),
        "fixed": ", ".join(f"`{key}`" for key in sorted(FIXED)),
        "flags": _table(
            ("flag", "setting"),
            ((f"`{flag}`", f"`{key}`") for key, flag in FLAGS.items()),
        ),
        "variables": _table(
            ("variable", "what it is"),
            ((f"`{name}`", text) for name, text in VARIABLES.items()),
        ),
        "worker-keys": _table(
            ("key", "what it is; what is allowed"),
            (
                (f"`{key}`", f"{hint.__metadata__[-1]}; {describe_hint(hint)}")
                for key, hint in WORKER_KEYS.items()
            ),
        ),
        "endpoints": _describe_endpoints(),
        "refused": _table(
            ("route of llama-server", "because it"),
            ((f"`{route}`", reason) for route, reason in REFUSED.items()),
        ),
        "admin": "\n\n".join(_describe_calls(api["paths"])),
        "objects": "\n\n".join(_describe_objects(api["components"]["schemas"])),
        "failures": _describe_failures(),
        "metrics": "\n\n".join(_describe_metrics()),
        "alerts": _describe_alerts(),
        "exchange": draw(
            (before, "", after)
            for before, states in state.TRANSITIONS.items()
            for after in sorted(states, key=list(state.State).index)
        ),
        "breaker": draw(_steps(breaker.TRANSITIONS)),
        "worker": draw(_steps(worker.TRANSITIONS)),
        "store": draw(_steps(store.TRANSITIONS)),
        "acl": _describe_permissions(),
    }


def fill(page: str) -> str:
    """Return a page with its generated parts as they are now."""
    made = parts()

    def generate(marked: re.Match[str]) -> str:
        return f"{marked[1]}{made[marked[2]]}\n{marked[3]}"

    marked = r"(<!-- generated: (\S+) -->\n)(?:.*?\n)??(<!-- end -->)"
    return re.sub(marked, generate, page, flags=re.DOTALL)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return (
        "\n".join(
            f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)
        )
        .replace("| --- ", "|---")
        .replace("|--- |", "|---|")
    )


# --- Metrics ----------------------------------------------------------------------


def _describe_metrics() -> Iterator[str]:
    for title, families in GROUPS.items():
        rows = (
            (
                f"`{family.name}`",
                family.type,
                ", ".join(f"`{label}`" for label in family.labels),
                family.help,
            )
            for family in families
        )
        head = ("metric", "type", "labels", "what it is")
        yield f"#### {title}\n\n{_table(head, rows)}"
    bounds = {
        family.name: ", ".join(f"{bound:g}" for bound in family.bounds)
        for families in GROUPS.values()
        for family in families
        if family.bounds
    }
    rows = ((f"`{name}`", text) for name, text in bounds.items())
    yield f"#### Buckets\n\n{_table(('histogram', 'upper bounds'), rows)}"


def _describe_alerts() -> str:
    text = (ROOT / "examples" / "monitoring" / "alerts.yml").read_text()
    rules = [
        rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]
    ]
    rows = (
        (
            f"`{rule['alert']}`",
            rule["labels"]["severity"],
            rule.get("for", "at once"),
            rule["annotations"]["description"],
        )
        for rule in rules
    )
    return _table(("alert", "severity", "after", "what it means"), rows)


# --- Settings ---------------------------------------------------------------------


def _describe_permissions() -> str:
    names = sorted((*BASICS, *store.COMMANDS))
    rule = "ACL SETUSER gollama on >PASSWORD ~gollama:* &gollama:*"
    words = (rule, *(f"+{name}" for name in names))
    return "\n".join(("```text", *textwrap.wrap(" ".join(words), 88), "```"))


def _describe_sections() -> Iterator[str]:
    for section in SECTIONS:
        rows = (
            (f"`{row.key}`", f"`{show_default(row)}`", f"{row.help}; {row.allowed}")
            for row in settings(section)
        )
        head = ("setting", "default", "what it is; what is allowed")
        yield f"### {section}\n\n{_table(head, rows)}"


# --- The API of clients -----------------------------------------------------------

_APIS = {
    Api.OPENAI: "OpenAI",
    Api.RESPONSES: "OpenAI Responses",
    Api.ANTHROPIC: "Anthropic",
    Api.NATIVE: "llama-server",
}


def _describe_endpoints() -> str:
    def features(endpoint: Endpoint) -> Iterator[str]:
        yield "can stream" if endpoint.generates else "answers in one piece"
        if not endpoint.slot:
            yield "needs no slot"
        if endpoint.form:
            yield "takes a multipart form"
        yield from (f"`{name}` must be an array" for name in endpoint.arrays)

    return _table(
        ("path", "API", ""),
        (
            (f"`{path}`", _APIS[endpoint.api], ", ".join(features(endpoint)))
            for path, endpoint in ENDPOINTS.items()
        ),
    )


# --- The admin API ----------------------------------------------------------------

# What every call may be answered; `Errors` of the page explains these.
_COMMON = {"400", "401", "403", "408", "413", "415", "503"}


def _describe_calls(paths: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in paths.items():
        for method, call in methods.items():
            if method != "parameters":
                yield from _describe_call(f"{method.upper()} {path}", call)


def _describe_call(name: str, call: Mapping[str, Any]) -> Iterator[str]:
    responses = call["responses"]
    yield f"#### {name}"
    yield f"{call['summary']}. {_scope(responses)}."
    if given := call.get("parameters"):
        yield _table(
            ("parameter", "type", ""),
            (
                (f"`{each['name']}`", _type(each["schema"]), each["description"])
                for each in given
            ),
        )
    if "requestBody" in call:
        schema = call["requestBody"]["content"]["application/json"]["schema"]
        yield f"Takes {_type(schema)}."
    yield "\n".join(
        f"* {status}: {response['description']}{_returned(response)}"
        for status, response in responses.items()
        if status not in _COMMON
    )


def _scope(responses: Mapping[str, Any]) -> str:
    if "403" not in responses:
        return "Any token"
    looks = "`monitor`" in responses["403"]["description"]
    return "Scope `monitor` or `admin`" if looks else "Scope `admin`"


def _returned(response: Mapping[str, Any]) -> str:
    media = response.get("content", {}).get("application/json", {})
    schema = media.get("schema", {})
    if "$ref" in schema:
        return "" if schema["$ref"].endswith("/Error") else f" {_type(schema)}"
    fields = schema.get("properties", {})
    return "".join(f" `{name}`: {_type(each)}" for name, each in fields.items())


def _describe_objects(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in schemas.items():
        yield f"#### {name}"
        if text := schema.get("description"):
            yield text
        shapes = schema.get("oneOf", [schema])
        for number, shape in enumerate(shapes):
            if number:
                yield "or"
            required = shape.get("required", ())
            yield _table(
                ("field", "type", ""),
                (
                    (
                        f"`{key}`" + ("" if key in required else " (optional)"),
                        _type(each),
                        each.get("description", ""),
                    )
                    for key, each in shape["properties"].items()
                ),
            )


def _type(schema: Mapping[str, Any]) -> str:
    """Describe the type of a value in a few words, with a link to its object."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if len(schema.get("enum", ())) in range(1, 8):
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if "oneOf" in schema:
        return " or ".join(_type(each) for each in schema["oneOf"])
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(_type({**schema, "type": each}) for each in kind)
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}"
    if kind == "object" and (fields := schema.get("properties")):
        return "object: " + ", ".join(f"`{name}`" for name in fields)
    if kind in ("integer", "number") and "minimum" in schema and "maximum" in schema:
        return f"{kind} from {schema['minimum']:,} to {schema['maximum']:,}"
    return str(kind)


# --- Failures ---------------------------------------------------------------------

_BLAME = {
    Result.WORKER_FAILED: "a failure",
    Result.SLOW: "a slow answer",
    Result.BUSY: "busy: it gets no requests for this model for a while",
    Result.ERRED: "a failure, if another worker succeeds",
}


def _describe_failures() -> str:
    def elsewhere(rule: Rule) -> str:
        if not rule.elsewhere:
            return "no"
        return "yes, free" if rule.free else "yes"

    return _table(
        (
            "what happened",
            "another worker tries",
            "the only worker tries again",
            "what its breaker counts",
            "error if nothing helps",
        ),
        (
            (
                cause.value,
                elsewhere(rule),
                rule.again.value if rule.again is not Again.NO else "no",
                _BLAME.get(rule.result, "nothing"),
                f"{rule.code.status} `{rule.code}`",
            )
            for cause in Cause
            for rule in (rule_of(cause),)
        ),
    )


# --- Diagrams ---------------------------------------------------------------------

# State, event (empty where the table has none), next state.
Step = tuple[enum.Enum, str, enum.Enum]


def _steps(table: Mapping[tuple[Any, Any], Any]) -> list[Step]:
    return [(before, event.name, after) for (before, event), after in table.items()]


def draw(steps: Iterable[Step]) -> str:
    """Draw a state machine in the language of Mermaid; the first state begins."""
    steps = list(steps)
    lines = ["stateDiagram-v2", f"    [*] --> {steps[0][0].name}"]
    for before, event, after in steps:
        if before is not after:
            lines.append(
                f"    {before.name} --> {after.name}" + (f": {event}" if event else "")
            )
    return "\n".join(["```mermaid", *lines, "```"])


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(fill(file.read_text()))
