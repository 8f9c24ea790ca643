"""The list of files in docs/structure.md: the first sentence of each. ``python -m tests.structure`` writes it anew."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "structure.md"
FOLDERS = ("rlx", "converters")
BEGIN = "<!-- files: written by python -m tests.structure -->\n"


def listing() -> str:
    """A heading a folder, top to bottom as imports point, and a line a file."""
    lines = []
    for folder in _folders():
        modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        if modules:
            about = _first_sentence(folder / "__init__.py")
            lines += [f"\n### `{folder.relative_to(ROOT)}/`\n", f"{about}\n", "| file | what it is |", "|---|---|"]
            lines += [f"| [`{path.name}`](../{path.relative_to(ROOT)}) | {_first_sentence(path)} |" for path in modules]
    return "\n".join(lines) + "\n"


def split_page() -> tuple[str, str]:
    """What is written by hand, and the list."""
    before, begin, after = PAGE.read_text().partition(BEGIN)
    assert begin, f"{PAGE} has lost the line {BEGIN!r}"
    return before, after


def _folders() -> list[Path]:
    levels = re.findall(r"^    \{(.+)\},$", (ROOT / "tests" / "test_architecture.py").read_text(), re.MULTILINE)
    packages = [name for level in levels for name in re.findall(r'"(\w+)"', level) if (ROOT / "rlx" / name).is_dir()]
    tops = [ROOT / "rlx" / name for name in packages] + [ROOT / "converters"]
    return [folder for top in tops for folder in [top, *sorted(path for path in top.rglob("*") if path.is_dir())]]


def _first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    sentence = re.match(r".+?(?<!et al)\.(?=\s|$)", text)
    found = sentence[0] if sentence else text
    return found.rstrip(":").replace("``", "`").replace("|", "\\|").removesuffix(".") + "."


def main() -> None:
    before, _ = split_page()
    PAGE.write_text(before + BEGIN + listing())


if __name__ == "__main__":
    main()
