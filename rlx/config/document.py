"""The table of all keys in ``docs/config.md``, made from the schema: ``python -m rlx.config.document > docs/config.md``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rlx.config.convert import Entry, row_class, section_entries, type_words
from rlx.config.options import limit_words
from rlx.config.resume import effect_of
from rlx.config.schema import Config

_HEAD = """# Configuration

Every key, as written in a YAML file or given as `section.key=value` on the command line. This page is generated:
`python -m rlx.config.document > docs/config.md`.

A file may begin with `defaults: [other.yaml]`, paths relative to the file, whose keys come first and yield to the file's
own. Every other path is relative to the folder that the command is started in. `${section.key}` refers to another key.

`rlx check CONFIG.yaml [key=value ...]` reports every problem at once and prints the resolved tree. It reads what a run reads
before it starts anything: config.json, the headers of the weights, the tokenizer, the reward (whose function is bound to the
columns) and the first 1,000 rows of each file (`--all-rows`: all of them, as `rlx train` does). Keys that are set and change
nothing are warned of.

The last column says what becomes of a key that is changed before a run goes on ([resuming.md](resuming.md)).
"""


def document() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *(_section(entry) for entry in section_entries(Config))])


def _section(section: Entry) -> str:
    keys = section_entries(section.hint, f"{section.key}.")
    same = section.field.name == "critic_optimizer"
    about = "The same keys as `optimizer`, for the critic." if same else (section.hint.__doc__ or "").strip()
    lines = [f"## {section.key}", "", about, "", *_table(keys)]
    for key in keys:
        row = row_class(key.hint)
        if row is not None:
            lines += ["", f"### {key.key}.NAME", "", (row.__doc__ or "").strip(), ""]
            lines += _table(section_entries(row, f"{key.key}.NAME."))
    return "\n".join(lines) + "\n"


def _table(keys: Sequence[Entry]) -> list[str]:
    head = ["| key | type | default | meaning | on resume |", "|---|---|---|---|---|"]
    return [*head, *(_row(entry) for entry in keys)]


def _row(entry: Entry) -> str:
    default = "**required**" if entry.is_required else f"`{_yaml(entry.default())}`"
    return f"| `{entry.key}` | {_type(entry)} | {default} | {_cell(entry.field.metadata['doc'])} | {effect_of(entry.key)} |"


def _type(entry: Entry) -> str:
    choices = entry.field.metadata["choices"]
    words = " / ".join(f"`{choice}`" for choice in choices) if choices else type_words(entry.hint)
    return ", ".join([words, *limit_words(entry.field.metadata["limits"])])


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(document())
