"""Which files of a data set are a split: as its README says (``configs``), else by their names, as the hub's own reader does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import yaml

from rlx.config.sources import FILE_ENDINGS

_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_OTHER_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")


def split_files(names: Sequence[str], readme: str, wanted: str | None) -> list[str] | None:
    """The parquet and JSONL files of ``wanted`` (SPLIT or CONFIG/SPLIT; None is train), in order; None where there are no such
    files at all. ValueError lists the splits where there is none of that name, or one in several configurations."""
    data = sorted(name for name in names if name.endswith(FILE_ENDINGS) and not name.startswith("."))
    if not data:
        return None
    table = _from_readme(readme, data) or _from_names(data)
    *config, split = (wanted or "train").split("/")
    found = {tuple(files) for (name, part), files in table.items() if part == split and name in (config or [name])}
    if not config and ("", split) in table:
        return table["", split]
    if len(found) == 1:
        return list(found.pop())
    known = sorted(f":{name}/{part}" if name else f":{part}" for name, part in table if not name or ("", part) not in table)
    raise ValueError(f"the data set has {'several' if found else 'no'} {wanted or 'train'}; name one of {', '.join(known)}")


def _from_readme(readme: str, data: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """By (configuration, split). A configuration that is the default one, or the only one, is also called ""."""
    front = _FRONT.match(readme)
    try:
        meta = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return {}
    rows = meta.get("configs") if isinstance(meta, Mapping) else None
    rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    table: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        called = str(row.get("config_name", "default"))
        is_default = bool(row.get("default")) or called == "default" or len(rows) == 1
        for split, files in _of_config(row, data):
            for name in {called, "" if is_default else called}:
                kept = table.setdefault((name, split), [])
                kept += [file for file in files if file not in kept]
    return {name: files for name, files in table.items() if files}


def _of_config(row: Mapping[str, Any], data: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(split, files) of a configuration in a README."""
    home = PurePosixPath(str(row.get("data_dir") or "").strip("/"))
    named = row.get("data_files")
    if named is None:
        inside = [file for file in data if PurePosixPath(file).is_relative_to(home)]
        yield from ((split, files) for (_, split), files in _from_names(inside).items())
    for entry in named if isinstance(named, list) else [named]:
        by_split = entry if isinstance(entry, Mapping) else {"path": entry or []}
        if "path" in by_split:
            by_split = {str(by_split.get("split", "train")): by_split["path"]}
        for split, paths in by_split.items():
            for path in paths if isinstance(paths, list) else [paths]:
                pattern = str(home / str(path)).replace("**/", "*").replace("**", "*")
                yield str(split), [file for file in data if fnmatch(file, pattern)]


def _from_names(data: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """A file is of the split that its path has as a word; where none has any, all are train. The folder above is its
    configuration, unless all have the same."""
    table: dict[tuple[str, str], list[str]] = {}
    for file in data:
        words = re.split(r"[/._-]", file.lower())
        split = next((part for part in ("train", *_OTHER_SPLITS) if part in words), "train")
        folders = [part for part in PurePosixPath(file).parts[:-1] if part.lower() not in ("data", "train", *_OTHER_SPLITS)]
        table.setdefault((folders[0] if folders else "", split), []).append(file)
    if len({config for config, _ in table}) == 1:
        table |= {("", split): files for (_, split), files in table.items()}
    return table
