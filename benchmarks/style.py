"""How long and how plain a package is: lines, code, branches in expressions, first words of docstrings.

    python benchmarks/style.py [FOLDER …]     (this package, flax and optax by default)

"code" are lines without blanks, comments and docstrings; "conditionals" are conditional expressions for each 100 lines;
"fragments" is the share of the docstrings of functions that open with an article, "What", "Of", "Whether" or a
pronoun, rather than with a verb.
"""

import ast
import io
import sys
import tokenize
from importlib.util import find_spec
from pathlib import Path

FRAGMENTS = {"a", "an", "the", "what", "of", "whether", "those", "each", "all", "how", "in", "it", "its", "this"}
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def count(file: Path) -> dict[str, int]:
    """Count lines, code, conditional expressions, and docstrings of functions with their fragments, of one file."""
    source = file.read_text()
    tree = ast.parse(source)
    docstrings: set[int] = set()
    counts = {"lines": source.count("\n"), "conditionals": 0, "docstrings": 0, "fragments": 0}
    for node in ast.walk(tree):
        counts["conditionals"] += isinstance(node, ast.IfExp)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            counts["docstrings"] += 1
            counts["fragments"] += text.split()[0].lower() in FRAGMENTS
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return counts | {"code": len(lines - docstrings)}


def main() -> None:
    """Print a row for each package."""
    here = [Path(__file__).resolve().parents[1] / "jax_resnet"]
    specs = [find_spec(name) for name in ("flax", "optax")]
    peers = [Path(spec.submodule_search_locations[0]) for spec in specs if spec and spec.submodule_search_locations]
    folders = [Path(argument) for argument in sys.argv[1:]] or here + peers
    print(f"{'package':20}{'lines':>8}{'code':>8}{'conditionals':>14}{'fragments':>11}")
    for folder in folders:
        files = [file for file in folder.rglob("*.py") if not file.name.endswith("_test.py")]
        counts = [count(file) for file in files]
        total = {key: sum(one[key] for one in counts) for key in counts[0]}
        conditionals = 100 * total["conditionals"] / total["lines"]
        share = 100 * total["fragments"] / total["docstrings"]
        print(f"{folder.name:20}{total['lines']:>8,}{total['code']:>8,}{conditionals:>14.2f}{share:>9.0f} %")


if __name__ == "__main__":
    main()
