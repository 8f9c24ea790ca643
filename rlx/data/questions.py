"""Reading one source of prompts into questions: rows, columns, chat template, length limit.

Everything is read and tokenised at once and stays in memory: prompt sets are small beside models, and every fault in a file
shows before anything else starts.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import DataConfig
from rlx.config.sources import DRAWN_PREFIX, EvaluationSetConfig, SourceConfig, task_of
from rlx.data.chat import Chat, Message, for_template, read_messages, read_tools, render
from rlx.data.drawn.table import read_drawn
from rlx.data.images.intake import StoredImage
from rlx.data.images.reader import BadImageError, ImageReader, beside, refuse_images
from rlx.data.rows import Look, Row, column, columns_in, has_more, label_in, placed, read_rows, row_digest
from rlx.data.tasks import read_task
from rlx.data.tokenizer import encode_part, encode_text, is_surely_longer, most_bytes
from rlx.obs.log import logger
from rlx.types.rollout import ImageSpan, LabelUse, Prompt

Source = SourceConfig | EvaluationSetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row, ready to be asked. ``level`` is its number in the curriculum's column (0 without one); ``digest`` names it."""

    token_ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...]
    label: object
    level: float
    extra: Mapping[str, object]
    digest: bytes
    images: tuple[ImageSpan, ...] = ()

    def ask(self, prompt_id: int, source: str) -> Prompt:
        """The prompt ``prompt_id`` of a run."""
        return Prompt(
            prompt_id=prompt_id,
            token_ids=self.token_ids,
            text=self.text,
            messages=self.messages,
            label=self.label,
            source=source,
            extra=self.extra,
            images=self.images,
        )


def read_questions(
    source: Source,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    default_seed: int = 0,
    limit: int | None = None,
    images: ImageReader | None = None,
) -> tuple[list[Question], Counter[str]]:
    """All usable questions of ``source`` (the first ``limit``) in file order, and how many were not as they stand there, by what
    became of them: ``prompt_too_long`` (left out), ``prompt_truncated`` (its last tokens kept, as the question's end stands
    there) or ``bad_image`` (left out where ``data.bad_images`` says so).

    ``default_seed`` seeds a task that has none of its own; ``images`` reads those of rows, None for a model that sees none.
    Raises ValueError for a source that cannot be used: unreadable, empty, without a prompt column, with a level that is no
    number, or with nothing but too long prompts.
    """
    data = columns_of(source, data)
    counts: Counter[str] = Counter()
    questions: list[Question] = []
    num_rows = 0
    rows = _rows(source, data, default_seed)
    for where, row in rows if images is None else images.ahead(rows, beside(source.path)):
        if len(questions) == limit:
            break
        num_rows += 1
        with placed(where):
            question, fate = _to_question(row, source, data, tokenizer, images, where)
        if question is not None:
            questions.append(question)
        if fate is not None:
            counts[fate] += 1
    _refuse_nothing(source, data, num_rows, len(questions))
    return questions, counts


def check_questions(
    source: Source,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    use: LabelUse,
    look: Look,
    images: ImageReader | None = None,
) -> bool | None:
    """Look for faults before a run, as ``look`` says. Returns whether any of the rows has a label; None where none has that was
    looked at, and there are more.

    Raises ValueError with file and line, as ``read_questions`` would, and for a label that ``use`` has no use for.
    """
    data = columns_of(source, data)
    num_rows, num_kept, is_labelled = 0, 0, False
    rows = _rows(source, data, look.seed)
    first = islice(rows, look.num_rows)
    for num_rows, (where, row) in enumerate(first if images is None else images.ahead(first, beside(source.path)), start=1):
        with placed(where):
            question, _ = _to_question(row, source, data, tokenizer, images, where)
            is_labelled |= _checked_label(row, data, use) is not None
            if question is not None:
                num_kept += 1
                look.check_ids(question.token_ids)
                look.check_prompt(question.ask(num_rows, look.source or source.path))
    if (is_labelled and num_kept) or not has_more(rows, look):
        _refuse_nothing(source, data, num_rows, num_kept)
        return is_labelled
    if not num_kept:
        logger.warning(
            "rlx: warning: %s: the first %d prompts are all longer than data.max_prompt_tokens = %d",
            source.path,
            num_rows,
            data.max_prompt_tokens,
        )
    return is_labelled or None


def _refuse_nothing(source: Source, data: DataConfig, num_rows: int, num_kept: int) -> None:
    if not num_rows:
        raise ValueError(f"{source.path} holds no rows")
    if not num_kept:
        raise ValueError(
            f"{source.path}: all {num_rows} prompts are longer than data.max_prompt_tokens = {data.max_prompt_tokens}"
        )


def columns_of(source: Source, data: DataConfig) -> DataConfig:
    """``data`` with what ``source`` says about its own columns."""
    keys = ("prompt_key", "messages_key", "tools_key", "label_key", "system_prompt")
    own = {key: getattr(source, key) for key in keys}
    return replace(data, **{key: value for key, value in own.items() if value is not None})


def fingerprint(questions: list[Question]) -> str:
    """Names the rows of this list and their order, however they are rendered."""
    return hashlib.blake2b(b"".join(question.digest for question in questions), digest_size=16).hexdigest()


