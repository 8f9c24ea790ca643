"""Product code in statements of the syntax tree, docstrings not counted: ``python -m tests.statements [FOLDER...]``."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PRODUCT = ("rlx", "converters")


def statements(text: str) -> int:
    """Statements of a module, compound ones counted once beside those inside them."""
    tree = ast.parse(text)
    owners = [
        node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    docstrings = sum(ast.get_docstring(node, clean=False) is not None for node in owners)
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - docstrings


def main(root: Path, folders: list[str]) -> int:
    """Print the count of each folder below ``root`` and their sum."""
    counts = {
        folder: sum(statements(file.read_text(encoding="utf-8")) for file in (root / folder).rglob("*.py")) for folder in folders
    }
    for folder, count in counts.items():
        print(f"{count:7,} {folder}")
    print(f"{sum(counts.values()):7,}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd(), sys.argv[1:] or list(PRODUCT)))
