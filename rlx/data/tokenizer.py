"""The tokenizer of a model folder, and prompts to token ids. Text becomes tokens here and nowhere else in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlx.config.schema import DataConfig

# Any one of these is enough for AutoTokenizer to build a tokenizer from a folder.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder ``path``; ``chat_template`` (a Jinja file) replaces its own template.

    Raises ValueError naming what is missing: the folder, its vocabulary, or the template file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"model.tokenizer_path: {path} is not a folder")
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise ValueError(f"model.tokenizer_path: {path} holds no tokenizer; expected one of {', '.join(_VOCABULARY_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.tokenizer_path: the tokenizer in {path} cannot be loaded: {error}") from error
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise ValueError(f"data.chat_template: no such file: {chat_template}")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def encode_prompt(row: Mapping[str, object], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Token ids and text of a row: its messages through the chat template with the assistant's opening, else its prompt.

    ``config.system_prompt`` goes before messages that do not begin with a system message, and makes a chat of a prompt.
    Raises ValueError for a row with neither, of the wrong type, or with messages the tokenizer has no template for.
    """
    messages, prompt = row.get(config.messages_key), row.get(config.prompt_key)
    if messages is None and config.system_prompt is not None and isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if messages is not None:
        text = _render(messages, config, tokenizer)
        # The template writes its own special tokens.
        return list(tokenizer.encode(text, add_special_tokens=False)), text
    if not isinstance(prompt, str):
        raise ValueError(f"column {config.prompt_key!r} must be text, got {type(prompt).__name__}")
    return list(tokenizer.encode(prompt)), prompt


def _render(messages: object, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"column {config.messages_key!r} holds a chat, but the tokenizer has no chat template:"
            " set data.chat_template to a Jinja file, or give the prompts as text"
        )
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"column {config.messages_key!r} must be a list of role/content objects, got {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"column {config.messages_key!r}: each message needs role and content, got {message!r}")
    has_system = messages[0]["role"] == "system"
    opening = [{"role": "system", "content": config.system_prompt}] if config.system_prompt and not has_system else []
    rendered = tokenizer.apply_chat_template([*opening, *messages], tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered
