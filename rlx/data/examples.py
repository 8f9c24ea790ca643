"""The source of fine-tuning examples: rows of answers, or of pairs of answers, to token ids and loss masks.

All rows are read and tokenised at start, packed small (five bytes a token). What a row may hold is in ``docs/finetuning.md``.
Rows that nothing can be learnt from are dropped with a counted reason; rows that cannot be read are errors.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlx.config.schema import DataConfig, FinetuneConfig
from rlx.data.chat import Chat, Message, read_messages, says_something
from rlx.data.chat_mask import MaskedTokens, encode_chat, encode_text_pair
from rlx.data.images.intake import StoredImage
from rlx.data.images.reader import BadImageError, ImageReader, beside, refuse_images
from rlx.data.order import EpochOrder
from rlx.data.plan import Budget, plan_batch, round_up
from rlx.data.questions import tools_of
from rlx.data.rows import EVERY_ROW, Look, Row, column, columns_in, has_more, placed, read_rows, row_digest
from rlx.data.tokenizer import GIVE_BACK, Limit, check_template, template_digest
from rlx.obs.log import logger
from rlx.types.image_arrays import ImageArrays
from rlx.types.layout import BatchPlan, MiniBatchPlan, ParallelDims
from rlx.types.train_batch import TrainBatch

Example = tuple[MaskedTokens, ...]
"""One answer, or the chosen and the rejected one of a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    prompt: str
    answer: str


_Dialogue = _Text | Chat


