"""What a verifier is given: the answer as text and as a trajectory, and what it answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlx.types.rollout import FinishReason, Prompt, Trajectory

# Templates without special tokens of their own may write roles and borders of texts as tags, which are no part of an answer.
_OPEN_TAG = re.compile(r"<(?!(?:assistant|model|bot|ai|s|bos|sep)>)[a-z][\w-]*>\s*\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One trajectory with the text of its last turn, without what ends or pads it."""

    response: str
    trajectory: Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRequest:
    """One answer to be judged. ``response`` is the text of the last turn, without what ends or pads it; ``group`` has all answers
    to the prompt, in order, this one (whose trajectory is this very object) among them, where the verifier asks for it.

    Example: to a prompt that ends with ``<think>\\n``, the response ``so 4.</think>4`` has that ``opening`` and the ``text``
    ``<think>\\nso 4.</think>4``.
    """

    prompt: Prompt
    response: str
    trajectory: Trajectory
    group: tuple[Answer, ...] = ()

    @property
    def opening(self) -> str:
        """The tag that the prompt's tail opened in the answer's place, with the white space after it; mostly nothing."""
        found = _OPEN_TAG.search(self.prompt.text)
        return "" if found is None or len(self.trajectory.turns) > 1 else found.group()

    @property
    def text(self) -> str:
        """The answer as the model's sequence has it: what the prompt's tail opened, and the response."""
        return self.opening + self.response

    @property
    def messages(self) -> list[Mapping[str, object]]:
        """The conversation. A prompt that is a text counts as the user's message."""
        asked = self.prompt.messages or ({"role": "user", "content": self.prompt.text},)
        return [*asked, *(self.trajectory.messages or ({"role": "assistant", "content": self.text},))]

    @property
    def finish_reason(self) -> FinishReason:
        """How the last turn ended."""
        return self.trajectory.finish_reason
