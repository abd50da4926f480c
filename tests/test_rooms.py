"""The house: imports point down the list of rooms, in a circle nowhere, and hide in no function."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

PACKAGE = ROOT / "jax_resnet"
# From the top of the house to its cellar.
ROOMS = (
    *("__main__", "main", "commands", "inference", "training", "data", "runs", "config", "models"),
    *("runtime", "errors"),
)
# In a function, because the module is heavy and a mistyped flag or another command shall not wait for it.
LAZY = {
    ("__init__", "*"),
    ("main", "runtime.distributed"),
    ("main", "training.evaluate"),
    ("main", "training.loop"),
    ("commands.ending", "commands.failure"),
    ("main", "commands.host"),
    ("commands.config", "commands.overview"),
    ("commands.compile", "commands.program"),
    ("data.sources", "data.tfds"),
}

FILE_LINES, FUNCTION_LINES = 300, 50
# What is longer, and why: a file, or a file and its function.
LONGER = {
    "config/defaults.py default": "one line for each key of the config, with what it means",
}


def modules() -> dict[str, ast.Module]:
    files = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in PACKAGE.rglob("*.py")}
    return {name: ast.parse(file.read_text()) for name, file in files.items() if not name.startswith("configs.")}


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of the package that are imported anywhere below `tree`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax_resnet":
            module = (node.module or "").removeprefix("jax_resnet").removeprefix(".")
            inside = [f"{module}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in known else module for name in inside}
    return found - {""}


def arrows() -> dict[str, set[str]]:
    trees = modules()
    return {name: imports(tree, set(trees)) for name, tree in trees.items() if not name.endswith("__init__")}


def floor(module: str) -> int:
    return ROOMS.index(module.split(".")[0])


def test_imports_point_down() -> None:
    up = {(name, other) for name, others in arrows().items() for other in others if floor(other) < floor(name)}
    assert up == set()


def test_no_circle() -> None:
    TopologicalSorter(arrows()).prepare()  # raises CycleError, which names them


def test_no_import_hides_in_a_function() -> None:
    trees = modules()
    hidden = set()
    for name, tree in trees.items():
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            hidden |= {(name, other) for other in imports(function, set(trees))}
    assert {pair for pair in hidden if pair not in LAZY and (pair[0], "*") not in LAZY} == set()


def test_at_most_sixteen_entries_at_the_first_level() -> None:
    entries = [f for f in PACKAGE.iterdir() if f.name not in ("__pycache__", "configs")]
    assert len(entries) <= 16, entries


def length(function: ast.FunctionDef) -> int:
    """Count the lines of a function without its docstring."""
    first = function.body[0]
    docstring = 0
    if isinstance(first, ast.Expr) and ast.get_docstring(function) is not None:
        docstring = first.end_lineno - first.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


def test_files_and_functions_are_short() -> None:
    lengths = {}
    for file in PACKAGE.rglob("*.py"):
        name, text = str(file.relative_to(PACKAGE)), file.read_text()
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        lengths |= {f"{name} {node.name}": length(node) - FUNCTION_LINES for node in functions}
        lengths[name] = len(text.splitlines()) - FILE_LINES
    assert {name for name, above in lengths.items() if above > 0} == set(LONGER)
