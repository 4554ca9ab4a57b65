"""Insert bugs into the modules that decide, one by one: do the tests notice?

`make mutants`, or `make mutants MODULES='proxy/plan wire/resume' EVERY=3`.

A module is tried in one process, which imports and collects its tests once and runs
them under coverage. Each mutant is then a fork of it: the code of one function is
replaced, and only the tests that run the changed line follow, the quickest first, until
one fails. So a mutant costs milliseconds, and nothing is written anywhere.

Not changed are `__repr__`, the texts of f-strings, and code outside functions: tests
compare the tables there with separate tables.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import coverage
import pytest

LEAST = 0.9  # of the mutants of a module
PACKAGE = Path("gollama_proxy")
TESTS = Path("tests")

# What decides.  The tests of a module are those of its name, and these.
MODULES: dict[str, list[str]] = {
    "control/merging": ["control/test_peers.py", "control/test_replies.py"],
    "edge/auth": [],
    "edge/quotas": [],
    "fleet/agents": [],
    "fleet/breaker": [],
    "fleet/registry": [],
    "fleet/wake": [],
    "proxy/exchange": [
        "behaviour/test_aliases.py",
        "behaviour/test_cancellation.py",
        "behaviour/test_charges.py",
        "behaviour/test_expect_continue.py",
        "behaviour/test_fallbacks.py",
        "behaviour/test_loading.py",
        "behaviour/test_queue.py",
        "behaviour/test_slow_stages.py",
        "behaviour/test_steps.py",
        "behaviour/test_streaming.py",
        "behaviour/test_traces.py",
        "control/test_events.py",
    ],
    "proxy/failures": [],
    "proxy/plan": [],
    "proxy/recovery": [
        "behaviour/test_fallbacks.py",
        "behaviour/test_recovery.py",
        "behaviour/test_rescue.py",
        "behaviour/test_retries.py",
        "behaviour/test_steps.py",
    ],
    "proxy/state": [],
    "scheduling/admission": [],
    "scheduling/balancer": [
        "scheduling/test_affinity*.py",
        "scheduling/test_policies*.py",
    ],
    "scheduling/hints": [],
    "scheduling/queue": ["scheduling/test_sharing.py"],
    "scheduling/turns": [],
    "state/members": [],
    "state/slots": ["scheduling/test_sharing.py"],
    "wire/answer": [],
    "wire/errors": [],
    "wire/headers": [],
    "wire/partial": [],
    "wire/resume": ["proxy/test_relay.py"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE")
    parser.add_argument("--every", type=int, default=1, help="try every n-th mutant")
    options = parser.parse_args()
    unknown = set(options.modules) - set(MODULES)
    if unknown:
        parser.error(f"not among the modules that decide: {', '.join(unknown)}")
    # A process for each module, so that no module has imported another's fixtures.
    weak = [m for m in options.modules if _fork(partial(_try_module, m, options.every))]
    return int(bool(weak))


def _try_module(module: str, every: int) -> bool:
    """Whether the tests of a module detect too few mutants."""
    file = (PACKAGE / module).with_suffix(".py")
    trial = Trial(file, every)
    began = time.monotonic()
    pytest.main(
        ["-qq", "-s", "-p", "no:xdist", "-o", "timeout=0", *tests_of(module)],
        plugins=[trial],
    )
    if not trial.results.total():
        print(f"{module}: the tests fail without a mutant", file=sys.stderr)
        return True
    detected, tried = trial.results[Result.DETECTED], trial.results.total()
    print(
        f"| `{module}.py` | {detected} | {tried} | {detected / tried:.1%} |"
        f"  ({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    return detected < LEAST * tried


def tests_of(module: str) -> list[str]:
    """Return the files of tests that are to detect the mutants of a module."""
    name = module.replace("/", "/test_")
    patterns = [f"{name}.py", f"{name}_*.py", *MODULES[module]]
    return sorted({str(file) for each in patterns for file in TESTS.glob(each)})


class Result(Enum):
    DETECTED = "detected"
    SURVIVED = "survived"
    UNTESTED = "no test"


class Trial:
    """A plugin of pytest that runs the tests once, and then for each mutant."""

    def __init__(self, file: Path, every: int) -> None:
        self.results: Counter[Result] = Counter()
        self._file = file
        self._every = every
        self._failed = False
        self._items: dict[str, pytest.Item] = {}
        self._seconds: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Trial of {self._file}: {dict(self.results)}>"

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        # pytest wants to be the first to import it.
        from hypothesis import Phase, settings

        # One failing example is enough, whichever it is.
        settings.register_profile(
            "mutants",
            settings(),
            phases=[Phase.explicit, Phase.generate],
            report_multiple_bugs=False,
        )
        settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._items = {item.nodeid: item for item in session.items}
        touched = self._run_all()
        print()
        if self._failed:
            return True
        source = self._file.read_text()
        tree = ast.parse(source)
        functions = _functions(compile(tree, str(self._file.resolve()), "exec"))
        live = _live_functions(self._file)
        _clear_caches()
        gc.freeze()
        for mutant in list(find_mutants(tree))[:: self._every]:
            original = functions[mutant.function]
            key = original.co_qualname, original.co_firstlineno
            tests = {
                test for line in mutant.lines for test in touched.get(line, ())
            } or {  # what is not the beginning of any instruction
                test
                for line in {line for *_, line in original.co_lines() if line}
                for test in touched.get(line, ())
            }
            if key not in live or not tests:
                result = Result.UNTESTED
            elif self._is_detected(tree, mutant, live[key], tests):
                result = Result.DETECTED
            else:
                result = Result.SURVIVED
            self.results[result] += 1
            if result is not Result.DETECTED:
                print(f"{self._file}:{mutant.lines[0]}: {result.value}: {mutant.text}")
                sys.stdout.flush()
        return True

    def _run_all(self) -> dict[int, list[str]]:
        """Run every test, and return the tests that touched each line."""
        watch = coverage.Coverage(
            data_file=None, config_file=False, include=[str(self._file.resolve())]
        )
        failed = []
        watch.start()
        for name, item in self._items.items():
            watch.switch_context(name)
            began = time.perf_counter()
            self._run(item)
            self._seconds[name] = time.perf_counter() - began
            if self._failed:
                failed.append(item)
                self._failed = False
        watch.stop()
        for item in failed:  # what measures memory finds that of the coverage
            self._run(item)
        data = watch.get_data()
        touched: dict[int, list[str]] = {}
        for measured in data.measured_files():
            touched = data.contexts_by_lineno(measured)
        return touched

    def _is_detected(
        self,
        tree: ast.Module,
        mutant: Mutant,
        functions: list[types.FunctionType],
        tests: set[str],
    ) -> bool:
        chosen = sorted(tests & set(self._items), key=self._seconds.__getitem__)

        def attempt() -> bool:
            limit = int(5 + 10 * sum(self._seconds[name] for name in chosen))
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            mutant.apply()
            code = compile(tree, str(self._file.resolve()), "exec")
            changed = _functions(code)[mutant.function]
            for function in functions:
                function.__code__ = changed
            for name in chosen:
                # A mutant may wait for what never comes, and longer than is good here.
                signal.setitimer(signal.ITIMER_REAL, 4 + 10 * self._seconds[name])
                self._run(self._items[name])
                if self._failed:
                    return True
            return False

        return _fork(attempt)

    def _run(self, item: pytest.Item) -> None:
        """Run a test; nothing of it stays set up."""
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)


def _fork(run: Callable[[], object]) -> bool:
    """Whether `run` returns something true in another process, or it does not return.

    What it started ends with it.
    """

    def call() -> None:
        os.setpgid(0, 0)
        sys.exit(bool(run()))

    child = multiprocessing.get_context("fork").Process(target=call)
    sys.stdout.flush()
    child.start()
    child.join()
    assert child.pid
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.exitcode != 0


def _functions(code: types.CodeType) -> list[types.CodeType]:
    """Return the functions and methods of a module or class, in order."""
    found = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & 2:  # CO_NEWLOCALS: a function
                if not constant.co_name.startswith("<"):
                    found.append(constant)
            else:
                found += _functions(constant)
    return found


def _live_functions(file: Path) -> dict[tuple[str, int], list[types.FunctionType]]:
    gc.unfreeze()
    name = str(file.resolve())
    found: dict[tuple[str, int], list[types.FunctionType]] = {}
    for each in gc.get_objects():
        if isinstance(each, types.FunctionType) and each.__code__.co_filename == name:
            code = each.__code__
            found.setdefault((code.co_qualname, code.co_firstlineno), []).append(each)
    return found


def _clear_caches() -> None:
    """Forget the results of functions, which a mutant would not compute again."""
    for each in gc.get_objects():
        if isinstance(each, functools._lru_cache_wrapper):
            each.cache_clear()


# Mutants.


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a tree: a node takes the place of another."""

    function: int  # the position of the function among those of the module
    parent: ast.AST
    field: str
    index: int | None  # in the field, where that is a list
    node: ast.AST  # that is there
    change: ast.AST
    lines: range

    @property
    def text(self) -> str:
        before, after = (
            ast.unparse(each).replace("\n", " ") for each in (self.node, self.change)
        )
        return f"{before:.150} -> {after:.150}"

    def apply(self) -> None:
        ast.fix_missing_locations(ast.copy_location(self.change, self.node))
        if self.index is None:
            setattr(self.parent, self.field, self.change)
        else:
            getattr(self.parent, self.field)[self.index] = self.change


