"""Chats to token ids and a mask of what the assistant wrote, by the tokenizer's own chat template.

A template that marks the assistant's words itself (``{% generation %}``) is followed. With any other, the answer of a turn
is what the rendering up to it has beyond the rendering before it with the assistant's opening. The tokens before an answer
are those that an engine is given when it writes one, whatever the answer begins with.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, object]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedTokens:
    """One sequence to learn from: ``loss_mask`` is 1 on the tokens to learn. Both have its length; it ends with a 1."""

    token_ids: Sequence[int]
    loss_mask: Sequence[int]

    def cut(self, num_tokens: int) -> MaskedTokens:
        """The first ``num_tokens``, less what comes after the last token to learn; nothing where there is none."""
        return masked_tokens(self.token_ids[:num_tokens], self.loss_mask[:num_tokens])


def masked_tokens(token_ids: Sequence[int], loss_mask: Sequence[int]) -> MaskedTokens:
    """Packed small, and without the tokens that nothing to learn comes after."""
    end = max((position + 1 for position, learnt in enumerate(loss_mask) if learnt), default=0)
    return MaskedTokens(token_ids=array("i", token_ids[:end]), loss_mask=bytes(loss_mask[:end]))


def continuation(
    token_ids: list[int], before: str, text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> list[int]:
    """The tokens of ``text`` after those of ``before``.

    Those that the whole has further, if it begins with ``token_ids``: alone, some tokenizers would put a space before the
    text. Where the border falls inside a token of the whole, ``text`` is tokenised alone, for the border is kept.
    """
    whole = list(tokenizer.encode(before + text, add_special_tokens=add_special_tokens))
    if whole[: len(token_ids)] == token_ids:
        return whole[len(token_ids) :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def checked_chat(value: object, column: str) -> list[Message]:
    """``value`` as a chat; ValueError when it is none."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"column {column!r} must be a list of role/content objects, got {value!r}")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"column {column!r}: each message needs role and content, got {message!r}")
    return list(value)


def encode_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, last_only: bool) -> MaskedTokens:
    """The chat with the assistant's turns (or its last one) to learn.

    What a template writes after the end-of-sequence token of an answer is not learnt, for no engine would write it.
    Raises ValueError for a chat that cannot be masked: no template, or one that renders a turn differently once others
    follow; and for one that the assistant begins.
    """
    template = tokenizer.chat_template
    if not template:
        raise ValueError(
            "the row holds a chat, but the tokenizer has no chat template: set data.chat_template to a Jinja file,"
            " or give prompts and answers as text"
        )
    if isinstance(template, str) and _GENERATION.search(template):
        return _encode_marked(messages, tokenizer, last_only)
    token_ids: list[int] = []
    loss_mask: list[int] = []
    done = ""
    for text, is_answer in _pieces(messages, tokenizer, last_only):
        # The template writes its own special tokens.
        piece = continuation(token_ids, done, text, tokenizer, add_special_tokens=False)
        token_ids, done = token_ids + piece, done + text
        loss_mask += _answer_mask(piece, tokenizer.eos_token_id) if is_answer else [0] * len(piece)
    return masked_tokens(token_ids, loss_mask)


def _encode_marked(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, last_only: bool) -> MaskedTokens:
    encoded = cast(
        Mapping[str, list[int]],
        tokenizer.apply_chat_template(
            cast(Any, list(messages)), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        ),
    )
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


def _pieces(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, last_only: bool) -> Iterator[tuple[str, bool]]:
    """The rendered chat up to the last answer, cut at the borders of the answers: (text, is an answer)."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if answers and answers[0] == 0:
        raise ValueError("the chat begins with the assistant; a user's or system message must come first")
    whole, done = _render(messages, tokenizer), ""
    for index in answers[-1:] if last_only else answers:
        opened = _render(messages[:index], tokenizer, opens_answer=True)
        through = _render(messages[: index + 1], tokenizer)
        if not (opened.startswith(done) and through.startswith(opened) and whole.startswith(through)):
            raise ValueError(
                f"the chat template does not render message {index} as its opening of an answer followed by the answer, the"
                " same whatever follows; use a template that marks answers with {% generation %} (data.chat_template)"
                + ("" if last_only else ", or learn from the last turn alone with finetune.turns=last")
            )
        yield opened[len(done) :], False
        yield through[len(opened) :], True
        done = through


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, opens_answer: bool = False) -> str:
    rendered = tokenizer.apply_chat_template(cast(Any, list(messages)), tokenize=False, add_generation_prompt=opens_answer)
    assert isinstance(rendered, str)
    return rendered
