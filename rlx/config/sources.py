"""Where prompts come from: the entries of ``data.sources`` and ``evaluation.sets``. ``docs/data.md`` explains them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.config.options import option, required

FILE_ENDINGS = (".jsonl", ".parquet")
TASK_PREFIX = "reasoning-gym:"
# A name is part of metric names and of overrides such as data.sources.NAME.weight=2.
SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """Prompts from one place."""

    path: str = required("a .jsonl or .parquet file or a folder of them, owner/name:split of the hub, or reasoning-gym:TASK")
    args: Mapping[str, Any] = option({}, "arguments of a reasoning-gym task: its own, seed and size")
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
            f" (owner/name:split) or {TASK_PREFIX}TASK"
        )
    if not os.path.isfile(path):
        raise ValueError(f"no such file {path}")
    return [Path(path)]


def task_name(path: str) -> str | None:
    """TASK of ``reasoning-gym:TASK``, None for a file."""
    return path.removeprefix(TASK_PREFIX) if path.startswith(TASK_PREFIX) else None
