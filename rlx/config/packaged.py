"""What comes with rlx beside its code (``launch``, ``configs``): in a checkout, or in ``share/rlx`` of an installation."""

from __future__ import annotations

import sys
from pathlib import Path

import rlx

CHECKOUT = Path(rlx.__file__).resolve().parents[1]
PLACES = (CHECKOUT, Path(sys.prefix) / "share/rlx")


def packaged(name: str) -> Path | None:
    """The file or folder ``name``, such as ``launch/slurm``; None when the installation lacks it."""
    return next((place / name for place in PLACES if (place / name).exists()), None)
