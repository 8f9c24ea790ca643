"""Which keys the run that ``run.dir`` holds can follow, and what it could not know: looked at before any process starts.

Files of the run folder alone, no torch; ``began_with`` compares models, tokenizer and rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from rlx.config.load import ConfigError, read_tree
from rlx.config.resume import REFUSED, Change, compare, refusal
from rlx.config.schema import Config, DataConfig, RunConfig
from rlx.driver.checkpoint import DRIVER_FILE, SavedRun, check_models, newest_checkpoint, whole_checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A run that goes on, its checkpoint, and the keys that are not what they were."""

    config: Config
    saved: SavedRun
    changes: tuple[Change, ...]
    before: Mapping[str, Any]

    @property
    def notes(self) -> list[str]:
        """What the user is to see: what is followed, what could not be compared."""
        examples = self.saved.state.get("examples", {"rows": ""})
        unknown = {
            "the configuration": not self.before,
            "the models and the tokenizer that the run began with": not self.saved.origin,
            "the rows of data.train": "rows" not in examples,
            "the day of its first start (data.template_date)": not _day(self.before),
        }
        names = ", ".join(name for name, is_unknown in unknown.items() if is_unknown)
        older = [f"{self.saved.folder.name} was saved by an older rlx, so these could not be compared: {names}"] if names else []
        return [*(f"resume with {change}" for change in self.changes), *older]


def find_resumption(config: Config) -> Resumption | None:
    """What ``run.resume=auto`` goes on from; None where a run begins, and for an evaluation alone, which asks the checkpoint for
    its weights only. ConfigError for keys that it cannot follow, or when the checkpoint cannot be read."""
    saved = _readable(config.run) if config.run.resume == "auto" else None
    if saved is None or config.evaluation.only:
        return None
    before = saved.config or _launched(config.run)
    changes = tuple(compare(before, config)) if before else ()
    where = f"the run that {config.run.dir} holds ({saved.folder.name})"
    problems = [refusal(change, where) for change in changes if change.effect == REFUSED]
    if problems:
        raise ConfigError(problems)
    _check_models(saved, ["policy", *(["critic"] if config.trains_critic else [])])
    return Resumption(config=config, saved=saved, changes=changes, before=before)


def steps_problem(found: Resumption) -> list[str]:
    """Why a run that has gone further than ``run.steps`` cannot go on; nothing where it has not."""
    run = found.config.run
    if found.saved.step <= run.steps:
        return []
    return [
        f"run.steps: {run.steps}, but the run that {run.dir} holds is at step {found.saved.step} already"
        f" ({found.saved.folder.name}); raise run.steps to go on, or write its model by rlx export {run.dir}"
    ]


def nothing_left(run: RunConfig, folder: Path, *, evaluates: bool) -> str | None:
    """What to tell the user of a run that went to its end and whose model is written, where one is to be; None for any other. Its
    checkpoints are in ``folder``."""
    checkpoints = whole_checkpoints(folder) if run.resume == "auto" and not evaluates else []
    if not checkpoints or checkpoints[-1][0] != run.steps:
        return None
    step, newest = checkpoints[-1]
    exported = Path(run.dir) / "hf"
    # One that is older than the checkpoint was written at an end that the run had before.
    is_written = exported.is_dir() and exported.stat().st_mtime >= (newest / DRIVER_FILE).stat().st_mtime
    if run.export_hf and not is_written:
        return None
    return f"nothing to do: the run that {run.dir} holds is at step {step} = run.steps; raise run.steps to go on"


def _readable(run: RunConfig) -> SavedRun | None:
    try:
        saved = newest_checkpoint(Path(run.dir) / "checkpoints")
    except (ValueError, OSError) as error:
        raise ConfigError([str(error)]) from error
    if saved is not None:
        _check_models(saved, ["policy"])
    return saved


def _check_models(saved: SavedRun, names: Sequence[str]) -> None:
    try:
        check_models(saved.folder, names)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def with_template_date(data: DataConfig, run: RunConfig) -> DataConfig:
    """With ``template_date`` filled in: the day of the run's first start, today for a run that starts now."""
    if data.template_date is not None:
        return data
    known = _day(_launched(run)) if run.resume == "auto" else None
    return replace(data, template_date=known or date.today().isoformat())


def _day(tree: Mapping[str, Any]) -> str | None:
    found: str | None = tree.get("data", {}).get("template_date")
    return found


def _launched(run: RunConfig) -> Mapping[str, Any]:
    """The configuration of the last launch into the run folder, empty where there was none."""
    try:
        return read_tree(Path(run.dir) / "config.yaml")
    except ConfigError:
        return {}
