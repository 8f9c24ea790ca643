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
    among several outputs; without it there must be one, as a server that knows no such reward model gives hidden states.
    """

    def __init__(
        self,
        *,
        url: str,
        label_index: int | None = None,
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
            outputs = [row["embedding"] for row in rows]
            if self._label_index is None and any(len(output) != 1 for output in outputs):
                raise RemoteError(
                    f"/classify answered {max(map(len, outputs))} numbers a sequence, expected one score: either the server does "
                    f"not know this kind of reward model, or reward.args.label_index says which number is the score"
                )
            return [output[self._label_index or 0] for output in outputs]
        except (KeyError, IndexError, TypeError) as error:
            raise RemoteError(f"/classify answered {str(answer)[:200]!r}, expected embeddings of scores") from error
