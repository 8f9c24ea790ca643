"""Checkpoint folders of a run: named by step, written beside and renamed, so that a folder that is there is whole.

``RUN_DIR/checkpoints/step-00000012/`` holds one folder a trained model and ``driver.json``: data cursor, versions, the
configuration and what the run began with.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER_FILE = "driver.json"
_NAME = re.compile(r"step-(\d{8})")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def whole_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """A run as its newest checkpoint has it. ``config`` is the tree it was saved under, ``origin`` what it began with
    (``origin_of``); both are empty in older checkpoints."""

    step: int
    folder: Path
    state: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.state.get("config", {})
        return found

    @property
    def origin(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.state.get("origin", {})
        return found


def newest_checkpoint(root: Path) -> SavedRun | None:
    """What ``run.resume=auto`` goes on from. ValueError when its state cannot be read."""
    found = whole_checkpoints(root)
    if not found:
        return None
    step, folder = found[-1]
    return SavedRun(step=step, folder=folder, state=read_driver_state(folder))


def write_checkpoint(
    root: Path, step: int, driver_state: Mapping[str, Any], save_models: Callable[[str], None], keep: int
) -> Path:
    """Save the models through ``save_models(folder)`` and the driver's state, then rename; drops the oldest beyond ``keep``.

    An interruption leaves a ``.partial`` folder, which the next write removes and no load looks at.
    """
    target = step_folder(root, step)
    beside = target.with_name(target.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_models(str(beside))
    sizes = {str(file.relative_to(beside)): file.stat().st_size for file in sorted(beside.rglob("*")) if file.is_file()}
    (beside / DRIVER_FILE).write_text(json.dumps({**driver_state, "files": sizes}))
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    for _, old in whole_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return target


def read_driver_state(folder: Path) -> dict[str, Any]:
    """What the driver saved. ValueError names the file when it is missing or broken."""
    file = folder / DRIVER_FILE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {folder} cannot be resumed: {file} cannot be read ({error})") from error
    if not isinstance(state, dict) or not {"step", "seed"} <= state.keys() or not {"prompts", "examples"} & state.keys():
        raise ValueError(f"checkpoint {folder} cannot be resumed: {file} does not hold the state of a run")
    return state


def check_models(folder: Path, names: Sequence[str]) -> None:
    """ValueError for a checkpoint that does not hold these models whole: every file as long as it was written (older checkpoints
    do not say), and what describes the tensors, which is written last."""
    for name in names:
        if not (folder / name / "metadata.json").is_file():
            raise ValueError(f"checkpoint {folder} cannot be resumed: {folder / name} is not whole, metadata.json is missing")
    sizes = read_driver_state(folder).get("files", {})
    for file, size in sizes.items():
        if file.partition("/")[0] not in names:
            continue
        found = (folder / file).stat().st_size if (folder / file).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, {size} were written"
            raise ValueError(f"checkpoint {folder} cannot be resumed: {folder / file} {what}")
