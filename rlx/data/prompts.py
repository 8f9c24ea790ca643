"""The source of prompts: reads a file once, then deals its rows in a seeded order, epoch after epoch.

All rows are read and tokenised at start and stay in memory: prompt sets are small beside models, and every fault in the
file shows before anything else starts. The order of an epoch depends on (seed, epoch) alone, so four integers resume it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import DataConfig
from rlx.data.rows import Row, read_rows
from rlx.data.tokenizer import encode_prompt
from rlx.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    token_ids: tuple[int, ...]
    text: str
    label: str | None
    extra: Mapping[str, object]


class PromptSource:
    """Deals the prompts of ``config.train``.

    ``drops`` counts rows left out by reason (``prompt_too_long``). Raises ValueError for a file that cannot be used:
    unreadable, empty, without a prompt column, or with nothing but too long prompts.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._config, self._seed = config, seed
        self.drops: Counter[str] = Counter()
        self._questions = self._load(tokenizer)
        self._epoch = self._offset = self._next_id = 0
        self._order = self._order_of_epoch()

    def __len__(self) -> int:
        """Usable prompts in an epoch."""
        return len(self._questions)

    def next(self, num: int) -> list[Prompt]:
        """The next ``num`` prompts; goes over into the next epoch as often as needed."""
        return [self._draw() for _ in range(num)]

    def epoch(self) -> Iterator[Prompt]:
        """Every usable prompt once, in file order, with its row number as id: for evaluation; moves nothing."""
        for index in range(len(self._questions)):
            yield self._prompt(index, index)

    def state(self) -> dict[str, int]:
        """What ``load_state`` needs to go on exactly here (JSON-able)."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "next_prompt_id": self._next_id,
            "num_questions": len(self._questions),
        }

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken; ValueError when the file holds another number of prompts now."""
        if state["num_questions"] != len(self._questions):
            raise ValueError(
                f"data.train {self._config.train} holds {len(self._questions)} usable prompts,"
                f" but {state['num_questions']} when the state was saved"
            )
        self._epoch, self._offset, self._next_id = state["epoch"], state["offset"], state["next_prompt_id"]
        self._order = self._order_of_epoch()

    def _draw(self) -> Prompt:
        if self._offset == len(self._order):
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._order_of_epoch()
        prompt = self._prompt(self._order[self._offset], self._next_id)
        self._offset, self._next_id = self._offset + 1, self._next_id + 1
        return prompt

    def _prompt(self, index: int, prompt_id: int) -> Prompt:
        question = self._questions[index]
        return Prompt(
            prompt_id=prompt_id,
            token_ids=question.token_ids,
            text=question.text,
            label=question.label,
            source=self._config.train,
            extra=question.extra,
        )

    def _order_of_epoch(self) -> list[int]:
        order = list(range(len(self._questions)))
        if self._config.shuffle:
            random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order

    def _load(self, tokenizer: PreTrainedTokenizerBase) -> list[_Question]:
        questions = []
        for where, row in read_rows(self._config.train):
            try:
                question = _to_question(row, self._config, tokenizer)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if len(question.token_ids) > self._config.max_prompt_tokens:
                self.drops["prompt_too_long"] += 1
            else:
                questions.append(question)
        if not questions and self.drops:
            raise ValueError(
                f"data.train {self._config.train}: all {self.drops.total()} prompts are longer than"
                f" data.max_prompt_tokens = {self._config.max_prompt_tokens}"
            )
        if not questions:
            raise ValueError(f"data.train {self._config.train} holds no rows")
        return questions


def check_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_encoded: int = 64) -> None:
    """Look for faults in ``config.train`` before a run: every row is read, the first ``num_encoded`` are tokenised too.

    Raises ValueError with file and line, as ``PromptSource`` would.
    """
    num_rows = 0
    for where, row in read_rows(config.train):
        try:
            if num_rows < num_encoded:
                _to_question(row, config, tokenizer)
            else:
                _check_columns(row, config)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        num_rows += 1
    if not num_rows:
        raise ValueError(f"data.train {config.train} holds no rows")


def _check_columns(row: Row, config: DataConfig) -> None:
    if row.get(config.messages_key) is None and row.get(config.prompt_key) is None:
        columns = ", ".join(row) or "none"
        raise ValueError(
            f"neither a {config.messages_key!r} nor a {config.prompt_key!r} column; the columns are {columns}"
            " (data.messages_key and data.prompt_key name them)"
        )


def _to_question(row: Row, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> _Question:
    _check_columns(row, config)
    token_ids, text = encode_prompt(row, config, tokenizer)
    if not token_ids:
        raise ValueError("the prompt has no tokens")
    label = row.get(config.label_key)
    used = {config.messages_key, config.prompt_key, config.label_key}
    return _Question(
        token_ids=tuple(token_ids),
        text=text,
        label=None if label is None else str(label),
        extra={key: value for key, value in row.items() if key not in used},
    )
