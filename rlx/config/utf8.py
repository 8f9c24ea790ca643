"""UTF-8 everywhere: in arguments, file names, files and messages, whatever the locale."""

from __future__ import annotations

import locale
import os
import sys


def enter_utf8_mode(module: str) -> None:
    """Begin this process again in Python's UTF-8 mode, as ``python -m module`` with its own arguments, where the locale has
    another encoding. Processes that it starts inherit the mode."""
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", module, *sys.argv[1:]])
