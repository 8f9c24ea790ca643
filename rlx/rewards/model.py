"""A reward model behind SGLang's ``/classify``: ``sglang.launch_server --model-path RM --is-embedding``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlx.rewards.base import checked_reward, invalid
from rlx.rewards.remote import Batcher, Poster, RemoteError
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Reward


class ModelScorer:
    """The model's score of the whole trajectory (``url`` is the server's, with or without ``/classify``).

    Token ids are sent, so both models must share a tokenizer (``send_text`` true sends text instead). ``label_index`` picks
    among several outputs.
    """

    def __init__(
        self,
        *,
        url: str,
        label_index: int = 0,
        send_text: bool = False,
        batch_size: int = 32,
        max_wait_s: float = 0.02,
        **poster: Any,
    ) -> None:
        self._poster = Poster(url=url.removesuffix("/classify").rstrip("/") + "/classify", **poster)
        self._label_index, self._send_text = label_index, send_text
        self._batcher: Batcher[object] = Batcher(self._ask_all, batch_size, max_wait_s)

    def __call__(self, request: RewardRequest) -> Reward:
        if not self._send_text:
            return checked_reward(self._batcher.ask(request.trajectory.token_ids.tolist()))
        if len(request.trajectory.turns) > 1:
            return invalid("reward.args.send_text: of several turns only token ids can be sent")
        return checked_reward(self._batcher.ask(request.prompt.text + request.response))

    def _ask_all(self, questions: Sequence[object]) -> Sequence[float]:
        answer = self._poster.post({"text" if self._send_text else "input_ids": list(questions)})
        rows = answer if isinstance(answer, list) else [answer]
        try:
            return [row["embedding"][self._label_index] for row in rows]
        except (KeyError, IndexError, TypeError) as error:
            raise RemoteError(f"/classify answered {str(answer)[:200]!r}, expected embeddings of scores") from error
