"""docs/structure.md lists every file with what it says of itself, and its walks name files that are there."""

from __future__ import annotations

import re

from tests.structure import ROOT, listing, split_page


def test_every_file_is_listed_as_it_describes_itself() -> None:
    assert split_page()[1] == listing(), "run python -m tests.structure"


def test_walks_name_what_is_there() -> None:
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", split_page()[0])
    missing = [name for name in named if not (ROOT / "rlx" / name).exists() and not (ROOT / name).exists()]
    assert len(named) > 50 and not missing
