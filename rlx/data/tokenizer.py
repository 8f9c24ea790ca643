"""The tokenizer of a model folder, and text to token ids. Text becomes tokens here and nowhere else in a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlx.arch.fields import tokens_problem
from rlx.config.schema import DataConfig, ModelConfig

# Any one of these is enough for AutoTokenizer to build a tokenizer from a folder.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# A token stands for no more bytes than the longest one has; small vocabularies may throw away more (spaces, unknown words).
_BYTES_A_TOKEN = 128


# What to do when a run's data cannot be gone on with.
GIVE_BACK = "give what the run began with, or begin a new run in another run.dir"
_PROBE = "The quick brown fox: 12 + 34 = 46.\n\tna\u00efve \u4f60\u597d \U0001f642 def f(x): return x<|im_end|></s>"


def tokenizer_of(model: ModelConfig, data: DataConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a run reads and writes with."""
    return load_tokenizer(model.tokenizer_path or model.path, data.chat_template, data.template_date)


def load_tokenizer(path: str, chat_template: str | None = None, template_date: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder ``path``; ``chat_template`` (a Jinja file) replaces its own template, ``template_date`` (ISO)
    is the day that templates take for today.

    Raises ValueError naming what is missing: the folder, its vocabulary, or the template file.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        raise ValueError(f"model.tokenizer_path: {path} is not a folder")
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise ValueError(f"model.tokenizer_path: {path} holds no tokenizer; expected one of {', '.join(_VOCABULARY_FILES)}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its backends raise whatever a broken file makes them
        raise ValueError(f"model.tokenizer_path: the tokenizer in {path} cannot be loaded: {_said(error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        _check_syntax(tokenizer, f"data.chat_template: {chat_template}")
    elif tokenizer.chat_template:
        _check_syntax(tokenizer, f"model.tokenizer_path: the chat template in {path}")
    if template_date is not None:
        # A variable of the rendering hides transformers' global of that name; what a caller passes wins over both.
        now = datetime.fromisoformat(template_date).strftime
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=now)  # type: ignore[method-assign]
    return tokenizer


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the text of the chat template."""
    return hashlib.blake2b(repr(tokenizer.chat_template).encode(), digest_size=16).hexdigest()


def check_template(state: Mapping[str, object], present: str) -> None:
    """ValueError where the chat template, now ``present`` by its digest, is not that of a ``state`` which knows its own."""
    if state.get("template", present) != present:
        raise ValueError(f"data.chat_template: the chat template is another than when the state was saved; {GIVE_BACK}")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the vocabulary, the special tokens and how a text with everything in it is cut."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    cut = tokenizer.encode(_PROBE, add_special_tokens=False)
    return hashlib.blake2b(repr((vocabulary, special, cut)).encode(), digest_size=16).hexdigest()


def answer_decoder(
    tokenizer: PreTrainedTokenizerBase, model: str, stop_token_ids: Sequence[int], *, skip_special_tokens: bool
) -> Callable[[Sequence[int]], str]:
    """What turns an answer's ids into the text that verifiers see: with special tokens (``<think>`` may be one, and mean
    something) but for those that pad it or end it by the tokenizer, the files of the folder ``model`` or ``stop_token_ids``;
    without any where ``skip_special_tokens`` says so."""
    if skip_special_tokens:
        return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))
    aside = {tokenizer.eos_token_id, tokenizer.pad_token_id, *stop_token_ids, *end_ids(model)}
    return lambda ids: str(tokenizer.decode([token for token in ids if token not in aside], skip_special_tokens=False))


def end_ids(model: str) -> list[int]:
    """What ends an answer by the files of a model folder. ValueError for a file that cannot be read, or names what is no token of
    the vocabulary."""
    found: list[int] = []
    vocab_size = 2**63
    for file in (Path(model) / "config.json", Path(model) / "generation_config.json"):
        if not file.is_file():
            continue
        try:
            described = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"model.path: {file} is not readable JSON: {error}") from error
        if not isinstance(described, dict):
            raise ValueError(f"model.path: {file} must hold a JSON object, got {described!r:.200}")
        if isinstance(described.get("text_config"), dict):  # of a model that also sees
            described = described["text_config"] | described
        known = described.get("vocab_size")  # the first file's holds for the other too
        vocab_size = known if type(known) is int else vocab_size
        ends = described.get("eos_token_id")
        problem = tokens_problem("eos_token_id", ends, vocab_size)
        if problem is not None:
            raise ValueError(f"model.path: {file} has {problem}")
        found += ends if isinstance(ends, list) else [] if ends is None else [ends]
    return found


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a text that begins a sequence and is to be continued.

    The tokens that the tokenizer opens a text with (such as a beginning-of-sequence token) come first, once, whether or not
    the text spells them out; those that it closes one with are left away, for the sequence goes on.
    """
    ids, opening = encode_part(text, tokenizer), list(_opening(tokenizer))
    return ids if ids[: len(opening)] == opening else opening + ids


def encode_part(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a text and nothing else, as a chat template's, which writes its special tokens itself.

    Raises ValueError for what the tokenizer refuses.
    """
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # a tokenizer's backend raises whatever it likes
        raise ValueError(f"the tokenizer refuses the text: {type(error).__name__}: {error}") from error


def most_bytes(num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Texts of more bytes than this have more than ``num_tokens`` tokens; so tokenising them, which may take minutes, is
    not needed to know."""
    return num_tokens * max(_BYTES_A_TOKEN, _longest_token(tokenizer))


def is_surely_longer(text: str, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text has more tokens than these, by its length alone."""
    most = most_bytes(num_tokens, tokenizer)
    return len(text) * 4 > most and len(text.encode(errors="replace")) > most


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Tokens of a sequence, and whether longer ones are cut (to their beginning) rather than left out."""

    num_tokens: int
    may_cut: bool

    def kept(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What there is to tokenise of the text: of one that is surely longer its beginning, or nothing."""
        if not is_surely_longer(text, self.num_tokens, tokenizer):
            return text
        return text[: most_bytes(self.num_tokens, tokenizer)] if self.may_cut else ""


def _read_template(path: str) -> str:
    if not os.path.isfile(path):
        raise ValueError(f"data.chat_template: no such file: {path}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template: {path} cannot be read: {error}") from error


def _said(error: Exception) -> str:
    """What an exception says; one that says a bare name or nothing, with its kind."""
    return str(error) if " " in str(error) else f"{type(error).__name__} {error}".rstrip()


def _check_syntax(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """ValueError for a text that is no template, with its line. What a template refuses is a row's fault, and told by row."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"{what}:{error.lineno}: {error.message}") from error
    except Exception:  # whatever a template makes of a chat that is nobody's
        return


@lru_cache(maxsize=8)
def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before a text."""
    alone, whole = encode_part("a", tokenizer), list(tokenizer.encode("a"))
    starts = (start for start in range(len(whole)) if alone and whole[start : start + len(alone)] == alone)
    bos = tokenizer.bos_token_id
    return tuple(whole[: next(starts, int(bos is not None and whole[:1] == [bos]))])


@lru_cache(maxsize=8)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the longest token, or somewhat more: byte-level vocabularies spell some bytes by two."""
    return max((len(token.encode(errors="replace")) for token in tokenizer.get_vocab()), default=1)