class _UnusableError(Exception):
    """Nothing can be learnt from the row; the message is the reason it is counted under."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleReader:
    """How a row becomes an example: by its columns, the tokenizer and the limit of a sequence; ``images`` reads those of rows."""

    data: DataConfig
    finetune: FinetuneConfig
    tokenizer: PreTrainedTokenizerBase
    images: ImageReader | None = None

    def rows(self, path: str) -> Iterator[tuple[str, Row]]:
        """The rows of a file, each with its file and line."""
        rows = read_rows(path)
        return rows if self.images is None else self.images.ahead(rows, beside(path))

    def read(self, row: Row, folder: Path) -> tuple[Example, bool]:
        """The example and whether a sequence of it was cut; the relative paths of its images begin in ``folder``. A sequence
        with images is never cut."""
        finetune = self.finetune
        whole = tuple(self._encode(dialogue, row, folder) for dialogue in self._dialogues(row))
        is_long = any(side.is_cut or len(side.token_ids) > finetune.max_tokens for side in whole)
        if is_long and (finetune.overlong == "drop" or any(side.images for side in whole)):
            raise _UnusableError("too_long")
        example = tuple(side.cut(finetune.max_tokens) for side in whole) if is_long else whole
        if not all(side.token_ids for side in example):
            raise _UnusableError("too_long" if is_long else "empty_answer")
        if finetune.is_paired and example[0].token_ids == example[1].token_ids:
            raise _UnusableError("equal_sides")
        return example, is_long

    def nothing_left(self, path: str, drops: Counter[str]) -> str:
        """Why no row of a file can be learnt from."""
        if not drops:
            return f"{path} holds no rows"
        counted = ", ".join(f"{reason} {count}" for reason, count in drops.most_common())
        advice = f"; finetune.max_tokens is {self.finetune.max_tokens}" if drops["too_long"] else ""
        return f"{path}: all {drops.total()} rows are dropped ({counted}){advice}"

    def _encode(self, dialogue: _Dialogue, row: Row, folder: Path) -> MaskedTokens:
        finetune = self.finetune
        pictures: tuple[StoredImage, ...] = ()
        if self.images is None:
            refuse_images(row, self.data.images_key)
        else:
            dialogue, pictures = self._pictured(dialogue, self.images, row, folder)
        limit = Limit(num_tokens=finetune.max_tokens, may_cut=finetune.overlong == "truncate" and not pictures)
        if isinstance(dialogue, Chat):
            side = encode_chat(dialogue, self.tokenizer, limit, last_only=finetune.is_paired or finetune.turns == "last")
        else:
            side = encode_text_pair(dialogue.prompt, dialogue.answer, self.tokenizer, limit)
        return side if self.images is None or side.is_cut else side.with_images(self.images, pictures)

    def _pictured(
        self, dialogue: _Dialogue, images: ImageReader, row: Row, folder: Path
    ) -> tuple[_Dialogue, tuple[StoredImage, ...]]:
        try:
            read, pictures = images.read(dialogue if isinstance(dialogue, Chat) else dialogue.prompt, row, folder)
        except BadImageError as error:
            if not images.drops_bad:
                raise
            logger.warning("rlx: warning: left out: %s", error)
            raise _UnusableError("bad_image") from None
        if isinstance(read, str):
            assert isinstance(dialogue, _Text)
            return replace(dialogue, prompt=read), pictures
        return read, pictures

    def _dialogues(self, row: Row) -> tuple[_Dialogue, ...]:
        """What the row holds, by its columns. ValueError for columns that are missing or of the wrong type."""
        finetune = self.finetune
        if finetune.is_paired:
            keys = (finetune.chosen_key, finetune.rejected_key)
            missing = [key for key in keys if column(row, key) is None]
            if missing:
                raise ValueError(f"no column {missing[0]!r} (finetune.chosen_key, finetune.rejected_key); {columns_in(row)}")
            return tuple(self._with_answer(row, key) for key in keys)
        if column(row, finetune.response_key) is not None:
            return (self._with_answer(row, finetune.response_key),)
        prompt, key = self._prompt(row)
        if prompt is None or isinstance(prompt, str):
            raise ValueError(
                f"neither a chat in {self.data.messages_key!r} nor an answer in {finetune.response_key!r}"
                f" (data.messages_key, finetune.response_key); {columns_in(row)}"
            )
        return (self._chat(row, read_messages(prompt, key)),)

    def _with_answer(self, row: Row, key: str) -> _Dialogue:
        """The answer in column ``key``, text or messages, to the row's prompt."""
        answer = column(row, key)
        prompt, prompt_key = self._prompt(row)
        if not isinstance(answer, str):
            messages = read_messages(answer, key)
            if messages[0]["role"] != "assistant":
                return self._chat(row, messages)
            if prompt is None or isinstance(prompt, str):
                raise ValueError(f"column {key!r} holds the assistant's messages alone; give the prompt as messages too")
            return self._chat(row, [*read_messages(prompt, prompt_key), *messages])
        if prompt is None:
            raise ValueError(f"column {key!r} is the answer to no prompt (data.messages_key, data.prompt_key); {columns_in(row)}")
        if not isinstance(prompt, str):
            return self._chat(row, [*read_messages(prompt, prompt_key), {"role": "assistant", "content": answer}])
        if not answer.strip():
            raise _UnusableError("empty_answer")
        return _Text(prompt=prompt, answer=answer)

    def _prompt(self, row: Row) -> tuple[object, str]:
        """The prompt, text or messages or None, and the column it stands in."""
        named = ((column(row, key), key) for key in (self.data.messages_key, self.data.prompt_key))
        return next(((found, key) for found, key in named if found is not None), (None, ""))

    def _chat(self, row: Row, messages: Sequence[Message]) -> Chat:
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers or not says_something(answers[-1]):
            raise _UnusableError("empty_answer")
        return Chat(messages=messages, tools=tools_of(row, self.data))