def rendered_fingerprint(questions: list[Question]) -> str:
    """As older checkpoints name a list: by its token ids, labels and levels."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        digest.update(repr((question.token_ids, question.label, question.level)).encode())
    return digest.hexdigest()


def _rows(source: Source, data: DataConfig, default_seed: int) -> Iterator[tuple[str, Row]]:
    named = task_of(source.path)
    if named is not None and named[0] == DRAWN_PREFIX:
        return read_drawn(named[1], source.args, default_seed, data)
    if named is not None:
        return read_task(named[1], source.args, default_seed, data.prompt_key, data.label_key)
    if source.args:
        raise ValueError(f"{source.path}: only a task takes args, got {dict(source.args)}")
    return read_rows(source.path)


def _prompt_of(row: Row, data: DataConfig) -> str | Chat:
    """What the row asks: a text, or a chat. ``data.system_prompt`` opens chats that begin with no system message, and makes a
    chat of a text. ValueError for a row with neither, or of the wrong type."""
    messages, prompt = column(row, data.messages_key), column(row, data.prompt_key)
    if messages is None and prompt is None:
        raise ValueError(
            f"neither a {data.messages_key!r} nor a {data.prompt_key!r} column; {columns_in(row)}"
            " (data.messages_key and data.prompt_key name them)"
        )
    if messages is None and not isinstance(prompt, str):
        raise ValueError(f"column {data.prompt_key!r} must be text, got {type(prompt).__name__}; data.messages_key names chats")
    if messages is None and data.system_prompt is None:
        return str(prompt)
    chat = [{"role": "user", "content": prompt}] if messages is None else read_messages(messages, data.messages_key)
    if data.system_prompt and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": data.system_prompt}, *chat]
    return Chat(messages=chat, tools=tools_of(row, data))


def _to_question(
    row: Row, source: Source, data: DataConfig, tokenizer: PreTrainedTokenizerBase, images: ImageReader | None, where: str
) -> tuple[Question | None, str | None]:
    """The question of a row, None when it is left out; and what became of it when it was over the length limit, or an image of
    it could not be used."""
    prompt, limit = _prompt_of(row, data), data.max_prompt_tokens
    pictures: tuple[StoredImage, ...] = ()
    if images is None:
        refuse_images(row, data.images_key)
    else:
        try:
            prompt, pictures = images.read(prompt, row, beside(source.path))
        except BadImageError as error:
            if not images.drops_bad:
                raise
            logger.warning("rlx: warning: %s: left out: %s", where, error)
            return None, "bad_image"
    text = prompt if isinstance(prompt, str) else render(for_template(prompt, tokenizer), tokenizer, opens_answer=True)
    encode = encode_text if isinstance(prompt, str) else encode_part  # a template writes its own special tokens
    is_long, overlong = is_surely_longer(text, limit, tokenizer), "drop" if pictures else data.overlong
    if is_long and overlong == "truncate":
        text = _tail(text, limit, tokenizer)
    token_ids = [] if is_long and overlong == "drop" else encode(text, tokenizer)
    if not token_ids and not (is_long and overlong == "drop"):
        raise ValueError("the prompt has no tokens")
    spans: tuple[ImageSpan, ...] = ()
    if images is not None and token_ids:
        token_ids, spans = images.expand(token_ids, pictures)
    question = Question(
        token_ids=tuple(token_ids),
        text=text,
        messages=() if isinstance(prompt, str) else tuple(prompt.messages),
        label=label_in(row, data.label_key),
        level=_level_of(row, source, data),
        extra=_extra(row, data, [] if images is None else images.intake.files(spans)),
        digest=row_digest(row) if not pictures else _with_images(row, pictures),
        images=spans,
    )
    if not is_long and len(token_ids) <= limit:
        return question, None
    if overlong == "drop":
        return None, "prompt_too_long"
    return question if len(token_ids) <= limit else _truncated(question, limit, tokenizer), "prompt_truncated"


def _extra(row: Row, data: DataConfig, files: list[str]) -> dict[str, object]:
    """The row's other columns; that of images holds the files that trainer and engine read."""
    used = {data.messages_key, data.prompt_key, data.label_key, data.images_key if files else None}
    extra = {key: value for key, value in row.items() if key not in used}
    return extra | ({data.images_key: files} if files and data.images_key is not None else {})


def _with_images(row: Row, images: Sequence[StoredImage]) -> bytes:
    """Names a row and what its images show: another picture under the old name makes another row."""
    return hashlib.blake2b(row_digest(row) + "".join(image.key for image in images).encode(), digest_size=16).digest()


def tools_of(row: Row, data: DataConfig) -> list[Mapping[str, object]] | None:
    """The tools beside a row's messages."""
    return None if data.tools_key is None else read_tools(column(row, data.tools_key), data.tools_key)


def _checked_label(row: Row, data: DataConfig, use: LabelUse) -> object:
    label = label_in(row, data.label_key)
    if use.is_compared and label is not None and not isinstance(label, str):
        raise ValueError(
            f"the label in {data.label_key!r} (data.label_key) is {type(label).__name__} {label!r:.200}; the reward compares"
            " with text or a number (a.b names the field b of column a; a function of your own gets labels as they are)"
        )
    return label


def _tail(text: str, limit: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of a text, far more of it than the limit, behind the opening token that it may begin with."""
    opening = str(tokenizer.bos_token or "")
    return (opening if text.startswith(opening) else "") + text[-2 * most_bytes(limit, tokenizer) :]


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
    found = column(row, key)
    try:
        level = math.nan if isinstance(found, bool) or not isinstance(found, int | float) else float(found)
    except OverflowError:
        level = math.inf
    if not math.isfinite(level):
        raise ValueError(f"the curriculum's column {key!r} (data.curriculum_key) must hold a finite number, got {found!r:.200}")
    return level
