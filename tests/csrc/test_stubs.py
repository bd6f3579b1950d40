"""bytekernels/_C.pyi names exactly what the built module has: functions with their parameters, values, submodules."""

import ast
from pathlib import Path
from types import ModuleType

import pytest

import bytekernels
from bytekernels import _C

STUB = Path(bytekernels.__file__).with_name("_C.pyi")
SANITIZED_ALONE = {"overstep"}  # what only a sanitized build has


def parameters(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names and defaults."""
    given, defaults = function.args.args, function.args.defaults
    plain = len(given) - len(defaults)
    return [(a.arg, ast.unparse(defaults[i - plain]) if i >= plain else None) for i, a in enumerate(given)]


def built(module: ModuleType) -> dict[str, object]:
    """A description of the module, with a function's parameters as the first line of its docstring gives them."""
    found: dict[str, object] = {}
    for name, value in vars(module).items():
        if name.startswith("__") or name in SANITIZED_ALONE:
            continue
        if isinstance(value, ModuleType):
            found[name] = built(value)
        elif callable(value):
            [signature] = ast.parse(f"def {value.__doc__.splitlines()[0]}: ...").body
            found[name] = parameters(signature)
        else:
            found[name] = type(value).__name__
    return found


def stubbed(body: list[ast.stmt]) -> dict[str, object]:
    """The same of a stub, in which a submodule is a class of static methods."""
    found: dict[str, object] = {}
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            found[statement.name] = stubbed(statement.body)
        elif isinstance(statement, ast.FunctionDef):
            found[statement.name] = parameters(statement)
        elif isinstance(statement, ast.AnnAssign) and statement.value is None:
            found[statement.target.id] = ast.unparse(statement.annotation).split("[")[0]
    return found


def test_the_stub_is_the_module():
    assert stubbed(ast.parse(STUB.read_text()).body) == built(_C)


@pytest.mark.parametrize(
    "change",
    [
        ("def route(\n    bf16: bool", "def route(\n    narrow: bool"),
        ("fail_at: int = -1", "fail_at: int"),
        ("def parallel_runtime() -> str: ...\n", ""),
        ("march: str", "march: int"),
        ("def unpack(", "def unpacked("),
    ],
)
def test_a_stub_that_differs_is_told_apart(change):
    text = STUB.read_text()
    assert change[0] in text
    assert stubbed(ast.parse(text.replace(*change)).body) != built(_C)
