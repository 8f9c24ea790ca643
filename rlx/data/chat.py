"""Chats: what a row may hold as messages and tools, and how the tokenizer's chat template writes them as text.

The one place where a template is called. What it cannot write is refused, as it would leave it out, or print Python's view of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlx.data.rows import without_nulls

Message = Mapping[str, object]
_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Messages, and the tools (JSON schemas) that they may call; None where the row names none."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, object]] | None = None


def read_messages(value: object, column: str) -> list[Message]:
    """``value`` as messages: each with a role, and content or something else to write, such as tool_calls. Null keys count
    as missing. ValueError when it is none."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"column {column!r} must be a list of role/content objects, got {_show(value)}")
    return [_read_message(one, f"column {column!r}: message {index}") for index, one in enumerate(value)]


def read_tools(value: object, column: str) -> list[Mapping[str, object]] | None:
    """``value`` as tools: a list of objects, or JSON text of one. None for no tools; ValueError when it is neither."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"column {column!r} (data.tools_key) must be a list of tools, or JSON of one: {error}") from None
    tools = without_nulls(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"column {column!r} (data.tools_key) must be a list of objects, got {_show(value)}")
    return tools


def says_something(message: Message) -> bool:
    """Whether a message has words or tool calls."""
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def for_template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The chat as the tokenizer's template takes it: parts of text become one text where it knows no parts.

    Raises ValueError for what the template has no place for: tools, tool calls, parts that are no text.
    """
    template = template_of(tokenizer, chat)
    if chat.tools and "tools" not in template:
        raise ValueError("the row has tools, but the chat template has no place for them (data.chat_template, data.tools_key)")
    if any(message.get("tool_calls") for message in chat.messages) and "tool_calls" not in template:
        raise ValueError("a message has tool_calls, but the chat template has no place for them (data.chat_template)")
    if not any(isinstance(message.get("content"), list) for message in chat.messages) or _takes_parts(tokenizer, template):
        return chat
    return replace(chat, messages=[_with_text(message, index) for index, message in enumerate(chat.messages)])


def template_of(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """The template that the chat is written by; ValueError where the tokenizer has none."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the row holds a chat, but the tokenizer has no chat template: set data.chat_template to a Jinja file,"
            " or give the row's prompt (and answer) as text"
        )
    return str(tokenizer.get_chat_template(None, cast(Any, chat.tools)))


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, opens_answer: bool = False) -> str:
    """The chat as text, with the opening of the assistant's answer if asked for. ValueError with the template's own words
    when it refuses the chat."""
    return cast(str, apply_template(chat, tokenizer, tokenize=False, add_generation_prompt=opens_answer))


def apply_template(chat: Chat, tokenizer: PreTrainedTokenizerBase, **options: Any) -> object:
    """``apply_chat_template`` under ``options``. A template is a program of others and may raise anything: always ValueError."""
    messages = [dict(message) for message in chat.messages]
    attempts = [messages]
    if not all("content" in message for message in messages):
        # Some templates ask for a content that is null rather than missing; others would print that null as "None".
        attempts.append([{"content": None, **message} for message in messages])
    failures = []
    for attempt in attempts:
        try:
            return tokenizer.apply_chat_template(cast(Any, attempt), tools=cast(Any, chat.tools), **options)
        except Exception as error:
            failures.append(error)
    said = str(failures[0]) if isinstance(failures[0], TemplateError) else f"{type(failures[0]).__name__}: {failures[0]}"
    raise ValueError(f"the chat template refuses the row: {said}") from failures[0]


def _read_message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise ValueError(f"{where} needs a role and content, got {_show(value)}")
    message = cast(dict[str, object], without_nulls(value))
    content = message.get("content")
    if content is None and not message.keys() - {"role", "name"}:
        raise ValueError(f"{where} needs a role and content (or tool_calls), got {_show(value)}")
    if isinstance(content, list):
        message["content"] = [_read_part(part, where) for part in content]
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where}: the content must be text or a list of parts, got {_show(content)}")
    return message


def _read_part(value: object, where: str) -> Mapping[str, object]:
    part = {"type": "text", "text": value} if isinstance(value, str) else value
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError(f'{where}: a part of the content must be an object with a type, as {{"type": "text", "text": ..}}')
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{where}: a part of type text holds no text: {_show(value)}")
    return part


def _with_text(message: Message, index: int) -> Message:
    """The message with its parts joined as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    other = next((part["type"] for part in content if part["type"] != "text"), None)
    if other is not None:
        raise ValueError(f"message {index} has a part of type {other!r}, but the chat template writes text alone")
    return {**message, "content": "".join(part["text"] for part in content)}


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template writes the text of a list of parts, found out by trying."""
    probe = Chat(messages=[{"role": "user", "content": [{"type": "text", "text": "PROBE"}]}])
    try:
        written = str(apply_template(probe, tokenizer, tokenize=False, chat_template=template))
    except ValueError:
        return False
    return "PROBE" in written and not any(key in written for key in ("'text'", '"text"'))


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
