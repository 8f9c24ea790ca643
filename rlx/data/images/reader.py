"""Images of a row: which it names, where its chat or text has them, and token ids with the places of each spelt out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlx.arch.families.registry import read_architecture
from rlx.arch.vision import Vision
from rlx.config.schema import DataConfig
from rlx.data.chat import Chat, Message
from rlx.data.images.grid import num_image_tokens
from rlx.data.images.intake import ImageIntake, StoredImage, image_rules
from rlx.data.rows import Row, column, columns_in
from rlx.obs.log import logger
from rlx.types.rollout import ImageSpan

MARK = "<image>"
"""Stands for an image in the texts of rows that have images."""
_OWN = ("image", "path", "bytes", "base64", "url", "image_url")


class BadImageError(ValueError):
    """An image of the row cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReader:
    """Reads the images of rows for a model with a tower. ``key`` is the column of images; ``drops_bad``: whether a row whose
    image cannot be used is counted and left out."""

    intake: ImageIntake
    tokenizer: PreTrainedTokenizerBase
    key: str | None
    drops_bad: bool
    _told: set[str] = field(default_factory=set, init=False, repr=False)

    @property
    def vision(self) -> Vision:
        return self.intake.rules.vision

    def ahead(self, rows: Iterable[tuple[str, Row]], folder: Path) -> Iterator[tuple[str, Row]]:
        """The same rows, while threads take in the images of those that follow. Faults are told when a row is read."""
        num_threads = max(1, len(os.sched_getaffinity(0)))
        waiting: deque[tuple[tuple[str, Row], Future[None]]] = deque()
        with ThreadPoolExecutor(num_threads) as pool:
            for item in rows:
                waiting.append((item, pool.submit(self._warm, item[1], folder)))
                if len(waiting) > 4 * num_threads:
                    yield _done(waiting)
            while waiting:
                yield _done(waiting)

    def read(self, prompt: str | Chat, row: Row, folder: Path) -> tuple[str | Chat, tuple[StoredImage, ...]]:
        """The row's text or chat with placeholders where its images stand, and those in that order.

        Raises ValueError where placeholders and images are not as many, BadImageError for an image that cannot be used.
        """
        listed = _listed(row, self.key)
        if not listed:
            self._tell_of_marks(prompt, row)
        if isinstance(prompt, str):
            text, sources = self._in_text(prompt, listed)
            return text, self._taken(sources, folder)
        messages: list[Message] = []
        left = iter(listed)
        sources = []
        for index, message in enumerate(prompt.messages):
            parts = self._parts(message, bool(listed), f"message {index}")
            if parts is None:
                messages.append(message)
                continue
            written = []
            for part in parts:
                if part["type"] == "image":
                    sources.append(_source_of(part, left, self._column(row), len(listed)))
                    part = {"type": "image"}
                written.append(part)
            messages.append({**message, "content": written})
        _refuse_rest(len(listed), sum(1 for _ in left), self.key)
        return Chat(messages=messages, tools=prompt.tools) if sources else prompt, self._taken(sources, folder)

    def expand(self, token_ids: Sequence[int], images: Sequence[StoredImage]) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Token ids with one placeholder an image as ids with as many as the image has merged patches, and where each stands.

        Raises ValueError where they are not as many: a template that writes none for an image, or two.
        """
        placeholder = self.vision.image_token
        at = [index for index, token in enumerate(token_ids) if token == placeholder]
        if len(at) != len(images):
            raise ValueError(f"the chat template writes {len(at)} placeholders for {len(images)} images (data.chat_template)")
        expanded: list[int] = []
        spans = []
        done = 0
        for index, image in zip(at, images, strict=True):
            expanded += token_ids[done:index]
            spans.append(image.at(len(expanded)))
            expanded += [placeholder] * self.num_tokens(image)
            done = index + 1
        return [*expanded, *token_ids[done:]], tuple(spans)

    def _column(self, row: Row) -> str:
        """What rows have their images in, in words."""
        if self.key is None or column(row, self.key) is not None:
            return _names(self.key)
        return f"{_names(self.key)}, which is not there: {columns_in(row)}"

    def _tell_of_marks(self, prompt: str | Chat, row: Row) -> None:
        """Once: marks of a row without images are plain text, which is seldom meant."""
        texts = [prompt] if isinstance(prompt, str) else [str(message.get("content")) for message in prompt.messages]
        if not self._told and any(MARK in text for text in texts):
            self._told.add(MARK)
            logger.warning(
                "rlx: warning: a row has %s in its text and no image in %s: the model reads it as text", MARK, self._column(row)
            )

    def num_tokens(self, image: StoredImage) -> int:
        """How many tokens an image is."""
        return num_image_tokens(image.grid, self.vision.merge)

    def _warm(self, row: Row, folder: Path) -> None:
        for source in _listed(row, self.key):
            with suppress(ValueError):
                self.intake.take(source, folder)

    def _taken(self, sources: Sequence[object], folder: Path) -> tuple[StoredImage, ...]:
        try:
            return tuple(self.intake.take(source, folder) for source in sources)
        except ValueError as error:
            raise BadImageError(str(error)) from None

    def _parts(self, message: Message, has_images: bool, where: str) -> list[Mapping[str, object]] | None:
        """The message's parts, marks in its texts made parts of their own; None where it has no image."""
        content = message.get("content")
        given = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
        parts: list[Mapping[str, object]] = []
        for part in given:
            kind = str(part["type"])
            if kind in ("video", "video_url"):
                raise ValueError(f"{where} has a part of type {kind!r}; videos are not supported")
            if kind in ("image", "image_url", "input_image"):
                parts.append({**part, "type": "image"})
            elif kind == "text":
                self._refuse_tokens(str(part["text"]), where)
                parts += _split(str(part["text"])) if has_images else [part]
            else:
                parts.append(part)
        return parts if any(part["type"] == "image" for part in parts) else None

    def _in_text(self, text: str, listed: Sequence[object]) -> tuple[str, list[object]]:
        """A text that no template writes: marks become the model's own tokens, which may stand there as well."""
        start, placeholder, end = (self._token(token) for token in self._framed)
        num_written = text.count(placeholder)
        num = num_written + (text.count(MARK) if listed else 0)
        if self._token(self.vision.video_token) in text:
            raise ValueError(f"the text holds {self._token(self.vision.video_token)}; videos are not supported")
        if num != len(listed):
            raise ValueError(
                f"the text has {num} places for images ({MARK} or {placeholder}), but {_names(self.key)} holds {len(listed)}"
            )
        return text.replace(MARK, f"{start}{placeholder}{end}") if listed else text, list(listed)

    @property
    def _framed(self) -> tuple[int, int, int]:
        return self.vision.start_token, self.vision.image_token, self.vision.end_token

    def _refuse_tokens(self, text: str, where: str) -> None:
        for token in (self.vision.image_token, self.vision.video_token):
            if self._token(token) in text:
                raise ValueError(
                    f"{where}: the text holds {self._token(token)}, which stands for an image in the model's own tokens; write"
                    f' {MARK} or a part {{"type": "image"}}'
                )

    def _token(self, token_id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token_id))


