"""The page shows what a model writes as Markdown, and never as markup."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from tests.fakes.tools import require

DRIVER = Path(__file__).parents[1] / "fakes" / "markdown.mjs"
SIZE = 100_000  # characters of a text that tries to be slow

Node = str | dict[str, Any]


class Reader:
    """The page's reader of Markdown, in a process of Node."""

    def __init__(self, node: str) -> None:
        module = resources.files("gollama_proxy.control") / "dashboard" / "markdown.js"
        self._process = subprocess.Popen(
            [node, str(DRIVER), str(module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def __repr__(self) -> str:
        return f"<Reader {self._process.pid}>"

    def read(self, text: str) -> list[Node]:
        """Return the nodes of a text."""
        return cast(list[Node], self._ask(text, None)["whole"])

    def read_both(self, text: str, cuts: list[int]) -> tuple[list[Node], list[Node]]:
        """Return the nodes of a text, and those of it after it grew with these cuts."""
        answer = self._ask(text, cuts)
        return answer["whole"], answer["grown"]

    def shown(self, text: str) -> str:
        """Return what a text becomes, in the notation of HTML."""
        return "".join(map(drawn, self.read(text)))

    def _ask(self, text: str, cuts: list[int] | None) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = msgspec.json.encode({"text": text, "cuts": cuts}).decode()
        print(asked, file=self._process.stdin, flush=True)
        return msgspec.json.decode(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def drawn(node: Node) -> str:
    """Draw a node; `&` and `<` of its text stay as they are."""
    if isinstance(node, str):
        return node
    given = "".join(f" {name}={value}" for name, value in node["attributes"].items())
    inside = "".join(map(drawn, node["children"]))
    return f"<{node['tag']}{given}>{inside}</{node['tag']}>"


def elements(nodes: Iterable[Node]) -> Iterator[dict[str, Any]]:
    """Go through all elements; some texts have tens of thousands of them."""
    left = list(nodes)
    while left:
        node = left.pop()
        if not isinstance(node, str):
            yield node
            left += node["children"]


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader(require("node", package="nodejs"))
    yield reader
    reader.close()


def code(text: str, language: str = "text") -> str:
    return (
        f"<div class=code><div class=bar-of-code><span>{language}</span>"
        "<button type=button class=copy>Copy</button></div>"
        f"<pre tabindex=0><code>{text}</code></pre></div>"
    )


def link(url: str, text: str | None = None) -> str:
    attributes = f"href={url} title={url} target=_blank rel=noreferrer noopener"
    return f"<a {attributes}>{url if text is None else text}</a>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("a\nb\n\nc", "<p>a\nb</p><p>c</p>"),
        ("# A *b* #", "<h3>A <em>b</em></h3>"),
        ("###### A", "<h6>A</h6>"),
        ("#hash", "<p>#hash</p>"),
        ("a\n***\nb", "<p>a</p><hr></hr><p>b</p>"),
        ("**a *b* c** d", "<p><strong>a <em>b</em> c</strong> d</p>"),
        ("***a***", "<p><em><strong>a</strong></em></p>"),
        ("**a:**b", "<p><strong>a:</strong>b</p>"),
        ("**a *b", "<p>**a *b</p>"),
        ("**a*", "<p>**a*</p>"),
        ("*a **b* c**", "<p><em>a **b</em> c**</p>"),
        ("2 * 3 * 4, a_b_c, 5*6", "<p>2 * 3 * 4, a_b_c, 5*6</p>"),
        ("~~a~~ ~b~", "<p><del>a</del> ~b~</p>"),
        (r"\*a\* \d", r"<p>*a* \d</p>"),
        ("`a*` ``b`c`` `d", "<p><code>a*</code> <code>b`c</code> `d</p>"),
        ("*a `b* c`", "<p>*a <code>b* c</code></p>"),
        (
            "- a\n- b\n  - c\n\nd",
            "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>",
        ),
        ("3. a\n4. b", "<ol start=3><li>a</li><li>b</li></ol>"),
        (
            "1. a\n   ```\n   b\n   ```\n2. c",
            f"<ol><li>a{code('b')}</li><li>c</li></ol>",
        ),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("- [ ] a\n- [x] b", "<ul><li>☐ a</li><li>☑ b</li></ul>"),
        ("In\n1984. A year", "<p>In\n1984. A year</p>"),
        (
            "> a\n> - b\n\nc",
            "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>",
        ),
        ("```py\na\n\n  b\n```\nc", code("a\n\n  b", "py") + "<p>c</p>"),
        ("~~~~\n```\n~~~\n~~~~", code("```\n~~~")),
        ("```\nnot closed yet", code("not closed yet")),
        (
            "| a | b |\n|---|--:|\n| 1 | `x` |\n| 2 |",
            (
                "<div class=sheet tabindex=0><table><thead><tr><th>a</th>"
                "<th class=right>b</th></tr></thead><tbody><tr><td>1</td>"
                "<td class=right><code>x</code></td></tr><tr><td>2</td></tr></tbody>"
                "</table></div>"
            ),
        ),
        ("a | b\nc", "<p>a | b\nc</p>"),
        ("[a](https://b.c/d)", f"<p>{link('https://b.c/d', 'a')}</p>"),
        (
            '[**a**](http://b.c/ "t")',
            f"<p>{link('http://b.c/', '<strong>a</strong>')}</p>",
        ),
        ("![a](http://b.c/d.png)", f"<p>{link('http://b.c/d.png', 'a')}</p>"),
        ("see https://b.c/d_(e).", f"<p>see {link('https://b.c/d_(e)')}.</p>"),
        ("**https://b.c/d**", f"<p><strong>{link('https://b.c/d')}</strong></p>"),
        ("[a] (b) [c](d)", "<p>[a] (b) [c](d)</p>"),
    ],
)
def test_what_models_write(reader: Reader, text: str, shown: str) -> None:
    assert reader.shown(text) == shown


# --- Text of a model is text ------------------------------------------------------

PAYLOADS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](JAVASCRIPT:alert(1))",
    "[a](java\tscript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x)",
    "[a](//evil.example/x)",
    "[a](https:evil)",
    "![a](x.png)",
    "<javascript:alert(1)>",
    "&lt;b&gt;",
    "a\0b",
    "<a href='https://x.y' onclick=alert(1)>z</a>",
]
TAGS = {
    "p",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "ul",
    "ol",
    "li",
    "blockquote",
    "div",
    "span",
}
TAGS |= {"button", "pre", "code", "em", "strong", "del", "a"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {"href", "title", "target", "rel", "class", "type", "tabindex", "start"}
CLASSES = {"code", "bar-of-code", "copy", "sheet", "right", "center"}


def is_harmless(nodes: Iterable[Node]) -> bool:
    for element in elements(nodes):
        given = element["attributes"]
        assert element["tag"] in TAGS
        if not given and element["tag"] != "a":
            continue
        assert given.keys() <= ATTRIBUTES
        assert given.get("class", "code") in CLASSES
        assert given.get("href", "https://").startswith(("http://", "https://"))
        assert ("href" in given) == (element["tag"] == "a")
        assert "noreferrer" in given.get("rel", "noreferrer")
    return True


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_is_shown_as_text(reader: Reader, payload: str) -> None:
    places = [
        "{}",
        "# {}",
        "- {}",
        "> {}",
        "**{}**",
        "| {} |\n|---|\n| {} |",
        "```{}\n{}",
    ]
    for place in places:
        nodes = reader.read(place.replace("{}", payload))
        assert is_harmless(nodes)
        assert not any(
            element["tag"] == "a" and "evil" in element["attributes"]["href"]
            for element in elements(nodes)
        )
    assert reader.shown(f"`` {payload} ``").startswith("<p><code>")


PIECES = [
    *"*_~`|[]()#>-<!\\:1.x é",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\r\n",
    "**",
    "```",
    "~~~",
]
PIECES += ["- ", "1. ", "> ", "# ", "|-|", "---", "](http://a.b)", "https://c.d", "\t"]
PIECES += ["| a | b |\n|---|---|\n", "```py\n", "- [ ] ", "word ", "<b>", *PAYLOADS[:4]]


def test_a_text_looks_the_same_however_it_arrived(reader: Reader) -> None:
    """Blocks that were kept while it grew are as they would be in the whole."""
    for seed in range(600):
        rng = random.Random(seed)
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 60)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(12)))
        whole, grown = reader.read_both(text, cuts)
        assert grown == whole, (seed, text, cuts)
        assert is_harmless(whole)


