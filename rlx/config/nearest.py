"""Which known key a misspelt one most likely meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The known dotted key closest to ``key``. The last part counts as much as the whole, so that a right name
    in the wrong section finds its home. Raises ValueError when ``known`` is empty."""
    return max(known, key=lambda candidate: _likeness(key, candidate))


def _likeness(left: str, right: str) -> float:
    whole = SequenceMatcher(None, left, right).ratio()
    last = SequenceMatcher(None, left.rpartition(".")[2], right.rpartition(".")[2]).ratio()
    return whole + last
