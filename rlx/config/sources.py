"""Where prompts come from: the entries of ``data.sources`` and ``evaluation.sets``. ``docs/data.md`` explains them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.config.options import option, required

FILE_ENDINGS = (".jsonl", ".parquet")
TASK_PREFIX = "reasoning-gym:"
# A name is part of metric names and of overrides such as data.sources.NAME.weight=2.
SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """Prompts from one place."""

    path: str = required("a .jsonl or .parquet file, or reasoning-gym:TASK")
    args: Mapping[str, Any] = option({}, "arguments of a reasoning-gym task: its own, seed and size")
    prompt_key: str | None = option(None, "column of a text prompt")
    messages_key: str | None = option(None, "column of a chat")
    tools_key: str | None = option(None, "column of the tools of a chat")
    label_key: str | None = option(None, "column of the ground truth")
    system_prompt: str | None = option(None, "system message of chats that have none; makes a text prompt a chat")


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


def task_name(path: str) -> str | None:
    """TASK of ``reasoning-gym:TASK``, None for a file."""
    return path.removeprefix(TASK_PREFIX) if path.startswith(TASK_PREFIX) else None
