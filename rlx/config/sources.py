"""Where prompts come from: the entries of ``data.sources`` and the section ``evaluation``. ``docs/data.md`` explains them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlx.config.options import option, required

FILE_ENDINGS = (".jsonl", ".parquet")
TASK_PREFIX = "reasoning-gym:"
DRAWN_PREFIX = "drawn:"
# A name is part of metric names and of overrides such as data.sources.NAME.weight=2.
SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """Prompts from one place."""

    path: str = required(
        "a .jsonl or .parquet file or a folder of them, owner/name:split of the hub, reasoning-gym:TASK or drawn:TASK"
    )
    args: Mapping[str, Any] = option({}, "arguments of a task: its own, seed and size")
    prompt_key: str | None = option(None, "column of a text prompt")
    messages_key: str | None = option(None, "column of a chat")
    tools_key: str | None = option(None, "column of the tools of a chat")
    label_key: str | None = option(None, "column of the ground truth")
    system_prompt: str | None = option(
        None, "system message of chats that have none; makes a text prompt a chat", may_be_empty=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig(PromptsConfig):
    """One source of the mixture. What is null takes the value of the key of that name in the section data."""

    weight: float = option(1.0, "share of the prompts, relative to the other sources' weights", above=0)
    curriculum_key: str | None = option(None, "column of numbers to order epochs by")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSetConfig(PromptsConfig):
    """One set. What is null takes the value of the key of that name in the section data or evaluation."""

    max_prompts: int | None = option(None, "prompts used", minimum=1)
    samples_per_prompt: int | None = option(None, "answers to each", minimum=1)
    temperature: float | None = option(None, "0 is greedy", minimum=0)


def files_of(path: str) -> list[Path]:
    """The files of a path of data: itself, or those in a folder that are not hidden, by name. ValueError when it is neither."""
    if os.path.isdir(path):
        found = (file for file in Path(path).iterdir() if file.suffix in FILE_ENDINGS and not file.name.startswith("."))
        files = sorted(found)
        if not files:
            raise ValueError(f"the folder {path} holds no file that ends in {' or '.join(FILE_ENDINGS)}")
        return files
    if Path(path).suffix not in FILE_ENDINGS:
        raise ValueError(
            f"{path} must end in {' or '.join(FILE_ENDINGS)}, or be a folder of such files, a data set of the hub"
            f" (owner/name:split), {TASK_PREFIX}TASK or {DRAWN_PREFIX}TASK"
        )
    if not os.path.isfile(path):
        raise ValueError(f"no such file {path}")
    return [Path(path)]


def task_of(path: str) -> tuple[str, str] | None:
    """The prefix and the TASK of ``reasoning-gym:TASK`` or ``drawn:TASK``, None for a file."""
    prefix = next((prefix for prefix in (TASK_PREFIX, DRAWN_PREFIX) if path.startswith(prefix)), None)
    return None if prefix is None else (prefix, path.removeprefix(prefix))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on held-out prompts; the loss on held-out examples when fine-tuning."""

    data: str | None = option(None, "prompts (or examples) to evaluate on, as data.train; none: only evaluation.sets, if any")
    sets: Mapping[str, EvaluationSetConfig] = option({}, "further sets: NAME -> set (keys below), reported as eval/NAME/...")
    every: int = option(0, "steps between evaluations; 0: only at the end", minimum=0)
    at_start: bool = option(False, "also before the first step, reported as step 0")
    only: bool = option(False, "evaluate and train nothing; `rlx eval` sets it")
    max_prompts: int = option(256, "prompts (or examples) used", minimum=1)
    samples_per_prompt: int = option(1, "answers to each; more than one: mean@k and pass@k", minimum=1)
    temperature: float = option(0.0, "0 is greedy; several answers need more", minimum=0)
    pass_reward: float = option(1.0, "an answer with at least this reward passes")

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether it is time to evaluate after this step; 0 is before the first."""
        if step == 0:
            return self.at_start
        return step == last_step or (self.every > 0 and step % self.every == 0)

    @property
    def by_name(self) -> Mapping[str, EvaluationSetConfig]:
        """Every set, nothing left to a default of this section; the one of ``data`` is called ""."""
        sets = {**({} if self.data is None else {"": EvaluationSetConfig(path=self.data)}), **self.sets}
        return {
            name: replace(
                one,
                max_prompts=self.max_prompts if one.max_prompts is None else one.max_prompts,
                samples_per_prompt=self.samples_per_prompt if one.samples_per_prompt is None else one.samples_per_prompt,
                temperature=self.temperature if one.temperature is None else one.temperature,
            )
            for name, one in sets.items()
        }