class ExampleSource:
    """Deals the examples of ``path``, which ``reader`` makes of its rows.

    ``drops`` counts rows left out: ``too_long``, ``empty_answer``, ``equal_sides`` (of a pair), ``bad_image``.
    ``num_truncated`` counts rows of which a sequence was cut. Raises ValueError for a file that cannot be used, or of which
    nothing is left.
    """

    def __init__(self, path: str, reader: ExampleReader, seed: int) -> None:
        self.drops: Counter[str] = Counter()
        self.num_truncated = 0
        self._path, self._reader, self._template = path, reader, template_digest(reader.tokenizer)
        self._rows = hashlib.blake2b(digest_size=16)
        self._examples = list(self._load())
        if not self._examples:
            raise ValueError(reader.nothing_left(path, self.drops))
        self._order = EpochOrder(len(self._examples), seed=seed, shuffle=reader.data.shuffle)

    def __len__(self) -> int:
        """Usable examples in an epoch."""
        return len(self._examples)

    @property
    def epochs(self) -> float:
        """Epochs dealt so far."""
        return self._order.epochs

    def next(self, num: int) -> list[Example]:
        """The next ``num`` examples; goes over into the next epoch as often as needed."""
        return [self._examples[index] for index in self._order.next(num)]

    def first(self, num: int) -> list[Example]:
        """The first ``num`` in file order, fewer where there are fewer: for evaluation; moves nothing."""
        return self._examples[:num]

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to go on exactly here (JSON-able)."""
        return {**self._order.state(), "rows": self._rows.hexdigest(), "template": self._template}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; ValueError when the file holds other examples now, or the template is another.
        Older checkpoints know the number of examples alone."""
        check_template(state, self._template)
        now = {"num_rows": len(self), "rows": self._rows.hexdigest()}
        was = {name: state.get(name, value) for name, value in now.items()}
        if was != now:
            raise ValueError(
                f"data.train: {self._path} is not what it was when the state was saved: {was} then, {now} now; {GIVE_BACK}"
            )
        self._order.load_state(state)

    def _load(self) -> Iterator[Example]:
        folder = beside(self._path)
        for where, row in self._reader.rows(self._path):
            try:
                with placed(where):
                    example, was_cut = self._reader.read(row, folder)
            except _UnusableError as reason:
                self.drops[str(reason)] += 1
            else:
                self.num_truncated += was_cut
                self._rows.update(row_digest(row) + "".join(span.key for span in example[0].images).encode())
                yield example


def check_examples(path: str, reader: ExampleReader, look: Look = EVERY_ROW) -> int:
    """Look for faults in ``path`` before a run, as ``look`` says; how many of its rows can be learnt from.

    Raises ValueError with file and line, as ``ExampleSource`` would.
    """
    num_usable = 0
    drops: Counter[str] = Counter()
    rows = reader.rows(path)
    for where, row in islice(rows, look.num_rows):
        try:
            with placed(where):
                example, _ = reader.read(row, beside(path))
                for side in example:
                    look.check_ids(side.token_ids)
            num_usable += 1
        except _UnusableError as reason:
            drops[str(reason)] += 1
    if not num_usable:
        nothing = reader.nothing_left(path, drops)
        if not has_more(rows, look):
            raise ValueError(nothing)
        logger.warning("rlx: warning: %s; the file has more", nothing)
    return num_usable


def to_train_batch(examples: Sequence[Example]) -> TrainBatch:
    """Each example's sequences in order; group ids number the examples. So of pairs, the chosen sides have even sample
    ids and the rejected ones the odd ids that follow."""
    numbered = [(group, side) for group, example in enumerate(examples) for side in example]
    batch = TrainBatch.of_lengths([len(side.token_ids) for _, side in numbered], group_ids=[group for group, _ in numbered])
    for sample, (_, side) in zip(batch, numbered, strict=True):
        sample.token_ids[:] = np.asarray(side.token_ids)
        sample.loss_mask[:] = np.frombuffer(bytes(side.loss_mask), np.uint8)
    return replace(batch, images=ImageArrays.of([side.images for _, side in numbered]))


def plan_examples(examples: Sequence[Example], *, dims: ParallelDims, budget: Budget) -> BatchPlan:
    """One mini-batch, cut as ``plan_batch`` cuts, but so that an example's sequences stay side by side in one micro-batch.
    Its members are indices of ``to_train_batch(examples)``."""
    sizes = [sum(round_up(len(side.token_ids), dims.sequence_multiple) for side in example) for example in examples]
    learnt = [[sum(side.loss_mask) for side in example] for example in examples]
    plan = plan_batch(
        sizes,
        list(map(sum, learnt)),
        dims=dims,
        num_mini_batches=1,
        max_tokens=budget.max_tokens,
        load=budget.load_of(
            [[len(side.token_ids) for side in example] for example in examples],
            [[span for side in example for span in side.images] for example in examples],
        ),
    )
    (whole,) = plan.mini_batches
    sides = len(examples[0])
    ranks = tuple(
        tuple(tuple(index * sides + side for index in part for side in range(sides)) for part in rank)
        for rank in whole.micro_batches
    )
    num_sequences = sum(1 for example in learnt for count in example if count)
    part = MiniBatchPlan(micro_batches=ranks, num_loss_tokens=whole.num_loss_tokens, num_sequences=num_sequences)
    return BatchPlan(mini_batches=(part,))
