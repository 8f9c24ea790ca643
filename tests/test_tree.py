"""What a broken merge or a moved file leaves behind, in texts that no compiler reads."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = ("*.md", "*.py", "*.yaml", "*.sh", "*.toml", "*.txt", "*.j2", "Makefile", "Dockerfile")
FOLDERS = ("rlx", "configs", "launch", "converters", "tests", "docs")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
MARKER = re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE)


def broken_links(page: Path, text: str) -> list[str]:
    """Targets inside the repository that are not there."""
    targets = [target for target in LINK.findall(text) if "://" not in target]
    return [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_no_conflict_marker_is_left() -> None:
    texts = [path for folder in FOLDERS for pattern in TEXTS for path in (ROOT / folder).rglob(pattern)]
    texts += [path for pattern in TEXTS for path in ROOT.glob(pattern)]
    assert len(texts) > 200
    assert not [path for path in texts if MARKER.search(path.read_text(encoding="utf-8"))]


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme]


def test_pytest_enters_every_test_folder(request: pytest.FixtureRequest) -> None:
    left_out = request.config.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [folder for folder in folders for pattern in left_out if fnmatch(folder.name, pattern)]


def test_the_checks_bite() -> None:
    text = "[a](docs/none.md#b) [c](https://example.org/x.md) [d](docs/config.md)"
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md"]
    assert MARKER.search("a\n<<<<<<< HEAD\n") and not MARKER.search("a <<<<<<< b")
