"""Command-line words from named values."""

from __future__ import annotations

import json
from collections.abc import Mapping


def flags(arguments: Mapping[str, object]) -> list[str]:
    """``{"max_tokens": 9, "quiet": True}`` -> ``--max-tokens 9 --quiet``; False and None leave an argument out."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, *(str(each) for each in value)]
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(dict(value))]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words
