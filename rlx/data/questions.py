"""Reading one source of prompts into questions: rows, columns, chat template, length limit.

Everything is read and tokenised at once and stays in memory: prompt sets are small beside models, and every fault in a file
shows before anything else starts.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import DataConfig
from rlx.config.sources import EvaluationSetConfig, SourceConfig, task_name
from rlx.data.rows import Row, read_rows
from rlx.data.tasks import read_task
from rlx.data.tokenizer import encode_prompt
from rlx.types.rollout import Prompt

Source = SourceConfig | EvaluationSetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row, ready to be asked. ``level`` is its number in the curriculum's column (0 without one)."""

    token_ids: tuple[int, ...]
    text: str
    label: str | None
    level: float
    extra: Mapping[str, object]

    def ask(self, prompt_id: int, source: str) -> Prompt:
        """The prompt ``prompt_id`` of a run."""
        return Prompt(
            prompt_id=prompt_id, token_ids=self.token_ids, text=self.text, label=self.label, source=source, extra=self.extra
        )


def read_questions(
    source: Source, data: DataConfig, tokenizer: PreTrainedTokenizerBase, default_seed: int = 0
) -> tuple[list[Question], Counter[str]]:
    """All usable questions of ``source`` in file order, and how many were too long, by what became of them:
    ``prompt_too_long`` (left out) or ``prompt_truncated`` (its last tokens kept, as the question's end stands there).

    ``default_seed`` seeds a reasoning-gym task that has none of its own. Raises ValueError for a source that cannot be used:
    unreadable, empty, without a prompt column, with a level that is no number, or with nothing but too long prompts.
    """
    data = columns_of(source, data)
    counts: Counter[str] = Counter()
    questions = []
    for where, row in _rows(source, data, default_seed):
        try:
            question = _to_question(row, source, data, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if len(question.token_ids) <= data.max_prompt_tokens:
            questions.append(question)
        elif data.overlong == "truncate":
            questions.append(_truncated(question, data.max_prompt_tokens, tokenizer))
            counts["prompt_truncated"] += 1
        else:
            counts["prompt_too_long"] += 1
    if not questions and counts:
        raise ValueError(
            f"{source.path}: all {counts.total()} prompts are longer than data.max_prompt_tokens = {data.max_prompt_tokens}"
        )
    if not questions:
        raise ValueError(f"{source.path} holds no rows")
    return questions, counts


def check_questions(
    source: Source, data: DataConfig, tokenizer: PreTrainedTokenizerBase, default_seed: int = 0, num_encoded: int = 64
) -> bool:
    """Look for faults before a run: every row of a file is read and the first ``num_encoded`` are tokenised too; of a task
    only so many questions are made. Returns whether any of those has a label.

    Raises ValueError with file and line, as ``read_questions`` would.
    """
    data = columns_of(source, data)
    num_rows, is_labelled = 0, False
    for where, row in _rows(source, data, default_seed):
        try:
            if num_rows < num_encoded:
                is_labelled |= _to_question(row, source, data, tokenizer).label is not None
            elif task_name(source.path) is not None:
                break
            else:
                _check_columns(row, data)
                _level_of(row, source, data)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        num_rows += 1
    if not num_rows:
        raise ValueError(f"{source.path} holds no rows")
    return is_labelled


def columns_of(source: Source, data: DataConfig) -> DataConfig:
    """``data`` with what ``source`` says about its own columns."""
    own = {key: getattr(source, key) for key in ("prompt_key", "messages_key", "label_key", "system_prompt")}
    return replace(data, **{key: value for key, value in own.items() if value is not None})


def fingerprint(questions: list[Question]) -> str:
    """Names this list: other token ids, labels, levels or another order give another fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        digest.update(repr((question.token_ids, question.label, question.level)).encode())
    return digest.hexdigest()


def _rows(source: Source, data: DataConfig, default_seed: int) -> Iterator[tuple[str, Row]]:
    task = task_name(source.path)
    if task is not None:
        return read_task(task, source.args, default_seed, data.prompt_key, data.label_key)
    if source.args:
        raise ValueError(f"{source.path}: only a reasoning-gym task takes args, got {dict(source.args)}")
    return read_rows(source.path)


def _check_columns(row: Row, data: DataConfig) -> None:
    if row.get(data.messages_key) is None and row.get(data.prompt_key) is None:
        columns = ", ".join(row) or "none"
        raise ValueError(
            f"neither a {data.messages_key!r} nor a {data.prompt_key!r} column; the columns are {columns}"
            " (data.messages_key and data.prompt_key name them)"
        )


def _to_question(row: Row, source: Source, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Question:
    _check_columns(row, data)
    token_ids, text = encode_prompt(row, data, tokenizer)
    if not token_ids:
        raise ValueError("the prompt has no tokens")
    label = row.get(data.label_key)
    used = {data.messages_key, data.prompt_key, data.label_key}
    return Question(
        token_ids=tuple(token_ids),
        text=text,
        label=None if label is None else str(label),
        level=_level_of(row, source, data),
        extra={key: value for key, value in row.items() if key not in used},
    )


def _truncated(question: Question, limit: int, tokenizer: PreTrainedTokenizerBase) -> Question:
    """The last ``limit`` tokens; a beginning-of-sequence token stays in front, as models do badly without it."""
    opening = question.token_ids[:1] if question.token_ids[0] == tokenizer.bos_token_id and limit > 1 else ()
    kept = opening + question.token_ids[len(opening) - limit :]
    return replace(question, token_ids=kept, text=str(tokenizer.decode(list(kept))))


def _level_of(row: Row, source: Source, data: DataConfig) -> float:
    """The number in the curriculum's column; evaluation has no order, and no level."""
    if not isinstance(source, SourceConfig):
        return 0.0
    key = source.curriculum_key or data.curriculum_key
    if key is None:
        return 0.0
    found: object = row
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"the curriculum's column {key!r} (data.curriculum_key) must hold a finite number, got {found!r}")
    return float(found)