def find_mutants(tree: ast.Module) -> Iterator[Mutant]:
    """Yield a mutant for each change of the functions and methods of a module."""
    for position, function in enumerate(_definitions(tree)):
        if function.name == "__repr__":
            continue
        for index, statement in enumerate(function.body):
            yield from _changes(position, function, "body", index, statement)


def _definitions(
    scope: ast.Module | ast.ClassDef,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield what `_functions` returns the code of, in the same order."""
    for statement in scope.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        elif isinstance(statement, ast.ClassDef):
            yield from _definitions(statement)


def _changes(
    function: int, parent: ast.AST, field: str, index: int | None, node: ast.AST
) -> Iterator[Mutant]:
    if _is_left_alone(field, node):
        return
    place = node.pattern if isinstance(node, ast.match_case) else node
    if isinstance(place, ast.expr | ast.stmt | ast.pattern):
        body = getattr(node, "body", None)
        last = place.end_lineno or place.lineno
        if isinstance(body, list) and body and isinstance(place, ast.stmt):
            last = place.lineno  # of a compound statement, its beginning
        lines = range(place.lineno, last + 1)
        for change in _replacements(field, node):
            yield Mutant(function, parent, field, index, node, change, lines)
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            yield from _changes(function, node, name, None, value)
        elif isinstance(value, list):
            for position, each in enumerate(value):
                if isinstance(each, ast.AST):
                    yield from _changes(function, node, name, position, each)


def _is_left_alone(field: str, node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Call(func=ast.Name(id="cast" | "assert_never" | "len" | "isinstance")):
            return True
        case _:
            return field in {"annotation", "returns", "decorator_list"}


_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Div,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_NAMES = [
    ("min", "max"),
    ("any", "all"),
    ("lower", "upper"),
    ("lstrip", "rstrip"),
    ("find", "rfind"),
    ("removeprefix", "removesuffix"),
    ("partition", "rpartition"),
    ("startswith", "endswith"),
]
_OTHER_NAMES = dict(_NAMES) | {there: here for here, there in _NAMES}


def _replacements(field: str, node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node."""
    match node:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str(value)):
            yield ast.Constant(f"XX{value}XX")
        case ast.Constant(value=bytes(value)):
            yield ast.Constant(b"XX" + value + b"XX")
        case ast.Compare(ops=operators):
            for index, operator in enumerate(operators):
                before, after = operators[:index], operators[index + 1 :]
                yield _with(node, ops=[*before, _other(operator), *after])
        case ast.BoolOp() | ast.BinOp() if type(node.op) in _OPERATORS:
            yield _with(node, op=_other(node.op))
        case ast.AugAssign():
            yield ast.Assign([node.target], node.value, lineno=node.lineno)
            if type(node.op) in _OPERATORS:
                yield _with(node, op=_other(node.op))
        case ast.UnaryOp():
            yield node.operand
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.Lambda():
            yield _with(node, body=ast.Constant(None))
        case ast.Call():
            yield from _calls(node)
        case ast.Assign() | ast.AnnAssign(value=ast.expr()):
            if not isinstance(node.value, ast.Constant):
                yield _with(node, value=ast.Constant(None))
        case ast.Expr() | ast.Delete():  # a step that is left out
            yield ast.Pass()
        case ast.Break():
            yield ast.Return(None)
        case ast.Continue():
            yield ast.Break()
        case ast.Match(cases=cases) if len(cases) > 1:
            for index in range(len(cases)):
                yield _with(node, cases=cases[:index] + cases[index + 1 :])
        case _:
            pass
    if field == "test" and isinstance(node, ast.Name | ast.Attribute | ast.Call):
        yield ast.UnaryOp(ast.Not(), node)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    for index, value in enumerate(node.args):
        others = list(node.args)
        if not isinstance(value, ast.Starred | ast.Constant):
            others[index] = ast.Constant(None)
            yield _with(node, args=others)
        if len(node.args) + len(node.keywords) > 1:
            yield _with(node, args=node.args[:index] + node.args[index + 1 :])
    for index, keyword in enumerate(node.keywords):
        rest = node.keywords[:index] + node.keywords[index + 1 :]
        if keyword.arg and not isinstance(keyword.value, ast.Constant):
            other = ast.keyword(keyword.arg, ast.Constant(None))
            yield _with(node, keywords=[*node.keywords[:index], other, *rest[index:]])
        if len(node.args) + len(node.keywords) > 1:
            yield _with(node, keywords=rest)
    match node.func:
        case ast.Name(id=name) if name in _OTHER_NAMES:
            yield _with(node, func=ast.Name(_OTHER_NAMES[name], ast.Load()))
        case ast.Attribute(attr=name) if name in _OTHER_NAMES:
            yield _with(node, func=_with(node.func, attr=_OTHER_NAMES[name]))


def _other(operator: ast.AST) -> ast.AST:
    return _OPERATORS[type(operator)]()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


if __name__ == "__main__":
    sys.exit(main())