# --- Time -------------------------------------------------------------------------

SLOW = {
    **{repr(mark): mark for mark in "*_~`[]()!<>#-|\\ \n:"},
    **{
        repr(text): text
        for text in [
            "*a ",
            "**a*",
            "a_ ",
            "~~a ",
            "](",
            "[](",
            "[a](http://x/",
            "http://",
        ]
    },
    **{
        repr(text): text
        for text in ["> ", "- ", "- a\n\n\n", "- a\nb\n", "|\n", "|a", "a|b\n", "```\n"]
    },
    "opened, then closed": "*a " * 15_000 + "a* " * 15_000,
    "opened, then others closed": "*a _b " * 8_000 + "a~~ c_ " * 8_000,
    "deeper and deeper": "\n".join(" " * depth + "- a" for depth in range(440)),
    "in each other": "[" * 50_000 + "]" * 50_000,
    "an address and a half": "http://x" + "!" * SIZE + "x",
    "a wide table": "|a" * 2000 + "|\n" + "|-" * 2000 + "|\n" + "|x|\n" * 20_000,
    "runs of all lengths": "a".join("`" * length for length in range(440)),
    "never an address": '[a](http://x "' * 7_000,
}


@pytest.mark.parametrize("case", SLOW)
def test_no_text_is_slow(reader: Reader, case: str) -> None:
    """With squares of the length this would take minutes."""
    text = SLOW[case]
    text = (text * (SIZE // len(text) + 1))[:SIZE]
    assert is_harmless(reader.read(text))
