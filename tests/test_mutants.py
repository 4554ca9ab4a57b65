"""The tool of `make mutants`."""

from __future__ import annotations

import ast

import pytest

from tests import mutants


@pytest.mark.parametrize("module", mutants.MODULES)
def test_the_modules_that_decide_have_tests(module: str) -> None:
    assert (mutants.PACKAGE / f"{module}.py").exists()
    assert mutants.tests_of(module)


def test_each_change_of_a_function_is_a_mutant() -> None:
    tree = ast.parse(
        "LEAST = 3\n"
        "class Room:\n"
        "    def __repr__(self) -> str:\n"
        "        return str(1)\n"
        "    def has(self, wanted: int = 1) -> bool:\n"
        "        '''Whether there is room.'''\n"
        "        if self.closed:\n"
        "            log.info(f'{wanted} asked', LEAST)\n"
        "        return wanted <= self.free - LEAST\n"
    )
    assert [f"{m.lines[0]}: {m.text}" for m in mutants.find_mutants(tree)] == [
        "7: self.closed -> not self.closed",
        "8: log.info(f'{wanted} asked', LEAST) -> pass",
        "8: log.info(f'{wanted} asked', LEAST) -> log.info(None, LEAST)",
        "8: log.info(f'{wanted} asked', LEAST) -> log.info(LEAST)",
        "8: log.info(f'{wanted} asked', LEAST) -> log.info(f'{wanted} asked', None)",
        "8: log.info(f'{wanted} asked', LEAST) -> log.info(f'{wanted} asked')",
        "9: wanted <= self.free - LEAST -> wanted < self.free - LEAST",
        "9: self.free - LEAST -> self.free + LEAST",
    ]


def test_a_mutant_changes_one_function() -> None:
    tree = ast.parse("def a(n):\n    return n + 1\ndef b(n):\n    return n < 1\n")
    mutant = list(mutants.find_mutants(tree))[-1]
    assert mutant.function == 1
    mutant.apply()
    assert (
        ast.unparse(tree)
        == "def a(n):\n    return n + 1\n\ndef b(n):\n    return n < 2"
    )