def image_reader(
    model_path: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    kept_in: Path | None,
    num_decoded: int | None = None,
) -> ImageReader | None:
    """What reads the images of rows for this model, taking them in under ``kept_in`` and ``num_decoded``; None for a model that
    sees none.

    Raises ValueError for a model folder without an image processor that is known.
    """
    vision = read_architecture(model_path).vision
    if vision is None:
        return None
    rules = image_rules(model_path, vision, data.min_pixels, data.max_pixels)
    intake = ImageIntake(rules, kept_in, num_decoded)
    return ImageReader(intake=intake, tokenizer=tokenizer, key=data.images_key, drops_bad=data.bad_images == "drop")


def beside(path: str) -> Path:
    """Where the relative paths of a file's rows begin."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _done(waiting: deque[tuple[tuple[str, Row], Future[None]]]) -> tuple[str, Row]:
    item, images = waiting.popleft()
    images.result()
    return item


def refuse_images(row: Row, key: str | None) -> None:
    """ValueError for a row with images beside a model that sees none."""
    if key is not None and _listed(row, key):
        raise ValueError(f"the row has images in {key!r} (data.images_key), but the model of model.path has no vision tower")


def _listed(row: Row, key: str | None) -> list[object]:
    found = None if key is None else column(row, key)
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]


def _names(key: str | None) -> str:
    return "no column of images (data.images_key)" if key is None else f"the column {key!r} (data.images_key)"


def _split(text: str) -> Iterator[Mapping[str, object]]:
    for index, piece in enumerate(text.split(MARK)):
        if index:
            yield {"type": "image"}
        if piece:
            yield {"type": "text", "text": piece}


def _source_of(part: Mapping[str, object], left: Iterator[object], where: str, num_listed: int) -> object:
    """The image of a part: its own, or the next of the column."""
    own = next((part[name] for name in _OWN if part.get(name) is not None), None)
    if own is not None:
        return own
    try:
        return next(left)
    except StopIteration:
        raise ValueError(
            f"the chat has more places for images ({MARK} or parts of type image) than the {num_listed} in {where}"
        ) from None


def _refuse_rest(num_listed: int, num_left: int, key: str | None) -> None:
    if num_left:
        raise ValueError(
            f"{_names(key)} holds {num_listed} images, but the chat has places for {num_listed - num_left}: write {MARK} or a"
            ' part {"type": "image"} where each stands'
        )
