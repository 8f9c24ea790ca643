"""Chats to token ids and a mask of what the assistant wrote, by the tokenizer's own chat template.

A template that marks the assistant's words itself (``{% generation %}``) is followed. With any other, the answer of a turn
is what the rendering up to it has beyond the rendering before it with the assistant's opening. The tokens before an answer
are those that an engine is given when it writes one, whatever the answer begins with.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedTokenizerBase

from rlx.data.chat import Chat, apply_template, for_template, render, template_of
from rlx.data.images.intake import StoredImage
from rlx.data.images.reader import ImageReader
from rlx.data.tokenizer import Limit, encode_part, encode_text
from rlx.types.rollout import ImageSpan

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedTokens:
    """One sequence to learn from: ``loss_mask`` is 1 on the tokens to learn. Both have its length; it ends with a 1.

    ``images`` stand among its tokens. ``is_cut``: its text goes on far beyond the limit, and was not tokenised to its end.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    images: tuple[ImageSpan, ...] = ()
    is_cut: bool = False

    def cut(self, num_tokens: int) -> MaskedTokens:
        """The first ``num_tokens``, less what comes after the last token to learn; nothing where there is none."""
        return masked_tokens(self.token_ids[:num_tokens], self.loss_mask[:num_tokens])

    def with_images(self, reader: ImageReader, images: Sequence[StoredImage]) -> MaskedTokens:
        """The same with every placeholder spelt out; nothing of an image is learnt."""
        token_ids, spans = reader.expand(self.token_ids, images)
        lengths = iter([reader.num_tokens(image) for image in images])
        mask: list[int] = []
        for token, learnt in zip(self.token_ids, self.loss_mask, strict=True):
            mask += [0] * next(lengths) if token == reader.vision.image_token else [learnt]
        return replace(masked_tokens(token_ids, mask), images=spans)


def masked_tokens(token_ids: Sequence[int], loss_mask: Sequence[int], is_cut: bool = False) -> MaskedTokens:
    """Packed small, and without the tokens that nothing to learn comes after."""
    end = max((position + 1 for position, learnt in enumerate(loss_mask) if learnt), default=0)
    return MaskedTokens(token_ids=array("i", token_ids[:end]), loss_mask=bytes(loss_mask[:end]), is_cut=is_cut)


def continuation(token_ids: list[int], before: str, text: str, tokenizer: PreTrainedTokenizerBase, *, opens: bool) -> list[int]:
    """The tokens of ``text`` after those of ``before``, which begins as plain text does where ``opens``.

    Those that the whole has further, if it begins with ``token_ids``: alone, some tokenizers would put a space before the
    text. Where the border falls inside a token of the whole, ``text`` is tokenised alone, for the border is kept.
    """
    whole = (encode_text if opens else encode_part)(before + text, tokenizer)
    if whole[: len(token_ids)] == token_ids:
        return whole[len(token_ids) :]
    return encode_part(text, tokenizer)


def encode_text_pair(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, limit: Limit) -> MaskedTokens:
    """A text and its continuation, which is to learn and ends with the end of sequence."""
    whole = prompt + answer
    kept = limit.kept(whole, tokenizer)
    is_cut = len(kept) < len(whole)
    before = encode_text(kept[: len(prompt)], tokenizer)
    if not before and not is_cut:
        raise ValueError("the prompt has no tokens")
    after = continuation(before, kept[: len(prompt)], kept[len(prompt) :], tokenizer, opens=True)
    end = tokenizer.eos_token_id
    if end is not None and after[-1:] != [end] and not is_cut:
        after.append(end)
    return masked_tokens([*before, *after], [0] * len(before) + [1] * len(after), is_cut)


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, limit: Limit, *, last_only: bool) -> MaskedTokens:
    """The chat with the assistant's turns (or its last one) to learn.

    What a template writes after the end-of-sequence token of an answer is not learnt, for no engine would write it.
    Raises ValueError for a chat that cannot be masked: no template, or one that renders a turn differently once others
    follow; and for one that the assistant begins.
    """
    chat = for_template(chat, tokenizer)
    if _GENERATION.search(template_of(tokenizer, chat)):
        return _encode_marked(chat, tokenizer, limit, last_only)
    pieces = list(_pieces(chat, tokenizer, last_only))
    whole = "".join(text for text, _ in pieces)
    kept = limit.kept(whole, tokenizer)
    token_ids: list[int] = []
    loss_mask: list[int] = []
    done = ""
    for full, is_answer in pieces:
        text = full[: len(kept) - len(done)]
        # The template writes its own special tokens.
        piece = continuation(token_ids, done, text, tokenizer, opens=False) if text else []
        token_ids, done = token_ids + piece, done + text
        loss_mask += _answer_mask(piece, tokenizer.eos_token_id) if is_answer else [0] * len(piece)
    return masked_tokens(token_ids, loss_mask, is_cut=len(kept) < len(whole))


def _encode_marked(chat: Chat, tokenizer: PreTrainedTokenizerBase, limit: Limit, last_only: bool) -> MaskedTokens:
    if not limit.kept(render(chat, tokenizer), tokenizer):
        return masked_tokens([], [], is_cut=True)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = cast(Mapping[str, list[int]], apply_template(chat, tokenizer, **options))
    mask = list(encoded["assistant_masks"])
    if last_only and 1 in mask:
        last = len(mask) - 1 - mask[::-1].index(1)
        first = next((at + 1 for at in range(last, -1, -1) if not mask[at]), 0)
        mask = [int(first <= at <= last) for at in range(len(mask))]
    return masked_tokens(list(encoded["input_ids"]), mask)


def _answer_mask(piece: Sequence[int], end: int | None) -> list[int]:
    if end is None or end not in piece:
        return [1] * len(piece)
    last = len(piece) - 1 - list(reversed(piece)).index(end)
    return [int(at <= last) for at in range(len(piece))]


def _pieces(chat: Chat, tokenizer: PreTrainedTokenizerBase, last_only: bool) -> Iterator[tuple[str, bool]]:
    """The rendered chat up to the last answer, cut at the borders of the answers: (text, is an answer)."""
    messages = chat.messages
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if answers and answers[0] == 0:
        raise ValueError("the chat begins with the assistant; a user's or system message must come first")
    whole, done = render(chat, tokenizer), ""
    for index in answers[-1:] if last_only else answers:
        opened = render(replace(chat, messages=messages[:index]), tokenizer, opens_answer=True)
        through = render(replace(chat, messages=messages[: index + 1]), tokenizer)
        if not (opened.startswith(done) and through.startswith(opened) and whole.startswith(through)):
            raise ValueError(
                f"the chat template does not render message {index} as its opening of an answer followed by the answer, the"
                " same whatever follows; use a template that marks answers with {% generation %} (data.chat_template)"
                + ("" if last_only else ", or learn from the last turn alone with finetune.turns=last")
            )
        yield opened[len(done) :], False
        yield through[len(opened) :], True
        done = through
